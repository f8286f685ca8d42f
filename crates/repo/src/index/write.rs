//! Writing segments: in memory for a run's few packs, or in two passes over a sorted source that fits in no memory.
//!
//! The first pass finds what stands in front of the blocks: the number of entries, the fences, the filter. The second
//! one seals block after block. Invariant: both passes see the same entries, or nothing is written to the end.

use std::borrow::Borrow;

use super::{
    filter::{Filter, lines_for},
    segment::{BLOCK_BYTES, BLOCK_ENTRIES, Header, IndexEntry},
};
use crate::{
    error::{Error, Result},
    format::{ChunkId, ObjectId},
    keys::KeyRing,
    pack::PackInfo,
};

/// Hands every entry, sorted by id, to its argument. Called twice, with the same result.
pub type Source<'a> = dyn FnMut(&mut dyn FnMut(&IndexEntry) -> Result<()>) -> Result<()> + 'a;

/// Takes the bytes of a segment, part by part.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// What the first pass found.
pub struct Outline {
    pub(super) header: Header,
    fences: Vec<u64>,
    pub(super) filter: Filter,
}

fn unsorted() -> Error {
    Error::Misuse { what: "the entries of an index segment were not in order, or changed between two passes".into() }
}

impl Outline {
    /// The first pass. `entries_max` is an upper bound that sizes the filter.
    pub fn new(ring: &KeyRing, origin: (ObjectId, u64), entries_max: u64, source: &mut Source<'_>) -> Result<Self> {
        let mut header = Header::new(ring, origin)?;
        let (mut fences, mut filter) = (Vec::new(), Filter::new(lines_for(entries_max)));
        let mut last = ChunkId([0; 32]);
        source(&mut |e| {
            let id = e.entry.id;
            if id < last {
                return Err(unsorted());
            }
            last = id;
            if header.entries.is_multiple_of(BLOCK_ENTRIES as u64) {
                fences.push(id.prefix());
            }
            filter.insert(&id);
            header.entries += 1;
            Ok(())
        })?;
        header.filter_lines = filter.lines();
        Ok(Self { header, fences, filter })
    }

    /// Identity of the segment.
    pub fn segment(&self) -> ObjectId {
        self.header.segment
    }
    /// Number of entries.
    pub fn entries(&self) -> u64 {
        self.header.entries
    }

    /// The second pass; returns the length of the segment.
    pub fn write<P: Borrow<PackInfo>>(
        mut self,
        ring: &KeyRing,
        packs: &[P],
        replaces: &[ObjectId],
        source: &mut Source<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<u64> {
        (self.header.packs, self.header.replaces) = (packs.len() as u32, replaces.len() as u32);
        let mut hasher = blake3::Hasher::new();
        let mut put = |bytes: &[u8]| {
            hasher.update(bytes);
            sink(bytes)
        };
        let mut clear = self.header.encode();
        for pack in packs {
            let PackInfo { header, footer } = pack.borrow();
            clear.extend_from_slice(&footer.encode(header));
        }
        replaces.iter().for_each(|id| clear.extend_from_slice(&id.0));
        let seal = self.header.seal(ring, &clear)?;
        put(&clear)?;
        drop(clear);
        put(&seal.seal_fences(&self.fences))?;
        for (number, mut piece) in (0u32..).zip(self.filter.pieces()) {
            seal.seal_piece(number, &mut piece);
            put(&piece)?;
        }
        self.filter = Filter::default();
        let (mut text, mut written) = (Vec::with_capacity(BLOCK_BYTES), 0u64);
        source(&mut |e| {
            e.push(&mut text);
            written += 1;
            if written.is_multiple_of(BLOCK_ENTRIES as u64) {
                seal.seal_block(written / BLOCK_ENTRIES as u64 - 1, &mut text);
                put(&text)?;
                text.clear();
            }
            Ok(())
        })?;
        if written != self.header.entries {
            return Err(unsorted());
        }
        if !text.is_empty() {
            seal.seal_block(written / BLOCK_ENTRIES as u64, &mut text);
            put(&text)?;
        }
        sink(hasher.finalize().as_bytes())?;
        Ok(self.header.segment_bytes())
    }
}

/// Encodes a segment in memory. Entries are sorted here.
pub fn encode<P: Borrow<PackInfo>>(
    ring: &KeyRing,
    origin: (ObjectId, u64),
    packs: &[P],
    replaces: &[ObjectId],
    mut entries: Vec<IndexEntry>,
) -> Result<(ObjectId, Vec<u8>)> {
    entries.sort_unstable_by_key(IndexEntry::key);
    let mut source = |each: &mut dyn FnMut(&IndexEntry) -> Result<()>| entries.iter().try_for_each(each);
    let outline = Outline::new(ring, origin, entries.len() as u64, &mut source)?;
    let (segment, mut out) = (outline.segment(), Vec::new());
    let bytes = outline.write(ring, packs, replaces, &mut source, &mut |part| {
        out.extend_from_slice(part);
        Ok(())
    })?;
    debug_assert_eq!(out.len() as u64, bytes);
    Ok((segment, out))
}
