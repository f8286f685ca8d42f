//! Entry point that feeds arbitrary bytes to the parsers of what people write, for the fuzz target and for tests alike.

use std::{
    fmt::{Debug, Display},
    str::FromStr,
};

use jiff::{
    Timestamp,
    tz::{TimeZone, TimeZoneDatabase},
};
use virtward_model::{
    Age, BackupKind, Bytes, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, Seconds, SourceKind,
    TimeOfDay, Weekday,
    select::{Pattern, Rule},
};

use crate::{
    pointref,
    policy::{check::Known, file},
    schedule::cron::Cron,
};

/// Names of restore points, policies, schedules, sizes and ages. Whatever is read can be written again and reads the same.
pub fn words(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let zone = TimeZone::UTC;
    let points = [point(1, "web1"), point(0x10 << 120, "web1"), point(0x11 << 120, "größe@1")];
    match pointref::resolve(&points, text, &zone) {
        Ok(resolved) => assert!(points.contains(resolved.point)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let _ = pointref::nearest(text, ["web1", "größe@1"]);
    policies(text);
    if let Ok(cron) = Cron::parse(text) {
        let now = Timestamp::UNIX_EPOCH;
        if let Some(next) = cron.next_after(now, &zone) {
            assert!(next > now);
            assert!(cron.last_until(next, &zone).is_some_and(|last| last == next));
        }
    }
    if let Ok(size) = text.parse::<Bytes>() {
        assert_eq!(size.exact().parse(), Ok(size));
    }
    same::<Age>(text);
    same::<Seconds>(text);
    same::<TimeOfDay>(text);
    same::<PointId>(text);
    let _ = text.parse::<Weekday>();
    let _ = text.parse::<Rule>();
    let _ = Pattern::new(text).matches("web1");
    let _ = Pattern::new("w*b?").matches(text);
}

/// What can be read can be written, and reads the same.
fn same<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        assert_eq!(value.to_string().parse::<T>().ok().as_ref(), Some(&value), "{text:?}");
    }
}

fn policies(text: &str) {
    let zones = TimeZoneDatabase::bundled();
    let known = Known { zones: &zones, repositories: None, hosts: None };
    match file::parse("policies.toml", text, &known) {
        Ok(policies) => {
            let written = file::render(&policies).expect("policies can be written");
            assert_eq!(file::parse("policies.toml", &written, &known).as_ref(), Ok(&policies), "{written}");
        }
        Err(problems) => assert!(!problems.is_empty()),
    }
}

fn point(id: u128, vm: &str) -> RestorePoint {
    let taken = Timestamp::UNIX_EPOCH;
    let quiesce = QuiesceRecord {
        requested: QuiesceRequest::Auto,
        outcome: QuiesceOutcome::Frozen,
        frozen_ms: None,
        reason: None,
    };
    RestorePoint {
        id: PointId(id.to_be_bytes()),
        vm: vm.into(),
        vm_uuid: uuid::Uuid::from_u128(id),
        host: "h1".into(),
        source: SourceKind::Hot,
        kind: BackupKind::Full,
        taken,
        started: taken,
        finished: taken,
        parent: None,
        quiesce,
        disks: Vec::new(),
        skipped: Vec::new(),
        tags: Vec::new(),
        warnings: Vec::new(),
        copied_from: None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    const WRITTEN: [&str; 6] = [
        "web1@latest",
        "web1@2026-11-22T10:00",
        "*/15 22-6 1,15 * mon-fri",
        "1y6mo2w3d4h",
        "1.5GiB",
        "[[policy]]\nname = \"gold\"\nselect = [\"tag:gold\"]\nschedule.cron = [\"0 22 * * *\"]\n",
    ];

    proptest! {
        #[test]
        fn nothing_that_is_written_breaks_a_parser(which in 0..WRITTEN.len(), at in 0usize..64, with in ".{0,3}") {
            let mut text = WRITTEN[which].to_owned();
            let at = text.char_indices().map(|(at, _)| at).nth(at).unwrap_or(text.len());
            super::words(text.as_bytes());
            text.insert_str(at, &with);
            super::words(text.as_bytes());
            text.truncate(at);
            super::words(text.as_bytes());
        }
    }
}
