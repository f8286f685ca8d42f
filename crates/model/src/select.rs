//! Which VMs a policy is for: rules over name, tags, libvirt metadata and host.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A pattern for a whole text: `*` is any run of characters, `?` is one, everything else is itself, with its case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern(String);

impl Pattern {
    /// From its text; every text is a pattern.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Whether the whole text matches. Time is at most the product of the lengths.
    pub fn matches(&self, text: &str) -> bool {
        let (mut pattern, mut text) = (self.0.as_str(), text);
        // Where to go on if the present attempt fails: after the last star, with one more character given to it.
        let mut retry: Option<(&str, &str)> = None;
        loop {
            let mut rest = pattern.chars();
            let mut input = text.chars();
            match (rest.next(), input.next()) {
                (Some('*'), _) => {
                    pattern = rest.as_str();
                    retry = Some((pattern, text));
                    continue;
                }
                (None, None) => return true,
                (Some(wanted), Some(found)) if wanted == '?' || wanted == found => {
                    (pattern, text) = (rest.as_str(), input.as_str());
                    continue;
                }
                _ => {}
            }
            let Some((after_star, from)) = retry else { return false };
            let mut skipped = from.chars();
            if skipped.next().is_none() {
                return false;
            }
            (pattern, text) = (after_star, skipped.as_str());
            retry = Some((pattern, text));
        }
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One condition on a VM, written `name:web-*`, `tag:gold`, `metadata:owner=finance`, `host:kvm1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Rule {
    /// The name of the VM.
    Name(Pattern),
    /// One of its tags.
    Tag(Pattern),
    /// A value in its libvirt metadata.
    Metadata(String, Pattern),
    /// The host that it is on.
    Host(Pattern),
}

impl Rule {
    /// Every word that a rule may begin with.
    pub const KINDS: [&str; 4] = ["name", "tag", "metadata", "host"];
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::Name(pattern) => write!(f, "name:{pattern}"),
            Rule::Tag(pattern) => write!(f, "tag:{pattern}"),
            Rule::Metadata(key, pattern) => write!(f, "metadata:{key}={pattern}"),
            Rule::Host(pattern) => write!(f, "host:{pattern}"),
        }
    }
}

/// A text that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a rule; write name:PATTERN, tag:PATTERN, metadata:KEY=PATTERN or host:PATTERN")]
pub struct ParseRuleError(String);

impl FromStr for Rule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseRuleError(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        let pattern = |text: &str| match text.is_empty() {
            true => Err(bad()),
            false => Ok(Pattern::new(text)),
        };
        match kind {
            "name" => pattern(rest).map(Rule::Name),
            "tag" => pattern(rest).map(Rule::Tag),
            "host" => pattern(rest).map(Rule::Host),
            "metadata" => match rest.split_once('=') {
                Some((key, value)) if !key.is_empty() => Ok(Rule::Metadata(key.to_owned(), pattern(value)?)),
                _ => Err(bad()),
            },
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Rule {
    type Error = ParseRuleError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> String {
        rule.to_string()
    }
}

/// A VM is selected if every rule of `all` holds, at least one of `any` if there are some, and none of `exclude`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Select {
    /// At least one must hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub any: Vec<Rule>,
    /// Each must hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub all: Vec<Rule>,
    /// None may hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<Rule>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_texts() {
        for (pattern, yes, no) in [
            ("web1", &["web1"][..], &["web10", "aweb1", "WEB1", ""][..]),
            ("web*", &["web", "web1", "web*"], &["we", "aweb"]),
            ("*", &["", "x", "üñ"], &[]),
            ("*-db-?", &["a-db-1", "-db-ü", "a-db-b-db-1"], &["a-db-", "a-db-12", "db-1"]),
            ("a*b*c", &["abc", "a--b--c", "abbc", "abcbc"], &["acb", "ab", "bc"]),
            ("??", &["ab", "üñ"], &["a", "abc"]),
        ] {
            yes.iter().for_each(|text| assert!(Pattern::new(pattern).matches(text), "{pattern} {text}"));
            no.iter().for_each(|text| assert!(!Pattern::new(pattern).matches(text), "{pattern} {text}"));
        }
        // Many stars against a text that never matches must not take exponential time.
        assert!(!Pattern::new("*a".repeat(50) + "b").matches(&"a".repeat(2000)));
    }

    #[test]
    fn rules_round_trip() {
        for text in ["name:web-*", "tag:gold", "metadata:owner=*=x", "host:kvm?", "name:a:b"] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
        for text in ["", "web*", "name:", "nam:x", "metadata:owner", "metadata:=x", "metadata:a="] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
