//! Format 1, byte by byte: identities, names, the cursor that every parser uses, and the envelope of small objects.
//!
//! `docs/format.md` is normative; this module and `pack::layout`, `index::segment`, `manifest::page` are its code.
//! Invariant: parsers take a bounded slice, never panic, and never allocate more than a small multiple of the input.

pub mod config;
pub mod cursor;
pub mod envelope;
pub mod ids;
pub mod names;
pub mod sealed;

pub use cursor::{Cursor, Malformed};
pub use ids::{ChunkId, ObjectId};

/// The format that this version writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// Smallest chunk size of a disk.
pub const CHUNK_BYTES_MIN: u32 = 256 << 10;
/// Default chunk size of a disk.
pub const CHUNK_BYTES_DEFAULT: u32 = 1 << 20;
/// Largest chunk size of a disk, and bound of every plaintext in a pack.
pub const CHUNK_BYTES_MAX: u32 = 4 << 20;
/// Most chunks that a disk may have.
pub const DISK_CHUNKS_MAX: u64 = 1 << 32;

/// Whether disks can be cut into chunks of that many bytes.
pub fn is_chunk_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&bytes)
}
