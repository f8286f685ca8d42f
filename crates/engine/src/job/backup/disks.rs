//! From decided disks and opened exports to disk records: copy, check the tracking, record.

use std::{collections::BTreeSet, ops::Range};

use futures::future::try_join_all;
use uuid::Uuid;
use virtward_decide::tracking::{self, DiskDecision, DiskFacts, PreviousDisk};
use virtward_model::{DiskRecord, RestorePoint, TrackingRecord, TrackingState};
use virtward_repo::{Compared, DiskSpec, DiskWriter, Writer};

use super::{
    blocking,
    copy::{Flow, Source},
};
use crate::Result;

/// Chunk size of new disks.
pub(super) const CHUNK_BYTES: u32 = 1 << 20;

/// One disk about to be read.
pub(super) struct DiskJob {
    pub decision: DiskDecision,
    pub size_bytes: u64,
    pub format: String,
    pub source_name: String,
    /// The disk in the previous restore point; the base of what does not change.
    pub base: Option<DiskRecord>,
    /// Name of the bitmap context of the export, if only changes are read.
    pub dirty_context: Option<String>,
    /// Checkpoint that will be there for the next run.
    pub checkpoint: Option<String>,
}

/// Whether a record came from reading changes only.
pub(super) fn was_incremental(record: &DiskRecord) -> bool {
    record.tracking.state == TrackingState::Valid && record.tracking.reason.is_none()
}

/// The disk of that target in the previous restore point, as the decision needs it.
pub(super) fn previous_disk(previous: Option<&RestorePoint>, target: &str) -> Option<(PreviousDisk, DiskRecord)> {
    let record = previous?.disks.iter().find(|disk| disk.target == target)?;
    let disk = PreviousDisk {
        target: target.to_owned(),
        size_bytes: record.size_bytes,
        checkpoint: record.tracking.checkpoint.clone(),
        chunk_bytes: record.chunk_bytes,
    };
    Some((disk, record.clone()))
}

/// Decides for every disk.
pub(super) fn decide(
    facts: &[DiskFacts],
    previous: Option<&RestorePoint>,
    ours: &str,
    full: bool,
) -> Vec<DiskDecision> {
    facts
        .iter()
        .map(|disk| {
            let earlier = previous_disk(previous, &disk.target).map(|(disk, _)| disk);
            tracking::decide_disk(disk, earlier.as_ref(), ours, CHUNK_BYTES, full)
        })
        .collect()
}

/// Reads all disks at once into the repository.
pub(super) async fn store(
    writer: &Writer,
    disks: Vec<(DiskJob, Source)>,
    samples: usize,
    flow: &Flow<'_>,
) -> Result<Vec<DiskRecord>> {
    try_join_all(disks.into_iter().map(|(job, source)| store_one(writer, job, source, samples, flow))).await
}

async fn store_one(
    writer: &Writer,
    mut job: DiskJob,
    source: Source,
    samples: usize,
    flow: &Flow<'_>,
) -> Result<DiskRecord> {
    let everything = || std::iter::once(0..job.size_bytes).filter(|range| !range.is_empty()).collect::<Vec<_>>();
    let spec = |base: Option<DiskRecord>| DiskSpec { size_bytes: job.size_bytes, chunk_bytes: CHUNK_BYTES, base };
    let mut sampled_bytes = 0;
    let (disk, ranges) = match (&job.dirty_context, &job.base) {
        (Some(context), Some(base)) => {
            let ranges = source.dirty_ranges(context).await?;
            let disk = writer.disk(spec(Some(base.clone())))?;
            match changed_behind_our_back(disk, &source, &ranges, samples).await? {
                Sampled::Same { disk, read_bytes } => {
                    sampled_bytes = read_bytes;
                    (disk, ranges)
                }
                Sampled::Different { offset } => {
                    job.decision.state = TrackingState::Untrusted;
                    job.decision.reason =
                        Some(format!("bytes at {offset} changed although tracking calls them clean"));
                    (writer.disk(spec(None))?, everything())
                }
            }
        }
        _ => (writer.disk(spec(None))?, everything()),
    };
    let (disk, read_bytes) = source.copy(disk, ranges, flow).await?;
    let result = blocking(move || Ok(disk.finish()?)).await?;
    source.client.disconnect().await;
    Ok(DiskRecord {
        target: job.decision.target,
        size_bytes: job.size_bytes,
        chunk_bytes: CHUNK_BYTES,
        format: job.format,
        source: job.source_name,
        root: result.root,
        read_bytes,
        sampled_bytes,
        new_bytes: result.new_bytes,
        stored_bytes: result.stored_bytes,
        data_bytes: result.data_bytes,
        tracking: TrackingRecord {
            state: job.decision.state,
            reason: job.decision.reason,
            checkpoint: job.checkpoint,
        },
    })
}

enum Sampled {
    Same { disk: DiskWriter, read_bytes: u64 },
    Different { offset: u64 },
}

/// Re-reads a few allocated chunks that tracking calls clean and compares them with the previous restore point. Silent
/// loss of tracking (another tool wrote to the image, a bitmap bug) is found this way before it spoils many restore
/// points.
async fn changed_behind_our_back(
    mut disk: DiskWriter,
    source: &Source,
    dirty: &[Range<u64>],
    samples: usize,
) -> Result<Sampled> {
    let chunk = u64::from(source.chunk_bytes);
    let chunks = source.size_bytes.div_ceil(chunk);
    let is_dirty = |at: u64| match dirty.binary_search_by_key(&at, |range| range.start) {
        Ok(_) => true,
        Err(next) => next > 0 && dirty[next - 1].end > at,
    };
    let mut picked = BTreeSet::new();
    // A few tries per sample: on a mostly empty or mostly dirty disk there may be little to find.
    for _ in 0..if chunks == 0 { 0 } else { samples * 8 } {
        let index = (Uuid::new_v4().as_u128() % u128::from(chunks)) as u64;
        if !is_dirty(index * chunk) && source.is_allocated(index).await? {
            picked.insert(index);
        }
        if picked.len() >= samples {
            break;
        }
    }
    let mut read_bytes = 0;
    for index in picked {
        let data = source.read_index(index).await?;
        read_bytes += data.len() as u64;
        let compared;
        (disk, compared) = blocking(move || {
            let compared = disk.compare_base(index, &data)?;
            Ok((disk, compared))
        })
        .await?;
        if compared == Compared::Different {
            return Ok(Sampled::Different { offset: index * chunk });
        }
    }
    Ok(Sampled::Same { disk, read_bytes })
}
