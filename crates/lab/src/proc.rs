//! The processes of a host: found by the namespaces they live in, ended through pidfds.
//!
//! Invariant: a signal reaches only a process that was seen inside the host after its pidfd was opened, so a number
//! that the kernel gave to another process in between is never hit.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    names::{HostName, LabName},
    run::wait_until,
};

/// How a process is known to belong to a host: it is in its network namespace, or in a mount namespace where the
/// host's libvirt directory is mounted (which holds even when the namespace's name is gone).
#[derive(Debug)]
pub struct Membership {
    netns: Option<(u64, u64)>,
    mount_root: String,
}

impl Membership {
    /// Of the host `host` of lab `lab`, whose network namespace is named `netns`.
    pub fn new(lab: &LabName, host: &HostName, netns: &str) -> Self {
        let netns = fs::metadata(netns_path(netns)).ok().map(|m| (m.dev(), m.ino()));
        Self { netns, mount_root: format!("virtward-lab/{lab}/{host}/libvirt") }
    }

    fn holds(&self, pid: i32) -> bool {
        let in_netns = || {
            let seen = fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|m| (m.dev(), m.ino()));
            seen.is_some() && seen == self.netns
        };
        in_netns() || self.sees_mount(pid)
    }

    fn sees_mount(&self, pid: i32) -> bool {
        let Ok(mounts) = fs::read_to_string(format!("/proc/{pid}/mountinfo")) else { return false };
        mounts.lines().any(|line| {
            // Fields: id parent major:minor root mountpoint ...
            let mut fields = line.split(' ').skip(3);
            let (root, point) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
            point == "/run/libvirt" && root.ends_with(&format!("/{}", self.mount_root))
        })
    }

    /// The processes of the host now.
    pub fn pids(&self) -> Vec<i32> {
        all_pids().into_iter().filter(|&pid| self.holds(pid)).collect()
    }

    /// Sends a signal to every process of the host.
    fn signal_all(&self, signal: Signal) {
        for pid in self.pids() {
            self.signal(pid, signal);
        }
    }

    /// Sends a signal to one process if it belongs to the host; false if it does not (any more).
    pub fn signal(&self, pid: i32, signal: Signal) -> bool {
        let Some(pid_checked) = Pid::from_raw(pid) else { return false };
        let Ok(fd) = pidfd_open(pid_checked, PidfdFlags::empty()) else { return false };
        self.holds(pid) && pidfd_send_signal(&fd, signal).is_ok()
    }

    /// Stops every process of the host where it stands, as a hypervisor that pauses a host does, or lets them go on.
    /// They know nothing of it, and their clocks went on.
    pub fn freeze(&self, stop: bool) -> Result<()> {
        let (signal, state) = if stop { (Signal::STOP, "stop") } else { (Signal::CONT, "go on") };
        // New ones that a process forked before it stopped are met by the next round.
        let done = wait_until(Duration::from_secs(20), || {
            self.signal_all(signal);
            self.pids()
                .into_iter()
                .all(|pid| matches!(state_of(pid), None | Some('Z' | 'X' | 'D')) || is_stopped(pid) == stop)
        });
        if !done {
            bail!("processes {:?} do not {state}", self.pids());
        }
        Ok(())
    }

    /// Whether the host is stopped: all of its processes are.
    pub fn is_frozen(&self) -> bool {
        let pids = self.pids();
        !pids.is_empty() && pids.into_iter().all(is_stopped)
    }

    /// Ends every process of the host at once, as a power cut does. New ones that a dying process still forked are
    /// met by the next round.
    pub fn kill_all(&self) -> Result<()> {
        let gone = wait_until(Duration::from_secs(20), || {
            self.signal_all(Signal::KILL);
            self.pids().into_iter().all(is_zombie)
        });
        if !gone {
            bail!(
                "processes {:?} do not end on SIGKILL; they may hang in the kernel (see /proc/PID/stack)",
                self.pids()
            );
        }
        Ok(())
    }

    /// The process whose number is in a pid file, if it belongs to the host and lives.
    pub fn pid_in_file(&self, path: &Path) -> Option<i32> {
        let pid = fs::read_to_string(path).ok()?.trim().parse().ok()?;
        (self.holds(pid) && !is_zombie(pid)).then_some(pid)
    }
}

/// Where `ip netns` keeps a namespace.
pub fn netns_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

fn all_pids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// The state of a process as the kernel shows it; none when it is gone.
fn state_of(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The state follows the name, which is in parentheses and may hold anything.
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// A process that has ended and waits for its parent holds nothing any more.
fn is_zombie(pid: i32) -> bool {
    matches!(state_of(pid), None | Some('Z' | 'X'))
}

fn is_stopped(pid: i32) -> bool {
    state_of(pid) == Some('T')
}

/// Sends a signal to a process that `is_it` recognises, looked at after its pidfd was opened.
pub fn signal_if(pid: i32, signal: Signal, is_it: impl Fn(i32) -> bool) {
    let Some(number) = Pid::from_raw(pid) else { return };
    let Ok(fd) = pidfd_open(number, PidfdFlags::empty()) else { return };
    if is_it(pid) {
        let _ = pidfd_send_signal(&fd, signal);
    }
}

/// Whether a process was called with these words, one after the other.
pub fn has_words(pid: i32, words: &[&str]) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let called: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    called.windows(words.len()).any(|some| some.iter().zip(words).all(|(a, b)| *a == b.as_bytes()))
}
