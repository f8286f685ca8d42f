//! Secrets on a node's disk: for their owner alone.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use zeroize::Zeroizing;

use super::{Error, Result};
use crate::Error as StoreError;

/// Largest file that is read as a secret.
const BYTES_MAX: u64 = 1 << 20;

/// Writes a file with mode 0600, replacing what was there: whole or not at all, and durable.
pub fn write_secret(path: &Path, contents: &[u8]) -> Result<()> {
    let staged = path.with_extension("new");
    let _ = fs::remove_file(&staged);
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()
    });
    written.map_err(StoreError::io("write", &staged))?;
    fs::rename(&staged, path).map_err(StoreError::io("rename", &staged))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(StoreError::io("sync", dir))?;
    Ok(())
}

/// Reads such a file, and refuses one that others can read.
pub fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let data = fs::metadata(path).map_err(StoreError::io("examine", path))?;
    let mode = data.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(Error::Exposed { path: path.display().to_string(), mode });
    }
    if data.len() > BYTES_MAX {
        return Err(super::certificate(format!("{} is too large for a key", path.display())));
    }
    Ok(Zeroizing::new(fs::read(path).map_err(StoreError::io("read", path))?))
}
