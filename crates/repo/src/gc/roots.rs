//! What a collection must keep: listed restore points, and deleted ones that can still be recovered.

use std::collections::{HashMap, HashSet};

use virtward_model::PointId;

use super::{Round, cannot, mark::Roots};
use crate::{
    error::{Error, Result},
    format::names,
    store::Listed,
    util::{delete_all, opening_threads, parallel_map},
};

impl Round<'_> {
    /// Reads the roots; removes what is in the trash for longer than the grace period.
    pub(super) fn roots(&mut self) -> Result<Roots> {
        let store = &*self.repo.inner.store;
        let mut trash = self.trash()?;
        let list = self.repo.points()?;
        if let Some((name, error)) = list.unreadable.first() {
            return Err(cannot(format!(
                "{name} cannot be read, so nobody knows what it needs ({error}); repair or delete it first"
            )));
        }
        // Deleting goes from `points/` to `trash/`, recovering the other way; who looks on both sides misses neither.
        trash.extend(self.trash()?);
        let points = list.points.iter().filter_map(|p| match self.repo.record(p.id) {
            Err(Error::NoPoint { .. }) => None,
            other => Some(other),
        });
        let mut roots = Roots { points: points.collect::<Result<_>>()?, trash: Vec::new() };
        // A deletion that met a new hold and died before it put the restore point back.
        let holds = self.repo.holds()?;
        let now = store.now()?;
        // What a recovery left beside its restore point means nothing. It goes when the point is deleted again: removing it
        // here could meet that deletion, and take the only copy.
        let listed: HashSet<PointId> = roots.points.iter().map(|record| record.point.id).collect();
        let trash = trash.into_iter().filter(|(id, _)| !listed.contains(id));
        let is_expired =
            |id: &PointId, object: &Listed| object.age(now) > self.options.grace && !holds.contains_key(id);
        let (expired, kept): (Vec<_>, Vec<_>) = trash.partition(|(id, object)| is_expired(id, object));
        if !self.options.dry_run {
            let names: Vec<String> = expired.iter().map(|(id, _)| names::trash(id)).collect();
            delete_all(store, &names, self.progress)?;
        }
        let known: HashSet<PointId> = self.report.expired_points.iter().copied().collect();
        self.report.expired_points.extend(expired.iter().map(|(id, _)| *id).filter(|id| !known.contains(id)));
        let records =
            parallel_map(&kept, opening_threads(store, kept.len()), |(id, _)| match self.repo.trashed_record(*id) {
                Err(Error::Missing { .. }) => Ok(None),
                Err(e) if !e.is_damage() => Err(e),
                record => Ok(Some((*id, record))),
            })?;
        for (id, record) in records {
            match record {
                Ok(record) => roots.trash.push(record),
                Err(e) => self.note(format!("{} cannot be recovered: {e}", names::trash(id))),
            }
        }
        self.report.points = roots.points.len() as u64;
        self.report.recoverable_points = roots.trash.len() as u64;
        Ok(roots)
    }

    fn trash(&self) -> Result<HashMap<PointId, Listed>> {
        let mut trash = HashMap::new();
        self.repo.inner.store.list(names::TRASH, &mut |object| {
            if let Ok(id) = names::leaf(&object.name).parse() {
                trash.insert(id, object);
            }
            Ok(())
        })?;
        Ok(trash)
    }
}
