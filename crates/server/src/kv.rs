//! Records in the state store: JSON under keys that this crate owns. What every daemon follows is below `/v1/`, what is
//! only read when somebody asks (logs of jobs) below `/logs/`.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use virtward_api::{Code, Problem};
use virtward_cluster::{Compare, Error, Listing, Op, Revision, Store, VALUE_BYTES_MAX, Versioned, Watch};

use crate::failures::{self, Result};

/// Typed access to the state store.
#[derive(Clone)]
pub struct Kv {
    store: Arc<dyn Store>,
    /// Why the last change was refused, if there was no room for it.
    full: Arc<Mutex<Option<String>>>,
}

impl Kv {
    /// Over a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store, full: Arc::default() }
    }

    /// Where the state is, for people.
    pub fn location(&self) -> String {
        self.store.location()
    }

    /// The store itself, for elections and leases.
    pub fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    /// Why the last change was refused, if there was no room for it.
    pub fn full(&self) -> Option<String> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_full(&self, why: Option<String>) {
        *self.full.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// All keys with a prefix as they are stored, at one revision.
    pub async fn listing(&self, prefix: &str) -> Result<Listing> {
        self.store.list(prefix.as_bytes()).await.map_err(|error| failures::state(&error))
    }

    /// Changes of keys with a prefix.
    pub fn watch(&self, prefix: &str, from: Revision) -> Watch {
        self.store.watch(prefix.as_bytes(), from)
    }

    /// A record, with where it stands in history.
    pub async fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<(T, Versioned)>> {
        let found = self.store.get(key.as_bytes()).await.map_err(|error| failures::state(&error))?;
        let Some(entry) = found else { return Ok(None) };
        let value = serde_json::from_slice(&entry.value).map_err(|error| {
            Problem::new(Code::StateUnavailable, format!("the record {key} cannot be read: {error}"))
                .hint("it may be of a newer version; upgrade virtward on this host")
        })?;
        Ok(Some((value, entry)))
    }

    /// All records with a prefix. What cannot be read is left out and logged: one bad record must not stop the daemon.
    pub async fn list<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<(String, T)>> {
        let listing = self.listing(prefix).await?;
        let read = |entry: Versioned| {
            let key = String::from_utf8_lossy(&entry.key).into_owned();
            read(&key, &entry.value).map(|value| (key, value))
        };
        Ok(listing.entries.into_iter().filter_map(read).collect())
    }

    /// Does all of `ops` if all of `compares` hold; the revision if it did. What is not certain is tried again where
    /// that is safe: puts of the same values can be repeated.
    pub async fn commit(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<Option<Revision>> {
        const TRIES: u32 = 4;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.store.txn(compares.clone(), ops.clone()).await {
                Ok(outcome) => {
                    // One that was refused for what it compares wrote nothing.
                    if outcome.succeeded && !ops.is_empty() {
                        self.note_full(None);
                    }
                    return Ok(outcome.succeeded.then_some(outcome.revision));
                }
                Err(Error::Unavailable { .. } | Error::Full { .. }) if tries < TRIES => {
                    tokio::time::sleep(std::time::Duration::from_millis(100 << tries)).await;
                }
                Err(Error::Indeterminate { .. }) if compares.is_empty() && tries < TRIES => {}
                Err(error) => {
                    if let Error::Full { .. } = &error {
                        self.note_full(Some(error.to_string()));
                    }
                    return Err(failures::state(&error));
                }
            }
        }
    }

    /// Sets a record whatever there was; its revision.
    pub async fn put<T: Serialize>(&self, key: &str, value: &T) -> Result<Revision> {
        Ok(self.commit(Vec::new(), vec![put(key, value)?]).await?.unwrap_or_default())
    }

    /// Removes records; the last revision, if there were any.
    pub async fn delete(&self, keys: &[String]) -> Result<Option<Revision>> {
        let mut at = None;
        for some in keys.chunks(virtward_cluster::TXN_LEN_MAX) {
            at = self.commit(Vec::new(), some.iter().map(|key| Op::delete(key.clone())).collect()).await?;
        }
        Ok(at)
    }
}

/// A record's value; nothing, and a line in the log, if it makes no sense here.
pub fn read<T: DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    match serde_json::from_slice(value) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::error!(key, %error, "a record cannot be read; it is left out");
            None
        }
    }
}

/// A put of a record, for a transaction.
pub fn put<T: Serialize>(key: &str, value: &T) -> Result<Op> {
    let value = serde_json::to_vec(value)
        .map_err(|error| Problem::new(Code::Internal, format!("the record {key} cannot be written: {error}")))?;
    if value.len() > VALUE_BYTES_MAX {
        return Err(Problem::new(Code::TooLarge, format!("{key} would have {} bytes", value.len())));
    }
    Ok(Op::put(key.to_owned(), Bytes::from(value)))
}
