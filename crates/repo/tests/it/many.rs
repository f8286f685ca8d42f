//! What many restore points cost: the requests that jobs make, and that nothing is believed which the store denies.

use std::{path::Path, sync::Arc};

use virtward_model::PointId;
use virtward_repo::{
    DiskSpec, Error, InitOptions, KdfCost, Repository, Secret,
    store::{
        cache::{CacheOptions, CachedStore},
        mem::MemStore,
    },
};

use crate::{common::*, hooked::Hooked};

const C: usize = CHUNK as usize;

/// A process that keeps local copies.
fn process(store: &Hooked, dir: &Path) -> Repository {
    let options = CacheOptions { dir: dir.into(), max_bytes: 1 << 30 };
    let cached = CachedStore::new(Arc::new(store.clone()), &options).unwrap();
    Repository::open(Arc::new(cached), &secret()).unwrap()
}

/// A VM's disk with so many states, one chunk changing from each to the next.
fn series(repo: &Repository, states: usize) -> Vec<virtward_model::RestorePoint> {
    let mut points: Vec<virtward_model::RestorePoint> = Vec::new();
    let mut image = noise(1, 3 * C);
    for state in 0..states {
        let changed = state % 3;
        image[changed * C..][..C].copy_from_slice(&noise(10 + state as u64, C));
        let base = points.last().map(|point| point.disks[0].clone());
        let is_dirty = |index: u64| state == 0 || index == changed as u64;
        points.push(back_up_on(repo, "web1", &image, base.as_ref(), &is_dirty).unwrap());
    }
    points
}

#[test]
fn the_next_process_reads_no_restore_point_again_and_a_check_reads_all() {
    let (objects, repo) = mem_repo();
    let saved = series(&repo, 12);
    let (store, dir) = (Hooked::new(&objects), tempfile::tempdir().unwrap());
    assert_eq!(process(&store, dir.path()).points().unwrap().points, saved);
    assert_eq!(store.count("read points/"), 12);
    let next = process(&store, dir.path());
    assert_eq!(next.points().unwrap().points, saved);
    assert_eq!(store.count("read points/"), 0);
    // One is damaged in the store, one is gone, one is new.
    let name = |number: usize| format!("points/{}", saved[number].id);
    let mut bytes = objects.names().contains(&name(3)).then(|| vec![0u8; 900]).unwrap();
    bytes[7] = 1;
    objects.tamper(&name(3), Some(bytes));
    objects.tamper(&name(4), None);
    let new = back_up(&repo, "web2", &noise(5, C)).unwrap();
    let list = process(&store, dir.path()).points().unwrap();
    assert_eq!(list.unreadable.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), [name(3)]);
    assert_eq!((list.points.len(), list.points.last()), (11, Some(&new)));
    assert_eq!(store.count("read points/"), 2);
    // Damage that a listing does not show.
    objects.tamper(&name(3), None);
    let mut bytes = virtward_repo::Store::get(&objects, &name(5), 1 << 20).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    objects.tamper(&name(5), Some(bytes));
    let damaged = process(&store, dir.path()).check(&()).unwrap().damaged;
    assert!(damaged.iter().any(|damage| damage.object == name(5)), "{damaged:?}");
}

#[test]
fn building_on_a_point_asks_the_store_for_it_and_lists_none() {
    let (objects, repo) = mem_repo();
    let saved = series(&repo, 10);
    let (store, dir) = (Hooked::new(&objects), tempfile::tempdir().unwrap());
    let host = process(&store, dir.path());
    host.points().unwrap();
    let spec = |number: usize| {
        let disk = &saved[number].disks[0];
        DiskSpec { size_bytes: disk.size_bytes, chunk_bytes: CHUNK, base: Some(disk.clone()) }
    };
    let writer = host.writer(small()).unwrap();
    store.count("");
    writer.disk(spec(9)).unwrap();
    assert_eq!(store.count("list points/"), 0);
    // Deleted by somebody else: what this host remembers of it counts for nothing.
    repo.delete_point(saved[9].id).unwrap();
    assert!(matches!(writer.disk(spec(9)), Err(Error::BadBase { .. })));
    writer.disk(spec(8)).unwrap();
}

#[test]
fn copies_list_points_and_packs_of_the_destination_once() {
    let ((_, repo), there) = (mem_repo(), MemStore::new());
    let saved = series(&repo, 12);
    let store = Hooked::new(&there);
    let options = InitOptions { kdf: KdfCost::weak_for_tests(), ..InitOptions::default() };
    let to = Repository::init(Arc::new(store.clone()), &Secret::password("there"), &options).unwrap();
    let ids: Vec<PointId> = saved.iter().map(|point| point.id).collect();
    let count = |operation: &str| {
        store.count("");
        let report = repo.copy_points(&to, &ids[..6], &small(), &(), &mut |_| {}).unwrap();
        (report.copied.len(), store.count(operation))
    };
    assert_eq!(count("list points/"), (6, 1));
    let before = there.names().iter().filter(|name| name.starts_with("data/")).count();
    let report = repo.copy_points(&to, &ids, &small(), &(), &mut |_| {}).unwrap();
    assert_eq!((report.copied.len(), store.count("list data/")), (6, 1));
    assert!(there.names().iter().filter(|name| name.starts_with("data/")).count() > before);
    assert!(to.check(&()).unwrap().is_ok());
    assert_eq!(to.points().unwrap().points.len(), 12);
}

#[test]
fn many_are_deleted_at_once_but_those_that_are_held() {
    let (objects, repo) = mem_repo();
    let saved = series(&repo, 70);
    repo.add_hold(saved[30].id, "litigation").unwrap();
    repo.delete_point(saved[31].id).unwrap();
    let ids: Vec<PointId> = saved[..69].iter().map(|point| point.id).collect();
    let outcomes = repo.delete_points(&ids, &());
    assert_eq!(outcomes.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
    for (number, (_, outcome)) in outcomes.iter().enumerate() {
        match number {
            30 => assert!(matches!(outcome, Err(Error::Held { .. })), "{outcome:?}"),
            31 => assert!(matches!(outcome, Err(Error::NoPoint { .. })), "{outcome:?}"),
            _ => assert!(outcome.is_ok(), "{number}: {outcome:?}"),
        }
    }
    let left = open_again(&objects).points().unwrap().points;
    assert_eq!(left, [saved[30].clone(), saved[69].clone()]);
    assert_eq!(repo.deleted_points(virtward_repo::GRACE_DEFAULT).unwrap().points.len(), 68);
    let cancelled = std::sync::atomic::AtomicBool::new(true);
    assert!(repo.delete_points(&[saved[69].id], &cancelled).is_empty());
    assert_eq!(open_again(&objects).points().unwrap().points.len(), 2);
}

fn open_again(objects: &MemStore) -> Repository {
    Repository::open(Arc::new(objects.clone()), &secret()).unwrap()
}
