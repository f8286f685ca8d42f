//! Copies between the repository under test and others, as actors: stopped and killed at any operation of either store.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use virtward_model::{PointId, RestorePoint};
use virtward_repo::{Error, Repository, Result, Secret, store::mem::MemStore};

use super::{Dice, Done, Images, World, back_up_over, content, options, restore_alone, stage::Role};
use crate::common::*;

/// A copy opens two repositories, and reads one before it writes the other.
const OPERATIONS: u64 = 120;
/// Restore points that one copy is asked for at most.
const ASKED_MAX: usize = 3;

/// The key of every repository but the one under test.
fn other_secret() -> Secret {
    Secret::password("another key")
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Direction {
    /// Into the repository under test.
    Here,
    /// Out of it.
    Away,
}

/// What a copy did, as it saw it.
pub struct Copied {
    direction: Direction,
    /// Acknowledged one by one.
    acknowledged: Vec<PointId>,
    /// Points that it could not copy, as it said.
    failed: Vec<(PointId, Error)>,
    outcome: Result<()>,
}

/// A repository that is only read from. One for all worlds: that keeps them fast.
struct Source {
    store: MemStore,
    points: BTreeMap<PointId, RestorePoint>,
    images: Images,
}

fn source() -> &'static Source {
    static SOURCE: OnceLock<Source> = OnceLock::new();
    SOURCE.get_or_init(|| {
        let store = empty();
        let repo = Repository::open(Arc::new(store.clone()), &other_secret()).unwrap();
        let (mut dice, images, mut base) = (Dice(4711), Images::default(), None);
        let mut points = BTreeMap::new();
        for _ in 0..3 {
            let image = content(&mut dice);
            let point = back_up_over(&repo, &image, base, &images).unwrap();
            base = Some((point.disks[0].clone(), image));
            points.insert(point.id, point);
        }
        Source { store, points, images }
    })
}

/// A new repository.
pub fn empty() -> MemStore {
    static EMPTY: OnceLock<MemStore> = OnceLock::new();
    let made = EMPTY.get_or_init(|| {
        let store = MemStore::new();
        Repository::init(Arc::new(store.clone()), &other_secret(), &init_options()).unwrap();
        store
    });
    made.fork()
}

impl World {
    /// Starts a copy of a few points.
    pub fn copy(&mut self, direction: Direction) {
        let there = match direction {
            Direction::Here => source().store.clone(),
            Direction::Away => self.away.clone(),
        };
        let mut ids: Vec<PointId> = match direction {
            Direction::Here => source().points.keys().copied().collect(),
            Direction::Away => self.points.keys().copied().collect(),
        };
        while ids.len() > ASKED_MAX {
            ids.remove(self.dice.roll(ids.len() as u64) as usize);
        }
        self.log.push(format!("copy {direction:?} of {ids:?}"));
        self.start(Role::Copier, OPERATIONS, move |stage| {
            let (mut acknowledged, mut failed) = (Vec::new(), Vec::new());
            let mut run = || {
                let under_test = Repository::open(Arc::new(stage.clone()), &secret())?;
                let other = Repository::open(Arc::new(stage.before(&there)), &other_secret())?;
                let (from, to) = match direction {
                    Direction::Here => (other, under_test),
                    Direction::Away => (under_test, other),
                };
                let report =
                    from.copy_points(&to, &ids, &options(), &(), &mut |copied| acknowledged.push(copied.id))?;
                failed = report.failed;
                Ok(())
            };
            let outcome = run();
            Done::Copied(Copied { direction, acknowledged, failed, outcome })
        });
    }

    /// Takes over what a copy says that it did.
    pub fn take_copied(&mut self, copied: Copied) {
        let Copied { direction, acknowledged, failed, outcome } = copied;
        self.log.push(format!("  copied {direction:?} {acknowledged:?}, failed {failed:?}, {outcome:?}"));
        match direction {
            Direction::Here => {
                if let Some((id, error)) = failed.first() {
                    self.violation = Some(format!("{id} could not be copied from an intact repository: {error}"));
                }
                let repo = self.open();
                for id in acknowledged {
                    let image = source().images.lock().unwrap()[&id].clone();
                    // If it is not there, that is what the check will find.
                    let point = repo.point(id).unwrap_or_else(|_| source().points[&id].clone());
                    self.images.lock().unwrap().insert(id, image.clone());
                    self.points.insert(id, (point, image));
                }
            }
            Direction::Away => {
                self.has_copies = true;
                // Whoever reads holds no lease: packs are emptied and deleted under his hands, and he finds the new place.
                let lost = failed.iter().find(|(id, error)| self.points.contains_key(id) && error.is_damage());
                if let Some((id, error)) = lost {
                    self.violation = Some(format!("{id} is whole and could not be copied: {error}"));
                }
                if let Err(why) = self.check_copies(&acknowledged) {
                    self.violation = Some(why);
                }
            }
        }
    }

    /// Whether what was acknowledged is over there, and all that is listed over there restores.
    fn check_copies(&self, acknowledged: &[PointId]) -> std::result::Result<(), String> {
        let repo = Repository::open(Arc::new(self.away.clone()), &other_secret()).unwrap();
        let listed = repo.points().map_err(|e| format!("the copies cannot be listed: {e}"))?.points;
        if let Some(id) = acknowledged.iter().find(|id| !listed.iter().any(|point| point.id == **id)) {
            return Err(format!("the copy of {id} is not listed"));
        }
        let images = self.images.lock().unwrap();
        for point in listed {
            let id = point.id;
            match restore_alone(&repo, &point.disks[0]) {
                Ok(image) if images.get(&id) == Some(&image) => {}
                Ok(_) => return Err(format!("the copy of {id} restores something else")),
                Err(e) => return Err(format!("the copy of {id} does not restore: {e}")),
            }
            repo.attachments(id).map_err(|e| format!("attachments of the copy of {id}: {e}"))?;
        }
        Ok(())
    }

    /// Whether the repository that was copied to is intact.
    pub fn check_away(&self) -> std::result::Result<(), String> {
        if !self.has_copies {
            return Ok(());
        }
        self.check_copies(&[])?;
        let repo = Repository::open(Arc::new(self.away.clone()), &other_secret()).unwrap();
        let check = repo.check(&()).map_err(|e| format!("check of the copies: {e}"))?;
        match check.is_ok() {
            true => Ok(()),
            false => Err(format!("check of the copies: {:?} {:?}", check.damaged, check.damaged_points)),
        }
    }
}
