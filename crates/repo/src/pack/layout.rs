//! Bytes of a pack: header, records, sealed table, tail with a copy of the header.
//!
//! ```text
//! header 256 · record… · sealed table · tail 384 = header copy 256 · footer 128
//! ```
//! A record is one sealed chunk; its nonce is its offset in the pack, so reserving a range reserves a nonce.

use super::PackClass;
use crate::{
    crypto::{Cipher, Key, Sealer, TAG_BYTES, WRAPPED_BYTES, derive, random},
    error::Result,
    format::{CHUNK_BYTES_MAX, ChunkId, Cursor, Malformed, ObjectId},
    keys::{KeyRing, ring::Wrapped},
};

/// Bytes of a pack header.
pub const HEADER_BYTES: usize = 256;
/// Bytes of the tail.
pub const TAIL_BYTES: usize = HEADER_BYTES + 128;
/// Bytes of a table entry.
pub const ENTRY_BYTES: usize = 40;
/// Most records in a pack: bounds the table.
pub const RECORDS_MAX: u32 = 1 << 20;
/// Longest pack.
pub const PACK_BYTES_MAX: u64 = 1 << 30;

const MAGIC: &[u8] = b"VWPACK\r\n";
const TAIL_MAGIC: &[u8] = b"VWPKTAIL";
const VERSION: u16 = 1;
/// Where the header's own checksum begins.
const HEADER_SUM_AT: usize = HEADER_BYTES - 16;
/// Nonce of the table; no record can have it.
const TABLE_NONCE: u64 = u64::MAX;

/// A decoded header together with its exact bytes.
#[derive(Clone, Debug)]
pub struct Header {
    /// Class of the pack.
    pub class: PackClass,
    /// Cipher of everything in the pack.
    pub cipher: Cipher,
    /// Repository.
    pub repository: ObjectId,
    /// Identity of the pack; random.
    pub pack: ObjectId,
    wrapped: Wrapped,
    metadata_generation: u32,
    table_salt: [u8; 32],
    bytes: [u8; HEADER_BYTES],
}

impl Header {
    /// The run that wrote the pack.
    pub fn writer(&self) -> ObjectId {
        let mut id = [0; 16];
        id.copy_from_slice(&self.bytes[48..64]);
        ObjectId(id)
    }

    /// A new pack with a fresh key.
    pub fn create(ring: &KeyRing, class: PackClass, writer: ObjectId, epoch: u64) -> Result<(Self, Sealer)> {
        let (cipher, pack, key) = (Cipher::preferred(), ObjectId::random(), Key::random());
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[class as u8, cipher as u8, 0, 0, 0, 0]);
        for id in [&ring.repository, &pack, &writer] {
            out.extend_from_slice(&id.0);
        }
        out.extend_from_slice(&epoch.to_le_bytes());
        let wrapped = ring.wrap(class.key_class(), cipher, &out, &key)?;
        let (metadata_generation, _) = ring.metadata_newest()?;
        let table_salt: [u8; 32] = random();
        out.extend_from_slice(&u32::from(wrapped.form).to_le_bytes());
        out.extend_from_slice(&wrapped.generation.to_le_bytes());
        out.extend_from_slice(&wrapped.salt);
        out.extend_from_slice(&wrapped.key);
        out.extend_from_slice(&metadata_generation.to_le_bytes());
        out.extend_from_slice(&table_salt);
        out.resize(HEADER_SUM_AT, 0);
        let sum = blake3::hash(&out);
        out.extend_from_slice(&sum.as_bytes()[..16]);
        let bytes: [u8; HEADER_BYTES] = out.try_into().expect("the fields fill the header");
        let header = Self::decode(&bytes).expect("just encoded");
        Ok((header, cipher.with(&key)))
    }

    /// From its bytes; checks its checksum. Needs no key.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        // What does not begin as a pack is not called a damaged one.
        Cursor::new(bytes).expect(MAGIC, "it does not begin as a pack")?;
        if blake3::hash(&bytes[..HEADER_SUM_AT]).as_bytes()[..16] != bytes[HEADER_SUM_AT..] {
            return Err(Malformed("the checksum of its header does not match"));
        }
        Self::decode_intact(bytes)
    }

    /// From bytes that are known to be those that were written.
    fn decode_intact(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        at.expect(MAGIC, "it does not begin as a pack")?;
        if at.u16()? != VERSION {
            return Err(Malformed("it is a pack of a newer version; upgrade virtward"));
        }
        let (class, cipher) = (PackClass::from_byte(at.u8()?)?, Cipher::from_byte(at.u8()?)?);
        at.u32()?;
        let (repository, pack) = (ObjectId(at.array()?), ObjectId(at.array()?));
        at.take(16 + 8)?; // Writer and epoch: for people and collectors, not for readers.
        let form = u8::try_from(at.u32()?).map_err(|_| Malformed("its key is wrapped in an unknown way"))?;
        let (generation, salt, key) = (at.u32()?, at.array()?, at.array::<WRAPPED_BYTES>()?);
        let (metadata_generation, table_salt) = (at.u32()?, at.array()?);
        let wrapped = Wrapped { form, generation, salt, key };
        let bytes = *bytes;
        Ok(Self { class, cipher, repository, pack, wrapped, metadata_generation, table_salt, bytes })
    }

    /// The exact bytes.
    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        &self.bytes
    }
    /// Name of the pack's object.
    pub fn name(&self) -> String {
        self.class.name(&self.pack)
    }
    /// What opens the records.
    pub fn sealer(&self, ring: &KeyRing) -> Result<Sealer> {
        let identity = &self.bytes[..IDENTITY_BYTES];
        let key = ring.unwrap(self.class.key_class(), self.cipher, identity, &self.wrapped, &self.name())?;
        Ok(self.cipher.with(&key))
    }
    fn table_sealer(&self, ring: &KeyRing) -> Result<Sealer> {
        let key = ring.metadata(self.metadata_generation)?;
        Ok(self.cipher.with(&derive("pack table", key, &[&self.table_salt, &self.repository.0])))
    }
}

/// The fields that identify a pack: AAD of its wrapped key.
const IDENTITY_BYTES: usize = 8 + 2 + 6 + 3 * 16 + 8;

/// How a chunk's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Plain = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

impl Encoding {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Result<Self, Malformed> {
        match byte {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            _ => Err(Malformed("a chunk has an unknown compression")),
        }
    }
}

/// One record, in the order of the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Identity of the chunk or page.
    pub id: ChunkId,
    /// Offset of the record in the pack.
    pub offset: u32,
    /// Length of the record, tag included.
    pub stored: u32,
    /// Length of the plaintext.
    pub plain: u32,
    /// Compression.
    pub encoding: Encoding,
}

impl Entry {
    /// Bounds that hold for every valid entry.
    pub fn check(&self) -> Result<(), Malformed> {
        let fits = self.plain <= CHUNK_BYTES_MAX
            && (TAG_BYTES as u32..=CHUNK_BYTES_MAX + TAG_BYTES as u32).contains(&self.stored)
            && u64::from(self.offset) + u64::from(self.stored) <= PACK_BYTES_MAX;
        if fits { Ok(()) } else { Err(Malformed("a record has impossible lengths")) }
    }
    /// Length and compression in one word, as tables and segments keep them.
    pub fn plain_word(&self) -> u32 {
        self.plain | u32::from(self.encoding as u8) << 24
    }
    /// Reverses [`Entry::plain_word`].
    pub fn split_plain_word(word: u32) -> Result<(u32, Encoding), Malformed> {
        Ok((word & 0x00ff_ffff, Encoding::from_byte((word >> 24) as u8)?))
    }
    /// AAD of the record: everything that a reader believes of it before opening.
    pub fn aad(&self, header: &Header) -> [u8; 56] {
        let mut aad = [0; 56];
        aad[..16].copy_from_slice(&header.repository.0);
        aad[16..18].copy_from_slice(&VERSION.to_le_bytes());
        aad[18] = header.class as u8;
        aad[20..52].copy_from_slice(&self.id.0);
        aad[52..].copy_from_slice(&self.plain_word().to_le_bytes());
        aad
    }
}

/// Encodes and seals the table.
pub fn seal_table(header: &Header, ring: &KeyRing, entries: &[Entry]) -> Result<Vec<u8>> {
    let mut table = Vec::with_capacity(entries.len() * ENTRY_BYTES + TAG_BYTES);
    for entry in entries {
        table.extend_from_slice(&entry.id.0);
        table.extend_from_slice(&entry.stored.to_le_bytes());
        table.extend_from_slice(&entry.plain_word().to_le_bytes());
    }
    header.table_sealer(ring)?.seal(TABLE_NONCE, &header.bytes, &mut table);
    Ok(table)
}

/// Opens the table and checks that its records fill the space between header and table exactly.
pub fn open_table(header: &Header, ring: &KeyRing, footer: &Footer, mut sealed: Vec<u8>) -> Result<Vec<Entry>> {
    let sealer = header.table_sealer(ring)?;
    let table = sealer.open(TABLE_NONCE, &header.bytes, &mut sealed).map_err(|e| e.at(header.name()))?;
    parse_table(table, footer.table_offset).map_err(|e| e.at(header.name()))
}

/// From the opened bytes of a table.
pub fn parse_table(table: &[u8], table_offset: u32) -> Result<Vec<Entry>, Malformed> {
    let mut at = Cursor::new(table);
    let mut entries = Vec::with_capacity(table.len() / ENTRY_BYTES);
    let mut offset = HEADER_BYTES as u32;
    while !at.rest().is_empty() {
        let (id, stored) = (ChunkId(at.array()?), at.u32()?);
        let (plain, encoding) = Entry::split_plain_word(at.u32()?)?;
        let entry = Entry { id, offset, stored, plain, encoding };
        entry.check()?;
        offset = offset.checked_add(stored).ok_or(Malformed("its records do not fit"))?;
        entries.push(entry);
    }
    if offset != table_offset {
        return Err(Malformed("its records do not fill it"));
    }
    Ok(entries)
}

/// The last 128 bytes of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the sealed table begins, which is where the records end.
    pub table_offset: u32,
    /// Length of the sealed table.
    pub table_bytes: u32,
    /// Number of records.
    pub records: u32,
    /// BLAKE3 of everything before the tail.
    pub sum: [u8; 32],
}

impl Footer {
    /// Length of the whole pack.
    pub fn pack_bytes(&self) -> u64 {
        u64::from(self.table_offset) + u64::from(self.table_bytes) + TAIL_BYTES as u64
    }

    /// The tail: header copy and footer.
    pub fn encode(&self, header: &Header) -> [u8; TAIL_BYTES] {
        let mut out = Vec::with_capacity(TAIL_BYTES);
        out.extend_from_slice(&header.bytes);
        for word in [self.table_offset, self.table_bytes, self.records, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.sum);
        out.resize(TAIL_BYTES - 24, 0);
        let sum = blake3::hash(&out);
        out.extend_from_slice(&sum.as_bytes()[..16]);
        out.extend_from_slice(TAIL_MAGIC);
        out.try_into().expect("the fields fill the tail")
    }

    /// From the tail; checks checksums and bounds. Needs no key.
    pub fn decode(tail: &[u8; TAIL_BYTES]) -> Result<(Header, Self), Malformed> {
        if &tail[TAIL_BYTES - 8..] != TAIL_MAGIC {
            return Err(Malformed("it does not end as a pack (cut short?)"));
        }
        if blake3::hash(&tail[..TAIL_BYTES - 24]).as_bytes()[..16] != tail[TAIL_BYTES - 24..TAIL_BYTES - 8] {
            return Err(Malformed("the checksum of its tail does not match"));
        }
        let (header_bytes, _) = tail.split_first_chunk().ok_or(Malformed("it is too short"))?;
        Header::decode(header_bytes)?;
        Self::decode_intact(tail)
    }

    /// From a tail that is known to be the one that was written: an index segment has many, under a checksum of its own.
    pub fn decode_intact(tail: &[u8; TAIL_BYTES]) -> Result<(Header, Self), Malformed> {
        let (header_bytes, rest) = tail.split_first_chunk().ok_or(Malformed("it is too short"))?;
        let header = Header::decode_intact(header_bytes)?;
        let mut at = Cursor::new(rest);
        let (table_offset, table_bytes, records) = (at.u32()?, at.u32()?, at.u32()?);
        at.u32()?;
        let footer = Self { table_offset, table_bytes, records, sum: at.array()? };
        let table_fits = records <= RECORDS_MAX && table_bytes as usize == records as usize * ENTRY_BYTES + TAG_BYTES;
        if !table_fits || (table_offset as usize) < HEADER_BYTES || footer.pack_bytes() > PACK_BYTES_MAX {
            return Err(Malformed("its tail has impossible lengths"));
        }
        Ok((header, footer))
    }
}
