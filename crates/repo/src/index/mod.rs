//! Where chunks are: all live segments, looked up through their filters and fences.
//!
//! ```text
//! id ─► filter of each segment ─► fences ─► block (cached, or one read of 24 KiB) ─► binary search ─► accept?
//! ```
//! In memory there are per segment its clear part, fences and filter, and a bounded cache of blocks; nothing per chunk
//! but the 12 bits of the filter. Segments come and go beside everything here: what is compacted away while it is read
//! is found in its replacement.
//!
//! Invariants: a state is immutable; look-ups work on a snapshot and never wait for a refresh. A damaged segment or
//! block is remembered, not fatal: what it listed counts as absent, and `verify` names it. Whoever must find a chunk that
//! exists does so whatever filters and unfinished compactions say: [`Index::search`].

mod compact;
mod compare;
mod filter;
mod load;
mod open;
pub mod policy;
mod rebuild;
pub mod segment;
mod stream;
#[doc(hidden)]
pub mod synthetic;
#[cfg(test)]
mod tests;
mod write;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, RwLock},
};

use crate::{
    error::{Error, Result},
    format::{ChunkId, ObjectId, names},
    keys::KeyRing,
    pack::{Entry, PackInfo},
    store::Store,
    util::{Cache, lock},
};
pub use compact::{CompactReport, Compacted};
pub use open::Segment;
pub use rebuild::RebuildReport;

use open::Block;
use segment::IndexEntry;
use stream::Stream;

/// Blocks kept, per generation of the cache: about 12 MiB.
const CACHED_BLOCKS: usize = 512;
/// How often a look-up begins anew because segments were compacted away under it.
const RETRIES_MAX: usize = 8;

/// A chunk's place.
#[derive(Clone, Debug)]
pub struct Location {
    /// The pack.
    pub pack: Arc<PackInfo>,
    /// The record in it.
    pub entry: Entry,
}

/// Segment and number of a block.
type BlockKey = (ObjectId, u64);

/// A segment that could not be used, or not fully, and why.
pub type Unusable = (String, Error);

/// A snapshot of all live segments.
#[derive(Default)]
pub struct State {
    /// Live segments, largest first.
    pub segments: Vec<Arc<Segment>>,
    /// Segments that a live one replaces and that are still there.
    pub replaced: Vec<Arc<Segment>>,
    /// Segments with damage.
    pub unusable: Vec<Unusable>,
}

/// Which places count.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// Those that the filters of live segments let through.
    Filtered,
    /// All, also in replaced segments.
    Everything,
}

/// The index of a repository.
pub struct Index {
    store: Arc<dyn Store>,
    ring: Arc<KeyRing>,
    state: RwLock<Option<Arc<State>>>,
    refreshing: Mutex<()>,
    blocks: Mutex<Cache<BlockKey, Block>>,
}

impl Index {
    /// Nothing is read before the first look-up.
    pub fn new(store: Arc<dyn Store>, ring: Arc<KeyRing>) -> Self {
        let blocks = Mutex::new(Cache::new(CACHED_BLOCKS));
        Self { store, ring, state: RwLock::new(None), refreshing: Mutex::new(()), blocks }
    }

    /// The current snapshot; the first call opens the segments.
    pub fn state(&self) -> Result<Arc<State>> {
        match self.loaded() {
            Some(state) => Ok(state),
            None => self.refresh_past(None),
        }
    }

    fn loaded(&self) -> Option<Arc<State>> {
        self.state.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Picks up segments that appeared or went since.
    pub fn refresh(&self) -> Result<Arc<State>> {
        let _one = lock(&self.refreshing);
        self.refresh_locked()
    }

    fn refresh_locked(&self) -> Result<Arc<State>> {
        let known = self.loaded().unwrap_or_default();
        let state = Arc::new(self.load(&known)?);
        *self.state.write().unwrap_or_else(|e| e.into_inner()) = Some(state.clone());
        Ok(state)
    }

    /// A newer snapshot than `old`; threads that need one at the same time share it.
    fn refresh_past(&self, old: Option<&Arc<State>>) -> Result<Arc<State>> {
        let _one = lock(&self.refreshing);
        match self.loaded() {
            Some(state) if old.is_none_or(|old| !Arc::ptr_eq(old, &state)) => Ok(state),
            _ => self.refresh_locked(),
        }
    }

    /// Reads everything anew, so that damage since the last look is seen.
    pub fn reload(&self) -> Result<Arc<State>> {
        *self.state.write().unwrap_or_else(|e| e.into_inner()) = None;
        lock(&self.blocks).clear();
        self.refresh()
    }

    /// Runs `act` on the current snapshot, and again on a newer one if a segment was compacted away meanwhile.
    pub fn with_snapshot<T>(&self, mut act: impl FnMut(&State) -> Result<T>) -> Result<T> {
        let mut state = self.state()?;
        for _ in 0..RETRIES_MAX {
            match act(&state) {
                Err(Error::Missing { object }) if object.starts_with(names::INDEX) => {
                    state = self.refresh_past(Some(&state))?;
                }
                other => return other,
            }
        }
        act(&state)
    }

    /// The records of a pack as the index knows them, in the order of the pack.
    pub fn records_of(&self, pack: &ObjectId) -> Result<Vec<Entry>> {
        self.with_snapshot(|state| {
            let mut records = Vec::new();
            for segment in &state.segments {
                if let Some(number) = segment.packs.iter().position(|p| p.id() == *pack) {
                    self.read_segment(segment, &mut |e| {
                        if e.pack as usize == number {
                            records.push(e.entry);
                        }
                    })?;
                }
            }
            records.sort_unstable_by_key(|e| e.offset);
            records.dedup_by_key(|e| e.offset);
            Ok(records)
        })
    }

    /// Every entry of a segment, in order. [`Error::Missing`] if it was compacted away: see [`Index::with_snapshot`].
    pub fn read_segment(&self, segment: &Segment, each: &mut dyn FnMut(&IndexEntry)) -> Result<()> {
        let mut stream = Stream::new(&*self.store, segment, 1);
        while let Some(entry) = stream.next()? {
            each(&entry);
        }
        Ok(())
    }

    /// Checks that every entry of a segment can be found by fences and filter: other readers search by them.
    pub fn check_order(&self, segment: &Segment) -> Result<()> {
        let (mut stream, mut order) = (Stream::new(&*self.store, segment, 1), segment.order());
        while let Some(entry) = stream.next()? {
            order.push(&entry.entry.id)?;
        }
        Ok(())
    }

    fn block(&self, segment: &Segment, block: u64) -> Result<Block> {
        let key = (segment.id(), block);
        if let Some(text) = lock(&self.blocks).get(&key) {
            return Ok(text);
        }
        let text = Arc::new(segment.block(&*self.store, block)?);
        lock(&self.blocks).insert(key, text.clone());
        Ok(text)
    }

    /// Where a chunk or page is, at a place that `accept` takes. For those who store it anew if it is not found: works on
    /// what was read last, and believes the filters.
    pub fn lookup(&self, id: &ChunkId, accept: &dyn Fn(&PackInfo, &Entry) -> bool) -> Result<Option<Location>> {
        self.find(id, accept, Reach::Filtered)
    }

    /// Like [`Index::lookup`], for those to whom absence means loss: looks past the filters, and into segments that a
    /// compaction has replaced but nobody has deleted yet.
    pub fn search(&self, id: &ChunkId, accept: &dyn Fn(&PackInfo, &Entry) -> bool) -> Result<Option<Location>> {
        match self.find(id, accept, Reach::Filtered)? {
            None => self.find(id, accept, Reach::Everything),
            found => Ok(found),
        }
    }

    /// Where a chunk or page that must exist is; refreshes the index once if it is not known.
    pub fn locate(&self, id: &ChunkId) -> Result<Location> {
        if let Some(found) = self.lookup(id, &|_, _| true)? {
            return Ok(found);
        }
        self.refresh()?;
        self.search(id, &|_, _| true)?.ok_or_else(|| not_listed(id))
    }

    fn find(&self, id: &ChunkId, accept: &dyn Fn(&PackInfo, &Entry) -> bool, reach: Reach) -> Result<Option<Location>> {
        let mut state = self.state()?;
        for retry in 0.. {
            match self.find_in(&state, id, accept, reach) {
                Ok(Found::Place(place)) => return Ok(Some(place)),
                // A store that lists a segment again and again and has it not: that is damage like any other.
                Ok(Found::Nothing { vanished }) if !vanished || retry == RETRIES_MAX => return Ok(None),
                // Compacted away: its entries are in a segment that a refresh finds.
                Ok(Found::Nothing { .. }) => state = self.refresh_past(Some(&state))?,
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    fn find_in(
        &self,
        state: &State,
        id: &ChunkId,
        accept: &dyn Fn(&PackInfo, &Entry) -> bool,
        reach: Reach,
    ) -> Result<Found> {
        let mut vanished = false;
        let replaced = if reach == Reach::Everything { &state.replaced[..] } else { &[] };
        for segment in state.segments.iter().chain(replaced) {
            if reach == Reach::Filtered && !segment.may_contain(id) {
                continue;
            }
            for block in segment.blocks_of(id) {
                let text = match self.block(segment, block) {
                    Ok(text) => text,
                    Err(Error::Missing { .. }) => {
                        vanished = true;
                        break;
                    }
                    Err(e) if e.is_damage() => continue,
                    Err(e) => return Err(e),
                };
                for row in open::find(&text, id) {
                    let Ok(IndexEntry { pack, entry }) = segment.entry(row) else { continue };
                    let pack = &segment.packs[pack as usize];
                    if accept(pack, &entry) {
                        return Ok(Found::Place(Location { pack: pack.clone(), entry }));
                    }
                }
            }
        }
        Ok(Found::Nothing { vanished })
    }
}

/// What one pass over a snapshot found.
enum Found {
    Place(Location),
    Nothing {
        /// A segment of the snapshot is no longer there.
        vanished: bool,
    },
}

/// The failure to find something that must exist.
pub fn not_listed(id: &ChunkId) -> Error {
    Error::Damaged {
        object: format!("chunk {id}"),
        what: "no index segment lists it".into(),
        hint: "run `virtward repo check`: an index segment or a pack is missing or damaged".into(),
    }
}

impl State {
    /// Every live pack once.
    pub fn packs(&self) -> HashMap<ObjectId, Arc<PackInfo>> {
        self.segments.iter().flat_map(|s| s.packs.iter()).map(|p| (p.id(), p.clone())).collect()
    }
    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.segments.iter().map(|s| s.header.entries as usize).sum()
    }
}
