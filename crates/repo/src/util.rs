//! Small helpers without a better home.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{
        Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::{
    error::{Error, Result},
    progress::Progress,
    store::Store,
};

/// Locks, ignoring poison: every critical section here leaves its data consistent at each step.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cache of two generations: bounded by twice `capacity`, constant time, recently used entries survive.
#[derive(Debug)]
pub struct Cache<K, V> {
    capacity: usize,
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    /// An empty cache.
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), young: HashMap::new(), old: HashMap::new() }
    }
    /// Looks up and keeps young.
    pub fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let value = self.old.remove(key)?;
        self.insert(key.clone(), value.clone());
        Some(value)
    }
    /// Adds an entry; may forget the least recently used half.
    pub fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.capacity {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}

/// Permits for CPU-bound sections of I/O threads.
#[derive(Debug)]
pub struct Permits {
    free: Mutex<usize>,
    returned: Condvar,
}

impl Permits {
    /// With `count` permits.
    pub fn new(count: usize) -> Self {
        Self { free: Mutex::new(count.max(1)), returned: Condvar::new() }
    }
    /// Waits for a permit and runs `act` with it.
    pub fn with<T>(&self, act: impl FnOnce() -> T) -> T {
        struct Give<'a>(&'a Permits);
        impl Drop for Give<'_> {
            fn drop(&mut self) {
                *lock(&self.0.free) += 1;
                self.0.returned.notify_one();
            }
        }
        let mut free = lock(&self.free);
        while *free == 0 {
            free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        drop(free);
        let _give = Give(self);
        act()
    }
}

/// Number of worker threads when the caller leaves it open.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get()).min(64)
}

/// Number of threads that read from a store and work on what they read.
pub fn reading_threads(store: &dyn Store, wanted: usize) -> usize {
    if wanted == 0 { default_threads().max(store.fetches_in_flight()) } else { wanted }
}

/// Small objects per thread that are worth starting it for.
const OBJECTS_PER_THREAD: usize = 64;

/// Number of threads to read and open that many small objects with.
pub fn opening_threads(store: &dyn Store, objects: usize) -> usize {
    default_threads().min(objects / OBJECTS_PER_THREAD).max(store.fetches_in_flight())
}

/// Writes and deletions in flight, for a store that says nothing of itself: each waits for a disk most of the time, which
/// makes many durable at once.
const CHANGES_IN_FLIGHT: usize = 8;

/// Number of threads to change that many objects with.
pub fn changing_threads(store: &dyn Store, objects: usize) -> usize {
    CHANGES_IN_FLIGHT.min(objects / CHANGES_IN_FLIGHT).max(store.fetches_in_flight())
}

/// Deletes objects, many at once; those that were there. The first failure ends it.
pub fn delete_all(store: &dyn Store, names: &[String], progress: &dyn Progress) -> Result<Vec<String>> {
    let deleted = Mutex::new(Vec::with_capacity(names.len()));
    let outcome = parallel(names, changing_threads(store, names.len()), |name| {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if store.delete(name)? {
            lock(&deleted).push(name.clone());
        }
        Ok(())
    });
    outcome.map(|()| deleted.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Runs `act` over items, as [`parallel`] does; what it gives, in no particular order.
pub fn parallel_map<T: Sync, U: Send>(
    items: &[T],
    threads: usize,
    act: impl Fn(&T) -> Result<Option<U>> + Sync,
) -> Result<Vec<U>> {
    let found = Mutex::new(Vec::with_capacity(items.len()));
    parallel(items, threads, |item| {
        if let Some(value) = act(item)? {
            lock(&found).push(value);
        }
        Ok(())
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Runs `act` over items on several threads; the first error ends it.
pub fn parallel<T: Sync>(items: &[T], threads: usize, act: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let threads = if threads == 0 { default_threads() } else { threads }.min(items.len());
    if threads <= 1 {
        return items.iter().try_for_each(act);
    }
    let (next, failed) = (AtomicUsize::new(0), OnceLock::<Error>::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let (Some(item), None) = (items.get(next.fetch_add(1, Relaxed)), failed.get()) {
                    if let Err(e) = act(item) {
                        let _ = failed.set(e);
                    }
                }
            });
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}
