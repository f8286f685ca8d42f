//! Hosts for VMs that run nowhere.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_model::world::{HostName, World};

use super::{Choice, Exact, Impossible, Item, Occupancy, Space, WhyNot, bound, exact, fits, items, order, pack, total};

/// The exact search is tried up to this many items, and over this many nodes: milliseconds.
const EXACT_ITEMS: usize = 64;
const EXACT_NODES: u64 = 50_000;

/// What VMs are placed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A first start: spare hosts stay empty, memory as in normal times.
    Initial,
    /// Their host failed: spare hosts are used, memory may be overcommitted as after a failure.
    Failover,
}

/// What to place.
#[derive(Clone, Debug)]
pub struct Request {
    /// The VMs; those that are listed on a host in the world are taken off it first.
    pub vms: Vec<Uuid>,
    /// What for.
    pub purpose: Purpose,
    /// A host to be taken if the VM fits there: a designated one.
    pub prefer: BTreeMap<Uuid, HostName>,
    /// Hosts that are not to be taken, such as where a start has just failed.
    pub avoid: BTreeMap<Uuid, BTreeSet<HostName>>,
}

impl Request {
    /// A first start.
    pub fn initial(vms: impl Into<Vec<Uuid>>) -> Self {
        Self { vms: vms.into(), purpose: Purpose::Initial, prefer: BTreeMap::new(), avoid: BTreeMap::new() }
    }
    /// Restart after a failure.
    pub fn failover(vms: impl Into<Vec<Uuid>>) -> Self {
        Self { purpose: Purpose::Failover, ..Self::initial(vms) }
    }
}

/// A VM's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The VM.
    pub vm: Uuid,
    /// Its host.
    pub host: HostName,
}

/// Hosts for VMs, most important VMs first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// In the order in which they are to be started.
    pub places: Vec<Place>,
}

/// What became of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// It has a host.
    Placed {
        /// Which.
        host: HostName,
        /// Should rules that this breaks.
        unmet: Vec<String>,
        /// On how many hosts it would have fitted.
        candidates: usize,
    },
    /// It has none.
    NotPlaced {
        /// Why not, with the hosts that this is said of.
        hosts: Vec<(WhyNot, Vec<HostName>)>,
        /// Set if no host could take it even if nothing else were placed.
        proven: bool,
    },
    /// There is no such VM in the world.
    Unknown,
}

/// What became of a VM, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The VM.
    pub vm: Uuid,
    /// Its name, empty if unknown.
    pub name: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// Why VMs are where they are, and why others are nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// One for each VM that was asked for, as in the placement, those without a host last.
    pub lines: Vec<Line>,
    /// If not all have a host: the proof that this cannot be. `None` then means that no way was found.
    pub impossible: Option<Impossible>,
}

impl Report {
    /// Whether every VM has a host.
    pub fn is_complete(&self) -> bool {
        self.lines.iter().all(|line| matches!(line.outcome, Outcome::Placed { .. }))
    }
}

/// Finds hosts for VMs without moving any other. More important VMs come first where not all can run.
pub fn place(world: &World, request: &Request) -> (Placement, Report) {
    let failover = request.purpose == Purpose::Failover;
    let space = Space::new(world, failover);
    let mut occupancy = space.occupancy();
    let vms: Vec<u32> = request.vms.iter().filter_map(|&id| space.vm(id)).collect();
    vms.iter().for_each(|&vm| occupancy.take(&space, vm));
    let open: Vec<u32> = (0..world.hosts.len() as u32)
        .filter(|&host| {
            let facts = &world.hosts[host as usize];
            facts.state.takes_vms() && (failover || !facts.spare)
        })
        .collect();
    let mut wanted = items(&space, &vms, &occupancy.at);
    order(&mut wanted, &total(&space, &open));
    let problem = Problem { space: &space, open: &open, request };
    let (hosts, impossible) = problem.solve(&occupancy, &wanted);
    problem.report(occupancy, &wanted, &hosts, impossible)
}

struct Problem<'a> {
    space: &'a Space<'a>,
    open: &'a [u32],
    request: &'a Request,
}

impl Problem<'_> {
    fn avoids(&self, item: &Item, host: u32) -> bool {
        item.vms.iter().any(|&vm| {
            let id = self.space.world.vms[vm as usize].id;
            let name = &self.space.world.hosts[host as usize].name;
            self.request.avoid.get(&id).is_some_and(|hosts| hosts.contains(name))
        })
    }

    /// The best of several passes, and the proof if not all can have a host.
    fn solve(&self, occupancy: &Occupancy, wanted: &[Item]) -> (Vec<Option<u32>>, Option<Impossible>) {
        let mut best: Option<Vec<Option<u32>>> = None;
        for choice in [Choice::Spread, Choice::Tight] {
            let hosts = self.pass(&mut occupancy.clone(), wanted, choice);
            if hosts.iter().all(Option::is_some) {
                return (hosts, None);
            }
            if best.as_ref().is_none_or(|best| missing(wanted, &hosts) < missing(wanted, best)) {
                best = Some(hosts);
            }
        }
        let best = best.unwrap_or_default();
        // Designated and avoided hosts differ from item to item, which the bounds and the search do not know.
        if !self.request.avoid.is_empty() {
            return (best, None);
        }
        if let Some(proof) = bound(self.space, occupancy, wanted, self.open) {
            return (best, Some(proof));
        }
        if wanted.len() > EXACT_ITEMS {
            return (best, None);
        }
        match exact(self.space, &mut occupancy.clone(), wanted, self.open, EXACT_NODES) {
            Exact::Found(hosts) => (hosts.into_iter().map(Some).collect(), None),
            Exact::None(nodes) => (best, Some(Impossible::Searched { nodes })),
            Exact::Unknown => (best, None),
        }
    }

    fn pass(&self, occupancy: &mut Occupancy, wanted: &[Item], choice: Choice) -> Vec<Option<u32>> {
        let mut hosts = Vec::with_capacity(wanted.len());
        for item in wanted {
            let designated = item.vms.iter().find_map(|&vm| {
                let name = self.request.prefer.get(&self.space.world.vms[vm as usize].id)?;
                let host = self.space.host(&name.0)?;
                self.open.contains(&host).then_some(host)
            });
            let fitting =
                designated.filter(|&host| !self.avoids(item, host) && fits(self.space, occupancy, item, host));
            let open: Vec<u32> = match fitting {
                Some(host) => vec![host],
                None if self.request.avoid.is_empty() => {
                    hosts.extend(pack(self.space, occupancy, std::slice::from_ref(item), self.open, choice, &mut 0));
                    continue;
                }
                None => self.open.iter().copied().filter(|&host| !self.avoids(item, host)).collect(),
            };
            hosts.extend(pack(self.space, occupancy, std::slice::from_ref(item), &open, choice, &mut 0));
        }
        hosts
    }

    fn report(
        &self,
        before: Occupancy,
        wanted: &[Item],
        hosts: &[Option<u32>],
        impossible: Option<Impossible>,
    ) -> (Placement, Report) {
        let world = self.space.world;
        let mut after = before.clone();
        let mut placement = Placement::default();
        let mut report = Report { lines: Vec::new(), impossible };
        let mut candidates = Vec::new();
        for (item, host) in wanted.iter().zip(hosts) {
            candidates.push(self.open.iter().filter(|&&host| fits(self.space, &after, item, host)).count());
            if let Some(host) = *host {
                item.vms.iter().for_each(|&vm| after.put(self.space, vm, host));
            }
        }
        for ((item, host), candidates) in wanted.iter().zip(hosts).zip(candidates) {
            let Some(host) = *host else { continue };
            let name = &world.hosts[host as usize].name;
            for &vm in &item.vms {
                let facts = &world.vms[vm as usize];
                let wishes = self.space.wishes[vm as usize].iter().map(|&rule| rule as usize);
                let unmet = wishes
                    .filter(|&rule| !self.space.keeps(rule, vm, host, &after.at))
                    .map(|rule| world.rules[rule].name.clone());
                let outcome = Outcome::Placed { host: name.clone(), unmet: unmet.collect(), candidates };
                report.lines.push(Line { vm: facts.id, name: facts.name.clone(), outcome });
                placement.places.push(Place { vm: facts.id, host: name.clone() });
            }
        }
        for (item, _) in wanted.iter().zip(hosts).filter(|(_, host)| host.is_none()) {
            let proven =
                self.request.avoid.is_empty() && !self.open.iter().any(|&host| fits(self.space, &before, item, host));
            for &vm in &item.vms {
                let facts = &world.vms[vm as usize];
                let outcome = Outcome::NotPlaced { hosts: self.why_not(item, &after), proven };
                report.lines.push(Line { vm: facts.id, name: facts.name.clone(), outcome });
            }
        }
        for &vm in self.request.vms.iter().filter(|&&vm| self.space.vm(vm).is_none()) {
            report.lines.push(Line { vm, name: String::new(), outcome: Outcome::Unknown });
        }
        (placement, report)
    }

    /// Every host with the reason, hosts with the same reason together.
    fn why_not(&self, item: &Item, after: &Occupancy) -> Vec<(WhyNot, Vec<HostName>)> {
        let mut reasons: BTreeMap<(WhyNot, u64), Vec<HostName>> = BTreeMap::new();
        for (at, host) in self.space.world.hosts.iter().enumerate() {
            let why = self.why_not_on(item, at as u32, after);
            let (key, missing) = match why {
                WhyNot::Short { resource, missing } => (WhyNot::Short { resource, missing: 0 }, missing),
                why => (why, 0),
            };
            // What is missing differs everywhere; hosts are told together with the largest.
            let known = reasons.keys().find(|(known, _)| *known == key).cloned();
            let mut hosts = known.as_ref().and_then(|known| reasons.remove(known)).unwrap_or_default();
            hosts.push(host.name.clone());
            reasons.insert((key, missing.max(known.map_or(0, |(_, missing)| missing))), hosts);
        }
        let told = reasons.into_iter().map(|((why, missing), hosts)| match why {
            WhyNot::Short { resource, .. } => (WhyNot::Short { resource, missing }, hosts),
            why => (why, hosts),
        });
        told.collect()
    }

    fn why_not_on(&self, item: &Item, host: u32, after: &Occupancy) -> WhyNot {
        let facts = &self.space.world.hosts[host as usize];
        if !facts.state.takes_vms() {
            return WhyNot::State { state: facts.state };
        }
        if facts.spare && self.request.purpose == Purpose::Initial {
            return WhyNot::Spare;
        }
        if self.avoids(item, host) {
            return WhyNot::Avoided;
        }
        blocked(self.space, after, item, host)
            .unwrap_or(WhyNot::Short { resource: virtward_model::world::Resource::Memory, missing: 0 })
    }
}

/// Why an item does not fit on a host that takes VMs.
pub(crate) fn blocked(space: &Space, occupancy: &Occupancy, item: &Item, host: u32) -> Option<WhyNot> {
    let rule = |at: usize| WhyNot::Rule { rule: space.world.rules[at].name.clone() };
    if let Some(why) = item.vms.iter().find_map(|&vm| space.never(vm, host)) {
        return Some(why);
    }
    if let Some(at) = item.vms.iter().find_map(|&vm| space.conflict(vm, host, &occupancy.at)) {
        return Some(rule(at));
    }
    if let Some((d, needed, free)) = space.short(&item.need, host, &occupancy.used[host as usize]) {
        return Some(WhyNot::Short { resource: super::MEANING[d], missing: needed - free });
    }
    // What is left are units: mates elsewhere, or mates that another rule keeps apart.
    (!fits(space, occupancy, item, host)).then(|| {
        let ids: Vec<Uuid> = item.vms.iter().map(|&vm| space.world.vms[vm as usize].id).collect();
        let together = space.world.rules.iter().find(|rule| {
            rule.must
                && matches!(rule.kind, virtward_model::world::RuleKind::Together)
                && ids.iter().any(|id| rule.vms.contains(id))
        });
        WhyNot::Rule { rule: together.map(|rule| rule.name.clone()).unwrap_or_default() }
    })
}

/// Items without a host, by priority: fewer of the most important first.
fn missing(wanted: &[Item], hosts: &[Option<u32>]) -> [usize; 6] {
    let mut counts = [0; 6];
    for (item, host) in wanted.iter().zip(hosts) {
        counts[usize::from(item.priority).min(5)] += usize::from(host.is_none()) * item.vms.len();
    }
    counts
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
