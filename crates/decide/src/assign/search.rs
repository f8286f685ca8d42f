//! The long search: cycles of annealing, each from the best that is known.
//!
//! It has no clock: a caller says how many steps there will be, and takes them. A seed and a number of steps give one
//! result, however fast the machine is.

use super::{
    Bounds, Problem, State,
    anneal::{self, Groups, Heat},
    climb,
    rng::Rng,
};

/// An assignment and its cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Best {
    /// By process: its machine.
    pub machines: Vec<u32>,
    /// Its cost.
    pub cost: i64,
}

/// Proposals in a step.
const STEP: u64 = 50_000;
/// The first cycle begins at so many times the middle of what moves cost; each later one at this part of the one before.
const START: f64 = 30.0;
const COOLER: f64 = 0.7;
/// All cool down to this part of what a process costs on average above the least that is possible.
const END: f64 = 0.1;
/// From this part of a cycle on it cools down much faster, to what `END` says times `FROZEN`.
const QUENCH: f64 = 0.93;
const FROZEN: f64 = 0.002;
/// What heat asks for each process that leaves home, in temperatures, where transient resources are held there.
const HOMESICK: f64 = 1.5;
/// Lengths of cycles in sixteenths of all steps: short ones find the scale, the long one the result.
const CYCLES: [u64; 4] = [1, 1, 2, 12];

/// A search, to be stepped.
pub struct Search<'p> {
    state: State<'p>,
    rng: Rng,
    best: Best,
    groups: Groups,
    /// What all machines cost at least.
    least: i64,
    /// What a move costs, about.
    scale: f64,
    /// What the best cost above `least` when the present cycle began.
    gap: f64,
    steps: u64,
    /// Steps taken in the present cycle.
    step: u64,
    /// Number of the present cycle.
    cycle: usize,
}

impl<'p> Search<'p> {
    /// Begins with the problem's initial assignment, and climbs. It will be stepped about `steps` times.
    pub fn new(problem: &'p Problem, seed: u64, steps: u64) -> Self {
        let mut state = State::new(problem, &problem.initial);
        let bounds =
            Bounds { looks: 2_000_000 + 100 * problem.processes() as u64, moves: usize::MAX, gain: 1, targets: 200 };
        climb(&mut state, bounds);
        let mut rng = Rng::new(seed);
        let scale = anneal::scale(&state, &mut rng);
        let best = Best { machines: state.machines().to_vec(), cost: state.cost() };
        let least = state.least();
        let gap = (best.cost - least) as f64;
        Self { state, rng, best, groups: Groups::new(problem), least, scale, gap, steps, step: 0, cycle: 0 }
    }

    /// The best so far.
    pub fn best(&self) -> &Best {
        &self.best
    }

    /// Goes on from another search's result if it is better.
    pub fn adopt(&mut self, other: &Best) {
        if other.cost < self.best.cost {
            self.best = other.clone();
            self.begin();
        }
    }

    /// Whether a cycle has just ended: the time to look at what others found.
    pub fn is_between_cycles(&self) -> bool {
        self.step == 0
    }

    fn begin(&mut self) {
        self.state = State::new(self.state.problem(), &self.best.machines);
        self.gap = (self.best.cost - self.least) as f64;
    }

    /// A bounded piece of work: a fraction of a second.
    pub fn step(&mut self) {
        let problem = self.state.problem();
        let length = (CYCLES[self.cycle.min(CYCLES.len() - 1)] * self.steps / 16).max(1);
        let start = self.scale * START * COOLER.powi(self.cycle.min(8) as i32);
        let end = (END * self.gap / problem.processes().max(1) as f64).clamp(0.15, start);
        let part = self.step as f64 / length as f64;
        let quench = FROZEN.powf(((part - QUENCH) / (1.0 - QUENCH)).max(0.0));
        let temperature = (start * (end / start).powf((part / QUENCH).min(1.0)) * quench).max(0.1);
        let homesick = if problem.transient.contains(&true) { HOMESICK } else { 0.0 };
        let mut cost = self.best.cost;
        let best = &mut self.best;
        let heat = Heat { temperature, homesick };
        anneal::anneal(&mut self.state, &mut self.rng, &self.groups, &heat, STEP, &mut cost, &mut |state| {
            best.cost = state.cost();
            best.machines.copy_from_slice(state.machines());
        });
        self.step += 1;
        if self.step >= length {
            self.step = 0;
            self.cycle += 1;
            self.begin();
        }
    }
}
