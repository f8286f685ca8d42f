//! Which packs may go: how much of each is referenced, and the decision that follows.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use super::live::LiveSet;
use crate::{
    error::{Error, Result},
    format::ObjectId,
    index::{Index, State},
    pack::{Entry, PackInfo},
    progress::Progress,
    util::{lock, parallel},
};

/// A pack of which less than this share is referenced is worth moving the rest elsewhere.
const SPARSE_PERCENT: u64 = 50;
/// Packs smaller than this are merged, once there are many.
const SMALL_BYTES: u64 = 16 << 20;
/// How many small packs of one class are many.
const SMALL_MANY: usize = 24;

/// How much of a pack is referenced.
#[derive(Clone, Debug)]
pub struct PackUse {
    /// The pack.
    pub info: Arc<PackInfo>,
    /// Bytes of records that are referenced.
    pub live_bytes: u64,
}

/// How much of every listed pack is referenced.
pub fn sweep(
    index: &Index,
    live: &LiveSet,
    threads: usize,
    progress: &dyn Progress,
) -> Result<HashMap<ObjectId, PackUse>> {
    index.with_snapshot(|state| sweep_state(index, state, live, threads, progress))
}

fn sweep_state(
    index: &Index,
    state: &State,
    live: &LiveSet,
    threads: usize,
    progress: &dyn Progress,
) -> Result<HashMap<ObjectId, PackUse>> {
    let uses: Mutex<HashMap<ObjectId, PackUse>> = Mutex::default();
    parallel(&state.segments, threads, |segment| {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let mut bytes = vec![0u64; segment.packs.len()];
        index.read_segment(segment, &mut |e| {
            if live.contains(&e.entry.id) {
                bytes[e.pack as usize] += u64::from(e.entry.stored);
            }
        })?;
        let mut uses = lock(&uses);
        for (info, live_bytes) in segment.packs.iter().zip(bytes) {
            // A pack that two segments list has the same records in both.
            let known = uses.entry(info.id()).or_insert_with(|| PackUse { info: info.clone(), live_bytes: 0 });
            known.live_bytes = known.live_bytes.max(live_bytes);
        }
        Ok(())
    })?;
    Ok(uses.into_inner().unwrap_or_else(|e| e.into_inner()))
}

/// The referenced records of some packs, in the order of the pack.
pub fn live_entries(index: &Index, live: &LiveSet, packs: &HashSet<ObjectId>) -> Result<HashMap<ObjectId, Vec<Entry>>> {
    index.with_snapshot(|state| live_entries_in(index, state, live, packs))
}

fn live_entries_in(
    index: &Index,
    state: &State,
    live: &LiveSet,
    packs: &HashSet<ObjectId>,
) -> Result<HashMap<ObjectId, Vec<Entry>>> {
    let mut found: HashMap<ObjectId, Vec<Entry>> = HashMap::new();
    for segment in &state.segments {
        let wanted: Vec<bool> = segment.packs.iter().map(|p| packs.contains(&p.id())).collect();
        if !wanted.contains(&true) {
            continue;
        }
        index.read_segment(segment, &mut |e| {
            if wanted[e.pack as usize] && live.contains(&e.entry.id) {
                found.entry(segment.packs[e.pack as usize].id()).or_default().push(e.entry);
            }
        })?;
    }
    for entries in found.values_mut() {
        entries.sort_unstable_by_key(|e| e.offset);
        entries.dedup_by_key(|e| e.offset);
    }
    Ok(found)
}

/// What to condemn.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sentence {
    /// Packs of which nothing is referenced.
    pub dead: Vec<ObjectId>,
    /// Packs whose few referenced records are to be moved.
    pub sparse: Vec<ObjectId>,
}

/// Decides on packs that are not condemned yet. At most `budget_bytes` are to be moved; `may_move` says for which packs
/// the keys at hand suffice.
pub fn judge(uses: &[PackUse], budget_bytes: u64, may_move: &dyn Fn(&PackInfo) -> bool) -> Sentence {
    let mut sentence = Sentence::default();
    let mut sparse: Vec<&PackUse> = Vec::new();
    let mut small: HashMap<u8, Vec<&PackUse>> = HashMap::new();
    for pack in uses {
        if pack.live_bytes == 0 {
            sentence.dead.push(pack.info.id());
        } else if !may_move(&pack.info) {
        } else if pack.live_bytes * 100 < pack.info.record_bytes() * SPARSE_PERCENT {
            sparse.push(pack);
        } else if pack.info.bytes() < SMALL_BYTES {
            small.entry(pack.info.header.class as u8).or_default().push(pack);
        }
    }
    let share = |p: &PackUse| p.live_bytes * 1_000_000 / p.info.record_bytes().max(1);
    sparse.sort_by_key(|p| (share(p), p.info.id()));
    for few in small.into_values().filter(|packs| packs.len() >= SMALL_MANY) {
        sparse.extend(few);
    }
    let mut moved = 0;
    for pack in sparse {
        moved += pack.live_bytes;
        if moved > budget_bytes {
            break;
        }
        sentence.sparse.push(pack.info.id());
    }
    sentence.dead.sort_unstable();
    sentence.sparse.sort_unstable();
    sentence
}
