//! Local copies of restore points' objects, all in one file: whoever lists ten thousand restore points reads that file and
//! not ten thousand objects.
//!
//! ```text
//! record: length of the name u8 · length of the bytes u32 · modified, ns since 1970 i128 · name · bytes · checksum 16
//! ```
//! The store has the say: a copy counts only if the store's latest listing shows an object of that name, length and time,
//! and its bytes are sealed under the repository's keys like those of the object itself. A name comes back with other
//! bytes when a restore point is deleted and copied again; the time tells the two apart.
//!
//! A record is appended with one write, so several processes may share the file. Where one was torn, reading ends, and the
//! file is written anew without it; so it is when most of it is of objects that are gone. A process that appends to a
//! file which was just replaced adds a copy that nobody finds, and that is all. Any failure makes it only slower.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use jiff::Timestamp;

use crate::{
    format::{ObjectId, envelope::ENVELOPE_BYTES_MAX, names},
    store::{Listed, check_name},
    util::lock,
};

const FILE: &str = "points";
const HEAD_BYTES: usize = 1 + 4 + 16;
const SUM_BYTES: usize = 16;
/// Bytes of objects that are gone, on top of as many of those that are there, before the file is written anew.
const WASTE_BYTES_MAX: u64 = 1 << 20;

/// What a listing says of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Timestamp,
}

/// Where a copy is in the file.
#[derive(Clone, Copy, Debug)]
struct Place {
    stamp: Stamp,
    offset: u64,
}

impl Place {
    fn record_bytes(&self, name: &str) -> u64 {
        (HEAD_BYTES + name.len() + SUM_BYTES) as u64 + self.stamp.bytes
    }
}

/// The file, as far as it was read or written by this process.
struct Log {
    file: Arc<File>,
    places: HashMap<String, Place>,
}

#[derive(Default)]
struct State {
    /// The latest complete listing.
    listed: HashMap<String, Stamp>,
    /// None before the first use, or where the file cannot be used.
    log: Option<Log>,
    is_opened: bool,
}

/// The copies of one repository.
pub struct PointCopies {
    dir: PathBuf,
    max_bytes: u64,
    points_min: usize,
    state: Mutex<State>,
}

impl PointCopies {
    /// In a directory, which is made when it is needed. Nothing is kept of repositories with fewer points than `points_min`.
    pub fn new(dir: PathBuf, max_bytes: u64, points_min: usize) -> Self {
        Self { dir, max_bytes, points_min, state: Mutex::default() }
    }

    /// Takes note of what a complete listing of all points showed.
    pub fn listed(&self, objects: impl Iterator<Item = Listed>) {
        let stamps = objects.map(|o| (o.name, Stamp { bytes: o.bytes, modified: o.modified })).collect();
        lock(&self.state).listed = stamps;
    }

    /// The copy of an object that the store has.
    pub fn load(&self, name: &str) -> Option<Vec<u8>> {
        let (file, place) = {
            let mut state = lock(&self.state);
            let stamp = *state.listed.get(name)?;
            let log = self.log(&mut state)?;
            let place = *log.places.get(name).filter(|place| place.stamp == stamp)?;
            (log.file.clone(), place)
        };
        let mut record = vec![0; place.record_bytes(name) as usize];
        file.read_exact_at(&mut record, place.offset).ok()?;
        let (text, sum) = record.split_at(record.len() - SUM_BYTES);
        let begin = HEAD_BYTES + name.len();
        let is_good = *sum == checksum(text) && text[HEAD_BYTES..begin] == *name.as_bytes();
        is_good.then(|| text[begin..].to_vec())
    }

    /// Keeps a copy of what was read from the store just now.
    pub fn keep(&self, name: &str, bytes: &[u8]) {
        let mut state = lock(&self.state);
        let Some(stamp) = state.listed.get(name).copied() else { return };
        if stamp.bytes != bytes.len() as u64 || name.len() > usize::from(u8::MAX) {
            return;
        }
        let Some(log) = self.log(&mut state) else { return };
        if let Err(error) = log.append(name, stamp, bytes, self.max_bytes) {
            tracing::debug!(%error, dir = %self.dir.display(), "cannot keep copies of restore points");
            state.log = None;
        }
    }

    /// Drops what is in memory; the file is the caller's to remove.
    pub fn forget(&self) {
        let mut state = lock(&self.state);
        (state.log, state.is_opened) = (None, false);
    }

    fn log<'a>(&self, state: &'a mut State) -> Option<&'a mut Log> {
        if state.listed.len() < self.points_min {
            return None;
        }
        if !state.is_opened {
            state.is_opened = true;
            match open(&self.dir, &state.listed) {
                Ok(log) => state.log = Some(log),
                Err(error) => {
                    tracing::debug!(%error, dir = %self.dir.display(), "no copies of restore points are kept");
                }
            }
        }
        state.log.as_mut()
    }
}

fn checksum(text: &[u8]) -> [u8; SUM_BYTES] {
    let mut sum = [0; SUM_BYTES];
    sum.copy_from_slice(&blake3::hash(text).as_bytes()[..SUM_BYTES]);
    sum
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

/// Opens the file, and writes it anew first if little of it is of use.
fn open(dir: &Path, listed: &HashMap<String, Stamp>) -> io::Result<Log> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let path = dir.join(FILE);
    let mut log = Log { file: Arc::new(append_to(&path)?), places: HashMap::new() };
    let is_whole = log.read()?;
    let all = log.file.metadata()?.len();
    log.places.retain(|name, place| listed.get(name) == Some(&place.stamp));
    let live: u64 = log.places.iter().map(|(name, place)| place.record_bytes(name)).sum();
    if is_whole && all <= 2 * live + WASTE_BYTES_MAX {
        return Ok(log);
    }
    let tmp = dir.join(format!("{}.tmp", ObjectId::random()));
    let written = log.copy_to(&tmp).and_then(|copy| fs::rename(&tmp, &path).map(|()| copy));
    if written.is_err() {
        let _ = fs::remove_file(&tmp);
    }
    written
}

impl Log {
    /// Finds the records; false if there is something in between or at the end that is none.
    fn read(&mut self) -> io::Result<bool> {
        let (end, mut at) = (self.file.metadata()?.len(), 0u64);
        let mut input = BufReader::with_capacity(1 << 20, &*self.file);
        input.seek(SeekFrom::Start(0))?;
        while at < end {
            let Some((name, stamp)) = read_head(&mut input, end - at)? else { return Ok(false) };
            let place = Place { stamp, offset: at };
            let bytes = place.record_bytes(&name);
            if bytes > end - at {
                return Ok(false);
            }
            input.seek_relative((stamp.bytes + SUM_BYTES as u64) as i64)?;
            at += bytes;
            self.places.insert(name, place);
        }
        Ok(true)
    }

    fn append(&mut self, name: &str, stamp: Stamp, bytes: &[u8], max_bytes: u64) -> io::Result<()> {
        let place = Place { stamp, offset: 0 };
        let mut record = Vec::with_capacity(place.record_bytes(name) as usize);
        record.push(name.len() as u8);
        record.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        record.extend_from_slice(&stamp.modified.as_nanosecond().to_le_bytes());
        record.extend_from_slice(name.as_bytes());
        record.extend_from_slice(bytes);
        record.extend_from_slice(&checksum(&record));
        if self.file.metadata()?.len() + record.len() as u64 > max_bytes {
            return Ok(());
        }
        (&*self.file).write_all(&record)?;
        // Where it ended up is only known if nobody else appends; the caller has the bytes, so it need not be.
        Ok(())
    }

    /// The records that are of use, in a file of their own.
    fn copy_to(&self, path: &Path) -> io::Result<Log> {
        let mut copy = Log { file: Arc::new(append_to(path)?), places: HashMap::new() };
        let mut record = Vec::new();
        let mut out = io::BufWriter::with_capacity(1 << 20, &*copy.file);
        let mut at = 0;
        for (name, place) in &self.places {
            record.resize(place.record_bytes(name) as usize, 0);
            self.file.read_exact_at(&mut record, place.offset)?;
            out.write_all(&record)?;
            copy.places.insert(name.clone(), Place { offset: at, ..*place });
            at += record.len() as u64;
        }
        out.flush()?;
        drop(out);
        Ok(copy)
    }
}

/// The beginning of a record; `None` if it is none.
fn read_head(input: &mut impl BufRead, left: u64) -> io::Result<Option<(String, Stamp)>> {
    let mut head = [0; HEAD_BYTES];
    if left < HEAD_BYTES as u64 {
        return Ok(None);
    }
    input.read_exact(&mut head)?;
    let (name_bytes, rest) = (usize::from(head[0]), &head[1..]);
    let (bytes, modified) = rest.split_at(4);
    let bytes = u64::from(bytes.iter().rev().fold(0, |number: u32, byte| number << 8 | u32::from(*byte)));
    let modified = modified.iter().rev().fold(0, |number: u128, byte| number << 8 | u128::from(*byte)) as i128;
    if left < (HEAD_BYTES + name_bytes) as u64 || bytes > ENVELOPE_BYTES_MAX {
        return Ok(None);
    }
    let mut name = vec![0; name_bytes];
    input.read_exact(&mut name)?;
    let name = String::from_utf8(name).ok().filter(|name| name.starts_with(names::POINTS) && check_name(name).is_ok());
    Ok(name.zip(Timestamp::from_nanosecond(modified).ok()).map(|(name, modified)| (name, Stamp { bytes, modified })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, bytes: &[u8], second: i64) -> Listed {
        Listed {
            name: name.into(),
            bytes: bytes.len() as u64,
            modified: Timestamp::new(1_700_000_000 + second, 5).unwrap(),
        }
    }

    fn content(number: usize) -> Vec<u8> {
        format!("sealed bytes of {number} ").repeat(20 + number % 7).into_bytes()
    }

    fn name(number: usize) -> String {
        format!("points/{number:032x}")
    }

    /// A new process that has listed so many points.
    fn process(dir: &Path, points: std::ops::Range<usize>) -> PointCopies {
        let copies = PointCopies::new(dir.join("c"), 1 << 20, 3);
        copies.listed(points.map(|n| listed(&name(n), &content(n), n as i64)));
        copies
    }

    fn found(copies: &PointCopies, points: std::ops::Range<usize>) -> usize {
        let hits = points.filter_map(|n| Some((n, copies.load(&name(n))?)));
        hits.inspect(|(n, bytes)| assert!(*bytes == content(*n))).count()
    }

    fn keep(copies: &PointCopies, points: std::ops::Range<usize>) {
        points.for_each(|n| copies.keep(&name(n), &content(n)));
    }

    #[test]
    fn the_next_process_finds_what_is_as_the_store_lists_it() {
        let dir = tempfile::tempdir().unwrap();
        keep(&process(dir.path(), 0..10), 0..10);
        assert_eq!(found(&process(dir.path(), 0..10), 0..10), 10);
        let other = process(dir.path(), 0..10);
        let mut objects: Vec<Listed> = (0..10).map(|n| listed(&name(n), &content(n), n as i64)).collect();
        objects[1].bytes += 1;
        objects[2].modified = Timestamp::new(5, 0).unwrap();
        objects.remove(3);
        other.listed(objects.into_iter());
        assert_eq!((found(&other, 0..1), found(&other, 1..4), found(&other, 4..10)), (1, 0, 6));
    }

    #[test]
    fn what_is_torn_or_altered_is_not_given_out_and_the_file_mends() {
        let dir = tempfile::tempdir().unwrap();
        keep(&process(dir.path(), 0..10), 0..10);
        let path = dir.path().join("c").join(FILE);
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..good.len() - 3]).unwrap();
        let copies = process(dir.path(), 0..10);
        assert_eq!(found(&copies, 0..10), 9);
        keep(&copies, 9..10);
        assert_eq!(found(&process(dir.path(), 0..10), 0..10), 10, "the torn one went, the new one is found");
        let mut flipped = fs::read(&path).unwrap();
        let middle = flipped.len() - 100;
        flipped[middle] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(found(&process(dir.path(), 0..10), 0..10), 9);
        for garbage in [vec![], vec![0xff; 5], vec![0xff; 5000], vec![0; 5000]] {
            fs::write(&path, garbage).unwrap();
            let copies = process(dir.path(), 0..10);
            assert_eq!(found(&copies, 0..10), 0);
            keep(&copies, 0..10);
            assert_eq!(found(&process(dir.path(), 0..10), 0..10), 10);
        }
    }

    #[test]
    fn processes_share_the_file_and_what_is_gone_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (process(dir.path(), 0..4000), process(dir.path(), 0..4000));
        std::thread::scope(|scope| {
            scope.spawn(|| keep(&one, 0..1000));
            scope.spawn(|| keep(&other, 1000..2000));
        });
        let length = || fs::metadata(dir.path().join("c").join(FILE)).unwrap().len();
        assert!(found(&process(dir.path(), 0..4000), 0..4000) > 1500, "what fits");
        assert!(length() <= (1 << 20) + 1000, "bounded, but for what two add at the same instant");
        let few = process(dir.path(), 0..10);
        assert_eq!(found(&few, 0..10), 10);
        let full = length();
        few.forget();
        let few = PointCopies::new(dir.path().join("c"), 1 << 20, 3);
        few.listed((0..10).map(|n| listed(&name(n), &content(n), n as i64)));
        // Just under a megabyte of waste stays; a torn end makes the file be written anew.
        fs::OpenOptions::new().append(true).open(dir.path().join("c").join(FILE)).unwrap().write_all(b"x").unwrap();
        assert_eq!(found(&few, 0..10), 10);
        assert!(length() < full / 10);
    }

    #[test]
    fn few_points_and_places_that_cannot_be_written_leave_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let copies = process(dir.path(), 0..2);
        keep(&copies, 0..2);
        assert_eq!(found(&copies, 0..2), 0);
        assert!(!dir.path().join("c").exists());
        fs::write(dir.path().join("c"), "a file is in the way").unwrap();
        let copies = process(dir.path(), 0..10);
        keep(&copies, 0..10);
        assert_eq!(found(&copies, 0..10), 0);
    }
}
