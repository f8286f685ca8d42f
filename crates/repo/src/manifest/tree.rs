//! Reading a disk's tree of pages.

use std::sync::Arc;

use super::page::{FANOUT, Page, Ref, root_level};
use crate::{
    error::{Error, Result},
    format::{ChunkId, DISK_CHUNKS_MAX, is_chunk_size},
};

/// Where pages come from.
pub trait Pages: Sync {
    /// The page with an id, checked to be of a level.
    fn page(&self, id: &ChunkId, level: u8) -> Result<Arc<Page>>;
}

/// A disk's tree: root and size. Holds no pages.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    /// Root page; `None` if the whole disk is zero.
    pub root: Option<ChunkId>,
    /// Chunks of the disk.
    pub chunks: u64,
}

impl Tree {
    /// From the root as a disk's record spells it, and the disk's size.
    pub fn parse(root: &str, size_bytes: u64, chunk_bytes: u32) -> Result<Self> {
        if !is_chunk_size(chunk_bytes) {
            return Err(Error::Misuse { what: format!("disks have no chunks of {chunk_bytes} bytes") });
        }
        let root = match root {
            "" => None,
            text => {
                Some(text.parse().map_err(|e| Error::Misuse { what: format!("{text:?} is no manifest root: {e}") })?)
            }
        };
        let chunks = size_bytes.div_ceil(u64::from(chunk_bytes));
        if chunks > DISK_CHUNKS_MAX {
            return Err(Error::Misuse {
                what: format!("a disk of {size_bytes} bytes has too many chunks of {chunk_bytes}"),
            });
        }
        Ok(Self { root, chunks })
    }

    /// Level of the root page.
    pub fn level(&self) -> u8 {
        root_level(self.chunks)
    }

    /// The page that holds the references of 256 chunks; `None` if they are all zero.
    pub fn leaf(&self, pages: &dyn Pages, leaf: u64) -> Result<Option<Arc<Page>>> {
        let Some(root) = self.root else { return Ok(None) };
        let mut level = self.level();
        let mut page = pages.page(&root, level)?;
        while level > 0 {
            let place = leaf / FANOUT.pow(u32::from(level) - 1) % FANOUT;
            let Some(child) = page.get(place) else { return Ok(None) };
            level -= 1;
            page = pages.page(&child.id, level)?;
        }
        Ok(Some(page))
    }

    /// What is at the place of a chunk; `None` if it is zero.
    pub fn chunk(&self, pages: &dyn Pages, index: u64) -> Result<Option<Ref>> {
        if index >= self.chunks {
            return Ok(None);
        }
        Ok(self.leaf(pages, index / FANOUT)?.and_then(|page| page.get(index % FANOUT)))
    }

    /// Number of chunks that are not zero.
    pub fn data_chunks(&self, pages: &dyn Pages) -> Result<u64> {
        match &self.root {
            Some(root) => Ok(pages.page(root, self.level())?.chunks()),
            None => Ok(0),
        }
    }

    /// The first leaf page at or after `from`, with its number; zero subtrees are skipped without reading.
    pub fn next_leaf(&self, pages: &dyn Pages, from: u64) -> Result<Option<(u64, Arc<Page>)>> {
        let Some(root) = self.root else { return Ok(None) };
        next_leaf(pages, &root, self.level(), 0, from, self.chunks.div_ceil(FANOUT))
    }
}

/// Below a node: `first` is the number of the node's first leaf.
fn next_leaf(
    pages: &dyn Pages,
    node: &ChunkId,
    level: u8,
    first: u64,
    from: u64,
    end: u64,
) -> Result<Option<(u64, Arc<Page>)>> {
    if level == 0 && first < from {
        return Ok(None);
    }
    let page = pages.page(node, level)?;
    if level == 0 {
        return Ok(Some((first, page)));
    }
    let below = FANOUT.pow(u32::from(level) - 1);
    let begin = from.saturating_sub(first) / below;
    for place in begin..page.refs.len() as u64 {
        let child_first = first + place * below;
        if child_first >= end {
            break;
        }
        let Some(child) = page.get(place) else { continue };
        if let Some(found) = next_leaf(pages, &child.id, level - 1, child_first, from.max(child_first), end)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
