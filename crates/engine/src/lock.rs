//! One job of ours per VM on this host, and one conversation with its guest agent. The kernel frees a lock when its holder
//! dies, however it dies.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    time::Duration,
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
        let mut file = open(&path).map_err(Error::io(format!("open {}", path.display())))?;
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

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// Between two tries to get a turn.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// The turn to talk to a VM's guest agent, which handles one command at a time. Held until dropped; by a backup from its
/// first question until the guest is thawed.
pub(crate) struct AgentTurn {
    _file: File,
}

impl AgentTurn {
    /// Takes the turn of a VM if nobody has it.
    pub(crate) fn try_take(runtime: &Path, vm: Uuid) -> std::io::Result<Option<Self>> {
        let dir = runtime.join("locks");
        std::fs::create_dir_all(&dir)?;
        let file = open(&dir.join(format!("{vm}.agent")))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Takes the turn of a VM as soon as whoever has it gives it back, but waits no longer than `limit`: what a backup
    /// does not get it goes on without.
    pub(crate) async fn take(runtime: &Path, vm: Uuid, limit: Duration) -> Option<Self> {
        let wait = async {
            loop {
                match Self::try_take(runtime, vm) {
                    Ok(None) => tokio::time::sleep(TRY_AGAIN).await,
                    Ok(turn) => return turn,
                    Err(error) => {
                        tracing::debug!(%vm, %error, "no lock for the guest agent");
                        return None;
                    }
                }
            }
        };
        tokio::time::timeout(limit, wait).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_turn_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let vm = Uuid::new_v4();
        let first = AgentTurn::try_take(dir.path(), vm).unwrap().expect("nobody has it");
        assert!(AgentTurn::try_take(dir.path(), vm).unwrap().is_none());
        assert!(AgentTurn::take(dir.path(), vm, TRY_AGAIN).await.is_none());
        assert!(AgentTurn::try_take(dir.path(), Uuid::new_v4()).unwrap().is_some(), "another VM has its own");
        assert!(VmLock::take(dir.path(), vm, "web1", "backup").is_ok(), "it keeps no job away");
        let (second, ()) = futures::join!(AgentTurn::take(dir.path(), vm, Duration::from_secs(30)), async {
            tokio::time::sleep(TRY_AGAIN * 2).await;
            drop(first);
        });
        assert!(second.is_some());
    }

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
