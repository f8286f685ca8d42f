//! Sentences of the daemon, taken apart so that each can be said in another language.
//!
//! Beside each stands the sentence itself, in English: for programs, logs, and readers that do not know its key.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// What a sentence says, and what is put into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Said {
    /// Which sentence. More may come: show the English one beside it for those that are not known.
    #[schema(value_type = Saying)]
    pub key: String,
    /// What is put into it. A name that ends in `_at` has a time, `_s` seconds, `_bytes` bytes; a list is put in as one, and
    /// an object is a sentence of its own. `why` is what somebody else said, as it was said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = Object)]
    pub values: BTreeMap<String, Value>,
}

impl Said {
    /// Puts a value in.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.values.insert(name.to_owned(), value.into());
        self
    }
}

impl From<Saying> for Said {
    fn from(saying: Saying) -> Self {
        let key = serde_json::to_value(saying).ok();
        let key = key.as_ref().and_then(Value::as_str).unwrap_or_default().to_owned();
        Self { key, values: BTreeMap::new() }
    }
}

impl From<Said> for Value {
    fn from(said: Said) -> Self {
        serde_json::to_value(said).unwrap_or_default()
    }
}

/// The sentences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Saying {
    // How a VM is protected.
    NoPolicy,
    ByPolicy,
    FirstNotDue,
    LastRunFailed,
    PointMissing,
    PointOld,
    PointTooOld,
    RepositoryUnreadable,
    // What a run or a job waits for.
    WaitsBackoff,
    WaitsCancelling,
    WaitsHostDown,
    WaitsHostGap,
    WaitsHostLimit,
    WaitsHostSilent,
    WaitsHypervisor,
    WaitsJobs,
    WaitsMoves,
    WaitsNoHost,
    WaitsNode,
    WaitsOperation,
    WaitsPoints,
    WaitsPolicy,
    WaitsRepositoryLimit,
    WaitsStorageLimit,
    WaitsTotal,
    WaitsWindow,
    WaitsWindowClosed,
    // What a policy makes of a VM.
    ExcludedBy,
    LacksRule,
    NoRuleHolds,
    NoRules,
    SelectedBy,
    RunCancelled,
    RunCaughtUp,
    RunFailed,
    RunIdle,
    RunMissed,
    RunNever,
    RunPaused,
    RunResumed,
    RunRetry,
    RunSince,
    RunStarts,
    RunTooLate,
    RunWaits,
    RunsByProxy,
    RunsHere,
    RunsHereNamed,
    RunsHereNoProxy,
    // What was done to keep a repository sound.
    Collected,
    Pruned,
    Verified,
    // What happened.
    AuditBroken,
    BalanceRecommended,
    CertificateEnded,
    CertificateEnds,
    CertificateGood,
    ConfigRefused,
    ConfigReloaded,
    DaemonStarted,
    HardwareCritical,
    HardwareRead,
    HardwareUnread,
    HardwareWarning,
    HardwareWell,
    HostDown,
    HostEvacuated,
    HostLibvirtdDown,
    HostNotEvacuated,
    HostUnknown,
    HostUp,
    JobCancelled,
    JobFailed,
    JobInterrupted,
    JobNodeRemoved,
    JobNodeSilent,
    JobSucceeded,
    JoinRefused,
    MigrationCertificates,
    MigrationCertificatesFailed,
    NoneOverdue,
    NodeAnswers,
    NodeCertificateEnds,
    NodeCertificateRenewed,
    NodeCertificateReplaced,
    NodeJoined,
    NodeLeads,
    NodeNameTaken,
    NodeRemoved,
    NodeSilent,
    NodeStopped,
    NotifyFailing,
    NotifyWell,
    PolicyApplied,
    PolicyDeleted,
    RepositoryFull,
    RepositoryRoom,
    RepositoryUnusable,
    RepositoryUsable,
    StateFull,
    StateLow,
    StateRoom,
    StateStoreAnswers,
    StateStoreSilent,
    ThisNodeRemoved,
    VmGone,
    VmNew,
    VmNotOverdue,
    VmOverdue,
    VmRunsTwice,
    VmState,
    VmsNotOverdue,
    VmsOverdue,
}
