//! `virtward repo key`: the passwords and key files that open a repository. Any one of them opens all of it, but for
//! write-only ones.

use std::path::PathBuf;

use virtward_repo::{Error as RepoError, KdfCost, KeyInfo, Repository, RotateOptions, Secret};

use crate::{
    app::App,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    render::{self, Table},
    secret::{self, NewKeyFile},
};

/// The verbs of keys.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Add a password or a key file as another way in
    Add(AddArgs),
    /// List the ways in
    List(ListArgs),
    /// Remove a way in
    Remove(RemoveArgs),
    /// Make new keys for what is written from now on
    Rotate(RotateArgs),
}

/// Arguments of `repo key add`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The repository is opened as usual (--password-file, --key-file); the new secret
is asked for on the terminal unless one of the --new options names it.

Examples:
  virtward repo key add --label 'safe in the office'
  virtward repo key add --new-key-file /media/usb/virtward.key
  virtward repo key add --new-password-file /root/second.pw
  virtward repo key add --write-only --new-key-file /root/host7.key --label host7")]
pub struct AddArgs {
    /// File whose first line is the new password
    #[arg(long, value_name = "FILE", conflicts_with = "new_key_file")]
    pub new_password_file: Option<PathBuf>,
    /// New key file; created with a random key if it does not exist
    #[arg(long, value_name = "FILE")]
    pub new_key_file: Option<PathBuf>,
    /// What to call it in lists
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// A key for a host that backs up: it can write, list and verify, and cannot read a disk
    #[arg(long)]
    pub write_only: bool,
}

/// Arguments of `repo key rotate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Nothing is encrypted again: what is stored stays readable with the older keys,
which every password and key file goes on opening. What is written from now on
needs the new ones. These are not wrapped for the old keys, so that whoever got
hold of those is shut out; therefore every password and key file that is to open
the repository afterwards must be named. Runs that go on end with an error if
they meet something new; run them again.

Examples:
  virtward repo key rotate --and-key-file /root/host7.key --and-password-file /root/second.pw
  virtward repo key rotate --drop-other-keys
  virtward repo key rotate --sealed --drop-other-keys")]
pub struct RotateArgs {
    /// File with a further password that stays; may be repeated
    #[arg(long, value_name = "FILE")]
    pub and_password_file: Vec<PathBuf>,
    /// Further key file that stays; may be repeated
    #[arg(long, value_name = "FILE")]
    pub and_key_file: Vec<PathBuf>,
    /// Remove every other password and key file
    #[arg(long)]
    pub drop_other_keys: bool,
    /// Seal data to a public key from now on: see virtward repo key add --write-only
    #[arg(long)]
    pub sealed: bool,
}

/// Arguments of `repo key list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward repo key list
  virtward repo key list --json")]
pub struct ListArgs {}

/// Arguments of `repo key remove`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The last key cannot be removed.

Examples:
  virtward repo key remove 4f1c09d2")]
pub struct RemoveArgs {
    /// Key, as virtward repo key list shows it, or the beginning of it
    #[arg(value_name = "KEY")]
    pub key: String,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Add(args) => add(app, args).await,
        Command::List(_) => list(app).await,
        Command::Remove(args) => remove(app, args).await,
        Command::Rotate(args) => rotate(app, args).await,
    }
}

async fn add(app: &App, args: &AddArgs) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let (secret, made) = new_secret(app, args)?;
    let (label, write_only) = (args.label.clone(), args.write_only);
    let add = move || match write_only {
        true => repository.add_write_only_key(&secret, &label, KdfCost::default()),
        false => repository.add_key(&secret, &label, KdfCost::default()),
    };
    let info = blocking(move || Ok(add()?)).await?;
    if let Some(made) = made {
        made.keep();
    }
    match app.json {
        true => out::json(&info),
        false => out::text(&format!("added key {} ({})\n", info.id, render::word(&info.kind))),
    }
}

fn new_secret(app: &App, args: &AddArgs) -> Result<(Secret, Option<NewKeyFile>), Failure> {
    match (&args.new_password_file, &args.new_key_file) {
        (Some(path), _) => Ok((secret::password_file(app, path)?.secret, None)),
        (None, Some(path)) if path.exists() => Ok((secret::key_file(app, path)?.secret, None)),
        (None, Some(path)) => NewKeyFile::create(path).map(|(made, secret)| (secret, Some(made))),
        (None, None) if out::can_ask() => match secret::new_password("New password: ")? {
            Some(secret) => Ok((secret, None)),
            None => Err(Failure::new(Kind::Usage, "the new password is empty").hint("nothing was changed")),
        },
        (None, None) => Err(Failure::new(Kind::Usage, "no new password or key was given")
            .hint("name one with --new-password-file or --new-key-file, or run on a terminal to be asked")),
    }
}

async fn rotate(app: &App, args: &RotateArgs) -> Result<(), Failure> {
    let (repository, secret) = connect::repository_and_secret(app).await?;
    connect::readable(&repository).await?;
    let mut others = Vec::new();
    for path in &args.and_password_file {
        others.push(secret::password_file(app, path)?.secret);
    }
    for path in &args.and_key_file {
        others.push(secret::key_file(app, path)?.secret);
    }
    let options =
        RotateOptions { others, drop_others: args.drop_other_keys, sealed: args.sealed, kdf: KdfCost::default() };
    let rotated = blocking(move || Ok(repository.rotate_keys(&secret, &options))).await?;
    let rotated = rotated.map_err(|error| match error {
        RepoError::KeysLeft { .. } => {
            Failure::from(error).hint("name them with --and-password-file and --and-key-file, or use --drop-other-keys")
        }
        RepoError::WrongSecret { .. } => {
            Failure::from(error).hint("one of the files named opens no key of this repository; nothing was changed")
        }
        error => error.into(),
    })?;
    if app.json {
        return out::json(&rotated);
    }
    out::text(&format!("keys of generation {} are in use\n", rotated.generation))?;
    for key in &rotated.dropped {
        out::text(&render::printable(&format!("removed key {} {}", key.id, key.label)))?;
        out::text("\n")?;
    }
    out::text(&table(&rotated.keys).render(out::stdout_is_terminal()))
}

async fn list(app: &App) -> Result<(), Failure> {
    let keys = keys(&connect::repository(app).await?).await?;
    if app.json {
        return out::json(&keys);
    }
    out::text(&table(&keys).render(out::stdout_is_terminal()))
}

fn table(keys: &[KeyInfo]) -> Table {
    let mut table = Table::new(&["KEY", "KIND", "CREATED", ">GENERATION", "CAN", "LABEL"]);
    for key in keys {
        table.row([
            key.id.to_string(),
            render::word(&key.kind),
            render::local_time(key.created),
            key.generation.to_string(),
            if key.write_only { "write" } else { "write, read" }.into(),
            key.label.clone(),
        ]);
    }
    table
}

async fn remove(app: &App, args: &RemoveArgs) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let keys = keys(&repository).await?;
    let wanted = args.key.to_ascii_lowercase();
    let found: Vec<&KeyInfo> = keys.iter().filter(|key| key.id.to_string().starts_with(&wanted)).collect();
    let id = match found[..] {
        [key] if !wanted.is_empty() => key.id,
        [] => {
            return Err(Failure::new(Kind::NotFound, format!("there is no key {}", args.key))
                .hint("virtward repo key list shows them"));
        }
        _ => {
            return Err(Failure::new(
                Kind::Refused,
                format!("{:?} is the beginning of {} keys", args.key, found.len()),
            )
            .hint("write more digits"));
        }
    };
    blocking(move || Ok(repository.remove_key(&id)?)).await?;
    match app.json {
        true => out::json(&serde_json::json!({ "removed": id.to_string() })),
        false => out::text(&format!("removed key {id}\n")),
    }
}

async fn keys(repository: &Repository) -> Result<Vec<KeyInfo>, Failure> {
    let repository = repository.clone();
    blocking(move || Ok(repository.list_keys()?)).await
}
