//! Where a job runs: the hypervisor, the directories, the way to start a helper of ourselves.

use std::{path::PathBuf, sync::Arc};

use virtward_hypervisor::Hypervisor;

/// Directories on the host.
#[derive(Clone, Debug)]
pub struct Dirs {
    /// Locks, sockets, markers of frozen guests; gone after a reboot. Default `/run/virtward`.
    pub runtime: PathBuf,
    /// Scratch (fleecing) images of running backups. Default `/var/lib/virtward/scratch`.
    pub scratch: PathBuf,
}

impl Default for Dirs {
    fn default() -> Self {
        Self { runtime: "/run/virtward".into(), scratch: "/var/lib/virtward/scratch".into() }
    }
}

/// What a job needs besides its options.
#[derive(Clone)]
pub struct Env {
    /// The hypervisor that runs the VMs.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The URI it was connected by, for helpers that must connect by themselves.
    pub uri: String,
    /// Directories.
    pub dirs: Dirs,
    /// Program and leading arguments that, given `--connect URI --vm UUID --after-ms N`, thaw a guest (with `--resume`:
    /// let its vCPUs run again) when standard input closes without the word `thawed`. None: only this process does.
    pub thaw_guard: Option<Vec<String>>,
}
