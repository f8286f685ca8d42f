//! Finite jobs. Each is a saga whose steps are idempotent: a killed run is cleaned up by the next one.

pub mod backup;
pub mod drain;
pub mod migrate;
pub mod move_disk;
pub mod restore;
