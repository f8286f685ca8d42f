//! Deleted restore points: on their way out, and back.
//!
//! ```text
//! delete:  held? ─► copy to trash/ ─► remove from points/ ─► held now? ─► put back
//! recover: lease ─► read trash/ ─► is all that it needs in good packs? ─► put points/ ─► lease still held?
//! ```
//! Invariants: at every instant the point is in `points/`, in `trash/` or in both; the trash object is as old as the
//! deletion, which is what its grace period is counted from; a recovered point refers to nothing that a collector
//! condemned before the lease, and to nothing that it condemns later, because the lease holds that back.
//!
//! An object in `trash/` whose point is in `points/` means nothing: it is left by a recovery, which removes nothing, so
//! that a deletion at the same moment cannot lose the last copy.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use virtward_model::{PointId, RestorePoint};

use crate::{
    error::{Error, Result},
    format::{
        envelope::{self, Kind},
        names,
    },
    lease::Lease,
    manifest::point::{self, PointRecord},
    progress::Progress,
    repository::Repository,
    store::{Put, put_new},
    util::{changing_threads, lock, opening_threads, parallel, parallel_map},
    verify::{Bad, Impact},
    writer::WriterOptions,
};

/// A restore point in the trash.
#[derive(Clone, Debug)]
pub struct DeletedPoint {
    /// The restore point.
    pub point: RestorePoint,
    /// When it was deleted, by the store's clock.
    pub deleted: Timestamp,
    /// Until when it can be recovered for certain.
    pub recoverable_until: Timestamp,
}

/// The restore points in the trash, and those that cannot be read.
#[derive(Clone, Debug, Default)]
pub struct DeletedPoints {
    /// Sorted by the instant of the cut, oldest first.
    pub points: Vec<DeletedPoint>,
    /// Name of the object, and why it cannot be read.
    pub unreadable: Vec<(String, Error)>,
}

impl Repository {
    /// Deletes a restore point, unless it is held. Its object goes to the trash, from where it can be recovered until the
    /// space is collected; what only it referred to becomes garbage.
    pub fn delete_point(&self, id: PointId) -> Result<()> {
        let (store, name, trash) = (&*self.inner.store, names::point(id), names::trash(id));
        let held = |this: &Self| match this.hold(id)? {
            Some(hold) => Err(Error::Held { id, reason: hold.reason }),
            None => Ok(()),
        };
        held(self)?;
        let bytes = match self.inner.get_small(&name) {
            Err(Error::Missing { .. }) => return Err(Error::NoPoint { id }),
            other => other?,
        };
        // One that was left by a recovery is older than this deletion, or another copy of the point.
        store.delete(&trash)?;
        put_new(store, &trash, &bytes)?;
        store.delete(&name)?;
        lock(&self.inner.points).remove(&id);
        // A hold that was put while the point was on its way out was told that it holds, or will see the point again.
        held(self).inspect_err(|_| {
            if let Err(error) = put_new(store, &name, &bytes) {
                tracing::error!(%error, point = %id, "a held restore point is in the trash; recover it");
            }
        })
    }

    /// Deletes many restore points, several at a time, and says what became of each, in the order of `ids`. A failure of the
    /// store or a cancellation ends it; those that were not reached are not mentioned.
    pub fn delete_points(&self, ids: &[PointId], progress: &dyn Progress) -> Vec<(PointId, Result<()>)> {
        let store = &*self.inner.store;
        let numbered: Vec<(usize, PointId)> = ids.iter().copied().enumerate().collect();
        let outcomes = Mutex::new(Vec::with_capacity(ids.len()));
        let ended = parallel(&numbered, changing_threads(store, ids.len()), |(number, id)| {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let outcome = self.delete_point(*id);
            let goes_on = matches!(outcome, Ok(()) | Err(Error::NoPoint { .. } | Error::Held { .. }));
            lock(&outcomes).push((*number, *id, outcome));
            if goes_on { Ok(()) } else { Err(Error::Cancelled) }
        });
        tracing::debug!(complete = ended.is_ok(), "restore points were deleted");
        let mut outcomes = outcomes.into_inner().unwrap_or_else(|e| e.into_inner());
        outcomes.sort_unstable_by_key(|(number, ..)| *number);
        outcomes.into_iter().map(|(_, id, outcome)| (id, outcome)).collect()
    }

    /// Removes the damaged object of a restore point, for the one that is put next. That one is in the trash before, so that
    /// whoever dies in between has left a deleted restore point and not a lost one.
    pub(crate) fn make_way(&self, id: PointId, bytes: &[u8]) -> Result<()> {
        let (store, name, trash) = (&*self.inner.store, names::point(id), names::trash(id));
        // By the checksum alone: what is intact and does not open is a matter of keys or of a newer version.
        match self
            .inner
            .get_small(&name)
            .and_then(|found| envelope::parse(&found, Kind::Point).map(drop).map_err(|e| e.at(&*name)))
        {
            Err(Error::Damaged { .. }) => {}
            Err(Error::Missing { .. }) | Ok(()) => return Ok(()),
            Err(e) => return Err(e),
        }
        store.delete(&trash)?;
        put_new(store, &trash, bytes)?;
        store.delete(&name).map(drop)
    }

    /// What is in the trash and can be recovered. `grace` is how long collectors leave it alone; after that it can be
    /// recovered until one has come by.
    pub fn deleted_points(&self, grace: Duration) -> Result<DeletedPoints> {
        let (mut listed, mut live) = (Vec::new(), HashSet::new());
        let store = &*self.inner.store;
        store.list(names::TRASH, &mut |object| {
            listed.push((object.name, object.modified));
            Ok(())
        })?;
        store.list(names::POINTS, &mut |object| {
            live.insert(names::leaf(&object.name).to_owned());
            Ok(())
        })?;
        let grace = SignedDuration::try_from(grace).unwrap_or(SignedDuration::MAX);
        let mut found = DeletedPoints::default();
        listed.retain(|(name, _)| !live.contains(names::leaf(name)));
        let records = parallel_map(&listed, opening_threads(store, listed.len()), |(name, deleted)| {
            let id = names::leaf(name).parse::<PointId>().map_err(|e| Error::damaged(&**name, e.to_string()));
            match id.and_then(|id| self.trashed_record(id)) {
                // Collected or recovered since the listing.
                Err(Error::Missing { .. }) => Ok(None),
                Err(e @ (Error::Io { .. } | Error::PermissionDenied { .. } | Error::Remote { .. })) => Err(e),
                record => Ok(Some((name.clone(), *deleted, record))),
            }
        })?;
        for (name, deleted, record) in records {
            match record {
                Ok(PointRecord { point, .. }) => {
                    let recoverable_until = deleted.saturating_add(grace).unwrap_or(Timestamp::MAX);
                    found.points.push(DeletedPoint { point, deleted, recoverable_until });
                }
                Err(e) => found.unreadable.push((name, e)),
            }
        }
        found.points.sort_by_key(|deleted| (deleted.point.taken, deleted.point.id));
        found.unreadable.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Brings a deleted restore point back, if everything that it needs is still there:
    /// [`Error::Unrecoverable`] says what is not.
    pub fn recover_point(&self, id: PointId, progress: &dyn Progress) -> Result<RestorePoint> {
        let inner = &*self.inner;
        let lease = Lease::begin(inner.store.clone(), inner.ring.clone(), WriterOptions::default().lease_ttl)?;
        let bytes = match inner.get_small(&names::trash(id)) {
            Err(Error::Missing { .. }) => return Err(Error::NoPoint { id }),
            other => other?,
        };
        let record = Arc::new(point::open(&inner.ring, id, &bytes)?);
        // After the lease, so that neither the index nor the list of packs is older than it.
        let state = inner.index.refresh()?;
        let mut gone = inner.lost_packs(&state)?;
        gone.extend(&lease.condemned);
        let bad = Bad::packs(gone);
        if let Some(lost) = Impact::new(self, &bad).damaged_points(std::slice::from_ref(&record), progress)?.pop() {
            return Err(Error::Unrecoverable { lost: Box::new(lost) });
        }
        let (store, name) = (&*inner.store, names::point(id));
        lease.check()?;
        match store.put_if_absent(&name, &bytes)? {
            Put::Created => {}
            Put::Exists if inner.get_small(&name)? == bytes => return Ok(record.point.clone()),
            Put::Exists => {
                return Err(Error::AlreadyExists { location: name, what: "is a restore point already".into() });
            }
        }
        // Not before this answer is it acknowledged: see `lease`.
        if let Err(e) = lease.check().and_then(|()| self.check_in_place()) {
            store.delete(&name)?;
            return Err(e);
        }
        lock(&inner.points).insert(id, record.clone());
        Ok(record.point.clone())
    }
}
