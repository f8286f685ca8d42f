//! All keys in one file, and back: for moving a cluster to another store, and for the day after.
//!
//! The file is lines of JSON: a header, one line for each key in ascending order, and a trailer with the count and a
//! BLAKE3 hash of all bytes before it. Leased keys are left out: they tell who is there now. A listing is of one
//! revision, so the file is consistent.
//!
//! A restore writes nothing before all of the file was checked, then many transactions. What keeps half a restore from
//! being taken for a state is a marker key, put first and deleted last: see [`restoring`]. An interrupted restore is
//! simply run again. Revisions are the new store's own: whoever kept one from before (an epoch, a fencing number) must
//! not be alive when a state is restored elsewhere.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, BufWriter, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    store::{Compare, KEY_BYTES_MAX, Op, Revision, Store, VALUE_BYTES_MAX, check_key},
};

const FORMAT: &str = "virtward-state";
const VERSION: u32 = 1;
/// Put while a restore is under way. No key of the state itself.
const MARKER: &str = "/restoring";
/// Keys per transaction of a restore, and their bytes.
const BATCH_LEN: usize = 50;
const BATCH_BYTES: usize = 512 << 10;
/// Longest line: a largest value in base64, its key, and what is around them.
const LINE_BYTES_MAX: u64 = (VALUE_BYTES_MAX as u64 + KEY_BYTES_MAX as u64) * 4 / 3 + 1024;
const ENTRIES_MAX: u64 = 10_000_000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u32,
    revision: Revision,
    made: jiff::Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: String,
    value: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trailer {
    entries: u64,
    blake3: String,
}

/// What a file of this kind holds, or what was done with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Keys in the file.
    pub entries: u64,
    /// Revision of the store that they were read from.
    pub revision: Revision,
    /// When they were.
    pub made: jiff::Timestamp,
}

/// Whether a restore into this store has begun and not ended. A daemon does no work on such a state.
pub async fn restoring(store: &dyn Store) -> Result<bool> {
    Ok(store.get(MARKER.as_bytes()).await?.is_some())
}

/// Writes all keys to a new file that only its owner can read. It appears complete and synced, or not at all; a file
/// that is there is not overwritten.
pub async fn export(store: &dyn Store, path: &Path) -> Result<Summary> {
    let listing = store.list(b"").await?;
    if listing.entries.iter().any(|entry| entry.key == MARKER) {
        return Err(Error::Invalid {
            what: "a restore into this state has not ended; end it before saving the state".into(),
        });
    }
    let header =
        Header { format: FORMAT.into(), version: VERSION, revision: listing.revision, made: jiff::Timestamp::now() };
    let kept = listing.entries.iter().filter(|entry| entry.lease.is_none());
    let entries = kept.map(|entry| Entry { key: STANDARD.encode(&entry.key), value: STANDARD.encode(&entry.value) });
    let staged = path.with_extension("incomplete");
    let result = write(&staged, &header, entries).and_then(|count| {
        // Not a rename: that would overwrite.
        fs::hard_link(&staged, path).map_err(Error::io("create", path))?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))?;
        Ok(Summary { entries: count, revision: header.revision, made: header.made })
    });
    let _ = fs::remove_file(&staged);
    result
}

fn write(path: &Path, header: &Header, entries: impl Iterator<Item = Entry>) -> Result<u64> {
    let fail = || Error::io("write", path);
    let _ = fs::remove_file(path);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut out = BufWriter::new(file.map_err(Error::io("create", path))?);
    let mut hasher = blake3::Hasher::new();
    let mut line = |bytes: Vec<u8>| -> std::io::Result<()> {
        hasher.update(&bytes);
        out.write_all(&bytes)
    };
    line(json_line(header)).map_err(fail())?;
    let mut count = 0;
    for entry in entries {
        line(json_line(&entry)).map_err(fail())?;
        count += 1;
    }
    let trailer = Trailer { entries: count, blake3: hasher.finalize().to_hex().to_string() };
    out.write_all(&json_line(&trailer)).map_err(fail())?;
    let file = out.into_inner().map_err(|error| fail()(error.into_error()))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    Ok(count)
}

fn json_line(value: &impl Serialize) -> Vec<u8> {
    // Plain structs of texts and numbers always serialise.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Checks a file and says what it holds.
pub fn inspect(path: &Path) -> Result<Summary> {
    read(path, &mut |_, _| {})
}

/// Reads a file, checking everything, and hands out its entries. What was handed out counts only if this succeeds.
fn read(path: &Path, each: &mut dyn FnMut(Bytes, Bytes)) -> Result<Summary> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut lines = Lines { input: BufReader::new(file), path, number: 0, hasher: blake3::Hasher::new() };
    let (header, _) = lines.next()?;
    let header: Header = lines.parse(&header)?;
    if header.format != FORMAT {
        return Err(lines.damaged("it is no saved state of a cluster"));
    }
    if header.version > VERSION {
        let (found, supported) = (header.version.into(), VERSION.into());
        return Err(Error::NewerFormat { path: path.into(), found, supported });
    }
    let (mut count, mut last) = (0, Bytes::new());
    loop {
        let (line, before) = lines.next()?;
        if !line.starts_with(b"{\"key\"") {
            let trailer: Trailer = lines.parse(&line)?;
            if trailer.entries != count || trailer.blake3 != before.to_hex().as_str() {
                return Err(lines.damaged("its contents do not match its checksum"));
            }
            if lines.more()? {
                return Err(lines.damaged("something follows its end"));
            }
            return Ok(Summary { entries: count, revision: header.revision, made: header.made });
        }
        let entry: Entry = lines.parse(&line)?;
        let decode = |text: &str| STANDARD.decode(text).map(Bytes::from);
        let (Ok(key), Ok(value)) = (decode(&entry.key), decode(&entry.value)) else {
            return Err(lines.damaged("it is no base64"));
        };
        if check_key(&key).is_err() || value.len() > VALUE_BYTES_MAX || key <= last || count >= ENTRIES_MAX {
            return Err(lines.damaged("a key is out of order or too large"));
        }
        each(key.clone(), value);
        (last, count) = (key, count + 1);
    }
}

struct Lines<'a> {
    input: BufReader<File>,
    path: &'a Path,
    number: u64,
    hasher: blake3::Hasher,
}

impl Lines<'_> {
    /// A line, and the hash of everything before it.
    fn next(&mut self) -> Result<(Vec<u8>, blake3::Hash)> {
        let before = self.hasher.finalize();
        let mut line = Vec::new();
        let read = self.input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        read.map_err(Error::io("read", self.path))?;
        self.number += 1;
        if line.last() != Some(&b'\n') {
            return Err(self.damaged("it is cut short"));
        }
        self.hasher.update(&line);
        Ok((line, before))
    }

    fn more(&mut self) -> Result<bool> {
        self.input.fill_buf().map(|rest| !rest.is_empty()).map_err(Error::io("read", self.path))
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, line: &[u8]) -> Result<T> {
        serde_json::from_slice(line).map_err(|error| self.damaged(&error.to_string()))
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Corrupt {
            path: self.path.into(),
            what: format!("line {}: {what}", self.number),
            remedy: "nothing was changed; use another copy".into(),
        }
    }
}

/// Puts all keys of a file into a store. One that holds anything is refused unless `replace` is set; then its keys are
/// replaced by those of the file. Leases and their keys are left alone.
pub async fn import(store: &dyn Store, path: &Path, replace: bool) -> Result<Summary> {
    let mut entries = Vec::new();
    let summary = read(path, &mut |key, value| entries.push((key, value)))?;
    let listing = store.list(b"").await?;
    let there = || listing.entries.iter().filter(|entry| entry.lease.is_none() && entry.key != MARKER);
    let interrupted = listing.entries.iter().find(|entry| entry.key == MARKER);
    if there().next().is_some() && !replace && interrupted.is_none() {
        return Err(Error::Invalid {
            what: format!(
                "{} holds {} keys already; restoring would replace them. Nothing was changed; say that they are to be \
                 replaced if that is meant",
                store.location(),
                there().count()
            ),
        });
    }
    let begin = interrupted.map_or_else(|| Compare::absent(MARKER), |marker| marker.unchanged());
    let begun = store.txn(vec![begin], vec![Op::put(MARKER, summary.made.to_string())]).await?;
    if !begun.succeeded {
        return Err(Error::Invalid { what: "another restore into this state is under way".into() });
    }
    let guard = Compare::at(MARKER, begun.revision);
    let wanted: BTreeSet<&Bytes> = entries.iter().map(|(key, _)| key).collect();
    let gone: Vec<Op> =
        there().filter(|entry| !wanted.contains(&entry.key)).map(|entry| Op::delete(entry.key.clone())).collect();
    let puts = entries.iter().map(|(key, value)| Op::put(key.clone(), value.clone()));
    let mut batch = Batch { store, guard, ops: Vec::new(), bytes: 0 };
    for op in gone.into_iter().chain(puts) {
        batch.push(op).await?;
    }
    batch.push(Op::delete(MARKER)).await?;
    batch.flush().await?;
    Ok(summary)
}

/// Operations on their way into a store that a marker guards.
struct Batch<'a> {
    store: &'a dyn Store,
    guard: Compare,
    ops: Vec<Op>,
    bytes: usize,
}

impl Batch<'_> {
    async fn push(&mut self, op: Op) -> Result<()> {
        let bytes = op.key().len() + if let Op::Put { value, .. } = &op { value.len() } else { 0 };
        if self.ops.len() >= BATCH_LEN || self.bytes + bytes > BATCH_BYTES {
            self.flush().await?;
        }
        self.bytes += bytes;
        self.ops.push(op);
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        let outcome = self.store.txn(vec![self.guard.clone()], std::mem::take(&mut self.ops)).await?;
        if outcome.succeeded {
            return Ok(());
        }
        Err(Error::Invalid { what: "another restore into this state has taken over".into() })
    }
}
