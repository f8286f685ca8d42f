//! Opening what commands work on: the repository and the hypervisor. Blocking work leaves the async side here.

use std::{path::PathBuf, sync::Arc};

use jiff::tz::TimeZone;
use virtward_decide::pointref;
use virtward_engine::{Destination, Dirs, Env};
use virtward_hypervisor::{Hypervisor, host_of, libvirt::Libvirt};
use virtward_model::RestorePoint;
use virtward_repo::{Error as RepoError, KeyInfo, Repository, Secret, Store, store};

use crate::{
    app::App,
    config::Settings,
    exit::{Failure, Kind},
    out, render, secret,
    view::Holds,
};

/// Runs blocking work on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Failure::new(Kind::Other, format!("a worker thread ended early: {error}"))),
    }
}

/// Opens a store. What waits for it to come back is told when the job is cancelled.
pub fn open_store(app: &App, location: &str) -> Result<Arc<dyn Store>, Failure> {
    let store = store::open_with(location, &app.settings.store)?;
    store.heed(&app.cancel.flag());
    Ok(store)
}

/// The store of a repository, which is looked at before a secret is asked for: nobody likes typing a password for a path
/// that is wrong. A repository that has lost its `config` still has its keys.
pub fn store(app: &App) -> Result<Arc<dyn Store>, Failure> {
    let location = app.settings.repo.clone();
    let store = open_store(app, &location)?;
    if matches!(store.exists("config"), Ok(false)) {
        let mut keys = 0;
        store.list("keys/", &mut |_| {
            keys += 1;
            Ok(())
        })?;
        if keys == 0 {
            return Err(RepoError::NotARepository { location }.into());
        }
    }
    Ok(store)
}

/// Opens the repository with whatever secret was named, lies in the default place, or is typed.
pub async fn repository(app: &App) -> Result<Repository, Failure> {
    repository_and_secret(app).await.map(|(repository, _)| repository)
}

/// The same, with the secret that opened it.
pub async fn repository_and_secret(app: &App) -> Result<(Repository, Secret), Failure> {
    let location = app.settings.repo.clone();
    // Who opens it with what is at hand finds out by that whether it is there.
    let store = match secret::is_at_hand(app) {
        true => open_store(app, &location)?,
        false => self::store(app)?,
    };
    let found = secret::find(app)?;
    let (first, by_default, origin) = (found.secret, found.by_default, found.origin);
    let (attempt, secret) = (store.clone(), first.clone());
    let opened = blocking(move || Ok(Repository::open(attempt, &secret))).await?;
    match opened {
        Ok(repository) => Ok((repository, first)),
        Err(RepoError::WrongSecret { .. }) if by_default && out::can_ask() => {
            app.progress.note(&format!("{origin} does not open {location}"));
            let typed = secret::typed(&format!("Password of {location}: "))?;
            blocking(move || Ok((Repository::open(store, &typed.secret)?, typed.secret))).await
        }
        Err(error @ RepoError::WrongSecret { .. }) => {
            let hint = format!("{origin} was tried; name another one with --password-file or --key-file");
            Err(Failure::from(error).hint(hint))
        }
        Err(error) => Err(error.into()),
    }
}

/// Opens another repository: with its own secret if one was named, else with the one that opened the first.
pub async fn other(app: &App, location: &str, own: &OtherSecret, first: Secret) -> Result<Repository, Failure> {
    let (secret, origin) = match (&own.password_file, &own.key_file) {
        (Some(path), _) => secret::password_file(app, path).map(|found| (found.secret, found.origin))?,
        (None, Some(path)) => secret::key_file(app, path).map(|found| (found.secret, found.origin))?,
        (None, None) => (first, format!("the secret of {}", app.settings.repo)),
    };
    let store = open_store(app, location)?;
    match blocking(move || Ok(Repository::open(store, &secret))).await? {
        Err(error @ RepoError::WrongSecret { .. }) => {
            let hint = format!("{origin} was tried; name another one with {}", own.flags);
            Err(Failure::from(error).hint(hint))
        }
        opened => Ok(opened?),
    }
}

/// What opens another repository, as far as it was said.
pub struct OtherSecret {
    /// File with its password.
    pub password_file: Option<PathBuf>,
    /// Its key file.
    pub key_file: Option<PathBuf>,
    /// The flags that name them, for messages.
    pub flags: &'static str,
}

/// Fails with the names of keys that would do if the key in use can write and not read.
pub async fn readable(repository: &Repository) -> Result<(), Failure> {
    if repository.can_restore() {
        return Ok(());
    }
    let listing = repository.clone();
    let keys = blocking(move || Ok(listing.list_keys()?)).await?;
    let name = |key: &KeyInfo| match &*key.label {
        "" => format!("{} ({})", key.id, render::word(&key.kind)),
        label => format!("{label:?} ({}, {})", render::word(&key.kind), key.id),
    };
    let full: Vec<String> = keys.iter().filter(|key| !key.write_only).map(name).collect();
    Err(Failure::new(Kind::WrongSecret, "the key in use can write backups and not read them")
        .hint(format!("use one of these keys: {}", full.join(", "))))
}

/// All holds. One that cannot be read holds too, and is warned of by `repo check`.
pub async fn holds(repository: &Repository) -> Result<Holds, Failure> {
    let repository = repository.clone();
    blocking(move || Ok(repository.holds()?)).await
}

/// Every restore point that can be read, oldest first. The others are warned of.
pub async fn points(app: &App, repository: &Repository) -> Result<Vec<RestorePoint>, Failure> {
    let repository = repository.clone();
    let listing = blocking(move || Ok(repository.points()?)).await?;
    for (object, error) in listing.unreadable {
        app.progress.warn(&format!("restore point {object} cannot be read: {}", Failure::from(error).message));
    }
    Ok(listing.points)
}

/// The restore point that a person means; says which one it is where that is not obvious.
pub fn point<'a>(app: &App, all: &'a [RestorePoint], text: &str) -> Result<&'a RestorePoint, Failure> {
    if all.is_empty() {
        return Err(Failure::new(Kind::NotFound, format!("there are no restore points in {}", app.settings.repo))
            .hint("virtward backup run makes one"));
    }
    let resolved = pointref::resolve(all, text, &TimeZone::system())?;
    let point = resolved.point;
    if text.contains('@') {
        let taken = render::exact_time(point.taken);
        app.progress.note(&format!("{text} is {} of {}, taken {taken}", pointref::short_id(all, point), point.vm));
    }
    if let Some(note) = resolved.note {
        app.progress.warn(&note);
    }
    Ok(point)
}

/// Connects to the libvirt of the settings.
pub async fn hypervisor(app: &App) -> Result<Arc<dyn Hypervisor>, Failure> {
    libvirt(app, &app.settings.connect).await
}

/// Connects to another host: by its URI, or by its name the way this one is reached.
pub async fn destination(app: &App, to: &str, address: Option<&str>) -> Result<Destination, Failure> {
    let uri = host_uri(&app.settings.connect, to);
    let address = address.map(str::to_owned).or_else(|| host_of(&uri).map(str::to_owned));
    Ok(Destination { hypervisor: libvirt(app, &uri).await?, uri, address })
}

/// The URI of a host that is named like this, reached like the first one; over SSH if that is local.
fn host_uri(connect: &str, to: &str) -> String {
    if to.contains("://") {
        return to.to_owned();
    }
    match host_of(connect) {
        Some(host) => connect.replacen(host, to, 1),
        None => format!("qemu+ssh://{to}/system"),
    }
}

async fn libvirt(app: &App, uri: &str) -> Result<Arc<dyn Hypervisor>, Failure> {
    let connecting = Libvirt::connect(uri);
    tokio::select! {
        connected = connecting => match connected {
            Ok(libvirt) => Ok(Arc::new(libvirt)),
            Err(error) => {
                let inner = Failure::from(error);
                Err(Failure { message: format!("cannot reach the hypervisor at {uri}: {}", inner.message), ..inner })
            }
        },
        () = app.cancel.cancelled() => Err(Failure::new(Kind::Cancelled, "cancelled")),
    }
}

/// What a job needs.
pub fn env(app: &App, hypervisor: Arc<dyn Hypervisor>) -> Env {
    Env { hypervisor, uri: app.settings.connect.clone(), dirs: dirs(&app.settings), thaw_guard: Some(thaw_guard()) }
}

/// The directories of jobs.
pub fn dirs(settings: &Settings) -> Dirs {
    let defaults = Dirs::default();
    Dirs {
        runtime: settings.runtime_dir.clone().unwrap_or(defaults.runtime),
        scratch: settings.scratch_dir.clone().unwrap_or(defaults.scratch),
    }
}

/// How a helper that thaws is started.
pub fn thaw_guard() -> Vec<String> {
    // An upgrade may have replaced the file that this process was started from; the process itself can still be found.
    let program = std::env::current_exe().ok().filter(|program| program.exists());
    let program = program.and_then(|program| program.into_os_string().into_string().ok());
    let program = program.unwrap_or_else(|| "/proc/self/exe".into());
    vec![program, "internal".into(), "thaw-guard".into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_reached_the_way_this_one_is() {
        assert_eq!(host_uri("qemu:///system", "h2"), "qemu+ssh://h2/system");
        assert_eq!(
            host_uri("qemu+tls://root@h1:16514/system?pkipath=/p", "h2"),
            "qemu+tls://root@h2:16514/system?pkipath=/p"
        );
        assert_eq!(host_uri("qemu:///system", "qemu+tcp://h3/system"), "qemu+tcp://h3/system");
        assert_eq!(host_of("qemu+unix:///system?socket=/run/s"), None);
        assert_eq!(host_of("qemu+tcp://[fd00::1]:16509/system"), Some("fd00::1"));
        assert_eq!(host_of("qemu+ssh://admin@h2/system"), Some("h2"));
    }
}
