//! The thread that owns the file: it alone changes the state, one request after another.
//!
//! ```text
//! request ─► decide on the state in memory ─► commit to the file ─► apply in memory ─► wake watches ─► answer
//!                                                  │ nobody knows whether that happened
//!                                                  ▼
//!                                 broken: answer Indeterminate, read the file again before the next request
//! ```

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, mpsc},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};

use super::{
    EmbeddedOptions,
    backup::{self, Backup, backups},
    file::{CommitError, File},
    guard::Guard,
};
use crate::{
    core::{Core, Decision, new_lease_id},
    error::{Error, Result},
    store::{Compare, Lease, LeaseId, Op, Revision, TxnOutcome},
    watch::{Change, Changes},
};

/// How long a file that failed is left alone before it is read again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Where an answer goes.
type Reply<T> = oneshot::Sender<Result<T>>;

/// What the worker can do.
pub(super) enum Job {
    Txn { compares: Vec<Compare>, ops: Vec<Op>, reply: Reply<TxnOutcome> },
    Grant { ttl: Duration, reply: Reply<Lease> },
    KeepAlive { lease: LeaseId, reply: Reply<()> },
    Revoke { lease: LeaseId, reply: Reply<()> },
    Backup(Reply<Backup>),
}

/// A job with its place in the queue.
pub(super) struct Request {
    pub(super) job: Job,
    pub(super) _turn: OwnedSemaphorePermit,
}

/// What readers and watches see.
pub(super) struct Shared {
    /// Only the worker writes, and commits while it reads: readers never wait for the disk. An error while the file is
    /// broken: what is in memory may be less than what is in the file.
    state: RwLock<Result<Core>>,
    pub(super) changed: watch::Sender<Revision>,
}

impl Shared {
    pub(super) fn read<T>(&self, read: impl FnOnce(&Core) -> T) -> Result<T> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(read).map_err(Error::clone)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Core) -> T) -> Result<T> {
        self.state.write().unwrap_or_else(PoisonError::into_inner).as_mut().map(change).map_err(|error| error.clone())
    }

    fn replace(&self, state: Result<Core>) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.send_modify(|_| ());
    }
}

/// The thread's own.
pub(super) struct Worker {
    shared: Arc<Shared>,
    requests: mpsc::Receiver<Request>,
    /// None while the file is broken.
    file: Option<File>,
    /// When a broken file is read again.
    retry_at: Instant,
    path: PathBuf,
    origin: Instant,
    options: EmbeddedOptions,
    next_backup: Instant,
    // Last: the lock goes after the file is closed.
    _guard: Guard,
}

impl Worker {
    /// Reads the file and makes it ready: a backup if one is due, leases of the last process ended.
    pub(super) fn open(
        path: &Path,
        guard: Guard,
        options: &EmbeddedOptions,
    ) -> Result<(Self, Arc<Shared>, mpsc::Sender<Request>)> {
        let (file, core) = File::open(path, options.history)?;
        let unusable = |error: rusqlite::Error| Error::unavailable(&path.display().to_string(), error.to_string());
        let upgrade = file.writer().map_err(unusable)? != env!("CARGO_PKG_VERSION");
        if upgrade {
            backup::make(&file, path, core.revision(), "-before-upgrade", options.backups_kept)?;
            file.sign().map_err(unusable)?;
        }
        let newest = backups(path).first().map(|backup| backup.made);
        let age = newest.map(|made| Duration::try_from(Timestamp::now().duration_since(made)).unwrap_or_default());
        // A file that holds nothing yet need not be saved from anything.
        let empty = core.entries().next().is_none();
        let due_in = match age {
            _ if empty => options.backup_every,
            Some(age) => options.backup_every.saturating_sub(age),
            None => Duration::ZERO,
        };
        let (sender, requests) = mpsc::channel();
        let changed = watch::Sender::new(core.revision());
        let shared = Arc::new(Shared { state: RwLock::new(Ok(core)), changed });
        let mut worker = Self {
            shared: shared.clone(),
            requests,
            file: Some(file),
            retry_at: Instant::now(),
            path: path.into(),
            origin: Instant::now(),
            options: options.clone(),
            next_backup: Instant::now() + due_in,
            _guard: guard,
        };
        worker.end_leases_of_the_past()?;
        Ok((worker, shared, sender))
    }

    /// Serves requests until no store is left to send any.
    pub(super) fn run(mut self) {
        loop {
            let wait = self.wait();
            match self.requests.recv_timeout(wait) {
                Ok(request) => {
                    self.end_expired();
                    self.serve(request.job);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.recover();
                    self.end_expired();
                    self.back_up_if_due();
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Some(Err(what)) = self.file.take().map(File::close) {
            tracing::warn!(path = %self.path.display(), what, "the cluster's state was not closed cleanly");
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Until something has to be done without being asked.
    fn wait(&self) -> Duration {
        if self.file.is_none() {
            return self.retry_at.saturating_duration_since(Instant::now());
        }
        let lease = self.shared.read(Core::next_expiry).ok().flatten();
        let lease = lease.map(|at| at.saturating_sub(self.now()));
        let backup = self.next_backup.saturating_duration_since(Instant::now());
        lease.map_or(backup, |lease| lease.min(backup))
    }

    fn serve(&mut self, job: Job) {
        match job {
            // Whoever does not wait any more has been told that nothing is known; nothing is then done.
            Job::Txn { reply, .. } if reply.is_closed() => {}
            Job::Txn { compares, ops, reply } => drop(reply.send(self.txn(&compares, &ops))),
            Job::Grant { ttl, reply } => drop(reply.send(self.grant(ttl))),
            Job::KeepAlive { lease, reply } => {
                let now = self.now();
                drop(reply.send(self.shared.change(|core| core.keep_alive(lease, now)).and_then(|kept| kept)));
            }
            Job::Revoke { lease, reply } => drop(reply.send(self.end(lease))),
            Job::Backup(reply) => drop(reply.send(self.back_up())),
        }
    }

    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<TxnOutcome> {
        match self.shared.read(|core| core.decide(compares, ops))?? {
            Decision::Settled(outcome) => Ok(outcome),
            Decision::Commit(changes) => {
                let revision = changes.revision;
                self.commit(changes)?;
                Ok(TxnOutcome { succeeded: true, revision })
            }
        }
    }

    /// Makes changes durable, then visible.
    fn commit(&mut self, changes: Changes) -> Result<()> {
        let location = self.path.display().to_string();
        let Some(file) = &mut self.file else {
            return Err(Error::unavailable(&location, "the file failed and could not be read again yet"));
        };
        match self.shared.read(|core| file.commit(core, &changes))? {
            Ok(()) => {
                let revision = changes.revision;
                self.shared.change(|core| core.apply(changes))?;
                self.shared.changed.send_replace(revision);
                Ok(())
            }
            Err(CommitError::Refused(what)) => Err(Error::Full { location, what }),
            Err(CommitError::Unknown(what)) => {
                tracing::error!(path = location, what, "writing the cluster's state failed");
                self.file = None;
                self.retry_at = Instant::now() + RETRY_AFTER;
                self.shared.replace(Err(Error::unavailable(&location, format!("writing to it failed: {what}"))));
                Err(Error::indeterminate(&location, what))
            }
        }
    }

    /// Reads a file again that failed. Leases that lived then are over: their holders could not be heard.
    fn recover(&mut self) {
        if self.file.is_some() || Instant::now() < self.retry_at {
            return;
        }
        self.retry_at = Instant::now() + RETRY_AFTER;
        match File::open(&self.path, self.options.history) {
            Ok((file, core)) => {
                self.file = Some(file);
                self.shared.replace(Ok(core));
                if let Err(error) = self.end_leases_of_the_past() {
                    tracing::warn!(%error, "keys of old leases stay");
                }
            }
            Err(error) => self.shared.replace(Err(backup::advise(&self.path, error))),
        }
    }

    fn grant(&mut self, ttl: Duration) -> Result<Lease> {
        let (id, now) = (new_lease_id()?, self.now());
        self.shared.change(|core| core.grant(id, ttl, now))?;
        Ok(Lease { id, ttl })
    }

    fn end(&mut self, lease: LeaseId) -> Result<()> {
        if let Some(changes) = self.shared.read(|core| core.ending(lease))? {
            self.commit(changes)?;
        }
        self.shared.change(|core| core.end(lease))
    }

    fn end_expired(&mut self) {
        while let Ok(Some(lease)) = self.shared.read(|core| core.expired(self.now())) {
            if let Err(error) = self.end(lease) {
                // A full disk, say. The lease is over all the same; its keys go as soon as they can.
                tracing::warn!(%lease, %error, "keys of a lease that is over stay for now");
                let again = self.now() + RETRY_AFTER;
                let _ = self.shared.change(|core| core.postpone(lease, again));
            }
        }
    }

    /// Deletes every leased key: no lease lives longer than the process that held the file.
    fn end_leases_of_the_past(&mut self) -> Result<()> {
        let changes = self.shared.read(|core| {
            let leased = core.entries().filter(|entry| entry.lease.is_some());
            let changes: Vec<Change> = leased.map(|entry| Change::Delete { key: entry.key.clone() }).collect();
            Changes { revision: core.revision().next(), changes }
        })?;
        if changes.changes.is_empty() { Ok(()) } else { self.commit(changes) }
    }

    fn back_up(&mut self) -> Result<Backup> {
        let location = self.path.display().to_string();
        let revision = self.shared.read(Core::revision)?;
        let file = self.file.as_ref().ok_or_else(|| Error::unavailable(&location, "the file failed"))?;
        backup::make(file, &self.path, revision, "", self.options.backups_kept)
    }

    fn back_up_if_due(&mut self) {
        if Instant::now() < self.next_backup {
            return;
        }
        self.next_backup = Instant::now() + self.options.backup_every;
        if let Err(error) = self.back_up() {
            tracing::error!(path = %self.path.display(), %error, "the automatic backup of the cluster's state failed");
            self.next_backup = Instant::now() + self.options.backup_every.min(Duration::from_secs(3600));
        }
    }
}
