//! A job as it is kept: what is shown of it, and what is needed to do it, also by a daemon that starts later.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_api::{
    BackupRequest, DrainRequest, Job, JobKind, MigrateRequest, MoveDiskRequest, Progress, RestoreRequest,
    VerifyRequest, VmRef,
};
use virtward_decide::{arbiter::Operation, placement::Plan};
use virtward_model::{PointId, Retention, Seconds, policy::Hooks};

/// A job with all that is needed to do it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What is shown.
    pub job: Job,
    /// What is done.
    pub work: Work,
    /// The node whose daemon does it.
    pub node: String,
    /// The start of that daemon that began it.
    #[serde(default)]
    pub boot: Option<Uuid>,
    /// It does not begin before.
    #[serde(default)]
    pub not_before: Option<Timestamp>,
    /// Another program holds the VM since.
    #[serde(default)]
    pub busy_since: Option<Timestamp>,
}

/// What a job does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "kebab-case")]
pub enum Work {
    /// Makes a restore point.
    Backup {
        /// What was asked for.
        request: BackupRequest,
        /// Commands around the freeze.
        #[serde(default)]
        hooks: Hooks,
        /// It is cancelled after so long.
        #[serde(default)]
        timeout: Option<Seconds>,
        /// Hosts of which one reads and stores.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        proxies: Vec<String>,
    },
    /// Makes a VM.
    Restore {
        /// What was asked for.
        request: RestoreRequest,
        /// The point that was meant.
        point: PointId,
    },
    /// Checks what is stored.
    Verify {
        /// What was asked for.
        request: VerifyRequest,
        /// The points that were meant; none is all.
        points: Vec<PointId>,
    },
    /// Copies restore points that the policy made of a VM and the other repository does not have.
    Copy {
        /// Name of the other repository.
        to: String,
        /// The rules there; empty: everything is kept.
        retention: Retention,
    },
    /// Deletes restore points that the policy made of a VM and no rule keeps.
    Prune {
        /// The rules.
        retention: Retention,
    },
    /// Gives back the space of data that no restore point needs.
    Gc {},
    /// Moves a VM to another host.
    Migrate {
        /// What was asked for.
        request: MigrateRequest,
        /// Because a person wants it, for the sake of load, or so that its host can be serviced.
        operation: Operation,
    },
    /// Moves a disk.
    MoveDisk {
        /// What was asked for.
        request: MoveDiskRequest,
    },
    /// Empties the host of this node.
    Drain {
        /// What was asked for.
        request: DrainRequest,
    },
    /// Carries out a plan of balancing.
    Balance {
        /// The plan.
        plan: Plan,
        /// Steps at the same time.
        parallel: usize,
    },
}

/// What jobs of a host keep each other waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Reading and writing of data: as many as the configuration says.
    Data,
    /// Moving of VMs and disks.
    Moves,
    /// Nothing: it has other jobs do the work.
    Plans,
}

impl Work {
    /// The kind that is shown.
    pub fn kind(&self) -> JobKind {
        match self {
            Work::Backup { .. } => JobKind::Backup,
            Work::Restore { .. } => JobKind::Restore,
            Work::Verify { .. } => JobKind::Verify,
            Work::Copy { .. } => JobKind::Copy,
            Work::Prune { .. } => JobKind::Prune,
            Work::Gc {} => JobKind::Gc,
            Work::Migrate { .. } => JobKind::Migrate,
            Work::MoveDisk { .. } => JobKind::MoveDisk,
            Work::Drain { .. } => JobKind::Drain,
            Work::Balance { .. } => JobKind::Balance,
        }
    }

    /// What it does to its VM, for the arbiter; nothing if it only works on a repository.
    pub fn operation(&self) -> Option<Operation> {
        match self {
            Work::Backup { .. } => Some(Operation::Backup),
            Work::Restore { .. } => Some(Operation::Restore),
            Work::Migrate { operation, .. } => Some(*operation),
            Work::MoveDisk { .. } => Some(Operation::MoveDisk),
            _ => None,
        }
    }

    /// Hosts of which one reads and stores.
    pub fn proxies(&self) -> &[String] {
        match self {
            Work::Backup { proxies, .. } => proxies,
            _ => &[],
        }
    }

    /// What it keeps waiting.
    pub fn lane(&self) -> Lane {
        match self {
            Work::Migrate { .. } | Work::MoveDisk { .. } => Lane::Moves,
            Work::Drain { .. } | Work::Balance { .. } => Lane::Plans,
            _ => Lane::Data,
        }
    }

    /// It is done on the host where its VM is, wherever that goes.
    pub fn follows_its_vm(&self) -> bool {
        matches!(self, Work::Backup { .. } | Work::Migrate { .. } | Work::MoveDisk { .. })
    }

    /// Doing it again after an interruption does no harm and needs nobody's consent.
    pub fn is_repeatable(&self) -> bool {
        match self {
            Work::Restore { .. } | Work::Balance { .. } => false,
            // The job whose plan it is a step of plans anew.
            Work::Migrate { operation, .. } => *operation == Operation::Migrate,
            _ => true,
        }
    }
}

/// Where a job is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node whose daemon does it.
    pub node: String,
    /// Its host.
    pub host: String,
}

/// Somebody wants a job to stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelAsked {
    /// Who.
    pub by: String,
    /// When.
    pub at: Timestamp,
}

/// Progress of a node's jobs.
pub type Running = BTreeMap<Uuid, Progress>;

/// A job to come.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What it does.
    pub work: Work,
    /// The VM that it is about.
    pub vm: Option<VmRef>,
    /// The repository that it uses.
    pub repository: String,
    /// Why it exists.
    pub origin: virtward_api::Origin,
    /// The host that is to read and store, as things are.
    pub proxy: Option<String>,
}

impl NewJob {
    /// A job that uses no repository.
    pub fn without_repository(work: Work, vm: Option<VmRef>, origin: virtward_api::Origin) -> Self {
        Self { work, vm, repository: String::new(), origin, proxy: None }
    }
}

/// A request that may be repeated.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// Who and which key, hashed.
    pub key: String,
    /// What was asked, hashed.
    pub request: String,
}

/// What a repeatable request made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Made {
    /// What was asked, hashed.
    pub request: String,
    /// Id of the job or token.
    pub id: String,
    /// When.
    pub at: Timestamp,
}

/// The last run of a policy on a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The job.
    pub job: Uuid,
    /// The time of the schedule that it served.
    pub due: Timestamp,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
    /// Which try.
    pub number: u32,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Outcome {
    Succeeded,
    Failed,
    Cancelled,
    Interrupted,
}

impl From<Attempt> for virtward_decide::schedule::Attempt {
    fn from(attempt: Attempt) -> Self {
        use virtward_decide::schedule::Outcome as To;
        let Attempt { due, started, ended, number, outcome, .. } = attempt;
        let outcome = match outcome {
            Outcome::Succeeded => To::Succeeded,
            Outcome::Failed => To::Failed,
            Outcome::Cancelled => To::Cancelled,
            Outcome::Interrupted => To::Interrupted,
        };
        Self { due, started, ended, number, outcome }
    }
}
