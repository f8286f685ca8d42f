//! What goes in comes out: full, incremental, resized, sparse, concurrent.

use std::sync::Arc;

use crate::common::*;
use proptest::prelude::*;
use virtward_model::DiskRecord;
use virtward_repo::{Compared, DiskSpec, Error, Repository, Store, store, store::fs::FsStore};

#[test]
fn a_disk_comes_back_from_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repo");
    let store: Arc<dyn Store> = Arc::new(FsStore::new(&path));
    let image = noise(1, 5_000_001);
    let saved = back_up(&init(store), "web1", &image).unwrap();

    let repo = Repository::open(store::open(path.to_str().unwrap()).unwrap(), &secret()).unwrap();
    let listed = repo.points().unwrap();
    assert!(listed.unreadable.is_empty());
    assert_eq!(listed.points, vec![saved.clone()]);
    assert!(restore(&repo, &saved.disks[0]).unwrap() == image);
    assert!(restore_slowly(&repo, &saved.disks[0]).unwrap() == image);
    assert_eq!(repo.attachments(saved.id).unwrap(), attachments());
    let check = repo.check(&()).unwrap();
    assert!(check.is_ok(), "{check:?}");
    let verify = repo.verify(&Default::default(), &()).unwrap();
    assert!(verify.is_ok() && verify.chunks_checked > 0, "{verify:?}");
    assert!(virtward_repo::verify_ciphertext(&**repo.store(), 0, &()).unwrap().is_ok());
    let leases = std::fs::read_dir(path.join("leases")).unwrap().count();
    assert_eq!(leases, 0, "a finished run leaves no lease");
    assert_eq!(std::fs::read_dir(path.join("tmp")).unwrap().count(), 0);
}

#[test]
fn an_increment_stores_what_changed_and_restores_alone() {
    let (_, repo) = mem_repo();
    let mut image = noise(2, 40 * CHUNK as usize);
    let full = back_up(&repo, "web1", &image).unwrap();
    image[7 * CHUNK as usize..8 * CHUNK as usize].copy_from_slice(&noise(3, CHUNK as usize));
    let base = full.disks[0].clone();
    let next = back_up_on(&repo, "web1", &image, Some(&base), &|index| index == 7).unwrap();
    assert_eq!(next.disks[0].new_bytes, u64::from(CHUNK));
    assert!(next.disks[0].stored_bytes < u64::from(CHUNK) + 1000);
    repo.delete_point(full.id).unwrap();
    assert!(restore(&repo, &next.disks[0]).unwrap() == image);
    assert!(repo.check(&()).unwrap().is_ok());
}

#[test]
fn the_same_bytes_are_stored_once() {
    let (_, repo) = mem_repo();
    let image = noise(4, 20 * CHUNK as usize);
    back_up(&repo, "web1", &image).unwrap();
    let again = back_up(&repo, "web2", &image).unwrap();
    assert_eq!((again.disks[0].new_bytes, again.disks[0].stored_bytes), (0, 0));
    assert!(restore(&repo, &again.disks[0]).unwrap() == image);
    let info = repo.info().unwrap();
    assert_eq!((info.points, info.chunk_bytes - info.chunk_bytes % u64::from(CHUNK)), (2, 22 * u64::from(CHUNK)));
    assert!(info.dedup_ratio > 1.5 && info.compression_ratio > 1.2, "{info:?}");
}

#[test]
fn zeros_cost_nothing_and_are_not_written_back() {
    let (_, repo) = mem_repo();
    let writer = repo.writer(small()).unwrap();
    let chunks = 3000;
    let size_bytes = chunks * u64::from(CHUNK) - 77;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: None }).unwrap();
    disk.put_zero(0, 2000).unwrap();
    disk.put(2000, vec![0; CHUNK as usize]).unwrap();
    disk.put(2001, vec![9; CHUNK as usize]).unwrap();
    disk.put(2002, vec![9; CHUNK as usize]).unwrap();
    let mut last = disk.buffer(chunks - 1);
    last.fill(3);
    disk.put(chunks - 1, last).unwrap();
    let result = disk.finish().unwrap();
    assert_eq!(result.data_bytes, 3 * u64::from(CHUNK) - 77);
    assert_eq!(result.new_bytes, 2 * u64::from(CHUNK) - 77);
    let record = disk_record("vda", size_bytes, CHUNK, &result);
    writer.publish(point("sparse", vec![record.clone()]), vec![]).unwrap();
    let reader = repo.disk(&record).unwrap();
    let extents: Vec<_> = reader.data_extents().map(|e| e.map(|e| (e.offset, e.bytes)).unwrap()).collect();
    let chunk = u64::from(CHUNK);
    assert_eq!(extents, [(2001 * chunk, 2 * chunk), ((chunks - 1) * chunk, chunk - 77)]);
    let written = std::sync::atomic::AtomicU64::new(0);
    let sink = |_: u64, bytes: &[u8]| {
        written.fetch_add(bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    };
    let stats = reader.copy_to(&sink, &Default::default()).unwrap();
    assert_eq!(stats.written_bytes, result.data_bytes);
    assert_eq!(written.into_inner(), result.data_bytes);
}

#[test]
fn a_base_can_be_compared_without_reading_it() {
    let (_, repo) = mem_repo();
    let image = noise(5, 3 * CHUNK as usize + 1000);
    let full = back_up(&repo, "web1", &image).unwrap();
    let writer = repo.writer(small()).unwrap();
    let size_bytes = 6 * u64::from(CHUNK);
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: Some(full.disks[0].clone()) }).unwrap();
    let chunk = |n: usize| image[n * CHUNK as usize..(n + 1) * CHUNK as usize].to_vec();
    assert_eq!(disk.compare_base(0, &chunk(0)).unwrap(), Compared::Same);
    assert_eq!(disk.compare_base(0, &chunk(1)).unwrap(), Compared::Different);
    let mut grown = image[3 * CHUNK as usize..].to_vec();
    grown.resize(CHUNK as usize, 0);
    assert_eq!(disk.compare_base(3, &grown).unwrap(), Compared::Same);
    grown[2000] = 1;
    assert_eq!(disk.compare_base(3, &grown).unwrap(), Compared::Different);
    assert_eq!(disk.compare_base(4, &grown).unwrap(), Compared::NoBase);
}

#[test]
fn a_base_that_does_not_fit_is_refused() {
    let (_, repo) = mem_repo();
    let full = back_up(&repo, "web1", &noise(6, 5 * CHUNK as usize)).unwrap();
    let base = Some(full.disks[0].clone());
    let writer = repo.writer(small()).unwrap();
    let other = DiskSpec { size_bytes: 1 << 20, chunk_bytes: 1 << 20, base: base.clone() };
    assert!(matches!(writer.disk(other), Err(Error::BadBase { .. })));
    repo.delete_point(full.id).unwrap();
    let gone = DiskSpec { size_bytes: 5 * u64::from(CHUNK), chunk_bytes: CHUNK, base };
    assert!(matches!(writer.disk(gone), Err(Error::BadBase { .. })));
    assert!(matches!(repo.point(full.id), Err(Error::NoPoint { .. })));
}

#[test]
fn misuse_is_refused() {
    let (_, repo) = mem_repo();
    let writer = repo.writer(small()).unwrap();
    let spec = |chunk_bytes| DiskSpec { size_bytes: 1 << 20, chunk_bytes, base: None };
    assert!(writer.disk(spec(1000)).is_err() && writer.disk(spec(8 << 20)).is_err());
    let disk = writer.disk(spec(CHUNK)).unwrap();
    assert!(disk.put(0, vec![1; 5]).is_err() && disk.put(4, vec![1; CHUNK as usize]).is_err());
    assert!(disk.put_zero(3, 2).is_err() && disk.put_zero(u64::MAX, 2).is_err());
    disk.put(1, vec![1; CHUNK as usize]).unwrap();
    let _ = disk.put(1, vec![1; CHUNK as usize]);
    assert!(matches!(disk.finish(), Err(Error::Misuse { .. })));
}

#[test]
fn disks_in_chunks_of_an_impossible_size_are_neither_read_nor_published() {
    let (_, repo) = mem_repo();
    let good = back_up(&repo, "vm", &noise(1, 3 * CHUNK as usize)).unwrap().disks.remove(0);
    for chunk_bytes in [0, 1, 1000, CHUNK - 1, CHUNK / 2, 8 << 20, 1 << 31, u32::MAX] {
        let disk = DiskRecord { chunk_bytes, ..good.clone() };
        assert!(matches!(repo.disk(&disk), Err(Error::Misuse { .. })), "{chunk_bytes}");
        let writer = repo.writer(small()).unwrap();
        let refused = writer.publish(point("vm", vec![disk]), attachments());
        assert!(matches!(refused, Err(Error::Misuse { .. })), "{chunk_bytes}: {refused:?}");
    }
    assert_eq!(repo.points().unwrap().points.len(), 1);
}

#[test]
fn many_writers_work_at_once() {
    let (store, repo) = mem_repo();
    let shared = noise(10, 8 * CHUNK as usize);
    std::thread::scope(|scope| {
        for number in 0..6u64 {
            let (store, repo, shared) = (store.clone(), repo.clone(), &shared);
            scope.spawn(move || {
                // Some share an open repository, some open their own as other processes do.
                let repo = match number % 2 {
                    0 => repo,
                    _ => Repository::open(Arc::new(store), &secret()).unwrap(),
                };
                let mut image = shared.clone();
                image.extend(noise(20 + number, 5 * CHUNK as usize));
                let saved = back_up(&repo, &format!("vm{number}"), &image).unwrap();
                assert!(restore(&repo, &saved.disks[0]).unwrap() == image);
            });
        }
    });
    assert_eq!(repo.points().unwrap().points.len(), 6);
    assert!(repo.check(&()).unwrap().is_ok());
    assert!(repo.verify(&Default::default(), &()).unwrap().is_ok());
}

#[test]
fn a_cancelled_run_ends_and_leaves_nothing_visible() {
    let (_, repo) = mem_repo();
    let cancel = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = repo.writer(virtward_repo::WriterOptions { cancel: Some(cancel.clone()), ..small() }).unwrap();
    let spec = DiskSpec { size_bytes: 1 << 30, chunk_bytes: CHUNK, base: None };
    let disk = writer.disk(spec).unwrap();
    disk.put(0, vec![1; CHUNK as usize]).unwrap();
    cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(disk.put(1, vec![1; CHUNK as usize]), Err(Error::Cancelled)));
    // In this order, which a caller with a struct of both may well have.
    drop(writer);
    assert!(matches!(disk.finish(), Err(Error::Cancelled)));
    assert!(repo.points().unwrap().points.is_empty());
}

#[test]
fn nothing_in_the_store_names_a_vm_or_a_host() {
    let (store, repo) = mem_repo();
    back_up(&repo, "payroll-db", &noise(11, 3 * CHUNK as usize)).unwrap();
    for name in store.names() {
        let bytes = store.get(&name, u64::MAX).unwrap();
        for secret in ["payroll", "secret-name", "domain", "compresscompress"] {
            let found = bytes.windows(secret.len()).any(|w| w == secret.as_bytes()) || name.contains(secret);
            assert!(!found, "{secret} is readable in {name}");
        }
    }
}

#[derive(Clone, Debug)]
struct Step {
    size_bytes: usize,
    use_base: bool,
    writes: Vec<(usize, u8)>,
    zeros: Option<(usize, usize)>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Around the boundaries of chunks and of leaf pages (256 chunks): sizes in units of a quarter chunk.
    let size = prop_oneof![0usize..40, 1020usize..1030, 1000usize..1100];
    let writes = prop::collection::vec((0usize..300, any::<u8>()), 0..12);
    let step = (size, any::<bool>(), writes, prop::option::of((0usize..300, 0usize..300)));
    let step = step.prop_map(|(quarters, use_base, writes, zeros)| Step {
        size_bytes: quarters * CHUNK as usize / 4,
        use_base,
        writes,
        zeros,
    });
    prop::collection::vec(step, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a model in memory: any sequence of backups with bases, resizes, zero runs and writes.
    #[test]
    fn every_restore_point_is_what_the_model_says(steps in steps()) {
        let (_, repo) = mem_repo();
        let mut history: Vec<(virtward_model::RestorePoint, Vec<u8>)> = Vec::new();
        for Step { size_bytes, use_base, writes, zeros } in steps {
            let before = history.last().filter(|_| use_base);
            let mut image = before.map(|(_, image)| image.clone()).unwrap_or_default();
            image.resize(size_bytes, 0);
            let writer = repo.writer(small()).unwrap();
            let base = before.map(|(point, _)| point.disks[0].clone());
            let disk = writer.disk(DiskSpec { size_bytes: size_bytes as u64, chunk_bytes: CHUNK, base }).unwrap();
            let mut taken = std::collections::HashSet::new();
            let chunks = disk.chunks() as usize;
            if let Some((first, count)) = zeros.filter(|(first, _)| *first < chunks) {
                let count = count.min(chunks - first);
                disk.put_zero(first as u64, count as u64).unwrap();
                taken.extend(first..first + count);
                let end = ((first + count) * CHUNK as usize).min(size_bytes);
                image[first * CHUNK as usize..end].fill(0);
            }
            for (index, value) in writes {
                if index < chunks && taken.insert(index) {
                    let mut chunk = disk.buffer(index as u64);
                    chunk.fill(value);
                    image[index * CHUNK as usize..][..chunk.len()].copy_from_slice(&chunk);
                    disk.put(index as u64, chunk).unwrap();
                }
            }
            let result = disk.finish().unwrap();
            let data = image.chunks(CHUNK as usize).filter(|c| c.iter().any(|b| *b != 0)).map(|c| c.len() as u64);
            // A chunk that was cut to zeros by shrinking may still count as data.
            prop_assert!(result.data_bytes >= data.sum::<u64>());
            let point = point("vm", vec![disk_record("vda", size_bytes as u64, CHUNK, &result)]);
            writer.publish(point.clone(), vec![]).unwrap();
            history.push((point, image));
        }
        for (point, image) in &history {
            prop_assert!(restore(&repo, &point.disks[0]).unwrap() == *image);
        }
        let (point, image) = history.last().unwrap();
        prop_assert!(restore_slowly(&repo, &point.disks[0]).unwrap() == *image);
        prop_assert!(repo.check(&()).unwrap().is_ok());
    }
}
