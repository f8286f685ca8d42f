//! The files by which it is seen whether both hosts see one directory, noted before each is made, so that the next run for
//! the same VM removes those of a run that was killed.
//!
//! A note is a file in the runtime directory, locked by the run whose note it is: what can be locked is abandoned.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    path::PathBuf,
};

use uuid::Uuid;
use virtward_hypervisor::Hypervisor;

use crate::{Env, Error, Result};

/// The probes of one run. Its note goes with it.
pub(super) struct Probes {
    note: File,
    path: PathBuf,
}

impl Probes {
    /// Removes what killed runs for the VM left on either host, and begins a note.
    pub(super) async fn begin(env: &Env, vm: Uuid, here: &dyn Hypervisor, there: &dyn Hypervisor) -> Result<Self> {
        let dir = env.dirs.runtime.join("probes");
        std::fs::create_dir_all(&dir).map_err(Error::io(format!("make {}", dir.display())))?;
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&vm.to_string()) {
                clear(entry.path(), here, there).await;
            }
        }
        let path = dir.join(format!("{vm}-{}", Uuid::new_v4()));
        let open = || {
            let note = OpenOptions::new().append(true).create_new(true).open(&path)?;
            note.try_lock()?;
            Ok(note)
        };
        let note = open().map_err(Error::io(format!("write {}", path.display())))?;
        Ok(Self { note, path })
    }

    /// A path for the next probe in a directory.
    pub(super) fn next(&mut self, directory: &str) -> Result<String> {
        let probe = format!("{}/virtward-probe-{}", directory.trim_end_matches('/'), Uuid::new_v4());
        let noted = self.note.write_all(format!("{probe}\n").as_bytes());
        noted.map_err(Error::io(format!("write {}", self.path.display())))?;
        Ok(probe)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes an abandoned run's probes, and then its note; one whose host cannot be asked keeps it for the next run.
async fn clear(path: PathBuf, here: &dyn Hypervisor, there: &dyn Hypervisor) {
    let Ok(mut note) = File::open(&path) else { return };
    if note.try_lock().is_err() {
        return;
    }
    let mut text = String::new();
    let mut all = note.read_to_string(&mut text).is_ok();
    // A last line that was cut short names a probe that was not made yet.
    for probe in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        for host in [here, there] {
            if let Err(error) = host.volume_remove(probe).await {
                tracing::debug!(probe, %error, "a probe of an earlier run could not be removed");
                all &= error.kind != virtward_hypervisor::ErrorKind::Unreachable;
            }
        }
    }
    if all {
        let _ = std::fs::remove_file(&path);
    }
}
