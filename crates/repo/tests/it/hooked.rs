//! A store that lets a test act right before or after an operation: two actors, step by step.

use std::sync::{Arc, Mutex};

use virtward_repo::{
    Result, Store,
    store::{Listed, ObjectWriter, Put, mem::MemStore},
};

type Hook = Box<dyn FnOnce() + Send>;

/// In front of a store in memory.
#[derive(Clone)]
pub struct Hooked {
    inner: MemStore,
    hook: Arc<Mutex<Option<(String, bool, Hook)>>>,
    done: Arc<Mutex<Vec<String>>>,
}

impl Hooked {
    pub fn new(inner: &MemStore) -> Self {
        Self { inner: inner.clone(), hook: Arc::default(), done: Arc::default() }
    }

    /// Once, before (or after) the first operation that is described so: `delete points/`, `put trash/`, `size holds/`.
    pub fn at(&self, operation: &str, after: bool, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().unwrap() = Some((operation.into(), after, Box::new(hook)));
    }

    /// Whether the hook has run.
    pub fn is_through(&self) -> bool {
        self.hook.lock().unwrap().is_none()
    }

    /// How many operations since the last question are described so.
    pub fn count(&self, operation: &str) -> usize {
        let done = std::mem::take(&mut *self.done.lock().unwrap());
        done.iter().filter(|line| line.starts_with(operation)).count()
    }

    fn around<T>(&self, operation: &str, name: &str, act: impl FnOnce() -> T) -> T {
        let mut hook = self.hook.lock().unwrap();
        let line = format!("{operation} {name}");
        self.done.lock().unwrap().push(line.clone());
        let taken = if hook.as_ref().is_some_and(|(at, ..)| line.starts_with(&**at)) { hook.take() } else { None };
        drop(hook);
        match taken {
            Some((_, false, hook)) => {
                hook();
                act()
            }
            Some((_, true, hook)) => {
                let outcome = act();
                hook();
                outcome
            }
            None => act(),
        }
    }
}

impl Store for Hooked {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.around("read", name, || self.inner.read_range(name, offset, buf))
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.around("size", name, || self.inner.size(name))
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.around("put", name, || self.inner.put_if_absent(name, bytes))
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(name)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.around("list", prefix, || self.inner.list(prefix, each))
    }
    fn now(&self) -> Result<jiff::Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        self.around("delete", name, || self.inner.delete(name))
    }
}
