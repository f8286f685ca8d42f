//! One process per file: a lock that the kernel frees when its holder dies.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// A child that its parent has just forked holds the parent's locks until it runs its own program: not long, even on a
/// busy machine, but longer than it takes to close a file and open it again.
const PATIENCE: Duration = Duration::from_secs(1);

/// The lock on a state file, for as long as this lives.
pub(super) struct Guard(#[expect(dead_code, reason = "the lock lives as long as the open file")] File);

impl Guard {
    /// Takes the lock, or says who has it.
    pub(super) fn take(path: &Path) -> Result<Self> {
        let io = |doing| Error::io(doing, path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(path)
            .map_err(io("open"))?;
        let patience = Instant::now() + PATIENCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < patience => sleep(PATIENCE / 20),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(Error::InUse { path: path.into(), holder: holder(&file) });
                }
                Err(error) => return Err(io("lock")(error.into())),
            }
        }
        // A file that was replaced in between is not the one that others will lock.
        let (locked, there) = (file.metadata().map_err(io("examine"))?, path.metadata().map_err(io("examine"))?);
        if (locked.dev(), locked.ino()) != (there.dev(), there.ino()) {
            return Err(Error::InUse { path: path.into(), holder: "a restore that replaced it just now".into() });
        }
        Ok(Self(file))
    }
}

/// Who holds the lock, as far as /proc tells.
fn holder(file: &File) -> String {
    let known = || {
        let inode = file.metadata().ok()?.ino().to_string();
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        // 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
        let pid = locks.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let here = fields.get(1) == Some(&"FLOCK") && fields.get(5)?.rsplit(':').next() == Some(&inode);
            here.then(|| fields.get(4).map(|pid| (*pid).to_owned()))?
        })?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(format!("process {pid} ({})", name.trim()))
    };
    known().unwrap_or_else(|| "another process".into())
}
