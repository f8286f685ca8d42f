//! Scratch space and socket of a running backup: where QEMU keeps the old content of blocks that the guest overwrites
//! while they are being read.
//!
//! Both directories are named after the VM, so the next run of the same VM finds and removes what a killed run left.

use std::{
    fs::File,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
};

use uuid::Uuid;
use virtward_decide::tracking::DiskFacts;
use virtward_model::Bytes;

use crate::{Env, Error, Result, image::qcow2::Qcow2Writer};

/// Linux's limit for the path of a Unix socket.
const SOCKET_PATH_MAX: usize = 107;

/// The two directories of one backup.
pub(super) struct Scratch {
    run: PathBuf,
    images: PathBuf,
}

impl Scratch {
    pub(super) fn of(env: &Env, vm: Uuid) -> Self {
        Self {
            run: env.dirs.runtime.join("backup").join(vm.to_string()),
            images: env.dirs.scratch.join(vm.to_string()),
        }
    }

    /// Creates both, empty, accessible to QEMU's user only, and checks that there is room.
    pub(super) fn create(&self, owner: Option<(u32, u32)>, reserve: Bytes, disks_bytes: u64) -> Result<()> {
        self.remove()?;
        for dir in [&self.run, &self.images] {
            let parent = dir.parent().unwrap_or(dir);
            // Others may pass through the parents, not list them: QEMU's user must reach its own directory.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(parent)
                .and_then(|()| std::fs::DirBuilder::new().mode(0o700).create(dir))
                .map_err(Error::io(format!("create {}", dir.display())))?;
            if let Some((user, group)) = owner {
                chown(dir, Some(user), Some(group))
                    .map_err(Error::io(format!("give {} to QEMU's user", dir.display())))?;
            }
        }
        if self.socket().as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::Refused(format!(
                "{} is too long for a socket; choose a shorter runtime directory",
                self.socket().display()
            )));
        }
        // The guest overwrites a small part of its disks during a backup; a file system that could not even hold a
        // twentieth of them, or a gigabyte, is not worth starting on.
        let wanted = reserve.get() + (disks_bytes / 20).min(1 << 30);
        let free = self.free()?;
        if free < wanted {
            return Err(Error::GuestFirst(format!(
                "only {} free for scratch space in {}, {} are needed to begin; free some, or set another scratch \
                 directory",
                Bytes(free),
                self.images.display(),
                Bytes(wanted)
            )));
        }
        Ok(())
    }

    /// Makes the empty images, which QEMU would otherwise make while the guest is frozen.
    pub(super) fn make_images(&self, owner: Option<(u32, u32)>, disks: &[DiskFacts]) -> Result<()> {
        for disk in disks {
            let path = self.image(&disk.target);
            File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .and_then(|file| Qcow2Writer::empty(file, disk.size_bytes))
                .and_then(|()| owner.map_or(Ok(()), |(user, group)| chown(&path, Some(user), Some(group))))
                .map_err(Error::io(format!("make scratch image {}", path.display())))?;
        }
        Ok(())
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.run.join("nbd.sock")
    }

    pub(super) fn image(&self, target: &str) -> PathBuf {
        self.images.join(format!("{target}.scratch.qcow2"))
    }

    /// Whether a path of a running backup job lies in here: then the job is one of ours.
    pub(super) fn owns(&self, backup_xml: &str) -> bool {
        let within = |path: &Path| backup_xml.contains(&format!("{}/", path.display()));
        within(&self.run) || within(&self.images)
    }

    /// Bytes free on the scratch file system.
    pub(super) fn free(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(&self.images)
            .map_err(|errno| Error::io(format!("look at {}", self.images.display()))(errno.into()))?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    /// Removes both; nothing there is fine.
    pub(super) fn remove(&self) -> Result<()> {
        for dir in [&self.run, &self.images] {
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("remove {}", dir.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
