//! Every object flipped, cut or missing is found by the right mode, and what it means is named.

use std::sync::Arc;

use virtward_model::RestorePoint;
use virtward_repo::{
    Error, Repository, Store, VerifyMode, VerifyOptions, VerifyReport, store::mem::MemStore, verify_ciphertext,
};

use crate::common::*;

fn scene() -> (MemStore, RestorePoint, Vec<u8>) {
    let (store, repo) = mem_repo();
    let image = noise(1, 30 * CHUNK as usize);
    let point = back_up(&repo, "web1", &image).unwrap();
    (store, point, image)
}

fn verify(store: &MemStore, mode: VerifyMode) -> Result<VerifyReport, Error> {
    let repo = Repository::open(Arc::new(store.clone()), &secret())?;
    repo.verify(&VerifyOptions { mode, ..VerifyOptions::default() }, &())
}

fn finds(outcome: Result<VerifyReport, Error>, object: &str) -> bool {
    match outcome {
        Ok(report) => report.damaged.iter().any(|d| d.object == object),
        Err(e) => e.to_string().contains(object),
    }
}

/// Objects that hold restore points and what they refer to (not the lease, not the trash).
fn objects(store: &MemStore) -> Vec<String> {
    let names = store.names();
    assert!(names.iter().filter(|n| n.starts_with("data/")).count() > 3);
    names
}

#[test]
fn every_flipped_bit_is_found() {
    let (store, _, image) = scene();
    for name in objects(&store) {
        let bytes = store.get(&name, u64::MAX).unwrap();
        // Everywhere in the structured ends, here and there in the middle.
        let step = (bytes.len() / 6).max(1);
        let ends =
            (0..bytes.len()).filter(|at| at % step == 0 || (at % 5 == 0 && (*at < 24 || *at + 24 > bytes.len())));
        for at in ends {
            let hurt = store.fork();
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            hurt.tamper(&name, Some(flipped));
            let keyless = verify_ciphertext(&hurt, 1, &()).unwrap();
            assert!(keyless.damaged.iter().any(|d| d.object == name), "{name} at {at} without keys");
            if name == "config" || name.starts_with("keys/") {
                match Repository::open(Arc::new(hurt.clone()), &secret()) {
                    Ok(repo) => assert!(!repo.check(&()).unwrap().is_ok(), "{name} at {at}"),
                    Err(e) => assert!(!matches!(e, Error::WrongSecret { .. }), "{name} at {at}: {e}"),
                }
                continue;
            }
            if at % 3 == 0 {
                assert!(finds(verify(&hurt, VerifyMode::Full), &name), "{name} at {at}, full");
            } else {
                assert!(finds(verify(&hurt, VerifyMode::Ciphertext), &name), "{name} at {at}, ciphertext");
            }
            let repo = Repository::open(Arc::new(hurt), &secret()).unwrap();
            for point in repo.points().unwrap().points {
                if let Ok(restored) = restore(&repo, &point.disks[0]) {
                    assert!(restored == image, "{name} at {at}: wrong bytes were given out");
                }
            }
        }
    }
}

#[test]
fn every_cut_or_missing_object_is_found_by_a_light_look() {
    let (store, point, _) = scene();
    for name in objects(&store) {
        let bytes = store.get(&name, u64::MAX).unwrap();
        for kept in [None, Some(0), Some(bytes.len() / 2), Some(bytes.len() - 1)] {
            let hurt = store.fork();
            hurt.tamper(&name, kept.map(|len| bytes[..len].to_vec()));
            let repo = match Repository::open(Arc::new(hurt.clone()), &secret()) {
                Ok(repo) => repo,
                Err(e) => {
                    assert!(name.starts_with("keys/"), "{name}: {e}");
                    continue;
                }
            };
            let check = repo.check(&()).unwrap();
            // A restore point that is gone without a trace can only be missed by those who remember it.
            if name.starts_with("points/") && kept.is_none() {
                assert!(matches!(repo.point(point.id), Err(Error::NoPoint { .. })));
                continue;
            }
            assert!(!check.is_ok(), "{name} cut to {kept:?}");
            if name.starts_with("data/") || name.starts_with("meta/") {
                let report = verify(&hurt, VerifyMode::Light).unwrap();
                assert!(finds(Ok(report.clone()), &name));
                assert_eq!(report.damaged_points[0].id, point.id, "{name} cut to {kept:?}");
            }
            if name.starts_with("index/") {
                assert_eq!(check.damaged_points[0].disks[0].ranges, vec![0..point.disks[0].size_bytes]);
            }
        }
    }
}

#[test]
fn damage_is_named_by_point_disk_and_range() {
    let (store, repo) = mem_repo();
    let image = noise(1, 30 * CHUNK as usize);
    let first = back_up(&repo, "web1", &image).unwrap();
    let mut changed = image.clone();
    changed[5 * CHUNK as usize..6 * CHUNK as usize].copy_from_slice(&noise(2, CHUNK as usize));
    let before = store.names();
    let base = first.disks[0].clone();
    let second = back_up_on(&repo, "web1", &changed, Some(&base), &|index| index == 5).unwrap();
    let new_pack = store.names().into_iter().find(|n| n.starts_with("data/") && !before.contains(n)).unwrap();
    let mut bytes = store.get(&new_pack, u64::MAX).unwrap();
    bytes[300] ^= 1;
    store.tamper(&new_pack, Some(bytes));
    for mode in [VerifyMode::Ciphertext, VerifyMode::Full] {
        let report = verify(&store, mode).unwrap();
        let [point] = &report.damaged_points[..] else { panic!("{report:?}") };
        assert_eq!((point.id, &*point.vm, point.attachments), (second.id, "web1", false));
        let chunk = u64::from(CHUNK);
        assert_eq!(
            (&*point.disks[0].target, &point.disks[0].ranges),
            ("vda", &std::iter::once(5 * chunk..6 * chunk).collect::<Vec<_>>())
        );
    }
    assert!(verify(&store, VerifyMode::Light).unwrap().is_ok());
    let only_first = VerifyOptions { points: Some(vec![first.id]), ..VerifyOptions::default() };
    assert!(repo.verify(&only_first, &()).unwrap().is_ok());
    assert!(restore(&repo, &first.disks[0]).unwrap() == image);
    let error = restore(&repo, &second.disks[0]).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }) && error.to_string().contains(&new_pack), "{error}");
}

#[test]
fn an_object_in_the_place_of_another_is_found() {
    let (store, ..) = scene();
    let packs: Vec<_> = store.names().into_iter().filter(|n| n.starts_with("data/")).collect();
    store.tamper(&packs[0], Some(store.get(&packs[1], u64::MAX).unwrap()));
    assert!(finds(verify(&store, VerifyMode::Full), &packs[0]));
    assert!(!verify_ciphertext(&store, 1, &()).unwrap().is_ok());
}

#[test]
fn a_share_of_the_packs_can_be_verified() {
    let (store, ..) = scene();
    let repo = Repository::open(Arc::new(store), &secret()).unwrap();
    let half = VerifyOptions { percent: Some(50), ..VerifyOptions::default() };
    let report = repo.verify(&half, &()).unwrap();
    assert!(report.is_ok() && report.packs_read == report.packs.div_ceil(2), "{report:?}");
    assert!(repo.verify(&VerifyOptions { percent: Some(0), ..half }, &()).is_err());
    let cancelled = std::sync::atomic::AtomicBool::new(true);
    assert!(matches!(repo.verify(&VerifyOptions::default(), &cancelled), Err(Error::Cancelled)));
}
