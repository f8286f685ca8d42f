//! One protected VM on the host that runs it: does its guest live?
//!
//! ```text
//!              agent answered or I/O went on
//!            ┌──────────────┐
//!            ▼              │  both silent for hang_ms, or guest watchdog, or panic
//!        HEALTHY ──────► DOUBTED ─────────────────────────────► RESET, at most resets_max within the window
//!            ▲   agent silent alone: said, nothing done            │
//!            └──────────────── agent answers again ────────────────┤ budget spent
//!                                                                  ▼
//!   paused on an I/O error: resumed with pauses, then ────────► RELOCATE
//! ```
//!
//! A hang takes two signals: an agent that answered since the guest started and stopped answering, together with disks
//! that do nothing. Either alone is a busy or an idle guest. A guest without an agent is never called hung; its
//! emulated watchdog and its panic device speak for it. Unknown (the hypervisor did not answer) is no signal at all.

use super::{record::VmPolicy, timing::Moment};

/// What was seen of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its process was started or its machine reset.
    Started,
    /// A look: whether the agent answered, and the requests of all disks so far; none if it is not known.
    Sample {
        /// Agent.
        agent: Option<bool>,
        /// Requests.
        io: Option<u64>,
    },
    /// Its emulated watchdog (i6300esb) fired and the machine did nothing about it.
    Watchdog,
    /// Its kernel panicked (pvpanic).
    Panicked,
    /// Its vCPUs were stopped by an I/O error.
    IoPaused,
    /// Its vCPUs run.
    Running,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Press the reset button.
    Reset(String),
    /// Let the vCPUs run again after an I/O error.
    Resume,
    /// End it here, and say so to the agent ([`super::agent::Event::Relocate`]).
    Relocate(String),
    /// Its readiness gate is passed ([`super::agent::Event::Ready`]).
    Ready,
    /// For the log and the events of the cluster.
    Say(String),
}

/// Tries to resume after an I/O error before the VM is taken elsewhere.
const RESUMES_MAX: u32 = 5;
/// Between them.
const RESUME_MS: u64 = 10_000;

/// The monitor of one VM.
#[derive(Debug)]
pub struct Guest {
    policy: VmPolicy,
    started: Moment,
    answered: Option<Moment>,
    agent_lost: bool,
    io: Option<(u64, Moment)>,
    ready: bool,
    resets: Vec<Moment>,
    paused: Option<(Moment, u32)>,
    given_up: bool,
}

impl Guest {
    /// A monitor for a guest that was just found or started.
    pub fn new(policy: VmPolicy, now: Moment) -> Self {
        Self {
            policy,
            started: now,
            answered: None,
            agent_lost: false,
            io: None,
            ready: false,
            resets: Vec::new(),
            paused: None,
            given_up: false,
        }
    }

    /// How it is protected may change while it runs.
    pub fn set_policy(&mut self, policy: VmPolicy) {
        self.policy = policy;
    }

    /// Resets within the window.
    pub fn resets(&self, now: Moment) -> usize {
        self.resets.iter().filter(|reset| now.since(**reset) < self.policy.resets_window_ms).count()
    }

    /// One step.
    pub fn step(&mut self, now: Moment, event: Event) -> Vec<Effect> {
        if self.given_up && event != Event::Started {
            return Vec::new();
        }
        match event {
            Event::Started => {
                let resets = std::mem::take(&mut self.resets);
                *self = Self { resets, ..Self::new(self.policy.clone(), now) };
                Vec::new()
            }
            Event::Sample { agent, io } => self.sample(now, agent, io),
            Event::Watchdog => self.reset(now, "its watchdog fired"),
            Event::Panicked => self.reset(now, "its kernel panicked"),
            Event::Running => {
                self.paused = None;
                Vec::new()
            }
            Event::IoPaused => self.io_paused(now),
        }
    }

    fn sample(&mut self, now: Moment, agent: Option<bool>, io: Option<u64>) -> Vec<Effect> {
        let mut out = Vec::new();
        if let Some(io) = io
            && self.io.is_none_or(|(before, _)| before != io)
        {
            self.io = Some((io, now));
        }
        match agent {
            Some(true) => {
                if std::mem::take(&mut self.agent_lost) {
                    out.push(Effect::Say("its agent answers again".into()));
                }
                self.answered = Some(now);
                if !std::mem::replace(&mut self.ready, true) {
                    out.push(Effect::Ready);
                }
            }
            Some(false) => out.extend(self.silent_agent(now)),
            None => {}
        }
        out
    }

    fn silent_agent(&mut self, now: Moment) -> Vec<Effect> {
        let (Some(answered), Some((_, io))) = (self.answered, self.io) else { return Vec::new() };
        let hang = self.policy.hang_ms;
        if hang == 0 || self.paused.is_some() || now.since(answered) < hang {
            return Vec::new();
        }
        if now.since(io) >= hang {
            return self.reset(now, "its agent and its disks are silent");
        }
        if std::mem::replace(&mut self.agent_lost, true) {
            return Vec::new();
        }
        vec![Effect::Say("its agent does not answer; its disks work, so it is left alone".into())]
    }

    fn io_paused(&mut self, now: Moment) -> Vec<Effect> {
        let (last, tries) = self.paused.unwrap_or((now, 0));
        if tries > 0 && now.since(last) < RESUME_MS {
            return Vec::new();
        }
        if tries >= RESUMES_MAX {
            return self.relocate(format!("paused by I/O errors {tries} times"));
        }
        self.paused = Some((now, tries + 1));
        vec![Effect::Resume]
    }

    fn reset(&mut self, now: Moment, why: &str) -> Vec<Effect> {
        if self.resets(now) >= self.policy.resets_max as usize {
            return self.relocate(format!("{why}, after {} resets", self.policy.resets_max));
        }
        let window = self.policy.resets_window_ms;
        self.resets.retain(|reset| now.since(*reset) < window);
        self.resets.push(now);
        (self.started, self.answered, self.io, self.agent_lost) = (now, None, None, false);
        vec![Effect::Reset(why.to_owned())]
    }

    fn relocate(&mut self, why: String) -> Vec<Effect> {
        self.given_up = true;
        vec![Effect::Relocate(why)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        let mut guest = Guest::new(VmPolicy::default(), Moment(0));
        assert_eq!(guest.step(Moment(0), sample(true, 1)), [Effect::Ready]);
        guest
    }

    fn sample(agent: bool, io: u64) -> Event {
        Event::Sample { agent: Some(agent), io: Some(io) }
    }

    fn is_reset(effects: &[Effect]) -> bool {
        matches!(effects, [Effect::Reset(_)])
    }

    #[test]
    fn a_hang_takes_two_signals() {
        let mut silent_agent = guest();
        for s in 1..600 {
            let effects = silent_agent.step(Moment(s * 1000), sample(false, s));
            assert!(!is_reset(&effects), "its disks work, {s} s");
        }
        let mut idle = guest();
        assert!((1..600).all(|s| idle.step(Moment(s * 1000), sample(true, 1)).is_empty()), "its agent answers");
        let mut hung = guest();
        assert!((1..60).all(|s| hung.step(Moment(s * 1000), sample(false, 1)).is_empty()));
        assert!(is_reset(&hung.step(Moment(60_000), sample(false, 1))));
    }

    #[test]
    fn unknown_is_no_signal_and_no_agent_is_no_hang() {
        let mut unknown = guest();
        let event = Event::Sample { agent: None, io: None };
        assert!((1..600).all(|s| unknown.step(Moment(s * 1000), event).is_empty()), "a blocked hypervisor");
        let mut without = Guest::new(VmPolicy::default(), Moment(0));
        assert!((1..600).all(|s| without.step(Moment(s * 1000), sample(false, 1)).is_empty()));
    }

    #[test]
    fn the_budget_holds_then_it_is_taken_elsewhere() {
        let mut guest = guest();
        for n in 0..3 {
            assert!(is_reset(&guest.step(Moment(n * 1000), Event::Panicked)), "{n}");
        }
        assert!(matches!(&guest.step(Moment(4000), Event::Panicked)[..], [Effect::Relocate(_)]));
        assert!(guest.step(Moment(5000), Event::Panicked).is_empty(), "said once");
    }

    #[test]
    fn resets_of_long_ago_do_not_count() {
        let mut guest = guest();
        for hour in 0..20 {
            assert!(is_reset(&guest.step(Moment(hour * 3_600_000 / 2), Event::Watchdog)), "two an hour");
        }
    }

    #[test]
    fn an_io_error_is_waited_out_then_left() {
        let mut guest = guest();
        let mut resumed = 0;
        for s in 0..600 {
            match &guest.step(Moment(s * 1000), Event::IoPaused)[..] {
                [] => {}
                [Effect::Resume] => resumed += 1,
                [Effect::Relocate(_)] => {
                    assert_eq!((resumed, s), (5, 50));
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("never taken elsewhere");
    }
}
