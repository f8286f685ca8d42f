//! Copying restore points to another repository: incremental, resumable, in bounded memory.
//!
//! ```text
//! a point that is not there yet ─► a copied neighbour of the same VM? ─► compare the two trees of pages
//!   ─► read only chunks that differ, on many threads ─► hash, store and index under the other's keys ─► publish
//! ```
//! Each point is a run of its own on the other side: what was copied before an interruption is there, and chunks that an
//! unfinished point stored are found again by their content.

use std::{cmp::Reverse, collections::HashMap, io, sync::OnceLock};

use jiff::Timestamp;
use serde::Serialize;
use virtward_model::{CopiedFrom, DiskRecord, PointId, RestorePoint};

use super::{Meter, by_origin, check_pair, origin};
use crate::{
    error::{Error, Result},
    format::ChunkId,
    manifest::{Ref, diff::Change},
    progress::Progress,
    reader::{RestoreOptions, Sink},
    repository::Repository,
    writer::{Census, DiskSpec, DiskWriter, Writer, WriterOptions},
};

/// A restore point that was copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CopiedPoint {
    /// Identity, the same on both sides.
    pub id: PointId,
    /// VM.
    pub vm: String,
    /// The instant that it holds.
    pub taken: Timestamp,
    /// Copied neighbour against which changes were told; `None` if all data was read.
    pub base: Option<PointId>,
    /// Bytes read from this repository's disks.
    pub read_bytes: u64,
    /// Bytes added to the other repository for the disks.
    pub stored_bytes: u64,
}

/// What a copy did.
#[derive(Clone, Debug, Default)]
pub struct CopyReport {
    /// Points copied now, in order.
    pub copied: Vec<CopiedPoint>,
    /// Points that were there already.
    pub present: Vec<PointId>,
    /// Points that could not be copied, because they are damaged or gone.
    pub failed: Vec<(PointId, Error)>,
}

pub(super) struct Sending<'a> {
    from: &'a Repository,
    to: &'a Repository,
    options: &'a WriterOptions,
    meter: Meter<'a>,
    /// All points of the source.
    pub(super) points: Vec<RestorePoint>,
    /// Whether what is copied takes the place of a damaged object.
    mends: bool,
    /// Points of the destination.
    there: HashMap<CopiedFrom, RestorePoint>,
    /// Packs of the destination.
    census: Census,
}

impl Repository {
    /// Copies restore points to another repository, oldest first; `each` is told of every one as it is published. A
    /// point that is damaged here does not stop the others; a failure of the destination does.
    pub fn copy_points(
        &self,
        to: &Repository,
        ids: &[PointId],
        options: &WriterOptions,
        progress: &dyn Progress,
        each: &mut dyn FnMut(&CopiedPoint),
    ) -> Result<CopyReport> {
        check_pair(self, to, self)?;
        let mut send = Sending::new(self, to, options, progress)?;
        let mut report = CopyReport::default();
        let (wanted, missing): (Vec<PointId>, _) =
            ids.iter().partition(|id| send.points.iter().any(|point| point.id == **id));
        report.failed.extend(missing.into_iter().map(|id| (id, self.point(id).err().unwrap_or(Error::NoPoint { id }))));
        let in_order: Vec<PointId> =
            send.points.iter().map(|point| point.id).filter(|id| wanted.contains(id)).collect();
        for id in in_order {
            match send.point(id) {
                Ok(Some(copied)) => {
                    each(&copied);
                    report.copied.push(copied);
                }
                Ok(None) => report.present.push(id),
                Err(e @ (Error::Damaged { .. } | Error::Missing { .. } | Error::NoPoint { .. })) => {
                    report.failed.push((id, e));
                }
                // Another copy at the same moment got there first, or something that cannot be read has its name.
                Err(e @ Error::AlreadyExists { .. }) => match to.point(id) {
                    Ok(_) => report.present.push(id),
                    Err(_) => report.failed.push((id, e)),
                },
                Err(e) => return Err(e),
            }
        }
        Ok(report)
    }
}

impl<'a> Sending<'a> {
    pub(super) fn new(
        from: &'a Repository,
        to: &'a Repository,
        options: &'a WriterOptions,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let (points, there) = (from.points()?.points, by_origin(to)?);
        Ok(Self {
            from,
            to,
            options,
            meter: Meter::new(progress),
            mends: false,
            points,
            there,
            census: Census::default(),
        })
    }

    /// Copies one point over a damaged object of its; whether that was done.
    pub(super) fn mend(&mut self, id: PointId) -> Result<bool> {
        self.mends = true;
        self.point(id).map(|copied| copied.is_some())
    }

    /// Copies one point; `None` if it is there.
    fn point(&mut self, id: PointId) -> Result<Option<CopiedPoint>> {
        self.meter.status()?;
        let point = self.from.point(id)?;
        let origin = origin(self.from, &point);
        if self.there.contains_key(&origin) {
            return Ok(None);
        }
        let before = self.meter.done();
        let writer = self.to.writer_after(self.options.clone(), &mut self.census)?;
        let (mut disks, mut bases) = (Vec::with_capacity(point.disks.len()), Vec::new());
        for disk in &point.disks {
            let (copy, base) = self.disk(&writer, &point, disk)?;
            disks.push(copy);
            bases.push(base);
        }
        let attachments = self.from.attachments(id)?;
        let came_home = origin.repository == self.to.id();
        let copy = RestorePoint { disks, copied_from: (!came_home).then(|| origin.clone()), ..point };
        writer.publish_or_mend(copy.clone(), attachments, self.mends)?;
        let copied = CopiedPoint {
            id,
            vm: copy.vm.clone(),
            taken: copy.taken,
            base: bases.into_iter().flatten().next(),
            read_bytes: self.meter.done() - before,
            stored_bytes: copy.disks.iter().map(|disk| disk.stored_bytes).sum(),
        };
        self.there.insert(origin, copy);
        Ok(Some(copied))
    }

    /// The disk of the nearest point in time that both sides have: here and there, and the point.
    fn base_of(&self, point: &RestorePoint, disk: &DiskRecord) -> Option<(DiskRecord, DiskRecord, PointId)> {
        let fits = |other: &&DiskRecord| other.target == disk.target && other.chunk_bytes == disk.chunk_bytes;
        let pair = |other: &RestorePoint| {
            let there = self.there.get(&origin(self.from, other))?;
            let (here, there) = (other.disks.iter().find(fits)?, there.disks.iter().find(fits)?);
            // Copies of one point have disks of one size; anything else is no copy of it.
            (here.size_bytes == there.size_bytes).then(|| (here.clone(), there.clone(), other.id))
        };
        let mut same_vm: Vec<&RestorePoint> =
            self.points.iter().filter(|other| other.vm_uuid == point.vm_uuid && other.vm == point.vm).collect();
        same_vm.sort_by_key(|other| {
            let apart = other.taken.as_second().abs_diff(point.taken.as_second());
            (apart, Reverse((other.taken, other.id)))
        });
        same_vm.into_iter().find_map(pair)
    }

    fn disk(&self, writer: &Writer, point: &RestorePoint, disk: &DiskRecord) -> Result<(DiskRecord, Option<PointId>)> {
        let spec = |base| DiskSpec { size_bytes: disk.size_bytes, chunk_bytes: disk.chunk_bytes, base };
        let mut reader = self.from.disk(disk)?;
        let mut base = None;
        let mut out = None;
        if let Some((here, there, id)) = self.base_of(point, disk) {
            match writer.disk(spec(Some(there))) {
                Ok(disk_writer) => {
                    reader.since(&here, disk)?;
                    (base, out) = (Some(id), Some(disk_writer));
                }
                // Gone or damaged over there: everything is read, and what is there is found by its content.
                Err(Error::BadBase { why }) => tracing::info!(%why, "the copied neighbour cannot serve as a base"),
                Err(e) => return Err(e),
            }
        }
        let out = match out {
            Some(out) => out,
            None => writer.disk(spec(None))?,
        };
        reader.zeroed(&mut |index| out.put_zero(index, 1))?;
        self.data(&reader, &out)?;
        let result = out.finish()?;
        let mut copy = DiskRecord {
            root: result.root,
            new_bytes: result.new_bytes,
            stored_bytes: result.stored_bytes,
            data_bytes: result.data_bytes,
            ..disk.clone()
        };
        // The bitmap belongs to the repository that the point was made in.
        copy.tracking.checkpoint = None;
        Ok((copy, base))
    }

    /// Passes every chunk that is to be copied on.
    fn data(&self, reader: &crate::DiskReader, out: &DiskWriter) -> Result<()> {
        let sink = Onward { out, refused: OnceLock::new() };
        let options =
            RestoreOptions { threads: self.options.threads, progress: Some(&self.meter), ..RestoreOptions::default() };
        let copied = reader.copy_into(&sink, &options);
        match sink.refused.into_inner() {
            Some(e) => Err(e),
            None => copied.map(drop),
        }
    }
}

/// The disk over there. Chunks get the layers that they have here, so that later increments and mending find them alike.
struct Onward<'a> {
    out: &'a DiskWriter,
    refused: OnceLock<Error>,
}

impl Sink for Onward<'_> {
    fn chunk(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let index = offset / u64::from(self.out.chunk_bytes());
        let mut chunk = self.out.buffer(index);
        chunk.clear();
        chunk.extend_from_slice(bytes);
        self.out.put_short(index, chunk).map_err(|e| {
            let _ = self.refused.set(e);
            io::Error::other("the destination failed")
        })
    }

    fn layers(&self, change: &Change, read: &dyn Fn(&ChunkId) -> Result<Vec<u8>>) -> Result<bool> {
        let new = change.now.iter().flat_map(Ref::layers).skip(change.kept);
        let layers = new.map(read).collect::<Result<Vec<_>>>()?;
        match self.out.put_layers(change.index, change.kept, layers) {
            Ok(()) => Ok(true),
            Err(e) => {
                let _ = self.refused.set(e.clone());
                Err(e)
            }
        }
    }
}
