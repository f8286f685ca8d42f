//! Backing up a VM (hot, warm, cold) or plain image files into one restore point.

use std::{path::PathBuf, time::Duration};

use virtward_model::{Bytes, QuiesceRequest, RestorePoint};
use virtward_repo::Repository;

use crate::{Cancel, Env, Error, Observer, Result};

/// How a running VM is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupMode {
    /// Without a pause: hot if it runs, cold if it is off.
    #[default]
    Auto,
    /// vCPUs stopped for the instant of the cut.
    Warm,
}

/// Commands run on this host around the freeze, through `sh -c`, with `VIRTWARD_VM` in the environment.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    /// Before the freeze; a failure fails a `required` quiesce and is a warning otherwise.
    pub pre_freeze: Option<String>,
    /// After the thaw, always run once `pre_freeze` was started.
    pub post_thaw: Option<String>,
    /// Limit for each; default 30 s.
    pub timeout: Option<Duration>,
}

/// Options of [`backup_vm`].
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Hot/cold or warm.
    pub mode: BackupMode,
    /// Quiescing.
    pub quiesce: QuiesceRequest,
    /// How long the agent may take to answer before it counts as absent.
    pub agent_timeout: Duration,
    /// Hook commands.
    pub hooks: Hooks,
    /// Read limit in bytes per second over all disks; none is unlimited.
    pub bandwidth: Option<Bytes>,
    /// Ignore change tracking and read everything that is allocated.
    pub full: bool,
    /// Back up only these disks.
    pub only_disks: Vec<String>,
    /// Leave these disks out.
    pub exclude_disks: Vec<String>,
    /// Labels for the restore point.
    pub tags: Vec<String>,
    /// Free space that must remain on the scratch file system; the backup is given up below it.
    pub scratch_reserve: Bytes,
    /// Number of clean regions re-read to check the tracking.
    pub sample_regions: usize,
    /// Threads that hash, compress and encrypt; 0 means one per core.
    pub threads: usize,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            mode: BackupMode::Auto,
            quiesce: QuiesceRequest::Auto,
            agent_timeout: Duration::from_secs(10),
            hooks: Hooks::default(),
            bandwidth: None,
            full: false,
            only_disks: Vec::new(),
            exclude_disks: Vec::new(),
            tags: Vec::new(),
            scratch_reserve: Bytes::mib(512),
            sample_regions: 8,
            threads: 0,
        }
    }
}

/// Image files that belong to no domain, backed up together as one restore point.
#[derive(Clone, Debug)]
pub struct ImageSet {
    /// Name in the repository (`image/NAME` cannot collide with a VM's: its UUID is nil).
    pub name: String,
    /// Image files, each its own disk.
    pub files: Vec<PathBuf>,
    /// Format of all of them; none: by extension and header, refused where the two disagree.
    pub format: Option<String>,
}

/// Backs up one VM, by name or UUID.
pub async fn backup_vm(
    _env: &Env,
    _repo: &Repository,
    _vm: &str,
    _options: &BackupOptions,
    _observer: &dyn Observer,
    _cancel: &Cancel,
) -> Result<RestorePoint> {
    Err(Error::Refused(String::new()))
}

/// Backs up image files. Needs no hypervisor.
pub async fn backup_images(
    _repo: &Repository,
    _set: &ImageSet,
    _options: &BackupOptions,
    _observer: &dyn Observer,
    _cancel: &Cancel,
) -> Result<RestorePoint> {
    Err(Error::Refused(String::new()))
}
