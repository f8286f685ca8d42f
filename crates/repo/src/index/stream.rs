//! Reading whole segments in bounded memory: one after the other, or merged.

use std::{
    collections::{BinaryHeap, binary_heap::PeekMut},
    ops::Range,
};

use super::{
    open::{Segment, rows},
    segment::{BLOCK_BYTES, BLOCK_ENTRIES, IndexEntry},
};
use crate::{
    error::{Error, Result},
    format::{ChunkId, Malformed},
    store::Store,
};

/// Blocks fetched at once: 3 MiB for one segment, less for each of many.
const FETCH_BLOCKS: u64 = 128;
const FETCH_BLOCKS_MIN: u64 = 8;
/// More entries of one id are no work of this program; they would have to be held in memory together.
const SAME_ID_MAX: usize = 1 << 16;

/// The entries of one segment, in order.
pub struct Stream<'a> {
    store: &'a dyn Store,
    segment: &'a Segment,
    fetch_blocks: u64,
    /// Sealed blocks as fetched; those before `unopened` are open.
    fetched: Vec<u8>,
    first_fetched: u64,
    unopened: Range<u64>,
    /// Bytes of the entries to come of the block that is open.
    row: Range<usize>,
    given: u64,
}

impl<'a> Stream<'a> {
    /// From the first entry on. `beside` is the number of streams that are read at once.
    pub fn new(store: &'a dyn Store, segment: &'a Segment, beside: usize) -> Self {
        let fetch_blocks = (FETCH_BLOCKS / beside.max(1) as u64).max(FETCH_BLOCKS_MIN);
        let (fetched, unopened, row) = (Vec::new(), 0..0, 0..0);
        Self { store, segment, fetch_blocks, fetched, first_fetched: 0, unopened, row, given: 0 }
    }

    /// The next entry. An error names the segment.
    pub fn next(&mut self) -> Result<Option<IndexEntry>> {
        if self.row.is_empty() && !self.next_block()? {
            // What is not given out here would be lost by a compaction.
            if self.given != self.segment.header.entries {
                return Err(Malformed("it has less entries than its header says").at(&*self.segment.name));
            }
            return Ok(None);
        }
        let (row, _) = rows(&self.fetched[self.row.clone()]).split_first().expect("whole entries are left");
        let entry = self.segment.entry(row)?;
        self.row.start += row.len();
        self.given += 1;
        Ok(Some(entry))
    }

    fn next_block(&mut self) -> Result<bool> {
        let header = &self.segment.header;
        if self.unopened.is_empty() {
            let begin = self.unopened.end;
            let end = (begin + self.fetch_blocks).min(header.blocks());
            if begin == end {
                return Ok(false);
            }
            let ((first, _), (last, last_len)) = (header.block_range(begin), header.block_range(end - 1));
            self.fetched.resize((last - first) as usize + last_len, 0);
            self.store.read_range(&self.segment.name, first, &mut self.fetched)?;
            (self.first_fetched, self.unopened) = (begin, begin..end);
        }
        let block = self.unopened.start;
        let (_, len) = header.block_range(block);
        let at = (block - self.first_fetched) as usize * BLOCK_BYTES;
        let text = self.segment.open_block(block, &mut self.fetched[at..at + len])?.len();
        self.row = at..at + text;
        self.unopened.start += 1;
        debug_assert!(text <= BLOCK_ENTRIES * super::segment::ENTRY_BYTES);
        Ok(true)
    }
}

/// What becomes of an input's packs: their number in the output, or nothing.
pub type PackMap = Vec<Option<u32>>;

/// The next entry of an input, on the heap: the smallest id is on top.
struct Head {
    next: IndexEntry,
    input: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.next.entry.id, other.input).cmp(&(self.next.entry.id, self.input))
    }
}
impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Head {}

/// Hands out the entries of several segments, sorted, equal ones once, packs renumbered.
pub fn merge(
    store: &dyn Store,
    inputs: &[(&Segment, &PackMap)],
    each: &mut dyn FnMut(&IndexEntry) -> Result<()>,
) -> Result<()> {
    let mut streams: Vec<_> = inputs.iter().map(|(segment, _)| Stream::new(store, segment, inputs.len())).collect();
    let mut heap = BinaryHeap::with_capacity(streams.len());
    for (input, stream) in streams.iter_mut().enumerate() {
        heap.extend(stream.next()?.map(|next| Head { next, input }));
    }
    let (mut same, mut id) = (Vec::<IndexEntry>::new(), ChunkId([0; 32]));
    while let Some(mut head) = heap.peek_mut() {
        let Head { next: IndexEntry { pack, entry }, input } = *head;
        match streams[input].next()? {
            Some(next) if next.entry.id < entry.id => {
                return Err(Malformed("its entries are not in order").at(&*inputs[input].0.name));
            }
            Some(next) => head.next = next,
            None => drop(PeekMut::pop(head)),
        }
        if entry.id != id || same.len() > SAME_ID_MAX {
            if same.len() > SAME_ID_MAX {
                return Err(too_many(&inputs[input].0.name));
            }
            flush(&mut same, each)?;
            id = entry.id;
        }
        same.extend(inputs[input].1[pack as usize].map(|pack| IndexEntry { pack, entry }));
    }
    flush(&mut same, each)
}

pub fn too_many(segment: &str) -> Error {
    Malformed("it lists one chunk so often that it cannot be genuine").at(segment)
}

fn flush(same: &mut Vec<IndexEntry>, each: &mut dyn FnMut(&IndexEntry) -> Result<()>) -> Result<()> {
    same.sort_unstable_by_key(IndexEntry::key);
    same.dedup();
    same.iter().try_for_each(&mut *each)?;
    same.clear();
    Ok(())
}
