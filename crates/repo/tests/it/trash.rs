//! Deleting, holding and recovering restore points, alone and at the same moment.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use virtward_model::RestorePoint;
use virtward_repo::{
    Error, GRACE_DEFAULT, GcOptions, Repository, Store, VerifyOptions,
    store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

use crate::{common::*, hooked::Hooked};

fn scene() -> (MemStore, Repository, RestorePoint, Vec<u8>) {
    let (store, repo) = mem_repo();
    let image = noise(1, 12 * CHUNK as usize);
    let point = back_up(&repo, "web1", &image).unwrap();
    (store, repo, point, image)
}

fn open(store: impl Store + 'static) -> Repository {
    Repository::open(Arc::new(store), &secret()).unwrap()
}

fn is_whole(store: &MemStore, point: &RestorePoint, image: &[u8]) -> bool {
    let repo = open(store.clone());
    repo.point(point.id).is_ok_and(|point| restore(&repo, &point.disks[0]).unwrap() == image)
}

#[test]
fn a_deleted_point_is_listed_and_comes_back_whole() {
    let (store, repo, point, image) = scene();
    let before = Timestamp::now();
    repo.delete_point(point.id).unwrap();
    assert!(matches!(open(store.clone()).point(point.id), Err(Error::NoPoint { .. })));
    let list = open(store.clone()).deleted_points(GRACE_DEFAULT).unwrap();
    let [deleted] = &list.points[..] else { panic!("{list:?}") };
    assert_eq!((&deleted.point, list.unreadable.len()), (&point, 0));
    assert!((before..=Timestamp::now()).contains(&deleted.deleted));
    assert_eq!(deleted.recoverable_until.duration_since(deleted.deleted).unsigned_abs(), GRACE_DEFAULT);
    assert_eq!(open(store.clone()).recover_point(point.id, &()).unwrap(), point);
    assert!(is_whole(&store, &point, &image));
    assert!(open(store.clone()).deleted_points(GRACE_DEFAULT).unwrap().points.is_empty());
    assert!(!store.names().iter().any(|name| name.starts_with("leases/")));
    assert!(open(store.clone()).check(&()).unwrap().is_ok());
    let again = open(store.clone()).recover_point(point.id, &()).unwrap();
    assert_eq!(again, point, "recovering what is there changes nothing");
    let other = back_up(&repo, "web1", &image).unwrap();
    assert!(matches!(repo.recover_point(other.id, &()), Err(Error::NoPoint { .. })));
}

#[test]
fn a_second_deletion_begins_a_new_grace_period() {
    let (store, repo, point, image) = scene();
    repo.delete_point(point.id).unwrap();
    let first = repo.deleted_points(GRACE_DEFAULT).unwrap().points[0].deleted;
    repo.recover_point(point.id, &()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let between = Timestamp::now();
    repo.delete_point(point.id).unwrap();
    let second = repo.deleted_points(GRACE_DEFAULT).unwrap().points[0].deleted;
    assert!(first < between && between <= second, "{first} {between} {second}");
    repo.recover_point(point.id, &()).unwrap();
    assert!(is_whole(&store, &point, &image));
}

#[test]
fn what_lost_its_data_is_not_recovered_and_the_loss_is_named() {
    let (store, repo, point, _) = scene();
    repo.delete_point(point.id).unwrap();
    let pack = store.names().into_iter().find(|name| name.starts_with("data/")).unwrap();
    store.tamper(&pack, None);
    let error = open(store.clone()).recover_point(point.id, &()).unwrap_err();
    let Error::Unrecoverable { lost } = &error else { panic!("{error}") };
    assert!(lost.attachments || lost.disks[0].target == "vda", "{lost:?}");
    assert!(error.to_string().contains("are gone from the repository"), "{error}");
    assert!(store.names().contains(&format!("trash/{}", point.id)), "it stays where it is");
    assert!(open(store).points().unwrap().points.is_empty());
}

#[test]
fn what_is_in_condemned_packs_is_not_recovered() {
    let (store, repo, point, _) = scene();
    let pack = store.names().into_iter().find(|name| name.starts_with("data/")).unwrap();
    let mut bytes = store.get(&pack, u64::MAX).unwrap();
    bytes[300] ^= 1;
    let good = store.get(&pack, u64::MAX).unwrap();
    store.tamper(&pack, Some(bytes));
    assert!(!repo.verify(&VerifyOptions::default(), &()).unwrap().is_ok());
    // The bytes are good again, but a collector may delete the pack at any time.
    store.tamper(&pack, Some(good));
    repo.delete_point(point.id).unwrap();
    assert!(matches!(open(store).recover_point(point.id, &()), Err(Error::Unrecoverable { .. })));
}

#[test]
fn dying_at_any_step_of_deletion_or_recovery_loses_nothing() {
    let (store, _, point, image) = scene();
    for delete in [true, false] {
        let mut died = 0;
        for at in 0..200 {
            for die_after_effect in [false, true] {
                let store = store.fork();
                if !delete {
                    open(store.clone()).delete_point(point.id).unwrap();
                }
                let repo = open(store.clone());
                let faults = Faults { die_at: Some(at), die_after_effect, ..Faults::default() };
                let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
                let outcome = Repository::open(Arc::new(faulty), &secret()).and_then(|repo| match delete {
                    true => repo.delete_point(point.id),
                    false => repo.recover_point(point.id, &()).map(drop),
                });
                died += u32::from(outcome.is_err());
                if repo.point(point.id).is_err() {
                    assert!(delete || outcome.is_err(), "acknowledged and not there, operation {at}");
                    repo.recover_point(point.id, &()).unwrap();
                }
                assert!(is_whole(&store, &point, &image), "operation {at}");
                assert!(repo.check(&()).unwrap().is_ok());
            }
        }
        assert!((4..390).contains(&died), "{died}");
    }
}

#[test]
fn a_collection_leaves_deleted_points_alone_until_their_grace_period_ends() {
    let (store, repo, point, image) = scene();
    let kept = back_up(&repo, "web2", &noise(5, 4 * CHUNK as usize)).unwrap();
    repo.delete_point(point.id).unwrap();
    let collect = |grace| {
        let options = GcOptions { grace, writer: small(), ..GcOptions::default() };
        open(store.clone()).collect_garbage(&options, &()).unwrap()
    };
    assert_eq!(collect(GRACE_DEFAULT).deleted_packs, 0);
    open(store.clone()).recover_point(point.id, &()).unwrap();
    assert!(collect(Duration::ZERO).deleted_packs == 0 && is_whole(&store, &point, &image), "it is back for good");
    open(store.clone()).delete_point(point.id).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    let freed = collect(Duration::ZERO);
    assert!(freed.deleted_packs > 0 && freed.expired_points == [point.id], "{freed:?}");
    assert!(matches!(open(store.clone()).recover_point(point.id, &()), Err(Error::NoPoint { .. })));
    assert!(is_whole(&store, &kept, &noise(5, 4 * CHUNK as usize)));
}

#[test]
fn a_held_point_cannot_be_deleted_and_says_why() {
    let (store, repo, point, image) = scene();
    let hold = repo.add_hold(point.id, "case 17, ask legal").unwrap();
    assert_eq!(open(store.clone()).hold(point.id).unwrap().unwrap().since, hold.since);
    let error = open(store.clone()).delete_point(point.id).unwrap_err();
    assert!(matches!(&error, Error::Held { reason, .. } if reason == "case 17, ask legal"), "{error}");
    assert!(repo.add_hold(point.id, "case 17, ask legal").is_ok(), "the same again is no conflict");
    assert!(matches!(repo.add_hold(point.id, "other"), Err(Error::Held { .. })));
    for bad in ["", "  ", "two\nlines", &"x".repeat(1001)] {
        assert!(matches!(repo.add_hold(point.id, bad), Err(Error::Misuse { .. })), "{bad:?}");
    }
    assert_eq!(repo.holds().unwrap().keys().collect::<Vec<_>>(), [&point.id]);
    assert!(!store.names().iter().any(|n| String::from_utf8_lossy(&store.get(n, u64::MAX).unwrap()).contains("legal")));
    assert!(repo.remove_hold(point.id).unwrap() && !repo.remove_hold(point.id).unwrap());
    repo.delete_point(point.id).unwrap();
    assert!(matches!(repo.add_hold(point.id, "too late"), Err(Error::NoPoint { .. })));
    assert!(repo.holds().unwrap().is_empty(), "a hold that failed leaves nothing");
    repo.recover_point(point.id, &()).unwrap();
    assert!(is_whole(&store, &point, &image));
}

#[test]
fn a_hold_that_cannot_be_read_holds_all_the_same() {
    let (store, repo, point, _) = scene();
    repo.add_hold(point.id, "case 17").unwrap();
    let name = format!("holds/{}", point.id);
    let mut bytes = store.get(&name, u64::MAX).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    store.tamper(&name, Some(bytes));
    assert!(matches!(repo.delete_point(point.id), Err(Error::Held { .. })));
    assert!(repo.check(&()).unwrap().damaged.iter().any(|damage| damage.object == name));
    assert!(virtward_repo::verify_ciphertext(&store, 1, &()).unwrap().damaged.iter().any(|d| d.object == name));
}

#[test]
fn a_hold_and_a_deletion_at_the_same_moment() {
    let steps = ["size holds/", "size points/", "delete trash/", "put trash/", "delete points/"];
    for step in steps {
        for after in [false, true] {
            let (store, _, point, image) = scene();
            let hooked = Hooked::new(&store);
            let deleting = open(hooked.clone());
            let (held, id) = (Arc::new(std::sync::Mutex::new(None)), point.id);
            let (outcome, holding) = (held.clone(), open(store.clone()));
            hooked.at(step, after, move || *outcome.lock().unwrap() = Some(holding.add_hold(id, "case 17")));
            let deleted = deleting.delete_point(point.id);
            assert!(hooked.is_through(), "{step}");
            let held = held.lock().unwrap().take().unwrap();
            let there = is_whole(&store, &point, &image);
            assert_eq!(held.is_ok(), deleted.is_err(), "{step} {after}: {held:?} {deleted:?}");
            assert_eq!(held.is_ok(), there, "{step} {after}");
            assert_eq!(open(store).holds().unwrap().len(), usize::from(there));
        }
    }
}

#[test]
fn a_deletion_between_the_steps_of_adding_a_hold() {
    for (step, after) in [("put holds/", false), ("put holds/", true), ("size points/", false), ("size points/", true)]
    {
        let (store, _, point, image) = scene();
        let hooked = Hooked::new(&store);
        let (holding, deleting, id) = (open(hooked.clone()), open(store.clone()), point.id);
        let deleted = Arc::new(std::sync::Mutex::new(None));
        let outcome = deleted.clone();
        hooked.at(step, after, move || *outcome.lock().unwrap() = Some(deleting.delete_point(id)));
        let held = holding.add_hold(point.id, "case 17");
        let deleted = deleted.lock().unwrap().take().unwrap();
        assert!(held.is_err() || is_whole(&store, &point, &image), "{step} {after}: a hold that does not hold");
        assert!(deleted.is_err() || !is_whole(&store, &point, &image), "{step} {after}");
        assert_eq!(held.is_ok(), !open(store).holds().unwrap().is_empty());
    }
}

#[test]
fn a_recovered_point_is_neither_recoverable_nor_beyond_recovery() {
    let (store, repo, point, image) = scene();
    let gc = |grace: Duration| {
        let options = GcOptions { grace, writer: small(), ..GcOptions::default() };
        open(store.clone()).collect_garbage(&options, &()).unwrap()
    };
    repo.delete_point(point.id).unwrap();
    assert_eq!(gc(GRACE_DEFAULT).recoverable_points, 1);
    repo.recover_point(point.id, &()).unwrap();
    let report = gc(GRACE_DEFAULT);
    assert_eq!((report.points, report.recoverable_points), (1, 0), "{report:?}");
    store.advance(2 * GRACE_DEFAULT);
    let report = gc(GRACE_DEFAULT);
    assert!(report.expired_points.is_empty(), "{report:?}");
    assert!(is_whole(&store, &point, &image));
    // A second deletion counts from itself, and ends like any other.
    open(store.clone()).delete_point(point.id).unwrap();
    assert_eq!(gc(GRACE_DEFAULT).recoverable_points, 1);
    store.advance(2 * GRACE_DEFAULT);
    assert_eq!(gc(GRACE_DEFAULT).expired_points, [point.id]);
    assert!(!store.names().iter().any(|name| name.starts_with("trash/")));
}
