//! Local copies of what is read again and again: restore points ([`points`]), and from a remote store index segments and
//! packs of manifest pages too.
//!
//! The latter never change under their name, so a copy cannot be stale; they are sealed, so it reveals nothing. Copies
//! are blocks of 256 KiB, which fetches thirty pages with one request. Each block carries a checksum over name, place and
//! bytes: one that was cut short, altered or exchanged is dropped and fetched again. Whether an object exists is always
//! asked of the store, and nothing is given out that a listing of the store contradicts. The cache may fail, fill up or vanish at any time; then it is only slower.

mod points;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use jiff::Timestamp;

use super::{Listed, ObjectWriter, Put, Store, check_name};
use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    util::lock,
};
use points::PointCopies;

const BLOCK_BYTES: u64 = 256 << 10;
/// Blocks fetched with one request.
const RUN_BLOCKS: u64 = 32;
/// Restore points of a directory that are opened as fast from where they are.
const FEW_POINTS: usize = 200;
/// After a block: the object's length and the checksum.
const TRAILER_BYTES: usize = 8 + 32;

/// Where copies are kept, and how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Directory; each repository has one of its own inside.
    pub dir: PathBuf,
    /// Bytes per repository. Beyond this the blocks that were used least recently go.
    pub max_bytes: u64,
}

/// A store with local copies.
pub struct CachedStore {
    inner: Arc<dyn Store>,
    dir: PathBuf,
    max_bytes: u64,
    /// Whether blocks are kept, or restore points only.
    has_blocks: bool,
    points: PointCopies,
    sizes: Mutex<HashMap<String, u64>>,
    /// Bytes added since the cache was last found small enough.
    added: AtomicU64,
}

impl CachedStore {
    /// In front of a remote store. Makes its directory.
    pub fn new(inner: Arc<dyn Store>, options: &CacheOptions) -> Result<Self> {
        let cache = Self::assemble(inner, options, 0);
        let fail = |e| Error::io("create", cache.dir.display().to_string(), e);
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&cache.dir).map_err(fail)?;
        cache.shrink();
        Ok(Self { has_blocks: true, ..cache })
    }

    /// In front of a store that is fast, but for thousands of small objects: a directory. Keeps restore points only, and
    /// makes its directory when there are many.
    pub fn of_points(inner: Arc<dyn Store>, options: &CacheOptions) -> Self {
        Self::assemble(inner, options, FEW_POINTS)
    }

    fn assemble(inner: Arc<dyn Store>, options: &CacheOptions, points_min: usize) -> Self {
        let place = blake3::hash(inner.location().as_bytes());
        let dir = options.dir.join(hex::encode(&place.as_bytes()[..16]));
        let points = PointCopies::new(dir.clone(), options.max_bytes / 4, points_min);
        let (sizes, added) = (Mutex::default(), AtomicU64::new(0));
        Self { inner, dir, max_bytes: options.max_bytes, has_blocks: false, points, sizes, added }
    }

    /// Whether an object is worth keeping blocks of.
    fn is_kept(&self, name: &str) -> bool {
        self.has_blocks && (name.starts_with(names::INDEX) || name.starts_with(names::META))
    }

    fn file(&self, name: &str, block: u64) -> PathBuf {
        self.dir.join(format!("{}.{block}", name.replace('/', "-")))
    }

    /// A block and the object's length, if there is a good copy.
    fn load(&self, name: &str, block: u64) -> Option<(Vec<u8>, u64)> {
        let path = self.file(name, block);
        let mut bytes = fs::read(&path).ok()?;
        let split = bytes.len().checked_sub(TRAILER_BYTES);
        let good = split.and_then(|split| {
            let size = u64::from_le_bytes(bytes[split..split + 8].try_into().ok()?);
            let is_whole = split as u64 == block_bytes(block, size);
            let is_good = is_whole && checksum(name, block, size, &bytes[..split]) == bytes[split + 8..];
            is_good.then_some((split, size))
        });
        let Some((split, size)) = good else {
            tracing::debug!(file = %path.display(), "a damaged local copy is dropped");
            let _ = fs::remove_file(&path);
            return None;
        };
        // Young again: the oldest go first.
        let _ = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        bytes.truncate(split);
        Some((bytes, size))
    }

    fn keep(&self, name: &str, block: u64, size: u64, bytes: &[u8]) {
        let written = || -> io::Result<()> {
            let tmp = self.dir.join(format!("{}.tmp", ObjectId::random()));
            let sum = checksum(name, block, size, bytes);
            let done = fs::write(&tmp, [bytes, &size.to_le_bytes(), &sum].concat())
                .and_then(|()| fs::rename(&tmp, self.file(name, block)));
            if done.is_err() {
                let _ = fs::remove_file(&tmp);
            }
            done
        };
        match written() {
            Ok(()) if self.added.fetch_add(bytes.len() as u64, Relaxed) > self.max_bytes / 16 => self.shrink(),
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, dir = %self.dir.display(), "cannot keep a local copy"),
        }
    }

    /// Removes the oldest copies down to three quarters of the bound, if there are too many.
    fn shrink(&self) {
        self.added.store(0, Relaxed);
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let meta = entry.metadata().ok()?;
                Some((meta.modified().ok()?, meta.len(), entry.path()))
            })
            .collect();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        if total <= self.max_bytes {
            return;
        }
        files.sort();
        for (_, bytes, path) in files {
            if total <= self.max_bytes / 4 * 3 {
                return;
            }
            if fs::remove_file(path).is_ok() {
                total -= bytes;
            }
        }
    }

    fn known_size(&self, name: &str) -> Result<u64> {
        if let Some(size) = lock(&self.sizes).get(name) {
            return Ok(*size);
        }
        let size = self.inner.size(name)?;
        lock(&self.sizes).insert(name.into(), size);
        Ok(size)
    }

    /// Blocks from `first`, of which that one has no copy: fetched with as many after it as have none either.
    fn fetch(&self, name: &str, first: u64, last: u64, size: u64) -> Result<Vec<u8>> {
        let missing = |block: &u64| !self.file(name, *block).exists();
        let run = 1 + (first + 1..=last).take(RUN_BLOCKS as usize - 1).take_while(missing).count() as u64;
        let begin = first * BLOCK_BYTES;
        let len = (run * BLOCK_BYTES).min(size - begin);
        let bytes = self.inner.get_range(name, begin, len as usize)?;
        for (number, block) in bytes.chunks(BLOCK_BYTES as usize).enumerate() {
            self.keep(name, first + number as u64, size, block);
        }
        Ok(bytes)
    }

    fn read_kept(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_name(name)?;
        let too_short = || Error::damaged(name, "it ends too early");
        let end = offset.checked_add(buf.len() as u64).ok_or_else(too_short)?;
        let first = self.load(name, offset / BLOCK_BYTES);
        let size = match (&first, lock(&self.sizes).get(name)) {
            (_, Some(size)) => Some(*size),
            (Some((_, size)), None) => Some(*size),
            (None, None) => None,
        };
        let size = size.map_or_else(|| self.known_size(name), Ok)?;
        if end > size {
            return Err(too_short());
        }
        let last = end.saturating_sub(1) / BLOCK_BYTES;
        let mut at = offset;
        let mut ready = first;
        while at < end {
            let block = at / BLOCK_BYTES;
            let copy = ready.take().or_else(|| self.load(name, block));
            let bytes = match copy {
                Some((bytes, length)) if length == size => bytes,
                _ => self.fetch(name, block, last, size)?,
            };
            let within = (at - block * BLOCK_BYTES) as usize;
            let len = (bytes.len() - within).min((end - at) as usize);
            let to = (at - offset) as usize;
            buf[to..to + len].copy_from_slice(&bytes[within..within + len]);
            at += len as u64;
        }
        Ok(())
    }
}

/// Length of a block of an object of `size` bytes.
fn block_bytes(block: u64, size: u64) -> u64 {
    size.saturating_sub(block.saturating_mul(BLOCK_BYTES)).min(BLOCK_BYTES)
}

fn checksum(name: &str, block: u64, size: u64, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
    hasher.update(&block.to_le_bytes()).update(&size.to_le_bytes()).update(bytes);
    *hasher.finalize().as_bytes()
}

/// Removes every copy in a directory that [`CachedStore`] made.
fn clear(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let _ = fs::remove_file(entry.path());
    }
}

impl Store for CachedStore {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        if self.is_kept(name) { self.read_kept(name, offset, buf) } else { self.inner.read_range(name, offset, buf) }
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }
    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        if !name.starts_with(names::POINTS) {
            return self.inner.get(name, max);
        }
        if let Some(bytes) = self.points.load(name).filter(|bytes| bytes.len() as u64 <= max) {
            return Ok(bytes);
        }
        let bytes = self.inner.get(name, max)?;
        self.points.keep(name, &bytes);
        Ok(bytes)
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.inner.put_if_absent(name, bytes)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(name)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let mut points = Vec::new();
        self.inner.list(prefix, &mut |object| {
            if self.is_kept(&object.name) {
                lock(&self.sizes).insert(object.name.clone(), object.bytes);
            }
            if prefix == names::POINTS {
                points.push(object.clone());
            }
            each(object)
        })?;
        if prefix == names::POINTS {
            self.points.listed(points.into_iter());
        }
        Ok(())
    }
    fn now(&self) -> Result<Timestamp> {
        self.inner.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        lock(&self.sizes).remove(name);
        self.inner.delete(name)
    }
    fn clean(&self) {
        self.inner.clean();
    }
    fn forget(&self) {
        lock(&self.sizes).clear();
        clear(&self.dir);
        self.points.forget();
        self.inner.forget();
    }
    fn fetches_in_flight(&self) -> usize {
        self.inner.fetches_in_flight()
    }
    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
    fn heed(&self, cancel: &Arc<AtomicBool>) {
        self.inner.heed(cancel);
    }
    fn retention(&self) -> Option<std::time::Duration> {
        self.inner.retention()
    }
    fn renew(&self, names: &mut dyn Iterator<Item = String>, until: Timestamp) -> Result<()> {
        self.inner.renew(names, until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    };

    struct Stand {
        objects: MemStore,
        counted: FaultyStore,
        cache: CachedStore,
        dir: tempfile::TempDir,
    }

    fn stand(max_bytes: u64) -> Stand {
        let objects = MemStore::new();
        let counted = FaultyStore::new(Arc::new(objects.clone()), Faults::default());
        let dir = tempfile::tempdir().unwrap();
        let options = CacheOptions { dir: dir.path().join("cache"), max_bytes };
        let cache = CachedStore::new(Arc::new(counted.clone()), &options).unwrap();
        Stand { objects, counted, cache, dir }
    }

    fn options(stand: &Stand) -> CacheOptions {
        CacheOptions { dir: stand.dir.path().join("cache"), max_bytes: 1 << 30 }
    }

    fn files(stand: &Stand) -> Vec<PathBuf> {
        let repo = fs::read_dir(stand.dir.path().join("cache")).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(repo).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n / 7 % 251) as u8).collect()
    }

    #[test]
    fn a_second_look_costs_no_request() {
        let stand = stand(1 << 30);
        let object = bytes((2 << 20) + 77);
        let _ = stand.objects.put_if_absent("meta/aa/pack", &object).unwrap();
        let range = |offset: usize, len: usize| {
            assert_eq!(
                stand.cache.get_range("meta/aa/pack", offset as u64, len).unwrap(),
                object[offset..offset + len]
            );
        };
        range(0, object.len());
        let before = stand.counted.operations();
        range((1 << 20) - 3, 9);
        range(2 << 20, 77);
        range(5, 0);
        assert_eq!(stand.counted.operations(), before);
        let short = stand.cache.get_range("meta/aa/pack", 2 << 20, 78).unwrap_err();
        assert!(short.is_damage(), "{short}");
        assert!(stand.cache.get_range("meta/aa/pack", u64::MAX, 2).is_err());
        assert!(matches!(stand.cache.get_range("meta/aa/none", 0, 2), Err(Error::Missing { .. })));
    }

    #[test]
    fn a_damaged_copy_is_fetched_again() {
        let stand = stand(1 << 30);
        let object = bytes(3000);
        let _ = stand.objects.put_if_absent("index/a", &object).unwrap();
        assert_eq!(stand.cache.get_range("index/a", 0, 3000).unwrap(), object);
        let file = files(&stand).remove(0);
        for damage in [vec![], object[..100].to_vec(), {
            let mut flipped = fs::read(&file).unwrap();
            flipped[50] ^= 1;
            flipped
        }] {
            fs::write(&file, damage).unwrap();
            assert_eq!(stand.cache.get_range("index/a", 0, 3000).unwrap(), object);
        }
    }

    #[test]
    fn a_copy_does_not_hide_damage_from_who_forgets_it() {
        let stand = stand(1 << 30);
        let _ = stand.objects.put_if_absent("index/a", b"good").unwrap();
        assert_eq!(stand.cache.get_range("index/a", 0, 4).unwrap(), b"good");
        stand.objects.tamper("index/a", Some(b"evil".to_vec()));
        stand.cache.forget();
        assert_eq!(stand.cache.get_range("index/a", 0, 4).unwrap(), b"evil");
    }

    #[test]
    fn restore_points_are_read_once_and_as_the_store_has_them() {
        let stand = stand(1 << 30);
        let next = || CachedStore::of_points(Arc::new(stand.counted.clone()), &options(&stand));
        let names: Vec<String> = (0..FEW_POINTS).map(|n| format!("points/{n:032x}")).collect();
        for name in &names {
            let _ = stand.objects.put_if_absent(name, name.as_bytes()).unwrap();
        }
        let read = |store: &CachedStore| {
            let before = stand.counted.operations();
            store.list(names::POINTS, &mut |_| Ok(())).unwrap();
            for name in &names {
                assert_eq!(store.get(name, 100).ok(), stand.objects.get(name, 100).ok(), "{name}");
            }
            stand.counted.operations() - before - 1
        };
        assert!(read(&next()) >= names.len() as u64);
        assert_eq!(read(&next()), 0);
        // Deleted, and copied back with as many other bytes.
        stand.objects.tamper(&names[7], Some(vec![b'7'; names[7].len()]));
        assert!((1..5).contains(&read(&next())));
        stand.objects.tamper(&names[8], None);
        assert!(next().get(&names[8], 100).is_err(), "without a listing the store is asked");
        let store = next();
        store.list(names::POINTS, &mut |_| Ok(())).unwrap();
        assert!(store.get(&names[8], 100).is_err());
        store.forget();
        assert!(read(&next()) >= names.len() as u64 - 1);
    }

    #[test]
    fn the_cache_stays_small_and_data_is_not_kept() {
        let stand = stand(5 << 20);
        let object = bytes(12 << 20);
        for name in ["meta/aa/pack", "data/aa/pack"] {
            let _ = stand.objects.put_if_absent(name, &object).unwrap();
            assert_eq!(stand.cache.get_range(name, 0, object.len()).unwrap(), object);
        }
        let total: u64 = files(&stand).iter().map(|file| fs::metadata(file).unwrap().len()).sum();
        assert!(total > 0 && total <= 6 << 20, "{total}");
        assert!(files(&stand).iter().all(|file| file.file_name().unwrap().to_str().unwrap().starts_with("meta-")));
    }

    #[test]
    fn without_its_directory_it_is_only_slower() {
        let stand = stand(1 << 30);
        let _ = stand.objects.put_if_absent("index/a", b"hello").unwrap();
        fs::remove_dir_all(stand.dir.path().join("cache")).unwrap();
        assert_eq!(stand.cache.get_range("index/a", 1, 3).unwrap(), b"ell");
    }
}
