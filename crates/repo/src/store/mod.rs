//! Where objects live. A store is a flat map from names to immutable bytes.
//!
//! Invariants that every implementation keeps: an object appears under its name whole or not at all; once
//! `put_if_absent` or `finish` returned, the object survives a power cut; a listing shows every object that was
//! acknowledged before the listing began; nothing is overwritten. Names are relative, of `[a-z0-9._-]` and slashes.
//! Not here: keys, formats, retries of whole operations.

pub mod append;
pub mod cache;
pub mod faulty;
pub mod fs;
#[cfg(test)]
mod fs_test;
pub mod mem;
mod retry;
pub mod s3;

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use jiff::Timestamp;

use crate::error::{Error, Result};

/// What became of a write that must not overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Put {
    /// The object is new.
    Created,
    /// The name was taken; nothing was changed.
    Exists,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Full name.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// When it was written, by the store's own clock; see [`Store::now`].
    pub modified: Timestamp,
}

impl Listed {
    /// How old it is at an instant of the store's clock; nothing if it is younger than that.
    pub(crate) fn age(&self, now: Timestamp) -> Duration {
        Duration::try_from(now.duration_since(self.modified)).unwrap_or_default()
    }
}

/// An object that is being written. Dropping it abandons the object without a trace.
pub trait ObjectWriter: Send {
    /// Appends bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Makes everything durable, then publishes the object under its name if that is free.
    fn finish(self: Box<Self>) -> Result<Put>;
}

/// A store of objects. Blocking; called from many threads.
pub trait Store: Send + Sync {
    /// URL or path, for messages.
    fn location(&self) -> String;
    /// Fills `buf` from `offset`. [`Error::Missing`] if there is no such object, [`Error::Damaged`] if it is shorter.
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// Length of an object. [`Error::Missing`] if there is none.
    fn size(&self, name: &str) -> Result<u64>;
    /// Writes a small object in one go, unless the name is taken.
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put>;
    /// Begins an object whose length is not known yet.
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>>;
    /// Calls `each` for every object whose name begins with `prefix` (a directory ending in `/`, or empty), in no
    /// particular order, page by page. An error of `each` ends the listing.
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()>;
    /// The time by the clock that stamps objects. Ages are told by it alone, so no other machine's clock matters.
    fn now(&self) -> Result<Timestamp>;
    /// Removes an object; false if there was none.
    fn delete(&self, name: &str) -> Result<bool>;

    /// A range as a new buffer.
    fn get_range(&self, name: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_range(name, offset, &mut bytes)?;
        Ok(bytes)
    }
    /// A whole object of at most `max` bytes; a longer one is [`Error::Damaged`].
    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        let size = self.size(name)?;
        if size > max {
            return Err(Error::damaged(name, format!("it has {size} bytes where at most {max} make sense")));
        }
        self.get_range(name, 0, size as usize)
    }
    /// Whether an object exists.
    fn exists(&self, name: &str) -> Result<bool> {
        match self.size(name) {
            Ok(_) => Ok(true),
            Err(Error::Missing { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }
    /// Removes what dead writers left half-written. Never touches what a live writer uses. Best effort.
    fn clean(&self) {}
    /// Forgets copies that are held in front of the store, so that what is read next comes from the store itself.
    fn forget(&self) {}
    /// Fetches in flight that pay, however few cores there are: many where an answer takes long to come.
    fn fetches_in_flight(&self) -> usize {
        1
    }
    /// Bytes that can still be written to packs, where the store knows.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
    /// From now on a call that waits for the store to come back gives up with [`Error::Cancelled`] when this is raised.
    fn heed(&self, cancel: &Arc<AtomicBool>) {
        let _ = cancel;
    }
    /// How long objects are kept from being deleted after they were written or renewed, if the store does so.
    fn retention(&self) -> Option<Duration> {
        None
    }
    /// Keeps objects from being deleted until an instant at least, where the store enforces such a thing (object lock)
    /// and is told to. Objects that are gone are passed over.
    fn renew(&self, names: &mut dyn Iterator<Item = String>, until: Timestamp) -> Result<()> {
        let _ = (names, until);
        Ok(())
    }
}

/// How stores are opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreOptions {
    /// Object storage.
    pub s3: s3::S3Options,
    /// Refuse to delete anything: see [`append::AppendOnly`].
    pub append_only: bool,
    /// Local copies of restore points, and of the index of a remote store.
    pub cache: Option<cache::CacheOptions>,
}

/// Opens the store behind a path, a `file://` URL or an `s3://bucket/prefix` URL. Creates nothing there.
pub fn open(url_or_path: &str) -> Result<Arc<dyn Store>> {
    open_with(url_or_path, &StoreOptions::default())
}

/// The same with options.
pub fn open_with(url_or_path: &str, options: &StoreOptions) -> Result<Arc<dyn Store>> {
    let store = match url_or_path.strip_prefix("s3://") {
        Some(rest) => with_cache(Arc::new(s3::S3Store::open(rest, &options.s3)?), options),
        None => with_points(Arc::new(fs::FsStore::new(local(url_or_path)?)), options),
    };
    Ok(if options.append_only { Arc::new(append::AppendOnly::new(store)) } else { store })
}

fn with_cache(store: Arc<dyn Store>, options: &StoreOptions) -> Arc<dyn Store> {
    let Some(cache) = &options.cache else { return store };
    match cache::CachedStore::new(store.clone(), cache) {
        Ok(cached) => Arc::new(cached),
        Err(error) => {
            tracing::warn!(%error, "no local copies of the index are kept, which makes everything slower");
            store
        }
    }
}

fn with_points(store: Arc<dyn Store>, options: &StoreOptions) -> Arc<dyn Store> {
    match &options.cache {
        Some(cache) => Arc::new(cache::CachedStore::of_points(store, cache)),
        None => store,
    }
}

fn local(url_or_path: &str) -> Result<&Path> {
    let unsupported = |what: String| Err(Error::Unsupported { what });
    match url_or_path.split_once("://") {
        None if url_or_path.is_empty() => unsupported("the path of the repository is empty".into()),
        None => Ok(Path::new(url_or_path)),
        Some(("file", path)) if path.starts_with('/') => Ok(Path::new(path)),
        Some(("file", _)) => {
            unsupported(format!("{url_or_path} names another host; write file:///path with three slashes"))
        }
        Some((scheme, _)) => unsupported(format!(
            "{scheme}:// is not supported; use a directory, local or mounted, or s3://bucket/prefix"
        )),
    }
}

/// Names that can be objects: they stay inside the store on every implementation.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let good = !name.is_empty()
        && name.len() <= 200
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-/".contains(&b));
    if good { Ok(()) } else { Err(Error::Misuse { what: format!("{name:?} cannot be the name of an object") }) }
}

/// Puts an object with a fresh random name. A taken name is success if the bytes are the same: the store did it and
/// the acknowledgement was lost.
pub(crate) fn put_new(store: &dyn Store, name: &str, bytes: &[u8]) -> Result<()> {
    match store.put_if_absent(name, bytes)? {
        Put::Created => Ok(()),
        Put::Exists if store.get(name, bytes.len() as u64).is_ok_and(|there| there == bytes) => Ok(()),
        Put::Exists => Err(Error::damaged(name, "another object has this name")),
    }
}
