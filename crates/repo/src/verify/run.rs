//! Verification with keys.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    Damage, VerifyMode, VerifyOptions, VerifyReport,
    ciphertext::{check_frame, check_pack, check_segment, describe},
    impact::Impact,
};
use crate::{
    error::{Error, Result},
    format::ObjectId,
    lease::{condemn, newest_epoch},
    manifest::point::PointRecord,
    pack::{
        Entry, PackInfo,
        read::{decode_record, read_table},
    },
    progress::Progress,
    repository::Repository,
    util::{lock, parallel, reading_threads},
};

/// Packs whose tables are held at once.
const BATCH_PACKS: usize = 256;
/// Longest range of records read at once.
const GROUP_BYTES_MAX: u64 = 4 << 20;

/// What is found to be bad so far.
#[derive(Default)]
pub(crate) struct Bad {
    /// Packs that are missing or useless as a whole.
    pub packs: HashSet<ObjectId>,
    /// Single records, as pack and offset.
    pub records: HashSet<(ObjectId, u32)>,
    /// Objects, for people.
    pub objects: Vec<Damage>,
    /// Condemned packs that are gone: damage only if restore points are.
    pub collected: Vec<Damage>,
}

impl Bad {
    /// Packs that count as lost with all that is in them.
    pub fn packs(packs: HashSet<ObjectId>) -> Self {
        Self { packs, ..Self::default() }
    }
    /// Whether a record can be relied on.
    pub fn is_good(&self, pack: &PackInfo, entry: &Entry) -> bool {
        !self.packs.contains(&pack.id()) && !self.records.contains(&(pack.id(), entry.offset))
    }
    /// Notes what is wrong with an object.
    pub fn object(&mut self, object: impl Into<String>, what: impl Into<String>) {
        self.objects.push(Damage { object: object.into(), what: what.into() });
    }
    /// Nothing of the pack can be read.
    fn useless(&mut self, pack: &PackInfo, error: &Error) {
        self.object(pack.name(), describe(error));
        self.packs.insert(pack.id());
    }
}

struct Run<'a> {
    repo: &'a Repository,
    progress: &'a dyn Progress,
    bad: Mutex<Bad>,
    bytes: AtomicU64,
    chunks: AtomicU64,
    packs_read: AtomicU64,
}

impl Repository {
    /// Verifies the repository, or some restore points; see [`VerifyMode`]. Damage is reported, not an error: an error
    /// means that verification could not go on.
    pub fn verify(&self, options: &VerifyOptions, progress: &dyn Progress) -> Result<VerifyReport> {
        if options.percent.is_some_and(|p| !(1..=100).contains(&p)) {
            return Err(Error::Misuse { what: "a percentage to verify is from 1 to 100".into() });
        }
        if options.mode == VerifyMode::Full && !self.can_restore() {
            return Err(Error::KeyNotHeld { class: "data" });
        }
        self.inner.forget();
        let mut bad = Bad::default();
        let records = self.records_to_verify(options, &mut bad)?;
        let state = self.inner.index.reload()?;
        for (name, error) in &state.unusable {
            bad.object(&**name, describe(error));
        }
        // Opening a segment reads no block.
        self.check_segments(&mut bad)?;
        let mut packs = self.existing_packs(&state.packs(), &mut bad)?;
        if options.points.is_some() {
            let wanted = Impact::new(self, &bad).packs_of(&records)?;
            packs.retain(|p| wanted.contains(&p.id()));
            bad.packs.retain(|id| wanted.contains(id));
            let wanted: HashSet<String> =
                state.packs().values().filter(|p| wanted.contains(&p.id())).map(|p| p.name()).collect();
            bad.objects
                .retain(|d| !d.object.contains('/') || d.object.starts_with("points/") || wanted.contains(&d.object));
        }
        let total = packs.len() as u64;
        let run = Run {
            repo: self,
            progress,
            bad: Mutex::new(bad),
            bytes: AtomicU64::new(0),
            chunks: AtomicU64::new(0),
            packs_read: AtomicU64::new(0),
        };
        if options.mode != VerifyMode::Light {
            sample(&mut packs, options.percent);
            progress.total(packs.iter().map(|p| p.bytes()).sum());
            for batch in packs.chunks(BATCH_PACKS) {
                run.batch(batch, options)?;
            }
        }
        let mut bad = run.bad.into_inner().unwrap_or_else(|e| e.into_inner());
        // What was collected meanwhile is elsewhere now.
        self.inner.index.refresh()?;
        let damaged_points = Impact::new(self, &bad).damaged_points(&records, progress)?;
        self.quarantine(&bad);
        if !damaged_points.is_empty() {
            bad.objects.append(&mut bad.collected);
        }
        bad.objects.sort_by(|a, b| (&a.object, &a.what).cmp(&(&b.object, &b.what)));
        bad.objects.dedup();
        Ok(VerifyReport {
            mode: options.mode,
            points: records.len() as u64,
            packs: total,
            packs_read: run.packs_read.into_inner(),
            chunks_checked: run.chunks.into_inner(),
            bytes_read: run.bytes.into_inner(),
            damaged: bad.objects,
            damaged_points,
        })
    }

    /// Makes the next backups store anew what damaged packs hold. Where this may not be written, damage is only reported.
    fn quarantine(&self, bad: &Bad) {
        let packs: HashSet<ObjectId> =
            bad.packs.iter().copied().chain(bad.records.iter().map(|(pack, _)| *pack)).collect();
        if let Err(error) = condemn(&*self.inner.store, &self.inner.ring, &packs, &HashSet::new()) {
            tracing::warn!(%error, "damaged packs could not be marked; the next backup may refer to them");
        }
    }

    fn records_to_verify(&self, options: &VerifyOptions, bad: &mut Bad) -> Result<Vec<Arc<PointRecord>>> {
        let ids = match &options.points {
            Some(ids) => ids.clone(),
            None => {
                let list = self.points()?;
                for (name, error) in &list.unreadable {
                    bad.object(&**name, describe(error));
                }
                list.points.iter().map(|p| p.id).collect()
            }
        };
        let mut records = Vec::with_capacity(ids.len());
        for id in ids {
            match self.record(id) {
                Ok(record) => records.push(record),
                Err(e) if e.is_damage() => bad.object(crate::format::names::point(id), describe(&e)),
                // Deleted since the listing, unless it was asked for by name.
                Err(Error::NoPoint { .. }) if options.points.is_none() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(records)
    }

    /// Every segment by its checksum: opening blocks does not see all of its bytes.
    pub(super) fn check_segments(&self, bad: &mut Bad) -> Result<()> {
        let mut segments = Vec::new();
        self.inner.store.list(crate::format::names::INDEX, &mut |object| {
            segments.push(object);
            Ok(())
        })?;
        for object in &segments {
            match check_segment(&*self.inner.store, object, &()) {
                Ok(_) | Err(Error::Missing { .. }) => {}
                Err(e) if e.is_damage() => bad.object(&*object.name, describe(&e)),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The packs of the index that are there with their length.
    fn existing_packs(&self, packs: &HashMap<ObjectId, Arc<PackInfo>>, bad: &mut Bad) -> Result<Vec<Arc<PackInfo>>> {
        let present = self.inner.pack_lengths()?;
        let condemned = newest_epoch(&*self.inner.store, &self.inner.ring).map(|e| e.condemned).unwrap_or_default();
        let condemned: HashSet<ObjectId> = condemned.into_iter().collect();
        let mut existing = Vec::with_capacity(packs.len());
        for pack in packs.values() {
            let name = pack.name();
            match present.get(&name) {
                Some(bytes) if *bytes == pack.bytes() => existing.push(pack.clone()),
                Some(bytes) => {
                    bad.object(&*name, format!("it has {bytes} bytes, the index says {}", pack.bytes()));
                    // What is in front of the cut can still be good: only reading it tells.
                    if *bytes < pack.bytes() {
                        bad.packs.insert(pack.id());
                    }
                }
                None => {
                    let missing = Damage { object: name, what: "it is missing".into() };
                    // A condemned pack may be gone, unless a restore point misses what was in it.
                    match condemned.contains(&pack.id()) {
                        true => bad.collected.push(missing),
                        false => bad.objects.push(missing),
                    }
                    bad.packs.insert(pack.id());
                }
            }
        }
        existing.sort_by_key(|p| p.name());
        Ok(existing)
    }
}

/// Keeps a random share.
fn sample(packs: &mut Vec<Arc<PackInfo>>, percent: Option<u8>) {
    let Some(percent) = percent else { return };
    let key: [u8; 32] = crate::crypto::random();
    packs.sort_by_cached_key(|p| *blake3::keyed_hash(&key, &p.id().0).as_bytes());
    packs.truncate((packs.len() * usize::from(percent)).div_ceil(100));
    packs.sort_by_key(|p| p.name());
}

/// Neighbouring records of one pack.
struct Group<'a> {
    pack: &'a PackInfo,
    records: &'a [Entry],
}

impl Run<'_> {
    fn batch(&self, packs: &[Arc<PackInfo>], options: &VerifyOptions) -> Result<()> {
        let threads = reading_threads(&*self.repo.inner.store, options.threads);
        let tables = Mutex::new(Vec::with_capacity(packs.len()));
        parallel(packs, threads, |pack| {
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.packs_read.fetch_add(1, Relaxed);
            match self.pack(pack, options.mode) {
                Ok(None) => Ok(()),
                Ok(Some(table)) => {
                    lock(&tables).push((pack.clone(), table));
                    Ok(())
                }
                // Collected since the listing: what was needed of it is elsewhere.
                Err(Error::Missing { .. }) => {
                    lock(&self.bad).packs.insert(pack.id());
                    Ok(())
                }
                Err(e) if e.is_damage() => {
                    let mut bad = lock(&self.bad);
                    bad.object(pack.name(), describe(&e));
                    Ok(())
                }
                Err(e) => Err(e),
            }
        })?;
        let tables = tables.into_inner().unwrap_or_else(|e| e.into_inner());
        let groups: Vec<Group<'_>> = tables.iter().flat_map(|(pack, table)| groups(pack, table)).collect();
        parallel(&groups, threads, |group| self.group(group))
    }

    /// The pack as a whole; its table if its records must be decoded.
    fn pack(&self, pack: &Arc<PackInfo>, mode: VerifyMode) -> Result<Option<Vec<Entry>>> {
        let (store, ring) = (&*self.repo.inner.store, &self.repo.inner.ring);
        let frame = check_frame(store, pack);
        if let Err(e @ Error::Missing { .. }) = frame {
            return Err(e);
        }
        if mode == VerifyMode::Ciphertext {
            self.bytes.fetch_add(pack.bytes(), Relaxed);
            match frame.and_then(|()| check_pack(store, &pack.name(), pack.bytes(), self.progress)) {
                Ok(_) => return Ok(None),
                Err(e) if e.is_damage() => lock(&self.bad).object(pack.name(), describe(&e)),
                Err(e) => return Err(e),
            }
        } else if let Err(e) = frame {
            if !e.is_damage() {
                return Err(e);
            }
            lock(&self.bad).object(pack.name(), describe(&e));
        }
        // The index knows where the records are even if the pack's own table does not.
        match read_table(store, ring, pack) {
            Ok(table) => Ok(Some(table)),
            Err(e) if e.is_damage() => {
                lock(&self.bad).object(pack.name(), describe(&e));
                self.repo.inner.index.records_of(&pack.id()).map(Some)
            }
            Err(e) => Err(e),
        }
    }

    fn group(&self, group: &Group<'_>) -> Result<()> {
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let (inner, pack) = (&*self.repo.inner, group.pack);
        let (Some(first), Some(last)) = (group.records.first(), group.records.last()) else { return Ok(()) };
        let begin = u64::from(first.offset);
        let len = u64::from(last.offset) + u64::from(last.stored) - begin;
        let sealer = match inner.sealer(pack) {
            Ok(sealer) => sealer,
            // Without the data key every record of a pack that failed its checksum is suspect.
            Err(Error::KeyNotHeld { .. }) => {
                lock(&self.bad).packs.insert(pack.id());
                return Ok(());
            }
            Err(e) if e.is_damage() => {
                lock(&self.bad).useless(pack, &e);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let mut sealed = match inner.store.get_range(&pack.name(), begin, len as usize) {
            Ok(sealed) => sealed,
            Err(e) if e.is_damage() => {
                lock(&self.bad).useless(pack, &e);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.bytes.fetch_add(len, Relaxed);
        let mut plain = Vec::new();
        for entry in group.records {
            let at = (u64::from(entry.offset) - begin) as usize;
            let record = &mut sealed[at..at + entry.stored as usize];
            self.chunks.fetch_add(1, Relaxed);
            if let Err(e) = decode_record(&inner.ring, &pack.header, &sealer, entry, record, &mut plain) {
                let mut bad = lock(&self.bad);
                bad.object(pack.name(), format!("the record at byte {}: {}", entry.offset, e.0));
                bad.records.insert((pack.id(), entry.offset));
            }
        }
        self.progress.advance(len);
        Ok(())
    }
}

fn groups<'a>(pack: &'a PackInfo, table: &'a [Entry]) -> Vec<Group<'a>> {
    let mut groups = Vec::new();
    let mut begin = 0;
    for end in 1..=table.len() {
        let next_end = table.get(end).map(|e| u64::from(e.offset) + u64::from(e.stored));
        if next_end.is_none_or(|e| e - u64::from(table[begin].offset) > GROUP_BYTES_MAX) {
            groups.push(Group { pack, records: &table[begin..end] });
            begin = end;
        }
    }
    groups
}
