//! A length of time as people write it in policies: `30d`, `12h`, `1y6mo`.

use std::{fmt, str::FromStr};

use jiff::{Span, Timestamp, tz::TimeZone};
use serde::{Deserialize, Serialize};

/// Calendar time to count back: years and months have their own lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Age {
    /// Counts of [`UNITS`].
    counts: [u16; 5],
}

/// Units from the longest to the shortest; they are written in any order, each at most once.
const UNITS: [&str; 5] = ["y", "mo", "w", "d", "h"];
/// Largest count of a unit.
const COUNT_MAX: u16 = 9999;

/// A text that is no age.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a length of time; {advice}")]
pub struct ParseAgeError {
    text: String,
    advice: &'static str,
}

impl Age {
    /// So many days.
    pub fn days(days: u16) -> Self {
        Self { counts: [0, 0, 0, days.min(COUNT_MAX), 0] }
    }

    /// Whether it is no time at all.
    pub fn is_zero(&self) -> bool {
        self.counts == [0; 5]
    }

    /// The instant so long before another one, by the calendar of a zone; the beginning of time if that is too far.
    pub fn before(&self, at: Timestamp, zone: &TimeZone) -> Timestamp {
        let [years, months, weeks, days, hours] = self.counts.map(i64::from);
        let span = Span::new().years(years).months(months).weeks(weeks).days(days).hours(hours);
        at.to_zoned(zone.clone()).checked_sub(span).map_or(Timestamp::MIN, |zoned| zoned.timestamp())
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_zero() {
            return f.write_str("0d");
        }
        let mut parts = self.counts.iter().zip(UNITS).filter(|(count, _)| **count > 0);
        parts.try_for_each(|(count, unit)| write!(f, "{count}{unit}"))
    }
}

impl FromStr for Age {
    type Err = ParseAgeError;

    fn from_str(text: &str) -> Result<Self, ParseAgeError> {
        let bad = |advice| ParseAgeError { text: text.to_owned(), advice };
        const FORM: &str = "write numbers with units, such as 30d, 12h, 2w, 6mo or 1y6mo";
        let (mut age, mut rest) = (Self::default(), text);
        if rest.is_empty() {
            return Err(bad(FORM));
        }
        let mut seen = [false; 5];
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| bad(FORM))?;
            let (number, tail) = rest.split_at(digits);
            let end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(end);
            if unit == "m" {
                return Err(bad("for months write mo, such as 6mo"));
            }
            let place = UNITS.iter().position(|known| *known == unit).ok_or_else(|| bad(FORM))?;
            let count = number.parse().ok().filter(|count| *count <= COUNT_MAX);
            age.counts[place] = count.ok_or_else(|| bad("a number in it is missing or above 9999"))?;
            if std::mem::replace(&mut seen[place], true) {
                return Err(bad("a unit stands in it twice"));
            }
            rest = tail;
        }
        Ok(age)
    }
}

impl TryFrom<String> for Age {
    type Error = ParseAgeError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Age> for String {
    fn from(age: Age) -> String {
        age.to_string()
    }
}
