//! What a collection must keep: listed restore points, and deleted ones that can still be recovered.

use std::collections::{HashMap, HashSet};

use virtward_model::PointId;

use super::{Round, cannot, mark::Roots};
use crate::{
    error::{Error, Result},
    format::names,
    store::Listed,
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
        for (id, object) in trash.into_iter().filter(|(id, _)| !listed.contains(id)) {
            if object.age(now) > self.options.grace && !holds.contains_key(&id) {
                if !self.options.dry_run {
                    store.delete(&names::trash(id))?;
                }
                if !self.report.expired_points.contains(&id) {
                    self.report.expired_points.push(id);
                }
                continue;
            }
            match self.repo.trashed_record(id) {
                Ok(record) => roots.trash.push(record),
                Err(Error::Missing { .. }) => {}
                Err(e) if e.is_damage() => self.note(format!("{} cannot be recovered: {e}", names::trash(id))),
                Err(e) => return Err(e),
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
