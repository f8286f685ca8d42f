//! Copying a whole disk out: many fetches in flight, decoding on all cores, writing only what is not zero.
//!
//! Chunks are planned in windows of the disk, sorted by their place in packs, and neighbours are fetched together. A
//! chunk that occurs more than once in a window is fetched and decoded once. A chunk that was written over is read by
//! itself, with its overlays.

use std::{
    collections::{HashMap, VecDeque, hash_map},
    io,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use super::DiskReader;
use crate::{
    crypto::Sealer,
    error::{Error, Result},
    format::ChunkId,
    index::Location,
    manifest::{Ref, diff::Change},
    pack::{Entry, PackInfo, read::decode_record},
    progress::Progress,
    util::{Permits, default_threads, lock},
};

/// Longest range fetched at once.
const FETCH_BYTES_MAX: u64 = 4 << 20;
/// Unwanted bytes between two chunks that are fetched along with them.
const GAP_BYTES_MAX: u64 = 128 << 10;
/// Leaf pages planned at once.
const WINDOW_LEAVES: usize = 4;

/// Fetches in flight even from a store that answers at once.
const IN_FLIGHT_MIN: usize = 16;

/// How to copy a disk out.
#[derive(Clone, Default)]
pub struct RestoreOptions<'a> {
    /// Threads that decode at the same time; 0 is one per core.
    pub threads: usize,
    /// Fetches in flight; 0 is 16, or more if the store says that it pays.
    pub in_flight: usize,
    /// Raised to end with [`Error::Cancelled`].
    pub cancel: Option<&'a AtomicBool>,
    /// Told of every byte written.
    pub progress: Option<&'a dyn Progress>,
}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// Bytes given to the sink.
    pub written_bytes: u64,
    /// Bytes fetched from the store.
    pub fetched_bytes: u64,
    /// Ranges fetched.
    pub fetches: u64,
}

/// Neighbouring records of one pack, with the chunks of the disk that each serves.
struct Group {
    pack: Arc<PackInfo>,
    begin: u64,
    end: u64,
    records: Vec<(Entry, Vec<u64>)>,
}

/// What one thread does next.
enum Work {
    Group(Group),
    Layered(Change),
}

/// Where a disk is copied to. Called from several threads at once, in no particular order.
pub(crate) trait Sink: Sync {
    /// The bytes at an offset.
    fn chunk(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Takes the layers of a chunk as they are, instead of the bytes that they add up to; false if it does not.
    fn layers(&self, change: &Change, read: &dyn Fn(&ChunkId) -> Result<Vec<u8>>) -> Result<bool>;
}

/// A sink that wants bytes.
struct Bytes<'a, S: ?Sized>(&'a S);

impl<S: Fn(u64, &[u8]) -> io::Result<()> + Sync + ?Sized> Sink for Bytes<'_, S> {
    fn chunk(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (self.0)(offset, bytes)
    }
    fn layers(&self, _: &Change, _: &dyn Fn(&ChunkId) -> Result<Vec<u8>>) -> Result<bool> {
        Ok(false)
    }
}

struct Copy<'a, S: ?Sized> {
    reader: &'a DiskReader,
    sink: &'a S,
    options: &'a RestoreOptions<'a>,
    plan: Mutex<Plan>,
    permits: Permits,
    failed: OnceLock<Error>,
    written: AtomicU64,
    fetched: AtomicU64,
    fetches: AtomicU64,
}

#[derive(Default)]
struct Plan {
    next_leaf: u64,
    work: VecDeque<Work>,
}

impl DiskReader {
    /// Gives every chunk that is not zero to `sink`, in no particular order, from several threads at once. What is not
    /// given is zero.
    pub fn copy_to<S>(&self, sink: &S, options: &RestoreOptions<'_>) -> Result<RestoreStats>
    where
        S: Fn(u64, &[u8]) -> io::Result<()> + Sync + ?Sized,
    {
        self.copy_into(&Bytes(sink), options)
    }

    /// As [`DiskReader::copy_to`], for a sink that may take layers.
    pub(crate) fn copy_into<S: Sink + ?Sized>(&self, sink: &S, options: &RestoreOptions<'_>) -> Result<RestoreStats> {
        let threads = if options.threads == 0 { default_threads() } else { options.threads };
        let in_flight = match options.in_flight {
            0 => self.repo.inner.store.fetches_in_flight().max(IN_FLIGHT_MIN),
            given => given,
        };
        let in_flight = in_flight.clamp(1, 256);
        let copy = Copy {
            reader: self,
            sink,
            options,
            plan: Mutex::default(),
            permits: Permits::new(threads),
            failed: OnceLock::new(),
            written: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            fetches: AtomicU64::new(0),
        };
        if let Some(progress) = options.progress {
            progress.total(self.zeroed(&mut |_| Ok(()))?);
        }
        std::thread::scope(|scope| {
            for _ in 0..in_flight {
                scope.spawn(|| {
                    if let Err(e) = copy.work() {
                        let _ = copy.failed.set(e);
                    }
                });
            }
        });
        let stats = RestoreStats {
            written_bytes: copy.written.load(Relaxed),
            fetched_bytes: copy.fetched.load(Relaxed),
            fetches: copy.fetches.load(Relaxed),
        };
        copy.failed.into_inner().map_or(Ok(stats), Err)
    }
}

impl<S: Sink + ?Sized> Copy<'_, S> {
    fn work(&self) -> Result<()> {
        let (mut sealed, mut plain) = (Vec::new(), Vec::new());
        while let Some(work) = self.next()? {
            let group = match work {
                Work::Group(group) => group,
                Work::Layered(change) => {
                    self.copy_layered(&change)?;
                    continue;
                }
            };
            match self.fetch(&group, &mut sealed) {
                Ok(sealer) => self.copy_group(&group, &sealer, &mut sealed, &mut plain)?,
                // Repacked since it was planned, or damaged: each chunk is looked up anew, at every place it has.
                Err(e) if e.is_damage() => self.copy_singly(&group)?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn status(&self) -> Result<()> {
        let raised = |flag: Option<&AtomicBool>| flag.is_some_and(|c| c.load(Relaxed));
        if raised(self.options.cancel) || self.options.progress.is_some_and(|p| p.is_cancelled()) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    fn next(&self) -> Result<Option<Work>> {
        self.status()?;
        if self.failed.get().is_some() {
            return Ok(None);
        }
        let mut plan = lock(&self.plan);
        if plan.work.is_empty() {
            self.plan_window(&mut plan)?;
        }
        Ok(plan.work.pop_front())
    }

    fn plan_window(&self, plan: &mut Plan) -> Result<()> {
        let repo = &self.reader.repo;
        let mut uses: HashMap<ChunkId, Vec<u64>> = HashMap::new();
        let mut places: Vec<Location> = Vec::new();
        for _ in 0..WINDOW_LEAVES {
            let Some((leaf, chunks)) = self.reader.next_to_copy(plan.next_leaf)? else { break };
            plan.next_leaf = leaf + 1;
            for change in chunks {
                match &change.now {
                    None => {}
                    Some(r) if !r.overlays.is_empty() => plan.work.push_back(Work::Layered(change)),
                    Some(Ref { id, .. }) => match uses.entry(*id) {
                        hash_map::Entry::Occupied(mut seen) => seen.get_mut().push(change.index),
                        hash_map::Entry::Vacant(new) => {
                            places.push(repo.inner.index.locate(id)?);
                            new.insert(vec![change.index]);
                        }
                    },
                }
            }
        }
        places.sort_by_key(|p| (p.pack.id(), p.entry.offset));
        for Location { pack, entry } in places {
            let indexes = uses.remove(&entry.id).unwrap_or_default();
            let (begin, end) = (u64::from(entry.offset), u64::from(entry.offset) + u64::from(entry.stored));
            match plan.work.back_mut() {
                Some(Work::Group(group))
                    if group.pack.id() == pack.id()
                        && begin <= group.end + GAP_BYTES_MAX
                        && end - group.begin <= FETCH_BYTES_MAX =>
                {
                    group.end = end;
                    group.records.push((entry, indexes));
                }
                _ => plan.work.push_back(Work::Group(Group { pack, begin, end, records: vec![(entry, indexes)] })),
            }
        }
        Ok(())
    }

    fn fetch(&self, group: &Group, sealed: &mut Vec<u8>) -> Result<Arc<Sealer>> {
        let inner = &*self.reader.repo.inner;
        sealed.resize((group.end - group.begin) as usize, 0);
        inner.store.read_range(&group.pack.name(), group.begin, sealed)?;
        self.fetched.fetch_add(sealed.len() as u64, Relaxed);
        self.fetches.fetch_add(1, Relaxed);
        inner.sealer(&group.pack)
    }

    fn copy_group(&self, group: &Group, sealer: &Sealer, sealed: &mut [u8], plain: &mut Vec<u8>) -> Result<()> {
        let inner = &*self.reader.repo.inner;
        for (entry, indexes) in &group.records {
            let begin = (u64::from(entry.offset) - group.begin) as usize;
            let record = &mut sealed[begin..begin + entry.stored as usize];
            let decoded =
                self.permits.with(|| decode_record(&inner.ring, &group.pack.header, sealer, entry, record, plain));
            if decoded.is_err() {
                // Damaged here; the chunk may have been stored again elsewhere.
                *plain = inner.read_record(&entry.id)?;
            }
            indexes.iter().try_for_each(|index| self.give(*index, plain))?;
        }
        Ok(())
    }

    fn copy_singly(&self, group: &Group) -> Result<()> {
        for (entry, indexes) in &group.records {
            let plain = self.reader.repo.inner.read_record(&entry.id)?;
            indexes.iter().try_for_each(|index| self.give(*index, &plain))?;
        }
        Ok(())
    }

    fn copy_layered(&self, change: &Change) -> Result<()> {
        let (reader, index) = (self.reader, change.index);
        let Some(r) = &change.now else { return Ok(()) };
        let read = |id: &ChunkId| {
            let plain = reader.repo.inner.read_record(id)?;
            self.fetches.fetch_add(1, Relaxed);
            self.fetched.fetch_add(plain.len() as u64, Relaxed);
            Ok(plain)
        };
        if self.sink.layers(change, &read)? {
            if let Some(progress) = self.options.progress {
                progress.advance(reader.room(index) as u64);
            }
            return Ok(());
        }
        let room = reader.room(index);
        let plain = self.permits.with(|| reader.repo.inner.read_place(r, room))?;
        self.fetches.fetch_add(r.layers().count() as u64, Relaxed);
        self.give(index, &plain)
    }

    fn give(&self, index: u64, plain: &[u8]) -> Result<()> {
        self.status()?;
        let offset = index * u64::from(self.reader.chunk_bytes);
        let room = self.reader.room(index);
        let bytes = &plain[..plain.len().min(room)];
        self.sink.chunk(offset, bytes).map_err(|e| Error::io("write", "the restored disk", e))?;
        self.written.fetch_add(bytes.len() as u64, Relaxed);
        if let Some(progress) = self.options.progress {
            progress.advance(room as u64);
        }
        Ok(())
    }
}
