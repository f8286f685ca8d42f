//! Where notifications go, and whether they arrive.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Severity;

/// How a channel reaches people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NotifyKind {
    /// HTTP POST of JSON.
    Webhook,
    /// Mail by SMTP.
    Mail,
}

/// A channel of the daemon that was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NotifyChannel {
    /// Its name in the configuration.
    pub name: String,
    /// How it reaches people.
    pub kind: NotifyKind,
    /// Where it goes, without what is secret: the origin of a URL, or the mail server and the recipients.
    pub target: String,
    /// Nothing that matters less is told.
    pub severity: Severity,
    /// Events that wait to be told.
    pub waiting: u64,
    /// Messages that arrived since the daemon started.
    pub delivered: u64,
    /// Messages that were given up since the daemon started.
    pub given_up: u64,
    /// When one arrived last.
    pub last_delivered: Option<Timestamp>,
    /// Why the last try failed; null if it did not.
    pub error: Option<String>,
}

/// Sends a test message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NotifyTest {
    /// Only to this channel; without: to all of them.
    #[serde(default)]
    pub channel: Option<String>,
}

/// What became of a test message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NotifyOutcome {
    /// Name of the channel.
    pub channel: String,
    /// How it reaches people.
    pub kind: NotifyKind,
    /// Where it goes.
    pub target: String,
    /// Whether it was accepted there.
    pub is_ok: bool,
    /// Why not.
    pub error: Option<String>,
    /// How long that took.
    pub took_ms: u64,
}
