//! Plans: what must move, what should, and in which steps.
//!
//! First what must: VMs of hosts that are to be empty, must rules that are broken, hosts that were given more than they
//! have. Then what should: should rules that are broken, and, if asked, load. Then steps are found, and the plan is cut
//! back until it takes no room for failures away. What cannot be done is set aside with its reason; the rest goes on.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_model::world::{HostName, HostState, Resource, World};

use super::{
    Choice, DIMENSIONS, Item, MEANING, NOWHERE, Occupancy, Space, Wanted, WhyNot, blocked, even, fits, items, pack,
    route,
};
use crate::admission;

/// Why a VM moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum Reason {
    /// Its host is to be empty.
    Evacuate {
        /// The host's state.
        state: HostState,
    },
    /// A must rule is broken where it is, or a should rule that can be kept elsewhere.
    Rule {
        /// Its name.
        rule: String,
    },
    /// Its host was given more than it has.
    Overfull {
        /// Of what.
        resource: Resource,
    },
    /// Another VM needs its room.
    MakeRoom {
        /// That VM's name.
        vm: String,
    },
    /// Its host is loaded more than others; in percent of what the host has, before and after all moves.
    Load {
        /// The resource that is short there.
        resource: Resource,
        /// Before.
        from_percent: u64,
        /// On its new host, after.
        to_percent: u64,
    },
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Evacuate { state } => write!(f, "its host is {state}"),
            Reason::Rule { rule } => write!(f, "rule {rule}"),
            Reason::Overfull { resource } => write!(f, "its host was given more {resource} than it has"),
            Reason::MakeRoom { vm } => write!(f, "makes room for {vm}"),
            Reason::Load { resource, from_percent, to_percent } => {
                write!(f, "{resource} at {from_percent} % here, {to_percent} % there afterwards")
            }
        }
    }
}

/// One migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub name: String,
    /// Where it is then.
    pub from: HostName,
    /// Where it goes.
    pub to: HostName,
    /// Steps, by index, that must have succeeded before this one starts.
    pub after: Vec<usize>,
    /// Steps of one layer do not wait for each other.
    pub layer: usize,
    /// It moves on from there in a later step.
    pub temporary: bool,
    /// Why.
    pub why: Reason,
}

/// Steps; each may start when those that it waits for have succeeded, as many at once as the executor's limits allow. If
/// one fails, those that wait for it, directly or not, do not start; all others are as right as before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// In an order in which they could be done one by one.
    pub steps: Vec<Step>,
}

/// A VM that should move and does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub name: String,
    /// Its host.
    pub host: HostName,
    /// Why it should move.
    pub wanted: Reason,
    /// Why it does not.
    pub because: Because,
}

/// Why a move that is wanted is not made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "because", rename_all = "kebab-case")]
pub enum Because {
    /// The VM cannot be moved now.
    Stuck {
        /// Why.
        why: String,
    },
    /// No host can take it.
    NoHost {
        /// Hosts by reason.
        hosts: Vec<(WhyNot, Vec<HostName>)>,
    },
    /// There is a place, but no order of moves, with temporary ones, leads there.
    NoWay,
    /// Room that is kept for failures would be lost.
    FailoverRoom,
}

impl std::fmt::Display for Because {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Because::Stuck { why } => f.write_str(why),
            Because::NoHost { hosts } => {
                let told: Vec<String> = hosts
                    .iter()
                    .map(|(why, hosts)| match hosts.as_slice() {
                        [host] => format!("{host}: {why}"),
                        [host, rest @ ..] => format!("{host} and {} more: {why}", rest.len()),
                        [] => why.to_string(),
                    })
                    .collect();
                write!(f, "no host can take it ({})", told.join("; "))
            }
            Because::NoWay => f.write_str("no order of moves leads to its place"),
            Because::FailoverRoom => f.write_str("room that is kept for failures would be lost"),
        }
    }
}

/// What to plan for.
#[derive(Clone, Debug, Default)]
pub struct Goal {
    /// Even out load, too.
    pub load: Option<even::Evening>,
    /// Should rules that are broken are mended.
    pub wishes: bool,
    /// Only hosts that are to be empty are looked at: rules that are broken elsewhere, and hosts that were given too much,
    /// are left as they are.
    pub only_leaving: bool,
    /// Room for failures may be lost to what must move: an administrator insists.
    pub give_up_failover_room: bool,
}

/// What a plan comes to, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanReport {
    /// Moves that are wanted and not made.
    pub set_aside: Vec<SetAside>,
    /// Unmet demand and discomfort before and after, in millionths of an average host.
    pub cost_before: u64,
    /// After all steps.
    pub cost_after: u64,
    /// Why load is not evened out, if it is not.
    pub no_load_moves: Option<String>,
}

/// Plans. The linter ([`super::check`]) accepts every plan that this makes.
pub fn plan(world: &World, goal: &Goal) -> (Plan, PlanReport) {
    let space = Space::new(world, false);
    let start = living(&space);
    let mut draft = Draft::new(&space, &start);
    draft.musts(goal.only_leaving);
    if goal.wishes {
        draft.wishes();
    }
    let evened = goal.load.as_ref().map(|evening| even::even(world, &start, &draft.target, evening));
    let mut report = PlanReport::default();
    if let Some(evened) = &evened {
        report.no_load_moves = evened.why_not.clone();
        draft.load(evened);
    }
    let chosen = draft.choose(goal);
    report.set_aside = draft.set_aside;
    let measure = goal.load.clone().unwrap_or_default();
    report.cost_before = even::cost(world, &start, &measure);
    report.cost_after = even::cost(world, &chosen.end, &measure);
    (to_plan(&space, &chosen, &draft.reasons), report)
}

/// Who is where, without those whose host is down: they run nowhere, and failover places them.
fn living(space: &Space) -> Occupancy {
    let mut occupancy = space.occupancy();
    for vm in 0..space.world.vms.len() as u32 {
        let host = occupancy.at[vm as usize];
        if host != NOWHERE && space.world.hosts[host as usize].state == HostState::Down {
            occupancy.take(space, vm);
        }
    }
    occupancy
}

fn to_plan(space: &Space, route: &super::Route, reasons: &[Reason]) -> Plan {
    let host = |at: u32| space.world.hosts[at as usize].name.clone();
    let steps = route.hops.iter().map(|hop| {
        let vm = &space.world.vms[hop.vm as usize];
        Step {
            vm: vm.id,
            name: vm.name.clone(),
            from: host(hop.from),
            to: host(hop.to),
            after: hop.after.iter().map(|&at| at as usize).collect(),
            layer: hop.layer as usize,
            temporary: hop.temporary,
            why: reasons[hop.reason as usize].clone(),
        }
    });
    Plan { steps: steps.collect() }
}

struct Draft<'a> {
    space: &'a Space<'a>,
    start: &'a Occupancy,
    /// Where everybody is to be.
    target: Occupancy,
    open: Vec<u32>,
    /// In order of importance: what must move first.
    wanted: Vec<Wanted>,
    musts: usize,
    reasons: Vec<Reason>,
    set_aside: Vec<SetAside>,
}

impl<'a> Draft<'a> {
    fn new(space: &'a Space<'a>, start: &'a Occupancy) -> Self {
        let hosts = space.world.hosts.iter().enumerate();
        let open = hosts.filter(|(_, host)| host.state.takes_vms() && !host.spare).map(|(at, _)| at as u32).collect();
        Self {
            space,
            start,
            target: start.clone(),
            open,
            wanted: Vec::new(),
            musts: 0,
            reasons: Vec::new(),
            set_aside: Vec::new(),
        }
    }

    fn reason(&mut self, reason: Reason) -> u32 {
        if self.reasons.last() != Some(&reason) {
            self.reasons.push(reason);
        }
        self.reasons.len() as u32 - 1
    }

    fn want(&mut self, vm: u32, to: u32, reason: Reason) {
        let reason = self.reason(reason);
        self.wanted.retain(|wanted| wanted.vm != vm);
        if self.start.at[vm as usize] != to {
            self.wanted.push(Wanted { vm, to, reason });
        }
    }

    fn aside(&mut self, vm: u32, wanted: Reason, because: Because) {
        let facts = &self.space.world.vms[vm as usize];
        let host = facts.host.clone().unwrap_or_else(|| HostName(String::new()));
        self.set_aside.push(SetAside { vm: facts.id, name: facts.name.clone(), host, wanted, because });
    }

    /// Moves that must be made, by the VMs' priority.
    fn musts(&mut self, only_leaving: bool) {
        let mut vms: Vec<u32> = (0..self.space.world.vms.len() as u32).collect();
        vms.sort_by_key(|&vm| {
            let facts = &self.space.world.vms[vm as usize];
            (facts.priority, std::cmp::Reverse(facts.size.memory), vm)
        });
        for &vm in &vms {
            let Some(reason) = self.must(vm) else { continue };
            if !only_leaving || matches!(reason, Reason::Evacuate { .. }) {
                self.relocate(vm, reason, true);
            }
        }
        if only_leaving {
            self.musts = self.wanted.len();
            return;
        }
        // Overfull hosts give away what matters least, smallest first.
        for host in 0..self.space.world.hosts.len() as u32 {
            let mut here: Vec<u32> =
                vms.iter().rev().copied().filter(|&vm| self.target.at[vm as usize] == host).collect();
            while let Some(d) = self.overfull(host) {
                let Some(at) = here.iter().position(|&vm| self.space.need[vm as usize][d] > 0 && self.is_free(vm))
                else {
                    break;
                };
                let vm = here.remove(at);
                self.relocate(vm, Reason::Overfull { resource: MEANING[d] }, false);
            }
        }
        self.musts = self.wanted.len();
    }

    /// A dimension in which the host was given more than it has.
    fn overfull(&self, host: u32) -> Option<usize> {
        let (used, room) = (&self.target.used[host as usize], &self.space.room[host as usize]);
        let state = self.space.world.hosts[host as usize].state;
        (0..DIMENSIONS).find(|&d| used[d] > room[d]).filter(|_| state.takes_vms())
    }

    fn is_free(&self, vm: u32) -> bool {
        let facts = &self.space.world.vms[vm as usize];
        facts.stuck.is_none() && !self.wanted.iter().any(|wanted| wanted.vm == vm)
    }

    fn must(&self, vm: u32) -> Option<Reason> {
        let host = self.target.at[vm as usize];
        if host == NOWHERE {
            return None;
        }
        let facts = &self.space.world.hosts[host as usize];
        if facts.state.is_leaving() {
            return Some(Reason::Evacuate { state: facts.state });
        }
        let rule = |at: usize| Reason::Rule { rule: self.space.world.rules[at].name.clone() };
        if !self.space.may(vm, host) {
            return Some(Reason::Rule {
                rule: self.space.never(vm, host).map_or_else(String::new, |why| match why {
                    WhyNot::Rule { rule } => rule,
                    why => why.to_string(),
                }),
            });
        }
        if let Some(at) = self.space.conflict(vm, host, &self.target.at) {
            // Of two that must part, the less important one goes: it comes later, when the other has been seen.
            let seen_later = self.space.apart_of[vm as usize].iter().any(|&group| {
                let group = &self.space.apart[group as usize];
                group.rule == at && group.members.iter().any(|&other| self.is_behind(other, vm, host, group.level))
            });
            return (!seen_later).then(|| rule(at));
        }
        let mates = &self.space.units[self.space.unit[vm as usize] as usize];
        let apart =
            mates.iter().any(|&mate| self.target.at[mate as usize] != host && self.target.at[mate as usize] != NOWHERE);
        apart.then(|| Reason::Rule { rule: self.together_rule(vm) })
    }

    /// Whether another VM of the same place can move and is less important, so that it is the one to go.
    fn is_behind(&self, other: u32, vm: u32, host: u32, level: Option<usize>) -> bool {
        let key = |vm: u32| {
            let facts = &self.space.world.vms[vm as usize];
            (facts.stuck.is_none(), facts.priority, std::cmp::Reverse(facts.size.memory), vm)
        };
        let there = self.target.at[other as usize];
        there != NOWHERE && self.space.slot(level, there) == self.space.slot(level, host) && key(other) > key(vm)
    }

    fn together_rule(&self, vm: u32) -> String {
        let id = self.space.world.vms[vm as usize].id;
        let rules = self.space.world.rules.iter();
        rules
            .filter(|rule| rule.must && matches!(rule.kind, virtward_model::world::RuleKind::Together))
            .find(|rule| rule.vms.contains(&id))
            .map_or_else(String::new, |rule| rule.name.clone())
    }

    /// Finds another place for a VM and all that must stay with it.
    fn relocate(&mut self, vm: u32, reason: Reason, may_push: bool) {
        let unit = self.space.units[self.space.unit[vm as usize] as usize].clone();
        let unit: Vec<u32> = unit.into_iter().filter(|&mate| self.target.at[mate as usize] != NOWHERE).collect();
        if let Some(why) = unit.iter().find_map(|&mate| self.space.world.vms[mate as usize].stuck.as_ref()) {
            self.aside(vm, reason, Because::Stuck { why: why.to_string() });
            return;
        }
        let before: Vec<u32> = unit.iter().map(|&mate| self.target.at[mate as usize]).collect();
        unit.iter().for_each(|&mate| self.target.take(self.space, mate));
        let item = items(self.space, &unit, &self.target.at).swap_remove(0);
        let one = std::slice::from_ref(&item);
        // Where it is counts as no place, or a host that was given too much would keep it.
        let open: Vec<u32> = self.open.iter().copied().filter(|host| unit.len() > 1 || *host != before[0]).collect();
        let found = pack(self.space, &mut self.target, one, &open, Choice::Spread, &mut 0)[0]
            .or_else(|| if may_push { self.push(&item, &open) } else { None });
        match found {
            Some(host) => unit.iter().for_each(|&mate| self.want(mate, host, reason.clone())),
            None => {
                unit.iter().zip(&before).for_each(|(&mate, &host)| self.target.put(self.space, mate, host));
                let hosts = self.why_not(&item);
                self.aside(vm, reason, Because::NoHost { hosts });
            }
        }
    }

    /// Makes room on a host by moving one other VM away from it.
    fn push(&mut self, item: &Item, open: &[u32]) -> Option<u32> {
        for &host in open {
            if !item.vms.iter().all(|&vm| self.space.may(vm, host)) {
                continue;
            }
            let here: Vec<u32> =
                self.on(host).into_iter().filter(|&vm| self.is_free(vm) && self.is_single(vm)).collect();
            for pushed in here {
                self.target.take(self.space, pushed);
                if fits(self.space, &self.target, item, host) {
                    item.vms.iter().for_each(|&vm| self.target.put(self.space, vm, host));
                    let other = items(self.space, &[pushed], &self.target.at);
                    let elsewhere: Vec<u32> = open.iter().copied().filter(|&other| other != host).collect();
                    if let Some(to) = pack(self.space, &mut self.target, &other, &elsewhere, Choice::Spread, &mut 0)[0]
                    {
                        let name = self.space.world.vms[item.vms[0] as usize].name.clone();
                        self.want(pushed, to, Reason::MakeRoom { vm: name });
                        return Some(host);
                    }
                    item.vms.iter().for_each(|&vm| self.target.take(self.space, vm));
                }
                self.target.put(self.space, pushed, host);
            }
        }
        None
    }

    fn is_single(&self, vm: u32) -> bool {
        self.space.units[self.space.unit[vm as usize] as usize].len() == 1
    }

    fn on(&self, host: u32) -> Vec<u32> {
        (0..self.target.at.len() as u32).filter(|&vm| self.target.at[vm as usize] == host).collect()
    }

    fn why_not(&self, item: &Item) -> Vec<(WhyNot, Vec<HostName>)> {
        let mut told: std::collections::BTreeMap<WhyNot, Vec<HostName>> = std::collections::BTreeMap::new();
        for (at, host) in self.space.world.hosts.iter().enumerate() {
            let why = match () {
                () if !host.state.takes_vms() => Some(WhyNot::State { state: host.state }),
                () if host.spare => Some(WhyNot::Spare),
                () => blocked(self.space, &self.target, item, at as u32),
            };
            if let Some(why) = why {
                told.entry(why).or_default().push(host.name.clone());
            }
        }
        told.into_iter().collect()
    }

    /// Should rules that are broken and can be kept elsewhere.
    fn wishes(&mut self) {
        for vm in 0..self.space.world.vms.len() as u32 {
            let here = self.target.at[vm as usize];
            if here == NOWHERE || self.space.wishes[vm as usize].is_empty() || !self.is_free(vm) || !self.is_single(vm)
            {
                continue;
            }
            let unmet = self.space.unmet_wishes(vm, here, &self.target.at);
            if unmet == 0 {
                continue;
            }
            self.target.take(self.space, vm);
            let item = items(self.space, &[vm], &self.target.at).swap_remove(0);
            let better = self.open.iter().copied().filter(|&host| {
                self.space.unmet_wishes(vm, host, &self.target.at) < unmet
                    && fits(self.space, &self.target, &item, host)
            });
            let best = better.min_by_key(|&host| {
                let unmet = self.space.unmet_wishes(vm, host, &self.target.at);
                (unmet, self.target.pressure(self.space, host, &item.need, &item.want), host)
            });
            let rule = self.space.wishes[vm as usize]
                .iter()
                .map(|&rule| rule as usize)
                .find(|&rule| !self.space.keeps(rule, vm, here, &self.target.at));
            self.target.put(self.space, vm, best.unwrap_or(here));
            if let (Some(host), Some(rule)) = (best, rule) {
                self.want(vm, host, Reason::Rule { rule: self.space.world.rules[rule].name.clone() });
            }
        }
        // They come before load, and give way to room for failures as load does.
    }

    fn load(&mut self, evened: &even::Evened) {
        for &(vm, to) in &evened.moves {
            self.target.take(self.space, vm);
            self.target.put(self.space, vm, to);
        }
        for &(vm, to) in &evened.moves {
            let from = self.start.at[vm as usize];
            let resource = even::hottest(self.space, self.start, from);
            let percent = |occupancy: &Occupancy, host| even::percent(self.space, occupancy, host, resource);
            let reason = Reason::Load {
                resource,
                from_percent: percent(self.start, from),
                to_percent: percent(&self.target, to),
            };
            self.want(vm, to, reason);
        }
    }

    /// The longest part of what is wanted that takes no room for failures away, as steps.
    fn choose(&mut self, goal: &Goal) -> super::Route {
        let all = route(self.space, self.start, &self.wanted, &self.open);
        let unbounded = goal.give_up_failover_room && self.wanted.len() == self.musts;
        let failures = self.space.world.failover.failures;
        if all.hops.is_empty() || failures == 0 || unbounded {
            return self.taken(all, self.wanted.len());
        }
        let before = admission::check(self.space.world);
        let keeps = |route: &super::Route| {
            let mut after = self.space.world.clone();
            for hop in &route.hops {
                let host = route.end.at[hop.vm as usize];
                after.vms[hop.vm as usize].host = Some(self.space.world.hosts[host as usize].name.clone());
            }
            !admission::is_worse(&before, &admission::check(&after))
        };
        if keeps(&all) {
            return self.taken(all, self.wanted.len());
        }
        // More moves need not take more room, but half as many are found to do in a few looks.
        let (mut low, mut high) = (0, self.wanted.len());
        let mut best = route(self.space, self.start, &[], &self.open);
        if goal.give_up_failover_room {
            low = self.musts;
            best = route(self.space, self.start, &self.wanted[..low], &self.open);
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let part = route(self.space, self.start, &self.wanted[..middle], &self.open);
            if keeps(&part) {
                (low, best) = (middle, part);
            } else {
                high = middle;
            }
        }
        self.taken(best, low)
    }

    /// Tells of those that are not moved in the end.
    fn taken(&mut self, route: super::Route, kept: usize) -> super::Route {
        let left: Vec<(Wanted, Because)> = route
            .blocked
            .iter()
            .map(|&wanted| (wanted, Because::NoWay))
            .chain(self.wanted[kept..].iter().map(|&wanted| (wanted, Because::FailoverRoom)))
            .collect();
        for (wanted, because) in left {
            let reason = self.reasons[wanted.reason as usize].clone();
            self.aside(wanted.vm, reason, because);
        }
        route
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
