//! A host's hardware: what its sensors say, and when that is enough to empty the host before it fails.
//!
//! ```text
//! sensors ─► worst of them ─ so for `CONFIRM` readings? ─► Ok │ Warning │ Critical ─ so for `SETTLE`, and better? ─► better
//! ```
//!
//! A sensor that flutters must not send guests round: worse is believed after three readings in a row, better only after a
//! quarter of an hour. A source that does not answer says nothing of the host: what was known stays.

pub mod metrics;
pub mod redfish;

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Readings in a row that must agree before it is worse.
pub const CONFIRM: u32 = 3;
/// How long it must have been better before it is.
pub const SETTLE: Duration = Duration::from_secs(15 * 60);
/// Most troubles that are told of one host.
pub const TOLD_MAX: usize = 16;
/// Characters of a sensor's name or text that are told.
const TEXT_MAX: usize = 120;

/// How bad it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    #[default]
    Ok,
    /// Somebody should look: it works, with less to spare.
    Warning,
    /// It fails, or is about to.
    Critical,
}

/// What one sensor says that is not well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// How bad it is.
    pub level: Level,
    /// Which part, and what it says; for people.
    pub text: String,
}

impl Trouble {
    /// Of what a stranger wrote: cut, and without control characters.
    pub fn new(level: Level, text: &str) -> Self {
        Self { level, text: text.chars().filter(|letter| !letter.is_control()).take(TEXT_MAX).collect() }
    }
}

/// All troubles of one look, the worst first.
pub fn sorted(mut troubles: Vec<Trouble>) -> Vec<Trouble> {
    troubles.sort_by(|a, b| b.level.cmp(&a.level).then_with(|| a.text.cmp(&b.text)));
    troubles.dedup();
    troubles.truncate(TOLD_MAX);
    troubles
}

/// What is believed of a host, from reading to reading. Times are from any fixed origin that never goes back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watch {
    level: Level,
    troubles: Vec<Trouble>,
    /// Readings in a row that were worse, and the least of them.
    worse: (u32, Level),
    /// Since when all readings were better, and the worst of them.
    better: Option<(Duration, Level)>,
}

impl Watch {
    /// How bad it is believed to be.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Why; the worst first. Empty if all is well.
    pub fn troubles(&self) -> &[Trouble] {
        &self.troubles
    }

    /// Takes a reading; whether something else is believed now.
    pub fn read(&mut self, troubles: Vec<Trouble>, now: Duration) -> bool {
        let troubles = sorted(troubles);
        let level = troubles.first().map_or(Level::Ok, |trouble| trouble.level);
        if level > self.level {
            self.better = None;
            let least = if self.worse.0 == 0 { level } else { level.min(self.worse.1) };
            self.worse = (self.worse.0 + 1, least);
            if self.worse.0 < CONFIRM {
                return false;
            }
            return self.believe(least, troubles);
        }
        self.worse = (0, Level::Ok);
        if level == self.level {
            self.better = None;
            // Which sensor it is may change; that alone is no news.
            self.troubles = troubles;
            return false;
        }
        let (since, worst) = self.better.map_or((now, level), |(since, worst)| (since, worst.max(level)));
        self.better = Some((since, worst));
        match now.saturating_sub(since) >= SETTLE {
            true => self.believe(worst, troubles),
            false => false,
        }
    }

    fn believe(&mut self, level: Level, troubles: Vec<Trouble>) -> bool {
        *self = Self { level, troubles, worse: (0, Level::Ok), better: None };
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(level: Level) -> Vec<Trouble> {
        match level {
            Level::Ok => Vec::new(),
            level => vec![Trouble::new(level, "fan 1: stopped")],
        }
    }

    fn minutes(n: u64) -> Duration {
        Duration::from_secs(60 * n)
    }

    #[test]
    fn worse_is_believed_after_three_readings_in_a_row() {
        let mut watch = Watch::default();
        for (n, level) in
            [Level::Critical, Level::Critical, Level::Ok, Level::Critical, Level::Critical].iter().enumerate()
        {
            assert!(!watch.read(of(*level), minutes(n as u64)));
            assert_eq!(watch.level(), Level::Ok);
        }
        assert!(watch.read(of(Level::Critical), minutes(5)));
        assert_eq!((watch.level(), watch.troubles()[0].text.as_str()), (Level::Critical, "fan 1: stopped"));
    }

    #[test]
    fn of_readings_that_differ_the_least_is_believed() {
        let mut watch = Watch::default();
        watch.read(of(Level::Critical), minutes(0));
        watch.read(of(Level::Warning), minutes(1));
        assert!(watch.read(of(Level::Critical), minutes(2)));
        assert_eq!(watch.level(), Level::Warning);
        watch.read(of(Level::Critical), minutes(3));
        watch.read(of(Level::Critical), minutes(4));
        assert!(watch.read(of(Level::Critical), minutes(5)));
        assert_eq!(watch.level(), Level::Critical);
    }

    #[test]
    fn better_is_believed_after_a_quarter_of_an_hour_and_only_as_good_as_the_worst_of_it() {
        let mut watch = Watch::default();
        (0..3).for_each(|n| _ = watch.read(of(Level::Critical), minutes(n)));
        assert!(!watch.read(of(Level::Ok), minutes(10)));
        assert!(!watch.read(of(Level::Ok), minutes(24)));
        // A relapse begins it anew.
        assert!(!watch.read(of(Level::Critical), minutes(25)));
        assert!(!watch.read(of(Level::Ok), minutes(26)));
        assert!(!watch.read(of(Level::Warning), minutes(30)));
        assert!(watch.read(of(Level::Ok), minutes(41)));
        assert_eq!(watch.level(), Level::Warning);
    }

    proptest! {
        #[test]
        fn nothing_is_believed_that_was_not_read_often_enough(readings in prop::collection::vec((0u8..3, 1u64..20), 0..60)) {
            let mut watch = Watch::default();
            let (mut now, mut last) = (0, Vec::new());
            for (level, after) in readings {
                now += after;
                let level = [Level::Ok, Level::Warning, Level::Critical][usize::from(level)];
                last.push(level);
                let before = watch.level();
                let changed = watch.read(of(level), minutes(now));
                prop_assert_eq!(changed, watch.level() != before);
                if watch.level() > before {
                    prop_assert!(last.iter().rev().take(CONFIRM as usize).all(|level| *level >= watch.level()));
                }
                prop_assert_eq!(watch.level() == Level::Ok, watch.troubles().is_empty() && watch.level() == Level::Ok);
            }
        }
    }
}
