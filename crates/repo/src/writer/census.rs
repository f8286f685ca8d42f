//! Which packs of the index are lost, for runs that follow each other closely: copies of many restore points.
//!
//! The first run lists all packs. The next ones ask only for packs that the index did not list then, their own and those of
//! others. So a pack that vanishes between two of them is noticed as late as one that vanishes during a long run: by the
//! next backup. Packs that a collector deletes are condemned first, which each run learns with its lease.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use crate::{
    error::{Error, Result},
    format::ObjectId,
    index::State,
    pack::PackInfo,
    repository::Inner,
    util::{lock, opening_threads, parallel},
};

/// Packs that are asked for one by one; beyond this a listing is cheaper.
const ASKED_MAX: usize = 256;

/// What is known of packs so far.
#[derive(Default)]
pub(crate) struct Census {
    known: HashSet<ObjectId>,
    lost: HashSet<ObjectId>,
}

impl Census {
    /// Packs of the index that are not in the store with the length that they should have.
    pub fn lost_packs(&mut self, inner: &Inner, state: &State) -> Result<HashSet<ObjectId>> {
        let new: Vec<Arc<PackInfo>> = state
            .segments
            .iter()
            .flat_map(|segment| segment.packs.iter())
            .filter(|pack| !self.known.contains(&pack.id()))
            .cloned()
            .collect();
        if self.known.is_empty() || new.len() > ASKED_MAX {
            self.lost = inner.lost_packs(state)?;
        } else {
            let lost = Mutex::new(Vec::new());
            parallel(&new, opening_threads(&*inner.store, new.len()), |pack| {
                match inner.store.size(&pack.name()) {
                    Ok(bytes) if bytes == pack.bytes() => {}
                    Ok(_) | Err(Error::Missing { .. }) => lock(&lost).push(pack.id()),
                    Err(e) => return Err(e),
                }
                Ok(())
            })?;
            self.lost.extend(lost.into_inner().unwrap_or_else(|e| e.into_inner()));
        }
        self.known.extend(new.iter().map(|pack| pack.id()));
        Ok(self.lost.clone())
    }
}
