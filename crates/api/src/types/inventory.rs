//! Hosts and virtual machines.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{HostDrain, HostHealth, Said, UpcomingRun};
use crate::Code;

/// What is known of a host. Three ways of not being `up` are three different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// Its hypervisor answers.
    Up,
    /// The host answers, its libvirtd does not. Its VMs most likely go on running.
    LibvirtdDown,
    /// The host itself does not answer on a network that is known to work.
    Down,
    /// It cannot be told: the network between may be what is broken.
    Unknown,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Name.
    pub name: String,
    /// UUID; null until it was reached once.
    pub uuid: Option<Uuid>,
    /// What is known of it.
    pub state: HostState,
    /// Why it is not up.
    pub reason: Option<String>,
    /// In this state since.
    pub since: Timestamp,
    /// When it last answered.
    pub seen: Option<Timestamp>,
    /// How its libvirt is reached.
    pub uri: String,
    /// libvirt, as `11.3.0`.
    pub libvirt_version: Option<String>,
    /// QEMU, as `10.0.2`.
    pub qemu_version: Option<String>,
    /// Logical processors.
    pub cpus: Option<u32>,
    /// Load average of the last minute.
    pub load: Option<f64>,
    /// Memory.
    pub memory_bytes: Option<u64>,
    /// Memory that is free or can be freed.
    pub memory_available_bytes: Option<u64>,
    /// VMs that are defined or run there.
    pub vms: u32,
    /// Of these, running.
    pub vms_running: u32,
    /// Jobs that run there.
    pub jobs_running: u32,
    /// File systems that hold disks of VMs.
    pub storage: Vec<Storage>,
    /// The daemon that answers runs there.
    pub is_local: bool,
    /// It is drained, or being drained: it takes no VMs.
    #[serde(default)]
    pub drained: Option<HostDrain>,
    /// How its hardware is, if something is asked that knows.
    #[serde(default)]
    pub health: Option<HostHealth>,
}

/// A file system that holds disks of VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Storage {
    /// Directory.
    pub path: String,
    /// Size.
    pub total_bytes: u64,
    /// Free for users.
    pub free_bytes: u64,
    /// Disks of VMs there.
    pub disks: u32,
    /// Other hosts see the same: it is on the network, or several mount it at once.
    #[serde(default)]
    pub is_shared: bool,
}

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PowerState {
    /// Running.
    Running,
    /// In memory, its CPUs stopped.
    Paused,
    /// Off.
    ShutOff,
    /// Ended by a crash.
    Crashed,
    /// Anything else that the hypervisor says.
    Other,
}

/// Whether a VM is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProtectionState {
    /// A policy covers it and its newest restore point is recent enough.
    Protected,
    /// A policy covers it, and the newest restore point is older than promised, or there is none though one was due.
    Overdue,
    /// A policy covers it, and its first backup is not due yet.
    Pending,
    /// No policy covers it. It may still have restore points that somebody made by hand.
    Unprotected,
    /// The repository cannot be looked into, so nothing is certain.
    Unknown,
}

/// A virtual machine in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// UUID, which survives renames.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Where it is.
    pub host: String,
    /// Host name that its guest gives itself; null if it does not say.
    #[serde(default)]
    pub hostname: Option<String>,
    /// What it does; as last seen while the host does not answer.
    pub state: PowerState,
    /// Its host does not answer: what is shown is what was last seen.
    pub is_stale: bool,
    /// Tags from its libvirt metadata.
    pub tags: Vec<String>,
    /// Virtual size of all disks that hold data; null if not known.
    pub size_bytes: Option<u64>,
    /// Whether it is protected.
    pub protection: ProtectionState,
    /// Policies that select it.
    pub policies: Vec<String>,
    /// When its newest restore point was taken.
    pub last_point: Option<Timestamp>,
    /// When the next backup is due.
    pub next_run: Option<Timestamp>,
    /// A job that runs or waits for it.
    pub job: Option<Uuid>,
}

/// A virtual machine with everything that is known of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmDetail {
    /// As in the list.
    #[serde(flatten)]
    pub vm: Vm,
    /// libvirt's title.
    pub title: Option<String>,
    /// Values in the libvirt metadata.
    pub metadata: BTreeMap<String, String>,
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// Memory.
    pub memory_bytes: Option<u64>,
    /// Other hosts that have a definition of it, or run it as well.
    #[serde(default)]
    pub also_on: Vec<String>,
    /// Disks.
    pub disks: Vec<VmDisk>,
    /// Networks.
    pub networks: Vec<Network>,
    /// What the guest says; null without a channel for a guest agent.
    pub guest: Option<Guest>,
    /// Use of resources; null unless it runs.
    pub usage: Option<Usage>,
    /// How it is protected.
    pub protected: Protection,
    /// Number of restore points in all repositories.
    pub points: u64,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Target name: `vda`.
    pub target: String,
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    /// Image format.
    pub format: String,
    /// Where the data is.
    pub source: String,
    /// Virtual size.
    pub size_bytes: Option<u64>,
    /// Bytes allocated on the host.
    pub allocated_bytes: Option<u64>,
    /// The guest cannot write to it.
    pub is_read_only: bool,
    /// Backups include it.
    pub is_backed_up: bool,
}

/// A network interface of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Bridge or network on the host.
    pub source: Option<String>,
    /// MAC address.
    pub mac: Option<String>,
    /// Model.
    pub model: Option<String>,
    /// Its IP addresses, as the guest agent says; without those of the link.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// What the guest agent says. It is asked when it connects and every ten minutes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Guest {
    /// The agent's channel is connected.
    pub is_agent_connected: bool,
    /// Host name that the guest gives itself; null until it said so.
    pub hostname: Option<String>,
    /// Operating system, for people: `Debian GNU/Linux 12 (bookworm)`; null until it said so.
    pub os: Option<String>,
}

/// Use of resources, averaged since the last look.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Of one processor: 1.5 is one and a half.
    pub cpu: f64,
    /// Memory of the QEMU process.
    pub memory_rss_bytes: u64,
    /// Read from disks, per second.
    pub read_bytes_s: u64,
    /// Written to disks, per second.
    pub write_bytes_s: u64,
    /// Received, per second.
    pub rx_bytes_s: u64,
    /// Sent, per second.
    pub tx_bytes_s: u64,
}

/// How a VM is protected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Protection {
    /// In one word.
    pub state: ProtectionState,
    /// In a sentence.
    pub reason: String,
    /// The same, for other languages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
    /// Policies that select it.
    pub policies: Vec<String>,
    /// Strictest promise among the policies: the newest restore point must not be older.
    pub rpo_s: Option<u64>,
    /// Age of the newest restore point.
    pub age_s: Option<u64>,
    /// Newest restore point.
    pub last_good: Option<LastGood>,
    /// Last backup that failed, if none succeeded since.
    pub last_failure: Option<LastFailure>,
    /// What comes next.
    pub next: Option<UpcomingRun>,
}

/// Newest restore point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LastGood {
    /// Its id.
    pub point: String,
    /// Where it is.
    pub repository: String,
    /// When it was taken.
    pub taken: Timestamp,
}

/// A backup that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LastFailure {
    /// The job.
    pub job: Uuid,
    /// When.
    pub at: Timestamp,
    /// Why.
    pub message: String,
    /// Of which kind the failure is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
}
