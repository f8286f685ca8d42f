//! Change tracking that heals itself: for each disk, may the run trust the bitmap of the previous restore point?
//!
//! The answer is never "fail": a disk whose tracking is unusable is read in full (allocated blocks only; chunks that
//! the repository has are not stored again), with the reason recorded, and gets a fresh checkpoint for the next run.
//!
//! Also decided here: which checkpoints and bitmaps of ours are leftovers, and how the previous one is made usable.
//! Not here: reading the facts or carrying the answer out.

use serde::{Deserialize, Serialize};
use virtward_model::TrackingState;

/// What is known of one disk before the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Target name.
    pub target: String,
    /// Virtual size now, in bytes.
    pub size_bytes: u64,
    /// Why the disk's format holds no persistent bitmap, if so.
    pub untrackable: Option<String>,
    /// Dirty bitmaps of the active layer.
    pub bitmaps: Vec<BitmapFact>,
}

/// One dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapFact {
    /// Name; equal to the checkpoint's.
    pub name: String,
    /// Was not closed cleanly (in-use or inconsistent).
    pub broken: bool,
    /// Records writes.
    pub recording: bool,
}

/// What the previous restore point of this VM in this repository says of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousDisk {
    /// Target name.
    pub target: String,
    /// Virtual size then, in bytes.
    pub size_bytes: u64,
    /// Checkpoint that it left, if the disk could be tracked.
    pub checkpoint: Option<String>,
    /// Chunk size then, in bytes.
    pub chunk_bytes: u32,
}

/// How one disk is to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDecision {
    /// Target name.
    pub target: String,
    /// What was found.
    pub state: TrackingState,
    /// Why, in words, when tracking is not used.
    pub reason: Option<String>,
    /// Read only what this bitmap says; none reads everything that is allocated.
    pub since: Option<String>,
    /// The previous restore point's bitmap, if it is sound: it stays until the new restore point is published, even if
    /// this run does not read by it, so that a run that fails costs no tracking.
    pub keep: Option<String>,
    /// A checkpoint can be made for the next run.
    pub trackable: bool,
    /// Chunk size to store the disk with, in bytes.
    pub chunk_bytes: u32,
}

/// Disks from this size on get large chunks.
const LARGE_DISK_BYTES: u64 = 1 << 40;
const SMALL_CHUNK_BYTES: u32 = 512 << 10;
const LARGE_CHUNK_BYTES: u32 = 1 << 20;

/// Chunk size of a disk that has no restore point yet. Small chunks make small increments (a change of 64 KiB costs a
/// chunk), large ones a small index; both matter in proportion to the disk.
pub fn first_chunk_bytes(size_bytes: u64) -> u32 {
    if size_bytes < LARGE_DISK_BYTES { SMALL_CHUNK_BYTES } else { LARGE_CHUNK_BYTES }
}

/// Chunk size of a disk. It keeps that of its earlier restore points, so that their chunks are found again.
fn chunk_bytes(size_bytes: u64, previous: Option<&PreviousDisk>) -> u32 {
    let usable = |bytes: &u32| bytes.is_power_of_two() && (256 << 10..=4 << 20).contains(bytes);
    previous.map(|disk| disk.chunk_bytes).filter(usable).unwrap_or_else(|| first_chunk_bytes(size_bytes))
}

/// Decides for one disk. `full` is the operator's wish to ignore tracking.
pub fn decide_disk(facts: &DiskFacts, previous: Option<&PreviousDisk>, ours: &str, full: bool) -> DiskDecision {
    let chunk_bytes = chunk_bytes(facts.size_bytes, previous);
    let (state, reason) = classify(facts, previous, ours, chunk_bytes);
    let keep = match (state, previous) {
        (TrackingState::Valid, Some(previous)) => previous.checkpoint.clone(),
        _ => None,
    };
    let since = keep.clone().filter(|_| !full);
    let reason = match (state, full) {
        (TrackingState::Valid, true) => Some("a full read was asked for".to_owned()),
        _ => reason,
    };
    let (target, trackable) = (facts.target.clone(), facts.untrackable.is_none());
    DiskDecision { target, state, reason, since, keep, trackable, chunk_bytes }
}

fn classify(
    facts: &DiskFacts,
    previous: Option<&PreviousDisk>,
    ours: &str,
    chunk_bytes: u32,
) -> (TrackingState, Option<String>) {
    if let Some(why) = &facts.untrackable {
        return (TrackingState::Unsupported, Some(why.clone()));
    }
    let Some(previous) = previous else {
        return (TrackingState::First, Some("no earlier restore point of this disk in this repository".to_owned()));
    };
    if previous.size_bytes != facts.size_bytes {
        let reason = format!("the disk was {} bytes and is {} bytes now", previous.size_bytes, facts.size_bytes);
        return (TrackingState::Resized, Some(reason));
    }
    if previous.chunk_bytes != chunk_bytes {
        let reason = format!("the chunk size was {} bytes and is {chunk_bytes} bytes now", previous.chunk_bytes);
        return (TrackingState::Foreign, Some(reason));
    }
    let Some(wanted) = &previous.checkpoint else {
        return (TrackingState::Missing, Some("the previous restore point left no checkpoint on this disk".to_owned()));
    };
    match facts.bitmaps.iter().find(|bitmap| &bitmap.name == wanted) {
        Some(bitmap) if bitmap.broken => (
            TrackingState::InUse,
            Some(format!("bitmap {wanted} was not closed cleanly (QEMU crash or power cut) and cannot be trusted")),
        ),
        Some(bitmap) if !bitmap.recording => {
            (TrackingState::Foreign, Some(format!("bitmap {wanted} is disabled: something else stopped it recording")))
        }
        Some(_) => (TrackingState::Valid, None),
        None => match facts.bitmaps.iter().find(|bitmap| bitmap.name.starts_with(ours)) {
            Some(other) => (
                TrackingState::Foreign,
                Some(format!("bitmap {wanted} is gone; {} belongs to another restore point", other.name)),
            ),
            None => (
                TrackingState::Missing,
                Some(format!(
                    "bitmap {wanted} is gone (QEMU crash, power cut, disk replaced, or deleted by another tool)"
                )),
            ),
        },
    }
}

/// A checkpoint as the hypervisor lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFact {
    /// Name.
    pub name: String,
    /// Targets on which it has a bitmap, as far as the hypervisor believes.
    pub targets: Vec<String>,
}

/// One repair before the run. All are safe to repeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The hypervisor believes in a checkpoint whose bitmaps are gone or broken: forget the metadata only.
    ForgetCheckpoint {
        /// Checkpoint.
        name: String,
    },
    /// A complete checkpoint of ours that no restore point needs any more.
    DeleteCheckpoint {
        /// Checkpoint.
        name: String,
    },
    /// A bitmap of ours that no checkpoint owns and no disk will use.
    RemoveBitmap {
        /// Disk.
        target: String,
        /// Bitmap.
        bitmap: String,
    },
    /// Bitmaps are fine but the hypervisor has forgotten the checkpoint (migration, redefinition): tell it again.
    Redefine {
        /// Checkpoint.
        name: String,
        /// Disks on which its bitmap is usable.
        targets: Vec<String>,
    },
}

/// What must be put right so that exactly the bitmaps named by `decisions` are known and usable and no leftover of ours
/// remains. `ours` is the name prefix of this repository's checkpoints; others' are never touched. `elsewhere` names the
/// checkpoints that restore points of disks outside this run rely on; these stay too.
pub fn repairs(
    facts: &[DiskFacts],
    checkpoints: &[CheckpointFact],
    decisions: &[DiskDecision],
    elsewhere: &[String],
    ours: &str,
) -> Vec<Repair> {
    let in_run = |target: &str| facts.iter().any(|disk| disk.target == target);
    let has = |target: &str, name: &str| {
        facts
            .iter()
            .find(|disk| disk.target == target)
            .and_then(|disk| disk.bitmaps.iter().find(|bitmap| bitmap.name == name))
    };
    let mut repairs = Vec::new();
    let mut owned: Vec<(&str, &str)> = Vec::new();
    let mut known: Vec<&str> = Vec::new();
    for checkpoint in checkpoints.iter().filter(|checkpoint| checkpoint.name.starts_with(ours)) {
        let name = checkpoint.name.as_str();
        let needed: Vec<&str> = needing(decisions, name);
        // Nothing is known of disks outside this run; they count as sound until a run of theirs looks at them.
        let sound = checkpoint
            .targets
            .iter()
            .all(|target| !in_run(target) || has(target, name).is_some_and(|bitmap| !bitmap.broken));
        let covers = needed.iter().all(|target| checkpoint.targets.iter().any(|known| known == target));
        let wanted = !needed.is_empty() || elsewhere.iter().any(|kept| kept == name);
        match (wanted, sound && covers) {
            (true, true) => {
                known.push(name);
                owned.extend(checkpoint.targets.iter().map(|target| (target.as_str(), name)));
            }
            (false, true) => {
                repairs.push(Repair::DeleteCheckpoint { name: name.to_owned() });
                owned.extend(checkpoint.targets.iter().map(|target| (target.as_str(), name)));
            }
            // Unsound metadata is forgotten; what is usable of it is told again below.
            (_, false) => repairs.push(Repair::ForgetCheckpoint { name: name.to_owned() }),
        }
    }
    for disk in facts {
        for bitmap in disk.bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(ours)) {
            let used = decisions.iter().any(|decision| {
                decision.target == disk.target && decision.keep.as_deref() == Some(bitmap.name.as_str())
            });
            if !used && !owned.contains(&(disk.target.as_str(), bitmap.name.as_str())) {
                repairs.push(Repair::RemoveBitmap { target: disk.target.clone(), bitmap: bitmap.name.clone() });
            }
        }
    }
    let mut wanted: Vec<&str> = decisions.iter().filter_map(|decision| decision.keep.as_deref()).collect();
    wanted.sort_unstable();
    wanted.dedup();
    for name in wanted.into_iter().filter(|name| !known.contains(name)) {
        let targets = needing(decisions, name).into_iter().map(str::to_owned).collect();
        repairs.push(Repair::Redefine { name: name.to_owned(), targets });
    }
    repairs
}

fn needing<'a>(decisions: &'a [DiskDecision], checkpoint: &str) -> Vec<&'a str> {
    decisions
        .iter()
        .filter(|decision| decision.keep.as_deref() == Some(checkpoint))
        .map(|decision| decision.target.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "virtward-r-";
    const CHUNK: u32 = 1 << 20;

    fn disk(target: &str, bitmaps: &[(&str, bool)]) -> DiskFacts {
        DiskFacts {
            target: target.into(),
            size_bytes: 1 << 30,
            untrackable: None,
            bitmaps: bitmaps
                .iter()
                .map(|(name, broken)| BitmapFact { name: (*name).into(), broken: *broken, recording: !broken })
                .collect(),
        }
    }

    fn previous(checkpoint: Option<&str>) -> PreviousDisk {
        PreviousDisk {
            target: "vda".into(),
            size_bytes: 1 << 30,
            checkpoint: checkpoint.map(str::to_owned),
            chunk_bytes: CHUNK,
        }
    }

    fn state(facts: &DiskFacts, previous: Option<&PreviousDisk>) -> TrackingState {
        decide_disk(facts, previous, OURS, false).state
    }

    #[test]
    fn a_disk_keeps_the_chunk_size_that_it_began_with() {
        let mut facts = disk("vda", &[]);
        assert_eq!(decide_disk(&facts, None, OURS, false).chunk_bytes, SMALL_CHUNK_BYTES);
        assert_eq!(decide_disk(&facts, Some(&previous(None)), OURS, true).chunk_bytes, CHUNK);
        facts.size_bytes = 2 << 40;
        assert_eq!(decide_disk(&facts, None, OURS, false).chunk_bytes, LARGE_CHUNK_BYTES);
        let began_small = PreviousDisk { chunk_bytes: SMALL_CHUNK_BYTES, ..previous(None) };
        assert_eq!(decide_disk(&facts, Some(&began_small), OURS, false).chunk_bytes, SMALL_CHUNK_BYTES);
        let nonsense = PreviousDisk { chunk_bytes: 12_345, ..previous(None) };
        assert_eq!(decide_disk(&facts, Some(&nonsense), OURS, false).chunk_bytes, LARGE_CHUNK_BYTES);
    }

    #[test]
    fn every_state_is_told_apart_and_only_valid_is_trusted() {
        let ours = "virtward-r-1";
        let prev = previous(Some(ours));
        assert_eq!(state(&disk("vda", &[(ours, false)]), Some(&prev)), TrackingState::Valid);
        assert_eq!(state(&disk("vda", &[(ours, false)]), None), TrackingState::First);
        assert_eq!(state(&disk("vda", &[]), Some(&prev)), TrackingState::Missing);
        assert_eq!(state(&disk("vda", &[("other", false)]), Some(&prev)), TrackingState::Missing);
        assert_eq!(state(&disk("vda", &[(ours, true)]), Some(&prev)), TrackingState::InUse);
        assert_eq!(state(&disk("vda", &[("virtward-r-0", false)]), Some(&prev)), TrackingState::Foreign);
        assert_eq!(state(&disk("vda", &[(ours, false)]), Some(&previous(None))), TrackingState::Missing);
        let mut grown = disk("vda", &[(ours, false)]);
        grown.size_bytes += 512;
        assert_eq!(state(&grown, Some(&prev)), TrackingState::Resized);
        let mut raw = disk("vda", &[]);
        raw.untrackable = Some("raw images hold no bitmap".into());
        assert_eq!(state(&raw, Some(&prev)), TrackingState::Unsupported);
        let mut disabled = disk("vda", &[(ours, false)]);
        disabled.bitmaps[0].recording = false;
        assert_eq!(state(&disabled, Some(&prev)), TrackingState::Foreign);
        for facts in [&grown, &raw, &disabled] {
            let decision = decide_disk(facts, Some(&prev), OURS, false);
            assert_eq!(decision.since, None);
            assert!(decision.reason.is_some());
        }
        let asked = decide_disk(&disk("vda", &[(ours, false)]), Some(&prev), OURS, true);
        assert_eq!((asked.state, asked.since, asked.keep.as_deref()), (TrackingState::Valid, None, Some(ours)));
        let nonsense = PreviousDisk { chunk_bytes: 12_345, ..prev };
        assert_eq!(decide_disk(&disk("vda", &[(ours, false)]), Some(&nonsense), OURS, false).since, None);
    }

    fn decision(target: &str, since: Option<&str>) -> DiskDecision {
        DiskDecision {
            target: target.into(),
            state: if since.is_some() { TrackingState::Valid } else { TrackingState::Missing },
            reason: None,
            since: since.map(str::to_owned),
            keep: since.map(str::to_owned),
            trackable: true,
            chunk_bytes: CHUNK,
        }
    }

    fn checkpoint(name: &str, targets: &[&str]) -> CheckpointFact {
        CheckpointFact { name: name.into(), targets: targets.iter().map(|target| (*target).into()).collect() }
    }

    #[test]
    fn a_healthy_vm_needs_no_repair() {
        let facts = [disk("vda", &[("virtward-r-1", false)]), disk("vdb", &[("virtward-r-1", false)])];
        let decisions = [decision("vda", Some("virtward-r-1")), decision("vdb", Some("virtward-r-1"))];
        assert_eq!(repairs(&facts, &[checkpoint("virtward-r-1", &["vda", "vdb"])], &decisions, &[], OURS), []);
    }

    #[test]
    fn a_migrated_vm_gets_its_checkpoint_told_again() {
        let facts = [disk("vda", &[("virtward-r-1", false)])];
        let decisions = [decision("vda", Some("virtward-r-1"))];
        assert_eq!(
            repairs(&facts, &[], &decisions, &[], OURS),
            [Repair::Redefine { name: "virtward-r-1".into(), targets: vec!["vda".into()] }]
        );
    }

    #[test]
    fn one_broken_disk_does_not_cost_the_others_their_tracking() {
        let facts = [disk("vda", &[("virtward-r-1", false)]), disk("vdb", &[("virtward-r-1", true)])];
        let decisions = [decision("vda", Some("virtward-r-1")), decision("vdb", None)];
        assert_eq!(
            repairs(&facts, &[checkpoint("virtward-r-1", &["vda", "vdb"])], &decisions, &[], OURS),
            [
                Repair::ForgetCheckpoint { name: "virtward-r-1".into() },
                Repair::RemoveBitmap { target: "vdb".into(), bitmap: "virtward-r-1".into() },
                Repair::Redefine { name: "virtward-r-1".into(), targets: vec!["vda".into()] },
            ]
        );
    }

    #[test]
    fn leftovers_of_a_killed_run_go_and_others_checkpoints_stay() {
        let facts = [disk("vda", &[("virtward-r-1", false), ("virtward-r-2", false), ("nightly", false)])];
        let decisions = [decision("vda", Some("virtward-r-1"))];
        let checkpoints = [
            checkpoint("nightly", &["vda"]),
            checkpoint("virtward-r-1", &["vda"]),
            checkpoint("virtward-r-2", &["vda"]),
        ];
        assert_eq!(
            repairs(&facts, &checkpoints, &decisions, &[], OURS),
            [Repair::DeleteCheckpoint { name: "virtward-r-2".into() }]
        );
    }

    #[test]
    fn a_full_read_that_may_fail_leaves_the_tracking_of_the_last_restore_point_alone() {
        let facts = [disk("vda", &[("virtward-r-1", false)])];
        let decisions = [decide_disk(&facts[0], Some(&previous(Some("virtward-r-1"))), OURS, true)];
        assert_eq!(repairs(&facts, &[checkpoint("virtward-r-1", &["vda"])], &decisions, &[], OURS), []);
    }

    #[test]
    fn a_run_of_one_disk_leaves_the_tracking_of_the_other_alone() {
        let facts = [disk("vda", &[("virtward-r-1", false), ("virtward-r-2", false)])];
        let decisions = [decision("vda", Some("virtward-r-2"))];
        let checkpoints = [checkpoint("virtward-r-1", &["vda", "vdb"]), checkpoint("virtward-r-2", &["vda"])];
        assert_eq!(repairs(&facts, &checkpoints, &decisions, &["virtward-r-1".into()], OURS), []);
        assert_eq!(
            repairs(&facts, &checkpoints, &decisions, &[], OURS),
            [Repair::DeleteCheckpoint { name: "virtward-r-1".into() }]
        );
    }
}
