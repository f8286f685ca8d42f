//! Large writes past the page cache.
//!
//! A backup or a restore writes each byte once and does not read it again soon: through the page cache it would push
//! out what the host's guests need, and pay for a copy. Where the file system or the range does not allow direct writes
//! (alignment, tmpfs), the same bytes go the ordinary way; nothing is lost but speed.
//!
//! Not here: reads, and durability; [`DirectFile::sync`] is as needed as ever.

use std::{
    cell::RefCell,
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
};

use rustix::fs::OFlags;

/// Sufficient for every device there is.
const ALIGN: usize = 4096;
/// Longest single write.
const PIECE: usize = 1 << 20;

thread_local! {
    /// Aligned staging: a part of this buffer begins at a multiple of [`ALIGN`].
    static STAGING: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A file for large writes at any offset, from any thread.
pub struct DirectFile {
    plain: File,
    direct: Option<File>,
}

impl DirectFile {
    /// Writes into `file`, directly where possible.
    pub fn new(file: File) -> Self {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = File::options().write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok();
        Self { plain: file, direct }
    }

    /// The file itself, for small writes and reads. Its ranges must not be written both ways at once.
    pub fn plain(&self) -> &File {
        &self.plain
    }

    /// Writes all bytes at an offset.
    pub fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let aligned = data.len() - data.len() % ALIGN;
        let Some(direct) = self.direct.as_ref().filter(|_| aligned > 0 && offset.is_multiple_of(ALIGN as u64)) else {
            return self.plain.write_all_at(data, offset);
        };
        let (whole, tail) = data.split_at(aligned);
        let mut at = offset;
        for piece in whole.chunks(PIECE) {
            // Refused, or cut short and then misaligned: the ordinary way works, or tells the real reason.
            if write_aligned(direct, piece, at).is_err() {
                self.plain.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
        self.plain.write_all_at(tail, at)
    }

    /// Makes everything durable.
    pub fn sync(&self) -> io::Result<()> {
        self.plain.sync_all()
    }
}

fn write_aligned(direct: &File, piece: &[u8], offset: u64) -> io::Result<()> {
    STAGING.with_borrow_mut(|staging| {
        staging.resize(PIECE + ALIGN, 0);
        let skip = staging.as_ptr().align_offset(ALIGN);
        let aligned = &mut staging[skip..skip + piece.len()];
        aligned.copy_from_slice(piece);
        direct.write_all_at(aligned, offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_arrives_whatever_its_alignment() {
        let pattern: Vec<u8> = (0..3 * PIECE + 777).map(|i| (i % 251) as u8 + 1).collect();
        for offset in [0u64, 1, 4096, 4095, 1 << 20] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("file");
            let file = DirectFile::new(File::options().read(true).write(true).create_new(true).open(&path).unwrap());
            file.write_all_at(&pattern, offset).unwrap();
            file.write_all_at(b"end", offset + pattern.len() as u64).unwrap();
            file.sync().unwrap();
            let back = std::fs::read(&path).unwrap();
            assert!(back[offset as usize..].strip_suffix(b"end") == Some(&pattern[..]), "offset {offset}");
        }
    }
}
