//! What a backup of a running VM leaves on the hypervisor while it runs, and how that is put right before and after:
//! the job, its checkpoint, scratch files, leftovers of killed runs.

use std::time::Duration;

use tokio::time::Instant;
use virtward_decide::tracking::{CheckpointFact, DiskDecision, DiskFacts, Repair, repairs};
use virtward_hypervisor::{CheckpointInfo, CheckpointSpec, ErrorKind};
use virtward_model::TrackingState;

use super::{Job, quiesce, scratch::Scratch, watch::HYPERVISOR_AWAY_MAX};
use crate::{Error, Result};

/// How long a job that was asked to end may take before the run goes on without having seen its end.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// libvirt is deaf to a domain's events for 30 s after a guest was reset in mid-backup, and learns of the job's end only
/// then. Events that came meanwhile (the agent's channel closes and opens with the reset) can hold it up for 30 s each:
/// a run that waits is better than one that fails at night.
const LEFTOVER_ENDS_WITHIN: Duration = Duration::from_secs(150);

/// Removes what a killed run of ours left; refuses to touch another tool's job.
pub(super) async fn clear_leftovers(job: &mut Job<'_>, scratch: &Scratch) -> Result<()> {
    if quiesce::thaw_leftover(job.env, job.vm.uuid).await {
        job.warn("an earlier run left the guest frozen; it was thawed".into());
    }
    let hypervisor = &job.env.hypervisor;
    let context = || format!("look for a running backup of {}", job.vm.name);
    let Some(xml) = hypervisor.backup_xml(job.vm.uuid).await.map_err(Error::hyper(context()))? else {
        return Ok(());
    };
    if !scratch.owns(&xml) {
        return Err(Error::Busy(format!(
            "another tool is backing up {}; wait for it, or end its job with: virsh domjobabort {}",
            job.vm.name, job.vm.name
        )));
    }
    match hypervisor.abort_job(job.vm.uuid).await {
        // It ended by itself meanwhile.
        Err(error) if matches!(error.kind, ErrorKind::WrongState | ErrorKind::Invalid) => {}
        Err(error) => return Err(Error::hyper("end the backup job of an interrupted run")(error)),
        Ok(()) => {}
    }
    if !job_is_over(job, LEFTOVER_ENDS_WITHIN).await {
        return Err(Error::Busy(format!(
            "the backup job of an earlier, interrupted run of {} does not end; look at it with: virsh domjobinfo {}",
            job.vm.name, job.vm.name
        )));
    }
    job.warn("the backup job of an earlier, interrupted run was ended".into());
    Ok(())
}

/// Waits until libvirt has no backup job of the VM any more: ending one is asked for first and done later.
async fn job_is_over(job: &Job<'_>, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        // A VM that is gone or does not run has no job.
        if !matches!(job.env.hypervisor.backup_xml(job.vm.uuid).await, Ok(Some(_))) {
            return true;
        }
        if Instant::now() > deadline || job.cancel.is_cancelled() {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Puts checkpoints and bitmaps right. A repair that fails costs tracking, never the backup.
pub(super) async fn repair(
    job: &Job<'_>,
    known: Vec<CheckpointInfo>,
    facts: &[DiskFacts],
    elsewhere: &[String],
    decisions: &mut [DiskDecision],
) -> Result<()> {
    let hypervisor = job.env.hypervisor.clone();
    let uuid = job.vm.uuid;
    let known: Vec<CheckpointFact> = known
        .into_iter()
        .map(|info| CheckpointFact {
            name: info.name,
            targets: info.disks.into_iter().map(|(target, _)| target).collect(),
        })
        .collect();
    for repair in repairs(facts, &known, decisions, elsewhere, &job.checkpoint_prefix()) {
        let done = match &repair {
            Repair::ForgetCheckpoint { name } => hypervisor.checkpoint_delete(uuid, name, true).await,
            Repair::DeleteCheckpoint { name } => match hypervisor.checkpoint_delete(uuid, name, false).await {
                Err(_) => hypervisor.checkpoint_delete(uuid, name, true).await,
                done => done,
            },
            Repair::RemoveBitmap { target, bitmap } => hypervisor.bitmap_remove(uuid, target, bitmap).await,
            Repair::Redefine { name, targets } => {
                let spec = checkpoint_spec(name.clone(), targets.clone());
                let made_by = job.history.iter().find(|point| &job.checkpoint_name(point.id) == name);
                let created = made_by.map_or(0, |point| point.taken.as_second());
                hypervisor.checkpoint_redefine(uuid, &spec, created).await
            }
        };
        let Err(error) = done else { continue };
        tracing::debug!(?repair, %error, "repair of change tracking failed");
        if let Repair::Redefine { name, .. } = &repair {
            for decision in decisions.iter_mut().filter(|decision| decision.keep.as_ref() == Some(name)) {
                decision.since = None;
                decision.keep = None;
                decision.state = TrackingState::Missing;
                decision.reason = Some(format!("checkpoint {name} could not be used again: {}", error.message));
            }
        }
    }
    Ok(())
}

pub(super) fn checkpoint_spec(name: String, disks: Vec<String>) -> CheckpointSpec {
    CheckpointSpec { name, description: "Virtward change tracking".into(), disks }
}

/// What exists on the hypervisor for this run and must be ended.
pub(super) struct Session {
    pub scratch: Scratch,
    /// The checkpoint made by this run.
    pub checkpoint: Option<String>,
    /// A backup job of this run is there.
    pub begun: bool,
    /// Checkpoints that disks outside this run rely on.
    pub elsewhere: Vec<String>,
}

impl Session {
    /// Ends the backup job, so that the guest pays no longer for it.
    pub(super) async fn end_job(&mut self, job: &mut Job<'_>) {
        if !self.begun {
            return;
        }
        let deadline = Instant::now() + HYPERVISOR_AWAY_MAX;
        loop {
            match job.env.hypervisor.abort_job(job.vm.uuid).await {
                Ok(()) => break,
                // No job or no domain any more: what was wanted.
                Err(error)
                    if matches!(error.kind, ErrorKind::WrongState | ErrorKind::NoDomain | ErrorKind::Invalid) =>
                {
                    break;
                }
                Err(error) if error.kind == ErrorKind::Unreachable && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
                Err(error) => {
                    job.warn(format!("the backup job could not be ended ({}); the next run ends it", error.message));
                    break;
                }
            }
        }
        self.begun = false;
        job_is_over(job, ENDS_WITHIN).await;
    }

    /// Keeps the checkpoint that the published restore point (new or previous) needs and removes the others of ours.
    pub(super) async fn clean_up(&mut self, job: &mut Job<'_>, published: bool) {
        let hypervisor = &job.env.hypervisor;
        let prefix = job.checkpoint_prefix();
        let doomed: Vec<String> = match (&self.checkpoint, published) {
            (Some(new), false) => vec![new.clone()],
            (kept, true) => match hypervisor.checkpoints(job.vm.uuid).await {
                Ok(known) => known
                    .into_iter()
                    .map(|info| info.name)
                    .filter(|name| name.starts_with(&prefix))
                    .filter(|name| Some(name) != kept.as_ref() && !self.elsewhere.contains(name))
                    .collect(),
                Err(_) => Vec::new(),
            },
            (None, false) => Vec::new(),
        };
        for name in doomed {
            if let Err(error) = hypervisor.checkpoint_delete(job.vm.uuid, &name, false).await {
                // The next run repairs it; a restore point is not worth less for it.
                tracing::debug!(name, %error, "checkpoint not deleted");
            }
        }
        if let Err(error) = self.scratch.remove() {
            job.warn(error.to_string());
        }
    }
}
