//! What a VM asks of the host that runs it, and what a host offers: the facts that migration and placement decide over.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Disk;

/// What a VM needs besides room: read from its definition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Guest architecture (`x86_64`).
    pub arch: String,
    /// Machine type, with its version while the VM runs (`pc-q35-10.0`).
    pub machine: String,
    /// `kvm`, or `qemu` for an emulated one.
    pub virt: String,
    /// Path of the emulator, if the definition names one.
    pub emulator: Option<String>,
    /// The CPU that the guest sees.
    pub cpu: CpuAsk,
    /// Most vCPUs.
    pub vcpus: u32,
    /// Most memory, in bytes.
    pub memory_bytes: u64,
    /// Disks in document order.
    pub disks: Vec<DiskUse>,
    /// Network interfaces in document order.
    pub nics: Vec<Nic>,
    /// What ties the VM to its host.
    pub ties: Vec<Tie>,
}

/// The `<cpu>` of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuAsk {
    /// libvirt's mode: `custom`, `host-model`, `host-passthrough`, `maximum`; empty for the hypervisor's default.
    pub mode: String,
    /// Model name, if one is named.
    pub model: Option<String>,
    /// The element as it is, for a hypervisor to judge; none without one.
    pub xml: Option<String>,
}

/// A disk and how its host file is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUse {
    /// The disk.
    pub disk: Disk,
    /// Cache mode (`none`, `writeback` …); empty for the hypervisor's default.
    pub cache: String,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// MAC address, empty if the definition leaves it out.
    pub mac: String,
    /// What it is plugged into.
    pub link: Link,
}

/// What a network interface is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "name", rename_all = "kebab-case")]
pub enum Link {
    /// A libvirt network of this name.
    Network(String),
    /// A bridge of the host.
    Bridge(String),
    /// A network device of the host (macvtap).
    Device(String),
    /// Needs nothing of the host, or nothing that can be looked up.
    Other(String),
}

/// A thing of the host that a VM holds and cannot take along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tie {
    /// Kind.
    pub kind: TieKind,
    /// In words, with its address: `PCI device 0000:65:00.0`.
    pub what: String,
}

/// Kinds of [`Tie`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TieKind {
    /// A device of the host given to the guest.
    Device,
    /// A directory of the host mounted in the guest.
    Directory,
    /// Memory shared with a process of the host.
    SharedMemory,
    /// A file or character device of the host behind a port of the guest.
    Port,
    /// Memory encrypted by the host's processor.
    Encryption,
}

/// A host as somebody who may send it a VM sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostOffer {
    /// Name.
    pub name: String,
    /// UUID; nil where the driver gives none.
    pub uuid: Uuid,
    /// libvirt version, `major*1_000_000 + minor*1_000 + release`.
    pub libvirt_version: u64,
    /// QEMU version, same encoding; 0 if unknown.
    pub qemu_version: u64,
    /// CPUs.
    pub cpus: u32,
    /// Memory, in bytes.
    pub memory_total_bytes: u64,
    /// Memory that a new process could have, caches counted as free, in bytes.
    pub memory_available_bytes: u64,
    /// Active libvirt networks.
    pub networks: Vec<String>,
    /// Network devices and bridges; none where the host does not tell.
    pub links: Option<Vec<String>>,
}

/// Whether a host's hypervisor can run a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// Why it cannot run machines of this type, if so.
    pub machine: Option<String>,
    /// What it says of the CPU.
    pub cpu: CpuFit,
}

/// What a host says of a CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuFit {
    /// It has exactly that.
    Identical,
    /// It has that and more.
    Superset,
    /// It lacks something; what, as far as the hypervisor says.
    Lacking(String),
    /// It cannot tell, and why.
    Unknown(String),
}

/// A storage pool: a place for disk images that has a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Name.
    pub name: String,
    /// libvirt's type (`dir`, `netfs`, `logical` …).
    pub kind: String,
    /// Directory of its volumes.
    pub path: Option<String>,
    /// Usable now.
    pub active: bool,
    /// Size, in bytes; 0 while inactive.
    pub capacity_bytes: u64,
    /// Free, in bytes; 0 while inactive.
    pub available_bytes: u64,
}

/// An image file in a directory of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Absolute path.
    pub path: String,
    /// Format as the host sees it.
    pub format: String,
    /// Virtual size, in bytes.
    pub capacity_bytes: u64,
    /// Bytes taken.
    pub allocation_bytes: u64,
}
