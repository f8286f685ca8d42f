//! The seeded simulator: real machines, everything around them made up. A seed is a run; a run that fails prints what
//! happened, line by line, and the same seed does the same again.
//!
//! # Fault model
//!
//! - Clocks of hosts and of their watchdogs run at 1 ± ρ, each at its own rate.
//! - A daemon, or a whole host, stops for any time between any two steps and effects, or dies there. An effect that was
//!   decided before a pause is performed after it; the adversary places the last pet as late as the watchdog lets it.
//! - Hosts lose power, are reset by their watchdog, and boot again, or not for a long while.
//! - The store answers late, loses requests and answers, performs requests long after the caller gave up, is cut off from
//!   one host, some, or all, and is restored from an old backup (with the revision bumped, as etcd's manual asks).
//! - Hosts' links among each other are cut in either direction.
//! - Fence devices work, have no power, take a minute, or say "done" and do nothing (reading back then says "on"). A
//!   device that reads back "off" while the host runs is outside the model: nothing can see through it.
//! - Writes are in flight for up to the drain time and land after their QEMU, or its host, is dead.
//! - A QEMU in the kernel's hands does not die. Guests shut themselves down; QEMUs crash; the reason may get lost.
//! - Making a process and taking the lease takes up to a minute; several daemons may believe to lead.
//!
//! # What is checked, at every step
//!
//! One effective writer per disk, writes in flight included; no claim of a VM that ran without a proof; generations
//! strictly rise; no heartbeat of an epoch after its FENCING; nobody is fenced or killed whom no fault touched; a guest
//! that shut itself down stays down; of a pair one leads at a time, never two, and never both are on one host; and once the
//! faults end, everything that should run runs, and one of a pair leads.

mod check;
mod faults;
mod node;
mod roles;
mod store;
mod tests;
mod world;
