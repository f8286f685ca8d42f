//! Simulated annealing among feasible assignments.
//!
//! Besides shifts and swaps at random there are those that chance would hardly ever find: going home, changing places within
//! a service, which leaves its spread and its dependencies as they are, and one large process for several small ones.

use super::{Problem, State, rng::Rng};

/// How hot it is, and what heat asks for each process that leaves home, in temperatures.
pub(super) struct Heat {
    pub temperature: f64,
    pub homesick: f64,
}

/// Who and what belongs together.
pub(super) struct Groups {
    service: Vec<Vec<u32>>,
    location: Vec<Vec<u32>>,
    neighbourhood: Vec<Vec<u32>>,
}

impl Groups {
    pub fn new(problem: &Problem) -> Self {
        let by = |of: &[u32]| {
            let mut groups = vec![Vec::new(); of.iter().max().map_or(0, |&most| most as usize + 1)];
            of.iter().enumerate().for_each(|(at, &group)| groups[group as usize].push(at as u32));
            groups
        };
        Self {
            service: by(&problem.service),
            location: by(&problem.location),
            neighbourhood: by(&problem.neighbourhood),
        }
    }

    /// A machine at random, often one that is close.
    fn machine(&self, problem: &Problem, from: usize, rng: &mut Rng) -> usize {
        let group = match rng.next() & 15 {
            0..6 => return rng.below(problem.machines()),
            6..11 => &self.location[problem.location[from] as usize],
            _ => &self.neighbourhood[problem.neighbourhood[from] as usize],
        };
        group[rng.below(group.len())] as usize
    }
}

/// Proposes `proposals` random moves, and takes those that save or that the heat allows. `note` is told of every cost
/// below `best`.
pub(super) fn anneal(
    state: &mut State,
    rng: &mut Rng,
    groups: &Groups,
    heat: &Heat,
    proposals: u64,
    best: &mut i64,
    note: &mut dyn FnMut(&State),
) {
    let problem = state.problem();
    let (processes, machines) = (problem.processes(), problem.machines());
    if processes == 0 || machines < 2 {
        return;
    }
    for _ in 0..proposals {
        let process = rng.below(processes);
        let from = state.at(process);
        let moved = match rng.next() & 1023 {
            0..4 => {
                let to = groups.machine(problem, from, rng);
                to != from && rearrange(state, rng, heat, process, to)
            }
            4..64 => shift(state, rng, heat, process, problem.initial[process] as usize),
            64..384 => {
                let to = groups.machine(problem, from, rng);
                shift(state, rng, heat, process, to)
            }
            384..640 => {
                let mates = &groups.service[problem.service[process] as usize];
                let other = mates[rng.below(mates.len())] as usize;
                exchange(state, rng, heat, process, other)
            }
            _ => {
                let there = state.on(groups.machine(problem, from, rng));
                !there.is_empty() && {
                    let other = there[rng.below(there.len())] as usize;
                    exchange(state, rng, heat, process, other)
                }
            }
        };
        if moved && state.cost() < *best {
            *best = state.cost();
            note(state);
        }
    }
}

fn shift(state: &mut State, rng: &mut Rng, heat: &Heat, process: usize, to: usize) -> bool {
    if !state.can_shift(process, to) {
        return false;
    }
    let moves = accept(state.shift_delta(process, to), away(state, process, to), heat, rng);
    if moves {
        state.shift(process, to);
    }
    moves
}

/// Exchanges two processes.
fn exchange(state: &mut State, rng: &mut Rng, heat: &Heat, process: usize, other: usize) -> bool {
    if !state.can_swap(process, other) {
        return false;
    }
    let away = away(state, process, state.at(other)) + away(state, other, state.at(process));
    let moves = accept(state.swap_delta(process, other), away, heat, rng);
    if moves {
        state.swap(process, other);
    }
    moves
}

/// Exchanges a process for as many of the target's as it takes for it to fit there, and for as long as that saves.
fn rearrange(state: &mut State, rng: &mut Rng, heat: &Heat, process: usize, to: usize) -> bool {
    let (from, before) = (state.at(process), state.cost());
    if !state.rules_allow(process, to, None) {
        return false;
    }
    state.shift(process, to);
    let mut away_by = away(state, process, to) - away(state, process, from);
    let mut others: Vec<u32> = state.on(to).iter().copied().filter(|&other| other as usize != process).collect();
    let mut gone = vec![process as u32];
    while !others.is_empty() {
        let other = others.swap_remove(rng.below(others.len())) as usize;
        if state.can_shift(other, from) && (!state.fits(to) || state.shift_delta(other, from) < 0) {
            away_by += away(state, other, from);
            state.shift(other, from);
            gone.push(other as u32);
        }
    }
    let moves = state.fits(to) && state.fits(from) && accept(state.cost() - before, away_by, heat, rng);
    if !moves {
        gone.iter().skip(1).for_each(|&other| state.shift(other as usize, to));
        state.shift(process, from);
    }
    moves
}

/// How many more processes are not at home after a move: 1, 0 or -1.
fn away(state: &State, process: usize, to: usize) -> i32 {
    let first = state.problem().initial[process] as usize;
    i32::from(to != first) - i32::from(state.at(process) != first)
}

/// There is one home and are many other places, so chance alone would scatter all processes, and those that left hold
/// capacity where it is transient. The heat asks for something for each that leaves.
fn accept(delta: i64, away: i32, heat: &Heat, rng: &mut Rng) -> bool {
    let heats = delta as f64 / heat.temperature + heat.homesick * f64::from(away);
    heats <= 0.0 || heats < 40.0 && heats < -rng.unit().ln()
}

/// What moves cost from here: the middle of random feasible ones.
pub(super) fn scale(state: &State, rng: &mut Rng) -> f64 {
    let problem = state.problem();
    let (processes, machines) = (problem.processes(), problem.machines());
    let mut deltas = Vec::new();
    if processes > 0 && machines > 1 {
        for _ in 0..40_000 {
            let (process, to) = (rng.below(processes), rng.below(machines));
            if state.can_shift(process, to) {
                deltas.push(state.shift_delta(process, to));
            }
            let other = rng.below(processes);
            if state.can_swap(process, other) {
                deltas.push(state.swap_delta(process, other));
            }
        }
    }
    deltas.retain(|&delta| delta > 0);
    deltas.sort_unstable();
    deltas.get(deltas.len() / 2).map_or(1.0, |&delta| delta as f64)
}
