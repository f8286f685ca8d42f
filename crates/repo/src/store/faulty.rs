//! A store that misbehaves on purpose, from a seed or at a chosen operation, in front of a real one.
//!
//! Fault model: any operation may fail with an I/O error before or after it took effect (a lost acknowledgement), may be
//! slow, may find the store full, or may be the last one before the process dies. A torn write leaves a cut object under
//! the final name, which a correct store never does but broken hardware and careless gateways do.

use std::{
    io,
    sync::{
        Arc,
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
    /// Operations that are slow.
    pub delay_permille: u32,
    /// How slow.
    pub delay: Duration,
}

/// The misbehaving store.
#[derive(Clone)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    faults: Arc<Faults>,
    operations: Arc<AtomicU64>,
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
        Self { inner, faults: Arc::new(faults), operations: Arc::default() }
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
        let roll = |salt: u64, permille: u32| mix(faults.seed ^ mix(number ^ mix(salt))) % 1000 < u64::from(permille);
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
        self.apply(prefix, false, || self.inner.list(prefix, each))
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
        if fate == Fate::FailAfter { Err(injected(&self.name)) } else { Ok(put) }
    }
}
