//! Image files at paths of the host, through whatever storage pool has their directory, or one that is opened for the
//! moment: that way it works on hosts that nobody can log in to, and libvirt gives the files the right owner.

use std::path::Path;
use std::time::Duration;

use virt_sys as v;
use virtward_model::{Pool, Volume};

use super::error::{Attempt, Fault};
use super::ffi::{Conn, StoragePool};
use crate::{ErrorKind, xml};

/// Pools opened for the moment are called this and more. One that a killed process left is used and closed by the next.
const OURS: &str = "virtward-dir-";
/// Two that open one directory at the same moment meet; the later one tries again.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// A pool, and whether it is to be closed after use.
struct Directory {
    pool: StoragePool,
    ours: bool,
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Another one of ours may have closed it already.
        if self.ours
            && let Err(e) = self.pool.destroy()
        {
            tracing::debug!(error = e.message, "a directory opened as a pool was not closed");
        }
    }
}

/// Every pool.
pub(super) fn pools(conn: &Conn) -> Attempt<Vec<Pool>> {
    let mut pools = Vec::new();
    for pool in conn.pools()? {
        // One that went away between the list and the look at it.
        let (Ok(xml), Ok(info)) = (pool.xml(), pool.info()) else { continue };
        let known = xml::pool(&xml)?;
        if !known.name.starts_with(OURS) {
            let (active, capacity_bytes, available_bytes) = (info.running, info.capacity, info.available);
            pools.push(Pool { active, capacity_bytes, available_bytes, ..known });
        }
    }
    pools.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pools)
}

/// The image at a path, if there is one.
pub(super) fn volume(conn: &Conn, path: &str) -> Attempt<Option<Volume>> {
    within(conn, path, |directory, name| {
        directory.pool.refresh()?;
        match directory.pool.volume(name) {
            Ok(volume) => Ok(Some(xml::volume(&volume.xml()?)?)),
            Err(e) if e.code as u32 == v::VIR_ERR_NO_STORAGE_VOL => Ok(None),
            Err(e) => Err(e.into()),
        }
    })
}

/// Free in a directory, in bytes.
pub(super) fn room(conn: &Conn, directory: &str) -> Attempt<u64> {
    // Any name will do: it is the directory that is looked at.
    within(conn, &format!("{}/x", directory.trim_end_matches('/')), |directory, _| {
        directory.pool.refresh()?;
        Ok(directory.pool.info()?.available)
    })
}

/// Makes an empty image.
pub(super) fn create(conn: &Conn, path: &str, format: &str, capacity_bytes: u64) -> Attempt<()> {
    within(conn, path, |directory, name| {
        directory.pool.refresh()?;
        directory.pool.volume_create(&xml::new_volume(name, format, capacity_bytes))?;
        Ok(())
    })
}

/// Removes an image; whether there was one.
pub(super) fn remove(conn: &Conn, path: &str) -> Attempt<bool> {
    within(conn, path, |directory, name| {
        directory.pool.refresh()?;
        match directory.pool.volume(name) {
            Ok(volume) => Ok(volume.delete().map(|()| true)?),
            Err(e) if e.code as u32 == v::VIR_ERR_NO_STORAGE_VOL => Ok(false),
            Err(e) => Err(e.into()),
        }
    })
}

/// Does something in the directory of a path.
fn within<T>(conn: &Conn, path: &str, body: impl Fn(&Directory, &str) -> Attempt<T>) -> Attempt<T> {
    let bad = || Fault::new(ErrorKind::Invalid, format!("{path} is no absolute path of a file"));
    let (directory, name) = Path::new(path).parent().zip(Path::new(path).file_name()).ok_or_else(bad)?;
    let (directory, name) = directory.to_str().zip(name.to_str()).filter(|_| path.starts_with('/')).ok_or_else(bad)?;
    let mut tries = 0;
    loop {
        match open(conn, directory).and_then(|directory| body(&directory, name)) {
            // Somebody else of us opened or closed it under our hands.
            Err(fault) if tries < TRIES && meets(&fault) => {
                tries += 1;
                std::thread::sleep(PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn meets(fault: &Fault) -> bool {
    let says = |part: &str| fault.message().contains(part);
    says(OURS) || says("conflict with pool") || fault.code() as u32 == v::VIR_ERR_NO_STORAGE_POOL
}

fn open(conn: &Conn, directory: &str) -> Attempt<Directory> {
    for pool in conn.pools()? {
        let known = pool.xml().ok().and_then(|xml| xml::pool(&xml).ok());
        let here = known.and_then(|k| k.path).is_some_and(|p| Path::new(&p) == Path::new(directory));
        if here && pool.info().is_ok_and(|info| info.running) {
            let ours = pool.name().starts_with(OURS);
            return Ok(Directory { pool, ours });
        }
    }
    // The same name for the same directory, so that two meet instead of libvirt finding them at odds.
    let name = format!("{OURS}{:016x}", fnv(directory.as_bytes()));
    let pool = conn.pool_create(&xml::open_directory(&name, directory))?;
    Ok(Directory { pool, ours: true })
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}
