//! A running VM: libvirt's pull-mode backup with a checkpoint, read over a Unix socket.
//!
//! The guest comes first: it is frozen for the instant of `begin` only, scratch space is watched while data moves, and
//! the job is given up before the guest could see an error.

use std::{path::PathBuf, time::Duration};

use futures::TryFutureExt;
use jiff::Timestamp;
use tokio::{
    sync::{broadcast, oneshot},
    time::Instant,
};
use virtward_decide::tracking::{BitmapFact, DiskDecision, DiskFacts};
use virtward_hypervisor::{BackupDisk, BackupServer, BackupSpec, DomainEvent, ErrorKind};
use virtward_model::{
    Disk, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind, TrackingState,
    VmState,
};
use virtward_nbd::ReconnectPolicy;
use virtward_repo::Attachment;

use super::{
    BackupMode, Job, Taken, attach, disks, quiesce,
    scratch::Scratch,
    select,
    session::{Session, checkpoint_spec, clear_leftovers, repair},
    store::{Access, DiskJob, Store},
    watch,
};
use crate::{Error, Phase, Result};

/// Backs up a running VM.
pub(super) async fn run(job: &mut Job<'_>) -> Result<RestorePoint> {
    let outcome = cut(job).await;
    watch::explain(job, outcome).await
}

async fn cut(job: &mut Job<'_>) -> Result<RestorePoint> {
    let (chosen, skipped) = select::select(&job.vm, &job.options.only_disks, &job.options.exclude_disks)?;
    let scratch = Scratch::of(job.env, job.vm.uuid);
    clear_leftovers(job, &scratch).await?;
    let (env, vm, state, options) = (job.env, job.vm.uuid, job.vm.state, job.options);
    let agent = async {
        match chosen.is_empty() {
            true => quiesce::Asked::nothing(),
            false => quiesce::ask_agent(env, vm, state, options).await,
        }
    };
    let thaw = async {
        if options.quiesce != QuiesceRequest::Off {
            env.hypervisor.prepare_thaw().await;
        }
    };
    let (agent, (), prepared) = futures::join!(agent, thaw, prepare(job, &chosen, scratch));
    let Prepared { attachments, tracked } = prepared?;
    let Some(Tracked { facts, decisions, mut session, store }) = tracked else {
        return definition_only(job, skipped, attachments).await;
    };
    let id = PointId::random();
    let events = job.env.hypervisor.events();
    let outcome = cut_and_copy(job, &mut session, &chosen, &facts, decisions, agent, &store, id, events).await;
    let outcome = match outcome {
        Ok((quiesce, taken, disks)) => {
            // What was copied becomes durable while the hypervisor ends the job.
            let (store, ()) = futures::join!(store.complete(attachments), session.end_job(job));
            let source = if job.options.mode == BackupMode::Warm { SourceKind::Warm } else { SourceKind::Hot };
            let taken = Taken { id, source, taken, quiesce, disks, skipped };
            match store {
                Ok(store) => publish(job, store, taken).await,
                Err(error) => Err(error),
            }
        }
        Err(error) => {
            session.end_job(job).await;
            Err(error)
        }
    };
    job.phase(Phase::CleaningUp);
    session.clean_up(job, outcome.is_ok()).await;
    outcome
}

struct Prepared<'a> {
    attachments: Vec<Attachment>,
    /// None if there is no disk.
    tracked: Option<Tracked<'a>>,
}

struct Tracked<'a> {
    facts: Vec<DiskFacts>,
    decisions: Vec<DiskDecision>,
    session: Session,
    store: Store<'a>,
}

/// Everything that can be done before the guest notices.
async fn prepare<'a>(job: &mut Job<'a>, chosen: &[Disk], scratch: Scratch) -> Result<Prepared<'a>> {
    let mut warnings = Vec::new();
    if chosen.is_empty() {
        let attachments = attach::gather(job.env, &job.vm, &mut warnings).await?;
        job.warnings.extend(warnings);
        return Ok(Prepared { attachments, tracked: None });
    }
    // Each is a few questions to the hypervisor or the repository, and none needs the answers of another.
    let (attachments, facts, known, store) = futures::try_join!(
        attach::gather(job.env, &job.vm, &mut warnings),
        facts(job, chosen),
        job.env.hypervisor.checkpoints(job.vm.uuid).map_err(Error::hyper("list checkpoints")),
        Store::open(job),
    )?;
    job.warnings.extend(warnings);
    let ours = job.checkpoint_prefix();
    let mut decisions = disks::decide(&facts, &job.history, &ours, job.options.full);
    let elsewhere = disks::kept_elsewhere(&job.history, &job.vm.disks, &facts);
    repair(job, known, &facts, &elsewhere, &mut decisions).await?;

    let owner = attachments
        .iter()
        .find(|item| item.name == attach::LIVE_XML)
        .and_then(|item| attach::qemu_owner(&String::from_utf8_lossy(&item.bytes)));
    let total = facts.iter().map(|disk| disk.size_bytes).sum();
    scratch.create(owner, job.options.scratch_reserve, total)?;
    scratch.make_images(owner, &facts).inspect_err(|_| {
        // Nothing uses it yet; what cannot be removed now, the next run removes.
        let _ = scratch.remove();
    })?;
    let session = Session { scratch, checkpoint: None, begun: false, elsewhere };
    Ok(Prepared { attachments, tracked: Some(Tracked { facts, decisions, session, store }) })
}

async fn publish(job: &Job<'_>, store: Store<'_>, taken: Taken) -> Result<RestorePoint> {
    if job.cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    job.publish(store, taken, Vec::new()).await
}

/// A VM without disks still has a definition worth keeping.
async fn definition_only(
    job: &mut Job<'_>,
    skipped: Vec<String>,
    attachments: Vec<Attachment>,
) -> Result<RestorePoint> {
    job.warn(format!("{} has no disk to back up; only its definition is in this restore point", job.vm.name));
    let store = Store::open(job).await?;
    let quiesce = QuiesceRecord {
        requested: job.options.quiesce,
        outcome: QuiesceOutcome::NotNeeded,
        frozen_ms: None,
        reason: None,
    };
    let id = PointId::random();
    let taken = Taken { id, source: SourceKind::Hot, taken: Timestamp::now(), quiesce, disks: Vec::new(), skipped };
    job.publish(store, taken, attachments).await
}

async fn facts(job: &Job<'_>, chosen: &[Disk]) -> Result<Vec<DiskFacts>> {
    let hypervisor = &job.env.hypervisor;
    let context = || format!("read the disks of {}", job.vm.name);
    let (sizes, bitmaps) = futures::try_join!(hypervisor.disk_sizes(job.vm.uuid), hypervisor.bitmaps(job.vm.uuid))
        .map_err(Error::hyper(context()))?;
    chosen
        .iter()
        .map(|disk| {
            let size_bytes = sizes
                .iter()
                .find(|(target, _)| target == &disk.target)
                .map(|(_, bytes)| *bytes)
                .ok_or_else(|| Error::SourceGone(format!("{} is not running any more", job.vm.name)))?;
            let untrackable =
                (disk.format != "qcow2").then(|| format!("{} images hold no persistent bitmap", disk.format));
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

type Cut = (QuiesceRecord, Timestamp, Vec<DiskRecord>);

#[expect(clippy::too_many_arguments, reason = "the one place where everything that was prepared comes together")]
async fn cut_and_copy(
    job: &mut Job<'_>,
    session: &mut Session,
    chosen: &[Disk],
    facts: &[DiskFacts],
    mut decisions: Vec<DiskDecision>,
    agent: quiesce::Asked,
    store: &Store<'_>,
    id: PointId,
    events: broadcast::Receiver<DomainEvent>,
) -> Result<Cut> {
    job.phase(Phase::Quiescing);
    let name = job.vm.name.clone();
    let quiesced = quiesce::freeze(job.env, job.vm.uuid, &name, agent, job.options).await?;
    let begun = begin(job, session, &mut decisions, id).await;
    let taken = Timestamp::now();
    // The cut is made: it is copied while the guest thaws, unless the thaw shows that it cannot be used.
    let (refuse, refused) = oneshot::channel::<()>();
    let thawed = async {
        let (quiesce, doubt) = quiesced.thaw().await;
        let usable = quiesce::check(&name, &quiesce);
        if usable.is_err() {
            let _ = refuse.send(());
        }
        (quiesce, doubt, usable)
    };
    let copied = async {
        begun?;
        let disks = cut_disks(job, session, chosen, facts, decisions)?;
        tokio::select! {
            records = store.disks(job, disks) => records,
            error = watch::watch(job, &session.scratch, events) => Err(error),
            Ok(()) = refused => Err(Error::Cancelled),
        }
    };
    let ((quiesce, doubt, usable), copied) = futures::join!(thawed, copied);
    usable?;
    if let Some(doubt) = doubt {
        job.warn(doubt);
    }
    if let (Some(reason), QuiesceRequest::Auto) = (&quiesce.reason, quiesce.requested) {
        job.warn(format!("not quiesced, so crash-consistent: {reason}"));
    }
    Ok((quiesce, taken, copied?))
}

/// Begins the job, with as much tracking as the hypervisor accepts: all of it, then full reads with a new checkpoint,
/// then without one.
async fn begin(job: &mut Job<'_>, session: &mut Session, decisions: &mut [DiskDecision], id: PointId) -> Result<()> {
    let hypervisor = job.env.hypervisor.clone();
    // A guest that its operator paused stays paused.
    let pause = job.options.mode == BackupMode::Warm && job.vm.state == VmState::Running;
    if !pause {
        return begin_with_fallback(job, session, decisions, id).await;
    }
    let guard = quiesce::Guard::start(job.env, job.vm.uuid, quiesce::Guards::Pause)
        .map_err(Error::io("start the process that resumes the guest if this one dies"))?;
    hypervisor.suspend(job.vm.uuid).await.map_err(Error::hyper("pause the guest for the cut"))?;
    let begun = begin_with_fallback(job, session, decisions, id).await;
    let deadline = Instant::now() + watch::HYPERVISOR_AWAY_MAX;
    loop {
        match hypervisor.resume(job.vm.uuid).await {
            Ok(()) => {
                if let Some(guard) = guard {
                    guard.dismiss().await;
                }
                return begun;
            }
            // A guest that stays paused is worse than a backup that takes its time.
            Err(error) if error.kind == ErrorKind::Unreachable && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return begun.and(Err(Error::hyper("resume the guest after the cut")(error))),
        }
    }
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
            return Err(Error::hyper(format!("begin the backup of {}", job.vm.name))(error));
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
        scratch_is_there: true,
    }
}

/// Where each disk of the cut is to be read.
fn cut_disks(
    job: &Job<'_>,
    session: &Session,
    chosen: &[Disk],
    facts: &[DiskFacts],
    decisions: Vec<DiskDecision>,
) -> Result<Vec<(DiskJob, Access)>> {
    let socket = session.scratch.socket();
    if !socket.exists() {
        return Err(Error::Refused(format!(
            "the backup's socket {} is not on this machine: {} runs on {}; run Virtward there",
            socket.display(),
            job.vm.name,
            job.host.name
        )));
    }
    let disks = chosen.iter().zip(facts).zip(decisions).map(|((disk, facts), decision)| {
        let disk_job = DiskJob {
            size_bytes: facts.size_bytes,
            format: disk.format.clone(),
            source_name: disk.source.path().unwrap_or(&disk.target).to_owned(),
            base: disks::previous_disk(&job.history, &disk.target).map(|(_, record)| record),
            dirty_context: decision.since.as_ref().map(|_| format!("qemu:dirty-bitmap:backup-{}", disk.target)),
            checkpoint: session.checkpoint.clone().filter(|_| decision.trackable),
            export: disk.target.clone(),
            decision,
        };
        // Never reconnect: whatever answers at this path later is another job, cut at another instant.
        (disk_job, Access::Export { socket: socket.clone(), reconnect: ReconnectPolicy::never() })
    });
    Ok(disks.collect())
}
