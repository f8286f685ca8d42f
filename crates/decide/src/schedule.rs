//! When backups start: cron expressions, windows, and the plan over all VMs and policies.

pub mod cron;
pub mod window;
