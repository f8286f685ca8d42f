//! Who leads: at most one candidate whose writes succeed.
//!
//! ```text
//! campaign ─► put own key if absent, under a lease ─┬─ succeeded ─► Leadership { epoch = revision of that put }
//!    ▲                                              ├─ refused ───► wait until the leader's key is gone
//!    └──────────────────────────────────────────────┴─ unknown ───► ask the same again; the key tells whose it is
//!
//! Leadership ─► keeps the lease alive ─► lost: the lease could not be kept, or the key is another's
//! ```
//!
//! Two leaders may *believe* to lead at the same time: one that was suspended wakes up and has not noticed yet. What
//! keeps them apart is the [guard](Leadership::guard), a compare to put into every transaction that a leader makes: the
//! key must still be of this epoch. A deposed leader's transaction is refused, however late it comes. Outside the store
//! the [epoch](Leadership::epoch) serves as a fencing number: it only rises, as long as the store's revisions do.
//! [`Leadership::lost`] is for giving up soon, by the local clock and a tenth of the lease early; it proves nothing.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    clock::{Clock, SystemClock},
    error::{Error, Result},
    store::{Compare, Lease, Op, Revision, Store, Versioned},
    watch::Change,
};

/// What keys of elections begin with.
const PREFIX: &str = "/election/";

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Name that the candidate gave.
    pub id: String,
    /// Its fencing number.
    pub epoch: Revision,
}

/// Somebody who may lead.
#[derive(Clone)]
pub struct Candidate {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    key: Bytes,
    id: String,
    ttl: Duration,
}

impl Candidate {
    /// A candidate called `id` in the election called `name`. `ttl` is how long a leader that vanishes blocks the next
    /// one; it keeps its lease alive three times in that time.
    pub fn new(store: Arc<dyn Store>, name: &str, id: &str, ttl: Duration) -> Self {
        let key = Bytes::from(format!("{PREFIX}{name}"));
        Self { store, clock: Arc::new(SystemClock::new()), key, id: id.into(), ttl }
    }

    /// With a clock of a simulator's.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Waits until this candidate leads. A store that does not answer is waited for. Dropping the future leaves the
    /// election, at the latest when its lease ends.
    pub async fn campaign(&self) -> Result<Leadership> {
        loop {
            match self.attempt().await {
                Ok(Attempt::Won(leadership)) => return Ok(leadership),
                Ok(Attempt::Taken(by)) => self.wait_for_end(&by).await?,
                Err(Error::LeaseEnded { .. }) => {}
                Err(error) if error.is_retryable() => {
                    tracing::debug!(id = self.id, %error, "no election while the store is away");
                    self.pause(self.ttl / 4).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Who leads now, if anybody does.
    pub async fn leader(&self) -> Result<Option<Leader>> {
        Ok(self.store.get(&self.key).await?.map(|entry| Leader { id: who(&entry), epoch: entry.revision }))
    }

    async fn attempt(&self) -> Result<Attempt> {
        if let Some(entry) = self.store.get(&self.key).await? {
            return Ok(Attempt::Taken(entry));
        }
        let since = self.clock.now();
        let lease = self.store.grant(self.ttl).await?;
        let nonce = nonce()?;
        let claimed = self.claim(&lease, &nonce).await;
        match claimed {
            Ok(Some(epoch)) => Ok(Attempt::Won(Leadership::new(self, lease, epoch, since))),
            Ok(None) => {
                let _ = self.store.revoke(lease.id).await;
                match self.store.get(&self.key).await? {
                    Some(entry) => Ok(Attempt::Taken(entry)),
                    None => Err(Error::unavailable(&self.store.location(), "the leader resigned just now")),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Puts the key if it is absent. Asked again after doubt, it can succeed only once, and the nonce tells whose it
    /// is.
    async fn claim(&self, lease: &Lease, nonce: &str) -> Result<Option<Revision>> {
        let value = format!("{nonce} {}", self.id);
        loop {
            let compare = Compare::absent(self.key.clone());
            let put = Op::put_leased(self.key.clone(), value.clone(), lease.id);
            match self.store.txn(vec![compare], vec![put]).await {
                Ok(outcome) if outcome.succeeded => return Ok(Some(outcome.revision)),
                Ok(_) => {
                    let entry = self.store.get(&self.key).await?;
                    return Ok(entry.filter(|entry| entry.value == value).map(|entry| entry.revision));
                }
                // Ends when the lease has.
                Err(Error::Indeterminate { .. }) => self.pause(self.ttl / 20).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until a leader's key is gone.
    async fn wait_for_end(&self, of: &Versioned) -> Result<()> {
        let mut watch = self.store.watch(&self.key, of.revision.next());
        loop {
            match watch.next().await {
                // Others' keys may begin with this one.
                Ok(changes) => {
                    let gone = |change: &Change| matches!(change, Change::Delete { key } if *key == self.key);
                    if changes.changes.iter().any(gone) {
                        return Ok(());
                    }
                }
                Err(Error::Compacted { .. }) => return Ok(()),
                Err(error) if error.is_retryable() => {
                    self.pause(self.ttl / 4).await;
                    // Whoever it was may be gone for long.
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn pause(&self, time: Duration) {
        self.clock.sleep_until(self.clock.now() + time).await;
    }
}

enum Attempt {
    Won(Leadership),
    Taken(Versioned),
}

/// A won election. Dropping it resigns, in the background; [`Leadership::resign`] waits for that.
#[derive(Debug)]
pub struct Leadership {
    key: Bytes,
    epoch: Revision,
    /// Dropped to end the task.
    resigning: watch::Sender<()>,
    lost: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Leadership {
    fn new(candidate: &Candidate, lease: Lease, epoch: Revision, since: Duration) -> Self {
        let (resigning, resigned) = watch::channel(());
        let (report, lost) = watch::channel(false);
        let keeper = Keeper { candidate: candidate.clone(), lease, epoch, last: since, report };
        let task = tokio::spawn(keeper.run(resigned));
        Self { key: candidate.key.clone(), epoch, resigning, lost, task }
    }

    /// Fencing number: higher than that of every leader before.
    pub fn epoch(&self) -> Revision {
        self.epoch
    }

    /// The condition to put into every transaction that only the leader may make. It keeps other leaders' writes apart
    /// from this one's, not this one's from each other: where a late one of its own could do harm, compare the keys too.
    pub fn guard(&self) -> Compare {
        Compare::at(self.key.clone(), self.epoch)
    }

    /// Whether leadership has been lost, as far as is known here and now.
    pub fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Returns when leadership is lost. Can be waited for by many, again and again.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut lost = self.lost.clone();
        async move {
            // An error is the keeper's end, which is the end of leadership as well.
            let _ = lost.wait_for(|lost| *lost).await;
        }
    }

    /// Lets others lead at once instead of when the lease ends.
    pub async fn resign(self) {
        drop(self.resigning);
        let _ = self.task.await;
    }
}

/// The task that keeps a leader's lease.
struct Keeper {
    candidate: Candidate,
    lease: Lease,
    epoch: Revision,
    /// When the last keep-alive that was answered was sent. Not when it was answered: the store counts from no earlier.
    last: Duration,
    report: watch::Sender<bool>,
}

impl Keeper {
    async fn run(mut self, mut resigned: watch::Receiver<()>) {
        let ended = async {
            // The sender sends nothing; it only goes.
            while resigned.changed().await.is_ok() {}
        };
        tokio::select! {
            () = ended => {}
            why = self.keep() => tracing::warn!(id = self.candidate.id, epoch = %self.epoch, why, "leadership is lost"),
        }
        self.report.send_replace(true);
        // Late is as good as never here: the lease ends by itself.
        if let Err(error) = self.candidate.store.revoke(self.lease.id).await {
            tracing::debug!(%error, "the lease of the leader ends by itself");
        }
    }

    /// Keeps the lease until that is over, and says why.
    async fn keep(&mut self) -> String {
        loop {
            // A tenth early, for clocks that differ.
            let give_up = self.last + self.lease.ttl.mul_f64(0.9);
            let clock = self.candidate.clock.clone();
            let next = self.last + self.lease.ttl / 3;
            let renewed = async {
                clock.sleep_until(next).await;
                loop {
                    match self.renew().await {
                        Ok(sent) => return Ok(sent),
                        Err(error) if error.is_retryable() => self.candidate.pause(self.lease.ttl / 20).await,
                        Err(error) => return Err(error.to_string()),
                    }
                }
            };
            tokio::select! {
                renewed = renewed => match renewed {
                    Ok(sent) => self.last = sent,
                    Err(why) => return why,
                },
                () = clock.sleep_until(give_up) => return "the store did not answer in time".into(),
            }
        }
    }

    async fn renew(&self) -> Result<Duration> {
        let sent = self.candidate.clock.now();
        self.candidate.store.keep_alive(self.lease.id).await?;
        let entry = self.candidate.store.get(&self.candidate.key).await?;
        match entry {
            Some(entry) if entry.revision == self.epoch => Ok(sent),
            _ => Err(Error::LeaseEnded { lease: self.lease.id }),
        }
    }
}

/// The name in a leader's key; the nonce stands before it.
fn who(entry: &Versioned) -> String {
    let value = String::from_utf8_lossy(&entry.value);
    value.split_once(' ').map_or_else(|| value.to_string(), |(_, id)| id.to_owned())
}

fn nonce() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Error::unavailable("(random numbers)", error.to_string()))?;
    Ok(hex::encode(bytes))
}
