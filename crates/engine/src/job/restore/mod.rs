//! Restoring a VM or one of its disks from a restore point.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_model::PointId;
use virtward_repo::Repository;

use crate::{Cancel, Env, Error, Observer, Result};

/// Image format of a restored disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// QEMU's own format, thin.
    Qcow2,
    /// Plain bytes, sparse where the file system allows it.
    Raw,
    /// VMware, one growing file.
    Vmdk,
    /// VMware, split into extents of at most 2 GB.
    VmdkSplit,
    /// Hyper-V.
    Vhdx,
    /// VirtualBox.
    Vdi,
}

/// Options of [`restore_vm`].
#[derive(Clone, Debug, Default)]
pub struct RestoreVmOptions {
    /// Name of the restored VM; a name other than the original's gets a new UUID and new MAC addresses.
    pub name: Option<String>,
    /// Start it when restored.
    pub start: bool,
    /// Replace a VM of that name (it must be shut off) and its disk files.
    pub overwrite: bool,
    /// Directory for the disks; default: where each disk was.
    pub disk_dir: Option<PathBuf>,
    /// Threads that decode; 0 means one per core.
    pub threads: usize,
}

/// A disk that was written.
#[derive(Clone, Debug, Serialize)]
pub struct RestoredDisk {
    /// Target name.
    pub target: String,
    /// Where it is now.
    pub path: String,
    /// Format.
    pub format: DiskFormat,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Bytes written (not known to be zero).
    pub written_bytes: u64,
}

/// A VM that was restored.
#[derive(Clone, Debug, Serialize)]
pub struct RestoredVm {
    /// Name.
    pub vm: String,
    /// UUID.
    pub uuid: Uuid,
    /// Restore point it came from.
    pub point: PointId,
    /// Whether it was started.
    pub started: bool,
    /// Disks.
    pub disks: Vec<RestoredDisk>,
    /// Things the operator should know.
    pub warnings: Vec<String>,
}

/// Options of [`restore_disk`].
#[derive(Clone, Debug)]
pub struct RestoreDiskOptions {
    /// Target name (`vda`); may be left out when the point holds one disk.
    pub disk: Option<String>,
    /// File to create.
    pub to: PathBuf,
    /// Format; default: by the file's extension, else that of the source.
    pub format: Option<DiskFormat>,
    /// Replace an existing file.
    pub overwrite: bool,
    /// Threads that decode; 0 means one per core.
    pub threads: usize,
}

/// Restores a whole VM: disks first, definition last, so that a failure leaves no half VM.
pub async fn restore_vm(
    _env: &Env,
    _repo: &Repository,
    _point: PointId,
    _options: &RestoreVmOptions,
    _observer: &dyn Observer,
    _cancel: &Cancel,
) -> Result<RestoredVm> {
    Err(Error::Refused(String::new()))
}

/// Restores one disk to a file. Needs no hypervisor.
pub async fn restore_disk(
    _repo: &Repository,
    _point: PointId,
    _options: &RestoreDiskOptions,
    _observer: &dyn Observer,
    _cancel: &Cancel,
) -> Result<RestoredDisk> {
    Err(Error::Refused(String::new()))
}
