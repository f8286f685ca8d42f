//! The backup repository: every restore point is full, incrementals cost what changed, many writers need no lock.
//!
//! Blocking calls with worker threads of their own. [`store`] is where bytes live, [`format`] and `docs/format.md` say
//! what they mean, [`Repository`] is what callers use. Not here: what to back up and when, retention, the guests.
//!
//! Invariants: a restore point is visible only when everything that it refers to is durable; nothing stored is ever
//! changed; every byte that is given out was authenticated and hashed again; names in the store reveal nothing.

mod crypto;
mod direct;
mod disorder;
mod error;
pub mod format;
#[doc(hidden)]
pub mod fuzz;
#[doc(hidden)]
pub mod gc;
mod hold;
#[doc(hidden)]
pub mod index;
mod keys;
mod lease;
mod manifest;
mod mirror;
mod pack;
#[cfg(test)]
mod parsers_test;
mod points;
mod progress;
mod reader;
mod repository;
pub mod store;
mod trash;
mod util;
mod verify;
mod writer;

pub use direct::DirectFile;
pub use error::{Error, Result};
pub use format::{CHUNK_BYTES_DEFAULT, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, ObjectId};
pub use gc::{GRACE_DEFAULT, GcOptions, GcReport};
pub use hold::Hold;
pub use index::RebuildReport;
pub use keys::{KdfCost, KeyInfo, KeyKind, RotateOptions, Rotated, Secret};
pub use manifest::point::Attachment;
pub use mirror::{
    heal::HealReport,
    send::{CopiedPoint, CopyReport},
};
pub use pack::codec::Compression;
pub use points::{Info, PointList};
pub use progress::Progress;
pub use reader::{DiskReader, Extent, RestoreOptions, RestoreStats};
pub use repository::{InitOptions, Repository};
pub use store::Store;
pub use trash::{DeletedPoint, DeletedPoints};
pub use verify::{
    CheckReport, CiphertextReport, Damage, DamagedDisk, DamagedPoint, VerifyMode, VerifyOptions, VerifyReport,
    verify_ciphertext,
};
pub use writer::{ChunkBuf, Compared, DiskResult, DiskSpec, DiskStats, DiskWriter, Writer, WriterOptions};
