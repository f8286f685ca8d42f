//! Live migration: what must be true before it, how fast it may go on, what must be true after it.
//!
//! [`check`] looks at both hosts and lists everything that stands in the way at once, each with what to do about it.
//! [`pace`] watches the passes over memory and decides when to wait, to relax, to switch to post-copy, or to give up.
//! [`gate`] judges the VM at its new place. All pure: facts in, findings or effects out.

pub mod check;
pub mod gate;
pub mod pace;

use serde::{Deserialize, Serialize};

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Fine,
    /// Worth knowing; does not stand in the way.
    Warning,
    /// Stands in the way.
    Blocker,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at: `cpu`, `disk vda`, `memory` …
    pub check: String,
    /// How much it weighs.
    pub level: Level,
    /// What was found.
    pub text: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Finding {
    pub(crate) fn fine(check: impl Into<String>, text: impl Into<String>) -> Self {
        Self { check: check.into(), level: Level::Fine, text: text.into(), advice: None }
    }

    pub(crate) fn warning(check: impl Into<String>, text: impl Into<String>) -> Self {
        Self { level: Level::Warning, ..Self::fine(check, text) }
    }

    pub(crate) fn blocker(check: impl Into<String>, text: impl Into<String>) -> Self {
        Self { level: Level::Blocker, ..Self::fine(check, text) }
    }

    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// The findings that stand in the way.
pub fn blockers(findings: &[Finding]) -> impl Iterator<Item = &Finding> {
    findings.iter().filter(|finding| finding.level == Level::Blocker)
}
