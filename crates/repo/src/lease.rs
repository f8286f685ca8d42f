//! Epochs and leases: how writers and a garbage collector agree without a lock, ordered by counters and not by clocks.
//!
//! ```text
//! writer:    read epoch E ─► lease (E, beat 0) ─► is E still the newest? ─no─► beat again with the newer one
//!            … beat n+1, n+2 … while it runs ─► publish ─► is `.end` absent? ─► acknowledged
//! collector: publish epoch E+1 with the condemned packs ─► wait until every lease is of E+1 or later, or has not beaten
//!            for its time to live by the collector's own clock ─► `.end` for the silent ─► mark again ─► delete
//! ```
//! A writer treats chunks in packs condemned by its epoch as absent. `.end` is put-if-absent, so a writer that slept
//! through its lease learns it after publishing at the latest, and does not acknowledge.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crossbeam_channel::{Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    format::{ObjectId, envelope, envelope::Kind, names, sealed},
    keys::KeyRing,
    store::{Put, Store, put_new},
    util::lock,
};

/// An epoch: the packs that are condemned from now on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Epoch {
    /// Number; 0 is implied by an empty repository.
    pub epoch: u64,
    /// Packs whose chunks count as absent. Cumulative: packs that are deleted may be left out.
    pub condemned: Vec<ObjectId>,
}

/// One beat of a lease.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Beat {
    /// Writer.
    pub writer: ObjectId,
    /// Epoch that the writer knows.
    pub epoch: u64,
    /// Counter of beats.
    pub beat: u64,
    /// Silence after which the lease may be ended, in seconds.
    pub ttl_s: u64,
}

/// The newest epoch.
pub fn newest_epoch(store: &dyn Store, ring: &KeyRing) -> Result<Epoch> {
    let mut newest: Option<u64> = None;
    store.list(names::EPOCHS, &mut |object| {
        let number = u64::from_str_radix(names::leaf(&object.name), 16).ok();
        newest = newest.max(number);
        Ok(())
    })?;
    let Some(number) = newest else { return Ok(Epoch::default()) };
    let name = names::epoch(number);
    let epoch: Epoch = sealed::open(ring, Kind::Epoch, &name, &store.get(&name, envelope::ENVELOPE_BYTES_MAX)?)?;
    if epoch.epoch == number {
        Ok(epoch)
    } else {
        Err(Error::damaged(name, "it holds another epoch than its name says"))
    }
}

/// Condemns packs in which damage was found: from the next epoch on, writers store anew what is in them.
pub fn condemn(store: &dyn Store, ring: &KeyRing, packs: &HashSet<ObjectId>) -> Result<()> {
    loop {
        let mut next = newest_epoch(store, ring)?;
        let known: HashSet<ObjectId> = next.condemned.iter().copied().collect();
        let before = next.condemned.len();
        next.condemned.extend(packs.difference(&known));
        if next.condemned.len() == before {
            return Ok(());
        }
        next.condemned[before..].sort_unstable();
        next.epoch += 1;
        let name = names::epoch(next.epoch);
        match store.put_if_absent(&name, &sealed::seal(ring, Kind::Epoch, &name, &next)?)? {
            Put::Created => return Ok(()),
            // Somebody else began that epoch; theirs is the newest now.
            Put::Exists => {}
        }
    }
}

/// A writer's lease. Ends when dropped.
pub struct Lease {
    state: Arc<State>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Packs that the writer must not refer to.
    pub condemned: HashSet<ObjectId>,
}

struct State {
    store: Arc<dyn Store>,
    ring: Arc<KeyRing>,
    writer: ObjectId,
    epoch: u64,
    beat: AtomicU64,
    ttl: Duration,
    beaten: Mutex<Instant>,
}

impl State {
    fn put_beat(&self, number: u64) -> Result<()> {
        let name = names::lease(&self.writer, number);
        let beat = Beat { writer: self.writer, epoch: self.epoch, beat: number, ttl_s: self.ttl.as_secs() };
        // Counted from before the write: the collector may have seen it at any time since.
        let now = Instant::now();
        put_new(&*self.store, &name, &sealed::seal(&self.ring, Kind::Lease, &name, &beat)?)?;
        *lock(&self.beaten) = now;
        Ok(())
    }

    fn beat(&self) {
        // Every attempt has its own number: one that failed may have arrived all the same.
        let last = self.beat.fetch_add(1, Ordering::SeqCst);
        match self.put_beat(last + 1) {
            Ok(()) => {
                // A store may not let writers delete; the collector does it then.
                let _ = self.store.delete(&names::lease(&self.writer, last));
            }
            Err(error) => tracing::warn!(%error, "cannot renew the lease of this writer; will try again"),
        }
    }
}

impl Lease {
    /// Takes a lease and begins to renew it.
    pub fn begin(store: Arc<dyn Store>, ring: Arc<KeyRing>, ttl: Duration) -> Result<Self> {
        let writer = ObjectId::random();
        let mut newest = newest_epoch(&*store, &ring)?;
        let mut beat = 0;
        let state = loop {
            let state = State {
                store: store.clone(),
                ring: ring.clone(),
                writer,
                epoch: newest.epoch,
                beat: AtomicU64::new(beat),
                ttl,
                beaten: Mutex::new(Instant::now()),
            };
            state.put_beat(beat)?;
            let again = newest_epoch(&*store, &ring)?;
            if again.epoch == newest.epoch {
                break Arc::new(state);
            }
            let _ = store.delete(&names::lease(&writer, beat));
            (newest, beat) = (again, beat + 1);
        };
        let (stop, stopped) = bounded::<()>(0);
        let beating = state.clone();
        let thread = std::thread::Builder::new()
            .name("repo-lease".into())
            .spawn(move || {
                while stopped.recv_timeout(beating.ttl / 10) == Err(crossbeam_channel::RecvTimeoutError::Timeout) {
                    beating.beat();
                }
            })
            .map_err(|e| Error::io("start", "the lease thread", e))?;
        Ok(Self { state, stop: Some(stop), thread: Some(thread), condemned: newest.condemned.into_iter().collect() })
    }

    /// The writer's identity.
    pub fn writer(&self) -> ObjectId {
        self.state.writer
    }
    /// The epoch that the writer knows.
    pub fn epoch(&self) -> u64 {
        self.state.epoch
    }

    /// Fails if the lease ran out or was ended by a collector.
    pub fn check(&self) -> Result<()> {
        let silent = lock(&self.state.beaten).elapsed();
        if silent > self.state.ttl {
            return Err(Error::LeaseLost { why: format!("it could not be renewed for {} s", silent.as_secs()) });
        }
        if self.state.store.exists(&names::lease_end(&self.state.writer))? {
            return Err(Error::LeaseLost { why: "a garbage collector ended it".into() });
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let State { store, writer, .. } = &*self.state;
        let mut beats = Vec::new();
        let mine = writer.to_string();
        let listed = store.list(names::LEASES, &mut |object| {
            if names::leaf(&object.name).starts_with(&mine) && !object.name.ends_with(".end") {
                beats.push(object.name);
            }
            Ok(())
        });
        if listed.is_err() || beats.iter().any(|name| store.delete(name).is_err()) {
            let _ = store.put_if_absent(&names::lease_end(writer), &[]);
        }
    }
}
