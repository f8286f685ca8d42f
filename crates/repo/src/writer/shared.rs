//! What all threads of a run share: the deduplicating store of chunks, the first failure, spare buffers.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use crossbeam_channel::Sender;
use virtward_model::DiskRecord;

use super::{
    WriterOptions,
    disk::{ChunkBuf, DiskState},
    finisher::Finisher,
};
use crate::{
    error::{Error, Result},
    format::{ChunkId, ObjectId, names},
    lease::Lease,
    manifest::{Page, Ref, Tree},
    pack::{
        Encoding, Entry, PackClass, PackInfo,
        append::{Appender, FullPack, Origin},
        codec::{Compression, Compressor},
    },
    repository::Repository,
    util::lock,
    verify::{Bad, Impact},
};

/// One chunk on its way to a worker, or layers of one.
pub struct Job {
    pub disk: Arc<DiskState>,
    pub index: u64,
    /// Layers of the base's chunk that stay below.
    pub keep: usize,
    /// The next layer: the chunk itself if none stay.
    pub chunk: ChunkBuf,
    /// Layers over that.
    pub over: Vec<Vec<u8>>,
}

/// Sets of ids, apart so that threads rarely meet.
const SHARDS: usize = 32;
/// Spare buffers kept, of each kind.
const SPARES_MAX: usize = 32;

/// Buffers that have done their work, for the next one of their kind: memory that is in use already need neither be asked
/// for nor cleared again.
#[derive(Default)]
struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    fn take(&self) -> Vec<u8> {
        lock(&self.0).pop().unwrap_or_default()
    }

    fn give(&self, buffer: Vec<u8>) {
        let mut spares = lock(&self.0);
        if spares.len() < SPARES_MAX && buffer.capacity() > 0 {
            spares.push(buffer);
        }
    }
}

pub struct Shared {
    pub repo: Repository,
    pub origin: Origin,
    pub compression: Compression,
    /// Packs that count as absent: condemned by the epoch, lost, or found damaged by this run.
    avoid: RwLock<HashSet<ObjectId>>,
    /// Chunks and pages that this run stores or is storing.
    seen: Vec<Mutex<HashSet<ChunkId>>>,
    data: Appender,
    meta: Appender,
    finisher: Arc<Finisher>,
    full_packs: Sender<Option<FullPack>>,
    roots: Mutex<HashSet<String>>,
    failed: Arc<OnceLock<Error>>,
    closed: AtomicBool,
    cancel: Option<Arc<AtomicBool>>,
    chunk_buffers: Spares,
    record_buffers: Spares,
}

impl Shared {
    /// Starts the finisher thread and prepares the packs.
    pub fn start(
        repo: Repository,
        lease: &Lease,
        avoid: HashSet<ObjectId>,
        options: &WriterOptions,
        pack_bytes: u32,
    ) -> Result<(Arc<Self>, JoinHandle<()>)> {
        let origin = Origin { writer: lease.writer(), epoch: lease.epoch() };
        let failed: Arc<OnceLock<Error>> = Arc::default();
        let (finisher, full_packs, thread) = Finisher::start(&repo, origin, failed.clone())?;
        let appender = |class| {
            let (finisher, full_packs) = (finisher.clone(), full_packs.clone());
            let on_full = move |pack| {
                finisher.expect_one();
                // Fails only after the run has ended, when nobody waits for the pack.
                let _ = full_packs.send(Some(pack));
            };
            let (store, ring) = (repo.inner.store.clone(), repo.inner.ring.clone());
            Appender::new(store, ring, class, origin, pack_bytes, Box::new(on_full))
        };
        let shared = Self {
            data: appender(PackClass::Data),
            meta: appender(PackClass::Meta),
            repo,
            origin,
            compression: options.compression,
            avoid: RwLock::new(avoid),
            seen: (0..SHARDS).map(|_| Mutex::default()).collect(),
            finisher,
            full_packs,
            roots: Mutex::default(),
            failed,
            closed: AtomicBool::new(false),
            cancel: options.cancel.clone(),
            chunk_buffers: Spares::default(),
            record_buffers: Spares::default(),
        };
        Ok((Arc::new(shared), thread))
    }

    /// The first failure of the run, or cancellation.
    pub fn status(&self) -> Result<()> {
        if let Some(e) = self.failed.get() {
            return Err(e.clone());
        }
        if self.closed.load(Ordering::Relaxed) || self.cancel.as_ref().is_some_and(|c| c.load(Ordering::Relaxed)) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }
    /// Records a failure; the first one counts.
    pub fn fail(&self, error: &Error) {
        let _ = self.failed.set(error.clone());
    }
    /// Makes everything fail that is still to come.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Whether an id is new to repository and run; the caller must store it then.
    fn claim(&self, id: &ChunkId) -> Result<bool> {
        if self.is_stored(id)? {
            return Ok(false);
        }
        Ok(lock(&self.seen[id.0[0] as usize % SHARDS]).insert(*id))
    }

    fn is_stored(&self, id: &ChunkId) -> Result<bool> {
        let avoid = self.avoid.read().unwrap_or_else(PoisonError::into_inner);
        let usable = |pack: &PackInfo, _: &Entry| !avoid.contains(&pack.id());
        Ok(self.repo.inner.index.lookup(id, &usable)?.is_some())
    }

    /// If an outcome is damage in a pack, nothing more is taken from that pack: the run stores it again. Otherwise the
    /// backup that follows the discovery would refer to what is damaged, because its id is known.
    pub fn distrust<T>(&self, outcome: Result<T>) -> Result<T> {
        if let Err(Error::Damaged { object, .. } | Error::Missing { object }) = &outcome
            && let Some(pack) = names::parse_pack(object)
        {
            self.avoid.write().unwrap_or_else(PoisonError::into_inner).insert(pack);
        }
        outcome
    }

    /// Packs that count as absent.
    pub fn avoided(&self) -> HashSet<ObjectId> {
        self.avoid.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a disk has chunks or pages whose only places are in packs to avoid. Where there is nothing to avoid, only
    /// its root is read.
    pub fn rests_on_avoided(&self, disk: &DiskRecord) -> Result<bool> {
        let tree = Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes)?;
        tree.data_chunks(&*self.repo.inner)?;
        let avoid = self.avoided();
        if avoid.is_empty() {
            return Ok(false);
        }
        let bad = Bad::packs(avoid);
        Ok(!Impact::new(&self.repo, &bad).disk(disk)?.is_empty())
    }

    /// Stores a chunk unless it is there; the bytes it takes if it was new.
    pub fn store_chunk(&self, id: ChunkId, chunk: &[u8], compressor: &mut Compressor) -> Result<Option<u64>> {
        if !self.claim(&id)? {
            return Ok(None);
        }
        let mut bytes = self.record_buffers.take();
        let encoding = compressor.compress(chunk, &mut bytes);
        let stored = bytes.len() as u64 + crate::crypto::TAG_BYTES as u64;
        let entry = Entry { id, offset: 0, stored: 0, plain: chunk.len() as u32, encoding };
        let spare = self.data.append(entry, bytes)?;
        self.record_buffers.give(spare);
        Ok(Some(stored))
    }

    /// Stores compressed bytes of a record that was checked, unless it is there; the bytes it takes.
    pub fn adopt(&self, class: PackClass, entry: Entry, encoded: Vec<u8>) -> Result<u64> {
        self.status()?;
        if !self.claim(&entry.id)? {
            return Ok(0);
        }
        let stored = encoded.len() as u64 + crate::crypto::TAG_BYTES as u64;
        let packs = match class {
            PackClass::Data => &self.data,
            PackClass::Meta => &self.meta,
        };
        packs.append(Entry { offset: 0, stored: 0, ..entry }, encoded)?;
        Ok(stored)
    }

    /// Stores a manifest page unless it is there.
    pub fn store_page(&self, page: &Page) -> Result<Ref> {
        let bytes = page.encode();
        let id = self.repo.inner.ring.page_id(&bytes);
        if self.claim(&id)? {
            let plain = bytes.len() as u32;
            self.meta.append(Entry { id, offset: 0, stored: 0, plain, encoding: Encoding::Plain }, bytes)?;
        }
        Ok(Ref::page(id, page.chunks()))
    }

    /// Completes all packs and indexes them durably. No chunk may be on its way.
    pub fn settle(&self) -> Result<()> {
        self.status()?;
        self.data.flush()?;
        self.meta.flush()?;
        self.finisher.settle()?;
        self.status()
    }

    /// Ends the finisher's thread once it is through with what it has.
    pub fn stop_finisher(&self) {
        let _ = self.full_packs.send(None);
    }

    /// Remembers the root of a finished disk.
    pub fn add_root(&self, root: &str) {
        lock(&self.roots).insert(root.into());
    }
    /// Whether this run finished a disk with that root.
    pub fn is_own_root(&self, root: &str) -> bool {
        lock(&self.roots).contains(root)
    }

    /// A buffer for a chunk, of any length and content.
    pub fn chunk_buffer(&self) -> Vec<u8> {
        self.chunk_buffers.take()
    }
    /// Takes back the buffer of a chunk.
    pub fn recycle(&self, chunk: ChunkBuf) {
        if let ChunkBuf::Vec(buffer) = chunk {
            self.chunk_buffers.give(buffer);
        }
    }
}
