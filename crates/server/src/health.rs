//! This host's hardware: asked of metrics and of its management controller, told to everybody, and reason to empty the host
//! before it fails. What follows from readings is decided in [`virtward_decide::health`].

mod source;

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use virtward_api::{DrainRequest, HealthLevel, HostHealth, HostState, HostTrouble, Origin, Said, Saying, Severity};
use virtward_decide::health::{Level, Trouble, Watch};
use virtward_engine::Cancel;

use crate::{
    config::HealthConfig,
    daemon::Daemon,
    events::Note,
    failures::Result,
    jobs::record::{NewJob, Work},
    moves,
};
use source::Source;

/// Between two attempts to empty a host on which VMs were left.
const AGAIN: Duration = Duration::from_secs(15 * 60);
/// Between two looks at the configuration where nothing is to be asked.
const IDLE: Duration = Duration::from_secs(10);
const KIND: &str = "host-health";
/// By whom a host is emptied that fails.
const BY: &str = "health";

/// What is known of this host, for those who show it.
#[derive(Debug, Default)]
pub struct Health(RwLock<Option<HostHealth>>);

impl Health {
    /// None if nothing is asked.
    pub fn now(&self) -> Option<HostHealth> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, health: Option<HostHealth>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = health;
    }
}

#[derive(Default)]
struct Host {
    of: HealthConfig,
    sources: Vec<Source>,
    watch: Watch,
    since: Option<Timestamp>,
    unread: Vec<String>,
    /// When it was last to be emptied, in this time of failing.
    tried: Option<Instant>,
    refused: Option<String>,
}

/// Asks until cancelled.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let origin = Instant::now();
    let mut host = Host::default();
    loop {
        let config = daemon.config().health.clone();
        if config != host.of {
            host = Host { sources: source::all(&config), of: config, ..Host::default() };
        }
        if host.sources.is_empty() {
            daemon.health.set(None);
        } else {
            tokio::select! {
                () = host.look(&daemon, origin.elapsed()) => {}
                () = cancel.cancelled() => return,
            }
        }
        let pause = if host.sources.is_empty() { IDLE } else { host.of.interval };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = cancel.cancelled() => return,
        }
    }
}

impl Host {
    async fn look(&mut self, daemon: &Arc<Daemon>, now: Duration) {
        let (mut troubles, mut unread) = (Vec::new(), Vec::new());
        for source in &mut self.sources {
            // Of one that does not answer, what it said last still counts.
            if let Err(why) = source.read().await {
                unread.push(format!("{}: {why}", source.name()));
            }
            troubles.extend(source.troubles().iter().cloned());
        }
        self.tell_unread(daemon, unread);
        let is_known = self.sources.iter().any(Source::has_answered);
        if self.watch.read(troubles, now) || self.since.is_none() {
            let is_first = self.since.replace(Timestamp::now()).is_none();
            if !is_first || self.watch.level() != Level::Ok {
                self.tell(daemon);
            }
        }
        let health = HostHealth {
            level: if is_known { shown(self.watch.level()) } else { HealthLevel::Unknown },
            since: self.since.unwrap_or_else(Timestamp::now),
            troubles: self.watch.troubles().iter().map(told).collect(),
            unread: self.unread.clone(),
        };
        if daemon.health.now().as_ref() != Some(&health) {
            daemon.health.set(Some(health));
            daemon.publish.notify_one();
        }
        match self.watch.level() {
            Level::Critical if self.of.evacuate => self.evacuate(daemon).await,
            Level::Critical => {}
            Level::Ok | Level::Warning => (self.tried, self.refused) = (None, None),
        }
    }

    fn tell_unread(&mut self, daemon: &Daemon, unread: Vec<String>) {
        let host = daemon.host_name();
        let note = match (self.unread.is_empty(), unread.is_empty()) {
            (true, false) => {
                let text = format!("the hardware of {host} cannot be looked at: {}", unread.join("; "));
                tracing::warn!("{text}");
                let said =
                    Said::from(Saying::HardwareUnread).with("host", host.as_str()).with("why", unread.join("; "));
                Some(Note::new(Severity::Warning, "host-health-unread", text).says(said))
            }
            (false, true) => {
                let text = format!("the hardware of {host} can be looked at again");
                let said = Said::from(Saying::HardwareRead).with("host", host.as_str());
                Some(Note::new(Severity::Info, "host-health-unread", text).says(said))
            }
            _ => None,
        };
        self.unread = unread;
        if let Some(note) = note {
            let is_over = self.unread.is_empty();
            daemon
                .events
                .add(Note { host: Some(host.clone()), ..note.about(format!("host-health-unread/{host}"), is_over) });
        }
    }

    fn tell(&self, daemon: &Daemon) {
        let host = daemon.host_name();
        let why: Vec<&str> = self.watch.troubles().iter().map(|trouble| trouble.text.as_str()).collect();
        let why = why.join("; ");
        let (severity, text, saying) = match self.watch.level() {
            Level::Ok => (Severity::Info, format!("the hardware of {host} is well"), Saying::HardwareWell),
            Level::Warning => {
                (Severity::Warning, format!("the hardware of {host} needs a look: {why}"), Saying::HardwareWarning)
            }
            Level::Critical => {
                (Severity::Error, format!("the hardware of {host} fails: {why}"), Saying::HardwareCritical)
            }
        };
        tracing::warn!("{text}");
        let said = Said::from(saying).with("host", host.as_str()).with("why", why);
        let note =
            Note::new(severity, KIND, text).says(said).about(format!("{KIND}/{host}"), severity == Severity::Info);
        daemon.events.add(Note { host: Some(host), ..note });
    }

    /// Has this host emptied: once for each time that it fails, and again after a while for VMs that were left, unless an
    /// operator has taken it into service meanwhile.
    async fn evacuate(&mut self, daemon: &Arc<Daemon>) {
        let node = &daemon.nodes.me.name;
        let is_closed = moves::drained::closed(daemon, node).is_some();
        let is_due = match self.tried {
            None => true,
            Some(at) => (is_closed || self.refused.is_some()) && at.elapsed() >= AGAIN,
        };
        let others = daemon.fleet().hosts.iter().any(|(of, host)| of != node && host.state == HostState::Up);
        let runs = daemon.inventory.world().vms.values().any(|view| view.vm.state.is_active());
        if !is_due || !others || !runs || moves::draining(daemon, node).is_some() {
            return;
        }
        self.tried = Some(Instant::now());
        let host = daemon.host_name();
        let outcome = drain(daemon).await;
        let refused = outcome.as_ref().err().map(ToString::to_string);
        if refused == self.refused && refused.is_some() {
            return;
        }
        let (severity, text, said) = match outcome {
            Ok(job) => (
                Severity::Warning,
                format!("{host} is emptied, as its hardware fails: job {job}"),
                Said::from(Saying::HostEvacuated).with("job", job),
            ),
            Err(problem) => (
                Severity::Error,
                format!("{host} fails and is not emptied: {problem}"),
                Said::from(Saying::HostNotEvacuated).with("why", problem.to_string()),
            ),
        };
        let said = said.with("host", host.as_str());
        tracing::warn!("{text}");
        self.refused = refused;
        let note =
            Note::new(severity, "host-evacuated", text).says(said).about(format!("host-evacuated/{host}"), false);
        daemon.events.add(Note { host: Some(host), ..note });
    }
}

async fn drain(daemon: &Daemon) -> Result<String> {
    moves::may_drain(daemon, &daemon.nodes.me.name, false)?;
    let origin = Origin { by: BY.into(), policy: None, due: None, attempt: 1, after: None };
    let new = NewJob::without_repository(Work::Drain { request: DrainRequest::default() }, None, origin);
    Ok(daemon.jobs.submit(new, &daemon.here(), None, Vec::new()).await?.0.id.to_string())
}

fn shown(level: Level) -> HealthLevel {
    match level {
        Level::Ok => HealthLevel::Ok,
        Level::Warning => HealthLevel::Warning,
        Level::Critical => HealthLevel::Critical,
    }
}

fn told(trouble: &Trouble) -> HostTrouble {
    HostTrouble { level: shown(trouble.level), text: trouble.text.clone() }
}
