//! High availability: who may run a VM, and when a host that went silent may be replaced.
//!
//! Invariant above all: at most one effective writer per disk at every instant, writes in flight included. Everything
//! here is pure: machines with `step(now, event) -> effects`, records as data, transactions as data. Shells perform
//! the effects and hold no policy. `now` is the local `CLOCK_BOOTTIME` ([`Moment`]).
//!
//! A host's epochs ([`agent`] drives what is above the line, [`coordinator`] what is below):
//!
//! ```text
//!            guests gone, watchdog armed and read back
//!   OUT ────────────────────────────────────────────────► ARMED(e) ◄─┐ heartbeats: txn if /ha/host/H is as I put it
//!    ▲ ▲                    e+1, with a proof for e          │  └─────┘
//!    │ └────────────── soft fence: guests killed, seen gone ─┤
//!  ──┼───────────────────────────────────────────────────────┼──────────────────────────────────────────────────────
//!    │                                                  silence, SUSPECT (cancelled by a heartbeat)
//!    │ joins again                                           │ txn: heartbeat and host record unchanged
//!    └────────────── FENCED(e+1) ◄──── proof for e ──── FENCING(e+1), irrevocable
//!                                  P0 … P5, in parallel
//! ```
//!
//! A VM's generations:
//!
//! ```text
//!   STOPPED ──claim, gen+1──► CLAIMED ──owner──► STARTING ──lease on the disk, then txn "still mine, still armed"──► RUNNING
//!      ▲                         ▲  paused process, no writes                                                          │
//!      │ the owner saw it end    └────────────── CLAIMABLE ◄── proof for (owner, epoch) ── LOST ◄── owner FENCING ─────┤
//!      └───────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - [`timing`] when a silent host is dead by its own watchdog, and why then.
//! - [`record`], [`txn`] what is in the store, and how it is changed.
//! - [`agent`] one host: joins, beats, pets, fences itself, starts and ends its VMs.
//! - [`coordinator`] any daemon: suspects, fences, collects proofs, gives VMs to hosts.
//! - [`recovery`] in which order and where VMs come back. [`room`] whether a change leaves room for that.
//! - [`pair`] an active VM and its standby, and how they change roles.
//! - [`guest`] one VM on its host: hangs, crashes, resets and their budget. [`probe`] a service inside.
//! - [`grade`] how well a host is protected, and why not better.

pub mod agent;
pub mod coordinator;
pub mod grade;
pub mod guest;
pub mod pair;
mod planted;
pub mod probe;
pub mod record;
pub mod recovery;
pub mod room;
#[cfg(test)]
mod sim;
pub mod timing;
pub mod txn;

pub use self::{
    record::{HostId, Owner, View, VmId},
    timing::{Moment, Timing, TimingError},
    txn::{Answer, Txn, Versioned},
};
