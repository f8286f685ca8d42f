//! Bytes of an overlay: parts of a chunk that were written over an earlier one.
//!
//! ```text
//! "VWOV" · version u8 · count u16 · (offset u32 · length u32)… · the parts' bytes, one after the other
//! ```
//! A guest that changes 64 KiB of a chunk costs 64 KiB to read, hash, compress and keep, not a whole chunk. An overlay is
//! stored like any chunk and shared like one; the page that names it says over what it lies. Parts are sorted, disjoint,
//! not empty.

use std::ops::Range;

use crate::format::{CHUNK_BYTES_MAX, Cursor, Malformed};

/// Most parts of an overlay.
pub const PARTS_MAX: usize = 1024;

const MAGIC: &[u8] = b"VWOV";
const VERSION: u8 = 1;
/// Bytes in front of the list of parts.
const HEAD_BYTES: usize = 4 + 1 + 2;
const PART_BYTES: usize = 8;

/// Whether parts of a chunk of that length can make an overlay: sorted, disjoint, not empty, not too many, and saving at
/// least half of the chunk.
pub fn is_worth_it(parts: &[Range<u32>], chunk_len: usize) -> bool {
    let in_order = parts.iter().all(|part| part.start < part.end && part.end as usize <= chunk_len)
        && parts.windows(2).all(|pair| pair[0].end <= pair[1].start);
    let bytes: usize = parts.iter().map(Range::len).sum();
    in_order && !parts.is_empty() && parts.len() <= PARTS_MAX && bytes <= chunk_len / 2
}

/// The overlay that writes these parts of `chunk`.
pub fn encode(chunk: &[u8], parts: &[Range<u32>], out: &mut Vec<u8>) {
    out.clear();
    out.reserve(HEAD_BYTES + parts.iter().map(|part| PART_BYTES + part.len()).sum::<usize>());
    out.extend_from_slice(MAGIC);
    out.push(VERSION);
    out.extend_from_slice(&(parts.len() as u16).to_le_bytes());
    for part in parts {
        out.extend_from_slice(&part.start.to_le_bytes());
        out.extend_from_slice(&(part.end - part.start).to_le_bytes());
    }
    for part in parts {
        out.extend_from_slice(&chunk[part.start as usize..part.end as usize]);
    }
}

/// Writes an overlay's parts into `chunk`, which is as long as its place on the disk: what lies beyond is ignored, as it
/// is in a chunk.
pub fn apply(overlay: &[u8], chunk: &mut [u8]) -> Result<(), Malformed> {
    let mut at = Cursor::new(overlay);
    at.expect(MAGIC, "it is no overlay")?;
    if at.u8()? != VERSION {
        return Err(Malformed("it is an overlay of a newer version; upgrade virtward"));
    }
    let count = at.u16()?;
    if usize::from(count) > PARTS_MAX {
        return Err(Malformed("an overlay has too many parts"));
    }
    let mut parts = Vec::with_capacity(count.into());
    let mut last = 0;
    for _ in 0..count {
        let (offset, length) = (at.u32()?, at.u32()?);
        let end = offset.checked_add(length).filter(|end| *end <= CHUNK_BYTES_MAX);
        let Some(end) = end.filter(|_| offset >= last && length > 0) else {
            return Err(Malformed("the parts of an overlay are out of order"));
        };
        parts.push(offset as usize..end as usize);
        last = end;
    }
    for part in parts {
        let bytes = at.take(part.len())?;
        if let Some(place) = chunk.get_mut(part.start..part.end.min(chunk.len()).max(part.start)) {
            place.copy_from_slice(&bytes[..place.len()]);
        }
    }
    at.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parts(cuts: &[u32]) -> Vec<Range<u32>> {
        cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
    }

    proptest! {
        #[test]
        fn parts_come_back_where_they_were_and_nothing_else_changes(
            cuts in prop::collection::btree_set(0u32..4096, 2..12),
            below in any::<u8>(),
            room in 0usize..5000,
        ) {
            let parts = parts(&cuts.into_iter().collect::<Vec<_>>());
            let chunk: Vec<u8> = (0..4096u32).map(|n| (n % 251) as u8).collect();
            let mut bytes = Vec::new();
            encode(&chunk, &parts, &mut bytes);
            let mut place = vec![below; room];
            apply(&bytes, &mut place).unwrap();
            for (at, byte) in place.into_iter().enumerate() {
                let written = parts.iter().any(|part| part.contains(&(at as u32)));
                prop_assert_eq!(byte, if written { chunk[at] } else { below });
            }
        }

        #[test]
        fn cut_and_changed_overlays_are_refused_or_harmless(
            at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>(),
        ) {
            let chunk = vec![7u8; 4096];
            let mut bytes = Vec::new();
            encode(&chunk, &[0..10, 100..300], &mut bytes);
            let whole = bytes.len();
            let index = at.index(whole);
            bytes[index] = value;
            let mut place = vec![0; 4096];
            let _ = apply(&bytes, &mut place);
            bytes.truncate(cut.index(whole));
            prop_assert!(apply(&bytes, &mut place).is_err());
        }
    }

    #[test]
    fn only_what_saves_half_is_an_overlay() {
        assert!(is_worth_it(&[0..1000, 1000..2048], 4096));
        assert!(!is_worth_it(&[0..1000, 1000..2049], 4096));
        assert!(!is_worth_it(&[10..20, 15..30], 4096), "overlapping");
        assert!(!is_worth_it(&[1..2, 10..10], 4096), "empty");
        assert!(!is_worth_it(&[1..2, 4090..4100], 4096), "beyond the end");
        assert!(!is_worth_it(&[], 4096));
    }
}
