//! Bytes of a manifest page: up to 256 references, zero ones costing a bit.
//!
//! ```text
//! "VWPG" · version u8 · level u8 · count u16 · bitmap ceil(count/8) · reference…
//! ```
//! A reference at level 0 is a chunk id (32 bytes); above, a page id and the number of chunks below it (40 bytes). In
//! version 2, which is only for pages of level 0 with overlays, a reference is a chunk id, a count (1 byte) and so many
//! ids of [overlays](super::overlay). Trailing zero entries are cut off, so a disk that grows shares its pages. The
//! encoding is canonical: one content, one id.

use crate::format::{ChunkId, Cursor, Malformed};

/// References in a page.
pub const FANOUT: u64 = 256;
/// Levels that suffice for the largest disk.
pub const LEVELS_MAX: u8 = 4;
/// Longest page.
pub const PAGE_BYTES_MAX: usize = 8 + 32 + 256 * (33 + 32 * OVERLAYS_MAX);
/// Most overlays of one chunk. Reading a place costs that many records more; a change beyond stores it whole.
pub const OVERLAYS_MAX: usize = 3;

const MAGIC: &[u8] = b"VWPG";
const VERSION: u8 = 1;
const VERSION_OVERLAYS: u8 = 2;

/// A reference to a chunk (with `chunks` = 1) or to a page with that many data chunks below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ref {
    /// Identity.
    pub id: ChunkId,
    /// Data chunks below.
    pub chunks: u64,
    /// What was written over the chunk, oldest first; empty for pages.
    pub overlays: Box<[ChunkId]>,
}

impl Ref {
    /// A page.
    pub fn page(id: ChunkId, chunks: u64) -> Self {
        Self { id, chunks, overlays: Box::default() }
    }

    /// A chunk and what was written over it. `None` without a first layer.
    pub fn layered(layers: &[ChunkId]) -> Option<Self> {
        let (id, overlays) = layers.split_first()?;
        Some(Self { id: *id, chunks: 1, overlays: overlays.into() })
    }

    /// A chunk that nothing was written over.
    #[cfg(test)]
    pub fn chunk(id: ChunkId) -> Self {
        Self::page(id, 1)
    }

    /// The chunk or page, and the overlays.
    pub fn layers(&self) -> impl Iterator<Item = &ChunkId> {
        std::iter::once(&self.id).chain(&self.overlays)
    }
}

/// A page: `None` is zero. Never longer than [`FANOUT`], never ends in `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// 0 for pages of chunks.
    pub level: u8,
    /// References from the first on.
    pub refs: Vec<Option<Ref>>,
}

impl Page {
    /// From references; trailing zeros are cut. `None` if all are zero.
    pub fn new(level: u8, mut refs: Vec<Option<Ref>>) -> Option<Self> {
        let len = refs.iter().rposition(Option::is_some)? + 1;
        refs.truncate(len);
        Some(Self { level, refs })
    }

    /// Data chunks below.
    pub fn chunks(&self) -> u64 {
        self.refs.iter().flatten().map(|r| r.chunks).sum()
    }

    /// The entry at a place.
    pub fn get(&self, place: u64) -> Option<Ref> {
        self.refs.get(place as usize).cloned().flatten()
    }

    /// The canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE_BYTES_MAX);
        out.extend_from_slice(MAGIC);
        let with_overlays = self.level == 0 && self.refs.iter().flatten().any(|r| !r.overlays.is_empty());
        out.extend_from_slice(&[if with_overlays { VERSION_OVERLAYS } else { VERSION }, self.level]);
        out.extend_from_slice(&(self.refs.len() as u16).to_le_bytes());
        for eight in self.refs.chunks(8) {
            out.push(eight.iter().enumerate().fold(0, |bits, (n, r)| bits | u8::from(r.is_some()) << n));
        }
        for r in self.refs.iter().flatten() {
            out.extend_from_slice(&r.id.0);
            if self.level > 0 {
                out.extend_from_slice(&r.chunks.to_le_bytes());
            }
            if with_overlays {
                out.push(r.overlays.len() as u8);
                r.overlays.iter().for_each(|id| out.extend_from_slice(&id.0));
            }
        }
        out
    }

    /// From bytes; `level` is what the place in the tree demands.
    pub fn decode(bytes: &[u8], level: u8) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        at.expect(MAGIC, "it does not begin as a manifest page")?;
        let with_overlays = match at.u8()? {
            VERSION => false,
            VERSION_OVERLAYS if level == 0 => true,
            _ => return Err(Malformed("it is a manifest page of a newer version; upgrade virtward")),
        };
        if at.u8()? != level {
            return Err(Malformed("a manifest page is of another level than its place"));
        }
        let count = at.u16()? as usize;
        if count > FANOUT as usize {
            return Err(Malformed("a manifest page has too many entries"));
        }
        let bitmap = at.take(count.div_ceil(8))?;
        let below_max = FANOUT.pow(u32::from(level));
        let mut refs = Vec::with_capacity(count);
        for place in 0..count {
            if bitmap[place / 8] & (1 << (place % 8)) == 0 {
                refs.push(None);
                continue;
            }
            let id = ChunkId(at.array()?);
            let chunks = if level > 0 { at.u64()? } else { 1 };
            if chunks > below_max {
                return Err(Malformed("a manifest page counts more chunks than it can hold"));
            }
            let mut overlays = Vec::new();
            for _ in 0..if with_overlays { at.u8()? } else { 0 } {
                overlays.push(ChunkId(at.array()?));
            }
            if overlays.len() > OVERLAYS_MAX {
                return Err(Malformed("a manifest page has too many overlays of one chunk"));
            }
            refs.push(Some(Ref { id, chunks, overlays: overlays.into() }));
        }
        at.end()?;
        Ok(Self { level, refs })
    }
}

/// Level of the root page of a disk with that many chunks.
pub fn root_level(chunks: u64) -> u8 {
    let mut level = 0;
    while level + 1 < LEVELS_MAX && FANOUT.pow(u32::from(level) + 1) < chunks {
        level += 1;
    }
    level
}

/// Chunks under one page of a level.
pub fn span(level: u8) -> u64 {
    FANOUT.pow(u32::from(level) + 1)
}
