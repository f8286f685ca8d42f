//! A directory, local or on NFS.
//!
//! An object is written to `tmp/`, synced, then moved to its name without replacing (`renameat2`, or `link` where the
//! file system lacks it), then its directory is synced. A writer holds a lock on its temporary file for as long as it
//! lives, so files of dead writers are told from those of live ones without any clock but the file server's own.
//!
//! Packs leave a small share of the file system free. Whoever deletes restore points or collects garbage has to write a
//! little before anything is freed, and could not do so where backups had taken the last block.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read},
    ops::RangeInclusive,
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use rustix::{
    fs::{
        AtFlags, CWD, FlockOperation, RenameFlags, StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, flock,
        fstatvfs, renameat_with, statvfs, utimensat,
    },
    io::Errno,
};

use super::{Listed, ObjectWriter, Put, Store, check_name};
use crate::{
    direct::DirectFile,
    disorder::{self, Disorder},
    error::{Error, Result},
    format::{ObjectId, names},
};

const TMP: &str = "tmp";
/// A lock is taken right after a temporary file is made; younger files may still be in between.
const TMP_AGE_MIN: Duration = Duration::from_secs(60);
/// Where locks do not work, only files this old count as abandoned.
const TMP_AGE_UNLOCKABLE: Duration = Duration::from_secs(7 * 86_400);

/// Part of the file system that packs leave free: one of this many.
const RESERVE_SHARE: u64 = 100;
/// As much as a collection of a small repository writes, and as much as anybody would give up.
const RESERVE_BYTES: RangeInclusive<u64> = 1 << 20..=256 << 20;

/// A store in a directory, which is created by the first write.
#[derive(Clone, Debug)]
pub struct FsStore {
    root: PathBuf,
}

impl FsStore {
    /// Over a directory; nothing is touched yet.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        Ok(self.root.join(name))
    }

    fn open_object(&self, name: &str) -> Result<File> {
        File::open(self.path(name)?).map_err(|e| self.fail("read", name, e))
    }

    /// Missing objects keep their name; other failures show the path, which is what the operator can act on.
    fn fail(&self, action: &'static str, name: &str, e: io::Error) -> Error {
        if e.kind() == io::ErrorKind::NotFound {
            return Error::Missing { object: name.into() };
        }
        Error::io(action, self.root.join(name).display().to_string(), e)
    }

    fn create_file(&self, name: &str) -> Result<FsWriter> {
        let target = self.path(name)?;
        let fail = |e| Error::io("create", target.display().to_string(), e);
        make_dirs(&self.root.join(TMP)).map_err(fail)?;
        let tmp = self.root.join(TMP).join(format!("{}.{}", std::process::id(), ObjectId::random()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp).map_err(fail)?;
        // Best effort: without a lock the file only counts as abandoned much later.
        let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
        let is_pack = names::parse_pack(name).is_some();
        Ok(FsWriter { file: DirectFile::new(file), pending: Vec::new(), written: 0, tmp: Some(tmp), target, is_pack })
    }
}

/// Bytes that packs may still take.
fn room_of(stat: &StatVfs) -> Option<u64> {
    // Some network file systems do not say.
    let total = stat.f_blocks.checked_mul(stat.f_frsize).filter(|total| *total > 0)?;
    let reserve = (total / RESERVE_SHARE).clamp(*RESERVE_BYTES.start(), *RESERVE_BYTES.end());
    Some(stat.f_bavail.saturating_mul(stat.f_frsize).saturating_sub(reserve))
}

/// Creates missing directories and syncs the parent of each new one.
fn make_dirs(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_dirs(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => sync_dir(parent.unwrap_or(Path::new("."))),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        // Some network file systems cannot sync a directory; their servers order metadata themselves.
        Err(e) if matches!(e.raw_os_error(), Some(22 | 95)) => Ok(()),
        Err(e) => Err(e),
        Ok(()) => Ok(()),
    }
}

/// Moves a file to a name that must be free.
fn publish(tmp: &Path, target: &Path) -> io::Result<Put> {
    match renameat_with(CWD, tmp, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(Put::Created),
        Err(Errno::EXIST) => return Ok(Put::Exists),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(e) => return Err(e.into()),
    }
    let outcome = match fs::hard_link(tmp, target) {
        Ok(()) => Put::Created,
        // Over NFS the answer to a successful link can be lost and its repetition fails: the link count tells.
        Err(e) => match fs::metadata(tmp) {
            Ok(meta) if meta.nlink() == 2 => Put::Created,
            _ if e.kind() == io::ErrorKind::AlreadyExists => Put::Exists,
            _ => return Err(e),
        },
    };
    fs::remove_file(tmp)?;
    Ok(outcome)
}

/// Bytes of a large object that go out in one write.
const WRITE_BYTES: usize = 2 << 20;

struct FsWriter {
    file: DirectFile,
    /// Accepted and not yet written: always the end of the object.
    pending: Vec<u8>,
    written: u64,
    tmp: Option<PathBuf>,
    target: PathBuf,
    is_pack: bool,
}

impl FsWriter {
    /// Fails if a pack would take what is kept free.
    fn check_room(&self, bytes: usize) -> io::Result<()> {
        if !self.is_pack || bytes == 0 {
            return Ok(());
        }
        match fstatvfs(self.file.plain()).ok().as_ref().and_then(room_of) {
            Some(room) if room < bytes as u64 => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }

    fn finish_io(&mut self) -> io::Result<Put> {
        self.check_room(self.pending.len())?;
        self.file.write_all_at(&self.pending, self.written)?;
        self.pending.clear();
        if !disorder::is(Disorder::NameBeforeBytes) {
            self.file.sync()?;
        }
        let dir = self.target.parent().expect("an object is inside the root");
        make_dirs(dir)?;
        let tmp = self.tmp.as_deref().expect("finished once");
        let put = publish(tmp, &self.target)?;
        if put == Put::Created {
            self.tmp = None;
        }
        if !disorder::is(Disorder::AnswerBeforeName) {
            sync_dir(dir)?;
        }
        Ok(put)
    }
}

impl ObjectWriter for FsWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(bytes);
        let whole = self.pending.len() - self.pending.len() % WRITE_BYTES;
        if whole == 0 {
            return Ok(());
        }
        let done = self.check_room(whole).and_then(|()| self.file.write_all_at(&self.pending[..whole], self.written));
        done.map_err(|e| Error::io("write", self.target.display().to_string(), e))?;
        self.written += whole as u64;
        self.pending.drain(..whole);
        Ok(())
    }
    fn finish(mut self: Box<Self>) -> Result<Put> {
        self.finish_io().map_err(|e| Error::io("write", self.target.display().to_string(), e))
    }
}

impl Drop for FsWriter {
    fn drop(&mut self) {
        if let Some(tmp) = &self.tmp {
            let _ = fs::remove_file(tmp);
        }
    }
}

impl Store for FsStore {
    fn location(&self) -> String {
        self.root.display().to_string()
    }

    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.open_object(name)?.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::damaged(name, "it ends too early"),
            _ => self.fail("read", name, e),
        })
    }

    fn size(&self, name: &str) -> Result<u64> {
        let meta = fs::metadata(self.path(name)?).map_err(|e| self.fail("read", name, e))?;
        if meta.is_file() { Ok(meta.len()) } else { Err(Error::Missing { object: name.into() }) }
    }

    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        let file = self.open_object(name)?;
        let fail = |e| self.fail("read", name, e);
        let size = file.metadata().map_err(fail)?.len();
        if size > max {
            return Err(Error::damaged(name, format!("it has {size} bytes where at most {max} make sense")));
        }
        let mut bytes = Vec::with_capacity(size as usize + 1);
        file.take(max).read_to_end(&mut bytes).map_err(fail)?;
        Ok(bytes)
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        let mut writer = Box::new(self.create_file(name)?);
        writer.write(bytes)?;
        writer.finish()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(self.create_file(name)?))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let dir = prefix.trim_end_matches('/');
        list_dir(&self.root.join(dir), dir, each)
    }

    fn now(&self) -> Result<Timestamp> {
        let tmp = self.root.join(TMP);
        let fail = |e| Error::io("tell the time in", tmp.display().to_string(), e);
        make_dirs(&tmp).map_err(fail)?;
        server_now(&tmp).and_then(timestamp).map_err(fail)
    }

    fn free_bytes(&self) -> Option<u64> {
        statvfs(&self.root).ok().as_ref().and_then(room_of)
    }

    fn delete(&self, name: &str) -> Result<bool> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(self.fail("delete", name, e)),
        }
        let dir = path.parent().expect("an object is inside the root");
        sync_dir(dir).map_err(|e| self.fail("delete", name, e))?;
        Ok(true)
    }

    fn clean(&self) {
        if let Err(e) = clean_tmp(&self.root.join(TMP)) {
            tracing::debug!(error = %e, "cannot look for abandoned temporary files");
        }
    }
}

fn timestamp(time: SystemTime) -> io::Result<Timestamp> {
    Timestamp::try_from(time).map_err(io::Error::other)
}

fn list_dir(dir: &Path, name: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
    let fail = |e| Error::io("list", dir.display().to_string(), e);
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail(e)),
    };
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let Ok(leaf) = entry.file_name().into_string() else { continue };
        let child = if name.is_empty() { leaf } else { format!("{name}/{leaf}") };
        if check_name(&child).is_err() || child == TMP {
            continue; // Not ours: lost+found, .nfs files, whatever people leave there.
        }
        let kind = entry.file_type().map_err(fail)?;
        if kind.is_dir() {
            list_dir(&entry.path(), &child, each)?;
        } else if kind.is_file() {
            match entry.metadata() {
                Ok(meta) => {
                    let modified = meta.modified().and_then(timestamp).map_err(fail)?;
                    each(Listed { name: child, bytes: meta.len(), modified })?;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {} // Deleted since.
                Err(e) => return Err(fail(e)),
            }
        }
    }
    Ok(())
}

/// Removes temporary files whose writer is dead: old enough by the file server's own clock, and not locked.
fn clean_tmp(tmp: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(tmp) else { return Ok(()) };
    let mut now = None;
    for entry in entries {
        let path = entry?.path();
        let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
        let now = match now {
            Some(now) => now,
            None => *now.insert(server_now(tmp)?),
        };
        let age = now.duration_since(file.metadata()?.modified()?).unwrap_or_default();
        let dead = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => age >= TMP_AGE_MIN,
            Err(Errno::WOULDBLOCK) => false,
            Err(_) => age >= TMP_AGE_UNLOCKABLE,
        };
        if dead {
            tracing::info!(file = %path.display(), "removing what a dead writer left");
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

/// The time by the clock that stamps the files.
fn server_now(tmp: &Path) -> io::Result<SystemTime> {
    let probe = tmp.join(format!("probe.{}", ObjectId::random()));
    let file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&probe) {
        Ok(file) => file,
        // What is there already can be stamped without any space.
        Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            let (now, as_it_is) = (UTIME_NOW, UTIME_OMIT);
            let stamp = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
            let times = Timestamps { last_access: stamp(as_it_is), last_modification: stamp(now) };
            utimensat(CWD, tmp, &times, AtFlags::empty())?;
            return fs::metadata(tmp)?.modified();
        }
        Err(e) => return Err(e),
    };
    let now = file.metadata().and_then(|meta| meta.modified());
    fs::remove_file(&probe)?;
    now
}
