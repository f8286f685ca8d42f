//! The agent of one host: earns its right to run guests again and again, and ends them when it cannot.
//!
//! ```text
//!   OUT ─enable─► JOINING ─guests gone ► watchdog armed, read back ► txn─► ARMED(e) ──────────┐ heartbeat done: may pet
//!    ▲              ▲  └─ same boot, record ARMED(e): RESUMING ─heartbeat done─────► ▲ └──────┘ for m after it was sent
//!    │ leave        │                                                               │
//!    │              │ guests seen gone; txn "e is over, P0"                          │ record changed by others, or no
//!    │              └────────────────── DRAINED ◄── guests killed, seen gone ── KILLING ◄─── heartbeat and not all peers'
//!    └─ from ARMED, if no VM is left                                   (no pets; else the watchdog fires)      word for m
//! ```
//!
//! Invariants:
//! - A pet is asked for only if no guest may be alive, or `now − basis ≤ m`, where basis is when the last heartbeat (or VM
//!   transaction, which has the same guard) that the store took was *sent*, or when the question was sent that *every*
//!   peer answered with "nobody declared you dead".
//! - A guest's vCPUs are let go only after a transaction that still found the VM claimed by this epoch and the epoch armed.
//! - What a peer's word means: a peer that gave it counts its wait for this host from later than the question. One that
//!   knows of FENCING(e) never gives it. So the word of all of them is worth a heartbeat, and losing the store alone
//!   ends no guest. (`docs/design/ha.md` has the proof.)
//!
//! Not here: how guests are killed or watchdogs petted; which host gets what ([`super::coordinator`]).

mod lease;
mod vms;

use std::collections::{BTreeMap, BTreeSet};

pub use self::{
    lease::Mine,
    vms::{Ended, LocalVm},
};
use super::{
    record::{HostId, HostRecord, View, VmId, WatchdogClass},
    timing::{Moment, Timing},
    txn::{Answer, Txn},
};

/// What happened on the host.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Time passed. At least four times within h.
    Tick,
    /// The store's records, perhaps some time ago: every decision from them is guarded by a compare.
    View(&'a View),
    /// A transaction of [`Effect::Txn`] was answered.
    Answered {
        /// Its number.
        id: u64,
        /// What became of it.
        answer: Answer,
    },
    /// The watchdog is armed, and reads back this timeout.
    WatchdogArmed {
        /// As the device says.
        timeout_ms: u64,
        /// Its kind.
        class: WatchdogClass,
    },
    /// The watchdog could not be armed.
    WatchdogFailed {
        /// Why.
        why: String,
    },
    /// The protected VMs that have a process on this host, as the kernel sees them. Never guessed: while it is not
    /// known, this event is not sent.
    Guests {
        /// When the look began.
        asked: Moment,
        /// All of them, stopped vCPUs or not.
        alive: BTreeMap<VmId, LocalVm>,
    },
    /// A peer answered [`Effect::AskPeers`].
    PeerAnswered {
        /// When the question was sent.
        asked: Moment,
        /// Who.
        peer: HostId,
        /// Whether it knows of nobody who declared this host dead.
        ack: bool,
    },
    /// [`Effect::Start`] is done: a process with stopped vCPUs, and the disk's lease holds this generation.
    Started {
        /// VM.
        vm: VmId,
        /// Generation.
        generation: u64,
    },
    /// [`Effect::Start`] failed, and no process is left.
    StartFailed {
        /// VM.
        vm: VmId,
        /// Generation.
        generation: u64,
        /// Why.
        why: String,
        /// The lease on the disk is of this higher generation: the store is behind the disk.
        disk_generation: Option<u64>,
    },
    /// A guest's process ended.
    GuestEnded {
        /// VM.
        vm: VmId,
        /// How.
        how: Ended,
    },
    /// [`super::guest`], [`super::probe`] or [`super::pair`] gave up on a VM on this host: its process is about to be ended.
    GivingUp {
        /// VM.
        vm: VmId,
    },
    /// Its process is gone: somebody else is to have it.
    Relocate {
        /// VM.
        vm: VmId,
        /// Why.
        why: String,
        /// For the sake of a service in it.
        for_service: bool,
    },
    /// Its process is gone, and it stays down: its standby has taken over.
    StoodDown {
        /// VM.
        vm: VmId,
        /// Why.
        why: String,
    },
    /// All services of a guest are up.
    Well {
        /// VM.
        vm: VmId,
    },
    /// A guest's readiness gate was passed.
    Ready {
        /// VM.
        vm: VmId,
    },
    /// A person takes the host into service, or (if no VM is left) out of it.
    Enable(bool),
    /// A person stops or resumes protection for maintenance.
    Maintenance(bool),
}

/// What the shell has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A transaction; its answer comes back as [`Event::Answered`], within the store's deadline.
    Txn {
        /// Number.
        id: u64,
        /// Transaction.
        txn: Txn,
        /// For the log.
        what: String,
    },
    /// Arm the watchdog with W and read it back.
    ArmWatchdog {
        /// W in milliseconds.
        timeout_ms: u64,
    },
    /// Disarm it: nothing is protected.
    DisarmWatchdog,
    /// Pet the watchdog. If that moment is not reached before `until`, don't.
    Pet {
        /// Last moment at which it is allowed.
        until: Moment,
    },
    /// Ask every one of them whether anybody declared this host dead.
    AskPeers {
        /// When: comes back with the answers.
        asked: Moment,
        /// Whom.
        peers: BTreeSet<HostId>,
        /// The epoch that is asked about.
        epoch: u64,
    },
    /// SIGKILL every protected guest, confirm through its pidfd, then send [`Event::Guests`].
    KillAll,
    /// Look which protected guests there are: [`Event::Guests`].
    LookAtGuests,
    /// Make the process with stopped vCPUs and take the disk's lease with this generation; refuse if the lease is newer.
    /// What an earlier one of the same VM is still doing, or made, is ended first: a late process of an old generation
    /// must not take the place of a new one.
    Start {
        /// VM.
        vm: VmId,
        /// Generation.
        generation: u64,
        /// Epoch.
        epoch: u64,
    },
    /// Let the vCPUs run. If that moment is not reached before `until`, don't, and kill it.
    Resume {
        /// VM.
        vm: VmId,
        /// Generation.
        generation: u64,
        /// Last moment at which it is allowed.
        until: Moment,
    },
    /// SIGKILL one guest: it is somebody else's now.
    Kill {
        /// VM.
        vm: VmId,
        /// Why.
        why: String,
    },
    /// Keep this over a restart of the daemon, not over a boot of the host (in `/run`); none: forget it.
    Remember(Option<Mine>),
    /// For the log and the events of the cluster.
    Say(String),
}

/// Where an agent stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Not in service.
    Out,
    /// Wants to be.
    Joining,
    /// Protects its guests.
    Armed {
        /// Epoch.
        epoch: u64,
    },
    /// Ends its guests, pets no more.
    Killing {
        /// The epoch that is over.
        epoch: u64,
        /// Since when.
        since: Moment,
        /// Why.
        why: String,
    },
    /// Has no guests left and wants to say so.
    Drained {
        /// The epoch that is over.
        epoch: u64,
    },
}

/// What is constant about a host.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its name.
    pub host: HostId,
    /// Its boot.
    pub boot_id: String,
    /// Its times, checked.
    pub timing: Timing,
    /// Whether a kernel's or no watchdog will do (the host then needs another proof to be replaced).
    pub watchdog_optional: bool,
    /// Memory for guests, in bytes.
    pub memory_bytes: u64,
    /// Proved fence devices.
    pub fence_devices: u32,
    /// Ask the peers when the store is lost.
    pub failsafe: bool,
}

/// The agent. One per host; a new process begins with a new one.
#[derive(Debug)]
pub struct Agent {
    me: Identity,
    stage: Stage,
    /// My record as I know it stands, while armed.
    host: Option<Mine>,
    watchdog: Option<WatchdogClass>,
    last_pet: Moment,
    /// While armed: when the last proof that nobody declared this host dead was *asked for*.
    basis: Option<Moment>,
    /// While resuming: how long a first heartbeat may take.
    resume_by: Option<Moment>,
    beat: lease::Beat,
    asked: Option<lease::Question>,
    guests: Option<BTreeMap<VmId, LocalVm>>,
    guests_as_of: Moment,
    last_look: Moment,
    pending: BTreeMap<u64, Pending>,
    next_id: u64,
    vms: BTreeMap<VmId, vms::Task>,
    /// Crashes within the window, by VM.
    crashes: BTreeMap<VmId, Vec<Moment>>,
    /// Which generation of a guest ended on purpose: told again to a store that forgot it.
    stopped: BTreeMap<VmId, (u64, String)>,
    /// Guests that had shut themselves down when the epoch ended, which the store does not know.
    downs: BTreeMap<VmId, String>,
    /// Epochs up to this one are over for this process, whatever an old view says.
    ended: u64,
    /// Peers that the store's record may list, though the last one known does not.
    maybe_peers: BTreeSet<HostId>,
    /// A change of the record was not answered: it may happen.
    unsettled: bool,
    told: BTreeSet<String>,
    want_maintenance: bool,
    want_out: bool,
    /// The store's word about this host.
    seen: Option<lease::Seen>,
    /// The record that the open join or change puts.
    joining: Option<HostRecord>,
    changing: Option<HostRecord>,
    /// A guest has or had disks that go through the page cache: killing it does not end its writes.
    indirect: bool,
}

/// What an open transaction is about.
#[derive(Clone, Debug)]
struct Pending {
    sent: Moment,
    about: About,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum About {
    Heartbeat { revision: u64 },
    Join { epoch: u64 },
    Record,
    Orphan { epoch: u64 },
    Drained,
    Leave,
    Vm { vm: VmId, then: vms::Then },
}

impl Agent {
    /// An agent that is out of service until [`Event::Enable`].
    pub fn new(me: Identity) -> Self {
        Self {
            me,
            stage: Stage::Out,
            host: None,
            watchdog: None,
            last_pet: Moment::default(),
            basis: None,
            resume_by: None,
            beat: lease::Beat::default(),
            asked: None,
            guests: None,
            guests_as_of: Moment::default(),
            last_look: Moment::default(),
            pending: BTreeMap::new(),
            next_id: 1,
            vms: BTreeMap::new(),
            crashes: BTreeMap::new(),
            stopped: BTreeMap::new(),
            downs: BTreeMap::new(),
            ended: 0,
            maybe_peers: BTreeSet::new(),
            unsettled: false,
            told: BTreeSet::new(),
            want_maintenance: false,
            want_out: false,
            seen: None,
            joining: None,
            changing: None,
            indirect: false,
        }
    }

    /// An agent of a daemon that was restarted in the same boot, with what [`Effect::Remember`] kept.
    pub fn resumed(me: Identity, now: Moment, mine: Mine) -> (Self, Vec<Effect>) {
        let mut agent = Self::new(me);
        let mut out = Vec::new();
        agent.resume(now, mine, &mut out);
        (agent, out)
    }

    /// Where it stands.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// The watchdog as armed.
    pub fn watchdog(&self) -> Option<WatchdogClass> {
        self.watchdog
    }

    /// Until when it may run guests without another heartbeat; none if it may not.
    pub fn allowed_until(&self) -> Option<Moment> {
        self.basis.map(|basis| basis.plus(self.me.timing.fresh_ms))
    }

    /// Whether the store knows that this host is in maintenance: its daemon may end, and nobody takes its guests.
    pub fn is_resting(&self) -> bool {
        self.host.as_ref().is_some_and(|mine| mine.record.maintenance) && self.changing.is_none() && !self.unsettled
    }

    /// One step.
    pub fn step(&mut self, now: Moment, event: Event<'_>) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Tick => {}
            Event::View(view) => self.seen(now, view, &mut out),
            Event::Answered { id, answer } => self.answered(now, id, answer, &mut out),
            Event::WatchdogArmed { timeout_ms, class } => self.watchdog_armed(now, timeout_ms, class, &mut out),
            Event::WatchdogFailed { why } => self.watchdog_failed(&why, &mut out),
            Event::Guests { asked, alive } => {
                if asked >= self.guests_as_of {
                    self.guests_as_of = asked;
                    self.guests = Some(alive);
                    self.compare_guests(now);
                }
            }
            Event::PeerAnswered { asked, peer, ack } => self.peer_answered(asked, &peer, ack, &mut out),
            Event::Started { vm, generation } => self.started(vm, generation),
            Event::StartFailed { vm, generation, why, disk_generation } => {
                self.start_failed(vm, generation, why, disk_generation, &mut out);
            }
            Event::GuestEnded { vm, how } => self.guest_ended(now, vm, how),
            Event::GivingUp { vm } => self.giving_up(vm),
            Event::Relocate { vm, why, for_service } => self.relocate(vm, why, for_service),
            Event::StoodDown { vm, why } => self.stood_down(vm, why),
            Event::Well { vm } => self.well(vm),
            Event::Ready { vm } => self.ready(vm),
            Event::Enable(on) => self.enable(on, &mut out),
            Event::Maintenance(on) => self.want_maintenance = on,
        }
        self.go_on(now, &mut out);
        out
    }

    fn txn(&mut self, now: Moment, about: About, txn: Txn, what: String, out: &mut Vec<Effect>) {
        let id = self.next_id;
        self.next_id += 1;
        self.pending.insert(id, Pending { sent: now, about });
        out.push(Effect::Txn { id, txn, what });
    }

    fn is_pending(&self, about: &About) -> bool {
        self.pending.values().any(|pending| pending.about == *about)
    }

    /// Says something once, until something else of the same kind is said.
    fn say_once(&mut self, text: String, out: &mut Vec<Effect>) {
        if self.told.insert(text.clone()) {
            out.push(Effect::Say(text));
        }
    }
}
