//! Cron by example, and by stepping through every minute.

use std::collections::BTreeSet;

use jiff::{SignedDuration, tz::TimeZoneDatabase};
use proptest::prelude::*;

use super::*;

fn zone(name: &str) -> TimeZone {
    TimeZoneDatabase::bundled().get(name).unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// The next instants, in the zone's own time.
fn following(cron: &str, zone_name: &str, after: &str, count: usize) -> Vec<String> {
    let (cron, zone) = (Cron::parse(cron).unwrap(), zone(zone_name));
    let mut now = at(after);
    let mut seen = Vec::new();
    for _ in 0..count {
        now = cron.next_after(now, &zone).unwrap();
        assert_eq!(cron.last_until(now, &zone), Some(now));
        seen.push(now.to_zoned(zone.clone()).strftime("%m-%d %H:%M%:z").to_string());
    }
    seen
}

#[test]
fn lists_ranges_steps_names_and_words() {
    let from = "2026-01-01T00:00:00Z"; // a Thursday
    for (cron, expected) in [
        ("30 1 * * *", ["01-01 01:30", "01-02 01:30", "01-03 01:30"]),
        ("*/20 3-4 * * *", ["01-01 03:00", "01-01 03:20", "01-01 03:40"]),
        ("5,10 22 * * mon-fri", ["01-01 22:05", "01-01 22:10", "01-02 22:05"]),
        ("0 4 * * SAT-SUN", ["01-03 04:00", "01-04 04:00", "01-10 04:00"]),
        ("0 4 * * 7", ["01-04 04:00", "01-11 04:00", "01-18 04:00"]),
        ("0 4 1-31/15 * *", ["01-01 04:00", "01-16 04:00", "01-31 04:00"]),
        ("0 4 L * *", ["01-31 04:00", "02-28 04:00", "03-31 04:00"]),
        ("0 4 15,L feb,apr *", ["02-15 04:00", "02-28 04:00", "04-15 04:00"]),
        ("0 4 * * friL", ["01-30 04:00", "02-27 04:00", "03-27 04:00"]),
        ("0 4 * * sun#1", ["01-04 04:00", "02-01 04:00", "03-01 04:00"]),
        ("0 4 13 * fri", ["01-02 04:00", "01-09 04:00", "01-13 04:00"]),
        ("0 4 */2 * fri", ["01-09 04:00", "01-23 04:00", "02-13 04:00"]),
        ("@daily", ["01-02 00:00", "01-03 00:00", "01-04 00:00"]),
        ("@weekly", ["01-04 00:00", "01-11 00:00", "01-18 00:00"]),
    ] {
        let expected: Vec<String> = expected.iter().map(|time| format!("{time}+00:00")).collect();
        assert_eq!(following(cron, "UTC", from, 3), expected, "{cron}");
    }
    let leap = Cron::parse("0 0 29 2 *").unwrap();
    assert_eq!(leap.next_after(at(from), &TimeZone::UTC), Some(at("2028-02-29T00:00:00Z")));
    assert_eq!(leap.last_until(at(from), &TimeZone::UTC), Some(at("2024-02-29T00:00:00Z")));
}

#[test]
fn what_is_wrong_is_said() {
    for (cron, says) in [
        ("", "0 fields"),
        ("0 1 * *", "4 fields"),
        ("0 0 1 * * *", "6 fields"),
        ("60 1 * * *", "minute is not 0 to 59"),
        ("0 24 * * *", "hour is not 0 to 23"),
        ("0 1 0 * *", "day of month"),
        ("0 1 * 13 *", "1 to 12 or jan to dec"),
        ("0 1 * * funday", "sun to sat"),
        ("0 1 * * 8", "day of week"),
        ("0 22-2 * * *", "backwards"),
        ("5/15 * * * *", "5-59/15"),
        ("*/0 * * * *", "step"),
        ("*/x * * * *", "step"),
        ("0 1 * * fri#6", "weeks 1 to 5"),
        ("0 1 * * L", "friL"),
        ("0 1 31 2,4 *", "never"),
        ("@nightly", "@daily"),
        ("+5 1 * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("-5 1 * * *", "minute"),
    ] {
        let error = Cron::parse(cron).unwrap_err().to_string();
        assert!(error.contains(says), "{cron}: {error}");
    }
}

#[test]
fn clocks_go_forward() {
    // Berlin, 29 March 2026: 02:00 becomes 03:00.
    let day = "2026-03-28T12:00:00Z";
    assert_eq!(following("30 2 * * *", "Europe/Berlin", day, 2), ["03-29 03:30+02:00", "03-30 02:30+02:00"]);
    // Two names for one instant are one run.
    assert_eq!(following("30 2,3 * * *", "Europe/Berlin", day, 2), ["03-29 03:30+02:00", "03-30 02:30+02:00"]);
    // Times in and after the gap come in the order of their instants.
    let both = following("0,30 2,3 * * *", "Europe/Berlin", day, 3);
    assert_eq!(both, ["03-29 03:00+02:00", "03-29 03:30+02:00", "03-30 02:00+02:00"]);
    let hourly = following("0 * * * *", "Europe/Berlin", "2026-03-29T00:30:00Z", 3);
    assert_eq!(hourly, ["03-29 03:00+02:00", "03-29 04:00+02:00", "03-29 05:00+02:00"]);
    // Half an hour, with a minute that the clock skips: nothing is made up for what repeats every hour.
    let lord_howe = following("15 * * * *", "Australia/Lord_Howe", "2026-10-03T14:30:00Z", 3);
    assert_eq!(lord_howe, ["10-04 01:15+10:30", "10-04 03:15+11:00", "10-04 04:15+11:00"]);
}

#[test]
fn clocks_go_back() {
    // Berlin, 25 October 2026: 03:00 becomes 02:00.
    let day = "2026-10-24T12:00:00Z";
    assert_eq!(following("30 2 * * *", "Europe/Berlin", day, 2), ["10-25 02:30+02:00", "10-26 02:30+01:00"]);
    let hourly = following("30 * * * *", "Europe/Berlin", "2026-10-25T00:00:00Z", 3);
    assert_eq!(hourly, ["10-25 02:30+02:00", "10-25 02:30+01:00", "10-25 03:30+01:00"]);
}

#[test]
fn a_day_that_never_was() {
    // Samoa went from the 29th straight to the 31st of December 2011.
    let days = following("0 9 * * *", "Pacific/Apia", "2011-12-28T23:00:00Z", 3);
    assert_eq!(days, ["12-29 09:00-10:00", "12-31 09:00+14:00", "01-01 09:00+14:00"]);
}

/// A field: its text, and the values that it names.
fn field(min: u32, max: u32) -> impl Strategy<Value = (String, BTreeSet<u32>)> {
    let item = prop_oneof![
        3 => (min..=max).prop_map(|one| (one.to_string(), BTreeSet::from([one]))),
        2 => (min..=max, min..=max, 1_u32..9).prop_map(|(a, b, step)| {
            let (first, last) = (a.min(b), a.max(b));
            (format!("{first}-{last}/{step}"), (first..=last).filter(|n| (n - first).is_multiple_of(step)).collect())
        }),
    ];
    prop_oneof![
        2 => Just(("*".to_owned(), (min..=max).collect())),
        1 => (2_u32..20).prop_map(move |step| {
            (format!("*/{step}"), (min..=max).filter(|n| (n - min).is_multiple_of(step)).collect())
        }),
        4 => prop::collection::vec(item, 1..3).prop_map(|items| {
            let texts: Vec<String> = items.iter().map(|(text, _)| text.clone()).collect();
            (texts.join(","), items.into_iter().flat_map(|(_, values)| values).collect())
        }),
    ]
}

#[derive(Debug)]
struct Expression {
    fields: Vec<(String, BTreeSet<u32>)>,
}

impl Expression {
    fn text(&self) -> String {
        self.fields.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>().join(" ")
    }

    fn names(&self, at: civil::DateTime) -> bool {
        let has = |place: usize, value: i8| self.fields[place].1.contains(&u32::try_from(value).unwrap());
        let star = |place: usize| self.fields[place].0.starts_with('*');
        let day = has(2, at.day());
        let weekday = has(4, at.weekday().to_sunday_zero_offset());
        let days = if star(2) || star(4) { day && weekday } else { day || weekday };
        has(0, at.minute()) && has(1, at.hour()) && has(3, at.month()) && days
    }

    /// Every instant in a span, by looking at each minute as it passes on the clock.
    fn by_stepping(&self, from: Timestamp, to: Timestamp, zone: &TimeZone) -> BTreeSet<Timestamp> {
        let by_distance = self.fields[1].1.len() == 24;
        let minute = SignedDuration::from_mins(1);
        let mut named = BTreeSet::new();
        // Begin earlier, to know which times the clock has shown already.
        let mut now = from - SignedDuration::from_hours(72);
        let mut latest: Option<(civil::DateTime, Timestamp)> = None;
        while now <= to {
            let clock = now.to_zoned(zone.clone()).datetime();
            let again = latest.is_some_and(|(shown, _)| clock <= shown);
            if let Some((shown, then)) = latest.filter(|_| !by_distance) {
                let mut skipped = shown.checked_add(minute).unwrap();
                while skipped < clock {
                    if self.names(skipped) {
                        named.insert(then + skipped.duration_since(shown));
                    }
                    skipped = skipped.checked_add(minute).unwrap();
                }
            }
            if self.names(clock) && (by_distance || !again) {
                named.insert(now);
            }
            if !again {
                latest = Some((clock, now));
            }
            now += minute;
        }
        named.into_iter().filter(|at| *at > from && *at <= to).collect()
    }
}

fn expression() -> impl Strategy<Value = Expression> {
    (field(0, 59), field(0, 23), field(1, 31), field(1, 12), field(0, 6))
        .prop_map(|(a, b, c, d, e)| Expression { fields: vec![a, b, c, d, e] })
}

/// A zone with an instant shortly before its clock changes, or any.
fn moment() -> impl Strategy<Value = (TimeZone, Timestamp)> {
    let changes = prop::sample::select(vec![
        ("UTC", "2026-06-01T00:00:00Z"),
        ("Europe/Berlin", "2026-03-29T01:00:00Z"),
        ("Europe/Berlin", "2026-10-25T01:00:00Z"),
        ("Australia/Lord_Howe", "2026-04-04T15:00:00Z"),
        ("Australia/Lord_Howe", "2026-10-03T15:30:00Z"),
        // One minute past midnight, so that times of two days are mixed.
        ("America/St_Johns", "2006-10-29T02:31:00Z"),
        ("America/St_Johns", "2006-04-02T03:31:00Z"),
        ("Pacific/Apia", "2011-12-30T10:00:00Z"),
        ("America/Sao_Paulo", "2017-10-15T03:00:00Z"),
    ]);
    (changes, -3000_i64..1500)
        .prop_map(|((name, change), minutes)| (zone(name), at(change) + SignedDuration::from_mins(minutes)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn agrees_with_stepping_through_every_minute(expression in expression(), (zone, from) in moment()) {
        let Ok(cron) = Cron::parse(&expression.text()) else {
            // Only days that no month has are refused.
            prop_assert!(!expression.fields[2].0.starts_with('*'));
            return Ok(());
        };
        let to = from + SignedDuration::from_hours(48);
        let expected = expression.by_stepping(from, to, &zone);
        let mut found = BTreeSet::new();
        let mut now = from;
        while let Some(next) = cron.next_after(now, &zone).filter(|next| *next <= to) {
            prop_assert!(next > now);
            found.insert(next);
            now = next;
        }
        prop_assert_eq!(&found, &expected, "{} after {}", cron, from.to_zoned(zone.clone()));
        let mut back = BTreeSet::new();
        let mut now = to;
        while let Some(last) = cron.last_until(now, &zone).filter(|last| *last > from) {
            back.insert(last);
            now = last - SignedDuration::from_nanos(1);
        }
        prop_assert_eq!(&back, &expected, "{} backwards", cron);
    }

    #[test]
    fn any_text_is_refused_or_understood(text in "[-0-9*/,#a-zL@ ]{0,24}") {
        if let Ok(cron) = Cron::parse(&text) {
            prop_assert!(cron.next_after(at("2026-01-01T00:00:00Z"), &TimeZone::UTC).is_some());
        }
    }
}
