//! Faults, and the plan of them that a seed makes.

use super::{
    node::{Bmc, Rng},
    world::{Ev, Setup, World, host_id, vm_id},
};
use crate::ha::{Timing, agent::Ended, record::WatchdogClass};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    PowerCut(usize),
    StopDaemon(usize, u64),
    Freeze(usize, u64),
    KillDaemon(usize, u64),
    CutStore(usize, bool),
    CutLinks(usize, bool, u8),
    StoreDown(bool),
    StoreSlow(bool),
    StorageSlow(bool),
    Backup,
    Restore,
    GuestShutsDown(usize),
    Crash(usize, bool),
    Stick(usize, u64),
    Edge(usize),
    Heal,
}

impl World {
    fn touch(&mut self, node: usize) {
        self.nodes[node].touched = Some(self.now);
    }

    fn touch_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.touch(node);
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.say("FAULT", &format!("{fault:?}"));
        match fault {
            Fault::PowerCut(n) => {
                self.touch(n);
                if self.nodes[n].powered {
                    self.power_off(n);
                    let after = self.rng.range(30_000, 120_000);
                    self.push(after, Ev::Boot(n));
                }
            }
            Fault::StopDaemon(n, ms) => {
                self.touch(n);
                self.nodes[n].stopped_until = self.now + ms;
            }
            Fault::Freeze(n, ms) => {
                self.touch(n);
                self.nodes[n].frozen_until = self.now + ms;
            }
            Fault::KillDaemon(n, ms) => {
                self.touch(n);
                self.nodes[n].daemon = None;
                self.push(ms, Ev::StartDaemon(n));
            }
            Fault::CutStore(n, cut) => {
                self.touch(n);
                self.nodes[n].store_cut = cut;
            }
            Fault::CutLinks(n, cut, ways) => self.cut_links(n, cut, ways),
            Fault::StoreDown(down) => {
                // Alone it touches nobody; together with another fault it touches all.
                if (0..self.nodes.len()).any(|node| self.touched(node)) || !self.setup.failsafe {
                    self.touch_all();
                }
                self.store_down = down;
            }
            Fault::StoreSlow(slow) => {
                self.touch_all();
                self.store_slow = slow;
            }
            Fault::StorageSlow(slow) => self.storage_slow = slow,
            Fault::Backup => self.backup = Some(self.kv.clone()),
            Fault::Restore => {
                if let Some(backup) = self.backup.take() {
                    self.touch_all();
                    (self.restored, self.checks.down) = (true, Default::default());
                    let anew = self.now % 2 == 1;
                    self.kv.restore(&backup, anew);
                }
            }
            Fault::GuestShutsDown(vm) => self.end_guest(vm, Ended::ByGuest, true),
            Fault::Crash(vm, told) => self.end_guest(vm, Ended::Crashed, told),
            Fault::Stick(n, ms) => {
                let until = self.now + ms;
                self.nodes[n].qemus.values_mut().for_each(|qemu| qemu.stuck_until = until);
            }
            Fault::Edge(n) => {
                self.touch(n);
                self.nodes[n].edge = true;
                self.push(11_000, Ev::Fault(Fault::CutStore(n, true)));
                self.push(11_000, Ev::Fault(Fault::CutLinks(n, true, 3)));
            }
            Fault::Heal => self.heal(),
        }
    }

    /// Bit 0: others do not hear it; bit 1: it does not hear others.
    fn cut_links(&mut self, n: usize, cut: bool, ways: u8) {
        self.touch(n);
        for other in (0..self.nodes.len()).filter(|other| *other != n) {
            for (from, to, bit) in [(n, other, 1), (other, n, 2)] {
                match cut && ways & bit != 0 {
                    true => self.nodes[from].deaf.insert(to),
                    false => self.nodes[from].deaf.remove(&to),
                };
            }
        }
        // An outage of the store that goes on now needs the links that are cut.
        if self.store_down {
            self.touch_all();
        }
    }

    fn end_guest(&mut self, vm: usize, how: Ended, told: bool) {
        let id = vm_id(vm);
        let runs = |n: &usize| self.nodes[*n].qemus.get(&id).is_some_and(|qemu| qemu.running);
        let Some(n) = (0..self.nodes.len()).find(runs) else { return };
        let (life, qemu) = (self.nodes[n].life, self.nodes[n].qemus.remove(&id).expect("it runs"));
        let now = self.now;
        self.flying.iter_mut().filter(|(_, writer, _)| *writer == qemu.id).for_each(|(.., at)| *at = (*at).min(now));
        if how == Ended::ByGuest && self.nodes[n].daemon.is_some() {
            self.checks.shut.push((id, n, life));
        }
        if told {
            let after = self.rng.range(10, 900);
            self.push(after, Ev::ToAgent(n, life, super::world::Told::Ended(id, how)));
        }
    }

    fn heal(&mut self) {
        (self.store_down, self.store_slow, self.storage_slow) = (false, false, false);
        let now = self.now;
        for n in 0..self.nodes.len() {
            let node = &mut self.nodes[n];
            (node.store_cut, node.edge) = (false, false);
            node.bmc = if node.bmc == Bmc::Missing { Bmc::Missing } else { Bmc::Works };
            node.deaf.clear();
            (node.stopped_until, node.frozen_until) = (node.stopped_until.min(now), node.frozen_until.min(now));
            node.qemus.values_mut().for_each(|qemu| qemu.stuck_until = 0);
            if !node.powered {
                self.push(1_000, Ev::Boot(n));
            } else if node.daemon.is_none() {
                self.push(1_000, Ev::StartDaemon(n));
            }
            self.touch(n);
        }
    }
}

/// The run of a seed: its cluster and its faults.
pub(super) fn plan(seed: u64) -> (Setup, Vec<(u64, Fault)>) {
    let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let hosts = rng.range(2, 6) as usize;
    let class = |rng: &mut Rng| match rng.range(0, 10) {
        0 => WatchdogClass::None,
        1 => WatchdogClass::Software,
        _ => WatchdogClass::Hardware,
    };
    let bmc = |rng: &mut Rng| match rng.range(0, 8) {
        0 | 1 => Bmc::Works,
        2 => Bmc::Slow,
        3 | 4 => Bmc::NoPower,
        5 => Bmc::Lies,
        _ => Bmc::Missing,
    };
    let start_ms = if rng.percent(50) { 15_000 } else { 120_000 };
    let setup = Setup {
        hosts,
        vms: rng.range(2, 7) as usize,
        timing: Timing { start_ms, ..Timing::default() },
        classes: (0..hosts).map(|_| class(&mut rng)).collect(),
        bmcs: (0..hosts).map(|_| bmc(&mut rng)).collect(),
        drift: true,
        failsafe: rng.percent(80),
        revoke: rng.percent(10),
        fast: rng.percent(30),
        deadline: rng.range(2_000, 10_000),
        pair: (seed % 8 == 6).then_some(seed % 16 == 6),
    };
    match seed % 8 {
        0 => return start_race(&mut rng, setup),
        1 => return late_answers(&mut rng, setup),
        2 if seed % 16 == 2 => return no_watchdog(&mut rng, setup),
        _ => {}
    }
    let mut faults = Vec::new();
    let mut at = 25_000;
    for _ in 0..rng.range(1, 5) {
        at += rng.range(500, 45_000);
        one(&mut rng, at, &setup, &mut faults);
    }
    faults.push((at + rng.range(60_000, 90_000), Fault::Heal));
    (setup, faults)
}

/// A host dies while the storage is slow; starts take so long that they are taken elsewhere, while a daemon stands still.
fn start_race(rng: &mut Rng, setup: Setup) -> (Setup, Vec<(u64, Fault)>) {
    let timing = Timing { start_ms: 15_000, ..Timing::default() };
    let hosts = setup.hosts.max(3);
    let setup = Setup { hosts, vms: 6, timing, bmcs: vec![Bmc::Works], fast: false, ..setup };
    let mut faults = vec![(25_000, Fault::PowerCut(rng.range(0, 3) as usize)), (25_000, Fault::StorageSlow(true))];
    faults.push((rng.range(38_000, 52_000), Fault::StorageSlow(false)));
    for n in 0..hosts {
        faults.push((rng.range(43_000, 56_000), Fault::StopDaemon(n, rng.range(1_000, 9_000))));
    }
    faults.push((120_000, Fault::Heal));
    (setup, faults)
}

/// A host whose heartbeats are taken at once and answered late is cut off, and dies as late as its watchdog lets it.
fn late_answers(rng: &mut Rng, setup: Setup) -> (Setup, Vec<(u64, Fault)>) {
    let timing = Timing { heartbeat_ms: 1_000, silence_ms: 2_500, ..Timing::default() };
    let (classes, bmcs) = (vec![WatchdogClass::Hardware], vec![Bmc::NoPower]);
    let setup = Setup { timing, classes, bmcs, fast: true, revoke: false, deadline: 8_000, ..setup };
    let n = rng.range(0, setup.hosts as u64) as usize;
    (setup, vec![(rng.range(25_000, 30_000), Fault::Edge(n)), (140_000, Fault::Heal)])
}

/// A host without a watchdog and with a dead fence device stands still, guests and all, and goes on later.
fn no_watchdog(rng: &mut Rng, setup: Setup) -> (Setup, Vec<(u64, Fault)>) {
    let (classes, bmcs) = (vec![WatchdogClass::None], vec![Bmc::NoPower]);
    let setup = Setup { classes, bmcs, revoke: false, ..setup };
    let n = rng.range(0, setup.hosts as u64) as usize;
    let fault = if rng.percent(50) { Fault::StopDaemon(n, 90_000) } else { Fault::Freeze(n, 90_000) };
    (setup, vec![(rng.range(25_000, 30_000), fault), (180_000, Fault::Heal)])
}

fn one(rng: &mut Rng, at: u64, setup: &Setup, faults: &mut Vec<(u64, Fault)>) {
    let n = rng.range(0, setup.hosts as u64) as usize;
    let vm = rng.range(0, setup.vms as u64) as usize;
    let long = at + rng.range(3_000, 70_000);
    let ms = rng.range(500, 60_000);
    match rng.range(0, 16) {
        0 | 1 => faults.push((at, Fault::PowerCut(n))),
        2 => faults.push((at, Fault::StopDaemon(n, ms))),
        3 => faults.push((at, Fault::Freeze(n, ms))),
        4 => faults.push((at, Fault::KillDaemon(n, ms / 4))),
        5 => faults.extend([(at, Fault::CutStore(n, true)), (long, Fault::CutStore(n, false))]),
        6 => {
            let ways = rng.range(1, 4) as u8;
            faults.extend([(at, Fault::CutStore(n, true)), (at, Fault::CutLinks(n, true, ways))]);
            faults.extend([(long, Fault::CutStore(n, false)), (long, Fault::CutLinks(n, false, ways))]);
        }
        7 => faults.extend([(at, Fault::StoreDown(true)), (long, Fault::StoreDown(false))]),
        8 => faults.extend([(at, Fault::StoreSlow(true)), (long, Fault::StoreSlow(false))]),
        9 => faults.extend([(at, Fault::StorageSlow(true)), (long, Fault::StorageSlow(false))]),
        10 => faults.extend([(at, Fault::Backup), (long, Fault::Restore)]),
        11 => faults.push((at, Fault::GuestShutsDown(vm))),
        12 => faults.push((at, Fault::Crash(vm, rng.percent(70)))),
        13 => {
            faults.extend([(at, Fault::Stick(n, 200_000)), (at + 10, Fault::CutStore(n, true))]);
            faults.extend([(at + 10, Fault::CutLinks(n, true, 3)), (long, Fault::CutStore(n, false))]);
        }
        _ => faults.push((at, Fault::Edge(n))),
    }
}

/// Plays a seed to its end.
pub(super) fn play(seed: u64) -> World {
    let (setup, faults) = plan(seed);
    let mut world = World::new(seed, setup);
    let mut end = 0;
    for (at, fault) in faults {
        world.push(at, Ev::Fault(fault));
        end = end.max(at);
    }
    world.run(end + 240_000);
    if world.checks.broken.is_none() {
        world.check_liveness();
    }
    let hosts: Vec<String> = (0..world.nodes.len())
        .map(|n| format!("{} {:?} watchdog, device {:?}", host_id(n), world.nodes[n].class, world.nodes[n].bmc))
        .collect();
    let timing =
        format!("deadline {} ms, fast {}, failsafe {}", world.setup.deadline, world.setup.fast, world.setup.failsafe);
    world.log.insert(0, format!("seed {seed}: {}; {timing}", hosts.join("; ")));
    world
}
