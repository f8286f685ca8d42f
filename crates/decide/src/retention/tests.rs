//! Retention by example and by property.

use jiff::civil;
use proptest::prelude::*;
use virtward_model::{BackupKind, QuiesceOutcome, QuiesceRecord, QuiesceRequest, SourceKind};

use super::*;

fn at(id: u128, uuid: u128, vm: &str, taken: Timestamp) -> RestorePoint {
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

/// Points of one VM at these instants.
fn taken(times: &[&str]) -> Vec<RestorePoint> {
    times.iter().enumerate().map(|(n, time)| at(n as u128, 1, "web1", time.parse().unwrap())).collect()
}

fn berlin() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn now() -> Timestamp {
    "2026-12-31T00:00:00Z".parse().unwrap()
}

/// Numbers of the points that stay.
fn kept(points: &[RestorePoint], policy: &Policy, zone: &TimeZone) -> Vec<u128> {
    kept_under(points, policy, &Protection::default(), zone)
}

fn kept_under(points: &[RestorePoint], policy: &Policy, protection: &Protection, zone: &TimeZone) -> Vec<u128> {
    let verdicts = decide(points, policy, protection, zone, now()).unwrap();
    assert_eq!(verdicts.len(), points.len(), "every point has a verdict");
    let mut ids: Vec<u128> =
        verdicts.iter().filter(|v| v.is_kept()).map(|v| u128::from_be_bytes(v.point.id.0)).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn a_policy_that_keeps_nothing_is_refused() {
    let points = taken(&["2026-01-01T00:00:00Z"]);
    let none = Policy { within: Some(Age::default()), ..Policy::default() };
    for policy in [Policy::default(), none] {
        assert_eq!(decide(&points, &policy, &Protection::default(), &TimeZone::UTC, now()), Err(EmptyPolicy));
    }
}

#[test]
fn the_newest_of_each_day_and_the_oldest_while_days_are_few() {
    let points = taken(&[
        "2026-11-18T08:00:00Z",
        "2026-11-18T20:00:00Z",
        "2026-11-19T08:00:00Z",
        "2026-11-19T20:00:00Z",
        "2026-11-20T08:00:00Z",
    ]);
    let daily = |daily| Policy { daily, ..Policy::default() };
    assert_eq!(kept(&points, &daily(1), &TimeZone::UTC), [4]);
    assert_eq!(kept(&points, &daily(2), &TimeZone::UTC), [3, 4]);
    assert_eq!(kept(&points, &daily(3), &TimeZone::UTC), [1, 3, 4]);
    assert_eq!(kept(&points, &daily(4), &TimeZone::UTC), [0, 1, 3, 4], "a day is to spare: the oldest stays");
    let verdicts = decide(&points, &daily(4), &Protection::default(), &TimeZone::UTC, now()).unwrap();
    let words: Vec<String> = verdicts[0].stays.iter().map(ToString::to_string).collect();
    assert_eq!(words, ["daily (the oldest)"]);
    assert_eq!(verdicts[2].misses, [Miss::Superseded(Rule::Daily, "2026-11-19".into())]);
    assert_eq!(verdicts[2].misses[0].to_string(), "2026-11-19 has a newer one");
}

#[test]
fn days_begin_where_the_caller_lives() {
    let points = taken(&["2026-11-18T22:30:00Z", "2026-11-18T23:30:00Z"]);
    let daily = Policy { daily: 2, ..Policy::default() };
    assert_eq!(kept(&points, &Policy { daily: 1, ..Policy::default() }, &TimeZone::UTC), [1]);
    assert_eq!(kept(&points, &daily, &berlin()), [0, 1], "one is of the 18th, the other of the 19th in Berlin");
}

#[test]
fn the_hour_that_comes_twice_is_two_hours_and_the_one_left_out_none() {
    // 02:30 CEST and 02:30 CET on the day that has 25 hours.
    let autumn = taken(&["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"]);
    let hourly = |hourly| Policy { hourly, ..Policy::default() };
    assert_eq!(kept(&autumn, &hourly(1), &berlin()), [1]);
    assert_eq!(kept(&autumn, &hourly(2), &berlin()), [0, 1]);
    assert_eq!(kept(&autumn, &Policy { daily: 1, ..Policy::default() }, &berlin()), [1], "one day of 25 hours");
    let spring = taken(&["2026-03-29T00:59:00Z", "2026-03-29T01:00:00Z"]);
    assert_eq!(kept(&spring, &hourly(1), &berlin()), [1], "01:59 CET and 03:00 CEST are neighbours");
    // 23:30 on the short day and 00:30 on the next.
    let midnight = taken(&["2026-03-29T21:30:00Z", "2026-03-29T22:30:00Z"]);
    assert_eq!(kept(&midnight, &Policy { daily: 2, ..Policy::default() }, &berlin()), [0, 1]);
}

#[test]
fn weeks_are_iso_weeks_and_years_end_in_december() {
    // 2027-01-03 is a Sunday of week 2026-W53.
    let points = taken(&["2026-12-28T12:00:00Z", "2027-01-03T12:00:00Z", "2027-01-04T12:00:00Z"]);
    let verdicts = decide(
        &points,
        &Policy { weekly: 9, yearly: 1, ..Policy::default() },
        &Protection::default(),
        &TimeZone::UTC,
        now(),
    )
    .unwrap();
    assert_eq!(verdicts[1].stays, [Stay::Newest(Rule::Weekly, "2026-W53".into())]);
    assert_eq!(
        verdicts[2].stays,
        [Stay::Newest(Rule::Weekly, "2027-W01".into()), Stay::Newest(Rule::Yearly, "2027".into())]
    );
    assert_eq!(verdicts[0].stays, [Stay::Oldest(Rule::Weekly)]);
}

#[test]
fn the_leap_day_is_a_day_and_a_year_before_it_is_the_28th() {
    let points =
        taken(&["2027-02-28T11:00:00Z", "2027-02-28T13:00:00Z", "2028-02-28T12:00:00Z", "2028-02-29T12:00:00Z"]);
    let daily = Policy { daily: 2, ..Policy::default() };
    assert_eq!(kept(&points, &daily, &TimeZone::UTC), [2, 3]);
    let within = Policy { within: Some("1y".parse().unwrap()), ..Policy::default() };
    let after: Timestamp = "2028-03-01T00:00:00Z".parse().unwrap();
    let verdicts = decide(&points, &within, &Protection::default(), &TimeZone::UTC, after).unwrap();
    assert_eq!(verdicts.iter().map(Verdict::is_kept).collect::<Vec<_>>(), [false, true, true, true]);
}

#[test]
fn within_counts_from_the_newest_point_and_not_from_a_clock_ahead() {
    let within = Policy { within: Some("30d".parse().unwrap()), ..Policy::default() };
    let stopped = taken(&["2020-01-01T00:00:00Z", "2020-02-20T00:00:00Z", "2020-03-01T00:00:00Z"]);
    assert_eq!(kept(&stopped, &within, &TimeZone::UTC), [1, 2]);
    let ahead = taken(&["2026-12-20T00:00:00Z", "2039-01-01T00:00:00Z"]);
    assert_eq!(kept(&ahead, &within, &TimeZone::UTC), [0, 1]);
}

#[test]
fn held_young_and_newest_points_stay_whatever_the_rules_say() {
    let mut points = taken(&["2026-11-01T00:00:00Z", "2026-12-30T00:00:00Z", "2026-12-30T12:00:00Z"]);
    points[0].tags.push("before-upgrade".into());
    let tag = |tag: &str| Policy { tags: vec![tag.into()], ..Policy::default() };
    assert_eq!(kept(&points, &tag("before-upgrade"), &TimeZone::UTC), [0, 2]);
    assert_eq!(kept(&points, &tag("other"), &TimeZone::UTC), [2]);
    let bare = Protection { newest_may_go: true, ..Protection::default() };
    assert_eq!(kept_under(&points, &tag("other"), &bare, &TimeZone::UTC), [0; 0]);
    let young = Protection { min_age: Some("1d".parse().unwrap()), ..bare.clone() };
    assert_eq!(kept_under(&points, &tag("other"), &young, &TimeZone::UTC), [2], "exactly a day old is old enough");
    let held = Protection { held: BTreeMap::from([(points[1].id, "case 7".to_owned())]), ..bare };
    assert_eq!(kept_under(&points, &tag("other"), &held, &TimeZone::UTC), [1]);
}

#[test]
fn vms_are_judged_apart_by_uuid_and_images_by_name() {
    let time: Timestamp = "2026-11-01T00:00:00Z".parse().unwrap();
    let later: Timestamp = "2026-11-02T00:00:00Z".parse().unwrap();
    let points = [
        at(0, 1, "web1", time),
        at(1, 1, "renamed", later),
        at(2, 2, "web1", time),
        at(3, 0, "disk-a", time),
        at(4, 0, "disk-b", later),
    ];
    assert_eq!(kept(&points, &Policy { last: 1, ..Policy::default() }, &TimeZone::UTC), [1, 2, 3, 4]);
}

#[test]
fn ages_are_read_and_shown() {
    for (text, shown) in [("30d", "30d"), ("12h", "12h"), ("6mo1y", "1y6mo"), ("2w", "2w"), ("0d", "0d")] {
        assert_eq!(text.parse::<Age>().unwrap().to_string(), shown);
    }
    for bad in ["", "d", "30", "30 d", "6m", "1d1d", "99999d", "-1d", "1.5d", "1é", "٣d"] {
        assert!(bad.parse::<Age>().is_err(), "{bad}");
    }
    assert!("6m".parse::<Age>().unwrap_err().to_string().contains("6mo"));
    let far = "9999y9999mo".parse::<Age>().unwrap();
    assert_eq!(far.before(far.before(now(), &berlin()), &berlin()), Timestamp::MIN);
}

/// A zone with summer time and one without, and points of two VMs over some years, often within the same hour.
fn scenes() -> impl Strategy<Value = (Vec<RestorePoint>, TimeZone)> {
    let begin = civil::date(2023, 12, 30).at(0, 0, 0, 0).to_zoned(TimeZone::UTC).unwrap().timestamp();
    let minutes = prop_oneof![0..200_i64, 0..60 * 24 * 40_i64, 0..60 * 24 * 900_i64, 1_210_000..1_216_000_i64];
    let point = (minutes, 1..3_u128, any::<bool>());
    (proptest::collection::vec(point, 1..40), any::<bool>()).prop_map(move |(points, summer)| {
        let make = |(n, (minutes, uuid, tagged)): (usize, (i64, u128, bool))| {
            let time = begin + jiff::SignedDuration::from_mins(minutes);
            let mut point = at(n as u128, uuid, &format!("vm{uuid}"), time);
            point.tags.extend(tagged.then(|| "t".to_owned()));
            point
        };
        let zone = if summer { berlin() } else { TimeZone::UTC };
        (points.into_iter().enumerate().map(make).collect(), zone)
    })
}

fn policies() -> impl Strategy<Value = Policy> {
    let numbers = proptest::array::uniform6(prop_oneof![Just(0_u32), 1..5_u32, 5..40_u32]);
    (numbers, 0..3_u16, any::<bool>()).prop_map(|([last, hourly, daily, weekly, monthly, yearly], days, tag)| Policy {
        // At least one rule.
        last: last.max(1),
        hourly,
        daily,
        weekly,
        monthly,
        yearly,
        within: (days > 0).then(|| Age::days(days * 10)),
        tags: tag.then(|| "t".to_owned()).into_iter().collect(),
    })
}

/// The policy with one number larger.
fn grown(policy: &Policy, which: usize) -> Policy {
    let mut grown = policy.clone();
    let Policy { last, hourly, daily, weekly, monthly, yearly, .. } = &mut grown;
    *[last, hourly, daily, weekly, monthly, yearly][which] += 1;
    grown
}

proptest! {
    #[test]
    fn a_larger_number_never_keeps_less((points, zone) in scenes(), policy in policies(), which in 0..6_usize) {
        let (before, after) = (kept(&points, &policy, &zone), kept(&points, &grown(&policy, which), &zone));
        prop_assert!(before.iter().all(|id| after.contains(id)), "{before:?} {after:?}");
    }

    #[test]
    fn the_newest_of_every_vm_stays((points, zone) in scenes(), policy in policies()) {
        let kept = kept(&points, &policy, &zone);
        for uuid in [1, 2] {
            let of_vm = points.iter().filter(|p| p.vm_uuid == Uuid::from_u128(uuid));
            if let Some(newest) = of_vm.max_by_key(|p| (p.taken, p.id)) {
                prop_assert!(kept.contains(&u128::from_be_bytes(newest.id.0)));
            }
        }
    }

    #[test]
    fn the_order_of_the_input_does_not_matter((points, zone) in scenes(), policy in policies()) {
        let mut other = points.clone();
        other.reverse();
        other.rotate_left(points.len() / 3);
        prop_assert_eq!(
            decide(&points, &policy, &Protection::default(), &zone, now()),
            decide(&other, &policy, &Protection::default(), &zone, now())
        );
    }

    #[test]
    fn pruning_again_removes_nothing((points, zone) in scenes(), policy in policies()) {
        let first = kept(&points, &policy, &zone);
        let left: Vec<_> = points.into_iter().filter(|p| first.contains(&u128::from_be_bytes(p.id.0))).collect();
        prop_assert_eq!(kept(&left, &policy, &zone), first);
    }

    #[test]
    fn no_rule_keeps_more_than_its_number_and_the_oldest((points, zone) in scenes(), daily in 1..9_u32) {
        let kept = kept(&points, &Policy { daily, ..Policy::default() }, &zone);
        prop_assert!(kept.len() <= 2 * (daily as usize + 1));
    }
}
