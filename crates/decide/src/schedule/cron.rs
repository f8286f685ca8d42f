//! Cron expressions and the instants that they name in a time zone.
//!
//! Five fields (minute, hour, day of month, month, day of week) as in crontab(5): `*`, numbers, names, ranges, steps
//! after `*` or a range, lists; besides `L` (last day of the month), `friL` (last Friday), `fri#2` (second Friday), and
//! `@hourly` `@daily` `@midnight` `@weekly` `@monthly` `@yearly` `@annually`. If day of month and day of week are both
//! given, a day that either of them names counts; a field that begins with `*` does not count as given.
//!
//! When clocks change: an expression that names hours runs once for each time that it names. A time that the clock skips
//! in spring is read with the offset from before the change, as in RFC 5545, so that 02:30 runs at 03:30; of a time that
//! the clock repeats in autumn the first counts. An expression that names every hour is about distances, not times: it
//! runs whenever the clock shows a minute that it names, in both passes of a repeated hour and not for skipped ones.
//!
//! Pure. Not here: time zones' names, windows, jitter.

use std::fmt;

use jiff::{
    Timestamp, ToSpan, civil,
    tz::{AmbiguousOffset, TimeZone},
};

/// A parsed cron expression that happens at least once in a hundred years.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cron {
    text: String,
    minutes: u64,
    hours: u64,
    days: u64,
    last_day: bool,
    months: u64,
    /// For each day from Sunday: bit 0 every week, bits 1 to 5 that week of the month, bit 6 the last one.
    weekdays: [u8; 7],
    /// The fields of days begin with `*`.
    any_day: bool,
    any_weekday: bool,
}

/// A text that is no cron expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a cron expression: {why}")]
pub struct CronError {
    text: String,
    why: String,
}

const EVERY_WEEK: u8 = 1;
const LAST_WEEK: u8 = 1 << 6;
const EVERY_HOUR: u64 = (1 << 24) - 1;
/// Days in which anything that happens at all happens: 29 February on a given day of the week may take 40 years.
const HORIZON_DAYS: usize = 36_525;

/// One field: its name, its range, and names of values from the smallest.
struct Field {
    name: &'static str,
    min: u32,
    max: u32,
    names: &'static [&'static str],
}

const MINUTE: Field = Field { name: "minute", min: 0, max: 59, names: &[] };
const HOUR: Field = Field { name: "hour", min: 0, max: 23, names: &[] };
const DAY: Field = Field { name: "day of month", min: 1, max: 31, names: &[] };
const MONTH: Field = Field {
    name: "month",
    min: 1,
    max: 12,
    names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
};
/// 7 is Sunday as well as 0.
const WEEKDAY: Field =
    Field { name: "day of week", min: 0, max: 7, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] };

const ALIASES: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

impl Field {
    fn value(&self, text: &str) -> Result<u32, String> {
        let lower = text.to_ascii_lowercase();
        if let Some(place) = (self.min..).zip(self.names).find(|(_, name)| **name == lower) {
            return Ok(place.0);
        }
        let number = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        number.filter(|value| (self.min..=self.max).contains(value)).ok_or_else(|| {
            let names = self.names.first().zip(self.names.last());
            let names = names.map_or(String::new(), |(first, last)| format!(" or {first} to {last}"));
            format!("{text:?} in the field {} is not {} to {}{names}", self.name, self.min, self.max)
        })
    }

    /// The values of `*`, `a`, `a-b` and `…/step`.
    fn values(&self, item: &str) -> Result<u64, String> {
        let (range, step) = match item.split_once('/') {
            None => (item, 1),
            Some((range, step)) => match step.parse::<u32>() {
                Ok(step @ 1..) if range == "*" || range.contains('-') => (range, step),
                Ok(1..) => return Err(format!("a step needs a range; write {range}-{}/{step}", self.max.min(59))),
                _ => return Err(format!("the step {step:?} in the field {} is not a positive number", self.name)),
            },
        };
        let (first, last) = match range.split_once('-') {
            None if range == "*" => (self.min, self.max),
            None => (self.value(range)?, self.value(range)?),
            Some((first, last)) => match (self.value(first)?, self.value(last)?) {
                // `sat-sun`, `1-0`: Sunday ends a week as well as it begins one.
                (first @ 1.., 0) if self.max == WEEKDAY.max => (first, 7),
                (first, last) if first > last => {
                    return Err(format!("the range {range} in the field {} runs backwards; write two", self.name));
                }
                both => both,
            },
        };
        let step = usize::try_from(step).unwrap_or(usize::MAX);
        Ok((first..=last).step_by(step).fold(0, |bits, value| bits | 1 << value))
    }

    fn parse(&self, text: &str) -> Result<u64, String> {
        text.split(',').try_fold(0, |bits, item| Ok(bits | self.values(item)?))
    }
}

impl Cron {
    /// Reads an expression.
    pub fn parse(text: &str) -> Result<Self, CronError> {
        Self::read(text).map_err(|why| CronError { text: text.to_owned(), why })
    }

    fn read(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let expression = match ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(text)) {
            Some((_, meaning)) => meaning,
            None if text.starts_with('@') => {
                let known: Vec<&str> = ALIASES.iter().map(|(alias, _)| *alias).collect();
                return Err(format!("the words are {}", known.join(", ")));
            }
            None => text,
        };
        let fields: Vec<&str> = expression.split_whitespace().collect();
        let &[minute, hour, day, month, weekday] = &fields[..] else {
            return Err(format!(
                "it has {} fields; write five: minute, hour, day of month, month, day of week",
                fields.len()
            ));
        };
        let (days, last_day) = days(day)?;
        let cron = Self {
            text: text.to_owned(),
            minutes: MINUTE.parse(minute)?,
            hours: HOUR.parse(hour)?,
            days,
            last_day,
            months: MONTH.parse(month)?,
            weekdays: weekdays(weekday)?,
            any_day: day.starts_with('*'),
            any_weekday: weekday.starts_with('*'),
        };
        let start = civil::date(2000, 1, 1);
        match start.series(1.day()).take(HORIZON_DAYS).any(|date| cron.names_day(date)) {
            true => Ok(cron),
            false => Err("no month has such a day, so that it would never run".to_owned()),
        }
    }

    /// Whether it names something on this day.
    pub fn names_day(&self, date: civil::Date) -> bool {
        if self.months & 1 << date.month() == 0 {
            return false;
        }
        let (day, of_month) = (date.day(), date.days_in_month());
        let by_day = self.days & 1 << day != 0 || self.last_day && day == of_month;
        let weeks = self.weekdays[usize::from(date.weekday().to_sunday_zero_offset().unsigned_abs())];
        let last = if day + 7 > of_month { LAST_WEEK } else { 0 };
        let by_weekday = weeks & (EVERY_WEEK | 1 << (1 + (day - 1) / 7) | last) != 0;
        match self.any_day || self.any_weekday {
            true => by_day && by_weekday,
            false => by_day || by_weekday,
        }
    }

    /// Times of day that it names, in order, as minutes since midnight.
    pub fn minutes_of_day(&self) -> impl Iterator<Item = u16> {
        let hours = (0..24_u16).filter(|hour| self.hours & 1 << hour != 0);
        hours.flat_map(|hour| (0..60_u16).filter(|m| self.minutes & 1 << m != 0).map(move |m| hour * 60 + m))
    }

    /// The first instant after another one.
    pub fn next_after(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let today = after.to_zoned(zone.clone()).date();
        let first = today.checked_sub(1.day()).unwrap_or(today);
        let mut days = first.series(1.day()).take(HORIZON_DAYS);
        let next_on = |date| self.on(date, zone).into_iter().find(|at| *at > after);
        let found = days.by_ref().find_map(next_on)?;
        // A change of clocks about midnight can put times of the following day before those of this one.
        Some(days.next().and_then(next_on).map_or(found, |other| other.min(found)))
    }

    /// The last instant not after another one.
    pub fn last_until(&self, until: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let today = until.to_zoned(zone.clone()).date();
        let first = today.checked_add(1.day()).unwrap_or(today);
        let mut days = first.series(-1.day()).take(HORIZON_DAYS);
        let last_on = |date| self.on(date, zone).into_iter().rfind(|at| *at <= until);
        let found = days.by_ref().find_map(last_on)?;
        Some(days.next().and_then(last_on).map_or(found, |other| other.max(found)))
    }

    /// Every instant that the times of one day name, in order.
    pub(crate) fn on(&self, date: civil::Date, zone: &TimeZone) -> Vec<Timestamp> {
        if !self.names_day(date) {
            return Vec::new();
        }
        let by_distance = self.hours == EVERY_HOUR;
        let mut instants = Vec::new();
        for minute in self.minutes_of_day() {
            let (hour, minute) = ((minute / 60) as i8, (minute % 60) as i8);
            let time = date.at(hour, minute, 0, 0);
            let offsets = match zone.to_ambiguous_timestamp(time).offset() {
                AmbiguousOffset::Unambiguous { offset } => [Some(offset), None],
                AmbiguousOffset::Gap { before, .. } => [Some(before).filter(|_| !by_distance), None],
                AmbiguousOffset::Fold { before, after } => [Some(before), Some(after).filter(|_| by_distance)],
            };
            instants.extend(offsets.into_iter().flatten().filter_map(|offset| offset.to_timestamp(time).ok()));
        }
        instants.sort_unstable();
        instants.dedup();
        instants
    }
}

fn days(text: &str) -> Result<(u64, bool), String> {
    text.split(',').try_fold((0, false), |(bits, last), item| match item.eq_ignore_ascii_case("l") {
        true => Ok((bits, true)),
        false => Ok((bits | DAY.values(item)?, last)),
    })
}

fn weekdays(text: &str) -> Result<[u8; 7], String> {
    let mut weekdays = [0; 7];
    for item in text.split(',') {
        let (days, weeks) = match (item.split_once('#'), item.strip_suffix(['l', 'L'])) {
            (Some((day, week)), _) => match week.parse() {
                Ok(week @ 1..=5_u8) => (1 << WEEKDAY.value(day)?, 1 << week),
                _ => return Err(format!("{item:?}: a month has weeks 1 to 5 of a day")),
            },
            (None, Some("")) => return Err("L needs a day of the week before it, such as friL".to_owned()),
            (None, Some(day)) => (1 << WEEKDAY.value(day)?, LAST_WEEK),
            (None, None) => (WEEKDAY.values(item)?, EVERY_WEEK),
        };
        (0..=7).filter(|day| days & 1_u64 << day != 0).for_each(|day| weekdays[day % 7] |= weeks);
    }
    Ok(weekdays)
}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests;
