//! Balancing by rounds: when load is evened out, how eagerly, and when it is left alone.
//!
//! A round looks at the world, and at what earlier rounds remember. A host gives VMs away only if it was loaded for
//! several rounds; a VM that was moved rests; a plan that saves little is not made. So a peak that passes moves nothing,
//! and two rounds never undo each other. What *must* move (hosts that are to be empty, broken must rules) does not wait.

mod forecast;
mod load;
mod upgrade;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_model::world::{HostName, Mode, World};

pub use forecast::{HOURS, Weekly};
pub use load::{HostLoad, after, loads, part};
pub use upgrade::{Service, UpgradePlan, upgrade};

use crate::placement::{Evening, Goal, Plan, PlanReport, Reason, Space, hottest, percent, plan};

/// How eagerly load is evened out: 1 moves only what must move, 5 for small gains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Eagerness(u8);

impl Eagerness {
    /// From 1 to 5.
    pub fn new(level: u8) -> Option<Self> {
        (1..=5).contains(&level).then_some(Self(level))
    }
    /// From 1 to 5.
    pub fn level(self) -> u8 {
        self.0
    }
}

impl Default for Eagerness {
    fn default() -> Self {
        Self(3)
    }
}

impl TryFrom<u8> for Eagerness {
    type Error = String;
    fn try_from(level: u8) -> Result<Self, String> {
        Self::new(level).ok_or_else(|| format!("eagerness {level} is not one of 1 to 5"))
    }
}

impl From<Eagerness> for u8 {
    fn from(eagerness: Eagerness) -> u8 {
        eagerness.0
    }
}

/// What an eagerness means.
struct Level {
    comfort_percent: u64,
    gain: i64,
    hold: u32,
    min_gain_percent: u64,
}

/// For levels 2 to 5: comfort in percent of a host, least gain of a move in millionths of a host, rounds that a load must
/// have lasted, least part of all unmet demand and discomfort that a plan must remove.
const LEVELS: [Level; 4] = [
    Level { comfort_percent: 100, gain: 20_000, hold: 6, min_gain_percent: 20 },
    Level { comfort_percent: 90, gain: 10_000, hold: 3, min_gain_percent: 10 },
    Level { comfort_percent: 80, gain: 5_000, hold: 2, min_gain_percent: 5 },
    Level { comfort_percent: 70, gain: 2_000, hold: 1, min_gain_percent: 3 },
];

/// How balancing is to behave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Off, recommend, automatic; a VM's own mode goes before it.
    pub mode: Mode,
    /// From 1 to 5.
    pub eagerness: Eagerness,
    /// Rounds for which a host must have been loaded; `None`: as the eagerness says.
    pub hold: Option<u32>,
    /// Least part, in percent, of unmet demand and discomfort that a plan must remove; `None`: as the eagerness says.
    pub min_gain_percent: Option<u64>,
    /// Rounds for which a VM rests after a move for load.
    pub rest: u32,
    /// Bytes a second that a migration can use.
    pub link: u64,
    /// Moves for load in one round, at most.
    pub moves: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: Mode::Recommend,
            eagerness: Eagerness::default(),
            hold: None,
            min_gain_percent: None,
            rest: 12,
            link: 1_000_000_000,
            moves: 500,
        }
    }
}

/// What rounds remember.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// How many there were.
    pub round: u64,
    /// For how many rounds on end a host has been loaded.
    pub loaded: BTreeMap<HostName, u32>,
    /// In which round a VM was last moved for load.
    pub moved: BTreeMap<Uuid, u64>,
}

/// What a round says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The plan's own report.
    pub plan: PlanReport,
    /// Hosts that are loaded, in percent of their fullest resource, and for how many rounds.
    pub loaded: Vec<Loaded>,
    /// Steps of the plan, by index, that are carried out by themselves; the others are recommended.
    pub automatic: Vec<usize>,
    /// Why nothing moves, if nothing does.
    pub nothing: Option<String>,
}

/// A host above comfort.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Which.
    pub host: HostName,
    /// Its fullest resource, in percent of what it has.
    pub percent: u64,
    /// For how many rounds.
    pub rounds: u32,
    /// From how many on it gives VMs away.
    pub hold: u32,
}

/// One round. The memory is that of the round before, and is returned as it is to be given to the next one; if the plan
/// is not carried out, [`Memory::forget_moves`] says so.
pub fn round(world: &World, policy: &Policy, memory: &Memory) -> (Plan, Report, Memory) {
    let mut memory = memory.clone();
    memory.round += 1;
    let mut report = Report::default();
    let only_own_modes = policy.mode == Mode::Off;
    if only_own_modes && !world.vms.iter().any(|vm| vm.mode.is_some_and(|mode| mode != Mode::Off)) {
        report.nothing = Some("balancing is off".into());
        return (Plan::default(), report, memory);
    }
    let level = (policy.eagerness.level() >= 2).then(|| &LEVELS[usize::from(policy.eagerness.level()) - 2]);
    let evening = level.map(|level| evening(world, policy, level, &mut memory, &mut report));
    let fixed_load = evening.is_none();
    let goal = Goal { load: evening, wishes: !fixed_load, ..Goal::default() };
    let (mut steps, mut told) = plan(world, &goal);
    let least = policy.min_gain_percent.or(level.map(|level| level.min_gain_percent)).unwrap_or(0);
    if steps.steps.iter().any(|step| is_for_load(&step.why)) && gain_percent(&told) < least {
        let saved = gain_percent(&told);
        (steps, told) = plan(world, &Goal { load: None, ..goal });
        told.no_load_moves = Some(format!(
            "the best plan found would remove {saved} % of unmet demand and discomfort, {least} % is the least that is worth moving for"
        ));
    }
    for step in steps.steps.iter().filter(|step| is_for_load(&step.why)) {
        memory.moved.insert(step.vm, memory.round);
    }
    report.automatic = automatic(world, policy, &steps);
    if steps.steps.is_empty() {
        report.nothing = Some(match (&told.no_load_moves, told.set_aside.len()) {
            (_, aside @ 1..) => format!("{aside} VMs should move and cannot; see why for each"),
            (Some(why), 0) => why.clone(),
            (None, 0) => "nothing must move, and eagerness 1 does nothing else".into(),
        });
    }
    report.plan = told;
    (steps, report, memory)
}

impl Memory {
    /// Takes back that VMs were moved in the last round, as they were not.
    pub fn forget_moves(&mut self, vms: &[Uuid]) {
        self.moved.retain(|vm, round| *round != self.round || !vms.contains(vm));
    }
}

fn is_for_load(reason: &Reason) -> bool {
    matches!(reason, Reason::Load { .. })
}

fn gain_percent(report: &PlanReport) -> u64 {
    (report.cost_before.saturating_sub(report.cost_after)) * 100 / report.cost_before.max(1)
}

/// Counts for how long hosts have been loaded, and says who may move.
fn evening(world: &World, policy: &Policy, level: &Level, memory: &mut Memory, report: &mut Report) -> Evening {
    let space = Space::new(world, false);
    let occupancy = space.occupancy();
    let hold = policy.hold.unwrap_or(level.hold);
    let mut loaded = BTreeMap::new();
    let mut waiting = BTreeSet::new();
    for (at, host) in world.hosts.iter().enumerate().filter(|(_, host)| host.state.takes_vms()) {
        let full = percent(&space, &occupancy, at as u32, hottest(&space, &occupancy, at as u32));
        if full <= level.comfort_percent {
            continue;
        }
        let rounds = memory.loaded.get(&host.name).copied().unwrap_or(0) + 1;
        // Demand that is not met hurts now; it waits half as long.
        let hold = if full > 100 { hold.div_ceil(2) } else { hold };
        if rounds < hold {
            waiting.insert(host.name.0.clone());
        }
        loaded.insert(host.name.clone(), rounds);
        report.loaded.push(Loaded { host: host.name.clone(), percent: full, rounds, hold });
    }
    memory.loaded = loaded;
    let rest = u64::from(policy.rest);
    memory.moved.retain(|_, round| *round + rest > memory.round);
    let off = world.vms.iter().filter(|vm| vm.mode.unwrap_or(policy.mode) == Mode::Off).map(|vm| vm.id);
    Evening {
        comfort_percent: level.comfort_percent,
        gain: level.gain,
        link: policy.link,
        moves: policy.moves,
        fixed: off.chain(memory.moved.keys().copied()).collect(),
        waiting,
        ..Evening::default()
    }
}

/// Steps of VMs that are moved by themselves, as far as nothing that they wait for is only recommended.
fn automatic(world: &World, policy: &Policy, plan: &Plan) -> Vec<usize> {
    let modes: BTreeMap<Uuid, Mode> = world.vms.iter().filter_map(|vm| vm.mode.map(|mode| (vm.id, mode))).collect();
    let mut chosen: BTreeSet<usize> = BTreeSet::new();
    // Steps are in an order in which they could be done one by one.
    for (at, step) in plan.steps.iter().enumerate() {
        let mode = modes.get(&step.vm).copied().unwrap_or(policy.mode);
        if mode == Mode::Automatic && step.after.iter().all(|before| chosen.contains(before)) {
            chosen.insert(at);
        }
    }
    chosen.into_iter().collect()
}

#[cfg(test)]
mod tests;
