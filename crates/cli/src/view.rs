//! Restore points as they leave the program: one JSON shape for `backup run`, `image`, `list` and `show`, and tables.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;
use virtward_decide::pointref::ShortIds;
use virtward_model::{
    BackupKind, Bytes, CopiedFrom, DiskRecord, PointId, QuiesceOutcome, QuiesceRequest, RestorePoint, SourceKind,
    TrackingState,
};
use virtward_repo::Hold;

use crate::render::{self, Table};

/// A restore point as JSON. Fields are added, never renamed or removed.
#[derive(Debug, Serialize)]
pub struct PointView<'a> {
    vm: &'a str,
    id: PointId,
    kind: BackupKind,
    started: Timestamp,
    finished: Timestamp,
    quiesce: QuiesceView<'a>,
    disks: Vec<DiskView<'a>>,
    uuid: Uuid,
    host: &'a str,
    source: SourceKind,
    taken: Timestamp,
    duration_ms: u64,
    parent: Option<PointId>,
    skipped: &'a [String],
    tags: &'a [String],
    warnings: &'a [String],
    held: Option<&'a str>,
    copied_from: Option<&'a CopiedFrom>,
}

#[derive(Debug, Serialize)]
struct QuiesceView<'a> {
    requested: QuiesceRequest,
    outcome: QuiesceOutcome,
    frozen_ms: Option<u64>,
    reason: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct DiskView<'a> {
    target: &'a str,
    size_bytes: u64,
    read_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    tracking: TrackingState,
    reason: Option<&'a str>,
    sampled_bytes: u64,
    data_bytes: u64,
    chunk_bytes: u32,
    format: &'a str,
    source: &'a str,
}

impl<'a> From<&'a RestorePoint> for PointView<'a> {
    fn from(point: &'a RestorePoint) -> Self {
        Self {
            vm: &point.vm,
            id: point.id,
            kind: point.kind,
            started: point.started,
            finished: point.finished,
            quiesce: QuiesceView {
                requested: point.quiesce.requested,
                outcome: point.quiesce.outcome,
                frozen_ms: point.quiesce.frozen_ms,
                reason: point.quiesce.reason.as_deref(),
            },
            disks: point.disks.iter().map(DiskView::from).collect(),
            uuid: point.vm_uuid,
            host: &point.host,
            source: point.source,
            taken: point.taken,
            duration_ms: duration_ms(point),
            parent: point.parent,
            skipped: &point.skipped,
            tags: &point.tags,
            warnings: &point.warnings,
            held: None,
            copied_from: point.copied_from.as_ref(),
        }
    }
}

impl<'a> PointView<'a> {
    /// Says why it is held, if it is.
    pub fn held(mut self, holds: &'a Holds) -> Self {
        self.held = holds.get(&self.id).map(|hold| &*hold.reason);
        self
    }
}

/// Holds by restore point.
pub type Holds = BTreeMap<PointId, Hold>;

impl<'a> From<&'a DiskRecord> for DiskView<'a> {
    fn from(disk: &'a DiskRecord) -> Self {
        Self {
            target: &disk.target,
            size_bytes: disk.size_bytes,
            read_bytes: disk.read_bytes,
            new_bytes: disk.new_bytes,
            stored_bytes: disk.stored_bytes,
            tracking: disk.tracking.state,
            reason: disk.tracking.reason.as_deref(),
            sampled_bytes: disk.sampled_bytes,
            data_bytes: disk.data_bytes,
            chunk_bytes: disk.chunk_bytes,
            format: &disk.format,
            source: &disk.source,
        }
    }
}

/// How long the run took.
pub fn duration_ms(point: &RestorePoint) -> u64 {
    let ms = point.finished.as_millisecond() - point.started.as_millisecond();
    u64::try_from(ms).unwrap_or(0)
}

fn sum(point: &RestorePoint, of: impl Fn(&DiskRecord) -> u64) -> Bytes {
    Bytes(point.disks.iter().fold(0, |sum, disk| sum.saturating_add(of(disk))))
}

/// Restore points as a table, in the order given. Ids are shortened as far as they stay unique among `all`.
pub fn list(points: &[&RestorePoint], all: &[RestorePoint], holds: &Holds, now: Timestamp) -> Table {
    let headings = ["ID", "VM", "TAKEN", "AGE", "KIND", "SOURCE", "QUIESCE", ">SIZE", ">READ", ">STORED", "HELD"];
    // Where nothing is held there is no such column.
    let shown = headings.len() - usize::from(!points.iter().any(|point| holds.contains_key(&point.id)));
    let mut table = Table::new(&headings[..shown]);
    let ids = ShortIds::new(all);
    for point in points {
        table.row([
            ids.of(point),
            point.vm.clone(),
            render::local_time(point.taken),
            render::age(point.taken, now),
            render::word(&point.kind),
            render::word(&point.source),
            render::word(&point.quiesce.outcome),
            sum(point, |disk| disk.size_bytes).to_string(),
            sum(point, |disk| disk.read_bytes).to_string(),
            sum(point, |disk| disk.stored_bytes).to_string(),
            holds.get(&point.id).map(|hold| hold.reason.clone()).unwrap_or_default(),
        ]);
    }
    table
}

/// The disks of a restore point as a table.
pub fn disks(point: &RestorePoint) -> Table {
    let mut table = Table::new(&["DISK", ">SIZE", ">DATA", ">READ", ">NEW", ">STORED", "TRACKING", "REASON"]);
    for disk in &point.disks {
        table.row([
            disk.target.clone(),
            Bytes(disk.size_bytes).to_string(),
            Bytes(disk.data_bytes).to_string(),
            Bytes(disk.read_bytes).to_string(),
            Bytes(disk.new_bytes).to_string(),
            Bytes(disk.stored_bytes).to_string(),
            render::word(&disk.tracking.state),
            disk.tracking.reason.clone().unwrap_or_default(),
        ]);
    }
    table
}

/// What a backup run says when it is done: one line, its disks, what was left out. Warnings were shown as they came.
pub fn summary(point: &RestorePoint, bold: bool) -> String {
    let quiesce = match (&point.quiesce.outcome, point.quiesce.frozen_ms, &point.quiesce.reason) {
        (QuiesceOutcome::Frozen, Some(ms), _) => format!("frozen for {ms} ms"),
        (QuiesceOutcome::NotNeeded, _, _) => "not quiesced".to_owned(),
        (outcome, _, Some(reason)) => format!("crash-consistent ({}: {reason})", render::word(outcome)),
        (outcome, _, None) => render::word(outcome),
    };
    let head = format!(
        "{}: {} {} backup {} in {}, {} read, {} stored, {quiesce}",
        point.vm,
        render::word(&point.source),
        render::word(&point.kind),
        point.id,
        render::duration_ms(duration_ms(point)),
        sum(point, |disk| disk.read_bytes),
        sum(point, |disk| disk.stored_bytes),
    );
    let mut text = render::printable(&head);
    text.push('\n');
    for line in disks(point).render(bold).lines() {
        text.push_str(&format!("  {line}\n"));
    }
    for skipped in &point.skipped {
        text.push_str(&format!("  skipped {}\n", render::printable(skipped)));
    }
    text
}

#[cfg(test)]
pub mod tests {
    use virtward_model::{QuiesceRecord, TrackingRecord};

    use super::*;

    pub fn point() -> RestorePoint {
        RestorePoint {
            id: PointId([0x4f; 16]),
            vm: "web1".into(),
            vm_uuid: Uuid::from_u128(1),
            host: "h1".into(),
            source: SourceKind::Hot,
            kind: BackupKind::Incremental,
            taken: "2026-11-22T10:00:00Z".parse().unwrap(),
            started: "2026-11-22T10:00:00Z".parse().unwrap(),
            finished: "2026-11-22T10:00:01.500Z".parse().unwrap(),
            parent: None,
            quiesce: QuiesceRecord {
                requested: QuiesceRequest::Auto,
                outcome: QuiesceOutcome::Frozen,
                frozen_ms: Some(31),
                reason: None,
            },
            disks: vec![DiskRecord {
                target: "vda".into(),
                size_bytes: 2 << 30,
                chunk_bytes: 1 << 20,
                format: "qcow2".into(),
                source: "/images/web1.qcow2".into(),
                root: String::new(),
                read_bytes: 17 << 20,
                sampled_bytes: 4 << 20,
                new_bytes: 16 << 20,
                stored_bytes: 16 << 20,
                data_bytes: 600 << 20,
                tracking: TrackingRecord { state: TrackingState::Valid, reason: None, checkpoint: None },
            }],
            skipped: vec!["sda: CD-ROM".into()],
            tags: Vec::new(),
            warnings: Vec::new(),
            copied_from: None,
        }
    }

    #[test]
    fn the_json_object_is_the_promised_one() {
        let json = serde_json::to_string(&PointView::from(&point())).unwrap();
        assert_eq!(
            json,
            concat!(
                r#"{"vm":"web1","id":"4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f","kind":"incremental","#,
                r#""started":"2026-11-22T10:00:00Z","finished":"2026-11-22T10:00:01.5Z","#,
                r#""quiesce":{"requested":"auto","outcome":"frozen","frozen_ms":31,"reason":null},"#,
                r#""disks":[{"target":"vda","size_bytes":2147483648,"read_bytes":17825792,"new_bytes":16777216,"#,
                r#""stored_bytes":16777216,"tracking":"valid","reason":null,"sampled_bytes":4194304,"data_bytes":629145600,"#,
                r#""chunk_bytes":1048576,"format":"qcow2","source":"/images/web1.qcow2"}],"#,
                r#""uuid":"00000000-0000-0000-0000-000000000001","host":"h1","source":"hot","#,
                r#""taken":"2026-11-22T10:00:00Z","duration_ms":1500,"parent":null,"#,
                r#""skipped":["sda: CD-ROM"],"tags":[],"warnings":[],"held":null,"copied_from":null}"#
            )
        );
    }

    #[test]
    fn the_summary_says_what_was_read_and_stored() {
        assert_eq!(
            summary(&point(), false),
            "web1: hot incremental backup 4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f in 1.5 s, 17.0 MiB read, 16.0 MiB stored, \
             frozen for 31 ms\n\
             \x20 DISK     SIZE       DATA      READ       NEW    STORED  TRACKING  REASON\n\
             \x20 vda   2.0 GiB  600.0 MiB  17.0 MiB  16.0 MiB  16.0 MiB  valid\n\
             \x20 skipped sda: CD-ROM\n"
        );
    }
}
