//! One block of the lease: bytes to record and back, and unbuffered access to it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use rustix::{fs::OFlags, io::Errno};
use sha2::{Digest, Sha256};

use super::Record;

/// The size of a block: what storage writes whole at best.
pub(super) const BLOCK: usize = 4096;
const MAGIC: &[u8; 8] = b"VWLEASE\n";
const VERSION: u32 = 1;
const HEADER: usize = 48;

/// What is in a block.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Never written.
    Empty,
    Record(Record),
    /// Written, and not whole or not of this kind.
    Damaged(String),
}

pub(super) fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(record)?;
    if body.len() > BLOCK - HEADER {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut block = Vec::with_capacity(BLOCK);
    block.extend_from_slice(MAGIC);
    block.extend_from_slice(&VERSION.to_le_bytes());
    block.extend_from_slice(&(body.len() as u32).to_le_bytes());
    block.extend_from_slice(&Sha256::digest(&body));
    block.extend_from_slice(&body);
    block.resize(BLOCK, 0);
    Ok(block)
}

pub(super) fn decode(block: &[u8]) -> Content {
    if block.iter().all(|byte| *byte == 0) {
        return Content::Empty;
    }
    let damaged = |why: &str| Content::Damaged(why.to_owned());
    if block.len() < BLOCK || block[..8] != *MAGIC {
        return damaged("it does not begin as one");
    }
    let number = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if number(8) != VERSION {
        return damaged("it was written by another version");
    }
    let length = number(12) as usize;
    let Some(body) = block[HEADER..].get(..length) else { return damaged("its length is wrong") };
    if Sha256::digest(body)[..] != block[16..HEADER] {
        return damaged("its checksum is wrong: a write was torn, or something else wrote there");
    }
    serde_json::from_slice(body).map_or_else(|error| damaged(&error.to_string()), Content::Record)
}

/// Opens for access past every cache. File systems without direct I/O (tmpfs, some FUSE) get synchronous writes; a file
/// that is opened anew each time is also seen anew over NFS.
pub(super) fn open(path: &Path, write: bool, create: bool) -> io::Result<File> {
    let attempt = |extra: OFlags| {
        let flags = (OFlags::DSYNC | OFlags::CLOEXEC | extra).bits() as i32;
        OpenOptions::new().read(true).write(write).create(create).mode(0o600).custom_flags(flags).open(path)
    };
    match attempt(OFlags::DIRECT) {
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => attempt(OFlags::empty()),
        result => result,
    }
}

/// A buffer whose first byte lies as direct I/O wants it.
struct Aligned {
    bytes: Vec<u8>,
    at: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let at = bytes.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { bytes, at, len }
    }

    fn slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.len]
    }
}

/// Reads `len` bytes, a multiple of the block, at a multiple of the block; what lies past the end is zero.
pub(super) fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = Aligned::new(len);
    let mut done = 0;
    while done < len {
        match file.read_at(&mut buffer.slice()[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // Direct I/O that ends within a block has met the end of the file.
        if done % BLOCK != 0 {
            break;
        }
    }
    Ok(buffer.slice().to_vec())
}

/// Writes one block in one call.
pub(super) fn write_at(file: &File, offset: u64, block: &[u8]) -> io::Result<()> {
    let mut buffer = Aligned::new(BLOCK);
    buffer.slice().copy_from_slice(block);
    match file.write_at(buffer.slice(), offset)? {
        BLOCK => file.sync_data(),
        short => Err(io::Error::other(format!("only {short} of {BLOCK} bytes were written"))),
    }
}
