//! Where a VM runs after a migration that ended, however it ended. Two hosts are asked, not one call's result.

use std::time::Duration;

use tokio::time::Instant;
use virtward_hypervisor::{ErrorKind, Hypervisor};
use virtward_model::VmState;

use super::{Run, drive::Driven};
use crate::{Error, Result};

/// How long the hosts may take to agree: a libvirtd that was restarted first looks at its guests.
const SETTLES_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Here,
    There,
}

/// What one host says of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    Runs,
    Paused,
    /// Defined, without a process.
    Off,
    Absent,
    Unknown,
}

async fn ask(hypervisor: &dyn Hypervisor, vm: &str) -> Says {
    match hypervisor.lookup(vm).await {
        Ok(vm) if vm.state == VmState::Running => Says::Runs,
        Ok(vm) if vm.state.is_active() => Says::Paused,
        Ok(_) => Says::Off,
        Err(error) if error.kind == ErrorKind::NoDomain => Says::Absent,
        Err(_) => Says::Unknown,
    }
}

/// Waits until it is certain where the VM is. A VM that was left paused here by a migration that failed goes on.
pub(super) async fn settle(run: &mut Run<'_>, driven: &Driven) -> Result<Place> {
    let id = run.vm.uuid.to_string();
    let (ran, was_off) = (run.vm.state == VmState::Running, !run.vm.state.is_active());
    let deadline = Instant::now() + SETTLES_WITHIN;
    let failed = driven.error.is_some() || driven.ended.is_some();
    loop {
        let (here, there) = futures::join!(ask(run.here(), &id), ask(run.there(), &id));
        match (here, there) {
            (Says::Absent | Says::Off, Says::Runs) => return Ok(Place::There),
            (Says::Absent, Says::Paused) if !ran => return Ok(Place::There),
            (Says::Absent, Says::Off) if was_off => return Ok(Place::There),
            (Says::Off, Says::Absent) if was_off => return Ok(Place::Here),
            (Says::Runs, Says::Absent | Says::Off) => return Ok(Place::Here),
            (Says::Runs, Says::Unknown) if failed => return Ok(Place::Here),
            (Says::Paused, Says::Absent | Says::Off) if !ran => return Ok(Place::Here),
            _ => {}
        }
        // libvirt lets a VM go on that did not get away; if it could not, this does.
        let stuck = failed && here == Says::Paused && matches!(there, Says::Absent | Says::Off);
        if stuck && run.here().resume(run.vm.uuid).await.is_ok() {
            run.warn(format!("{} had been left paused here and goes on", run.vm.name));
        }
        if Instant::now() > deadline {
            return Err(uncertain(run, here, there));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn uncertain(run: &Run<'_>, here: Says, there: Says) -> Error {
    let say = |says| match says {
        Says::Runs => "runs",
        Says::Paused => "is paused",
        Says::Off => "is shut off",
        Says::Absent => "is not known",
        Says::Unknown => "cannot be asked for",
    };
    Error::Busy(format!(
        "the migration of {} ended in between: it {} at the source and {} at the destination; look at both with virsh \
         list --all, and run the same command again, which goes on from there",
        run.vm.name,
        say(here),
        say(there)
    ))
}
