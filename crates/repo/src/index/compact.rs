//! Compaction: many segments become one. Never on a read path; a garbage collector or a rebuild calls it.
//!
//! ```text
//! merge (two passes) ─► put ─► read again, compare with the inputs, entry for entry ─► [`Compacted`] ─► delete inputs
//!                                └─ differs ─► delete the output; the inputs stay
//! ```
//! Invariant: whatever an entry's segment, it is deleted only when a durable segment was read that holds the entry too
//! (or its pack is to be dropped). So at every instant, and after every crash, each entry is in a segment that is there.
//!
//! Why several processes may compact the same segments at once, beside readers, writers and rebuilds:
//!
//! - Each makes an output of its own, under a random name. Both hold what the inputs held; that entries are listed twice
//!   harms nobody, and the next compaction lists them once.
//! - Each deletes only inputs that it has compared with its own output. Deleting what is gone already changes nothing.
//! - One that finds an input gone cannot compare. It neither deletes inputs nor its output: somebody may have proved that
//!   output meanwhile ([`Index::resume`]) and deleted the inputs on its strength.
//! - An output is deleted only for differing from inputs that are all still there. Whoever else compares the same
//!   immutable segments comes to the same result, so nobody relies on it.
//! - An output that was put and not compared, because its maker died, hides its inputs from look-ups. It holds the same
//!   entries unless this code is wrong; and even then [`Index::search`] finds them in the inputs.
//! - An input that its deleter did not reach before it died stays hidden as long as a segment says that it is replaced.
//!   Outputs pass that on for segments which are still there, so that dropped packs do not come back with them.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    Index, State,
    compare::{Comparison, Mismatch},
    open::Segment,
    policy::{Candidate, plan},
    segment::{ENTRY_BYTES, IndexEntry},
    stream::{PackMap, merge},
    write::Outline,
};
use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    pack::PackInfo,
    progress::Progress,
};

/// Entries between two looks at the cancel token.
const STEP: u64 = 1 << 16;

/// A compaction whose output was read again and compared. What allows its inputs to be deleted.
#[derive(Debug)]
pub struct Compacted {
    /// The output; none if every pack of the inputs was dropped.
    pub segment: Option<ObjectId>,
    /// Entries of the output.
    pub entries: u64,
    /// Bytes that were written.
    pub bytes: u64,
    inputs: Vec<Arc<Segment>>,
}

impl Compacted {
    /// Names of the segments that are no longer needed.
    pub fn inputs(&self) -> impl Iterator<Item = &str> {
        self.inputs.iter().map(|s| &*s.name)
    }
}

/// What [`Index::compact_all`] did.
#[derive(Clone, Debug, Default)]
pub struct CompactReport {
    /// Segments deleted.
    pub removed: u64,
    /// Segments written.
    pub written: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Segments that could not be compacted, and why. They stay.
    pub failed: Vec<(String, Error)>,
}

/// Packs of all inputs once, and what number the packs of each input get.
struct Packs {
    listed: Vec<Arc<PackInfo>>,
    maps: Vec<PackMap>,
    /// Entries at most.
    entries_max: u64,
}

impl Packs {
    fn new(inputs: &[Arc<Segment>], drop: &HashSet<ObjectId>) -> Self {
        let (mut listed, mut numbers) = (Vec::<Arc<PackInfo>>::new(), HashMap::<ObjectId, u32>::new());
        let mut entries_max = 0;
        let mut maps = Vec::with_capacity(inputs.len());
        for segment in inputs {
            entries_max += staying(segment, drop);
            let number = |pack: &Arc<PackInfo>| {
                (!drop.contains(&pack.id())).then(|| {
                    *numbers.entry(pack.id()).or_insert_with(|| {
                        listed.push(pack.clone());
                        listed.len() as u32 - 1
                    })
                })
            };
            maps.push(segment.packs.iter().map(number).collect());
        }
        Self { listed, maps, entries_max }
    }
}

/// Entries of a segment that do not go with their packs.
fn staying(segment: &Segment, drop: &HashSet<ObjectId>) -> u64 {
    let going = segment.packs.iter().filter(|p| drop.contains(&p.id())).map(|p| u64::from(p.footer.records)).sum();
    segment.header.entries.saturating_sub(going)
}

impl Index {
    /// Merges segments into one that replaces them, without the packs in `drop` and their entries. The inputs stay until
    /// [`Index::delete_inputs`]. `None` if an input was compacted away meanwhile by somebody else.
    pub fn compact(
        &self,
        origin: (ObjectId, u64),
        inputs: &[Arc<Segment>],
        drop: &HashSet<ObjectId>,
        progress: &dyn Progress,
    ) -> Result<Option<Compacted>> {
        let state = self.state()?;
        let made = self.write_merged(origin, inputs, &inherited(&state, inputs), drop, progress);
        let outcome = made.and_then(|made| self.prove(made, inputs, drop, progress));
        match outcome {
            Err(Error::Missing { object }) if object.starts_with(names::INDEX) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Puts the output; its identity and length. Nothing is put if no entry stays.
    fn write_merged(
        &self,
        origin: (ObjectId, u64),
        inputs: &[Arc<Segment>],
        replaces: &[ObjectId],
        drop: &HashSet<ObjectId>,
        progress: &dyn Progress,
    ) -> Result<Option<(ObjectId, u64, u64)>> {
        let Packs { listed, maps, entries_max } = Packs::new(inputs, drop);
        let sources: Vec<(&Segment, &PackMap)> = inputs.iter().map(|s| &**s).zip(&maps).collect();
        let seen = AtomicU64::new(0);
        let mut source = |each: &mut dyn FnMut(&IndexEntry) -> Result<()>| {
            merge(&*self.store, &sources, &mut |entry| {
                if seen.fetch_add(1, Relaxed).is_multiple_of(STEP) {
                    progress.advance(STEP * ENTRY_BYTES as u64);
                    if progress.is_cancelled() {
                        return Err(Error::Cancelled);
                    }
                }
                each(entry)
            })
        };
        let outline = Outline::new(&self.ring, origin, entries_max, &mut source)?;
        if listed.is_empty() && outline.entries() == 0 {
            return Ok(None);
        }
        let (segment, entries) = (outline.segment(), outline.entries());
        let mut object = self.store.create(&names::segment(&segment))?;
        let bytes = outline.write(&self.ring, &listed, replaces, &mut source, &mut |part| object.write(part))?;
        // A taken name can only be this very object, if an acknowledgement was lost on the way: the comparison decides.
        let _ = object.finish()?;
        Ok(Some((segment, bytes, entries)))
    }

    /// Reads what was put, and compares.
    fn prove(
        &self,
        made: Option<(ObjectId, u64, u64)>,
        inputs: &[Arc<Segment>],
        drop: &HashSet<ObjectId>,
        progress: &dyn Progress,
    ) -> Result<Compacted> {
        let compare = |output: Option<&Segment>| {
            Comparison { store: &*self.store, output, inputs, drop, is_exact: true }.run(progress)
        };
        let inputs_of_proof = inputs.to_vec();
        let Some((segment, bytes, entries)) = made else {
            return match compare(None)? {
                Ok(()) => Ok(Compacted { segment: None, entries: 0, bytes: 0, inputs: inputs_of_proof }),
                Err(Mismatch(what)) => Err(wrong(names::INDEX, &what)),
            };
        };
        let name = names::segment(&segment);
        let compared = Segment::open(&*self.store, &self.ring, &name, bytes).and_then(|output| match &output.flaw {
            Some(flaw) => Err(flaw.clone()),
            None => compare(Some(&output)),
        });
        match compared {
            Ok(Ok(())) => Ok(Compacted { segment: Some(segment), entries, bytes, inputs: inputs_of_proof }),
            Ok(Err(Mismatch(what))) => Err(self.reject(&name, inputs, &what)),
            Err(e @ (Error::Damaged { .. } | Error::NewerFormat { .. })) => {
                Err(self.reject(&name, inputs, &e.to_string()))
            }
            Err(e) => Err(e),
        }
    }

    /// Takes a wrong output back, unless an input is gone: then somebody may rely on the output.
    fn reject(&self, name: &str, inputs: &[Arc<Segment>], what: &str) -> Error {
        if inputs.iter().all(|s| self.store.exists(&s.name).unwrap_or(false)) {
            let _ = self.store.delete(name);
        }
        wrong(name, what)
    }

    /// Deletes what a compaction replaced.
    pub fn delete_inputs(&self, done: &Compacted) -> Result<()> {
        for name in done.inputs() {
            self.store.delete(name)?;
        }
        self.refresh().map(|_| ())
    }

    /// Finishes compactions that were interrupted between putting the output and deleting the inputs: compares again, or
    /// merges output and inputs once more if they do not agree.
    fn resume(
        &self,
        origin: (ObjectId, u64),
        drop: &HashSet<ObjectId>,
        progress: &dyn Progress,
        report: &mut CompactReport,
    ) -> Result<()> {
        let state = self.refresh()?;
        for output in &state.segments {
            let inputs: Vec<_> = state.replaced.iter().filter(|s| output.replaces.contains(&s.id())).cloned().collect();
            if inputs.is_empty() {
                continue;
            }
            // Inputs that are gone were deleted by somebody who had compared all of them.
            let is_exact = inputs.len() == output.replaces.len();
            let compared = Comparison { store: &*self.store, output: Some(output), inputs: &inputs, drop, is_exact };
            let outcome = match compared.run(progress) {
                Ok(Ok(())) if output.flaw.is_none() => {
                    Ok(Some(Compacted { segment: Some(output.id()), entries: output.header.entries, bytes: 0, inputs }))
                }
                // Never deleted here: its maker may still be at work, with other packs to drop.
                Ok(_) => {
                    let all: Vec<_> = inputs.into_iter().chain([output.clone()]).collect();
                    self.compact(origin, &all, drop, progress)
                }
                Err(Error::Missing { object }) if object.starts_with(names::INDEX) => Ok(None),
                Err(e) => Err(e),
            };
            self.settle(outcome, &output.name, report)?;
        }
        Ok(())
    }

    /// Deletes the inputs of a compaction that went well; a damaged segment stays, and the others go on.
    fn settle(&self, outcome: Result<Option<Compacted>>, name: &str, report: &mut CompactReport) -> Result<()> {
        match outcome {
            Ok(None) => {}
            Ok(Some(done)) => {
                self.delete_inputs(&done)?;
                report.removed += done.inputs.len() as u64;
                report.written += u64::from(done.bytes > 0);
                report.written_bytes += done.bytes;
            }
            Err(e) if e.is_damage() => {
                tracing::warn!(error = %e, "index segments cannot be compacted; they stay as they are");
                report.failed.push((name.into(), e));
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// What to merge now: see [`plan`].
    pub fn plan_compaction(&self, drop: &HashSet<ObjectId>) -> Result<Vec<Vec<Arc<Segment>>>> {
        let state = self.refresh()?;
        let candidate = |s: &Arc<Segment>| Candidate {
            entries: staying(s, drop),
            is_rewritten: s.packs.iter().any(|p| drop.contains(&p.id())),
        };
        let candidates: Vec<_> = state.segments.iter().map(candidate).collect();
        let group = |numbers: Vec<usize>| numbers.into_iter().map(|n| state.segments[n].clone()).collect();
        Ok(plan(&candidates).into_iter().map(group).collect())
    }

    /// Finishes what was interrupted, merges what should be merged, drops packs, deletes what is replaced.
    pub fn compact_all(
        &self,
        origin: (ObjectId, u64),
        drop: &HashSet<ObjectId>,
        progress: &dyn Progress,
    ) -> Result<CompactReport> {
        let mut report = CompactReport::default();
        self.resume(origin, drop, progress, &mut report)?;
        for group in self.plan_compaction(drop)? {
            let outcome = self.compact(origin, &group, drop, progress);
            self.settle(outcome, &group[0].name, &mut report)?;
        }
        Ok(report)
    }
}

/// The segments that an output replaces: its inputs, and what these replaced and is still there.
fn inherited(state: &State, inputs: &[Arc<Segment>]) -> Vec<ObjectId> {
    let mut replaces: Vec<ObjectId> = inputs.iter().map(|s| s.id()).collect();
    let older = state.replaced.iter().map(|s| s.id());
    replaces.extend(older.filter(|id| inputs.iter().any(|s| s.replaces.contains(id))));
    replaces.sort_unstable();
    replaces.dedup();
    replaces
}

fn wrong(object: &str, what: &str) -> Error {
    Error::Damaged {
        object: object.into(),
        what: format!("compaction went wrong: {what}"),
        hint: "nothing is lost, the segments that it was made of are still there; please report this".into(),
    }
}
