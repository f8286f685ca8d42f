//! What damage means: from bad packs and records to restore points, disks and byte ranges.
//!
//! Pages that restore points share are walked once: a page below which all is well is remembered.

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, Mutex},
};

use virtward_model::DiskRecord;

use super::{DamagedDisk, DamagedPoint, run::Bad};
use crate::{
    error::{Error, Result},
    format::{ChunkId, ObjectId},
    manifest::{FANOUT, Page, Ref, Tree, page::span, point::PointRecord, tree::Pages},
    progress::Progress,
    repository::Repository,
    util::{lock, parallel_map, reading_threads},
};

/// Finds what is lost if everything in some packs and records is.
pub(crate) struct Impact<'a> {
    repo: &'a Repository,
    bad: &'a Bad,
    clean: Mutex<HashSet<(ChunkId, u8)>>,
}

impl<'a> Impact<'a> {
    /// Of a repository whose index is up to date.
    pub fn new(repo: &'a Repository, bad: &'a Bad) -> Self {
        Self { repo, bad, clean: Mutex::default() }
    }

    /// The restore points that have lost something, in the order of the records.
    pub fn damaged_points(&self, records: &[Arc<PointRecord>], progress: &dyn Progress) -> Result<Vec<DamagedPoint>> {
        let numbered: Vec<(usize, &PointRecord)> = records.iter().map(|record| &**record).enumerate().collect();
        let threads = reading_threads(&*self.repo.inner.store, 0);
        let mut damaged = parallel_map(&numbered, threads, |(number, record)| {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            Ok(self.damaged_point(record)?.map(|point| (*number, point)))
        })?;
        damaged.sort_by_key(|(number, _)| *number);
        Ok(damaged.into_iter().map(|(_, point)| point).collect())
    }

    fn damaged_point(&self, record: &PointRecord) -> Result<Option<DamagedPoint>> {
        let point = &record.point;
        let mut disks = Vec::new();
        for disk in &point.disks {
            let ranges = self.disk(disk)?;
            if !ranges.is_empty() {
                disks.push(DamagedDisk { target: disk.target.clone(), ranges });
            }
        }
        let mut attachments = false;
        for chunk in &record.attachments.chunks {
            attachments |= !self.is_there(chunk)?;
        }
        let damaged = DamagedPoint { id: point.id, vm: point.vm.clone(), taken: point.taken, disks, attachments };
        Ok((damaged.attachments || !damaged.disks.is_empty()).then_some(damaged))
    }

    /// Whether a chunk or page has a place that is not bad.
    pub fn is_there(&self, id: &ChunkId) -> Result<bool> {
        Ok(self.repo.inner.index.search(id, &|pack, entry| self.bad.is_good(pack, entry))?.is_some())
    }

    /// The byte ranges of a disk that are lost, in order.
    pub fn disk(&self, disk: &DiskRecord) -> Result<Vec<Range<u64>>> {
        let tree = match Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes) {
            Ok(tree) => tree,
            Err(_) => return Ok(std::iter::once(0..disk.size_bytes).collect()),
        };
        let Some(root) = tree.root else { return Ok(Vec::new()) };
        let mut lost = Vec::new();
        self.page(&root, tree.level(), 0, tree.chunks, &mut lost)?;
        let bytes = |chunk: u64| (chunk * u64::from(disk.chunk_bytes)).min(disk.size_bytes);
        Ok(lost.into_iter().map(|r| bytes(r.start)..bytes(r.end)).collect())
    }

    /// Appends the chunks that are lost below a page.
    fn page(&self, id: &ChunkId, level: u8, node: u64, end: u64, lost: &mut Vec<Range<u64>>) -> Result<()> {
        if lock(&self.clean).contains(&(*id, level)) {
            return Ok(());
        }
        let whole = node * span(level)..((node + 1) * span(level)).min(end);
        let page = match self.read_page(id, level)? {
            Some(page) => page,
            None => {
                push(lost, whole);
                return Ok(());
            }
        };
        let before = (lost.len(), lost.last().map(|r| r.end));
        for (place, r) in page.refs.iter().enumerate() {
            let child = node * FANOUT + place as u64;
            let first = child * span(level) / FANOUT;
            let Some(r) = r.as_ref().filter(|_| first < end) else { continue };
            if level > 0 {
                self.page(&r.id, level - 1, child, end, lost)?;
                continue;
            }
            for layer in r.layers() {
                if !self.is_there(layer)? {
                    push(lost, child..child + 1);
                    break;
                }
            }
        }
        if before == (lost.len(), lost.last().map(|r| r.end)) {
            lock(&self.clean).insert((*id, level));
        }
        Ok(())
    }

    fn read_page(&self, id: &ChunkId, level: u8) -> Result<Option<Arc<Page>>> {
        if !self.is_there(id)? {
            return Ok(None);
        }
        match self.repo.inner.page(id, level) {
            Ok(page) => Ok(Some(page)),
            Err(e) if e.is_damage() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The packs that restore points refer to, as far as their pages can be read.
    pub fn packs_of(&self, records: &[Arc<PointRecord>]) -> Result<HashSet<ObjectId>> {
        let (mut packs, mut seen) = (HashSet::new(), HashSet::new());
        let mut todo: Vec<(ChunkId, Option<u8>)> = Vec::new();
        for record in records {
            todo.extend(record.attachments.chunks.iter().map(|id| (*id, None)));
            for disk in &record.point.disks {
                if let Ok(tree @ Tree { root: Some(root), .. }) =
                    Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes)
                {
                    todo.push((root, Some(tree.level())));
                }
            }
        }
        while let Some((id, level)) = todo.pop() {
            if !seen.insert((id, level)) {
                continue;
            }
            if let Some(place) = self.repo.inner.index.search(&id, &|_, _| true)? {
                packs.insert(place.pack.id());
            }
            let Some(level) = level else { continue };
            if let Some(page) = self.read_page(&id, level)? {
                let below = page.refs.iter().flatten().flat_map(Ref::layers);
                todo.extend(below.map(|id| (*id, level.checked_sub(1))));
            }
        }
        Ok(packs)
    }
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
