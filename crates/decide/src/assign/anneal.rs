//! Simulated annealing over shifts and swaps.
//!
//! Capacity may be exceeded on the way, at a price that rises until most assignments on the way are feasible: where hosts
//! are nearly full, feasible assignments alone hardly hang together.

use super::{State, rng::Rng};

/// How hot it is, and what exceeding capacity costs.
pub(super) struct Heat {
    pub temperature: f64,
    pub price: f64,
}

/// Proposes `proposals` random moves, and takes those that save or that the heat allows; returns the share of those taken
/// after which everything fits. `note` is told of every feasible cost below `best`.
pub(super) fn anneal(
    state: &mut State,
    rng: &mut Rng,
    heat: &Heat,
    proposals: u64,
    best: &mut i64,
    note: &mut dyn FnMut(&State),
) -> f64 {
    let problem = state.problem();
    let (processes, machines) = (problem.processes(), problem.machines());
    if processes == 0 || machines < 2 {
        return 1.0;
    }
    let (mut taken, mut feasible) = (0u64, 0u64);
    for _ in 0..proposals {
        let process = rng.below(processes);
        let kind = rng.next() & 15;
        // A home that was left is a target of its own: with many machines chance would hardly ever find it.
        let to = if kind == 0 { problem.initial[process] as usize } else { rng.below(machines) };
        if to == state.at(process) {
            continue;
        }
        let moved =
            if kind < 8 { shift(state, rng, heat, process, to) } else { exchange(state, rng, heat, process, to) };
        if !moved {
            continue;
        }
        taken += 1;
        if state.excess() == 0 {
            feasible += 1;
            if state.cost() < *best {
                *best = state.cost();
                note(state);
            }
        }
    }
    feasible as f64 / taken.max(1) as f64
}

fn shift(state: &mut State, rng: &mut Rng, heat: &Heat, process: usize, to: usize) -> bool {
    if !state.rules_allow(process, to, None) {
        return false;
    }
    let delta = state.shift_delta(process, to) as f64 + heat.price * state.shift_excess(process, to) as f64;
    let moves = accept(delta, away(state, process, to), heat.temperature, rng);
    if moves {
        state.shift(process, to);
    }
    moves
}

/// Exchanges the process with one of the target's.
fn exchange(state: &mut State, rng: &mut Rng, heat: &Heat, process: usize, to: usize) -> bool {
    let there = state.on(to).len();
    if there == 0 {
        return false;
    }
    let other = state.on(to)[rng.below(there)] as usize;
    if !state.rules_allow_swap(process, other) {
        return false;
    }
    let away = away(state, process, to) + away(state, other, state.at(process));
    let delta = state.swap_delta(process, other) as f64 + heat.price * state.swap_excess(process, other) as f64;
    let moves = accept(delta, away, heat.temperature, rng);
    if moves {
        state.swap(process, other);
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
fn accept(delta: f64, away: i32, temperature: f64, rng: &mut Rng) -> bool {
    let delta = delta + temperature * HOMESICK * f64::from(away);
    delta <= 0.0 || delta < -temperature * rng.unit().ln()
}

/// What the heat asks for each process that leaves home, in temperatures.
const HOMESICK: f64 = 5.0;

/// What moves cost from here: the middle and the thousandth part of random feasible ones, cheapest first.
pub(super) fn scale(state: &State, rng: &mut Rng) -> (f64, f64) {
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
    let part = |share: usize| deltas.get(deltas.len() / share).map_or(1.0, |&delta| delta as f64);
    (part(2), part(1000))
}
