//! The world compiled to indices and numbers: what placement, admission and planning compute on.
//!
//! A [`Space`] never changes; who is where is an [`Occupancy`]. What a VM may never use (labels, copies, must rules
//! about hosts) is one bit set for each *class* of VMs that agree in all of it, as most VMs do.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;
use virtward_model::world::{Host, Resource, RuleKind, Vm, World};

use super::WhyNot;

/// Dimensions that are never exceeded: reservations and sizes.
pub(crate) const DIMENSIONS: usize = 6;
/// Which resource each dimension is about; the last is vCPUs against the bound of overcommitment.
pub(crate) const MEANING: [Resource; DIMENSIONS] =
    [Resource::Memory, Resource::DiskSpace, Resource::Cpu, Resource::DiskIo, Resource::Network, Resource::Cpu];
/// Amounts in every dimension.
pub(crate) type Amounts = [u64; DIMENSIONS];
/// No host.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// What a VM needs in every dimension, wherever it is.
pub(crate) fn need(vm: &Vm) -> Amounts {
    let reserved = vm.reservation;
    [
        // Never nothing, so that a host that is marked as full takes nobody.
        vm.size.memory.0.max(1),
        vm.size.disk_space.0,
        reserved.cpu_milli,
        reserved.disk_iops,
        reserved.network,
        vm.size.cpu_milli,
    ]
}

/// What is wanted, or there, of CPU, disk I/O and network: resources that can be given out twice, at the cost of speed.
pub(crate) type Wants = [u64; 3];

/// What a VM wants after its limits; it is never taken for less than its reservation.
pub(crate) fn wants(vm: &Vm) -> Wants {
    let (demand, reserved, limits) = (&vm.demand, &vm.reservation, &vm.limits);
    let of = |demand: u64, reserved: u64, limit: Option<u64>| demand.max(reserved).min(limit.unwrap_or(u64::MAX));
    [
        of(demand.cpu_milli, reserved.cpu_milli, limits.cpu_milli),
        of(demand.disk_iops, reserved.disk_iops, limits.disk_iops),
        of(demand.network, reserved.network, limits.network),
    ]
}

fn supply(host: &Host) -> Wants {
    let (usable, all) = (host.usable(), &host.capacity);
    let known = |amount: u64, all: u64| if all == 0 { u64::MAX } else { amount };
    [known(usable.cpu_milli, all.cpu_milli), known(usable.disk_iops, all.disk_iops), known(usable.network, all.network)]
}

/// VMs of which no two share a slot: a host, or a fault domain at a level.
pub(crate) struct Apart {
    pub rule: usize,
    pub members: Vec<u32>,
    /// `None`: hosts.
    pub level: Option<usize>,
}

/// The world in numbers.
pub(crate) struct Space<'w> {
    pub world: &'w World,
    /// By host.
    pub room: Vec<Amounts>,
    /// By VM.
    pub need: Vec<Amounts>,
    /// By VM: what it wants of CPU, disk I/O and network, after its limits.
    pub want: Vec<Wants>,
    /// By host: what there is of these.
    pub supply: Vec<Wants>,
    /// By VM.
    pub class: Vec<u32>,
    /// By class, then by host.
    pub allowed: Vec<Vec<bool>>,
    /// Must rules that keep VMs apart.
    pub apart: Vec<Apart>,
    /// By VM: indices into `apart`.
    pub apart_of: Vec<Vec<u32>>,
    /// By VM: the unit of VMs that must stay on one host; VMs without such a rule are units of their own.
    pub unit: Vec<u32>,
    /// By unit.
    pub units: Vec<Vec<u32>>,
    /// Should rules, as indices into the world's; by VM.
    pub wishes: Vec<Vec<u32>>,
    /// By level, then by host: the fault domain.
    domains: Vec<Vec<u32>>,
    hosts_by_name: HashMap<&'w str, u32>,
    vms_by_id: HashMap<Uuid, u32>,
}

impl<'w> Space<'w> {
    /// Compiles. With `failover`, memory may be overcommitted as after a failure.
    pub fn new(world: &'w World, failover: bool) -> Self {
        let hosts_by_name: HashMap<_, _> =
            world.hosts.iter().enumerate().map(|(at, host)| (host.name.0.as_str(), at as u32)).collect();
        let vms_by_id: HashMap<_, _> = world.vms.iter().enumerate().map(|(at, vm)| (vm.id, at as u32)).collect();
        let mut space = Self {
            world,
            room: world.hosts.iter().map(|host| room(world, host, failover)).collect(),
            need: world.vms.iter().map(need).collect(),
            want: world.vms.iter().map(wants).collect(),
            supply: world.hosts.iter().map(supply).collect(),
            class: Vec::new(),
            allowed: Vec::new(),
            apart: Vec::new(),
            apart_of: vec![Vec::new(); world.vms.len()],
            unit: Vec::new(),
            units: Vec::new(),
            wishes: vec![Vec::new(); world.vms.len()],
            domains: domains(world),
            hosts_by_name,
            vms_by_id,
        };
        space.compile_rules();
        space.compile_classes();
        space
    }

    pub fn host(&self, name: &str) -> Option<u32> {
        self.hosts_by_name.get(name).copied()
    }

    pub fn vm(&self, id: Uuid) -> Option<u32> {
        self.vms_by_id.get(&id).copied()
    }

    /// Where everybody is in the world.
    pub fn occupancy(&self) -> Occupancy {
        let mut occupancy = Occupancy {
            at: vec![NOWHERE; self.world.vms.len()],
            used: vec![[0; DIMENSIONS]; self.world.hosts.len()],
            wanted: vec![[0; 3]; self.world.hosts.len()],
        };
        for (vm, facts) in self.world.vms.iter().enumerate() {
            if let Some(host) = facts.host.as_ref().and_then(|host| self.host(&host.0)) {
                occupancy.put(self, vm as u32, host);
            }
        }
        occupancy
    }

    /// Whether the VM may ever be on the host; state of the host and room aside.
    pub fn may(&self, vm: u32, host: u32) -> bool {
        self.allowed[self.class[vm as usize] as usize][host as usize]
    }

    /// What of a host counts as one place for a group.
    pub fn slot(&self, level: Option<usize>, host: u32) -> u32 {
        match level.and_then(|level| self.domains.get(level)) {
            Some(domains) => domains[host as usize],
            None => host,
        }
    }

    /// The rule that somebody else's place breaks if the VM is put on the host.
    pub fn conflict(&self, vm: u32, host: u32, at: &[u32]) -> Option<usize> {
        self.apart_of[vm as usize].iter().map(|&group| &self.apart[group as usize]).find_map(|group| {
            let slot = self.slot(group.level, host);
            let taken = group.members.iter().any(|&other| {
                let there = at[other as usize];
                other != vm && there != NOWHERE && self.slot(group.level, there) == slot
            });
            taken.then_some(group.rule)
        })
    }

    /// How many should rules are broken with the VM on the host.
    pub fn unmet_wishes(&self, vm: u32, host: u32, at: &[u32]) -> usize {
        self.wishes[vm as usize].iter().filter(|&&rule| !self.keeps(rule as usize, vm, host, at)).count()
    }

    /// Whether a rule is kept as far as this VM is concerned, if it were on the host.
    pub fn keeps(&self, rule: usize, vm: u32, host: u32, at: &[u32]) -> bool {
        let rule = &self.world.rules[rule];
        let named = |hosts: &[virtward_model::world::HostName]| {
            let name = &self.world.hosts[host as usize].name;
            hosts.contains(name)
        };
        let mut others = rule
            .vms
            .iter()
            .filter_map(|&id| self.vm(id))
            .filter(|&other| other != vm && at[other as usize] != NOWHERE)
            .map(|other| at[other as usize]);
        match &rule.kind {
            RuleKind::Together => others.all(|there| there == host),
            RuleKind::Apart => others.all(|there| there != host),
            RuleKind::ApartDomains { level } => {
                let slot = self.slot(Some(*level), host);
                others.all(|there| self.slot(Some(*level), there) != slot)
            }
            RuleKind::OnHosts { hosts } => named(hosts),
            RuleKind::NotOnHosts { hosts } => !named(hosts),
        }
    }

    /// The first dimension in which a host has too little left, with what is needed and what is left.
    pub fn short(&self, need: &Amounts, host: u32, used: &Amounts) -> Option<(usize, u64, u64)> {
        let room = &self.room[host as usize];
        (0..DIMENSIONS).find_map(|d| {
            let free = room[d].saturating_sub(used[d]);
            (need[d] > free).then_some((d, need[d], free))
        })
    }

    /// Why a VM cannot be on a host for reasons that no move of others changes.
    pub fn never(&self, vm: u32, host: u32) -> Option<WhyNot> {
        let (facts, target) = (&self.world.vms[vm as usize], &self.world.hosts[host as usize]);
        if let Some(label) = facts.requires.iter().find(|label| !target.offers.contains(*label)) {
            return Some(WhyNot::Lacks { label: label.clone() });
        }
        if facts.replicas.contains(&target.name) {
            return Some(WhyNot::HoldsReplica);
        }
        self.world.rules.iter().filter(|rule| rule.must && rule.vms.contains(&facts.id)).find_map(|rule| {
            let broken = match &rule.kind {
                RuleKind::OnHosts { hosts } => !hosts.contains(&target.name),
                RuleKind::NotOnHosts { hosts } => hosts.contains(&target.name),
                _ => false,
            };
            broken.then(|| WhyNot::Rule { rule: rule.name.clone() })
        })
    }

    fn compile_rules(&mut self) {
        let mut union: Vec<u32> = (0..self.world.vms.len() as u32).collect();
        for (at, rule) in self.world.rules.iter().enumerate() {
            let mut members: Vec<u32> = rule.vms.iter().filter_map(|&id| self.vm(id)).collect();
            members.sort_unstable();
            members.dedup();
            if !rule.must {
                members.iter().for_each(|&vm| self.wishes[vm as usize].push(at as u32));
                continue;
            }
            let level = match rule.kind {
                RuleKind::Apart => None,
                RuleKind::ApartDomains { level } => Some(level),
                RuleKind::Together => {
                    members.windows(2).for_each(|pair| join(&mut union, pair[0], pair[1]));
                    continue;
                }
                _ => continue,
            };
            members.iter().for_each(|&vm| self.apart_of[vm as usize].push(self.apart.len() as u32));
            self.apart.push(Apart { rule: at, members, level });
        }
        let mut numbers = HashMap::new();
        for vm in 0..union.len() as u32 {
            let root = find(&mut union, vm);
            let unit = *numbers.entry(root).or_insert_with(|| {
                self.units.push(Vec::new());
                self.units.len() as u32 - 1
            });
            self.units[unit as usize].push(vm);
            self.unit.push(unit);
        }
    }

    fn compile_classes(&mut self) {
        let world = self.world;
        let mut bound: Vec<Vec<u32>> = vec![Vec::new(); world.vms.len()];
        for (at, rule) in world.rules.iter().enumerate() {
            if rule.must && matches!(rule.kind, RuleKind::OnHosts { .. } | RuleKind::NotOnHosts { .. }) {
                rule.vms.iter().filter_map(|&id| self.vm(id)).for_each(|vm| bound[vm as usize].push(at as u32));
            }
        }
        let mut classes = BTreeMap::new();
        for (vm, facts) in world.vms.iter().enumerate() {
            let key = (&facts.requires, &facts.replicas, &bound[vm]);
            let class = *classes.entry(key).or_insert_with(|| {
                let hosts = world.hosts.iter().map(|host| {
                    facts.requires.is_subset(&host.offers)
                        && !facts.replicas.contains(&host.name)
                        && bound[vm].iter().all(|&rule| match &world.rules[rule as usize].kind {
                            RuleKind::OnHosts { hosts } => hosts.contains(&host.name),
                            RuleKind::NotOnHosts { hosts } => !hosts.contains(&host.name),
                            _ => true,
                        })
                });
                self.allowed.push(hosts.collect());
                self.allowed.len() as u32 - 1
            });
            self.class.push(class);
        }
    }
}

/// Who is where, and what is used by it.
#[derive(Clone)]
pub(crate) struct Occupancy {
    /// By VM; [`NOWHERE`] for those that run nowhere.
    pub at: Vec<u32>,
    /// By host.
    pub used: Vec<Amounts>,
    /// By host: what its VMs want.
    pub wanted: Vec<Wants>,
}

impl Occupancy {
    pub fn put(&mut self, space: &Space, vm: u32, host: u32) {
        self.at[vm as usize] = host;
        add(&mut self.used[host as usize], &space.need[vm as usize]);
        let wants = &space.want[vm as usize];
        self.wanted[host as usize].iter_mut().zip(wants).for_each(|(to, what)| *to = to.saturating_add(*what));
    }

    /// Takes the VM off its host, if it is on one.
    pub fn take(&mut self, space: &Space, vm: u32) {
        let host = std::mem::replace(&mut self.at[vm as usize], NOWHERE);
        if host != NOWHERE {
            subtract(&mut self.used[host as usize], &space.need[vm as usize]);
            let wants = &space.want[vm as usize];
            self.wanted[host as usize]
                .iter_mut()
                .zip(wants)
                .for_each(|(from, what)| *from = from.saturating_sub(*what));
        }
    }

    /// How full the fullest of a host's resources would be with more on it; 1000 is full, more is unmet demand.
    pub fn pressure(&self, space: &Space, host: u32, need: &Amounts, want: &Wants) -> u64 {
        let h = host as usize;
        let of = |used: u64, more: u64, room: u64| match room {
            u64::MAX => 0,
            room => (u128::from(used.saturating_add(more)) * 1000 / u128::from(room.max(1))) as u64,
        };
        let sizes = (0..2).map(|d| of(self.used[h][d], need[d], space.room[h][d]));
        let demand = (0..3).map(|r| of(self.wanted[h][r], want[r], space.supply[h][r]));
        sizes.chain(demand).max().unwrap_or(0)
    }
}

pub(crate) fn add(to: &mut Amounts, what: &Amounts) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to = to.saturating_add(*what));
}

pub(crate) fn subtract(from: &mut Amounts, what: &Amounts) {
    from.iter_mut().zip(what).for_each(|(from, what)| *from = from.saturating_sub(*what));
}

/// What a host gives to VMs in every dimension.
pub(crate) fn room(world: &World, host: &Host, failover: bool) -> Amounts {
    let usable = host.usable();
    let overcommit = &world.overcommit;
    let percent = match failover {
        true => overcommit.memory_failover_percent.max(overcommit.memory_percent),
        false => overcommit.memory_percent,
    };
    let scaled = |amount: u64, percent: u32| (u128::from(amount) * u128::from(percent) / 100) as u64;
    // A capacity that nobody knows bounds nothing.
    let known = |amount: u64, of_host: u64| if of_host == 0 { u64::MAX } else { amount };
    [
        scaled(usable.memory.0, percent),
        known(usable.disk_space.0, host.capacity.disk_space.0),
        known(usable.cpu_milli, host.capacity.cpu_milli),
        known(usable.disk_iops, host.capacity.disk_iops),
        known(usable.network, host.capacity.network),
        match overcommit.cpu_percent {
            0 => u64::MAX,
            percent => known(scaled(usable.cpu_milli, percent), host.capacity.cpu_milli),
        },
    ]
}

/// Numbers fault domains: by level, then by host. A host without a domain at a level is one of its own.
pub(crate) fn domains(world: &World) -> Vec<Vec<u32>> {
    let levels = world.hosts.iter().map(|host| host.fault_domain.len()).max().unwrap_or(0);
    let level = |level: usize| {
        let mut numbers: HashMap<&[String], u32> = HashMap::new();
        let mut next = 0;
        world
            .hosts
            .iter()
            .map(|host| {
                let fresh = next;
                let number = match host.fault_domain.get(..=level) {
                    Some(path) => *numbers.entry(path).or_insert(fresh),
                    None => fresh,
                };
                next += u32::from(number == fresh);
                number
            })
            .collect()
    };
    (0..levels).map(level).collect()
}

fn find(union: &mut [u32], mut vm: u32) -> u32 {
    while union[vm as usize] != vm {
        union[vm as usize] = union[union[vm as usize] as usize];
        vm = union[vm as usize];
    }
    vm
}

fn join(union: &mut [u32], one: u32, other: u32) {
    let (one, other) = (find(union, one), find(union, other));
    union[one.max(other) as usize] = one.min(other);
}
