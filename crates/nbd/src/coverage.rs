//! Which bytes of a read have been answered, so that gaps and overlaps in the server's chunks are found.
//!
//! Servers answer nearly always in order; then this is a single range that grows.

/// Most separate ranges that are kept. An honest server that answers out of order has a few; a hostile one would make
/// every insertion slow.
const RANGES_MAX: usize = 4096;

/// Disjoint, sorted, merged ranges of offsets relative to the start of the read.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    ranges: Vec<(u32, u32)>,
}

impl Coverage {
    /// Adds `start..end`. `false` if any of it was there already, or if the ranges are absurdly many.
    #[must_use]
    pub(crate) fn add(&mut self, start: u32, end: u32) -> bool {
        debug_assert!(start < end);
        let next = self.ranges.partition_point(|range| range.1 <= start);
        // All before `next` end at or before `start`, so only the one at `next` can overlap.
        if self.ranges.get(next).is_some_and(|range| range.0 < end) {
            return false;
        }
        let joins_left = next > 0 && self.ranges[next - 1].1 == start;
        let joins_right = self.ranges.get(next).is_some_and(|range| range.0 == end);
        match (joins_left, joins_right) {
            (true, true) => {
                self.ranges[next - 1].1 = self.ranges[next].1;
                self.ranges.remove(next);
            }
            (true, false) => self.ranges[next - 1].1 = end,
            (false, true) => self.ranges[next].0 = start,
            (false, false) if self.ranges.len() >= RANGES_MAX => return false,
            (false, false) => self.ranges.insert(next, (start, end)),
        }
        true
    }

    /// Whether all of `0..length` was added.
    pub(crate) fn is_complete(&self, length: u32) -> bool {
        match self.ranges[..] {
            [] => length == 0,
            [(start, end)] => start == 0 && end == length,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_bitmap(spans in prop::collection::vec((0u32..64, 1u32..12), 0..40)) {
            let mut coverage = Coverage::default();
            let mut bitmap = [false; 80];
            for (start, length) in spans {
                let cells = &mut bitmap[start as usize..(start + length) as usize];
                let free = cells.iter().all(|cell| !cell);
                prop_assert_eq!(coverage.add(start, start + length), free);
                if free {
                    cells.fill(true);
                }
                let prefix = bitmap.iter().take_while(|cell| **cell).count();
                let exact = bitmap[prefix..].iter().all(|cell| !cell);
                prop_assert_eq!(coverage.is_complete(prefix as u32), exact);
            }
        }
    }

    #[test]
    fn scattered_ranges_are_bounded() {
        let mut coverage = Coverage::default();
        let accepted = (0..1 << 20).take_while(|i| coverage.add(i * 2, i * 2 + 1)).count();
        assert_eq!(accepted, RANGES_MAX);
    }
}
