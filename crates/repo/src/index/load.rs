//! From a listing to a snapshot, beside compactions and rebuilds that replace segments.
//!
//! A compaction puts its output, then deletes its inputs. Whoever reads meanwhile must end up with the one or the others:
//!
//! - A segment that is listed and then missing was replaced by one that was there before it went. A listing that begins
//!   after the loss was seen shows the replacement, so another listing is made. Names known to be gone before it began
//!   need no further one, even if a slow listing shows them still.
//! - A listing that takes its time can miss the output (not there yet when it passed that place) and the inputs (gone
//!   when it came to theirs). A second listing shows the output. So a snapshot is complete when a listing brings nothing
//!   that replaces anything. To fool both listings, two compactions one after the other would have to slip through the
//!   same gap; and then a reader that misses a chunk refreshes, and a writer stores it again.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use super::{Index, State, Unusable, open::Segment};
use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    store::Listed,
    util::{lock, parallel},
};

/// Listings made in a row before giving up.
const LISTINGS_MAX: usize = 16;

/// What became of the objects below `index/`.
#[derive(Default)]
struct Seen {
    opened: HashMap<String, Arc<Segment>>,
    unusable: HashMap<String, Error>,
    gone: HashSet<String>,
}

impl Index {
    /// The segments that there are now. Those of `known` are not read again.
    pub(super) fn load(&self, known: &State) -> Result<State> {
        let mut seen = Seen::default();
        let before = known.segments.iter().chain(&known.replaced);
        seen.opened.extend(before.map(|s| (s.name.clone(), Arc::clone(s))));
        for listing in 0..LISTINGS_MAX {
            let listed = self.listed()?;
            let changed = self.open_new(&listed, &mut seen)?;
            if listing > 0 && !changed {
                return Ok(assemble(&listed, seen));
            }
        }
        let busy = std::io::Error::other("its segments are replaced faster than they can be read; run again");
        Err(Error::io("follow", names::INDEX, busy))
    }

    fn listed(&self) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        self.store.list(names::INDEX, &mut |object| {
            listed.push(object);
            Ok(())
        })?;
        Ok(listed)
    }

    /// Opens what is new. True if segments were replaced meanwhile, so that another listing is needed.
    fn open_new(&self, listed: &[Listed], seen: &mut Seen) -> Result<bool> {
        let is_new = |name: &str| {
            !seen.opened.contains_key(name) && !seen.unusable.contains_key(name) && !seen.gone.contains(name)
        };
        let new: Vec<&Listed> = listed.iter().filter(|object| is_new(&object.name)).collect();
        let outcomes = Mutex::new(Vec::with_capacity(new.len()));
        parallel(&new, 0, |object| {
            let outcome = Segment::open(&*self.store, &self.ring, &object.name, object.bytes);
            if let Err(e) = &outcome
                && !e.is_damage()
            {
                return Err(e.clone());
            }
            lock(&outcomes).push((object.name.clone(), outcome));
            Ok(())
        })?;
        let mut changed = false;
        for (name, outcome) in outcomes.into_inner().unwrap_or_else(|e| e.into_inner()) {
            match outcome {
                Ok(segment) => {
                    changed |= !segment.replaces.is_empty();
                    seen.opened.insert(name, Arc::new(segment));
                }
                Err(Error::Missing { .. }) => {
                    changed = true;
                    seen.gone.insert(name);
                }
                Err(e) => drop(seen.unusable.insert(name, e)),
            }
        }
        Ok(changed)
    }
}

fn assemble(listed: &[Listed], mut seen: Seen) -> State {
    let present: Vec<Arc<Segment>> = listed.iter().filter_map(|object| seen.opened.remove(&object.name)).collect();
    let replaced: HashSet<ObjectId> = present.iter().flat_map(|s| s.replaces.iter().copied()).collect();
    let mut state = State::default();
    for segment in present {
        if let Some(flaw) = &segment.flaw {
            seen.unusable.insert(segment.name.clone(), flaw.clone());
        }
        match replaced.contains(&segment.id()) {
            true => state.replaced.push(segment),
            false => state.segments.push(segment),
        }
    }
    // Most chunks that are found are in the largest.
    state.segments.sort_by(|a, b| (b.header.entries, &a.name).cmp(&(a.header.entries, &b.name)));
    state.unusable = seen.unusable.into_iter().collect::<Vec<Unusable>>();
    state.unusable.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, error) in &state.unusable {
        tracing::warn!(segment = %name, %error, "index segment cannot be used, or not fully");
    }
    state
}
