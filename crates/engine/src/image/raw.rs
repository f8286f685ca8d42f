//! A raw image, file or block device, read without QEMU.
//!
//! Reads are at offsets and so may run side by side. Holes are asked of the file system; where it does not know,
//! everything is data. A file that ends earlier than it did when it was opened is an error and never zeros.

use std::{
    fs::File,
    io::{self, Seek},
    ops::Range,
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
};

use rustix::{fs::SeekFrom, io::Errno};
use virtward_decide::readplan::Span;

use super::locks;
use crate::{Error, Result, tool};

/// Spans found in one go; a file in many pieces is described bit by bit.
const SPANS_MAX: usize = 4096;

/// An open raw image.
#[derive(Debug)]
pub(crate) struct RawImage {
    file: File,
    path: PathBuf,
    size_bytes: u64,
}

impl RawImage {
    /// Opens a file or block device.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let context = || format!("open {}", path.display());
        let file = File::open(path).map_err(Error::io(context()))?;
        let kind = file.metadata().map_err(Error::io(context()))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Refused(format!("{} is neither a file nor a block device", path.display())));
        }
        let size_bytes = (&file).seek(io::SeekFrom::End(0)).map_err(Error::io(context()))?;
        Ok(Self { file, path: path.to_owned(), size_bytes })
    }

    /// Opens an image and keeps every QEMU from writing to it until it is closed.
    pub(crate) fn open_locked(path: &Path) -> Result<Self> {
        let image = Self::open(path)?;
        match locks::keep_writers_away(&image.file) {
            Ok(true) => Ok(image),
            Ok(false) => Err(tool::in_use(path)),
            Err(error) => Err(Error::io(format!("lock {}", path.display()))(error)),
        }
    }

    /// Whether some process has the image open for writing in QEMU's way.
    pub(crate) fn has_writer(&self) -> Result<bool> {
        locks::has_writer(&self.file).map_err(Error::io(format!("look for locks on {}", self.path.display())))
    }

    /// Bytes of the image when it was opened.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What of a range may hold data: consecutive spans from its start, at least one unless it is empty. What is behind
    /// the end of the image is a hole.
    pub(crate) fn spans(&self, range: Range<u64>) -> Result<Vec<Span>> {
        let mut spans: Vec<Span> = Vec::new();
        let mut at = range.start;
        while at < range.end && spans.len() < SPANS_MAX {
            let data = self.next_data(at)?.map_or(range.end, |data| data.min(range.end));
            let hole = if data < range.end { self.next_hole(data).min(range.end) } else { data };
            for (from, to, set) in [(at, data, false), (data, hole, true)] {
                if to > from {
                    spans.push(Span { offset: from, length: to - from, set });
                }
            }
            at = hole;
        }
        Ok(spans)
    }

    /// Where data begins, from a place on; nothing if only a hole follows.
    fn next_data(&self, from: u64) -> Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(at) => Ok(Some(at.max(from))),
            // A hole up to the end, or a file that now ends before.
            Err(Errno::NXIO) => self.still_as_long().map(|()| None),
            // Devices and some file systems do not know. If more is wrong, reading says it better.
            Err(_) => Ok(Some(from).filter(|from| *from < self.size_bytes)),
        }
    }

    /// Where data that begins at a place ends.
    fn next_hole(&self, data: u64) -> u64 {
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(data)).unwrap_or(self.size_bytes);
        // Whatever a file system that is being written to answers, the search goes on.
        end.max(data + 1)
    }

    fn still_as_long(&self) -> Result<()> {
        let now =
            (&self.file).seek(io::SeekFrom::End(0)).map_err(Error::io(format!("read {}", self.path.display())))?;
        if now < self.size_bytes { Err(self.shrunk()) } else { Ok(()) }
    }

    /// Fills a buffer from a place in the image.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.shrunk(),
            _ => Error::io(format!("read {} bytes at byte {offset} of {}", buffer.len(), self.path.display()))(error),
        })
    }

    fn shrunk(&self) -> Error {
        Error::SourceGone(format!(
            "{} became shorter than {} bytes during the backup; nothing was published",
            self.path.display(),
            self.size_bytes
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(size: u64, data: &[(u64, u64)]) -> (tempfile::NamedTempFile, RawImage) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        for (at, length) in data {
            file.as_file().write_all_at(&vec![7; *length as usize], *at).unwrap();
        }
        let image = RawImage::open(file.path()).unwrap();
        (file, image)
    }

    /// Spans of a whole image, asked for bit by bit, as (begin, end) of what is set.
    fn set(image: &RawImage, end: u64, step: u64) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while at < end {
            for span in image.spans(at..end.min(at + step)).unwrap() {
                assert_eq!(span.offset, at, "spans follow each other");
                assert!(span.length > 0);
                at += span.length;
                match found.last_mut() {
                    Some(last) if span.set && last.1 == span.offset => last.1 = at,
                    _ if span.set => found.push((span.offset, at)),
                    _ => {}
                }
            }
        }
        assert_eq!(at, end);
        found
    }

    #[test]
    fn holes_are_found_wherever_they_are() {
        let (_file, image) = file(10 * MIB + 100, &[(2 * MIB, MIB), (5 * MIB, 2 * MIB)]);
        for step in [u64::MAX / 2, MIB + 4096] {
            assert_eq!(set(&image, 10 * MIB + 100, step), [(2 * MIB, 3 * MIB), (5 * MIB, 7 * MIB)]);
        }
        // Data up to an odd end, and what is asked for behind it.
        let (_file, image) = file(MIB + 100, &[(MIB, 100)]);
        assert_eq!(set(&image, MIB + 512, MIB * 9), [(MIB, MIB + 100)]);
        let (_file, image) = file(3 * MIB, &[]);
        assert_eq!(set(&image, 3 * MIB, MIB), []);
        assert!(image.spans(0..0).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_shrinks_is_no_hole() {
        let (file, image) = file(4 * MIB, &[(0, 4 * MIB)]);
        file.as_file().set_len(2 * MIB).unwrap();
        let mut buffer = vec![0; 4096];
        image.read(MIB, &mut buffer).unwrap();
        for error in [image.spans(3 * MIB..4 * MIB).unwrap_err(), image.read(2 * MIB - 10, &mut buffer).unwrap_err()] {
            assert!(matches!(error, Error::SourceGone(_)) && error.to_string().contains("shorter"), "{error}");
        }
    }

    #[test]
    fn one_reader_does_not_keep_another_out_and_a_writer_does() {
        let (file, image) = file(MIB, &[]);
        assert!(!image.has_writer().unwrap());
        let one = RawImage::open_locked(file.path()).unwrap();
        let two = RawImage::open_locked(file.path()).unwrap();
        assert!(!one.has_writer().unwrap() && !two.has_writer().unwrap() && !image.has_writer().unwrap());
    }
}
