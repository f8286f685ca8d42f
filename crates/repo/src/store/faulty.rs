//! A store that misbehaves on purpose, from a seed or at a chosen operation, in front of a real one.
//!
//! Fault model: any operation may fail with an I/O error before or after it took effect (a lost acknowledgement), may be
//! slow, may find the store full, or may be the last one before the process dies. A write may arrive a second time, later,
//! when what it wrote has perhaps been deleted; a listing may not show yet what was just written. A torn write leaves a cut
//! object under the final name, which a correct store never does but broken hardware and careless gateways do.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;

use super::{Listed, ObjectWriter, Put, Store};
use crate::error::{Error, Result};

/// What goes wrong, and when. Operations are counted from 0; probabilities are per thousand.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Seed of every random choice.
    pub seed: u64,
    /// From this operation on everything fails, as after a power cut.
    pub die_at: Option<u64>,
    /// Whether the operation at `die_at` still takes effect.
    pub die_after_effect: bool,
    /// From this operation on every write finds the store full.
    pub full_at: Option<u64>,
    /// Operations that fail before taking effect.
    pub error_permille: u32,
    /// Writes that take effect, and then fail.
    pub lost_ack_permille: u32,
    /// Writes that leave the object cut short, and succeed.
    pub torn_permille: u32,
    /// Writes whose request arrives once more, [`REPEATED_AFTER`] operations later.
    pub repeated_permille: u32,
    /// For so many operations after it was written, an object is not listed.
    pub listing_lag: u64,
    /// Operations that are slow.
    pub delay_permille: u32,
    /// How slow.
    pub delay: Duration,
}

/// Operations between a write and its repetition.
const REPEATED_AFTER: u64 = 7;

/// A write that will arrive once more: at which operation, and what.
type Repetition = (u64, String, Vec<u8>);

/// The misbehaving store.
#[derive(Clone)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    faults: Arc<Faults>,
    operations: Arc<AtomicU64>,
    repetitions: Arc<Mutex<Vec<Repetition>>>,
    /// At which operation each object was written.
    written: Arc<Mutex<HashMap<String, u64>>>,
}

/// What an operation is told to do.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Fine,
    FailBefore,
    FailAfter,
    Full,
    Torn,
}

impl FaultyStore {
    /// In front of a store.
    pub fn new(inner: Arc<dyn Store>, faults: Faults) -> Self {
        Self {
            inner,
            faults: Arc::new(faults),
            operations: Arc::default(),
            repetitions: Arc::default(),
            written: Arc::default(),
        }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    fn fate(&self, is_write: bool) -> Fate {
        let faults = &*self.faults;
        let number = self.operations.fetch_add(1, Ordering::SeqCst);
        if let Some(at) = faults.die_at.filter(|at| number >= *at) {
            let effect = number == at && faults.die_after_effect && is_write;
            return if effect { Fate::FailAfter } else { Fate::FailBefore };
        }
        if is_write && faults.full_at.is_some_and(|at| number >= at) {
            return Fate::Full;
        }
        self.repeat(number);
        let roll = |salt: u64, permille: u32| self.roll(number, salt, permille);
        if roll(1, faults.delay_permille) {
            std::thread::sleep(faults.delay);
        }
        if roll(2, faults.error_permille) {
            Fate::FailBefore
        } else if is_write && roll(3, faults.lost_ack_permille) {
            Fate::FailAfter
        } else if is_write && roll(4, faults.torn_permille) {
            Fate::Torn
        } else {
            Fate::Fine
        }
    }

    fn roll(&self, number: u64, salt: u64, permille: u32) -> bool {
        mix(self.faults.seed ^ mix(number ^ mix(salt))) % 1000 < u64::from(permille)
    }

    /// Lets requests arrive that are due to arrive once more. Nobody hears the answer.
    fn repeat(&self, number: u64) {
        let mut waiting = self.repetitions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (_, name, bytes) in waiting.extract_if(.., |(at, ..)| *at <= number) {
            let _ = self.inner.put_if_absent(&name, &bytes);
        }
    }

    /// Remembers what was written, as far as faults depend on it.
    fn wrote(&self, name: &str, bytes: Vec<u8>) {
        let number = self.operations();
        if self.faults.listing_lag > 0 {
            let mut written = self.written.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            written.insert(name.to_owned(), number);
        }
        if self.roll(number, 5, self.faults.repeated_permille) {
            let mut waiting = self.repetitions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            waiting.push((number + REPEATED_AFTER, name.to_owned(), bytes));
        }
    }

    fn is_listed(&self, name: &str) -> bool {
        let written = self.written.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        written.get(name).is_none_or(|at| self.operations() >= at + self.faults.listing_lag)
    }

    fn apply<T>(&self, name: &str, is_write: bool, act: impl FnOnce() -> Result<T>) -> Result<T> {
        self.suffer(self.fate(is_write), name, act)
    }

    fn suffer<T>(&self, fate: Fate, name: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
        match fate {
            Fate::FailBefore => Err(injected(name)),
            Fate::Full => Err(Error::StorageFull { object: name.into() }),
            Fate::FailAfter => act().and_then(|_| Err(injected(name))),
            Fate::Fine | Fate::Torn => act(),
        }
    }
}

fn injected(name: &str) -> Error {
    Error::io("reach", name, io::Error::other("injected fault"))
}

/// SplitMix64.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Store for FaultyStore {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.apply(name, false, || self.inner.read_range(name, offset, buf))
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.apply(name, false, || self.inner.size(name))
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        let mut writer = self.create(name)?;
        writer.write(bytes)?;
        writer.finish()
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.apply(name, true, || self.inner.create(name))?;
        Ok(Box::new(FaultyWriter { store: self.clone(), inner, name: name.into(), bytes: Vec::new() }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let mut listed = |object: Listed| if self.is_listed(&object.name) { each(object) } else { Ok(()) };
        self.apply(prefix, false, || self.inner.list(prefix, &mut listed))
    }
    fn forget(&self) {
        self.inner.forget();
    }
    fn fetches_in_flight(&self) -> usize {
        self.inner.fetches_in_flight()
    }
    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
    fn heed(&self, cancel: &Arc<AtomicBool>) {
        self.inner.heed(cancel);
    }
    fn retention(&self) -> Option<Duration> {
        self.inner.retention()
    }
    fn renew(&self, names: &mut dyn Iterator<Item = String>, until: Timestamp) -> Result<()> {
        self.apply("retention", true, || self.inner.renew(names, until))
    }
    fn now(&self) -> Result<Timestamp> {
        self.apply("the clock", false, || self.inner.now())
    }
    fn delete(&self, name: &str) -> Result<bool> {
        // Deleting takes no space.
        let fate = match self.fate(true) {
            Fate::Full => Fate::Fine,
            fate => fate,
        };
        self.suffer(fate, name, || self.inner.delete(name))
    }
}

/// Holds the bytes back until the end, because tearing is decided there.
struct FaultyWriter {
    store: FaultyStore,
    inner: Box<dyn ObjectWriter>,
    name: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for FaultyWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self.store.fate(true) {
            Fate::FailBefore | Fate::FailAfter => Err(injected(&self.name)),
            Fate::Full => Err(Error::StorageFull { object: self.name.clone() }),
            Fate::Fine | Fate::Torn => {
                self.bytes.extend_from_slice(bytes);
                Ok(())
            }
        }
    }
    fn finish(mut self: Box<Self>) -> Result<Put> {
        let fate = self.store.fate(true);
        match fate {
            Fate::FailBefore => return Err(injected(&self.name)),
            Fate::Full => return Err(Error::StorageFull { object: self.name }),
            Fate::Torn => self.bytes.truncate(self.bytes.len() / 2),
            Fate::Fine | Fate::FailAfter => {}
        }
        self.inner.write(&self.bytes)?;
        let put = self.inner.finish()?;
        self.store.wrote(&self.name, self.bytes);
        if fate == Fate::FailAfter { Err(injected(&self.name)) } else { Ok(put) }
    }
}
