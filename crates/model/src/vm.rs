//! A virtual machine as the hypervisor describes it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What the hypervisor says of a domain's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// vCPUs run.
    Running,
    /// QEMU is alive, vCPUs do not run.
    Paused,
    /// No QEMU process.
    ShutOff,
    /// The guest or QEMU crashed and the process is kept.
    Crashed,
    /// Any other state that libvirt names (pm-suspended, in shutdown, no state).
    Other,
}

impl VmState {
    /// Whether a QEMU process holds the disks open.
    pub fn is_active(self) -> bool {
        !matches!(self, VmState::ShutOff)
    }
}

/// A virtual machine: identity, state, disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// libvirt's domain name.
    pub name: String,
    /// libvirt's domain UUID; the identity across renames and hosts.
    pub uuid: Uuid,
    /// The state when it was read.
    pub state: VmState,
    /// Every `<disk>` in document order.
    pub disks: Vec<Disk>,
}

/// The `device` attribute of a `<disk>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskDevice {
    /// An ordinary disk.
    Disk,
    /// An optical drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A SCSI LUN passed through.
    Lun,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum DiskSource {
    /// An image file on a file system of the host.
    File {
        /// Absolute path on the host.
        path: String,
    },
    /// A block device of the host.
    Block {
        /// Absolute path on the host.
        path: String,
    },
    /// Anything that QEMU reaches by itself (rbd, iscsi, nbd, nfs, https …).
    Network {
        /// libvirt's protocol name.
        protocol: String,
        /// libvirt's source name (pool/image, IQN, export).
        name: String,
    },
    /// A libvirt storage volume not resolved to a path.
    Volume {
        /// Pool name.
        pool: String,
        /// Volume name.
        volume: String,
    },
    /// An empty drive.
    None,
}

impl DiskSource {
    /// The host path of a file or block source.
    pub fn path(&self) -> Option<&str> {
        match self {
            DiskSource::File { path } | DiskSource::Block { path } => Some(path),
            _ => None,
        }
    }
}

/// One `<disk>` of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Target name in the guest (`vda`); unique within a VM and stable across restarts.
    pub target: String,
    /// Kind of device.
    pub device: DiskDevice,
    /// Driver format: `qcow2`, `raw`, …
    pub format: String,
    /// Where the active layer lives.
    pub source: DiskSource,
    /// Marked `<readonly/>`.
    pub read_only: bool,
    /// Marked `<shareable/>`.
    pub shareable: bool,
    /// Marked `<transient/>`.
    pub transient: bool,
    /// Paths of the backing files below the active layer, top first, as far as libvirt knows them.
    pub backing: Vec<String>,
}
