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
//! state is stored together with what the scheduler must remember of it, in one transaction; so is the beginning together
//! with the claim on its VM. In a cluster any daemon accepts a job, and the daemon of the host that the record names does
//! it.

mod exec;
mod observer;
mod queue;
pub use self::exec::restore_options;

pub mod record;
pub mod runner;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use uuid::Uuid;
use virtward_api::{Code, Job, JobError, JobLogEntry, JobState, LogLevel, Problem, Progress, Said, Saying};
use virtward_cluster::{Compare, Op};
use virtward_engine::Cancel;

use self::record::{Attempt, CancelAsked, Idempotency, Made, NewJob, Outcome, Place, Record, Running};
use crate::{
    cluster::{
        claims::{self, Claims, Draft},
        nodes::Nodes,
    },
    failures::{self, Result},
    hub::Hub,
    kv::{self, Kv},
    said::Sentence,
    table::Table,
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

/// All jobs of the cluster. A job is done by one node's daemon: its record says which.
pub struct Jobs {
    kv: Kv,
    hub: Arc<Hub>,
    nodes: Arc<Nodes>,
    claims: Arc<Claims>,
    /// Records.
    pub table: Table<Uuid, Record>,
    /// The last run of each policy on each VM.
    pub past: Table<(Uuid, String), Attempt>,
    /// Jobs that somebody wants to stop.
    pub cancels: Table<Uuid, CancelAsked>,
    /// Progress of what runs on other nodes.
    pub remote: Table<String, Running>,
    live: Mutex<HashMap<Uuid, Live>>,
    /// Something may have become possible.
    pub wake: Notify,
}

/// What is known of a running job beyond its record.
#[derive(Default)]
struct Live {
    cancel: Cancel,
    progress: Progress,
    log: Vec<JobLogEntry>,
    warnings: Vec<String>,
    is_log_stored: bool,
}

/// Tries against others who change the same records.
const TRIES: usize = 16;

fn job_key(id: Uuid) -> String {
    format!("/v1/jobs/{id}")
}

/// Not followed by others: read when somebody asks.
fn log_key(id: Uuid) -> String {
    format!("/logs/{id}")
}

fn cancel_key(id: Uuid) -> String {
    format!("/v1/cancels/{id}")
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
    pub async fn load(kv: Kv, hub: Arc<Hub>, nodes: Arc<Nodes>, claims: Arc<Claims>) -> Result<Self> {
        Ok(Self {
            table: Table::load(&kv, "/v1/jobs/").await?,
            past: Table::load(&kv, "/v1/history/").await?,
            cancels: Table::load(&kv, "/v1/cancels/").await?,
            remote: Table::load(&kv, "/v1/progress/").await?,
            kv,
            hub,
            nodes,
            claims,
            live: Mutex::default(),
            wake: Notify::new(),
        })
    }

    fn live(&self) -> MutexGuard<'_, HashMap<Uuid, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_mine(&self, record: &Record) -> bool {
        record.node == self.nodes.me.name
    }

    /// Every record, oldest first.
    pub fn records(&self) -> Vec<Arc<Record>> {
        self.table.values()
    }

    /// One record.
    pub fn record(&self, id: Uuid) -> Result<Arc<Record>> {
        self.table.get(&id).ok_or_else(|| {
            Problem::new(Code::NotFound, format!("there is no job {id}"))
                .hint("virtward job list (GET /api/v1/jobs) lists the jobs")
        })
    }

    /// One job as it is now.
    pub fn job(&self, id: Uuid) -> Result<Job> {
        self.record(id).map(|record| self.view(&record))
    }

    /// A job as it is now.
    pub fn view(&self, record: &Record) -> Job {
        let mut job = record.job.clone();
        if job.state != JobState::Running {
            return job;
        }
        job.is_cancelling = self.cancels.get(&job.id).is_some();
        if !self.is_mine(record) {
            let told = self.remote.get(&record.node).and_then(|running| running.get(&job.id).cloned());
            job.progress = told.unwrap_or_default();
            if !self.nodes.is_there(&record.node) {
                job.waiting_for =
                    Some(format!("the daemon of {} does not answer; this is what it last told", job.host));
                job.waiting_said = Some(Said::from(Saying::WaitsNode).with("host", job.host.as_str()));
            }
        } else if let Some(live) = self.live().get(&job.id) {
            job.progress = live.progress.clone();
            job.is_cancelling |= live.cancel.is_cancelled();
        }
        job
    }

    /// The last run of each policy on each VM.
    pub fn history(&self) -> HashMap<Uuid, BTreeMap<String, Attempt>> {
        let mut history: HashMap<Uuid, BTreeMap<String, Attempt>> = HashMap::new();
        for ((vm, policy), attempt) in self.past.all() {
            history.entry(vm).or_default().insert(policy, *attempt);
        }
        history
    }

    /// Progress of what runs here.
    pub fn progress(&self) -> Running {
        self.live().iter().map(|(id, live)| (*id, live.progress.clone())).collect()
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

    /// Accepts a job, or finds the one that the same request made before; whether it is new. `guard`: conditions that
    /// have to hold, those of a leader.
    pub async fn submit(
        &self,
        new: NewJob,
        place: &Place,
        idempotency: Option<&Idempotency>,
        guard: Vec<Compare>,
    ) -> Result<(Job, bool)> {
        if let Some(job) = self.made_before(idempotency).await? {
            return Ok((job, false));
        }
        let waiting = self.records().iter().filter(|record| record.job.state == JobState::Queued).count();
        if waiting >= QUEUE_MAX {
            return Err(Problem::new(Code::Unavailable, format!("{waiting} jobs wait already"))
                .hint("wait, or cancel some with virtward job cancel"));
        }
        let record = prepare(new, place);
        let mut compares = guard;
        compares.push(Compare::absent(job_key(record.job.id)));
        let mut ops = vec![kv::put(&job_key(record.job.id), &record)?];
        if let Some(idempotency) = idempotency {
            let id = record.job.id.to_string();
            let made = Made { request: idempotency.request.clone(), id, at: record.job.created };
            compares.push(Compare::absent(made_key(&idempotency.key)));
            ops.push(kv::put(&made_key(&idempotency.key), &made)?);
        }
        let Some(at) = self.kv.commit(compares, ops).await? else {
            // Another request with the same key was faster, or another daemon leads.
            return match self.made_before(idempotency).await? {
                Some(job) => Ok((job, false)),
                None if idempotency.is_none() => {
                    Err(Problem::new(Code::Unavailable, "this daemon does not lead the cluster any more"))
                }
                None => Err(Problem::new(Code::Conflict, "another request with this idempotency key is under way")),
            };
        };
        let job = record.job.clone();
        self.table.put(job.id, at, record);
        self.hub.send("jobs", "job", &job);
        self.wake.notify_one();
        Ok((job, true))
    }

    async fn made_before(&self, idempotency: Option<&Idempotency>) -> Result<Option<Job>> {
        let Some(idempotency) = idempotency else { return Ok(None) };
        let Some((made, _)) = self.kv.get::<Made>(&made_key(&idempotency.key)).await? else { return Ok(None) };
        let mismatch = || {
            Problem::new(Code::IdempotencyMismatch, "this idempotency key was used for another request")
                .hint("use a new key for a new request")
        };
        let Some(id) = made.id.parse::<Uuid>().ok().filter(|_| made.request == idempotency.request) else {
            return Err(mismatch());
        };
        // Another daemon may have accepted it a moment ago.
        if self.table.get(&id).is_none() {
            self.refresh(id).await?;
        }
        self.job(id).map(Some)
    }

    /// Reads a record anew: what is known here is not what is there.
    async fn refresh(&self, id: Uuid) -> Result<()> {
        let listing = self.kv.listing(&job_key(id)).await?;
        match listing.entries.first() {
            Some(entry) => _ = self.table.follow(&entry.key, entry.revision, Some(&entry.value)),
            None => self.table.delete(&id, listing.revision),
        }
        Ok(())
    }

    /// Changes a record of this daemon's, here and in the state store, together with the claims on its VM, and tells of
    /// it. Refused if somebody else changed it meanwhile.
    async fn update(&self, id: Uuid, claim: Option<Draft>, change: impl FnOnce(&mut Record)) -> Result<Option<Record>> {
        let (revision, record) = self.table.row(&id).ok_or_else(|| failures::changed(&format!("job {id}")))?;
        let mut record = Record::clone(&record);
        change(&mut record);
        let mut compares = vec![Compare::at(job_key(id), revision)];
        let mut ops = vec![kv::put(&job_key(id), &record)?];
        if let Some(claim) = &claim {
            compares.extend(claim.compares.iter().cloned());
            ops.push(claim.op.clone());
        }
        let Some(at) = self.kv.commit(compares, ops).await? else {
            self.refresh(id).await?;
            if let Some(vm) = record.job.vm.as_ref().filter(|_| claim.is_some()) {
                self.claims.refresh(vm.uuid).await?;
            }
            return Ok(None);
        };
        if let Some(claim) = claim {
            self.claims.done(claim, at);
        }
        self.table.put(id, at, record.clone());
        self.hub.send("jobs", "job", &self.view(&record));
        Ok(Some(record))
    }

    /// Says what a queued job waits for; not worth storing.
    fn waits(&self, record: &Record, why: Sentence) {
        if record.job.waiting_for.as_deref() == Some(&*why.text) {
            return;
        }
        let mut record = record.clone();
        (record.job.waiting_for, record.job.waiting_said) = (Some(why.text), why.said);
        let job = record.job.clone();
        self.table.overlay(&job.id.clone(), record);
        self.hub.send("jobs", "job", &job);
    }

    /// Asks a job to stop, on whatever node it is.
    pub async fn cancel(&self, id: Uuid, who: &str) -> Result<Job> {
        for _ in 0..TRIES {
            let record = self.record(id)?;
            match record.job.state {
                JobState::Running => {
                    let asked = CancelAsked { by: who.to_owned(), at: Timestamp::now() };
                    let unchanged = self.table.unchanged(&id, &job_key(id));
                    let put = kv::put(&cancel_key(id), &asked)?;
                    if let Some(at) = self.kv.commit(vec![unchanged], vec![put]).await? {
                        self.cancel_asked(id, &asked);
                        self.cancels.put(id, at, asked);
                        let job = self.job(id)?;
                        self.hub.send("jobs", "job", &job);
                        return Ok(job);
                    }
                }
                JobState::Queued => {
                    let error = JobError {
                        code: Code::Cancelled,
                        message: format!("cancelled by {who} before it began"),
                        hint: None,
                        retry_at: None,
                    };
                    if self.finish_as_known(id, JobState::Cancelled, Some(error), None).await?.is_some() {
                        return self.job(id);
                    }
                }
                state => {
                    let state = serde_json::to_value(state).ok();
                    let state = state.as_ref().and_then(|state| state.as_str()).unwrap_or("ended");
                    return Err(Problem::new(Code::Conflict, format!("job {id} has ended already ({state})")));
                }
            }
            self.refresh(id).await?;
        }
        Err(failures::changed(&format!("job {id}")))
    }

    /// Somebody, here or on another node, wants a job to stop.
    pub fn cancel_asked(&self, id: Uuid, asked: &CancelAsked) {
        let mut stopped = false;
        if let Some(live) = self.live().get(&id) {
            stopped = !live.cancel.is_cancelled();
            live.cancel.cancel();
        }
        if stopped {
            self.note(id, LogLevel::Info, format!("{} asks to cancel it", asked.by));
        }
    }

    /// A record changed, here or on another node.
    pub fn news(&self, record: &Record) {
        self.hub.send("jobs", "job", &self.view(record));
        self.wake.notify_one();
    }

    /// Another node told how far its jobs are.
    pub fn told_of(&self, running: &Running) {
        for (id, progress) in running {
            self.hub.send("jobs", "progress", &serde_json::json!({ "id": id, "progress": progress }));
        }
    }

    /// Gives a job its final state. What ran here and has a result has the last word, also over another daemon that took
    /// this one for lost.
    async fn finish(
        &self,
        id: Uuid,
        state: JobState,
        error: Option<JobError>,
        result: Option<virtward_api::JobResult>,
    ) -> Result<Record> {
        for _ in 0..TRIES {
            if let Some(record) = self.finish_as_known(id, state, error.clone(), result.clone()).await? {
                return Ok(record);
            }
            self.refresh(id).await?;
            let record = self.record(id)?;
            let is_ours = self.is_mine(&record) && self.live().contains_key(&id);
            if is_ours && record.job.state == state && (&record.job.error, &record.job.result) == (&error, &result) {
                // It was recorded, and the answer was lost.
                self.live().remove(&id);
                self.claims.forget(&claims::of_job(id));
                return Ok(Record::clone(&record));
            }
            if record.job.state.is_final() && !(is_ours && record.job.state == JobState::Interrupted) {
                return Err(failures::changed(&format!("job {id}")));
            }
            if let Some(vm) = &record.job.vm {
                self.claims.refresh(vm.uuid).await?;
            }
        }
        Err(failures::changed(&format!("job {id}")))
    }

    /// One try of that: the final state, what the scheduler must remember, the log and the claim, in one transaction.
    /// None if somebody else changed the record or the claims on the VM.
    async fn finish_as_known(
        &self,
        id: Uuid,
        state: JobState,
        error: Option<JobError>,
        result: Option<virtward_api::JobResult>,
    ) -> Result<Option<Record>> {
        let unchanged = self.table.unchanged(&id, &job_key(id));
        let mut record = Record::clone(&*self.record(id)?);
        let now = Timestamp::now();
        record.job.progress = self.view(&record).progress;
        record.job.state = state;
        record.job.finished = Some(now);
        (record.job.waiting_for, record.job.waiting_said) = (None, None);
        record.job.is_cancelling = false;
        record.job.error = error;
        record.job.result = result;
        let (mut log, warnings) =
            self.live().get(&id).map(|live| (live.log.clone(), live.warnings.clone())).unwrap_or_default();
        if !warnings.is_empty() {
            record.job.warnings = warnings;
        }
        if let Some(error) = &record.job.error {
            append(&mut log, LogLevel::Error, error.message.clone());
        }
        let mut compares = vec![unchanged];
        let mut ops = vec![kv::put(&job_key(id), &record)?, Op::delete(cancel_key(id))];
        if self.live().contains_key(&id) {
            ops.push(kv::put(&log_key(id), &log)?);
        }
        let attempt = attempt(&record, now);
        if let Some((vm, policy, attempt)) = &attempt {
            ops.push(kv::put(&history_key(*vm, policy), attempt)?);
        }
        let holder = claims::of_job(id);
        let claim = match &record.job.vm {
            Some(vm) => self.claims.giving_back(vm.uuid, &holder)?,
            None => None,
        };
        if let Some(claim) = &claim {
            compares.extend(claim.compares.iter().cloned());
            ops.push(claim.op.clone());
        }
        let Some(at) = self.kv.commit(compares, ops).await? else { return Ok(None) };
        if let Some(claim) = claim {
            self.claims.done(claim, at);
        }
        if let Some((vm, policy, attempt)) = attempt {
            self.past.put((vm, policy), at, attempt);
        }
        self.claims.forget(&holder);
        self.cancels.delete(&id, at);
        self.live().remove(&id);
        self.table.put(id, at, record.clone());
        self.hub.send("jobs", "job", &record.job);
        self.wake.notify_one();
        Ok(Some(record))
    }

    /// Tells a job of a daemon that is gone as interrupted. Should it go on after all, its result takes the place of this.
    pub async fn presume_interrupted(&self, id: Uuid, message: String) -> Result<()> {
        let hint = Some("the scheduler runs a policy's backup again; ask for another one again".to_owned());
        let error = JobError { code: Code::Interrupted, message, hint, retry_at: None };
        match self.finish_as_known(id, JobState::Interrupted, Some(error), None).await? {
            Some(_) => Ok(()),
            None => self.refresh(id).await,
        }
    }

    /// Gives a job that waits to another node.
    pub async fn move_to(&self, id: Uuid, place: Place) -> Result<()> {
        let moved = self.update(id, None, |record| {
            record.job.host = place.host;
            record.node = place.node;
            (record.job.waiting_for, record.job.waiting_said) = (None, None);
        });
        moved.await.map(|_| ())
    }

    /// Notes that the proxy that was chosen does not do it.
    pub async fn without_proxy(&self, id: Uuid) -> Result<()> {
        for _ in 0..TRIES {
            if self.update(id, None, |record| record.job.proxy = None).await?.is_some() {
                return Ok(());
            }
        }
        Err(failures::changed(&format!("job {id}")))
    }

    /// Adds to the log of a running job.
    fn note(&self, id: Uuid, level: LogLevel, message: String) {
        if let Some(live) = self.live().get_mut(&id) {
            append(&mut live.log, level, message);
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
        // Of a cluster's jobs every daemon sees the same: whoever comes first removes them.
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
        if let Some(at) = self.kv.delete(&keys).await? {
            going.iter().for_each(|id| self.table.delete(id, at));
        }
        let made = self.kv.list::<Made>("/v1/made/").await?;
        let old = made.into_iter().filter(|(_, made)| now.duration_since(made.at) > IDEMPOTENCY_FOR);
        self.kv.delete(&old.map(|(key, _)| key).collect::<Vec<_>>()).await.map(|_| ())
    }
}

fn prepare(new: NewJob, place: &Place) -> Record {
    let job = Job {
        id: Uuid::now_v7(),
        kind: new.work.kind(),
        state: JobState::Queued,
        vm: new.vm,
        host: place.host.clone(),
        proxy: new.proxy,
        repository: new.repository,
        origin: new.origin,
        created: Timestamp::now(),
        started: None,
        finished: None,
        waiting_for: None,
        waiting_said: None,
        is_cancelling: false,
        progress: Progress::default(),
        warnings: Vec::new(),
        error: None,
        result: None,
    };
    Record { job, work: new.work, node: place.node.clone(), boot: None, not_before: None, busy_since: None }
}

fn append(log: &mut Vec<JobLogEntry>, level: LogLevel, message: String) {
    // The last entry says why it failed: there is always room for that.
    if log.len() >= LOG_MAX && level != LogLevel::Error {
        return;
    }
    let seq = log.last().map_or(1, |last| last.seq + 1);
    log.push(JobLogEntry { seq, at: Timestamp::now(), level, message });
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
