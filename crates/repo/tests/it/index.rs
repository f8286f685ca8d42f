//! The index beside everything else: compaction that dies anywhere, rebuilding from packs, segments that come and go.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, Mutex},
};

use virtward_model::RestorePoint;
use virtward_repo::{
    DiskSpec, Error, ObjectId, Repository, Result, Store, Writer,
    format::ChunkId,
    store::{
        Listed, ObjectWriter, Put,
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

use crate::common::*;

const ORIGIN: (ObjectId, u64) = (ObjectId([9; 16]), 0);

fn open(store: impl Store + 'static) -> Repository {
    Repository::open(Arc::new(store), &secret()).unwrap()
}

/// Several runs, and so several segments, that share some chunks.
fn scene(runs: u64) -> (MemStore, Vec<(RestorePoint, Vec<u8>)>) {
    let (store, repo) = mem_repo();
    let points = (0..runs)
        .map(|n| {
            let mut image = noise(1, 4 * CHUNK as usize);
            image.extend(noise(100 + n, 5 * CHUNK as usize));
            (back_up(&repo, "web1", &image).unwrap(), image)
        })
        .collect();
    (store, points)
}

fn segments(store: &MemStore) -> Vec<String> {
    store.names().into_iter().filter(|name| name.starts_with("index/")).collect()
}

/// Every id that the index lists.
fn ids(store: &MemStore) -> BTreeSet<ChunkId> {
    let (repo, mut ids) = (open(store.clone()), BTreeSet::new());
    for segment in &repo.index().state().unwrap().segments {
        repo.index()
            .read_segment(segment, &mut |e| {
                ids.insert(e.entry.id);
            })
            .unwrap();
    }
    ids
}

#[track_caller]
fn assert_sound(store: &MemStore, ids: &BTreeSet<ChunkId>, points: &[(RestorePoint, Vec<u8>)]) {
    let repo = open(store.clone());
    for id in ids {
        assert!(repo.index().lookup(id, &|_, _| true).unwrap().is_some(), "{id} is not found");
    }
    let check = repo.check(&()).unwrap();
    assert!(check.is_ok(), "{check:?}");
    for (point, image) in points {
        assert!(restore(&repo, &point.disks[0]).unwrap() == *image);
    }
}

fn compact(repo: &Repository) -> Result<()> {
    repo.index().compact_all(ORIGIN, &HashSet::new(), &()).map(drop)
}

#[test]
fn many_runs_become_one_segment_that_all_readers_find() {
    let (store, points) = scene(5);
    let (ids, reader) = (ids(&store), open(store.clone()));
    assert_eq!(reader.index().state().unwrap().segments.len(), 5);
    compact(&open(store.clone())).unwrap();
    assert_eq!(segments(&store).len(), 1);
    assert!(virtward_repo::verify_ciphertext(&store, 1, &()).unwrap().is_ok());
    assert_sound(&store, &ids, &points);
    // This one has not noticed yet.
    assert!(restore(&reader, &points[0].0.disks[0]).unwrap() == points[0].1);
    let again = back_up(&reader, "web1", &points[1].1).unwrap();
    assert_eq!(again.disks[0].new_bytes, 0, "what was stored is known after compaction");
}

/// An action over a store that dies at each of its operations in turn, and what must hold afterwards.
fn die_everywhere(store: &MemStore, act: &dyn Fn(&Repository) -> Result<()>, assert: &dyn Fn(&MemStore)) {
    let run = |store: &MemStore, faults: Faults| {
        let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
        (Repository::open(Arc::new(faulty.clone()), &secret()).and_then(|repo| act(&repo)), faulty.operations())
    };
    let (outcome, operations) = run(&store.fork(), Faults::default());
    outcome.unwrap();
    let mut died = 0;
    for at in 0..operations {
        for die_after_effect in [false, true] {
            let store = store.fork();
            let (outcome, _) = run(&store, Faults { die_at: Some(at), die_after_effect, ..Faults::default() });
            died += u64::from(outcome.is_err());
            assert(&store);
        }
    }
    assert!(died > operations, "{died} of {operations}");
}

#[test]
fn compaction_that_dies_anywhere_loses_no_entry() {
    let (store, points) = scene(3);
    let ids = ids(&store);
    die_everywhere(&store, &compact, &|store| {
        assert_sound(store, &ids, &points[..1]);
        // The next one finishes what was begun.
        compact(&open(store.clone())).unwrap();
        assert_eq!(segments(store).len(), 1);
        assert_sound(store, &ids, &points[2..]);
    });
}

#[test]
fn compaction_over_a_store_that_errs_and_tears_loses_no_entry() {
    let (store, points) = scene(4);
    let ids = ids(&store);
    let mut failed = 0;
    for seed in 0..60 {
        let store = store.fork();
        let faults =
            Faults { seed, error_permille: 20, lost_ack_permille: 40, torn_permille: 200, ..Faults::default() };
        let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
        let repo = Repository::open(Arc::new(faulty), &secret());
        let outcome = repo.and_then(|repo| repo.index().compact_all(ORIGIN, &HashSet::new(), &()));
        failed += u64::from(outcome.is_err() || outcome.is_ok_and(|report| !report.failed.is_empty()));
        let repo = open(store.clone());
        for id in &ids {
            assert!(repo.index().lookup(id, &|_, _| true).unwrap().is_some(), "seed {seed}: {id} is not found");
        }
        assert!(restore(&repo, &points[3].0.disks[0]).unwrap() == points[3].1, "seed {seed}");
    }
    assert!(failed > 5, "{failed}");
}

/// What was done, to which object, and the range.
type Noted = (&'static str, String, u64, u64);

/// Remembers what is done to segments.
#[derive(Clone)]
struct Watched {
    inner: MemStore,
    log: Arc<Mutex<Vec<Noted>>>,
}

impl Watched {
    fn note(&self, what: &'static str, name: &str, from: u64, to: u64) {
        self.log.lock().unwrap().push((what, name.into(), from, to));
    }
}

struct WatchedWriter {
    store: Watched,
    inner: Box<dyn ObjectWriter>,
    name: String,
    bytes: u64,
}

impl ObjectWriter for WatchedWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.inner.write(bytes)
    }
    fn finish(self: Box<Self>) -> Result<Put> {
        self.store.note("put", &self.name, 0, self.bytes);
        self.inner.finish()
    }
}

impl Store for Watched {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.note("read", name, offset, offset + buf.len() as u64);
        self.inner.read_range(name, offset, buf)
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.note("put", name, 0, bytes.len() as u64);
        self.inner.put_if_absent(name, bytes)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.inner.create(name)?;
        Ok(Box::new(WatchedWriter { store: self.clone(), inner, name: name.into(), bytes: 0 }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }
    fn now(&self) -> Result<jiff::Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        self.note("delete", name, 0, 0);
        self.inner.delete(name)
    }
}

/// No segment goes before every byte that replaces it was read from the store.
fn assert_read_before_deletion(log: &[(&'static str, String, u64, u64)]) {
    let is_segment = |name: &str| name.starts_with("index/");
    let deleted = log.iter().position(|(what, name, ..)| *what == "delete" && is_segment(name)).unwrap();
    let outputs: Vec<_> = log.iter().filter(|(what, name, ..)| *what == "put" && is_segment(name)).collect();
    assert!(!outputs.is_empty());
    for (_, output, _, bytes) in outputs {
        let put = log.iter().position(|(what, name, ..)| *what == "put" && name == output).unwrap();
        assert!(put < deleted, "deleted before the replacement was there");
        let read = log[put..deleted].iter().filter(|(what, name, ..)| *what == "read" && name == output);
        let mut ranges: Vec<(u64, u64)> = read.map(|(_, _, from, to)| (*from, *to)).collect();
        ranges.sort_unstable();
        let covered = ranges.iter().fold(0, |end, (from, to)| if *from <= end { end.max(*to) } else { end });
        // The checksum at the end is for those without keys.
        assert!(covered + 32 >= *bytes, "only {covered} of {bytes} bytes were read again");
    }
}

#[test]
fn nothing_is_deleted_before_what_replaces_it_was_read_again() {
    let (store, _) = scene(3);
    for act in [compact, |repo: &Repository| repo.rebuild_index(&()).map(drop)] {
        let watched = Watched { inner: store.fork(), log: Arc::default() };
        act(&open(watched.clone())).unwrap();
        assert_read_before_deletion(&watched.log.lock().unwrap());
    }
}

#[test]
fn a_lost_index_is_made_again_from_packs() {
    let (store, points) = scene(3);
    let all = ids(&store);
    let lost = store.fork();
    segments(&store).iter().for_each(|name| lost.tamper(name, None));
    let repo = open(lost.clone());
    assert!(restore(&repo, &points[0].0.disks[0]).is_err());
    let report = repo.rebuild_index(&()).unwrap();
    assert!(report.is_ok() && report.replaced == 0 && report.chunks >= all.len() as u64, "{report:?}");
    assert_sound(&lost, &all, &points);
    assert!(restore(&repo, &points[1].0.disks[0]).unwrap() == points[1].1);
}

#[test]
fn damaged_segments_are_replaced_whatever_is_left_of_them() {
    let (store, points) = scene(3);
    let all = ids(&store);
    let names = segments(&store);
    store.tamper(&names[0], Some(b"garbage".to_vec()));
    let bytes = store.get(&names[1], u64::MAX).unwrap();
    store.tamper(&names[1], Some(bytes[..bytes.len() / 2].to_vec()));
    store.tamper("index/not-a-segment", Some(vec![]));
    let report = open(store.clone()).rebuild_index(&()).unwrap();
    assert_eq!((report.replaced, report.segments), (4, 1));
    assert_sound(&store, &all, &points);
}

#[test]
fn a_pack_with_a_damaged_table_is_reported_and_kept_if_the_index_knows_it() {
    let (store, points) = scene(1);
    let all = ids(&store);
    let pack = store.names().into_iter().find(|name| name.starts_with("data/")).unwrap();
    let mut bytes = store.get(&pack, u64::MAX).unwrap();
    let in_table = bytes.len() - 384 - 20;
    bytes[in_table] ^= 1;
    store.tamper(&pack, Some(bytes));
    let report = open(store.clone()).rebuild_index(&()).unwrap();
    assert_eq!((report.salvaged, report.damaged.len(), &report.damaged[0].object), (1, 1, &pack));
    let repo = open(store.clone());
    assert!(all.iter().all(|id| repo.index().locate(id).is_ok()));
    assert!(restore(&repo, &points[0].0.disks[0]).unwrap() == points[0].1);
    // Without an index nobody knows what is in it; the rest is there.
    segments(&store).iter().for_each(|name| store.tamper(name, None));
    let report = repo.rebuild_index(&()).unwrap();
    assert_eq!((report.salvaged, report.damaged.len()), (0, 1));
    assert!(report.packs > 0 && all.iter().any(|id| repo.index().locate(id).is_ok()));
}

#[test]
fn a_rebuild_that_dies_anywhere_loses_no_entry() {
    let (store, points) = scene(2);
    let ids = ids(&store);
    let names = segments(&store);
    die_everywhere(&store, &|repo| repo.rebuild_index(&()).map(drop), &|store| assert_sound(store, &ids, &points[1..]));
    // Nor does one that starts from nothing keep the next from succeeding.
    names.iter().for_each(|name| store.tamper(name, None));
    die_everywhere(&store, &|repo| repo.rebuild_index(&()).map(drop), &|store| {
        open(store.clone()).rebuild_index(&()).unwrap();
        assert_sound(store, &ids, &points[1..]);
    });
}

/// A run with all of its chunks put, and nothing published.
fn begun(repo: &Repository, image: &[u8]) -> (Writer, RestorePoint) {
    let writer = repo.writer(small()).unwrap();
    let size_bytes = image.len() as u64;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: None }).unwrap();
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        disk.put(index as u64, chunk.to_vec()).unwrap();
    }
    let result = disk.finish().unwrap();
    (writer, point("web2", vec![disk_record("vda", size_bytes, CHUNK, &result)]))
}

#[test]
fn runs_go_on_while_the_index_is_rebuilt_and_compacted() {
    let (store, mut points) = scene(2);
    let repo = open(store.clone());
    // More than the four packs after which a run writes its first segment.
    let image = noise(70, 40 * CHUNK as usize);
    let (writer, point) = begun(&repo, &image);
    let report = open(store.clone()).rebuild_index(&()).unwrap();
    assert!(report.is_ok(), "{report:?}");
    compact(&open(store.clone())).unwrap();
    writer.publish(point.clone(), attachments()).unwrap();
    points.push((point, image));
    assert_sound(&store, &ids(&store), &points);
}

#[test]
fn rebuilds_compactions_and_runs_at_once_lose_nothing() {
    let (store, mut points) = scene(3);
    let ids = ids(&store);
    let more = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| (0..6).for_each(|_| compact(&open(store.clone())).unwrap()));
        scope.spawn(|| {
            for _ in 0..4 {
                // Another compaction may take away what this one wrote before it has read it again.
                match open(store.clone()).rebuild_index(&()) {
                    Ok(report) => assert!(report.is_ok(), "{report:?}"),
                    Err(Error::Missing { object }) => assert!(object.starts_with("index/")),
                    Err(e) => panic!("{e}"),
                }
            }
        });
        scope.spawn(|| {
            for n in 0..6 {
                let (image, repo) = (noise(500 + n, 6 * CHUNK as usize), open(store.clone()));
                more.lock().unwrap().push((back_up(&repo, "web3", &image).unwrap(), image));
            }
        });
        scope.spawn(|| {
            let repo = open(store.clone());
            for _ in 0..10 {
                assert!(ids.iter().all(|id| repo.index().locate(id).is_ok()));
            }
        });
    });
    points.append(&mut more.into_inner().unwrap());
    assert_sound(&store, &ids, &points);
}

#[test]
fn cancelling_ends_a_rebuild_and_leaves_the_index_as_it_was() {
    let (store, points) = scene(1);
    let (ids, before) = (ids(&store), segments(&store));
    let cancelled = std::sync::atomic::AtomicBool::new(true);
    assert!(matches!(open(store.clone()).rebuild_index(&cancelled), Err(Error::Cancelled)));
    assert_eq!(segments(&store), before);
    assert_sound(&store, &ids, &points);
}
