//! Putting restored files where they belong, all or nothing.
//!
//! Files are written in a staging directory beside their destination and moved when complete, so a restore that is
//! killed leaves no half disk under a real name. The staging directory is locked while its owner lives; the next
//! restore into the same directory removes those whose owner is gone.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use uuid::Uuid;

use crate::{Error, Result};

const STAGING: &str = ".virtward-restore-";
/// Not a name that a disk would have.
const LOCK: &str = ".virtward-lock";

/// A directory for files that are not ready yet.
pub(super) struct Staging {
    dir: PathBuf,
    _lock: File,
}

impl Staging {
    /// Creates one in `destination`, which must exist, after clearing abandoned ones.
    pub(super) fn create(destination: &Path) -> Result<Self> {
        clear_abandoned(destination);
        let context = || {
            format!(
                "create a directory for unfinished files in {} (it must exist and be writable)",
                destination.display()
            )
        };
        loop {
            let dir = destination.join(format!("{STAGING}{}", Uuid::new_v4().simple()));
            // What is in it is readable for nobody else until it has the owner and mode that it is to have.
            std::fs::DirBuilder::new().mode(0o700).create(&dir).map_err(Error::io(context()))?;
            let lock = File::create(dir.join(LOCK)).map_err(Error::io(context()))?;
            lock.lock().map_err(Error::io(context()))?;
            // Somebody may have taken it for abandoned before it was locked.
            if dir.join(LOCK).exists() {
                return Ok(Self { dir, _lock: lock });
            }
        }
    }

    /// Where to write the file that will be called `name`.
    pub(super) fn file(&self, name: &OsStr) -> PathBuf {
        self.dir.join(name)
    }

    /// Names of the finished files: everything beside the main file (extents of a split image), then the main file.
    fn contents(&self, main: &OsStr) -> Result<Vec<OsString>> {
        let context = || format!("list {}", self.dir.display());
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(Error::io(context()))? {
            let name = entry.map_err(Error::io(context()))?.file_name();
            if name != LOCK && name != main {
                names.push(name);
            }
        }
        names.sort();
        names.push(main.to_owned());
        Ok(names)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn clear_abandoned(destination: &Path) {
    let Ok(entries) = std::fs::read_dir(destination) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(STAGING) {
            continue;
        }
        // Unlocked means that its owner is dead. Without a lock file it is being made, or is not ours.
        let Ok(lock) = File::open(entry.path().join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Files moved into place, that can still be taken back.
#[derive(Default)]
pub(super) struct Placed {
    /// New file, and where the file that it replaced went.
    moves: Vec<(PathBuf, Option<PathBuf>)>,
}

impl Placed {
    /// Moves a finished file (and its extents) to `destination`.
    pub(super) fn place(&mut self, staging: &Staging, destination: &Path, overwrite: bool) -> Result<()> {
        let parent = destination.parent().unwrap_or(Path::new("/"));
        for name in staging.contents(file_name(destination)?)? {
            self.place_one(&staging.file(&name), parent, &name, overwrite)?;
        }
        sync_dir(parent)
    }

    fn place_one(&mut self, from: &Path, parent: &Path, name: &OsStr, overwrite: bool) -> Result<()> {
        let to = parent.join(name);
        let context = || format!("move a restored file to {}", to.display());
        let old = to.symlink_metadata().ok().filter(|_| overwrite);
        let Some(old) = old else {
            set_mode(from, 0o600).map_err(Error::io(context()))?;
            rename_new(from, &to).map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => exists(&to),
                _ => Error::io(context())(error),
            })?;
            self.moves.push((to, None));
            return Ok(());
        };
        replaceable(&to)?;
        // Whoever could use the old file must be able to use the new one.
        let _ = std::os::unix::fs::chown(from, Some(old.uid()), Some(old.gid()));
        set_mode(from, if old.is_file() { old.mode() & 0o777 } else { 0o600 }).map_err(Error::io(context()))?;
        let aside = parent.join(aside_name(name));
        // With a second name for the old file there is, at every moment, a whole file under the real name.
        if std::fs::hard_link(&to, &aside).is_err() {
            std::fs::rename(&to, &aside).map_err(Error::io(context()))?;
        }
        if let Err(error) = std::fs::rename(from, &to) {
            let _ = std::fs::rename(&aside, &to);
            let _ = std::fs::remove_file(&aside);
            return Err(Error::io(context())(error));
        }
        self.moves.push((to, Some(aside)));
        Ok(())
    }

    /// Everything is in place for good: what was replaced goes.
    pub(super) fn keep(mut self) {
        for (_, replaced) in self.moves.drain(..) {
            if let Some(aside) = replaced {
                let _ = std::fs::remove_file(aside);
            }
        }
    }
}

impl Drop for Placed {
    /// Takes everything back.
    fn drop(&mut self) {
        for (path, replaced) in self.moves.drain(..).rev() {
            let _ = match replaced {
                Some(aside) => std::fs::rename(aside, path),
                None => std::fs::remove_file(path),
            };
        }
    }
}

/// The refusal to overwrite.
pub(super) fn exists(path: &Path) -> Error {
    Error::Refused(format!("{} exists; choose another place, or replace it with --overwrite", path.display()))
}

/// Whether a restore may replace what is at `path`: only files (or links to them), and only if nobody uses them.
pub(super) fn replaceable(path: &Path) -> Result<()> {
    let Ok(meta) = std::fs::metadata(path) else { return Ok(()) };
    if !meta.is_file() {
        return Err(Error::Refused(format!("{} is not a file, so it is not replaced", path.display())));
    }
    // QEMU locks the images that it has open. A lock of this kind goes when any descriptor of the file is closed.
    let Ok(file) = File::options().read(true).write(true).open(path) else { return Ok(()) };
    match rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => Err(Error::Busy(format!(
            "{} is in use by another process, probably a running VM; shut it down, or choose another place",
            path.display()
        ))),
        // Where locks do not work there is nothing to learn from them.
        _ => Ok(()),
    }
}

/// Where a replaced file waits until the restore has succeeded.
fn aside_name(name: &OsStr) -> OsString {
    const NAME_BYTES_MAX: usize = 200;
    let name = name.as_bytes();
    let mut aside = b".".to_vec();
    aside.extend_from_slice(&name[..name.len().min(NAME_BYTES_MAX)]);
    aside.extend_from_slice(format!(".virtward-replaced-{}", Uuid::new_v4().simple()).as_bytes());
    OsString::from_vec(aside)
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// The last component of a path.
pub(super) fn file_name(path: &Path) -> Result<&OsStr> {
    path.file_name().ok_or_else(|| Error::Refused(format!("{} is not a file name", path.display())))
}

fn rename_new(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems (NFS) cannot rename without replacing; a hard link cannot replace either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            std::fs::hard_link(from, to).and_then(|()| std::fs::remove_file(from))
        }
        done => done.map_err(std::io::Error::from),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(format!("make {} durable", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(dir: &Path, name: &str, text: &str) -> Staging {
        let staging = Staging::create(dir).unwrap();
        std::fs::write(staging.file(OsStr::new(name)), text).unwrap();
        staging
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_overwritten_unless_asked_and_what_was_replaced_comes_back_on_failure() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("vda.qcow2");
        std::fs::write(&disk, "old").unwrap();
        let staging = stage(dir.path(), "vda.qcow2", "new");
        assert!(matches!(Placed::default().place(&staging, &disk, false), Err(Error::Refused(_))));
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "old");

        let mut placed = Placed::default();
        placed.place(&staging, &disk, true).unwrap();
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "new");
        drop((placed, staging));
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "old");
        assert_eq!(names(dir.path()), ["vda.qcow2"]);

        let staging = stage(dir.path(), "vda.qcow2", "new");
        let mut placed = Placed::default();
        placed.place(&staging, &disk, true).unwrap();
        placed.keep();
        drop(staging);
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "new");
        assert_eq!(names(dir.path()), ["vda.qcow2"]);
    }

    #[test]
    fn only_files_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let staging = stage(dir.path(), "x", "new");
        std::fs::create_dir(dir.path().join("x")).unwrap();
        let error = Placed::default().place(&staging, &dir.path().join("x"), true).unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error}");
        assert!(replaceable(Path::new("/dev/null")).is_err());
        drop(staging);
        assert_eq!(names(dir.path()), ["x"]);
    }

    #[test]
    fn a_replaced_file_leaves_owner_and_mode_to_the_new_one_however_long_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let name = "n".repeat(255);
        let path = dir.path().join(&name);
        std::fs::write(&path, "old").unwrap();
        set_mode(&path, 0o640).unwrap();
        let staging = stage(dir.path(), &name, "new");
        let mut placed = Placed::default();
        placed.place(&staging, &path, true).unwrap();
        placed.keep();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
    }

    #[test]
    fn abandoned_staging_goes_and_a_living_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let living = stage(dir.path(), "a", "a");
        let dead = dir.path().join(format!("{STAGING}dead"));
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join(LOCK), "").unwrap();
        let another = Staging::create(dir.path()).unwrap();
        assert!(!dead.exists());
        assert_eq!(names(dir.path()).len(), 2);
        drop((living, another));
        assert!(names(dir.path()).is_empty());
    }
}
