//! A blocked Bloom filter over chunk ids: says quickly that a segment does not list an id.
//!
//! Ids are keyed hashes, so their own bytes choose line and bits. All bits of an id are in one line of 64 bytes, so a
//! look-up touches one cache line. The line follows the order of the ids: building from sorted entries walks through
//! memory once. At 12 bits per id about one in two hundred absent ids is let through.
//!
//! Invariant: never a false "absent" for an id that was inserted. Bits that a hostile or faulty writer set wrong can hide
//! a chunk, so nobody who must find one relies on the filter alone; see [`super::Index::search`].

use crate::format::ChunkId;

/// Bytes of a line.
pub const LINE_BYTES: usize = 64;
/// Lines that are sealed together: 1 MiB.
pub const PIECE_LINES: u32 = 16_384;

const LINE_BITS: u64 = 8 * LINE_BYTES as u64;
const BITS_PER_ID: u64 = 12;
const PROBES: usize = 8;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u64; LINE_BYTES / 8]);

/// The filter of one segment. Without lines it lets everything through.
#[derive(Clone, Default)]
pub struct Filter {
    lines: Vec<Line>,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filter({} lines)", self.lines.len())
    }
}

/// Lines for that many ids.
pub fn lines_for(ids: u64) -> u32 {
    u32::try_from((ids * BITS_PER_ID).div_ceil(LINE_BITS)).unwrap_or(u32::MAX)
}

impl Filter {
    /// An empty filter that lets nothing through.
    pub fn new(lines: u32) -> Self {
        Self { lines: vec![Line([0; LINE_BYTES / 8]); lines as usize] }
    }

    /// Room for lines that follow with [`Filter::extend`].
    pub fn with_capacity(lines: u32) -> Self {
        Self { lines: Vec::with_capacity(lines as usize) }
    }

    /// Number of lines.
    pub fn lines(&self) -> u32 {
        self.lines.len() as u32
    }

    /// Takes over the lines of a piece.
    pub fn extend(&mut self, piece: &[u8]) {
        let line = |bytes: &[u8; LINE_BYTES]| {
            let mut words = [0; LINE_BYTES / 8];
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            Line(words)
        };
        self.lines.extend(piece.as_chunks::<LINE_BYTES>().0.iter().map(line));
    }

    /// The bytes of piece after piece.
    pub fn pieces(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.lines
            .chunks(PIECE_LINES as usize)
            .map(|lines| lines.iter().flat_map(|line| line.0).flat_map(u64::to_le_bytes).collect())
    }

    fn line(&self, id: &ChunkId) -> usize {
        ((u128::from(id.prefix()) * self.lines.len() as u128) >> 64) as usize
    }

    /// Adds an id.
    pub fn insert(&mut self, id: &ChunkId) {
        let at = self.line(id);
        if let Some(Line(words)) = self.lines.get_mut(at) {
            for bit in bits(id) {
                words[bit / 64] |= 1 << (bit % 64);
            }
        }
    }

    /// Whether an id may have been added. True for every id that was, and for few others.
    pub fn may_contain(&self, id: &ChunkId) -> bool {
        let Some(Line(words)) = self.lines.get(self.line(id)) else { return true };
        bits(id).all(|bit| words[bit / 64] >> (bit % 64) & 1 == 1)
    }
}

/// The bits of an id in its line: bytes 8 to 23, two for each.
fn bits(id: &ChunkId) -> impl Iterator<Item = usize> {
    let words = id.0[8..8 + 2 * PROBES].as_chunks::<2>().0;
    words.iter().map(|two| usize::from(u16::from_le_bytes(*two)) % LINE_BITS as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn random_id() -> ChunkId {
        ChunkId(crate::crypto::random())
    }

    proptest! {
        #[test]
        fn never_a_false_absent(ids in prop::collection::vec(any::<[u8; 32]>(), 1..300), lines in 1u32..40) {
            let mut filter = Filter::new(lines);
            ids.iter().for_each(|id| filter.insert(&ChunkId(*id)));
            let mut again = Filter::with_capacity(lines);
            filter.pieces().for_each(|piece| again.extend(&piece));
            prop_assert_eq!(again.lines(), lines);
            prop_assert!(ids.iter().all(|id| filter.may_contain(&ChunkId(*id)) && again.may_contain(&ChunkId(*id))));
        }
    }

    #[test]
    fn fewer_than_one_in_a_hundred_absent_ids_pass() {
        let mut filter = Filter::new(lines_for(100_000));
        (0..100_000).for_each(|_| filter.insert(&random_id()));
        let passed = (0..100_000).filter(|_| filter.may_contain(&random_id())).count();
        assert!(passed < 1000, "{passed} of 100000");
        assert!(passed > 100, "{passed} of 100000: the bits are not those of the ids");
    }

    #[test]
    fn no_lines_let_everything_through() {
        assert_eq!((lines_for(0), lines_for(1), lines_for(42), lines_for(43)), (0, 1, 1, 2));
        assert!(Filter::default().may_contain(&random_id()));
    }

    #[test]
    fn ids_at_both_ends_have_a_line() {
        let mut filter = Filter::new(3);
        for id in [ChunkId([0; 32]), ChunkId([255; 32])] {
            assert!(!filter.may_contain(&id));
            filter.insert(&id);
            assert!(filter.may_contain(&id));
        }
    }

    #[test]
    fn large_filters_come_in_pieces() {
        let mut filter = Filter::new(PIECE_LINES + 1);
        let ids: Vec<_> = (0..1000).map(|_| random_id()).collect();
        ids.iter().for_each(|id| filter.insert(id));
        let pieces: Vec<_> = filter.pieces().collect();
        assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [PIECE_LINES as usize * LINE_BYTES, LINE_BYTES]);
        let mut again = Filter::default();
        pieces.iter().for_each(|piece| again.extend(piece));
        assert!(ids.iter().all(|id| again.may_contain(id)));
    }
}
