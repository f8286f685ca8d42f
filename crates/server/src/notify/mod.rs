//! Tells people of what happens: by webhook, by mail.
//!
//! ```text
//! Events::add ─► intake (bounded) ─► per channel: Digest (decide::notify) ─► message ─► delivery, repeated until it arrives
//! ```
//!
//! Only what this daemon itself made an event of is told by it, so that in a cluster an occurrence is told once. A
//! channel that does not work holds up nothing: while its message is tried again, its digest grows, within bounds, and
//! becomes one message. What was not delivered when the daemon ends is lost; the events themselves are kept.

mod channel;
mod mail;
mod message;
pub(crate) mod trust;
mod webhook;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinHandle};
use virtward_api::{Code, Event, NotifyChannel, NotifyKind, NotifyOutcome, Problem, Severity};
use virtward_decide::notify::{Level, Occurrence};
use virtward_engine::Cancel;

use self::message::Message;
use crate::{
    config::{ChannelConfig, Config, NotifyConfig, Target},
    daemon::Daemon,
};

/// Events that wait to be looked at; more are counted and not told.
const INTAKE_MAX: usize = 4096;
/// How long channels may take to send what is left when the daemon ends.
const LAST_MAX: Duration = Duration::from_secs(8);

/// Why a message did not arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For people; without secrets.
    pub text: String,
    /// The other side refused it, and would again.
    pub is_final: bool,
}

impl Failure {
    /// It may go better next time.
    fn passing(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_final: false }
    }

    /// It will not go better by itself.
    fn lasting(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_final: true }
    }
}

/// The way from events to channels, and what is known of those.
pub struct Notifier {
    intake: mpsc::Sender<Occurrence<Event>>,
    outlet: Mutex<Option<mpsc::Receiver<Occurrence<Event>>>>,
    /// Events that the intake had no room for.
    lost: AtomicU64,
    /// The configuration may be another one.
    changed: tokio::sync::Notify,
    channels: Mutex<BTreeMap<String, NotifyChannel>>,
}

impl Default for Notifier {
    fn default() -> Self {
        let (intake, outlet) = mpsc::channel(INTAKE_MAX);
        Self {
            intake,
            outlet: Mutex::new(Some(outlet)),
            lost: AtomicU64::new(0),
            changed: tokio::sync::Notify::new(),
            channels: Mutex::default(),
        }
    }
}

impl Notifier {
    /// Takes an event in. Never waits.
    pub fn tell(&self, occurrence: Occurrence<Event>) {
        if self.intake.try_send(occurrence).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// The configuration may be another one.
    pub fn reconfigure(&self) {
        self.changed.notify_one();
    }

    /// What is known of the channels, by name.
    pub fn channels(&self) -> Vec<NotifyChannel> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, NotifyChannel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, name: &str, change: impl FnOnce(&mut NotifyChannel)) {
        if let Some(channel) = self.lock().get_mut(name) {
            change(channel);
        }
    }
}

/// The severity as rules know it.
pub fn level(severity: Severity) -> Level {
    match severity {
        Severity::Info => Level::Info,
        Severity::Warning => Level::Warning,
        Severity::Error => Level::Error,
    }
}

fn severity(level: Level) -> Severity {
    match level {
        Level::Info => Severity::Info,
        Level::Warning => Severity::Warning,
        Level::Error => Severity::Error,
    }
}

/// How a channel is shown.
fn shown(config: &ChannelConfig) -> NotifyChannel {
    let (kind, target) = match &config.target {
        Target::Webhook(hook) => (NotifyKind::Webhook, webhook::origin(hook)),
        Target::Mail(mail) => (NotifyKind::Mail, format!("{} by {}:{}", mail.to.join(", "), mail.server, mail.port)),
    };
    NotifyChannel {
        name: config.name.clone(),
        kind,
        target,
        severity: severity(config.rules.severity),
        waiting: 0,
        delivered: 0,
        given_up: 0,
        last_delivered: None,
        error: None,
    }
}

/// Hands a message to where a channel leads.
async fn deliver(config: &ChannelConfig, message: &Arc<Message>) -> Result<(), Failure> {
    match &config.target {
        Target::Webhook(hook) => webhook::send(hook, message).await,
        Target::Mail(mail) => mail::send(mail, message).await,
    }
}

/// Whether a URL can be that of a webhook; else what is wrong with it.
pub fn check_url(url: &str) -> Result<(), String> {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    match url.parse::<ureq::http::Uri>() {
        Ok(uri) if matches!(scheme, "http" | "https") && uri.host().is_some_and(|host| !host.is_empty()) => Ok(()),
        _ => Err("its URL is none; give one such as https://host/path (http only where nobody listens)".into()),
    }
}

/// Whether a text is an address that mail can be sent to or from; else what is wrong with it.
pub fn check_address(text: &str) -> Result<(), String> {
    mail::mailbox(text).map(|_| ())
}

struct Running {
    config: ChannelConfig,
    events: mpsc::Sender<Occurrence<Event>>,
    task: JoinHandle<()>,
}

/// Spreads events to channels until cancelled; then lets them send what is left.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let notifier = daemon.events.notifier.clone();
    let outlet = notifier.outlet.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut outlet) = outlet else { return cancel.cancelled().await };
    let mut running: BTreeMap<String, Running> = BTreeMap::new();
    let mut leaving = Vec::new();
    loop {
        follow(&daemon, &mut running, &mut leaving);
        tokio::select! {
            Some(occurrence) = outlet.recv() => {
                for channel in running.values() {
                    if channel.events.try_send(occurrence.clone()).is_err() {
                        notifier.lost.fetch_add(1, Relaxed);
                    }
                }
                continue;
            }
            () = notifier.changed.notified() => {}
            () = cancel.cancelled() => break,
        }
    }
    // What happened on the way out is told too.
    while let Ok(occurrence) = outlet.try_recv() {
        for channel in running.values() {
            let _ = channel.events.try_send(occurrence.clone());
        }
    }
    leaving.extend(running.into_values().map(|channel| channel.task));
    let all = async {
        for task in leaving {
            let _ = task.await;
        }
    };
    if tokio::time::timeout(LAST_MAX, all).await.is_err() {
        tracing::warn!("notifications were still under way when the daemon ended");
    }
}

/// Makes the channels those of the configuration; one that did not change goes on as it was.
fn follow(daemon: &Arc<Daemon>, running: &mut BTreeMap<String, Running>, leaving: &mut Vec<JoinHandle<()>>) {
    let config = daemon.config();
    let wanted = &config.notify;
    leaving.retain(|task| !task.is_finished());
    let is_wanted = |name: &str, config: &ChannelConfig| {
        wanted.channels.iter().any(|channel| channel.name == name && channel == config)
    };
    let gone: Vec<String> = running
        .iter()
        .filter(|(name, channel)| !is_wanted(name, &channel.config) || channel.task.is_finished())
        .map(|(name, _)| name.clone())
        .collect();
    let notifier = &daemon.events.notifier;
    for name in gone {
        leaving.extend(running.remove(&name).map(|channel| channel.task));
        notifier.lock().remove(&name);
    }
    for config in &wanted.channels {
        if running.contains_key(&config.name) {
            continue;
        }
        notifier.lock().insert(config.name.clone(), shown(config));
        let (events, receiver) = mpsc::channel(INTAKE_MAX);
        let task = tokio::spawn(channel::run(daemon.clone(), config.clone(), receiver));
        running.insert(config.name.clone(), Running { config: config.clone(), events, task });
    }
}

/// Sends a test message to one channel, or to all; what became of each.
pub async fn test(config: &Config, only: Option<&str>) -> Result<Vec<NotifyOutcome>, Problem> {
    let NotifyConfig { channels, link } = &config.notify;
    let chosen: Vec<&ChannelConfig> =
        channels.iter().filter(|channel| only.is_none_or(|name| name == channel.name)).collect();
    if let Some(name) = only
        && chosen.is_empty()
    {
        let known: Vec<&str> = channels.iter().map(|channel| channel.name.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(Problem::new(Code::NotFound, format!("there is no notification channel called {name}"))
            .hint(format!("[notify] of the configuration has {known}")));
    }
    let message = Arc::new(Message::test(&config.node, link.as_deref()));
    let each = chosen.into_iter().map(|channel| {
        let message = message.clone();
        async move {
            let (NotifyChannel { kind, target, .. }, began) = (shown(channel), Instant::now());
            let error = deliver(channel, &message).await.err().map(|failure| failure.text);
            let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            NotifyOutcome { channel: channel.name.clone(), kind, target, is_ok: error.is_none(), error, took_ms }
        }
    });
    Ok(futures::future::join_all(each).await)
}

/// What is told of a start that failed, so that a service that is started again and again tells it once.
fn stamp(config: &Config) -> PathBuf {
    config.socket.with_file_name("start-failed")
}

/// Tells people that the daemon does not start: nobody else will.
pub async fn start_failed(config: &Config, problem: &Problem) {
    let channels = &config.notify.channels;
    // That one runs already is told to whoever starts another.
    if channels.is_empty() || matches!(problem.code, Code::Busy | Code::Cancelled) {
        return;
    }
    let hint = problem.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
    let text = format!("the daemon on {} does not start: {}{hint}", config.node, problem.detail);
    let repeat = channels.iter().map(|channel| channel.rules.repeat_after).min().unwrap_or_default();
    let path = stamp(config);
    let age = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
    let is_told = std::fs::read_to_string(&path).is_ok_and(|told| told == text);
    if is_told && age.is_some_and(|age| age < repeat) {
        return;
    }
    if let Err(error) = std::fs::write(&path, &text) {
        // Rather not at all than every few seconds.
        tracing::warn!(%error, "people are not told, as that it was told cannot be kept in {}", path.display());
        return;
    }
    let link = config.notify.link.as_deref();
    let message = Arc::new(Message::alone(&config.node, link, Severity::Error, "daemon-not-started", text));
    let each = channels.iter().map(|channel| deliver(channel, &message));
    match tokio::time::timeout(LAST_MAX, futures::future::join_all(each)).await {
        Ok(all) => all.iter().filter_map(|sent| sent.as_ref().err()).for_each(|failure| {
            tracing::warn!(why = failure.text, "people were not told that the daemon does not start");
        }),
        Err(_) => tracing::warn!("people were not told in time that the daemon does not start"),
    }
}

/// It did start: the next failure is news.
pub fn started(config: &Config) {
    let _ = std::fs::remove_file(stamp(config));
}
