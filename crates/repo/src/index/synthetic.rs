//! Segments without packs, and restore points that refer to all that they list, to measure the index and the mark of a
//! collection at sizes that nobody has at hand.

use jiff::Timestamp;
use uuid::Uuid;
use virtward_model::{
    BackupKind, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind,
    TrackingRecord, TrackingState,
};

use super::{
    segment::{BLOCK_ENTRIES, IndexEntry},
    write::Outline,
};
use crate::{
    error::{Error, Result},
    format::{CHUNK_BYTES_DEFAULT, ChunkId, ObjectId, names},
    manifest::{
        FANOUT, Page, Ref, Tree,
        point::{self, AttachmentRefs, PointRecord},
    },
    pack::{Encoding, Entry, Footer, Header, PackClass, PackInfo},
    repository::Repository,
    store::{Put, put_new},
    writer::{Writer, WriterOptions},
};

/// Chunks of 1 MiB that compress to half fill a pack of 256 MiB so far.
const RECORDS_PER_PACK: u64 = 512;
const STORED_BYTES: u32 = 512 << 10;

/// SplitMix64.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Puts a segment with random ids in order, as if so many chunks had been stored; its length.
pub fn put_segment(repository: &Repository, seed: u64, entries: u64) -> Result<u64> {
    let inner = &repository.inner;
    let origin = (ObjectId::random(), 0);
    let mut packs = Vec::new();
    for _ in 0..entries.div_ceil(RECORDS_PER_PACK) {
        let (header, _) = Header::create(&inner.ring, PackClass::Data, origin.0, origin.1)?;
        let records = RECORDS_PER_PACK as u32;
        let footer = Footer {
            table_offset: 256 + records * STORED_BYTES,
            table_bytes: 40 * records + 16,
            records,
            sum: crate::crypto::random(),
        };
        packs.push(PackInfo { header, footer });
    }
    let mut source = |each: &mut dyn FnMut(&IndexEntry) -> Result<()>| generate(seed, entries, packs.len(), each);
    let outline = Outline::new(&inner.ring, origin, entries, &mut source)?;
    let name = names::segment(&outline.segment());
    let mut object = inner.store.create(&name)?;
    let bytes = outline.write(&inner.ring, &packs, &[], &mut source, &mut |part| object.write(part))?;
    match object.finish()? {
        Put::Created => Ok(bytes),
        Put::Exists => Err(Error::damaged(name, "another object has this random name")),
    }
}

/// Sorted random numbers without sorting: the gaps between them are exponentially distributed.
fn generate(seed: u64, entries: u64, packs: usize, each: &mut dyn FnMut(&IndexEntry) -> Result<()>) -> Result<()> {
    let mut noise = Noise(seed);
    // Room for chance at the end, so that the last one is a number still.
    let scale = (u64::MAX as f64) / (entries as f64 + 8.0 * (entries as f64).sqrt() + BLOCK_ENTRIES as f64);
    let mut at = 0.0f64;
    for _ in 0..entries {
        let uniform = (noise.next() >> 11) as f64 / (1u64 << 53) as f64;
        at -= (1.0 - uniform).ln();
        let mut id = [0; 32];
        id[..8].copy_from_slice(&((at * scale) as u64).to_be_bytes());
        for word in id[8..].as_chunks_mut::<8>().0 {
            *word = noise.next().to_le_bytes();
        }
        let place = noise.next();
        let entry = Entry {
            id: ChunkId(id),
            offset: 256 + (place as u32 % RECORDS_PER_PACK as u32) * STORED_BYTES,
            stored: STORED_BYTES,
            plain: 1 << 20,
            encoding: Encoding::Zstd,
        };
        each(&IndexEntry { pack: ((place >> 32) % packs as u64) as u32, entry })?;
    }
    Ok(())
}

/// Makes a restore point of a VM with one disk, whose chunks are those of the segment of that seed, in order.
pub fn put_point(repository: &Repository, seed: u64, entries: u64) -> Result<()> {
    let size_bytes = entries * u64::from(CHUNK_BYTES_DEFAULT);
    let level = Tree { root: None, chunks: entries }.level();
    let writer = repository.writer(WriterOptions::default())?;
    let mut pages = Pages { writer: &writer, levels: vec![Vec::new(); usize::from(level) + 1] };
    generate(seed, entries, 1, &mut |e| pages.push(0, Ref { id: e.entry.id, chunks: 1, overlays: Box::default() }))?;
    let root = pages.finish()?;
    let (origin, now) = (writer.id(), Timestamp::now());
    writer.settle()?;
    let disk = DiskRecord {
        target: "vda".into(),
        size_bytes,
        chunk_bytes: CHUNK_BYTES_DEFAULT,
        format: "raw".into(),
        source: String::new(),
        root,
        read_bytes: size_bytes,
        sampled_bytes: 0,
        new_bytes: size_bytes,
        stored_bytes: entries * u64::from(STORED_BYTES),
        data_bytes: size_bytes,
        tracking: TrackingRecord { state: TrackingState::First, reason: None, checkpoint: None },
    };
    let (requested, outcome) = (QuiesceRequest::Auto, QuiesceOutcome::NotNeeded);
    let point = RestorePoint {
        id: PointId::random(),
        vm: format!("vm{seed}"),
        vm_uuid: Uuid::nil(),
        host: String::new(),
        source: SourceKind::Image,
        kind: BackupKind::Full,
        taken: now,
        started: now,
        finished: now,
        parent: None,
        quiesce: QuiesceRecord { requested, outcome, frozen_ms: None, reason: None },
        disks: vec![disk],
        skipped: Vec::new(),
        tags: Vec::new(),
        warnings: Vec::new(),
        copied_from: None,
    };
    let name = names::point(point.id);
    let record = PointRecord { point, attachments: AttachmentRefs::default(), writer: origin, epoch: 0 };
    put_new(&*repository.inner.store, &name, &point::seal(&repository.inner.ring, &record)?)
}

/// A tree that is written from left to right: the references that no page has yet, by level.
struct Pages<'a> {
    writer: &'a Writer,
    levels: Vec<Vec<Option<Ref>>>,
}

impl Pages<'_> {
    fn push(&mut self, level: usize, reference: Ref) -> Result<()> {
        self.levels[level].push(Some(reference));
        let is_root = level + 1 == self.levels.len();
        if !is_root && self.levels[level].len() as u64 == FANOUT { self.close(level).map(drop) } else { Ok(()) }
    }

    /// Stores the references of a level as a page, and refers to it from the level above.
    fn close(&mut self, level: usize) -> Result<Option<Ref>> {
        let refs = std::mem::take(&mut self.levels[level]);
        let Some(page) = Page::new(level as u8, refs) else { return Ok(None) };
        let stored = self.writer.store_page(&page)?;
        if level + 1 < self.levels.len() {
            self.push(level + 1, stored.clone())?;
        }
        Ok(Some(stored))
    }

    /// The root.
    fn finish(mut self) -> Result<String> {
        let mut root = None;
        for level in 0..self.levels.len() {
            root = self.close(level)?;
        }
        Ok(root.map(|root| root.id.to_string()).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{InitOptions, KdfCost, Secret, gc::measure::mark_and_sweep, store::mem::MemStore};

    #[test]
    fn a_restore_point_refers_to_all_that_its_segment_lists() {
        for entries in [1, 256, 257, 70_000] {
            let store = Arc::new(MemStore::new());
            let options = InitOptions { kdf: KdfCost::weak_for_tests(), ..InitOptions::default() };
            let repo = Repository::init(store, &Secret::password("x"), &options).unwrap();
            put_segment(&repo, 3, entries).unwrap();
            put_segment(&repo, 4, 1000).unwrap();
            repo.index().refresh().unwrap();
            put_point(&repo, 3, entries).unwrap();
            repo.index().refresh().unwrap();
            let times = mark_and_sweep(&repo).unwrap();
            assert!(times.marks > entries && times.marks <= entries + entries / 100 + 5, "{times:?}");
            // Those of the other segment; by chance something dead passes for live, never the other way round.
            assert!(times.dead_packs <= 2, "{times:?}");
            let disk = &repo.points().unwrap().points[0].disks[0];
            let tree = Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes).unwrap();
            assert_eq!(tree.data_chunks(&*repo.inner).unwrap(), entries);
        }
    }
}
