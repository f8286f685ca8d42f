//! One disk of a run: takes chunks, or parts of them, in any order; makes the next tree of pages.

use std::{
    collections::BTreeMap,
    ops::{Deref, Range},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use crossbeam_channel::{SendTimeoutError, Sender};

use super::{
    DiskSpec,
    shared::{Job, Shared},
};
use crate::{
    error::{Error, Result},
    format::ChunkId,
    manifest::{
        FANOUT, Page, Ref, Tree,
        edit::{Edit, LeafChange},
        overlay,
        page::OVERLAYS_MAX,
    },
    pack::codec::{Compressor, is_zero},
    util::lock,
};

/// The bytes of a chunk, in whatever buffer the caller has. A `Vec` is recycled; see [`DiskWriter::buffer`].
#[derive(Debug)]
pub enum ChunkBuf {
    /// An owned buffer.
    Vec(Vec<u8>),
    /// A shared buffer.
    Bytes(Bytes),
}

impl Deref for ChunkBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Vec(bytes) => bytes,
            Self::Bytes(bytes) => bytes,
        }
    }
}
impl From<Vec<u8>> for ChunkBuf {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Vec(bytes)
    }
}
impl From<Bytes> for ChunkBuf {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

/// What a comparison with the base said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The base has the same bytes there.
    Same,
    /// The base has other bytes there.
    Different,
    /// There is no base, or it ends before.
    NoBase,
}

/// Counters of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Chunks that were put, zero ones included.
    pub chunks: u64,
    /// Of these, chunks that were all zero.
    pub zero_chunks: u64,
    /// Bytes that the repository did not have, before compression.
    pub new_bytes: u64,
    /// Bytes added to the repository for them.
    pub stored_bytes: u64,
}

/// A finished disk; the fields go into its [`virtward_model::DiskRecord`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskResult {
    /// Root of the tree of pages.
    pub root: String,
    /// Bytes that the repository did not have, before compression.
    pub new_bytes: u64,
    /// Bytes added to the repository for them.
    pub stored_bytes: u64,
    /// Bytes of the whole disk that are not zero.
    pub data_bytes: u64,
    /// All counters.
    pub stats: DiskStats,
}

/// Writes one disk. Every chunk is put at most once, from any thread.
pub struct DiskWriter {
    shared: Arc<Shared>,
    queue: Sender<Job>,
    state: Arc<DiskState>,
}

pub struct DiskState {
    size_bytes: u64,
    chunk_bytes: u32,
    chunks: u64,
    base: Option<(Tree, u64)>,
    /// What the last chunk was set to.
    last: AtomicU8,
    changes: Mutex<BTreeMap<u64, LeafChange>>,
    in_flight: Mutex<u64>,
    idle: Condvar,
    put: AtomicU64,
    zero: AtomicU64,
    new_bytes: AtomicU64,
    stored_bytes: AtomicU64,
}

const LAST_UNKNOWN: u8 = 0;
const LAST_ZERO: u8 = 1;
const LAST_DATA: u8 = 2;

impl DiskState {
    fn chunk_len(&self, index: u64) -> usize {
        let begin = index * u64::from(self.chunk_bytes);
        (self.size_bytes - begin).min(u64::from(self.chunk_bytes)) as usize
    }

    fn leaf_len(&self, leaf: u64) -> u64 {
        FANOUT.min(self.chunks - leaf * FANOUT)
    }

    /// On a worker: from bytes to a reference.
    pub fn process(&self, shared: &Shared, job: &Job, compressor: &mut Compressor) -> Result<()> {
        self.put.fetch_add(1, Relaxed);
        if job.keep == 0 && job.over.is_empty() && is_zero(&job.chunk) {
            self.zero.fetch_add(1, Relaxed);
            return self.set(shared, job.index, None);
        }
        let mut layers = self.base_layers(shared, job.index, job.keep)?;
        for layer in std::iter::once(&*job.chunk).chain(job.over.iter().map(Vec::as_slice)) {
            let id = shared.repo.inner.ring.chunk_id(layer);
            if let Some(stored) = shared.store_chunk(id, layer, compressor)? {
                self.new_bytes.fetch_add(layer.len() as u64, Relaxed);
                self.stored_bytes.fetch_add(stored, Relaxed);
            }
            layers.push(id);
        }
        self.set(shared, job.index, Ref::layered(&layers))
    }

    /// The lowest layers of a chunk of the base.
    fn base_layers(&self, shared: &Shared, index: u64, keep: usize) -> Result<Vec<ChunkId>> {
        if keep == 0 {
            return Ok(Vec::new());
        }
        let base = self.base_at(shared, index)?;
        let layers: Vec<ChunkId> = base.iter().flat_map(Ref::layers).take(keep).copied().collect();
        if layers.len() == keep {
            return Ok(layers);
        }
        Err(Error::Misuse { what: format!("layers put over chunk {index}, of which the base has {}", layers.len()) })
    }

    fn base_at(&self, shared: &Shared, index: u64) -> Result<Option<Ref>> {
        let Some((tree, _)) = self.base else { return Ok(None) };
        shared.distrust(tree.chunk(&*shared.repo.inner, index))
    }

    fn note_last(&self, index: u64, is_data: bool) {
        if index + 1 == self.chunks {
            self.last.store(if is_data { LAST_DATA } else { LAST_ZERO }, Relaxed);
        }
    }

    /// A chunk has left the workers.
    pub fn done(&self) {
        *lock(&self.in_flight) -= 1;
        self.idle.notify_all();
    }

    fn set(&self, shared: &Shared, index: u64, chunk: Option<Ref>) -> Result<()> {
        let leaf = index / FANOUT;
        self.note_last(index, chunk.is_some());
        let mut changes = lock(&self.changes);
        let change = changes.entry(leaf).or_insert_with(|| LeafChange::Patch(Box::default()));
        let LeafChange::Patch(patch) = change else { return Err(put_twice(index)) };
        if !patch.set(index % FANOUT, chunk) {
            return Err(put_twice(index));
        }
        if patch.count() < self.leaf_len(leaf) {
            return Ok(());
        }
        // The leaf is complete: its page is written now, so that memory does not grow with the disk.
        let LeafChange::Patch(patch) = std::mem::replace(change, LeafChange::Sealing) else {
            return Err(put_twice(index));
        };
        drop(changes);
        let page = Page::new(0, patch.into_refs());
        let written = page.map(|page| shared.store_page(&page)).transpose()?;
        lock(&self.changes).insert(leaf, LeafChange::Whole(written));
        Ok(())
    }
}

fn put_twice(index: u64) -> Error {
    Error::Misuse { what: format!("chunk {index} was put twice in one run") }
}

impl DiskWriter {
    pub(super) fn new(shared: Arc<Shared>, queue: Sender<Job>, spec: DiskSpec) -> Result<Self> {
        let DiskSpec { size_bytes, chunk_bytes, base } = spec;
        let tree = |b: &virtward_model::DiskRecord| {
            Tree::parse(&b.root, b.size_bytes, b.chunk_bytes).map(|tree| (tree, b.size_bytes))
        };
        let state = DiskState {
            size_bytes,
            chunk_bytes,
            chunks: size_bytes.div_ceil(u64::from(chunk_bytes)),
            base: base.as_ref().map(tree).transpose()?,
            last: AtomicU8::new(LAST_UNKNOWN),
            changes: Mutex::default(),
            in_flight: Mutex::default(),
            idle: Condvar::new(),
            put: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            new_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
        };
        Ok(Self { shared, queue, state: Arc::new(state) })
    }

    /// Virtual size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.state.size_bytes
    }
    /// Chunk size in bytes.
    pub fn chunk_bytes(&self) -> u32 {
        self.state.chunk_bytes
    }
    /// Number of chunks; the last may be short.
    pub fn chunks(&self) -> u64 {
        self.state.chunks
    }
    /// Length of a chunk.
    pub fn chunk_len(&self, index: u64) -> usize {
        if index < self.state.chunks { self.state.chunk_len(index) } else { 0 }
    }

    /// A buffer of the length of a chunk, recycled if there is one; its content is arbitrary.
    pub fn buffer(&self, index: u64) -> Vec<u8> {
        let mut buffer = self.shared.chunk_buffer();
        buffer.resize(self.chunk_len(index), 0);
        buffer
    }

    fn check(&self, index: u64, len: usize) -> Result<()> {
        if index < self.state.chunks && len == self.state.chunk_len(index) {
            return Ok(());
        }
        let what = format!("{len} bytes put as chunk {index} of {}", self.state.chunks);
        Err(Error::Misuse { what })
    }

    /// Takes one chunk; waits while the workers are busy. An error may be that of an earlier chunk.
    pub fn put(&self, index: u64, chunk: impl Into<ChunkBuf>) -> Result<()> {
        let chunk = chunk.into();
        self.check(index, chunk.len())?;
        self.enqueue(index, 0, chunk, Vec::new())
    }

    /// Whether [`DiskWriter::put_parts`] can take these parts of a chunk: they are few, and what they change is in the
    /// base. Otherwise the whole chunk has to be put. Reads pages, never data.
    pub fn takes_parts(&self, index: u64, parts: &[Range<u32>]) -> Result<bool> {
        Ok(overlay::is_worth_it(parts, self.chunk_len(index)) && self.layers_below(index)?.is_some())
    }

    /// Layers of the base's chunk if another one can be put over them; 0 where the base is zero.
    fn layers_below(&self, index: u64) -> Result<Option<usize>> {
        let state = &*self.state;
        let Some((_, base_bytes)) = state.base else { return Ok(None) };
        // Where one of the disks ends inside a chunk, what is beyond its end must not come back.
        let end = (index + 1).saturating_mul(state.chunk_bytes.into());
        if base_bytes != state.size_bytes && end > base_bytes.min(state.size_bytes) {
            return Ok(None);
        }
        let layers = state.base_at(&self.shared, index)?.map_or(0, |r| r.layers().count());
        Ok((layers <= OVERLAYS_MAX).then_some(layers))
    }

    /// Takes parts of a chunk that lie over what the base has there. `chunk` is as long as the chunk; only the bytes of the
    /// parts count. Waits and fails as [`DiskWriter::put`]; refuses what [`DiskWriter::takes_parts`] does not take.
    pub fn put_parts(&self, index: u64, chunk: impl Into<ChunkBuf>, parts: &[Range<u32>]) -> Result<()> {
        let chunk = chunk.into();
        self.check(index, chunk.len())?;
        let below = if overlay::is_worth_it(parts, chunk.len()) { self.layers_below(index)? } else { None };
        let Some(keep) = below else {
            return Err(Error::Misuse { what: format!("parts put of chunk {index}, which must be put whole") });
        };
        let mut buffer = self.shared.chunk_buffer();
        if keep == 0 {
            buffer.clear();
            buffer.resize(chunk.len(), 0);
            for part in parts {
                let part = part.start as usize..part.end as usize;
                buffer[part.clone()].copy_from_slice(&chunk[part]);
            }
        } else {
            overlay::encode(&chunk, parts, &mut buffer);
        }
        self.shared.recycle(chunk);
        self.enqueue(index, keep, buffer.into(), Vec::new())
    }

    /// Takes layers as they are in another repository, over the lowest `keep` of the base.
    pub(crate) fn put_layers(&self, index: u64, keep: usize, mut layers: Vec<Vec<u8>>) -> Result<()> {
        if layers.is_empty() || index >= self.chunks() || keep + layers.len() > 1 + OVERLAYS_MAX {
            return Err(Error::Misuse { what: format!("{} layers put as chunk {index}", layers.len()) });
        }
        let first = layers.remove(0);
        self.enqueue(index, keep, first.into(), layers)
    }

    /// Takes a chunk that may be shorter than its place, the rest being zero: a copy has the same chunks as its original,
    /// byte for byte, also where the original's are short because the disk grew.
    pub(crate) fn put_short(&self, index: u64, chunk: Vec<u8>) -> Result<()> {
        if chunk.len() > self.chunk_len(index) {
            self.check(index, chunk.len())?;
        }
        self.enqueue(index, 0, chunk.into(), Vec::new())
    }

    fn enqueue(&self, index: u64, keep: usize, chunk: ChunkBuf, over: Vec<Vec<u8>>) -> Result<()> {
        self.shared.status()?;
        *lock(&self.state.in_flight) += 1;
        let mut job = Job { disk: self.state.clone(), index, keep, chunk, over };
        loop {
            // Wakes up now and then, so that a cancelled or failed run is noticed while waiting.
            job = match self.queue.send_timeout(job, Duration::from_millis(200)) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(job)) => job,
                Err(SendTimeoutError::Disconnected(_)) => {
                    self.state.done();
                    return Err(self.shared.status().err().unwrap_or(Error::Cancelled));
                }
            };
            if let Err(e) = self.shared.status() {
                self.state.done();
                return Err(e);
            }
        }
    }

    /// Declares chunks to be zero, without bytes.
    pub fn put_zero(&self, first: u64, count: u64) -> Result<()> {
        self.shared.status()?;
        let state = &*self.state;
        let end = first
            .checked_add(count)
            .filter(|end| *end <= state.chunks)
            .ok_or_else(|| Error::Misuse { what: format!("{count} zero chunks put at {first} of {}", state.chunks) })?;
        state.put.fetch_add(count, Relaxed);
        state.zero.fetch_add(count, Relaxed);
        let mut index = first;
        while index < end {
            let leaf = index / FANOUT;
            let leaf_end = leaf * FANOUT + state.leaf_len(leaf);
            let untouched =
                index.is_multiple_of(FANOUT) && end >= leaf_end && !lock(&state.changes).contains_key(&leaf);
            if untouched {
                // Without a base an untouched leaf is zero already.
                if state.base.is_some() {
                    lock(&state.changes).insert(leaf, LeafChange::Whole(None));
                }
                state.note_last(leaf_end - 1, false);
                index = leaf_end;
            } else {
                state.set(&self.shared, index, None)?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Whether the base has these bytes at that place. Reads pages; data only where a chunk was written over or a disk
    /// changed its size, and answers `NoBase` where this host's keys cannot read that.
    pub fn compare_base(&self, index: u64, data: &[u8]) -> Result<Compared> {
        self.check(index, data.len())?;
        self.shared.distrust(self.compare(index, data))
    }

    fn compare(&self, index: u64, data: &[u8]) -> Result<Compared> {
        let state = &*self.state;
        let Some((tree, base_bytes)) = state.base else { return Ok(Compared::NoBase) };
        let begin = index * u64::from(state.chunk_bytes);
        if begin >= base_bytes {
            return Ok(Compared::NoBase);
        }
        let base_len = (base_bytes - begin).min(u64::from(state.chunk_bytes)) as usize;
        let inner = &*self.shared.repo.inner;
        let Some(r) = tree.chunk(inner, index)? else {
            return Ok(if is_zero(data) { Compared::Same } else { Compared::Different });
        };
        if !r.overlays.is_empty() {
            if !self.shared.repo.can_restore() {
                return Ok(Compared::NoBase);
            }
            let mut old = inner.read_place(&r, base_len)?;
            old.resize(data.len(), 0);
            return Ok(if old == data { Compared::Same } else { Compared::Different });
        }
        let id = r.id;
        // Around a resize a chunk can be shorter than its place (the rest is zero), or longer than this disk.
        let plain = inner.index.locate(&id)?.entry.plain as usize;
        let same = if plain <= base_len.min(data.len()) {
            inner.ring.chunk_id(&data[..plain]) == id && is_zero(&data[plain..])
        } else {
            let mut old = inner.read_record(&id)?;
            old.truncate(base_len);
            old.resize(data.len(), 0);
            old == data
        };
        Ok(if same { Compared::Same } else { Compared::Different })
    }

    /// Counters so far.
    pub fn stats(&self) -> DiskStats {
        let state = &*self.state;
        DiskStats {
            chunks: state.put.load(Relaxed),
            zero_chunks: state.zero.load(Relaxed),
            new_bytes: state.new_bytes.load(Relaxed),
            stored_bytes: state.stored_bytes.load(Relaxed),
        }
    }

    fn wait_idle(&self) -> Result<()> {
        let mut in_flight = lock(&self.state.in_flight);
        while *in_flight > 0 {
            self.shared.status()?;
            let step = Duration::from_millis(200);
            in_flight = self.state.idle.wait_timeout(in_flight, step).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.shared.status()
    }

    /// Whether the last chunk of the new state is data.
    fn last_is_data(&self) -> Result<bool> {
        let state = &*self.state;
        match (state.last.load(Relaxed), state.base, state.chunks) {
            (LAST_ZERO, ..) | (_, _, 0) => Ok(false),
            (LAST_DATA, ..) => Ok(true),
            (_, Some((tree, _)), chunks) => Ok(tree.chunk(&*self.shared.repo.inner, chunks - 1)?.is_some()),
            (_, None, _) => Ok(false),
        }
    }

    /// When the disk shrank inside a chunk that comes from the base, what is beyond the end must go: it would come back
    /// if the disk grew again.
    fn cut_last_chunk(&self) -> Result<()> {
        let state = &*self.state;
        let Some((tree, base_bytes)) = state.base else { return Ok(()) };
        let is_cut = base_bytes > state.size_bytes && !state.size_bytes.is_multiple_of(state.chunk_bytes.into());
        if !is_cut || state.last.load(Relaxed) != LAST_UNKNOWN {
            return Ok(());
        }
        let (index, inner) = (state.chunks - 1, &*self.shared.repo.inner);
        let Some(r) = tree.chunk(inner, index)? else { return Ok(()) };
        let chunk = inner.read_place(&r, state.chunk_len(index))?.into();
        let job = Job { disk: self.state.clone(), index, keep: 0, chunk, over: Vec::new() };
        state.process(&self.shared, &job, &mut Compressor::new(self.shared.compression))
    }

    /// Waits for the disk's chunks and makes its tree. Durable only once the run is published.
    pub fn finish(self) -> Result<DiskResult> {
        self.wait_idle()?;
        self.shared.distrust(self.make_tree())
    }

    fn make_tree(&self) -> Result<DiskResult> {
        self.cut_last_chunk()?;
        let (state, inner) = (&*self.state, &*self.shared.repo.inner);
        let changes = lock(&state.changes);
        let base = state.base.map(|(tree, _)| tree);
        let write = |page: &Page| self.shared.store_page(page);
        let root = Edit { pages: inner, write: &write, changes: &changes, base, chunks: state.chunks }.run()?;
        let root_text = root.as_ref().map(|r| r.id.to_string()).unwrap_or_default();
        self.shared.add_root(&root_text);
        drop(changes);
        let short = if self.last_is_data()? {
            u64::from(state.chunk_bytes) - self.chunk_len(state.chunks - 1) as u64
        } else {
            0
        };
        let data_bytes = root.map_or(0, |r| r.chunks) * u64::from(state.chunk_bytes) - short;
        let DiskStats { new_bytes, stored_bytes, .. } = self.stats();
        Ok(DiskResult { root: root_text, new_bytes, stored_bytes, data_bytes, stats: self.stats() })
    }
}
