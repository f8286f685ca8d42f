//! Writing packs from many threads.
//!
//! A worker knows the length of its record before it encrypts, so it reserves the range (and with it the nonce), then
//! encrypts outside any lock and hands the record in. Whoever hands in the record that comes next in the file writes it
//! and all that follow; nobody else waits, except when too much is pending.
//!
//! ```text
//! reserve ─► (encrypt) ─► hand in ─► [drain in order] ─► last record of a full pack ─► finish: table, tail, fsync
//! ```
//! Invariant: a pack is reported as finished only after the store said that it is durable.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{
    Entry, Footer, Header, PackClass, PackInfo,
    layout::{HEADER_BYTES, RECORDS_MAX, seal_table},
};
use crate::{
    crypto::Sealer,
    error::{Error, Result},
    format::ObjectId,
    keys::KeyRing,
    store::{ObjectWriter, Put, Store},
    util::lock,
};

/// Records handed in but not yet written, in bytes: beyond this the workers wait for the disk.
const PENDING_BYTES_MAX: usize = 24 << 20;

/// Who writes, for the headers of packs.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Writer.
    pub writer: ObjectId,
    /// Its epoch.
    pub epoch: u64,
}

/// A finished pack with its records.
pub type Finished = (PackInfo, Vec<Entry>);

/// Takes finished packs to durability and onwards; see [`Appender::new`].
pub type OnFull = dyn Fn(FullPack) + Send + Sync;

/// Writes packs of one class.
pub struct Appender {
    store: Arc<dyn Store>,
    ring: Arc<KeyRing>,
    class: PackClass,
    origin: Origin,
    target_bytes: u32,
    current: Mutex<Option<Arc<OpenPack>>>,
    on_full: Box<OnFull>,
}

struct OpenPack {
    header: Header,
    sealer: Sealer,
    plan: Mutex<Plan>,
    out: Mutex<Out>,
    drained: Condvar,
}

/// What is reserved. Locked only inside the lock of `current`, or after the pack left it.
struct Plan {
    next: u32,
    entries: Vec<Entry>,
}

struct Out {
    /// Absent while a thread writes, and after a failure.
    sink: Option<Sink>,
    failed: Option<Error>,
    written: u32,
    pending: BTreeMap<u32, Vec<u8>>,
    pending_bytes: usize,
    /// Where the records end; known once no more are reserved.
    end: Option<u32>,
}

struct Sink {
    object: Box<dyn ObjectWriter>,
    hasher: blake3::Hasher,
}

/// A pack whose records are all written; what remains is table, tail and durability.
pub struct FullPack {
    pack: Arc<OpenPack>,
    sink: Sink,
}

impl FullPack {
    /// Completes the pack. Blocks for as long as the disk needs.
    pub fn finish(self, ring: &KeyRing) -> Result<Finished> {
        let Self { pack, mut sink } = self;
        let entries = std::mem::take(&mut lock(&pack.plan).entries);
        let table = seal_table(&pack.header, ring, &entries)?;
        sink.write(&table)?;
        let footer = Footer {
            table_offset: lock(&pack.out).written,
            table_bytes: table.len() as u32,
            records: entries.len() as u32,
            sum: *sink.hasher.finalize().as_bytes(),
        };
        sink.object.write(&footer.encode(&pack.header))?;
        let info = PackInfo { header: pack.header.clone(), footer };
        match sink.object.finish()? {
            Put::Created => Ok((info, entries)),
            Put::Exists => Err(Error::damaged(info.name(), "another object has this random name")),
        }
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.object.write(bytes)
    }
}

impl Appender {
    /// `on_full` gets every pack whose records are all written, on the thread that wrote the last of them.
    pub fn new(
        store: Arc<dyn Store>,
        ring: Arc<KeyRing>,
        class: PackClass,
        origin: Origin,
        target_bytes: u32,
        on_full: Box<OnFull>,
    ) -> Self {
        Self { store, ring, class, origin, target_bytes, current: Mutex::new(None), on_full }
    }

    /// Seals `entry`'s compressed bytes and appends them; `entry.offset` and `entry.stored` are set here. Gives back a
    /// buffer for the next chunk. An error may belong to an earlier record.
    pub fn append(&self, mut entry: Entry, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
        entry.stored = (bytes.len() + crate::crypto::TAG_BYTES) as u32;
        let (pack, entry, end) = self.reserve(entry)?;
        pack.sealer.seal(u64::from(entry.offset), &entry.aad(&pack.header), &mut bytes);
        debug_assert_eq!(bytes.len(), entry.stored as usize);
        self.hand_in(&pack, entry.offset, bytes, end)
    }

    fn reserve(&self, mut entry: Entry) -> Result<(Arc<OpenPack>, Entry, Option<u32>)> {
        let mut current = lock(&self.current);
        let pack = match &*current {
            Some(pack) => pack.clone(),
            None => current.insert(Arc::new(self.open()?)).clone(),
        };
        let mut plan = lock(&pack.plan);
        entry.offset = plan.next;
        plan.next += entry.stored;
        plan.entries.push(entry);
        let is_full = plan.next >= self.target_bytes || plan.entries.len() as u32 == RECORDS_MAX;
        let end = is_full.then_some(plan.next);
        drop(plan);
        if is_full {
            *current = None;
        }
        Ok((pack, entry, end))
    }

    fn open(&self) -> Result<OpenPack> {
        let (header, sealer) = Header::create(&self.ring, self.class, self.origin.writer, self.origin.epoch)?;
        let mut sink = Sink { object: self.store.create(&header.name())?, hasher: blake3::Hasher::new() };
        sink.write(header.bytes())?;
        let first = HEADER_BYTES as u32;
        Ok(OpenPack {
            header,
            sealer,
            plan: Mutex::new(Plan { next: first, entries: Vec::new() }),
            out: Mutex::new(Out {
                sink: Some(sink),
                failed: None,
                written: first,
                pending: BTreeMap::new(),
                pending_bytes: 0,
                end: None,
            }),
            drained: Condvar::new(),
        })
    }

    /// Puts a record in line and, if it is the next and nobody is writing, writes.
    fn hand_in(&self, pack: &Arc<OpenPack>, offset: u32, bytes: Vec<u8>, end: Option<u32>) -> Result<Vec<u8>> {
        let mut out = lock(&pack.out);
        out.end = out.end.or(end);
        out.pending_bytes += bytes.len();
        out.pending.insert(offset, bytes);
        // The writing thread takes from the front; who is not next waits only when much is pending.
        while out.failed.is_none() && out.pending_bytes > PENDING_BYTES_MAX && !out.can_drain() {
            out = pack.drained.wait(out).unwrap_or_else(PoisonError::into_inner);
        }
        self.drain(pack, out)
    }

    fn drain<'a>(&self, pack: &'a Arc<OpenPack>, mut out: MutexGuard<'a, Out>) -> Result<Vec<u8>> {
        let mut spare = Vec::new();
        while out.can_drain() {
            let at = out.written;
            let (Some(mut sink), Some(bytes)) = (out.sink.take(), out.pending.remove(&at)) else { break };
            drop(out);
            let outcome = sink.write(&bytes);
            out = lock(&pack.out);
            out.pending_bytes -= bytes.len();
            out.written += bytes.len() as u32;
            spare = bytes;
            match outcome {
                Ok(()) => out.sink = Some(sink),
                Err(e) => out.failed = Some(e),
            }
            pack.drained.notify_all();
        }
        if let Some(e) = &out.failed {
            return Err(e.clone());
        }
        if out.end == Some(out.written)
            && let Some(sink) = out.sink.take()
        {
            drop(out);
            (self.on_full)(FullPack { pack: pack.clone(), sink });
        }
        spare.clear();
        Ok(spare)
    }

    /// Ends the pack that is being filled, if any; it goes to `on_full`. No append may be under way.
    pub fn flush(&self) -> Result<()> {
        let Some(pack) = lock(&self.current).take() else { return Ok(()) };
        let end = lock(&pack.plan).next;
        let mut out = lock(&pack.out);
        out.end = Some(end);
        self.drain(&pack, out).map(drop)
    }
}

impl Out {
    fn can_drain(&self) -> bool {
        self.sink.is_some() && self.pending.contains_key(&self.written)
    }
}
