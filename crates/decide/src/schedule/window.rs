//! Hours in which backups may start.
//!
//! A window is open when the clock of its time zone shows a time from `start` to before `end`. One that ends before it
//! starts runs past midnight and belongs to the day that it opens on. The clock decides, also when clocks change: of an
//! hour that comes twice, both are in the window. Windows stop nothing that runs.

use jiff::{Timestamp, ToSpan, Zoned, civil, tz::TimeZone};
use virtward_model::{Weekday, policy::Window};

use super::cron::Cron;

/// Whether the window is open.
pub fn is_open(window: &Window, at: &Zoned) -> bool {
    let minute = at.hour() as u16 * 60 + at.minute() as u16;
    is_open_on(window, at.date(), minute)
}

/// The first instant after another one at which the window opens, if it does within nine days.
pub fn next_open(window: &Window, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let today = after.to_zoned(zone.clone()).date();
    let starts = today.series(1.day()).take(9).flat_map(|date| {
        let start = zone.to_ambiguous_timestamp(date.to_datetime(window.start.civil()));
        // The clock may show the time twice.
        [start.earlier().ok(), start.later().ok()].into_iter().flatten()
    });
    // A clock that is set forward or back may enter the window without passing its start.
    let changes = zone.following(after).take(3).map(|change| change.timestamp());
    let limit = after.to_zoned(zone.clone()).checked_add(9.days()).ok()?.timestamp();
    starts.chain(changes).filter(|at| *at > after && *at <= limit && is_open(window, &at.to_zoned(zone.clone()))).min()
}

/// Whether any time that the expression names is in the window. Looks at 28 years, after which days of the week repeat.
pub fn is_ever_hit(window: &Window, cron: &Cron) -> bool {
    let (after_start, before_end): (Vec<u16>, Vec<u16>) =
        cron.minutes_of_day().filter(|minute| in_hours(window, *minute)).partition(|m| *m >= window.start.minutes());
    let samples = [after_start.first(), before_end.first()];
    let mut days = civil::date(2000, 1, 1).series(1.day()).take(28 * 366).filter(|date| cron.names_day(*date));
    days.any(|date| samples.into_iter().flatten().any(|minute| is_open_on(window, date, *minute)))
}

fn in_hours(window: &Window, minute: u16) -> bool {
    let (start, end) = (window.start.minutes(), window.end.minutes());
    match start < end {
        true => (start..end).contains(&minute),
        false => minute >= start || minute < end,
    }
}

fn is_open_on(window: &Window, date: civil::Date, minute: u16) -> bool {
    let opened = match minute < window.start.minutes() {
        true => date.yesterday().unwrap_or(date),
        false => date,
    };
    let day = Weekday::of(opened.weekday());
    in_hours(window, minute) && (window.days.is_empty() || window.days.contains(&day))
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, tz::TimeZoneDatabase};
    use proptest::prelude::*;

    use super::*;

    fn window(start: &str, end: &str, days: &[Weekday]) -> Window {
        Window { start: start.parse().unwrap(), end: end.parse().unwrap(), days: days.to_vec() }
    }

    fn open(window: &Window, at: &str) -> bool {
        is_open(window, &at.parse().unwrap())
    }

    #[test]
    fn a_night_belongs_to_the_day_that_it_begins_on() {
        let night = window("22:00", "05:00", &[Weekday::Fri]);
        // 2 January 2026 is a Friday.
        assert!(!open(&night, "2026-01-02T04:59[UTC]") && !open(&night, "2026-01-02T21:59[UTC]"));
        assert!(open(&night, "2026-01-02T22:00[UTC]") && open(&night, "2026-01-03T04:59[UTC]"));
        assert!(!open(&night, "2026-01-03T05:00[UTC]") && !open(&night, "2026-01-03T23:00[UTC]"));
        let day = window("09:00", "24:00", &[]);
        assert!(open(&day, "2026-01-02T23:59[UTC]") && !open(&day, "2026-01-02T00:00[UTC]"));
    }

    #[test]
    fn a_window_that_the_schedule_never_meets() {
        let meets =
            |start, end, days: &[Weekday], cron| is_ever_hit(&window(start, end, days), &Cron::parse(cron).unwrap());
        assert!(meets("22:00", "05:00", &[], "30 1 * * *"));
        assert!(!meets("22:00", "05:00", &[], "0 12 * * *"));
        assert!(!meets("22:00", "05:00", &[], "0 5 * * *"));
        assert!(meets("22:00", "05:00", &[Weekday::Fri], "30 1 * * sat"));
        assert!(!meets("22:00", "05:00", &[Weekday::Fri], "30 1 * * fri"));
        assert!(meets("22:00", "05:00", &[Weekday::Fri], "30 1,23 * * fri"));
        assert!(meets("22:00", "05:00", &[Weekday::Mon], "0 22 1 1 *"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn the_next_opening_is_the_first_minute_that_is_open(
            start in 0_u16..1440,
            length in 1_u16..1440,
            days in prop::collection::vec(0_usize..7, 0..3),
            (name, change) in prop::sample::select(vec![
                ("UTC", "2026-06-01T00:00:00Z"),
                ("Europe/Berlin", "2026-03-29T01:00:00Z"),
                ("Europe/Berlin", "2026-10-25T01:00:00Z"),
                ("America/St_Johns", "2006-10-29T02:31:00Z"),
                ("America/Sao_Paulo", "2017-10-15T03:00:00Z"),
            ]),
            minutes in -3000_i64..600,
        ) {
            let show = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
            let days: Vec<Weekday> = days.into_iter().map(|day| Weekday::ALL[day]).collect();
            let window = window(&show(start), &show((start + length) % 1440), &days);
            let zone = TimeZoneDatabase::bundled().get(name).unwrap();
            let from = change.parse::<Timestamp>().unwrap() + SignedDuration::from_mins(minutes);
            let at = |minute: i64| from + SignedDuration::from_mins(minute);
            let is_open = |minute: i64| is_open(&window, &at(minute).to_zoned(zone.clone()));
            if !is_open(0) {
                let expected = (1..9 * 1440).find(|minute| is_open(*minute)).map(at);
                prop_assert_eq!(next_open(&window, from, &zone), expected);
            }
        }
    }
}
