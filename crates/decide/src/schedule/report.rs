//! What a plan says of every VM and policy: why it starts, waits, or has nothing to do.

use jiff::{Timestamp, tz::TimeZone};
use uuid::Uuid;
use virtward_model::Seconds;

use super::{Cause, HostState};
use crate::arbiter::Operation;

/// The plan in words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// One line for every VM and policy that selects it, by VM in the order of the input, then by policy.
    pub lines: Vec<Line>,
    /// Where the newest restore point is older than the policy's objective.
    pub rpo: Vec<RpoBreach>,
    /// VMs that no policy selects.
    pub unprotected: Vec<Uuid>,
    /// When time alone may change the plan; planning earlier is needed only when facts change.
    pub wake_at: Option<Timestamp>,
}

/// One VM and policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The VM.
    pub vm: Uuid,
    /// Place of the policy in the input.
    pub policy: usize,
    /// What is with it.
    pub state: State,
}

/// What is with a VM and a policy.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// The policy is paused.
    Paused,
    /// A backup of this policy runs.
    Running {
        /// Since then.
        since: Timestamp,
    },
    /// Nothing to do.
    Idle {
        /// Until then; none: never again.
        next: Option<Timestamp>,
        /// A time of the schedule without a good run that is not made up for.
        left_out: Option<(Timestamp, LeftOut)>,
    },
    /// It starts now.
    Starts {
        /// The time that it serves.
        due: Timestamp,
        /// Which try.
        attempt: u32,
        /// Why now.
        cause: Cause,
    },
    /// It is due and waits.
    Waits {
        /// The time that it serves.
        due: Timestamp,
        /// For what.
        why: Why,
    },
}

/// Why a time of the schedule is not made up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// It could not start within the policy's longest lateness.
    TooLate,
    /// No scheduler ran, and the policy does not catch up.
    Missed,
    /// So many tries failed.
    Failed(u32),
    /// A person cancelled it.
    Cancelled,
}

/// What a run that is due waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The time after a failed or interrupted try.
    Backoff {
        /// Until then.
        until: Timestamp,
    },
    /// The window.
    Window {
        /// It opens then; none: not within nine days.
        opens: Option<Timestamp>,
    },
    /// Another operation on the VM.
    Busy(Operation),
    /// Another policy's backup of the VM starts first.
    OtherPolicy(String),
    /// Nobody knows where the VM is.
    NoHost,
    /// Its host is not up.
    Host(String, HostState),
    /// As much runs in the cluster as may.
    Total(u32),
    /// As much runs on the host as may.
    HostLimit(String, u32),
    /// As much reads from the storage as may.
    StorageLimit(String, u32),
    /// As much writes to the repository as may.
    RepositoryLimit(String, u32),
    /// Another backup just started on the host.
    HostGap {
        /// The host.
        host: String,
        /// Until then.
        until: Timestamp,
    },
}

impl Why {
    /// When it ends by time alone.
    pub fn until(&self) -> Option<Timestamp> {
        match self {
            Why::Backoff { until } | Why::HostGap { until, .. } => Some(*until),
            Why::Window { opens } => *opens,
            _ => None,
        }
    }
}

/// A restore point that is too old, or missing.
#[derive(Clone, Debug, PartialEq)]
pub struct RpoBreach {
    /// The VM.
    pub vm: Uuid,
    /// Place of the policy in the input.
    pub policy: usize,
    /// The objective.
    pub rpo: Seconds,
    /// Age of the newest restore point; if there is none, how long the policy has been for this VM.
    pub age: Seconds,
    /// The instant that the newest restore point holds.
    pub newest: Option<Timestamp>,
}

impl State {
    /// When it changes by time alone.
    pub fn until(&self) -> Option<Timestamp> {
        match self {
            State::Idle { next, .. } => *next,
            State::Waits { why, .. } => why.until(),
            _ => None,
        }
    }

    /// For people, with times as the clock of a zone shows them.
    pub fn text(&self, zone: &TimeZone) -> String {
        let at = |time: Timestamp| time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M").to_string();
        match self {
            State::Paused => "the policy is paused".to_owned(),
            State::Running { since } => format!("runs since {}", at(*since)),
            State::Idle { next, left_out } => {
                let next = next.map_or("never again".to_owned(), |next| format!("next at {}", at(next)));
                match left_out {
                    None => format!("nothing to do, {next}"),
                    Some((due, why)) => format!("{}: {}; {next}", at(*due), why.text()),
                }
            }
            State::Starts { due, attempt, cause } => match cause {
                Cause::Scheduled => format!("starts, due {}", at(*due)),
                Cause::CaughtUp => format!("starts, was missed at {}", at(*due)),
                Cause::Retry => format!("starts try {attempt} for {}", at(*due)),
                Cause::Resumed => format!("starts again for {} after an interruption", at(*due)),
            },
            State::Waits { due, why } => format!("due {}, waits: {}", at(*due), why.text(zone)),
        }
    }
}

impl LeftOut {
    /// For people.
    pub fn text(self) -> String {
        match self {
            LeftOut::TooLate => "could not start in time".to_owned(),
            LeftOut::Missed => "was missed, and the policy does not catch up".to_owned(),
            LeftOut::Failed(1) => "failed".to_owned(),
            LeftOut::Failed(tries) => format!("failed {tries} times"),
            LeftOut::Cancelled => "was cancelled".to_owned(),
        }
    }
}

impl Why {
    /// For people, with times as the clock of a zone shows them.
    pub fn text(&self, zone: &TimeZone) -> String {
        let at = |time: &Timestamp| time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string();
        match self {
            Why::Backoff { until } => format!("tries again at {}", at(until)),
            Why::Window { opens: Some(opens) } => format!("the window opens at {}", at(opens)),
            Why::Window { opens: None } => "the window does not open soon".to_owned(),
            Why::Busy(operation) => format!("a {operation} of this VM is under way"),
            Why::OtherPolicy(policy) => format!("the backup of policy {policy} goes first"),
            Why::NoHost => "nobody knows which host the VM is on".to_owned(),
            Why::Host(host, HostState::Down) => format!("host {host} is down"),
            Why::Host(host, _) => format!("host {host} does not answer"),
            Why::Total(limit) => format!("{limit} backups run in the cluster, no more may"),
            Why::HostLimit(host, limit) => format!("{limit} backups run on host {host}, no more may"),
            Why::StorageLimit(storage, limit) => format!("{limit} backups read from storage {storage}, no more may"),
            Why::RepositoryLimit(name, limit) => format!("{limit} backups write to repository {name}, no more may"),
            Why::HostGap { host, until } => {
                format!("a backup just started on host {host}, the next may at {}", at(until))
            }
        }
    }
}
