//! One host: its power, clock, watchdog, daemon, guests, links and fence device.

use std::collections::{BTreeMap, BTreeSet};

use crate::ha::{
    agent::{Agent, Mine},
    coordinator::Coordinator,
    record::{VmId, WatchdogClass},
    timing::Moment,
};

pub(super) struct Daemon {
    pub(super) agent: Agent,
    pub(super) coordinator: Coordinator,
    pub(super) leading: bool,
}

pub(super) struct Qemu {
    pub(super) id: u64,
    pub(super) generation: u64,
    pub(super) running: bool,
    pub(super) ran: bool,
    /// In the kernel's hands until then: no signal ends it.
    pub(super) stuck_until: u64,
    /// It has its signal and begins no more writes.
    pub(super) dying: bool,
    /// The service in it is the active one.
    pub(super) leads: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Bmc {
    Works,
    NoPower,
    Slow,
    Lies,
    Missing,
}

pub(super) struct Node {
    pub(super) powered: bool,
    pub(super) boot: u64,
    pub(super) booted_at: u64,
    pub(super) rate_ppm: i64,
    pub(super) watchdog_rate_ppm: i64,
    pub(super) class: WatchdogClass,
    /// True times: armed or petted last. None: not armed.
    pub(super) petted: Option<u64>,
    pub(super) daemon: Option<Daemon>,
    /// Counts daemons, over boots.
    pub(super) life: u64,
    /// The daemon does nothing before this.
    pub(super) stopped_until: u64,
    /// Nor do the guests.
    pub(super) frozen_until: u64,
    pub(super) remembered: Option<Mine>,
    pub(super) qemus: BTreeMap<VmId, Qemu>,
    /// Generation of the start that was asked for last; one of before is ended when a newer one begins.
    pub(super) starting: BTreeMap<VmId, u64>,
    /// Guests that are being told their role.
    pub(super) duties: BTreeSet<VmId>,
    pub(super) store_cut: bool,
    /// Hosts that do not hear this one.
    pub(super) deaf: BTreeSet<usize>,
    pub(super) bmc: Bmc,
    pub(super) revoked: bool,
    /// Last true time at which a fault touched it.
    pub(super) touched: Option<u64>,
    /// The adversary delays the last pet.
    pub(super) edge: bool,
}

impl Node {
    pub(super) fn local(&self, now: u64) -> Moment {
        Moment(5_000 + scale(now - self.booted_at, self.rate_ppm))
    }

    pub(super) fn stopped(&self, now: u64) -> Option<u64> {
        let until = self.stopped_until.max(self.frozen_until);
        (until > now).then_some(until)
    }

    pub(super) fn boot_id(&self) -> String {
        format!("boot-{}", self.boot)
    }
}

pub(super) fn scale(ms: u64, ppm: i64) -> u64 {
    let scaled = i128::from(ms) * i128::from(1_000_000 + ppm) / 1_000_000;
    u64::try_from(scaled).expect("lengths are positive")
}

/// SplitMix64.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to below `high`.
    pub(super) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.range(0, 100) < percent
    }
}
