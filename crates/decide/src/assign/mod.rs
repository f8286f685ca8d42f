//! Assigning processes to machines at least cost: the search under the planner, free of anything that is a VM.
//!
//! A [`Problem`] has machines with capacities that hold and soft capacities that cost, processes that need and that
//! cost to move, services of processes that keep apart and spread, and an assignment to begin with. That is machine
//! reassignment as ROADEF/EURO posed it in 2012 ([`roadef`] reads its files), and what balancing VMs needs: the planner
//! translates a world into a `Problem`, so what is measured against published results is what moves VMs.
//!
//! - [`State`] knows who is where and answers "may this move, and what would it save" in the time of a few resources.
//! - [`climb`] takes improvements until there is none: milliseconds, for thousands of machines.
//! - [`Search`] goes on from there for a number of steps that is planned beforehand. It has no clock and takes its seed as an
//!   argument, so that number always gives the same result.
//! - [`check()`] recomputes feasibility and cost from nothing but the problem.

mod anneal;
mod check;
mod climb;
mod load;
mod problem;
mod rng;
pub mod roadef;
mod search;
mod state;

pub use check::{Broken, check};
pub use climb::{Bounds, climb};
pub use problem::{Balance, Malformed, Problem};
pub use search::{Best, Search};
pub use state::State;
