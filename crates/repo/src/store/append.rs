//! A store that only grows: a guard against mistakes of the host that backs up, in front of any store.
//!
//! Nothing can be deleted but what this very run put and must be able to take back: the beats of its lease, and a restore
//! point that it withdraws. (Overwriting is impossible on every store.) It binds this program, not somebody who took over
//! the host: for that, the credentials' policy and object lock are there, see docs/object-storage.md.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use jiff::Timestamp;

use super::{Listed, ObjectWriter, Put, Store};
use crate::{
    error::{Error, Result},
    format::names,
    util::lock,
};

/// The guard.
pub struct AppendOnly {
    inner: Arc<dyn Store>,
    own: Mutex<HashSet<String>>,
}

impl AppendOnly {
    /// In front of a store.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, own: Mutex::default() }
    }
}

impl Store for AppendOnly {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_range(name, offset, buf)
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }
    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        self.inner.get(name, max)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        let put = self.inner.put_if_absent(name, bytes)?;
        let is_beat = name.starts_with(names::LEASES) && !name.ends_with(".end");
        if put == Put::Created && (is_beat || name.starts_with(names::POINTS)) {
            lock(&self.own).insert(name.into());
        }
        Ok(put)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(name)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }
    fn now(&self) -> Result<Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        if !lock(&self.own).remove(name) {
            return Err(Error::AppendOnly { object: name.into() });
        }
        self.inner.delete(name)
    }
    fn clean(&self) {
        self.inner.clean();
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
    fn retention(&self) -> Option<std::time::Duration> {
        self.inner.retention()
    }
    fn renew(&self, names: &mut dyn Iterator<Item = String>, until: Timestamp) -> Result<()> {
        self.inner.renew(names, until)
    }
}
