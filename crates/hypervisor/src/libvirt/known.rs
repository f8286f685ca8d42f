//! What was last seen of each domain's disks, for the time that libvirt does not tell.
//!
//! While one call waits for a QEMU that does not answer, libvirt refuses that domain's XML, after 30 s of waiting. That
//! wait is paid once a minute, not at every list.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use virtward_model::{Disk, Vm};

/// How long a domain that hung is not asked again.
const PAUSE: Duration = Duration::from_secs(60);

/// The memory of one connection.
#[derive(Default)]
pub(super) struct Known(Mutex<HashMap<Uuid, Seen>>);

#[derive(Default)]
struct Seen {
    disks: Vec<Disk>,
    hung: Option<Instant>,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a domain that was read.
    pub(super) fn learn(&self, vm: &Vm) {
        self.lock().insert(vm.uuid, Seen { disks: vm.disks.clone(), hung: None });
    }

    /// Remembers that a domain could not be read.
    pub(super) fn hung(&self, uuid: Uuid) {
        self.lock().entry(uuid).or_default().hung = Some(Instant::now());
    }

    /// Whether a domain hung a moment ago.
    pub(super) fn hangs(&self, uuid: Uuid) -> bool {
        self.lock().get(&uuid).and_then(|s| s.hung).is_some_and(|at| at.elapsed() < PAUSE)
    }

    /// The disks last seen.
    pub(super) fn disks(&self, uuid: Uuid) -> Vec<Disk> {
        self.lock().get(&uuid).map(|s| s.disks.clone()).unwrap_or_default()
    }

    /// Forgets domains that are gone.
    pub(super) fn keep_only(&self, vms: &[Vm]) {
        let names: std::collections::HashSet<Uuid> = vms.iter().map(|vm| vm.uuid).collect();
        self.lock().retain(|uuid, _| names.contains(uuid));
    }
}
