//! A running VM: libvirt's pull-mode backup with a checkpoint, read over a Unix socket.
//!
//! The guest comes first: it is frozen for the instant of `begin` only, scratch space is watched while data moves, and
//! the job is given up before the guest could see an error.

use std::{path::PathBuf, time::Duration};

use jiff::Timestamp;
use tokio::{sync::broadcast, time::Instant};
use virtward_decide::tracking::{BitmapFact, CheckpointFact, DiskDecision, DiskFacts, Repair, repairs};
use virtward_hypervisor::{
    BackupDisk, BackupServer, BackupSpec, CheckpointSpec, DomainEvent, DomainEventKind, ErrorKind,
};
use virtward_model::{
    Disk, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind, TrackingState,
};
use virtward_nbd::{Address, Client, Options, ReconnectPolicy};
use virtward_repo::{Attachment, Writer};

use super::{
    BackupMode, Job, Taken, attach,
    copy::{ALLOCATION, Flow, Source},
    disks::{self, CHUNK_BYTES, DiskJob},
    quiesce,
    scratch::Scratch,
    select,
};
use crate::{Error, Phase, Result};

const WATCH_INTERVAL: Duration = Duration::from_millis(500);
/// How long the hypervisor may be away (libvirtd restarting) before the job is given up.
const HYPERVISOR_AWAY_MAX: Duration = Duration::from_secs(60);

/// Backs up a running VM.
pub(super) async fn run(job: &mut Job<'_>) -> Result<RestorePoint> {
    let (chosen, skipped) = select::select(&job.vm, &job.options.only_disks, &job.options.exclude_disks)?;
    let scratch = Scratch::of(job.env, job.vm.uuid);
    clear_leftovers(job, &scratch).await?;
    let attachments = attach::gather(job.env, &job.vm, &mut job.warnings).await?;
    if chosen.is_empty() {
        return definition_only(job, skipped, attachments).await;
    }
    let facts = facts(job, &chosen).await?;
    let ours = job.checkpoint_prefix();
    let mut decisions = disks::decide(&facts, job.previous.as_ref(), &ours, job.options.full);
    repair(job, &facts, &mut decisions).await?;

    let owner = attachments
        .iter()
        .find(|item| item.name == attach::LIVE_XML)
        .and_then(|item| attach::qemu_owner(&String::from_utf8_lossy(&item.bytes)));
    let total = facts.iter().map(|disk| disk.size_bytes).sum();
    scratch.create(owner, job.options.scratch_reserve, total)?;
    let writer = job.writer().await?;
    let id = PointId::random();
    let events = job.env.hypervisor.events();
    let mut session = Session { scratch, checkpoint: None, begun: false };
    let outcome = cut_and_copy(job, &mut session, &chosen, &facts, decisions, &writer, id, events).await;
    session.end_job(job).await;
    let outcome = match outcome {
        Ok((quiesce, taken, disks)) => {
            let source = if job.options.mode == BackupMode::Warm { SourceKind::Warm } else { SourceKind::Hot };
            let taken = Taken { id, source, taken, quiesce, disks, skipped };
            publish(job, writer, taken, attachments).await
        }
        Err(error) => Err(error),
    };
    job.phase(Phase::CleaningUp);
    session.clean_up(job, outcome.is_ok()).await;
    outcome
}

async fn publish(
    job: &Job<'_>,
    writer: Writer,
    taken: Taken,
    attachments: Vec<Attachment>,
) -> Result<RestorePoint> {
    if job.cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    job.publish(writer, taken, attachments).await
}

/// A VM without disks still has a definition worth keeping.
async fn definition_only(
    job: &mut Job<'_>,
    skipped: Vec<String>,
    attachments: Vec<Attachment>,
) -> Result<RestorePoint> {
    job.warn(format!("{} has no disk to back up; only its definition is in this restore point", job.vm.name));
    let writer = job.writer().await?;
    let quiesce = QuiesceRecord {
        requested: job.options.quiesce,
        outcome: QuiesceOutcome::NotNeeded,
        frozen_ms: None,
        reason: None,
    };
    let id = PointId::random();
    let taken =
        Taken { id, source: SourceKind::Hot, taken: Timestamp::now(), quiesce, disks: Vec::new(), skipped };
    job.publish(writer, taken, attachments).await
}

/// Removes what a killed run of ours left; refuses to touch another tool's job.
async fn clear_leftovers(job: &mut Job<'_>, scratch: &Scratch) -> Result<()> {
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
    hypervisor.abort_job(job.vm.uuid).await.map_err(Error::hyper("end the backup job of a killed run"))?;
    job.warn("the backup job of an earlier, interrupted run was ended".into());
    Ok(())
}

async fn facts(job: &Job<'_>, chosen: &[Disk]) -> Result<Vec<DiskFacts>> {
    let hypervisor = &job.env.hypervisor;
    let context = || format!("read the disks of {}", job.vm.name);
    let stats = hypervisor.stats().await.map_err(Error::hyper(context()))?;
    let stats = stats.into_iter().find(|domain| domain.uuid == job.vm.uuid);
    let bitmaps = hypervisor.bitmaps(job.vm.uuid).await.map_err(Error::hyper(context()))?;
    chosen
        .iter()
        .map(|disk| {
            let size_bytes = stats
                .iter()
                .flat_map(|domain| &domain.disks)
                .find(|stat| stat.target == disk.target)
                .map(|stat| stat.capacity_bytes)
                .ok_or_else(|| Error::SourceGone(format!("{} is not running any more", job.vm.name)))?;
            let untrackable = (disk.format != "qcow2").then(|| format!("{} images hold no persistent bitmap", disk.format));
            let bitmaps = bitmaps
                .iter()
                .filter(|bitmap| bitmap.target == disk.target && bitmap.persistent)
                .map(|bitmap| BitmapFact {
                    name: bitmap.name.clone(),
                    broken: bitmap.inconsistent,
                    recording: bitmap.recording,
                })
                .collect();
            Ok(DiskFacts { target: disk.target.clone(), size_bytes, untrackable, bitmaps })
        })
        .collect()
}

/// Puts checkpoints and bitmaps right. A repair that fails costs tracking, never the backup.
async fn repair(job: &mut Job<'_>, facts: &[DiskFacts], decisions: &mut [DiskDecision]) -> Result<()> {
    let hypervisor = &job.env.hypervisor;
    let uuid = job.vm.uuid;
    let known = hypervisor.checkpoints(uuid).await.map_err(Error::hyper("list checkpoints"))?;
    let known: Vec<CheckpointFact> = known
        .into_iter()
        .map(|info| CheckpointFact {
            name: info.name,
            targets: info.disks.into_iter().map(|(target, _)| target).collect(),
        })
        .collect();
    for repair in repairs(facts, &known, decisions, &job.checkpoint_prefix()) {
        let done = match &repair {
            Repair::ForgetCheckpoint { name } => hypervisor.checkpoint_delete(uuid, name, true).await,
            Repair::DeleteCheckpoint { name } => match hypervisor.checkpoint_delete(uuid, name, false).await {
                Err(_) => hypervisor.checkpoint_delete(uuid, name, true).await,
                done => done,
            },
            Repair::RemoveBitmap { target, bitmap } => hypervisor.bitmap_remove(uuid, target, bitmap).await,
            Repair::Redefine { name, targets } => {
                let spec = checkpoint_spec(name.clone(), targets.clone());
                let created = job.previous.as_ref().map_or(0, |point| point.taken.as_second());
                hypervisor.checkpoint_redefine(uuid, &spec, created).await
            }
        };
        let Err(error) = done else { continue };
        tracing::debug!(?repair, %error, "repair of change tracking failed");
        if let Repair::Redefine { name, .. } = &repair {
            for decision in decisions.iter_mut().filter(|decision| decision.since.as_ref() == Some(name)) {
                decision.since = None;
                decision.state = TrackingState::Missing;
                decision.reason = Some(format!("checkpoint {name} could not be used again: {}", error.message));
            }
        }
    }
    Ok(())
}

fn checkpoint_spec(name: String, disks: Vec<String>) -> CheckpointSpec {
    CheckpointSpec { name, description: "Virtward change tracking".into(), disks }
}

/// What exists on the hypervisor for this run and must be ended.
struct Session {
    scratch: Scratch,
    checkpoint: Option<String>,
    begun: bool,
}

impl Session {
    /// Ends the backup job, so that the guest pays no longer for it.
    async fn end_job(&mut self, job: &mut Job<'_>) {
        if !self.begun {
            return;
        }
        let deadline = Instant::now() + HYPERVISOR_AWAY_MAX;
        loop {
            match job.env.hypervisor.abort_job(job.vm.uuid).await {
                Ok(()) => break,
                // No job or no domain any more: what was wanted.
                Err(error) if matches!(error.kind, ErrorKind::WrongState | ErrorKind::NoDomain | ErrorKind::Invalid) => break,
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
    }

    /// Keeps the checkpoint that the published restore point (new or previous) needs and removes the others of ours.
    async fn clean_up(&mut self, job: &mut Job<'_>, published: bool) {
        let hypervisor = &job.env.hypervisor;
        let prefix = job.checkpoint_prefix();
        let doomed: Vec<String> = match (&self.checkpoint, published) {
            (Some(new), false) => vec![new.clone()],
            (kept, true) => match hypervisor.checkpoints(job.vm.uuid).await {
                Ok(known) => known
                    .into_iter()
                    .map(|info| info.name)
                    .filter(|name| name.starts_with(&prefix) && Some(name) != kept.as_ref())
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

type Cut = (QuiesceRecord, Timestamp, Vec<DiskRecord>);

#[expect(clippy::too_many_arguments, reason = "the one place where everything that was prepared comes together")]
async fn cut_and_copy(
    job: &mut Job<'_>,
    session: &mut Session,
    chosen: &[Disk],
    facts: &[DiskFacts],
    mut decisions: Vec<DiskDecision>,
    writer: &Writer,
    id: PointId,
    events: broadcast::Receiver<DomainEvent>,
) -> Result<Cut> {
    job.phase(Phase::Quiescing);
    let name = job.vm.name.clone();
    let quiesced = quiesce::freeze(job.env, job.vm.uuid, &name, job.options).await?;
    let begun = begin(job, session, &mut decisions, id).await;
    let taken = Timestamp::now();
    let (quiesce, doubt) = quiesced.thaw().await;
    begun?;
    if let Some(doubt) = doubt {
        job.warn(doubt);
    }
    if let (Some(reason), QuiesceRequest::Auto) = (&quiesce.reason, quiesce.requested) {
        job.warn(format!("not quiesced, so crash-consistent: {reason}"));
    }

    job.phase(Phase::Copying);
    let flow = Flow::new(job.options.bandwidth.map(|rate| rate.get()), job.observer, &name, job.cancel);
    let socket = session.scratch.socket();
    let mut sources = Vec::new();
    for ((disk, facts), decision) in chosen.iter().zip(facts).zip(decisions) {
        sources.push(open(job, disk, facts, decision, session.checkpoint.as_ref(), &socket).await?);
    }
    let copied = tokio::select! {
        records = disks::store(writer, sources, job.options.sample_regions, &flow) => records,
        error = watch(job, &session.scratch, events) => Err(error),
    };
    match copied {
        Ok(records) => Ok((quiesce, taken, records)),
        // A broken connection is a symptom; the cause is what became of the VM.
        Err(error @ (Error::Nbd { .. } | Error::Hypervisor { .. })) => Err(gone(job).await.unwrap_or(error)),
        Err(error) => Err(error),
    }
}

/// Begins the job, with as much tracking as the hypervisor accepts: all of it, then full reads with a new checkpoint,
/// then without one.
async fn begin(job: &mut Job<'_>, session: &mut Session, decisions: &mut [DiskDecision], id: PointId) -> Result<()> {
    let hypervisor = job.env.hypervisor.clone();
    let warm = job.options.mode == BackupMode::Warm;
    if warm {
        hypervisor.suspend(job.vm.uuid).await.map_err(Error::hyper("pause the guest for the cut"))?;
    }
    let begun = begin_with_fallback(job, session, decisions, id).await;
    if warm {
        hypervisor.resume(job.vm.uuid).await.map_err(Error::hyper("resume the guest after the cut"))?;
    }
    begun
}

async fn begin_with_fallback(
    job: &mut Job<'_>,
    session: &mut Session,
    decisions: &mut [DiskDecision],
    id: PointId,
) -> Result<()> {
    let new = job.checkpoint_name(id);
    loop {
        let trackable: Vec<String> =
            decisions.iter().filter(|disk| disk.trackable).map(|disk| disk.target.clone()).collect();
        let checkpoint = (!trackable.is_empty()).then(|| checkpoint_spec(new.clone(), trackable));
        let spec = backup_spec(&session.scratch, decisions);
        let begun = job.env.hypervisor.backup_begin(job.vm.uuid, &spec, checkpoint.as_ref()).await;
        let Err(error) = begun else {
            session.begun = true;
            session.checkpoint = checkpoint.map(|spec| spec.name);
            return Ok(());
        };
        // The hypervisor may have made the checkpoint before it failed.
        if checkpoint.is_some() {
            let _ = job.env.hypervisor.checkpoint_delete(job.vm.uuid, &new, false).await;
        }
        let hopeless = matches!(
            error.kind,
            ErrorKind::Busy | ErrorKind::Unreachable | ErrorKind::NoDomain | ErrorKind::WrongState | ErrorKind::Denied
        );
        if error.kind == ErrorKind::Busy {
            return Err(Error::Busy(format!(
                "{} is busy with another job (migration, snapshot, backup of another tool): {}",
                job.vm.name, error.message
            )));
        }
        let incremental = decisions.iter().any(|disk| disk.since.is_some());
        if hopeless || (!incremental && checkpoint.is_none()) {
            let gone = if hopeless { gone(job).await } else { None };
            return Err(gone.unwrap_or_else(|| Error::hyper(format!("begin the backup of {}", job.vm.name))(error)));
        }
        for disk in decisions.iter_mut() {
            if incremental && disk.since.take().is_some() {
                disk.state = TrackingState::Missing;
                disk.reason = Some(format!("the hypervisor refused the bitmap: {}", error.message));
            } else if !incremental && disk.trackable {
                disk.trackable = false;
                disk.state = TrackingState::Unsupported;
                disk.reason = Some(format!("the hypervisor refused a checkpoint: {}", error.message));
            }
        }
    }
}

fn backup_spec(scratch: &Scratch, decisions: &[DiskDecision]) -> BackupSpec {
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    BackupSpec {
        server: BackupServer::Unix { path: text(scratch.socket()) },
        disks: decisions
            .iter()
            .map(|disk| BackupDisk {
                target: disk.target.clone(),
                incremental: disk.since.clone(),
                scratch: text(scratch.image(&disk.target)),
            })
            .collect(),
    }
}

async fn open(
    job: &Job<'_>,
    disk: &Disk,
    facts: &DiskFacts,
    decision: DiskDecision,
    checkpoint: Option<&String>,
    socket: &std::path::Path,
) -> Result<(DiskJob, Source)> {
    if !socket.exists() {
        return Err(Error::Refused(format!(
            "the backup's socket {} is not on this machine: {} runs on {}; run Virtward there",
            socket.display(),
            job.vm.name,
            job.host.name
        )));
    }
    let dirty_context = decision.since.as_ref().map(|_| format!("qemu:dirty-bitmap:backup-{}", disk.target));
    let contexts = [Some(ALLOCATION.to_owned()), dirty_context.clone()].into_iter().flatten().collect();
    // Never reconnect: whatever answers at this path later is another job, cut at another instant.
    let reconnect = ReconnectPolicy::never();
    let options = Options { export: disk.target.clone(), contexts, reconnect, ..Options::default() };
    let client = Client::connect(&Address::Unix(socket.to_owned()), options)
        .await
        .map_err(Error::nbd(format!("connect to the backup of {} disk {}", job.vm.name, disk.target)))?;
    let size_bytes = client.info().size_bytes;
    let allocation = client.info().contexts.iter().any(|context| context == ALLOCATION);
    debug_assert_eq!(size_bytes, facts.size_bytes);
    let base = disks::previous_disk(job.previous.as_ref(), &disk.target).map(|(_, record)| record);
    let disk_job = DiskJob {
        size_bytes,
        format: disk.format.clone(),
        source_name: disk.source.path().unwrap_or(&disk.target).to_owned(),
        base,
        dirty_context,
        checkpoint: checkpoint.filter(|_| decision.trackable).cloned(),
        decision,
    };
    Ok((disk_job, Source { client, size_bytes, chunk_bytes: CHUNK_BYTES, allocation }))
}

/// Resolves with the reason to give up: the VM went away, its job was ended by others, or scratch space runs low.
async fn watch(job: &Job<'_>, scratch: &Scratch, mut events: broadcast::Receiver<DomainEvent>) -> Error {
    let mut tick = tokio::time::interval(WATCH_INTERVAL);
    let mut away_since: Option<Instant> = None;
    loop {
        tokio::select! {
            () = job.cancel.cancelled() => return Error::Cancelled,
            event = events.recv() => {
                match event {
                    Ok(DomainEvent { uuid, kind: DomainEventKind::Stopped { detail }, .. }) if uuid == job.vm.uuid => {
                        return stopped(job, &detail);
                    }
                    // The driver is closing; only the ticks are left.
                    Err(broadcast::error::RecvError::Closed) => { tick.tick().await; }
                    _ => {}
                }
                continue;
            }
            _ = tick.tick() => {}
        }
        match scratch.free() {
            Ok(free) if free < job.options.scratch_reserve.get() => {
                return Error::GuestFirst(format!(
                    "the backup of {} was given up: scratch space is down to {} bytes free, and the guest would be \
                     the next to feel it. Free space in the scratch directory, back up at a quieter time, or raise \
                     --bandwidth",
                    job.vm.name, free
                ));
            }
            _ => {}
        }
        match job.env.hypervisor.backup_xml(job.vm.uuid).await {
            Ok(Some(_)) => away_since = None,
            Ok(None) => {
                let fallback = || {
                    Error::SourceGone(format!("the backup job of {} was ended by someone else", job.vm.name))
                };
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
        "crashed" => "crashed",
        "destroyed" => "was powered off",
        _ => "was shut down",
    };
    Error::SourceGone(format!("{} {what} during the backup", job.vm.name))
}

/// What became of the VM, if it does not run here any more.
async fn gone(job: &Job<'_>) -> Option<Error> {
    match job.env.hypervisor.lookup(&job.vm.uuid.to_string()).await {
        Ok(vm) if vm.state.is_active() => None,
        Ok(_) => Some(stopped(job, "shutdown")),
        Err(error) if error.kind == ErrorKind::NoDomain => {
            Some(Error::SourceGone(format!("{} was deleted during the backup", job.vm.name)))
        }
        Err(_) => None,
    }
}
