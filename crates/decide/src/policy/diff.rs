//! What applying a set of policies would change: whole policies by name, and field by field within one.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;
use serde_json::Value;
use virtward_model::Policy;

/// One policy that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Its name.
    pub policy: String,
    /// How.
    #[serde(flatten)]
    pub change: Change,
}

/// How a policy differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// These fields differ.
    Changed {
        /// By their names.
        fields: Vec<FieldChange>,
    },
}

/// One field that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FieldChange {
    /// The field, such as `schedule.cron`.
    pub field: String,
    /// What it was; none: not given.
    pub old: Option<Value>,
    /// What it is; none: not given.
    pub new: Option<Value>,
}

impl Difference {
    /// Whether the times change at which it runs: they then count from the change, not from the last run.
    pub fn reschedules(&self) -> bool {
        match &self.change {
            Change::Added => true,
            Change::Removed => false,
            Change::Changed { fields } => fields.iter().any(|change| change.field.starts_with("schedule.")),
        }
    }
}

/// Everything that differs, by name. Order within a set does not matter.
pub fn diff(old: &[Policy], new: &[Policy]) -> Vec<Difference> {
    let by_name = |policies: &[Policy]| -> BTreeMap<String, BTreeMap<String, Value>> {
        policies.iter().map(|policy| (policy.name.clone(), leaves(policy))).collect()
    };
    let (old, new) = (by_name(old), by_name(new));
    let removed = old.keys().filter(|name| !new.contains_key(*name)).map(|name| (name, Change::Removed));
    let others = new.iter().filter_map(|(name, new)| match old.get(name) {
        None => Some((name, Change::Added)),
        Some(old) if old == new => None,
        Some(old) => Some((name, Change::Changed { fields: fields(old, new) })),
    });
    let mut all: Vec<Difference> =
        removed.chain(others).map(|(name, change)| Difference { policy: name.clone(), change }).collect();
    all.sort_by(|a, b| a.policy.cmp(&b.policy));
    all
}

fn fields(old: &BTreeMap<String, Value>, new: &BTreeMap<String, Value>) -> Vec<FieldChange> {
    let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let change = |field: &String| FieldChange {
        field: field.clone(),
        old: old.get(field).cloned(),
        new: new.get(field).cloned(),
    };
    names.into_iter().map(change).filter(|change| change.old != change.new).collect()
}

/// The fields of a policy that were given, by their paths; a list is one value.
fn leaves(policy: &Policy) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    // Every policy is a JSON object: plain data with text keys.
    collect("", serde_json::to_value(policy).unwrap_or_default(), &mut found);
    found
}

fn collect(path: &str, value: Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let path = if path.is_empty() { key } else { format!("{path}.{key}") };
                collect(&path, value, found);
            }
        }
        value => {
            found.insert(path.to_owned(), value);
        }
    }
}

impl fmt::Display for FieldChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Value>| value.as_ref().map_or_else(|| "(not given)".to_owned(), Value::to_string);
        write!(f, "{}: {} -> {}", self.field, show(&self.old), show(&self.new))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.change {
            Change::Added => write!(f, "+ {}", self.policy),
            Change::Removed => write!(f, "- {}", self.policy),
            Change::Changed { fields } => {
                write!(f, "~ {}", self.policy)?;
                fields.iter().try_for_each(|field| write!(f, "\n    {field}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, cron: &str) -> Policy {
        let mut policy = Policy { name: name.into(), repository: "main".into(), ..Policy::default() };
        policy.schedule.cron = vec![cron.into()];
        policy
    }

    #[test]
    fn added_removed_and_changed_by_name() {
        let old = [policy("a", "@daily"), policy("b", "@daily"), policy("c", "@daily")];
        let mut changed = policy("b", "@daily");
        changed.priority = 5;
        changed.repository = "other".into();
        let new = [policy("d", "@daily"), changed, policy("a", "@daily")];
        let found = diff(&old, &new);
        let shown: Vec<String> = found.iter().map(Difference::to_string).collect();
        assert_eq!(shown, ["~ b\n    priority: (not given) -> 5\n    repository: \"main\" -> \"other\"", "- c", "+ d"]);
        assert_eq!(found.iter().map(Difference::reschedules).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(diff(&new, &new), []);
        let json = serde_json::to_value(&found[1]).unwrap();
        assert_eq!(json, serde_json::json!({"policy": "c", "change": "removed"}));
    }

    #[test]
    fn another_time_is_another_schedule() {
        let found = diff(&[policy("a", "@daily")], &[policy("a", "@hourly")]);
        assert_eq!(found[0].to_string(), "~ a\n    schedule.cron: [\"@daily\"] -> [\"@hourly\"]");
        assert!(found[0].reschedules());
    }
}
