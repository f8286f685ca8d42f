//! Times as people write them in policies: lengths (`90s`, `2h30m`, `1d`), times of day (`22:30`), days of the week.

use std::{fmt, str::FromStr};

use jiff::{SignedDuration, civil};
use serde::{Deserialize, Serialize};

/// A length of time of fixed size: a day is 24 hours. Parses and prints `90s`, `15m`, `2h30m`, `1d`, `2w`.
///
/// For lengths by the calendar, with months, there is [`Age`](crate::Age).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Seconds(pub u64);

/// Units from the longest to the shortest.
const UNITS: [(&str, u64); 5] = [("w", 7 * 86400), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1)];
/// Ten years: longer is a typing mistake, and sums of such lengths cannot overflow.
const SECONDS_MAX: u64 = 10 * 366 * 86400;

/// A text that is no length of time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a length of time; {advice}")]
pub struct ParseSecondsError {
    text: String,
    advice: &'static str,
}

impl Seconds {
    /// `n` minutes.
    pub const fn minutes(n: u64) -> Self {
        Self(n * 60)
    }

    /// `n` hours.
    pub const fn hours(n: u64) -> Self {
        Self(n * 3600)
    }

    /// Whether it is no time at all.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The same for computing with instants; at most ten years.
    pub fn duration(self) -> SignedDuration {
        SignedDuration::from_secs(i64::try_from(self.0.min(SECONDS_MAX)).unwrap_or(0))
    }

    /// From a span between instants; nothing if it is negative.
    pub fn of(duration: SignedDuration) -> Self {
        Self(u64::try_from(duration.as_secs()).unwrap_or(0))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_zero() {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        // Weeks are understood and not printed: `14d` reads better than `2w`.
        UNITS[1..].iter().try_for_each(|(unit, seconds)| {
            let count = rest / seconds;
            rest %= seconds;
            if count > 0 { write!(f, "{count}{unit}") } else { Ok(()) }
        })
    }
}

impl FromStr for Seconds {
    type Err = ParseSecondsError;

    fn from_str(text: &str) -> Result<Self, ParseSecondsError> {
        let bad = |advice| ParseSecondsError { text: text.to_owned(), advice };
        const FORM: &str =
            "write numbers with units from the longest to the shortest, such as 90s, 15m, 2h30m, 1d or 2w";
        let (mut total, mut rest, mut units) = (0_u64, text, &UNITS[..]);
        while !rest.is_empty() || total == 0 && units.len() == UNITS.len() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| bad(FORM))?;
            let (number, tail) = rest.split_at(digits);
            let end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(end);
            let place = units.iter().position(|(known, _)| *known == unit).ok_or_else(|| bad(FORM))?;
            let count: u64 = number.parse().map_err(|_| bad(FORM))?;
            total = count
                .checked_mul(units[place].1)
                .and_then(|seconds| seconds.checked_add(total))
                .filter(|total| *total <= SECONDS_MAX)
                .ok_or_else(|| bad("it is more than ten years"))?;
            (rest, units) = (tail, &units[place + 1..]);
        }
        Ok(Self(total))
    }
}

impl TryFrom<String> for Seconds {
    type Error = ParseSecondsError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Seconds> for String {
    fn from(value: Seconds) -> String {
        value.to_string()
    }
}

/// A time of day to the minute, `00:00` to `23:59`; `24:00` is read as `00:00`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TimeOfDay {
    minutes: u16,
}

/// A text that is no time of day.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time of day; write hours and minutes, such as 22:30")]
pub struct ParseTimeOfDayError(String);

impl TimeOfDay {
    /// Minutes since midnight, below 1440.
    pub fn minutes(self) -> u16 {
        self.minutes
    }

    /// The same for computing with dates.
    pub fn civil(self) -> civil::Time {
        let (hour, minute) = (self.minutes / 60, self.minutes % 60);
        civil::time(i8::try_from(hour).unwrap_or(0), i8::try_from(minute).unwrap_or(0), 0, 0)
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.minutes / 60, self.minutes % 60)
    }
}

impl FromStr for TimeOfDay {
    type Err = ParseTimeOfDayError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part = |text: &str| match text.bytes().all(|b| b.is_ascii_digit()) && text.len() <= 2 {
            true => text.parse::<u16>().ok(),
            false => None,
        };
        let (hour, minute) = text.split_once(':').unwrap_or((text, ""));
        match (part(hour), part(minute)) {
            (Some(24), Some(0)) => Ok(Self { minutes: 0 }),
            (Some(hour @ ..24), Some(minute @ ..60)) if text.len() >= 4 => Ok(Self { minutes: hour * 60 + minute }),
            _ => Err(ParseTimeOfDayError(text.to_owned())),
        }
    }
}

impl TryFrom<String> for TimeOfDay {
    type Error = ParseTimeOfDayError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<TimeOfDay> for String {
    fn from(value: TimeOfDay) -> String {
        value.to_string()
    }
}

/// A day of the week: `mon` … `sun`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Weekday {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Weekday {
    /// Every day, from Monday.
    pub const ALL: [Self; 7] = [Self::Mon, Self::Tue, Self::Wed, Self::Thu, Self::Fri, Self::Sat, Self::Sun];

    /// The same as the calendar says it.
    pub fn of(day: civil::Weekday) -> Self {
        match day {
            civil::Weekday::Monday => Self::Mon,
            civil::Weekday::Tuesday => Self::Tue,
            civil::Weekday::Wednesday => Self::Wed,
            civil::Weekday::Thursday => Self::Thu,
            civil::Weekday::Friday => Self::Fri,
            civil::Weekday::Saturday => Self::Sat,
            civil::Weekday::Sunday => Self::Sun,
        }
    }

    /// Three letters.
    pub fn name(self) -> &'static str {
        ["mon", "tue", "wed", "thu", "fri", "sat", "sun"][self as usize]
    }
}

impl fmt::Display for Weekday {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that is no day of the week.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a day of the week; write mon, tue, wed, thu, fri, sat or sun")]
pub struct ParseWeekdayError(String);

impl FromStr for Weekday {
    type Err = ParseWeekdayError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|day| day.name() == text).ok_or_else(|| ParseWeekdayError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_parse_and_print() {
        for (text, seconds, shown) in [
            ("0s", 0, "0s"),
            ("90s", 90, "1m30s"),
            ("15m", 900, "15m"),
            ("2h30m", 9000, "2h30m"),
            ("1d", 86400, "1d"),
            ("2w", 14 * 86400, "14d"),
            ("1w1d1h1m1s", 8 * 86400 + 3661, "8d1h1m1s"),
        ] {
            assert_eq!(text.parse(), Ok(Seconds(seconds)), "{text}");
            assert_eq!(Seconds(seconds).to_string(), shown);
            assert_eq!(shown.parse(), Ok(Seconds(seconds)));
        }
        for text in ["", "5", "m", "30m2h", "2h2h", "1.5h", "-1h", "1y", "99999999999999999999s", "9999w", "2 h"] {
            assert!(text.parse::<Seconds>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_of_day_parse_and_print() {
        for (text, minutes, shown) in [("00:00", 0, "00:00"), ("7:05", 425, "07:05"), ("23:59", 1439, "23:59")] {
            let time: TimeOfDay = text.parse().unwrap();
            assert_eq!((time.minutes(), time.to_string().as_str()), (minutes, shown));
        }
        assert_eq!("24:00".parse(), Ok(TimeOfDay::default()));
        for text in ["", "7", "7:5", "24:01", "12:60", "+1:00", "12:00:00", "noon", ":30"] {
            assert!(text.parse::<TimeOfDay>().is_err(), "{text}");
        }
    }
}
