//! Epochs and leases: how writers and a garbage collector agree without a lock, ordered by counters and not by clocks.
//!
//! ```text
//! writer:    read epoch E ─► lease (E, beat 0) ─► is E still the newest? ─no─► beat again with the newer one
//!            … beat n+1, n+2 … while it runs ─► publish ─► is `.end` absent? ─► acknowledged
//! collector: publish epoch E+1 with the condemned packs ─► is every lease of E+1 or later? Those that have not beaten
//!            for their time to live, by the store's clock, get an `.end` ─► mark again ─► delete
//! ```
//! Clocks only decide how patient a collector is. Ending the lease of a writer that is alive makes its run fail, and costs
//! nothing that was acknowledged.
//! A writer treats chunks in packs condemned by its epoch as absent. `.end` is put-if-absent, so a writer that slept
//! through its lease learns it after publishing at the latest, and does not acknowledge.

use std::{
    collections::{HashMap, HashSet},
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
    store::{Listed, Put, Store, put_new},
    util::lock,
};

/// An epoch: the packs that are condemned from now on. Once condemned, a pack stays so until it is deleted: whoever
/// decided that it may go can carry that out much later.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Epoch {
    /// Number; 0 is implied by an empty repository.
    pub epoch: u64,
    /// Packs whose chunks count as absent. Cumulative: packs that are deleted may be left out.
    pub condemned: Vec<ObjectId>,
    /// Per condemned pack the epoch that condemned it; a pack without one counts as condemned by this epoch.
    #[serde(default)]
    pub since: Vec<u64>,
}

impl Epoch {
    /// Every condemned pack with the epoch that condemned it.
    pub fn sentences(&self) -> impl Iterator<Item = (ObjectId, u64)> {
        let since = self.since.iter().copied().chain(std::iter::repeat(self.epoch));
        self.condemned.iter().copied().zip(since)
    }
}

/// Silence after which a lease that cannot be read may be ended.
const UNREADABLE_TTL: Duration = Duration::from_secs(3600);

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

/// How often a listing is repeated when what it listed went away meanwhile.
const RELISTINGS_MAX: usize = 100;

/// The newest epoch.
pub fn newest_epoch(store: &dyn Store, ring: &KeyRing) -> Result<Epoch> {
    for _ in 0..RELISTINGS_MAX {
        match try_newest_epoch(store, ring) {
            // Superseded and removed since the listing.
            Err(Error::Missing { .. }) => {}
            other => return other,
        }
    }
    try_newest_epoch(store, ring)
}

fn try_newest_epoch(store: &dyn Store, ring: &KeyRing) -> Result<Epoch> {
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

/// Condemns packs: from the next epoch on, writers store anew what is in them. `gone` are packs that the caller knows to be
/// deleted; nothing else leaves the list. Returns the newest epoch, which condemns them all.
pub fn condemn(
    store: &dyn Store,
    ring: &KeyRing,
    packs: &HashSet<ObjectId>,
    gone: &HashSet<ObjectId>,
) -> Result<Epoch> {
    loop {
        let newest = newest_epoch(store, ring)?;
        let (mut sentences, mut added) = (newest.sentences().collect::<Vec<_>>(), packs.clone());
        sentences.retain(|(pack, _)| {
            added.remove(pack);
            !gone.contains(pack)
        });
        if added.is_empty() {
            return Ok(newest);
        }
        let epoch = newest.epoch + 1;
        let mut added: Vec<(ObjectId, u64)> = added.into_iter().map(|pack| (pack, epoch)).collect();
        added.sort_unstable();
        sentences.append(&mut added);
        let (condemned, since) = sentences.into_iter().unzip();
        let next = Epoch { epoch, condemned, since };
        let name = names::epoch(epoch);
        match store.put_if_absent(&name, &sealed::seal(ring, Kind::Epoch, &name, &next)?)? {
            Put::Created => return Ok(next),
            // Somebody else began that epoch; theirs is the newest now.
            Put::Exists => {}
        }
    }
}

/// A writer's lease as others see it.
#[derive(Clone, Debug)]
pub struct Held {
    /// The writer.
    pub writer: ObjectId,
    /// The epoch that it knows.
    pub epoch: u64,
    /// How long it has not beaten, by the store's clock.
    pub silent: Duration,
    /// How long it may be silent.
    pub ttl: Duration,
}

/// The writers whose leases have not ended. What is found here was taken before this call ends; a lease that is taken
/// later is of an epoch that is the newest when this call begins, or later.
pub fn held_leases(store: &dyn Store, ring: &KeyRing) -> Result<Vec<Held>> {
    for _ in 0..RELISTINGS_MAX {
        match try_held_leases(store, ring) {
            // Renewed or ended since the listing.
            Err(Error::Missing { .. }) => {}
            other => return other,
        }
    }
    try_held_leases(store, ring)
}

fn try_held_leases(store: &dyn Store, ring: &KeyRing) -> Result<Vec<Held>> {
    let mut ended = HashSet::new();
    let mut newest: HashMap<ObjectId, Listed> = HashMap::new();
    store.list(names::LEASES, &mut |object| {
        let leaf = names::leaf(&object.name);
        let Some((Ok(writer), beat)) = leaf.split_once('.').map(|(writer, beat)| (writer.parse::<ObjectId>(), beat))
        else {
            return Ok(());
        };
        if beat == "end" {
            ended.insert(writer);
        } else if newest.get(&writer).is_none_or(|known| known.name < object.name) {
            newest.insert(writer, object);
        }
        Ok(())
    })?;
    newest.retain(|writer, _| !ended.contains(writer));
    if newest.is_empty() {
        return Ok(Vec::new());
    }
    let now = store.now()?;
    let mut held = Vec::with_capacity(newest.len());
    for (writer, object) in newest {
        let silent = object.age(now);
        let bytes = store.get(&object.name, envelope::ENVELOPE_BYTES_MAX)?;
        // A beat that cannot be read still is somebody's lease: of any epoch, until it has been silent for long.
        let (epoch, ttl) = match sealed::open::<Beat>(ring, Kind::Lease, &object.name, &bytes) {
            Ok(beat) => (beat.epoch, Duration::from_secs(beat.ttl_s)),
            Err(e) if e.is_damage() => (0, UNREADABLE_TTL),
            Err(e) => return Err(e),
        };
        held.push(Held { writer, epoch, silent, ttl });
    }
    held.sort_by_key(|h| (h.epoch, h.writer));
    Ok(held)
}

/// Ends the lease of a writer, which therefore acknowledges nothing any more. Safe however alive the writer is.
pub fn end_lease(store: &dyn Store, writer: &ObjectId) -> Result<()> {
    let end = names::lease_end(writer);
    match store.put_if_absent(&end, &[])? {
        Put::Created | Put::Exists => {}
    }
    delete_beats(store, writer)
}

fn delete_beats(store: &dyn Store, writer: &ObjectId) -> Result<()> {
    let mut beats = Vec::new();
    let mine = writer.to_string();
    store.list(names::LEASES, &mut |object| {
        if names::leaf(&object.name).starts_with(&mine) && !object.name.ends_with(".end") {
            beats.push(object.name);
        }
        Ok(())
    })?;
    beats.iter().try_for_each(|name| store.delete(name).map(drop))
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
        if delete_beats(&**store, writer).is_err() {
            let _ = store.put_if_absent(&names::lease_end(writer), &[]);
        }
    }
}
