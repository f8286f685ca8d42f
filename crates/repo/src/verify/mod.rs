//! Integrity: is everything there (light), are the bytes those that were written (ciphertext, no keys needed), do they
//! decode to what their ids say (full)? And what does damage mean: which restore points, disks and byte ranges.

mod check;
mod ciphertext;
mod impact;
mod run;

use std::ops::Range;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use virtward_model::PointId;

pub use check::CheckReport;
pub(crate) use ciphertext::describe;
pub use ciphertext::{CiphertextReport, verify_ciphertext};
pub(crate) use impact::Impact;
pub(crate) use run::Bad;

/// How deep to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyMode {
    /// Every object is there and has its length; indexes, pages and restore points decode.
    Light,
    /// Also the bytes of every pack are those that were written. Sequential, at the speed of the disk.
    Ciphertext,
    /// Also every chunk decrypts, decompresses and hashes to its id.
    #[default]
    Full,
}

/// What to verify.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// How deep.
    pub mode: VerifyMode,
    /// Share of the packs whose bytes are read, 1 to 100; `None` is all. Chosen at random at each run.
    pub percent: Option<u8>,
    /// Only what these restore points refer to; `None` is the whole repository.
    pub points: Option<Vec<PointId>>,
    /// Threads; 0 is one per core.
    pub threads: usize,
}

/// An object that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Name of the object.
    pub object: String,
    /// What is wrong with it.
    pub what: String,
}

/// A disk of which parts cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedDisk {
    /// Target name.
    pub target: String,
    /// Byte ranges that are lost, in order.
    pub ranges: Vec<Range<u64>>,
}

/// A restore point of which parts cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedPoint {
    /// Identity.
    pub id: PointId,
    /// VM.
    pub vm: String,
    /// The instant that it holds.
    pub taken: Timestamp,
    /// Its disks with losses.
    pub disks: Vec<DamagedDisk>,
    /// Whether domain XML, NVRAM or TPM state are affected.
    pub attachments: bool,
}

impl DamagedPoint {
    /// One line: which disks, and how many bytes of each.
    pub fn summary(&self) -> String {
        let disk = |disk: &DamagedDisk| {
            let lost: u64 = disk.ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum();
            format!("{lost} bytes of {}", disk.target)
        };
        let attachments = self.attachments.then(|| "the definition and firmware state".to_owned());
        let parts: Vec<String> = self.disks.iter().map(disk).chain(attachments).collect();
        format!("{} are gone from the repository", parts.join(", "))
    }
}

/// Outcome of a verification.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// How deep.
    pub mode: VerifyMode,
    /// Restore points looked at.
    pub points: u64,
    /// Packs that exist for them.
    pub packs: u64,
    /// Packs whose bytes were read.
    pub packs_read: u64,
    /// Chunks and pages that were decoded and hashed.
    pub chunks_checked: u64,
    /// Bytes read from packs.
    pub bytes_read: u64,
    /// Objects that are damaged or missing.
    pub damaged: Vec<Damage>,
    /// Restore points that are affected.
    pub damaged_points: Vec<DamagedPoint>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.damaged.is_empty() && self.damaged_points.is_empty()
    }
}
