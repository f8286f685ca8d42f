//! One job of ours per VM on this host. The kernel frees the lock when its holder dies, however it dies.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use uuid::Uuid;

use crate::{Error, Result};

/// Held until dropped.
pub(crate) struct VmLock {
    _file: File,
}

impl VmLock {
    /// Takes the lock of a VM, or says who has it.
    pub(crate) fn take(runtime: &Path, vm: Uuid, name: &str, job: &str) -> Result<Self> {
        let dir = runtime.join("locks");
        std::fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
        let path = dir.join(format!("{vm}.lock"));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io(format!("open {}", path.display())))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                let holder = holder.trim();
                let by = if holder.is_empty() { String::new() } else { format!(" ({holder})") };
                return Err(Error::Busy(format!(
                    "another job of Virtward works on {name}{by}; wait for it to end, then run this again"
                )));
            }
            Err(TryLockError::Error(source)) => return Err(Error::io(format!("lock {}", path.display()))(source)),
        }
        let note = format!("{job}, pid {}\n", std::process::id());
        let written =
            file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).and_then(|_| file.write_all(note.as_bytes()));
        written.map_err(Error::io(format!("write {}", path.display())))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_job_is_told_who_has_the_vm_and_the_third_gets_it_when_free() {
        let dir = tempfile::tempdir().unwrap();
        let vm = Uuid::new_v4();
        let first = VmLock::take(dir.path(), vm, "web1", "backup").unwrap();
        let error = VmLock::take(dir.path(), vm, "web1", "backup").err().unwrap();
        assert!(matches!(error, Error::Busy(_)));
        assert!(error.to_string().contains(&format!("backup, pid {}", std::process::id())), "{error}");
        assert!(VmLock::take(dir.path(), Uuid::new_v4(), "db1", "backup").is_ok());
        drop(first);
        assert!(VmLock::take(dir.path(), vm, "web1", "restore").is_ok());
    }
}
