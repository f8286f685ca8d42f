//! A run that dies at any operation of the store leaves earlier restore points whole and the repository usable.

use std::sync::Arc;

use virtward_repo::{
    DiskSpec, Error, Repository, Store,
    store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

use crate::common::*;

struct Scene {
    store: MemStore,
    first: virtward_model::RestorePoint,
    image: Vec<u8>,
    changed: Vec<u8>,
}

fn scene() -> Scene {
    let (store, repo) = mem_repo();
    let image = noise(1, 12 * CHUNK as usize);
    let mut changed = image.clone();
    changed[3 * CHUNK as usize..9 * CHUNK as usize].copy_from_slice(&noise(2, 6 * CHUNK as usize));
    let first = back_up(&repo, "web1", &image).unwrap();
    Scene { store, first, image, changed }
}

/// The next backup, over a store that misbehaves.
fn attempt(scene: &Scene, store: &MemStore, faults: Faults) -> (Result<virtward_model::RestorePoint, Error>, u64) {
    let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
    let outcome = Repository::open(Arc::new(faulty.clone()), &secret()).and_then(|repo| {
        let base = scene.first.disks[0].clone();
        back_up_on(&repo, "web1", &scene.changed, Some(&base), &|index| (3..9).contains(&index))
    });
    (outcome, faulty.operations())
}

fn assert_sound(scene: &Scene, store: &MemStore, acknowledged: Option<&virtward_model::RestorePoint>) {
    let repo = Repository::open(Arc::new(store.clone()), &secret()).unwrap();
    let check = repo.check(&()).unwrap();
    assert!(check.is_ok(), "{check:?}");
    assert!(restore(&repo, &scene.first.disks[0]).unwrap() == scene.image);
    for point in repo.points().unwrap().points.iter().filter(|p| p.id != scene.first.id) {
        assert!(restore(&repo, &point.disks[0]).unwrap() == scene.changed, "a visible point is a whole one");
    }
    if let Some(point) = acknowledged {
        assert!(restore(&repo, &repo.point(point.id).unwrap().disks[0]).unwrap() == scene.changed);
    }
    let next = back_up(&repo, "web1", &scene.changed).unwrap();
    assert!(restore(&repo, &next.disks[0]).unwrap() == scene.changed);
}

#[test]
fn death_at_every_operation() {
    let scene = scene();
    let (outcome, operations) = attempt(&scene, &scene.store.fork(), Faults::default());
    outcome.unwrap();
    let mut died = 0;
    for at in 0..operations {
        for die_after_effect in [false, true] {
            let store = scene.store.fork();
            let faults = Faults { die_at: Some(at), die_after_effect, ..Faults::default() };
            let (outcome, _) = attempt(&scene, &store, faults);
            died += u64::from(outcome.is_err());
            assert_sound(&scene, &store, outcome.as_ref().ok());
        }
    }
    assert!(died > operations, "{died} of {operations}");
}

#[test]
fn errors_delays_and_lost_acknowledgements() {
    let scene = scene();
    for seed in 0..60 {
        let store = scene.store.fork();
        let faults = Faults {
            seed,
            error_permille: 15,
            lost_ack_permille: 25,
            delay_permille: 20,
            delay: std::time::Duration::from_millis(1),
            ..Faults::default()
        };
        let (outcome, _) = attempt(&scene, &store, faults);
        assert_sound(&scene, &store, outcome.as_ref().ok());
    }
}

#[test]
fn requests_that_arrive_twice_and_listings_that_lag_behind() {
    let scene = scene();
    let mut acknowledged = 0;
    for seed in 0..60 {
        let store = scene.store.fork();
        let faults = Faults {
            seed,
            error_permille: 5,
            lost_ack_permille: 15,
            repeated_permille: 300,
            listing_lag: seed % 30,
            ..Faults::default()
        };
        let (outcome, _) = attempt(&scene, &store, faults);
        acknowledged += u32::from(outcome.is_ok());
        assert_sound(&scene, &store, outcome.as_ref().ok());
    }
    assert!(acknowledged > 20, "{acknowledged} of 60");
}

#[test]
fn a_full_store_says_so_and_stays_sound() {
    let scene = scene();
    let (_, operations) = attempt(&scene, &scene.store.fork(), Faults::default());
    let mut full = 0;
    for full_at in 0..operations {
        let store = scene.store.fork();
        let (outcome, _) = attempt(&scene, &store, Faults { full_at: Some(full_at), ..Faults::default() });
        match &outcome {
            Err(Error::StorageFull { .. }) => full += 1,
            Err(other) => panic!("full at {full_at}: {other}"),
            Ok(_) => {}
        }
        assert_sound(&scene, &store, outcome.as_ref().ok());
    }
    assert!(full > 5);
}

#[test]
fn a_torn_write_is_found() {
    let scene = scene();
    let mut torn = 0;
    for seed in 0..40 {
        let store = scene.store.fork();
        let (outcome, _) = attempt(&scene, &store, Faults { seed, torn_permille: 60, ..Faults::default() });
        let repo = Repository::open(Arc::new(store.clone()), &secret()).unwrap();
        assert!(restore(&repo, &scene.first.disks[0]).unwrap() == scene.image);
        let Ok(point) = outcome else { continue };
        let intact = repo.point(point.id).and_then(|p| restore(&repo, &p.disks[0])).is_ok_and(|i| i == scene.changed);
        let sound = virtward_repo::verify_ciphertext(&store, 1, &()).unwrap().is_ok();
        assert!(intact || !sound, "seed {seed}: loss without a finding");
        torn += u64::from(!intact);
    }
    assert!(torn > 0, "the seeds tore nothing of use");
}

#[test]
fn what_a_killed_run_stored_is_found_by_the_next() {
    let (store, repo) = mem_repo();
    let image = noise(30, 60 * CHUNK as usize);
    let writer = repo.writer(small()).unwrap();
    let spec = virtward_repo::DiskSpec { size_bytes: image.len() as u64, chunk_bytes: CHUNK, base: None };
    let disk = writer.disk(spec).unwrap();
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        disk.put(index as u64, chunk.to_vec()).unwrap();
    }
    let _ = disk.finish().unwrap();
    drop(writer);
    assert!(repo.points().unwrap().points.is_empty());
    let repo = Repository::open(Arc::new(store.clone()), &secret()).unwrap();
    let saved = back_up(&repo, "web1", &image).unwrap();
    assert!(saved.disks[0].new_bytes < image.len() as u64 / 2, "{}", saved.disks[0].new_bytes);
    assert!(!store.names().iter().any(|n| n.starts_with("leases/")));
}

#[test]
fn a_repository_that_is_gone_or_another_one_is_no_success() {
    for made_anew in [false, true] {
        let (store, repo) = mem_repo();
        let writer = repo.writer(small()).unwrap();
        let mut names = Vec::new();
        store
            .list("", &mut |object| {
                names.push(object.name);
                Ok(())
            })
            .unwrap();
        assert!(names.len() > 2, "{names:?}");
        for name in names {
            store.delete(&name).unwrap();
        }
        if made_anew {
            init(Arc::new(store.clone()));
        }
        let image = noise(1, 3 << 20);
        let disk = writer.disk(DiskSpec { size_bytes: image.len() as u64, chunk_bytes: CHUNK, base: None }).unwrap();
        for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
            disk.put(index as u64, chunk.to_vec()).unwrap();
        }
        let result = disk.finish().unwrap();
        let point = point("vm", vec![disk_record("vda", image.len() as u64, CHUNK, &result)]);
        let error = writer.publish(point, attachments()).unwrap_err();
        match made_anew {
            false => assert!(matches!(error, Error::NotARepository { .. }), "{error:?}"),
            true => assert!(matches!(error, Error::Replaced { .. }), "{error:?}"),
        }
    }
}
