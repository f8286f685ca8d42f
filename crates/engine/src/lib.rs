//! Effects: finite jobs that back up and restore, over the hypervisor driver, the NBD client and the repository.
//!
//! Decisions live in `virtward-decide`; this crate gathers facts, asks, and carries the answer out. Every job reports
//! to an [`Observer`], stops at a [`Cancel`], and leaves nothing half-done behind: what a killed job leaves, the next
//! run of the same job cleans up.
//!
//! [`collect`], [`guest`] and [`reconcile`] keep an inventory of what a host has.
//!
//! Not here: scheduling, clusters, rendering, exit codes.

mod cancel;
pub mod collect;
mod env;
mod error;
#[doc(hidden)]
pub mod fuzz;
pub mod guest;
pub mod ha;
mod image;
pub mod job;
mod lock;
mod observe;
pub mod reconcile;
pub mod survey;
mod tool;

pub use cancel::Cancel;
pub use env::{Dirs, Env};
pub use error::{Error, Result};
pub use job::backup::{
    BackupMode, BackupOptions, DiskJob, Hooks, ImageSet, Proxy, Terms, backup_images, backup_vm, backup_vm_through,
    store_exports,
};
pub use job::drain::{Assigned, DrainOptions, Drained, Evacuation, Left, drain_host, plan_drain};
pub use job::migrate::{Destination, MigrateOptions, Migrated, MigrationPlan, Passage, migrate_vm, plan_migration};
pub use job::move_disk::{DiskPlace, MoveDiskOptions, MovedDisk, move_disk};
pub use job::restore::{
    DiskFormat, PlannedDisk, PlannedVm, RestoreDiskOptions, RestoreVmOptions, RestoredDisk, RestoredVm,
    plan_restore_vm, restore_disk, restore_vm,
};
pub use job::steps::{Carried, Pace, carry_out};
pub use observe::{Event, Observer, Phase, Silent};
