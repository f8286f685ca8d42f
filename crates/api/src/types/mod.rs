//! Everything that is sent and received, one file per noun.

mod access;
mod cluster;
mod event;
mod ha;
mod inventory;
mod job;
mod moves;
mod notify;
mod point;
mod policy;
mod repository;
mod said;
mod system;

pub use self::{
    access::{Login, NewToken, Principal, PrincipalKind, Role, Session, Token, TokenCreated},
    cluster::{ClusterLeader, ClusterNode, ClusterStatus, JoinTokenMade, NewJoinToken, StateBackup},
    event::{AuditEntry, Event, Severity},
    ha::{
        HaAddress, HaCapacity, HaExplanation, HaFenceDevice, HaFenceTest, HaFenceTestRequest, HaFinding, HaHost,
        HaLoss, HaMove, HaPair, HaPolicy, HaReason, HaRoom, HaService, HaStandby, HaStart, HaStatus, HaVm,
    },
    inventory::{
        Guest, Host, HostState, LastFailure, LastGood, Network, PowerState, Protection, ProtectionState, Storage,
        Usage, Vm, VmDetail, VmDisk,
    },
    job::{
        BackupRequest, GcRequest, Job, JobError, JobKind, JobLogEntry, JobResult, JobState, JobVm, LogLevel, Origin,
        PlannedDisk, Progress, Quiesce, RestorePlan, RestoreRequest, RestoredDisk, VerifyDepth, VerifyRequest,
    },
    moves::{
        BalanceHost, BalanceMode, BalanceRequest, BalanceRound, BalanceStatus, DrainPlan, DrainRequest, FindingLevel,
        HealthLevel, HostDrain, HostHealth, HostTrouble, MigratePlan, MigrateRequest, MoveDiskRequest, MoveFinding,
        PlannedMove, VmLeft,
    },
    notify::{NotifyChannel, NotifyKind, NotifyOutcome, NotifyTest},
    point::{Point, PointDisk, PointQuiesce},
    policy::{
        Change, Explanation, Finding, FindingSeverity, Policy, PolicyDiff, PolicyDocument, PolicyReport, PolicyVerdict,
        UpcomingRun, VmRef,
    },
    repository::{Maintenance, Repository, RepositoryState, RepositoryUsage, UsageSample},
    said::{Said, Saying},
    system::{Capacity, Counts, HostCounts, JobCounts, Overview, ProtectionCounts, Settings, StreamReset, Version},
};
