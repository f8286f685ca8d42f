//! Collecting garbage beside any number of writers and other collectors, without a lock.
//!
//! ```text
//! epoch and leases read ─► expired trash removed ─► mark ─► sweep ─► condemn (a new epoch) ─► move what is referenced
//!   out of condemned packs ─► delete packs condemned before every lease that is held, if all that they hold and that
//!   is referenced has a good place elsewhere ─► again, for what was condemned just now
//! ```
//! Why that is safe is argued in `docs/design/repository.md`. In short:
//! - A writer refers to nothing in packs that its epoch condemns; a pack is deleted only when every writer that knows
//!   an older epoch has published, or can no longer do so, *before* the mark that finds it unneeded.
//! - A pack stays condemned until it is deleted, so a collector that was asleep may carry out what it decided.
//! - A chunk that is referenced is never deleted with its pack, because of anything: first it is stored elsewhere, in
//!   a pack that is not condemned.
//! - What cannot be understood (a restore point, a page, a segment) stops the collection before it changes anything.
//! - A full store stops nothing but what needs space: what can be deleted is deleted, and the rest follows in what that
//!   has freed.
//!
//! Every step can be repeated, so a collection that dies is simply run again.

mod live;
mod mark;
#[doc(hidden)]
pub mod measure;
mod repack;
mod roots;
mod sweep;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use virtward_model::PointId;

use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    index::State,
    lease::{self, Epoch, Held},
    pack::{Entry, PackClass, PackInfo, read},
    progress::Progress,
    repository::Repository,
    util::delete_all,
    writer::WriterOptions,
};
use live::LiveSet;
use mark::{Marker, Roots};
use sweep::{PackUse, Sentence, judge, live_entries, sweep};

/// How long deleted restore points can be recovered.
pub const GRACE_DEFAULT: Duration = Duration::from_secs(7 * 86_400);
/// Ends of leases are kept for writers that may still wake up; nobody sleeps for this long.
const ENDS_KEPT: Duration = Duration::from_secs(365 * 86_400);
/// Collections that follow each other in one call: what the first condemns, the second deletes.
const ROUNDS_MAX: usize = 3;
/// The same if the store was full: what could not be moved or written at first can be once something was deleted.
const ROUNDS_MAX_FULL: usize = 6;

/// How to collect.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// How long deleted restore points can be recovered.
    pub grace: Duration,
    /// At most this share of the repository's bytes is moved to make sparse packs deletable.
    pub budget_percent: u8,
    /// Threads, compression, size of packs and lease of what is moved.
    pub writer: WriterOptions,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { dry_run: false, grace: GRACE_DEFAULT, budget_percent: 10, writer: WriterOptions::default() }
    }
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GcReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// The newest epoch.
    pub epoch: u64,
    /// Restore points that were marked.
    pub points: u64,
    /// Deleted restore points that can still be recovered, so that what they need stays.
    pub recoverable_points: u64,
    /// Deleted restore points whose grace period has ended.
    pub expired_points: Vec<PointId>,
    /// References that were followed.
    pub marks: u64,
    /// Packs before, and their bytes.
    pub packs: u64,
    /// Bytes of all packs before.
    pub pack_bytes: u64,
    /// Bytes of packs that are referenced.
    pub live_bytes: u64,
    /// Packs condemned by this collection.
    pub condemned_packs: u64,
    /// Packs whose referenced rest was moved, and the bytes of that.
    pub moved_packs: u64,
    /// Bytes that were moved.
    pub moved_bytes: u64,
    /// Packs deleted.
    pub deleted_packs: u64,
    /// Bytes of them.
    pub freed_bytes: u64,
    /// Condemned packs that are not deleted yet.
    pub pending_packs: u64,
    /// Bytes of them.
    pub pending_bytes: u64,
    /// Writers whose leases hold the deletion of condemned packs back.
    pub waiting_for: Vec<ObjectId>,
    /// Leases of writers that fell silent, which were ended.
    pub ended_leases: u64,
    /// Packs that no segment listed although restore points need them; they are listed again.
    pub relisted_packs: u64,
    /// Whether something was not moved or not written for lack of space. With more space, the next collection does it.
    pub short_of_space: bool,
    /// What could not be done, and why; nothing is lost by it.
    pub notes: Vec<String>,
}

impl Repository {
    /// Collects garbage.
    pub fn collect_garbage(&self, options: &GcOptions, progress: &dyn Progress) -> Result<GcReport> {
        let mut report = GcReport { dry_run: options.dry_run, ..GcReport::default() };
        let mut limit = ROUNDS_MAX;
        for number in 0.. {
            let freed = report.freed_bytes;
            report.short_of_space = false;
            let is_first = number == 0;
            let mut round = Round { repo: self, options, progress, report: &mut report, is_first, full: None };
            let mut again = round.run()?;
            let full = round.full.take();
            if report.short_of_space && report.freed_bytes > freed {
                (again, limit) = (true, ROUNDS_MAX_FULL);
            }
            if !again || number + 1 >= limit {
                return match full {
                    Some(full) if report.freed_bytes == 0 => Err(full),
                    _ => Ok(report),
                };
            }
        }
        Ok(report)
    }
}

struct Round<'a> {
    repo: &'a Repository,
    options: &'a GcOptions,
    progress: &'a dyn Progress,
    report: &'a mut GcReport,
    is_first: bool,
    /// What met a full store.
    full: Option<Error>,
}

/// What a round knows about packs.
struct View {
    state: Arc<State>,
    /// Name and length of every pack that is there.
    present: HashMap<String, u64>,
    condemned: HashSet<ObjectId>,
}

impl View {
    /// Whether records in a pack can be relied on.
    fn is_good(&self, pack: &PackInfo) -> bool {
        !self.condemned.contains(&pack.id()) && self.present.get(&pack.name()) == Some(&pack.bytes())
    }

    /// Name and length of a pack, if it is there.
    fn find(&self, id: &ObjectId) -> Option<(String, u64)> {
        let names = [PackClass::Data, PackClass::Meta].map(|class| class.name(id));
        names.into_iter().find_map(|name| self.present.get(&name).map(|bytes| (name.clone(), *bytes)))
    }
}

impl Round<'_> {
    /// One collection; whether another one at once makes sense.
    fn run(&mut self) -> Result<bool> {
        let inner = &*self.repo.inner;
        let (store, ring) = (&*inner.store, &*inner.ring);
        store.clean();
        // The order matters: leases after the epoch, everything else after the leases.
        let epoch = lease::newest_epoch(store, ring)?;
        let held = self.held_leases()?;
        let roots = self.roots()?;
        // Packs before segments: a pack that is listed here and in no segment was in none when it was listed.
        let present = inner.pack_lengths()?;
        inner.forget();
        let state = inner.index.reload()?;
        if let Some((name, error)) = state.unusable.first() {
            return Err(cannot(format!(
                "index segment {name} is unusable ({error}); run `virtward repo rebuild-index`"
            )));
        }
        let live = LiveSet::new(state.entries() as u64);
        self.mark(&roots, &live)?;
        let uses = sweep(&inner.index, &live, self.options.writer.threads, self.progress)?;
        let condemned: HashSet<ObjectId> = epoch.condemned.iter().copied().collect();
        let view = View { state, present, condemned };
        let sentence = self.judge(&uses, &view, &live, &held)?;
        self.describe(&uses, &view, &sentence);
        if self.options.dry_run {
            return Ok(false);
        }
        self.report.epoch = epoch.epoch;
        let condemned = self.condemn(&epoch, &view, &sentence);
        let is_new = self.unless_full(condemned)?.unwrap_or(false);
        let condemned = lease::newest_epoch(store, ring)?.condemned.into_iter().collect();
        let mut view = View { condemned, ..view };
        let moved = self.move_out(&view, &live, &uses);
        if let Some(after) = self.unless_full(moved)?.flatten() {
            view = after;
        }
        self.delete(&epoch, &view, &live, &held)?;
        self.renew(&view)?;
        self.tidy(self.report.epoch)?;
        Ok(is_new && held.is_empty())
    }

    /// A full store is no reason to leave undone what needs no space.
    fn unless_full<T>(&mut self, outcome: Result<T>) -> Result<Option<T>> {
        match outcome {
            Err(full @ Error::StorageFull { .. }) => {
                tracing::info!(error = %full, "no space for a part of the collection");
                self.report.short_of_space = true;
                self.full.get_or_insert(full);
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    /// The leases that count; those that fell silent are ended first.
    fn held_leases(&mut self) -> Result<Vec<Held>> {
        let inner = &*self.repo.inner;
        let mut held = lease::held_leases(&*inner.store, &inner.ring)?;
        if self.options.dry_run {
            return Ok(held);
        }
        let silent: Vec<Held> = held.extract_if(.., |h| h.silent > h.ttl).collect();
        for lease in silent {
            match self.unless_full(lease::end_lease(&*inner.store, &lease.writer))? {
                Some(()) => self.report.ended_leases += 1,
                // It has not ended before that was written down.
                None => held.push(lease),
            }
        }
        Ok(held)
    }

    fn mark(&mut self, roots: &Roots, live: &LiveSet) -> Result<()> {
        let mut marker = Marker::new(self.repo, live, self.options.writer.threads, self.progress);
        // If something is lost, one after the other says where.
        for record in marker.mark_together(roots.points.iter().map(|record| &**record))? {
            let point = &record.point;
            marker.mark(record).map_err(|e| match e.is_damage() {
                true => cannot(format!(
                    "restore point {} of {} has lost parts of its manifest ({e}); heal or delete it first",
                    point.id, point.vm
                )),
                false => e,
            })?;
        }
        for record in marker.mark_together(roots.trash.iter())? {
            match marker.mark(record) {
                Err(e) if e.is_damage() => {
                    self.report.notes.push(format!("{} cannot be recovered: {e}", names::trash(record.point.id)));
                }
                other => other?,
            }
        }
        self.report.marks = marker.marks;
        Ok(())
    }

    /// What to condemn: listed packs by how much of them is referenced, unlisted ones if nothing in them is missed.
    fn judge(
        &mut self,
        uses: &HashMap<ObjectId, PackUse>,
        view: &View,
        live: &LiveSet,
        held: &[Held],
    ) -> Result<Sentence> {
        let free: Vec<PackUse> = uses.values().filter(|p| view.is_good(&p.info)).cloned().collect();
        let total: u64 = view.present.values().sum();
        let budget = total / 100 * u64::from(self.options.budget_percent.min(100));
        let room = if self.options.dry_run { u64::MAX } else { self.room() };
        let mut sentence = judge(&free, budget.min(room), &|pack| self.may_move(pack));
        // What is condemned and cannot be moved would only be stored once more by the next backups.
        self.report.short_of_space |=
            room < budget && judge(&free, budget, &|pack| self.may_move(pack)).sparse.len() > sentence.sparse.len();
        for (name, bytes) in &view.present {
            let Some(id) = names::parse_pack(name) else { continue };
            if uses.contains_key(&id) || view.condemned.contains(&id) {
                continue;
            }
            match self.unlisted_pack(name, *bytes, view, live, held) {
                Ok(true) => sentence.dead.push(id),
                // Still being written, listed again, or gone.
                Ok(false) | Err(Error::Missing { .. }) => {}
                Err(e) if e.is_damage() => self.note(format!("{name} is in no segment and cannot be read: {e}")),
                Err(e) => return Err(e),
            }
        }
        Ok(sentence)
    }

    /// Whether a pack that no segment lists is garbage. If it holds what is referenced and nowhere else, its segment was
    /// lost, and it gets a new one.
    fn unlisted_pack(&mut self, name: &str, bytes: u64, view: &View, live: &LiveSet, held: &[Held]) -> Result<bool> {
        let inner = &*self.repo.inner;
        let pack = read::read_tail(&*inner.store, name, bytes)?;
        if held.iter().any(|h| h.writer == pack.header.writer()) {
            return Ok(false);
        }
        let entries = read::read_table(&*inner.store, &inner.ring, &pack)?;
        if !self.misses_any(&entries, view, live)? {
            return Ok(true);
        }
        if !self.options.dry_run && self.unless_full(self.repo.list_pack(pack, entries))?.is_none() {
            return Ok(false);
        }
        self.report.relisted_packs += 1;
        Ok(false)
    }

    /// Bytes that can be moved before the store is full: what packs take beside records is left out.
    fn room(&self) -> u64 {
        let free = self.repo.inner.store.free_bytes().unwrap_or(u64::MAX);
        free.saturating_sub(free / 16)
    }

    /// Whether a referenced record has no other good place than the pack that it was found in.
    fn misses_any(&self, entries: &[Entry], view: &View, live: &LiveSet) -> Result<bool> {
        for entry in entries.iter().filter(|e| live.contains(&e.id)) {
            if self.repo.inner.index.lookup(&entry.id, &|pack, _| view.is_good(pack))?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn may_move(&self, pack: &PackInfo) -> bool {
        pack.header.class == PackClass::Meta || self.repo.can_restore()
    }

    /// The figures, of the first round only: they describe what was found.
    fn describe(&mut self, uses: &HashMap<ObjectId, PackUse>, view: &View, sentence: &Sentence) {
        let report = &mut *self.report;
        report.condemned_packs += (sentence.dead.len() + sentence.sparse.len()) as u64;
        if !self.is_first {
            return;
        }
        report.packs = view.present.len() as u64;
        report.pack_bytes = view.present.values().sum();
        report.live_bytes = uses.values().filter(|p| view.is_good(&p.info)).map(|p| p.live_bytes).sum();
        let bytes = |id: &ObjectId| view.find(id).map(|(_, bytes)| bytes);
        let condemned = || view.condemned.iter().chain(&sentence.dead).chain(&sentence.sparse);
        report.pending_packs = condemned().filter(|id| bytes(id).is_some()).count() as u64;
        report.pending_bytes = condemned().filter_map(bytes).sum();
    }

    /// Begins a new epoch if there is something to condemn; whether it did.
    fn condemn(&mut self, known: &Epoch, view: &View, sentence: &Sentence) -> Result<bool> {
        let inner = &*self.repo.inner;
        let packs: HashSet<ObjectId> = sentence.dead.iter().chain(&sentence.sparse).copied().collect();
        if packs.is_empty() {
            return Ok(false);
        }
        // Condemned before this round began, not there any more, and no segment leads to them.
        let listed = view.state.packs();
        let is_gone = |id: &&ObjectId| !listed.contains_key(id) && view.find(id).is_none();
        let gone = known.condemned.iter().filter(is_gone).copied().collect();
        self.report.epoch = lease::condemn(&*inner.store, &inner.ring, &packs, &gone)?.epoch;
        Ok(true)
    }

    /// Stores what is referenced in condemned packs, and in no good one, anew, as far as there is space. What is known
    /// after it, if something was moved.
    fn move_out(&mut self, view: &View, live: &LiveSet, uses: &HashMap<ObjectId, PackUse>) -> Result<Option<View>> {
        let inner = &*self.repo.inner;
        let has_live = |id: &&ObjectId| uses.get(id).is_some_and(|p| p.live_bytes > 0) && view.find(id).is_some();
        let sources: HashSet<ObjectId> = view.condemned.iter().filter(has_live).copied().collect();
        let (mut wanted, mut room) = (Vec::new(), self.room());
        for (id, entries) in live_entries(&inner.index, live, &sources)? {
            let pack = &uses[&id].info;
            let mut missed = Vec::new();
            for entry in entries {
                if self.misses_any(&[entry], view, live)? {
                    missed.push(entry);
                }
            }
            if missed.is_empty() {
                continue;
            }
            if !self.may_move(pack) {
                self.note(format!("{} stays: moving what is needed of it takes the data key", pack.name()));
                continue;
            }
            match room.checked_sub(missed.iter().map(|entry| u64::from(entry.stored)).sum()) {
                Some(left) => {
                    room = left;
                    wanted.push((pack.clone(), missed));
                }
                None => self.report.short_of_space = true,
            }
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        let moved = repack::run(self.repo, &wanted, &self.options.writer, self.progress)?;
        self.report.moved_packs += moved.packs;
        self.report.moved_bytes += moved.bytes;
        self.report.notes.extend(moved.lost);
        let present = inner.pack_lengths()?;
        let state = inner.index.refresh()?;
        // A collector beside this one may have condemned where things were moved to.
        let epoch = lease::newest_epoch(&*inner.store, &inner.ring)?;
        Ok(Some(View { state, present, condemned: epoch.condemned.into_iter().collect() }))
    }

    /// Deletes packs that were condemned when this round began, that no writer can refer to any more, and that nobody
    /// misses.
    fn delete(&mut self, known: &Epoch, view: &View, live: &LiveSet, held: &[Held]) -> Result<()> {
        let inner = &*self.repo.inner;
        let oldest = held.iter().map(|h| h.epoch).min().unwrap_or(u64::MAX);
        let ripe: HashSet<ObjectId> =
            known.sentences().filter(|(_, since)| *since <= oldest).map(|(id, _)| id).collect();
        let listed = view.state.packs();
        let gone = self.gone(view, &listed)?;
        let entries = live_entries(&inner.index, live, &ripe.union(&gone).copied().collect())?;
        let (mut doomed, mut unlist) = (Vec::new(), HashSet::new());
        for id in gone {
            if !self.misses_any(entries.get(&id).map_or(&[], Vec::as_slice), view, live)? {
                unlist.insert(id);
            }
        }
        (self.report.pending_packs, self.report.pending_bytes) = (0, 0);
        for id in &view.condemned {
            let (object, is_listed) = (view.find(id), listed.contains_key(id));
            let is_free = ripe.contains(id)
                && match (entries.get(id), &object) {
                    (Some(entries), _) => !self.misses_any(entries, view, live)?,
                    (None, _) if is_listed => true,
                    (None, Some((name, bytes))) => self.is_unlisted_garbage(name, *bytes, view, live)?,
                    (None, None) => false,
                };
            match object {
                Some(object) if is_free => doomed.push(object),
                Some((_, bytes)) => {
                    self.report.pending_packs += 1;
                    self.report.pending_bytes += bytes;
                }
                None => {}
            }
            if is_free && is_listed {
                unlist.insert(*id);
            }
        }
        self.report.waiting_for = held.iter().filter(|h| h.epoch < self.report.epoch).map(|h| h.writer).collect();
        // The index first: nobody should look for what is gone. Only if there is no space for that, it comes afterwards.
        let is_unlisted = self.unlist(&unlist)?;
        doomed.sort();
        let names: Vec<String> = doomed.into_iter().map(|(name, _)| name).collect();
        for name in delete_all(&*inner.store, &names, self.progress)? {
            self.report.deleted_packs += 1;
            self.report.freed_bytes += view.present.get(&name).copied().unwrap_or(0);
        }
        if !is_unlisted {
            self.unlist(&unlist)?;
        }
        Ok(())
    }

    /// Listed packs that nobody condemned and that are not there: lost, or listed by a run that slept while it put the segment,
    /// whose lease was ended and whose packs were collected meanwhile.
    fn gone(&self, view: &View, listed: &HashMap<ObjectId, Arc<PackInfo>>) -> Result<HashSet<ObjectId>> {
        let mut gone = HashSet::new();
        for (id, pack) in listed {
            let name = pack.name();
            let is_known = view.condemned.contains(id) || view.present.contains_key(&name);
            // It may have come since packs were listed.
            if !is_known && !self.repo.inner.store.exists(&name)? {
                gone.insert(*id);
            }
        }
        Ok(gone)
    }

    /// Compacts the index, without some packs; whether there was space for that.
    fn unlist(&mut self, packs: &HashSet<ObjectId>) -> Result<bool> {
        let index = &self.repo.inner.index;
        let compacted = index.compact_all((ObjectId::random(), self.report.epoch), packs, self.progress);
        let Some(compacted) = self.unless_full(compacted)? else { return Ok(false) };
        for (segment, e) in &compacted.failed {
            self.note(format!("index segment {segment} stays as it is: {e}"));
        }
        Ok(true)
    }

    /// Whether a condemned pack in no segment, as a collector that died half-way leaves it, holds nothing that is missed.
    fn is_unlisted_garbage(&mut self, name: &str, bytes: u64, view: &View, live: &LiveSet) -> Result<bool> {
        let inner = &*self.repo.inner;
        let table = read::read_tail(&*inner.store, name, bytes)
            .and_then(|pack| read::read_table(&*inner.store, &inner.ring, &pack));
        match table {
            Ok(entries) => Ok(!self.misses_any(&entries, view, live)?),
            Err(Error::Missing { .. }) => Ok(false),
            Err(e) if e.is_damage() => {
                self.note(format!("{name} is garbage as far as can be seen, but cannot be read ({e}); it stays"));
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Where objects are protected for a time, that of everything that is still needed begins anew.
    fn renew(&self, view: &View) -> Result<()> {
        let store = &*self.repo.inner.store;
        let Some(period) = store.retention() else { return Ok(()) };
        let condemned = |name: &str| names::parse_pack(name).is_some_and(|pack| view.condemned.contains(&pack));
        let mut needed = Vec::new();
        store.list("", &mut |object| {
            if !condemned(&object.name) {
                needed.push(object.name);
            }
            Ok(())
        })?;
        let until = store.now()?.checked_add(period).unwrap_or(Timestamp::MAX);
        store.renew(&mut needed.into_iter(), until)
    }

    /// Removes small objects that have no use any more.
    fn tidy(&mut self, epoch: u64) -> Result<()> {
        let store = &*self.repo.inner.store;
        let mut useless = Vec::new();
        store.list(names::EPOCHS, &mut |object| {
            // The one before stays for those who have just listed it.
            if u64::from_str_radix(names::leaf(&object.name), 16).is_ok_and(|number| number + 1 < epoch) {
                useless.push(object.name);
            }
            Ok(())
        })?;
        let now = store.now()?;
        store.list(names::LEASES, &mut |object| {
            if object.name.ends_with(".end") && object.age(now) > ENDS_KEPT {
                useless.push(object.name);
            }
            Ok(())
        })?;
        delete_all(store, &useless, self.progress).map(drop)
    }

    fn note(&mut self, note: String) {
        if !self.report.notes.contains(&note) {
            self.report.notes.push(note);
        }
    }
}

fn cannot(why: String) -> Error {
    Error::CannotCollect { why }
}
