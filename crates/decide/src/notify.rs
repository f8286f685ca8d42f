//! Which events become a message, and when: severity, grouping, repetition, recovery.
//!
//! ```text
//! event ─ matters enough? ─ told already? ─► pending ─ group-wait after the first, group-interval after the last message ─► batch
//!             no: nothing      yes: counted
//! ```
//!
//! Three hundred VMs that fail within the wait are one message; the same trouble again within `repeat_after` is counted
//! and not told; that it is over is told if the trouble was. Times are from any fixed origin that never goes back, so that
//! a clock that is set neither holds messages up nor repeats them. Everything is bounded: what does not fit is counted.

use std::{collections::BTreeMap, time::Duration};

/// Occurrences of a message that are kept in full; more are counted.
pub const ITEMS_MAX: usize = 200;
/// Troubles that are remembered as told.
pub const TOLD_MAX: usize = 10_000;

/// How much an occurrence matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Something does not work.
    Error,
}

/// What is told to a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Nothing that matters less, but for recoveries of what was told.
    pub severity: Level,
    /// How long the first occurrence waits for others.
    pub group_wait: Duration,
    /// Least time between two messages.
    pub group_interval: Duration,
    /// Least time until the same trouble is told again.
    pub repeat_after: Duration,
    /// Whether the end of a trouble that was told is told.
    pub recoveries: bool,
    /// Kinds of events that are never told.
    pub exclude: Vec<String>,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Occurrence<T> {
    /// How much it matters.
    pub level: Level,
    /// Kind of event.
    pub kind: String,
    /// Names the trouble: all occurrences of one trouble, and its end, have the same.
    pub condition: String,
    /// The trouble is over.
    pub is_over: bool,
    /// The event itself.
    pub event: T,
}

/// One line of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item<T> {
    /// The event.
    pub event: T,
    /// Whether it is the end of a trouble.
    pub is_over: bool,
    /// How often the same trouble occurred since it was last told, not counting this time.
    pub again: u64,
}

/// What one message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch<T> {
    /// In the order in which they happened.
    pub items: Vec<Item<T>>,
    /// Occurrences that there was no room for.
    pub more: u64,
    /// Repetitions, since the last message, of troubles that were told before.
    pub repeated: u64,
}

struct Told {
    at: Duration,
    level: Level,
    again: u64,
}

/// What is known of one channel.
pub struct Digest<T> {
    told: BTreeMap<String, Told>,
    items: Vec<Item<T>>,
    more: u64,
    repeated: u64,
    /// When the oldest pending occurrence came.
    since: Option<Duration>,
    last_sent: Option<Duration>,
}

impl<T> Default for Digest<T> {
    fn default() -> Self {
        Self { told: BTreeMap::new(), items: Vec::new(), more: 0, repeated: 0, since: None, last_sent: None }
    }
}

impl<T> Digest<T> {
    /// Takes note of an occurrence; whether it will be told.
    pub fn add(&mut self, rules: &Rules, now: Duration, what: Occurrence<T>) -> bool {
        if rules.exclude.contains(&what.kind) {
            return false;
        }
        let matters = what.level >= rules.severity;
        let was_told = self.told.contains_key(&what.condition);
        if what.is_over {
            self.told.remove(&what.condition);
            // Where there was no trouble it is just good news.
            let what = Occurrence { is_over: was_told, ..what };
            return if (was_told && rules.recoveries) || matters { self.push(now, what, 0) } else { false };
        }
        if !matters {
            return false;
        }
        if what.level == Level::Info {
            // Good news is no trouble that could be told already.
            return self.push(now, what, 0);
        }
        let mut again = 0;
        if let Some(told) = self.told.get_mut(&what.condition) {
            // What grew worse is news.
            if now.saturating_sub(told.at) < rules.repeat_after && what.level <= told.level {
                told.again += 1;
                self.repeated += 1;
                return false;
            }
            again = told.again;
        }
        self.remember(now, what.level, &what.condition);
        self.push(now, what, again)
    }

    fn remember(&mut self, now: Duration, level: Level, condition: &str) {
        if self.told.len() >= TOLD_MAX && !self.told.contains_key(condition) {
            let oldest = self.told.iter().min_by_key(|(_, told)| told.at).map(|(condition, _)| condition.clone());
            oldest.map(|oldest| self.told.remove(&oldest));
        }
        self.told.insert(condition.to_owned(), Told { at: now, level, again: 0 });
    }

    fn push(&mut self, now: Duration, what: Occurrence<T>, again: u64) -> bool {
        self.since.get_or_insert(now);
        if self.items.len() < ITEMS_MAX {
            self.items.push(Item { event: what.event, is_over: what.is_over, again });
        } else {
            self.more += 1;
        }
        true
    }

    /// When the next message is to go; none while there is nothing to tell.
    pub fn due(&self, rules: &Rules) -> Option<Duration> {
        let ripe = self.since?.saturating_add(rules.group_wait);
        Some(self.last_sent.map_or(ripe, |last| ripe.max(last.saturating_add(rules.group_interval))))
    }

    /// What there is to tell, if it is time.
    pub fn take(&mut self, rules: &Rules, now: Duration) -> Option<Batch<T>> {
        if self.due(rules)? > now {
            return None;
        }
        self.flush(now)
    }

    /// What there is to tell, at once.
    pub fn flush(&mut self, now: Duration) -> Option<Batch<T>> {
        self.since.take()?;
        self.last_sent = Some(now);
        let items = std::mem::take(&mut self.items);
        let (more, repeated) = (std::mem::take(&mut self.more), std::mem::take(&mut self.repeated));
        Some(Batch { items, more, repeated })
    }

    /// Occurrences that wait to be told.
    pub fn pending(&self) -> u64 {
        self.items.len() as u64 + self.more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            severity: Level::Warning,
            group_wait: Duration::from_secs(30),
            group_interval: Duration::from_secs(300),
            repeat_after: Duration::from_secs(6 * 3600),
            recoveries: true,
            exclude: vec!["noise".into()],
        }
    }

    fn what(level: Level, condition: &str, is_over: bool) -> Occurrence<String> {
        let event = format!("{condition} {}", if is_over { "over" } else { "wrong" });
        Occurrence { level, kind: "kind".into(), condition: condition.into(), is_over, event }
    }

    fn at(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn three_hundred_failures_are_one_message() {
        let (rules, mut digest) = (rules(), Digest::default());
        for number in 0..300 {
            assert!(digest.add(&rules, at(number / 20), what(Level::Error, &format!("vm{number}"), false)));
        }
        assert_eq!(digest.due(&rules), Some(at(30)));
        assert!(digest.take(&rules, at(29)).is_none());
        let batch = digest.take(&rules, at(30)).unwrap();
        assert_eq!((batch.items.len(), batch.more), (ITEMS_MAX, 100));
        assert_eq!(digest.due(&rules), None);
        // What comes right after waits until the interval is over, and is one message again.
        for number in 300..400 {
            digest.add(&rules, at(40), what(Level::Error, &format!("vm{number}"), false));
        }
        assert_eq!(digest.due(&rules), Some(at(330)));
        assert_eq!(digest.take(&rules, at(330)).unwrap().items.len(), 100);
    }

    #[test]
    fn the_same_trouble_is_told_once_until_it_is_over_or_lasts() {
        let (rules, mut digest) = (rules(), Digest::default());
        assert!(digest.add(&rules, at(0), what(Level::Error, "disk", false)));
        digest.take(&rules, at(30)).unwrap();
        for minutes in 1..10 {
            assert!(!digest.add(&rules, at(30 + 60 * minutes), what(Level::Error, "disk", false)));
        }
        assert_eq!(digest.due(&rules), None, "nothing but repetitions is no message");
        // It lasts: told again, with how often it occurred.
        assert!(digest.add(&rules, at(7 * 3600), what(Level::Error, "disk", false)));
        let batch = digest.take(&rules, at(8 * 3600)).unwrap();
        assert_eq!((batch.items[0].again, batch.repeated), (9, 9));
        // It is over, which is told although that matters little; then it is new.
        assert!(digest.add(&rules, at(9 * 3600), what(Level::Info, "disk", true)));
        assert!(digest.add(&rules, at(9 * 3600 + 1), what(Level::Error, "disk", false)));
        let batch = digest.take(&rules, at(10 * 3600)).unwrap();
        assert_eq!(batch.items.iter().map(|item| item.is_over).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn what_grows_worse_is_told_and_what_grows_better_is_not() {
        let (rules, mut digest) = (rules(), Digest::default());
        assert!(digest.add(&rules, at(0), what(Level::Warning, "room", false)));
        assert!(digest.add(&rules, at(1), what(Level::Error, "room", false)));
        assert!(!digest.add(&rules, at(2), what(Level::Warning, "room", false)));
        assert!(digest.add(&rules, at(3), what(Level::Info, "room", true)));
        assert!(digest.add(&rules, at(4), what(Level::Warning, "room", false)), "it is new after its end");
    }

    #[test]
    fn what_matters_little_and_what_is_excluded_is_not_told() {
        let (rules, mut digest) = (rules(), Digest::default());
        assert!(!digest.add(&rules, at(0), what(Level::Info, "vm", false)));
        assert!(!digest.add(&rules, at(0), what(Level::Info, "vm", true)), "nothing was told that could be over");
        let noise = Occurrence { kind: "noise".into(), ..what(Level::Error, "vm", false) };
        assert!(!digest.add(&rules, at(0), noise));
        let quiet = Rules { recoveries: false, ..rules.clone() };
        assert!(digest.add(&quiet, at(0), what(Level::Error, "vm", false)));
        assert!(!digest.add(&quiet, at(1), what(Level::Info, "vm", true)));
        // Whoever wants everything gets every success, not only the first.
        let all = Rules { severity: Level::Info, ..rules };
        let mut digest = Digest::default();
        assert!(digest.add(&all, at(0), what(Level::Info, "vm", true)));
        assert!(digest.add(&all, at(1), what(Level::Info, "vm", true)));
        assert!(digest.flush(at(2)).unwrap().items.iter().all(|item| !item.is_over), "nothing was wrong before");
    }

    #[test]
    fn memory_is_bounded() {
        let (rules, mut digest) = (rules(), Digest::default());
        for number in 0..TOLD_MAX + 500 {
            digest.add(&rules, at(number as u64), what(Level::Error, &format!("vm{number}"), false));
        }
        assert_eq!((digest.told.len(), digest.items.len()), (TOLD_MAX, ITEMS_MAX));
        assert_eq!(digest.pending(), (TOLD_MAX + 500) as u64);
        assert!(digest.told.contains_key("vm500") && !digest.told.contains_key("vm499"), "the oldest go");
    }
}
