//! Restore points of an open repository: list, look up, attachments, and the figures of `repo info`.

use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use serde::Serialize;
use virtward_model::{DiskRecord, PointId, RestorePoint};

use crate::{
    error::{Error, Result},
    format::{envelope::ENVELOPE_BYTES_MAX, names},
    keys::KeyInfo,
    manifest::point::{self, Attachment, PointRecord},
    pack::PackClass,
    repository::Repository,
    util::{lock, opening_threads, parallel},
};

/// All restore points that can be read, and those that cannot.
#[derive(Clone, Debug, Default)]
pub struct PointList {
    /// Sorted by the instant of the cut, oldest first.
    pub points: Vec<RestorePoint>,
    /// Name of the object, and why it cannot be read.
    pub unreadable: Vec<(String, Error)>,
}

/// Figures of a repository.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// Identity.
    pub id: String,
    /// Where it is.
    pub location: String,
    /// Format.
    pub format: u32,
    /// When it was made.
    pub created: Timestamp,
    /// Number of restore points.
    pub points: u64,
    /// Restore points that cannot be read.
    pub unreadable_points: u64,
    /// Number of packs, of data and of metadata.
    pub packs: u64,
    /// Bytes of all objects.
    pub bytes: u64,
    /// Distinct chunks.
    pub chunks: u64,
    /// Bytes of the distinct chunks before compression.
    pub chunk_bytes: u64,
    /// Bytes of the distinct chunks as stored.
    pub chunk_stored_bytes: u64,
    /// Bytes of all disks of all restore points that are not zero.
    pub data_bytes: u64,
    /// `data_bytes / chunk_bytes`: how often the average chunk is used.
    pub dedup_ratio: f64,
    /// `chunk_bytes / chunk_stored_bytes`.
    pub compression_ratio: f64,
    /// Key slots.
    pub keys: Vec<KeyInfo>,
}

/// Restore points looked at one by one before all are listed.
const KNOWN_MAX: usize = 4;

impl Repository {
    /// Every restore point, oldest first.
    pub fn points(&self) -> Result<PointList> {
        let mut listed = Vec::new();
        self.inner.store.list(names::POINTS, &mut |object| {
            listed.push(object.name);
            Ok(())
        })?;
        let list = Mutex::new(PointList::default());
        parallel(&listed, opening_threads(&*self.inner.store, listed.len()), |name| {
            let record = match names::leaf(name).parse() {
                Ok(id) => self.record(id),
                Err(e) => Err(Error::damaged(&**name, format!("its name is not that of a restore point: {e}"))),
            };
            match record {
                Ok(record) => lock(&list).points.push(record.point.clone()),
                Err(Error::NoPoint { .. }) => {} // Deleted since the listing.
                Err(e @ (Error::Io { .. } | Error::PermissionDenied { .. } | Error::Remote { .. })) => return Err(e),
                Err(e) => lock(&list).unreadable.push((name.clone(), e)),
            }
            Ok(())
        })?;
        let mut list = list.into_inner().unwrap_or_else(|e| e.into_inner());
        list.points.sort_by_key(|p| (p.taken, p.id));
        list.unreadable.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(list)
    }

    /// One restore point.
    pub fn point(&self, id: PointId) -> Result<RestorePoint> {
        self.record(id).map(|record| record.point.clone())
    }

    pub(crate) fn record(&self, id: PointId) -> Result<Arc<PointRecord>> {
        if let Some(record) = lock(&self.inner.points).get(&id) {
            return Ok(record.clone());
        }
        let bytes = match self.inner.get_small(&names::point(id)) {
            Err(Error::Missing { .. }) => return Err(Error::NoPoint { id }),
            other => other?,
        };
        let record = Arc::new(point::open(&self.inner.ring, id, &bytes)?);
        lock(&self.inner.points).insert(id, record.clone());
        Ok(record)
    }

    /// A record as the store has it now, whatever local copies say.
    fn record_in_store(&self, id: PointId) -> Result<PointRecord> {
        let (store, name) = (&*self.inner.store, names::point(id));
        let bytes = store.size(&name)?.min(ENVELOPE_BYTES_MAX);
        point::open(&self.inner.ring, id, &store.get_range(&name, 0, bytes as usize)?)
    }

    /// A deleted restore point. [`Error::Missing`] if it is not in the trash.
    pub(crate) fn trashed_record(&self, id: PointId) -> Result<PointRecord> {
        point::open(&self.inner.ring, id, &self.inner.get_small(&names::trash(id))?)
    }

    /// Whether a restore point that is there has a disk with this root. Looked up in the store, not in a cache: this is
    /// what makes it safe to build on the root.
    pub(crate) fn is_live_root(&self, disk: &DiskRecord) -> Result<bool> {
        let has_it = |p: &RestorePoint| p.disks.iter().any(|d| d.root == disk.root && d.size_bytes == disk.size_bytes);
        // Those that had it when they were last read, newest first, tell where to look: mostly one request is enough.
        let mut known: Vec<Arc<PointRecord>> =
            lock(&self.inner.points).values().filter(|record| has_it(&record.point)).cloned().collect();
        known.sort_by_key(|record| std::cmp::Reverse((record.point.taken, record.point.id)));
        for record in known.iter().take(KNOWN_MAX) {
            match self.record_in_store(record.point.id) {
                Ok(record) if has_it(&record.point) => return Ok(true),
                Ok(_) => {}
                Err(e @ (Error::Io { .. } | Error::PermissionDenied { .. } | Error::Remote { .. })) => return Err(e),
                // Gone or damaged; another one may have the disk.
                Err(_) => {}
            }
        }
        Ok(self.points()?.points.iter().any(has_it))
    }

    /// The attachments of a restore point.
    pub fn attachments(&self, id: PointId) -> Result<Vec<Attachment>> {
        let record = self.record(id)?;
        if record.attachments.chunks.is_empty() {
            return Ok(Vec::new());
        }
        let mut stream = Vec::new();
        for chunk in &record.attachments.chunks {
            stream.extend_from_slice(&self.inner.read_record(chunk)?);
        }
        point::decode_attachments(&stream).map_err(|e| e.at(names::point(id)))
    }

    /// The figures of the repository. Reads the whole index.
    pub fn info(&self) -> Result<Info> {
        let list = self.points()?;
        let state = self.inner.index.refresh()?;
        let (chunks, chunk_bytes, chunk_stored_bytes) = self.inner.index.with_snapshot(|state| {
            let (mut chunks, mut chunk_bytes, mut chunk_stored_bytes) = (0, 0, 0);
            for segment in &state.segments {
                self.inner.index.read_segment(segment, &mut |e| {
                    if segment.packs[e.pack as usize].header.class == PackClass::Data {
                        chunks += 1;
                        chunk_bytes += u64::from(e.entry.plain);
                        chunk_stored_bytes += u64::from(e.entry.stored);
                    }
                })?;
            }
            Ok((chunks, chunk_bytes, chunk_stored_bytes))
        })?;
        let mut bytes = 0;
        self.inner.store.list("", &mut |object| {
            bytes += object.bytes;
            Ok(())
        })?;
        let data_bytes = list.points.iter().flat_map(|p| &p.disks).map(|d| d.data_bytes).sum();
        let ratio = |a: u64, b: u64| if b == 0 { 1.0 } else { a as f64 / b as f64 };
        Ok(Info {
            id: self.id(),
            location: self.inner.store.location(),
            format: self.inner.config.format,
            created: self.inner.config.created,
            points: list.points.len() as u64,
            unreadable_points: list.unreadable.len() as u64,
            packs: state.packs().len() as u64,
            bytes,
            chunks,
            chunk_bytes,
            chunk_stored_bytes,
            data_bytes,
            dedup_ratio: ratio(data_bytes, chunk_bytes),
            compression_ratio: ratio(chunk_bytes, chunk_stored_bytes),
            keys: self.list_keys()?,
        })
    }
}
