//! Opening segments: of each, the clear part, the fences and the filter stay in memory; blocks are read when needed.
//!
//! A damaged filter is done without. Damaged fences are made again from the blocks. Only a segment of which nothing can
//! be read is useless.

use std::sync::Arc;

use super::{
    filter::Filter,
    segment::{BLOCK_ENTRIES, Clear, ENTRY_BYTES, HEADER_BYTES, Header, IndexEntry, Seal},
};
use crate::{
    error::{Error, Result},
    format::{ChunkId, Malformed, ObjectId},
    keys::KeyRing,
    pack::PackInfo,
    store::Store,
};

/// One opened segment.
#[derive(Debug)]
pub struct Segment {
    /// Name of the object.
    pub name: String,
    /// Its header.
    pub header: Header,
    /// Packs in the order of the segment.
    pub packs: Vec<Arc<PackInfo>>,
    /// Segments whose entries this one took over.
    pub replaces: Vec<ObjectId>,
    /// Damage that leaves it usable.
    pub flaw: Option<Error>,
    seal: Seal,
    fences: Vec<u64>,
    filter: Filter,
}

/// The bytes of a block's entries.
pub type Block = Arc<Vec<u8>>;

/// The entries in a block.
pub fn rows(block: &[u8]) -> &[[u8; ENTRY_BYTES]] {
    block.as_chunks().0
}

impl Segment {
    /// Opens a segment of that length.
    pub fn open(store: &dyn Store, ring: &KeyRing, name: &str, bytes: u64) -> Result<Self> {
        let first = store.get_range(name, 0, HEADER_BYTES.min(bytes as usize))?;
        let header = Header::decode(&first).map_err(|e| e.at(name))?;
        if header.segment_bytes() != bytes {
            return Err(Malformed("its length does not match its header").at(name));
        }
        // Bounded by the length of the object, like everything that is allocated here.
        let clear_bytes = store.get_range(name, 0, header.clear_bytes())?;
        header.check(ring, name).map_err(|e| e.at(name))?;
        let seal = header.seal(ring, &clear_bytes)?;
        let mut segment = Self {
            name: name.into(),
            header,
            packs: Vec::new(),
            replaces: Vec::new(),
            flaw: None,
            seal,
            fences: Vec::new(),
            filter: Filter::default(),
        };
        // Whatever opens, fences or a block, proves that the clear part is what was written: it is under the same seal.
        match segment.read_fences(store) {
            Ok(fences) => segment.fences = fences,
            Err(e @ Error::Damaged { .. }) => {
                segment.fences = segment.fences_from_blocks(store).map_err(|_| e.clone())?;
                segment.flaw = Some(e);
            }
            Err(e) => return Err(e),
        }
        let clear = Clear::decode_intact(&clear_bytes).map_err(|e| e.at(name))?;
        drop(clear_bytes);
        (segment.header, segment.packs, segment.replaces) = (clear.header, clear.packs, clear.replaces);
        match segment.read_filter(store) {
            Ok(filter) => segment.filter = filter,
            Err(e @ Error::Damaged { .. }) => segment.flaw = Some(e),
            Err(e) => return Err(e),
        }
        Ok(segment)
    }

    /// Identity.
    pub fn id(&self) -> ObjectId {
        self.header.segment
    }

    fn at(&self, what: Malformed) -> Error {
        what.at(&*self.name)
    }

    fn read_fences(&self, store: &dyn Store) -> Result<Vec<u64>> {
        let (offset, len) = self.header.fences_range();
        let mut sealed = store.get_range(&self.name, offset, len)?;
        self.seal.open_fences(&mut sealed).map_err(|e| self.at(e))
    }

    fn read_filter(&self, store: &dyn Store) -> Result<Filter> {
        let (mut filter, mut sealed) = (Filter::with_capacity(self.header.filter_lines), Vec::new());
        for piece in 0..self.header.filter_pieces() {
            let (offset, len) = self.header.filter_range(piece);
            sealed.resize(len, 0);
            store.read_range(&self.name, offset, &mut sealed)?;
            filter.extend(self.seal.open_piece(piece, &mut sealed).map_err(|e| self.at(e))?);
        }
        Ok(filter)
    }

    /// A block that cannot be read either gets the fence of the one before: nothing else moves.
    fn fences_from_blocks(&self, store: &dyn Store) -> Result<Vec<u64>> {
        let (mut fences, mut failure, mut last) = (Vec::new(), None, 0);
        for block in 0..self.header.blocks() {
            match self.block(store, block) {
                Ok(text) => last = rows(&text).first().map_or(last, |row| row_id(row).prefix()),
                Err(e @ Error::Damaged { .. }) => failure = Some(e),
                Err(e) => return Err(e),
            }
            fences.push(last);
        }
        match failure {
            Some(e) if last == 0 => Err(e),
            _ => Ok(fences),
        }
    }

    /// Reads and opens a block.
    pub fn block(&self, store: &dyn Store, block: u64) -> Result<Vec<u8>> {
        let (offset, len) = self.header.block_range(block);
        let mut sealed = store.get_range(&self.name, offset, len)?;
        let text = self.open_block(block, &mut sealed)?.len();
        sealed.truncate(text);
        Ok(sealed)
    }

    /// Opens a block in place.
    pub fn open_block<'a>(&self, block: u64, sealed: &'a mut [u8]) -> Result<&'a [u8]> {
        self.seal.open_block(block, sealed).map_err(|e| self.at(e))
    }

    /// Takes an entry apart.
    pub fn entry(&self, row: &[u8; ENTRY_BYTES]) -> Result<IndexEntry> {
        IndexEntry::decode(row, self.header.packs).map_err(|e| self.at(e))
    }

    /// Whether the filter lets an id through.
    pub fn may_contain(&self, id: &ChunkId) -> bool {
        self.filter.may_contain(id)
    }

    /// The blocks in which an id can be.
    pub fn blocks_of(&self, id: &ChunkId) -> std::ops::Range<u64> {
        let prefix = id.prefix();
        // The block before the first fence that is not smaller may end with the id.
        let begin = self.fences.partition_point(|fence| *fence < prefix).saturating_sub(1);
        let end = self.fences.partition_point(|fence| *fence <= prefix);
        begin as u64..end as u64
    }

    /// Follows a segment's entries and says whether other readers would find each.
    pub fn order(&self) -> Order<'_> {
        Order { segment: self, last: ChunkId([0; 32]), ordinal: 0 }
    }
}

/// The id of an entry.
pub fn row_id(row: &[u8; ENTRY_BYTES]) -> ChunkId {
    let mut id = [0; 32];
    id.copy_from_slice(&row[..32]);
    ChunkId(id)
}

/// The entries of an id in a block.
pub fn find<'a>(block: &'a [u8], id: &ChunkId) -> impl Iterator<Item = &'a [u8; ENTRY_BYTES]> {
    let rows = rows(block);
    let begin = rows.partition_point(|row| row[..32] < id.0[..]);
    let id = *id;
    rows[begin..].iter().take_while(move |row| row[..32] == id.0[..])
}

/// See [`Segment::order`].
pub struct Order<'a> {
    segment: &'a Segment,
    last: ChunkId,
    ordinal: usize,
}

impl Order<'_> {
    /// The next entry: is it in order, is its block's fence true, does the filter let it through?
    pub fn push(&mut self, id: &ChunkId) -> Result<()> {
        let is_first = self.ordinal.is_multiple_of(BLOCK_ENTRIES);
        let fence = self.segment.fences.get(self.ordinal / BLOCK_ENTRIES);
        if *id < self.last || (is_first && fence != Some(&id.prefix())) {
            return Err(self.segment.at(Malformed("its entries are not in order")));
        }
        if !self.segment.may_contain(id) {
            return Err(self.segment.at(Malformed("its filter hides an entry")));
        }
        (self.ordinal, self.last) = (self.ordinal + 1, *id);
        Ok(())
    }
}
