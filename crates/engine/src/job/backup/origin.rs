//! Where a disk's bytes come from: an NBD export, or a raw image that is read directly.
//!
//! Offers both in one way: what is there to read, and the bytes of a chunk. Not here: which chunks are read, how many at
//! once, and at what pace (`copy`).

use std::{ops::Range, sync::Arc};

use futures::future::try_join_all;
use virtward_decide::readplan::Span;
use virtward_nbd::{ALLOC_ZERO, Client, DIRTY};
use virtward_repo::ChunkBuf;

use super::blocking;
use crate::{Error, Result, image::raw::RawImage};

/// Context that every server offers: what reads as zeros.
pub(super) const ALLOCATION: &str = "base:allocation";
/// Longest range described at once.
const STATUS_BYTES_MAX: u64 = 1 << 30;

/// An open disk.
pub(super) enum Origin {
    /// An export, with or without [`ALLOCATION`].
    Nbd { client: Client, allocation: bool },
    /// A file or block device of this host, which knows nothing of changes.
    Raw(Arc<RawImage>),
}

/// A chunk to be read: these ranges of the disk, sorted and inside the chunk; the rest of it is zeros.
pub(super) struct ChunkRead {
    pub start: u64,
    pub length: u32,
    pub parts: Vec<Range<u64>>,
}

impl ChunkRead {
    pub(super) fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.end - part.start).sum()
    }

    fn is_whole(&self) -> bool {
        self.bytes() == u64::from(self.length)
    }

    /// Fills the buffer, which is as long as the chunk, part by part, and clears what is between them.
    fn fill(&self, buffer: &mut [u8], mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
        let mut done = 0;
        for part in &self.parts {
            let (from, to) = ((part.start - self.start) as usize, (part.end - self.start) as usize);
            buffer[done..from].fill(0);
            read(part.start, &mut buffer[from..to])?;
            done = to;
        }
        buffer[done..].fill(0);
        Ok(())
    }
}

impl Origin {
    /// What of a range may hold data: its first few spans, at least one. None if nobody knows.
    pub(super) async fn allocated(&self, range: Range<u64>) -> Result<Option<Vec<Span>>> {
        match self {
            Self::Nbd { allocation: false, .. } => Ok(None),
            Self::Nbd { client, .. } => {
                status(client, ALLOCATION, range, |flags| flags & ALLOC_ZERO == 0).await.map(Some)
            }
            Self::Raw(image) => {
                let (image, end) = (image.clone(), range.end.min(range.start + STATUS_BYTES_MAX));
                blocking(move || image.spans(range.start..end)).await.map(Some)
            }
        }
    }

    /// What of a range a bitmap calls dirty: its first few spans, at least one.
    pub(super) async fn dirty(&self, context: &str, range: Range<u64>) -> Result<Vec<Span>> {
        match self {
            Self::Nbd { client, .. } => status(client, context, range, |flags| flags & DIRTY != 0).await,
            Self::Raw(_) => Ok(vec![Span { offset: range.start, length: range.end - range.start, set: true }]),
        }
    }

    /// Reads a chunk; `buffer` makes a buffer of its length, of any content.
    pub(super) async fn read(&self, chunk: ChunkRead, buffer: impl FnOnce() -> Vec<u8>) -> Result<ChunkBuf> {
        match self {
            Self::Nbd { client, .. } if chunk.is_whole() => {
                let bytes = client.read(chunk.start, chunk.length).await;
                Ok(bytes.map_err(Error::nbd(reading(chunk.start, chunk.length as usize)))?.into())
            }
            Self::Nbd { client, .. } => {
                let parts = try_join_all(chunk.parts.iter().map(async |part| {
                    let length = (part.end - part.start) as u32;
                    let got = client.read(part.start, length).await;
                    got.map_err(Error::nbd(reading(part.start, length as usize)))
                }));
                let mut parts = parts.await?.into_iter();
                let mut buffer = buffer();
                chunk.fill(&mut buffer, |_, place| {
                    place.copy_from_slice(&parts.next().unwrap_or_default());
                    Ok(())
                })?;
                Ok(buffer.into())
            }
            Self::Raw(image) => {
                let (image, mut buffer) = (image.clone(), buffer());
                blocking(move || {
                    chunk.fill(&mut buffer, |offset, place| image.read(offset, place))?;
                    Ok(buffer.into())
                })
                .await
            }
        }
    }

    /// Ends the connection, if there is one.
    pub(super) async fn close(self) {
        if let Self::Nbd { client, .. } = self {
            client.disconnect().await;
        }
    }
}

fn reading(offset: u64, length: usize) -> String {
    format!("read {length} bytes at byte {offset}")
}

async fn status(client: &Client, context: &str, range: Range<u64>, set: impl Fn(u64) -> bool) -> Result<Vec<Span>> {
    let length = (range.end - range.start).min(STATUS_BYTES_MAX) as u32;
    let extents = client
        .block_status(context, range.start, length)
        .await
        .map_err(Error::nbd(format!("read the {context} map at byte {}", range.start)))?;
    let span = |flags, offset, length| Span { offset, length, set: set(flags) };
    Ok(extents.into_iter().map(|extent| span(extent.flags, extent.offset, extent.length)).collect())
}
