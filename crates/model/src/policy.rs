//! A protection policy: which VMs are backed up, when, how, to where, and what is kept.
//!
//! The same names in every shape: the policy file (TOML), the API (JSON), and messages about either. Every field has a
//! default here, also those that must be given, so that a check can name all that is missing at once
//! (`decide::policy::check`); a policy is good only after that check. What was not said is not written out again.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Bytes, QuiesceRequest, Retention, Seconds, TimeOfDay, Weekday, select::Select};

/// Smallest and largest priority.
pub const PRIORITY_RANGE: std::ops::RangeInclusive<i8> = -100..=100;
/// Most tries after the first.
pub const RETRIES_MAX: u32 = 20;

/// A protection policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// Unique name: letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// Nothing starts by itself.
    #[serde(skip_serializing_if = "is_default")]
    pub paused: bool,
    /// Who goes first when not all can: higher first, −100 to 100.
    #[serde(skip_serializing_if = "is_default")]
    pub priority: i8,
    /// Name of the repository.
    pub repository: String,
    /// How a running VM is cut.
    #[serde(skip_serializing_if = "is_default")]
    pub mode: Mode,
    /// Freezing of the guest's file systems.
    #[serde(skip_serializing_if = "is_default")]
    pub quiesce: QuiesceRequest,
    /// Read limit per second and job; none is unlimited.
    #[serde(skip_serializing_if = "is_default", serialize_with = "exact", deserialize_with = "size")]
    pub bandwidth: Option<Bytes>,
    /// Hosts of which one reads and stores in place of the VM's own; none: that does it.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "one_or_more")]
    pub proxy: Vec<String>,
    /// A run that takes longer is cancelled.
    #[serde(skip_serializing_if = "is_default")]
    pub timeout: Option<Seconds>,
    /// Recovery point objective: alarm when the newest restore point is older.
    #[serde(skip_serializing_if = "is_default")]
    pub rpo: Option<Seconds>,
    /// Which VMs.
    pub select: Select,
    /// When.
    pub schedule: Schedule,
    /// What is kept.
    pub retention: Retention,
    /// Commands around the freeze.
    #[serde(skip_serializing_if = "is_default")]
    pub hooks: Hooks,
    /// What follows a failure.
    #[serde(skip_serializing_if = "is_default")]
    pub retries: Retries,
    /// Further repositories that each restore point is copied to.
    #[serde(skip_serializing_if = "is_default")]
    pub copy_to: Vec<CopyTo>,
}

/// How a running VM is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Without a pause: hot if it runs, cold if it is off.
    #[default]
    Auto,
    /// vCPUs stopped for the instant of the cut.
    Warm,
}

/// When backups start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Schedule {
    /// Cron expressions; a run is due whenever one of them says so.
    #[serde(deserialize_with = "one_or_more")]
    pub cron: Vec<String>,
    /// IANA time zone of cron expressions and window.
    pub time_zone: String,
    /// Nothing starts outside.
    #[serde(skip_serializing_if = "is_default")]
    pub window: Option<Window>,
    /// Whether runs that fell into a time when no scheduler ran are made up for.
    #[serde(skip_serializing_if = "is_true")]
    pub catch_up: bool,
    /// A run that could not start for so long is left out. None: until the next one is due.
    #[serde(skip_serializing_if = "is_default")]
    pub max_lateness: Option<Seconds>,
    /// Each VM starts later by a part of this that is always the same for it.
    #[serde(skip_serializing_if = "is_default")]
    pub jitter: Seconds,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            cron: Vec::new(),
            time_zone: String::new(),
            window: None,
            catch_up: true,
            max_lateness: None,
            jitter: Seconds::default(),
        }
    }
}

/// From `start` to before `end`, past midnight if `end` is earlier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Window {
    /// When it opens.
    pub start: TimeOfDay,
    /// When it closes.
    pub end: TimeOfDay,
    /// The days that it opens on; none named is every day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub days: Vec<Weekday>,
}

/// Shell commands on the host that the VM runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Hooks {
    /// Before the freeze.
    #[serde(skip_serializing_if = "is_default")]
    pub pre_freeze: Option<String>,
    /// After the thaw.
    #[serde(skip_serializing_if = "is_default")]
    pub post_thaw: Option<String>,
    /// Limit for each.
    #[serde(skip_serializing_if = "is_default")]
    pub timeout: Option<Seconds>,
}

/// What follows a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Retries {
    /// Tries after the first.
    pub count: u32,
    /// Time to the first of them; each further one waits twice as long, up to six hours.
    pub backoff: Seconds,
}

impl Default for Retries {
    fn default() -> Self {
        Self { count: 2, backoff: Seconds::minutes(5) }
    }
}

/// A second place for restore points, with a history of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CopyTo {
    /// Name of the repository.
    pub repository: String,
    /// What is kept there.
    pub retention: Retention,
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_true(value: &bool) -> bool {
    *value
}

/// A size that reads back as it was: `100MiB`, not the rounded form for people.
fn exact<S: Serializer>(value: &Option<Bytes>, output: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => output.serialize_str(&value.exact()),
        None => output.serialize_none(),
    }
}

fn size<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Bytes>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Number(u64),
        Text(String),
    }
    match Option::<Size>::deserialize(input)? {
        None => Ok(None),
        Some(Size::Number(bytes)) => Ok(Some(Bytes(bytes))),
        Some(Size::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

fn one_or_more<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMore {
        One(String),
        More(Vec<String>),
    }
    Ok(match OneOrMore::deserialize(input)? {
        OneOrMore::One(one) => vec![one],
        OneOrMore::More(more) => more,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_said_is_not_written() {
        let policy = Policy {
            name: "gold".into(),
            bandwidth: Some(Bytes::mib(100)),
            schedule: Schedule { cron: vec!["@daily".into()], time_zone: "UTC".into(), ..Schedule::default() },
            ..Policy::default()
        };
        let json = serde_json::to_value(&policy).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "name": "gold", "repository": "", "bandwidth": "100MiB", "select": {}, "retention": {},
                "schedule": {"cron": ["@daily"], "time-zone": "UTC"},
            })
        );
        assert_eq!(serde_json::from_value::<Policy>(json).unwrap(), policy);
    }

    #[test]
    fn unknown_fields_are_refused_at_every_level() {
        for text in [
            r#"{"nme": "x"}"#,
            r#"{"schedule": {"crn": "@daily"}}"#,
            r#"{"select": {"some": []}}"#,
            r#"{"retention": {"keep-dayly": 1}}"#,
            r#"{"hooks": {"pre-frieze": "x"}}"#,
            r#"{"retries": {"number": 1}}"#,
            r#"{"copy-to": [{"repo": "x"}]}"#,
        ] {
            let error = serde_json::from_str::<Policy>(text).unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{text}: {error}");
        }
        assert_eq!(
            serde_json::from_str::<Policy>(r#"{"schedule": {"cron": "@daily"}}"#).unwrap().schedule.cron.len(),
            1
        );
    }
}
