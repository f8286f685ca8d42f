//! How well a host is protected, and why not better.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::record::{HostPhase, HostRecord, WatchdogClass};

/// A grade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// If it dies, its VMs do not come back by themselves.
    None,
    /// They may come back later than they could, or a second fault keeps them down.
    Degraded,
    /// They come back, with two independent proofs or one that depends on nothing else.
    Full,
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["none", "degraded", "full"][*self as usize])
    }
}

/// What else is known.
#[derive(Clone, Copy, Debug)]
pub struct Around {
    /// Voters of the store; 1 for the embedded one.
    pub voters: usize,
    /// Hosts in service, this one included.
    pub in_service: usize,
}

/// The grade with everything that keeps it from being better.
pub fn grade(host: &HostRecord, around: Around) -> (Grade, Vec<String>) {
    let mut why = Vec::new();
    let mut grade = Grade::Full;
    let mut lower = |to: Grade, text: &str| {
        grade = grade.min(to);
        why.push(text.to_owned());
    };
    match host.phase {
        HostPhase::Armed => {}
        HostPhase::Out => {
            lower(Grade::None, "it is not in service; its daemon joins by itself once [ha] is in its configuration")
        }
        HostPhase::Fencing => lower(Grade::None, "it was declared dead, and there is no proof yet"),
        HostPhase::Fenced => lower(Grade::None, "it was fenced and has not joined again"),
    }
    if host.maintenance {
        lower(Grade::None, "it is in maintenance: its daemon was stopped, or the cluster disarmed (virtward ha arm)");
    }
    if around.in_service < 2 {
        lower(Grade::None, "there is no other host in service to take its VMs");
    }
    match around.voters {
        0 | 1 => lower(Grade::None, "the store is on one host; host failover needs etcd with three voters"),
        2 => lower(
            Grade::Degraded,
            "the store has two voters: the loss of either stops failover; add a third (a witness)",
        ),
        _ => {}
    }
    match (host.watchdog, host.fence_devices) {
        (WatchdogClass::Hardware, 1..) => {}
        (WatchdogClass::Hardware, 0) => {}
        (WatchdogClass::Software, 1..) => {
            lower(
                Grade::Degraded,
                "its watchdog is a timer of its kernel, which can die with it: only the fence device is a proof",
            );
        }
        (WatchdogClass::Software, 0) => {
            lower(
                Grade::None,
                "softdog alone is no proof: add a hardware watchdog or a fence device and test it (virtward ha test-fencing)",
            );
        }
        (WatchdogClass::None, 1..) => lower(Grade::Degraded, "no watchdog is armed: only the fence device is a proof"),
        (WatchdogClass::None, 0) => {
            lower(Grade::None, "neither a watchdog nor a fence device: only a person's word would free its VMs");
        }
    }
    if host.watchdog == WatchdogClass::Hardware && host.fence_devices == 0 {
        let wait = host.timing.self_fence_ms().div_ceil(1000);
        why.push(format!("recovery takes {wait} s longer than with a fence device"));
    }
    (grade, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::record::fixture;

    fn host(watchdog: WatchdogClass, fence_devices: u32) -> HostRecord {
        HostRecord { watchdog, fence_devices, ..fixture::host() }
    }

    #[test]
    fn grades_follow_the_proofs_that_there_are() {
        let around = Around { voters: 3, in_service: 3 };
        for (watchdog, devices, expected) in [
            (WatchdogClass::Hardware, 1, Grade::Full),
            (WatchdogClass::Hardware, 0, Grade::Full),
            (WatchdogClass::Software, 1, Grade::Degraded),
            (WatchdogClass::Software, 0, Grade::None),
            (WatchdogClass::None, 1, Grade::Degraded),
            (WatchdogClass::None, 0, Grade::None),
        ] {
            let (found, why) = grade(&host(watchdog, devices), around);
            assert_eq!(found, expected, "{watchdog:?}, {devices} devices: {why:?}");
            assert!(found == Grade::Full || !why.is_empty());
        }
        let full = host(WatchdogClass::Hardware, 1);
        assert_eq!(grade(&full, Around { voters: 1, in_service: 1 }).0, Grade::None);
        assert_eq!(grade(&full, Around { voters: 2, in_service: 2 }).0, Grade::Degraded);
    }
}
