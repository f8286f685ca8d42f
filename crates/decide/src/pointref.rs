//! Which restore point a person means: `web1@latest`, `web1@2026-11-22T10:00`, `4f1c…`.
//!
//! A time means the newest restore point at or before it. What was not written counts as included: `T10:00` reaches to
//! the end of that minute and a bare date to the end of that day, because lists show times rounded down in that way.
//! Nothing is guessed: no match is an error that names what comes near.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use jiff::{Timestamp, civil, tz::TimeZone};
use uuid::Uuid;
use virtward_model::{PointId, RestorePoint};

/// A restore point that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved<'a> {
    /// The restore point.
    pub point: &'a RestorePoint,
    /// What the person should know of the choice (another VM has the same name).
    pub note: Option<String>,
}

/// Why no restore point was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PointRefError {
    /// Not written in any known way.
    #[error("{text:?} names no restore point: {why}")]
    Syntax {
        /// What was written.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// No restore point of such a VM.
    #[error("no VM {vm} in the repository{}", DidYouMean(near))]
    NoVm {
        /// What was written.
        vm: String,
        /// Names that come near, nearest first; all names if they are few and none comes near.
        near: Vec<String>,
    },
    /// The VM is known, but nothing is as old as that.
    #[error("no restore point of {vm} at or before {asked}; the oldest is {oldest}")]
    NoneBefore {
        /// VM.
        vm: String,
        /// The time as it was understood.
        asked: String,
        /// `id, time` of the oldest.
        oldest: String,
    },
    /// No id begins like that.
    #[error("no restore point {text} in the repository{}", DidYouMean(near))]
    NoId {
        /// What was written.
        text: String,
        /// Other ways to write what may have been meant.
        near: Vec<String>,
    },
    /// Several ids begin like that.
    #[error("{text} is the beginning of {} restore points: {}", candidates.len(), candidates.join(", "))]
    Ambiguous {
        /// What was written.
        text: String,
        /// Enough of each id to tell it apart, with VM and time.
        candidates: Vec<String>,
    },
}

struct DidYouMean<'a>(&'a [String]);

impl fmt::Display for DidYouMean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => Ok(()),
            [one] => write!(f, "; did you mean {one}?"),
            [firsts @ .., last] => write!(f, "; did you mean {} or {last}?", firsts.join(", ")),
        }
    }
}

/// Finds the restore point that `text` means. Times without a zone are in `zone`.
pub fn resolve<'a>(points: &'a [RestorePoint], text: &str, zone: &TimeZone) -> Result<Resolved<'a>, PointRefError> {
    match text.rsplit_once('@') {
        Some((vm, when)) => by_time(points, text, vm, when, zone),
        None => by_id(points, text, zone),
    }
}

fn by_time<'a>(
    points: &'a [RestorePoint],
    text: &str,
    vm: &str,
    when: &str,
    zone: &TimeZone,
) -> Result<Resolved<'a>, PointRefError> {
    let latest = when.eq_ignore_ascii_case("latest");
    let limit = if latest { Timestamp::MAX } else { end_of(text, when, zone)? };
    if vm.is_empty() {
        return Err(syntax(text, "the name of the VM is missing before the @"));
    }
    let of_vm = of_vm(points, vm);
    let Some(oldest) = of_vm.iter().copied().min_by_key(|point| point.taken) else {
        return Err(no_vm(points, vm));
    };
    let newest = of_vm.iter().copied().filter(|point| point.taken <= limit).max_by_key(|point| (point.taken, point.id));
    let Some(point) = newest else {
        return Err(PointRefError::NoneBefore {
            vm: vm.to_owned(),
            asked: show_time(limit, zone),
            oldest: format!("{}, {}", short_id(points, oldest), show_time(oldest.taken, zone)),
        });
    };
    let owners: BTreeSet<Uuid> = of_vm.iter().map(|point| point.vm_uuid).collect();
    let note = (owners.len() > 1).then(|| {
        format!(
            "{} different VMs called {vm} are in the repository; this is the one with UUID {} on host {}",
            owners.len(),
            point.vm_uuid,
            point.host
        )
    });
    Ok(Resolved { point, note })
}

/// The error for a VM that has no restore point, with the names that come near.
pub fn no_vm(points: &[RestorePoint], vm: &str) -> PointRefError {
    PointRefError::NoVm { vm: vm.to_owned(), near: near_vms(points, vm) }
}

/// The restore points of the VM with this name or UUID; `image/NAME` means image sets only.
pub fn of_vm<'a>(points: &'a [RestorePoint], vm: &str) -> Vec<&'a RestorePoint> {
    let uuid = Uuid::parse_str(vm).ok();
    let image = vm.strip_prefix("image/");
    points
        .iter()
        .filter(|point| {
            point.vm == vm
                || uuid.is_some_and(|uuid| !uuid.is_nil() && uuid == point.vm_uuid)
                || (point.vm_uuid.is_nil() && image == Some(point.vm.as_str()))
        })
        .collect()
}

fn by_id<'a>(points: &'a [RestorePoint], text: &str, zone: &TimeZone) -> Result<Resolved<'a>, PointRefError> {
    let wanted = text.to_ascii_lowercase();
    let hex = !wanted.is_empty() && wanted.len() <= 32 && wanted.bytes().all(|byte| byte.is_ascii_hexdigit());
    let found: Vec<&RestorePoint> = match hex {
        true => points.iter().filter(|point| point.id.to_string().starts_with(&wanted)).collect(),
        false => Vec::new(),
    };
    match found[..] {
        [point] => return Ok(Resolved { point, note: None }),
        [] => {}
        _ => {
            let mut found = found;
            found.sort_by_key(|point| std::cmp::Reverse(point.taken));
            let name = |point: &&RestorePoint| {
                format!("{} ({}, {})", short_id(points, point), point.vm, show_time(point.taken, zone))
            };
            let candidates = found.iter().map(name).collect();
            return Err(PointRefError::Ambiguous { text: text.to_owned(), candidates });
        }
    }
    if !of_vm(points, text).is_empty() {
        return Err(PointRefError::NoId { text: text.to_owned(), near: vec![format!("{text}@latest")] });
    }
    if hex {
        return Err(PointRefError::NoId { text: text.to_owned(), near: Vec::new() });
    }
    let near: Vec<String> = near_vms(points, text).into_iter().map(|vm| format!("{vm}@latest")).collect();
    match near.is_empty() {
        true => Err(syntax(text, "write VM@latest, VM@TIME, or the beginning of an id")),
        false => Err(PointRefError::NoId { text: text.to_owned(), near }),
    }
}

fn syntax(text: &str, why: impl Into<String>) -> PointRefError {
    PointRefError::Syntax { text: text.to_owned(), why: why.into() }
}

/// The last instant that `when` includes.
fn end_of(text: &str, when: &str, zone: &TimeZone) -> Result<Timestamp, PointRefError> {
    let bad = || {
        syntax(
            text,
            format!(
                "{when:?} is not a time; write it like 2026-11-22, 2026-11-22T10:00 or 2026-11-22T10:00:00Z, or latest"
            ),
        )
    };
    let (date, rest) = match when.find(['T', 't', ' ']) {
        Some(at) => (&when[..at], &when[at + 1..]),
        None => (when, ""),
    };
    let date: civil::Date = date.parse().map_err(|_| bad())?;
    let at = rest.find(['Z', 'z', '+', '-']).unwrap_or(rest.len());
    let (clock, offset) = rest.split_at(at);
    let zone = match offset {
        "" => zone.clone(),
        "Z" | "z" => TimeZone::UTC,
        offset => fixed_zone(offset).ok_or_else(bad)?,
    };
    let (time, unit_ns): (civil::Time, i128) = match clock.len() {
        0 if !offset.is_empty() || when.len() > 10 => return Err(bad()),
        0 => (civil::Time::MAX, 1),
        2 => (format!("{clock}:00").parse().map_err(|_| bad())?, 3_600_000_000_000),
        5 => (clock.parse().map_err(|_| bad())?, 60_000_000_000),
        8 => (clock.parse().map_err(|_| bad())?, 1_000_000_000),
        _ => (clock.parse().map_err(|_| bad())?, 1),
    };
    let start = zone.to_zoned(date.to_datetime(time)).map_err(|_| bad())?.timestamp();
    Ok(Timestamp::from_nanosecond(start.as_nanosecond() + unit_ns - 1).unwrap_or(Timestamp::MAX))
}

/// `+01:00`, `+0100`, `-05`.
fn fixed_zone(offset: &str) -> Option<TimeZone> {
    let digits: String = offset[1..].chars().filter(|c| *c != ':').collect();
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) || !(digits.len() == 2 || digits.len() == 4) {
        return None;
    }
    let hours: i32 = digits[..2].parse().ok()?;
    let minutes: i32 = if digits.len() == 4 { digits[2..].parse().ok()? } else { 0 };
    let seconds = (hours * 60 + minutes) * 60;
    let signed = if offset.starts_with('-') { -seconds } else { seconds };
    (minutes < 60).then(|| jiff::tz::Offset::from_seconds(signed).ok().map(TimeZone::fixed)).flatten()
}

/// A time as people are shown it: to the second, in their zone, with its offset.
pub fn show_time(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
}

/// How ids are shown beside each other: the shortest beginning of each, at least 8 digits, that no other one shares.
pub struct ShortIds {
    /// In order, so that the id which shares most with another stands next to it.
    sorted: Vec<PointId>,
}

impl ShortIds {
    /// For the ids of all points.
    pub fn new(points: &[RestorePoint]) -> Self {
        let mut sorted: Vec<PointId> = points.iter().map(|point| point.id).collect();
        sorted.sort_unstable();
        sorted.dedup();
        Self { sorted }
    }

    /// The short id of a point.
    pub fn of(&self, point: &RestorePoint) -> String {
        let (below, rest) = self.sorted.split_at(self.sorted.partition_point(|other| *other < point.id));
        let above = rest.iter().find(|other| **other != point.id);
        let shared = |other: &PointId| {
            let differs = u128::from_be_bytes(other.0) ^ u128::from_be_bytes(point.id.0);
            differs.leading_zeros() as usize / 4
        };
        let longest = below.last().into_iter().chain(above).map(shared).max().unwrap_or(0);
        let id = point.id.to_string();
        id[..(longest + 1).clamp(8, id.len())].to_owned()
    }
}

/// The short id of one restore point; [`ShortIds`] for many.
pub fn short_id(points: &[RestorePoint], point: &RestorePoint) -> String {
    ShortIds::new(points).of(point)
}

/// VM names that come near; every name if there are no more than three.
fn near_vms(points: &[RestorePoint], vm: &str) -> Vec<String> {
    let names: BTreeMap<&str, ()> = points.iter().map(|point| (point.vm.as_str(), ())).collect();
    let near = nearest(vm, names.keys().copied());
    match near.is_empty() && names.len() <= 3 {
        true => names.keys().map(|name| (*name).to_owned()).collect(),
        false => near,
    }
}

/// Up to three of `known` that `text` may be a misspelling of, nearest first.
pub fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    // Names come from files and repositories; the comparison is quadratic in their length.
    const LONGEST: usize = 256;
    if text.len() > LONGEST {
        return Vec::new();
    }
    let allowed = 1 + text.chars().count() / 4;
    let mut near: Vec<(usize, &str)> = known
        .into_iter()
        .filter(|name| name.len() <= LONGEST)
        .map(|name| (distance(&text.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(distance, _)| *distance <= allowed)
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
}

/// Edits (insert, delete, replace, swap neighbours) between two texts.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before_last[j - 2] + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtward_model::{BackupKind, QuiesceOutcome, QuiesceRecord, QuiesceRequest, SourceKind};

    use super::*;

    fn point(id: u128, vm: &str, uuid: u128, taken: &str) -> RestorePoint {
        let taken: Timestamp = taken.parse().unwrap();
        RestorePoint {
            id: PointId(id.to_be_bytes()),
            vm: vm.into(),
            vm_uuid: Uuid::from_u128(uuid),
            host: "h1".into(),
            source: SourceKind::Hot,
            kind: BackupKind::Full,
            taken,
            started: taken,
            finished: taken,
            parent: None,
            quiesce: QuiesceRecord {
                requested: QuiesceRequest::Auto,
                outcome: QuiesceOutcome::Frozen,
                frozen_ms: None,
                reason: None,
            },
            disks: Vec::new(),
            skipped: Vec::new(),
            tags: Vec::new(),
            warnings: Vec::new(),
            copied_from: None,
        }
    }

    const A: u128 = 0x4f1c_0000_0000_0000_0000_0000_0000_0001;
    const B: u128 = 0x4f1d_0000_0000_0000_0000_0000_0000_0002;
    const C: u128 = 0x9000_0000_0000_0000_0000_0000_0000_0003;
    const D: u128 = 0xa000_0000_0000_0000_0000_0000_0000_0004;

    fn points() -> Vec<RestorePoint> {
        vec![
            point(B, "web1", 1, "2026-11-22T10:00:20.7Z"),
            point(A, "web1", 1, "2026-11-21T10:00:00Z"),
            point(C, "db", 2, "2026-11-23T00:30:00Z"),
            point(D, "disks", 0, "2026-11-20T00:00:00Z"),
        ]
    }

    fn berlin() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    fn found(text: &str, zone: &TimeZone) -> u128 {
        let points = points();
        let resolved = resolve(&points, text, zone).unwrap_or_else(|error| panic!("{text}: {error}"));
        u128::from_be_bytes(resolved.point.id.0)
    }

    fn refused(text: &str) -> String {
        resolve(&points(), text, &TimeZone::UTC).unwrap_err().to_string()
    }

    #[test]
    fn latest_is_the_newest_of_that_vm() {
        assert_eq!(found("web1@latest", &TimeZone::UTC), B);
        assert_eq!(found("web1@LATEST", &TimeZone::UTC), B);
        assert_eq!(found("00000000-0000-0000-0000-000000000002@latest", &TimeZone::UTC), C);
        assert_eq!(found("image/disks@latest", &TimeZone::UTC), D);
        assert_eq!(found("disks@latest", &TimeZone::UTC), D);
    }

    #[test]
    fn a_time_is_the_newest_at_or_before_it() {
        for (text, id) in [
            ("web1@2026-11-22T10:00:19Z", A),
            ("web1@2026-11-22T10:00:20Z", B),
            ("web1@2026-11-22T10:00:20.6Z", A),
            ("web1@2026-11-22T10:00Z", B),
            ("web1@2026-11-22 10:00", B),
            ("web1@2026-11-22T09:59", A),
            ("web1@2026-11-22T10", B),
            ("web1@2026-11-22", B),
            ("web1@2026-11-21", A),
            ("web1@2026-11-22T11:00+01:00", B),
            ("web1@2026-11-22T10:00+01:00", A),
            ("web1@2026-11-22T05:00-0500", B),
        ] {
            assert_eq!(found(text, &TimeZone::UTC), id, "{text}");
        }
        assert_eq!(found("web1@2026-11-22T10:00", &berlin()), A);
        assert_eq!(found("web1@2026-11-22T11:00", &berlin()), B);
    }

    #[test]
    fn ids_by_their_beginning() {
        assert_eq!(found("4f1c", &TimeZone::UTC), A);
        assert_eq!(found("9", &TimeZone::UTC), C);
        assert_eq!(found("4F1D00000000000000000000000000", &TimeZone::UTC), B);
        let error = refused("4f1");
        assert!(
            error.starts_with("4f1 is the beginning of 2 restore points: 4f1d0000 (web1, 2026-11-22T10:00:20+00:00)")
        );
        assert_eq!(refused("ffff"), "no restore point ffff in the repository");
    }

    #[test]
    fn what_is_not_there_is_said_with_what_comes_near() {
        assert_eq!(refused("web01@latest"), "no VM web01 in the repository; did you mean web1?");
        assert_eq!(refused("web1"), "no restore point web1 in the repository; did you mean web1@latest?");
        assert_eq!(refused("db"), "no restore point db in the repository; did you mean db@latest?");
        assert_eq!(refused("zzz@latest"), "no VM zzz in the repository; did you mean db, disks or web1?");
        assert_eq!(
            refused("web1@2026-11-20"),
            "no restore point of web1 at or before 2026-11-20T23:59:59+00:00; the oldest is 4f1c0000, \
             2026-11-21T10:00:00+00:00"
        );
        assert_eq!(
            resolve(&[], "web1@latest", &TimeZone::UTC).unwrap_err().to_string(),
            "no VM web1 in the repository"
        );
    }

    #[test]
    fn nonsense_is_refused_without_a_guess() {
        for text in [
            "",
            "@",
            "@latest",
            "web1@",
            "web1@yesterday",
            "web1@2026-13-01",
            "web1@2026-11-22T",
            "web1@2026-11-22T25:00",
            "web1@2026-11-22T10:00+9999",
            "web1@2026-11-22Z",
            "web1@2026-11-22T10:0",
            "web1@2026-11-22T10:00+é",
        ] {
            assert!(resolve(&points(), text, &TimeZone::UTC).is_err(), "{text}");
        }
        assert!(refused("web1@yesterday").contains("2026-11-22T10:00"));
    }

    #[test]
    fn two_vms_of_one_name_are_pointed_out() {
        let mut points = points();
        points.push(point(7, "web1", 9, "2026-11-23T10:00:00Z"));
        let resolved = resolve(&points, "web1@latest", &TimeZone::UTC).unwrap();
        assert_eq!(resolved.point.vm_uuid, Uuid::from_u128(9));
        assert!(resolved.note.unwrap().contains("2 different VMs called web1"));
    }

    #[test]
    fn short_ids_stay_unique() {
        let mut points = points();
        points.push(point(A + 5, "web1", 1, "2026-11-23T10:00:00Z"));
        assert_eq!(short_id(&points, &points[2]), "90000000");
        assert_eq!(short_id(&points, &points[1]).len(), 32);
    }

    proptest! {
        #[test]
        fn a_short_id_is_the_beginning_of_one_id_alone(
            ids in proptest::collection::vec((0u128..3, 0u32..120, 0u128..4), 1..12),
        ) {
            let ids = ids.into_iter().map(|(high, shift, low)| high << shift << 8 | low);
            let points: Vec<_> = ids.map(|id| point(id, "web1", 1, "2026-11-23T10:00:00Z")).collect();
            let short = ShortIds::new(&points);
            for point in &points {
                let text = short.of(point);
                let same = |other: &&RestorePoint| other.id.to_string().starts_with(&text);
                prop_assert!(points.iter().filter(same).all(|other| other.id == point.id), "{}", text);
                let shorter = &text[..text.len() - 1];
                let others = points.iter().filter(|other| other.id != point.id);
                let needed = others.clone().any(|other| other.id.to_string().starts_with(shorter));
                prop_assert!(text.len() == 8 || needed, "{} is longer than it must be", text);
            }
        }
    }

    #[test]
    fn near_names_allow_a_slip_and_no_more() {
        let known = ["bandwidth", "quiesce", "repo"];
        assert_eq!(nearest("bandwith", known), ["bandwidth"]);
        assert_eq!(nearest("qiuesce", known), ["quiesce"]);
        assert_eq!(nearest("Repo", known), ["repo"]);
        assert!(nearest("nothing", known).is_empty());
        assert!(nearest(&"x".repeat(10_000), known).is_empty());
    }
}
