//! A store in memory, for tests and for rehearsals.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Listed, ObjectWriter, Put, Store, check_name};
use crate::error::{Error, Result};

type Objects = BTreeMap<String, Arc<Vec<u8>>>;

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
        self.with(|o| o.get(name).cloned()).ok_or_else(|| Error::Missing { object: name.into() })
    }
    /// A copy that changes independently.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.with(|o| o.clone()))))
    }
    /// Sets the bytes behind a name, as damage does. Not part of the store's contract.
    pub fn tamper(&self, name: &str, bytes: Option<Vec<u8>>) {
        self.with(|o| match bytes {
            Some(bytes) => o.insert(name.into(), Arc::new(bytes)),
            None => o.remove(name),
        });
    }
    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.with(|o| o.keys().cloned().collect())
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
            if o.contains_key(name) {
                return Put::Exists;
            }
            o.insert(name.into(), Arc::new(bytes.to_vec()));
            Put::Created
        }))
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        check_name(name)?;
        Ok(Box::new(MemWriter { store: self.clone(), name: name.into(), bytes: Vec::new() }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let page: Vec<Listed> = self.with(|o| {
            o.range(prefix.to_owned()..)
                .take_while(|(name, _)| name.starts_with(prefix))
                .map(|(name, bytes)| Listed { name: name.clone(), bytes: bytes.len() as u64 })
                .collect()
        });
        page.into_iter().try_for_each(each)
    }
    fn delete(&self, name: &str) -> Result<bool> {
        Ok(self.with(|o| o.remove(name)).is_some())
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
