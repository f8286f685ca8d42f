//! How a client behaves: what to open, how hard to push, how long to wait, when to give up.

use std::time::Duration;

use crate::wire::Framing;

/// Settings of a [`crate::Client`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// Block-status contexts to ask for, such as [`crate::BASE_ALLOCATION`]. What the server lacks is not an error:
    /// see [`crate::ExportInfo::contexts`].
    pub contexts: Vec<String>,
    /// Most connections. More than one is used only if the server says that this is safe, or the export is read-only.
    pub connections: usize,
    /// Requests in flight per connection.
    pub queue_depth: usize,
    /// Limit for connecting and the handshake, together.
    pub connect_timeout: Duration,
    /// Limit for the answer to a request that was sent.
    pub request_timeout: Duration,
    /// What to do when a connection breaks.
    pub reconnect: ReconnectPolicy,
    /// The most capable framing to ask for. Only tests and broken servers need less than the default.
    pub framing: Framing,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: String::new(),
            contexts: Vec::new(),
            connections: 2,
            queue_depth: 16,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(60),
            reconnect: ReconnectPolicy::default(),
            framing: Framing::Extended,
        }
    }
}

/// How long to try to bring a broken connection back.
///
/// Requests name their place, so repeating one is harmless: those that were in flight are sent again on the new
/// connection. Each is repeated at most `attempts` times and not after `total` has passed since it first failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReconnectPolicy {
    /// Most attempts in a row; 0 never reconnects.
    pub attempts: u32,
    /// Limit for all attempts together.
    pub total: Duration,
    /// Pause after the first failed attempt; it doubles with each.
    pub delay: Duration,
    /// Longest pause.
    pub delay_max: Duration,
}

impl ReconnectPolicy {
    /// A broken connection fails its requests at once.
    pub fn never() -> Self {
        Self { attempts: 0, ..Self::default() }
    }
}

impl Default for ReconnectPolicy {
    fn default() -> Self {
        Self {
            attempts: 10,
            total: Duration::from_secs(30),
            delay: Duration::from_millis(50),
            delay_max: Duration::from_secs(3),
        }
    }
}
