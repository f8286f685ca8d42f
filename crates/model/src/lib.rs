//! The nouns that every other crate speaks: units, virtual machines and their disks, restore points, policies,
//! the world that placements decide on.
//!
//! Plain data with parsing, formatting and serialisation. No I/O, no clock, no decisions.

pub mod age;
pub mod machine;
pub mod point;
pub mod policy;
pub mod retention;
pub mod select;
pub mod time;
pub mod units;
pub mod vm;
pub mod world;
pub mod xml;

pub use age::{Age, ParseAgeError};
pub use machine::{CpuAsk, CpuFit, DiskUse, Fit, HostOffer, Link, Machine, Nic, Pool, Tie, TieKind, Volume};
pub use point::{
    BackupKind, CopiedFrom, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint,
    SourceKind, TrackingRecord, TrackingState,
};
pub use policy::Policy;
pub use retention::Retention;
pub use time::{Seconds, TimeOfDay, Weekday};
pub use units::Bytes;
pub use vm::{Disk, DiskDevice, DiskSource, Vm, VmState};
