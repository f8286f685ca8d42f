//! A restore point: what one backup run of one VM left in the repository, apart from the data itself.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Identity of a restore point: 128 random bits, printed as 32 hex digits; prefixes are accepted from people.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PointId(pub [u8; 16]);

impl PointId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(*Uuid::new_v4().as_bytes())
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no restore point id.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a restore point id (32 hex digits)")]
pub struct ParsePointIdError(String);

impl FromStr for PointId {
    type Err = ParsePointIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParsePointIdError(text.to_owned());
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u128::from_str_radix(text, 16).map(|n| Self(n.to_be_bytes())).map_err(|_| bad())
    }
}

impl TryFrom<String> for PointId {
    type Error = ParsePointIdError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PointId> for String {
    fn from(id: PointId) -> String {
        id.to_string()
    }
}

/// Whether the run had to look at everything or only at what changed. Every restore point restores by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupKind {
    /// At least one disk was read in full.
    Full,
    /// Every disk was read by its change tracking.
    Incremental,
}

/// How the source was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// Running VM, pull-mode backup.
    Hot,
    /// Running VM, suspended for the instant of the cut.
    Warm,
    /// VM shut off, images read directly.
    Cold,
    /// Image files that belong to no domain.
    Image,
}

/// What the operator asked of the guest agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuiesceRequest {
    /// Freeze file systems if the agent answers; otherwise crash-consistent.
    #[default]
    Auto,
    /// Fail the backup if file systems cannot be frozen.
    Required,
    /// Never freeze.
    Off,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuiesceOutcome {
    /// File systems were frozen across the cut: application-consistent as far as the guest's hooks go.
    Frozen,
    /// Not asked for, or nothing to freeze (VM shut off).
    NotNeeded,
    /// The agent is absent or silent: crash-consistent.
    NoAgent,
    /// The agent answered and the freeze failed: crash-consistent.
    Failed,
}

/// Request and outcome of quiescing, with the reason when it is not `frozen`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuiesceRecord {
    /// What was asked.
    pub requested: QuiesceRequest,
    /// What happened.
    pub outcome: QuiesceOutcome,
    /// How long the file systems were frozen, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u64>,
    /// Why it was not frozen, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// State of a disk's change tracking when the run began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackingState {
    /// The bitmap of the previous restore point was there and was used.
    Valid,
    /// No earlier restore point of this disk in this repository.
    First,
    /// The bitmap is gone (migration, power cut, deleted by hand).
    Missing,
    /// QEMU did not close the image cleanly: the bitmap is marked in use and cannot be trusted.
    InUse,
    /// The disk's size differs from that of the previous restore point.
    Resized,
    /// The bitmap is not the one that the previous restore point left, or the disk is another one.
    Foreign,
    /// The disk's format or driver holds no persistent bitmap (raw, LVM, RBD).
    Unsupported,
    /// A sample of regions that tracking called clean had changed: the disk was read in full.
    Untrusted,
}

/// Provenance of the change tracking of one disk in one restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingRecord {
    /// What was found.
    pub state: TrackingState,
    /// Why, in words, when it is not `valid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Checkpoint (bitmap) that this restore point left for the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
}

/// One disk in a restore point. Everything but the data; the data is reached through `root`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Target name in the guest (`vda`), or the file name for images.
    pub target: String,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Chunk size in bytes, a power of two.
    pub chunk_bytes: u32,
    /// Format of the source (`qcow2`, `raw` …): the default format of a restore.
    pub format: String,
    /// Path or name of the source, for people.
    pub source: String,
    /// Root of the tree of manifest pages: hex of the page's id, empty when the whole disk reads as zeros.
    pub root: String,
    /// Bytes read from the source in this run to be kept.
    pub read_bytes: u64,
    /// Bytes re-read in regions that tracking calls clean, to check the tracking.
    #[serde(default)]
    pub sampled_bytes: u64,
    /// Bytes (before compression) that the repository did not have.
    pub new_bytes: u64,
    /// Bytes that this run added to the repository for this disk, after compression and encryption.
    pub stored_bytes: u64,
    /// Bytes that are not known to be zero: what a thin restore writes.
    pub data_bytes: u64,
    /// Change tracking: what was found and what was left.
    pub tracking: TrackingRecord,
}

/// The restore point that a copy was made of. A copy of a copy names the first one, so that all copies of a restore point
/// know each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CopiedFrom {
    /// Identity of the repository that it was made in: 32 hex digits.
    pub repository: String,
    /// Its identity there.
    pub point: PointId,
}

/// A restore point as it is kept in the repository and shown to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePoint {
    /// Identity.
    pub id: PointId,
    /// Name of the VM (or of the image set).
    pub vm: String,
    /// UUID of the domain; nil for image sets.
    pub vm_uuid: Uuid,
    /// Host that the VM ran on.
    pub host: String,
    /// How the source was read.
    pub source: SourceKind,
    /// Full or incremental work.
    pub kind: BackupKind,
    /// The instant of the cut: what the restore point holds is the VM as of this moment.
    pub taken: Timestamp,
    /// Begin of the run.
    pub started: Timestamp,
    /// End of the run.
    pub finished: Timestamp,
    /// Restore point that tracking was based on, if any. Never needed for a restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PointId>,
    /// Quiescing.
    pub quiesce: QuiesceRecord,
    /// The disks that were backed up.
    pub disks: Vec<DiskRecord>,
    /// Disks that were skipped, as `target: reason`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
    /// Labels given by the operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Things the operator should know (CBT sample mismatch, freeze failed …).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Where it was made, if it was copied here from another repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied_from: Option<CopiedFrom>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn point_ids_round_trip() {
        let id = PointId::random();
        assert_eq!(id.to_string().parse::<PointId>().unwrap(), id);
        assert_eq!(serde_json::from_str::<PointId>(&format!("\"{id}\"")).unwrap(), id);
        for bad in ["", "abc", "zz", "0123456789abcdef0123456789abcdeg", "+123456789abcdef0123456789abcdef"] {
            assert!(bad.parse::<PointId>().is_err(), "{bad}");
        }
    }
}
