//! Several daemons over one state: who they are, which are there, who leads, and what each has.
//!
//! ```text
//! own inventory ─► publish ─► state store ─► follow ─► tables ─► fleet: every host, every VM once
//! presence (leased) ─► who is there        election ─► who plans
//! claims ─► one operation per VM, on whatever host
//! ```
//!
//! On one host the same code runs over the embedded store: nothing is published, nobody is elected, and the fleet is the
//! one host's. Not here: how daemons talk to each other (`peers`), what is decided (decide).

pub mod claims;
pub mod fleet;
pub mod follow;
pub mod leader;
pub mod nodes;
pub mod oversight;
pub mod publish;
