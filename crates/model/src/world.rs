//! The world that a placement decides on: hosts and what they have, VMs and what they need, rules between them.
//!
//! A [`World`] is also the snapshot that `inventory export` saves: JSON, versioned by [`World::format`]. What is not
//! known has a neutral default, so that a snapshot can be written by hand.

use std::{collections::BTreeSet, fmt};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Bytes;

/// The version of the snapshot's format that this build writes.
pub const FORMAT: u32 = 1;

/// A host's name in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostName(pub String);

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for HostName {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

/// A kind of resource that hosts have and VMs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resource {
    /// Thousandths of a host CPU.
    Cpu,
    /// Bytes of memory.
    Memory,
    /// Bytes of the host's own disks; VMs on shared storage need none.
    DiskSpace,
    /// I/O operations a second.
    DiskIo,
    /// Bytes a second.
    Network,
}

impl Resource {
    /// All, in the order of [`Resources::array`].
    pub const ALL: [Resource; 5] =
        [Resource::Cpu, Resource::Memory, Resource::DiskSpace, Resource::DiskIo, Resource::Network];

    /// An amount of it for people: `3.5 CPUs`, `2.0 GiB`.
    pub fn show(self, amount: u64) -> String {
        match self {
            Resource::Cpu => format!("{:.1} CPUs", amount as f64 / 1000.0),
            Resource::Memory | Resource::DiskSpace => Bytes(amount).to_string(),
            Resource::DiskIo => format!("{amount} IOPS"),
            Resource::Network => format!("{}/s", Bytes(amount)),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Resource::Cpu => "CPU",
            Resource::Memory => "memory",
            Resource::DiskSpace => "disk space",
            Resource::DiskIo => "disk I/O",
            Resource::Network => "network",
        })
    }
}

/// An amount of every resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Memory.
    pub memory: Bytes,
    /// Space on the host's own disks.
    pub disk_space: Bytes,
    /// I/O operations a second.
    pub disk_iops: u64,
    /// Bytes a second, both directions together.
    pub network: u64,
}

impl Resources {
    /// In the order of [`Resource::ALL`].
    pub fn array(&self) -> [u64; 5] {
        [self.cpu_milli, self.memory.0, self.disk_space.0, self.disk_iops, self.network]
    }

    /// From the order of [`Resource::ALL`].
    pub fn from_array([cpu_milli, memory, disk_space, disk_iops, network]: [u64; 5]) -> Self {
        Self { cpu_milli, memory: Bytes(memory), disk_space: Bytes(disk_space), disk_iops, network }
    }
}

/// Upper bounds; `None` is without a bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Thousandths of a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_milli: Option<u64>,
    /// I/O operations a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_iops: Option<u64>,
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<u64>,
}

/// Whether a host takes VMs, and whether it keeps those that it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// In service.
    #[default]
    Up,
    /// Its hardware asks for evacuation (temperature, ECC, SMART, power supply); takes nothing.
    Failing,
    /// Being emptied on request; takes nothing.
    Draining,
    /// Empty or left so on request; takes nothing.
    Maintenance,
    /// Dead or not seen; nothing can be moved from it, VMs that are listed on it are lost with it.
    Down,
}

impl HostState {
    /// Whether VMs may be placed here.
    pub fn takes_vms(&self) -> bool {
        matches!(self, HostState::Up)
    }
    /// Whether VMs are to leave.
    pub fn is_leaving(&self) -> bool {
        matches!(self, HostState::Failing | HostState::Draining | HostState::Maintenance)
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HostState::Up => "in service",
            HostState::Failing => "failing",
            HostState::Draining => "being drained",
            HostState::Maintenance => "in maintenance",
            HostState::Down => "down",
        })
    }
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Unique in the world.
    pub name: HostName,
    /// In service or not.
    #[serde(default)]
    pub state: HostState,
    /// Why it is not in service, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What the hardware has.
    pub capacity: Resources,
    /// What of it the host keeps for itself.
    #[serde(default)]
    pub reserved: Resources,
    /// What fails together with it, outermost first: `["room-a", "rack-3"]`. Hosts share a domain at a level if they
    /// agree on everything up to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fault_domain: Vec<String>,
    /// What it offers that a VM can require: `cpu:x86-64-v3`, `network:lan`, `pool:fast`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub offers: BTreeSet<String>,
    /// Kept empty for failover: nothing else places a VM here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spare: bool,
}

/// How important: 1 is most, 5 is least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Priority(u8);

impl Priority {
    /// From 1 to 5.
    pub fn new(level: u8) -> Option<Self> {
        (1..=5).contains(&level).then_some(Self(level))
    }
    /// From 1 to 5.
    pub fn level(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(3)
    }
}

impl TryFrom<u8> for Priority {
    type Error = String;
    fn try_from(level: u8) -> Result<Self, String> {
        Self::new(level).ok_or_else(|| format!("priority {level} is not one of 1 (most important) to 5"))
    }
}

impl From<Priority> for u8 {
    fn from(priority: Priority) -> u8 {
        priority.0
    }
}

/// Why a VM cannot be moved now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", content = "detail", rename_all = "kebab-case")]
pub enum Stuck {
    /// A backup reads it.
    Backup,
    /// Another job runs on it (migration, disk move, snapshot).
    Job(String),
    /// A device of the host is passed to it.
    Device(String),
    /// A disk is on storage that only its host reaches.
    LocalStorage(String),
    /// Anything else that the checks before a migration found.
    Other(String),
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stuck::Backup => f.write_str("a backup of it is running"),
            Stuck::Job(job) => write!(f, "a job of it is running: {job}"),
            Stuck::Device(device) => write!(f, "it holds {device} of its host"),
            Stuck::LocalStorage(disk) => write!(f, "{disk} is on storage that only its host reaches"),
            Stuck::Other(why) => f.write_str(why),
        }
    }
}

impl Stuck {
    /// Whether the VM also cannot be started elsewhere when its host is gone.
    pub fn binds_to_host(&self) -> bool {
        matches!(self, Stuck::Device(_) | Stuck::LocalStorage(_))
    }
}

/// What balancing does with a VM, or in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Nothing.
    Off,
    /// Says what it would do.
    #[default]
    Recommend,
    /// Does it.
    Automatic,
}

/// A VM: what it has, wants and may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// libvirt's UUID.
    pub id: Uuid,
    /// libvirt's name.
    pub name: String,
    /// Where it runs; `None` if it runs nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// What it was configured with: vCPUs × 1000, memory, space on its host's own disks.
    pub size: Resources,
    /// What it wants now, whether or not it gets it. Memory and disk space are taken from `size`.
    #[serde(default)]
    pub demand: Resources,
    /// What it is always to get. Memory and disk space are always kept as `size` says.
    #[serde(default)]
    pub reservation: Resources,
    /// What it never gets more than, however much it wants.
    #[serde(default)]
    pub limits: Limits,
    /// Its weight against others on a host that is short of something.
    #[serde(default = "default_shares")]
    pub shares: u32,
    /// Who comes first when not all can run.
    #[serde(default)]
    pub priority: Priority,
    /// What a host must offer for it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub requires: BTreeSet<String>,
    /// Hosts with its DR copy: one fault must not take both, so it is never placed there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub replicas: BTreeSet<HostName>,
    /// Why it cannot be moved now, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<Stuck>,
    /// Bytes of memory that it dirties each second.
    #[serde(default)]
    pub dirty_rate: u64,
    /// Balancing of this VM, if not as everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Whether it is to be restarted when its host fails, so that capacity is kept for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failover: bool,
}

fn default_shares() -> u32 {
    1000
}

impl Host {
    /// A host in service with a capacity and neutral everything else.
    pub fn new(name: &str, capacity: Resources) -> Self {
        Self {
            name: name.into(),
            state: HostState::Up,
            why: None,
            capacity,
            reserved: Resources::default(),
            fault_domain: Vec::new(),
            offers: BTreeSet::new(),
            spare: false,
        }
    }

    /// What VMs can have of it.
    pub fn usable(&self) -> Resources {
        let (all, kept) = (self.capacity.array(), self.reserved.array());
        Resources::from_array(std::array::from_fn(|r| all[r].saturating_sub(kept[r])))
    }
}

impl Vm {
    /// A VM of a size with neutral everything else.
    pub fn new(id: Uuid, name: impl Into<String>, size: Resources) -> Self {
        Self {
            id,
            name: name.into(),
            host: None,
            size,
            demand: Resources::default(),
            reservation: Resources::default(),
            limits: Limits::default(),
            shares: default_shares(),
            priority: Priority::default(),
            requires: BTreeSet::new(),
            replicas: BTreeSet::new(),
            stuck: None,
            dirty_rate: 0,
            mode: None,
            failover: false,
        }
    }
}

/// What a rule asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RuleKind {
    /// All on one host.
    Together,
    /// No two on one host.
    Apart,
    /// Only on these hosts.
    OnHosts {
        /// The hosts.
        hosts: Vec<HostName>,
    },
    /// On none of these hosts.
    NotOnHosts {
        /// The hosts.
        hosts: Vec<HostName>,
    },
    /// No two in one fault domain at a level.
    ApartDomains {
        /// Index into [`Host::fault_domain`].
        level: usize,
    },
}

/// A rule about the places of some VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// For people; unique.
    pub name: String,
    /// Must be kept; otherwise it should, and is given up for capacity and other musts.
    pub must: bool,
    /// What it asks for.
    #[serde(flatten)]
    pub kind: RuleKind,
    /// Whom it is about.
    pub vms: Vec<Uuid>,
}

/// What failures the cluster keeps room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Failover {
    /// How many may fail at once; 0 keeps no room.
    pub failures: u32,
    /// Whole fault domains fail, at this index into [`Host::fault_domain`]; single hosts if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_level: Option<usize>,
}

/// How much more may be given out than there is, in percent: 100 is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overcommit {
    /// Memory in normal times; 100 means that all memory of all VMs is there.
    pub memory_percent: u32,
    /// Memory after a failure; never below `memory_percent`.
    pub memory_failover_percent: u32,
    /// vCPUs to CPUs; 0 is without a bound.
    pub cpu_percent: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self { memory_percent: 100, memory_failover_percent: 100, cpu_percent: 0 }
    }
}

/// Everything that a placement depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct World {
    /// [`FORMAT`].
    pub format: u32,
    /// When this was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<Timestamp>,
    /// The hosts, names unique.
    pub hosts: Vec<Host>,
    /// VMs that run, or are to run, ids unique.
    pub vms: Vec<Vm>,
    /// The rules.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Room that is kept for failures.
    #[serde(default)]
    pub failover: Failover,
    /// Overcommitment.
    #[serde(default)]
    pub overcommit: Overcommit,
}

impl Default for World {
    fn default() -> Self {
        Self {
            format: FORMAT,
            taken: None,
            hosts: Vec::new(),
            vms: Vec::new(),
            rules: Vec::new(),
            failover: Failover::default(),
            overcommit: Overcommit::default(),
        }
    }
}

/// Why a snapshot is not a world.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// Not JSON, or not of this shape.
    #[error("the snapshot cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// A later version wrote it.
    #[error("the snapshot has format {found}, this version reads {FORMAT}; use a newer version or export it again")]
    Format {
        /// Its format.
        found: u32,
    },
    /// Something in it contradicts itself.
    #[error("the snapshot contradicts itself: {0}")]
    Contradiction(String),
}

impl World {
    /// Reads and checks a snapshot.
    pub fn from_json(text: &str) -> Result<Self, WorldError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_str(text)?;
        if format != FORMAT {
            return Err(WorldError::Format { found: format });
        }
        let world: World = serde_json::from_str(text)?;
        world.check()?;
        Ok(world)
    }

    /// Whether names are unique and everything that is referred to is there.
    pub fn check(&self) -> Result<(), WorldError> {
        let wrong = |text: String| Err(WorldError::Contradiction(text));
        let mut hosts = BTreeSet::new();
        for host in &self.hosts {
            if !hosts.insert(&host.name) {
                return wrong(format!("two hosts are called {}", host.name));
            }
        }
        let mut vms = BTreeSet::new();
        for vm in &self.vms {
            if !vms.insert(vm.id) {
                return wrong(format!("two VMs have the id {} ({})", vm.id, vm.name));
            }
            if let Some(host) = vm.host.as_ref().filter(|host| !hosts.contains(host)) {
                return wrong(format!("VM {} runs on {host}, which is not among the hosts", vm.name));
            }
        }
        for rule in &self.rules {
            if let RuleKind::OnHosts { hosts: named } | RuleKind::NotOnHosts { hosts: named } = &rule.kind
                && let Some(host) = named.iter().find(|host| !hosts.contains(host))
            {
                return wrong(format!("rule {} names {host}, which is not among the hosts", rule.name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_can_be_written_by_hand_and_comes_back_the_same() {
        let text = r#"{"format": 1,
            "hosts": [
              {"name": "kvm1", "capacity": {"cpu_milli": 8000, "memory": 34359738368}, "fault_domain": ["rack-1"]},
              {"name": "kvm2", "state": "failing", "why": "ECC errors", "capacity": {"memory": 34359738368}}],
            "vms": [{"id": "00000000-0000-0000-0000-000000000001", "name": "web1", "host": "kvm1",
              "size": {"cpu_milli": 2000, "memory": 2147483648}, "stuck": {"why": "backup"}}],
            "rules": [{"name": "r", "must": true, "kind": "on-hosts", "hosts": ["kvm1"], "vms": []}],
            "failover": {"failures": 1, "domain_level": 0}}"#;
        let world = World::from_json(text).unwrap();
        assert_eq!(world.hosts[1].state, HostState::Failing);
        assert_eq!(world.vms[0].priority.level(), 3);
        let again = World::from_json(&serde_json::to_string(&world).unwrap()).unwrap();
        assert_eq!(again, world);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = World::from_json(r#"{"format": 9, "hosts": 1}"#).unwrap_err().to_string();
        assert!(error.contains("format 9"), "{error}");
        let error = World::from_json(
            r#"{"format": 1, "hosts": [], "vms": [{"id": "00000000-0000-0000-0000-000000000001", "name": "db",
                "host": "kvm7", "size": {}}]}"#,
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("db") && error.contains("kvm7"), "{error}");
    }
}
