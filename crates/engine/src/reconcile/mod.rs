//! Endless loops that keep something in step with the world. Signals only wake them: what they do follows from what they
//! find when they look.

pub mod guests;
pub mod inventory;
