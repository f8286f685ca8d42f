//! High availability on one host: what touches the world. What is decided, and when, is not here.
//!
//! - [`fence`]: other hosts' power, through the distribution's fence agents.
//! - [`watchdog`]: what ends this host when nobody says any more that it is well.
//! - [`lease`]: who may write to a VM's disks, recorded beside the disks.
//! - [`qemu`]: a VM's process, found and ended for certain.
//! - [`hook`]: libvirt asks before it starts a protected VM.
//! - [`probe`]: whether a service answers, from outside and from inside the guest.
//! - [`run`]: the loops that join all of it with the machines.
//!
//! Invariants: everything is bounded in time and in what it reads; nothing is believed that was not verified; what
//! cannot be known is said to be unknown, never guessed.

pub mod fence;
pub mod hook;
pub mod lease;
pub mod probe;
mod process;
pub mod qemu;
pub mod run;
pub mod watchdog;
