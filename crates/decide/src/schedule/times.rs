//! A policy made ready for planning, and the times of its schedule about the present.

use jiff::{
    SignedDuration, Timestamp,
    tz::{TimeZone, TimeZoneDatabase},
};
use uuid::Uuid;
use virtward_model::{Policy, Seconds};

use super::{cron::Cron, later};
use crate::policy::check::{Finding, Known, check};

/// A policy that was checked, with its cron expressions read and its time zone found.
#[derive(Clone, Debug)]
pub struct Compiled {
    policy: Policy,
    since: Timestamp,
    crons: Vec<Cron>,
    zone: TimeZone,
}

impl Compiled {
    /// Checks a policy. `since` is when its schedule came into force: when it was added or its schedule last changed
    /// ([`Difference::reschedules`](crate::policy::diff::Difference::reschedules)); times before that are not owed.
    pub fn new(policy: Policy, since: Timestamp, zones: &TimeZoneDatabase) -> Result<Self, Vec<Finding>> {
        let findings = check(std::slice::from_ref(&policy), &Known { zones, repositories: None, hosts: None });
        let crons: Vec<Cron> = policy.schedule.cron.iter().filter_map(|text| Cron::parse(text).ok()).collect();
        match zones.get(&policy.schedule.time_zone) {
            Ok(zone) if findings.is_empty() => Ok(Self { policy, since, crons, zone }),
            _ => Err(findings),
        }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// When its schedule came into force.
    pub fn since(&self) -> Timestamp {
        self.since
    }

    /// Its cron expressions.
    pub fn crons(&self) -> &[Cron] {
        &self.crons
    }

    /// Its time zone.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// How much later than the schedule says a VM starts.
    pub fn jitter(&self, vm: Uuid) -> Seconds {
        match self.policy.schedule.jitter.0 {
            0 => Seconds(0),
            jitter => Seconds(hash(&self.policy.name, vm) % jitter),
        }
    }

    /// The next times of the schedule, without jitter.
    pub fn upcoming(&self, after: Timestamp, count: usize) -> Vec<Timestamp> {
        std::iter::successors(self.next_after(after), |last| self.next_after(*last)).take(count).collect()
    }

    fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        self.crons.iter().filter_map(|cron| cron.next_after(after, &self.zone)).min()
    }

    fn last_until(&self, until: Timestamp) -> Option<Timestamp> {
        self.crons.iter().filter_map(|cron| cron.last_until(until, &self.zone)).max()
    }

    /// The times about an instant.
    pub(super) fn times(&self, now: Timestamp) -> Times {
        /// A jitter is shorter than the time between runs, so that two are enough but where clocks change.
        const RECENT_MAX: usize = 8;
        let jitter = self.policy.schedule.jitter;
        let mut recent: Vec<Timestamp> = Vec::new();
        let mut until = Some(now);
        while let Some(last) = until.and_then(|until| self.last_until(until)) {
            recent.push(last);
            if later(last, jitter) <= now || recent.len() == RECENT_MAX {
                break;
            }
            until = last.checked_sub(SignedDuration::from_nanos(1)).ok();
        }
        Times { recent, next: self.next_after(now) }
    }
}

/// Times of a schedule about an instant, without jitter.
#[derive(Clone, Debug)]
pub(super) struct Times {
    /// Not after it, newest first, back to the first that no jitter can postpone beyond it.
    recent: Vec<Timestamp>,
    /// The first after it.
    next: Option<Timestamp>,
}

impl Times {
    /// The last time that has come for a VM with this jitter.
    pub fn last(&self, jitter: Seconds, now: Timestamp) -> Option<Timestamp> {
        self.recent.iter().copied().find(|at| later(*at, jitter) <= now)
    }

    /// When the next one comes for it, jitter included.
    pub fn next(&self, jitter: Seconds, now: Timestamp) -> Option<Timestamp> {
        let coming = self.recent.iter().rev().copied().find(|at| later(*at, jitter) > now);
        coming.or(self.next).map(|at| later(at, jitter))
    }
}

/// The same number for the same policy and VM on every host and in every version: FNV-1a, mixed so that all bits count.
pub(super) fn hash(policy: &str, vm: Uuid) -> u64 {
    let bytes = policy.bytes().chain([0]).chain(*vm.as_bytes());
    let fnv = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mixed = (fnv ^ fnv >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}
