//! Backing up: [`Writer`] (one run), [`DiskWriter`] (one disk of it).
//!
//! ```text
//! put ─► bounded queue ─► worker: zero? ─► hash ─► known? ─► compress ─► reserve ─► encrypt ─► append
//!                                                                  full packs ─► finisher: fsync ─► index segment
//! publish: attachments ─► last packs ─► last segment ─► lease still held? ─► restore point
//!          ─► lease still held, and the repository still there? ─► acknowledged
//! ```
//! Invariants: a restore point appears only after everything that it refers to is durable; a run that is dropped, at
//! any instant, leaves only garbage; a failure reaches every later call of the run.

mod census;
mod disk;
mod finisher;
#[cfg(test)]
mod order_test;
mod shared;

use std::{
    collections::HashSet,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    thread::JoinHandle,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use virtward_model::{DiskRecord, RestorePoint};

pub(crate) use census::Census;
pub use disk::{ChunkBuf, Compared, DiskResult, DiskStats, DiskWriter};
use shared::{Job, Shared};

use crate::{
    disorder::{self, Disorder},
    error::{Error, Result},
    format::{ChunkId, ObjectId, is_chunk_size, names},
    lease::Lease,
    manifest::{
        Page, Ref, Tree,
        point::{self, ATTACHMENT_BYTES_MAX, ATTACHMENT_CHUNK_BYTES, Attachment, AttachmentRefs, PointRecord},
    },
    pack::{
        Entry, PackClass,
        codec::{Compression, Compressor},
    },
    repository::Repository,
    store::Put,
    util::{default_threads, lock},
};

/// How a run works.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Worker threads; 0 is one per core.
    pub threads: usize,
    /// Compression of new chunks.
    pub compression: Compression,
    /// Size at which a pack is complete; `None` grows with the repository from 64 to 256 MiB.
    pub pack_bytes: Option<u32>,
    /// Silence after which a garbage collector may end the run's lease.
    pub lease_ttl: Duration,
    /// Raised to end the run with [`Error::Cancelled`].
    pub cancel: Option<Arc<AtomicBool>>,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            compression: Compression::default(),
            pack_bytes: None,
            lease_ttl: Duration::from_secs(15 * 60),
            cancel: None,
        }
    }
}

/// The disk that a [`DiskWriter`] writes.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Chunk size: a power of two from 256 KiB to 4 MiB.
    pub chunk_bytes: u32,
    /// Earlier state of the disk, from a restore point that still exists; chunks that are not put are its chunks.
    pub base: Option<DiskRecord>,
}

/// One backup run.
pub struct Writer {
    shared: Arc<Shared>,
    queue: Sender<Job>,
    stop: Option<Sender<()>>,
    workers: Vec<JoinHandle<()>>,
    finisher: Option<JoinHandle<()>>,
    lease: Option<Lease>,
    completed: OnceLock<AttachmentRefs>,
}

impl Repository {
    /// Begins a backup run. Nothing is visible to anyone before [`Writer::publish`].
    pub fn writer(&self, options: WriterOptions) -> Result<Writer> {
        self.writer_after(options, &mut Census::default())
    }

    /// The same as one of several runs, of which only the first lists all packs.
    pub(crate) fn writer_after(&self, options: WriterOptions, census: &mut Census) -> Result<Writer> {
        let inner = &self.inner;
        inner.store.clean();
        let lease = Lease::begin(inner.store.clone(), inner.ring.clone(), options.lease_ttl)?;
        // After the lease, so that the index is not older than it.
        let state = inner.index.refresh()?;
        // What is lost or was found damaged is stored again, not referred to.
        let mut avoid = census.lost_packs(inner, &state)?;
        avoid.extend(&lease.condemned);
        let pack_bytes = options.pack_bytes.unwrap_or_else(|| pack_target(&state)).clamp(1 << 12, 512 << 20);
        let threads = if options.threads == 0 { default_threads() } else { options.threads };
        let (shared, finisher) = Shared::start(self.clone(), &lease, avoid, &options, pack_bytes)?;
        // One chunk at work per thread, and as many waiting.
        let (queue, jobs) = bounded(threads);
        let (stop, stopped) = bounded(0);
        let finisher = Some(finisher);
        let mut writer = Writer {
            shared,
            queue,
            stop: Some(stop),
            workers: vec![],
            finisher,
            lease: Some(lease),
            completed: OnceLock::new(),
        };
        // One more than work at once: there is always one that writes a pack and waits for the store.
        for number in 0..=threads {
            let (shared, jobs, stop) = (writer.shared.clone(), jobs.clone(), stopped.clone());
            let thread = std::thread::Builder::new()
                .name(format!("repo-write-{number}"))
                .spawn(move || work(&shared, &jobs, &stop, shared.compression))
                .map_err(|e| Error::io("start", "a worker thread", e))?;
            writer.workers.push(thread);
        }
        Ok(writer)
    }
}

/// Puts a restore point and acknowledges it.
fn put_point(repo: &Repository, lease: &Lease, record: &PointRecord, mends: bool) -> Result<()> {
    let bytes = point::seal(&repo.inner.ring, record)?;
    let (store, name) = (&repo.inner.store, names::point(record.point.id));
    lease.check()?;
    if mends {
        repo.make_way(record.point.id, &bytes)?;
    }
    match store.put_if_absent(&name, &bytes)? {
        Put::Created => {}
        Put::Exists => return Err(Error::AlreadyExists { location: name, what: "is a restore point already".into() }),
    }
    // Not before this answer is the restore point acknowledged: see `lease`.
    if let Err(e) = lease.check().and_then(|()| repo.check_in_place()) {
        // Another copy of the same restore point can have taken the place of this one meanwhile, and is acknowledged.
        if repo.inner.get_small(&name).is_ok_and(|there| there == bytes) {
            let _ = store.delete(&name);
        }
        return Err(e);
    }
    Ok(())
}

/// 64 MiB up to a TiB of packs, then growing with its square root up to 256 MiB at 16 TiB.
fn pack_target(state: &crate::index::State) -> u32 {
    let total: u64 = state.packs().values().map(|p| p.bytes()).sum();
    let factor = (total as f64 / (1u64 << 40) as f64).sqrt().clamp(1.0, 4.0);
    (f64::from(64 << 20) * factor) as u32
}

fn work(shared: &Shared, jobs: &Receiver<Job>, stop: &Receiver<()>, compression: Compression) {
    let mut compressor = Compressor::new(compression);
    loop {
        let job = crossbeam_channel::select! {
            recv(jobs) -> job => job.ok(),
            // Disk writers that outlive the run hold the queue open: the run ends all the same.
            recv(stop) -> _ => jobs.try_recv().ok(),
        };
        let Some(job) = job else { return };
        if let Err(e) = shared.status().and_then(|()| job.disk.process(shared, &job, &mut compressor)) {
            shared.fail(&e);
        }
        shared.recycle(job.chunk);
        job.disk.done();
    }
}

impl Writer {
    /// Begins a disk. Several may be written at once.
    pub fn disk(&self, spec: DiskSpec) -> Result<DiskWriter> {
        self.shared.status()?;
        if !is_chunk_size(spec.chunk_bytes) {
            return Err(Error::Misuse {
                what: format!("{} is no chunk size; choose a power of two from 256 KiB to 4 MiB", spec.chunk_bytes),
            });
        }
        Tree::parse("", spec.size_bytes, spec.chunk_bytes)?;
        if let Some(base) = &spec.base {
            self.check_base(base, &spec)?;
        }
        DiskWriter::new(self.shared.clone(), self.queue.clone(), spec)
    }

    fn check_base(&self, base: &DiskRecord, spec: &DiskSpec) -> Result<()> {
        let bad = |why: String| Err(Error::BadBase { why });
        let chunk_bytes = spec.chunk_bytes;
        if base.chunk_bytes != chunk_bytes {
            return bad(format!("it has chunks of {} bytes, this backup of {chunk_bytes}", base.chunk_bytes));
        }
        let cuts = base.size_bytes > spec.size_bytes && !spec.size_bytes.is_multiple_of(chunk_bytes.into());
        if cuts && !self.shared.repo.can_restore() {
            return bad("the disk shrank inside a chunk, and this host's keys cannot read that chunk to cut it".into());
        }
        if base.root.is_empty() || self.shared.is_own_root(&base.root) {
            return Ok(());
        }
        if !self.shared.repo.is_live_root(base)? {
            return bad("no restore point with it exists any more".into());
        }
        // A base whose tree cannot be read is found out now and not after the disk was.
        match self.shared.distrust(self.shared.rests_on_avoided(base)) {
            Ok(false) => Ok(()),
            Ok(true) => bad("parts of it are in packs that are lost or damaged".into()),
            Err(e) if e.is_damage() => bad(e.to_string()),
            Err(e) => Err(e),
        }
    }

    /// Stores a record that another pack has, unless it is stored in a good place already; the bytes it takes.
    pub(crate) fn adopt(&self, class: PackClass, entry: Entry, encoded: Vec<u8>) -> Result<u64> {
        self.shared.adopt(class, entry, encoded)
    }

    /// Ends the run without a restore point: what it stored is durable and indexed.
    pub(crate) fn settle(mut self) -> Result<()> {
        let lease = self.lease.take().expect("present until published");
        self.shared.settle()?;
        lease.check()
    }

    /// Identity of this run, as its packs name it.
    pub fn id(&self) -> ObjectId {
        self.shared.origin.writer
    }

    /// Stores the restore point's attachments and makes all that was stored durable, so that little is left for
    /// [`Writer::publish`], which is then called without attachments. Every disk must be finished before.
    pub fn complete(&self, attachments: &[Attachment]) -> Result<()> {
        let refs = self.store_attachments(attachments)?;
        let twice = self.completed.set(refs).is_err();
        if twice {
            return Err(Error::Misuse { what: "a run was completed twice".into() });
        }
        if disorder::is(Disorder::PointFirst) { Ok(()) } else { self.shared.settle() }
    }

    /// Makes the restore point: last, atomically, and only once everything it refers to is durable. Every disk must
    /// be finished before.
    pub fn publish(self, point: RestorePoint, attachments: Vec<Attachment>) -> Result<()> {
        self.publish_or_mend(point, attachments, false)
    }

    /// The same, and with `mends` in place of a damaged object of the same restore point.
    pub(crate) fn publish_or_mend(
        mut self,
        point: RestorePoint,
        attachments: Vec<Attachment>,
        mends: bool,
    ) -> Result<()> {
        let shared = self.shared.clone();
        let lease = self.lease.take().expect("present until published");
        for disk in &point.disks {
            if !disk.root.is_empty() && !shared.is_own_root(&disk.root) && !shared.repo.is_live_root(disk)? {
                return Err(Error::Misuse { what: format!("disk {} was not finished by this run", disk.target) });
            }
        }
        if self.completed.get().is_none() || !attachments.is_empty() {
            self.complete(&attachments)?;
        }
        let attachments = self.completed.take().unwrap_or_default();
        let record = Arc::new(PointRecord { attachments, writer: lease.writer(), epoch: lease.epoch(), point });
        record.check(record.point.id).map_err(|e| Error::Misuse { what: format!("this restore point: {}", e.0) })?;
        put_point(&shared.repo, &lease, &record, mends)?;
        lock(&shared.repo.inner.points).insert(record.point.id, record);
        if disorder::is(Disorder::PointFirst) { shared.settle() } else { Ok(()) }
    }

    /// Packs that count as absent for this run: condemned by its epoch, or lost.
    pub(crate) fn avoided(&self) -> HashSet<ObjectId> {
        self.shared.avoided()
    }

    /// Stores a chunk that belongs to no disk of this run, unless it is there.
    pub(crate) fn store_chunk(&self, chunk: &[u8], compressor: &mut Compressor) -> Result<ChunkId> {
        self.shared.status()?;
        let id = self.shared.repo.inner.ring.chunk_id(chunk);
        self.shared.store_chunk(id, chunk, compressor)?;
        Ok(id)
    }

    /// Stores a page that belongs to no disk of this run, unless it is there.
    pub(crate) fn store_page(&self, page: &Page) -> Result<Ref> {
        self.shared.status()?;
        self.shared.store_page(page)
    }

    fn store_attachments(&self, attachments: &[Attachment]) -> Result<AttachmentRefs> {
        if attachments.is_empty() {
            return Ok(AttachmentRefs::default());
        }
        let stream = point::encode_attachments(attachments);
        if stream.len() as u64 > ATTACHMENT_BYTES_MAX {
            return Err(Error::Misuse { what: format!("{} bytes of attachments are too many", stream.len()) });
        }
        let mut compressor = Compressor::new(self.shared.compression);
        let mut refs = AttachmentRefs { bytes: stream.len() as u64, chunks: Vec::new() };
        for chunk in stream.chunks(ATTACHMENT_CHUNK_BYTES) {
            let id = self.shared.repo.inner.ring.chunk_id(chunk);
            self.shared.store_chunk(id, chunk, &mut compressor)?;
            refs.chunks.push(id);
        }
        Ok(refs)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.close();
        drop(self.stop.take());
        for thread in self.workers.drain(..) {
            let _ = thread.join();
        }
        self.shared.stop_finisher();
        if let Some(thread) = self.finisher.take() {
            let _ = thread.join();
        }
    }
}
