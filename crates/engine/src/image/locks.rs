//! QEMU's locks on image files, for files that are read without QEMU.
//!
//! Whoever has an image open says with read locks on single bytes what it does (from [`DOES`] on) and what it does not
//! suffer from others (from [`FORBIDS`] on); a conflict is another's lock on the opposite byte (`docs/devel` and
//! `block/file-posix.c` of QEMU). The locks belong to the open file and end with it, however the process ends.

use std::{fs::File, io};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

/// First byte of "I do this".
const DOES: i64 = 100;
/// First byte of "nobody else may do this".
const FORBIDS: i64 = 200;
/// What can be done with an image, as offsets from both.
const READ_CONSISTENT: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Whether somebody writes to the image, or has it for itself.
pub(crate) fn has_writer(file: &File) -> io::Result<bool> {
    for byte in [DOES + WRITE, DOES + RESIZE, FORBIDS + READ_CONSISTENT] {
        if is_locked(file, byte)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Keeps writers away for as long as the file is open. False if there is one already. Where the file system knows no
/// locks there is nothing to keep anybody away with, which is QEMU's view too.
pub(crate) fn keep_writers_away(file: &File) -> io::Result<bool> {
    for byte in [DOES + READ_CONSISTENT, FORBIDS + WRITE, FORBIDS + RESIZE] {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
    // After locking, so that of two that come at once at least one sees the other.
    has_writer(file).map(|writer| !writer)
}

fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, byte);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}
