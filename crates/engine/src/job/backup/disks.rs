//! From decided disks and opened exports to disk records: copy, check the tracking, record.

use std::{collections::BTreeSet, ops::Range};

use futures::future::try_join_all;
use virtward_decide::tracking::{self, DiskDecision, DiskFacts, PreviousDisk};
use virtward_model::{DiskRecord, RestorePoint, TrackingRecord, TrackingState};
use virtward_repo::{DiskSpec, Repository, Same, Writer};

use super::{
    blocking,
    copy::{Flow, Source},
};
use crate::{Error, Result};

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
    repo: &Repository,
    writer: &Writer,
    disks: Vec<(DiskJob, Source)>,
    samples: usize,
    flow: &Flow<'_>,
) -> Result<Vec<DiskRecord>> {
    try_join_all(disks.into_iter().map(|(job, source)| store_one(repo, writer, job, source, samples, flow))).await
}

async fn store_one(
    repo: &Repository,
    writer: &Writer,
    mut job: DiskJob,
    source: Source,
    samples: usize,
    flow: &Flow<'_>,
) -> Result<DiskRecord> {
    let all = std::iter::once(0..job.size_bytes).filter(|range| !range.is_empty()).collect::<Vec<Range<u64>>>();
    let mut ranges = all.clone();
    let mut base = None;
    if let (Some(context), Some(record)) = (&job.dirty_context, &job.base) {
        ranges = source.dirty_ranges(context).await?;
        base = Some(record.clone());
    }
    let mut sampled_bytes = 0;
    if let Some(record) = base.clone() {
        match changed_behind_our_back(repo, &record, &source, &ranges, samples).await? {
            Ok(bytes) => sampled_bytes = bytes,
            Err(index) => {
                let at = index * u64::from(record.chunk_bytes);
                job.decision.state = TrackingState::Untrusted;
                job.decision.reason = Some(format!("bytes at {at} changed although tracking calls them clean"));
                (base, ranges) = (None, all);
            }
        }
    }
    let spec = DiskSpec { size_bytes: job.size_bytes, chunk_bytes: CHUNK_BYTES, base };
    let disk = writer.disk(spec)?;
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
        read_bytes: read_bytes + sampled_bytes,
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

/// Re-reads a few chunks that tracking calls clean and compares them with the previous restore point: the bytes read,
/// or the first chunk that differs. Silent loss of tracking (another tool wrote to the image, a bitmap bug) is found
/// this way before it spoils many restore points.
async fn changed_behind_our_back(
    repo: &Repository,
    record: &DiskRecord,
    source: &Source,
    dirty: &[Range<u64>],
    samples: usize,
) -> Result<std::result::Result<u64, u64>> {
    let (repo, record, dirty) = (repo.clone(), record.clone(), dirty.to_vec());
    let chunk = u64::from(record.chunk_bytes);
    let (reader, picked) = blocking(move || {
        let reader = repo.disk(&record)?;
        let is_dirty = |at: u64| match dirty.binary_search_by_key(&at, |range| range.start) {
            Ok(_) => true,
            Err(next) => next > 0 && dirty[next - 1].end > at,
        };
        let mut picked = BTreeSet::new();
        let chunks = record.size_bytes.div_ceil(chunk);
        // A few tries per sample: on a mostly empty or mostly dirty disk there may be little to find.
        for _ in 0..samples * 8 {
            if picked.len() >= samples || chunks == 0 {
                break;
            }
            let index = (uuid::Uuid::new_v4().as_u128() % u128::from(chunks)) as u64;
            if !is_dirty(index * chunk) && reader.is_data(index)? {
                picked.insert(index);
            }
        }
        Ok((reader, picked))
    })
    .await?;
    let reader = std::sync::Arc::new(reader);
    let mut read_bytes = 0;
    for index in picked {
        let data = source.read_index(index).await?;
        read_bytes += data.len() as u64;
        let reader = reader.clone();
        let same = blocking(move || reader.compare(index, &data).map_err(Error::from)).await?;
        if same == Same::Different {
            return Ok(Err(index));
        }
    }
    Ok(Ok(read_bytes))
}
