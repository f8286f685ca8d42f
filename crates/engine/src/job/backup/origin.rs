//! Where a disk's bytes come from: an NBD export, or a raw image that is read directly.
//!
//! Offers both in one way: what is there to read, and the bytes of a chunk. Not here: which chunks are read, how many at
//! once, and at what pace (`copy`).

use std::{ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
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
    pub parts: Vec<Range<u64>>,
}

impl ChunkRead {
    pub(super) fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.end - part.start).sum()
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
            Self::Nbd { client, .. } => Ok(receive(client, &chunk, buffer()).await?.into()),
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

/// Reads a chunk from an export into a buffer of its length: each part is received in its place.
async fn receive(client: &Client, chunk: &ChunkRead, buffer: Vec<u8>) -> Result<Vec<u8>> {
    let clear = |mut gap: BytesMut| {
        gap.fill(0);
        gap
    };
    let mut rest = Bytes::from(buffer).try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    let mut done = chunk.start;
    let mut places = Vec::with_capacity(chunk.parts.len());
    for part in &chunk.parts {
        let gap = clear(rest.split_to((part.start - done) as usize));
        let place = rest.split_to((part.end - part.start) as usize);
        done = part.end;
        places.push(async move {
            let length = place.len();
            let got = client.read_into(part.start, length as u32, place).await;
            Ok::<_, Error>((gap, got.map_err(Error::nbd(reading(part.start, length)))?))
        });
    }
    let rest = clear(rest);
    // Neighbours in memory are joined without copying.
    let mut whole = BytesMut::new();
    for (gap, part) in try_join_all(places).await? {
        whole.unsplit(gap);
        whole.unsplit(part);
    }
    whole.unsplit(rest);
    Ok(Vec::from(whole))
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
