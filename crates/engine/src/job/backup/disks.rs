//! From decided disks and opened exports to disk records: copy, check the tracking, record.

use std::{collections::BTreeSet, ops::Range, sync::Arc};

use futures::{
    TryFutureExt,
    future::{try_join, try_join_all},
};
use uuid::Uuid;
use virtward_decide::{
    readplan::Dirty,
    tracking::{self, DiskDecision, DiskFacts, PreviousDisk},
};
use virtward_model::{Disk, DiskRecord, RestorePoint, TrackingRecord, TrackingState};
use virtward_repo::{Compared, DiskResult, DiskSpec, DiskWriter, Writer};

use super::{
    blocking,
    copy::{Flow, Parts, Source},
    store::DiskJob,
};
use crate::{Error, Result};

/// Whether a record came from reading changes only.
pub(super) fn was_incremental(record: &DiskRecord) -> bool {
    record.tracking.state == TrackingState::Valid && record.tracking.reason.is_none()
}

/// The disk of that target in the newest restore point that holds it, as the decision needs it. `history` is newest
/// first. A run may leave disks out, so disks of one VM can have different newest restore points.
pub(super) fn previous_disk(history: &[RestorePoint], target: &str) -> Option<(PreviousDisk, DiskRecord)> {
    let record = history.iter().find_map(|point| point.disks.iter().find(|disk| disk.target == target))?;
    let disk = PreviousDisk {
        target: target.to_owned(),
        size_bytes: record.size_bytes,
        checkpoint: record.tracking.checkpoint.clone(),
        chunk_bytes: record.chunk_bytes,
    };
    Some((disk, record.clone()))
}

/// The checkpoints that the newest restore points of disks outside this run rely on.
pub(super) fn kept_elsewhere(history: &[RestorePoint], disks: &[Disk], in_run: &[DiskFacts]) -> Vec<String> {
    disks
        .iter()
        .filter(|disk| !in_run.iter().any(|facts| facts.target == disk.target))
        .filter_map(|disk| previous_disk(history, &disk.target)?.0.checkpoint)
        .collect()
}

/// Decides for every disk.
pub(super) fn decide(facts: &[DiskFacts], history: &[RestorePoint], ours: &str, full: bool) -> Vec<DiskDecision> {
    facts
        .iter()
        .map(|disk| {
            let earlier = previous_disk(history, &disk.target).map(|(disk, _)| disk);
            tracking::decide_disk(disk, earlier.as_ref(), ours, full)
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
    let stored = match store_changes(writer, &mut job, &source, samples, flow).await? {
        Some(stored) => stored,
        None => {
            let everything: Vec<_> = std::iter::once(0..job.size_bytes).filter(|range| !range.is_empty()).collect();
            let disk = Arc::new(writer.disk(spec(&job, None))?);
            let read_bytes = source.copy(&disk, &everything, Parts::new(), flow).await?;
            Stored { result: finish(disk).await?, read_bytes, sampled_bytes: 0 }
        }
    };
    source.origin.close().await;
    Ok(DiskRecord {
        target: job.decision.target,
        size_bytes: job.size_bytes,
        chunk_bytes: job.decision.chunk_bytes,
        format: job.format,
        source: job.source_name,
        root: stored.result.root,
        read_bytes: stored.read_bytes,
        sampled_bytes: stored.sampled_bytes,
        new_bytes: stored.result.new_bytes,
        stored_bytes: stored.result.stored_bytes,
        data_bytes: stored.result.data_bytes,
        tracking: TrackingRecord { state: job.decision.state, reason: job.decision.reason, checkpoint: job.checkpoint },
    })
}

struct Stored {
    result: DiskResult,
    read_bytes: u64,
    sampled_bytes: u64,
}

fn spec(job: &DiskJob, base: Option<DiskRecord>) -> DiskSpec {
    DiskSpec { size_bytes: job.size_bytes, chunk_bytes: job.decision.chunk_bytes, base }
}

/// Stores what changed on top of the previous restore point, or nothing, with the decision corrected, where this cannot
/// be relied on: tracking is off, was caught lying, or the previous restore point is gone or damaged.
async fn store_changes(
    writer: &Writer,
    job: &mut DiskJob,
    source: &Source,
    samples: usize,
    flow: &Flow<'_>,
) -> Result<Option<Stored>> {
    let (Some(context), Some(base)) = (&job.dirty_context, &job.base) else { return Ok(None) };
    let dirty = source.dirty(context).await?;
    let outcome = async {
        let disk = Arc::new(writer.disk(spec(job, Some(base.clone())))?);
        let parts = taken_in_parts(&disk, &dirty).await?;
        // Together, as each mostly waits for the hypervisor; what was copied in vain is collected later.
        let (read_bytes, sampled_bytes) = try_join(
            source.copy(&disk, dirty.ranges(), parts, flow).map_err(Stop::Failed),
            changed_behind_our_back(&disk, source, dirty.ranges(), samples),
        )
        .await?;
        Ok(Stored { result: finish(disk).await?, read_bytes, sampled_bytes })
    };
    match outcome.await {
        Ok(stored) => return Ok(Some(stored)),
        Err(Stop::Lied { offset }) => {
            job.decision.state = TrackingState::Untrusted;
            job.decision.reason = Some(format!("bytes at {offset} changed although tracking calls them clean"));
        }
        Err(Stop::Failed(Error::Repo(virtward_repo::Error::BadBase { why }))) => {
            job.decision.state = TrackingState::Foreign;
            job.decision.reason = Some(format!("the previous restore point cannot be built on: {why}"));
        }
        // Damage below the base's root: a restore point must not be built on it, or it would be inherited for ever.
        Err(Stop::Failed(Error::Repo(error))) if error.is_damage() => {
            job.decision.state = TrackingState::Foreign;
            job.decision.reason = Some(format!("the previous restore point is damaged: {error}"));
        }
        Err(Stop::Failed(error)) => return Err(error),
    }
    Ok(None)
}

/// Why changes alone were not stored.
enum Stop {
    /// Bytes that tracking calls clean have changed.
    Lied {
        offset: u64,
    },
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<virtward_repo::Error> for Stop {
    fn from(error: virtward_repo::Error) -> Self {
        Self::Failed(error.into())
    }
}

async fn finish(disk: Arc<DiskWriter>) -> Result<DiskResult> {
    let disk = Arc::into_inner(disk).ok_or_else(|| Error::Tool("a reader of the disk is still at work".into()))?;
    blocking(move || Ok(disk.finish()?)).await
}

/// The chunks of which only what is dirty has to be read.
async fn taken_in_parts(disk: &Arc<DiskWriter>, dirty: &Dirty) -> Result<Parts> {
    let (disk, parts) = (disk.clone(), dirty.parts());
    blocking(move || {
        let mut taken = Parts::new();
        for (index, parts) in parts {
            if disk.takes_parts(index, &parts)? {
                taken.insert(index, parts);
            }
        }
        Ok(taken)
    })
    .await
}

/// Re-reads a few allocated chunks that tracking calls clean and compares them with the previous restore point. Silent
/// loss of tracking (another tool wrote to the image, a bitmap bug) is found this way before it spoils many restore
/// points.
async fn changed_behind_our_back(
    disk: &Arc<DiskWriter>,
    source: &Source,
    dirty: &[Range<u64>],
    samples: usize,
) -> std::result::Result<u64, Stop> {
    let chunk = u64::from(source.chunk_bytes);
    let is_dirty = |at: u64| match dirty.binary_search_by_key(&at, |range| range.start) {
        Ok(_) => true,
        Err(next) => next > 0 && dirty[next - 1].end > at,
    };
    let mut picked = BTreeSet::new();
    // More tries than samples: what is found may be dirty, or found already.
    for _ in 0..samples * 4 {
        if picked.len() >= samples {
            break;
        }
        let Some(index) = source.allocated_near(random(), random()).await? else { break };
        if !is_dirty(index * chunk) {
            picked.insert(index);
        }
    }
    let mut read_bytes = 0;
    for index in picked {
        let data = source.read_index(index).await?;
        read_bytes += data.len() as u64;
        let disk = disk.clone();
        if blocking(move || Ok(disk.compare_base(index, &data)?)).await? == Compared::Different {
            return Err(Stop::Lied { offset: index * chunk });
        }
    }
    Ok(read_bytes)
}

fn random() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}
