//! Simulated annealing over shifts and swaps.

use super::{State, rng::Rng};

/// Proposes `proposals` random moves, and takes those that save or that the temperature allows. `note` is told of every
/// cost below `best`.
pub(super) fn anneal(
    state: &mut State,
    rng: &mut Rng,
    temperature: f64,
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
        // A home that was left is a target of its own: with many machines chance would hardly ever find it.
        let first = problem.initial[process] as usize;
        if rng.next() & 1 == 0 {
            let to = if rng.next() & 15 == 0 { first } else { rng.below(machines) };
            if !state.can_shift(process, to) || !accept(state.shift_delta(process, to), temperature, rng) {
                continue;
            }
            state.shift(process, to);
        } else {
            let other = rng.below(processes);
            if !state.can_swap(process, other) || !accept(state.swap_delta(process, other), temperature, rng) {
                continue;
            }
            state.swap(process, other);
        }
        if state.cost() < *best {
            *best = state.cost();
            note(state);
        }
    }
}

fn accept(delta: i64, temperature: f64, rng: &mut Rng) -> bool {
    delta <= 0 || (delta as f64) < -temperature * rng.unit().ln()
}

/// What moves cost from here: the tenth and the thousandth part of random feasible ones, cheapest first.
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
    (part(10), part(1000))
}
