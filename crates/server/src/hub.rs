//! Changes on their way to whoever follows them: numbered, the newest kept for those who come back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;
use tokio::sync::broadcast;

/// Messages kept for followers that come back.
const KEPT: usize = 4096;
/// Messages that a slow follower may be behind before it has to begin anew.
const BEHIND_MAX: usize = 1024;

/// One change.
#[derive(Clone, Debug)]
pub struct Message {
    /// Without gaps, from 1, since the daemon started.
    pub seq: u64,
    /// What is followed: `jobs`, `inventory`, `events`, `policies`, `repositories`.
    pub topic: &'static str,
    /// Name of the server-sent event.
    pub name: &'static str,
    /// JSON, on one line.
    pub data: Arc<str>,
}

/// Spreads changes.
pub struct Hub {
    /// Tells the numbers of this start of the daemon from those of others.
    pub boot: String,
    kept: Mutex<(u64, VecDeque<Message>)>,
    sender: broadcast::Sender<Message>,
}

/// What a follower begins with.
pub struct Following {
    /// What it missed; none if that is not known any more.
    pub missed: Option<Vec<Message>>,
    /// Number of the newest message then.
    pub seq: u64,
    /// What comes.
    pub receiver: broadcast::Receiver<Message>,
}

impl Hub {
    /// With nothing to tell yet.
    pub fn new(boot: String) -> Self {
        Self { boot, kept: Mutex::default(), sender: broadcast::Sender::new(BEHIND_MAX) }
    }

    /// Tells everybody.
    pub fn send(&self, topic: &'static str, name: &'static str, value: &impl Serialize) {
        let data: Arc<str> = match serde_json::to_string(value) {
            Ok(text) => text.into(),
            Err(error) => {
                tracing::error!(%error, name, "a change cannot be told");
                return;
            }
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.0 += 1;
        let message = Message { seq: kept.0, topic, name, data };
        if kept.1.len() == KEPT {
            kept.1.pop_front();
        }
        kept.1.push_back(message.clone());
        // Sent under the lock, so that the order is that of the numbers. Nobody listening is no error.
        let _ = self.sender.send(message);
    }

    /// Follows, from after the message `last` (`BOOT-SEQ`) if it is given.
    pub fn follow(&self, last: Option<&str>) -> Following {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = self.sender.subscribe();
        let seq = kept.0;
        let missed = match last {
            None => Some(Vec::new()),
            Some(last) => last
                .split_once('-')
                .filter(|(boot, _)| *boot == self.boot)
                .and_then(|(_, number)| number.parse::<u64>().ok())
                .filter(|last| *last <= seq && kept.1.front().is_none_or(|oldest| *last + 1 >= oldest.seq))
                .map(|last| kept.1.iter().filter(|message| message.seq > last).cloned().collect()),
        };
        Following { missed, seq, receiver }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_that_comes_back_misses_nothing_or_is_told_so() {
        let hub = Hub::new("b".into());
        for number in 0..10 {
            hub.send("jobs", "job", &number);
        }
        let seqs = |last: &str| hub.follow(Some(last)).missed.map(|all| all.iter().map(|m| m.seq).collect::<Vec<_>>());
        assert_eq!(seqs("b-7"), Some(vec![8, 9, 10]));
        assert_eq!(seqs("b-10"), Some(vec![]));
        for unknown in ["b-11", "c-7", "", "b-", "b-x", "7"] {
            assert_eq!(seqs(unknown), None, "{unknown:?}");
        }
        for number in 0..KEPT {
            hub.send("jobs", "job", &number);
        }
        assert_eq!(seqs("b-9"), None);
        assert_eq!(seqs("b-10").map(|all| all.len()), Some(KEPT));
        assert_eq!(hub.follow(None).missed.map(|all| all.len()), Some(0));
    }
}
