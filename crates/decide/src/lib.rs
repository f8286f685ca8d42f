//! Pure decisions. Nothing here reads a clock, a file or a network; everything is a function of its arguments, so that
//! every decision can be tested, replayed and explained.

pub mod admission;
pub mod arbiter;
pub mod assign;
pub mod balance;
#[doc(hidden)]
pub mod fuzz;
pub mod ha;
pub mod health;
pub mod migration;
pub mod notify;
pub mod placement;
pub mod pointref;
pub mod policy;
pub mod readplan;
pub mod retention;
pub mod schedule;
pub mod tracking;
