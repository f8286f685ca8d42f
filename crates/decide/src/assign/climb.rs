//! Improvements until there is none: from the most expensive machine on, the best shift of each process, then swaps.

use super::State;

/// How far a climb goes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Moves that are judged, at most.
    pub looks: u64,
    /// Moves that are made, at most; a swap is two.
    pub moves: usize,
    /// What a move must save at least; 1 for any saving.
    pub gain: i64,
    /// Targets that are judged for a process, at most: the cheapest machines.
    pub targets: usize,
}

/// Climbs; returns the moves that were made, in order, as processes.
pub fn climb(state: &mut State, bounds: Bounds) -> Vec<u32> {
    let mut climb = Climb { state, bounds, looks: 0, made: Vec::new(), targets: Vec::new() };
    loop {
        let before = climb.made.len();
        climb.round();
        if climb.made.len() == before || climb.is_over() {
            return climb.made;
        }
    }
}

struct Climb<'s, 'p> {
    state: &'s mut State<'p>,
    bounds: Bounds,
    looks: u64,
    made: Vec<u32>,
    targets: Vec<u32>,
}

impl Climb<'_, '_> {
    fn is_over(&self) -> bool {
        self.looks >= self.bounds.looks || self.made.len() >= self.bounds.moves
    }

    fn round(&mut self) {
        let machines = self.state.problem().machines();
        let mut order: Vec<u32> = (0..machines as u32).collect();
        order.sort_by_key(|&machine| (self.state.machine_cost(machine as usize), machine));
        self.targets = order.iter().copied().take(self.bounds.targets).collect();
        for &machine in order.iter().rev() {
            // Going home saves too, so that machines without a cost are looked at as well, with what has moved.
            let mut here = self.state.on(machine as usize).to_vec();
            here.sort_unstable();
            for &process in &here {
                if self.is_over() {
                    return;
                }
                self.best_shift(process as usize);
            }
            if self.state.machine_cost(machine as usize) > 0 {
                self.swaps(machine as usize);
            }
        }
    }

    fn best_shift(&mut self, process: usize) {
        let state = &self.state;
        let (from, first) = (state.at(process), state.problem().initial[process] as usize);
        if state.machine_cost(from) == 0 && from == first {
            return;
        }
        let targets = self.targets.iter().map(|&to| to as usize).chain((from != first).then_some(first));
        let mut best: Option<(i64, usize)> = None;
        for to in targets {
            self.looks += 1;
            if !state.can_shift(process, to) {
                continue;
            }
            let delta = state.shift_delta(process, to);
            if delta <= -self.bounds.gain && best.is_none_or(|best| (delta, to) < best) {
                best = Some((delta, to));
            }
        }
        if let Some((_, to)) = best {
            self.state.shift(process, to);
            self.made.push(process as u32);
        }
    }

    /// The first swap that saves, for each process of a machine that costs, with the cheapest machines.
    fn swaps(&mut self, machine: usize) {
        let mut here = self.state.on(machine).to_vec();
        here.sort_unstable();
        for &one in &here {
            let partners = self.targets.iter().take(SWAP_TARGETS).flat_map(|&to| self.state.on(to as usize));
            let mut found = None;
            for &other in partners {
                self.looks += 1;
                let (one, other) = (one as usize, other as usize);
                let saves = |state: &State| state.swap_delta(one, other) <= -self.bounds.gain.saturating_mul(2);
                if self.state.can_swap(one, other) && saves(self.state) {
                    found = Some(other);
                    break;
                }
            }
            if let Some(other) = found {
                self.state.swap(one as usize, other);
                self.made.extend([one, other as u32]);
            }
            if self.is_over() {
                return;
            }
        }
    }
}

const SWAP_TARGETS: usize = 24;
