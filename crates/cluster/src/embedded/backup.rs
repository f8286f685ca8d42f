//! Copies of the file, made by themselves, and the way back from one.
//!
//! A copy appears under its name complete, synced and checked, or not at all. A restore moves the damaged file aside
//! and deletes nothing.

use std::{
    fmt,
    fs::{self, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use jiff::{Timestamp, tz::TimeZone};

use super::{file::File, guard::Guard};
use crate::{
    core::History,
    error::{Error, Result},
    store::Revision,
};

/// How far history jumps at a restore: further than any store gets between a backup and the restore, so that no
/// revision that was given out, as a fencing number for example, is given out again.
const JUMP: u64 = 1 << 32;
const TIME_FORMAT: &str = "%Y%m%dT%H%M%SZ";

/// An automatic copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The file.
    pub path: PathBuf,
    /// When it was made, by the host's clock.
    pub made: Timestamp,
    /// Size in bytes.
    pub bytes: u64,
}

impl fmt::Display for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (of {}, {} bytes)", self.path.display(), self.made, self.bytes)
    }
}

/// Where the copies of a state file are: a directory beside it.
fn directory(path: &Path) -> PathBuf {
    path.with_extension("backups")
}

/// The automatic copies of a state file, newest first.
pub fn backups(path: &Path) -> Vec<Backup> {
    let Ok(entries) = fs::read_dir(directory(path)) else { return Vec::new() };
    let mut found: Vec<Backup> = entries
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let name = path.file_name()?.to_str()?.strip_suffix(".db")?;
            let made = jiff::civil::DateTime::strptime(TIME_FORMAT, name.split('-').next()?).ok()?;
            let made = made.to_zoned(TimeZone::UTC).ok()?.timestamp();
            let bytes = entry.metadata().ok()?.len();
            Some(Backup { path, made, bytes })
        })
        .collect();
    found.sort_by(|a, b| b.path.cmp(&a.path));
    found
}

/// Gives an error about a state file the advice that helps: which copies there are, and how to go back to one.
pub(super) fn advise(path: &Path, error: Error) -> Error {
    let Error::Corrupt { path: damaged, what, .. } = error else { return error };
    Error::Corrupt { path: damaged, what, remedy: remedy(path) }
}

pub(super) fn remedy(path: &Path) -> String {
    let found = backups(path);
    let Some(newest) = found.first() else {
        return "there is no automatic backup of it; bring back a copy or an export that is kept elsewhere: virtward \
                state restore FILE"
            .into();
    };
    let list: Vec<String> = found.iter().take(5).map(|backup| format!("  {backup}")).collect();
    format!(
        "automatic backups, newest first:\n{}\nbring the newest back with: virtward state restore {}\nthe damaged file is \
         kept",
        list.join("\n"),
        newest.path.display()
    )
}

/// Makes a copy, checks it, and removes the oldest beyond `keep`.
pub(super) fn make(file: &File, path: &Path, revision: Revision, label: &str, keep: usize) -> Result<Backup> {
    let dir = directory(path);
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io("create", &dir)(error));
        }
        _ => {}
    }
    let made = Timestamp::now();
    let name = format!("{}-r{}{label}.db", made.to_zoned(TimeZone::UTC).strftime(TIME_FORMAT), revision.0);
    let (staged, target) = (dir.join("incomplete"), dir.join(name));
    let result = copy(file, &staged, &target, &dir);
    if result.is_err() {
        let _ = fs::remove_file(&staged);
    }
    let bytes = result?;
    for old in backups(path).iter().skip(keep.max(1)) {
        if let Err(error) = fs::remove_file(&old.path) {
            tracing::warn!(path = %old.path.display(), %error, "an old backup of the cluster's state stays");
        }
    }
    Ok(Backup { path: target, made, bytes })
}

fn copy(file: &File, staged: &Path, target: &Path, dir: &Path) -> Result<u64> {
    create_empty(staged)?;
    file.copy_to(staged).map_err(|error| Error::Full {
        location: staged.display().to_string(),
        what: format!("the automatic backup failed: {error}"),
    })?;
    // A backup that cannot be read is found out now, not on the day that it is needed.
    File::open(staged, History::default())?.0.close().map_err(|what| Error::unavailable("backup", what))?;
    let copied = OpenOptions::new().read(true).open(staged).map_err(Error::io("open", staged))?;
    copied.sync_all().map_err(Error::io("sync", staged))?;
    fs::rename(staged, target).map_err(Error::io("rename", staged))?;
    sync_dir(dir)?;
    copied.metadata().map(|data| data.len()).map_err(Error::io("examine", target))
}

/// An empty file that nobody else may read.
pub(super) fn create_empty(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path)(error)),
        _ => {}
    }
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    created.map(|_| ()).map_err(Error::io("create", path))
}

pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Where the file that was there before is now.
    pub set_aside: Option<PathBuf>,
    /// Revision that the store goes on from.
    pub revision: Revision,
}

/// Puts a copy in the place of a state file that no process uses. What was there is set aside, not deleted. Revisions
/// go on far above those of the copy, so that none is given out twice; watches from before have to list again.
pub fn restore_backup(path: &Path, backup: &Path) -> Result<Restored> {
    let _guard = if path.exists() { Some(Guard::take(path)?) } else { None };
    let staged = path.with_extension("restoring");
    create_empty(&staged)?;
    let result = stage(backup, &staged);
    if result.is_err() {
        let _ = fs::remove_file(&staged);
    }
    let revision = result?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let set_aside = path.exists().then(|| {
        let now = Timestamp::now().to_zoned(TimeZone::UTC);
        path.with_extension(format!("damaged-{}", now.strftime(TIME_FORMAT)))
    });
    if let Some(aside) = &set_aside {
        // Its journal belongs to it and must not be played back into the new file.
        for suffix in ["-journal", ""] {
            let (from, to) = (with_suffix(path, suffix), with_suffix(aside, suffix));
            if from.exists() {
                fs::rename(&from, &to).map_err(Error::io("rename", &from))?;
            }
        }
    }
    fs::rename(&staged, path).map_err(Error::io("rename", &staged))?;
    sync_dir(dir)?;
    Ok(Restored { set_aside, revision })
}

fn stage(backup: &Path, staged: &Path) -> Result<Revision> {
    fs::copy(backup, staged).map_err(Error::io("copy", backup))?;
    fs::set_permissions(staged, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(Error::io("change permissions of", staged))?;
    let (mut file, core) = File::open(staged, History::default())?;
    let revision = Revision(core.revision().0.saturating_add(JUMP).min(i64::MAX as u64));
    let location = staged.display().to_string();
    file.jump(&core, revision).map_err(|error| Error::unavailable(&location, error.to_string()))?;
    file.close().map_err(|what| Error::unavailable(&location, what))?;
    fs::File::open(staged).and_then(|file| file.sync_all()).map_err(Error::io("sync", staged))?;
    Ok(revision)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
