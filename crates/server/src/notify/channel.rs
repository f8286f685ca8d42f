//! One channel: gathers events into messages and delivers one after the other.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use virtward_api::{Event, Said, Saying, Severity};
use virtward_decide::notify::{Digest, Occurrence};

use super::{Failure, deliver, message::Message};
use crate::{config::ChannelConfig, daemon::Daemon, events::Note};

/// Between the first two tries, doubled with each.
const BACKOFF: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(600);
/// How long a message is tried: where nobody answers, and where it was refused.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);
const PATIENCE_REFUSED: Duration = Duration::from_secs(600);
/// How long a last try may take.
const LAST_MAX: Duration = Duration::from_secs(4);

/// A message on its way.
struct Sending {
    message: Arc<Message>,
    since: Instant,
    tries: u32,
    next: Instant,
}

struct Channel {
    daemon: Arc<Daemon>,
    config: ChannelConfig,
    digest: Digest<Event>,
    origin: Instant,
    sending: Option<Sending>,
    /// Messages that were given up and not told of yet.
    lost: u64,
    is_failing: bool,
}

/// What this channel's own trouble is called: it is not told by itself.
fn condition(name: &str) -> String {
    format!("notify/{name}")
}

/// Runs until no more events can come, then sends what is left, once.
pub async fn run(daemon: Arc<Daemon>, config: ChannelConfig, mut events: mpsc::Receiver<Occurrence<Event>>) {
    let mut channel = Channel {
        daemon,
        config,
        digest: Digest::default(),
        origin: Instant::now(),
        sending: None,
        lost: 0,
        is_failing: false,
    };
    let own = condition(&channel.config.name);
    let mut flight: JoinSet<Result<(), Failure>> = JoinSet::new();
    loop {
        channel.begin();
        let wake = channel.wake().filter(|_| flight.is_empty());
        tokio::select! {
            got = events.recv() => match got {
                Some(what) if what.condition == own => {}
                Some(what) => {
                    channel.digest.add(&channel.config.rules, channel.origin.elapsed(), what);
                }
                None => break,
            },
            Some(outcome) = flight.join_next(), if !flight.is_empty() => {
                channel.ended(outcome.unwrap_or_else(|error| Err(Failure::passing(error.to_string()))));
            }
            () = sleep_until(wake.unwrap_or(channel.origin)), if wake.is_some() => {
                if let Some(sending) = &channel.sending {
                    let (config, message) = (channel.config.clone(), sending.message.clone());
                    flight.spawn(async move { deliver(&config, &message).await });
                }
            }
        }
        channel.shown();
    }
    flight.abort_all();
    channel.last().await;
}

impl Channel {
    /// Makes the next message if it is time and none is on its way.
    fn begin(&mut self) {
        if self.sending.is_some() {
            return;
        }
        if let Some(batch) = self.digest.take(&self.config.rules, self.origin.elapsed()) {
            self.sending = Some(self.sending_of(batch));
        }
    }

    fn sending_of(&mut self, batch: virtward_decide::notify::Batch<Event>) -> Sending {
        let config = self.daemon.config();
        let intake = self.daemon.events.notifier.lost.swap(0, Relaxed);
        let lost = std::mem::take(&mut self.lost) + intake;
        let message = Message::of(&config.node, config.notify.link.as_deref(), batch, lost);
        let now = Instant::now();
        Sending { message: Arc::new(message), since: now, tries: 0, next: now }
    }

    /// When something is to be done without an event.
    fn wake(&self) -> Option<Instant> {
        match &self.sending {
            Some(sending) => Some(sending.next),
            None => self.digest.due(&self.config.rules).map(|due| self.origin + due),
        }
    }

    fn shown(&self) {
        let waiting = self.digest.pending() + self.sending.as_ref().map_or(0, |sending| sending.message.count());
        self.daemon.events.notifier.note(&self.config.name, |shown| shown.waiting = waiting);
    }

    /// A try ended.
    fn ended(&mut self, outcome: Result<(), Failure>) {
        let name = self.config.name.clone();
        let notifier = self.daemon.events.notifier.clone();
        let Some(sending) = &mut self.sending else { return };
        match outcome {
            Ok(()) => {
                tracing::info!(channel = name, id = sending.message.id, "a notification was delivered");
                self.sending = None;
                notifier.note(&name, |shown| {
                    shown.delivered += 1;
                    (shown.last_delivered, shown.error) = (Some(Timestamp::now()), None);
                });
                if std::mem::take(&mut self.is_failing) {
                    let said = Said::from(Saying::NotifyWell).with("channel", name.as_str());
                    self.tell(Severity::Info, format!("notifications through {name} arrive again"), said, true);
                }
            }
            Err(failure) => {
                let wait = BACKOFF.saturating_mul(1 << sending.tries.min(16)).min(BACKOFF_MAX);
                sending.tries += 1;
                sending.next = Instant::now() + wait;
                let patience = if failure.is_final { PATIENCE_REFUSED } else { PATIENCE };
                let gives_up = sending.since.elapsed() + wait > patience;
                notifier.note(&name, |shown| {
                    shown.error = Some(failure.text.clone());
                    shown.given_up += u64::from(gives_up);
                });
                if gives_up {
                    (self.sending, self.lost) = (None, self.lost + 1);
                }
                if !std::mem::replace(&mut self.is_failing, true) {
                    let said = Said::from(Saying::NotifyFailing).with("channel", name.as_str());
                    self.tell(
                        Severity::Error,
                        format!("a notification could not be delivered through {name}: {}", failure.text),
                        said.with("why", failure.text.as_str()),
                        false,
                    );
                }
            }
        }
    }

    fn tell(&self, severity: Severity, text: String, said: Said, is_over: bool) {
        tracing::warn!("{text}");
        let note = Note::new(severity, "notify-channel", text).says(said);
        self.daemon.events.add(note.about(condition(&self.config.name), is_over));
    }

    /// Tries what is left once more.
    async fn last(&mut self) {
        let pending = self.digest.flush(self.origin.elapsed());
        let rest = pending.map(|batch| self.sending_of(batch));
        for sending in [self.sending.take(), rest].into_iter().flatten() {
            let sent = tokio::time::timeout(LAST_MAX, deliver(&self.config, &sending.message)).await;
            if !matches!(sent, Ok(Ok(()))) {
                tracing::warn!(channel = self.config.name, "a notification was not delivered before the daemon ended");
                return;
            }
        }
    }
}
