//! Looking after a running backup: the guest comes first, and a job that can come to no good is ended soon.

use std::time::Duration;

use tokio::{sync::broadcast, time::Instant};
use virtward_hypervisor::{DomainEvent, DomainEventKind, ErrorKind};

use super::{Job, scratch::Scratch};
use crate::{Error, Result};

/// How often the free scratch space is read. A guest that overwrites 2 GB/s uses 200 MB in this time; the reserve is
/// larger.
const SCRATCH_INTERVAL: Duration = Duration::from_millis(100);
const JOB_INTERVAL: Duration = Duration::from_millis(500);
/// How long the hypervisor may be away (libvirtd restarting) before the job is given up.
pub(super) const HYPERVISOR_AWAY_MAX: Duration = Duration::from_secs(60);
/// libvirt learns of QEMU's end a moment after those do who were connected to it.
const GONE_SETTLES: Duration = Duration::from_secs(3);
/// When the guest shut itself down in mid-backup, libvirt waits for the backup job to end before it looks at what
/// happened, and gives up after 30 s.
const CUT_OFF_SETTLES: Duration = Duration::from_secs(45);

/// Resolves with the reason to give up: cancelled, the VM went away, its job was ended by others, scratch space runs
/// low. The scratch space is watched apart from everything that a hanging libvirt could hold up.
pub(super) async fn watch(job: &Job<'_>, scratch: &Scratch, events: broadcast::Receiver<DomainEvent>) -> Error {
    tokio::select! {
        () = job.cancel.cancelled() => Error::Cancelled,
        error = watch_scratch(job, scratch) => error,
        error = watch_events(job, events) => error,
        error = watch_job(job) => error,
    }
}

async fn watch_scratch(job: &Job<'_>, scratch: &Scratch) -> Error {
    let mut tick = tokio::time::interval(SCRATCH_INTERVAL);
    loop {
        tick.tick().await;
        match scratch.free() {
            Ok(free) if free < job.options.scratch_reserve.get() => {
                return Error::GuestFirst(format!(
                    "the backup of {} was given up: scratch space is down to {} free, and the guest would be the next \
                     to feel it. Free space in the scratch directory, back up at a quieter time, or raise --bandwidth",
                    job.vm.name,
                    virtward_model::Bytes(free)
                ));
            }
            _ => {}
        }
    }
}

async fn watch_events(job: &Job<'_>, mut events: broadcast::Receiver<DomainEvent>) -> Error {
    loop {
        match events.recv().await {
            Ok(DomainEvent { uuid, kind: DomainEventKind::Stopped { detail }, .. }) if uuid == job.vm.uuid => {
                return stopped(job, &detail);
            }
            // The driver is closing; the others go on watching.
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            _ => {}
        }
    }
}

async fn watch_job(job: &Job<'_>) -> Error {
    let mut tick = tokio::time::interval(JOB_INTERVAL);
    let mut away_since: Option<Instant> = None;
    loop {
        tick.tick().await;
        match job.env.hypervisor.backup_xml(job.vm.uuid).await {
            Ok(Some(_)) => away_since = None,
            Ok(None) => {
                let fallback =
                    || Error::SourceGone(format!("the backup job of {} was ended by someone else", job.vm.name));
                return gone(job).await.unwrap_or_else(fallback);
            }
            // QEMU serves the data without libvirtd; only a long absence is a reason to stop.
            Err(error) if error.kind == ErrorKind::Unreachable => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > HYPERVISOR_AWAY_MAX {
                    return Error::hyper(format!("back up {}", job.vm.name))(error);
                }
            }
            Err(_) => {
                if let Some(error) = gone(job).await {
                    return error;
                }
            }
        }
    }
}

fn stopped(job: &Job<'_>, detail: &str) -> Error {
    let what = match detail {
        "migrated" => "was migrated to another host",
        "crashed" | "failed" => "crashed",
        "destroyed" => "was powered off",
        "shutdown" => "was shut down",
        _ => "stopped running",
    };
    Error::SourceGone(format!("{} {what} during the backup", job.vm.name))
}

/// What became of the VM, if it does not run here any more.
async fn gone(job: &Job<'_>) -> Option<Error> {
    match job.env.hypervisor.lookup(&job.vm.uuid.to_string()).await {
        Ok(vm) if vm.state.is_active() => None,
        Ok(_) => Some(stopped(job, "")),
        Err(error) if error.kind == ErrorKind::NoDomain => {
            Some(Error::SourceGone(format!("{} was deleted during the backup", job.vm.name)))
        }
        Err(_) => None,
    }
}

/// The cause behind an error. A broken connection or a refused call is often but a symptom of what became of the VM.
pub(super) async fn explain<T>(job: &Job<'_>, outcome: Result<T>) -> Result<T> {
    let error = match outcome {
        Err(Error::Hypervisor { source, context }) if source.kind == ErrorKind::Unreachable => {
            return Err(Error::Hypervisor { source, context });
        }
        // A lookup by an identity that was found a moment ago.
        Err(
            error @ (Error::Nbd { .. }
            | Error::Proxy { is_source: true, .. }
            | Error::Hypervisor { .. }
            | Error::NotFound(_)),
        ) => error,
        other => return other,
    };
    let settles = match &error {
        Error::Nbd { source: virtward_nbd::Error::Disconnected { .. }, .. } | Error::Proxy { .. } => CUT_OFF_SETTLES,
        _ => GONE_SETTLES,
    };
    let deadline = Instant::now() + settles;
    loop {
        if let Some(cause) = gone(job).await {
            return Err(cause);
        }
        if Instant::now() > deadline || job.cancel.is_cancelled() {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
