//! Copying restore points to another repository, and healing one from the other.

use std::sync::Arc;

use virtward_model::{DiskRecord, PointId, RestorePoint};
use virtward_repo::{
    CopyReport, Error, GcOptions, InitOptions, KdfCost, Repository, Secret, Store, VerifyOptions,
    store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

use crate::{common::*, hooked::Hooked};

const C: usize = CHUNK as usize;

fn other_secret() -> Secret {
    Secret::password("another site")
}

fn mirror() -> (MemStore, Repository) {
    let store = MemStore::new();
    let options = InitOptions { kdf: KdfCost::weak_for_tests(), ..InitOptions::default() };
    (store.clone(), Repository::init(Arc::new(store), &other_secret(), &options).unwrap())
}

fn copy(from: &Repository, to: &Repository, ids: &[PointId]) -> Result<CopyReport, Error> {
    let mut told = Vec::new();
    let report = from.copy_points(to, ids, &small(), &(), &mut |copied| told.push(copied.id))?;
    assert_eq!(told, report.copied.iter().map(|copied| copied.id).collect::<Vec<_>>());
    Ok(report)
}

/// States of a disk that grows and shrinks, inside chunks and beyond pages, each a restore point on the one before.
fn history(repo: &Repository) -> Vec<(RestorePoint, Vec<u8>)> {
    let mut image = noise(3, 6 * C + 1000);
    let mut states: Vec<(RestorePoint, Vec<u8>)> = Vec::new();
    let mut step = |image: &[u8], dirty: &dyn Fn(u64) -> bool| {
        let base = states.last().map(|(point, _)| point.disks[0].clone());
        let point = back_up_on(repo, "web1", image, base.as_ref(), dirty).unwrap();
        assert!(restore(repo, &point.disks[0]).unwrap() == image);
        states.push((point, image.to_vec()));
    };
    step(&image, &|_| true);
    image[2 * C..3 * C].copy_from_slice(&noise(4, C));
    image[4 * C..5 * C].fill(0);
    step(&image, &|index| [2, 4].contains(&index));
    image.resize(270 * C + 77, 0);
    image[269 * C..].copy_from_slice(&noise(5, C + 77));
    step(&image, &|index| index >= 269);
    image.truncate(5 * C + 500);
    step(&image, &|_| false);
    image.resize(6 * C, 0);
    step(&image, &|_| false);
    image[5 * C + 600] = 9;
    step(&image, &|index| index == 5);
    states
}

fn ids(states: &[(RestorePoint, Vec<u8>)]) -> Vec<PointId> {
    states.iter().map(|(point, _)| point.id).collect()
}

fn assert_same(repo: &Repository, states: &[(RestorePoint, Vec<u8>)]) {
    for (point, image) in states {
        let found = repo.point(point.id).unwrap();
        assert!(restore(repo, &found.disks[0]).unwrap() == *image, "{}", point.id);
        assert!(restore_slowly(repo, &found.disks[0]).unwrap() == *image);
        assert_eq!(repo.attachments(point.id).unwrap(), attachments());
    }
}

fn verified(repo: &Repository) -> bool {
    repo.verify(&VerifyOptions::default(), &()).unwrap().damaged_points.is_empty()
}

#[test]
fn copies_restore_when_the_original_is_gone_and_are_made_once() {
    let ((store, repo), (there, to)) = (mem_repo(), mirror());
    let states = history(&repo);
    let report = copy(&repo, &to, &ids(&states)).unwrap();
    assert_eq!(report.copied.iter().map(|c| c.id).collect::<Vec<_>>(), ids(&states));
    let read: Vec<u64> = report.copied.iter().map(|copied| copied.read_bytes / u64::from(CHUNK)).collect();
    assert_eq!((report.copied[0].base, read[0]), (None, 6), "7 chunks, the last of them short");
    assert_eq!(report.copied[1].base, Some(states[0].0.id));
    assert_eq!(read[1], 1, "one chunk has other bytes, one is zero now");
    for name in store.names() {
        store.tamper(&name, None);
    }
    let to = Repository::open(Arc::new(there.clone()), &other_secret()).unwrap();
    assert_same(&to, &states);
    assert!(verified(&to) && to.check(&()).unwrap().is_ok());
    let copied = to.point(states[1].0.id).unwrap();
    let from = copied.copied_from.clone().unwrap();
    assert_eq!((from.repository, from.point), (repo.id(), states[1].0.id));
    let expected =
        RestorePoint { disks: copied.disks.clone(), copied_from: copied.copied_from.clone(), ..states[1].0.clone() };
    assert_eq!(copied, expected, "all else is as it was");
}

#[test]
fn a_point_without_attachments_is_copied() {
    let ((_, repo), (_, to)) = (mem_repo(), mirror());
    let writer = repo.writer(small()).unwrap();
    writer.publish(point("image", vec![]), vec![]).unwrap();
    let id = repo.points().unwrap().points[0].id;
    assert_eq!(repo.attachments(id).unwrap(), []);
    assert_eq!(copy(&repo, &to, &[id]).unwrap().copied.len(), 1);
    assert_eq!(to.attachments(id).unwrap(), []);
}

#[test]
fn a_second_copy_does_nothing_and_one_repository_is_no_two() {
    let ((_, repo), (there, to)) = (mem_repo(), mirror());
    let states = history(&repo);
    copy(&repo, &to, &ids(&states[..2])).unwrap();
    let before = there.names();
    let again = copy(&repo, &to, &ids(&states[..2])).unwrap();
    assert_eq!((again.copied.len(), again.present), (0, ids(&states[..2])));
    assert_eq!(there.names(), before);
    let gone = PointId::random();
    let report = copy(&repo, &to, &[gone]).unwrap();
    assert!(matches!(report.failed[..], [(id, Error::NoPoint { .. })] if id == gone));
    assert!(matches!(copy(&repo, &repo, &ids(&states)), Err(Error::Unsupported { .. })));
}

#[test]
fn an_interrupted_copy_goes_on_where_it_was() {
    let (_, repo) = mem_repo();
    let states = history(&repo);
    let (empty, _) = mirror();
    let run = |store: &MemStore, faults: Faults| {
        let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
        let outcome =
            Repository::open(Arc::new(faulty.clone()), &other_secret()).and_then(|to| copy(&repo, &to, &ids(&states)));
        (outcome, faulty.operations())
    };
    let (whole, operations) = run(&empty.fork(), Faults::default());
    let stored = |report: &CopyReport| report.copied.iter().map(|copied| copied.stored_bytes).sum::<u64>();
    let all = stored(&whole.unwrap());
    let mut found_again = 0;
    for at in (3..operations).step_by(9) {
        let store = empty.fork();
        let (outcome, _) = run(&store, Faults { die_at: Some(at), ..Faults::default() });
        // The number of operations varies a little: dying while the last lease ends costs nothing.
        assert!(outcome.is_err() || at + 60 > operations, "operation {at} of {operations}");
        let done = Repository::open(Arc::new(store.clone()), &other_secret()).unwrap().points().unwrap().points.len();
        let (rest, _) = run(&store, Faults::default());
        let rest = rest.unwrap();
        assert_eq!((rest.present.len(), rest.copied.len()), (done, states.len() - done));
        found_again += u32::from(done == 0 && stored(&rest) < all);
        let to = Repository::open(Arc::new(store), &other_secret()).unwrap();
        assert_same(&to, &states);
        assert!(verified(&to));
    }
    assert!(found_again > 0, "no interrupted run left chunks that the next one found");
}

#[test]
fn a_cancelled_copy_ends_and_publishes_no_part() {
    let ((_, repo), (_, to)) = (mem_repo(), mirror());
    let states = history(&repo);
    let cancelled = std::sync::atomic::AtomicBool::new(true);
    let outcome = repo.copy_points(&to, &ids(&states), &small(), &cancelled, &mut |_| {});
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert!(to.points().unwrap().points.is_empty());
}

#[test]
fn copies_of_copies_know_each_other_and_come_home() {
    let ((_, a), (_, b), (_, c)) = (mem_repo(), mirror(), mirror());
    let states = history(&a);
    copy(&a, &b, &ids(&states)).unwrap();
    copy(&b, &c, &ids(&states[..3])).unwrap();
    let report = copy(&a, &c, &ids(&states)).unwrap();
    assert_eq!((report.present.len(), report.copied.len()), (3, states.len() - 3));
    assert_eq!(report.copied[0].base, Some(states[2].0.id), "a copy that came by another way is a base too");
    assert_same(&c, &states);
    assert_eq!(copy(&c, &a, &ids(&states)).unwrap().present.len(), states.len());
    a.delete_point(states[1].0.id).unwrap();
    assert_eq!(copy(&c, &a, &ids(&states)).unwrap().copied.len(), 1);
    assert_eq!(a.point(states[1].0.id).unwrap().copied_from, None, "it is at home");
    assert_same(&a, &states);
}

#[test]
fn a_damaged_point_does_not_stop_the_others() {
    let ((store, repo), (_, to)) = (mem_repo(), mirror());
    let good = back_up(&repo, "web1", &noise(1, 4 * C)).unwrap();
    let before = store.names();
    let bad = back_up(&repo, "web2", &noise(2, 4 * C)).unwrap();
    let packs = store.names().into_iter().filter(|name| name.starts_with("data/") && !before.contains(name));
    packs.for_each(|name| store.tamper(&name, None));
    let fresh = back_up(&Repository::open(Arc::new(store), &secret()).unwrap(), "web3", &noise(3, 4 * C)).unwrap();
    let report = copy(&repo, &to, &[good.id, bad.id, fresh.id]).unwrap();
    assert_eq!(report.copied.iter().map(|c| c.id).collect::<Vec<_>>(), [good.id, fresh.id]);
    assert!(matches!(&report.failed[..], [(id, e)] if *id == bad.id && e.is_damage()), "{:?}", report.failed);
    assert!(matches!(to.point(bad.id), Err(Error::NoPoint { .. })));
}

/// Damages every object that matches, each in its own way.
fn damage(store: &MemStore, prefix: &str) {
    for (number, name) in store.names().into_iter().filter(|name| name.starts_with(prefix)).enumerate() {
        let mut bytes = store.get(&name, u64::MAX).unwrap();
        let middle = 256 + (bytes.len() - 700) / 2;
        bytes[middle] ^= 1;
        let len = bytes.len();
        store.tamper(
            &name,
            match number % 3 {
                0 => None,
                1 => Some(bytes),
                _ => Some(bytes[..len / 2].to_vec()),
            },
        );
    }
}

#[test]
fn every_pack_damaged_heals_from_the_copy_and_the_other_way_round() {
    for reverse in [false, true] {
        for prefix in ["data/", "meta/", ""] {
            let ((store, repo), (there, to)) = (mem_repo(), mirror());
            let states = history(&repo);
            copy(&repo, &to, &ids(&states)).unwrap();
            let (hurt, hurt_secret, whole) =
                if reverse { (there, other_secret(), repo) } else { (store, secret(), to) };
            match prefix {
                "" => ["data/", "meta/"].iter().for_each(|prefix| damage(&hurt, prefix)),
                prefix => damage(&hurt, prefix),
            }
            let repo = Repository::open(Arc::new(hurt.clone()), &hurt_secret).unwrap();
            assert!(!verified(&repo), "{prefix}");
            let report = repo.heal_from(&whole, &small(), &()).unwrap();
            assert!(report.damaged_points.is_empty(), "{prefix} {reverse}: {report:?}");
            assert!(!report.healed.is_empty() && report.stored > 0 && report.without_copy.is_empty());
            let repo = Repository::open(Arc::new(hurt.clone()), &hurt_secret).unwrap();
            assert!(verified(&repo), "{prefix}");
            assert_same(&repo, &states);
            let again = repo.heal_from(&whole, &small(), &()).unwrap();
            assert_eq!((again.stored, again.healed.len()), (0, 0));
            assert!(!hurt.names().iter().any(|name| name.starts_with("leases/")));
            // What was damaged is garbage now.
            let collected = repo.collect_garbage(&GcOptions { writer: small(), ..GcOptions::default() }, &()).unwrap();
            assert!(collected.waiting_for.is_empty(), "{collected:?}");
            let repo = Repository::open(Arc::new(hurt), &hurt_secret).unwrap();
            let clean = repo.verify(&VerifyOptions::default(), &()).unwrap();
            assert!(clean.is_ok(), "{prefix} {reverse}: {:?}", clean.damaged);
            assert_same(&repo, &states);
        }
    }
}

#[test]
fn what_the_mirror_does_not_have_stays_damaged_and_is_named() {
    let ((store, repo), (_, to)) = (mem_repo(), mirror());
    let kept = back_up(&repo, "web1", &noise(1, 4 * C)).unwrap();
    copy(&repo, &to, &[kept.id]).unwrap();
    let before = store.names();
    let lost = back_up(&repo, "web2", &noise(2, 4 * C)).unwrap();
    for name in store.names().iter().filter(|name| name.starts_with("data/") && !before.contains(name)) {
        store.tamper(name, None);
    }
    let repo = Repository::open(Arc::new(store), &secret()).unwrap();
    let report = repo.heal_from(&to, &small(), &()).unwrap();
    assert_eq!(report.damaged_points.iter().map(|p| p.id).collect::<Vec<_>>(), [lost.id]);
    assert_eq!((report.without_copy, report.healed.len()), (vec![lost.id], 0));
    assert!(restore(&repo, &kept.disks[0]).unwrap() == noise(1, 4 * C));
}

#[test]
fn a_mirror_with_other_content_heals_nothing() {
    let ((store, repo), (_, to)) = (mem_repo(), mirror());
    let point = back_up(&repo, "web1", &noise(1, 4 * C)).unwrap();
    // A point that claims to be a copy and is not.
    let writer = to.writer(small()).unwrap();
    let disk =
        writer.disk(virtward_repo::DiskSpec { size_bytes: 4 * C as u64, chunk_bytes: CHUNK, base: None }).unwrap();
    (0..4).for_each(|index| disk.put(index, noise(9 + index, C)).unwrap());
    let record: DiskRecord = disk_record("vda", 4 * C as u64, CHUNK, &disk.finish().unwrap());
    let from = virtward_model::CopiedFrom { repository: repo.id(), point: point.id };
    let false_copy = RestorePoint { disks: vec![record], copied_from: Some(from), ..point.clone() };
    writer.publish(false_copy, vec![]).unwrap();
    ["data/", "meta/"].iter().for_each(|prefix| {
        store.names().iter().filter(|name| name.starts_with(prefix)).for_each(|name| store.tamper(name, None));
    });
    let repo = Repository::open(Arc::new(store), &secret()).unwrap();
    let report = repo.heal_from(&to, &small(), &()).unwrap();
    assert_eq!(report.damaged_points.len(), 1);
    assert!(restore(&repo, &point.disks[0]).is_err());
}

/// Damages every object that matches, so that it is still there.
fn spoil(store: &MemStore, prefix: &str) {
    for (number, name) in store.names().into_iter().filter(|name| name.starts_with(prefix)).enumerate() {
        let mut bytes = store.get(&name, u64::MAX).unwrap();
        let middle = bytes.len() / 2;
        match number % 3 {
            0 => bytes[middle] ^= 1,
            1 => bytes.truncate(middle),
            _ => bytes.clear(),
        }
        store.tamper(&name, Some(bytes));
    }
}

#[test]
fn damaged_restore_points_themselves_come_back_from_the_copy_and_the_other_way_round() {
    for reverse in [false, true] {
        let ((store, repo), (there, to)) = (mem_repo(), mirror());
        let states = history(&repo);
        copy(&repo, &to, &ids(&states)).unwrap();
        let (hurt, hurt_secret, whole) = if reverse { (there, other_secret(), repo) } else { (store, secret(), to) };
        let open = || Repository::open(Arc::new(hurt.clone()), &hurt_secret).unwrap();
        open().add_hold(states[0].0.id, "case 17").unwrap();
        spoil(&hurt, "points/");
        damage(&hurt, "data/");
        assert_eq!(open().points().unwrap().unreadable.len(), states.len());
        // Finds, and remembers, which packs are damaged.
        assert!(!open().verify(&VerifyOptions::default(), &()).unwrap().is_ok());
        let report = open().heal_from(&whole, &small(), &()).unwrap();
        assert!(report.unreadable.is_empty() && report.damaged_points.is_empty(), "{report:?}");
        let mut healed = report.healed;
        healed.sort_unstable();
        let mut all = ids(&states);
        all.sort_unstable();
        assert_eq!(healed, all);
        assert_same(&open(), &states);
        assert!(verified(&open()));
        assert!(matches!(open().delete_point(states[0].0.id), Err(Error::Held { .. })), "a hold outlives the damage");
        let collected = open().collect_garbage(&GcOptions { writer: small(), ..GcOptions::default() }, &()).unwrap();
        assert_eq!(collected.recoverable_points, 0, "nothing of it counts as deleted: {collected:?}");
        assert_same(&open(), &states);
        assert!(open().check(&()).unwrap().is_ok());
    }
}

#[test]
fn a_damaged_restore_point_without_a_whole_copy_stays_and_is_named() {
    let ((store, repo), (there, to)) = (mem_repo(), mirror());
    let kept = back_up(&repo, "web1", &noise(1, 4 * C)).unwrap();
    copy(&repo, &to, &[kept.id]).unwrap();
    let alone = back_up(&repo, "web2", &noise(2, 4 * C)).unwrap();
    spoil(&store, "points/");
    damage(&there, "data/");
    let before = store.names();
    let repo = Repository::open(Arc::new(store.clone()), &secret()).unwrap();
    let to = Repository::open(Arc::new(there), &other_secret()).unwrap();
    let mut unreadable = repo.heal_from(&to, &small(), &()).unwrap().unreadable;
    unreadable.sort_unstable();
    let mut expected = [format!("points/{}", kept.id), format!("points/{}", alone.id)];
    expected.sort_unstable();
    assert_eq!(unreadable, expected);
    let points =
        |names: Vec<String>| names.into_iter().filter(|n| n.contains(&kept.id.to_string())).collect::<Vec<_>>();
    assert_eq!(points(store.names()), points(before), "what cannot be replaced is not touched");
}

#[test]
fn who_dies_while_a_restore_point_is_replaced_has_not_lost_it() {
    let ((origin, repo), (_, to)) = (mem_repo(), mirror());
    let image = noise(1, 4 * C);
    let point = back_up(&repo, "web1", &image).unwrap();
    copy(&repo, &to, &[point.id]).unwrap();
    spoil(&origin, "points/");
    let mut in_between = 0;
    for at in 0..200 {
        for die_after_effect in [false, true] {
            let store = origin.fork();
            let faults = Faults { die_at: Some(at), die_after_effect, ..Faults::default() };
            let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
            let outcome = Repository::open(Arc::new(faulty.clone()), &secret())
                .and_then(|repo| repo.heal_from(&to, &small(), &()).map(drop));
            let open = || Repository::open(Arc::new(store.clone()), &secret()).unwrap();
            if open().points().unwrap().points.is_empty() {
                assert!(outcome.is_err(), "acknowledged and not there, operation {at}");
                if open().points().unwrap().unreadable.is_empty() {
                    in_between += 1;
                    open().recover_point(point.id, &()).unwrap();
                } else {
                    assert_eq!(open().heal_from(&to, &small(), &()).unwrap().healed, [point.id]);
                }
            }
            assert!(restore(&open(), &open().point(point.id).unwrap().disks[0]).unwrap() == image);
            if outcome.is_ok() {
                assert!(in_between > 0, "no death between removing the damaged object and putting the good one");
                return;
            }
        }
    }
    panic!("healing takes more than 200 operations");
}

#[test]
fn a_copy_that_withdraws_leaves_alone_what_another_one_has_put_meanwhile() {
    let ((_, from), (store, _)) = (mem_repo(), mirror());
    let image = noise(1, 4 * C);
    let point = back_up(&from, "web1", &image).unwrap();
    let hooked = Hooked::new(&store);
    let (plain, source) = (store.clone(), from.clone());
    hooked.at("put points/", true, move || {
        // A collector ends its lease, somebody deletes the restore point, and somebody else copies it again.
        let lease = plain.names().into_iter().find(|name| name.starts_with("leases/")).unwrap();
        let end = format!("{}.end", lease.split('.').next().unwrap());
        assert_eq!(plain.put_if_absent(&end, &[]).unwrap(), virtward_repo::store::Put::Created);
        let repo = Repository::open(Arc::new(plain), &other_secret()).unwrap();
        repo.delete_point(point.id).unwrap();
        assert_eq!(copy(&source, &repo, &[point.id]).unwrap().copied.len(), 1);
    });
    let to = Repository::open(Arc::new(hooked.clone()), &other_secret()).unwrap();
    let outcome = copy(&from, &to, &[point.id]);
    assert!(matches!(outcome, Err(Error::LeaseLost { .. })), "{outcome:?}");
    assert!(hooked.is_through());
    let to = Repository::open(Arc::new(store), &other_secret()).unwrap();
    let there = to.point(point.id).expect("the second copy was acknowledged");
    assert!(restore(&to, &there.disks[0]).unwrap() == image);
}
