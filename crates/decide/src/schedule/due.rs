//! Whether a policy owes a VM a run now: schedule, history, lateness and retries, without limits and other VMs.

use jiff::Timestamp;
use virtward_model::{Seconds, policy::Retries};

use super::{
    Attempt, Cause, Compiled, History, LeftOut, Outcome, State, VmFacts, Why, later,
    times::{Times, hash},
    window,
};

/// Changes of the coordinator leave gaps in planning that are no outage.
const HANDOVER: Seconds = Seconds::minutes(5);
/// Longest time between two tries.
const BACKOFF_MAX: Seconds = Seconds::hours(6);

/// A policy with what does not depend on the VM.
pub(super) struct Current<'a> {
    pub compiled: &'a Compiled,
    times: Times,
    /// Closed, and when it opens, if it does soon.
    closed: Option<Option<Timestamp>>,
    now: Timestamp,
    scheduling_since: Timestamp,
}

/// A run that may start as far as schedule and history go.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub due: Timestamp,
    /// The earliest that it could start: who waits longest goes first.
    pub ready: Timestamp,
    pub attempt: u32,
    pub cause: Cause,
    /// Breaks ties, differently for each policy, so that neighbours in the list do not start together.
    pub order: u64,
}

/// What is owed.
pub(super) enum Owed {
    Nothing(State),
    Run(Candidate),
}

impl<'a> Current<'a> {
    pub fn new(compiled: &'a Compiled, now: Timestamp, scheduling_since: Timestamp) -> Self {
        let here = now.to_zoned(compiled.zone().clone());
        let shut = compiled.policy().schedule.window.as_ref().filter(|hours| !window::is_open(hours, &here));
        Self {
            compiled,
            times: compiled.times(now),
            closed: shut.map(|hours| window::next_open(hours, now, compiled.zone())),
            now,
            scheduling_since,
        }
    }

    /// When the policy began to be for the VM. A time in the future is from a clock that was ahead and does not count.
    pub fn in_force(&self, vm: &VmFacts) -> Timestamp {
        let known = [self.compiled.since(), vm.first_seen];
        known.into_iter().filter(|since| *since <= self.now).max().unwrap_or(Timestamp::MIN)
    }

    /// When the next time of the schedule comes for the VM.
    pub fn next(&self, vm: &VmFacts) -> Option<Timestamp> {
        self.times.next(self.compiled.jitter(vm.uuid), self.now)
    }

    pub fn owed(&self, vm: &VmFacts, history: Option<&History>) -> Owed {
        if self.compiled.policy().paused {
            return Owed::Nothing(State::Paused);
        }
        let jitter = self.compiled.jitter(vm.uuid);
        // A run that began in the future says nothing: clocks were put right since.
        let last = history.and_then(|history| history.last).filter(|last| last.started <= self.now);
        let served = |due: Timestamp| {
            due <= self.in_force(vm) || last.is_some_and(|last| due <= last.due || later(due, jitter) <= last.started)
        };
        let fresh = self.times.last(jitter, self.now).filter(|due| !served(*due));
        let next = self.next(vm);
        let run = match (fresh, last) {
            (Some(due), _) => self.scheduled(due, later(due, jitter)),
            (None, Some(last)) => self.again(&last, jitter),
            (None, None) => return Owed::Nothing(State::Idle { next, left_out: None }),
        };
        match run {
            Ok(Some((due, ready, attempt, cause))) => self.timely(Candidate {
                due,
                ready,
                attempt,
                cause,
                order: hash(&self.compiled.policy().name, vm.uuid),
            }),
            Ok(None) => Owed::Nothing(State::Idle { next, left_out: None }),
            Err(left_out) => Owed::Nothing(State::Idle { next, left_out: Some(left_out) }),
        }
    }

    fn scheduled(&self, due: Timestamp, ready: Timestamp) -> Result<Option<Run>, (Timestamp, LeftOut)> {
        let missed = later(ready, HANDOVER) < self.scheduling_since;
        if missed && !self.compiled.policy().schedule.catch_up {
            return Err((due, LeftOut::Missed));
        }
        self.not_too_late(due, ready, self.now)?;
        Ok(Some((due, ready, 1, if missed { Cause::CaughtUp } else { Cause::Scheduled })))
    }

    /// What follows the last run, if the schedule asks for nothing new.
    fn again(&self, last: &Attempt, jitter: Seconds) -> Result<Option<Run>, (Timestamp, LeftOut)> {
        let retries = self.compiled.policy().retries;
        let (wait, attempt, cause) = match last.outcome {
            Outcome::Succeeded => return Ok(None),
            Outcome::Cancelled => return Err((last.due, LeftOut::Cancelled)),
            Outcome::Failed if last.number > retries.count => return Err((last.due, LeftOut::Failed(last.number))),
            Outcome::Failed => (backoff(retries, last.number), last.number + 1, Cause::Retry),
            Outcome::Interrupted => (retries.backoff, last.number, Cause::Resumed),
        };
        let ready = if last.ended <= self.now { later(last.ended, wait) } else { self.now };
        self.not_too_late(last.due, later(last.due, jitter), ready.max(self.now))?;
        Ok(Some((last.due, ready, attempt, cause)))
    }

    fn not_too_late(&self, due: Timestamp, ready: Timestamp, start: Timestamp) -> Result<(), (Timestamp, LeftOut)> {
        match self.compiled.policy().schedule.max_lateness {
            Some(longest) if start > later(ready, longest) => Err((due, LeftOut::TooLate)),
            _ => Ok(()),
        }
    }

    fn timely(&self, candidate: Candidate) -> Owed {
        let why = match self.closed {
            _ if candidate.ready > self.now => Why::Backoff { until: candidate.ready },
            Some(opens) => Why::Window { opens },
            None => return Owed::Run(candidate),
        };
        Owed::Nothing(State::Waits { due: candidate.due, why })
    }
}

/// Due, ready, which try, cause.
type Run = (Timestamp, Timestamp, u32, Cause);

/// Time after a failed try: doubled with each.
fn backoff(retries: Retries, failed: u32) -> Seconds {
    let doubled = 1_u64.checked_shl(failed.saturating_sub(1)).unwrap_or(u64::MAX);
    Seconds(retries.backoff.0.saturating_mul(doubled)).min(BACKOFF_MAX.max(retries.backoff))
}
