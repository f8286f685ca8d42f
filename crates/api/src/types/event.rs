//! What happened, for people and for auditors.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{PrincipalKind, Said};

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look at it.
    Warning,
    /// Something does not work.
    Error,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Unique; later events have greater ids, on one daemon always and between daemons as far as their clocks agree.
    pub id: String,
    /// When.
    pub at: Timestamp,
    /// How much it matters.
    pub severity: Severity,
    /// What, for programs: `job-failed`, `job-succeeded`, `host-state`, `vm-added`, `vm-removed`, `vm-state`,
    /// `policy-changed`, `repository-state`, `daemon-started` …
    pub kind: String,
    /// What, for people.
    pub message: String,
    /// The same, for other languages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
    /// The VM concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Uuid>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// The node that tells of it, in lists of several nodes' events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The host concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The job concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<Uuid>,
    /// The policy concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The repository concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
}

/// One change that somebody asked for, whether it was made or refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Number in the daemon's log, from 1, without gaps.
    pub id: u64,
    /// When.
    pub at: Timestamp,
    /// Who.
    pub who: String,
    /// How they proved it.
    pub via: PrincipalKind,
    /// From which address; none on the Unix socket.
    pub address: Option<String>,
    /// What: `job.backup`, `policy.put`, `token.create`, `session.login` …
    pub action: String,
    /// On what: a VM, a policy, a token, a job.
    pub target: Option<String>,
    /// HTTP status that it was answered with.
    pub status: u16,
    /// More about it; never a secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The node whose log it is in, in lists of several nodes' entries; it is no part of the hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Hash over this entry and the one before it: a changed or missing entry shows.
    pub chain: String,
}
