//! Records of one kind, kept in memory as they are in the state store: filled by a listing, kept in step by a watch, and
//! changed at once by this daemon's own writes.
//!
//! Every row knows the revision that it is from. What comes later with an older revision is passed over, so that the
//! order in which a write's answer and the watch's news of it arrive is of no importance. A row that was deleted here is
//! remembered as such until the watch tells of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use serde::de::DeserializeOwned;
use uuid::Uuid;
use virtward_cluster::{Compare, Listing, Revision};

use crate::{
    failures::Result,
    kv::{self, Kv},
};

/// What stands behind the prefix in a key.
pub trait RowKey: Ord + Clone + Send + Sync {
    /// From the rest of the key.
    fn parse(rest: &str) -> Option<Self>;
}

impl RowKey for String {
    fn parse(rest: &str) -> Option<Self> {
        Some(rest.to_owned())
    }
}

impl RowKey for Uuid {
    fn parse(rest: &str) -> Option<Self> {
        rest.parse().ok()
    }
}

impl RowKey for (Uuid, String) {
    fn parse(rest: &str) -> Option<Self> {
        let (uuid, name) = rest.split_once('/')?;
        Some((uuid.parse().ok()?, name.to_owned()))
    }
}

impl RowKey for (String, Uuid) {
    fn parse(rest: &str) -> Option<Self> {
        let (name, uuid) = rest.split_once('/')?;
        Some((name.to_owned(), uuid.parse().ok()?))
    }
}

struct Row<V> {
    revision: Revision,
    /// None: deleted here, and the watch has not told yet.
    value: Option<Arc<V>>,
}

/// What a change was.
#[derive(Debug)]
pub enum Changed<K, V> {
    /// Put, by whomever.
    Put(K, Arc<V>),
    /// Gone.
    Deleted(K),
}

/// All records of one kind.
pub struct Table<K, V> {
    prefix: &'static str,
    rows: RwLock<BTreeMap<K, Row<V>>>,
}

impl<K: RowKey, V: DeserializeOwned> Table<K, V> {
    /// Empty.
    pub fn new(prefix: &'static str) -> Self {
        Self { prefix, rows: RwLock::default() }
    }

    /// As the store has them now.
    pub async fn load(kv: &Kv, prefix: &'static str) -> Result<Self> {
        let table = Self::new(prefix);
        table.reset(&kv.listing(prefix).await?);
        Ok(table)
    }

    /// What its keys begin with.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<K, Row<V>>> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<K, Row<V>>> {
        self.rows.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, key: &[u8]) -> Option<K> {
        K::parse(std::str::from_utf8(key).ok()?.strip_prefix(self.prefix)?)
    }

    /// Takes over a listing of all keys with the prefix; what became different.
    pub fn reset(&self, listing: &Listing) -> Vec<Changed<K, V>> {
        let mut changed = Vec::new();
        let mut rows = self.write();
        let mut there = std::collections::BTreeSet::new();
        for entry in &listing.entries {
            let Some(key) = self.key(&entry.key) else { continue };
            there.insert(key.clone());
            if rows.get(&key).is_some_and(|row| row.revision >= entry.revision) {
                continue;
            }
            let Some(value) = kv::read::<V>(&String::from_utf8_lossy(&entry.key), &entry.value) else { continue };
            let value = Arc::new(value);
            rows.insert(key.clone(), Row { revision: entry.revision, value: Some(value.clone()) });
            changed.push(Changed::Put(key, value));
        }
        let is_gone = |key: &K, row: &Row<V>| row.revision <= listing.revision && !there.contains(key);
        let gone: Vec<K> = rows.iter().filter(|(key, row)| is_gone(key, row)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if rows.remove(&key).is_some_and(|row| row.value.is_some()) {
                changed.push(Changed::Deleted(key));
            }
        }
        changed
    }

    /// Takes over one change that a watch told of; none if it is known already.
    pub fn follow(&self, key: &[u8], revision: Revision, value: Option<&[u8]>) -> Option<Changed<K, V>> {
        let row = self.key(key)?;
        let mut rows = self.write();
        let known = rows.get(&row);
        match value {
            Some(_) if known.is_some_and(|known| known.revision >= revision) => None,
            Some(value) => {
                let value = Arc::new(kv::read::<V>(&String::from_utf8_lossy(key), value)?);
                rows.insert(row.clone(), Row { revision, value: Some(value.clone()) });
                Some(Changed::Put(row, value))
            }
            None if known.is_some_and(|known| known.revision > revision) => None,
            None => {
                rows.remove(&row)?.value?;
                Some(Changed::Deleted(row))
            }
        }
    }

    /// Takes over a write of this daemon's.
    pub fn put(&self, key: K, revision: Revision, value: V) -> Arc<V> {
        let value = Arc::new(value);
        let mut rows = self.write();
        if rows.get(&key).is_none_or(|row| row.revision <= revision) {
            rows.insert(key, Row { revision, value: Some(value.clone()) });
        }
        value
    }

    /// Takes over a deletion by this daemon.
    pub fn delete(&self, key: &K, revision: Revision) {
        let mut rows = self.write();
        if rows.get(key).is_some_and(|row| row.revision < revision) {
            rows.insert(key.clone(), Row { revision, value: None });
        }
    }

    /// Changes what is shown of a row here, and nowhere else.
    pub fn overlay(&self, key: &K, value: V) {
        if let Some(row) = self.write().get_mut(key).filter(|row| row.value.is_some()) {
            row.value = Some(Arc::new(value));
        }
    }

    /// One.
    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.read().get(key)?.value.clone()
    }

    /// One, by its key in the store.
    pub fn known(&self, key: &[u8]) -> Option<Arc<V>> {
        self.get(&self.key(key)?)
    }

    /// One, with the revision that it is from.
    pub fn row(&self, key: &K) -> Option<(Revision, Arc<V>)> {
        let rows = self.read();
        let row = rows.get(key)?;
        Some((row.revision, row.value.clone()?))
    }

    /// The condition that a row is in the store as it is known here: of this revision, or absent.
    pub fn unchanged(&self, key: &K, full: &str) -> Compare {
        match self.row(key) {
            Some((revision, _)) => Compare::at(full.to_owned(), revision),
            None => Compare::absent(full.to_owned()),
        }
    }

    /// All values, in the order of their keys.
    pub fn values(&self) -> Vec<Arc<V>> {
        self.read().values().filter_map(|row| row.value.clone()).collect()
    }

    /// All, in order.
    pub fn all(&self) -> Vec<(K, Arc<V>)> {
        self.read().iter().filter_map(|(key, row)| Some((key.clone(), row.value.clone()?))).collect()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.read().values().filter(|row| row.value.is_some()).count()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use virtward_cluster::Versioned;

    use super::*;

    fn entry(key: &'static str, value: &'static str, revision: u64) -> Versioned {
        let (key, value) = (Bytes::from(key), Bytes::from(value));
        Versioned { key, value, revision: Revision(revision), lease: None }
    }

    #[test]
    fn whatever_comes_late_changes_nothing() {
        let table = Table::<String, u32>::new("/t/");
        table.reset(&Listing { entries: vec![entry("/t/a", "1", 3)], revision: Revision(5) });
        table.put("a".into(), Revision(9), 2);
        assert!(table.follow(b"/t/a", Revision(7), Some(b"7")).is_none(), "an older put came after a newer one");
        assert!(table.follow(b"/t/a", Revision(8), None).is_none(), "an older deletion came after a newer put");
        assert_eq!(table.get(&"a".into()).as_deref(), Some(&2));
        assert!(table.follow(b"/t/a", Revision(9), Some(b"2")).is_none(), "its own write is no news");
        table.delete(&"a".into(), Revision(12));
        assert!(table.follow(b"/t/a", Revision(11), Some(b"11")).is_none(), "it was deleted after that");
        assert_eq!((table.get(&"a".into()), table.len()), (None, 0));
        assert!(table.follow(b"/t/a", Revision(12), None).is_none());
        assert!(
            matches!(table.follow(b"/t/a", Revision(13), Some(b"13")), Some(Changed::Put(_, value)) if *value == 13)
        );
    }

    #[test]
    fn a_listing_takes_away_what_is_gone_and_leaves_what_is_newer() {
        let table = Table::<String, u32>::new("/t/");
        for (key, revision) in [("old", 2), ("new", 20), ("kept", 3)] {
            table.put(key.into(), Revision(revision), 1);
        }
        let changed = table.reset(&Listing { entries: vec![entry("/t/kept", "1", 3)], revision: Revision(10) });
        assert!(matches!(&changed[..], [Changed::Deleted(key)] if key == "old"), "{changed:?}");
        let names: Vec<String> = table.all().into_iter().map(|(key, _)| key).collect();
        assert_eq!(names, ["kept", "new"]);
        // What cannot be read is left out and stops nothing.
        assert!(table.follow(b"/t/kept", Revision(11), Some(b"{")).is_none());
        assert_eq!(table.len(), 2);
    }
}
