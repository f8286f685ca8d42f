//! Policies: what was applied, what a change would do, why a VM is or is not backed up.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Said;

/// A policy as it was applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// Rises with every change: what to send as `If-Match` to change nothing that was not read.
    pub revision: u64,
    /// When it was last changed.
    pub updated: Timestamp,
    /// By whom.
    pub updated_by: String,
    /// Nothing starts by itself.
    pub is_paused: bool,
    /// The policy, with the names of the policy file.
    #[schema(value_type = Object)]
    pub policy: Value,
    /// The text that it was applied from (TOML), with its comments; none if it was applied as JSON.
    pub source: Option<String>,
    /// VMs that it selects now.
    pub vms: Vec<VmRef>,
    /// When its next run is due.
    pub next_run: Option<Timestamp>,
}

/// A policy to apply, validate or compare: as text or as JSON, not both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyDocument {
    /// A policy file (TOML). Messages name its lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Name of that file, for messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The same as JSON, with the names of the policy file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub policy: Option<Value>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FindingSeverity {
    /// It would work, and surprise.
    Warning,
    /// It is refused.
    Error,
}

/// One remark on a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// How bad it is.
    pub severity: FindingSeverity,
    /// Field, as in the file: `schedule.cron`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
    /// Line of the file, from 1.
    pub line: Option<u32>,
}

/// A VM by both of its names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct VmRef {
    /// UUID.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
}

/// What is wrong with a policy and what it would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PolicyReport {
    /// It can be applied.
    pub is_valid: bool,
    /// Remarks.
    pub findings: Vec<Finding>,
    /// Its name, as far as it could be read.
    pub name: Option<String>,
    /// VMs that it selects now.
    pub vms: Vec<VmRef>,
    /// The next times that it is due.
    pub next_runs: Vec<Timestamp>,
}

/// What applying a policy would change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PolicyDiff {
    /// Name of the policy.
    pub name: String,
    /// There is none of that name yet.
    pub is_new: bool,
    /// Fields that differ; empty if nothing would change.
    pub changes: Vec<Change>,
    /// VMs that it would select and does not.
    pub vms_added: Vec<VmRef>,
    /// VMs that it selects and would not.
    pub vms_removed: Vec<VmRef>,
    /// What is wrong with it and what it would do.
    pub report: PolicyReport,
}

/// A field that differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// Field, as in the file: `retention.keep-daily`.
    pub field: String,
    /// Value now; null if there is none.
    pub from: Value,
    /// Value then; null if there would be none.
    pub to: Value,
}

/// A backup that is to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpcomingRun {
    /// The policy.
    pub policy: String,
    /// When it is due.
    pub at: Timestamp,
    /// Why it does not start although it is due.
    pub waiting_for: Option<String>,
    /// The same, for other languages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_said: Option<Said>,
}

/// Why a VM is, or is not, backed up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// The VM.
    pub vm: VmRef,
    /// What each policy makes of it.
    pub policies: Vec<PolicyVerdict>,
}

/// What one policy makes of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PolicyVerdict {
    /// The policy.
    pub policy: String,
    /// It selects the VM.
    pub is_selected: bool,
    /// Why, in sentences.
    pub reasons: Vec<String>,
    /// The same, one for each, for other languages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons_said: Vec<Said>,
    /// When it is due next.
    pub next_run: Option<Timestamp>,
    /// Why it does not run now although it is due.
    pub waiting_for: Option<String>,
    /// The host that reads and stores it, as things are: the VM's own or a proxy; null if the policy does not select it.
    #[serde(default)]
    pub runs_on: Option<String>,
}
