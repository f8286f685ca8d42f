//! `repo rebuild-index`: the index again from the packs' own tables, whatever became of its segments.
//!
//! ```text
//! list segments ─► list packs ─► read tails and tables ─► put new segments, read them again
//!   ─► put the last one, which replaces all that were listed, read it again ─► delete the listed, readable ones first
//!   ─► compact
//! ```
//! Safe beside writers: a pack is durable before the segment that lists it, so every pack of a listed segment is in the
//! listing of packs, and segments that appear later stay. Packs that a running writer is about to index are then listed
//! twice, which harms nobody; nor do condemned packs that are still there, because every writer knows the epoch that
//! condemns them. Packs that vanish meanwhile are taken out again at the end.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use serde::Serialize;

use super::{
    Index,
    segment::{IndexEntry, encode},
};
use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    lease::newest_epoch,
    pack::{
        Entry, PackInfo,
        read::{read_table, read_tail},
    },
    progress::Progress,
    repository::Repository,
    store::put_new,
    util::{lock, parallel},
    verify::{Damage, describe},
};

/// Packs whose tables are read at once.
const BATCH_PACKS: usize = 64;
/// Entries held before they become a segment: about 150 MiB with its encoding.
const BATCH_ENTRIES: usize = 1 << 20;

/// Outcome of [`Repository::rebuild_index`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct RebuildReport {
    /// Packs that the new index lists.
    pub packs: u64,
    /// Records in them.
    pub chunks: u64,
    /// Index segments at the end.
    pub segments: u64,
    /// Segments that were there before and are gone: readable or not.
    pub replaced: u64,
    /// Packs whose own table is unreadable; their records were taken over from the index that was there.
    pub salvaged: u64,
    /// Packs with unreadable tables. What they hold is lost unless they were salvaged.
    pub damaged: Vec<Damage>,
}

impl RebuildReport {
    /// Whether nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.damaged.is_empty()
    }
}

/// A pack and its records.
type Listed = (Arc<PackInfo>, Vec<Entry>);

/// New segments, as they grow.
struct Growing<'a> {
    repo: &'a Repository,
    origin: (ObjectId, u64),
    packs: Vec<Arc<PackInfo>>,
    entries: Vec<IndexEntry>,
    /// Name, length and BLAKE3 of what was put and not read again.
    put: Vec<(String, u64, blake3::Hash)>,
}

impl Growing<'_> {
    fn add(&mut self, report: &mut RebuildReport, (pack, records): Listed) -> Result<()> {
        let number = self.packs.len() as u32;
        report.packs += 1;
        report.chunks += records.len() as u64;
        self.entries.extend(records.into_iter().map(|entry| IndexEntry { pack: number, entry }));
        self.packs.push(pack);
        if self.entries.len() < BATCH_ENTRIES { Ok(()) } else { self.put(&[]) }
    }

    fn put(&mut self, replaces: &[ObjectId]) -> Result<()> {
        let inner = &self.repo.inner;
        let (packs, entries) = (std::mem::take(&mut self.packs), std::mem::take(&mut self.entries));
        let (id, bytes) = encode(&inner.ring, self.origin, &packs, replaces, entries)?;
        let name = names::segment(&id);
        put_new(&*inner.store, &name, &bytes)?;
        self.put.push((name, bytes.len() as u64, blake3::hash(&bytes)));
        Ok(())
    }

    /// Reads what was put since the last time, and compares.
    fn verify(&mut self) -> Result<()> {
        for (name, bytes, sum) in std::mem::take(&mut self.put) {
            match self.repo.inner.store.get(&name, bytes) {
                Ok(there) if blake3::hash(&there) == sum => {}
                Ok(_) => return Err(Error::damaged(name, "it is not what was just written")),
                // Compacted already, by somebody who read it again too.
                Err(Error::Missing { .. }) if self.is_replaced(&name)? => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn is_replaced(&self, name: &str) -> Result<bool> {
        let state = self.repo.inner.index.refresh()?;
        Ok(state.segments.iter().flat_map(|s| &s.replaces).any(|id| names::segment(id) == name))
    }
}

/// The work that was announced is done; what follows only listens.
struct CancelOnly<'a>(&'a dyn Progress);

impl Progress for CancelOnly<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl Repository {
    /// Makes the index anew from packs alone. Damaged packs are reported, the rest goes on; see [`RebuildReport`].
    pub fn rebuild_index(&self, progress: &dyn Progress) -> Result<RebuildReport> {
        let inner = &self.inner;
        let old = self.listed_segments()?;
        let packs = self.listed_packs()?;
        progress.total(packs.iter().map(|(_, bytes)| bytes).sum());
        let origin = (ObjectId::random(), newest_epoch(&*inner.store, &inner.ring).unwrap_or_default().epoch);
        let mut growing = Growing { repo: self, origin, packs: vec![], entries: vec![], put: vec![] };
        let (mut report, mut unreadable) = (RebuildReport::default(), HashSet::new());
        for batch in packs.chunks(BATCH_PACKS) {
            for (name, outcome) in self.read_tables(batch, progress)? {
                match outcome {
                    Ok(listed) => growing.add(&mut report, listed)?,
                    Err(Error::Missing { .. }) => {} // Deleted since the listing.
                    Err(e) => {
                        report.damaged.push(Damage { object: name.clone(), what: describe(&e) });
                        unreadable.insert(name);
                    }
                }
            }
        }
        for listed in self.salvage(&unreadable)? {
            report.salvaged += 1;
            growing.add(&mut report, listed)?;
        }
        // Only the last one replaces: until it is there, the old index counts as well as the part of the new one.
        growing.verify()?;
        let ids: Vec<ObjectId> = old.iter().filter_map(|name| names::leaf(name).parse().ok()).collect();
        if !growing.packs.is_empty() || !ids.is_empty() {
            growing.put(&ids)?;
        }
        growing.verify()?;
        report.replaced = self.delete_segments(old)?;
        let gone = self.vanished(&packs)?;
        inner.index.reload()?;
        inner.index.compact_all(origin, &gone, &CancelOnly(progress))?;
        report.segments = inner.index.refresh()?.segments.len() as u64;
        report.damaged.sort_by(|a, b| a.object.cmp(&b.object));
        Ok(report)
    }

    fn listed_segments(&self) -> Result<Vec<String>> {
        let mut old = Vec::new();
        self.inner.store.list(names::INDEX, &mut |object| {
            old.push(object.name);
            Ok(())
        })?;
        Ok(old)
    }

    fn listed_packs(&self) -> Result<Vec<(String, u64)>> {
        let mut packs: Vec<_> = self.inner.pack_lengths()?.into_iter().collect();
        packs.sort_unstable();
        Ok(packs)
    }

    /// Tail and table of each pack, or why it has none.
    fn read_tables(&self, packs: &[(String, u64)], progress: &dyn Progress) -> Result<Vec<(String, Result<Listed>)>> {
        let (inner, tables) = (&self.inner, Mutex::new(Vec::with_capacity(packs.len())));
        parallel(packs, 0, |(name, bytes)| {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let read = read_tail(&*inner.store, name, *bytes)
                .and_then(|pack| read_table(&*inner.store, &inner.ring, &pack).map(|table| (Arc::new(pack), table)));
            match read {
                Err(e) if !e.is_damage() => return Err(e),
                read => lock(&tables).push((name.clone(), read)),
            }
            progress.advance(*bytes);
            Ok(())
        })?;
        let mut tables = tables.into_inner().unwrap_or_else(|e| e.into_inner());
        tables.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(tables)
    }

    /// What the index that is there knows of packs whose own tables cannot be read.
    fn salvage(&self, unreadable: &HashSet<String>) -> Result<Vec<Listed>> {
        if unreadable.is_empty() {
            return Ok(Vec::new());
        }
        let index: &Index = &self.inner.index;
        index.reload()?;
        index.with_snapshot(|state| {
            let mut found: HashMap<String, Listed> = HashMap::new();
            for segment in state.segments.iter().chain(&state.replaced) {
                let mut here: HashMap<u32, Listed> = HashMap::new();
                for (number, pack) in (0..).zip(&segment.packs) {
                    let name = pack.name();
                    if unreadable.contains(&name) && !found.contains_key(&name) {
                        here.insert(number, (pack.clone(), Vec::new()));
                    }
                }
                if here.is_empty() {
                    continue;
                }
                let read = index.read_segment(segment, &mut |e| {
                    if let Some((_, records)) = here.get_mut(&e.pack) {
                        records.push(e.entry);
                    }
                });
                match read {
                    Err(Error::Damaged { .. }) => continue,
                    other => other?,
                }
                found.extend(here.into_values().map(|(pack, records)| (pack.name(), (pack, records))));
            }
            let mut found: Vec<_> = found.into_values().collect();
            found.sort_by_key(|(pack, _)| pack.id());
            Ok(found)
        })
    }

    /// Deletes the old segments, those last that nobody could read.
    fn delete_segments(&self, old: Vec<String>) -> Result<u64> {
        let state = self.inner.index.refresh()?;
        let readable: HashSet<&str> = state.segments.iter().chain(&state.replaced).map(|s| &*s.name).collect();
        let (first, last): (Vec<_>, Vec<_>) = old.iter().partition(|name| readable.contains(&***name));
        let mut deleted = 0;
        for name in first.into_iter().chain(last) {
            deleted += u64::from(self.inner.store.delete(name)?);
        }
        Ok(deleted)
    }

    /// Packs that were listed and are no longer there.
    fn vanished(&self, packs: &[(String, u64)]) -> Result<HashSet<ObjectId>> {
        let present = self.inner.pack_lengths()?;
        let gone = packs.iter().filter(|(name, _)| !present.contains_key(name));
        Ok(gone.filter_map(|(name, _)| names::leaf(name).parse().ok()).collect())
    }
}
