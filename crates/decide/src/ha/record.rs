//! Records in the store. All keys are below `/ha/`; all values are JSON.
//!
//! | key | record | written by |
//! |---|---|---|
//! | `/ha/host/H` | [`HostRecord`] | H's agent while it lives; a coordinator by FENCING and with a proof |
//! | `/ha/hb/H` | [`Heartbeat`] | H's agent, only together with "`/ha/host/H` is as I put it" |
//! | `/ha/proof/H/E` | [`Proof`] | once, and never changed: nothing that H began in epoch E writes any more |
//! | `/ha/vm/V` | [`VmRecord`] | a coordinator (claims), the owner's agent (everything else) |
//! | `/ha/pair/P` | [`PairRecord`] | a coordinator or a host (switches), the hosts of both (what they were told), a person |
//! | `/ha/cluster` | [`ClusterRecord`] | a person |
//!
//! The store compares revisions only. "Epoch is e and phase is ARMED" is therefore a compare of the revision of
//! `/ha/host/H`: every change of that record, by anybody, refuses every later heartbeat that was made from the old one,
//! also one that was sent before and arrives after.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{pair::PairRecord, probe::Watched, timing::Timing, txn::Versioned};

/// All keys of high availability begin so.
pub const PREFIX: &str = "/ha/";

/// A VM.
pub type VmId = Uuid;

/// A host, by the name of its node in the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub String);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for HostId {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

/// Key of a host's record.
pub fn host_key(host: &HostId) -> String {
    format!("{PREFIX}host/{host}")
}

/// Key of a host's heartbeat.
pub fn heartbeat_key(host: &HostId) -> String {
    format!("{PREFIX}hb/{host}")
}

/// Key of the proof that an epoch of a host is over.
pub fn proof_key(host: &HostId, epoch: u64) -> String {
    format!("{PREFIX}proof/{host}/{epoch}")
}

/// Key of a VM.
pub fn vm_key(vm: VmId) -> String {
    format!("{PREFIX}vm/{vm}")
}

/// Key of a pair, by the VM that was its active one when it was made.
pub fn pair_key(pair: VmId) -> String {
    format!("{PREFIX}pair/{pair}")
}

/// Key of the cluster's switches.
pub fn cluster_key() -> String {
    format!("{PREFIX}cluster")
}

/// Where a host stands. The epoch rises whenever it leaves [`HostPhase::Armed`] or enters it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostPhase {
    /// Protects nothing, is used for nothing.
    Out,
    /// Protects its VMs: heartbeats are taken, the watchdog is armed (if it has one).
    Armed,
    /// Declared dead; irrevocable. No proof yet that epoch − 1 is over.
    Fencing,
    /// Epoch − 1 is over, and there is a proof.
    Fenced,
}

/// What kind of watchdog a host has armed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogClass {
    /// None, or it could not be armed, or maintenance took it off.
    #[default]
    None,
    /// A timer of the kernel (softdog): dies with the kernel. No proof by itself.
    Software,
    /// Outside the kernel's reach: a device of the machine.
    Hardware,
}

/// `/ha/host/H`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Rises with every change of phase.
    pub epoch: u64,
    /// Phase.
    pub phase: HostPhase,
    /// `/proc/sys/kernel/random/boot_id` when the epoch was armed.
    pub boot_id: String,
    /// The times that this host lives by.
    pub timing: Timing,
    /// Its watchdog, as armed and read back.
    pub watchdog: WatchdogClass,
    /// Whom it asks when it cannot reach the store. One that is not in this list must never call it dead by time.
    pub peers: BTreeSet<HostId>,
    /// A person took the host out of service for a while: it is not fenced and gets nothing.
    #[serde(default)]
    pub maintenance: bool,
    /// What there is for guests, in bytes; 0 is unknown and gets nothing.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Whether a proved fence device exists for it. For grading only.
    #[serde(default)]
    pub fence_devices: u32,
}

impl HostRecord {
    /// The epoch that is over or must be proved to be over, if this host was declared dead.
    pub fn ended(&self) -> Option<u64> {
        matches!(self.phase, HostPhase::Fencing | HostPhase::Fenced).then(|| self.epoch.saturating_sub(1))
    }
}

/// `/ha/hb/H`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Epoch.
    pub epoch: u64,
    /// Counts up within the epoch.
    pub seq: u64,
}

/// Why an epoch of a host is known to be over: the rungs of the ladder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ProofKind {
    /// P0: the host itself killed its guests and saw their processes end.
    Drained,
    /// P1: a fence device switched it off and read back "off".
    FencedOff {
        /// Device.
        device: String,
    },
    /// P2: the storage refuses it, for every disk of every VM that it had.
    StorageRevoked {
        /// What was revoked, in the storage's words.
        what: String,
    },
    /// P3: its hardware watchdog must have fired.
    SelfFenced {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// P4: it booted again.
    Rebooted {
        /// The boot that it is in now.
        boot_id: String,
    },
    /// P5: a person says so.
    Person {
        /// Who.
        name: String,
    },
}

impl fmt::Display for ProofKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drained => f.write_str("P0 drained: it killed its guests itself"),
            Self::FencedOff { device } => write!(f, "P1 fence device {device}: verified off"),
            Self::StorageRevoked { what } => write!(f, "P2 storage revoked: {what}"),
            Self::SelfFenced { waited_ms } => write!(f, "P3 watchdog: waited {waited_ms} ms"),
            Self::Rebooted { boot_id } => write!(f, "P4 booted again: {boot_id}"),
            Self::Person { name } => write!(f, "P5 confirmed by {name}"),
        }
    }
}

/// `/ha/proof/H/E`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Rung.
    #[serde(flatten)]
    pub kind: ProofKind,
    /// Node that wrote it.
    pub by: HostId,
}

/// What a VM should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Desired {
    /// Run.
    Running,
    /// Not run: shut down by its user or a person.
    Stopped,
}

/// Where a VM stands. LOST and CLAIMABLE follow from the owner's epoch and its proof ([`View::standing`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmPhase {
    /// Nobody runs it, and its owner (if any) saw it end.
    Stopped,
    /// A coordinator gave it to its owner, which has not begun.
    Claimed,
    /// The owner has or may have a process with stopped vCPUs.
    Starting,
    /// The owner runs it.
    Running,
}

/// Who has a VM: a host in one of its epochs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Host.
    pub host: HostId,
    /// Its epoch.
    pub epoch: u64,
}

/// When a VM counts as ready for those that depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    /// When it runs.
    Running,
    /// When its guest agent answers.
    #[default]
    Agent,
}

/// How a VM is protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmPolicy {
    /// Lower tiers start first, 0 to 9.
    pub tier: u8,
    /// VMs that must be ready first.
    pub after: BTreeSet<VmId>,
    /// When it is ready itself.
    pub gate: Gate,
    /// Those that wait for it go on after this, in milliseconds.
    pub ready_ms: u64,
    /// The only host that it may be restarted on, if any.
    pub only_on: Option<HostId>,
    /// Memory that it needs, in bytes.
    pub memory_bytes: u64,
    /// Resets within the window before it is taken elsewhere.
    pub resets_max: u32,
    /// The window, in milliseconds.
    pub resets_window_ms: u64,
    /// A guest whose agent and I/O are silent for this long hangs, in milliseconds; 0 never.
    pub hang_ms: u64,
    /// Services in it that are watched.
    pub services: Vec<Watched>,
}

impl Default for VmPolicy {
    fn default() -> Self {
        Self {
            tier: 5,
            after: BTreeSet::new(),
            gate: Gate::default(),
            ready_ms: 300_000,
            only_on: None,
            memory_bytes: 0,
            resets_max: 3,
            resets_window_ms: 3_600_000,
            hang_ms: 60_000,
            services: Vec::new(),
        }
    }
}

/// `/ha/vm/V`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Name, for people.
    pub name: String,
    /// Strictly rises with every claim.
    pub generation: u64,
    /// Who has it.
    pub owner: Option<Owner>,
    /// A migration under way: the host that it goes to. Until that is settled, both must be proved dead.
    #[serde(default)]
    pub moving_to: Option<Owner>,
    /// Phase.
    pub phase: VmPhase,
    /// What it should do.
    pub desired: Desired,
    /// Whether its readiness gate was passed since it was started.
    #[serde(default)]
    pub ready: bool,
    /// Hosts where it did not start since it last ran, with how often.
    #[serde(default)]
    pub failed_on: BTreeMap<HostId, u32>,
    /// How often it was taken elsewhere for a service's sake since its services were last seen up.
    #[serde(default)]
    pub service_moves: u32,
    /// Why nobody may have it until a person (or the host that runs it) has looked: the disk is ahead of the store.
    #[serde(default)]
    pub blocked: Option<String>,
    /// What happened last, for people.
    #[serde(default)]
    pub note: String,
    /// How it is protected.
    #[serde(default)]
    pub policy: VmPolicy,
}

impl VmRecord {
    /// The record of a VM that ended on purpose and stays down.
    #[must_use]
    pub fn stopped(&self, note: String) -> Self {
        Self {
            owner: None,
            moving_to: None,
            phase: VmPhase::Stopped,
            ready: false,
            desired: Desired::Stopped,
            note,
            failed_on: BTreeMap::new(),
            service_moves: 0,
            ..self.clone()
        }
    }

    /// Whether a host in an epoch owns it.
    pub fn is_owned_by(&self, host: &HostId, epoch: u64) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.host == *host && owner.epoch == epoch)
    }

    /// Whether it runs on a host in an epoch, and is not on its way to another.
    pub fn runs_on(&self, host: &HostId, epoch: u64) -> bool {
        self.is_owned_by(host, epoch) && self.phase == VmPhase::Running && self.moving_to.is_none()
    }
}

/// `/ha/cluster`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Whether hosts are fenced and VMs restarted at all.
    pub armed: bool,
    /// Host failures that admission keeps room for.
    pub failures: u32,
    /// Starts at a time on one host.
    pub starts_max: u32,
    /// Who changed it last and why.
    #[serde(default)]
    pub note: String,
}

impl Default for ClusterRecord {
    fn default() -> Self {
        Self { armed: true, failures: 1, starts_max: 4, note: String::new() }
    }
}

/// All records as they stood together at one revision. A record that cannot be read is in `unreadable`, and whatever it is
/// about is left alone: unknown never counts as dead.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// When.
    pub revision: u64,
    /// Hosts.
    pub hosts: BTreeMap<HostId, Versioned<HostRecord>>,
    /// Heartbeats.
    pub heartbeats: BTreeMap<HostId, Versioned<Heartbeat>>,
    /// Proofs, by host and epoch.
    pub proofs: BTreeMap<(HostId, u64), Versioned<Proof>>,
    /// VMs.
    pub vms: BTreeMap<VmId, Versioned<VmRecord>>,
    /// Pairs, by their keys.
    pub pairs: BTreeMap<VmId, Versioned<PairRecord>>,
    /// Switches.
    pub cluster: Option<Versioned<ClusterRecord>>,
    /// Hosts that were emptied and take nothing until they are taken into service again, as far as whoever looked knows.
    /// No record of high availability: nothing that must not happen twice follows from it.
    pub closed: BTreeSet<HostId>,
    /// Keys whose values make no sense to this version.
    pub unreadable: BTreeMap<String, String>,
}

/// Where a VM stands in the light of its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Should not run, or is blocked.
    Idle,
    /// In its owner's hands.
    Owned(VmPhase),
    /// Its owner is declared dead and not yet proved to be.
    Lost,
    /// Nobody can write to its disks.
    Claimable,
}

impl View {
    /// Adds one key. What does not parse, or is of a kind that this version does not know, is kept as unreadable.
    pub fn insert(&mut self, key: &str, value: &[u8], revision: u64) {
        let read = match key.strip_prefix(PREFIX).map(|rest| rest.split('/').collect::<Vec<_>>()).as_deref() {
            Some(["host", host]) => put(&mut self.hosts, HostId::from(*host), value, revision),
            Some(["hb", host]) => put(&mut self.heartbeats, HostId::from(*host), value, revision),
            Some(["proof", host, epoch]) => match epoch.parse() {
                Ok(epoch) => put(&mut self.proofs, (HostId::from(*host), epoch), value, revision),
                Err(_) => Err("the epoch is no number".to_owned()),
            },
            Some(["vm", vm]) => match vm.parse() {
                Ok(vm) => put(&mut self.vms, vm, value, revision),
                Err(_) => Err("the name is no UUID".to_owned()),
            },
            Some(["pair", pair]) => match pair.parse() {
                Ok(pair) => put(&mut self.pairs, pair, value, revision),
                Err(_) => Err("the name is no UUID".to_owned()),
            },
            Some(["cluster"]) => serde_json::from_slice(value)
                .map(|value| self.cluster = Some(Versioned { value, revision }))
                .map_err(|error| error.to_string()),
            _ => return,
        };
        if let Err(why) = read {
            self.unreadable.insert(key.to_owned(), why);
        }
    }

    /// Switches, or their defaults.
    pub fn switches(&self) -> ClusterRecord {
        self.cluster.as_ref().map(|cluster| cluster.value.clone()).unwrap_or_default()
    }

    /// Whether an epoch of a host is over, proved.
    pub fn is_over(&self, owner: &Owner) -> bool {
        self.proofs.contains_key(&(owner.host.clone(), owner.epoch))
    }

    /// Whether a host is in service in this very epoch.
    pub fn is_armed(&self, owner: &Owner) -> bool {
        self.hosts
            .get(&owner.host)
            .is_some_and(|host| host.value.phase == HostPhase::Armed && host.value.epoch == owner.epoch)
    }

    /// Where a VM stands.
    pub fn standing(&self, vm: &VmRecord) -> Standing {
        if vm.blocked.is_some() {
            return Standing::Idle;
        }
        let owners: Vec<&Owner> = vm.owner.iter().chain(&vm.moving_to).collect();
        if vm.phase == VmPhase::Stopped {
            return if vm.desired == Desired::Running { Standing::Claimable } else { Standing::Idle };
        }
        if owners.is_empty() {
            return Standing::Idle;
        }
        if owners.iter().all(|owner| self.is_over(owner)) {
            return if vm.desired == Desired::Running { Standing::Claimable } else { Standing::Idle };
        }
        // An owner that is in service and the destination of a migration finds out itself what it has.
        if owners.iter().any(|owner| self.is_armed(owner)) { Standing::Owned(vm.phase) } else { Standing::Lost }
    }
}

fn put<K: Ord, T: for<'a> Deserialize<'a>>(
    map: &mut BTreeMap<K, Versioned<T>>,
    key: K,
    value: &[u8],
    revision: u64,
) -> Result<(), String> {
    let value = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    map.insert(key, Versioned { value, revision });
    Ok(())
}

/// Records for tests, which say what matters to them and leave the rest as it is here.
#[cfg(test)]
pub(super) mod fixture {
    use super::*;

    /// A host in service, epoch 1, with a hardware watchdog, a fence device and 1 GiB for guests.
    pub fn host() -> HostRecord {
        HostRecord {
            epoch: 1,
            phase: HostPhase::Armed,
            boot_id: String::new(),
            timing: Timing::default(),
            watchdog: WatchdogClass::Hardware,
            peers: BTreeSet::new(),
            maintenance: false,
            memory_bytes: 1 << 30,
            fence_devices: 1,
        }
    }

    /// A VM that should run and that nobody has.
    pub fn vm(name: &str, memory_bytes: u64) -> VmRecord {
        VmRecord {
            name: name.to_owned(),
            generation: 1,
            owner: None,
            moving_to: None,
            phase: VmPhase::Stopped,
            desired: Desired::Running,
            ready: false,
            failed_on: BTreeMap::new(),
            service_moves: 0,
            blocked: None,
            note: String::new(),
            policy: VmPolicy { memory_bytes, ..VmPolicy::default() },
        }
    }
}
