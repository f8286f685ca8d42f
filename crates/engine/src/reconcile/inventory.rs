//! What a host has, kept in step with its hypervisor: events say where to look, a complete look now and then finds what
//! no event told of.
//!
//! ```text
//! Up ─ a call finds nobody ─► ask the host itself ─┬ it answers ───────────────► LibvirtdDown
//!  ▲                                               ├ its network knows it not ─► Down
//!  └────────────── a look succeeds ◄───────────────┴ nothing can be told ──────► Unknown
//! ```
//!
//! Invariants: while the host does not answer, what was last seen stays, marked as such by the host's state; a VM goes
//! only when the hypervisor says that it is gone. `Down` is what can be seen from here and no permission to start its
//! VMs elsewhere. Not here: what the facts mean for protection.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::StreamExt;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, broadcast::error::RecvError, mpsc};
use uuid::Uuid;
use virtward_hypervisor::{DomainEventKind, DomainStats, ErrorKind, Hypervisor, XmlView};
use virtward_model::Vm;

use crate::{
    Cancel,
    collect::{self, Details},
    guest::GuestFacts,
};

/// Events that come together are handled together.
const SETTLE: Duration = Duration::from_millis(50);
/// Domains that are looked into at the same time.
const LOOKS_AT_ONCE: usize = 3;
/// Between two tries to reach a host that does not answer.
const RETRY: Duration = Duration::from_secs(3);

/// What is known of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Its hypervisor answers.
    Up,
    /// The host answers, its hypervisor does not.
    LibvirtdDown,
    /// The host does not answer on a network that works.
    Down,
    /// It cannot be told.
    Unknown,
}

/// How a host is reached.
#[async_trait]
pub trait Connector: Send + Sync {
    /// The URI, for people.
    fn uri(&self) -> String;
    /// The host's name as far as it is known before it answers.
    fn name(&self) -> String;
    /// Connects. The connection finds itself again after that.
    async fn connect(&self) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>>;
    /// Connects to another host, for VMs to move there.
    async fn other(&self, uri: &str) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>> {
        let text = format!("other hosts, such as {uri}, are not reached from here");
        Err(virtward_hypervisor::Error {
            kind: virtward_hypervisor::ErrorKind::Unsupported,
            call: "connect".into(),
            message: text,
            code: 0,
        })
    }
    /// What of the host answers when its hypervisor does not.
    async fn probe(&self) -> HostState;
}

/// A host as it is known.
#[derive(Clone, Debug, PartialEq)]
pub struct HostView {
    /// Name.
    pub name: String,
    /// UUID; none until it was reached once.
    pub uuid: Option<Uuid>,
    /// How it is reached.
    pub uri: String,
    /// What is known of it.
    pub state: HostState,
    /// Why it is not up.
    pub reason: Option<String>,
    /// In this state since.
    pub since: Timestamp,
    /// When it last answered.
    pub seen: Option<Timestamp>,
    /// libvirt's version, as libvirt encodes it.
    pub libvirt_version: Option<u64>,
    /// QEMU's version, in the same way.
    pub qemu_version: Option<u64>,
}

/// A VM as it is known.
#[derive(Clone, Debug, PartialEq)]
pub struct VmView {
    /// Name, state, disks.
    pub vm: Vm,
    /// What its definition says.
    pub details: Arc<Details>,
    /// Use of resources of late.
    pub usage: Option<VmUsage>,
    /// Whether the guest agent's channel is connected, as far as an event told.
    pub agent: Option<bool>,
    /// What the guest said of itself since it was started.
    pub guest: Option<Arc<GuestFacts>>,
}

/// Use of resources between two looks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmUsage {
    /// Of one processor.
    pub cpu: f64,
    /// Resident memory of the process.
    pub memory_rss_bytes: u64,
    /// Read per second.
    pub read_bytes_s: u64,
    /// Written per second.
    pub write_bytes_s: u64,
    /// Received per second.
    pub rx_bytes_s: u64,
    /// Sent per second.
    pub tx_bytes_s: u64,
    /// Virtual and allocated size of each disk.
    pub disks: BTreeMap<String, (u64, u64)>,
}

/// Everything that is known, at one instant.
#[derive(Clone, Debug)]
pub struct World {
    /// Rises with every change.
    pub generation: u64,
    /// The host.
    pub host: HostView,
    /// Its VMs.
    pub vms: BTreeMap<Uuid, Arc<VmView>>,
    /// A complete look succeeded at least once.
    pub is_complete: bool,
}

/// What became different.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The host's state, from this one.
    Host(HostState),
    /// A VM appeared.
    Added(Uuid),
    /// A VM is gone.
    Removed(Uuid, String),
    /// Something about a VM; the state that it had if that differs.
    Changed(Uuid, Option<virtward_model::VmState>),
}

/// What is known, for everybody to read.
pub struct Inventory {
    world: RwLock<Arc<World>>,
    link: RwLock<Option<Arc<dyn Hypervisor>>>,
    connector: Arc<dyn Connector>,
    wake: Notify,
    /// What guests said that is not in the world yet.
    heard: Mutex<HashMap<Uuid, GuestFacts>>,
    hears: Notify,
}

impl Inventory {
    /// Nothing is known yet.
    pub fn new(connector: Arc<dyn Connector>, now: Timestamp) -> Self {
        let host = HostView {
            name: connector.name(),
            uuid: None,
            uri: connector.uri(),
            state: HostState::Unknown,
            reason: Some("it was not asked yet".into()),
            since: now,
            seen: None,
            libvirt_version: None,
            qemu_version: None,
        };
        let world = World { generation: 0, host, vms: BTreeMap::new(), is_complete: false };
        Self {
            world: RwLock::new(Arc::new(world)),
            link: RwLock::default(),
            connector,
            wake: Notify::new(),
            heard: Mutex::default(),
            hears: Notify::new(),
        }
    }

    /// What is known now.
    pub fn world(&self) -> Arc<World> {
        self.world.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The connection, if there ever was one.
    pub fn hypervisor(&self) -> Option<Arc<dyn Hypervisor>> {
        self.link.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks for a complete look soon.
    pub fn look_again(&self) {
        self.wake.notify_one();
    }

    /// Takes note of what a guest said; it is in the world soon.
    pub fn hear(&self, vm: Uuid, facts: GuestFacts) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).insert(vm, facts);
        self.hears.notify_one();
    }

    fn publish(&self, world: World) {
        *self.world.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(world);
    }

    /// Keeps in step until cancelled; closes the connection at the end.
    pub async fn run(&self, every: Duration, changes: mpsc::Sender<Change>, cancel: Cancel) {
        let mut memory = Memory::default();
        while !cancel.is_cancelled() {
            let Some(hypervisor) = self.connected(&changes).await else {
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => continue,
                    () = cancel.cancelled() => break,
                }
            };
            tokio::select! {
                () = self.follow(&*hypervisor, every, &changes, &mut memory) => {}
                () = cancel.cancelled() => break,
            }
        }
        let hypervisor = self.hypervisor();
        if let Some(hypervisor) = hypervisor {
            hypervisor.close().await;
        }
    }

    async fn connected(&self, changes: &mpsc::Sender<Change>) -> Option<Arc<dyn Hypervisor>> {
        if let Some(hypervisor) = self.hypervisor() {
            return Some(hypervisor);
        }
        match self.connector.connect().await {
            Ok(hypervisor) => {
                *self.link.write().unwrap_or_else(PoisonError::into_inner) = Some(hypervisor.clone());
                Some(hypervisor)
            }
            Err(error) => {
                self.lost(error.to_string(), changes).await;
                None
            }
        }
    }

    /// Looks once, then at what events point to, and at everything again after `every`. Never ends by itself.
    async fn follow(
        &self,
        hypervisor: &dyn Hypervisor,
        every: Duration,
        changes: &mpsc::Sender<Change>,
        memory: &mut Memory,
    ) {
        let mut events = hypervisor.events();
        loop {
            let wait = match self.look(hypervisor, changes, memory).await {
                true => every,
                false => RETRY.min(every),
            };
            let deadline = tokio::time::Instant::now() + wait;
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    () = tokio::time::sleep_until(deadline) => break,
                    () = self.wake.notified() => break,
                    () = self.hears.notified() => {
                        self.listen(changes, memory).await;
                        continue;
                    }
                };
                let mut dirty = BTreeSet::new();
                let mut whole = note(event, &mut dirty, memory);
                tokio::time::sleep(SETTLE).await;
                while let Some(more) = drain(&mut events) {
                    whole |= note(more, &mut dirty, memory);
                }
                if whole {
                    break;
                }
                self.look_at(hypervisor, dirty, changes, memory).await;
            }
        }
    }

    /// A complete look; whether it succeeded.
    async fn look(&self, hypervisor: &dyn Hypervisor, changes: &mpsc::Sender<Change>, memory: &mut Memory) -> bool {
        let answer = async { Ok((hypervisor.host().await?, hypervisor.list().await?)) }.await;
        let (info, list) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                let error: virtward_hypervisor::Error = error;
                self.lost(error.to_string(), changes).await;
                return false;
            }
        };
        let usage = match hypervisor.stats().await {
            Ok(stats) => memory.usage(stats),
            Err(error) => {
                tracing::debug!(%error, "no counters");
                HashMap::new()
            }
        };
        let before = self.world();
        let now = Timestamp::now();
        let mut vms = BTreeMap::new();
        let looks = futures::stream::iter(list.into_iter().map(|vm| look_into(hypervisor, vm, &memory.agents)));
        let seen = looks.buffer_unordered(LOOKS_AT_ONCE).collect::<Vec<_>>().await;
        for (vm, details, agent) in seen {
            let usage = usage.get(&vm.uuid).cloned();
            vms.insert(vm.uuid, Arc::new(memory.view(vm, details, agent, usage)));
        }
        let was = before.host.state;
        let host = HostView {
            name: info.name,
            uuid: Some(info.uuid),
            uri: before.host.uri.clone(),
            state: HostState::Up,
            reason: None,
            since: if was == HostState::Up { before.host.since } else { now },
            seen: Some(now),
            libvirt_version: Some(info.libvirt_version),
            qemu_version: Some(info.qemu_version).filter(|version| *version > 0),
        };
        let mut found = Vec::new();
        if was != HostState::Up {
            found.push(Change::Host(was));
        }
        found.extend(differences(&before.vms, &vms));
        memory.forget_all_but(&vms);
        self.publish(World { generation: before.generation + 1, host, vms, is_complete: true });
        tell(changes, found).await;
        true
    }

    /// A look at some VMs.
    async fn look_at(
        &self,
        hypervisor: &dyn Hypervisor,
        dirty: BTreeSet<Uuid>,
        changes: &mpsc::Sender<Change>,
        memory: &mut Memory,
    ) {
        let before = self.world();
        let mut vms = before.vms.clone();
        for uuid in dirty {
            match hypervisor.lookup(&uuid.to_string()).await {
                Ok(vm) => {
                    let usage = vms.get(&uuid).and_then(|view| view.usage.clone()).filter(|_| vm.state.is_active());
                    let (vm, details, agent) = look_into(hypervisor, vm, &memory.agents).await;
                    vms.insert(uuid, Arc::new(memory.view(vm, details, agent, usage)));
                }
                Err(error) if error.kind == ErrorKind::NoDomain => {
                    vms.remove(&uuid);
                }
                Err(error) => {
                    // The next complete look tells; until then what was known stays.
                    tracing::debug!(%uuid, %error, "could not look at a domain");
                }
            }
        }
        let found = differences(&before.vms, &vms);
        self.publish(World { generation: before.generation + 1, vms, ..World::clone(&before) });
        tell(changes, found).await;
    }

    /// Puts into the world what guests said.
    async fn listen(&self, changes: &mpsc::Sender<Change>, memory: &mut Memory) {
        let heard = std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner));
        let before = self.world();
        let mut vms = before.vms.clone();
        for (uuid, facts) in heard {
            let Some(view) = vms.get(&uuid).filter(|view| view.vm.state.is_active()) else { continue };
            if view.guest.as_deref() == Some(&facts) {
                continue;
            }
            let facts = Arc::new(facts);
            memory.guests.insert(uuid, facts.clone());
            let view = VmView { guest: Some(facts), ..VmView::clone(view) };
            vms.insert(uuid, Arc::new(view));
        }
        let found = differences(&before.vms, &vms);
        if !found.is_empty() {
            self.publish(World { generation: before.generation + 1, vms, ..World::clone(&before) });
            tell(changes, found).await;
        }
    }

    async fn lost(&self, why: String, changes: &mpsc::Sender<Change>) {
        let state = match self.connector.probe().await {
            // It cannot be up: a call just failed.
            HostState::Up => HostState::LibvirtdDown,
            state => state,
        };
        let before = self.world();
        let was = before.host.state;
        let host = HostView {
            state,
            reason: Some(why),
            since: if was == state { before.host.since } else { Timestamp::now() },
            ..before.host.clone()
        };
        let world = World { generation: before.generation + 1, host, ..World::clone(&before) };
        self.publish(world);
        if was != state {
            tell(changes, vec![Change::Host(was)]).await;
        }
    }
}

/// What only this loop needs to remember.
#[derive(Default)]
struct Memory {
    counters: HashMap<Uuid, (Instant, DomainStats)>,
    /// Whether the agents of active guests are connected; none if that was asked, and libvirt does not say.
    agents: HashMap<Uuid, Option<bool>>,
    /// What active guests said of themselves.
    guests: HashMap<Uuid, Arc<GuestFacts>>,
}

/// What a domain's definition says, and whether its guest's agent is connected, if that could be asked. Events tell it; of
/// one that was connected before this began, or while nobody listened, there is none: its XML is asked, once.
async fn look_into(
    hypervisor: &dyn Hypervisor,
    vm: Vm,
    agents: &HashMap<Uuid, Option<bool>>,
) -> (Vm, Details, Option<Option<bool>>) {
    let details = collect::details(hypervisor, vm.uuid).await;
    let agent = match agents.get(&vm.uuid) {
        Some(known) => Some(*known),
        None if vm.state.is_active() && details.has_agent_channel => {
            let live = hypervisor.xml(vm.uuid, XmlView::Live).await.ok();
            live.map(|live| collect::is_agent_connected(&live))
        }
        None => None,
    };
    (vm, details, agent)
}

impl Memory {
    /// A VM as it was seen, with what is remembered of it. A guest that ended has to say everything again.
    fn view(&mut self, vm: Vm, details: Details, agent: Option<Option<bool>>, usage: Option<VmUsage>) -> VmView {
        let uuid = vm.uuid;
        let agent = agent.filter(|_| vm.state.is_active());
        match agent {
            Some(agent) => _ = self.agents.insert(uuid, agent),
            None => _ = self.agents.remove(&uuid),
        }
        if !vm.state.is_active() {
            self.guests.remove(&uuid);
        }
        let guest = self.guests.get(&uuid).cloned();
        VmView { vm, details: Arc::new(details), usage, agent: agent.flatten(), guest }
    }

    fn usage(&mut self, stats: Vec<DomainStats>) -> HashMap<Uuid, VmUsage> {
        let now = Instant::now();
        let mut usage = HashMap::new();
        for new in stats {
            if let Some((then, old)) = self.counters.get(&new.uuid) {
                usage.insert(new.uuid, rates(old, &new, now.duration_since(*then)));
            } else {
                usage.insert(new.uuid, rates(&new, &new, Duration::from_secs(1)));
            }
            self.counters.insert(new.uuid, (now, new));
        }
        usage
    }

    fn forget_all_but(&mut self, vms: &BTreeMap<Uuid, Arc<VmView>>) {
        self.counters.retain(|uuid, _| vms.contains_key(uuid));
        self.agents.retain(|uuid, _| vms.contains_key(uuid));
        self.guests.retain(|uuid, _| vms.contains_key(uuid));
    }
}

fn rates(old: &DomainStats, new: &DomainStats, over: Duration) -> VmUsage {
    let seconds = over.as_secs_f64().max(0.001);
    // Counters begin anew when a VM is started again.
    let per_s = |old: u64, new: u64| (new.saturating_sub(old) as f64 / seconds) as u64;
    let disks = |of: fn(&virtward_hypervisor::DiskStats) -> u64, from: &DomainStats| from.disks.iter().map(of).sum();
    let nets = |of: fn(&virtward_hypervisor::NetStats) -> u64, from: &DomainStats| from.nets.iter().map(of).sum();
    VmUsage {
        cpu: new.cpu_time_ns.saturating_sub(old.cpu_time_ns) as f64 / 1e9 / seconds,
        memory_rss_bytes: new.memory_rss_bytes,
        read_bytes_s: per_s(disks(|d| d.read_bytes, old), disks(|d| d.read_bytes, new)),
        write_bytes_s: per_s(disks(|d| d.write_bytes, old), disks(|d| d.write_bytes, new)),
        rx_bytes_s: per_s(nets(|n| n.rx_bytes, old), nets(|n| n.rx_bytes, new)),
        tx_bytes_s: per_s(nets(|n| n.tx_bytes, old), nets(|n| n.tx_bytes, new)),
        disks: new.disks.iter().map(|d| (d.target.clone(), (d.capacity_bytes, d.allocation_bytes))).collect(),
    }
}

type Received = Result<virtward_hypervisor::DomainEvent, RecvError>;

/// Takes note of an event; whether everything has to be looked at.
fn note(event: Received, dirty: &mut BTreeSet<Uuid>, memory: &mut Memory) -> bool {
    match event {
        Ok(event) => match event.kind {
            DomainEventKind::ConnectionLost => true,
            DomainEventKind::ConnectionRestored => {
                memory.agents.clear();
                true
            }
            DomainEventKind::Agent { connected } => {
                memory.agents.insert(event.uuid, Some(connected));
                dirty.insert(event.uuid);
                false
            }
            _ => {
                dirty.insert(event.uuid);
                false
            }
        },
        // Some were lost, or none will come any more: only a complete look can tell.
        Err(_) => {
            memory.agents.clear();
            true
        }
    }
}

fn drain(events: &mut tokio::sync::broadcast::Receiver<virtward_hypervisor::DomainEvent>) -> Option<Received> {
    use tokio::sync::broadcast::error::TryRecvError;
    match events.try_recv() {
        Ok(event) => Some(Ok(event)),
        Err(TryRecvError::Lagged(lost)) => Some(Err(RecvError::Lagged(lost))),
        Err(TryRecvError::Empty | TryRecvError::Closed) => None,
    }
}

fn differences(before: &BTreeMap<Uuid, Arc<VmView>>, after: &BTreeMap<Uuid, Arc<VmView>>) -> Vec<Change> {
    let gone = before.iter().filter(|(uuid, _)| !after.contains_key(uuid));
    let gone = gone.map(|(uuid, view)| Change::Removed(*uuid, view.vm.name.clone()));
    let others = after.iter().filter_map(|(uuid, new)| match before.get(uuid) {
        None => Some(Change::Added(*uuid)),
        Some(old) if old.vm.state != new.vm.state => Some(Change::Changed(*uuid, Some(old.vm.state))),
        Some(old) if is_other(old, new) => Some(Change::Changed(*uuid, None)),
        Some(_) => None,
    });
    gone.chain(others).collect()
}

fn is_other(old: &VmView, new: &VmView) -> bool {
    (&old.vm, &old.details, old.agent, &old.guest) != (&new.vm, &new.details, new.agent, &new.guest)
}

async fn tell(changes: &mpsc::Sender<Change>, found: Vec<Change>) {
    for change in found {
        // Nobody listens any more only when the daemon ends.
        if changes.send(change).await.is_err() {
            return;
        }
    }
}
