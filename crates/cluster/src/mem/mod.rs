//! A store in memory: for tests and simulators, deterministic under a clock that they move.
//!
//! A [`MemStore`] is one node's connection; [`MemStore::client`] makes another one to the same data, with
//! [faults](Faults) of its own, so that one node can be cut off while others are not. Leases end when time has come, as
//! the injected clock tells it; nothing runs in the background. Nothing here lasts longer than the process.

mod faults;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::watch;

pub use self::faults::{Call, Fault, Faults};
use crate::{
    clock::{Clock, SystemClock},
    core::{Core, Decision},
    error::{Error, Result},
    store::{
        Compare, Lease, LeaseId, Listing, Op, Revision, Store, TxnOutcome, Versioned, check_key, check_ttl, check_txn,
    },
    watch::{Changes, Source, Watch},
};

pub use crate::core::History;

const LOCATION: &str = "(in memory)";

/// How a store in memory is made.
#[derive(Clone)]
pub struct MemOptions {
    /// Time for leases, delays and deadlines.
    pub clock: Arc<dyn Clock>,
    /// Deadline of every call.
    pub timeout: Duration,
    /// What is kept for watches.
    pub history: History,
}

impl Default for MemOptions {
    fn default() -> Self {
        Self { clock: Arc::new(SystemClock::new()), timeout: Duration::from_secs(5), history: History::default() }
    }
}

/// A transaction whose sender has given up and that arrives all the same.
struct Late {
    due: Duration,
    compares: Vec<Compare>,
    ops: Vec<Op>,
}

struct Inner {
    core: Core,
    late: Vec<Late>,
    last_lease: i64,
}

struct Data {
    inner: Mutex<Inner>,
    changed: watch::Sender<Revision>,
    options: MemOptions,
}

/// One client of a store in memory. Cloning gives the same client.
#[derive(Clone)]
pub struct MemStore {
    data: Arc<Data>,
    faults: Arc<Faults>,
}

impl MemStore {
    /// An empty store with the machine's clock.
    pub fn new() -> Self {
        Self::with(MemOptions::default())
    }

    /// An empty store.
    pub fn with(options: MemOptions) -> Self {
        let core = Core::new(options.history);
        let changed = watch::Sender::new(core.revision());
        let inner = Mutex::new(Inner { core, late: Vec::new(), last_lease: 0 });
        Self { data: Arc::new(Data { inner, changed, options }), faults: Arc::default() }
    }

    /// Another client of the same data, without faults.
    #[must_use]
    pub fn client(&self) -> Self {
        Self { data: self.data.clone(), faults: Arc::default() }
    }

    /// What goes wrong for this client.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Forgets all history, so that watches behind it are told to list again.
    pub fn compact(&self) {
        self.data.lock().core.compact();
    }

    /// Meets what was scripted for a call. `Ok` says that the call takes place now.
    async fn reach(&self, call: Call) -> Result<Reached> {
        let (clock, timeout) = (&self.data.options.clock, self.data.options.timeout);
        match self.faults.take(call) {
            None => Ok(Reached::Whole),
            Some(Fault::Unavailable) => Err(Error::unavailable(LOCATION, "a fault was injected")),
            Some(Fault::Indeterminate { happens: false }) => Err(call.unanswered("a fault was injected".into())),
            Some(Fault::Indeterminate { happens: true }) => Ok(Reached::AnswerLost),
            Some(Fault::Delay(delay)) if delay < timeout => {
                clock.sleep_until(clock.now() + delay).await;
                Ok(Reached::Whole)
            }
            Some(Fault::Delay(_)) => {
                clock.sleep_until(clock.now() + timeout).await;
                Err(call.unanswered(format!("no answer within {timeout:?}")))
            }
            Some(Fault::Late(after)) => Ok(Reached::Late(clock.now() + after)),
        }
    }

    /// Answers as if the answer of a call that did take place had been lost, if it was.
    fn answer<T>(reached: Reached, call: Call, answer: Result<T>) -> Result<T> {
        match reached {
            Reached::Whole => answer,
            Reached::AnswerLost | Reached::Late(_) => Err(call.unanswered("a fault was injected".into())),
        }
    }
}

/// How far a call came.
#[derive(Clone, Copy)]
enum Reached {
    Whole,
    AnswerLost,
    Late(Duration),
}

impl Default for MemStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Data {
    /// The state, with everything done whose time has come.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.tick(self.options.clock.now()) {
            self.announce(&inner);
        }
        inner
    }

    fn announce(&self, inner: &Inner) {
        self.changed.send_replace(inner.core.revision());
    }

    fn txn(&self, compares: &[Compare], ops: &[Op]) -> Result<TxnOutcome> {
        let mut inner = self.lock();
        let outcome = inner.txn(compares, ops)?;
        self.announce(&inner);
        Ok(outcome)
    }
}

impl Inner {
    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<TxnOutcome> {
        match self.core.decide(compares, ops)? {
            Decision::Settled(outcome) => Ok(outcome),
            Decision::Commit(changes) => {
                self.core.apply(changes);
                Ok(TxnOutcome { succeeded: true, revision: self.core.revision() })
            }
        }
    }

    /// Does what is due, in the order in which it was due. True if anything may have changed.
    fn tick(&mut self, now: Duration) -> bool {
        let before = self.core.revision();
        while let Some(at) = self.next_due().filter(|at| *at <= now) {
            if let Some(index) = self.late.iter().position(|late| late.due == at) {
                let late = self.late.remove(index);
                // Whether it still succeeds is nobody's business any more.
                let _ = self.txn(&late.compares, &late.ops);
            } else if let Some(lease) = self.core.expired(at) {
                self.end(lease);
            }
        }
        self.core.revision() != before
    }

    fn next_due(&self) -> Option<Duration> {
        self.late.iter().map(|late| late.due).chain(self.core.next_expiry()).min()
    }

    fn end(&mut self, lease: LeaseId) {
        if let Some(changes) = self.core.ending(lease) {
            self.core.apply(changes);
        }
        self.core.end(lease);
    }
}

#[async_trait]
impl Store for MemStore {
    fn location(&self) -> String {
        LOCATION.into()
    }

    async fn get(&self, key: &[u8]) -> Result<Option<Versioned>> {
        check_key(key)?;
        let reached = self.reach(Call::Read).await?;
        let entry = self.data.lock().core.get(key).cloned();
        Self::answer(reached, Call::Read, Ok(entry))
    }

    async fn list(&self, prefix: &[u8]) -> Result<Listing> {
        let reached = self.reach(Call::Read).await?;
        let listing = self.data.lock().core.list(prefix);
        Self::answer(reached, Call::Read, Ok(listing))
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome> {
        check_txn(&compares, &ops)?;
        match self.reach(Call::Txn).await? {
            Reached::Late(due) => {
                self.data.lock().late.push(Late { due, compares, ops });
                // Whoever waits for the next thing to happen must learn that there is one more.
                self.data.changed.send_modify(|_| ());
                let clock = &self.data.options.clock;
                let deadline = clock.now() + self.data.options.timeout;
                clock.sleep_until(deadline).await;
                Err(Call::Txn.unanswered(format!("no answer within {:?}", self.data.options.timeout)))
            }
            reached => Self::answer(reached, Call::Txn, self.data.txn(&compares, &ops)),
        }
    }

    fn watch(&self, prefix: &[u8], from: Revision) -> Watch {
        let (data, faults) = (self.data.clone(), self.faults.clone());
        let breaks = faults.breaks();
        Watch::new(prefix, from, Box::new(MemSource { changed: data.changed.subscribe(), data, faults, breaks }))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        check_ttl(ttl)?;
        let reached = self.reach(Call::Lease).await?;
        let id = {
            let mut inner = self.data.lock();
            // Counted, not random: runs of a simulator are equal.
            inner.last_lease += 1;
            let id = LeaseId(inner.last_lease);
            inner.core.grant(id, ttl, self.data.options.clock.now());
            id
        };
        self.data.changed.send_modify(|_| ());
        Self::answer(reached, Call::Lease, Ok(Lease { id, ttl }))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        let reached = self.reach(Call::Lease).await?;
        let answer = self.data.lock().core.keep_alive(lease, self.data.options.clock.now());
        Self::answer(reached, Call::Lease, answer)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        let reached = self.reach(Call::Lease).await?;
        {
            let mut inner = self.data.lock();
            inner.end(lease);
            self.data.announce(&inner);
        }
        Self::answer(reached, Call::Lease, Ok(()))
    }
}

struct MemSource {
    data: Arc<Data>,
    faults: Arc<Faults>,
    changed: watch::Receiver<Revision>,
    breaks: watch::Receiver<u64>,
}

#[async_trait]
impl Source for MemSource {
    async fn next(&mut self, prefix: &[u8], from: Revision) -> Result<Changes> {
        loop {
            if self.breaks.has_changed().unwrap_or(false) || self.faults.watches_fail() {
                self.breaks.mark_unchanged();
                return Err(Error::unavailable(LOCATION, "a fault was injected"));
            }
            self.changed.mark_unchanged();
            let due = {
                let inner = self.data.lock();
                if let Some(changes) = inner.core.changes_since(prefix, from)? {
                    return Ok(changes);
                }
                inner.next_due()
            };
            let clock = &self.data.options.clock;
            let time = async {
                match due {
                    Some(at) => clock.sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // None of these can end otherwise: this holds the data, and with it the senders.
            tokio::select! {
                _ = self.changed.changed() => {}
                _ = self.breaks.changed() => self.breaks.mark_changed(),
                () = time => {}
            }
        }
    }
}
