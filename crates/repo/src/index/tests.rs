//! The index alone, over segments made by hand: what callers of the repository cannot bring about.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use jiff::Timestamp;
use proptest::prelude::*;

use super::{
    filter::Filter,
    segment::{BLOCK_ENTRIES, encode},
    write::Outline,
    *,
};
use crate::{
    pack::{Encoding, Footer, Header, PackClass},
    store::{Listed, ObjectWriter, Put, Store, mem::MemStore},
};

const ORIGIN: (ObjectId, u64) = (ObjectId([7; 16]), 1);

struct Scene {
    store: MemStore,
    ring: Arc<KeyRing>,
}

/// A place, apart from any segment.
type Place = (ChunkId, ObjectId, u32);

fn scene() -> Scene {
    Scene { store: MemStore::new(), ring: Arc::new(KeyRing::generate(ObjectId::random())) }
}

fn id(n: u64) -> ChunkId {
    ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes())
}

fn entry(pack: u32, id: ChunkId, offset: u32) -> IndexEntry {
    IndexEntry { pack, entry: Entry { id, offset, stored: 100, plain: 200, encoding: Encoding::Lz4 } }
}

impl Scene {
    fn index(&self) -> Index {
        Index::new(Arc::new(self.store.clone()), self.ring.clone())
    }
    fn index_over(&self, store: impl Store + 'static) -> Index {
        Index::new(Arc::new(store), self.ring.clone())
    }
    fn pack(&self, records: u32) -> PackInfo {
        let (header, _) = Header::create(&self.ring, PackClass::Data, ORIGIN.0, 1).unwrap();
        let footer = Footer { table_offset: 5000, table_bytes: 40 * records + 16, records, sum: [1; 32] };
        PackInfo { header, footer }
    }
    fn put(&self, packs: &[PackInfo], replaces: &[ObjectId], entries: Vec<IndexEntry>) -> ObjectId {
        let (id, bytes) = encode(&self.ring, ORIGIN, packs, replaces, entries).unwrap();
        assert_eq!(self.store.put_if_absent(&names::segment(&id), &bytes).unwrap(), Put::Created);
        id
    }
    /// A segment with chunks `from..to` in one pack.
    fn put_range(&self, from: u64, to: u64) -> (ObjectId, PackInfo) {
        let pack = self.pack((to - from) as u32);
        let entries = (from..to).map(|n| entry(0, id(n), 256 + n as u32)).collect();
        (self.put(std::slice::from_ref(&pack), &[], entries), pack)
    }
    fn segments(&self) -> Vec<String> {
        self.store.names()
    }
    fn places(&self) -> BTreeSet<Place> {
        places(&self.index())
    }
}

/// Everything that the live segments list.
fn places(index: &Index) -> BTreeSet<Place> {
    let mut places = BTreeSet::new();
    for segment in &index.refresh().unwrap().segments {
        index
            .read_segment(segment, &mut |e| {
                places.insert((e.entry.id, segment.packs[e.pack as usize].id(), e.entry.offset));
            })
            .unwrap();
    }
    places
}

fn has(index: &Index, n: u64) -> bool {
    index.lookup(&id(n), &|_, _| true).unwrap().is_some()
}

#[test]
fn every_entry_of_every_block_is_found_and_nothing_else() {
    let scene = scene();
    scene.put_range(0, 2000);
    scene.put_range(2000, 2001);
    let index = scene.index();
    assert_eq!(index.state().unwrap().entries(), 2001);
    for n in 0..2001 {
        let place = index.lookup(&id(n), &|_, _| true).unwrap().unwrap();
        assert_eq!((place.entry.id, place.entry.offset), (id(n), 256 + n as u32));
    }
    assert!((5000..9000).all(|n| !has(&index, n)));
    for segment in &index.state().unwrap().segments {
        index.check_order(segment).unwrap();
    }
}

#[test]
fn all_places_of_a_chunk_are_offered_across_blocks() {
    let scene = scene();
    let pack = scene.pack(2000);
    let mut entries: Vec<_> = (0..1400).map(|n| entry(0, id(5), 256 + n)).collect();
    entries.extend((10..300).map(|n| entry(0, id(n), 9000)));
    scene.put(&[pack], &[], entries);
    let index = scene.index();
    for wanted in [256, 256 + 1399, 256 + BLOCK_ENTRIES as u32] {
        let place = index.lookup(&id(5), &|_, e| e.offset == wanted).unwrap().unwrap();
        assert_eq!(place.entry.offset, wanted);
    }
    assert!((10..300).all(|n| has(&index, n)));
}

#[test]
fn a_lying_filter_costs_a_copy_and_never_a_chunk() {
    let scene = scene();
    let packs = [scene.pack(1000)];
    let mut entries: Vec<_> = (0..1000).map(|n| entry(0, id(n), 256)).collect();
    entries.sort_by_key(IndexEntry::key);
    let mut source = |each: &mut dyn FnMut(&IndexEntry) -> Result<()>| entries.iter().try_for_each(each);
    let mut outline = Outline::new(&scene.ring, ORIGIN, 1000, &mut source).unwrap();
    outline.filter = Filter::new(outline.header.filter_lines);
    let (name, mut bytes) = (names::segment(&outline.segment()), Vec::new());
    let mut sink = |part: &[u8]| {
        bytes.extend_from_slice(part);
        Ok(())
    };
    outline.write(&scene.ring, &packs, &[], &mut source, &mut sink).unwrap();
    scene.store.tamper(&name, Some(bytes));
    let index = scene.index();
    let segment = index.state().unwrap().segments[0].clone();
    for n in 0..1000 {
        assert!(!has(&index, n), "a writer may store it again");
        assert_eq!(index.locate(&id(n)).unwrap().entry.id, id(n), "a reader must find it");
    }
    assert!(index.check_order(&segment).unwrap_err().to_string().contains("filter"));
}

#[test]
fn damaged_fences_and_filters_are_named_and_done_without() {
    let scene = scene();
    let (segment, _) = scene.put_range(0, 1500);
    let name = names::segment(&segment);
    let bytes = scene.store.get(&name, u64::MAX).unwrap();
    let header = segment::Header::decode(&bytes).unwrap();
    for at in [header.fences_range().0, header.filter_range(0).0] {
        let mut hurt = bytes.clone();
        hurt[at as usize] ^= 1;
        scene.store.tamper(&name, Some(hurt));
        let index = scene.index();
        assert_eq!(index.state().unwrap().unusable[0].0, name);
        assert!((0..1500).all(|n| has(&index, n)));
    }
    // Of a damaged block only its own entries are absent.
    let mut hurt = bytes;
    hurt[header.block_range(1).0 as usize] ^= 1;
    scene.store.tamper(&name, Some(hurt));
    let index = scene.index();
    assert_eq!((0..1500).filter(|n| has(&index, *n)).count(), 1500 - BLOCK_ENTRIES);
}

#[test]
fn dropped_packs_leave_with_their_entries_and_only_they() {
    let scene = scene();
    let (_, going) = scene.put_range(0, 700);
    scene.put_range(700, 900);
    let both = [scene.pack(10), going.clone()];
    scene.put(&both, &[], vec![entry(0, id(3), 256), entry(1, id(4), 260), entry(0, id(901), 300)]);
    let drop = HashSet::from([going.id()]);
    let index = scene.index();
    let report = index.compact_all(ORIGIN, &drop, &()).unwrap();
    assert_eq!((report.removed, report.written, report.failed.len()), (3, 1, 0));
    assert!(has(&index, 3) && has(&index, 901) && (700..900).all(|n| has(&index, n)));
    assert!(!has(&index, 4) && !has(&index, 5));
    assert!(!index.state().unwrap().packs().contains_key(&going.id()));
    // Nothing left but packs that go: no segment remains.
    let all: HashSet<ObjectId> = index.state().unwrap().packs().into_keys().collect();
    index.compact_all(ORIGIN, &all, &()).unwrap();
    assert!(scene.segments().is_empty());
}

#[test]
fn the_same_entry_is_listed_once_after_compaction() {
    let scene = scene();
    let (first, pack) = scene.put_range(0, 600);
    let entries = (0..600).map(|n| entry(0, id(n), 256 + n as u32)).collect();
    scene.put(&[pack], &[], entries);
    let index = scene.index();
    assert_eq!(index.state().unwrap().entries(), 1200);
    index.compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
    assert_eq!((index.state().unwrap().entries(), scene.segments().len()), (600, 1));
    assert!(!scene.segments().contains(&names::segment(&first)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn compaction_keeps_the_set_of_places(
        segments in prop::collection::vec(prop::collection::vec((0u64..40, 0usize..6, 0u32..4), 0..60), 1..6),
        dropped in prop::collection::hash_set(0usize..6, 0..3),
    ) {
        let scene = scene();
        let packs: Vec<PackInfo> = (0..6).map(|_| scene.pack(1)).collect();
        let drop: HashSet<ObjectId> = dropped.iter().map(|n| packs[*n].id()).collect();
        for (turn, segment) in segments.iter().enumerate() {
            // Every segment numbers the packs otherwise.
            let mut packs = packs.clone();
            packs.rotate_left(turn % 6);
            let number = |pack: usize| ((pack + 6 - turn % 6) % 6) as u32;
            let entries = segment.iter().map(|(n, pack, offset)| entry(number(*pack), id(*n), 256 + offset)).collect();
            scene.put(&packs, &[], entries);
        }
        let mut expected = scene.places();
        expected.retain(|(_, pack, _)| !drop.contains(pack));
        let index = scene.index();
        let all = index.state().unwrap().segments.clone();
        let done = index.compact(ORIGIN, &all, &drop, &()).unwrap().unwrap();
        index.delete_inputs(&done).unwrap();
        prop_assert_eq!(scene.places(), expected.clone());
        prop_assert_eq!(done.entries, expected.len() as u64);
        prop_assert!(scene.segments().len() == 1);
    }
}

/// Puts other segments than it is told to: as if the merge were wrong.
struct Forger {
    inner: MemStore,
    ring: Arc<KeyRing>,
    forge: fn(&mut Vec<IndexEntry>),
}

struct ForgingWriter {
    store: MemStore,
    ring: Arc<KeyRing>,
    forge: fn(&mut Vec<IndexEntry>),
    name: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for ForgingWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<Put> {
        let aside = MemStore::new();
        let _ = aside.put_if_absent(&self.name, &self.bytes)?;
        let true_one = Segment::open(&aside, &self.ring, &self.name, self.bytes.len() as u64)?;
        let (mut stream, mut entries) = (Stream::new(&aside, &true_one, 1), Vec::new());
        while let Some(entry) = stream.next()? {
            entries.push(entry);
        }
        (self.forge)(&mut entries);
        entries.sort_by_key(IndexEntry::key);
        let mut source = |each: &mut dyn FnMut(&IndexEntry) -> Result<()>| entries.iter().try_for_each(each);
        let mut outline = Outline::new(&self.ring, ORIGIN, entries.len() as u64, &mut source)?;
        outline.header.segment = true_one.id();
        let mut forged = Vec::new();
        outline.write(&self.ring, &true_one.packs, &true_one.replaces, &mut source, &mut |part| {
            forged.extend_from_slice(part);
            Ok(())
        })?;
        self.store.put_if_absent(&self.name, &forged)
    }
}

impl Store for Forger {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_range(name, offset, buf)
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.inner.put_if_absent(name, bytes)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        let (store, ring, forge) = (self.inner.clone(), self.ring.clone(), self.forge);
        Ok(Box::new(ForgingWriter { store, ring, forge, name: name.into(), bytes: Vec::new() }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }
    fn now(&self) -> Result<Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        self.inner.delete(name)
    }
}

/// What a wrong merge could do to entries.
const FORGERIES: [fn(&mut Vec<IndexEntry>); 5] = [
    |entries| entries.truncate(entries.len() - 1),
    |entries| entries.retain(|e| e.entry.id != id(0)),
    |entries| entries.push(entry(0, id(77_777), 256)),
    |entries| entries[3].pack ^= 1,
    |entries| entries[5].entry.offset += 1,
];

#[test]
fn a_wrong_output_is_found_out_and_the_inputs_stay() {
    for forge in FORGERIES {
        let scene = scene();
        scene.put_range(0, 800);
        scene.put_range(800, 900);
        let before = scene.segments();
        let index = scene.index_over(Forger { inner: scene.store.clone(), ring: scene.ring.clone(), forge });
        let report = index.compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
        assert_eq!((report.failed.len(), report.removed), (1, 0));
        assert!(report.failed[0].1.to_string().contains("compaction went wrong"), "{}", report.failed[0].1);
        assert_eq!(scene.segments(), before);
    }
}

#[test]
fn an_output_that_nobody_compared_hides_nothing_and_is_made_good() {
    for forge in FORGERIES {
        // As if its maker had died before comparing.
        let scene = scene();
        let (first, _) = scene.put_range(0, 800);
        let (second, _) = scene.put_range(800, 900);
        let complete = scene.places();
        let aside = Scene { store: scene.store.fork(), ring: scene.ring.clone() };
        let before = scene.segments();
        let index = aside.index();
        let inputs = index.state().unwrap().segments.clone();
        let done = index.compact(ORIGIN, &inputs, &HashSet::new(), &()).unwrap().unwrap();
        let name = names::segment(&done.segment.unwrap());
        let forger = Forger { inner: scene.store.clone(), ring: scene.ring.clone(), forge };
        let mut put = forger.create(&name).unwrap();
        put.write(&aside.store.get(&name, u64::MAX).unwrap()).unwrap();
        assert_eq!(put.finish().unwrap(), Put::Created);

        let index = scene.index();
        let state = index.state().unwrap();
        assert_eq!((state.segments.len(), state.replaced.len()), (1, 2));
        assert!((0..900).all(|n| index.locate(&id(n)).is_ok()), "readers find what only the inputs list");
        let report = index.compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
        assert!(report.failed.is_empty() && report.removed == 3, "{report:?}");
        assert!(scene.places().is_superset(&complete));
        assert!(before.iter().all(|name| !scene.segments().contains(name)), "{first} {second}");
    }
}

#[test]
fn an_output_that_lacks_entries_does_not_replace_the_inputs_that_are_left() {
    let scene = scene();
    let (first, _) = scene.put_range(0, 800);
    let (second, _) = scene.put_range(800, 900);
    let pack = scene.index().state().unwrap().packs().into_values().map(|p| (*p).clone()).collect::<Vec<_>>();
    let number = |n: u64| u32::from(pack[0].footer.records != if n < 800 { 800 } else { 100 });
    // Without the first chunk of the first segment; the second one is gone already.
    let entries = (1..900).map(|n| entry(number(n), id(n), 256 + n as u32)).collect();
    scene.put(&pack, &[first, second], entries);
    scene.store.delete(&names::segment(&second)).unwrap();
    let index = scene.index();
    assert!(!has(&index, 0));
    index.compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
    assert!((0..900).all(|n| has(&index, n)));
    assert_eq!(scene.segments().len(), 1);
}

#[test]
fn an_output_that_was_compared_by_nobody_yet_and_is_right_takes_over() {
    let scene = scene();
    scene.put_range(0, 800);
    scene.put_range(800, 900);
    let complete = scene.places();
    let index = scene.index();
    let inputs = index.state().unwrap().segments.clone();
    index.compact(ORIGIN, &inputs, &HashSet::new(), &()).unwrap().unwrap();
    let index = scene.index();
    // One input is gone already: the rest is still compared.
    scene.store.delete(&inputs[0].name).unwrap();
    let report = index.compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
    assert_eq!((report.removed, report.written), (1, 0));
    assert_eq!((scene.places(), scene.segments().len()), (complete, 1));
}

#[test]
fn an_input_that_is_gone_ends_a_compaction_without_harm() {
    let scene = scene();
    let (first, _) = scene.put_range(0, 800);
    scene.put_range(800, 900);
    let index = scene.index();
    let inputs = index.state().unwrap().segments.clone();
    scene.store.delete(&names::segment(&first)).unwrap();
    assert!(index.compact(ORIGIN, &inputs, &HashSet::new(), &()).unwrap().is_none());
    assert_eq!(scene.segments().len(), 1);
}

/// Another process, which deletes what is in `doomed` as soon as a segment was put: it has compared that segment.
struct Meddler {
    inner: MemStore,
    doomed: Vec<String>,
}

struct MeddlingWriter {
    store: MemStore,
    inner: Box<dyn ObjectWriter>,
    doomed: Vec<String>,
}

impl ObjectWriter for MeddlingWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.inner.write(bytes)
    }
    fn finish(self: Box<Self>) -> Result<Put> {
        let put = self.inner.finish()?;
        for name in &self.doomed {
            self.store.delete(name)?;
        }
        Ok(put)
    }
}

impl Store for Meddler {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_range(name, offset, buf)
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.inner.put_if_absent(name, bytes)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.inner.create(name)?;
        Ok(Box::new(MeddlingWriter { store: self.inner.clone(), inner, doomed: self.doomed.clone() }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }
    fn now(&self) -> Result<Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        self.inner.delete(name)
    }
}

#[test]
fn an_output_stays_when_others_rely_on_it() {
    let scene = scene();
    scene.put_range(0, 800);
    scene.put_range(800, 900);
    let complete = scene.places();
    for doomed in [1, 2] {
        let store = scene.store.fork();
        let doomed = store.names()[..doomed].to_vec();
        let index = scene.index_over(Meddler { inner: store.clone(), doomed });
        let inputs = index.state().unwrap().segments.clone();
        assert!(index.compact(ORIGIN, &inputs, &HashSet::new(), &()).unwrap().is_none());
        assert_eq!(places(&scene.index_over(store)), complete);
    }
}

#[test]
fn dropped_packs_do_not_come_back_with_a_segment_that_nobody_deleted() {
    let scene = scene();
    let (old, going) = scene.put_range(0, 700);
    let index = scene.index();
    let drop = HashSet::from([going.id()]);
    scene.put_range(700, 900);
    let inputs = index.refresh().unwrap().segments.clone();
    // Its maker dies before it deletes the inputs; the next one does not know why the pack was dropped.
    index.compact(ORIGIN, &inputs, &drop, &()).unwrap().unwrap();
    let again = index.refresh().unwrap();
    assert_eq!((again.segments.len(), again.replaced.len()), (1, 2));
    let done = index.compact(ORIGIN, &again.segments, &HashSet::new(), &()).unwrap().unwrap();
    index.delete_inputs(&done).unwrap();
    assert!(scene.segments().contains(&names::segment(&old)), "the case that this is about");
    let index = scene.index();
    assert!(!has(&index, 5) && has(&index, 800));
    assert!(!index.state().unwrap().packs().contains_key(&going.id()));
}

/// Shows other listings than the true ones, the last first; then the true ones.
struct SlowListing {
    inner: MemStore,
    listings: Mutex<Vec<Vec<Listed>>>,
}

impl Store for SlowListing {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_range(name, offset, buf)
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.inner.put_if_absent(name, bytes)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(name)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        match lock(&self.listings).pop() {
            Some(listed) => listed.into_iter().try_for_each(each),
            None => self.inner.list(prefix, each),
        }
    }
    fn now(&self) -> Result<Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        self.inner.delete(name)
    }
}

#[test]
fn a_snapshot_is_complete_whatever_a_compaction_does_during_the_listing() {
    let scene = scene();
    scene.put_range(0, 800);
    scene.put_range(800, 900);
    let (untouched, _) = scene.put_range(900, 905);
    let complete = scene.places();
    let mut before = Vec::new();
    scene
        .store
        .list(names::INDEX, &mut |object| {
            before.push(object);
            Ok(())
        })
        .unwrap();
    let index = scene.index();
    let mut inputs = index.state().unwrap().segments.clone();
    inputs.retain(|s| s.id() != untouched);
    let done = index.compact(ORIGIN, &inputs, &HashSet::new(), &()).unwrap().unwrap();
    index.delete_inputs(&done).unwrap();
    let gap: Vec<Listed> = before.iter().filter(|o| o.name == names::segment(&untouched)).cloned().collect();
    // Either the inputs are listed and gone, or neither they nor the output are listed, or one after the other.
    for listings in [vec![before.clone()], vec![gap.clone()], vec![before, gap]] {
        let store = SlowListing { inner: scene.store.clone(), listings: Mutex::new(listings) };
        assert_eq!(places(&scene.index_over(store)), complete);
    }
}

#[test]
fn look_ups_go_on_while_segments_are_compacted_away() {
    let scene = scene();
    for n in 0..6 {
        scene.put_range(n * 100, n * 100 + 100);
    }
    let reader = scene.index();
    reader.state().unwrap();
    scene.index().compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
    assert_eq!(scene.segments().len(), 1);
    assert!((0..600).all(|n| has(&reader, n)), "the old snapshot names segments that are gone");
    assert!((600..700).all(|n| !has(&reader, n)));
}

#[test]
fn compactions_beside_each_other_lose_nothing() {
    let scene = scene();
    for n in 0..8 {
        scene.put_range(n * 50, n * 50 + 50);
    }
    let complete = scene.places();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..6 {
                    scene.index().compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
                }
            });
        }
        scope.spawn(|| {
            let (index, fresh) = (scene.index(), (0..20).map(|_| scene.index()));
            for other in fresh {
                assert!((0..400).all(|n| index.locate(&id(n)).is_ok() && other.locate(&id(n)).is_ok()));
            }
        });
        scope.spawn(|| {
            for n in 8..20 {
                scene.put_range(n * 50, n * 50 + 50);
            }
        });
    });
    assert!(scene.places().is_superset(&complete));
    let index = scene.index();
    index.compact_all(ORIGIN, &HashSet::new(), &()).unwrap();
    assert!((0..1000).all(|n| has(&index, n)));
    assert_eq!(index.state().unwrap().entries(), 1000);
}
