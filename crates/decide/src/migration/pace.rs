//! How a live migration goes on, pass by pass.
//!
//! QEMU switches over as soon as what is left can be sent within the downtime limit. So the limit is the rudder: it
//! begins low, for a switch that nobody notices, and is relaxed with patience up to what the operator allows. A pass
//! that leaves no less than 0.96 of the best one older than [`Policy::patience_ms`] shows that the guest writes as fast
//! as the link carries: then the limit goes at once to what a switch at the best recent moment takes, if that is
//! allowed. If it is not, the vCPUs are held back (QEMU does so by itself), or memory follows after the switch
//! (post-copy, only if allowed and only if little enough is left), or the migration is given up early and says why. It
//! never goes on for hours in vain.

use std::collections::VecDeque;

use virtward_model::Bytes;

/// Downtime limit to begin with, in milliseconds.
const FIRST_LIMIT_MS: u64 = 50;
/// A pass that leaves at least this share of an old best is no progress, in hundredths.
const STALL_PERCENT: u64 = 96;
/// Passes, and milliseconds, between two relaxations while things get better.
const RELAX_PASSES: u64 = 2;
const RELAX_MS: u64 = 500;
/// Passes among which the best moment is looked for.
const RECENT: usize = 6;
/// Longest time in which a guest may depend on both hosts and the network after a switch to post-copy.
const POSTCOPY_MS_MAX: u64 = 30_000;
/// QEMU holds vCPUs back no more than this, in percent.
const THROTTLE_MAX: u64 = 99;
/// Passes kept; older ones live on in the best.
const KEPT: usize = 4096;

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Longest downtime, in milliseconds.
    pub max_downtime_ms: u64,
    /// Post-copy after this time, in milliseconds; none never.
    pub postcopy_after_ms: Option<u64>,
    /// Give up after this time, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// QEMU may hold the vCPUs back.
    pub throttle: bool,
    /// Age of what a pass is compared with, in milliseconds.
    pub patience_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { max_downtime_ms: 300, postcopy_after_ms: None, timeout_ms: None, throttle: true, patience_ms: 40_000 }
    }
}

/// A look at a running migration. Times count from its begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Number of the pass over memory; 0 before the first.
    pub pass: u64,
    /// Memory left, in bytes.
    pub remaining_bytes: u64,
    /// Memory sent per second, in bytes.
    pub bytes_s: u64,
    /// Memory dirtied per second, in bytes.
    pub dirty_bytes_s: u64,
    /// How much the vCPUs are held back, in percent.
    pub throttle_percent: u64,
    /// The guest runs at the destination already.
    pub postcopy: bool,
}

impl Sample {
    /// Downtime if it switched now, in milliseconds; none while the speed is not known.
    pub fn predicted_ms(&self) -> Option<u64> {
        predicted(self.remaining_bytes, self.bytes_s)
    }
}

fn predicted(bytes: u64, bytes_s: u64) -> Option<u64> {
    (bytes_s > 0).then(|| bytes.saturating_mul(1000) / bytes_s)
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Set the downtime limit.
    MaxDowntime {
        /// Milliseconds.
        ms: u64,
    },
    /// Switch to post-copy.
    Postcopy,
    /// Give up; the VM goes on where it is.
    Abort {
        /// Why, and what would help.
        reason: String,
    },
    /// Tell the operator.
    Note(String),
}

/// Drives one migration.
#[derive(Clone, Debug)]
pub struct Pace {
    policy: Policy,
    limit_ms: u64,
    pass: u64,
    /// Time and bytes left at the begin of recent passes.
    passes: VecDeque<(u64, u64)>,
    /// Least bytes left at the begin of passes that are older than the patience.
    best_old: Option<u64>,
    relaxed: (u64, u64),
    /// Throttle, and since when it is that.
    throttle: (u64, u64),
    refused_postcopy: bool,
    ended: bool,
}

impl Pace {
    /// A migration under a policy, with the limit to begin with.
    pub fn new(policy: Policy) -> (Self, u64) {
        let limit_ms = FIRST_LIMIT_MS.min(policy.max_downtime_ms);
        let pace = Self {
            policy,
            limit_ms,
            pass: 0,
            passes: VecDeque::new(),
            best_old: None,
            relaxed: (0, 0),
            throttle: (0, 0),
            refused_postcopy: false,
            ended: false,
        };
        (pace, limit_ms)
    }

    /// Looks at the migration `now_ms` after its begin.
    pub fn step(&mut self, now_ms: u64, sample: &Sample) -> Vec<Effect> {
        if self.ended || sample.postcopy {
            return Vec::new();
        }
        if let Some(limit) = self.policy.timeout_ms.filter(|limit| now_ms >= *limit) {
            return self.give_up(sample, &format!("it was not done within {} s", limit / 1000));
        }
        if sample.pass == 0 {
            return Vec::new();
        }
        if let Some(effect) = self.postcopy(now_ms, sample) {
            return vec![effect];
        }
        if sample.pass == self.pass {
            return Vec::new();
        }
        self.pass = sample.pass;
        self.note_pass(now_ms, sample);
        let Some(best_ms) = self.best_recent(sample) else { return Vec::new() };
        let stalled = self.best_old.is_some_and(|best| sample.remaining_bytes >= best / 100 * STALL_PERCENT);
        match stalled {
            false => self.relax(now_ms, best_ms).into_iter().collect(),
            true => self.stalled(now_ms, sample, best_ms),
        }
    }

    fn note_pass(&mut self, now_ms: u64, sample: &Sample) {
        if sample.throttle_percent != self.throttle.0 {
            self.throttle = (sample.throttle_percent, now_ms);
        }
        self.passes.push_back((now_ms, sample.remaining_bytes));
        let old = now_ms.saturating_sub(self.policy.patience_ms);
        while self.passes.front().is_some_and(|(at, _)| *at < old) || self.passes.len() > KEPT {
            let Some((_, bytes)) = self.passes.pop_front() else { break };
            self.best_old = Some(self.best_old.map_or(bytes, |best| best.min(bytes)));
        }
    }

    /// Downtime at the best of the recent passes.
    fn best_recent(&self, sample: &Sample) -> Option<u64> {
        let best = self.passes.iter().rev().take(RECENT).map(|(_, bytes)| *bytes).min()?;
        predicted(best, sample.bytes_s)
    }

    /// Things get better: a little more, now and then, so that it ends soon.
    fn relax(&mut self, now_ms: u64, best_ms: u64) -> Option<Effect> {
        let (at, pass) = self.relaxed;
        let due = self.pass >= pass + RELAX_PASSES && now_ms >= at + RELAX_MS && self.pass > RELAX_PASSES;
        if !due || self.limit_ms >= self.policy.max_downtime_ms || best_ms <= self.limit_ms {
            return None;
        }
        self.relaxed = (now_ms, self.pass);
        self.set(self.limit_ms.saturating_mul(2))
    }

    fn set(&mut self, ms: u64) -> Option<Effect> {
        let ms = ms.clamp(1, self.policy.max_downtime_ms.max(1));
        (ms != self.limit_ms).then(|| {
            self.limit_ms = ms;
            Effect::MaxDowntime { ms }
        })
    }

    /// The guest writes as fast as the link carries.
    fn stalled(&mut self, now_ms: u64, sample: &Sample, best_ms: u64) -> Vec<Effect> {
        let enough = best_ms.saturating_add(best_ms / 10 + 1);
        if self.limit_ms < self.policy.max_downtime_ms {
            // All that is allowed, if need be: the best moment of late is seized when it comes again.
            let ms = if enough <= self.policy.max_downtime_ms { enough.max(self.limit_ms) } else { u64::MAX };
            return self.set(ms).into_iter().collect();
        }
        let rising = self.policy.throttle
            && self.throttle.0 < THROTTLE_MAX
            && now_ms < self.throttle.1.saturating_add(self.policy.patience_ms);
        let waits_for_postcopy = self.policy.postcopy_after_ms.is_some() && !self.refused_postcopy;
        if rising || waits_for_postcopy {
            return Vec::new();
        }
        if self.policy.throttle && now_ms < self.throttle.1.saturating_add(self.policy.patience_ms) {
            return Vec::new();
        }
        self.give_up(sample, "it does not converge")
    }

    fn postcopy(&mut self, now_ms: u64, sample: &Sample) -> Option<Effect> {
        let after = self.policy.postcopy_after_ms?;
        // All memory has been sent once.
        if now_ms < after || sample.pass < 2 || self.refused_postcopy {
            return None;
        }
        let ms = sample.predicted_ms()?;
        if ms <= POSTCOPY_MS_MAX {
            self.ended = true;
            return Some(Effect::Postcopy);
        }
        self.refused_postcopy = true;
        Some(Effect::Note(format!(
            "no post-copy: the guest would depend on both hosts and the network for {} s, and no more than {} s are risked",
            ms / 1000,
            POSTCOPY_MS_MAX / 1000
        )))
    }

    fn give_up(&mut self, sample: &Sample, why: &str) -> Vec<Effect> {
        self.ended = true;
        let needs = self.best_recent(sample).or(sample.predicted_ms()).map_or_else(
            || "the speed of the link is not known yet".to_owned(),
            |ms| format!("a switch would take {ms} ms, and {} ms are allowed", self.policy.max_downtime_ms),
        );
        let held = match sample.throttle_percent {
            0 => String::new(),
            percent => format!(" though its vCPUs are held back by {percent} %"),
        };
        let reason = format!(
            "{why}: the guest dirties {}/s{held}, {}/s are sent, {} are left after pass {}, {needs}; allow a longer \
             --max-downtime, or --postcopy-after, or try at a quieter time",
            Bytes(sample.dirty_bytes_s),
            Bytes(sample.bytes_s),
            Bytes(sample.remaining_bytes),
            sample.pass
        );
        vec![Effect::Abort { reason }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A guest of this much memory that dirties so much per second, over a link of so much per second. What QEMU would
    /// do: switch when the rest fits the limit; hold vCPUs back when passes do not shrink.
    struct Model {
        memory: u64,
        dirty_s: u64,
        link_s: u64,
        /// Dirtying that throttling does not slow down (devices).
        stubborn: bool,
    }

    #[derive(Debug, PartialEq)]
    enum End {
        Switched { ms: u64, limit: u64, at_ms: u64 },
        Postcopy { at_ms: u64 },
        Aborted { at_ms: u64, reason: String },
    }

    impl Model {
        fn run(&self, policy: Policy) -> End {
            let (mut pace, mut limit) = Pace::new(policy);
            let (mut now, mut remaining, mut throttle, mut last) = (0, self.memory, 0, u64::MAX);
            for pass in 1..100_000 {
                let dirty = if self.stubborn { self.dirty_s } else { self.dirty_s * (100 - throttle) / 100 };
                let mut sample = Sample {
                    pass,
                    remaining_bytes: remaining,
                    bytes_s: self.link_s,
                    dirty_bytes_s: dirty,
                    throttle_percent: throttle,
                    postcopy: false,
                };
                // Twice per pass: a pass is longer than a look.
                for _ in 0..2 {
                    for effect in pace.step(now, &sample) {
                        match effect {
                            Effect::MaxDowntime { ms } => limit = ms,
                            Effect::Postcopy => return End::Postcopy { at_ms: now },
                            Effect::Abort { reason } => return End::Aborted { at_ms: now, reason },
                            Effect::Note(_) => {}
                        }
                    }
                    assert!(limit <= policy.max_downtime_ms, "never more than what is allowed");
                    let ms = remaining * 1000 / self.link_s;
                    if pass > 1 && ms <= limit {
                        return End::Switched { ms, limit, at_ms: now };
                    }
                    sample.remaining_bytes = remaining / 2;
                }
                let took = (remaining * 1000 / self.link_s).max(1);
                now += took;
                remaining = (dirty * took / 1000).min(self.memory);
                if policy.throttle && remaining >= last / 2 {
                    throttle = (throttle + if throttle == 0 { 20 } else { 10 }).min(99);
                }
                last = remaining;
            }
            panic!("neither done nor given up");
        }
    }

    fn model(memory_mib: u64, dirty_mib: u64, link_mib: u64) -> Model {
        Model { memory: memory_mib * MIB, dirty_s: dirty_mib * MIB, link_s: link_mib * MIB, stubborn: false }
    }

    #[test]
    fn a_calm_guest_switches_at_the_first_limit() {
        let End::Switched { ms, limit, .. } = model(4096, 5, 1000).run(Policy::default()) else { panic!() };
        assert!(ms <= FIRST_LIMIT_MS && limit == FIRST_LIMIT_MS, "{ms}");
    }

    #[test]
    fn a_busy_guest_is_given_more_time_only_as_needed() {
        // Passes settle at 8 MiB after a while: 80 ms of the link.
        let End::Switched { ms, limit, at_ms } =
            model(2048, 80, 100).run(Policy { throttle: false, ..Policy::default() })
        else {
            panic!()
        };
        assert!(ms <= limit && limit <= 300 && at_ms < 120_000, "{ms} {limit} {at_ms}");
    }

    #[test]
    fn a_guest_that_never_converges_is_given_up_early_and_the_reason_says_what_would_help() {
        let policy = Policy { throttle: false, ..Policy::default() };
        let End::Aborted { at_ms, reason } = model(4096, 200, 100).run(policy) else { panic!() };
        // Passes of 41 s each: the fourth is the first that can be compared with an old one and lies after the limit.
        assert!(at_ms < 300_000, "{at_ms}");
        for part in ["200.0 MiB/s", "100.0 MiB/s", "300 ms are allowed", "--postcopy-after"] {
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn holding_the_vcpus_back_makes_it_converge_and_is_not_cut_short() {
        let End::Switched { ms, .. } = model(1024, 200, 100).run(Policy::default()) else { panic!() };
        assert!(ms <= 300);
        // What devices dirty, no throttle stops: given up once it is at its end.
        let stubborn = Model { stubborn: true, ..model(1024, 200, 100) };
        let End::Aborted { at_ms, reason } = stubborn.run(Policy::default()) else { panic!() };
        assert!(reason.contains("held back by 99 %") && at_ms < 600_000, "{at_ms} {reason}");
    }

    #[test]
    fn post_copy_only_if_allowed_when_its_time_has_come_and_within_its_budget() {
        let policy = Policy { throttle: false, postcopy_after_ms: Some(120_000), ..Policy::default() };
        let End::Postcopy { at_ms } = model(2048, 200, 100).run(policy) else { panic!() };
        assert!((120_000..145_000).contains(&at_ms), "{at_ms}");
        // 64 GiB over 100 MiB/s: minutes in which a broken cable would cost the guest.
        let End::Aborted { reason, .. } = model(65_536, 200, 100).run(policy) else { panic!() };
        assert!(reason.contains("does not converge"), "{reason}");
    }

    #[test]
    fn time_is_up_when_it_is_up() {
        let policy = Policy { throttle: false, timeout_ms: Some(30_000), patience_ms: 1 << 40, ..Policy::default() };
        let End::Aborted { at_ms, reason } = model(1024, 200, 100).run(policy) else { panic!() };
        assert!(at_ms >= 30_000 && reason.contains("within 30 s"), "{at_ms} {reason}");
    }

    #[test]
    fn a_switch_at_the_best_moment_when_it_goes_up_and_down() {
        // Between 20 and 60 MiB left, 100 MiB/s: 200 ms at best.
        let policy = Policy { throttle: false, ..Policy::default() };
        let (mut pace, mut limit) = Pace::new(policy);
        let mut now = 0;
        for pass in 1..2000_u64 {
            let left = if pass == 1 { 1024 } else { 20 + (pass % 5) * 10 };
            let sample = Sample {
                pass,
                remaining_bytes: left * MIB,
                bytes_s: 100 * MIB,
                dirty_bytes_s: 90 * MIB,
                ..Sample::default()
            };
            for effect in pace.step(now, &sample) {
                let Effect::MaxDowntime { ms } = effect else { panic!("{effect:?}") };
                limit = ms;
            }
            now += left * 10;
            if pass > 1 && left * 10 <= limit {
                assert!(left <= 30, "at a low point: {left}");
                return;
            }
        }
        panic!("never switched");
    }
}
