//! Parts of chunks: an increment keeps what the guest wrote, not the chunks around it.

use std::sync::Arc;

use proptest::prelude::*;
use virtward_model::RestorePoint;
use virtward_repo::{
    Compared, DiskSpec, Error, GcOptions, InitOptions, KdfCost, Repository, Secret, VerifyOptions, store::mem::MemStore,
};

use crate::common::*;

const C: usize = CHUNK as usize;
const BLOCK: usize = 4096;
const DAY: std::time::Duration = std::time::Duration::from_secs(86_400);

fn write(image: &mut [u8], at: usize, seed: u64, len: usize) {
    image[at..at + len].copy_from_slice(&noise(seed, len));
}

fn assert_restores(repo: &Repository, point: &RestorePoint, image: &[u8]) {
    let found = repo.point(point.id).unwrap();
    assert!(restore(repo, &found.disks[0]).unwrap() == image, "{}", point.id);
    assert!(restore_slowly(repo, &found.disks[0]).unwrap() == image, "{}", point.id);
}

#[test]
fn a_small_change_costs_its_own_size() {
    let (_, repo) = mem_repo();
    let mut image = noise(1, 20 * C);
    let full = back_up(&repo, "web1", &image).unwrap();
    let before = image.clone();
    write(&mut image, 3 * C + 8 * BLOCK, 2, BLOCK);
    write(&mut image, 3 * C + 20 * BLOCK, 3, 2 * BLOCK);
    let (next, in_parts) = back_up_parts(&repo, "web1", &image, &full.disks[0], &before).unwrap();
    assert_eq!(in_parts, 1);
    assert!((3 * BLOCK as u64..4 * BLOCK as u64).contains(&next.disks[0].new_bytes), "{}", next.disks[0].new_bytes);
    assert_eq!(next.disks[0].data_bytes, full.disks[0].data_bytes);
    assert_restores(&repo, &next, &image);
    assert_restores(&repo, &full, &before);
    assert!(repo.verify(&VerifyOptions::default(), &()).unwrap().is_ok());
}

#[test]
fn changes_of_one_chunk_lie_over_each_other_until_it_is_stored_whole() {
    let (store, repo) = mem_repo();
    let mut image = noise(1, 2 * C + 700);
    let mut points = vec![(back_up(&repo, "web1", &image).unwrap(), image.clone())];
    let mut in_parts = Vec::new();
    for step in 0..9u64 {
        let (base, before) = points.last().cloned().unwrap();
        // Partly over what the step before wrote.
        write(&mut image, C + step as usize * 3000, 10 + step, 5000);
        write(&mut image, 2 * C + 100, 50 + step, 90);
        let (point, count) = back_up_parts(&repo, "web1", &image, &base.disks[0], &before).unwrap();
        in_parts.push(count);
        points.push((point, image.clone()));
    }
    // The short last chunk is one block, which is all of it.
    assert_eq!(in_parts, [1, 1, 1, 0, 1, 1, 1, 0, 1]);
    for (point, image) in &points {
        assert_restores(&repo, point, image);
    }
    // Only the last one stays; what it lies over must stay with it.
    for (point, _) in &points[..9] {
        repo.delete_point(point.id).unwrap();
    }
    let options = GcOptions { grace: std::time::Duration::ZERO, ..GcOptions::default() };
    for _ in 0..3 {
        store.advance(DAY);
        repo.collect_garbage(&options, &()).unwrap();
    }
    assert_restores(&repo, &points[9].0, &points[9].1);
    assert!(repo.verify(&VerifyOptions::default(), &()).unwrap().is_ok());
}

#[test]
fn parts_over_zeros_are_a_chunk() {
    let (_, repo) = mem_repo();
    let mut image = vec![0; 5 * C];
    write(&mut image, 0, 1, C);
    let full = back_up(&repo, "web1", &image).unwrap();
    let before = image.clone();
    write(&mut image, 2 * C + BLOCK, 2, BLOCK);
    let (next, in_parts) = back_up_parts(&repo, "web1", &image, &full.disks[0], &before).unwrap();
    assert_eq!((in_parts, next.disks[0].data_bytes), (1, 2 * C as u64));
    assert_restores(&repo, &next, &image);
}

#[test]
fn what_has_to_be_put_whole_is_refused_in_parts() {
    let (_, repo) = mem_repo();
    let image = noise(1, 4 * C);
    let full = back_up(&repo, "web1", &image).unwrap();
    let writer = repo.writer(small()).unwrap();
    let disk = |base, size_bytes| writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base }).unwrap();
    let part = [0..1, 9..BLOCK as u32];
    let without_base = disk(None, 4 * C as u64);
    assert!(!without_base.takes_parts(0, &part).unwrap());
    assert!(matches!(without_base.put_parts(0, vec![0; C], &part), Err(Error::Misuse { .. })));
    let over = disk(Some(full.disks[0].clone()), 4 * C as u64);
    assert!(over.takes_parts(0, &part).unwrap());
    assert!(!over.takes_parts(0, &[0..1, 9..CHUNK / 2 + 9]).unwrap(), "more than half");
    assert!(!over.takes_parts(9, &part).unwrap(), "beyond the end");
    assert!(matches!(over.put_parts(0, vec![0; 5], &part), Err(Error::Misuse { .. })), "another length");
    // The disk ends inside the chunk: what the base has beyond that must not come back when it grows again.
    let shrunk = disk(Some(full.disks[0].clone()), 3 * C as u64 + 500);
    assert!(!shrunk.takes_parts(3, &[0..10, 20..100]).unwrap());
    assert!(shrunk.takes_parts(2, &part).unwrap());
}

#[test]
fn a_base_that_was_written_over_is_compared_as_it_is_now() {
    let (_, repo) = mem_repo();
    let mut image = noise(1, 3 * C);
    let full = back_up(&repo, "web1", &image).unwrap();
    let before = image.clone();
    write(&mut image, C, 2, BLOCK);
    let (next, _) = back_up_parts(&repo, "web1", &image, &full.disks[0], &before).unwrap();
    let writer = repo.writer(small()).unwrap();
    let spec = DiskSpec { size_bytes: 3 * C as u64, chunk_bytes: CHUNK, base: Some(next.disks[0].clone()) };
    let disk = writer.disk(spec).unwrap();
    assert_eq!(disk.compare_base(1, &image[C..2 * C]).unwrap(), Compared::Same);
    assert_eq!(disk.compare_base(1, &before[C..2 * C]).unwrap(), Compared::Different);
}

/// A change of a disk: bytes written at a place, or another size.
#[derive(Clone, Debug)]
enum Change {
    Write { at: usize, len: usize, seed: u64 },
    Zero { at: usize, len: usize },
    Resize(usize),
}

fn change() -> impl Strategy<Value = Change> {
    let place = (0usize..6 * C, 1usize..C);
    prop_oneof![
        6 => (place.clone(), any::<u64>()).prop_map(|((at, len), seed)| Change::Write { at, len: len / 8 + 1, seed }),
        2 => place.prop_map(|(at, len)| Change::Zero { at, len }),
        1 => (1usize..6 * C).prop_map(Change::Resize),
    ]
}

fn apply(image: &mut Vec<u8>, change: &Change) {
    let room = |at: usize, len: usize, image: &[u8]| (at.min(image.len()), len.min(image.len().saturating_sub(at)));
    match change {
        Change::Write { at, len, seed } => {
            let (at, len) = room(*at, *len, image);
            write(image, at, *seed, len);
        }
        Change::Zero { at, len } => {
            let (at, len) = room(*at, *len, image);
            image[at..at + len].fill(0);
        }
        Change::Resize(len) => image.resize(*len, 0),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_state_comes_back_from_here_from_a_copy_and_after_losses(
        steps in prop::collection::vec(prop::collection::vec(change(), 1..5), 1..7),
        first_kept in any::<prop::sample::Index>(),
    ) {
        let (store, repo) = mem_repo();
        let mut image = noise(1, 5 * C + 1234);
        let mut points = vec![(back_up(&repo, "web1", &image).unwrap(), image.clone())];
        for changes in &steps {
            let (base, before) = points.last().cloned().unwrap();
            changes.iter().for_each(|change| apply(&mut image, change));
            let (point, _) = back_up_parts(&repo, "web1", &image, &base.disks[0], &before).unwrap();
            points.push((point, image.clone()));
        }
        for (point, image) in &points {
            assert_restores(&repo, point, image);
        }
        let there = MemStore::new();
        let (secret, options) = (Secret::password("there"), InitOptions { kdf: KdfCost::weak_for_tests(), ..InitOptions::default() });
        let mirror = Repository::init(Arc::new(there), &secret, &options).unwrap();
        let ids: Vec<_> = points.iter().map(|(point, _)| point.id).collect();
        prop_assert_eq!(repo.copy_points(&mirror, &ids, &small(), &(), &mut |_| {}).unwrap().copied.len(), ids.len());
        for (point, image) in &points {
            assert_restores(&mirror, point, image);
        }
        let kept = first_kept.index(points.len());
        for (point, _) in &points[..kept] {
            repo.delete_point(point.id).unwrap();
        }
        let options = GcOptions { grace: std::time::Duration::ZERO, ..GcOptions::default() };
        for _ in 0..2 {
            store.advance(DAY);
            repo.collect_garbage(&options, &()).unwrap();
        }
        for (point, image) in &points[kept..] {
            assert_restores(&repo, point, image);
        }
        // All that is stored is lost, and comes back from the copy.
        for name in store.names().into_iter().filter(|name| name.starts_with("data/") || name.starts_with("meta/")) {
            store.tamper(&name, None);
        }
        let repo = Repository::open(Arc::new(store), &crate::common::secret()).unwrap();
        let report = repo.heal_from(&mirror, &small(), &()).unwrap();
        prop_assert!(report.damaged_points.is_empty(), "{:?}", report);
        for (point, image) in &points[kept..] {
            assert_restores(&repo, point, image);
        }
    }
}
