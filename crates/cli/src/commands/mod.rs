//! One file per command: its arguments, its help, and what it does.

pub mod backup;
pub mod completions;
pub mod man;
pub mod repo;
pub mod restore;
pub mod thaw_guard;
pub mod vm;
