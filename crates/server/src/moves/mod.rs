//! VMs and disks that move: between hosts, off a host that is to be serviced, for the sake of load.
//!
//! ```text
//! request ─► migrate, move-disk: one job where the VM runs      claim of the VM (migrate, drain, balance, move-disk)
//!         ─► drain, balance: a job that plans and makes one migration job per step, each as soon as it may begin
//! rounds (leader) ─► balance: recommended, or a job
//! ```
//!
//! What goes where is `decide::placement`'s; how a VM moves is the engine's. Here is who does it, and who is told.

pub mod balance;
mod carry;
pub mod certificates;
pub mod drained;
mod jobs;
pub mod reach;

pub use self::{
    jobs::{drain, drain_plan, draining, may_drain, migrate, migrate_plan, move_disk, rebalance},
    reach::Reach,
};
