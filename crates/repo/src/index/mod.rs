//! Where chunks are: all live segments, looked up through one sorted table of id prefixes (16 bytes per chunk).
//!
//! The table only narrows down; the entry itself is read from its segment's block and compared in full. A damaged
//! segment is remembered, not fatal: what it listed counts as absent, and `verify` names it.
//! Invariant: a state is immutable; look-ups work on a snapshot and never wait for a refresh.

pub mod segment;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, RwLock},
};

use crate::{
    error::{Error, Result},
    format::{ChunkId, Malformed, ObjectId, names},
    keys::KeyRing,
    pack::{Entry, PackInfo},
    store::Store,
    util::{Cache, lock},
};
use segment::{BLOCK_BYTES, BLOCK_ENTRIES, Clear, Header, IndexEntry, Opened};

/// Blocks kept decoded, per generation of the cache: about 15 MiB.
const CACHED_BLOCKS: usize = 512;
/// Blocks fetched at once when a whole segment is read.
const STREAM_BLOCKS: u64 = 128;

/// A chunk's place.
#[derive(Clone, Debug)]
pub struct Location {
    /// The pack.
    pub pack: Arc<PackInfo>,
    /// The record in it.
    pub entry: Entry,
}

/// One live segment.
#[derive(Debug)]
pub struct Segment {
    /// Name of the object.
    pub name: String,
    opened: Opened,
    /// Packs in the order of the segment.
    pub packs: Vec<Arc<PackInfo>>,
}

/// Segment and number of a block.
type BlockKey = (ObjectId, u64);
/// A decoded block.
type Block = Arc<Vec<IndexEntry>>;

/// A segment that could not be used, and why.
pub type Unusable = (String, Error);

/// A snapshot of all live segments.
#[derive(Default)]
pub struct State {
    /// Live segments.
    pub segments: Vec<Arc<Segment>>,
    /// Segments that could not be read.
    pub unusable: Vec<Unusable>,
    /// (prefix, segment, ordinal), sorted.
    table: Vec<(u64, u32, u32)>,
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

    /// The current snapshot; the first call reads the segments.
    pub fn state(&self) -> Result<Arc<State>> {
        if let Some(state) = self.loaded() {
            return Ok(state);
        }
        self.refresh()
    }

    fn loaded(&self) -> Option<Arc<State>> {
        self.state.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Picks up segments that appeared or went since.
    pub fn refresh(&self) -> Result<Arc<State>> {
        let _one = lock(&self.refreshing);
        let known = self.loaded().unwrap_or_default();
        let state = Arc::new(self.load(&known)?);
        *self.state.write().unwrap_or_else(|e| e.into_inner()) = Some(state.clone());
        Ok(state)
    }

    /// Reads everything anew, so that damage since the last look is seen.
    pub fn reload(&self) -> Result<Arc<State>> {
        *self.state.write().unwrap_or_else(|e| e.into_inner()) = None;
        lock(&self.blocks).clear();
        self.refresh()
    }

    /// The records of a pack as the index knows them, in the order of the pack.
    pub fn records_of(&self, pack: &ObjectId) -> Result<Vec<Entry>> {
        let mut records = Vec::new();
        for segment in &self.state()?.segments {
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
    }

    fn load(&self, known: &State) -> Result<State> {
        let old: HashMap<&str, &Arc<Segment>> = known.segments.iter().map(|s| (&*s.name, s)).collect();
        let mut listed = Vec::new();
        self.store.list(names::INDEX, &mut |object| {
            listed.push(object);
            Ok(())
        })?;
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let mut state = State::default();
        let mut segments = Vec::new();
        for object in &listed {
            if let Some(segment) = old.get(&*object.name) {
                segments.push(Arc::clone(segment));
                continue;
            }
            match self.open_segment(&object.name, object.bytes) {
                Ok(segment) => segments.push(Arc::new(segment)),
                // Compacted away since the listing.
                Err(Error::Missing { .. }) => {}
                Err(e) if e.is_damage() => state.unusable.push((object.name.clone(), e)),
                Err(e) => return Err(e),
            }
        }
        let replaced: HashSet<ObjectId> =
            segments.iter().flat_map(|s| s.opened.clear.replaces.iter().copied()).collect();
        segments.retain(|s| !replaced.contains(&s.opened.clear.header.segment));
        self.fill(&mut state, segments, known)?;
        for (name, error) in &state.unusable {
            tracing::warn!(segment = %name, %error, "index segment cannot be used");
        }
        Ok(state)
    }

    /// Builds the table; entries of segments known before are taken over.
    fn fill(&self, state: &mut State, segments: Vec<Arc<Segment>>, known: &State) -> Result<()> {
        let mut moved: HashMap<u32, u32> = HashMap::new();
        for segment in segments {
            let place = state.segments.len() as u32;
            if let Some(before) = known.segments.iter().position(|s| Arc::ptr_eq(s, &segment)) {
                moved.insert(before as u32, place);
            } else {
                let begin = state.table.len();
                let mut ordinal = 0;
                let read = self.read_segment(&segment, &mut |e| {
                    state.table.push((e.entry.id.prefix(), place, ordinal));
                    ordinal += 1;
                });
                match read {
                    Ok(()) => {}
                    Err(e) if e.is_damage() => {
                        // Blocks before the damaged one stay usable.
                        if !matches!(e, Error::Missing { .. }) {
                            state.unusable.push((segment.name.clone(), e));
                        } else {
                            state.table.truncate(begin);
                        }
                    }
                    Err(e) => return Err(e),
                }
            }
            state.segments.push(segment);
        }
        state.table.extend(known.table.iter().filter_map(|(prefix, s, o)| moved.get(s).map(|s| (*prefix, *s, *o))));
        state.table.sort_unstable();
        state.table.shrink_to_fit();
        Ok(())
    }

    fn open_segment(&self, name: &str, bytes: u64) -> Result<Segment> {
        let first = self.store.get_range(name, 0, segment::HEADER_BYTES.min(bytes as usize))?;
        let header = Header::decode(&first).map_err(|e| e.at(name))?;
        if header.segment_bytes() != bytes {
            return Err(Malformed("its length does not match its header").at(name));
        }
        let clear_bytes = self.store.get_range(name, 0, header.clear_bytes())?;
        let clear = Clear::decode(&clear_bytes).map_err(|e| e.at(name))?;
        let packs = clear.packs.iter().cloned().map(Arc::new).collect();
        let opened = Opened::new(clear, &clear_bytes, &self.ring, name)?;
        Ok(Segment { name: name.into(), opened, packs })
    }

    /// Every entry of a segment, in order.
    pub fn read_segment(&self, segment: &Segment, each: &mut dyn FnMut(&IndexEntry)) -> Result<()> {
        let header = &segment.opened.clear.header;
        let mut entries = Vec::with_capacity(BLOCK_ENTRIES);
        let blocks: Vec<u64> = (0..header.blocks()).collect();
        for run in blocks.chunks(STREAM_BLOCKS as usize) {
            let (begin, _) = header.block_range(run[0]);
            let (last, last_len) = header.block_range(run[run.len() - 1]);
            let mut bytes = self.store.get_range(&segment.name, begin, (last - begin) as usize + last_len)?;
            for (block, sealed) in run.iter().zip(bytes.chunks_mut(BLOCK_BYTES)) {
                entries.clear();
                segment.opened.block(*block, sealed, &mut entries).map_err(|e| e.at(&*segment.name))?;
                entries.iter().for_each(&mut *each);
            }
        }
        Ok(())
    }

    /// Checks that a segment's entries are sorted and its fences true: other readers search by them.
    pub fn check_order(&self, segment: &Segment) -> Result<()> {
        let (offset, len) = segment.opened.clear.header.fences_range();
        let mut sealed = self.store.get_range(&segment.name, offset, len)?;
        let fences = segment.opened.fences(&mut sealed).map_err(|e| e.at(&*segment.name))?;
        let (mut ordinal, mut last, mut is_good) = (0usize, ChunkId([0; 32]), true);
        self.read_segment(segment, &mut |e| {
            let id = e.entry.id;
            let is_first = ordinal % BLOCK_ENTRIES == 0;
            is_good &= id >= last && (!is_first || fences.get(ordinal / BLOCK_ENTRIES) == Some(&id.prefix()));
            (ordinal, last) = (ordinal + 1, id);
        })?;
        if is_good { Ok(()) } else { Err(Malformed("its entries are not in order").at(&*segment.name)) }
    }

    fn block(&self, segment: &Segment, block: u64) -> Result<Block> {
        let header = &segment.opened.clear.header;
        let key = (header.segment, block);
        if let Some(entries) = lock(&self.blocks).get(&key) {
            return Ok(entries);
        }
        let (offset, len) = header.block_range(block);
        let mut sealed = self.store.get_range(&segment.name, offset, len)?;
        let mut entries = Vec::with_capacity(BLOCK_ENTRIES);
        segment.opened.block(block, &mut sealed, &mut entries).map_err(|e| e.at(&*segment.name))?;
        let entries = Arc::new(entries);
        lock(&self.blocks).insert(key, entries.clone());
        Ok(entries)
    }

    /// Where a chunk or page is, at a place that `accept` takes. Works on what was read last; see [`Index::locate`].
    pub fn lookup(&self, id: &ChunkId, accept: &dyn Fn(&PackInfo, &Entry) -> bool) -> Result<Option<Location>> {
        let state = self.state()?;
        let prefix = id.prefix();
        let begin = state.table.partition_point(|slot| slot.0 < prefix);
        for (_, segment, ordinal) in state.table[begin..].iter().take_while(|slot| slot.0 == prefix) {
            let segment = &state.segments[*segment as usize];
            let (block, at) = (u64::from(*ordinal) / BLOCK_ENTRIES as u64, *ordinal as usize % BLOCK_ENTRIES);
            let entries = match self.block(segment, block) {
                Ok(entries) => entries,
                // Compacted away: its entries live on in a segment that a refresh will find.
                Err(e) if e.is_damage() => continue,
                Err(e) => return Err(e),
            };
            if let Some(found) = entries.get(at).filter(|e| e.entry.id == *id) {
                let pack = &segment.packs[found.pack as usize];
                if accept(pack, &found.entry) {
                    return Ok(Some(Location { pack: pack.clone(), entry: found.entry }));
                }
            }
        }
        Ok(None)
    }

    /// Where a chunk or page that must exist is; refreshes the index once if it is not known.
    pub fn locate(&self, id: &ChunkId) -> Result<Location> {
        if let Some(found) = self.lookup(id, &|_, _| true)? {
            return Ok(found);
        }
        self.refresh()?;
        self.lookup(id, &|_, _| true)?.ok_or_else(|| not_listed(id))
    }
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
        self.table.len()
    }
}
