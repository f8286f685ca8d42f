//! The loops of high availability: they feed the machines of `virtward_decide::ha` with what happens and perform what the
//! machines ask for. They decide nothing.
//!
//! ```text
//!   store ─ every record, twice a second ─► view ─┬─► host: the agent      ─► heartbeats, watchdog, guests, hook
//!                                                 └─► watch: the coordinator ─► FENCING, fence devices, proofs, claims
//! ```
//!
//! All of it runs on threads of its own with a runtime, a connection to the store and one to the hypervisor of its own,
//! so that nothing else which the daemon does delays a heartbeat or a pet. What may hang (storage, processes, the
//! hypervisor) is never waited for by the loops themselves.
//!
//! Where a restart of the daemon meets a running guest:
//!
//! ```text
//!   killed ──► the watchdog counts ──► started again within W: the record is remembered, a heartbeat, pets go on
//!   stopped in order ──► maintenance in the record, watchdog off ──► any time later: watchdog on, maintenance off
//! ```

pub mod clock;
mod host;
pub mod store;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc, oneshot, watch as latest};
use virtward_cluster::Store;
use virtward_decide::ha::{
    HostId, Moment, Timing, View, VmId,
    agent::Stage,
    coordinator::{self, Coordinator},
    record::WatchdogClass,
    recovery::Held,
};
use virtward_hypervisor::Hypervisor;

use super::{fence::Device, hook::Hook, lease::Place};

/// Between two looks at the store.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// After one that failed.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What a host is told of high availability.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This host's name in the cluster.
    pub host: HostId,
    /// Times, checked.
    pub timing: Timing,
    /// Ask the peers when the store is lost.
    pub failsafe: bool,
    /// Watchdog device or keeper's socket.
    pub watchdog: Option<PathBuf>,
    /// Where the disks' leases are.
    pub leases: Vec<Place>,
    /// Fence devices by host.
    pub devices: BTreeMap<HostId, Vec<Device>>,
    /// Memory for guests, in bytes.
    pub memory_bytes: u64,
    /// State that outlives a boot: what the hook reads.
    pub state_dir: PathBuf,
    /// State of this boot alone (below `/run`).
    pub run_dir: PathBuf,
    /// libvirt's directory of hooks.
    pub hooks_dir: PathBuf,
    /// libvirt's directory of QEMU's pid files.
    pub qemu_dir: PathBuf,
    /// Pid files of libvirt's daemons.
    pub libvirt_pid_files: Vec<PathBuf>,
    /// The program that the hook calls.
    pub program: PathBuf,
}

impl Settings {
    /// The hook's files.
    pub fn hook(&self) -> Hook {
        Hook::new(&self.state_dir)
    }
}

/// How much something matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// It is good to know.
    Info,
    /// Somebody should look at it.
    Warning,
    /// Something is down or in danger.
    Error,
}

/// What the daemon around the loops does for them.
#[async_trait]
pub trait Outside: Send + Sync + 'static {
    /// The store, made on the calling runtime, whose calls end within `limit`.
    fn store(&self, limit: Duration) -> Result<Arc<dyn Store>, String>;
    /// A connection to the hypervisor of this host.
    async fn hypervisor(&self) -> Result<Arc<dyn Hypervisor>, String>;
    /// Whether this daemon leads the cluster.
    fn is_leading(&self) -> bool;
    /// Who led it last, as far as is known.
    fn leader(&self) -> Option<HostId>;
    /// Hosts that take no VMs because they were emptied, as far as is known.
    fn closed(&self) -> BTreeSet<HostId>;
    /// Asks a peer whether anybody declared this host dead; none if it does not answer.
    async fn ask(&self, peer: &HostId, epoch: u64) -> Option<bool>;
    /// Whether a host's daemon answers now, whatever the store says of it.
    async fn answers(&self, host: &HostId) -> bool;
    /// Something happened that people want to know.
    fn say(&self, weight: Weight, text: &str);
    /// It is proved that a host does nothing more of what it did.
    async fn is_over(&self, host: &HostId);
}

/// Records as they stood, and when it was asked for them.
#[derive(Clone, Debug)]
pub struct Looked {
    /// Records.
    pub view: Arc<View>,
    /// They are no older.
    pub asked: Moment,
}

/// The agent as it stands.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where it stands.
    pub stage: Stage,
    /// The watchdog as armed.
    pub watchdog: Option<WatchdogClass>,
    /// What it calls itself, or why there is none.
    pub watchdog_text: String,
    /// Until when guests may run without another heartbeat, in milliseconds from now; none if they may not.
    pub allowed_ms: Option<u64>,
    /// Why the hook does not hold, if it does not.
    pub hook_error: Option<String>,
}

struct Shared {
    settings: Settings,
    looked: latest::Sender<Option<Looked>>,
    look_now: Notify,
    store_error: Mutex<Option<String>>,
    coordinator: Mutex<Coordinator>,
    status: Mutex<Status>,
    to_agent: mpsc::UnboundedSender<host::Input>,
    to_coordinator: mpsc::UnboundedSender<watch::Input>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// High availability of this host, as others see and steer it. Clones share it.
#[derive(Clone)]
pub struct Ha(Arc<Shared>);

impl Ha {
    /// Starts the loops on threads of their own. They end with the process, or by [`Ha::stop`].
    pub fn start(settings: Settings, outside: Arc<dyn Outside>) -> std::io::Result<Self> {
        let (to_agent, agent_input) = mpsc::unbounded_channel();
        let (to_coordinator, coordinator_input) = mpsc::unbounded_channel();
        let status = Status {
            stage: Stage::Out,
            watchdog: None,
            watchdog_text: String::new(),
            allowed_ms: None,
            hook_error: Some(host::HOOK_UNKNOWN.into()),
        };
        let ha = Self(Arc::new(Shared {
            coordinator: Mutex::new(Coordinator::new(settings.host.clone(), settings.timing.clone())),
            looked: latest::Sender::new(None),
            look_now: Notify::new(),
            store_error: Mutex::new(None),
            status: Mutex::new(status),
            settings,
            to_agent,
            to_coordinator,
        }));
        let loops = ha.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(3)
            .thread_name("ha")
            .max_blocking_threads(64)
            .enable_all()
            .build()?;
        std::thread::Builder::new().name("ha".into()).spawn(move || {
            runtime.block_on(async move {
                let limit = Duration::from_millis(loops.0.settings.timing.heartbeat_ms.min(2_000));
                let store = loop {
                    match outside.store(limit) {
                        Ok(store) => break store,
                        Err(error) => tracing::error!(error, "high availability has no store"),
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                };
                tokio::spawn(loops.clone().look(store.clone(), outside.clone()));
                tokio::spawn(watch::run(loops.clone(), store.clone(), outside.clone(), coordinator_input));
                host::run(loops, store, outside, agent_input).await;
            });
        })?;
        Ok(ha)
    }

    /// What it was told.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// All records as they were seen last.
    pub fn looked(&self) -> Option<Looked> {
        self.0.looked.borrow().clone()
    }

    /// Why the store does not answer, if it does not.
    pub fn store_error(&self) -> Option<String> {
        lock(&self.0.store_error).clone()
    }

    /// The agent.
    pub fn status(&self) -> Status {
        lock(&self.0.status).clone()
    }

    /// The answer to a host that asks whether anybody declared it dead. Whoever is told true is known to live.
    pub fn word(&self, host: &HostId, epoch: u64) -> bool {
        let mut coordinator = lock(&self.0.coordinator);
        let word = coordinator.word(host, epoch);
        if word {
            // Nothing follows from it at once.
            let _ = coordinator.step(clock::now(), coordinator::Event::AskedBy(host.clone()));
        }
        word
    }

    /// Why VMs that should run are not being started, as this daemon sees it.
    pub fn held(&self) -> BTreeMap<VmId, Held> {
        lock(&self.0.coordinator).held().clone()
    }

    /// Hosts that are being fenced, with what their proof waits for.
    pub fn cases(&self) -> BTreeMap<HostId, String> {
        lock(&self.0.coordinator).cases(clock::now())
    }

    /// How long a host has been silent, in milliseconds.
    pub fn silent_ms(&self, host: &HostId) -> Option<u64> {
        lock(&self.0.coordinator).silent_ms(host)
    }

    /// A person says that a host is down.
    pub fn confirm_down(&self, host: HostId, by: String) {
        let _ = self.0.to_coordinator.send(watch::Input::ConfirmDown { host, by });
    }

    /// A protected VM's name, for people; its UUID if that is not known.
    fn name(&self, vm: VmId) -> String {
        let looked = self.0.looked.borrow();
        let record = looked.as_ref().and_then(|looked| looked.view.vms.get(&vm));
        record.map_or_else(|| vm.to_string(), |record| record.value.name.clone())
    }

    /// Something changed: looks at the store now.
    pub fn look_now(&self) {
        self.0.look_now.notify_one();
    }

    /// The daemon is about to end and its guests go on: tells the others that nobody is to take them, and stops the watchdog.
    /// False if that did not succeed in time; the watchdog counts on then.
    pub async fn stop(&self, within: Duration) -> bool {
        let (done, is_done) = oneshot::channel();
        if self.0.to_agent.send(host::Input::Stop(done)).is_err() {
            return false;
        }
        matches!(tokio::time::timeout(within, is_done).await, Ok(Ok(())))
    }

    /// Reads all records again and again.
    async fn look(self, store: Arc<dyn Store>, outside: Arc<dyn Outside>) {
        loop {
            let asked = clock::now();
            match store::view(&*store).await {
                Ok(mut view) => {
                    view.closed = outside.closed();
                    *lock(&self.0.store_error) = None;
                    self.0.looked.send_replace(Some(Looked { view: Arc::new(view), asked }));
                    // What this daemon changed itself is seen at once.
                    let _ = tokio::time::timeout(LOOK_EVERY, self.0.look_now.notified()).await;
                }
                Err(error) => {
                    *lock(&self.0.store_error) = Some(error.to_string());
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }
}
