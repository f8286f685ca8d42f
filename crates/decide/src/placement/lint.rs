//! Checks a plan against the world by itself: shares no code with the planner, only the nouns and admission control.
//!
//! Steps may be carried out in any order that their dependencies allow, and any of them may fail; so what is checked is
//! what could be on a host at once in any such order.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use uuid::Uuid;
use virtward_model::world::{Host, HostName, HostState, Rule, RuleKind, Vm, World};

use super::Plan;
use crate::admission;

/// What is wrong with a plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {what}")]
pub struct Violation {
    /// `step 3`, or `after all steps`.
    pub at: String,
    /// What is wrong.
    pub what: String,
}

struct Linter<'a> {
    world: &'a World,
    plan: &'a Plan,
    hosts: HashMap<&'a HostName, &'a Host>,
    vms: HashMap<Uuid, &'a Vm>,
    /// By step, as bits: all that must be done before it starts.
    before: Vec<Vec<u64>>,
    found: Vec<Violation>,
}

/// Everything that is wrong with a plan; nothing if it is sound.
pub fn check(world: &World, plan: &Plan) -> Vec<Violation> {
    let mut linter = Linter {
        world,
        plan,
        hosts: world.hosts.iter().map(|host| (&host.name, host)).collect(),
        vms: world.vms.iter().map(|vm| (vm.id, vm)).collect(),
        before: Vec::new(),
        found: Vec::new(),
    };
    if linter.order() {
        linter.journeys();
        linter.targets();
        linter.capacity();
        linter.rules();
        linter.end();
    }
    linter.found
}

/// What a VM needs of: memory, disk space, CPU, disk I/O and network that are reserved, vCPUs.
fn needs(vm: &Vm) -> [u128; 6] {
    let (size, kept) = (&vm.size, &vm.reservation);
    [size.memory.0, size.disk_space.0, kept.cpu_milli, kept.disk_iops, kept.network, size.cpu_milli].map(u128::from)
}

const NAMES: [&str; 6] = ["memory", "disk space", "reserved CPU", "reserved disk I/O", "reserved network", "vCPUs"];

/// What a host gives of these; `None`: no bound.
fn gives(world: &World, host: &Host) -> [Option<u128>; 6] {
    let rest = |all: u64, kept: u64| u128::from(all.saturating_sub(kept));
    let (all, kept) = (&host.capacity, &host.reserved);
    let known = |all: u64, kept: u64| (all > 0).then(|| rest(all, kept));
    let percent = |amount: u128, percent: u32| amount * u128::from(percent) / 100;
    let bound = world.overcommit.cpu_percent;
    [
        Some(percent(rest(all.memory.0, kept.memory.0), world.overcommit.memory_percent)),
        known(all.disk_space.0, kept.disk_space.0),
        known(all.cpu_milli, kept.cpu_milli),
        known(all.disk_iops, kept.disk_iops),
        known(all.network, kept.network),
        known(all.cpu_milli, kept.cpu_milli).filter(|_| bound > 0).map(|amount| percent(amount, bound)),
    ]
}

impl Linter<'_> {
    fn say(&mut self, step: usize, what: String) {
        self.found.push(Violation { at: format!("step {step}"), what });
    }

    /// Dependencies exist and have no cycle; fills `before`.
    fn order(&mut self) -> bool {
        let steps = &self.plan.steps;
        let words = steps.len().div_ceil(64);
        self.before = vec![vec![0; words]; steps.len()];
        let mut done = vec![false; steps.len()];
        let mut left = steps.len();
        while left > 0 {
            let ready: Vec<usize> = (0..steps.len())
                .filter(|&at| !done[at] && steps[at].after.iter().all(|&a| done.get(a).copied().unwrap_or(false)))
                .collect();
            if ready.is_empty() {
                let at = done.iter().position(|done| !done).unwrap_or(0);
                self.say(at, "waits for itself, or for a step that is not there".into());
                return false;
            }
            for at in ready {
                for &dependency in &steps[at].after {
                    let theirs = self.before[dependency].clone();
                    self.before[at].iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine |= theirs);
                    self.before[at][dependency / 64] |= 1 << (dependency % 64);
                }
                done[at] = true;
                left -= 1;
            }
        }
        true
    }

    fn comes_before(&self, one: usize, other: usize) -> bool {
        self.before[other][one / 64] >> (one % 64) & 1 == 1
    }

    /// Every VM is where its steps say, one after the other.
    fn journeys(&mut self) {
        let mut journeys: BTreeMap<Uuid, Vec<usize>> = BTreeMap::new();
        for (at, step) in self.plan.steps.iter().enumerate() {
            journeys.entry(step.vm).or_default().push(at);
        }
        for (vm, steps) in journeys {
            let Some(facts) = self.vms.get(&vm).copied() else {
                self.say(steps[0], format!("there is no VM {vm}"));
                continue;
            };
            let mut place = facts.host.clone();
            for pair in steps.windows(2) {
                if !self.comes_before(pair[0], pair[1]) {
                    self.say(pair[1], format!("{} may move twice at once", facts.name));
                }
            }
            for &at in &steps {
                let step = &self.plan.steps[at];
                let (from, to) = (step.from.clone(), step.to.clone());
                if place.as_ref() != Some(&from) || from == to {
                    self.say(at, format!("{} is not on {from}, or does not leave it", facts.name));
                }
                place = Some(to);
            }
        }
    }

    /// Each target takes the VM, whoever else is there.
    fn targets(&mut self) {
        let mut wrong = Vec::new();
        for (at, step) in self.plan.steps.iter().enumerate() {
            let (Some(vm), Some(host)) = (self.vms.get(&step.vm), self.hosts.get(&step.to)) else {
                wrong.push((at, format!("there is no host {}", step.to)));
                continue;
            };
            if !host.state.takes_vms() || host.spare {
                wrong.push((at, format!("{} takes no VMs", host.name)));
            }
            if let Some(stuck) = &vm.stuck {
                wrong.push((at, format!("{} cannot move: {stuck}", vm.name)));
            }
            if !vm.requires.is_subset(&host.offers) || vm.replicas.contains(&host.name) {
                wrong.push((
                    at,
                    format!("{} must not be on {}: a label is missing or its copy is there", vm.name, host.name),
                ));
            }
            if self.hosts.get(&step.from).is_some_and(|from| from.state == HostState::Down) {
                wrong.push((at, format!("nothing can be moved from {}", step.from)));
            }
            let broken =
                self.world.rules.iter().filter(|rule| rule.must && rule.vms.contains(&vm.id)).find(|rule| match &rule
                    .kind
                {
                    RuleKind::OnHosts { hosts } => !hosts.contains(&host.name),
                    RuleKind::NotOnHosts { hosts } => hosts.contains(&host.name),
                    _ => false,
                });
            if let Some(rule) = broken {
                wrong.push((at, format!("rule {}: {} on {}", rule.name, vm.name, host.name)));
            }
        }
        wrong.into_iter().for_each(|(at, what)| self.say(at, what));
    }

    /// Whatever order is taken, no host is ever given more than it has.
    fn capacity(&mut self) {
        let steps = &self.plan.steps;
        let touched: BTreeSet<&HostName> = steps.iter().map(|step| &step.to).collect();
        let mut wrong = Vec::new();
        for name in touched {
            let Some(host) = self.hosts.get(name) else { continue };
            let gives = gives(self.world, host);
            let mut base = [0u128; 6];
            for vm in self.world.vms.iter().filter(|vm| vm.host.as_ref() == Some(name)) {
                base.iter_mut().zip(needs(vm)).for_each(|(base, need)| *base += need);
            }
            let at_host = |at: &HostName| at == name;
            let arrivals: Vec<usize> = (0..steps.len()).filter(|&at| at_host(&steps[at].to)).collect();
            let departures: Vec<usize> = (0..steps.len()).filter(|&at| at_host(&steps[at].from)).collect();
            // What has certainly left when an arrival starts.
            let gone: BTreeMap<usize, BTreeSet<usize>> = arrivals
                .iter()
                .map(|&arrival| {
                    (arrival, departures.iter().copied().filter(|&d| self.comes_before(d, arrival)).collect())
                })
                .collect();
            for &arrival in &arrivals {
                let mine = &gone[&arrival];
                let mut load = base;
                for &other in &arrivals {
                    // Others that wait for more than this one can only be there once more has left; others of which
                    // nothing is known are taken to be there.
                    let later = mine.is_subset(&gone[&other]) && mine.len() < gone[&other].len();
                    if !later {
                        load.iter_mut().zip(self.need(other)).for_each(|(load, need)| *load += need);
                    }
                }
                for &departure in mine {
                    load.iter_mut().zip(self.need(departure)).for_each(|(l, need)| *l = l.saturating_sub(need));
                }
                let over = (0..6).find(|&d| gives[d].is_some_and(|gives| load[d] > gives));
                if let Some(d) = over {
                    wrong.push((arrival, format!("{name} may be given {} of {}", load[d], NAMES[d])));
                }
            }
        }
        wrong.into_iter().for_each(|(at, what)| self.say(at, what));
    }

    fn need(&self, step: usize) -> [u128; 6] {
        self.vms.get(&self.plan.steps[step].vm).map_or([0; 6], |vm| needs(vm))
    }

    /// Whoever must be apart never could be together: not at one host or in one domain at once.
    fn rules(&mut self) {
        let moving: BTreeSet<Uuid> = self.plan.steps.iter().map(|step| step.vm).collect();
        let mut wrong = Vec::new();
        for rule in self.world.rules.iter().filter(|rule| rule.must) {
            let level = match rule.kind {
                RuleKind::Apart => None,
                RuleKind::ApartDomains { level } => Some(level),
                _ => continue,
            };
            let vms: BTreeSet<Uuid> = rule.vms.iter().copied().collect();
            for &one in vms.intersection(&moving) {
                for &other in vms.iter().filter(|&&other| other != one) {
                    wrong.extend(self.meet(rule, level, one, other));
                }
            }
        }
        wrong.into_iter().for_each(|(at, what)| self.say(at, what));
    }

    /// A VM's stays: host, the step that brings it, the step that takes it away.
    fn stays(&self, vm: Uuid) -> Vec<(HostName, Option<usize>, Option<usize>)> {
        let mut stays: Vec<(HostName, Option<usize>, Option<usize>)> = Vec::new();
        let down = |host: &HostName| self.hosts.get(host).is_some_and(|host| host.state == HostState::Down);
        if let Some(host) = self.vms.get(&vm).and_then(|vm| vm.host.clone()).filter(|host| !down(host)) {
            stays.push((host, None, None));
        }
        for (at, step) in self.plan.steps.iter().enumerate().filter(|(_, step)| step.vm == vm) {
            if let Some(last) = stays.last_mut() {
                last.2 = Some(at);
            }
            stays.push((step.to.clone(), Some(at), None));
        }
        stays
    }

    fn meet(&self, rule: &Rule, level: Option<usize>, one: Uuid, other: Uuid) -> Option<(usize, String)> {
        let domain = |name: &HostName| {
            let path = level.and_then(|level| self.hosts.get(name)?.fault_domain.get(..=level));
            path.map(<[String]>::to_vec)
        };
        let same = |a: &HostName, b: &HostName| a == b || (domain(a).is_some() && domain(a) == domain(b));
        for (here, arrival, departure) in self.stays(one) {
            let Some(arrival) = arrival else { continue };
            for (there, their_arrival, their_departure) in self.stays(other) {
                let left = their_departure.is_some_and(|theirs| self.comes_before(theirs, arrival));
                let gone = departure.zip(their_arrival).is_some_and(|(mine, theirs)| self.comes_before(mine, theirs));
                if same(&here, &there) && !left && !gone {
                    return Some((arrival, format!("rule {}: two of its VMs may meet on {here}", rule.name)));
                }
            }
        }
        None
    }

    /// No room for failures is lost that was there.
    fn end(&mut self) {
        let mut after = self.world.clone();
        let last: HashMap<Uuid, &HostName> = self.plan.steps.iter().map(|step| (step.vm, &step.to)).collect();
        for vm in &mut after.vms {
            if let Some(&host) = last.get(&vm.id) {
                vm.host = Some(host.clone());
            }
        }
        if let Err(verdict) = admission::admit(self.world, &after) {
            let lost = verdict.losses.first().map(|loss| {
                let failed: Vec<&str> = loss.failed.iter().map(|host| host.0.as_str()).collect();
                format!("; {} VMs would stay down if {} failed", loss.lost.len(), failed.join(" and "))
            });
            let what = format!("less room for failures than before{}", lost.unwrap_or_default());
            self.found.push(Violation { at: "after all steps".into(), what });
        }
    }
}
