//! The nouns that every other crate speaks: units, virtual machines and their disks, restore points.
//!
//! Plain data with parsing, formatting and serialisation. No I/O, no clock, no policy.

pub mod point;
pub mod units;
pub mod vm;

pub use point::{
    BackupKind, CopiedFrom, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint,
    SourceKind, TrackingRecord, TrackingState,
};
pub use units::Bytes;
pub use vm::{Disk, DiskDevice, DiskSource, Vm, VmState};
