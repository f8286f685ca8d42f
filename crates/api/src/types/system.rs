//! The daemon itself, and everything at a glance.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Event, Job};

/// What answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// `virtward`.
    pub product: String,
    /// Version of the program.
    pub version: String,
    /// Version of the API: `v1`.
    pub api: String,
    /// Host that the daemon runs on.
    pub host: String,
    /// When it started.
    pub started: Timestamp,
}

/// Everything at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Overview {
    /// When it was put together.
    pub at: Timestamp,
    /// Hosts by state.
    pub hosts: HostCounts,
    /// VMs.
    pub vms: Counts,
    /// VMs by protection.
    pub protection: ProtectionCounts,
    /// Jobs.
    pub jobs: JobCounts,
    /// Jobs that run now, at most 20.
    pub running: Vec<Job>,
    /// Jobs that failed or were interrupted in the last seven days, newest first, at most 20.
    pub failures: Vec<Job>,
    /// Repositories.
    pub capacity: Vec<Capacity>,
    /// Warnings and errors of late, newest first, at most 20.
    pub events: Vec<Event>,
}

/// Hosts by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostCounts {
    /// All.
    pub total: u32,
    /// Up.
    pub up: u32,
    /// libvirtd down.
    pub libvirtd_down: u32,
    /// Down.
    pub down: u32,
    /// Unknown.
    pub unknown: u32,
}

/// VMs by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    /// All.
    pub total: u32,
    /// Running.
    pub running: u32,
}

/// VMs by protection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProtectionCounts {
    /// Protected.
    pub protected: u32,
    /// Overdue.
    pub overdue: u32,
    /// Pending.
    pub pending: u32,
    /// Unprotected.
    pub unprotected: u32,
    /// Unknown.
    pub unknown: u32,
}

/// Jobs by state; ended ones of the last 24 hours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobCounts {
    /// Queued now.
    pub queued: u32,
    /// Running now.
    pub running: u32,
    /// Succeeded.
    pub succeeded: u32,
    /// Failed or interrupted.
    pub failed: u32,
    /// Cancelled.
    pub cancelled: u32,
}

/// How full a repository is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// Name of the repository.
    pub repository: String,
    /// It can be used.
    pub is_ok: bool,
    /// Bytes stored.
    pub bytes: Option<u64>,
    /// Free in its file system.
    pub free_bytes: Option<u64>,
    /// Size of its file system.
    pub total_bytes: Option<u64>,
    /// Data to stored bytes.
    pub reduction: Option<f64>,
}

/// What the daemon was told, without secrets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Settings {
    /// Configuration file.
    pub config_file: Option<String>,
    /// Directory of its state.
    pub state_dir: String,
    /// Unix socket.
    pub socket: String,
    /// Address of the HTTPS listener; null if it is off.
    pub listen: Option<String>,
    /// SHA-256 fingerprint of its certificate, in hex.
    pub certificate_sha256: Option<String>,
    /// libvirt URI.
    pub connect: String,
    /// Names of repositories.
    pub repositories: Vec<String>,
    /// Most jobs at a time on this host.
    pub jobs_max: u32,
    /// Seconds between two complete looks at the hypervisor.
    pub reconcile_s: u64,
}

/// Sent on the stream when changes may have been missed: read again whatever is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StreamReset {
    /// Why.
    pub reason: String,
}
