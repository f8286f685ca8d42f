//! A store in memory, for tests and for rehearsals.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;

use super::{Listed, ObjectWriter, Put, Store, check_name};
use crate::error::{Error, Result};

type Object = (Arc<Vec<u8>>, Timestamp);

#[derive(Clone, Debug, Default)]
struct Objects {
    by_name: BTreeMap<String, Object>,
    /// How far the clock was put forward.
    ahead: Duration,
}

impl Objects {
    fn now(&self) -> Timestamp {
        Timestamp::now().checked_add(self.ahead).unwrap_or(Timestamp::MAX)
    }
}

/// Objects in memory. Clones share the objects.
#[derive(Clone, Debug, Default)]
pub struct MemStore(Arc<Mutex<Objects>>);

impl MemStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }
    fn with<T>(&self, act: impl FnOnce(&mut Objects) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
    fn object(&self, name: &str) -> Result<Arc<Vec<u8>>> {
        self.with(|o| o.by_name.get(name).map(|(bytes, _)| bytes.clone()))
            .ok_or_else(|| Error::Missing { object: name.into() })
    }
    /// A copy that changes independently.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.with(|o| o.clone()))))
    }
    /// Sets the bytes behind a name, as damage does. Not part of the store's contract.
    pub fn tamper(&self, name: &str, bytes: Option<Vec<u8>>) {
        self.with(|o| match bytes {
            Some(bytes) => o.by_name.insert(name.into(), (Arc::new(bytes), o.now())),
            None => o.by_name.remove(name),
        });
    }
    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.with(|o| o.by_name.keys().cloned().collect())
    }
    /// Puts the clock of the store forward.
    pub fn advance(&self, by: Duration) {
        self.with(|o| o.ahead += by);
    }
}

impl Store for MemStore {
    fn location(&self) -> String {
        "memory".into()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let object = self.object(name)?;
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let range = begin.checked_add(buf.len()).and_then(|end| object.get(begin..end));
        buf.copy_from_slice(range.ok_or_else(|| Error::damaged(name, "it ends too early"))?);
        Ok(())
    }
    fn size(&self, name: &str) -> Result<u64> {
        Ok(self.object(name)?.len() as u64)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        check_name(name)?;
        Ok(self.with(|o| {
            if o.by_name.contains_key(name) {
                return Put::Exists;
            }
            let now = o.now();
            o.by_name.insert(name.into(), (Arc::new(bytes.to_vec()), now));
            Put::Created
        }))
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        check_name(name)?;
        Ok(Box::new(MemWriter { store: self.clone(), name: name.into(), bytes: Vec::new() }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let page: Vec<Listed> = self.with(|o| {
            o.by_name
                .range(prefix.to_owned()..)
                .take_while(|(name, _)| name.starts_with(prefix))
                .map(|(name, (bytes, modified))| Listed {
                    name: name.clone(),
                    bytes: bytes.len() as u64,
                    modified: *modified,
                })
                .collect()
        });
        page.into_iter().try_for_each(each)
    }
    fn now(&self) -> Result<Timestamp> {
        Ok(self.with(|o| o.now()))
    }
    fn delete(&self, name: &str) -> Result<bool> {
        Ok(self.with(|o| o.by_name.remove(name)).is_some())
    }
}

struct MemWriter {
    store: MemStore,
    name: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for MemWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<Put> {
        self.store.put_if_absent(&self.name, &self.bytes)
    }
}
