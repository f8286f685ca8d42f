//! Extents: what a server says about the allocation or the dirtiness of ranges, and the walk over a whole export.

use std::ops::Range;

use crate::client::Client;
use crate::error::{Error, Result};

/// A run of bytes with the same flags in one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never 0.
    pub length: u64,
    /// Meaning by context: [`crate::ALLOC_HOLE`] and [`crate::ALLOC_ZERO`], [`crate::DIRTY`], or the depth itself for
    /// [`crate::ALLOCATION_DEPTH`].
    pub flags: u64,
}

impl Extent {
    /// The byte behind its last.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Places (length, flags) pairs that begin at `start`, and clips them to `len` bytes at `offset`.
pub(crate) fn clip_to(pairs: Vec<(u64, u64)>, start: u64, offset: u64, len: u64) -> Vec<Extent> {
    let (mut at, end) = (start, offset + len);
    let mut extents = Vec::with_capacity(pairs.len());
    for (length, flags) in pairs {
        let from = at.max(offset);
        at += length;
        let to = at.min(end);
        if from < to {
            extents.push(Extent { offset: from, length: to - from, flags });
        }
    }
    extents
}

/// Joins neighbours with equal flags, over any number of batches.
#[derive(Debug, Default)]
struct Merger {
    last: Option<Extent>,
}

impl Merger {
    /// Takes a batch, gives back what cannot grow any more.
    fn push(&mut self, batch: &[Extent]) -> Vec<Extent> {
        let mut settled = Vec::with_capacity(batch.len());
        for extent in batch {
            match &mut self.last {
                Some(last) if last.flags == extent.flags && last.end() == extent.offset => last.length += extent.length,
                last => settled.extend(last.replace(*extent)),
            }
        }
        settled
    }

    fn finish(&mut self) -> Option<Extent> {
        self.last.take()
    }
}

/// A walk over the extents of one context in a range of any length.
///
/// Memory is bounded by one answer of the server (at most a million extents). Extents come in order, without gaps,
/// clipped to the range, neighbours with equal flags joined.
#[derive(Debug)]
pub struct ExtentWalk {
    client: Client,
    context: String,
    at: u64,
    end: u64,
    merger: Merger,
}

impl ExtentWalk {
    pub(crate) fn new(client: Client, context: String, range: Range<u64>) -> Self {
        Self { client, context, at: range.start, end: range.end, merger: Merger::default() }
    }

    /// The next extents, never an empty batch; `None` after the last.
    ///
    /// If the future is dropped, nothing is lost: the next call asks again.
    ///
    /// # Errors
    /// See [`Error`]. The walk may be continued after an error that [`Error::is_retryable`].
    pub async fn next_batch(&mut self) -> Result<Option<Vec<Extent>>> {
        while self.at < self.end {
            let batch = self.client.block_status_long(&self.context, self.at, self.end - self.at).await?;
            let reached = batch.last().map_or(self.at, Extent::end);
            if reached <= self.at {
                return Err(Error::Protocol(format!("no extents of {:?} at {}", self.context, self.at)));
            }
            self.at = reached;
            let settled = self.merger.push(&batch);
            if !settled.is_empty() {
                return Ok(Some(settled));
            }
        }
        Ok(self.merger.finish().map(|last| vec![last]))
    }

    /// Hands every extent to `each`, which may end the walk with an error of its own.
    ///
    /// # Errors
    /// The server's (converted) or the callback's.
    pub async fn for_each<E: From<Error>>(mut self, mut each: impl FnMut(Extent) -> Result<(), E>) -> Result<(), E> {
        while let Some(batch) = self.next_batch().await? {
            for extent in batch {
                each(extent)?;
            }
        }
        Ok(())
    }

    /// All of them at once; only for ranges whose fragmentation is known to be bearable.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn collect(mut self) -> Result<Vec<Extent>> {
        let mut all = Vec::new();
        while let Some(mut batch) = self.next_batch().await? {
            all.append(&mut batch);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn clipping_cuts_both_ends() {
        let extents = clip_to(vec![(512, 1), (512, 0), (512, 3)], 1024, 1100, 1000);
        let expected = [(1100, 436, 1), (1536, 512, 0), (2048, 52, 3)];
        assert_eq!(extents, expected.map(|(offset, length, flags)| Extent { offset, length, flags }));
        assert_eq!(clip_to(vec![(512, 1)], 0, 600, 10), []);
    }

    proptest! {
        #[test]
        fn merging_keeps_every_byte_and_leaves_no_equal_neighbours(
            batches in prop::collection::vec(prop::collection::vec((1u64..9, 0u64..3), 0..8), 0..8),
        ) {
            let (mut at, mut merger, mut merged, mut expected) = (0, Merger::default(), vec![], vec![]);
            for batch in batches {
                let batch = clip_to(batch, at, at, u64::MAX - at);
                at = batch.last().map_or(at, Extent::end);
                expected.extend(batch.iter().flat_map(|e| (0..e.length).map(|_| e.flags)));
                merged.extend(merger.push(&batch));
            }
            merged.extend(merger.finish());
            let bytes: Vec<u64> = merged.iter().flat_map(|e| (0..e.length).map(|_| e.flags)).collect();
            prop_assert_eq!(bytes, expected);
            prop_assert!(merged.windows(2).all(|w| w[0].end() == w[1].offset && w[0].flags != w[1].flags));
        }
    }
}
