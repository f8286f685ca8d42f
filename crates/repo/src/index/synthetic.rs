//! Segments without packs, to measure the index at sizes that nobody has at hand.

use super::{
    segment::{BLOCK_ENTRIES, IndexEntry},
    write::Outline,
};
use crate::{
    error::{Error, Result},
    format::{ChunkId, ObjectId, names},
    pack::{Encoding, Entry, Footer, Header, PackClass, PackInfo},
    repository::Repository,
    store::Put,
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
