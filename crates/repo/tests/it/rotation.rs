//! New generations of keys: what was written stays readable, what is written needs the new ones.

use std::sync::Arc;

use virtward_repo::{
    Error, KdfCost, Repository, RotateOptions, Secret,
    store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

use crate::common::*;

fn file() -> Secret {
    Secret::key_bytes(vec![7; 32]).unwrap()
}

fn options(others: Vec<Secret>) -> RotateOptions {
    RotateOptions { others, kdf: KdfCost::weak_for_tests(), ..RotateOptions::default() }
}

fn open(store: &MemStore, secret: &Secret) -> Result<Repository, Error> {
    Repository::open(Arc::new(store.clone()), secret)
}

/// A repository with two keys and a restore point.
fn scene() -> (MemStore, Repository, virtward_model::RestorePoint, Vec<u8>) {
    let (store, repo) = mem_repo();
    repo.add_key(&file(), "escrow", KdfCost::weak_for_tests()).unwrap();
    let image = noise(1, 6 * CHUNK as usize);
    let point = back_up(&repo, "web1", &image).unwrap();
    (store, repo, point, image)
}

#[test]
fn every_key_reads_old_and_new_after_a_rotation() {
    let (store, repo, old, image) = scene();
    let rotated = repo.rotate_keys(&secret(), &options(vec![file()])).unwrap();
    assert_eq!((rotated.generation, rotated.keys.len(), rotated.dropped.len()), (2, 2, 0));
    assert!(rotated.keys.iter().any(|key| key.label == "escrow") && rotated.keys.iter().all(|key| key.generation == 2));
    let by_password = open(&store, &secret()).unwrap();
    assert_eq!(by_password.list_keys().unwrap().len(), 2);
    let mut changed = image.clone();
    changed[..CHUNK as usize].fill(3);
    let new = back_up(&by_password, "web1", &changed).unwrap();
    assert!(new.disks[0].new_bytes <= u64::from(CHUNK), "what is stored is found by its id as before");
    for key in [secret(), file()] {
        let repo = open(&store, &key).unwrap();
        assert!(restore(&repo, &old.disks[0]).unwrap() == image);
        assert!(restore(&repo, &new.disks[0]).unwrap() == changed);
        assert!(repo.check(&()).unwrap().is_ok());
        assert!(repo.verify(&Default::default(), &()).unwrap().is_ok());
    }
    // Who kept the keys of the first generation does not get at what was written since.
    let list = repo.points().unwrap();
    assert_eq!((list.points.len(), list.unreadable.len()), (1, 1));
    assert!(matches!(list.unreadable[0].1, Error::KeyNotHeld { class: "metadata" }), "{:?}", list.unreadable);
    assert!(matches!(repo.rotate_keys(&secret(), &options(vec![file()])), Err(Error::Unsupported { .. })));
}

#[test]
fn keys_without_their_secret_are_named_and_dropped_only_when_told_so() {
    let (store, repo, old, image) = scene();
    let before = store.names();
    let error = repo.rotate_keys(&secret(), &options(vec![])).unwrap_err();
    assert!(matches!(&error, Error::KeysLeft { keys } if keys.contains("escrow")), "{error}");
    let wrong = options(vec![Secret::password("no such key")]);
    assert!(matches!(repo.rotate_keys(&secret(), &wrong), Err(Error::WrongSecret { .. })));
    assert_eq!(store.names(), before, "a refusal changes nothing");
    let drop = RotateOptions { drop_others: true, ..options(vec![]) };
    let rotated = repo.rotate_keys(&secret(), &drop).unwrap();
    assert_eq!(rotated.dropped.iter().map(|key| &*key.label).collect::<Vec<_>>(), ["escrow"]);
    assert!(matches!(open(&store, &file()), Err(Error::WrongSecret { .. })));
    assert!(restore(&open(&store, &secret()).unwrap(), &old.disks[0]).unwrap() == image);
}

#[test]
fn a_rotation_that_dies_anywhere_locks_nobody_out_and_can_be_repeated() {
    let (store, _, old, image) = scene();
    let mut died = 0;
    for at in 0..60 {
        for die_after_effect in [false, true] {
            let store = store.fork();
            let faults = Faults { die_at: Some(at), die_after_effect, ..Faults::default() };
            let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
            let outcome = Repository::open(Arc::new(faulty), &secret())
                .and_then(|repo| repo.rotate_keys(&secret(), &options(vec![file()])));
            died += u32::from(outcome.is_err());
            for key in [secret(), file()] {
                assert!(restore(&open(&store, &key).unwrap(), &old.disks[0]).unwrap() == image, "operation {at}");
            }
            let new = back_up(&open(&store, &secret()).unwrap(), "web1", &noise(2, 1000)).unwrap();
            let repo = open(&store, &secret()).unwrap();
            let again = repo.rotate_keys(&secret(), &options(vec![file()])).unwrap();
            assert_eq!(again.keys.len(), 2);
            for key in [secret(), file()] {
                let repo = open(&store, &key).unwrap();
                assert_eq!(repo.list_keys().unwrap().len(), 2);
                assert!(restore(&repo, &old.disks[0]).unwrap() == image);
                assert!(restore(&repo, &new.disks[0]).unwrap() == noise(2, 1000));
            }
        }
    }
    assert!((4..110).contains(&died), "{died}");
}

#[test]
fn of_two_rotations_at_once_one_wins_and_all_stays_readable() {
    let (store, one, old, image) = scene();
    let two = open(&store, &file()).unwrap();
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| one.rotate_keys(&secret(), &options(vec![file()])));
        let b = scope.spawn(|| two.rotate_keys(&file(), &options(vec![secret()])));
        (a.join().unwrap(), b.join().unwrap())
    });
    assert!(a.is_ok() ^ b.is_ok(), "{a:?} {b:?}");
    for key in [secret(), file()] {
        let repo = open(&store, &key).unwrap();
        assert!(repo.list_keys().unwrap().iter().all(|key| key.generation == 2));
        assert!(restore(&repo, &old.disks[0]).unwrap() == image);
        back_up(&repo, "web1", &noise(3, 1000)).unwrap();
    }
    assert_eq!(open(&store, &file()).unwrap().points().unwrap().points.len(), 3);
}

#[test]
fn a_rotation_to_sealed_data_allows_write_only_keys() {
    let (store, repo, old, image) = scene();
    let host = Secret::key_bytes(vec![9; 32]).unwrap();
    let error = repo.add_write_only_key(&host, "host", KdfCost::weak_for_tests()).unwrap_err();
    assert!(error.to_string().contains("key rotate --sealed"), "{error}");
    repo.rotate_keys(&secret(), &RotateOptions { sealed: true, ..options(vec![file()]) }).unwrap();
    let owner = open(&store, &secret()).unwrap();
    let key = owner.add_write_only_key(&host, "host", KdfCost::weak_for_tests()).unwrap();
    assert!(key.write_only && key.generation == 2);
    let on_host = open(&store, &host).unwrap();
    let mut changed = image.clone();
    changed[..CHUNK as usize].fill(5);
    let new = back_up_on(&on_host, "web1", &changed, Some(&old.disks[0]), &|index| index == 0).unwrap();
    assert!(matches!(restore(&on_host, &new.disks[0]), Err(Error::KeyNotHeld { class: "data" })));
    assert!(matches!(restore(&on_host, &old.disks[0]), Err(Error::KeyNotHeld { class: "data" })));
    assert!(restore(&owner, &new.disks[0]).unwrap() == changed);
    assert!(matches!(on_host.rotate_keys(&host, &options(vec![])), Err(Error::KeyNotHeld { .. })));
    // Sealed stays sealed, and the host's key stays what it is.
    let rotated = owner.rotate_keys(&secret(), &options(vec![file(), host.clone()])).unwrap();
    assert_eq!((rotated.generation, rotated.keys.iter().filter(|key| key.write_only).count()), (3, 1));
    let on_host = open(&store, &host).unwrap();
    let third = back_up(&on_host, "web1", &changed).unwrap();
    assert!(restore(&on_host, &third.disks[0]).is_err());
    assert!(restore(&open(&store, &file()).unwrap(), &third.disks[0]).unwrap() == changed);
}
