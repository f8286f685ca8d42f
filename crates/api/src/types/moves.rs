//! VMs and disks that move: what can be asked for, what would be done, what stays.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmRef;

/// A VM that is to go to another host of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Name of the host.
    pub to: String,
    /// Longest time for which the guest may stand still; default 300.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// Send at most so much per second.
    #[serde(default)]
    pub bandwidth_bytes_s: Option<u64>,
    /// Switch to post-copy after so long if it has not converged; default: never. From then on, until all memory is there,
    /// a failure of either host or the network loses the running guest.
    #[serde(default)]
    pub postcopy_after_s: Option<u64>,
    /// Give up after so long.
    #[serde(default)]
    pub timeout_s: Option<u64>,
    /// Copy disks that the destination does not see.
    #[serde(default)]
    pub with_storage: bool,
    /// Move it although the cache mode of a disk ignores flushes.
    #[serde(default)]
    pub unsafe_cache: bool,
    /// Also if room is taken away that is kept for host failures.
    #[serde(default)]
    pub force: bool,
    /// Only say what stands in the way: answered with what was found instead of a job.
    #[serde(default)]
    pub dry_run: bool,
}

/// How a finding counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FindingLevel {
    /// As it should be.
    Fine,
    /// To know; it does not stand in the way.
    Warning,
    /// Stands in the way.
    Blocker,
}

/// Something that was looked at before or after a move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveFinding {
    /// What was looked at.
    pub check: String,
    /// How it counts.
    pub level: FindingLevel,
    /// What was found.
    pub text: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// What a migration would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigratePlan {
    /// The VM.
    pub vm: VmRef,
    /// Where it is.
    pub from: String,
    /// Where it would go.
    pub to: String,
    /// Nothing stands in the way.
    pub is_possible: bool,
    /// Everything that was looked at.
    pub findings: Vec<MoveFinding>,
    /// Disks that would be copied.
    pub copy: Vec<String>,
    /// Its memory.
    pub memory_bytes: u64,
}

/// A disk that is to go to another file, format or storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveDiskRequest {
    /// Target name of the disk.
    pub disk: String,
    /// A storage pool, or the absolute path of a file that does not exist.
    pub to: String,
    /// `qcow2` or `raw`; default: as it is.
    #[serde(default)]
    pub format: Option<String>,
    /// Copy at most so much per second.
    #[serde(default)]
    pub bandwidth_bytes_s: Option<u64>,
    /// Leave the old file.
    #[serde(default)]
    pub keep_source: bool,
}

/// A host that is to be emptied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// VMs that move at the same time, 1 to 4; default 2.
    #[serde(default)]
    pub parallel: Option<u8>,
    /// VMs that go first, in this order.
    #[serde(default)]
    pub first: Vec<String>,
    /// No move begins later than this after the first.
    #[serde(default)]
    pub within_s: Option<u64>,
    /// Move the definitions of VMs that are off, too.
    #[serde(default)]
    pub with_inactive: bool,
    /// Also if afterwards not all protected VMs would survive the host failures that are to be survived.
    #[serde(default)]
    pub force: bool,
    /// Only say what would go where, and what could not: answered with a plan instead of a job.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a drain would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainPlan {
    /// The host.
    pub host: String,
    /// What would go where.
    pub moves: Vec<PlannedMove>,
    /// What would stay.
    pub left: Vec<VmLeft>,
    /// Things to know before it is done.
    pub warnings: Vec<String>,
}

/// A VM that a plan moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedMove {
    /// The VM.
    pub vm: VmRef,
    /// Where it is then.
    pub from: String,
    /// Where it goes.
    pub to: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// VMs that must have moved before.
    pub after: Vec<String>,
    /// Why it moves.
    pub why: String,
}

/// A VM that stays where it is and should not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmLeft {
    /// The VM.
    pub vm: VmRef,
    /// Why.
    pub reasons: Vec<String>,
    /// What can be done about it.
    pub choices: Vec<String>,
}

/// A host that takes no VMs until it is taken into service again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostDrain {
    /// Who asked for it.
    pub by: String,
    /// Since when.
    pub since: Timestamp,
}

/// How a host's hardware is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostHealth {
    /// As far as it is believed.
    pub level: HealthLevel,
    /// Since when.
    pub since: Timestamp,
    /// What is wrong, the worst first.
    pub troubles: Vec<HostTrouble>,
    /// Sources that do not answer, and why.
    pub unread: Vec<String>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HealthLevel {
    /// Nothing has answered yet.
    Unknown,
    /// As it should be.
    Ok,
    /// It works, with less to spare.
    Warning,
    /// It fails, or is about to.
    Critical,
}

/// What a sensor says that is not well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostTrouble {
    /// How bad it is.
    pub level: HealthLevel,
    /// Which part, and what it says.
    pub text: String,
}

/// What balancing does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceMode {
    /// Nothing.
    #[default]
    Off,
    /// Says what it would do.
    Recommend,
    /// Does it.
    Automatic,
}

/// How balancing is told to behave, and what it said last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalanceStatus {
    /// What it does by itself.
    pub mode: BalanceMode,
    /// From 1 (only what must move) to 5 (for small gains).
    pub eagerness: u8,
    /// Seconds between two rounds.
    pub interval_s: u64,
    /// Whether the daemon that answers makes the rounds.
    pub is_here: bool,
    /// The last round, of whoever made it.
    pub last: Option<BalanceRound>,
}

/// One look at all hosts, and what followed from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalanceRound {
    /// When.
    pub at: Timestamp,
    /// Who asked: `balance` for those that come by themselves.
    pub by: String,
    /// The node that made it.
    pub node: String,
    /// What it was allowed to do.
    pub mode: BalanceMode,
    /// Hosts, before and after all moves.
    pub hosts: Vec<BalanceHost>,
    /// What should go where.
    pub moves: Vec<PlannedMove>,
    /// What should move and cannot.
    pub left: Vec<VmLeft>,
    /// Why nothing moves, if nothing does.
    pub nothing: Option<String>,
    /// The job that carries it out, if one does.
    pub job: Option<uuid::Uuid>,
    /// Why no plan could be made, if none could.
    pub error: Option<String>,
}

/// A host's load, in percent of what it has for VMs; before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalanceHost {
    /// Name.
    pub host: String,
    /// Why it takes no VMs, if it takes none.
    pub closed: Option<String>,
    /// CPU that VMs want.
    pub cpu_percent: u64,
    /// After all moves.
    pub cpu_percent_after: u64,
    /// Memory that VMs were given.
    pub memory_percent: u64,
    /// After all moves.
    pub memory_percent_after: u64,
    /// VMs that run.
    pub vms: u32,
    /// After all moves.
    pub vms_after: u32,
}

/// A plan that is to be made now, and carried out if it says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalanceRequest {
    /// From 1 to 5; default: as configured.
    #[serde(default)]
    pub eagerness: Option<u8>,
    /// VMs that move at the same time, 1 to 4; default: as configured.
    #[serde(default)]
    pub parallel: Option<u8>,
    /// For how many seconds to watch what VMs use, 1 to 60; default 5.
    #[serde(default)]
    pub interval_s: Option<u64>,
}
