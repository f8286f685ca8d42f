//! The file: an SQLite database that one process holds, written through with every transaction.
//!
//! Rollback journal, not WAL: a damaged tail of a WAL reads as its end, so that acknowledged transactions would vanish
//! without a word, and a daemon that forgets generations is worse than one that does not start. The exclusive locking
//! mode keeps other programs out and lets SQLite end a transaction by wiping the journal's header instead of unlinking
//! it; both it and the file are synced before a commit returns.
//!
//! SQLite checks its structure, not its contents. So a digest over all rows (the exclusive-or of a hash of each, hence
//! cheap to carry on) and the counters is stored with every transaction and compared when the file is opened.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Read},
    path::Path,
};

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};

use crate::{
    core::{Core, History},
    error::{Error, Result},
    store::{LeaseId, Revision, Versioned},
    watch::{Change, Changes},
};

/// Format that this version writes, and the newest that it reads.
pub(super) const FORMAT: i64 = 1;
/// Marks the file as what it is: "VWst".
const APPLICATION_ID: i32 = 0x5657_7374;

const SCHEMA: &str = "
    CREATE TABLE state (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        revision INTEGER NOT NULL, compacted INTEGER NOT NULL, digest BLOB NOT NULL, writer TEXT NOT NULL
    ) STRICT;
    CREATE TABLE entries (
        key BLOB PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease INTEGER
    ) STRICT, WITHOUT ROWID;
    -- What each transaction changed, for watches. A deletion has no value.
    CREATE TABLE log (
        revision INTEGER NOT NULL, key BLOB NOT NULL, value BLOB, lease INTEGER, PRIMARY KEY (revision, key)
    ) STRICT, WITHOUT ROWID;
";

/// An open file, and the digest of its rows.
pub(super) struct File {
    connection: Connection,
    rows: Digest,
}

/// Why a commit failed.
pub(super) enum CommitError {
    /// It did not happen, and the file goes on working.
    Refused(String),
    /// Nobody knows. The file has to be read again before it is used.
    Unknown(String),
}

impl File {
    /// Makes an empty file's contents.
    pub(super) fn init(path: &Path, history: History) -> Result<()> {
        let fail = |error: rusqlite::Error| failure(path, &error);
        let connection = connect(path)?;
        connection.execute_batch(SCHEMA).map_err(fail)?;
        connection.pragma_update(None, "application_id", APPLICATION_ID).map_err(fail)?;
        connection.pragma_update(None, "user_version", FORMAT).map_err(fail)?;
        let core = Core::new(history);
        let rows = Digest::default();
        let insert = "INSERT INTO state (id, revision, compacted, digest, writer) VALUES (1, ?1, ?2, ?3, ?4)";
        let (revision, compacted) = (core.revision(), core.compacted());
        let digest = rows.seal(revision, compacted);
        connection
            .execute(insert, params![revision.0, compacted.0, digest, env!("CARGO_PKG_VERSION")])
            .map_err(fail)?;
        connection.close().map_err(|(_, error)| fail(error))
    }

    /// Opens a file, checks all of it, and reads all of it.
    pub(super) fn open(path: &Path, history: History) -> Result<(Self, Core)> {
        check_header(path)?;
        let connection = connect(path)?;
        check_format(path, &connection)?;
        let verdict: String = connection
            .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
            .map_err(|error| failure(path, &error))?;
        if verdict != "ok" {
            return Err(corrupt(path, verdict));
        }
        let fail = |error: rusqlite::Error| failure(path, &error);
        let (revision, compacted, stored) = connection
            .query_row("SELECT revision, compacted, digest FROM state", [], |row| {
                Ok((revision(row, 0)?, revision(row, 1)?, row.get::<_, Vec<u8>>(2)?))
            })
            .optional()
            .map_err(fail)?
            .ok_or_else(|| corrupt(path, "its counters are gone"))?;
        let entries = read_entries(&connection).map_err(fail)?;
        let log = read_log(&connection).map_err(fail)?;
        let mut rows = Digest::default();
        entries.iter().for_each(|entry| rows.toggle_entry(entry));
        log.iter().for_each(|changes| rows.toggle_log(changes));
        if rows.seal(revision, compacted) != stored.as_slice() {
            return Err(corrupt(path, "its contents do not match their checksum"));
        }
        let core = Core::restored(history, revision, compacted, entries, log);
        Ok((Self { connection, rows }, core))
    }

    /// Version of the program that wrote to the file last.
    pub(super) fn writer(&self) -> rusqlite::Result<String> {
        self.connection.query_row("SELECT writer FROM state", [], |row| row.get(0))
    }

    /// Notes that this version writes to the file now.
    pub(super) fn sign(&self) -> rusqlite::Result<()> {
        self.connection.execute("UPDATE state SET writer = ?1", [env!("CARGO_PKG_VERSION")]).map(|_| ())
    }

    /// Makes a transaction durable. `core` is the state before it.
    pub(super) fn commit(&mut self, core: &Core, commit: &Changes) -> Result<(), CommitError> {
        let doomed: Vec<&Changes> = core.doomed_by(commit).collect();
        let compacted = doomed.last().map_or(core.compacted(), |last| last.revision);
        let mut rows = self.rows;
        for change in &commit.changes {
            if let Some(old) = core.get(change.key()) {
                rows.toggle_entry(old);
            }
            if let Change::Put(entry) = change {
                rows.toggle_entry(entry);
            }
        }
        rows.toggle_log(commit);
        doomed.iter().for_each(|old| rows.toggle_log(old));
        let digest = rows.seal(commit.revision, compacted);
        match self.write(commit, compacted, &digest) {
            Ok(()) => {
                self.rows = rows;
                Ok(())
            }
            Err(error) => Err(self.settle(&error)),
        }
    }

    fn write(&mut self, commit: &Changes, compacted: Revision, digest: &[u8; 32]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        {
            let mut put = transaction.prepare_cached(
                "INSERT INTO entries (key, value, revision, lease) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (key) DO UPDATE SET value = ?2, revision = ?3, lease = ?4",
            )?;
            let mut delete = transaction.prepare_cached("DELETE FROM entries WHERE key = ?1")?;
            let mut log =
                transaction.prepare_cached("INSERT INTO log (revision, key, value, lease) VALUES (?1, ?2, ?3, ?4)")?;
            for change in &commit.changes {
                let key = change.key().as_ref();
                match change {
                    Change::Put(entry) => {
                        let (value, lease) = (entry.value.as_ref(), entry.lease.map(|lease| lease.0));
                        put.execute(params![key, value, entry.revision.0, lease])?;
                        log.execute(params![commit.revision.0, key, value, lease])?;
                    }
                    Change::Delete { .. } => {
                        delete.execute([key])?;
                        log.execute(params![commit.revision.0, key, None::<&[u8]>, None::<i64>])?;
                    }
                }
            }
            transaction.prepare_cached("DELETE FROM log WHERE revision <= ?1")?.execute([compacted.0])?;
            transaction
                .prepare_cached("UPDATE state SET revision = ?1, compacted = ?2, digest = ?3")?
                .execute(params![commit.revision.0, compacted.0, digest])?;
        }
        transaction.commit()
    }

    /// What an error means for the transaction. A disk that is full fails while pages are written, before the journal
    /// is wiped; with the transaction rolled back it has not happened.
    fn settle(&mut self, error: &rusqlite::Error) -> CommitError {
        let full = error.sqlite_error_code() == Some(ErrorCode::DiskFull);
        let rolled_back = self.connection.is_autocommit() || self.connection.execute_batch("ROLLBACK").is_ok();
        if full && rolled_back {
            CommitError::Refused(error.to_string())
        } else {
            CommitError::Unknown(error.to_string())
        }
    }

    /// Writes a compact copy to an empty file.
    pub(super) fn copy_to(&self, path: &Path) -> rusqlite::Result<()> {
        self.connection.execute("VACUUM INTO ?1", [path.to_string_lossy()]).map(|_| ())
    }

    /// Jumps ahead in history and forgets it.
    pub(super) fn jump(&mut self, core: &Core, to: Revision) -> rusqlite::Result<()> {
        let mut rows = Digest::default();
        core.entries().for_each(|entry| rows.toggle_entry(entry));
        let transaction = self.connection.transaction()?;
        transaction.execute("DELETE FROM log", [])?;
        transaction
            .execute("UPDATE state SET revision = ?1, compacted = ?1, digest = ?2", params![to.0, rows.seal(to, to)])?;
        transaction.commit()?;
        self.rows = rows;
        Ok(())
    }

    pub(super) fn close(self) -> Result<(), String> {
        self.connection.close().map_err(|(_, error)| error.to_string())
    }
}

fn connect(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let fail = |error: rusqlite::Error| failure(path, &error);
    let connection = Connection::open_with_flags(path, flags).map_err(fail)?;
    connection
        .execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = DELETE; PRAGMA synchronous = EXTRA;
             PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;
             PRAGMA mmap_size = 0; BEGIN EXCLUSIVE; COMMIT;",
        )
        .map_err(fail)?;
    Ok(connection)
}

/// Whether this is such a file at all. SQLite takes an empty file for a new one and others for whatever they say, and
/// writes to them before it looks closer.
fn check_header(path: &Path) -> Result<()> {
    let mut header = [0; 100];
    let mut file = fs::File::open(path).map_err(Error::io("open", path))?;
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(corrupt(path, "it is cut short")),
        read => read.map_err(Error::io("read", path))?,
    }
    // https://www.sqlite.org/fileformat.html: the magic, the versions of a rollback journal, the application's id.
    let ours = header.starts_with(b"SQLite format 3\0")
        && header[18..20] == [1, 1]
        && header[68..72] == APPLICATION_ID.to_be_bytes();
    if ours { Ok(()) } else { Err(corrupt(path, "it does not begin as a state file of a cluster does")) }
}

fn check_format(path: &Path, connection: &Connection) -> Result<()> {
    let found = connection
        .pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
        .map_err(|error| failure(path, &error))?;
    match found {
        FORMAT => Ok(()),
        found if found > FORMAT => Err(Error::NewerFormat { path: path.into(), found, supported: FORMAT }),
        found => Err(corrupt(path, format!("it has format {found}, which never was"))),
    }
}

fn revision(row: &rusqlite::Row<'_>, index: usize) -> rusqlite::Result<Revision> {
    row.get::<_, u64>(index).map(Revision)
}

fn lease(row: &rusqlite::Row<'_>, index: usize) -> rusqlite::Result<Option<LeaseId>> {
    Ok(row.get::<_, Option<i64>>(index)?.map(LeaseId))
}

fn bytes(row: &rusqlite::Row<'_>, index: usize) -> rusqlite::Result<Bytes> {
    row.get::<_, Vec<u8>>(index).map(Bytes::from)
}

fn read_entries(connection: &Connection) -> rusqlite::Result<Vec<Versioned>> {
    let mut statement = connection.prepare("SELECT key, value, revision, lease FROM entries ORDER BY key")?;
    let rows = statement.query_map([], |row| {
        Ok(Versioned { key: bytes(row, 0)?, value: bytes(row, 1)?, revision: revision(row, 2)?, lease: lease(row, 3)? })
    })?;
    rows.collect()
}

fn read_log(connection: &Connection) -> rusqlite::Result<VecDeque<Changes>> {
    let mut statement = connection.prepare("SELECT revision, key, value, lease FROM log ORDER BY revision, key")?;
    let mut rows = statement.query([])?;
    let mut log: VecDeque<Changes> = VecDeque::new();
    while let Some(row) = rows.next()? {
        let (revision, key) = (revision(row, 0)?, bytes(row, 1)?);
        let change = match row.get::<_, Option<Vec<u8>>>(2)? {
            Some(value) => Change::Put(Versioned { key, value: value.into(), revision, lease: lease(row, 3)? }),
            None => Change::Delete { key },
        };
        match log.back_mut() {
            Some(last) if last.revision == revision => last.changes.push(change),
            _ => log.push_back(Changes { revision, changes: vec![change] }),
        }
    }
    Ok(log)
}

/// What an error of SQLite means while a file is opened. It is not the file's fault if the disk fails or the file
/// cannot be opened; everything else that goes wrong with fixed statements is.
fn failure(path: &Path, error: &rusqlite::Error) -> Error {
    let location = path.display().to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Error::InUse { path: path.into(), holder: "another program (an SQLite tool?)".into() }
        }
        Some(ErrorCode::DiskFull) => Error::Full { location, what: error.to_string() },
        Some(
            ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::OutOfMemory,
        ) => Error::unavailable(&location, error.to_string()),
        _ => corrupt(path, error.to_string()),
    }
}

/// Without a remedy yet; whoever knows the backups fills it in.
pub(super) fn corrupt(path: &Path, what: impl Into<String>) -> Error {
    Error::Corrupt { path: path.into(), what: what.into(), remedy: String::new() }
}

/// The exclusive-or of the hashes of all rows. Putting a row in and taking it out are the same operation.
#[derive(Clone, Copy, Default)]
struct Digest([u8; 32]);

impl Digest {
    fn toggle(&mut self, hasher: &blake3::Hasher) {
        for (byte, other) in self.0.iter_mut().zip(hasher.finalize().as_bytes()) {
            *byte ^= other;
        }
    }

    fn toggle_entry(&mut self, entry: &Versioned) {
        let mut hasher = blake3::Hasher::new_derive_key("virtward state 1 entry");
        hash_entry(&mut hasher, entry);
        self.toggle(&hasher);
    }

    fn toggle_log(&mut self, changes: &Changes) {
        let mut hasher = blake3::Hasher::new_derive_key("virtward state 1 log");
        hasher.update(&changes.revision.0.to_le_bytes());
        for change in &changes.changes {
            match change {
                Change::Put(entry) => {
                    hasher.update(b"+");
                    hash_entry(&mut hasher, entry);
                }
                Change::Delete { key } => {
                    hasher.update(b"-");
                    hash_bytes(&mut hasher, key);
                }
            }
        }
        self.toggle(&hasher);
    }

    /// With the counters: what is stored.
    fn seal(&self, revision: Revision, compacted: Revision) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("virtward state 1 seal");
        hasher.update(&self.0);
        hasher.update(&revision.0.to_le_bytes());
        hasher.update(&compacted.0.to_le_bytes());
        *hasher.finalize().as_bytes()
    }
}

fn hash_entry(hasher: &mut blake3::Hasher, entry: &Versioned) {
    hash_bytes(hasher, &entry.key);
    hash_bytes(hasher, &entry.value);
    hasher.update(&entry.revision.0.to_le_bytes());
    // Zero is no lease's name.
    hasher.update(&entry.lease.map_or(0, |lease| lease.0).to_le_bytes());
}

fn hash_bytes(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
