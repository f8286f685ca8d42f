//! A service inside a VM, watched by probes: from "it failed" to the last resort, one step at a time.
//!
//! ```text
//!   UP ──failures in a row──► restart the service ──► restart the VM ──► relocate ──► switch to the standby
//!    ▲                          each rung: so many tries, and a grace after each in which failures do not count
//!    └── successes in a row ────┘
//! ```
//!
//! Rungs that are not allowed or not there are left out. After the last one nothing more is done but to say so, until the
//! service is seen up again. A probe that could not be made (unknown) is no failure.

use serde::{Deserialize, Serialize};

use super::timing::Moment;

/// A step of the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// Restart the service inside the guest.
    RestartService,
    /// Restart the VM where it is.
    RestartVm,
    /// Start the VM on another host.
    Relocate,
    /// Let the standby VM take over.
    SwitchToStandby,
}

/// One rung and how it is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What to do.
    pub action: Rung,
    /// How often before the next rung.
    pub tries: u32,
    /// For so long after it, failures do not count, in milliseconds.
    pub grace_ms: u64,
}

/// How a service is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProbePolicy {
    /// Failures in a row before anything is done.
    pub failures: u32,
    /// Successes in a row after which all is forgotten.
    pub successes: u32,
    /// The ladder.
    pub steps: Vec<Step>,
}

impl Default for ProbePolicy {
    fn default() -> Self {
        let step = |action, tries, grace_ms| Step { action, tries, grace_ms };
        Self {
            failures: 3,
            successes: 3,
            steps: vec![
                step(Rung::RestartService, 2, 30_000),
                step(Rung::RestartVm, 1, 120_000),
                step(Rung::Relocate, 1, 180_000),
                step(Rung::SwitchToStandby, 1, 60_000),
            ],
        }
    }
}

/// What restarts a service inside its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// A systemd unit.
    Unit(String),
    /// A program, by its whole path, and its arguments.
    Command(Vec<String>),
}

/// A service of a VM that is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watched {
    /// What is asked, as a URL: `tcp://10.0.0.5:5432`.
    pub check: String,
    /// Between two probes, in milliseconds.
    pub every_ms: u64,
    /// After a start of the VM, failures do not count for so long, in milliseconds.
    pub grace_ms: u64,
    /// How the service is restarted inside, if it can be.
    pub restart: Option<Restart>,
    /// What is done about failures.
    pub policy: ProbePolicy,
}

impl Watched {
    /// The ladder without rungs that are not there: a service that nobody knows how to restart, a VM without a standby, and
    /// one that was taken elsewhere for this service's sake since it was last seen up. What did not help on two hosts
    /// helps on no third.
    pub fn ladder(&self, moves: u32, has_standby: bool) -> ProbePolicy {
        let mut policy = self.policy.clone();
        policy.steps.retain(|step| match step.action {
            Rung::RestartService => self.restart.is_some(),
            Rung::SwitchToStandby => has_standby,
            Rung::RestartVm | Rung::Relocate => true,
        });
        for step in policy.steps.iter_mut().filter(|step| step.action == Rung::Relocate) {
            step.tries = step.tries.saturating_sub(moves);
        }
        policy
    }
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The service answered as it should.
    Up,
    /// It did not.
    Down,
    /// The probe could not be made, or the VM is not meant to run.
    Unknown,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Take this rung.
    Act(Rung),
    /// For the log and the events of the cluster.
    Say(String),
}

/// The watch over one service.
#[derive(Debug)]
pub struct Watch {
    policy: ProbePolicy,
    down: u32,
    up: u32,
    step: usize,
    tried: u32,
    grace_until: Moment,
    exhausted: bool,
}

impl Watch {
    /// A watch over a service that is thought to be up. Failures do not count for a grace after the VM's start.
    pub fn new(policy: ProbePolicy, now: Moment, grace_ms: u64) -> Self {
        Self { policy, down: 0, up: 0, step: 0, tried: 0, grace_until: now.plus(grace_ms), exhausted: false }
    }

    /// Something was done to the whole VM: failures do not count for this long.
    pub fn hold(&mut self, now: Moment, ms: u64) {
        self.grace_until = self.grace_until.max(now.plus(ms));
        (self.up, self.down) = (0, 0);
    }

    /// So many successes in a row that the service counts as well.
    pub fn is_well(&self) -> bool {
        self.up >= self.policy.successes
    }

    /// One probe's result.
    pub fn step(&mut self, now: Moment, found: Found) -> Vec<Effect> {
        match found {
            Found::Unknown => Vec::new(),
            Found::Up => self.is_up(),
            Found::Down if now < self.grace_until => {
                self.up = 0;
                Vec::new()
            }
            Found::Down => self.is_down(now),
        }
    }

    fn is_up(&mut self) -> Vec<Effect> {
        (self.down, self.up) = (0, self.up.saturating_add(1));
        let acted = self.step > 0 || self.tried > 0;
        if self.up < self.policy.successes || !acted {
            return Vec::new();
        }
        (self.step, self.tried, self.exhausted) = (0, 0, false);
        vec![Effect::Say("the service is up again".into())]
    }

    fn is_down(&mut self, now: Moment) -> Vec<Effect> {
        (self.up, self.down) = (0, self.down.saturating_add(1));
        if self.down < self.policy.failures.max(1) || self.exhausted {
            return Vec::new();
        }
        while self.policy.steps.get(self.step).is_some_and(|step| self.tried >= step.tries) {
            (self.step, self.tried) = (self.step + 1, 0);
        }
        let Some(step) = self.policy.steps.get(self.step) else {
            self.exhausted = true;
            return vec![Effect::Say("the service is down, and nothing that is allowed has helped".into())];
        };
        (self.down, self.tried) = (0, self.tried + 1);
        self.grace_until = now.plus(step.grace_ms);
        vec![Effect::Act(step.action)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rungs taken in an hour of a service that is up when `up` says so, probed each five seconds.
    fn hour(up: impl Fn(u64) -> Found) -> Vec<(u64, Rung)> {
        let mut watch = Watch::new(ProbePolicy::default(), Moment(0), 60_000);
        let mut taken = Vec::new();
        for s in (0..3600).step_by(5) {
            for effect in watch.step(Moment(s * 1000), up(s)) {
                if let Effect::Act(rung) = effect {
                    taken.push((s, rung));
                }
            }
        }
        taken
    }

    #[test]
    fn rungs_are_taken_in_order_and_once() {
        use Rung::{Relocate, RestartService, RestartVm, SwitchToStandby};
        let taken = hour(|_| Found::Down);
        let rungs: Vec<Rung> = taken.iter().map(|(_, rung)| *rung).collect();
        assert_eq!(rungs, [RestartService, RestartService, RestartVm, Relocate, SwitchToStandby]);
        assert!(taken.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 30), "graces are kept: {taken:?}");
        assert!(taken[0].0 >= 60, "and the one after the start");
    }

    #[test]
    fn rungs_that_are_not_there_are_left_out_and_a_vm_is_moved_once_for_a_service() {
        let watched = |restart| Watched {
            check: "tcp://10.0.0.1:1".into(),
            every_ms: 5000,
            grace_ms: 60_000,
            restart,
            policy: ProbePolicy::default(),
        };
        let taken = |watched: &Watched, moves, has_standby| {
            let mut watch = Watch::new(watched.ladder(moves, has_standby), Moment(0), 0);
            let steps = (0..720).flat_map(move |n| watch.step(Moment(n * 5000), Found::Down));
            steps
                .filter_map(|effect| if let Effect::Act(rung) = effect { Some(rung) } else { None })
                .collect::<Vec<_>>()
        };
        let unit = Some(Restart::Unit("nginx".into()));
        assert_eq!(taken(&watched(None), 0, false), [Rung::RestartVm, Rung::Relocate]);
        assert_eq!(taken(&watched(None), 1, true), [Rung::RestartVm, Rung::SwitchToStandby]);
        assert_eq!(taken(&watched(unit), 1, false), [Rung::RestartService, Rung::RestartService, Rung::RestartVm]);
    }

    #[test]
    fn what_was_done_to_the_vm_gives_all_its_services_time() {
        let mut watch = Watch::new(ProbePolicy::default(), Moment(0), 0);
        assert!(watch.step(Moment(0), Found::Down).is_empty() && watch.step(Moment(1), Found::Down).is_empty());
        watch.hold(Moment(2), 60_000);
        assert!((1..60).all(|s| watch.step(Moment(s * 1000), Found::Down).is_empty()));
    }

    #[test]
    fn a_blip_or_an_unknown_does_nothing() {
        assert!(hour(|s| if s % 60 < 10 { Found::Down } else { Found::Up }).is_empty());
        assert!(hour(|_| Found::Unknown).is_empty());
    }

    #[test]
    fn after_it_was_up_the_ladder_begins_again() {
        let taken = hour(|s| if (100..200).contains(&s) || s > 1000 { Found::Down } else { Found::Up });
        let later: Vec<Rung> = taken.iter().filter(|(s, _)| *s > 1000).map(|(_, rung)| *rung).collect();
        assert_eq!(later.first(), Some(&Rung::RestartService));
    }
}
