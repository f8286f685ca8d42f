//! The only clock of high availability: it goes on while the machine is suspended, and nobody can set it.

use std::{fs, io};

use virtward_decide::ha::Moment;

/// Where the kernel names this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Now, by CLOCK_BOOTTIME.
pub fn now() -> Moment {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Moment(now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000)
}

/// The name of this boot.
pub fn boot_id() -> io::Result<String> {
    fs::read_to_string(BOOT_ID).map(|text| text.trim().to_owned())
}
