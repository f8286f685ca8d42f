//! Which restore points stay and which go: calendar rules, protection, and for every point the reasons.
//!
//! Each VM is a series of its own, by UUID; image sets go by name. A calendar rule (`hourly` … `yearly`) looks at the
//! periods, in the caller's time zone, that have restore points, from the newest back, and keeps the newest point of as
//! many periods as it was told. The newest, because rules then agree: the last point of a year is the last of its month
//! and of its day, so that one point serves several rules and fewer stay for the same history. While a rule finds fewer
//! periods than it may keep, it keeps the oldest point as well: a young series reaches back to its beginning until enough
//! periods have a point of their own.
//!
//! What no rule removes: points that are held, points younger than the minimum age, and the newest point of a VM.
//! Invariants: a larger number never keeps less; what was kept is kept again by the same policy; the order of the input
//! does not matter. Not here: reading the clock, holds or points, and deleting anything.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use jiff::{Timestamp, Zoned, tz::TimeZone};
use uuid::Uuid;
pub use virtward_model::{Age, ParseAgeError, Retention as Policy};
use virtward_model::{PointId, RestorePoint};

/// What no rule removes.
#[derive(Clone, Debug, Default)]
pub struct Protection {
    /// Points that are younger than this stay.
    pub min_age: Option<Age>,
    /// Held points with the reasons of their holds.
    pub held: BTreeMap<PointId, String>,
    /// Let the newest point of a VM go too, if no rule keeps it.
    pub newest_may_go: bool,
}

/// A calendar rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Rule {
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

const CALENDAR: [Rule; 5] = [Rule::Hourly, Rule::Daily, Rule::Weekly, Rule::Monthly, Rule::Yearly];

impl Rule {
    /// Its word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Hourly => "hourly",
            Rule::Daily => "daily",
            Rule::Weekly => "weekly",
            Rule::Monthly => "monthly",
            Rule::Yearly => "yearly",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Rule::Hourly => "hours",
            Rule::Daily => "days",
            Rule::Weekly => "weeks",
            Rule::Monthly => "months",
            Rule::Yearly => "years",
        }
    }

    /// How many of its periods a policy keeps.
    fn wanted(self, policy: &Policy) -> u32 {
        match self {
            Rule::Hourly => policy.hourly,
            Rule::Daily => policy.daily,
            Rule::Weekly => policy.weekly,
            Rule::Monthly => policy.monthly,
            Rule::Yearly => policy.yearly,
        }
    }

    /// The period that an instant is in. Hours carry their offset: the hour that a clock repeats in autumn is two.
    fn period(self, at: &Zoned) -> String {
        match self {
            Rule::Hourly => at.strftime("%Y-%m-%dT%H%:z").to_string(),
            Rule::Daily => at.strftime("%Y-%m-%d").to_string(),
            Rule::Weekly => {
                let week = at.date().iso_week_date();
                format!("{:04}-W{:02}", week.year(), week.week())
            }
            Rule::Monthly => at.strftime("%Y-%m").to_string(),
            Rule::Yearly => at.strftime("%Y").to_string(),
        }
    }
}

/// Why a restore point stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stay {
    /// It is among the newest.
    Last,
    /// It is the newest of this period.
    Newest(Rule, String),
    /// It is the oldest, and the rule has periods to spare.
    Oldest(Rule),
    /// It is at most so much older than the newest.
    Within(Age),
    /// It has this tag.
    Tag(String),
    /// It is held, for this reason.
    Held(String),
    /// It is younger than this.
    Young(Age),
    /// It is the newest of its VM.
    NewestOfVm,
}

impl Stay {
    /// One word for programs.
    pub fn rule(&self) -> &'static str {
        match self {
            Stay::Last => "last",
            Stay::Newest(rule, _) | Stay::Oldest(rule) => rule.name(),
            Stay::Within(_) => "within",
            Stay::Tag(_) => "tag",
            Stay::Held(_) => "held",
            Stay::Young(_) => "min-age",
            Stay::NewestOfVm => "newest",
        }
    }
}

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stay::Last => f.write_str("last"),
            Stay::Newest(rule, period) => write!(f, "{} {period}", rule.name()),
            Stay::Oldest(rule) => write!(f, "{} (the oldest)", rule.name()),
            Stay::Within(age) => write!(f, "within {age}"),
            Stay::Tag(tag) => write!(f, "tag {tag}"),
            Stay::Held(reason) => write!(f, "held: {reason}"),
            Stay::Young(age) => write!(f, "younger than {age}"),
            Stay::NewestOfVm => f.write_str("newest of its VM"),
        }
    }
}

/// Why one rule does not keep a restore point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss {
    /// So many are newer.
    Last(u32),
    /// Its period has a newer one.
    Superseded(Rule, String),
    /// So many periods are newer.
    Beyond(Rule, u32),
    /// It is older than this.
    Older(Age),
    /// It has none of the tags.
    NoTag,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Miss::Last(n) => write!(f, "not among the last {n}"),
            Miss::Superseded(_, period) => write!(f, "{period} has a newer one"),
            Miss::Beyond(rule, n) => write!(f, "beyond {n} {}", rule.unit()),
            Miss::Older(age) => write!(f, "older than {age}"),
            Miss::NoTag => f.write_str("not tagged"),
        }
    }
}

/// What becomes of one restore point, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict<'a> {
    /// The restore point.
    pub point: &'a RestorePoint,
    /// Reasons to stay; it goes if there are none.
    pub stays: Vec<Stay>,
    /// What each rule says that does not keep it.
    pub misses: Vec<Miss>,
}

impl Verdict<'_> {
    /// Whether the point stays.
    pub fn is_kept(&self) -> bool {
        !self.stays.is_empty()
    }
}

/// A policy that keeps nothing: surely a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the policy keeps nothing; name at least one --keep rule")]
pub struct EmptyPolicy;

/// Decides over all points given, VM by VM, sorted by name and time. `zone` is where days begin and end.
pub fn decide<'a>(
    points: impl IntoIterator<Item = &'a RestorePoint>,
    policy: &Policy,
    protection: &Protection,
    zone: &TimeZone,
    now: Timestamp,
) -> Result<Vec<Verdict<'a>>, EmptyPolicy> {
    if policy.is_empty() {
        return Err(EmptyPolicy);
    }
    let mut series: BTreeMap<(Uuid, &str), Vec<&RestorePoint>> = BTreeMap::new();
    for point in points {
        // A VM that was renamed is the same VM; image sets have nothing but their name.
        let name = if point.vm_uuid.is_nil() { &*point.vm } else { "" };
        series.entry((point.vm_uuid, name)).or_default().push(point);
    }
    let mut verdicts = Vec::new();
    for mut points in series.into_values() {
        points.sort_by_key(|point| std::cmp::Reverse((point.taken, point.id)));
        let judge = Judge { policy, protection, zone, now };
        verdicts.extend(judge.series(&points));
    }
    verdicts.sort_by_key(|verdict| (&verdict.point.vm, verdict.point.vm_uuid, verdict.point.taken, verdict.point.id));
    Ok(verdicts)
}

struct Judge<'a> {
    policy: &'a Policy,
    protection: &'a Protection,
    zone: &'a TimeZone,
    now: Timestamp,
}

impl Judge<'_> {
    /// One VM's points, newest first.
    fn series<'p>(&self, points: &[&'p RestorePoint]) -> Vec<Verdict<'p>> {
        let verdict = |point: &&'p RestorePoint| Verdict { point, stays: Vec::new(), misses: Vec::new() };
        let mut verdicts: Vec<_> = points.iter().map(verdict).collect();
        self.last(&mut verdicts);
        for rule in CALENDAR {
            self.calendar(rule, &mut verdicts);
        }
        self.within(&mut verdicts);
        self.tags(&mut verdicts);
        self.protect(&mut verdicts);
        verdicts
    }

    fn last(&self, verdicts: &mut [Verdict<'_>]) {
        let last = self.policy.last;
        if last == 0 {
            return;
        }
        for (place, verdict) in verdicts.iter_mut().enumerate() {
            match place < last as usize {
                true => verdict.stays.push(Stay::Last),
                false => verdict.misses.push(Miss::Last(last)),
            }
        }
    }

    fn calendar(&self, rule: Rule, verdicts: &mut [Verdict<'_>]) {
        let allowed = rule.wanted(self.policy);
        if allowed == 0 {
            return;
        }
        let mut seen: BTreeSet<String> = BTreeSet::new();
        for verdict in verdicts.iter_mut() {
            let period = rule.period(&verdict.point.taken.to_zoned(self.zone.clone()));
            if seen.contains(&period) {
                verdict.misses.push(Miss::Superseded(rule, period));
            } else if seen.len() < allowed as usize {
                seen.insert(period.clone());
                verdict.stays.push(Stay::Newest(rule, period));
            } else {
                verdict.misses.push(Miss::Beyond(rule, allowed));
            }
        }
        if seen.len() < allowed as usize
            && let Some(oldest) = verdicts.last_mut()
            && !oldest.stays.iter().any(|stay| matches!(stay, Stay::Newest(by, _) if *by == rule))
        {
            oldest.misses.retain(|miss| !matches!(miss, Miss::Superseded(by, _) if *by == rule));
            oldest.stays.push(Stay::Oldest(rule));
        }
    }

    fn within(&self, verdicts: &mut [Verdict<'_>]) {
        let (Some(age), Some(newest)) = (self.policy.within, verdicts.first()) else { return };
        // A point from a clock that runs ahead must not make all others look old.
        let begin = age.before(newest.point.taken.min(self.now), self.zone);
        for verdict in verdicts {
            match verdict.point.taken >= begin {
                true => verdict.stays.push(Stay::Within(age)),
                false => verdict.misses.push(Miss::Older(age)),
            }
        }
    }

    fn tags(&self, verdicts: &mut [Verdict<'_>]) {
        for verdict in verdicts.iter_mut().filter(|_| !self.policy.tags.is_empty()) {
            match self.policy.tags.iter().find(|tag| verdict.point.tags.contains(tag)) {
                Some(tag) => verdict.stays.push(Stay::Tag(tag.clone())),
                None => verdict.misses.push(Miss::NoTag),
            }
        }
    }

    fn protect(&self, verdicts: &mut [Verdict<'_>]) {
        let Protection { min_age, held, newest_may_go } = self.protection;
        for verdict in verdicts.iter_mut() {
            if let Some(reason) = held.get(&verdict.point.id) {
                verdict.stays.push(Stay::Held(reason.clone()));
            }
            if let Some(age) = min_age.filter(|age| verdict.point.taken > age.before(self.now, self.zone)) {
                verdict.stays.push(Stay::Young(age));
            }
        }
        if let Some(newest) = verdicts.first_mut()
            && !newest_may_go
            && !newest.is_kept()
        {
            newest.stays.push(Stay::NewestOfVm);
        }
    }
}
