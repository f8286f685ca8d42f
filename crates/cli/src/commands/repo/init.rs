//! `virtward repo init`: a new repository, with a password, an existing key file, or a key file made on the spot.

use std::path::{Path, PathBuf};

use virtward_repo::{InitOptions, Repository, Secret};

use crate::{
    app::App,
    config::SecretSource,
    connect::{blocking, open_store},
    exit::Failure,
    out,
    secret::{self, NewKeyFile},
};

/// Arguments of `repo init`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The repository is always encrypted. What opens it is, in this order: the file
named by --password-file or --key-file (a key file that does not exist is made),
the same by environment or configuration, a password typed on a terminal, or a
random key in /etc/virtward/repo.key, which later commands find by themselves.

Examples:
  virtward repo init
  virtward repo init --repo /mnt/vms --password-file /root/backup.pw
  virtward repo init --repo /mnt/vms --key-file /root/backup.key
  virtward repo init --repo /mnt/vms --sealed     see virtward repo key add --write-only")]
pub struct Args {
    /// Seal data to a public key, so that hosts can be given keys that write and cannot read
    #[arg(long)]
    pub sealed: bool,
}

/// How the new repository will be opened.
struct Chosen {
    secret: Secret,
    key: Option<(PathBuf, Option<NewKeyFile>)>,
}

/// Creates the repository.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let store = open_store(app, &app.settings.repo)?;
    let Chosen { secret, key } = choose(app)?;
    let options = InitOptions { sealed: args.sealed, ..InitOptions::default() };
    let repository = blocking(move || Ok(Repository::init(store, &secret, &options)?)).await?;
    let info = blocking(move || Ok(repository.info()?)).await?;
    let made = matches!(key, Some((_, Some(_))));
    let path = key.map(|(path, made)| {
        if let Some(made) = made {
            made.keep();
        }
        path
    });
    if app.json {
        return out::json(&serde_json::json!({
            "repo": app.settings.repo,
            "id": info.id.to_string(),
            "format": info.format,
            "key_file": path.as_deref().map(Path::display).map(|path| path.to_string()),
            "key_file_created": made,
        }));
    }
    out::text(&format!("created repository {} ({})\n", app.settings.repo, info.id))?;
    match (path, made) {
        (Some(path), true) => out::text(&loud(&path)),
        (Some(path), false) => out::text(&format!("it opens with the key in {}\n", path.display())),
        (None, _) => Ok(()),
    }
}

fn choose(app: &App) -> Result<Chosen, Failure> {
    let found = |secret| Chosen { secret, key: None };
    match &app.settings.secret {
        SecretSource::PasswordFile(path) => Ok(found(secret::password_file(app, path)?.secret)),
        SecretSource::KeyFile(path) => key(app, path),
        SecretSource::Default(path) => {
            if out::can_ask() && !app.json {
                let question = format!(
                    "Password for the new repository {} (empty: a key file, {}): ",
                    app.settings.repo,
                    path.display()
                );
                if let Some(secret) = secret::new_password(&question)? {
                    return Ok(found(secret));
                }
            }
            key(app, path)
        }
    }
}

/// The key in this file, which is made if it is not there.
fn key(app: &App, path: &Path) -> Result<Chosen, Failure> {
    if path.exists() {
        let secret = secret::key_file(app, path)?.secret;
        return Ok(Chosen { secret, key: Some((path.to_owned(), None)) });
    }
    let (made, secret) = NewKeyFile::create(path)?;
    Ok(Chosen { secret, key: Some((path.to_owned(), Some(made))) })
}

fn loud(path: &Path) -> String {
    let path = path.display();
    format!(
        "\n\
         ** A new key was made: {path}\n\
         ** Without it NOTHING in this repository can ever be read again.\n\
         ** Copy it now to a place that does not burn with this host (a password manager, a printed page),\n\
         ** or add a password as a second way in: virtward repo key add\n"
    )
}
