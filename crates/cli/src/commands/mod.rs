//! One file per command: its arguments, its help, and what it does.

pub mod backup;
pub mod balance;
pub mod cluster;
pub mod completions;
pub mod ha;
pub mod hook;
pub mod host;
pub mod inventory;
pub mod job;
pub mod man;
pub mod notify;
pub mod policy;
pub mod repo;
pub mod restore;
pub mod serve;
pub mod state;
pub mod status;
pub mod storage;
pub mod thaw_guard;
pub mod token;
pub mod upgrade_plan;
pub mod vm;
pub mod world;
