//! Reading a disk of a restore point: at random, as a list of extents, or all of it in parallel.
//!
//! Every chunk is authenticated, decompressed and hashed again before its bytes are given out.

mod copy;

use std::sync::{Arc, Mutex};

use virtward_model::DiskRecord;

pub(crate) use copy::Sink;
pub use copy::{RestoreOptions, RestoreStats};

use crate::{
    error::{Error, Result},
    manifest::{
        FANOUT, Tree,
        diff::{Change, Since, changed_leaf, leaf_changes},
    },
    repository::Repository,
    util::{Cache, lock},
};

/// Chunks kept decoded for random access, per generation.
const CACHED_CHUNKS: usize = 8;

/// A disk of a restore point, opened for reading.
pub struct DiskReader {
    repo: Repository,
    tree: Tree,
    size_bytes: u64,
    chunk_bytes: u32,
    /// Copying leaves out what was the same then.
    since: Option<Since>,
    chunks: Mutex<Cache<u64, Arc<Vec<u8>>>>,
}

/// Number of a leaf, and what is to be copied of it.
type LeafChunks = (u64, Vec<Change>);

/// A range of a disk that may hold data; everything between extents is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Repository {
    /// Opens a disk of a restore point.
    pub fn disk(&self, disk: &DiskRecord) -> Result<DiskReader> {
        let tree = Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes)?;
        Ok(DiskReader {
            repo: self.clone(),
            tree,
            size_bytes: disk.size_bytes,
            chunk_bytes: disk.chunk_bytes,
            since: None,
            chunks: Mutex::new(Cache::new(CACHED_CHUNKS)),
        })
    }
}

impl DiskReader {
    /// Virtual size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    /// Chunk size in bytes.
    pub fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// Fills `buf` from `offset`; the range must be inside the disk.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size_bytes) {
            let what = format!("{} bytes at {offset} of a disk of {} bytes", buf.len(), self.size_bytes);
            return Err(Error::Misuse { what: format!("read outside the disk: {what}") });
        }
        let chunk_bytes = u64::from(self.chunk_bytes);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let within = (at % chunk_bytes) as usize;
            let len = rest.len().min(chunk_bytes as usize - within);
            let (part, tail) = rest.split_at_mut(len);
            part.fill(0);
            if let Some(chunk) = self.chunk(at / chunk_bytes)? {
                part.copy_from_slice(&chunk[within..within + len]);
            }
            (at, rest) = (at + len as u64, tail);
        }
        Ok(())
    }

    /// The bytes at the place of a chunk; `None` if they are zero.
    fn chunk(&self, index: u64) -> Result<Option<Arc<Vec<u8>>>> {
        if let Some(chunk) = lock(&self.chunks).get(&index) {
            return Ok(Some(chunk));
        }
        let Some(r) = self.tree.chunk(&*self.repo.inner, index)? else { return Ok(None) };
        let chunk = Arc::new(self.repo.inner.read_place(&r, self.room(index))?);
        lock(&self.chunks).insert(index, chunk.clone());
        Ok(Some(chunk))
    }

    /// The ranges that may hold data, in order; neighbours are joined within a page of 256 chunks and beyond.
    pub fn data_extents(&self) -> impl Iterator<Item = Result<Extent>> + '_ {
        Extents { reader: self, next_leaf: 0, queued: Vec::new().into_iter(), joined: None, failed: false }
    }

    /// Makes [`DiskReader::copy_to`] give only chunks that differ from an earlier state with chunks of the same size.
    pub(crate) fn since(&mut self, base: &DiskRecord, disk: &DiskRecord) -> Result<()> {
        self.since = Some(Since::new(base, disk)?);
        Ok(())
    }

    /// The first leaf at or after `from` that has chunks to copy, and these.
    fn next_to_copy(&self, from: u64) -> Result<Option<LeafChunks>> {
        let (pages, tree) = (&*self.repo.inner, &self.tree);
        if let Some(since) = &self.since {
            let Some(leaf) = changed_leaf(pages, tree, since, from)? else { return Ok(None) };
            let changes = leaf_changes(pages, tree, since, leaf)?;
            return Ok(Some((leaf, changes.into_iter().filter(|change| change.now.is_some()).collect())));
        }
        let Some((leaf, page)) = tree.next_leaf(pages, from)? else { return Ok(None) };
        let numbered = (leaf * FANOUT..tree.chunks).zip(&page.refs);
        let chunks = numbered.filter(|(_, r)| r.is_some());
        Ok(Some((leaf, chunks.map(|(index, r)| Change { index, now: r.clone(), kept: 0 }).collect())))
    }

    /// Tells of every chunk that was data in the earlier state and is zero now, and counts the bytes of the others that
    /// changed. Reads pages only.
    pub(crate) fn zeroed(&self, each: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        let Some(since) = &self.since else { return self.data_bytes() };
        let (mut from, mut bytes) = (0, 0);
        while let Some(leaf) = changed_leaf(&*self.repo.inner, &self.tree, since, from)? {
            for change in leaf_changes(&*self.repo.inner, &self.tree, since, leaf)? {
                match change.now {
                    Some(_) => bytes += self.room(change.index) as u64,
                    None => each(change.index)?,
                }
            }
            from = leaf + 1;
        }
        Ok(bytes)
    }

    /// Bytes that the disk has at the place of a chunk.
    fn room(&self, index: u64) -> usize {
        let begin = index.saturating_mul(self.chunk_bytes.into());
        self.size_bytes.saturating_sub(begin).min(self.chunk_bytes.into()) as usize
    }

    /// Bytes of the disk that may be other than zero.
    pub fn data_bytes(&self) -> Result<u64> {
        let chunks = self.tree.data_chunks(&*self.repo.inner)?;
        let mut bytes = chunks * u64::from(self.chunk_bytes);
        if self.tree.chunks > 0 && self.tree.chunk(&*self.repo.inner, self.tree.chunks - 1)?.is_some() {
            bytes -= self.tree.chunks * u64::from(self.chunk_bytes) - self.size_bytes;
        }
        Ok(bytes)
    }
}

struct Extents<'a> {
    reader: &'a DiskReader,
    next_leaf: u64,
    queued: std::vec::IntoIter<u64>,
    joined: Option<Extent>,
    failed: bool,
}

impl Extents<'_> {
    /// The next chunk with data.
    fn next_chunk(&mut self) -> Result<Option<u64>> {
        loop {
            if let Some(index) = self.queued.next() {
                return Ok(Some(index));
            }
            let tree = &self.reader.tree;
            let Some((leaf, page)) = tree.next_leaf(&*self.reader.repo.inner, self.next_leaf)? else { return Ok(None) };
            let indexes = page.refs.iter().enumerate().filter(|(_, r)| r.is_some());
            let indexes = indexes.map(|(place, _)| leaf * FANOUT + place as u64).filter(|i| *i < tree.chunks);
            self.queued = indexes.collect::<Vec<_>>().into_iter();
            self.next_leaf = leaf + 1;
        }
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed {
            match self.next_chunk() {
                Ok(Some(index)) => {
                    let chunk_bytes = u64::from(self.reader.chunk_bytes);
                    let offset = index * chunk_bytes;
                    let bytes = chunk_bytes.min(self.reader.size_bytes - offset);
                    match &mut self.joined {
                        Some(joined) if joined.offset + joined.bytes == offset => joined.bytes += bytes,
                        joined => {
                            if let Some(done) = joined.replace(Extent { offset, bytes }) {
                                return Some(Ok(done));
                            }
                        }
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    self.failed = true;
                    return Some(Err(e));
                }
            }
        }
        self.joined.take().map(Ok)
    }
}
