//! Jobs: what was asked for, how far it is, what came of it.
//!
//! ```text
//! queued ─► running ─┬► succeeded
//!    │               ├► failed
//!    │               ├► cancelled
//!    └► cancelled    └► interrupted   (the daemon ended; what it did is retried by a new job)
//! ```

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Principal, Said, VmLeft, VmRef};
use crate::Code;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Makes a restore point of a VM.
    Backup,
    /// Makes a VM of a restore point.
    Restore,
    /// Checks what is stored.
    Verify,
    /// Copies restore points to another repository.
    Copy,
    /// Deletes restore points that no rule keeps.
    Prune,
    /// Gives back the space of stored data that no restore point needs.
    Gc,
    /// Moves a VM to another host.
    Migrate,
    /// Moves a disk of a VM to another file, format or storage.
    MoveDisk,
    /// Empties a host, by jobs of its own for each VM.
    Drain,
    /// Moves VMs for the sake of load, by jobs of its own for each.
    Balance,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Waits for its turn: `waiting_for` says for what.
    Queued,
    /// Runs.
    Running,
    /// Did what was asked.
    Succeeded,
    /// Did not: see `error`.
    Failed,
    /// Was stopped by request.
    Cancelled,
    /// The daemon ended while it ran.
    Interrupted,
}

impl JobState {
    /// Whether nothing changes any more.
    pub fn is_final(self) -> bool {
        !matches!(self, JobState::Queued | JobState::Running)
    }
}

/// Why a job exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Origin {
    /// Who asked.
    pub by: String,
    /// The policy that it carries out.
    pub policy: Option<String>,
    /// When the policy wanted it to start.
    pub due: Option<Timestamp>,
    /// 1 for the first try.
    pub attempt: u32,
    /// The job that this one tries again, or follows.
    pub after: Option<Uuid>,
}

/// The VM that a job is about.
pub type JobVm = VmRef;

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Later jobs have greater ids.
    pub id: Uuid,
    /// What it does.
    pub kind: JobKind,
    /// Where it stands.
    pub state: JobState,
    /// The VM that it is about; none if it is about a repository or a host.
    pub vm: Option<JobVm>,
    /// Where it runs.
    pub host: String,
    /// Backup: the host that reads and stores in place of that one, its proxy. Chosen when it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// The repository that it uses; empty if it uses none.
    pub repository: String,
    /// Why it exists.
    pub origin: Origin,
    /// When it was asked for.
    pub created: Timestamp,
    /// When it began.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// What a queued job waits for.
    pub waiting_for: Option<String>,
    /// The same, for other languages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_said: Option<Said>,
    /// Cancelling was asked for.
    pub is_cancelling: bool,
    /// How far it is.
    pub progress: Progress,
    /// Things to know that did not stop it.
    pub warnings: Vec<String>,
    /// Why it failed.
    pub error: Option<JobError>,
    /// What came of it.
    pub result: Option<JobResult>,
}

/// How far a job is. Zeros until it is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// `preparing`, `quiescing`, `copying`, `publishing`, `cleaning-up`.
    pub phase: Option<String>,
    /// What else there is to say: of a migration, its pass, what is left and how long the guest would stand still now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Bytes done in this phase.
    pub done_bytes: u64,
    /// Bytes to do in this phase, as far as known; may grow.
    pub total_bytes: u64,
    /// Bytes per second of late.
    pub rate_bytes_s: u64,
    /// Seconds left at that rate.
    pub remaining_s: Option<u64>,
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobError {
    /// For programs.
    pub code: Code,
    /// What failed, on what, and why.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    /// When it is tried again.
    pub retry_at: Option<Timestamp>,
}

/// What came of a job. Which fields there are follows from its kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct JobResult {
    /// Backup, restore: the restore point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// Backup: `full` or `incremental`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Bytes read from disks or from the repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes: Option<u64>,
    /// Bytes stored or written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
    /// Restore: the VM that was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmRef>,
    /// Restore: whether it was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_started: Option<bool>,
    /// Restore: the disks that were written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<RestoredDisk>,
    /// Verify, copy, prune: restore points that were checked, copied or deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub points: Option<u64>,
    /// Verify: objects that are damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damaged: Option<u64>,
    /// Gc: bytes that were deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freed_bytes: Option<u64>,
    /// Gc: bytes that are condemned, and deleted by a later one: backups that run may still need them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending_bytes: Option<u64>,
    /// Migrate, move-disk: where it was, a host or a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Migrate, move-disk: where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Migrate: for how long the guest stood still, as QEMU measured it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Migrate, move-disk: from the call to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<u64>,
    /// Migrate: memory sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Drain, balance: VMs that arrived.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moved: Option<u64>,
    /// Drain, balance: VMs that should have moved and did not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<VmLeft>,
}

/// A disk that was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoredDisk {
    /// Target name.
    pub target: String,
    /// Where it is now.
    pub path: String,
    /// Virtual size.
    pub size_bytes: u64,
}

/// How much a log entry matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// A step.
    Info,
    /// Something to know.
    Warning,
    /// Why it failed.
    Error,
}

/// One entry of a job's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobLogEntry {
    /// From 1, without gaps.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// How much it matters.
    pub level: LogLevel,
    /// What.
    pub message: String,
}

/// Freezing of the guest's file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Quiesce {
    /// If the guest agent answers.
    Auto,
    /// Fail without it.
    Required,
    /// Never.
    Off,
}

/// A backup to make now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupRequest {
    /// Name or UUID of the VM.
    pub vm: String,
    /// Name of the repository; default: that of its first policy, else `default`.
    #[serde(default)]
    pub repository: Option<String>,
    /// Read everything, as if nothing were known of earlier backups.
    #[serde(default)]
    pub full: bool,
    /// Stop the CPUs for the instant of the cut.
    #[serde(default)]
    pub warm: bool,
    /// Freezing of the guest's file systems; default: as configured.
    #[serde(default)]
    pub quiesce: Option<Quiesce>,
    /// Read at most so much per second.
    #[serde(default)]
    pub bandwidth_bytes_s: Option<u64>,
    /// Only these disks.
    #[serde(default)]
    pub only_disks: Vec<String>,
    /// Not these disks.
    #[serde(default)]
    pub exclude_disks: Vec<String>,
    /// Labels for the restore point.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Names of hosts of which one reads and stores in place of the VM's own, if one answers; empty: the VM's own host
    /// does that. Default: those of its first policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<Vec<String>>,
}

/// A restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Id of the restore point, or `VM@latest`, `VM@TIME` as on the command line.
    pub point: String,
    /// Name of the repository; default `default`.
    #[serde(default)]
    pub repository: Option<String>,
    /// Name of the VM to make; another name than the original's makes a copy with a new identity.
    #[serde(default)]
    pub name: Option<String>,
    /// Start it when restored.
    #[serde(default)]
    pub start: bool,
    /// Replace a VM of that name (it must be shut off) and its disks.
    #[serde(default)]
    pub overwrite: bool,
    /// Host to restore on; default: where the VM is or was.
    #[serde(default)]
    pub host: Option<String>,
    /// Directory on the host for the disks; default: where each was.
    #[serde(default)]
    pub disk_dir: Option<String>,
    /// Only say what would happen: answered with a plan instead of a job.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a restore would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RestorePlan {
    /// The restore point.
    pub point: String,
    /// When it was taken.
    pub taken: Timestamp,
    /// Name of the VM that would be made.
    pub name: String,
    /// Its UUID; null if it gets a new one.
    pub uuid: Option<Uuid>,
    /// Host that it would be on.
    pub host: String,
    /// A VM of that name would be replaced.
    pub replaces: bool,
    /// It would be started.
    pub start: bool,
    /// Disks that would be written.
    pub disks: Vec<PlannedDisk>,
    /// Bytes to write.
    pub data_bytes: u64,
    /// Things to know before it is done.
    pub warnings: Vec<String>,
}

/// A disk that a restore would write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedDisk {
    /// Target name.
    pub target: String,
    /// File that would be written.
    pub path: String,
    /// Image format.
    pub format: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Bytes of data in it.
    pub data_bytes: u64,
    /// A file of that name would be replaced.
    pub replaces: bool,
    /// Bytes free where it would be written; null if not known.
    pub free_bytes: Option<u64>,
}

/// How thoroughly stored data is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyDepth {
    /// Checksums of stored bytes.
    Ciphertext,
    /// Decrypt, decompress and hash every byte.
    #[default]
    Full,
}

/// A check of stored data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Name of the repository; default `default`.
    #[serde(default)]
    pub repository: Option<String>,
    /// Ids of restore points; none is all.
    #[serde(default)]
    pub points: Vec<String>,
    /// How thoroughly.
    #[serde(default)]
    pub mode: VerifyDepth,
    /// Check a random part of this many percent.
    #[serde(default)]
    pub percent: Option<u8>,
}

/// Giving back space that no restore point needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Name of the repository; default `default`.
    #[serde(default)]
    pub repository: Option<String>,
}

/// Keeps [`Principal`] the one way to say who asked.
impl From<&Principal> for Origin {
    fn from(who: &Principal) -> Self {
        Self { by: who.name.clone(), policy: None, due: None, attempt: 1, after: None }
    }
}
