//! Where the leases of one storage are, and access to them that cannot hang its caller.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use uuid::Uuid;

use super::{
    Error, Record,
    block::{BLOCK, Content, decode, encode, open, read_at, write_at},
};

/// The directory of the leases on storage that has directories.
const DIR: &str = ".virtward-lease";
/// Both blocks of one host.
const PAIR: usize = 2 * BLOCK;
/// Hosts in a device's region.
const HOSTS: u32 = 64;
/// No storage has more hosts; a directory with more files was not written by us.
const MOST_HOSTS: usize = 1024;

/// Storage on which an access hangs at this moment. A thread that the kernel does not give back holds its entry.
static HANGING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The leases of one storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A directory that all hosts see: a pool on NFS, CephFS, GFS2, or shared disks' files.
    Directory(PathBuf),
    /// A shared device set aside for leases (a logical volume of 1 MiB for every two VMs).
    Device {
        /// The device.
        path: PathBuf,
        /// The number of the VM's region, from the cluster's state; no two VMs share one.
        region: u32,
        /// The number of this host, below 64; no two hosts share one.
        host: u32,
    },
}

impl Place {
    /// The directory or device.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Device { path, .. } => path,
        }
    }

    pub(super) fn io(&self, source: io::Error) -> Error {
        Error::Io { place: self.path().to_owned(), source }
    }

    /// Runs `work` on a thread of its own, and leaves it behind when it does not end in time.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&Place) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let path = self.path().to_owned();
        let hangs = || Error::Hangs { place: path.clone(), limit };
        // One that hangs is enough: further ones would pile up threads that nothing can end.
        let deadline = tokio::time::Instant::now() + limit;
        while !lock().insert(path.clone()) {
            if tokio::time::Instant::now() >= deadline {
                return Err(hangs());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let place = self.clone();
        let started = std::thread::Builder::new().name("lease".into()).spawn(move || {
            let result = work(&place);
            lock().remove(place.path());
            let _ = sender.send(result);
        });
        if let Err(error) = started {
            lock().remove(&path);
            return Err(self.io(error));
        }
        match tokio::time::timeout_at(deadline, receiver).await {
            Ok(Ok(result)) => result,
            _ => Err(hangs()),
        }
    }

    /// The newest whole record of each host. An error if a host has written and none of its records is whole.
    pub(super) fn read_all(&self, vm: Uuid) -> Result<Vec<Record>, Error> {
        match self {
            Self::Directory(root) => {
                let names = match fs::read_dir(root.join(DIR).join(vm.to_string())) {
                    Ok(names) => names,
                    // Not the same as a storage that is not mounted: that one has no directory either.
                    Err(error) if error.kind() == io::ErrorKind::NotFound && root.is_dir() => return Ok(Vec::new()),
                    Err(error) => return Err(self.io(error)),
                };
                let mut records = Vec::new();
                for (count, entry) in names.enumerate() {
                    let path = entry.map_err(|error| self.io(error))?.path();
                    if count >= MOST_HOSTS {
                        return Err(self.damaged("there are far too many files".into()));
                    }
                    records.extend(self.pair(vm, &open(&path, false, false).map_err(|e| self.io(e))?, 0)?);
                }
                Ok(records)
            }
            Self::Device { path, region, .. } => {
                let file = open(path, false, false).map_err(|error| self.io(error))?;
                let all = read_at(&file, start(*region), PAIR * HOSTS as usize).map_err(|error| self.io(error))?;
                let pairs = all.chunks(PAIR).map(|pair| self.choose(vm, pair).map(|(record, _)| record));
                Ok(pairs.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
            }
        }
    }

    /// This host's own newest whole record.
    pub(super) fn read_own(&self, vm: Uuid, host: &str) -> Result<Option<Record>, Error> {
        match self.open_own(vm, host, false) {
            Ok((file, offset)) => self.pair(vm, &file, offset),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.io(error)),
        }
    }

    /// Writes this host's record over the older of its two.
    pub(super) fn write_own(&self, record: &Record) -> Result<(), Error> {
        let attempt = || -> io::Result<()> {
            let block = encode(record)?;
            let (file, offset) = self.open_own(record.vm, &record.host, true)?;
            let pair = read_at(&file, offset, PAIR)?;
            let older = self.choose(record.vm, &pair).map_or(0, |(_, older)| older);
            write_at(&file, offset + (older * BLOCK) as u64, &block)
        };
        attempt().map_err(|error| self.io(error))
    }

    /// Removes every record of the VM.
    pub(super) fn clear(&self, vm: Uuid) -> Result<(), Error> {
        let attempt = || -> io::Result<()> {
            match self {
                Self::Directory(root) => match fs::remove_dir_all(root.join(DIR).join(vm.to_string())) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound && root.is_dir() => Ok(()),
                    result => result,
                },
                Self::Device { path, region, .. } => {
                    let file = open(path, true, false)?;
                    let blocks = (PAIR / BLOCK) as u64 * u64::from(HOSTS);
                    (0..blocks).try_for_each(|n| write_at(&file, start(*region) + n * BLOCK as u64, &[0; BLOCK]))
                }
            }
        };
        attempt().map_err(|error| self.io(error))
    }

    /// The file that holds this host's two blocks, and where in it.
    fn open_own(&self, vm: Uuid, host: &str, write: bool) -> io::Result<(File, u64)> {
        match self {
            Self::Directory(root) => {
                let dir = root.join(DIR).join(vm.to_string());
                let path = dir.join(host);
                if write && !path.exists() {
                    // The root itself is never made: where it is missing, the storage is not mounted.
                    for (dir, parent) in [(&root.join(DIR), root), (&dir, &root.join(DIR))] {
                        match fs::create_dir(dir) {
                            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                            _ => File::open(parent)?.sync_all()?,
                        }
                    }
                    let file = open(&path, true, true)?;
                    file.set_len(PAIR as u64)?;
                    file.sync_all()?;
                    File::open(&dir)?.sync_all()?;
                    return Ok((file, 0));
                }
                Ok((open(&path, write, false)?, 0))
            }
            Self::Device { path, region, host, .. } => {
                if *host >= HOSTS {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!("a host's number is below {HOSTS}"),
                    ));
                }
                Ok((open(path, write, false)?, start(*region) + u64::from(*host) * PAIR as u64))
            }
        }
    }

    fn pair(&self, vm: Uuid, file: &File, offset: u64) -> Result<Option<Record>, Error> {
        let pair = read_at(file, offset, PAIR).map_err(|error| self.io(error))?;
        self.choose(vm, &pair).map(|(record, _)| record)
    }

    /// The newer record of a pair, and which block to write next. One damaged block beside a whole one is a write that
    /// was torn; two damaged ones, or one beside an empty one, say nothing that can be relied on.
    fn choose(&self, vm: Uuid, pair: &[u8]) -> Result<(Option<Record>, usize), Error> {
        let of_vm = |content: Content| match content {
            Content::Record(record) if record.vm != vm => Content::Damaged(format!("it is about VM {}", record.vm)),
            other => other,
        };
        match (of_vm(decode(&pair[..BLOCK])), of_vm(decode(&pair[BLOCK..]))) {
            (Content::Record(a), Content::Record(b)) => {
                Ok(if (a.generation, a.seq) >= (b.generation, b.seq) { (Some(a), 1) } else { (Some(b), 0) })
            }
            (Content::Record(a), _) => Ok((Some(a), 1)),
            (_, Content::Record(b)) => Ok((Some(b), 0)),
            (Content::Empty, Content::Empty) => Ok((None, 0)),
            // The very first write of a host was torn: it never held a lease. Its generation is not known, so a person
            // must say that it runs nowhere.
            (Content::Damaged(why), _) | (_, Content::Damaged(why)) => Err(self.damaged(why)),
        }
    }

    fn damaged(&self, why: String) -> Error {
        Error::Damaged { place: self.path().to_owned(), why }
    }
}

fn start(region: u32) -> u64 {
    u64::from(region) * PAIR as u64 * u64::from(HOSTS)
}

fn lock() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    HANGING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
