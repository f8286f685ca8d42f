//! Packing after each combination of failures.
//!
//! One occupancy is changed and changed back, as a cluster of a thousand hosts has half a million pairs. A pair whose
//! single plans use different hosts needs no packing: both plans hold side by side.

use virtward_model::world::HostState;

use super::{Loss, Lost, is_protected};
use crate::placement::{
    Amounts, Choice, Exact, Item, NOWHERE, Occupancy, Space, Wants, bound, exact, items, order, pack, total,
};

/// The exact search is tried up to this many VMs, and over this many nodes.
const EXACT_ITEMS: usize = 48;
const EXACT_NODES: u64 = 20_000;
/// All scenarios of a check together search no more than this.
const EXACT_NODES_IN_ALL: u64 = 400_000;

/// What can fail, and what is left then.
pub(super) struct Scenarios<'a> {
    space: &'a Space<'a>,
    /// What fails together: hosts.
    units: Vec<Vec<u32>>,
    /// By host: VMs that are to be restarted.
    pub protected: Vec<Vec<u32>>,
    /// VMs of hosts that are down already; they wait for room too.
    pub orphans: Vec<u32>,
    /// Hosts that take VMs.
    pub open: Vec<u32>,
    pub occupancy: Occupancy,
    total: Amounts,
    start: usize,
    nodes_left: u64,
}

/// What a scenario changed.
struct Undo {
    vms: Vec<(u32, u32)>,
    hosts: Vec<(u32, Amounts, Wants)>,
}

impl<'a> Scenarios<'a> {
    pub fn new(space: &'a Space<'a>) -> Self {
        let world = space.world;
        let mut occupancy = space.occupancy();
        let mut protected = vec![Vec::new(); world.hosts.len()];
        let mut orphans = Vec::new();
        for (vm, facts) in world.vms.iter().enumerate().filter(|(_, facts)| is_protected(facts)) {
            match occupancy.at[vm] {
                NOWHERE => {}
                host if world.hosts[host as usize].state == HostState::Down => {
                    orphans.push(vm as u32);
                    occupancy.take(space, vm as u32);
                }
                host => protected[host as usize].push(vm as u32),
            }
            let _ = facts;
        }
        let hosts = 0..world.hosts.len() as u32;
        let open: Vec<u32> = hosts.clone().filter(|&host| world.hosts[host as usize].state.takes_vms()).collect();
        let mut units: Vec<Vec<u32>> = Vec::new();
        let mut of_slot = std::collections::BTreeMap::new();
        for host in hosts.filter(|&host| world.hosts[host as usize].state != HostState::Down) {
            let unit = *of_slot.entry(space.slot(world.failover.domain_level, host)).or_insert_with(|| {
                units.push(Vec::new());
                units.len() - 1
            });
            units[unit].push(host);
        }
        let total = total(space, &open);
        Self { space, units, protected, orphans, open, occupancy, total, start: 0, nodes_left: EXACT_NODES_IN_ALL }
    }

    pub fn units(&self) -> usize {
        self.units.len()
    }

    pub fn unit(&self, unit: usize) -> &[u32] {
        &self.units[unit]
    }

    /// Packs every combination of `k` units, and tells of those that are not survived.
    pub fn each(&mut self, k: usize, tell: &mut dyn FnMut(Loss)) {
        let singles = if k > 1 { self.single_plans() } else { Vec::new() };
        let mut chosen: Vec<usize> = (0..k).collect();
        loop {
            let covered = k > 1 && side_by_side(&singles, &chosen);
            if !covered && let Some(loss) = self.scenario(&chosen) {
                tell(loss);
            }
            // The next combination in order: the last index that can still rise does, those behind it follow.
            let Some(at) = (0..k).rev().find(|&at| chosen[at] < self.units.len() - k + at) else { return };
            chosen[at] += 1;
            for next in at + 1..k {
                chosen[next] = chosen[next - 1] + 1;
            }
        }
    }

    /// By unit: the hosts that its plan uses and its own, as bits; `None` where plans cannot be laid side by side.
    fn single_plans(&mut self) -> Vec<Option<Plan>> {
        let level_rules = self.space.apart.iter().any(|group| group.level.is_some());
        if level_rules || !self.orphans.is_empty() {
            return vec![None; self.units.len()];
        }
        (0..self.units.len())
            .map(|unit| {
                let vms = self.failing(&[unit]);
                if vms.iter().any(|&vm| self.space.units[self.space.unit[vm as usize] as usize].len() > 1) {
                    return None;
                }
                let undo = self.fail(&[unit], &vms);
                let mut items = items(self.space, &vms, &self.occupancy.at);
                order(&mut items, &self.total);
                let hosts = pack(self.space, &mut self.occupancy, &items, &self.open, Choice::Next, &mut self.start);
                self.undo(undo, &items, &hosts);
                let mut plan = Plan { targets: self.bits(), own: self.bits() };
                hosts.iter().all(Option::is_some).then(|| {
                    hosts.iter().flatten().for_each(|&host| set(&mut plan.targets, host));
                    self.units[unit].iter().for_each(|&host| set(&mut plan.own, host));
                    plan
                })
            })
            .collect()
    }

    fn bits(&self) -> Vec<u64> {
        vec![0; self.space.world.hosts.len().div_ceil(64)]
    }

    fn failing(&self, chosen: &[usize]) -> Vec<u32> {
        let hosts = chosen.iter().flat_map(|&unit| &self.units[unit]);
        hosts.flat_map(|&host| &self.protected[host as usize]).chain(&self.orphans).copied().collect()
    }

    fn scenario(&mut self, chosen: &[usize]) -> Option<Loss> {
        let vms = self.failing(chosen);
        if vms.is_empty() {
            return None;
        }
        let undo = self.fail(chosen, &vms);
        let mut items = items(self.space, &vms, &self.occupancy.at);
        order(&mut items, &self.total);
        let mut best: Option<Vec<Option<u32>>> = None;
        for choice in [Choice::Next, Choice::Tight, Choice::Spread] {
            let hosts = pack(self.space, &mut self.occupancy, &items, &self.open, choice, &mut self.start);
            self.unplace(&items, &hosts);
            let missing = |hosts: &[Option<u32>]| hosts.iter().filter(|host| host.is_none()).count();
            if missing(&hosts) == 0 {
                self.undo(undo, &[], &[]);
                return None;
            }
            if best.as_ref().is_none_or(|best| missing(&hosts) < missing(best)) {
                best = Some(hosts);
            }
        }
        let proof = match bound(self.space, &self.occupancy, &items, &self.open) {
            Some(proof) => Ok(Some(proof)),
            None => self.search(&items),
        };
        let loss = proof.ok().map(|proof| Loss {
            failed: self.names(chosen),
            lost: self.lost(&items, &best.unwrap_or_default()),
            proof,
        });
        self.undo(undo, &[], &[]);
        loss
    }

    /// `Err` if a placement was found after all.
    fn search(&mut self, items: &[Item]) -> Result<Option<crate::placement::Impossible>, ()> {
        if items.len() > EXACT_ITEMS || self.nodes_left == 0 {
            return Ok(None);
        }
        let budget = EXACT_NODES.min(self.nodes_left);
        match exact(self.space, &mut self.occupancy, items, &self.open, budget) {
            Exact::Found(_) => Err(()),
            Exact::None(nodes) => {
                self.nodes_left -= nodes.min(self.nodes_left);
                Ok(Some(crate::placement::Impossible::Searched { nodes }))
            }
            Exact::Unknown => {
                self.nodes_left -= budget;
                Ok(None)
            }
        }
    }

    fn names(&self, chosen: &[usize]) -> Vec<virtward_model::world::HostName> {
        let hosts = chosen.iter().flat_map(|&unit| &self.units[unit]);
        hosts.map(|&host| self.space.world.hosts[host as usize].name.clone()).collect()
    }

    fn lost(&self, items: &[Item], hosts: &[Option<u32>]) -> Vec<Lost> {
        let without = items.iter().zip(hosts).filter(|(_, host)| host.is_none());
        let vms = without.flat_map(|(item, _)| &item.vms).map(|&vm| &self.space.world.vms[vm as usize]);
        vms.map(|vm| Lost { vm: vm.id, name: vm.name.clone(), priority: vm.priority }).collect()
    }

    /// Takes failing VMs off their hosts, which are full from then on.
    fn fail(&mut self, chosen: &[usize], vms: &[u32]) -> Undo {
        let hosts: Vec<u32> = chosen.iter().flat_map(|&unit| self.units[unit].iter().copied()).collect();
        let occupancy = &mut self.occupancy;
        let undo = Undo {
            vms: vms.iter().map(|&vm| (vm, occupancy.at[vm as usize])).collect(),
            hosts: hosts
                .iter()
                .map(|&host| (host, occupancy.used[host as usize], occupancy.wanted[host as usize]))
                .collect(),
        };
        vms.iter().for_each(|&vm| occupancy.at[vm as usize] = NOWHERE);
        hosts.iter().for_each(|&host| occupancy.used[host as usize] = [u64::MAX; crate::placement::DIMENSIONS]);
        undo
    }

    fn unplace(&mut self, items: &[Item], hosts: &[Option<u32>]) {
        for item in items.iter().zip(hosts).filter(|(_, host)| host.is_some()).map(|(item, _)| item) {
            item.vms.iter().for_each(|&vm| self.occupancy.take(self.space, vm));
        }
    }

    fn undo(&mut self, undo: Undo, items: &[Item], hosts: &[Option<u32>]) {
        self.unplace(items, hosts);
        undo.vms.iter().for_each(|&(vm, host)| self.occupancy.at[vm as usize] = host);
        for (host, used, wanted) in undo.hosts {
            self.occupancy.used[host as usize] = used;
            self.occupancy.wanted[host as usize] = wanted;
        }
    }
}

/// Hosts that a plan uses, and those whose failure it is for, as bits.
#[derive(Clone)]
struct Plan {
    targets: Vec<u64>,
    own: Vec<u64>,
}

fn set(bits: &mut [u64], host: u32) {
    bits[host as usize / 64] |= 1 << (host % 64);
}

/// Whether the plans of single failures hold together: no host is used by two, none is lost with another.
fn side_by_side(singles: &[Option<Plan>], chosen: &[usize]) -> bool {
    let meet = |one: &[u64], other: &[u64]| one.iter().zip(other).any(|(one, other)| one & other != 0);
    chosen.iter().enumerate().all(|(at, &one)| {
        chosen[at + 1..].iter().all(|&other| match (&singles[one], &singles[other]) {
            (Some(one), Some(other)) => {
                !meet(&one.targets, &other.targets)
                    && !meet(&one.targets, &other.own)
                    && !meet(&one.own, &other.targets)
            }
            _ => false,
        })
    })
}
