//! Finding what restore points refer to: every page and chunk below them, each page once.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use super::live::LiveSet;
use crate::{
    error::{Error, Result},
    format::ChunkId,
    manifest::{Tree, point::PointRecord, tree::Pages},
    progress::Progress,
    repository::Repository,
    util::{lock, parallel, reading_threads},
};

/// Pages read at once; bounds memory while there is work for all threads.
const BATCH_PAGES: usize = 2048;

/// Marks what records refer to.
pub struct Marker<'a> {
    repo: &'a Repository,
    live: &'a LiveSet,
    threads: usize,
    progress: &'a dyn Progress,
    /// Pages below which all is marked. Whole ids: a page that is skipped by mistake loses what is below it.
    seen: HashSet<ChunkId>,
    /// Chunks and pages that were marked, counting those that several pages refer to several times.
    pub marks: u64,
}

impl<'a> Marker<'a> {
    /// Nothing is marked yet.
    pub fn new(repo: &'a Repository, live: &'a LiveSet, threads: usize, progress: &'a dyn Progress) -> Self {
        let threads = reading_threads(&*repo.inner.store, threads);
        Self { repo, live, threads, progress, seen: HashSet::new(), marks: 0 }
    }

    /// Marks everything below a record. Fails if a page cannot be read: what it refers to is unknown then.
    pub fn mark(&mut self, record: &PointRecord) -> Result<()> {
        self.records(std::iter::once(record))
    }

    /// Marks everything below all records, whose pages are read together: of thousands of small disks each has but one or
    /// two. If a page cannot be read, nothing is marked for certain, and all records are given back.
    pub fn mark_together<'r, I>(&mut self, records: I) -> Result<Vec<&'r PointRecord>>
    where
        I: Iterator<Item = &'r PointRecord> + Clone,
    {
        match self.records(records.clone()) {
            Ok(()) => Ok(Vec::new()),
            Err(e) if e.is_damage() => Ok(records.collect()),
            Err(e) => Err(e),
        }
    }

    fn records<'r>(&mut self, records: impl Iterator<Item = &'r PointRecord>) -> Result<()> {
        let (mut roots, mut attached) = (Vec::new(), 0);
        for record in records {
            record.attachments.chunks.iter().for_each(|chunk| self.live.insert(chunk));
            attached += record.attachments.chunks.len() as u64;
            for disk in &record.point.disks {
                let tree = Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes)?;
                roots.extend(tree.root.map(|root| (root, tree.level())));
            }
        }
        self.marks += self.pages(roots)? + attached;
        Ok(())
    }

    /// The number of marks.
    fn pages(&mut self, mut todo: Vec<(ChunkId, u8)>) -> Result<u64> {
        let mut sum = 0;
        // Joins `seen` at the end only: a failure half-way must not let another record skip pages that were never read.
        let mut queued = HashSet::new();
        todo.retain(|(id, _)| !self.seen.contains(id) && queued.insert(*id));
        while !todo.is_empty() {
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let batch = todo.split_off(todo.len().saturating_sub(BATCH_PAGES));
            let found: Mutex<(Vec<(ChunkId, u8)>, u64)> = Mutex::default();
            parallel(&batch, self.threads, |(id, level)| {
                let page = self.repo.inner.page(id, *level)?;
                self.live.insert(id);
                let below: Vec<ChunkId> = page.refs.iter().flatten().flat_map(|r| r.layers().copied()).collect();
                if *level == 0 {
                    below.iter().for_each(|chunk| self.live.insert(chunk));
                }
                let mut found = lock(&found);
                found.1 += below.len() as u64 + 1;
                if let Some(level) = level.checked_sub(1) {
                    found.0.extend(below.into_iter().map(|page| (page, level)));
                }
                Ok(())
            })?;
            let (mut children, marks) = found.into_inner().unwrap_or_else(|e| e.into_inner());
            sum += marks;
            children.retain(|(id, _)| !self.seen.contains(id) && queued.insert(*id));
            todo.append(&mut children);
        }
        self.seen.extend(queued);
        Ok(sum)
    }
}

/// Records to mark; the second list may be damaged without stopping a collection.
#[derive(Default)]
pub struct Roots {
    /// Restore points.
    pub points: Vec<Arc<PointRecord>>,
    /// Deleted restore points that can still be recovered.
    pub trash: Vec<PointRecord>,
}
