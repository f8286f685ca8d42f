//! What is referenced, as a set that may claim too much and never too little: a blocked Bloom filter.
//!
//! Exact ids of a hundred million chunks would take gigabytes; this takes two bytes per chunk. A false claim (about one in
//! a thousand) keeps a piece of garbage until the next collection, which uses another salt.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::format::ChunkId;

/// Words of one line; all bits of an id are in one line.
const LINE_WORDS: usize = 8;
/// Ids per line at the capacity: 16 bits each.
const LINE_IDS: u64 = 32;
/// Bits set per id.
const PROBES: u32 = 7;

/// A set of ids. Filled from many threads.
pub struct LiveSet {
    lines: Vec<[AtomicU64; LINE_WORDS]>,
    /// Odd, random: which ids share a line differs from one collection to the next.
    salt: u64,
}

impl LiveSet {
    /// For about that many ids; more only make it less exact.
    pub fn new(capacity: u64) -> Self {
        let lines = capacity.div_ceil(LINE_IDS).max(1);
        let salt = u64::from_le_bytes(crate::crypto::random()) | 1;
        Self { lines: (0..lines).map(|_| Default::default()).collect(), salt }
    }

    fn place(&self, id: &ChunkId) -> (&[AtomicU64; LINE_WORDS], u64) {
        let word = |at: usize| id.0[at..at + 8].iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let line = (u128::from(word(0).wrapping_mul(self.salt)) * self.lines.len() as u128) >> 64;
        // Ids are keyed hashes: their bits are as good as any other hash.
        (&self.lines[line as usize], word(8))
    }

    /// Adds an id.
    pub fn insert(&self, id: &ChunkId) {
        let (line, bits) = self.place(id);
        for probe in 0..PROBES {
            let bit = (bits >> (9 * probe)) as usize % 512;
            line[bit / 64].fetch_or(1 << (bit % 64), Relaxed);
        }
    }

    /// Whether an id was added; now and then true for one that was not.
    pub fn contains(&self, id: &ChunkId) -> bool {
        let (line, bits) = self.place(id);
        (0..PROBES).all(|probe| {
            let bit = (bits >> (9 * probe)) as usize % 512;
            line[bit / 64].load(Relaxed) & 1 << (bit % 64) != 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> ChunkId {
        ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    #[test]
    fn what_was_added_is_there_and_little_else() {
        let set = LiveSet::new(50_000);
        (0..50_000).for_each(|n| set.insert(&id(n)));
        assert!((0..50_000).all(|n| set.contains(&id(n))));
        let wrong = (50_000..150_000).filter(|n| set.contains(&id(*n))).count();
        assert!(wrong < 500, "{wrong} of 100000");
    }

    #[test]
    fn more_than_it_was_made_for_is_still_there() {
        let set = LiveSet::new(0);
        (0..5_000).for_each(|n| set.insert(&id(n)));
        assert!((0..5_000).all(|n| set.contains(&id(n))));
    }
}
