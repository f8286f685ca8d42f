//! Effects: finite jobs that back up and restore, over the hypervisor driver, the NBD client and the repository.
//!
//! Decisions live in `virtward-decide`; this crate gathers facts, asks, and carries the answer out. Every job reports
//! to an [`Observer`], stops at a [`Cancel`], and leaves nothing half-done behind: what a killed job leaves, the next
//! run of the same job cleans up.
//!
//! Not here: scheduling, clusters, rendering, exit codes.

mod cancel;
mod env;
mod error;
mod image;
pub mod job;
mod lock;
mod observe;
mod tool;

pub use cancel::Cancel;
pub use env::{Dirs, Env};
pub use error::{Error, Result};
pub use job::backup::{BackupMode, BackupOptions, Hooks, ImageSet, backup_images, backup_vm};
pub use job::restore::{
    DiskFormat, RestoreDiskOptions, RestoreVmOptions, RestoredDisk, RestoredVm, restore_disk, restore_vm,
};
pub use observe::{Event, Observer, Phase, Silent};
