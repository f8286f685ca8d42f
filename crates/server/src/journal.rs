//! An append-only file of JSON lines, with the newest of them in memory for reading. Events and the audit log.
//!
//! Invariants: an entry is on the disk before `append` returns; nothing that was written is changed. A line that a crash
//! cut off is ended before the next one is written. Reading goes back as far as memory does; the file has everything.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Serialize, de::DeserializeOwned};

/// Entries kept for reading.
const KEPT: usize = 10_000;
/// Longest line that is read back.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// The file and its newest entries.
pub struct Journal<T> {
    path: PathBuf,
    inner: Mutex<Inner<T>>,
    /// Above this size the file is put aside and begun anew; none: never.
    rotate_at: Option<u64>,
}

struct Inner<T> {
    file: File,
    bytes: u64,
    newest: VecDeque<T>,
}

impl<T> Inner<T> {
    fn keep(&mut self, entry: T) {
        if self.newest.len() == KEPT {
            self.newest.pop_front();
        }
        self.newest.push_back(entry);
    }
}

impl<T: Clone + Serialize + DeserializeOwned> Journal<T> {
    /// Opens or makes the file and reads it; `each` sees every entry that can be read, oldest first.
    pub fn open(path: &Path, rotate_at: Option<u64>, mut each: impl FnMut(&T)) -> std::io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut newest = VecDeque::new();
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        let mut is_whole = true;
        loop {
            line.clear();
            if (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            is_whole = line.ends_with(b"\n");
            match serde_json::from_slice::<T>(&line) {
                Ok(entry) => {
                    each(&entry);
                    if newest.len() == KEPT {
                        newest.pop_front();
                    }
                    newest.push_back(entry);
                }
                Err(error) => tracing::warn!(file = %path.display(), %error, "a line cannot be read; it is left out"),
            }
        }
        drop(reader);
        if !is_whole {
            file.write_all(b"\n")?;
        }
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self { path: path.to_owned(), inner: Mutex::new(Inner { file, bytes, newest }), rotate_at })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what `make` makes of the newest entry. Blocks until it is on the disk.
    pub fn append(&self, make: impl FnOnce(Option<&T>) -> T) -> std::io::Result<T> {
        let mut inner = self.lock();
        let entry = make(inner.newest.back());
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        if self.rotate_at.is_some_and(|limit| inner.bytes > limit) {
            std::fs::rename(&self.path, self.path.with_extension("jsonl.1"))?;
            inner.file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&self.path)?;
            inner.bytes = 0;
        }
        if let Err(error) = inner.file.write_all(&line).and_then(|()| inner.file.sync_data()) {
            // A full disk takes half a line. What is left of it would spoil the next one.
            inner.file.set_len(inner.bytes)?;
            return Err(error);
        }
        inner.bytes += line.len() as u64;
        inner.keep(entry.clone());
        Ok(entry)
    }

    /// Keeps an entry that could not be stored, until the process ends.
    pub fn remember(&self, entry: T) {
        self.lock().keep(entry);
    }

    /// Entries that pass, newest first, from those that `is_older` lets pass; and whether there are more.
    pub fn page(&self, limit: usize, mut passes: impl FnMut(&T) -> bool) -> (Vec<T>, bool) {
        let inner = self.lock();
        let mut found: Vec<T> =
            inner.newest.iter().rev().filter(|entry| passes(entry)).take(limit + 1).cloned().collect();
        let more = found.len() > limit;
        found.truncate(limit);
        (found, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_and_a_torn_line_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let journal = Journal::<u32>::open(&path, None, |_| {}).unwrap();
        for _ in 0..3 {
            journal.append(|last| last.map_or(1, |last| last + 1)).unwrap();
        }
        drop(journal);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{torn").unwrap();
        let mut seen = Vec::new();
        let journal = Journal::<u32>::open(&path, None, |entry| seen.push(*entry)).unwrap();
        assert_eq!(seen, [1, 2, 3]);
        assert_eq!(journal.append(|last| last.unwrap() + 1).unwrap(), 4);
        assert_eq!(journal.page(2, |_| true), (vec![4, 3], true));
        assert_eq!(journal.page(10, |entry| *entry < 3), (vec![2, 1], false));
        drop(journal);
        let again = Journal::<u32>::open(&path, Some(1), |_| {}).unwrap();
        assert_eq!(again.page(10, |_| true).0, [4, 3, 2, 1]);
        again.append(|_| 5).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "5\n");
        assert!(path.with_extension("jsonl.1").exists());
    }
}
