//! Chunk to record and back: probe, compress, and the reverse with the length known beforehand.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use super::Encoding;
use crate::format::{CHUNK_BYTES_MAX, Malformed};

/// How new chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Not at all.
    Off,
    /// LZ4: less CPU, larger.
    Lz4,
    /// Zstandard at a level.
    Zstd(i32),
}

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(1)
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    /// `off`, `lz4`, `zstd` or `zstd:LEVEL` with a level from 1 to 19.
    fn from_str(text: &str) -> Result<Self, String> {
        let level = |text: &str| text.parse().ok().filter(|level| (1..=19).contains(level));
        match (text, text.strip_prefix("zstd:")) {
            ("off", _) => Some(Self::Off),
            ("lz4", _) => Some(Self::Lz4),
            ("zstd", _) => Some(Self::Zstd(1)),
            (_, number) => number.and_then(level).map(Self::Zstd),
        }
        .ok_or_else(|| {
            format!("{text:?} is no compression; use off, lz4, zstd or zstd:LEVEL with a level from 1 to 19")
        })
    }
}

thread_local! {
    static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// A compressor of one thread.
pub struct Compressor {
    mode: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

/// A chunk is kept plain unless compression saves at least one part in this many.
const WORTH_PARTS: usize = 32;

impl Compressor {
    /// For a mode; levels out of range are clamped.
    pub fn new(mode: Compression) -> Self {
        let zstd = match mode {
            Compression::Zstd(level) => zstd::bulk::Compressor::new(level.clamp(-7, 19)).ok(),
            _ => None,
        };
        Self { mode, zstd: zstd.map(|zstd| tune(mode, zstd)) }
    }

    /// Compresses into `out` (cleared first); if the result is not worth it, `out` is the plain chunk.
    pub fn compress(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> Encoding {
        out.clear();
        let limit = chunk.len() - chunk.len() / WORTH_PARTS;
        let done = match (self.mode, &mut self.zstd) {
            (Compression::Zstd(_), Some(zstd)) => {
                // Room for the worst case and for the tag, so that neither this nor sealing moves the buffer.
                out.reserve(zstd::zstd_safe::compress_bound(chunk.len()) + 64);
                zstd.compress_to_buffer(chunk, out).ok().map(|_| Encoding::Zstd)
            }
            (Compression::Lz4, _) => {
                out.resize(lz4_flex::block::get_maximum_output_size(chunk.len()), 0);
                lz4_flex::block::compress_into(chunk, out).ok().map(|len| {
                    out.truncate(len);
                    Encoding::Lz4
                })
            }
            _ => None,
        };
        match done {
            Some(encoding) if out.len() < limit => encoding,
            _ => {
                out.clear();
                out.extend_from_slice(chunk);
                Encoding::Plain
            }
        }
    }
}

/// Level 1 of Zstandard with matches from 6 bytes instead of 7, in its table of 64 KiB: for chunks of disks 3 % smaller, for
/// 4 % of its CPU. Matches from 5 bytes are 1.4 % smaller for another 4 % of CPU. A table of 128 KiB fits the nearest
/// caches less well: slower by 3 to 9 %, for 1.3 % of the size.
fn tune(mode: Compression, mut zstd: zstd::bulk::Compressor<'static>) -> zstd::bulk::Compressor<'static> {
    use zstd::zstd_safe::CParameter;
    if mode == Compression::Zstd(1) {
        for parameter in [CParameter::HashLog(14), CParameter::MinMatch(6)] {
            // Refused only by another version of the library, which then compresses as it does by itself.
            let _ = zstd.set_parameter(parameter);
        }
    }
    zstd
}

/// Decodes into `out`, which is exactly `plain` long afterwards.
pub fn decompress(encoding: Encoding, stored: &[u8], plain: u32, out: &mut Vec<u8>) -> Result<(), Malformed> {
    const BAD: Malformed = Malformed("a chunk does not decompress");
    let plain = plain.min(CHUNK_BYTES_MAX) as usize;
    match encoding {
        Encoding::Plain => {
            out.clear();
            out.extend_from_slice(stored);
        }
        Encoding::Lz4 => {
            out.resize(plain, 0);
            let len = lz4_flex::block::decompress_into(stored, out).map_err(|_| BAD)?;
            out.truncate(len);
        }
        Encoding::Zstd => {
            out.clear();
            out.reserve(plain);
            DECODER.with_borrow_mut(|decoder| -> Result<(), Malformed> {
                if decoder.is_none() {
                    *decoder = Some(zstd::bulk::Decompressor::new().map_err(|_| BAD)?);
                }
                let decoder = decoder.as_mut().ok_or(BAD)?;
                decoder.decompress_to_buffer(stored, out).map_err(|_| BAD)?;
                Ok(())
            })?;
        }
    }
    if out.len() == plain { Ok(()) } else { Err(BAD) }
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most chunks that are not zero say so early.
    let (head, tail) = bytes.split_at(bytes.len().min(64));
    head.iter().all(|b| *b == 0) && tail.chunks(4096).all(|block| block.iter().fold(0, |acc, b| acc | b) == 0)
}
