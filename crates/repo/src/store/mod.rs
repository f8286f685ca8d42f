//! Where objects live. A store is a flat map from names to immutable bytes.
//!
//! Invariants that every implementation keeps: an object appears under its name whole or not at all; once
//! `put_if_absent` or `finish` returned, the object survives a power cut; a listing shows every object that was
//! acknowledged before the listing began; nothing is overwritten. Names are relative, of `[a-z0-9._-]` and slashes.
//! Not here: keys, formats, retries of whole operations.

pub mod faulty;
pub mod fs;
pub mod mem;

use std::{path::Path, sync::Arc};

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
}

/// Opens the store behind a path, a `file://` URL or (later) an object storage URL. Creates nothing.
pub fn open(url_or_path: &str) -> Result<Arc<dyn Store>> {
    let path = match url_or_path.split_once("://") {
        None => url_or_path,
        Some(("file", path)) if path.starts_with('/') => path,
        Some(("file", _)) => {
            return Err(Error::Unsupported {
                what: format!("{url_or_path} names another host; write file:///path with three slashes"),
            });
        }
        Some((scheme, _)) => {
            return Err(Error::Unsupported {
                what: format!("{url_or_path}: {scheme}:// is not supported yet; use a directory, local or mounted"),
            });
        }
    };
    if path.is_empty() {
        return Err(Error::Unsupported { what: "the path of the repository is empty".into() });
    }
    Ok(Arc::new(fs::FsStore::new(Path::new(path))))
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
