//! Bytes of an index segment: clear lists of packs and of replaced segments, then sealed blocks of sorted entries.
//!
//! ```text
//! header 192 · pack tails (384 each) · replaced segment ids (16 each) · sealed fences · sealed block… · BLAKE3 of all before
//! ```
//! Fences are the first id prefix of each block, so a look-up reads one block. Blocks have a fixed size, so a reader
//! needs neither the whole segment nor memory for it. The clear lists let anyone without keys find missing packs.

use crate::{
    crypto::{Cipher, Key, Sealer, TAG_BYTES, derive, random},
    error::Result,
    format::{ChunkId, Cursor, Malformed, ObjectId, cursor::push_checksum, names},
    keys::KeyRing,
    pack::{Entry, Footer, PackInfo, layout::TAIL_BYTES},
};

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

const MAGIC: &[u8] = b"VWINDEX\n";
const VERSION: u16 = 1;
const PACKS_MAX: u32 = 1 << 24;
const REPLACES_MAX: u32 = 1 << 20;
const ENTRIES_MAX: u64 = 1 << 36;
const FENCES_NONCE: u64 = 1 << 63;

/// Where a chunk is: the pack's place in the segment's list, and its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Position in the segment's list of packs.
    pub pack: u32,
    /// The record.
    pub entry: Entry,
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
    cipher: Cipher,
    metadata_generation: u32,
    salt: [u8; 32],
}

impl Header {
    fn encode(&self) -> Vec<u8> {
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
        out.resize(HEADER_BYTES, 0);
        out
    }

    /// From the first bytes of a segment.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        at.expect(MAGIC, "it does not begin as an index segment")?;
        if at.u16()? != VERSION {
            return Err(Malformed("it is an index segment of a newer version; upgrade virtward"));
        }
        let cipher = Cipher::from_byte(at.u8()?)?;
        at.take(5)?;
        let (repository, segment, writer) = (ObjectId(at.array()?), ObjectId(at.array()?), ObjectId(at.array()?));
        let (epoch, entries) = (at.u64()?, at.u64()?);
        let (packs, replaces, block_entries, metadata_generation) = (at.u32()?, at.u32()?, at.u32()?, at.u32()?);
        let salt = at.array()?;
        if packs > PACKS_MAX || replaces > REPLACES_MAX || entries > ENTRIES_MAX {
            return Err(Malformed("its header has impossible counts"));
        }
        if block_entries as usize != BLOCK_ENTRIES {
            return Err(Malformed("its blocks have an unknown size"));
        }
        Ok(Self { repository, segment, writer, epoch, packs, replaces, entries, cipher, metadata_generation, salt })
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
    /// Where a block is in the segment: offset and length.
    pub fn block_range(&self, block: u64) -> (u64, usize) {
        let begin = self.clear_bytes() as u64 + self.fences_bytes() + block * BLOCK_BYTES as u64;
        let entries = (self.entries - block * BLOCK_ENTRIES as u64).min(BLOCK_ENTRIES as u64) as usize;
        (begin, entries * ENTRY_BYTES + TAG_BYTES)
    }
    /// Length of the whole segment.
    pub fn segment_bytes(&self) -> u64 {
        self.clear_bytes() as u64
            + self.fences_bytes()
            + self.entries * ENTRY_BYTES as u64
            + self.blocks() * TAG_BYTES as u64
            + SUM_BYTES as u64
    }
    fn sealer(&self, ring: &KeyRing) -> Result<Sealer> {
        let master: &Key = ring.metadata(self.metadata_generation)?;
        Ok(self.cipher.with(&derive("index segment", master, &[&self.salt, &self.repository.0])))
    }
}

/// The clear part of a segment. Needs no key.
#[derive(Clone, Debug)]
pub struct Clear {
    /// Header.
    pub header: Header,
    /// Packs whose chunks the segment lists.
    pub packs: Vec<PackInfo>,
    /// Segments whose entries this one took over.
    pub replaces: Vec<ObjectId>,
}

impl Clear {
    /// From the first [`Header::clear_bytes`] bytes (more are ignored).
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let header = Header::decode(bytes)?;
        let mut at = Cursor::new(bytes);
        at.take(HEADER_BYTES)?;
        let listed = at.take(header.packs as usize * TAIL_BYTES)?;
        let mut packs = Vec::with_capacity(header.packs as usize);
        for tail in listed.as_chunks::<TAIL_BYTES>().0 {
            let (header, footer) = Footer::decode(tail)?;
            packs.push(PackInfo { header, footer });
        }
        let listed = at.take(header.replaces as usize * 16)?;
        let replaces = listed.as_chunks::<16>().0.iter().map(|id| ObjectId(*id)).collect();
        Ok(Self { header, packs, replaces })
    }
}

/// A segment opened with keys: what is needed to read blocks.
#[derive(Debug)]
pub struct Opened {
    /// The clear part.
    pub clear: Clear,
    sealer: Sealer,
    aad: [u8; 32],
}

impl Opened {
    /// Prepares reading of blocks; `clear_bytes` are the exact bytes of the clear part.
    pub fn new(clear: Clear, clear_bytes: &[u8], ring: &KeyRing, name: &str) -> Result<Self> {
        if clear.header.repository != ring.repository || names::segment(&clear.header.segment) != name {
            return Err(Malformed("it belongs to another name or repository").at(name));
        }
        let sealer = clear.header.sealer(ring)?;
        Ok(Self { clear, sealer, aad: *blake3::hash(clear_bytes).as_bytes() })
    }

    /// Opens a sealed block into entries.
    pub fn block(&self, block: u64, sealed: &mut [u8], out: &mut Vec<IndexEntry>) -> Result<(), Malformed> {
        let text = self.sealer.open(block, &self.aad, sealed)?;
        let mut at = Cursor::new(text);
        while !at.rest().is_empty() {
            let (id, pack) = (ChunkId(at.array()?), at.u32()?);
            let (offset, stored) = (at.u32()?, at.u32()?);
            let (plain, encoding) = Entry::split_plain_word(at.u32()?)?;
            let entry = Entry { id, offset, stored, plain, encoding };
            entry.check()?;
            if pack >= self.clear.header.packs {
                return Err(Malformed("an entry names a pack that is not listed"));
            }
            out.push(IndexEntry { pack, entry });
        }
        Ok(())
    }

    /// Opens the fences.
    pub fn fences(&self, sealed: &mut [u8]) -> Result<Vec<u64>, Malformed> {
        let text = self.sealer.open(FENCES_NONCE, &self.aad, sealed)?;
        Ok(text.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }
}

/// Encodes a segment. Entries are sorted here.
pub fn encode(
    ring: &KeyRing,
    (writer, epoch): (ObjectId, u64),
    packs: &[PackInfo],
    replaces: &[ObjectId],
    mut entries: Vec<IndexEntry>,
) -> Result<(ObjectId, Vec<u8>)> {
    entries.sort_unstable_by_key(|e| (e.entry.id, e.pack, e.entry.offset));
    let (metadata_generation, _) = ring.metadata_newest()?;
    let header = Header {
        repository: ring.repository,
        segment: ObjectId::random(),
        writer,
        epoch,
        packs: packs.len() as u32,
        replaces: replaces.len() as u32,
        entries: entries.len() as u64,
        cipher: Cipher::preferred(),
        metadata_generation,
        salt: random(),
    };
    let mut out = header.encode();
    out.reserve(header.segment_bytes() as usize);
    for pack in packs {
        out.extend_from_slice(&pack.footer.encode(&pack.header));
    }
    for id in replaces {
        out.extend_from_slice(&id.0);
    }
    let aad = *blake3::hash(&out).as_bytes();
    let sealer = header.sealer(ring)?;
    let mut text = Vec::with_capacity(BLOCK_BYTES);
    for block in entries.chunks(BLOCK_ENTRIES) {
        text.extend_from_slice(&block[0].entry.id.prefix().to_be_bytes());
    }
    sealer.seal(FENCES_NONCE, &aad, &mut text);
    out.extend_from_slice(&text);
    for (number, block) in entries.chunks(BLOCK_ENTRIES).enumerate() {
        text.clear();
        for IndexEntry { pack, entry } in block {
            text.extend_from_slice(&entry.id.0);
            for word in [*pack, entry.offset, entry.stored, entry.plain_word()] {
                text.extend_from_slice(&word.to_le_bytes());
            }
        }
        sealer.seal(number as u64, &aad, &mut text);
        out.extend_from_slice(&text);
    }
    push_checksum(&mut out);
    debug_assert_eq!(out.len() as u64, header.segment_bytes());
    Ok((header.segment, out))
}
