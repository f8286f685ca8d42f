//! High availability: hosts, protected VMs, switches.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// High availability as one daemon sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaStatus {
    /// Whether silent hosts are fenced and VMs restarted at all (`ha arm`, `ha disarm`).
    pub armed: bool,
    /// Who changed that last, and why.
    pub note: String,
    /// Host failures that capacity is kept for.
    pub failures: u32,
    /// Why the state cannot be reached, if it cannot.
    pub state_error: Option<String>,
    /// Hosts that are or were in service, by name.
    pub hosts: Vec<HaHost>,
    /// Protected VMs, by name.
    pub vms: Vec<HaVm>,
}

/// A host in high availability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaHost {
    /// Name of its node.
    pub name: String,
    /// `out`, `armed`, `suspect`, `fencing`, `fenced`.
    pub phase: String,
    /// Rises whenever it leaves or enters service.
    pub epoch: u64,
    /// How well its VMs are protected: `none`, `degraded`, `full`.
    pub grade: String,
    /// Everything that keeps the grade from being better, and what to know about it.
    pub reasons: Vec<String>,
    /// `none`, `software`, `hardware`.
    pub watchdog: String,
    /// Fence devices that its configuration names for it.
    pub fence_devices: u32,
    /// Taken out of service for a while; nobody fences it, and it gets nothing.
    pub maintenance: bool,
    /// How long nothing was heard of it, in milliseconds.
    pub silent_ms: Option<u64>,
    /// What a proof of its death waits for, while it is being fenced.
    pub fencing: Option<String>,
    /// By what its last epoch was proved to be over.
    pub proof: Option<String>,
    /// Protected VMs that it has.
    pub vms: u32,
}

/// A protected VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaVm {
    /// UUID.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Who has it.
    pub host: Option<String>,
    /// `stopped`, `claimed`, `starting`, `running`, `lost`, `claimable`.
    pub phase: String,
    /// Whether it should run.
    pub should_run: bool,
    /// Rises with every start.
    pub generation: u64,
    /// It was seen to be ready since it was started.
    pub ready: bool,
    /// Why it is not being started, if it should run and does not.
    pub waits: Option<String>,
    /// What happened last.
    pub note: String,
    /// Its place in a pair, if it belongs to one.
    #[serde(default)]
    pub pair: Option<HaPair>,
    /// How it is protected.
    pub policy: HaPolicy,
}

/// A VM's place in a pair of an active VM and its standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaPair {
    /// `active` or `standby`.
    pub role: String,
    /// Name of the other one.
    pub other: String,
    /// Rises whenever the roles change.
    pub generation: u64,
    /// The active one was made so; false while a switch is under way.
    pub settled: bool,
    /// Of the active one: its standby could take over now.
    pub takes_over: bool,
    /// What happened last to the pair.
    pub note: String,
}

/// How a VM is protected. What is left out stays as it is, or has its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaPolicy {
    /// Lower tiers start first: 0 to 9; default 5.
    pub tier: Option<u8>,
    /// VMs, by name or UUID, that must be ready first.
    pub after: Option<Vec<String>>,
    /// When it is ready itself: `agent` (its guest agent answers; default) or `running`.
    pub gate: Option<String>,
    /// Those that wait for it go on after so many seconds; default 300.
    pub ready_s: Option<u64>,
    /// The only host that it may be restarted on; an empty text: any.
    pub only_on: Option<String>,
    /// Resets within the window before it is taken elsewhere; default 3.
    pub resets_max: Option<u32>,
    /// The window, in seconds; default an hour.
    pub resets_window_s: Option<u64>,
    /// A guest whose agent and disks are silent for so many seconds is reset; 0: never; default 60.
    pub hang_s: Option<u64>,
    /// Services in it that are watched; given, it takes the place of all that were.
    pub services: Option<Vec<HaService>>,
    /// Its standby.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby: Option<HaStandby>,
}

/// The standby of a protected VM, and how it takes over. Both run, on different hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaStandby {
    /// Protected VM that follows, by name or UUID; an empty text: none any more.
    pub vm: String,
    /// The program, by its whole path, and its arguments that make a guest the active one. Run through the guest's agent
    /// whenever the VM has become the active one or was started as such; ends with 0 as well if it is that already.
    pub promote: Vec<String>,
    /// The same to make one follow that was the active one before. Empty: what was the active one stays down.
    pub demote: Vec<String>,
    /// Addresses that the active one has.
    pub addresses: Vec<HaAddress>,
}

/// An address that is where the active one of a pair is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HaAddress {
    /// IPv4 with the length of its prefix: `10.0.0.9/24`.
    pub address: String,
    /// Network device in the guest.
    pub device: String,
}

/// A service in a protected VM that is watched, and what is done when it stays down: it is restarted, then the VM is reset,
/// then the VM is started on another host, then its standby takes over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaService {
    /// `tcp://HOST:PORT`, `http://HOST/PATH`, `https://…`, `tls://HOST:PORT?days=N`, `postgresql://HOST`, `mysql://HOST`,
    /// `smtp://HOST`, `unit:NAME` or `exec:/PROGRAM ARGUMENTS`.
    pub check: String,
    /// Seconds between two probes; default 10.
    pub every_s: Option<u64>,
    /// Failures in a row before something is done; default 3.
    pub failures: Option<u32>,
    /// Seconds after a start of the VM, and after each action, in which failures do not count; default 60, and for the
    /// actions 30, 120 and 180.
    pub grace_s: Option<u64>,
    /// The systemd unit that restarts it in the guest.
    pub restart_unit: Option<String>,
    /// The program, by its whole path, and its arguments that restart it in the guest.
    pub restart_command: Option<Vec<String>>,
    /// What may be done, in this order: `restart-service`, `restart-vm`, `relocate`, `switch-to-standby`; default all.
    pub actions: Option<Vec<String>>,
}

/// Why something is switched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaReason {
    /// In a person's words.
    pub reason: String,
}

/// A protected VM that moves while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HaMove {
    /// The host that it goes to, by name.
    pub to: String,
    /// Null: it is about to go. Else whether it runs there now, or has stayed.
    #[serde(default)]
    pub has_moved: Option<bool>,
    /// Also if room is taken away that is kept for host failures.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// A protected VM that is to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaStart {
    /// Also if room is taken away that is kept for host failures.
    pub force: bool,
}

/// What is known of one protected VM, and why it is where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaExplanation {
    /// The VM.
    pub vm: HaVm,
    /// In sentences.
    pub lines: Vec<String>,
}

/// What became of a test of a host's fence devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaFenceTest {
    /// The host.
    pub host: String,
    /// The node that asked its devices.
    pub from: String,
    /// Every device could be relied on.
    pub good: bool,
    /// Its devices.
    pub devices: Vec<HaFenceDevice>,
}

/// A fence device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaFenceDevice {
    /// Name.
    pub name: String,
    /// Level 1 is tried first.
    pub level: u8,
    /// Nothing was found that is wrong.
    pub good: bool,
    /// What was looked at, in order.
    pub findings: Vec<HaFinding>,
}

/// One step of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaFinding {
    /// `parameters`, `validate-all`, `monitor`, `status`, `off`, `on`.
    pub step: String,
    /// It is as it should be.
    pub good: bool,
    /// What was found.
    pub text: String,
}

/// How a fence device is tested.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaFenceTestRequest {
    /// Also switch the host off and on again. Everything that runs on it ends; only for a host that is out of service.
    pub power_cycle: bool,
}

/// What would not run if hosts were lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaCapacity {
    /// Host failures that were tried, in every combination.
    pub failures: u32,
    /// Every protected VM would run again whichever hosts were lost.
    pub enough: bool,
    /// Losses after which something would not run.
    pub losses: Vec<HaLoss>,
    /// Hosts with their memory.
    pub hosts: Vec<HaRoom>,
    /// Asked about a host without which it is to go, or about a VM that is to have other memory: why that would take room
    /// away which is there now.
    #[serde(default)]
    pub refused: Option<String>,
}

/// A loss and what it would cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaLoss {
    /// Hosts that are lost together.
    pub hosts: Vec<String>,
    /// VMs that would have no place.
    pub vms: Vec<String>,
    /// In a sentence.
    pub why: String,
}

/// A host's memory for protected VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HaRoom {
    /// Host.
    pub host: String,
    /// For guests.
    pub memory_bytes: u64,
    /// Taken by protected VMs.
    pub used_bytes: u64,
}
