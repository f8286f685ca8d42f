//! `virtward serve`: the daemon of a host. It knows what the host has, does what policies say, and answers the API.
//!
//! ```text
//! inventory ─ changes ─► pump ─► events, stream        scheduler ─ starts ─► runner ─► jobs (engine)
//!     ▲                                                    ▲                    │
//!  libvirt                         policies, history, points ◄─────────────────┘
//!                                         ▲
//!                     HTTP: Unix socket, HTTPS ─► handlers ─► state store
//! ```
//!
//! Every loop has one owner ([`run`]), ends with one cancellation, and is awaited. What must survive is in the state
//! store; what can be found out again is only in memory. Not here: how backups work (engine), what is due (decide), what
//! the API looks like (api).

#![allow(
    clippy::result_large_err,
    reason = "a problem is an answer, made once per request; boxing it would save nothing"
)]

mod access;
pub mod admin;
mod alarms;
pub mod cluster;
pub mod config;
mod daemon;
mod events;
mod failures;
pub mod ha;
mod health;
mod http;
mod hub;
mod jobs;
mod journal;
mod kv;
mod metrics;
mod moves;
pub mod notify;
mod peers;
mod policies;
mod pump;
mod repositories;
mod said;
mod scheduler;
mod storages;
mod table;
mod tls;
mod views;
mod web;
pub mod wire_up;

use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jiff::Timestamp;
use sd_notify::NotifyState;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use uuid::Uuid;
use virtward_api::{Code, Problem, Said, Saying, Severity};
use virtward_engine::{
    Cancel,
    ha::run::Ha,
    reconcile::{guests, inventory::Inventory},
};

use crate::{
    cluster::nodes::Me,
    config::Config,
    daemon::{Daemon, Parts},
    events::{Audit, Events, Note},
    failures::Result,
    http::listen,
    hub::Hub,
    kv::Kv,
    peers::Identity,
    wire_up::Wiring,
};

/// Time for sessions of other hosts to hear that this daemon stops.
const PROXIED_STOP_MAX: Duration = Duration::from_secs(5);

/// Reads the configuration again.
pub type Reload = Arc<dyn Fn() -> std::result::Result<Config, String> + Send + Sync>;

/// Where the daemon answers.
#[derive(Clone, Debug)]
pub struct Listening {
    /// Address of HTTPS, with the port that it got.
    pub https: Option<SocketAddr>,
    /// Address where peers are answered.
    pub peers: Option<SocketAddr>,
    /// Fingerprint of the certificate.
    pub certificate_sha256: Option<String>,
}

/// Runs the daemon until `stop`. Tells when it answers.
pub async fn run(
    config: Config,
    wiring: Wiring,
    reload: Reload,
    stop: Cancel,
    ready: oneshot::Sender<Listening>,
) -> Result<()> {
    // Before all else: a host that was in service has a few seconds to go on with its heartbeats.
    let (ha, link) = ha::start(&config, wiring.connector.clone(), wiring.store.clone())?.unzip();
    let outcome = serve(config, wiring, (ha.clone(), link), reload, stop, ready).await;
    // Whatever ended it: no watchdog may count on for a daemon that is gone.
    rest(ha.as_ref()).await;
    outcome
}

async fn serve(
    config: Config,
    wiring: Wiring,
    (ha, link): (Option<Ha>, Option<Arc<ha::Link>>),
    reload: Reload,
    stop: Cancel,
    ready: oneshot::Sender<Listening>,
) -> Result<()> {
    let daemon = tokio::select! {
        daemon = build(config, wiring, ha) => Arc::new(daemon?),
        () = stop.cancelled() => return Ok(()),
    };
    if let Some(link) = &link {
        link.attach(&daemon)?;
    }
    let config = daemon.config();
    let socket = listen::bind_unix(&config.socket).map_err(|error| {
        Problem::new(Code::Busy, format!("cannot listen on {}: {error}", config.socket.display()))
            .hint("stop the other daemon, or name another directory with runtime-dir in the configuration")
    })?;
    let https = match config.listen {
        Some(address) => Some(https(&daemon, address).await?),
        None => None,
    };
    let peers = match config.cluster.as_ref().and_then(|cluster| cluster.listen).zip(daemon.peers.identity()) {
        Some((address, identity)) => Some((peer_listener(address, &identity).await?, identity)),
        None => None,
    };
    let listening = Listening {
        peers: peers.as_ref().and_then(|((listener, _), _)| listener.local_addr().ok()),
        https: https.as_ref().and_then(|(listener, _)| listener.local_addr().ok()),
        certificate_sha256: daemon.certificate().map(|certificate| certificate.sha256),
    };
    let address = config.cluster.as_ref().and_then(|cluster| cluster.address.clone());
    daemon.nodes.register(address, daemon.started).await?;
    jobs::runner::recover(&daemon).await;

    let (work, doors) = (Cancel::default(), Cancel::default());
    let mut loops = JoinSet::new();
    let mut answering = JoinSet::new();
    let (sender, changes) = mpsc::channel(256);
    let inventory = daemon.inventory.clone();
    let (every, last) = (config.reconcile, doors.clone());
    answering.spawn(async move { inventory.run(every, sender, last).await });
    answering.spawn(pump::run(daemon.clone(), changes));
    let (asked, runtime) = (daemon.inventory.clone(), config.dirs.runtime.clone());
    loops.spawn(guests::run(asked, runtime, guests::Pace::default(), work.clone()));
    loops.spawn(jobs::runner::run(daemon.clone(), work.clone()));
    loops.spawn(scheduler::run(daemon.clone(), work.clone()));
    answering.spawn(cluster::follow::run(daemon.clone(), doors.clone()));
    if let Some(cluster) = &config.cluster {
        loops.spawn(cluster::leader::run(daemon.clone(), cluster.lease, work.clone()));
        loops.spawn(cluster::oversight::run(daemon.clone(), work.clone()));
        loops.spawn(cluster::publish::run(daemon.clone(), work.clone()));
        loops.spawn(pump::others(daemon.clone(), work.clone()));
        answering.spawn(daemon.nodes.clone().beat(cluster.lease, doors.clone()));
    }
    if let Some(link) = link {
        answering.spawn(link.run(daemon.clone(), doors.clone()));
    }
    loops.spawn(moves::balance::run(daemon.clone(), work.clone()));
    loops.spawn(pump::housekeeping(daemon.clone(), work.clone()));
    loops.spawn(health::run(daemon.clone(), work.clone()));
    loops.spawn(alarms::run(daemon.clone(), work.clone()));
    answering.spawn(notify::run(daemon.clone(), doors.clone()));
    let router = http::router(daemon.clone());
    let tls = https.as_ref().map(|(_, tls)| tls.clone());
    loops.spawn(reloading(daemon.clone(), reload, tls, work.clone()));
    loops.spawn(watchdog(work.clone()));
    answering.spawn(listen::unix(socket, router.clone(), doors.clone()));
    if let Some((listener, tls)) = https {
        answering.spawn(listen::https(listener, tls, router, doors.clone()));
    }
    if let Some(((listener, tls), identity)) = peers {
        answering.spawn(listen::peers(listener, tls.clone(), peers::router(daemon.clone()), doors.clone()));
        let (changed, of) = (daemon.clone(), identity.clone());
        let changed = move || {
            peers::renew(&tls, &of);
            if let Err(problem) = changed.peers.renew() {
                tracing::error!(%problem, "calls to other nodes go on as they did");
            }
        };
        loops.spawn(moves::certificates::keep(daemon.clone(), identity.clone(), work.clone()));
        loops.spawn(peers::identity::keep(daemon.clone(), identity, changed, work.clone()));
    }
    daemon.events.add(Note::new(Severity::Info, "daemon-started", "the daemon started").says(Saying::DaemonStarted));
    notify::started(&config);
    notify(&[NotifyState::Ready]);
    let _ = ready.send(listening);

    let failure = tokio::select! {
        () = stop.cancelled() => None,
        Some(ended) = loops.join_next() => Some(format!("a loop of the daemon ended early: {ended:?}")),
        Some(ended) = answering.join_next() => Some(format!("a loop of the daemon ended early: {ended:?}")),
    };
    notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: running jobs are stopped and recorded");
    daemon.stop();
    work.cancel();
    daemon.proxied.stop(PROXIED_STOP_MAX).await;
    while loops.join_next().await.is_some() {}
    doors.cancel();
    while answering.join_next().await.is_some() {}
    let _ = std::fs::remove_file(&config.socket);
    match failure {
        None => Ok(()),
        Some(detail) => Err(Problem::new(Code::Internal, detail)),
    }
}

/// Leaves the guests running without this daemon: nobody is to take them, and no watchdog to end them.
async fn rest(ha: Option<&Ha>) {
    let Some(ha) = ha else { return };
    if !ha.stop(ha::STOP_MAX).await {
        tracing::error!(
            "the others could not be told that this daemon was stopped on purpose: its watchdog counts on, and its guests \
             are started elsewhere unless it runs again at once"
        );
    }
}

async fn build(config: Config, wiring: Wiring, ha: Option<Ha>) -> Result<Daemon> {
    let now = Timestamp::now();
    let dir = config.state_dir.clone();
    let unusable = |error: std::io::Error| {
        Problem::new(Code::StateUnavailable, format!("cannot use {} for the state: {error}", dir.display()))
            .hint("run as root, or name another directory with state-dir in [server] of the configuration")
    };
    std::fs::create_dir_all(&dir).map_err(unusable)?;
    let hub = Arc::new(Hub::new(format!("{:x}", now.as_microsecond())));
    let events = Events::open(&dir, hub.clone()).map_err(unusable)?;
    let (audit, broken) = Audit::open(&dir).map_err(unusable)?;
    if let Some(number) = broken {
        let text = format!("the audit log was changed or cut: entry {number} does not fit the one before it");
        tracing::error!("{text}");
        events.add(
            Note::new(Severity::Error, "audit-broken", text)
                .says(Said::from(Saying::AuditBroken).with("entry", number)),
        );
    }
    let others = wiring.connector.clone();
    let inventory = Arc::new(Inventory::new(wiring.connector, now));
    let kv = Kv::new(wiring.store);
    usable(&kv, config.cluster.is_some()).await?;
    tracing::info!(state = kv.location(), "state opened");
    let me = Me { name: config.node.clone(), boot: Uuid::now_v7() };
    let identity = match &config.cluster {
        Some(cluster) if cluster.listen.is_some() => Some(Arc::new(Identity::load(&cluster.dir)?)),
        _ => None,
    };
    Daemon::new(Parts { config, kv, inventory, others, hub, events, audit, me, identity, ha, now }).await
}

/// Waits until the state can be used. A cluster's may be away when hosts start after a power cut; that of one host is here
/// or is not.
async fn usable(kv: &Kv, is_cluster: bool) -> Result<()> {
    loop {
        match virtward_cluster::state::restoring(&*kv.store()).await {
            Ok(false) => return Ok(()),
            Ok(true) => {
                return Err(Problem::new(Code::StateUnavailable, "a restore of the state has not ended")
                    .hint("run virtward cluster restore-state again"));
            }
            Err(error) if is_cluster && error.is_retryable() => {
                tracing::warn!(%error, "waiting for the cluster's state");
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
            Err(error) => return Err(failures::state(&error)),
        }
    }
}

async fn peer_listener(address: SocketAddr, identity: &Identity) -> Result<(TcpListener, listen::Tls)> {
    let tls = peers::listen(identity)?;
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Problem::new(Code::Busy, format!("cannot listen on {address} for peers: {error}"))
            .hint("choose another address with listen in [cluster] of the configuration")
    })?;
    Ok((listener, Arc::new(RwLock::new(tls))))
}

async fn https(daemon: &Daemon, address: SocketAddr) -> Result<(TcpListener, listen::Tls)> {
    let (tls, certificate) = tls::load(&daemon.config(), &wire_up::node_name())?;
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Problem::new(Code::Busy, format!("cannot listen on {address}: {error}"))
            .hint("choose another address with listen in [server] of the configuration")
    })?;
    daemon.set_certificate(certificate);
    Ok((listener, Arc::new(RwLock::new(tls))))
}

/// Takes over the configuration at SIGHUP.
async fn reloading(daemon: Arc<Daemon>, reload: Reload, tls: Option<listen::Tls>, cancel: Cancel) {
    let mut signals = match signal(SignalKind::hangup()) {
        Ok(signals) => signals,
        Err(error) => {
            tracing::error!(%error, "SIGHUP will not be heard");
            return cancel.cancelled().await;
        }
    };
    loop {
        tokio::select! {
            _ = signals.recv() => {}
            () = cancel.cancelled() => return,
        }
        notify(&[NotifyState::Reloading]);
        let outcome = match reload() {
            Ok(next) => daemon.reconfigure(next).await.map_err(|problem| problem.detail),
            Err(error) => Err(error),
        };
        if let (Some(tls), Ok(())) = (&tls, &outcome) {
            match tls::load(&daemon.config(), &wire_up::node_name()) {
                Ok((next, certificate)) => {
                    *tls.write().unwrap_or_else(PoisonError::into_inner) = next;
                    daemon.set_certificate(certificate);
                }
                Err(problem) => tracing::error!(%problem, "the certificate stays as it was"),
            }
        }
        let note = match outcome {
            Ok(()) => Note::new(Severity::Info, "config-reloaded", "the configuration was read again")
                .says(Saying::ConfigReloaded),
            Err(error) => Note::new(Severity::Error, "config-refused", format!("the configuration stays: {error}"))
                .says(Said::from(Saying::ConfigRefused).with("why", error.to_string())),
        };
        note.log();
        let is_over = note.severity == Severity::Info;
        daemon.events.add(note.about("config", is_over));
        notify(&[NotifyState::Ready]);
    }
}

/// Tells systemd now and then that the daemon lives.
async fn watchdog(cancel: Cancel) {
    let mut usec = 0;
    if !sd_notify::watchdog_enabled(false, &mut usec) || usec == 0 {
        return cancel.cancelled().await;
    }
    let every = Duration::from_micros(usec / 3);
    loop {
        notify(&[NotifyState::Watchdog]);
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = cancel.cancelled() => return,
        }
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
