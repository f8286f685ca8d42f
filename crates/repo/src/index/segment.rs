//! Bytes of an index segment: clear lists of packs and of replaced segments, then what is sealed.
//!
//! ```text
//! header 192 · pack tails (384 each) · replaced segment ids (16 each) · sealed fences · sealed filter piece…
//!            · sealed block… · BLAKE3 of all before
//! ```
//! Blocks hold entries sorted by id. Fences are the first id prefix of each block, the filter says which ids are not
//! listed at all, so a look-up reads at most one block. Everything sealed has a place that follows from the header, so a
//! reader needs neither the whole segment nor memory for it. The clear lists let anyone without keys find missing packs.
//! Not here: writing (`write`), reading from a store (`open`, `stream`).

use std::sync::Arc;

use crate::{
    crypto::{Cipher, Key, Sealer, TAG_BYTES, derive, random},
    error::Result,
    format::{ChunkId, Cursor, Malformed, ObjectId, names},
    keys::KeyRing,
    pack::{Entry, Footer, Header as PackHeader, PackInfo, layout::TAIL_BYTES},
};

use super::filter::{LINE_BYTES, PIECE_LINES};
pub use super::write::encode;

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 192;
/// Entries of a full block.
pub const BLOCK_ENTRIES: usize = 512;
/// Bytes of one entry.
pub const ENTRY_BYTES: usize = 48;
/// Bytes of a full sealed block.
pub const BLOCK_BYTES: usize = BLOCK_ENTRIES * ENTRY_BYTES + TAG_BYTES;
/// Bytes of the checksum at the end.
pub const SUM_BYTES: usize = 32;
/// Most segments that one segment may replace.
pub const REPLACES_MAX: u32 = 1 << 20;

const MAGIC: &[u8] = b"VWINDEX\n";
const VERSION: u16 = 1;
const PACKS_MAX: u32 = 1 << 24;
const ENTRIES_MAX: u64 = 1 << 36;
const FENCES_NONCE: u64 = 1 << 63;
const PIECE_BYTES: u64 = PIECE_LINES as u64 * LINE_BYTES as u64 + TAG_BYTES as u64;

/// Where a chunk is: the pack's place in the segment's list, and its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Position in the segment's list of packs.
    pub pack: u32,
    /// The record.
    pub entry: Entry,
}

impl IndexEntry {
    /// The order of entries in segments that this version writes; readers rely on that of the ids only.
    pub fn key(&self) -> (ChunkId, u32, u32, u32, u32) {
        (self.entry.id, self.pack, self.entry.offset, self.entry.stored, self.entry.plain_word())
    }

    /// Appends its bytes.
    pub fn push(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.entry.id.0);
        for word in [self.pack, self.entry.offset, self.entry.stored, self.entry.plain_word()] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// From its bytes, in a segment with that many packs.
    pub fn decode(bytes: &[u8; ENTRY_BYTES], packs: u32) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        let (id, pack) = (ChunkId(at.array()?), at.u32()?);
        let (offset, stored) = (at.u32()?, at.u32()?);
        let (plain, encoding) = Entry::split_plain_word(at.u32()?)?;
        let entry = Entry { id, offset, stored, plain, encoding };
        entry.check()?;
        if pack >= packs {
            return Err(Malformed("an entry names a pack that is not listed"));
        }
        Ok(Self { pack, entry })
    }
}

/// The fixed header.
#[derive(Clone, Debug)]
pub struct Header {
    /// Repository.
    pub repository: ObjectId,
    /// Identity; random.
    pub segment: ObjectId,
    /// Writer.
    pub writer: ObjectId,
    /// Its epoch.
    pub epoch: u64,
    /// Number of packs listed.
    pub packs: u32,
    /// Number of segments that this one replaces.
    pub replaces: u32,
    /// Number of entries.
    pub entries: u64,
    /// Lines of the filter; 0 if there is none.
    pub filter_lines: u32,
    cipher: Cipher,
    metadata_generation: u32,
    salt: [u8; 32],
}

impl Header {
    /// A new segment, still without packs and entries.
    pub fn new(ring: &KeyRing, (writer, epoch): (ObjectId, u64)) -> Result<Self> {
        let (metadata_generation, _) = ring.metadata_newest()?;
        Ok(Self {
            repository: ring.repository,
            segment: ObjectId::random(),
            writer,
            epoch,
            packs: 0,
            replaces: 0,
            entries: 0,
            filter_lines: 0,
            cipher: Cipher::preferred(),
            metadata_generation,
            salt: random(),
        })
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[self.cipher as u8, 0, 0, 0, 0, 0]);
        for id in [&self.repository, &self.segment, &self.writer] {
            out.extend_from_slice(&id.0);
        }
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.entries.to_le_bytes());
        for word in [self.packs, self.replaces, BLOCK_ENTRIES as u32, self.metadata_generation] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&self.filter_lines.to_le_bytes());
        out.resize(HEADER_BYTES, 0);
        out
    }

    /// From the first bytes of a segment.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes.get(..HEADER_BYTES).ok_or(Malformed("it is too short"))?);
        at.expect(MAGIC, "it does not begin as an index segment")?;
        if at.u16()? != VERSION {
            return Err(Malformed("it is an index segment of a newer version; upgrade virtward"));
        }
        let cipher = Cipher::from_byte(at.u8()?)?;
        at.take(5)?;
        let (repository, segment, writer) = (ObjectId(at.array()?), ObjectId(at.array()?), ObjectId(at.array()?));
        let (epoch, entries) = (at.u64()?, at.u64()?);
        let (packs, replaces, block_entries, metadata_generation) = (at.u32()?, at.u32()?, at.u32()?, at.u32()?);
        let (salt, filter_lines) = (at.array()?, at.u32()?);
        if packs > PACKS_MAX || replaces > REPLACES_MAX || entries > ENTRIES_MAX {
            return Err(Malformed("its header has impossible counts"));
        }
        if block_entries as usize != BLOCK_ENTRIES {
            return Err(Malformed("its blocks have an unknown size"));
        }
        Ok(Self {
            repository,
            segment,
            writer,
            epoch,
            packs,
            replaces,
            entries,
            filter_lines,
            cipher,
            metadata_generation,
            salt,
        })
    }

    /// Whether it is that of the segment of that name in that repository.
    pub fn check(&self, ring: &KeyRing, name: &str) -> Result<(), Malformed> {
        if self.repository == ring.repository && names::segment(&self.segment) == name {
            return Ok(());
        }
        Err(Malformed("it belongs to another name or repository"))
    }

    /// Bytes of the clear part.
    pub fn clear_bytes(&self) -> usize {
        HEADER_BYTES + self.packs as usize * TAIL_BYTES + self.replaces as usize * 16
    }
    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.entries.div_ceil(BLOCK_ENTRIES as u64)
    }
    fn fences_bytes(&self) -> u64 {
        self.blocks() * 8 + TAG_BYTES as u64
    }
    /// Where the fences are in the segment: offset and length.
    pub fn fences_range(&self) -> (u64, usize) {
        (self.clear_bytes() as u64, self.fences_bytes() as usize)
    }
    /// Number of pieces of the filter.
    pub fn filter_pieces(&self) -> u32 {
        self.filter_lines.div_ceil(PIECE_LINES)
    }
    /// Where a piece of the filter is in the segment: offset and length.
    pub fn filter_range(&self, piece: u32) -> (u64, usize) {
        let begin = self.clear_bytes() as u64 + self.fences_bytes() + u64::from(piece) * PIECE_BYTES;
        let lines = (self.filter_lines - piece * PIECE_LINES).min(PIECE_LINES) as usize;
        (begin, lines * LINE_BYTES + TAG_BYTES)
    }
    fn filter_bytes(&self) -> u64 {
        u64::from(self.filter_lines) * LINE_BYTES as u64 + u64::from(self.filter_pieces()) * TAG_BYTES as u64
    }
    /// Where a block is in the segment: offset and length.
    pub fn block_range(&self, block: u64) -> (u64, usize) {
        let first = self.clear_bytes() as u64 + self.fences_bytes() + self.filter_bytes();
        let entries = (self.entries - block * BLOCK_ENTRIES as u64).min(BLOCK_ENTRIES as u64) as usize;
        (first + block * BLOCK_BYTES as u64, entries * ENTRY_BYTES + TAG_BYTES)
    }
    /// Length of the whole segment.
    pub fn segment_bytes(&self) -> u64 {
        self.clear_bytes() as u64
            + self.fences_bytes()
            + self.filter_bytes()
            + self.entries * ENTRY_BYTES as u64
            + self.blocks() * TAG_BYTES as u64
            + SUM_BYTES as u64
    }
    /// What seals and opens everything after the clear part.
    pub fn seal(&self, ring: &KeyRing, clear_bytes: &[u8]) -> Result<Seal> {
        let master: &Key = ring.metadata(self.metadata_generation)?;
        let sealer = self.cipher.with(&derive("index segment", master, &[&self.salt, &self.repository.0]));
        Ok(Seal { sealer, aad: *blake3::hash(clear_bytes).as_bytes() })
    }
}

type TailDecoder = fn(&[u8; TAIL_BYTES]) -> Result<(PackHeader, Footer), Malformed>;

/// The clear part of a segment. Needs no key.
#[derive(Clone, Debug)]
pub struct Clear {
    /// Header.
    pub header: Header,
    /// Packs whose chunks the segment lists.
    pub packs: Vec<Arc<PackInfo>>,
    /// Segments whose entries this one took over.
    pub replaces: Vec<ObjectId>,
}

impl Clear {
    /// From the first [`Header::clear_bytes`] bytes (more are ignored).
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::decode_with(bytes, Footer::decode)
    }

    /// From bytes that were authenticated: the packs' own checksums need not be looked at.
    pub fn decode_intact(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::decode_with(bytes, Footer::decode_intact)
    }

    fn decode_with(bytes: &[u8], tail: TailDecoder) -> Result<Self, Malformed> {
        let header = Header::decode(bytes)?;
        let mut at = Cursor::new(bytes);
        at.take(HEADER_BYTES)?;
        let listed = at.take(header.packs as usize * TAIL_BYTES)?;
        let mut packs = Vec::with_capacity(header.packs as usize);
        for bytes in listed.as_chunks::<TAIL_BYTES>().0 {
            let (header, footer) = tail(bytes)?;
            packs.push(Arc::new(PackInfo { header, footer }));
        }
        let listed = at.take(header.replaces as usize * 16)?;
        let replaces = listed.as_chunks::<16>().0.iter().map(|id| ObjectId(*id)).collect();
        Ok(Self { header, packs, replaces })
    }
}

/// Seals and opens the parts of one segment. Every part has its own nonce.
#[derive(Debug)]
pub struct Seal {
    sealer: Sealer,
    aad: [u8; 32],
}

impl Seal {
    /// Seals a block in place.
    pub fn seal_block(&self, block: u64, text: &mut Vec<u8>) {
        self.sealer.seal(block, &self.aad, text);
    }
    /// Opens a block in place, into the bytes of its entries.
    pub fn open_block<'a>(&self, block: u64, sealed: &'a mut [u8]) -> Result<&'a [u8], Malformed> {
        Ok(self.sealer.open(block, &self.aad, sealed)?)
    }
    /// Seals the fences.
    pub fn seal_fences(&self, fences: &[u64]) -> Vec<u8> {
        let mut text: Vec<u8> = fences.iter().flat_map(|prefix| prefix.to_be_bytes()).collect();
        self.sealer.seal(FENCES_NONCE, &self.aad, &mut text);
        text
    }
    /// Opens the fences.
    pub fn open_fences(&self, sealed: &mut [u8]) -> Result<Vec<u64>, Malformed> {
        let text = self.sealer.open(FENCES_NONCE, &self.aad, sealed)?;
        Ok(text.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }
    /// Seals a piece of the filter in place.
    pub fn seal_piece(&self, piece: u32, text: &mut Vec<u8>) {
        self.sealer.seal(FENCES_NONCE + 1 + u64::from(piece), &self.aad, text);
    }
    /// Opens a piece of the filter in place.
    pub fn open_piece<'a>(&self, piece: u32, sealed: &'a mut [u8]) -> Result<&'a [u8], Malformed> {
        Ok(self.sealer.open(FENCES_NONCE + 1 + u64::from(piece), &self.aad, sealed)?)
    }
}
