//! A store in one file, for the daemon of a host that needs no other one to agree with.
//!
//! All state is in memory; a thread of its own evaluates transactions one after another, makes each durable in the
//! [file](file), and only then applies and answers it. So reads never touch the disk and never show what a crash could
//! take back. One process at a time uses the file, and therefore leases do not outlive the process: they are over, and
//! their keys gone, when the file is opened. Copies are made by themselves: daily, and before a new version
//! writes to the file for the first time.
//!
//! Not here: sharing the file between processes or hosts; the daemon's API does that.

mod backup;
mod file;
mod guard;
mod worker;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Semaphore, oneshot, watch};

pub use self::backup::{Backup, Restored, backups, restore_backup};
use self::{
    file::File,
    guard::Guard,
    worker::{Job, Request, Shared, Worker},
};
use crate::{
    core::History,
    error::{Error, Result},
    store::Op,
    store::{
        Compare, Lease, LeaseId, Listing, Revision, Store, TxnOutcome, Versioned, check_key, check_ttl, check_txn,
    },
    watch::{Changes, Source, Watch},
};

/// Requests that wait for the file at most; more wait for their turn to wait.
const QUEUE_MAX: usize = 256;

/// How a state file is used.
#[derive(Clone, Debug)]
pub struct EmbeddedOptions {
    /// Deadline of every call.
    pub timeout: Duration,
    /// What is kept for watches.
    pub history: History,
    /// Make the file if there is neither one nor a backup of one.
    pub create_if_missing: bool,
    /// Time between automatic backups.
    pub backup_every: Duration,
    /// Automatic backups that are kept.
    pub backups_kept: usize,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            history: History::default(),
            create_if_missing: true,
            backup_every: Duration::from_secs(24 * 3600),
            backups_kept: 10,
        }
    }
}

/// A store in one file. Dropping it waits until the file is closed.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    sender: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
    queue: Arc<Semaphore>,
    timeout: Duration,
    path: PathBuf,
}

impl EmbeddedStore {
    /// Opens a state file, after checking all of it. Blocks.
    pub fn open(path: impl AsRef<Path>, options: EmbeddedOptions) -> Result<Self> {
        let path = path.as_ref();
        create_if_needed(path, &options)?;
        let guard = Guard::take(path)?;
        let opened = Worker::open(path, guard, &options).map_err(|error| backup::advise(path, error))?;
        let (worker, shared, sender) = opened;
        let thread = std::thread::Builder::new().name("cluster-state".into()).spawn(move || worker.run());
        Ok(Self {
            shared,
            sender: Some(sender),
            thread: Some(thread.map_err(Error::io("start a thread for", path))?),
            queue: Arc::new(Semaphore::new(QUEUE_MAX)),
            timeout: options.timeout,
            path: path.into(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a backup now, beside the automatic ones.
    pub async fn backup(&self) -> Result<Backup> {
        self.ask(Job::Backup, Error::unavailable).await
    }

    /// Has the worker do something, and waits for its answer until the deadline. `lost` is what it means that a request
    /// was handed over and not answered.
    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T>>) -> Job,
        lost: fn(&str, String) -> Error,
    ) -> Result<T> {
        let deadline = tokio::time::Instant::now() + self.timeout;
        let location = self.location();
        let late = || format!("no answer within {:?}", self.timeout);
        let turn = tokio::time::timeout_at(deadline, self.queue.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else { return Err(Error::unavailable(&location, late())) };
        let (reply, answer) = oneshot::channel();
        let request = Request { job: job(reply), _turn: turn };
        let sent = self.sender.as_ref().is_some_and(|sender| sender.send(request).is_ok());
        if !sent {
            return Err(Error::unavailable(&location, "its thread has ended"));
        }
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(lost(&location, "its thread has ended".into())),
            Err(_) => Err(lost(&location, late())),
        }
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A new file appears whole or not at all, and never where there was one: a state that is gone is no empty state.
fn create_if_needed(path: &Path, options: &EmbeddedOptions) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let missing = |what: String| Err(Error::Missing { path: path.into(), what });
    if !backups(path).is_empty() {
        return missing(format!("there was, and it is gone; {}", backup::remedy(path)));
    }
    if !options.create_if_missing {
        return missing("`virtward cluster init` makes it".into());
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let staged = path.with_extension("new");
    backup::create_empty(&staged)?;
    File::init(&staged, options.history)?;
    fs::File::open(&staged).and_then(|file| file.sync_all()).map_err(Error::io("sync", &staged))?;
    fs::hard_link(&staged, path).map_err(Error::io("create", path))?;
    fs::remove_file(&staged).map_err(Error::io("remove", &staged))?;
    backup::sync_dir(dir)
}

#[async_trait]
impl Store for EmbeddedStore {
    fn location(&self) -> String {
        self.path.display().to_string()
    }

    async fn get(&self, key: &[u8]) -> Result<Option<Versioned>> {
        check_key(key)?;
        self.shared.read(|core| core.get(key).cloned())
    }

    async fn list(&self, prefix: &[u8]) -> Result<Listing> {
        self.shared.read(|core| core.list(prefix))
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome> {
        check_txn(&compares, &ops)?;
        self.ask(|reply| Job::Txn { compares, ops, reply }, Error::indeterminate).await
    }

    fn watch(&self, prefix: &[u8], from: Revision) -> Watch {
        let source = EmbeddedSource { changed: self.shared.changed.subscribe(), shared: Arc::downgrade(&self.shared) };
        Watch::new(prefix, from, Box::new(source))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        check_ttl(ttl)?;
        self.ask(|reply| Job::Grant { ttl, reply }, Error::unavailable).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.ask(|reply| Job::KeepAlive { lease, reply }, Error::unavailable).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.ask(|reply| Job::Revoke { lease, reply }, Error::unavailable).await
    }
}

/// Holds the state weakly: a watch that is left over keeps no store open.
struct EmbeddedSource {
    changed: watch::Receiver<Revision>,
    shared: std::sync::Weak<Shared>,
}

#[async_trait]
impl Source for EmbeddedSource {
    async fn next(&mut self, prefix: &[u8], from: Revision) -> Result<Changes> {
        let closed = || Error::Unavailable { location: "(closed)".into(), what: "the store was closed".into() };
        loop {
            self.changed.mark_unchanged();
            let found = {
                let shared = self.shared.upgrade().ok_or_else(closed)?;
                shared.read(|core| core.changes_since(prefix, from))??
            };
            if let Some(changes) = found {
                return Ok(changes);
            }
            self.changed.changed().await.map_err(|_| closed())?;
        }
    }
}
