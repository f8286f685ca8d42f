//! Evening out load: the world as a problem of [`crate::assign`], climbed.
//!
//! Costs are millionths of an average host. Demand above what a host has costs 100 each; demand above the comfortable
//! part costs 1, so that what is short is always mended first. A move costs what its migration takes from both hosts and
//! the gain that it must bring at least. Rules that hold now are kept, should rules too; what must not move stays.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use virtward_model::world::{HostState, Resource, World};

use super::{Amounts, NOWHERE, Occupancy, Space, Wants};
use crate::assign::{Bounds, Problem, State, climb};

/// Millionths that an average host has of everything.
const SCALE: i64 = 1_000_000;
/// Weight of demand that is not met, to demand above comfort.
const UNMET: i64 = 100;
/// Demand is in three resources, sizes and reservations in six.
const ROWS: usize = 6 + 3 + 3;

/// How load is evened out.
#[derive(Clone, Debug)]
pub struct Evening {
    /// Up to what part of a host, in percent, its guests are comfortable.
    pub comfort_percent: u64,
    /// What a move must save at least, in millionths of an average host, besides its own cost.
    pub gain: i64,
    /// Bytes a second that a migration can use.
    pub link: u64,
    /// For how long a load is taken to last, in seconds: a move pays off over it.
    pub horizon_s: u64,
    /// Moves at most.
    pub moves: usize,
    /// VMs that stay: overridden, or moved a short time ago.
    pub fixed: BTreeSet<Uuid>,
    /// Hosts that give nothing away, as their load may pass.
    pub waiting: BTreeSet<String>,
}

impl Default for Evening {
    fn default() -> Self {
        Self {
            comfort_percent: 85,
            gain: 5_000,
            link: 1_000_000_000,
            horizon_s: 3600,
            moves: 1_000,
            fixed: BTreeSet::new(),
            waiting: BTreeSet::new(),
        }
    }
}

/// What evening out comes to.
pub(crate) struct Evened {
    pub moves: Vec<(u32, u32)>,
    pub why_not: Option<String>,
}

/// What a migration of a VM costs, in seconds of a whole average host; `None` if its memory changes faster than it can
/// be sent.
pub fn migration_seconds(memory: u64, dirty_rate: u64, link: u64) -> Option<f64> {
    let (link, dirty) = (link as f64, dirty_rate as f64);
    // Pre-copy sends memory, then what was dirtied meanwhile, and so on: a geometric series.
    (dirty < 0.9 * link).then(|| memory as f64 / (link - dirty))
}

/// Finds moves that even out load, from where things will be when what must move has moved.
pub(crate) fn even(world: &World, start: &Occupancy, target: &Occupancy, evening: &Evening) -> Evened {
    let strict = strict(world, target);
    let space = Space::new(&strict, false);
    let translation = translate(&space, start, target, evening);
    let mut state = State::new(&translation.problem, &translation.at);
    let before = state.cost();
    let hosts = world.hosts.len();
    let bounds = Bounds {
        looks: 4_000_000,
        moves: evening.moves,
        gain: 1,
        // Enough of the emptiest to choose from; all of a small cluster.
        targets: if hosts <= 256 { hosts } else { 96 },
    };
    let made = climb(&mut state, bounds);
    let mut moves = Vec::new();
    let mut seen = BTreeSet::new();
    for &process in &made {
        let to = state.at(process as usize) as u32;
        for &vm in translation.vms[process as usize].iter().filter(|&&vm| target.at[vm as usize] != to) {
            if seen.insert(vm) {
                moves.push((vm, to));
            }
        }
    }
    let why_not = moves.is_empty().then(|| match before {
        0 => format!("no host is loaded above {} %", evening.comfort_percent),
        _ => "no move would save more than it costs, or rules, room and holding off forbid it".to_owned(),
    });
    Evened { moves, why_not }
}

/// The world with every should rule that holds made a must.
fn strict(world: &World, target: &Occupancy) -> World {
    let mut strict = world.clone();
    let space = Space::new(world, false);
    for (at, rule) in world.rules.iter().enumerate().filter(|(_, rule)| !rule.must) {
        let holds = rule.vms.iter().filter_map(|&id| space.vm(id)).all(|vm| {
            let host = target.at[vm as usize];
            host == NOWHERE || space.keeps(at, vm, host, &target.at)
        });
        strict.rules[at].must = holds;
    }
    strict
}

struct Translation {
    problem: Problem,
    at: Vec<u32>,
    /// By process: its VMs.
    vms: Vec<Vec<u32>>,
}

/// Amounts in millionths of an average host; needs are rounded up, capacities down, so that what fits there fits here.
struct Scale {
    sizes: Amounts,
    wants: Wants,
}

impl Scale {
    fn new(space: &Space) -> Self {
        let average = |values: &mut dyn Iterator<Item = u64>| {
            let known: Vec<u64> = values.filter(|&value| value != u64::MAX).collect();
            (known.iter().map(|&value| u128::from(value)).sum::<u128>() / known.len().max(1) as u128).max(1) as u64
        };
        Self {
            sizes: std::array::from_fn(|d| average(&mut space.room.iter().map(|room| room[d]))),
            wants: std::array::from_fn(|r| average(&mut space.supply.iter().map(|supply| supply[r]))),
        }
    }
}

fn up(amount: u64, average: u64) -> i64 {
    (u128::from(amount) * SCALE as u128).div_ceil(u128::from(average)).min(1 << 40) as i64
}

fn down(amount: u64, average: u64) -> i64 {
    (u128::from(amount) * SCALE as u128 / u128::from(average)).min(1 << 43) as i64
}

fn translate(space: &Space, start: &Occupancy, target: &Occupancy, evening: &Evening) -> Translation {
    let world = space.world;
    let scale = Scale::new(space);
    let mut problem = Problem { resources: ROWS, move_weight: 1, ..Problem::default() };
    problem.transient = (0..ROWS).map(|row| row < 6).collect();
    problem.load_weight = (0..ROWS).map(|row| [0, UNMET, 1][usize::from(row >= 6) + usize::from(row >= 9)]).collect();
    for host in 0..world.hosts.len() {
        let supply: [i64; 3] = std::array::from_fn(|r| down(space.supply[host][r], scale.wants[r]));
        problem.capacity.extend((0..6).map(|d| down(space.room[host][d], scale.sizes[d])));
        problem.capacity.extend([1i64 << 43; 6]);
        problem.soft.extend([1i64 << 43; 6]);
        problem.soft.extend(supply);
        problem.soft.extend(supply.map(|supply| supply / 100 * evening.comfort_percent as i64));
        problem.location.push(0);
        problem.neighbourhood.push(0);
    }
    let mut translation = Translation { problem, at: Vec::new(), vms: Vec::new() };
    let mut classes: BTreeMap<(u32, Option<u32>), u32> = BTreeMap::new();
    let mut process_of = vec![u32::MAX; world.vms.len()];
    for unit in &space.units {
        let mut placed: Vec<u32> = unit.iter().copied().filter(|&vm| target.at[vm as usize] != NOWHERE).collect();
        placed.sort_by_key(|&vm| target.at[vm as usize]);
        for mates in placed.chunk_by(|&one, &other| target.at[one as usize] == target.at[other as usize]) {
            let whole = mates.len() == placed.len();
            mates.iter().for_each(|&vm| process_of[vm as usize] = translation.at.len() as u32);
            push_process(space, start, target, evening, &scale, mates, whole, &mut classes, &mut translation);
        }
    }
    apart(space, &process_of, &mut translation);
    translation
}

#[expect(clippy::too_many_arguments, reason = "the parts of one loop's body")]
fn push_process(
    space: &Space,
    start: &Occupancy,
    target: &Occupancy,
    evening: &Evening,
    scale: &Scale,
    mates: &[u32],
    whole: bool,
    classes: &mut BTreeMap<(u32, Option<u32>), u32>,
    translation: &mut Translation,
) {
    let world = space.world;
    let problem = &mut translation.problem;
    let mut need = [0i64; ROWS];
    let (mut cost, mut fixed) = (0i64, !whole);
    for &vm in mates {
        let facts = &world.vms[vm as usize];
        let sizes = space.need[vm as usize].iter().zip(&scale.sizes).map(|(&need, &average)| up(need, average));
        let wants: Vec<i64> =
            space.want[vm as usize].iter().zip(&scale.wants).map(|(&want, &average)| up(want, average)).collect();
        let row = sizes.chain(wants.iter().copied()).chain(wants.iter().copied());
        need.iter_mut().zip(row).for_each(|(to, more)| *to += more);
        let seconds = migration_seconds(facts.size.memory.0, facts.dirty_rate, evening.link);
        fixed |= facts.stuck.is_some() || seconds.is_none() || evening.fixed.contains(&facts.id);
        fixed |= start.at[vm as usize] != target.at[vm as usize];
        // Both hosts give about a tenth of themselves while it lasts.
        cost += (seconds.unwrap_or(0.0) * 0.2 * SCALE as f64 / evening.horizon_s.max(1) as f64) as i64;
    }
    let host = target.at[mates[0] as usize];
    let facts = &world.hosts[host as usize];
    fixed |= facts.state != HostState::Up || evening.waiting.contains(&facts.name.0);
    // Several of a unit may differ in what they may use: then they stay.
    let class = space.class[mates[0] as usize];
    fixed |= mates.iter().any(|&vm| space.class[vm as usize] != class);
    let row = *classes.entry((class, fixed.then_some(host))).or_insert_with(|| {
        let may = (0..world.hosts.len()).map(|to| match fixed {
            true => to == host as usize,
            false => {
                let facts = &world.hosts[to];
                space.allowed[class as usize][to] && facts.state.takes_vms() && !facts.spare
            }
        });
        problem.allowed.push(may.collect());
        problem.allowed.len() as u32 - 1
    });
    problem.class.push(row);
    problem.need.extend(need);
    problem.move_cost.push(cost + evening.gain);
    problem.service.push(translation.at.len() as u32);
    problem.spread.push(0);
    problem.depends.push(Vec::new());
    problem.initial.push(host);
    problem.rivals.push(Vec::new());
    problem.zone_rivals.push(Vec::new());
    translation.at.push(host);
    translation.vms.push(mates.to_vec());
}

fn apart(space: &Space, process_of: &[u32], translation: &mut Translation) {
    let problem = &mut translation.problem;
    let levels = space.apart.iter().filter_map(|group| group.level).max().map_or(0, |most| most + 1);
    let hosts = space.world.hosts.len() as u32;
    problem.zone = (0..levels).map(|level| (0..hosts).map(|host| space.slot(Some(level), host)).collect()).collect();
    for group in &space.apart {
        let members: Vec<u32> =
            group.members.iter().map(|&vm| process_of[vm as usize]).filter(|&process| process != u32::MAX).collect();
        for &one in &members {
            for &other in members.iter().filter(|&&other| other != one) {
                match group.level {
                    None => problem.rivals[one as usize].push(other),
                    Some(level) => problem.zone_rivals[one as usize].push((other, level as u32)),
                }
            }
        }
    }
}

/// The cost of an occupancy: demand not met and discomfort.
pub(crate) fn cost(world: &World, occupancy: &Occupancy, evening: &Evening) -> u64 {
    let space = Space::new(world, false);
    let scale = Scale::new(&space);
    let mut cost = 0i64;
    for host in 0..world.hosts.len() {
        for r in 0..3 {
            let wanted = up(occupancy.wanted[host][r], scale.wants[r]);
            let supply = down(space.supply[host][r], scale.wants[r]);
            let comfort = supply / 100 * evening.comfort_percent as i64;
            cost = cost.saturating_add(UNMET * (wanted - supply).max(0)).saturating_add((wanted - comfort).max(0));
        }
    }
    cost.max(0) as u64
}

/// How full a host is of a resource, in percent of what it has.
pub(crate) fn percent(space: &Space, occupancy: &Occupancy, host: u32, resource: Resource) -> u64 {
    let r = match resource {
        Resource::DiskIo => 1,
        Resource::Network => 2,
        _ => 0,
    };
    match space.supply[host as usize][r] {
        u64::MAX => 0,
        supply => (u128::from(occupancy.wanted[host as usize][r]) * 100 / u128::from(supply.max(1))) as u64,
    }
}

/// The resource that a host is most loaded in.
pub(crate) fn hottest(space: &Space, occupancy: &Occupancy, host: u32) -> Resource {
    let all = [Resource::Cpu, Resource::DiskIo, Resource::Network];
    all.into_iter().rev().max_by_key(|&r| percent(space, occupancy, host, r)).unwrap_or(Resource::Cpu)
}
