//! libvirt's event numbers in our words.

use super::ffi::RawEvent;
use crate::DomainEventKind;

/// What became of a raw event.
pub(super) enum Translated {
    /// Ready to be announced.
    Event(DomainEventKind),
    /// Needs the domain's XML to name the disk.
    IoError {
        /// Device alias.
        alias: String,
    },
    /// Of no interest.
    Nothing,
}

const STARTED: [&str; 6] = ["booted", "migrated", "restored", "from-snapshot", "wakeup", "recreated"];
const SUSPENDED: [&str; 10] = [
    "paused",
    "migrated",
    "ioerror",
    "watchdog",
    "restored",
    "from-snapshot",
    "api-error",
    "postcopy",
    "postcopy-failed",
    "guest-shutdown",
];
const RESUMED: [&str; 5] = ["unpaused", "migrated", "from-snapshot", "postcopy", "postcopy-failed"];
const STOPPED: [&str; 8] =
    ["shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "recreated"];
const BLOCK_JOB: [&str; 4] = ["completed", "failed", "canceled", "ready"];

fn word(words: &[&str], index: u32) -> String {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    words.get(index).map_or_else(|| format!("unknown-{index}"), |w| (*w).to_owned())
}

/// Translates one event.
pub(super) fn translate(event: RawEvent) -> Translated {
    Translated::Event(match event {
        RawEvent::Lifecycle { event, detail } => match lifecycle(event, detail) {
            Some(kind) => kind,
            None => return Translated::Nothing,
        },
        RawEvent::Rebooted => DomainEventKind::Rebooted,
        RawEvent::Watchdog => DomainEventKind::Watchdog,
        RawEvent::IoError { alias } => return Translated::IoError { alias },
        RawEvent::Agent { connected } => DomainEventKind::Agent { connected },
        RawEvent::BlockJob { target, status } => DomainEventKind::BlockJob { target, status: word(&BLOCK_JOB, status) },
        RawEvent::JobCompleted => DomainEventKind::JobCompleted,
        RawEvent::MigrationPass { iteration } => {
            DomainEventKind::MigrationPass { iteration: u64::try_from(iteration).unwrap_or(0) }
        }
    })
}

fn lifecycle(event: u32, detail: u32) -> Option<DomainEventKind> {
    Some(match event {
        virt_sys::VIR_DOMAIN_EVENT_DEFINED => DomainEventKind::Defined,
        virt_sys::VIR_DOMAIN_EVENT_UNDEFINED => DomainEventKind::Undefined,
        virt_sys::VIR_DOMAIN_EVENT_STARTED => DomainEventKind::Started { detail: word(&STARTED, detail) },
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED => DomainEventKind::Suspended { detail: word(&SUSPENDED, detail) },
        virt_sys::VIR_DOMAIN_EVENT_RESUMED => DomainEventKind::Resumed { detail: word(&RESUMED, detail) },
        virt_sys::VIR_DOMAIN_EVENT_STOPPED => DomainEventKind::Stopped { detail: word(&STOPPED, detail) },
        virt_sys::VIR_DOMAIN_EVENT_PMSUSPENDED => DomainEventKind::Suspended { detail: "pm-suspended".into() },
        virt_sys::VIR_DOMAIN_EVENT_CRASHED => DomainEventKind::Crashed,
        // The guest's own shutdown is followed by `stopped`, which is what matters.
        _ => return None,
    })
}
