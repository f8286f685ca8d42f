//! What of a VM's history is to be kept.

use serde::{Deserialize, Serialize};

use crate::{Age, policy::is_default};

/// What to keep. A number of 0 is no rule. The names are those of the command line and of the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// The newest points.
    #[serde(rename = "keep-last", skip_serializing_if = "is_default")]
    pub last: u32,
    /// Hours with restore points.
    #[serde(rename = "keep-hourly", skip_serializing_if = "is_default")]
    pub hourly: u32,
    /// Days.
    #[serde(rename = "keep-daily", skip_serializing_if = "is_default")]
    pub daily: u32,
    /// ISO weeks, which begin on Monday.
    #[serde(rename = "keep-weekly", skip_serializing_if = "is_default")]
    pub weekly: u32,
    /// Months.
    #[serde(rename = "keep-monthly", skip_serializing_if = "is_default")]
    pub monthly: u32,
    /// Years.
    #[serde(rename = "keep-yearly", skip_serializing_if = "is_default")]
    pub yearly: u32,
    /// Everything that is at most this much older than the newest point of its VM: a VM whose backups stopped does not
    /// lose its history to the passage of time.
    #[serde(rename = "keep-within", skip_serializing_if = "is_default")]
    pub within: Option<Age>,
    /// Everything with one of these tags.
    #[serde(rename = "keep-tags", skip_serializing_if = "is_default")]
    pub tags: Vec<String>,
}

impl Retention {
    /// Whether it keeps nothing at all.
    pub fn is_empty(&self) -> bool {
        let numbers = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        numbers == [0; 6] && self.tags.is_empty() && self.within.is_none_or(|age| age.is_zero())
    }
}
