//! What a migration has begun, on disk, so that another run of the same command can bring it to its end.

use std::{io::Write, path::PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_decide::migration::check::{Checked, Snapshot};

use super::Run;
use crate::{Env, Error, Result};

/// A checkpoint that does not travel by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct KnownCheckpoint {
    pub(super) name: String,
    pub(super) created_unix_s: i64,
    pub(super) disks: Vec<String>,
}

/// One migration under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Journal {
    pub(super) vm: String,
    pub(super) uuid: Uuid,
    /// libvirt's URI of the destination.
    pub(super) destination: String,
    /// The hosts' names.
    pub(super) from: String,
    pub(super) to: String,
    /// It ran when it began.
    pub(super) active: bool,
    pub(super) paused: bool,
    /// Each disk's target and source.
    pub(super) disks: Vec<(String, String)>,
    /// Targets that are copied.
    pub(super) copy: Vec<String>,
    /// All other disks are proved to be shared.
    pub(super) proved_shared: bool,
    /// QEMU of the source.
    pub(super) qemu_version: u64,
    /// Images made at the destination.
    pub(super) made: Vec<String>,
    /// Oldest first.
    pub(super) checkpoints: Vec<KnownCheckpoint>,
}

impl Journal {
    /// Of a migration that is about to begin.
    pub(super) async fn of(run: &Run<'_>, snapshot: &Snapshot, checked: &Checked) -> Result<Self> {
        let known = run.here().checkpoints(run.vm.uuid).await.map_err(Error::hyper("list checkpoints"))?;
        let checkpoint = |info: virtward_hypervisor::CheckpointInfo| KnownCheckpoint {
            name: info.name,
            created_unix_s: info.created_unix_s,
            disks: info.disks.into_iter().map(|(target, _)| target).collect(),
        };
        Ok(Self {
            vm: run.vm.name.clone(),
            uuid: run.vm.uuid,
            destination: run.to.uri.clone(),
            from: snapshot.source.name.clone(),
            to: snapshot.destination.name.clone(),
            active: run.vm.state.is_active(),
            paused: run.vm.state == virtward_model::VmState::Paused,
            disks: super::facts::sources(&run.vm),
            copy: checked.copy.clone(),
            proved_shared: checked.proved_shared,
            qemu_version: snapshot.source.qemu_version,
            made: Vec::new(),
            checkpoints: known.into_iter().map(checkpoint).collect(),
        })
    }

    fn path(env: &Env, vm: Uuid) -> PathBuf {
        env.dirs.runtime.join("migrations").join(format!("{vm}.json"))
    }

    /// The journal that an interrupted run left, if any. One that cannot be read is worth nothing and is no obstacle.
    pub(super) fn load(env: &Env, vm: Uuid) -> Result<Option<Self>> {
        let path = Self::path(env, vm);
        match std::fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(journal) => Ok(Some(journal)),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the journal of an earlier migration is damaged");
                    Ok(None)
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("read {}", path.display()))(error)),
        }
    }

    /// Writes it, whole or not at all.
    pub(super) fn save(&self, env: &Env) -> Result<()> {
        let path = Self::path(env, self.uuid);
        let write = || {
            let dir = path.parent().unwrap_or(&path);
            std::fs::create_dir_all(dir)?;
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(Error::io(format!("write {}", path.display())))
    }

    /// The migration is over.
    pub(super) fn remove(&self, env: &Env) -> Result<()> {
        let path = Self::path(env, self.uuid);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", path.display()))(error))
            }
            _ => Ok(()),
        }
    }
}
