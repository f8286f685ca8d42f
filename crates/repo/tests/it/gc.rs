//! Garbage collection, one property at a time; `races` does everything at once.

use std::{sync::Arc, time::Duration};

use virtward_repo::{
    Error, GcOptions, GcReport, Repository, Store, VerifyMode, VerifyOptions,
    store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

use crate::common::*;

const DAY: Duration = Duration::from_secs(86_400);

fn collect(repo: &Repository, grace: Duration) -> GcReport {
    let options = GcOptions { grace, budget_percent: 100, writer: small(), ..GcOptions::default() };
    repo.collect_garbage(&options, &()).unwrap()
}

fn open(store: &MemStore) -> Repository {
    Repository::open(Arc::new(store.clone()), &secret()).unwrap()
}

fn bytes(store: &MemStore) -> u64 {
    let mut bytes = 0;
    for prefix in ["data/", "meta/"] {
        store
            .list(prefix, &mut |object| {
                bytes += object.bytes;
                Ok(())
            })
            .unwrap();
    }
    bytes
}

fn assert_clean(store: &MemStore) {
    let repo = open(store);
    let check = repo.check(&()).unwrap();
    assert!(check.is_ok(), "{:?} {:?}", check.damaged, check.damaged_points);
    let full = VerifyOptions { mode: VerifyMode::Full, ..VerifyOptions::default() };
    let report = repo.verify(&full, &()).unwrap();
    assert!(report.is_ok(), "{:?}", report.damaged);
}

#[test]
fn what_nothing_refers_to_is_freed_and_the_rest_restores() {
    let (store, repo) = mem_repo();
    let (one, two) = (noise(1, 6 << 20), noise(2, 6 << 20));
    let first = back_up(&repo, "one", &one).unwrap();
    let alone = bytes(&store);
    let second = back_up(&repo, "two", &two).unwrap();
    let before = bytes(&store);
    assert_eq!(collect(&repo, Duration::ZERO).freed_bytes, 0);
    repo.delete_point(second.id).unwrap();
    store.advance(DAY);
    let report = collect(&repo, Duration::ZERO);
    assert_eq!(report.expired_points, [second.id]);
    assert!(report.freed_bytes > 2 << 20, "{report:?}");
    assert_eq!(bytes(&store), before - report.freed_bytes + report.moved_bytes);
    assert!(bytes(&store) <= alone + (64 << 10), "{} where {alone} were before", bytes(&store));
    assert_eq!(restore(&open(&store), &first.disks[0]).unwrap(), one);
    assert_clean(&store);
}

#[test]
fn a_deleted_restore_point_can_be_read_until_its_grace_period_ends() {
    let (store, repo) = mem_repo();
    let image = noise(1, 3 << 20);
    let point = back_up(&repo, "one", &image).unwrap();
    repo.delete_point(point.id).unwrap();
    store.advance(6 * DAY);
    let report = collect(&repo, 7 * DAY);
    assert_eq!((report.recoverable_points, report.deleted_packs), (1, 0), "{report:?}");
    assert_eq!(restore(&open(&store), &point.disks[0]).unwrap(), image);
    store.advance(2 * DAY);
    let report = collect(&repo, 7 * DAY);
    assert_eq!(report.expired_points, [point.id]);
    assert_eq!(bytes(&store), 0, "{:?}", store.names());
    assert_clean(&store);
}

#[test]
fn half_empty_packs_are_moved_together_within_the_budget() {
    let (store, repo) = mem_repo();
    // One pack holds both; the second keeps few chunks of the first.
    let image = noise(1, 24 * CHUNK as usize);
    let first = back_up(&repo, "one", &image).unwrap();
    let mut kept = vec![0; image.len()];
    kept[..2 * CHUNK as usize].copy_from_slice(&image[..2 * CHUNK as usize]);
    let second = back_up(&repo, "one", &kept).unwrap();
    repo.delete_point(first.id).unwrap();
    store.advance(DAY);
    let none = GcOptions { grace: Duration::ZERO, budget_percent: 0, writer: small(), ..GcOptions::default() };
    let report = repo.collect_garbage(&none, &()).unwrap();
    assert_eq!(report.moved_bytes, 0, "{report:?}");
    let report = collect(&repo, Duration::ZERO);
    assert!(report.moved_bytes > 0 && report.deleted_packs > 0, "{report:?}");
    assert_eq!(restore(&open(&store), &second.disks[0]).unwrap(), kept);
    assert!(bytes(&store) < 1 << 20, "{}", bytes(&store));
    assert_clean(&store);
}

#[test]
fn a_dry_run_says_it_and_changes_nothing() {
    let (store, repo) = mem_repo();
    let point = back_up(&repo, "one", &noise(1, 3 << 20)).unwrap();
    repo.delete_point(point.id).unwrap();
    store.advance(DAY);
    let before = store.names();
    let options = GcOptions { dry_run: true, grace: Duration::ZERO, writer: small(), ..GcOptions::default() };
    let said = repo.collect_garbage(&options, &()).unwrap();
    assert_eq!(store.names(), before);
    let done = collect(&repo, Duration::ZERO);
    assert_eq!(said.pending_bytes, done.freed_bytes, "{said:?} {done:?}");
}

#[test]
fn a_running_backup_holds_deletion_back_and_a_dead_one_does_not() {
    let (store, repo) = mem_repo();
    let point = back_up(&repo, "one", &noise(1, 3 << 20)).unwrap();
    let running = open(&store).writer(small()).unwrap();
    repo.delete_point(point.id).unwrap();
    store.advance(Duration::from_secs(60));
    let report = collect(&repo, Duration::ZERO);
    assert_eq!(report.waiting_for, [running.id()]);
    assert!(report.deleted_packs == 0 && report.pending_packs > 0, "{report:?}");
    store.advance(DAY);
    let report = collect(&repo, Duration::ZERO);
    assert!(report.ended_leases == 1 && report.pending_packs == 0, "{report:?}");
    assert_eq!(bytes(&store), 0);
    // The one that was taken for dead notices.
    let error = running.publish(virtward_model::RestorePoint { disks: vec![], ..point }, vec![]).unwrap_err();
    assert!(matches!(error, Error::LeaseLost { .. }), "{error:?}");
    assert!(repo.points().unwrap().points.is_empty());
}

#[test]
fn what_killed_runs_left_is_collected() {
    let (store, repo) = mem_repo();
    let kept = back_up(&repo, "one", &noise(1, 2 << 20)).unwrap();
    let before = bytes(&store);
    let writer = repo.writer(small()).unwrap();
    let image = noise(5, 4 << 20);
    let disk = writer
        .disk(virtward_repo::DiskSpec { size_bytes: image.len() as u64, chunk_bytes: CHUNK, base: None })
        .unwrap();
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        disk.put(index as u64, chunk.to_vec()).unwrap();
    }
    disk.finish().unwrap();
    drop(writer);
    assert!(bytes(&store) > before);
    collect(&repo, Duration::ZERO);
    assert_eq!(bytes(&store), before);
    assert_eq!(restore(&open(&store), &kept.disks[0]).unwrap(), noise(1, 2 << 20));
    assert_clean(&store);
}

#[test]
fn damaged_packs_go_once_their_content_is_stored_again() {
    let (store, repo) = mem_repo();
    let image = noise(1, 3 << 20);
    let point = back_up(&repo, "one", &image).unwrap();
    let pack = store.names().into_iter().find(|name| name.starts_with("data/")).unwrap();
    let mut harmed = store.get(&pack, 1 << 30).unwrap();
    harmed[700] ^= 1;
    store.tamper(&pack, Some(harmed));
    let full = VerifyOptions { mode: VerifyMode::Full, ..VerifyOptions::default() };
    assert!(!repo.verify(&full, &()).unwrap().is_ok());
    // Not healed yet: what can still be read of it is moved, the rest is waited for.
    let report = collect(&open(&store), Duration::ZERO);
    assert!(report.notes.iter().any(|note| note.contains(&pack)), "{report:?}");
    assert!(store.exists(&pack).unwrap());
    back_up(&open(&store), "one", &image).unwrap();
    let report = collect(&open(&store), Duration::ZERO);
    assert!(report.notes.is_empty(), "{report:?}");
    assert!(!store.exists(&pack).unwrap());
    assert_eq!(restore(&open(&store), &point.disks[0]).unwrap(), image);
    assert_clean(&store);
}

/// A run sleeps while it puts a segment: its lease is ended, its packs are collected and forgotten, and then the segment is
/// there. It leads to nothing that anybody needs, so that is no damage, and the next collection takes it out of the index.
#[test]
fn a_segment_that_comes_when_its_packs_are_gone_is_cleared_away() {
    let (store, repo) = mem_repo();
    back_up(&repo, "one", &noise(1, 3 << 20)).unwrap();
    let segments = |store: &MemStore| {
        let mut names = Vec::new();
        let list = store.list("index/", &mut |object| {
            names.push(object.name);
            Ok(())
        });
        list.map(|()| names).unwrap()
    };
    let before = segments(&store);
    let asleep = back_up(&repo, "two", &noise(2, 3 << 20)).unwrap();
    let late: Vec<(String, Vec<u8>)> = segments(&store)
        .into_iter()
        .filter(|name| !before.contains(name))
        .map(|name| (name.clone(), store.get(&name, 1 << 30).unwrap()))
        .collect();
    assert!(!late.is_empty());
    for (name, _) in &late {
        store.delete(name).unwrap();
    }
    let lose = |point: virtward_model::PointId| {
        open(&store).delete_point(point).unwrap();
        store.advance(DAY);
        let report = collect(&open(&store), Duration::ZERO);
        assert!(report.deleted_packs > 0, "{report:?}");
    };
    lose(asleep.id);
    // A further epoch forgets who was condemned.
    lose(back_up(&open(&store), "three", &noise(3, 3 << 20)).unwrap().id);
    for (name, bytes) in &late {
        assert_eq!(store.put_if_absent(name, bytes).unwrap(), virtward_repo::store::Put::Created);
    }
    assert!(!open(&store).check(&()).unwrap().damaged.is_empty(), "its packs are there");
    collect(&open(&store), Duration::ZERO);
    assert_clean(&store);
}

#[test]
fn a_lost_segment_costs_no_data() {
    let (store, repo) = mem_repo();
    let image = noise(1, 3 << 20);
    let point = back_up(&repo, "one", &image).unwrap();
    let segments: Vec<String> = store.names().into_iter().filter(|name| name.starts_with("index/")).collect();
    for segment in segments {
        store.tamper(&segment, None);
    }
    let options = GcOptions { grace: Duration::ZERO, writer: small(), ..GcOptions::default() };
    for _ in 0..3 {
        // Without its pages nobody knows what the restore point needs.
        let outcome = open(&store).collect_garbage(&options, &());
        assert!(matches!(outcome, Err(Error::CannotCollect { .. })), "{outcome:?}");
    }
    assert!(bytes(&store) > 1 << 20);
    drop(point);
}

#[test]
fn what_cannot_be_understood_stops_a_collection() {
    for harm in ["points/", "index/"] {
        let (store, repo) = mem_repo();
        back_up(&repo, "one", &noise(1, 2 << 20)).unwrap();
        let gone = back_up(&repo, "two", &noise(2, 2 << 20)).unwrap();
        repo.delete_point(gone.id).unwrap();
        store.advance(DAY);
        let object = store.names().into_iter().find(|name| name.starts_with(harm)).unwrap();
        store.tamper(&object, Some(b"nonsense".to_vec()));
        let before = bytes(&store);
        let options = GcOptions { grace: Duration::ZERO, writer: small(), ..GcOptions::default() };
        let error = open(&store).collect_garbage(&options, &()).unwrap_err();
        assert!(matches!(&error, Error::CannotCollect { why } if why.contains(&object)), "{error}");
        assert_eq!(bytes(&store), before, "{harm}");
    }
}

#[test]
fn two_collectors_at_once_do_no_harm() {
    let (store, repo) = mem_repo();
    let image = noise(1, 6 << 20);
    let kept = back_up(&repo, "one", &image).unwrap();
    for number in 0..4 {
        let gone = back_up(&repo, "gone", &noise(10 + number, 2 << 20)).unwrap();
        repo.delete_point(gone.id).unwrap();
    }
    store.advance(DAY);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| collect(&open(&store), Duration::ZERO));
        }
    });
    collect(&open(&store), Duration::ZERO);
    assert_eq!(restore(&open(&store), &kept.disks[0]).unwrap(), image);
    assert_clean(&store);
}

/// A repository with a restore point that stays, and dead and half-empty packs.
fn with_garbage() -> (MemStore, virtward_model::RestorePoint, Vec<u8>) {
    let (store, repo) = mem_repo();
    let mut image = noise(1, 8 << 20);
    let first = back_up(&repo, "one", &image).unwrap();
    let other = back_up(&repo, "two", &noise(2, 4 << 20)).unwrap();
    // Every second chunk anew: what the first one stored is needed by halves.
    for (number, chunk) in image.chunks_mut(CHUNK as usize).enumerate().filter(|(number, _)| number % 4 > 0) {
        chunk.copy_from_slice(&noise(100 + number as u64, CHUNK as usize));
    }
    let second = back_up(&repo, "one", &image).unwrap();
    repo.delete_point(first.id).unwrap();
    repo.delete_point(other.id).unwrap();
    store.advance(DAY);
    (store, second, image)
}

fn collect_on_a_full_store(store: &MemStore, full_at: u64) -> (Result<GcReport, Error>, u64) {
    let faults = Faults { full_at: Some(full_at), ..Faults::default() };
    let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
    let repo = Repository::open(Arc::new(faulty.clone()), &secret()).unwrap();
    let options = GcOptions { grace: Duration::ZERO, budget_percent: 100, writer: small(), ..GcOptions::default() };
    (repo.collect_garbage(&options, &()), faulty.operations())
}

#[test]
fn a_store_that_is_full_at_any_moment_loses_nothing() {
    let (origin, point, image) = with_garbage();
    let whole = origin.fork();
    let (outcome, operations) = collect_on_a_full_store(&whole, u64::MAX);
    assert!(outcome.unwrap().moved_packs > 0);
    let least = bytes(&whole);
    let (mut refused, mut short, mut freed_all_the_same) = (0, 0, 0);
    for full_at in 0..operations {
        let store = origin.fork();
        match collect_on_a_full_store(&store, full_at).0 {
            Ok(report) => {
                short += u32::from(report.short_of_space);
                freed_all_the_same += u32::from(report.short_of_space && report.freed_bytes > 1 << 20);
            }
            Err(Error::StorageFull { .. }) => refused += 1,
            Err(other) => panic!("full at {full_at}: {other}"),
        }
        assert_eq!(restore(&open(&store), &point.disks[0]).unwrap(), image, "full at {full_at}");
        assert!(open(&store).check(&()).unwrap().is_ok(), "full at {full_at}");
        // With space it goes on, and ends where it would have ended.
        let report = collect(&open(&store), Duration::ZERO);
        assert!(!report.short_of_space && report.notes.is_empty(), "full at {full_at}: {report:?}");
        collect(&open(&store), Duration::ZERO);
        assert!(bytes(&store) <= least + (1 << 20), "full at {full_at}: {} where {least} are enough", bytes(&store));
        assert_clean(&store);
    }
    assert!(refused > 0 && short > 0 && freed_all_the_same > 0, "{refused} {short} {freed_all_the_same}");
}

#[test]
fn what_was_condemned_is_deleted_from_a_store_without_any_space() {
    let (store, point, image) = with_garbage();
    let running = open(&store).writer(small()).unwrap();
    let report = collect(&open(&store), Duration::ZERO);
    assert!(report.freed_bytes == 0 && report.pending_bytes > 1 << 20, "{report:?}");
    drop(running);
    let report = collect_on_a_full_store(&store, 0).0.unwrap();
    assert!(report.freed_bytes > 1 << 20 && report.short_of_space, "{report:?}");
    assert_eq!(restore(&open(&store), &point.disks[0]).unwrap(), image);
    let check = open(&store).check(&()).unwrap();
    assert!(check.is_ok(), "packs that are still listed and were deleted are no damage: {:?}", check.damaged);
    collect(&open(&store), Duration::ZERO);
    assert_clean(&store);
}
