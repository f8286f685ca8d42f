//! Mending a repository: what restore points have lost is stored anew, from a copy of the points in another repository.
//!
//! ```text
//! lease ─► packs that are lost or condemned ─► which points lost what ─► their copies in the mirror ─► read, hash
//!   ─► is it the chunk that the point names? ─► store in a new pack ─► settle ─► what is still lost?
//! ```
//! Restore points are not touched: they name content, and content that is stored again is found where it is now. Nothing
//! is believed because the mirror says so: a chunk counts only if it hashes to the id that was lost, a page that was lost
//! only if the page made again from the mirror's content has its id.
//! A restore point whose own object is damaged is copied back, the object last.
//! Not here: finding damage (`verify` condemns what it finds).

use std::{collections::HashSet, sync::Arc};

use serde::Serialize;
use virtward_model::{DiskRecord, PointId, RestorePoint};

use super::{Meter, by_origin, check_pair, origin, send::Sending};
use crate::{
    error::{Error, Result},
    format::{ChunkId, names},
    manifest::{
        FANOUT, Page, Ref, Tree,
        page::{LEVELS_MAX, span},
        point::{ATTACHMENT_CHUNK_BYTES, PointRecord, encode_attachments},
        tree::Pages,
    },
    pack::codec::{Compressor, is_zero},
    progress::Progress,
    repository::Repository,
    verify::{Bad, DamagedPoint, Impact},
    writer::{Writer, WriterOptions},
};

/// What healing did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HealReport {
    /// Chunks and pages that were stored anew.
    pub stored: u64,
    /// Bytes of them, before compression.
    pub stored_bytes: u64,
    /// Restore points that had losses, or were damaged themselves, and are whole again.
    pub healed: Vec<PointId>,
    /// Restore points that still have losses, and which.
    pub damaged_points: Vec<DamagedPoint>,
    /// Of these, restore points that the mirror has no copy of.
    pub without_copy: Vec<PointId>,
    /// Restore points whose own object is damaged, and that the mirror has no whole copy of.
    pub unreadable: Vec<String>,
}

impl Repository {
    /// Stores anew what restore points have lost, as far as this repository or the mirror still has it. Knows of packs
    /// that are gone or cut, and of those in which an earlier [`Repository::verify`] found damage.
    pub fn heal_from(
        &self,
        mirror: &Repository,
        options: &WriterOptions,
        progress: &dyn Progress,
    ) -> Result<HealReport> {
        check_pair(self, mirror, mirror)?;
        let writer = self.writer(options.clone())?;
        self.inner.forget();
        let bad = Bad::packs(writer.avoided());
        let list = self.points()?;
        let report = HealReport::default();
        let records = list.points.iter().map(|point| self.record(point.id)).collect::<Result<Vec<_>>>()?;
        let damaged = Impact::new(self, &bad).damaged_points(&records, progress)?;
        let copies = by_origin(mirror)?;
        let mut mender = Mender {
            repo: self,
            mirror,
            writer: &writer,
            bad: &bad,
            compressor: Compressor::new(options.compression),
            done: HashSet::new(),
            meter: Meter::new(progress),
            report,
        };
        let ranges = damaged.iter().flat_map(|point| &point.disks).flat_map(|disk| &disk.ranges);
        mender.meter.total(ranges.map(|range| range.end - range.start).sum());
        for loss in &damaged {
            let Some(record) = records.iter().find(|record| record.point.id == loss.id) else { continue };
            let copy = copies.get(&origin(self, &record.point));
            mender.point(record, loss, copy)?;
        }
        let mut report = mender.report;
        writer.settle()?;
        self.inner.index.refresh()?;
        report.damaged_points = Impact::new(self, &bad).damaged_points(&records, progress)?;
        let still = |id: PointId| report.damaged_points.iter().any(|point| point.id == id);
        report.healed = damaged.iter().map(|point| point.id).filter(|id| !still(*id)).collect();
        let without_copy =
            |id: &PointId| records.iter().any(|r| r.point.id == *id && !copies.contains_key(&origin(self, &r.point)));
        report.without_copy = report.damaged_points.iter().map(|point| point.id).filter(without_copy).collect();
        self.bring_back(mirror, list.unreadable, &mut report, options, progress)?;
        Ok(report)
    }

    /// Copies restore points back whose own objects are damaged.
    fn bring_back(
        &self,
        mirror: &Repository,
        unreadable: Vec<(String, Error)>,
        report: &mut HealReport,
        options: &WriterOptions,
        progress: &dyn Progress,
    ) -> Result<()> {
        if unreadable.is_empty() {
            return Ok(());
        }
        let mut send = Sending::new(mirror, self, options, progress)?;
        for (name, error) in unreadable {
            let id = names::leaf(&name).parse::<PointId>().ok();
            // A copy has its original's id, whichever of the two this one is.
            let id = id.filter(|id| error.is_damage() && send.points.iter().any(|point| point.id == *id));
            let mended = match id.map(|id| send.mend(id)) {
                Some(Err(e)) if e.is_damage() || matches!(e, Error::AlreadyExists { .. }) => false,
                Some(outcome) => outcome?,
                None => false,
            };
            match id {
                Some(id) if mended => report.healed.push(id),
                _ => report.unreadable.push(name),
            }
        }
        Ok(())
    }
}

struct Mender<'a> {
    repo: &'a Repository,
    mirror: &'a Repository,
    writer: &'a Writer,
    bad: &'a Bad,
    compressor: Compressor,
    /// Pages that were looked after, with their level; points share most of them.
    done: HashSet<(ChunkId, u8)>,
    meter: Meter<'a>,
    report: HealReport,
}

/// A damaged disk and its copy.
struct Place<'a> {
    disk: &'a DiskRecord,
    tree: Tree,
    copy: Option<Tree>,
}

impl Place<'_> {
    fn room(&self, index: u64) -> usize {
        let begin = index.saturating_mul(self.disk.chunk_bytes.into());
        self.disk.size_bytes.saturating_sub(begin).min(self.disk.chunk_bytes.into()) as usize
    }
}

/// Damage is an answer here, anything else a failure.
fn unless_damaged<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_damage() || matches!(e, Error::KeyNotHeld { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

impl Mender<'_> {
    fn point(&mut self, record: &Arc<PointRecord>, loss: &DamagedPoint, copy: Option<&RestorePoint>) -> Result<()> {
        for disk in record.point.disks.iter().filter(|disk| loss.disks.iter().any(|lost| lost.target == disk.target)) {
            let Some(tree) = unless_damaged(Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes))? else {
                continue;
            };
            let twin = copy.and_then(|copy| copy.disks.iter().find(|other| other.target == disk.target));
            let twin = twin.filter(|t| t.size_bytes == disk.size_bytes && t.chunk_bytes == disk.chunk_bytes);
            let twin = twin.map(|t| Tree::parse(&t.root, t.size_bytes, t.chunk_bytes)).transpose()?;
            let Some(root) = tree.root else { continue };
            self.page(&Place { disk, tree, copy: twin }, &root, tree.level(), 0)?;
        }
        if loss.attachments { self.attachments(record, copy) } else { Ok(()) }
    }

    fn is_good(&self, id: &ChunkId) -> Result<bool> {
        Impact::new(self.repo, self.bad).is_there(id)
    }

    /// Looks after a page and all below it.
    fn page(&mut self, place: &Place<'_>, id: &ChunkId, level: u8, node: u64) -> Result<()> {
        self.meter.status()?;
        if !self.done.insert((*id, level)) {
            return Ok(());
        }
        // A pack in which something is damaged may still give out this page.
        let Some(page) = unless_damaged(self.repo.inner.page(id, level))? else {
            return self.lost_page(place, id, level, node);
        };
        if !self.is_good(id)? {
            self.store_page(&page)?;
        }
        for (child, r) in page.refs.iter().enumerate() {
            let number = node * FANOUT + child as u64;
            match r {
                Some(r) if level > 0 && number * span(level - 1) < place.tree.chunks => {
                    self.page(place, &r.id, level - 1, number)?;
                }
                Some(r) if level == 0 && number < place.tree.chunks => {
                    for (layer, id) in r.layers().enumerate() {
                        if !self.is_good(id)? {
                            self.chunk(place, id, number, layer)?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn store_page(&mut self, page: &Page) -> Result<Ref> {
        let r = self.writer.store_page(page)?;
        self.report.stored += 1;
        self.report.stored_bytes += page.encode().len() as u64;
        Ok(r)
    }

    fn store_chunk(&mut self, plain: &[u8]) -> Result<ChunkId> {
        let id = self.writer.store_chunk(plain, &mut self.compressor)?;
        self.report.stored += 1;
        self.report.stored_bytes += plain.len() as u64;
        Ok(id)
    }

    /// The mirror's layers of a chunk, none if it is zero; `None` if it cannot tell.
    fn layers_there(&self, place: &Place<'_>, index: u64) -> Result<Option<Vec<ChunkId>>> {
        let Some(copy) = &place.copy else { return Ok(None) };
        let r = unless_damaged(copy.chunk(&*self.mirror.inner, index))?;
        Ok(r.map(|r| r.iter().flat_map(Ref::layers).copied().collect()))
    }

    fn read_there(&self, id: &ChunkId) -> Result<Option<Vec<u8>>> {
        unless_damaged(self.mirror.inner.read_record(id))
    }

    /// A layer of a chunk whose id is known.
    fn chunk(&mut self, place: &Place<'_>, id: &ChunkId, index: u64, layer: usize) -> Result<()> {
        self.meter.status()?;
        let room = place.room(index);
        if layer == 0 {
            self.meter.advance(room as u64);
        }
        if let Some(plain) = unless_damaged(self.repo.inner.read_record(id))? {
            return self.store_chunk(&plain).map(drop);
        }
        let Some(layers) = self.layers_there(place, index)? else { return Ok(()) };
        let read = layers.get(layer).map(|id| self.read_there(id)).unwrap_or(Ok(Some(Vec::new())))?;
        let Some(mut plain) = read else { return Ok(()) };
        // Around a change of the disk's size the same bytes may be stored with more or less of the zeros that follow.
        let listed = self.repo.inner.index.lookup(id, &|_, _| true)?.map(|place| place.entry.plain as usize);
        for len in [Some(plain.len()), listed, Some(room)].into_iter().flatten() {
            plain.resize(len, 0);
            if self.repo.inner.ring.chunk_id(&plain) == *id {
                return self.store_chunk(&plain).map(drop);
            }
        }
        Ok(())
    }

    /// A page that nothing is left of: made again from the content below it.
    fn lost_page(&mut self, place: &Place<'_>, id: &ChunkId, level: u8, node: u64) -> Result<()> {
        if place.copy.is_none() || level >= LEVELS_MAX {
            return Ok(());
        }
        let Some(page) = self.rebuild(place, level, node)? else { return Ok(()) };
        if self.repo.inner.ring.page_id(&page.encode()) == *id {
            self.store_page(&page)?;
        }
        Ok(())
    }

    /// The page that stands for the mirror's content; `None` if that is zero or cannot be read.
    fn rebuild(&mut self, place: &Place<'_>, level: u8, node: u64) -> Result<Option<Page>> {
        let mut refs = Vec::with_capacity(FANOUT as usize);
        for child in node * FANOUT..(node + 1) * FANOUT {
            self.meter.status()?;
            let below = if level > 0 { span(level - 1) } else { 1 };
            if child * below >= place.tree.chunks {
                break;
            }
            if level > 0 {
                let page = self.rebuild(place, level - 1, child)?;
                refs.push(page.map(|page| self.store_page(&page)).transpose()?);
                continue;
            }
            let Some(layers) = self.layers_there(place, child)? else { return Ok(None) };
            let layers: Option<Vec<_>> = layers.iter().map(|id| self.read_there(id)).collect::<Result<_>>()?;
            let Some(mut layers) = layers else { return Ok(None) };
            // A copy has its original's layers, so that what is hashed here is what was hashed then.
            if let [only] = &mut layers[..] {
                only.truncate(place.room(child));
                if is_zero(only) {
                    layers.clear();
                }
            }
            self.meter.advance(layers.first().map_or(0, Vec::len) as u64);
            let ids = layers.iter().map(|layer| self.store_chunk(layer)).collect::<Result<Vec<_>>>()?;
            refs.push(Ref::layered(&ids));
        }
        Ok(Page::new(level, refs))
    }

    fn attachments(&mut self, record: &PointRecord, copy: Option<&RestorePoint>) -> Result<()> {
        let mut stream: Option<Vec<u8>> = None;
        for (number, id) in record.attachments.chunks.iter().enumerate() {
            if self.is_good(id)? {
                continue;
            }
            if let Some(plain) = unless_damaged(self.repo.inner.read_record(id))? {
                self.store_chunk(&plain)?;
                continue;
            }
            if stream.is_none() {
                let read = copy.map(|copy| unless_damaged(self.mirror.attachments(copy.id))).transpose()?;
                stream = Some(read.flatten().map(|attachments| encode_attachments(&attachments)).unwrap_or_default());
            }
            let chunk = stream.iter().flat_map(|stream| stream.chunks(ATTACHMENT_CHUNK_BYTES)).nth(number);
            if let Some(chunk) = chunk.filter(|chunk| self.repo.inner.ring.chunk_id(chunk) == *id).map(<[u8]>::to_vec) {
                self.store_chunk(&chunk)?;
            }
        }
        Ok(())
    }
}
