//! How each kind of job is done: from the record to a call of the engine or the repository, and what came of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use jiff::{Timestamp, tz::TimeZone};
use virtward_api::{BackupRequest, Code, JobResult, LogLevel, Problem, Quiesce, RestoredDisk, VerifyDepth, VmRef};
use virtward_decide::retention::{self, Protection, Verdict};
use virtward_engine::{
    BackupMode, BackupOptions, Cancel, Error as EngineError, Event, Hooks, Observer, Proxy, RestoreVmOptions,
    backup_vm_through, restore_vm,
};
use virtward_model::{Bytes, PointId, QuiesceRequest, RestorePoint, Retention};
use virtward_repo::{Error as RepoError, GcOptions, Repository, VerifyMode, VerifyOptions, WriterOptions};

use super::{
    observer::Watch,
    record::{Record, Work},
};
use crate::{
    daemon::Daemon,
    failures::{self, Result, blocking},
    moves,
    peers::proxy::Session,
};

/// Does a job.
pub async fn run(daemon: &Arc<Daemon>, record: &Record, watch: Arc<Watch>, cancel: &Cancel) -> Result<JobResult> {
    match &record.work {
        Work::Backup { .. } => backup(daemon, record, &watch, cancel).await,
        Work::Restore { request, point } => {
            let options = restore_options(request);
            let repository = daemon.repositories.find(Some(&record.job.repository))?.open().await?;
            let env = daemon.env()?;
            let made = restore_vm(&env, &repository, *point, &options, &*watch, cancel).await;
            let made = made.map_err(|error| failures::engine(&error))?;
            daemon.inventory.look_again();
            Ok(JobResult {
                point: Some(made.point.to_string()),
                stored_bytes: Some(made.disks.iter().map(|disk| disk.written_bytes).sum()),
                vm: Some(VmRef { uuid: made.uuid, name: made.vm }),
                is_started: Some(made.started),
                disks: made
                    .disks
                    .into_iter()
                    .map(|disk| RestoredDisk { target: disk.target, path: disk.path, size_bytes: disk.size_bytes })
                    .collect(),
                ..JobResult::default()
            })
        }
        Work::Verify { request, points } => {
            let mode = match request.mode {
                VerifyDepth::Ciphertext => VerifyMode::Ciphertext,
                VerifyDepth::Full => VerifyMode::Full,
            };
            let points = (!points.is_empty()).then(|| points.clone());
            verify(daemon, record, VerifyOptions { mode, percent: request.percent, points, threads: 0 }, watch).await
        }
        Work::Copy { to, retention } => copy(daemon, record, to, retention, watch).await,
        Work::Prune { retention } => prune(daemon, record, retention, cancel).await,
        Work::Gc {} => gc(daemon, record, watch).await,
        Work::Migrate { request, operation } => {
            moves::migrate(daemon, record, (request, *operation), &*watch, cancel).await
        }
        Work::MoveDisk { request } => moves::move_disk(daemon, record, request, &*watch, cancel).await,
        Work::Drain { request } => moves::drain(daemon, record, request, &*watch, cancel).await,
        Work::Balance { plan, parallel } => moves::rebalance(daemon, record, (plan, *parallel), &*watch, cancel).await,
    }
}

/// Options of a restore.
pub fn restore_options(request: &virtward_api::RestoreRequest) -> RestoreVmOptions {
    RestoreVmOptions {
        name: request.name.clone(),
        start: request.start,
        overwrite: request.overwrite,
        disk_dir: request.disk_dir.as_ref().map(PathBuf::from),
        threads: 0,
    }
}

async fn backup(daemon: &Daemon, record: &Record, watch: &Watch, cancel: &Cancel) -> Result<JobResult> {
    let Work::Backup { request, hooks, timeout, .. } = &record.work else {
        return Err(Problem::new(Code::Internal, "not a backup"));
    };
    let vm = record.job.vm.as_ref().map(|vm| vm.uuid.to_string()).unwrap_or_else(|| request.vm.clone());
    let mut options = options(request, &daemon.config().backup);
    options.tags.extend(record.job.origin.policy.as_deref().map(policy_tag));
    if hooks != &virtward_model::policy::Hooks::default() {
        options.hooks = Hooks {
            pre_freeze: hooks.pre_freeze.clone(),
            post_thaw: hooks.post_thaw.clone(),
            timeout: hooks.timeout.map(|limit| Duration::from_secs(limit.0)),
        };
    }
    let entry = daemon.repositories.find(Some(&record.job.repository))?;
    let repository = entry.open().await?;
    let env = daemon.env()?;
    let session = through(daemon, record, (&repository, &options), watch, cancel).await?;
    let proxy = session.as_ref().map(|session| session as &dyn Proxy);
    let run = backup_vm_through(proxy, &env, &repository, &vm, &options, watch, cancel);
    tokio::pin!(run);
    let mut timed_out = false;
    let outcome = match timeout {
        None => run.await,
        Some(limit) => {
            tokio::select! {
                outcome = &mut run => outcome,
                () = tokio::time::sleep(Duration::from_secs(limit.0)) => {
                    timed_out = true;
                    cancel.cancel();
                    // It cleans up before it ends.
                    (&mut run).await
                }
            }
        }
    };
    match outcome {
        Ok(point) => Ok(of_point(&point)),
        Err(EngineError::Cancelled) if timed_out => {
            let limit = timeout.unwrap_or_default();
            Err(Problem::new(Code::TimedOut, format!("the backup took longer than {limit} and was cancelled"))
                .hint("raise timeout in the policy, or the bandwidth"))
        }
        Err(error @ EngineError::Proxy { .. }) => {
            let problem = session.as_ref().and_then(Session::problem);
            Err(problem.unwrap_or_else(|| failures::engine(&error)))
        }
        Err(error) => Err(failures::engine(&error)),
    }
}

/// The session with the proxy that was chosen. Where there is none to be had, this host does what it would have done.
async fn through(
    daemon: &Daemon,
    record: &Record,
    (repository, options): (&Repository, &BackupOptions),
    watch: &Watch,
    cancel: &Cancel,
) -> Result<Option<Session>> {
    let (job, named) = (&record.job, record.work.proxies());
    let warn = |text: String| watch.event("", Event::Warning(&text));
    let Some(host) = &job.proxy else {
        if !named.is_empty() && !named.contains(&job.host) {
            warn(format!("no proxy answers ({}): {} reads and stores this backup", named.join(", "), job.host));
        }
        return Ok(None);
    };
    let node = daemon.fleet().node_of(host).unwrap_or(host).to_owned();
    let vm = job.vm.as_ref().map(|vm| vm.name.as_str()).unwrap_or_default();
    let whereto = (job.repository.as_str(), repository);
    let begun = tokio::select! {
        begun = Session::begin(&daemon.peers, (&node, host), whereto, options.compression, vm) => begun,
        () = cancel.cancelled() => return Err(failures::engine(&EngineError::Cancelled)),
    };
    match begun {
        Ok(session) => {
            daemon.jobs.note(job.id, LogLevel::Info, format!("{host} reads and stores it"));
            Ok(Some(session))
        }
        Err(problem) => {
            warn(format!(
                "proxy {host} does not do it ({}): {} reads and stores this backup",
                problem.detail, job.host
            ));
            if let Err(problem) = daemon.jobs.without_proxy(job.id).await {
                tracing::warn!(job = %job.id, %problem, "that a job does without its proxy was not recorded");
            }
            Ok(None)
        }
    }
}

fn of_point(point: &RestorePoint) -> JobResult {
    let kind = serde_json::to_value(point.kind).ok();
    JobResult {
        point: Some(point.id.to_string()),
        kind: kind.as_ref().and_then(|kind| kind.as_str()).map(str::to_owned),
        read_bytes: Some(point.disks.iter().map(|disk| disk.read_bytes).sum()),
        stored_bytes: Some(point.disks.iter().map(|disk| disk.stored_bytes).sum()),
        ..JobResult::default()
    }
}

fn options(request: &BackupRequest, defaults: &BackupOptions) -> BackupOptions {
    BackupOptions {
        mode: if request.warm { BackupMode::Warm } else { defaults.mode },
        quiesce: match request.quiesce {
            Some(Quiesce::Auto) => QuiesceRequest::Auto,
            Some(Quiesce::Required) => QuiesceRequest::Required,
            Some(Quiesce::Off) => QuiesceRequest::Off,
            None => defaults.quiesce,
        },
        bandwidth: request.bandwidth_bytes_s.map(Bytes).or(defaults.bandwidth),
        full: request.full,
        only_disks: request.only_disks.clone(),
        exclude_disks: request.exclude_disks.clone(),
        tags: request.tags.clone(),
        ..defaults.clone()
    }
}

async fn verify(daemon: &Daemon, record: &Record, options: VerifyOptions, watch: Arc<Watch>) -> Result<JobResult> {
    let repository = daemon.repositories.find(Some(&record.job.repository))?.open().await?;
    let report = blocking(move || repository.verify(&options, &*watch).map_err(|error| failures::repo(&error))).await?;
    if !report.is_ok() {
        let (objects, points) = (report.damaged.len(), report.damaged_points.len());
        return Err(Problem::new(Code::Damaged, format!("{objects} objects and {points} restore points are damaged"))
            .hint("virtward backup verify --all shows what is lost; virtward repo heal may mend it from a copy"));
    }
    Ok(JobResult {
        points: Some(report.points),
        read_bytes: Some(report.bytes_read),
        damaged: Some(0),
        ..JobResult::default()
    })
}

/// The tag of restore points that a policy made. Its rules are for them alone: what a person or another policy made of
/// the same VM is kept for reasons of its own.
fn policy_tag(policy: &str) -> String {
    format!("policy:{policy}")
}

/// The restore points of the record's VM that its policy made.
async fn points_of(record: &Record, repository: &virtward_repo::Repository) -> Result<Vec<RestorePoint>> {
    let vm = record.job.vm.as_ref().map(|vm| vm.uuid);
    let tag = record.job.origin.policy.as_deref().map(policy_tag);
    let repository = repository.clone();
    let list = blocking(move || repository.points().map_err(|error| failures::repo(&error))).await?;
    let is_ours =
        |point: &RestorePoint| Some(point.vm_uuid) == vm && tag.as_ref().is_none_or(|tag| point.tags.contains(tag));
    Ok(list.points.into_iter().filter(is_ours).collect())
}

/// Which of the points here are to be there: those that the rules there will keep, or every copy would bring back what
/// the rules removed.
fn worth_copying(here: &[RestorePoint], there: &[RestorePoint], rules: &Retention) -> Result<Vec<PointId>> {
    let origin = |point: &RestorePoint| point.copied_from.as_ref().map_or(point.id, |from| from.point);
    let known: BTreeSet<PointId> = here.iter().map(|point| point.id).collect();
    let gone_here = there.iter().filter(|point| !known.contains(&origin(point)));
    let kept = match rules.is_empty() {
        true => known.clone(),
        false => {
            let verdicts = verdicts(here.iter().chain(gone_here), rules, BTreeMap::new())?;
            verdicts.iter().filter(|verdict| verdict.is_kept()).map(|verdict| verdict.point.id).collect()
        }
    };
    Ok(here.iter().map(|point| point.id).filter(|id| kept.contains(id)).collect())
}

fn verdicts<'a>(
    points: impl Iterator<Item = &'a RestorePoint>,
    rules: &Retention,
    held: BTreeMap<PointId, String>,
) -> Result<Vec<Verdict<'a>>> {
    let protection = Protection { min_age: None, held, newest_may_go: false };
    retention::decide(points, rules, &protection, &TimeZone::system(), Timestamp::now())
        .map_err(|error| Problem::new(Code::Conflict, error.to_string()))
}

async fn copy(daemon: &Daemon, record: &Record, to: &str, rules: &Retention, watch: Arc<Watch>) -> Result<JobResult> {
    let repository = daemon.repositories.find(Some(&record.job.repository))?.open().await?;
    let other = daemon.repositories.find(Some(to))?.open().await?;
    let (here, there) = (points_of(record, &repository).await?, points_of(record, &other).await?);
    let ids = worth_copying(&here, &there, rules)?;
    let compression = daemon.config().backup.compression;
    let report = blocking(move || {
        let options = WriterOptions { compression, ..WriterOptions::default() };
        repository.copy_points(&other, &ids, &options, &*watch, &mut |_| {}).map_err(|error| failures::repo(&error))
    })
    .await?;
    // Somebody who deleted a restore point meanwhile did not want it copied either.
    let failed: Vec<_> =
        report.failed.iter().filter(|(_, error)| !matches!(error, RepoError::NoPoint { .. })).collect();
    if let Some((id, error)) = failed.first() {
        let rest = failed.len();
        return Err(Problem::new(Code::Damaged, format!("{rest} restore points were not copied; {id}: {error}"))
            .hint("virtward backup verify shows what is damaged; virtward repo heal may mend it"));
    }
    Ok(JobResult {
        points: Some(report.copied.len() as u64),
        read_bytes: Some(report.copied.iter().map(|copied| copied.read_bytes).sum()),
        stored_bytes: Some(report.copied.iter().map(|copied| copied.stored_bytes).sum()),
        ..JobResult::default()
    })
}

async fn prune(daemon: &Daemon, record: &Record, rules: &Retention, cancel: &Cancel) -> Result<JobResult> {
    let repository = daemon.repositories.find(Some(&record.job.repository))?.open().await?;
    let points = points_of(record, &repository).await?;
    let holds = repository.clone();
    let holds = blocking(move || holds.holds().map_err(|error| failures::repo(&error))).await?;
    let held = holds.into_iter().map(|(id, hold)| (id, hold.reason.clone())).collect();
    let verdicts = verdicts(points.iter(), rules, held)?;
    let going = verdicts.iter().filter(|verdict| !verdict.is_kept()).map(|verdict| verdict.point.id);
    let mut deleted = 0;
    for id in going {
        if cancel.is_cancelled() {
            return Err(Problem::new(Code::Cancelled, format!("cancelled; {deleted} restore points were deleted")));
        }
        let repository = repository.clone();
        match blocking(move || Ok(repository.delete_point(id))).await? {
            Ok(()) => deleted += 1,
            // Somebody else deleted or held it meanwhile.
            Err(RepoError::NoPoint { .. } | RepoError::Held { .. }) => {}
            Err(error) => return Err(failures::repo(&error)),
        }
    }
    Ok(JobResult { points: Some(deleted), ..JobResult::default() })
}

async fn gc(daemon: &Daemon, record: &Record, watch: Arc<Watch>) -> Result<JobResult> {
    let repository = daemon.repositories.find(Some(&record.job.repository))?.open().await?;
    let collect =
        move || repository.collect_garbage(&GcOptions::default(), &*watch).map_err(|error| failures::repo(&error));
    let report = blocking(collect).await?;
    if let Some(note) = report.notes.first() {
        return Err(Problem::new(Code::Damaged, format!("some of what is not needed could not be collected: {note}"))
            .hint("virtward repo gc names all of it; virtward backup verify shows what is damaged"));
    }
    Ok(JobResult {
        points: Some(report.expired_points.len() as u64),
        freed_bytes: Some(report.freed_bytes),
        pending_bytes: Some(report.pending_bytes),
        ..JobResult::default()
    })
}
