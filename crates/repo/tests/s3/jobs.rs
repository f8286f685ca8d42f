//! Whole backups and restores on object storage.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use virtward_repo::{
    DiskSpec, Repository, RestoreOptions,
    store::cache::{CacheOptions, CachedStore},
    verify_ciphertext,
};

use crate::{
    common::*,
    http::{Distance, Http, Reply},
    server::{Server, names, store_at},
};

#[test]
fn a_disk_comes_back_from_a_bucket() {
    let server = Server::start();
    let repo = init(server.store("hosts/one"));
    let mut image = noise(1, 20 * CHUNK as usize + 77);
    let full = back_up(&repo, "web1", &image).unwrap();
    image[3 * CHUNK as usize..4 * CHUNK as usize].fill(7);
    let next = back_up_on(&repo, "web1", &image, Some(&full.disks[0]), &|index| index == 3).unwrap();

    let repo = Repository::open(server.store("hosts/one"), &secret()).unwrap();
    assert_eq!(repo.points().unwrap().points, [full.clone(), next.clone()]);
    assert!(restore(&repo, &next.disks[0]).unwrap() == image);
    assert!(restore_slowly(&repo, &next.disks[0]).unwrap() == image);
    assert_eq!(repo.attachments(next.id).unwrap(), attachments());
    repo.delete_point(full.id).unwrap();
    assert!(restore(&repo, &next.disks[0]).unwrap() == image);
    let check = repo.check(&()).unwrap();
    assert!(check.is_ok(), "{check:?}");
    let verify = repo.verify(&Default::default(), &()).unwrap();
    assert!(verify.is_ok() && verify.chunks_checked > 20, "{verify:?}");
    assert!(verify_ciphertext(&**repo.store(), 0, &()).unwrap().is_ok());
    let left = names(&**repo.store());
    assert!(!left.iter().any(|name| name.starts_with("leases/")), "a finished run leaves no lease: {left:?}");
    assert!(left.contains(&format!("trash/{}", full.id)), "{left:?}");
}

#[test]
fn damage_in_a_bucket_is_found_behind_a_cache() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { dir: dir.path().into(), max_bytes: 1 << 30 };
    let repo = init(Arc::new(CachedStore::new(server.store("a"), &options).unwrap()));
    let image = noise(5, 8 * CHUNK as usize);
    let saved = back_up(&repo, "web1", &image).unwrap();
    assert!(restore(&repo, &saved.disks[0]).unwrap() == image);
    let meta = names(&**repo.store()).into_iter().find(|name| name.starts_with("meta/")).unwrap();
    let file = server.file("a", &meta);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[300] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let verify = repo.verify(&Default::default(), &()).unwrap();
    assert!(verify.damaged.iter().any(|damage| damage.object == meta), "{verify:?}");
}

#[test]
fn a_server_that_dies_and_comes_back_costs_only_time() {
    let mut server = Server::start();
    let repo = init(server.store("a"));
    let image = noise(6, 40 * CHUNK as usize);
    let writer = repo.writer(small()).unwrap();
    let size_bytes = image.len() as u64;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: None }).unwrap();
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        match index {
            15 => server.kill(),
            20 => server.revive(),
            _ => {}
        }
        disk.put(index as u64, chunk.to_vec()).unwrap();
    }
    let result = disk.finish().unwrap();
    let record = disk_record("vda", size_bytes, CHUNK, &result);
    writer.publish(point("web1", vec![record.clone()]), attachments()).unwrap();
    assert!(restore(&repo, &record).unwrap() == image);
    assert!(repo.check(&()).unwrap().is_ok());
}

#[test]
fn a_backup_that_is_cut_off_leaves_nothing_that_counts() {
    let server = Server::start();
    init(server.store("a"));
    let cut = Arc::new(AtomicBool::new(false));
    let is_cut = cut.clone();
    let proxy = Http::start(server.port, move |_| match is_cut.load(SeqCst) {
        true => Reply::error(403, "AccessDenied"),
        false => Reply::Forward,
    });
    let repo = Repository::open(store_at(&proxy.endpoint(), "a"), &secret()).unwrap();
    let image = noise(7, 30 * CHUNK as usize);
    let writer = repo.writer(small()).unwrap();
    let size_bytes = image.len() as u64;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: None }).unwrap();
    let mut failed = None;
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        cut.store(index >= 12, SeqCst);
        if let Err(error) = disk.put(index as u64, chunk.to_vec()) {
            failed = Some(error);
            break;
        }
    }
    // The last packs may still be on their way when the last chunk is accepted.
    let error = match failed.map_or_else(|| disk.finish(), Err) {
        Ok(result) => {
            let record = disk_record("vda", size_bytes, CHUNK, &result);
            writer.publish(point("web1", vec![record]), vec![]).expect_err("the server refused")
        }
        Err(error) => {
            drop(writer);
            error
        }
    };
    assert!(error.to_string().contains("access denied"), "{error}");

    let repo = Repository::open(server.store("a"), &secret()).unwrap();
    assert!(repo.points().unwrap().points.is_empty());
    assert!(repo.check(&()).unwrap().is_ok());
    let saved = back_up(&repo, "web1", &image).unwrap();
    assert!(restore(&repo, &saved.disks[0]).unwrap() == image);
}

/// Over 30 ms, 200 fetches take a small part of what one after the other would: 6 s.
#[test]
fn distance_does_not_add_up() {
    let server = Server::start();
    let repo = init(server.store("a"));
    let image = noise(8, 600 * CHUNK as usize);
    back_up(&repo, "web1", &image).unwrap();
    // Every third chunk of what is stored: too far from each other to be fetched together.
    let thirds: Vec<u8> = image.chunks(CHUNK as usize).step_by(3).flatten().copied().collect();
    let saved = back_up(&repo, "web2", &thirds).unwrap();
    assert_eq!(saved.disks[0].new_bytes, 0);

    let near = Instant::now();
    assert!(restore(&repo, &saved.disks[0]).unwrap() == thirds);
    let near = near.elapsed();
    let delay = Duration::from_millis(30);
    let far = Distance::start(server.port, delay);
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { dir: dir.path().into(), max_bytes: 1 << 30 };
    let store = CachedStore::new(store_at(&far.endpoint(), "a"), &options).unwrap();
    let repo = Repository::open(Arc::new(store), &secret()).unwrap();
    let restored = std::sync::Mutex::new(vec![0; thirds.len()]);
    let sink = |offset: u64, bytes: &[u8]| {
        restored.lock().unwrap()[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    };
    let begun = Instant::now();
    let stats = repo.disk(&saved.disks[0]).unwrap().copy_to(&sink, &RestoreOptions::default()).unwrap();
    let elapsed = begun.elapsed();
    assert!(restored.into_inner().unwrap() == thirds);
    println!("{} fetches, index and pages over {delay:?} in {elapsed:?}; near {near:?}", stats.fetches);
    assert!(stats.fetches > 150, "{stats:?}");
    assert!(elapsed < near + delay * stats.fetches as u32 / 3, "{elapsed:?}, near {near:?}, {stats:?}");
}
