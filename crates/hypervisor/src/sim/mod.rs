//! Simulated hosts, for what cannot be provoked for real: [`Hypervisor`](crate::Hypervisor) in memory.
//!
//! Fault model. A host loses and regains its connection, or its power. A QEMU process dies. A guest agent is absent,
//! hangs, or says it froze what it did not. A bitmap vanishes or becomes inconsistent. Any call can be made to fail
//! once. Disks are shared between the hosts of a world, by path.
//!
//! What is modelled as the real thing does it (checked by the contract suite): states and who may do what in them; one
//! domain-wide job at a time; bitmaps live in QEMU, are saved into qcow2 images when it ends in order, and are missing
//! or inconsistent when it does not; checkpoint metadata belongs to a host and does not migrate, bitmaps do.
//!
//! Not modelled: disk contents, NBD servers, time (the clock only moves when a checkpoint is made), partial failures
//! inside one call. Same calls, same answers: there is no randomness.

mod calls;
mod disk;
mod domain;
mod faults;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;
use uuid::Uuid;

use virtward_model::{CpuFit, Fit, HostOffer};

use crate::{DomainEvent, DomainEventKind, Error, ErrorKind, Result};
use disk::Image;
use domain::Domain;
pub use faults::AgentMode;

/// Events kept for a receiver that lags.
const EVENTS_KEPT: usize = 1024;
/// Versions that a simulated host claims: what the rules were taken from.
const VERSIONS: (u64, u64) = (11_003_000, 10_000_002);
/// Time of the first checkpoint, in seconds since 1970.
const EPOCH_S: i64 = 1_700_000_000;

/// Several simulated hosts that can reach each other's disks.
#[derive(Clone, Default)]
pub struct SimWorld {
    inner: Arc<Mutex<World>>,
}

/// One simulated host; clones are the same host.
#[derive(Clone)]
pub struct SimHost {
    world: Arc<Mutex<World>>,
    name: String,
    events: broadcast::Sender<DomainEvent>,
}

#[derive(Default)]
struct World {
    hosts: BTreeMap<String, Host>,
    images: BTreeMap<String, Image>,
    checkpoints_made: i64,
}

/// A host as the world knows it.
struct Host {
    uuid: Uuid,
    connected: bool,
    powered: bool,
    closed: bool,
    domains: BTreeMap<Uuid, Domain>,
    offer: HostOffer,
    fit: Fit,
    /// Errors that the next calls of a method return.
    failures: BTreeMap<String, Vec<(ErrorKind, String)>>,
    events: broadcast::Sender<DomainEvent>,
}

impl SimWorld {
    /// A world without hosts.
    pub fn new() -> SimWorld {
        SimWorld::default()
    }

    /// The host of this name; made when first asked for.
    pub fn host(&self, name: &str) -> SimHost {
        let mut world = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let host = world.hosts.entry(name.to_owned()).or_insert_with(|| Host {
            uuid: name_uuid("host", name),
            connected: true,
            powered: true,
            closed: false,
            domains: BTreeMap::new(),
            offer: HostOffer {
                name: name.to_owned(),
                uuid: name_uuid("host", name),
                libvirt_version: VERSIONS.0,
                qemu_version: VERSIONS.1,
                cpus: 8,
                memory_total_bytes: 64 << 30,
                memory_available_bytes: 48 << 30,
                networks: vec!["default".to_owned()],
                links: Some(Vec::new()),
            },
            fit: Fit { machine: None, cpu: CpuFit::Identical },
            failures: BTreeMap::new(),
            events: broadcast::Sender::new(EVENTS_KEPT),
        });
        SimHost { world: Arc::clone(&self.inner), name: name.to_owned(), events: host.events.clone() }
    }
}

impl World {
    fn image(&mut self, path: &str) -> &mut Image {
        self.images.entry(path.to_owned()).or_default()
    }

    fn tick(&mut self) -> i64 {
        self.checkpoints_made += 1;
        EPOCH_S + self.checkpoints_made
    }
}

impl SimHost {
    /// The URI under which the other hosts of the world reach this one.
    pub fn uri(&self) -> String {
        format!("sim://{}/system", self.name)
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one call: refused when the connection is gone or a failure was ordered, described by `verb` and the
    /// domain's name when it fails.
    fn call<T>(&self, method: &str, verb: &str, body: impl FnOnce(&mut World, &str) -> Outcome<T>) -> Result<T> {
        self.enter(method, |world| body(world, &self.name)).map_err(|r| r.into_error(verb, ""))
    }

    /// [`SimHost::call`] on one domain.
    fn on<T>(
        &self,
        method: &str,
        verb: &str,
        vm: Uuid,
        body: impl FnOnce(&mut Domain, &mut Around<'_>) -> Outcome<T>,
    ) -> Result<T> {
        let mut subject = vm.to_string();
        let outcome = self.enter(method, |world| {
            // Taken out for the time of the call, so that the body may change the world around it.
            let domain = world.hosts.get_mut(&self.name).and_then(|h| h.domains.remove(&vm));
            let mut domain = domain.ok_or_else(|| no_domain(&vm.to_string()))?;
            subject.clone_from(&domain.name);
            let events = self.events.clone();
            let mut around = Around { world, events, gone: false };
            let outcome = body(&mut domain, &mut around);
            let gone = around.gone;
            if let Some(host) = world.hosts.get_mut(&self.name).filter(|_| !gone) {
                host.domains.insert(vm, domain);
            }
            outcome
        });
        outcome.map_err(|r| r.into_error(verb, &subject))
    }

    fn enter<T>(&self, method: &str, body: impl FnOnce(&mut World) -> Outcome<T>) -> Outcome<T> {
        let mut world = self.lock();
        let host = world.hosts.get_mut(&self.name).ok_or_else(|| refuse(ErrorKind::Unreachable, "no such host"))?;
        if host.closed || !host.connected || !host.powered {
            return Err(refuse(ErrorKind::Unreachable, "not connected: the simulated connection is down"));
        }
        if let Some(failures) = host.failures.get_mut(method).filter(|f| !f.is_empty()) {
            let (kind, message) = failures.remove(0);
            return Err(refuse(kind, message));
        }
        body(&mut world)
    }
}

/// What surrounds a domain during a call on it.
struct Around<'a> {
    world: &'a mut World,
    events: broadcast::Sender<DomainEvent>,
    /// The domain is not to be put back.
    gone: bool,
}

impl Around<'_> {
    fn announce(&self, domain: &Domain, kind: DomainEventKind) {
        announce(&self.events, domain, kind);
    }
}

fn announce(events: &broadcast::Sender<DomainEvent>, domain: &Domain, kind: DomainEventKind) {
    // No receiver is no error.
    let _ = events.send(DomainEvent { uuid: domain.uuid, name: domain.name.clone(), kind });
}

/// A failed call before its description is put to it.
struct Refusal {
    kind: ErrorKind,
    message: String,
}

type Outcome<T> = std::result::Result<T, Refusal>;

impl Refusal {
    fn into_error(self, verb: &str, subject: &str) -> Error {
        let call = format!("{verb} {subject}").trim_end().to_owned();
        Error { kind: self.kind, call, message: self.message, code: code(self.kind) }
    }
}

fn refuse(kind: ErrorKind, message: impl Into<String>) -> Refusal {
    Refusal { kind, message: message.into() }
}

fn no_domain(name: &str) -> Refusal {
    refuse(ErrorKind::NoDomain, format!("Domain not found: no domain with matching name or uuid '{name}'"))
}

/// The libvirt error number that usually goes with a kind.
fn code(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::Unreachable => 38,
        ErrorKind::Denied => 88,
        ErrorKind::NoDomain => 42,
        ErrorKind::WrongState => 55,
        ErrorKind::Busy | ErrorKind::Timeout => 68,
        ErrorKind::NoCheckpoint => 103,
        ErrorKind::CheckpointInconsistent => 109,
        ErrorKind::AgentUnavailable => 86,
        ErrorKind::Unsupported => 84,
        ErrorKind::Invalid => 27,
        ErrorKind::Other => 1,
    }
}

/// A UUID that follows from a name (FNV-1a), so that runs repeat.
fn name_uuid(space: &str, name: &str) -> Uuid {
    let hash = |seed: u64| {
        space.bytes().chain([0]).chain(name.bytes()).fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
    };
    Uuid::from_u64_pair(hash(0xcbf2_9ce4_8422_2325), hash(0x8422_2325_cbf2_9ce4))
}
