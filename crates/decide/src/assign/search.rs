//! The long search: cycles of annealing, each twice as long as the one before, from the best that is known.
//!
//! It has no clock: a caller steps it for as long as there is time. The n-th step does the same whenever it is taken, so
//! a seed and a number of steps give one result.

use super::{Bounds, Problem, State, anneal, climb, rng::Rng};

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
/// The first cycle begins at so many times the middle of what moves cost.
const START: f64 = 10.0;
/// Each later one, up to so many, begins at this part of the one before.
const COOLER: f64 = 0.7;
const COOLER_CYCLES: u32 = 6;
/// All end at this part of the thousandth part of what moves cost.
const END: f64 = 0.05;
/// Steps in the first cycle.
const FIRST_CYCLE: u64 = 64;

/// A search, to be stepped.
pub struct Search<'p> {
    state: State<'p>,
    rng: Rng,
    best: Best,
    scale: (f64, f64),
    /// Of each unit beyond capacity, to its weight.
    price: f64,
    /// Steps taken in the present cycle, and how many it has.
    step: u64,
    cycle: u64,
    number: u32,
}

impl<'p> Search<'p> {
    /// Begins with the problem's initial assignment, and climbs.
    pub fn new(problem: &'p Problem, seed: u64) -> Self {
        let mut state = State::new(problem, &problem.initial);
        let bounds =
            Bounds { looks: 2_000_000 + 100 * problem.processes() as u64, moves: usize::MAX, gain: 1, targets: 200 };
        climb(&mut state, bounds);
        let mut rng = Rng::new(seed);
        let scale = anneal::scale(&state, &mut rng);
        let best = Best { machines: state.machines().to_vec(), cost: state.cost() };
        Self { state, rng, best, scale, price: 1.0, step: 0, cycle: FIRST_CYCLE, number: 0 }
    }

    /// The best so far.
    pub fn best(&self) -> &Best {
        &self.best
    }

    /// Goes on from another search's result if it is better.
    pub fn adopt(&mut self, other: &Best) {
        if other.cost < self.best.cost {
            self.best = other.clone();
            self.state = State::new(self.state.problem(), &other.machines);
        }
    }

    /// Whether a cycle has just ended: the time to look at what others found.
    pub fn is_between_cycles(&self) -> bool {
        self.step == 0
    }

    /// A bounded piece of work: a fraction of a second.
    pub fn step(&mut self) {
        let (high, low) = self.scale;
        // Later cycles start cooler: they begin with something good.
        let start = high * START * COOLER.powi(self.number.min(COOLER_CYCLES) as i32);
        let end = low * END;
        let part = self.step as f64 / self.cycle as f64;
        let temperature = start * (end / start).powf(part);
        let mut cost = self.best.cost;
        let best = &mut self.best;
        let heat = anneal::Heat { temperature, price: self.price };
        let feasible = anneal::anneal(&mut self.state, &mut self.rng, &heat, STEP, &mut cost, &mut |state| {
            best.cost = state.cost();
            best.machines.copy_from_slice(state.machines());
        });
        match feasible {
            ..0.2 => self.price = (self.price * 1.2).min(1e6),
            0.5.. => self.price = (self.price / 1.1).max(0.1),
            _ => {}
        }
        self.step += 1;
        if self.step == self.cycle {
            self.state = State::new(self.state.problem(), &self.best.machines);
            self.step = 0;
            self.cycle *= 2;
            self.number += 1;
        }
    }
}
