//! From extents (what is allocated, what is dirty) to chunk-sized reads.
//!
//! Invariants: every chunk touched by a dirty byte is planned exactly once; a chunk's reads cover all of its bytes that
//! may be non-zero and are sorted, disjoint and inside the chunk; chunks that read as zeros are never read; the dirty
//! parts of a chunk cover all of its dirty bytes.

use std::ops::Range;

/// Part of a disk with one property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// Allocated (for a full read) or dirty (for an increment).
    pub set: bool,
}

/// What to do with a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChunkPlan {
    /// Read these byte ranges of the disk; the rest of the chunk is zeros.
    Read {
        /// Chunk number.
        index: u64,
        /// Bytes in this chunk (the last chunk of a disk may be short).
        length: u32,
        /// Ranges to read, absolute, sorted, disjoint.
        reads: Vec<Range<u64>>,
    },
    /// `count` chunks from `first` read as zeros.
    Zero {
        /// First chunk number.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// Gaps shorter than this are read rather than made a request of their own.
const GAP_BYTES_MAX: u64 = 32 << 10;

/// Turns consecutive allocation spans into chunk plans.
pub struct Planner {
    chunk_bytes: u64,
    end: u64,
    position: u64,
    reads: Vec<Range<u64>>,
    zeros: Range<u64>,
}

impl Planner {
    /// Plans the chunks of `range` (chunk-aligned at its start; its end is chunk-aligned or the end of the disk).
    pub fn new(chunk_bytes: u32, range: Range<u64>) -> Self {
        Self {
            chunk_bytes: u64::from(chunk_bytes),
            end: range.end,
            position: range.start,
            reads: Vec::new(),
            zeros: 0..0,
        }
    }

    /// The next span; it must begin where the last one ended. Bytes beyond the planned range are ignored.
    pub fn push(&mut self, span: Span, emit: &mut impl FnMut(ChunkPlan)) {
        debug_assert_eq!(span.offset, self.position);
        let mut length = span.length.min(self.end - self.position);
        while length > 0 {
            let chunk_end = self.chunk_end();
            let step = length.min(chunk_end - self.position);
            if span.set {
                self.add_read(self.position..self.position + step);
            }
            self.position += step;
            length -= step;
            if self.position == chunk_end {
                self.close_chunk(emit);
            }
        }
    }

    /// Ends the plan. A server that described less than the range leaves the rest unknown, so it is read.
    pub fn finish(mut self, emit: &mut impl FnMut(ChunkPlan)) {
        let rest = Span { offset: self.position, length: self.end - self.position, set: true };
        self.push(rest, emit);
        self.flush_zeros(emit);
    }

    fn chunk_end(&self) -> u64 {
        ((self.position / self.chunk_bytes + 1) * self.chunk_bytes).min(self.end)
    }

    fn add_read(&mut self, range: Range<u64>) {
        match self.reads.last_mut() {
            Some(last) if range.start - last.end <= GAP_BYTES_MAX => last.end = range.end,
            _ => self.reads.push(range),
        }
    }

    fn close_chunk(&mut self, emit: &mut impl FnMut(ChunkPlan)) {
        let index = (self.position - 1) / self.chunk_bytes;
        if self.reads.is_empty() {
            if self.zeros.is_empty() {
                self.zeros = index..index;
            }
            self.zeros.end = index + 1;
            return;
        }
        self.flush_zeros(emit);
        let length = (self.position - index * self.chunk_bytes) as u32;
        emit(ChunkPlan::Read { index, length, reads: std::mem::take(&mut self.reads) });
    }

    fn flush_zeros(&mut self, emit: &mut impl FnMut(ChunkPlan)) {
        let zeros = std::mem::replace(&mut self.zeros, 0..0);
        if !zeros.is_empty() {
            emit(ChunkPlan::Zero { first: zeros.start, count: zeros.end - zeros.start });
        }
    }
}

/// Dirty spans that are remembered as they are; a disk with more is read by whole chunks.
const SPANS_MAX: usize = 1 << 20;

/// Collects dirty spans: as they are, and as chunk-aligned byte ranges. Both merged and in order.
pub struct Dirty {
    chunk_bytes: u64,
    size_bytes: u64,
    ranges: Vec<Range<u64>>,
    spans: Vec<Range<u64>>,
}

impl Dirty {
    /// For a disk of `size_bytes`.
    pub fn new(chunk_bytes: u32, size_bytes: u64) -> Self {
        Self { chunk_bytes: u64::from(chunk_bytes), size_bytes, ranges: Vec::new(), spans: Vec::new() }
    }

    /// The next span, in ascending order; spans that are not set are ignored.
    pub fn push(&mut self, span: Span) {
        if !span.set || span.length == 0 || span.offset >= self.size_bytes {
            return;
        }
        let end = (span.offset + span.length).min(self.size_bytes);
        merge(&mut self.spans, span.offset..end);
        // Memory for one more than is used tells that there were too many.
        self.spans.truncate(SPANS_MAX + 1);
        let start = span.offset / self.chunk_bytes * self.chunk_bytes;
        let end = (end.div_ceil(self.chunk_bytes) * self.chunk_bytes).min(self.size_bytes);
        merge(&mut self.ranges, start..end);
    }

    /// The ranges to look at: chunks in which anything is dirty.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// The chunks of which parts are dirty, with these parts, relative to the chunk; chunks that are dirty as a whole are
    /// left out. Nothing where there were too many spans to remember.
    pub fn parts(&self) -> Vec<(u64, Vec<Range<u32>>)> {
        let mut parts: Vec<(u64, Vec<Range<u32>>)> = Vec::new();
        if self.spans.len() > SPANS_MAX {
            return parts;
        }
        for span in &self.spans {
            let mut at = span.start;
            while at < span.end {
                let index = at / self.chunk_bytes;
                let start = index * self.chunk_bytes;
                let end = span.end.min(start + self.chunk_bytes);
                let part = (at - start) as u32..(end - start) as u32;
                let is_whole = part.start == 0 && end == self.size_bytes.min(start + self.chunk_bytes);
                match parts.last_mut() {
                    _ if is_whole => {}
                    Some((last, list)) if *last == index => list.push(part),
                    _ => parts.push((index, vec![part])),
                }
                at = end;
            }
        }
        parts
    }
}

fn merge(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
        _ => ranges.push(next),
    }
}

/// What two sorted lists of disjoint ranges have in common.
pub fn intersect(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut i, mut j, mut both) = (0, 0, Vec::new());
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let common = x.start.max(y.start)..x.end.min(y.end);
        if !common.is_empty() {
            both.push(common);
        }
        if x.end < y.end { i += 1 } else { j += 1 }
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNK: u32 = 1 << 20;

    fn plan(range: Range<u64>, spans: &[(u64, bool)]) -> Vec<ChunkPlan> {
        let mut out = Vec::new();
        let mut planner = Planner::new(CHUNK, range.clone());
        let mut offset = range.start;
        for &(length, set) in spans {
            planner.push(Span { offset, length, set }, &mut |plan| out.push(plan));
            offset += length;
        }
        planner.finish(&mut |plan| out.push(plan));
        out
    }

    fn one(range: Range<u64>) -> Vec<Range<u64>> {
        vec![range]
    }

    #[test]
    fn zeros_are_never_read_and_small_gaps_are() {
        let mib = 1 << 20;
        assert_eq!(
            plan(0..5 * mib, &[(2 * mib, false), (4096, true), (8192, false), (4096, true), (3 * mib - 16384, false)]),
            [
                ChunkPlan::Zero { first: 0, count: 2 },
                ChunkPlan::Read { index: 2, length: CHUNK, reads: one(2 * mib..2 * mib + 16384) },
                ChunkPlan::Zero { first: 3, count: 2 },
            ]
        );
    }

    #[test]
    fn what_the_server_did_not_describe_is_read() {
        assert_eq!(plan(0..1000, &[(100, false)]), [ChunkPlan::Read { index: 0, length: 1000, reads: one(100..1000) }]);
    }

    proptest! {
        #[test]
        fn plans_cover_exactly_what_may_be_data(
            spans in prop::collection::vec((1u64..3_000_000, any::<bool>()), 1..40),
            tail in 0u64..CHUNK as u64,
        ) {
            let size = spans.iter().map(|span| span.0).sum::<u64>() + tail;
            let plans = plan(0..size, &spans);
            let mut next = 0;
            let mut covered: Vec<Range<u64>> = Vec::new();
            for item in plans {
                match item {
                    ChunkPlan::Zero { first, count } => { prop_assert_eq!(first, next); next += count; }
                    ChunkPlan::Read { index, length, reads } => {
                        prop_assert_eq!(index, next);
                        next += 1;
                        let start = index * u64::from(CHUNK);
                        prop_assert_eq!(u64::from(length), u64::from(CHUNK).min(size - start));
                        let mut at = start;
                        for read in reads {
                            prop_assert!(read.start >= at && read.end > read.start);
                            prop_assert!(read.end <= start + u64::from(length));
                            at = read.end;
                            covered.push(read);
                        }
                    }
                }
            }
            prop_assert_eq!(next, size.div_ceil(u64::from(CHUNK)));
            let mut offset = 0;
            for (length, set) in spans.iter().copied().chain([(tail, true)]) {
                if set && length > 0 {
                    let mut at = offset;
                    for range in &covered {
                        if range.start <= at && at < range.end { at = range.end; }
                    }
                    prop_assert!(at >= offset + length);
                }
                offset += length;
            }
        }

        #[test]
        fn dirty_ranges_are_aligned_sorted_and_cover(
            spans in prop::collection::vec((1u64..3_000_000, any::<bool>()), 1..40),
        ) {
            let size: u64 = spans.iter().map(|span| span.0).sum();
            let mut chunks = Dirty::new(CHUNK, size);
            let mut offset = 0;
            for &(length, set) in &spans {
                chunks.push(Span { offset, length, set });
                offset += length;
            }
            let ranges = chunks.ranges().to_vec();
            for pair in ranges.windows(2) { prop_assert!(pair[0].end < pair[1].start); }
            for range in &ranges {
                prop_assert_eq!(range.start % u64::from(CHUNK), 0);
                prop_assert!(range.end == size || range.end % u64::from(CHUNK) == 0);
            }
            let mut offset = 0;
            for (length, set) in &spans {
                if *set {
                    prop_assert!(ranges.iter().any(|range| range.start <= offset && offset + length <= range.end));
                }
                offset += length;
            }
            // Parts are what is dirty and nothing else, in chunks that are not dirty as a whole.
            let is_dirty = |at: u64| {
                let mut begin = 0;
                spans.iter().any(|(length, set)| { begin += length; *set && (begin - length..begin).contains(&at) })
            };
            for (index, parts) in chunks.parts() {
                let start = index * u64::from(CHUNK);
                let room = u64::from(CHUNK).min(size - start);
                prop_assert!(parts.iter().map(|part| u64::from(part.end - part.start)).sum::<u64>() < room);
                for pair in parts.windows(2) { prop_assert!(pair[0].end < pair[1].start); }
                for part in &parts {
                    prop_assert!(part.start < part.end && u64::from(part.end) <= room);
                    let (first, last) = (start + u64::from(part.start), start + u64::from(part.end) - 1);
                    prop_assert!(is_dirty(first) && is_dirty(last) && is_dirty(first.midpoint(last)));
                    prop_assert!(part.start == 0 || !is_dirty(first - 1));
                    prop_assert!(u64::from(part.end) == room || !is_dirty(last + 1));
                }
            }
        }

        #[test]
        fn what_two_lists_have_in_common_is_in_both(
            a in prop::collection::btree_set(0u64..200, 0..12), b in prop::collection::btree_set(0u64..200, 0..12),
        ) {
            let list = |cuts: &std::collections::BTreeSet<u64>| -> Vec<Range<u64>> {
                let cuts: Vec<u64> = cuts.iter().copied().collect();
                cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
            };
            let (a, b) = (list(&a), list(&b));
            let both = intersect(&a, &b);
            let has = |list: &[Range<u64>], at| list.iter().any(|range| range.contains(&at));
            for at in 0..200 {
                prop_assert_eq!(has(&both, at), has(&a, at) && has(&b, at));
            }
        }
    }
}
