//! What must hold at every step.

use std::collections::BTreeSet;

use super::world::{World, host_id};
use crate::ha::record::{Desired, HostPhase, View, VmId, VmPhase};

/// For so long after a fault a host counts as touched by it.
const TOUCHED_MS: u64 = 120_000;

#[derive(Default)]
pub(super) struct Checks {
    pub(super) broken: Option<String>,
    /// VMs that the store has as stopped on purpose.
    pub(super) down: BTreeSet<VmId>,
    /// VMs whose guests shut themselves down: host, its daemon's life.
    pub(super) shut: Vec<(VmId, usize, u64)>,
    /// Hosts that were declared dead.
    pub(super) fenced: Vec<usize>,
}

impl World {
    pub(super) fn broken(&mut self, what: String) {
        self.say("CHECK", &what);
        self.checks.broken.get_or_insert(what);
    }

    /// A QEMU's vCPUs begin to run: nobody else may be able to write, nor anything be in flight.
    pub(super) fn check_writer(&mut self, node: usize, vm: VmId, id: u64) {
        for n in 0..self.nodes.len() {
            let other = &self.nodes[n];
            if n != node && other.qemus.get(&vm).is_some_and(|qemu| qemu.running) && !other.revoked {
                self.broken(format!("two writers of v{}: {} and {}", vm.as_u128(), host_id(n), host_id(node)));
            }
        }
        let now = self.now;
        if let Some((.., at)) = self.flying.iter().find(|(disk, writer, at)| *disk == vm && *writer != id && *at > now)
        {
            self.broken(format!("v{} runs while a write of before is in flight for {} ms", vm.as_u128(), at - now));
        }
        self.checks.shut.retain(|(shut, host, _)| *shut != vm || *host == node);
        let life = self.nodes[node].life;
        if self.checks.down.contains(&vm) || self.checks.shut.contains(&(vm, node, life)) {
            self.broken(format!("v{} was shut down by its guest and runs again", vm.as_u128()));
        }
    }

    pub(super) fn touched(&self, node: usize) -> bool {
        self.nodes[node].touched.is_some_and(|at| self.now - at < TOUCHED_MS)
    }

    /// A transaction took effect.
    pub(super) fn check_commit(&mut self, before: &View, after: &View) {
        for (host, heartbeat) in &after.heartbeats {
            if before.heartbeats.get(host).map(|old| old.revision) == Some(heartbeat.revision) {
                continue;
            }
            let record = after.hosts.get(host).map(|record| &record.value);
            let epoch = heartbeat.value.epoch;
            if record.is_none_or(|record| record.phase != HostPhase::Armed || record.epoch != epoch) {
                self.broken(format!("a heartbeat of {host} epoch {epoch} after that epoch was ended"));
            }
        }
        for (host, record) in &after.hosts {
            let was = before.hosts.get(host).map(|old| old.value.phase);
            if record.value.phase == HostPhase::Fencing && was == Some(HostPhase::Armed) {
                let node = super::world::host_number(host);
                self.checks.fenced.push(node);
                if !self.touched(node) {
                    self.broken(format!("{host} was declared dead, though no fault had touched it"));
                }
            }
        }
        self.check_pairs(before, after);
        for (vm, record) in &after.vms {
            let Some(old) = before.vms.get(vm).filter(|old| old.revision != record.revision) else { continue };
            let (old, new) = (&old.value, &record.value);
            let name = &new.name;
            // A switch of a pair changes what a VM is meant to do, and claims nothing.
            let is_claim = new.phase == VmPhase::Claimed && (old.phase, &old.owner) != (new.phase, &new.owner);
            if new.generation < old.generation || (is_claim && new.generation == old.generation) {
                self.broken(format!("{name}: generation {} follows {}", new.generation, old.generation));
            }
            let moved = new.phase == VmPhase::Claimed && new.owner != old.owner;
            if let (VmPhase::Running, true, Some(owner)) = (old.phase, moved, &old.owner)
                && !after.is_over(owner)
            {
                self.broken(format!("{name} was claimed without a proof that {} is dead", owner.host));
            }
            // The old active one of a pair may come back to follow.
            let is_of_pair = after.pair_of(*vm).is_some_and(|(_, pair)| pair.value.active != *vm);
            if new.desired == Desired::Stopped && !self.restored && !is_of_pair {
                self.checks.down.insert(*vm);
            }
        }
    }

    /// A guest's service becomes the active one.
    pub(super) fn check_lead(&mut self, node: usize, vm: VmId) {
        let view = self.kv.view();
        let Some((_, pair)) = view.pair_of(vm).filter(|_| !self.restored) else { return };
        let other = pair.value.other(vm);
        for n in 0..self.nodes.len() {
            let there = &self.nodes[n];
            if there.qemus.get(&other).is_some_and(|qemu| qemu.leads) && !there.revoked {
                let (one, two) = (vm.as_u128(), other.as_u128());
                self.broken(format!("v{one} on {} leads while v{two} on {} does", host_id(node), host_id(n)));
            }
        }
    }

    /// Roles change hands one generation after the other, and both are never on one host.
    fn check_pairs(&mut self, before: &View, after: &View) {
        for (key, pair) in &after.pairs {
            let Some(old) = before.pairs.get(key).map(|old| &old.value) else { continue };
            let new = &pair.value;
            let step = u64::from(new.active != old.active);
            if new.generation != old.generation + step {
                self.broken(format!("generation {} of a pair follows {}", new.generation, old.generation));
            }
            let hosts = |vm: VmId| {
                let record = after.vms.get(&vm).filter(|of| of.value.phase != VmPhase::Stopped);
                record.and_then(|of| of.value.owner.clone())
            };
            if let (Some(one), Some(two)) = (hosts(new.active), hosts(new.standby))
                && one == two
            {
                self.broken(format!("both of a pair are on {}", one.host));
            }
        }
    }

    /// Everything that should run runs, somewhere, once.
    pub(super) fn check_liveness(&mut self) {
        let view = self.kv.view();
        for (vm, record) in &view.vms {
            let running = self.nodes.iter().filter(|node| node.qemus.get(vm).is_some_and(|qemu| qemu.running)).count();
            let record = &record.value;
            if record.desired == Desired::Running && record.blocked.is_none() && running == 0 {
                let held = self.nodes.iter().filter_map(|node| node.daemon.as_ref());
                let held: Vec<String> =
                    held.filter_map(|daemon| daemon.coordinator.held().get(vm)).map(ToString::to_string).collect();
                self.broken(format!("{} does not run: {record:?}, held {held:?}", record.name));
            }
        }
        let pairs = view.pairs.values().map(|pair| &pair.value);
        for pair in pairs.take(if self.restored { 0 } else { usize::MAX }) {
            let leads = self.nodes.iter().any(|node| node.qemus.get(&pair.active).is_some_and(|qemu| qemu.leads));
            if view.vms[&pair.active].value.desired == Desired::Running && !leads {
                self.broken(format!("nobody leads: {pair:?}"));
            }
        }
    }
}
