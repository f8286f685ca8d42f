//! Restore points, in the shape of the command line's JSON.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A restore point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Point {
    /// Id: 32 hex digits.
    pub id: String,
    /// Name of the repository that it is in.
    pub repository: String,
    /// Name of the VM when it was taken.
    pub vm: String,
    /// UUID of the VM; nil for plain images.
    pub uuid: Uuid,
    /// Host that it was taken on.
    pub host: String,
    /// `full` or `incremental`: how it was made. Every restore point is complete.
    pub kind: String,
    /// `hot`, `warm`, `cold`, `image`.
    pub source: String,
    /// The instant of the cut: what the guest was like then is what it holds.
    pub taken: Timestamp,
    /// When the run began.
    pub started: Timestamp,
    /// When it was published.
    pub finished: Timestamp,
    /// How long the run took.
    pub duration_ms: u64,
    /// The restore point that changes were tracked since.
    pub parent: Option<String>,
    /// Quiescing.
    pub quiesce: PointQuiesce,
    /// Disks.
    pub disks: Vec<PointDisk>,
    /// Disks that were left out, and why.
    pub skipped: Vec<String>,
    /// Labels.
    pub tags: Vec<String>,
    /// Things to know.
    pub warnings: Vec<String>,
    /// Why it must not be deleted, if so.
    pub held: Option<String>,
    /// Virtual size of all disks.
    pub size_bytes: u64,
    /// Bytes that the run read.
    pub read_bytes: u64,
    /// Bytes that the run added to the repository.
    pub stored_bytes: u64,
}

/// How the guest was quiesced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointQuiesce {
    /// What was asked for: `auto`, `required`, `off`.
    pub requested: String,
    /// What came of it: `frozen`, `not-needed`, `no-agent`, `failed`.
    pub outcome: String,
    /// How long file systems were frozen.
    pub frozen_ms: Option<u64>,
    /// Why not.
    pub reason: Option<String>,
}

/// A disk in a restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointDisk {
    /// Target name.
    pub target: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Bytes that are not zero.
    pub data_bytes: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that the repository did not have.
    pub new_bytes: u64,
    /// Bytes that were stored for them.
    pub stored_bytes: u64,
    /// State of change tracking: `valid`, `first`, `missing` …
    pub tracking: String,
    /// Why everything was read.
    pub reason: Option<String>,
    /// Image format of the source.
    pub format: String,
    /// Where the source was.
    pub source: String,
}
