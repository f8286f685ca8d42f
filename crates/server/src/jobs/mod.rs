//! Jobs: accepted, kept, found again, told of. Who runs them is in `runner`, how each is done in `exec`.
//!
//! ```text
//! submit ─► queued ─► running ─┬► succeeded
//!              ▲         │     ├► failed
//!              └─ busy ──┤     ├► cancelled
//!                        │     └► interrupted   (found running at the next start, or stopped with the daemon)
//! ```
//!
//! Invariants: a job is in the state store before its request is answered and before anything is done for it; a final
//! state is stored together with what the scheduler must remember of it, in one transaction.

mod exec;
mod observer;
pub use self::exec::restore_options;

pub mod record;
pub mod runner;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use uuid::Uuid;
use virtward_api::{Code, Job, JobError, JobLogEntry, JobState, LogLevel, Problem, Progress};
use virtward_cluster::Compare;
use virtward_engine::Cancel;

use self::record::{Attempt, Idempotency, Made, NewJob, Outcome, Record};
use crate::{
    failures::Result,
    hub::Hub,
    kv::{self, Kv},
};

/// Ended jobs that are kept, and for how long.
const KEPT_MAX: usize = 10_000;
const KEPT_FOR: SignedDuration = SignedDuration::from_hours(24 * 90);
/// Jobs that may wait.
const QUEUE_MAX: usize = 10_000;
/// Entries of a job's log.
const LOG_MAX: usize = 300;
/// How long a repeated request is recognised.
const IDEMPOTENCY_FOR: SignedDuration = SignedDuration::from_hours(24);

/// All jobs.
pub struct Jobs {
    kv: Kv,
    hub: Arc<Hub>,
    node: String,
    records: RwLock<BTreeMap<Uuid, Arc<Record>>>,
    live: Mutex<HashMap<Uuid, Live>>,
    history: RwLock<HashMap<Uuid, BTreeMap<String, Attempt>>>,
    /// Something may have become possible.
    pub wake: Notify,
}

/// What is known of a running job beyond its record.
#[derive(Default)]
struct Live {
    cancel: Cancel,
    progress: Progress,
    log: Vec<JobLogEntry>,
    is_log_stored: bool,
}

fn job_key(id: Uuid) -> String {
    format!("/v1/jobs/{id}")
}

fn log_key(id: Uuid) -> String {
    format!("/v1/job-logs/{id}")
}

fn history_key(vm: Uuid, policy: &str) -> String {
    format!("/v1/history/{vm}/{policy}")
}

/// Where what a repeatable request made is kept.
pub fn made_key(key: &str) -> String {
    format!("/v1/made/{key}")
}

impl Jobs {
    /// Those of the state store.
    pub async fn load(kv: Kv, hub: Arc<Hub>, node: String) -> Result<Self> {
        let records = kv.list::<Record>("/v1/jobs/").await?;
        let mut history: HashMap<Uuid, BTreeMap<String, Attempt>> = HashMap::new();
        for (key, attempt) in kv.list::<Attempt>("/v1/history/").await? {
            let place = key.strip_prefix("/v1/history/").and_then(|rest| rest.split_once('/'));
            if let Some((vm, policy)) = place.and_then(|(vm, policy)| Some((vm.parse::<Uuid>().ok()?, policy))) {
                history.entry(vm).or_default().insert(policy.to_owned(), attempt);
            }
        }
        Ok(Self {
            kv,
            hub,
            node,
            records: RwLock::new(records.into_iter().map(|(_, record)| (record.job.id, Arc::new(record))).collect()),
            live: Mutex::default(),
            history: RwLock::new(history),
            wake: Notify::new(),
        })
    }

    fn live(&self) -> MutexGuard<'_, HashMap<Uuid, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every record, oldest first.
    pub fn records(&self) -> Vec<Arc<Record>> {
        self.records.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// One record.
    pub fn record(&self, id: Uuid) -> Result<Arc<Record>> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.get(&id).cloned().ok_or_else(|| Problem::new(Code::NotFound, format!("there is no job {id}")))
    }

    /// One job as it is now.
    pub fn job(&self, id: Uuid) -> Result<Job> {
        self.record(id).map(|record| self.view(&record))
    }

    /// A job as it is now.
    pub fn view(&self, record: &Record) -> Job {
        let mut job = record.job.clone();
        if let Some(live) = self.live().get(&job.id).filter(|_| job.state == JobState::Running) {
            job.progress = live.progress.clone();
            job.is_cancelling = live.cancel.is_cancelled();
        }
        job
    }

    /// The last run of each policy on each VM.
    pub fn history(&self) -> HashMap<Uuid, BTreeMap<String, Attempt>> {
        self.history.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a job did, after the entry `after`.
    pub async fn log(&self, id: Uuid, after: u64, limit: usize) -> Result<Vec<JobLogEntry>> {
        self.record(id)?;
        let live = self.live().get(&id).map(|live| live.log.clone());
        let all = match live {
            Some(log) => log,
            None => self.kv.get::<Vec<JobLogEntry>>(&log_key(id)).await?.map(|(log, _)| log).unwrap_or_default(),
        };
        Ok(all.into_iter().filter(|entry| entry.seq > after).take(limit).collect())
    }

    /// Accepts a job, or finds the one that the same request made before; whether it is new.
    pub async fn submit(&self, new: NewJob, host: &str, idempotency: Option<&Idempotency>) -> Result<(Job, bool)> {
        if let Some(job) = self.made_before(idempotency).await? {
            return Ok((job, false));
        }
        let waiting = self.records().iter().filter(|record| record.job.state == JobState::Queued).count();
        if waiting >= QUEUE_MAX {
            return Err(Problem::new(Code::Unavailable, format!("{waiting} jobs wait already"))
                .hint("wait, or cancel some with virtward job cancel"));
        }
        let record = self.prepare(new, host);
        let mut compares = vec![Compare::absent(job_key(record.job.id))];
        let mut ops = vec![kv::put(&job_key(record.job.id), &record)?];
        if let Some(idempotency) = idempotency {
            let id = record.job.id.to_string();
            let made = Made { request: idempotency.request.clone(), id, at: record.job.created };
            compares.push(Compare::absent(made_key(&idempotency.key)));
            ops.push(kv::put(&made_key(&idempotency.key), &made)?);
        }
        if !self.kv.commit(compares, ops).await? {
            // Another request with the same key was faster.
            return match self.made_before(idempotency).await? {
                Some(job) => Ok((job, false)),
                None => Err(Problem::new(Code::Conflict, "another request with this idempotency key is under way")),
            };
        }
        let job = record.job.clone();
        self.remember(record);
        self.hub.send("jobs", "job", &job);
        self.wake.notify_one();
        Ok((job, true))
    }

    fn prepare(&self, new: NewJob, host: &str) -> Record {
        let job = Job {
            id: Uuid::now_v7(),
            kind: new.work.kind(),
            state: JobState::Queued,
            vm: new.vm,
            host: host.to_owned(),
            repository: new.repository,
            origin: new.origin,
            created: Timestamp::now(),
            started: None,
            finished: None,
            waiting_for: None,
            is_cancelling: false,
            progress: Progress::default(),
            warnings: Vec::new(),
            error: None,
            result: None,
        };
        Record { job, work: new.work, node: self.node.clone(), not_before: None, busy_since: None }
    }

    async fn made_before(&self, idempotency: Option<&Idempotency>) -> Result<Option<Job>> {
        let Some(idempotency) = idempotency else { return Ok(None) };
        let Some((made, _)) = self.kv.get::<Made>(&made_key(&idempotency.key)).await? else { return Ok(None) };
        if made.request != idempotency.request {
            return Err(Problem::new(Code::IdempotencyMismatch, "this idempotency key was used for another request")
                .hint("use a new key for a new request"));
        }
        match made.id.parse().map(|id| self.job(id)) {
            Ok(job) => job.map(Some),
            Err(_) => Err(Problem::new(Code::IdempotencyMismatch, "this idempotency key was used for another request")),
        }
    }

    fn remember(&self, record: Record) {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        records.insert(record.job.id, Arc::new(record));
    }

    /// Changes a record, here and in the state store, and tells of it.
    async fn update(&self, id: Uuid, change: impl FnOnce(&mut Record)) -> Result<Record> {
        let mut record = Record::clone(&*self.record(id)?);
        change(&mut record);
        self.kv.put(&job_key(id), &record).await?;
        self.remember(record.clone());
        self.hub.send("jobs", "job", &self.view(&record));
        Ok(record)
    }

    /// Says what a queued job waits for; not worth storing.
    fn waits(&self, record: &Record, why: String) {
        if record.job.waiting_for.as_deref() == Some(&*why) {
            return;
        }
        let mut record = record.clone();
        record.job.waiting_for = Some(why);
        let job = record.job.clone();
        self.remember(record);
        self.hub.send("jobs", "job", &job);
    }

    /// Asks a job to stop.
    pub async fn cancel(&self, id: Uuid, who: &str) -> Result<Job> {
        let record = self.record(id)?;
        match record.job.state {
            JobState::Running => {
                self.note(id, LogLevel::Info, format!("{who} asks to cancel it"));
                if let Some(live) = self.live().get(&id) {
                    live.cancel.cancel();
                }
                let job = self.job(id)?;
                self.hub.send("jobs", "job", &job);
                Ok(job)
            }
            JobState::Queued => {
                let error = JobError {
                    code: Code::Cancelled,
                    message: format!("cancelled by {who} before it began"),
                    hint: None,
                    retry_at: None,
                };
                self.finish(id, JobState::Cancelled, Some(error), None).await?;
                self.job(id)
            }
            state => {
                let state = serde_json::to_value(state).ok();
                let state = state.as_ref().and_then(|state| state.as_str()).unwrap_or("ended");
                Err(Problem::new(Code::Conflict, format!("job {id} has ended already ({state})")))
            }
        }
    }

    /// Gives a job its final state, together with what the scheduler must remember.
    async fn finish(
        &self,
        id: Uuid,
        state: JobState,
        error: Option<JobError>,
        result: Option<virtward_api::JobResult>,
    ) -> Result<Record> {
        let mut record = Record::clone(&*self.record(id)?);
        let now = Timestamp::now();
        record.job.progress = self.view(&record).progress;
        record.job.state = state;
        record.job.finished = Some(now);
        record.job.waiting_for = None;
        record.job.is_cancelling = false;
        record.job.error = error;
        record.job.result = result;
        if let Some(error) = &record.job.error {
            self.note(id, LogLevel::Error, error.message.clone());
        }
        let log = self.live().get(&id).map(|live| live.log.clone()).unwrap_or_default();
        let mut ops = vec![kv::put(&job_key(id), &record)?];
        if !log.is_empty() {
            ops.push(kv::put(&log_key(id), &log)?);
        }
        let attempt = attempt(&record, now);
        if let Some((vm, policy, attempt)) = &attempt {
            ops.push(kv::put(&history_key(*vm, policy), attempt)?);
        }
        self.kv.commit(Vec::new(), ops).await?;
        if let Some((vm, policy, attempt)) = attempt {
            let mut history = self.history.write().unwrap_or_else(PoisonError::into_inner);
            history.entry(vm).or_default().insert(policy, attempt);
        }
        self.live().remove(&id);
        self.remember(record.clone());
        self.hub.send("jobs", "job", &record.job);
        self.wake.notify_one();
        Ok(record)
    }

    /// Adds to the log of a running job.
    fn note(&self, id: Uuid, level: LogLevel, message: String) {
        if let Some(live) = self.live().get_mut(&id) {
            // The last entry says why it failed: there is always room for that.
            if live.log.len() >= LOG_MAX && level != LogLevel::Error {
                return;
            }
            let seq = live.log.last().map_or(1, |last| last.seq + 1);
            live.log.push(JobLogEntry { seq, at: Timestamp::now(), level, message });
            live.is_log_stored = false;
        }
    }

    /// Stores logs that grew.
    async fn store_logs(&self) {
        let mut grown = Vec::new();
        for (id, live) in self.live().iter_mut().filter(|(_, live)| !live.is_log_stored) {
            live.is_log_stored = true;
            grown.push((*id, live.log.clone()));
        }
        for (id, log) in grown {
            if let Err(problem) = self.kv.put(&log_key(id), &log).await {
                tracing::warn!(job = %id, %problem, "the log of a job was not stored");
            }
        }
    }

    /// Forgets what is too old, or too much.
    pub async fn prune(&self) -> Result<()> {
        let now = Timestamp::now();
        let ended: Vec<Arc<Record>> = self.records().into_iter().filter(|record| record.job.state.is_final()).collect();
        let surplus = ended.len().saturating_sub(KEPT_MAX);
        let is_old = |record: &Record| record.job.finished.is_some_and(|at| now.duration_since(at) > KEPT_FOR);
        let going: Vec<Uuid> = ended
            .iter()
            .enumerate()
            .filter(|(number, record)| *number < surplus || is_old(record))
            .map(|(_, record)| record.job.id)
            .collect();
        let keys: Vec<String> = going.iter().flat_map(|id| [job_key(*id), log_key(*id)]).collect();
        self.kv.delete(&keys).await?;
        {
            let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
            going.iter().for_each(|id| _ = records.remove(id));
        }
        let made = self.kv.list::<Made>("/v1/made/").await?;
        let old = made.into_iter().filter(|(_, made)| now.duration_since(made.at) > IDEMPOTENCY_FOR);
        self.kv.delete(&old.map(|(key, _)| key).collect::<Vec<_>>()).await
    }
}

/// What the scheduler must remember of a job that ended.
fn attempt(record: &Record, now: Timestamp) -> Option<(Uuid, String, Attempt)> {
    let job = &record.job;
    let (vm, policy, due) = (job.vm.as_ref()?.uuid, job.origin.policy.clone()?, job.origin.due?);
    record::Work::operation(&record.work)?;
    let outcome = match job.state {
        JobState::Succeeded => Outcome::Succeeded,
        JobState::Failed => Outcome::Failed,
        JobState::Cancelled => Outcome::Cancelled,
        JobState::Interrupted => Outcome::Interrupted,
        JobState::Queued | JobState::Running => return None,
    };
    let started = job.started.unwrap_or(job.created);
    Some((vm, policy, Attempt { job: job.id, due, started, ended: now, number: job.origin.attempt, outcome }))
}
