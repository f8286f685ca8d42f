//! `virtward repo key`: the passwords and key files that open a repository. Any one of them opens all of it.

use std::path::PathBuf;

use virtward_repo::{KdfCost, KeyInfo, Repository, Secret};

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
}

/// Arguments of `repo key add`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The repository is opened as usual (--password-file, --key-file); the new secret
is asked for on the terminal unless one of the --new options names it.

Examples:
  virtward repo key add --label 'safe in the office'
  virtward repo key add --new-key-file /media/usb/virtward.key
  virtward repo key add --new-password-file /root/second.pw")]
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
    }
}

async fn add(app: &App, args: &AddArgs) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let (secret, made) = new_secret(app, args)?;
    let label = args.label.clone();
    let info = blocking(move || Ok(repository.add_key(&secret, &label, KdfCost::default())?)).await?;
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

async fn list(app: &App) -> Result<(), Failure> {
    let keys = keys(&connect::repository(app).await?).await?;
    if app.json {
        return out::json(&keys);
    }
    let mut table = Table::new(&["KEY", "KIND", "CREATED", "LABEL"]);
    for key in &keys {
        table.row([key.id.to_string(), render::word(&key.kind), render::local_time(key.created), key.label.clone()]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
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
