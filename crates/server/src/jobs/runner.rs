//! Lets queued jobs of this host run: as many as it may, one per VM as the claims on it say, in the order in which they
//! were asked for. One task decides; every job is a task of its own that it owns.
//!
//! A VM that another program of ours holds (the command line) is waited for. What was found running when the daemon
//! started is interrupted: a policy's run is planned anew by the scheduler, another one is asked for again here, but for
//! a restore, which a person has to want again.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::task::JoinSet;
use virtward_api::{
    Code, Job, JobError, JobKind, JobResult, JobState, LogLevel, Maintenance, Problem, Said, Saying, Severity,
};
use virtward_engine::Cancel;
use virtward_model::{Policy, Seconds};

use super::{
    Live, exec,
    observer::Watch,
    queue,
    record::{Lane, NewJob, Place, Record, Work},
};
use crate::{
    cluster::claims::{self, Answer},
    daemon::Daemon,
    events::Note,
    failures::{self, Result},
    repositories::Entry,
    said::{self, Sentence},
    views::Views,
};

/// Between two looks at the queue when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// Between two tries of a VM that another program holds, and how long that is tried.
const BUSY_AGAIN: SignedDuration = SignedDuration::from_secs(5);
const BUSY_MAX: SignedDuration = SignedDuration::from_mins(30);
/// How long after the start jobs wait for the first sight of the host: libvirt may come up later than the daemon does.
const FIRST_SIGHT_MAX: SignedDuration = SignedDuration::from_mins(5);
/// Longest wait for a repository to name its restore points again.
const REREAD_WITHIN: Duration = Duration::from_secs(5);
/// Between two tries to record what a job did.
const PERSIST_AGAIN: Duration = Duration::from_secs(1);
/// VMs and disks of a host that move at the same time.
const MOVES_MAX: usize = 4;
/// Tries of a job that was interrupted.
const ATTEMPTS_MAX: u32 = 3;

/// Takes care of jobs that a daemon left behind when it ended.
pub async fn recover(daemon: &Daemon) {
    let jobs = &daemon.jobs;
    let left: Vec<Arc<Record>> = jobs
        .records()
        .into_iter()
        .filter(|record| jobs.is_mine(record) && record.job.state == JobState::Running)
        .collect();
    for record in left {
        let again =
            record.work.is_repeatable() && record.job.origin.due.is_none() && record.job.origin.attempt < ATTEMPTS_MAX;
        let by_policy = record.job.origin.due.is_some();
        let hint = match (by_policy, again) {
            (true, _) => "the scheduler runs it again".to_owned(),
            (_, true) => "it was asked for again".to_owned(),
            _ => "ask for it again if it is still wanted".to_owned(),
        };
        let message = "the daemon ended while this job ran".to_owned();
        let error = JobError { code: Code::Interrupted, message, hint: Some(hint), retry_at: None };
        match jobs.finish(record.job.id, JobState::Interrupted, Some(error), None).await {
            Ok(record) => told(daemon, &record.job),
            Err(problem) => {
                tracing::error!(job = %record.job.id, %problem, "an interrupted job could not be recorded");
                continue;
            }
        }
        if again {
            let mut origin = record.job.origin.clone();
            (origin.attempt, origin.after) = (origin.attempt + 1, Some(record.job.id));
            let new = NewJob {
                work: record.work.clone(),
                vm: record.job.vm.clone(),
                repository: record.job.repository.clone(),
                origin,
                proxy: None,
            };
            submit(daemon, new).await;
        }
    }
}

async fn submit(daemon: &Daemon, new: NewJob) {
    let place = daemon.place_for(&new);
    if let Err(problem) = daemon.jobs.submit(new, &place, None, Vec::new()).await {
        tracing::error!(%problem, "a job could not be asked for");
    }
}

/// Runs jobs until cancelled; then stops those that run, and waits for them as long as the configuration says.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let mut tasks: JoinSet<()> = JoinSet::new();
    while !cancel.is_cancelled() {
        start_some(&daemon, &mut tasks).await;
        daemon.jobs.store_logs().await;
        tokio::select! {
            () = daemon.jobs.wake.notified() => {}
            () = tokio::time::sleep(TICK) => {}
            Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a job's task ended early");
                }
            }
            () = cancel.cancelled() => break,
        }
    }
    for live in daemon.jobs.live().values() {
        live.cancel.cancel();
    }
    // A result that cannot be recorded now is lost with this process; the next start finds the job interrupted.
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(daemon.config().stop_timeout, all).await.is_err() {
        tracing::error!("jobs did not stop in time; the next start finds them interrupted");
    }
}

async fn start_some(daemon: &Arc<Daemon>, tasks: &mut JoinSet<()>) {
    let jobs = &daemon.jobs;
    let records = jobs.records();
    let mut running: Vec<Arc<Record>> =
        records.iter().filter(|record| record.job.state == JobState::Running).cloned().collect();
    if daemon.nodes.is_removed() {
        return;
    }
    let data = usize::try_from(daemon.config().jobs_max).unwrap_or(usize::MAX);
    let limit = |lane: Lane| match lane {
        Lane::Data => data,
        Lane::Moves => MOVES_MAX,
        Lane::Plans => usize::MAX,
    };
    let now = Timestamp::now();
    let queue = queue::look(daemon, &records, now);
    let own_name = daemon.host_name();
    let is_blind = !daemon.inventory.world().is_complete && now.duration_since(daemon.started) < FIRST_SIGHT_MAX;
    for record in records.iter().filter(|record| record.job.state == JobState::Queued && jobs.is_mine(record)) {
        if record.not_before.is_some_and(|until| until > now) {
            continue;
        }
        if is_blind && record.work.operation().is_some() {
            jobs.waits(record, Sentence::new("the hypervisor was not reached yet", Saying::WaitsHypervisor));
            continue;
        }
        if moves_on(daemon, record).await {
            continue;
        }
        let lane = record.work.lane();
        // What this host does for another one costs it as much as its own.
        let here = |other: &&Arc<Record>| jobs.is_mine(other) || other.job.proxy.as_deref() == Some(&*own_name);
        let here = running.iter().filter(here).filter(|other| other.work.lane() == lane).count();
        if here >= limit(lane) {
            let (what, saying) = match lane {
                Lane::Moves => ("moves", Saying::WaitsMoves),
                _ => ("jobs", Saying::WaitsJobs),
            };
            let said = Said::from(saying).with("count", here);
            jobs.waits(record, Sentence::new(format!("{here} {what} run on this host, no more may"), said));
            continue;
        }
        if record.work.operation().is_none() && is_beside_its_like(record, &running) {
            jobs.waits(record, Sentence::new("a copy or prune of this VM is under way", Saying::WaitsPoints));
            continue;
        }
        if let Some(why) = queue.held.get(&record.job.id) {
            jobs.waits(record, why.clone());
            continue;
        }
        match start(daemon, record, queue.admitted.get(&record.job.id), tasks).await {
            Ok(Some(started)) => {
                running.push(Arc::new(started));
            }
            Ok(None) => {}
            Err(problem) => tracing::error!(job = %record.job.id, %problem, "a job could not begin; it is tried again"),
        }
    }
}

/// Copies and removals of one VM's restore points come one after the other: what is being copied must not be deleted
/// meanwhile.
fn is_beside_its_like(record: &Record, running: &[Arc<Record>]) -> bool {
    let vm = record.job.vm.as_ref().map(|vm| vm.uuid);
    let is_same = |other: &&Arc<Record>| vm.is_some() && other.job.vm.as_ref().map(|vm| vm.uuid) == vm;
    running.iter().filter(is_same).any(|other| other.work.operation().is_none())
}

/// A job that waits and is done where its VM is goes where that went.
async fn moves_on(daemon: &Daemon, record: &Record) -> bool {
    if !record.work.follows_its_vm() {
        return false;
    }
    let fleet = daemon.fleet();
    let Some(placed) = record.job.vm.as_ref().and_then(|vm| fleet.vms.get(&vm.uuid)) else { return false };
    if placed.node == record.node {
        return false;
    }
    let place = Place { node: placed.node.clone(), host: placed.host.clone() };
    match daemon.jobs.move_to(record.job.id, place).await {
        Ok(()) => true,
        Err(problem) => {
            tracing::warn!(job = %record.job.id, %problem, "a job could not follow its VM to another host");
            false
        }
    }
}

/// Begins a job, with a claim on its VM if it does something to it. None if something else goes first, or somebody
/// changed something meanwhile.
async fn start(
    daemon: &Arc<Daemon>,
    record: &Record,
    admitted: Option<&Option<String>>,
    tasks: &mut JoinSet<()>,
) -> Result<Option<Record>> {
    let (jobs, id) = (&daemon.jobs, record.job.id);
    let holder = claims::of_job(id);
    let mut claim = None;
    if let (Some(operation), Some(vm)) = (record.work.operation(), &record.job.vm) {
        let (answer, draft) = daemon.claims.wish(vm.uuid, operation, &holder)?;
        match answer {
            Answer::Acquired => claim = draft,
            Answer::Waits { operation, .. } => {
                let text = format!("a {operation} of this VM is under way");
                jobs.waits(record, Sentence::new(text, said::busy(operation)));
                return Ok(None);
            }
            Answer::Cancelling { operation: other, .. } => {
                let said = Said::from(Saying::WaitsCancelling).with("operation", said::word(other));
                jobs.waits(record, Sentence::new(format!("a {other} of this VM is being cancelled"), said));
                daemon.claims.acquire(vm.uuid, operation, &holder).await?;
                return Ok(None);
            }
            Answer::Refused { reason } => {
                let error = JobError { code: Code::Busy, message: reason, hint: None, retry_at: None };
                let record = jobs.finish(id, JobState::Failed, Some(error), None).await?;
                told(daemon, &record.job);
                return Ok(None);
            }
        }
    }
    if admitted.is_none() && !record.work.proxies().is_empty() {
        // Its VM has become free since the queue was judged: who does it is known at the next look.
        return Ok(None);
    }
    let proxy = admitted.cloned().flatten();
    let cancel = Cancel::default();
    jobs.live().insert(id, Live { cancel: cancel.clone(), ..Live::default() });
    daemon.claims.on_stop(&holder, cancel.clone());
    let boot = daemon.nodes.me.boot;
    let begun = jobs.update(id, claim, |record| {
        record.job.state = JobState::Running;
        record.job.started = Some(Timestamp::now());
        (record.job.waiting_for, record.job.waiting_said) = (None, None);
        record.job.proxy = proxy;
        record.boot = Some(boot);
    });
    let Some(record) = begun.await.unwrap_or_else(|problem| {
        tracing::error!(job = %id, %problem, "a job could not begin; it is tried again");
        None
    }) else {
        jobs.live().remove(&id);
        daemon.claims.forget(&holder);
        return Ok(None);
    };
    let (daemon, task) = (daemon.clone(), record.clone());
    tasks.spawn(async move { one(&daemon, task, cancel).await });
    Ok(Some(record))
}

async fn one(daemon: &Arc<Daemon>, record: Record, cancel: Cancel) {
    let (jobs, id) = (&daemon.jobs, record.job.id);
    tracing::info!(job = %id, kind = ?record.job.kind, vm = record.job.vm.as_ref().map(|vm| &*vm.name), "job begins");
    let watch = Arc::new(Watch::new(jobs.clone(), id, cancel.clone()));
    let outcome = exec::run(daemon, &record, watch.clone(), &cancel).await;
    let (state, error, result) = match outcome {
        Ok(result) if result.left.is_empty() => {
            jobs.note(id, LogLevel::Info, "done".into());
            (JobState::Succeeded, None, Some(result))
        }
        Ok(result) => (JobState::Failed, Some(in_part(&record, &result)), Some(result)),
        Err(problem) if problem.code == Code::Busy && may_wait(&record) => {
            let (daemon, record, why) = (&**daemon, &record, &*problem.detail);
            persist(daemon, "put back", || put_back(daemon, record, why).boxed()).await;
            return;
        }
        Err(problem) => {
            let (state, error) = verdict(daemon, &record, problem);
            (state, Some(error), None)
        }
    };
    reread(daemon, &record).await;
    let finish = || jobs.finish(id, state, error.clone(), result.clone()).boxed();
    if let Some(record) = persist(daemon, "ended", finish).await {
        after(daemon, &record).await;
    }
}

/// Records something of a job however long the state store is away: what was done must not be forgotten. Gives up when
/// the daemon stops; the record still says that the job runs, and the next start finds it interrupted.
async fn persist<'a, T>(daemon: &Daemon, what: &str, record: impl Fn() -> BoxFuture<'a, Result<T>>) -> Option<T> {
    let mut is_told = false;
    loop {
        match record().await {
            Ok(done) => return Some(done),
            Err(problem) if problem.code == Code::StateUnavailable && !daemon.is_stopping() => {
                if !is_told {
                    tracing::warn!(%problem, "that a job {what} is recorded when the state store is back");
                    is_told = true;
                }
                tokio::time::sleep(PERSIST_AGAIN).await;
            }
            Err(problem) => {
                tracing::error!(%problem, "that a job {what} could not be recorded");
                return None;
            }
        }
    }
}

/// Puts a job that met another program at its VM back into the queue.
async fn put_back(daemon: &Daemon, record: &Record, why: &str) -> Result<()> {
    let (jobs, id, now) = (&daemon.jobs, record.job.id, Timestamp::now());
    let holder = claims::of_job(id);
    for _ in 0..super::TRIES {
        let claim = match &record.job.vm {
            Some(vm) => daemon.claims.giving_back(vm.uuid, &holder)?,
            None => None,
        };
        let again = jobs.update(id, claim, |record| {
            record.job.state = JobState::Queued;
            record.job.started = None;
            (record.job.waiting_for, record.job.waiting_said) = (Some(why.to_owned()), None);
            record.boot = None;
            record.not_before = now.checked_add(BUSY_AGAIN).ok();
            record.busy_since.get_or_insert(now);
        });
        if again.await?.is_some() {
            jobs.live().remove(&id);
            daemon.claims.forget(&holder);
            return Ok(());
        }
    }
    Err(failures::changed(&format!("job {id}")))
}

/// Why a job that moved some VMs and not others has failed.
fn in_part(record: &Record, result: &JobResult) -> JobError {
    let names: Vec<&str> = result.left.iter().map(|left| left.vm.name.as_str()).take(10).collect();
    let count = result.left.len();
    let message = match record.job.kind {
        JobKind::Drain => format!("{count} VMs are still on {}: {}", record.job.host, names.join(", ")),
        _ => format!("{count} VMs did not move: {}", names.join(", ")),
    };
    let hint = Some("the result of the job says why, and what can be done about each".to_owned());
    JobError { code: Code::Conflict, message, hint, retry_at: None }
}

fn may_wait(record: &Record) -> bool {
    record.busy_since.is_none_or(|since| Timestamp::now().duration_since(since) < BUSY_MAX)
}

fn verdict(daemon: &Daemon, record: &Record, problem: Problem) -> (JobState, JobError) {
    let error = JobError { code: problem.code, message: problem.detail, hint: problem.hint, retry_at: None };
    match problem.code {
        Code::Cancelled if daemon.is_stopping() => {
            let message = "the daemon was stopped while this job ran".to_owned();
            let hint = record.job.origin.due.map(|_| "the scheduler runs it again".to_owned());
            (JobState::Interrupted, JobError { code: Code::Interrupted, message, hint, retry_at: None })
        }
        // The daemon of its proxy was stopped.
        Code::Interrupted => (JobState::Interrupted, error),
        Code::Cancelled => match gave_way(daemon, record) {
            Some(why) => {
                let message = format!("it was stopped: {why}");
                (JobState::Interrupted, JobError { code: Code::Interrupted, message, hint: None, retry_at: None })
            }
            None => (JobState::Cancelled, error),
        },
        _ => (JobState::Failed, JobError { retry_at: retry_at(daemon, record), ..error }),
    }
}

/// Why a job had to stop for another operation on its VM, if it had.
fn gave_way(daemon: &Daemon, record: &Record) -> Option<String> {
    daemon.claims.told_to_stop(record.job.vm.as_ref()?.uuid, &claims::of_job(record.job.id))
}

/// When the scheduler tries again: as the planner counts, as far as it can be told from here.
fn retry_at(daemon: &Daemon, record: &Record) -> Option<Timestamp> {
    let policy = daemon.policies.policy(record.job.origin.policy.as_deref()?)?;
    record.job.origin.due?;
    let tries = record.job.origin.attempt;
    if tries > policy.retries.count {
        return None;
    }
    let wait = policy.retries.backoff.0.saturating_mul(1 << (tries - 1).min(16)).min(Seconds::hours(6).0);
    Timestamp::now().checked_add(Seconds(wait).duration()).ok()
}

/// The repository that a job changed.
fn changed(daemon: &Daemon, record: &Record) -> Option<Arc<Entry>> {
    let name = match &record.work {
        Work::Backup { .. } | Work::Prune { .. } | Work::Gc {} => &record.job.repository,
        Work::Copy { to, .. } => to,
        _ => return None,
    };
    daemon.repositories.find(Some(name)).ok()
}

/// Has restore points read again that a job made or deleted, so that whoever sees its end sees them too. A repository that
/// does not answer does not keep the job from ending.
async fn reread(daemon: &Arc<Daemon>, record: &Record) {
    if let Some(entry) = changed(daemon, record) {
        let _ = tokio::time::timeout(REREAD_WITHIN, daemon.refresh(&entry)).await;
    }
}

/// What follows a job that ended.
async fn after(daemon: &Arc<Daemon>, record: &Record) {
    let job = &record.job;
    told(daemon, job);
    daemon.metrics.ended(job);
    if let Ok(entry) = daemon.repositories.find(Some(&job.repository)) {
        let why = job.error.as_ref().map(|error| error.message.clone());
        let done = |summary: String, said: Said| Maintenance {
            at: Timestamp::now(),
            job: Some(job.id),
            is_ok: job.state == JobState::Succeeded,
            said: why.is_none().then_some(said),
            summary: why.clone().unwrap_or(summary),
        };
        let points = job.result.as_ref().and_then(|result| result.points).unwrap_or(0);
        let kept = match job.kind {
            JobKind::Verify => {
                let said = Said::from(Saying::Verified).with("points", points);
                let done = done(format!("{points} restore points checked, nothing is damaged"), said);
                daemon.repositories.keep(&entry, |kept| kept.last_verify = Some(done)).await
            }
            JobKind::Prune => {
                let said = Said::from(Saying::Pruned).with("points", points);
                let done = done(format!("{points} restore points deleted"), said);
                daemon.repositories.keep(&entry, |kept| kept.last_prune = Some(done)).await
            }
            JobKind::Gc => {
                let freed = job.result.as_ref().and_then(|result| result.freed_bytes).unwrap_or(0);
                let said = Said::from(Saying::Collected).with("freed_bytes", freed);
                let done = done(format!("{} given back", virtward_model::Bytes(freed)), said);
                daemon.repositories.keep(&entry, |kept| kept.last_gc = Some(done)).await
            }
            _ => Ok(()),
        };
        if let Err(problem) = kept {
            tracing::warn!(%problem, "the result of maintenance was not kept");
        }
    }
    // What was pruned takes its space until it is collected.
    if job.kind != JobKind::Prune
        && let Some(entry) = changed(daemon, record)
    {
        daemon.measure(&entry).await;
    }
    // Its newest restore point may be another one, and it has no job any more.
    let views = Views::new(daemon);
    if let Some(placed) = job.vm.as_ref().and_then(|vm| views.fleet.vms.get(&vm.uuid)) {
        daemon.hub.send("inventory", "vm", &views.vm(placed));
    }
    if job.state == JobState::Succeeded {
        for next in follow_ups(daemon, record) {
            submit(daemon, next).await;
        }
    }
    daemon.schedule.notify_one();
}

/// After a policy's backup: its rules, and copies; after a copy: the rules there.
fn follow_ups(daemon: &Daemon, record: &Record) -> Vec<NewJob> {
    let job = &record.job;
    let policy = job.origin.policy.as_deref().and_then(|name| daemon.policies.policy(name));
    let Some(policy): Option<Policy> = policy else { return Vec::new() };
    let origin = virtward_api::Origin { after: Some(job.id), due: None, attempt: 1, ..job.origin.clone() };
    let new = |work: Work, repository: &str| NewJob {
        work,
        vm: job.vm.clone(),
        repository: repository.to_owned(),
        origin: origin.clone(),
        proxy: None,
    };
    match &record.work {
        Work::Backup { .. } => {
            let copies = policy.copy_to.iter().map(|copy| {
                let (to, retention) = (copy.repository.clone(), copy.retention.clone());
                new(Work::Copy { to, retention }, &job.repository)
            });
            let prune = (!policy.retention.is_empty())
                .then(|| new(Work::Prune { retention: policy.retention.clone() }, &job.repository));
            copies.chain(prune).collect()
        }
        Work::Copy { to, .. } => {
            let there = policy.copy_to.iter().find(|copy| copy.repository == *to && !copy.retention.is_empty());
            there.map(|copy| new(Work::Prune { retention: copy.retention.clone() }, to)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

/// Makes an event of a job that ended.
fn told(daemon: &Daemon, job: &Job) {
    let kind = serde_json::to_value(job.kind).ok();
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or("job").to_owned();
    let subject = match (&job.vm, job.kind) {
        (Some(vm), _) => vm.name.clone(),
        (None, JobKind::Drain) => job.host.clone(),
        (None, JobKind::Balance) => "the cluster".to_owned(),
        (None, _) => job.repository.clone(),
    };
    let why = job.error.as_ref().map(|error| format!(": {}", error.message)).unwrap_or_default();
    let (severity, name, verb, saying) = match job.state {
        JobState::Succeeded => (Severity::Info, "job-succeeded", "succeeded", Saying::JobSucceeded),
        JobState::Cancelled => (Severity::Info, "job-cancelled", "was cancelled", Saying::JobCancelled),
        JobState::Interrupted => (Severity::Warning, "job-interrupted", "was interrupted", Saying::JobInterrupted),
        _ => (Severity::Error, "job-failed", "failed", Saying::JobFailed),
    };
    // Without a subject it is about all hosts.
    let about = (job.kind != JobKind::Balance || job.vm.is_some()).then(|| subject.clone());
    let mut said = Said::from(saying).with("kind", kind.as_str()).with("subject", about);
    if let Some(error) = &job.error {
        said = said.with("code", json!(error.code)).with("why", error.message.as_str());
    }
    let mut note = Note::new(severity, name, format!("{kind} of {subject} {verb}{why}")).says(said);
    note.job = Some(job.id);
    note.vm = job.vm.clone();
    note.policy.clone_from(&job.origin.policy);
    note.repository = Some(job.repository.clone()).filter(|name| !name.is_empty());
    note.log();
    daemon.events.add(note.about(condition(job), job.state == JobState::Succeeded));
}

/// What a job's failure is called until one of the same kind and subject succeeds.
pub fn condition(job: &Job) -> String {
    let subject = match (&job.vm, job.kind) {
        (Some(vm), _) => vm.uuid.to_string(),
        (None, JobKind::Drain) => job.host.clone(),
        (None, _) => job.repository.clone(),
    };
    format!("job/{:?}/{subject}", job.kind)
}
