//! Lets queued jobs run: as many as the host may, one per VM as the arbiter says, in the order in which they were asked
//! for. One task decides; every job is a task of its own that it owns.
//!
//! A VM that another program of ours holds (the command line) is waited for. What was found running when the daemon
//! started is interrupted: a policy's run is planned anew by the scheduler, another one is asked for again here, but for
//! a restore, which a person has to want again.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::task::JoinSet;
use uuid::Uuid;
use virtward_api::{Code, Job, JobError, JobKind, JobState, LogLevel, Maintenance, Problem, Severity};
use virtward_decide::arbiter::{self, Operation, Ruling};
use virtward_engine::Cancel;
use virtward_model::{Policy, Seconds};

use super::{
    Live, exec,
    observer::Watch,
    record::{NewJob, Record, Work},
};
use crate::{daemon::Daemon, events::Note, views::Views};

/// Between two looks at the queue when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// Between two tries of a VM that another program holds, and how long that is tried.
const BUSY_AGAIN: SignedDuration = SignedDuration::from_secs(5);
const BUSY_MAX: SignedDuration = SignedDuration::from_mins(30);
/// How long after the start jobs wait for the first sight of the host: libvirt may come up later than the daemon does.
const FIRST_SIGHT_MAX: SignedDuration = SignedDuration::from_mins(5);
/// Tries of a job that was interrupted.
const ATTEMPTS_MAX: u32 = 3;

/// Takes care of jobs that a daemon left behind when it ended.
pub async fn recover(daemon: &Daemon) {
    let jobs = &daemon.jobs;
    let left: Vec<Arc<Record>> = jobs
        .records()
        .into_iter()
        .filter(|record| record.node == jobs.node && record.job.state == JobState::Running)
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
        let error = JobError {
            code: Code::Interrupted,
            message: "the daemon ended while this job ran".into(),
            hint: Some(hint),
            retry_at: None,
        };
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
            };
            submit(daemon, new).await;
        }
    }
}

async fn submit(daemon: &Daemon, new: NewJob) {
    if let Err(problem) = daemon.jobs.submit(new, &daemon.host_name(), None).await {
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
    let limit = usize::try_from(daemon.config().jobs_max).unwrap_or(usize::MAX);
    let now = Timestamp::now();
    let is_blind = !daemon.inventory.world().is_complete && now.duration_since(daemon.started) < FIRST_SIGHT_MAX;
    for record in records.iter().filter(|record| record.job.state == JobState::Queued && record.node == jobs.node) {
        if record.not_before.is_some_and(|until| until > now) {
            continue;
        }
        if is_blind && record.work.operation().is_some() {
            jobs.waits(record, "the hypervisor was not reached yet".into());
            continue;
        }
        if running.len() >= limit {
            jobs.waits(record, format!("{} jobs run on this host, no more may", running.len()));
            continue;
        }
        match admit(record, &running) {
            (Ruling::Run, _) => {}
            (Ruling::Refuse, Some(other)) => {
                let wanted = record.work.operation().unwrap_or(Operation::Backup);
                let message = arbiter::reason(other, wanted);
                let error = JobError { code: Code::Busy, message, hint: None, retry_at: None };
                if let Ok(record) = jobs.finish(record.job.id, JobState::Failed, Some(error), None).await {
                    told(daemon, &record.job);
                }
                continue;
            }
            (_, other) => {
                let other = other.map_or("copy or prune", Operation::name);
                jobs.waits(record, format!("a {other} of this VM is under way"));
                continue;
            }
        }
        if let Some(started) = start(daemon, record.job.id, tasks).await {
            running.push(Arc::new(started));
        }
    }
}

/// What the arbiter says of a job beside those that run. Copies and removals of one VM's restore points come one after
/// the other: what is being copied must not be deleted meanwhile.
fn admit(record: &Record, running: &[Arc<Record>]) -> (Ruling, Option<Operation>) {
    let same = |other: &&Arc<Record>| match (&record.job.vm, &other.job.vm) {
        (Some(one), Some(two)) => one.uuid == two.uuid,
        _ => false,
    };
    let beside: Vec<&Arc<Record>> = running.iter().filter(same).collect();
    match record.work.operation() {
        Some(wanted) => {
            let operations: Vec<Operation> = beside.iter().filter_map(|other| other.work.operation()).collect();
            arbiter::admit(&operations, wanted)
        }
        None if beside.iter().any(|other| other.work.operation().is_none()) => (Ruling::Wait, None),
        None => (Ruling::Run, None),
    }
}

async fn start(daemon: &Arc<Daemon>, id: Uuid, tasks: &mut JoinSet<()>) -> Option<Record> {
    let cancel = Cancel::default();
    daemon.jobs.live().insert(id, Live { cancel: cancel.clone(), ..Live::default() });
    let begun = daemon.jobs.update(id, |record| {
        record.job.state = JobState::Running;
        record.job.started = Some(Timestamp::now());
        record.job.waiting_for = None;
    });
    let record = match begun.await {
        Ok(record) => record,
        Err(problem) => {
            daemon.jobs.live().remove(&id);
            tracing::error!(job = %id, %problem, "a job could not begin; it is tried again");
            return None;
        }
    };
    let (daemon, task) = (daemon.clone(), record.clone());
    tasks.spawn(async move { one(&daemon, task, cancel).await });
    Some(record)
}

async fn one(daemon: &Arc<Daemon>, record: Record, cancel: Cancel) {
    let (jobs, id) = (&daemon.jobs, record.job.id);
    tracing::info!(job = %id, kind = ?record.job.kind, vm = record.job.vm.as_ref().map(|vm| &*vm.name), "job begins");
    let watch = Arc::new(Watch::new(jobs.clone(), id, cancel.clone()));
    let outcome = exec::run(daemon, &record, watch.clone(), &cancel).await;
    let warnings = watch.warnings();
    if !warnings.is_empty() {
        let mut with = Record::clone(&record);
        with.job.warnings = warnings;
        jobs.remember(with);
    }
    let finished = match outcome {
        Ok(result) => {
            jobs.note(id, LogLevel::Info, "done".into());
            jobs.finish(id, JobState::Succeeded, None, Some(result)).await
        }
        Err(problem) if problem.code == Code::Busy && may_wait(&record) => {
            jobs.live().remove(&id);
            let now = Timestamp::now();
            let again = jobs.update(id, |record| {
                record.job.state = JobState::Queued;
                record.job.started = None;
                record.job.waiting_for = Some(problem.detail.clone());
                record.not_before = now.checked_add(BUSY_AGAIN).ok();
                record.busy_since.get_or_insert(now);
            });
            if let Err(problem) = again.await {
                tracing::error!(job = %id, %problem, "a job could not be put back");
            }
            return;
        }
        Err(problem) => {
            let (state, error) = verdict(daemon, &record, problem);
            jobs.finish(id, state, Some(error), None).await
        }
    };
    match finished {
        Ok(record) => after(daemon, &record).await,
        // The record still says that it runs: the next start of the daemon finds it interrupted.
        Err(problem) => tracing::error!(job = %id, %problem, "the end of a job could not be recorded"),
    }
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
        Code::Cancelled => (JobState::Cancelled, error),
        _ => (JobState::Failed, JobError { retry_at: retry_at(daemon, record), ..error }),
    }
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

/// What follows a job that ended.
async fn after(daemon: &Arc<Daemon>, record: &Record) {
    let job = &record.job;
    told(daemon, job);
    daemon.metrics.ended(job);
    if let Ok(entry) = daemon.repositories.find(Some(&job.repository)) {
        let done = |summary: String| Maintenance {
            at: Timestamp::now(),
            job: Some(job.id),
            is_ok: job.state == JobState::Succeeded,
            summary,
        };
        let why = job.error.as_ref().map(|error| error.message.clone());
        let points = job.result.as_ref().and_then(|result| result.points).unwrap_or(0);
        let kept = match job.kind {
            JobKind::Verify => {
                let done = done(why.unwrap_or_else(|| format!("{points} restore points checked, nothing is damaged")));
                daemon.repositories.keep(&entry, |kept| kept.last_verify = Some(done)).await
            }
            JobKind::Prune => {
                let done = done(why.unwrap_or_else(|| format!("{points} restore points deleted")));
                daemon.repositories.keep(&entry, |kept| kept.last_prune = Some(done)).await
            }
            _ => Ok(()),
        };
        if let Err(problem) = kept {
            tracing::warn!(%problem, "the result of maintenance was not kept");
        }
        if matches!(job.kind, JobKind::Backup | JobKind::Prune | JobKind::Copy) {
            daemon.refresh(&entry, job.kind == JobKind::Backup).await;
        }
    }
    if let (JobKind::Copy, Work::Copy { to, .. }) = (job.kind, &record.work)
        && let Ok(entry) = daemon.repositories.find(Some(to))
    {
        daemon.refresh(&entry, true).await;
    }
    // Its newest restore point may be another one, and it has no job any more.
    let world = daemon.inventory.world();
    if let Some(view) = job.vm.as_ref().and_then(|vm| world.vms.get(&vm.uuid)) {
        daemon.hub.send("inventory", "vm", &Views::new(daemon).vm(view));
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
    let subject = job.vm.as_ref().map_or_else(|| job.repository.clone(), |vm| vm.name.clone());
    let why = job.error.as_ref().map(|error| format!(": {}", error.message)).unwrap_or_default();
    let (severity, name, verb) = match job.state {
        JobState::Succeeded => (Severity::Info, "job-succeeded", "succeeded"),
        JobState::Cancelled => (Severity::Info, "job-cancelled", "was cancelled"),
        JobState::Interrupted => (Severity::Warning, "job-interrupted", "was interrupted"),
        _ => (Severity::Error, "job-failed", "failed"),
    };
    tracing::info!(job = %job.id, state = verb, "{kind} of {subject} {verb}{why}");
    let mut note = Note::new(severity, name, format!("{kind} of {subject} {verb}{why}"));
    note.job = Some(job.id);
    note.vm = job.vm.clone();
    note.policy.clone_from(&job.origin.policy);
    note.repository = Some(job.repository.clone());
    daemon.events.add(note);
}
