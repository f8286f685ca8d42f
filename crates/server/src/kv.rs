//! Records in the state store: JSON under keys that this crate owns, all below `/v1/`.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use virtward_api::{Code, Problem};
use virtward_cluster::{Compare, Error, Op, Store, VALUE_BYTES_MAX, Versioned};

use crate::failures::{self, Result};

/// Typed access to the state store.
#[derive(Clone)]
pub struct Kv {
    store: Arc<dyn Store>,
}

impl Kv {
    /// Over a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// Where the state is, for people.
    pub fn location(&self) -> String {
        self.store.location()
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
        let listing = self.store.list(prefix.as_bytes()).await.map_err(|error| failures::state(&error))?;
        let read = |entry: Versioned| {
            let key = String::from_utf8_lossy(&entry.key).into_owned();
            match serde_json::from_slice(&entry.value) {
                Ok(value) => Some((key, value)),
                Err(error) => {
                    tracing::error!(key, %error, "a record cannot be read; it is left out");
                    None
                }
            }
        };
        Ok(listing.entries.into_iter().filter_map(read).collect())
    }

    /// Does all of `ops` if all of `compares` hold; whether it did. What is not certain is tried again, which is safe:
    /// puts of the same values can be repeated, and what compares is refused the second time.
    pub async fn commit(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<bool> {
        const TRIES: u32 = 4;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.store.txn(compares.clone(), ops.clone()).await {
                Ok(outcome) => return Ok(outcome.succeeded),
                Err(Error::Unavailable { .. } | Error::Full { .. }) if tries < TRIES => {
                    tokio::time::sleep(std::time::Duration::from_millis(100 << tries)).await;
                }
                Err(Error::Indeterminate { .. }) if compares.is_empty() && tries < TRIES => {}
                Err(error) => return Err(failures::state(&error)),
            }
        }
    }

    /// Sets a record whatever there was.
    pub async fn put<T: Serialize>(&self, key: &str, value: &T) -> Result<()> {
        self.commit(Vec::new(), vec![put(key, value)?]).await.map(|_| ())
    }

    /// Removes records.
    pub async fn delete(&self, keys: &[String]) -> Result<()> {
        for some in keys.chunks(virtward_cluster::TXN_LEN_MAX) {
            self.commit(Vec::new(), some.iter().map(|key| Op::delete(key.clone())).collect()).await?;
        }
        Ok(())
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
