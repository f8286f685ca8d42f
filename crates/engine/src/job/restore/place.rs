//! Putting restored files where they belong, all or nothing.
//!
//! Files are written in a staging directory beside their destination and moved when complete, so a restore that is
//! killed leaves no half disk under a real name. The staging directory is locked while its owner lives; the next
//! restore into the same directory removes those whose owner is gone.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use crate::{Error, Result};

const STAGING: &str = ".virtward-restore-";
const LOCK: &str = "lock";

/// A directory for files that are not ready yet.
pub(super) struct Staging {
    dir: PathBuf,
    _lock: File,
}

impl Staging {
    /// Creates one in `destination`, which must exist, after clearing abandoned ones.
    pub(super) fn create(destination: &Path) -> Result<Self> {
        clear_abandoned(destination);
        let dir = destination.join(format!("{STAGING}{}", Uuid::new_v4().simple()));
        let context = || {
            format!("create a directory for unfinished files in {} (it must exist and be writable)", destination.display())
        };
        std::fs::create_dir(&dir).map_err(Error::io(context()))?;
        let lock = File::create(dir.join(LOCK)).map_err(Error::io(context()))?;
        lock.lock().map_err(Error::io(context()))?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where to write the file that will be called `name`.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Moves everything beside the main file (extents of a split image), then the main file. What would be overwritten
    /// goes to `replaced`, or is an error.
    fn contents(&self, main: &str) -> Result<Vec<String>> {
        let context = || format!("list {}", self.dir.display());
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(Error::io(context()))? {
            let name = entry.map_err(Error::io(context()))?.file_name().to_string_lossy().into_owned();
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
        let main = file_name(destination)?;
        for name in staging.contents(&main)? {
            let to = parent.join(&name);
            let context = || format!("move a restored file to {}", to.display());
            let replaced = match overwrite && to.symlink_metadata().is_ok() {
                true => {
                    let aside = parent.join(format!(".{name}.virtward-replaced-{}", Uuid::new_v4().simple()));
                    std::fs::rename(&to, &aside).map_err(Error::io(context()))?;
                    Some(aside)
                }
                false => None,
            };
            let moved = rename_new(&staging.file(&name), &to);
            if let (Err(_), Some(aside)) = (&moved, &replaced) {
                let _ = std::fs::rename(aside, &to);
            }
            moved.map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => exists(&to),
                _ => Error::io(context())(error),
            })?;
            self.moves.push((to, replaced));
        }
        sync_dir(parent)
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

/// The last component of a path.
pub(super) fn file_name(path: &Path) -> Result<String> {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .ok_or_else(|| Error::Refused(format!("{} is not a file name", path.display())))
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
        std::fs::write(staging.file(name), text).unwrap();
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
        drop(placed);
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "old");

        let staging = stage(dir.path(), "vda.qcow2", "new");
        let mut placed = Placed::default();
        placed.place(&staging, &disk, true).unwrap();
        placed.keep();
        drop(staging);
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "new");
        assert_eq!(names(dir.path()), ["vda.qcow2"]);
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
