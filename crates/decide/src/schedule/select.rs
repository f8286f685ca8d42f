//! Whether a policy is for a VM, and by which rule.

use virtward_model::select::{Rule, Select};

use super::VmFacts;

/// What a selection says of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection<'a> {
    /// It is selected, by these rules: all of `all`, and the first of `any` that holds.
    Selected(Vec<&'a Rule>),
    /// This rule of `exclude` holds.
    Excluded(&'a Rule),
    /// This rule of `all` does not hold.
    Lacks(&'a Rule),
    /// No rule of `any` holds.
    NoneHolds,
    /// There is no rule to select anything.
    Nothing,
}

impl Selection<'_> {
    /// Whether the policy is for the VM.
    pub fn is_selected(&self) -> bool {
        matches!(self, Selection::Selected(_))
    }
}

impl std::fmt::Display for Selection<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selection::Selected(rules) => {
                let rules: Vec<String> = rules.iter().map(|rule| rule.to_string()).collect();
                write!(f, "selected by {}", rules.join(" and "))
            }
            Selection::Excluded(rule) => write!(f, "excluded by {rule}"),
            Selection::Lacks(rule) => write!(f, "not selected: {rule} does not hold"),
            Selection::NoneHolds => f.write_str("not selected: no rule of any holds"),
            Selection::Nothing => f.write_str("not selected: the policy has no rules"),
        }
    }
}

/// Whether a rule holds for a VM.
pub fn holds(rule: &Rule, vm: &VmFacts) -> bool {
    match rule {
        Rule::Name(pattern) => pattern.matches(&vm.name),
        Rule::Tag(pattern) => vm.tags.iter().any(|tag| pattern.matches(tag)),
        Rule::Metadata(key, pattern) => vm.metadata.get(key).is_some_and(|value| pattern.matches(value)),
        Rule::Host(pattern) => vm.host.as_deref().is_some_and(|host| pattern.matches(host)),
    }
}

/// Judges a VM, with reasons.
pub fn judge<'a>(select: &'a Select, vm: &VmFacts) -> Selection<'a> {
    if select.any.is_empty() && select.all.is_empty() {
        return Selection::Nothing;
    }
    if let Some(rule) = select.exclude.iter().find(|rule| holds(rule, vm)) {
        return Selection::Excluded(rule);
    }
    if let Some(rule) = select.all.iter().find(|rule| !holds(rule, vm)) {
        return Selection::Lacks(rule);
    }
    let any = select.any.iter().find(|rule| holds(rule, vm));
    match any.is_none() && !select.any.is_empty() {
        true => Selection::NoneHolds,
        false => Selection::Selected(select.all.iter().chain(any).collect()),
    }
}
