//! Which backups start now, in which order, and why all others do not.
//!
//! ```text
//! cron ─ last time that has come, plus the VM's jitter ─┬ served by the last run? ─► idle until the next
//!                                                       ├ failed ─► backoff ─► retry, or given up
//!                                                       ├ too late, or missed without catch-up ─► left out
//!                                                       └ due ─► window ─► VM free ─► host up ─► limits ─► start
//! ```
//!
//! Each policy runs by itself; a VM that several select has a run of each, one after the other. Of the times that passed
//! without a run only the last is made up for: a backup holds the present, not the past. All is a function of
//! [`ScheduleInput`] and the time: two daemons with the same facts plan the same, and a plan can be replayed.
//!
//! Not here: starting anything, claims that others take between plan and start (the arbiter's claim decides then), and
//! copies to other repositories, which belong to the run.

pub mod cron;
mod due;
pub mod explain;
pub mod lint;
pub mod plan;
pub mod proxy;
pub mod report;
pub mod room;
pub mod select;
#[cfg(test)]
mod tests;
pub mod times;
pub mod window;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use uuid::Uuid;
use virtward_model::Seconds;

pub use self::{
    explain::{Explanation, explain},
    plan::plan,
    proxy::{Carrier, choose},
    report::{LeftOut, Line, Report, RpoBreach, State, Why},
    room::{Admitted, admit},
    select::Selection,
    times::Compiled,
};
use crate::arbiter::Operation;

/// Everything that a plan depends on, but the time.
#[derive(Clone, Debug, Default)]
pub struct ScheduleInput {
    /// Policies that are in force.
    pub policies: Vec<Compiled>,
    /// Every VM that is known, also where its host is not up.
    pub vms: Vec<VmFacts>,
    /// What is known of hosts; one that is not here is unknown.
    pub hosts: BTreeMap<String, HostState>,
    /// Hosts whose daemon answers, whatever is with their libvirt: they can be proxies.
    pub daemons: BTreeSet<String>,
    /// What became of earlier runs, by VM and name of policy.
    pub history: HashMap<Uuid, BTreeMap<String, History>>,
    /// Backups that run, whoever started them.
    pub running: Vec<Job>,
    /// Operations on VMs that run or are about to, as the arbiter knows them.
    pub claims: Vec<(Uuid, Operation)>,
    /// How much may run at once.
    pub limits: Limits,
    /// Since when some scheduler of this cluster has been planning without a break, by whatever daemon.
    pub scheduling_since: Timestamp,
}

/// What selection and limits need to know of a VM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VmFacts {
    /// Identity.
    pub uuid: Uuid,
    /// Name of the domain.
    pub name: String,
    /// The host that it is on, running or not; none if nobody knows.
    pub host: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// Values in its libvirt metadata.
    pub metadata: BTreeMap<String, String>,
    /// Storages that its disks are on, each once.
    pub storages: Vec<String>,
    /// When it was first seen: a VM owes no runs from before.
    pub first_seen: Timestamp,
}

/// Whether backups can start on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Daemon and libvirt answer.
    Up,
    /// It is known to be down.
    Down,
    /// It does not answer.
    Unknown,
}

/// What is known of a policy's runs of a VM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The last run that ended.
    pub last: Option<Attempt>,
    /// The instant that the newest restore point holds.
    pub newest: Option<Timestamp>,
}

/// One run that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The time of the schedule that it served.
    pub due: Timestamp,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
    /// Which try for that time, from 1.
    pub number: u32,
    /// How.
    pub outcome: Outcome,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a restore point.
    Succeeded,
    /// With an error; it is retried as often as the policy says.
    Failed,
    /// A person cancelled it; the next one is as scheduled.
    Cancelled,
    /// It was not its fault: a drain or failover cancelled it, or its daemon died. It is tried again, and not counted.
    Interrupted,
}

/// A backup that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The VM.
    pub vm: Uuid,
    /// The policy that it belongs to, if not started by hand.
    pub policy: Option<String>,
    /// The host that the VM is on.
    pub host: String,
    /// Hosts that may read and store in its place; of a backup that runs, the one that does.
    pub proxies: Vec<String>,
    /// Storages that are read.
    pub storages: Vec<String>,
    /// The repository that is written.
    pub repository: String,
    /// When it began.
    pub started: Timestamp,
}

/// How many backups may run at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// In the whole cluster.
    pub total: u32,
    /// On one host, with those that it does as a proxy.
    pub per_host: Limit,
    /// Reading from one storage.
    pub per_storage: Limit,
    /// Writing to one repository.
    pub per_repository: Limit,
    /// Time between two starts on one host: guests that were frozen together would all stall together.
    pub host_gap: Seconds,
}

/// A limit for everything of a kind, with exceptions by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// Unless named.
    pub each: u32,
    /// Exceptions; 0 lets nothing start there.
    pub named: BTreeMap<String, u32>,
}

impl Limit {
    /// The same for all.
    pub fn each(each: u32) -> Self {
        Self { each, named: BTreeMap::new() }
    }

    /// The limit of one.
    pub fn of(&self, name: &str) -> u32 {
        self.named.get(name).copied().unwrap_or(self.each)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            total: 64,
            per_host: Limit::each(2),
            per_storage: Limit::each(8),
            per_repository: Limit::each(16),
            host_gap: Seconds(20),
        }
    }
}

/// A backup that is to start now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The VM.
    pub vm: Uuid,
    /// The policy that it is for.
    pub policy: String,
    /// The host that the VM is on.
    pub host: String,
    /// The host that reads and stores in its place.
    pub proxy: Option<String>,
    /// The time of the schedule that it serves.
    pub due: Timestamp,
    /// Which try, from 1.
    pub attempt: u32,
    /// Why now.
    pub cause: Cause,
}

/// Why a run is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its time has come.
    Scheduled,
    /// Its time came while no scheduler ran.
    CaughtUp,
    /// The last try failed.
    Retry,
    /// The last try was interrupted.
    Resumed,
}

/// A later instant; the end of time if that is too far.
pub(crate) fn later(at: Timestamp, by: Seconds) -> Timestamp {
    at.checked_add(by.duration()).unwrap_or(Timestamp::MAX)
}
