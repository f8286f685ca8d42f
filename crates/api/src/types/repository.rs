//! Repositories as the daemon sees them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Said;
use uuid::Uuid;

/// Whether a repository can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RepositoryState {
    /// It opens.
    Ok,
    /// It does not: see `error`.
    Unusable,
    /// It was not looked at yet.
    Unknown,
}

/// A repository.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Repository {
    /// Its name in the configuration and in policies; that of the main one is `default`.
    pub name: String,
    /// Directory or URL.
    pub location: String,
    /// Its identity; null until it was opened.
    pub id: Option<String>,
    /// Whether it can be used.
    pub state: RepositoryState,
    /// Why not.
    pub error: Option<String>,
    /// This daemon deletes nothing there.
    pub is_append_only: bool,
    /// Restore points in it.
    pub points: u64,
    /// What it holds; null until it was measured.
    pub usage: Option<RepositoryUsage>,
    /// Growth, oldest first, at most one sample per hour.
    pub history: Vec<UsageSample>,
    /// Last check of stored data that this daemon made.
    pub last_verify: Option<Maintenance>,
    /// Last removal of restore points by rules.
    pub last_prune: Option<Maintenance>,
    /// Last collection of unused data.
    pub last_gc: Option<Maintenance>,
    /// Jobs that use it now.
    pub jobs_running: u32,
}

/// What a repository holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RepositoryUsage {
    /// When it was measured.
    pub at: Timestamp,
    /// Bytes stored.
    pub bytes: u64,
    /// Bytes of data in all restore points.
    pub data_bytes: u64,
    /// Of these, distinct.
    pub chunk_bytes: u64,
    /// Data to distinct data.
    pub dedup_ratio: f64,
    /// Distinct data to stored bytes.
    pub compression_ratio: f64,
    /// Free in its file system; null for object storage.
    pub free_bytes: Option<u64>,
    /// Size of its file system; null for object storage.
    pub total_bytes: Option<u64>,
}

/// A point of the growth chart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UsageSample {
    /// When.
    pub at: Timestamp,
    /// Bytes stored.
    pub bytes: u64,
    /// Bytes of data in all restore points.
    pub data_bytes: u64,
    /// Restore points.
    pub points: u64,
}

/// A piece of maintenance that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Maintenance {
    /// When it ended.
    pub at: Timestamp,
    /// The job.
    pub job: Option<Uuid>,
    /// It found nothing wrong and did all that there was to do.
    pub is_ok: bool,
    /// In a sentence.
    pub summary: String,
    /// The same, for other languages; none if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
}
