//! High availability within the daemon: starts the loops of `engine::ha::run` before anything else of the daemon is there,
//! and answers for the daemon what they need of it.
//!
//! ```text
//!   run ─► ha::start ─► loops (threads of their own): heartbeats go on while the rest starts, works, hangs or stops
//!      └─► Daemon ─► Link::attach: who leads, the way to peers, events, claims
//! ```

mod actions;
mod capacity;
mod moving;
mod pairs;
mod services;
mod views;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use virtward_api::{Code, Problem, Severity};
use virtward_cluster::Store;
use virtward_decide::ha::HostId;
use virtward_engine::{
    Cancel,
    ha::run::{Ha, Outside, Settings, Weight},
    reconcile::inventory::Connector,
};
use virtward_hypervisor::Hypervisor;

pub use self::{
    actions::{arm, confirm_off, disable, enable, start_vm, test_fencing},
    capacity::{If, capacity},
    moving::moving,
    pairs::switch,
    views::{explain, status, vm},
};
use crate::{
    cluster::leader,
    config::Config,
    daemon::Daemon,
    events::Note,
    failures::Result,
    peers::{Peers, client::Call},
    wire_up,
};

/// Kind of all events.
pub const EVENT: &str = "ha";
/// Between two looks who leads.
const LEADER_EVERY: Duration = Duration::from_secs(2);
/// How long a host that should be off is asked whether it is.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// How long the end of the daemon may wait for the store and the watchdog.
pub const STOP_MAX: Duration = Duration::from_secs(8);

/// What a host is told of high availability: `[ha]` of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct HaConfig {
    /// Times, checked.
    pub timing: virtward_decide::ha::Timing,
    /// Ask the peers when the store is lost.
    pub failsafe: bool,
    /// Watchdog device, or keeper's socket.
    pub watchdog: Option<PathBuf>,
    /// Directories on shared storage that hold the disks' leases.
    pub lease_dirs: Vec<PathBuf>,
    /// Fence devices, by host.
    pub devices: Vec<(String, virtward_engine::ha::fence::Device)>,
    /// Memory for guests, in bytes.
    pub memory_bytes: u64,
    /// libvirt's directory of hooks.
    pub hooks_dir: PathBuf,
    /// libvirt's runtime directory.
    pub libvirt_dir: PathBuf,
    /// The program that the hook calls.
    pub program: PathBuf,
}

/// Whether anybody declared a host dead.
#[derive(Serialize, Deserialize)]
pub struct Word {
    /// Nobody, as far as the daemon that says so knows.
    pub fine: bool,
}

/// Starts the loops, if this host is to take part.
pub fn start(config: &Config, connector: Arc<dyn Connector>, store: Arc<dyn Store>) -> Result<Option<(Ha, Arc<Link>)>> {
    let Some(of) = &config.ha else { return Ok(None) };
    let runtime_dir = config.socket.parent().map(PathBuf::from).unwrap_or_else(|| "/run/virtward".into());
    let settings = Settings {
        host: HostId(config.node.clone()),
        timing: of.timing.clone(),
        failsafe: of.failsafe,
        // Alone nobody could take this host's VMs, so nothing is won by a reset.
        watchdog: of.watchdog.clone().filter(|_| config.cluster.is_some()),
        leases: of.lease_dirs.iter().cloned().map(virtward_engine::ha::lease::Place::Directory).collect(),
        devices: {
            let mut devices = std::collections::BTreeMap::<HostId, Vec<_>>::new();
            for (host, device) in &of.devices {
                devices.entry(HostId(host.clone())).or_default().push(device.clone());
            }
            devices
        },
        memory_bytes: of.memory_bytes,
        state_dir: config.state_dir.join("ha"),
        run_dir: runtime_dir.join("ha"),
        hooks_dir: of.hooks_dir.clone(),
        qemu_dir: of.libvirt_dir.join("qemu"),
        libvirt_pid_files: [of.libvirt_dir.clone(), of.libvirt_dir.parent().map(PathBuf::from).unwrap_or_default()]
            .iter()
            .flat_map(|dir| ["virtqemud.pid", "libvirtd.pid"].map(|name| dir.join(name)))
            .collect(),
        program: of.program.clone(),
    };
    let (notes, heard) = mpsc::unbounded_channel();
    let link = Arc::new(Link {
        config: config.clone(),
        connector,
        store,
        daemon: OnceLock::new(),
        peers: OnceLock::new(),
        leader: Mutex::new(None),
        notes,
        heard: Mutex::new(Some(heard)),
    });
    let ha = Ha::start(settings, link.clone()).map_err(|error| {
        Problem::new(Code::Internal, format!("the threads of high availability do not start: {error}"))
    })?;
    Ok(Some((ha, link)))
}

/// What the loops need of the daemon, which is there later than they are.
pub struct Link {
    config: Config,
    connector: Arc<dyn Connector>,
    store: Arc<dyn Store>,
    daemon: OnceLock<Arc<Daemon>>,
    /// Connections that nothing else uses.
    peers: OnceLock<Peers>,
    leader: Mutex<Option<HostId>>,
    notes: mpsc::UnboundedSender<(Weight, String)>,
    heard: Mutex<Option<mpsc::UnboundedReceiver<(Weight, String)>>>,
}

impl Link {
    /// The daemon is there.
    pub fn attach(&self, daemon: &Arc<Daemon>) -> Result<()> {
        let peers = Peers::new(daemon.nodes.clone(), daemon.peers.identity())?;
        let _ = self.peers.set(peers);
        let _ = self.daemon.set(daemon.clone());
        Ok(())
    }

    /// Passes on what happened, and looks who leads.
    pub async fn run(self: Arc<Self>, daemon: Arc<Daemon>, cancel: Cancel) {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut heard) = heard else { return cancel.cancelled().await };
        let mut look = tokio::time::interval(LEADER_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                note = heard.recv() => {
                    let Some((weight, text)) = note else { return };
                    let severity = match weight {
                        Weight::Info => Severity::Info,
                        Weight::Warning => Severity::Warning,
                        Weight::Error => Severity::Error,
                    };
                    daemon.events.add(Note::new(severity, EVENT, text));
                }
                _ = look.tick() => {
                    if let Ok(Some(record)) = leader::current(&daemon.kv).await {
                        *self.leader.lock().unwrap_or_else(PoisonError::into_inner) = Some(HostId(record.node));
                    }
                }
                () = cancel.cancelled() => return,
            }
        }
    }
}

#[async_trait]
impl Outside for Link {
    fn store(&self, limit: Duration) -> std::result::Result<Arc<dyn Store>, String> {
        wire_up::ha_store(&self.config, self.store.clone(), limit).map_err(|problem| problem.detail)
    }

    async fn hypervisor(&self) -> std::result::Result<Arc<dyn Hypervisor>, String> {
        self.connector.connect().await.map_err(|error| error.to_string())
    }

    fn is_leading(&self) -> bool {
        self.daemon.get().is_some_and(|daemon| daemon.leader.is_leader() && !daemon.is_stopping())
    }

    fn leader(&self) -> Option<HostId> {
        self.leader.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn closed(&self) -> BTreeSet<HostId> {
        self.daemon.get().map(|daemon| drained(daemon)).unwrap_or_default()
    }

    async fn ask(&self, peer: &HostId, epoch: u64) -> Option<bool> {
        let path = format!("/peer/v1/ha/word?epoch={epoch}");
        let call = Call { method: "GET", path: &path, headers: &[], body: Bytes::new() };
        let (status, body) = self.peers.get()?.ask(&peer.0, &call).await.ok()?;
        let word: Word = serde_json::from_slice(&body).ok().filter(|_| status == 200)?;
        Some(word.fine)
    }

    async fn answers(&self, host: &HostId) -> bool {
        let call = Call { method: "GET", path: "/peer/v1/ping", headers: &[], body: Bytes::new() };
        let Some(peers) = self.peers.get() else { return false };
        matches!(tokio::time::timeout(ANSWER_MAX, peers.ask(&host.0, &call)).await, Ok(Ok((200, _))))
    }

    fn say(&self, weight: Weight, text: &str) {
        match weight {
            Weight::Info => tracing::info!("{text}"),
            Weight::Warning => tracing::warn!("{text}"),
            Weight::Error => tracing::error!("{text}"),
        }
        let _ = self.notes.send((weight, text.to_owned()));
    }

    async fn is_over(&self, host: &HostId) {
        let Some(daemon) = self.daemon.get() else { return };
        if let Err(problem) = daemon.claims.void_node(&host.0).await {
            tracing::warn!(%host, %problem, "what it had claimed is not void yet");
        }
    }
}

/// Hosts that were emptied and take nothing.
fn drained(daemon: &Daemon) -> BTreeSet<HostId> {
    daemon.drained.all().into_iter().map(|(node, _)| HostId(node)).collect()
}

/// High availability of this daemon, or why there is none.
pub fn of(daemon: &Daemon) -> Result<&Ha> {
    daemon.ha.as_ref().ok_or_else(|| {
        Problem::new(Code::Conflict, "high availability is not configured on this host")
            .hint("add [ha] to its configuration and restart the daemon: docs/ha.md says what belongs there")
    })
}
