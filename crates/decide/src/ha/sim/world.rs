//! The world: an event queue over hosts, a store, disks and links.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    rc::Rc,
};

use uuid::Uuid;

use super::{
    check::Checks,
    node::{Bmc, Daemon, Node, Qemu, Rng, scale},
    store::Kv,
};
use crate::ha::{
    agent::{self, Agent, Ended, LocalVm},
    coordinator::{self, Coordinator, FenceOutcome},
    planted::{Planted, planted},
    record::{Gate, HostId, View, VmId, VmRecord, WatchdogClass, fixture, vm_key},
    timing::{Moment, Timing},
    txn::{Answer, Txn},
};

/// Settings of a run.
#[derive(Clone)]
pub(super) struct Setup {
    pub(super) hosts: usize,
    pub(super) vms: usize,
    pub(super) timing: Timing,
    pub(super) classes: Vec<WatchdogClass>,
    pub(super) bmcs: Vec<Bmc>,
    pub(super) drift: bool,
    pub(super) failsafe: bool,
    pub(super) revoke: bool,
    /// Everything answers at once: the store in 1 to 5 ms, starts in 100 ms.
    pub(super) fast: bool,
    /// The store's deadline.
    pub(super) deadline: u64,
    /// The first two VMs are a pair; whether one that led may be told to follow.
    pub(super) pair: Option<bool>,
}

pub(super) enum Ev {
    Tick(usize, u64),
    Poll(usize, u64),
    ToAgent(usize, u64, Told),
    ToCoordinator(usize, u64, Heard),
    Do(usize, u64, Box<agent::Effect>),
    Lead(usize, u64, Box<coordinator::Effect>),
    Pet(usize, u64),
    Request { node: usize, life: u64, from: From, id: u64, txn: Box<Txn> },
    GaveUp { node: usize, life: u64, from: From, id: u64 },
    Write(usize, VmId, u64),
    Dies(usize, VmId, u64),
    WatchdogFires(usize, u64),
    Reset(usize, u64),
    Boot(usize),
    Role(super::roles::Role),
    StartDaemon(usize),
    Fault(super::faults::Fault),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    Agent,
    Coordinator,
}

/// Events of an agent, owned.
#[derive(Clone)]
pub(super) enum Told {
    View(Rc<View>),
    Answered(u64, Answer),
    Armed(WatchdogClass),
    Guests(Moment),
    Peer(Moment, usize, bool),
    /// VM, generation, whether the lease was taken, whether it still is to be.
    Started(VmId, u64, bool, bool),
    Ended(VmId, Ended),
}

pub(super) enum Heard {
    View(Rc<View>, Moment),
    Answered(u64, Answer),
    Question(usize, u64, Moment, u64),
    Fenced(HostId, u64, FenceOutcome),
    Revoked(HostId, u64, Result<String, String>),
}

pub(super) struct World {
    pub(super) now: u64,
    pub(super) rng: Rng,
    pub(super) setup: Setup,
    pub(super) nodes: Vec<Node>,
    pub(super) kv: Kv,
    pub(super) backup: Option<Kv>,
    pub(super) restored: bool,
    pub(super) store_down: bool,
    pub(super) store_slow: bool,
    pub(super) storage_slow: bool,
    pub(super) leases: BTreeMap<VmId, (u64, usize)>,
    /// Writes in flight: VM, QEMU, when they land.
    pub(super) flying: Vec<(VmId, u64, u64)>,
    pub(super) checks: Checks,
    pub(super) log: Vec<String>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Ev>,
    serial: u64,
}

pub(super) fn vm_id(n: usize) -> VmId {
    Uuid::from_u128(n as u128 + 1)
}

pub(super) fn host_id(n: usize) -> HostId {
    HostId(format!("h{}", n + 1))
}

pub(super) fn host_number(host: &HostId) -> usize {
    host.0[1..].parse::<usize>().expect("a number") - 1
}

impl World {
    pub(super) fn new(seed: u64, setup: Setup) -> Self {
        let mut rng = Rng(seed);
        let drift = if setup.drift { i64::try_from(setup.timing.drift_ppm).expect("small") } else { 0 };
        let mut rate = |_| match rng.range(0, 3) {
            0 => -drift,
            1 => drift,
            _ => 0,
        };
        let nodes = (0..setup.hosts).map(|n| Node {
            powered: true,
            boot: n as u64 * 1000,
            booted_at: 0,
            rate_ppm: rate(n),
            watchdog_rate_ppm: rate(n),
            class: setup.classes[n % setup.classes.len()],
            petted: None,
            daemon: None,
            life: 0,
            stopped_until: 0,
            frozen_until: 0,
            remembered: None,
            qemus: BTreeMap::new(),
            starting: BTreeMap::new(),
            duties: BTreeSet::new(),
            store_cut: false,
            deaf: BTreeSet::new(),
            bmc: setup.bmcs[n % setup.bmcs.len()],
            revoked: false,
            touched: None,
            edge: false,
        });
        let nodes = nodes.collect();
        let mut world = Self {
            now: 0,
            rng,
            setup,
            nodes,
            kv: Kv::default(),
            backup: None,
            restored: false,
            store_down: false,
            store_slow: false,
            storage_slow: false,
            leases: BTreeMap::new(),
            flying: Vec::new(),
            checks: Checks::default(),
            log: Vec::new(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            serial: 0,
        };
        world.define_vms();
        for n in 0..world.nodes.len() {
            let at = world.rng.range(0, 500);
            world.push(at, Ev::StartDaemon(n));
        }
        world
    }

    fn define_vms(&mut self) {
        for n in 0..self.setup.vms {
            // No agents are played here.
            let mut record = VmRecord { generation: 0, ..fixture::vm(&format!("v{}", n + 1), 1 << 30) };
            record.policy.gate = Gate::Running;
            assert_eq!(
                self.kv.txn(&Txn::default().put(vm_key(vm_id(n)), &record)),
                Answer::Done { revision: n as u64 + 1 }
            );
        }
        self.define_pair();
    }

    pub(super) fn push(&mut self, after: u64, event: Ev) {
        self.serial += 1;
        self.queue.push(Reverse((self.now + after, self.serial)));
        self.events.insert(self.serial, event);
    }

    pub(super) fn say(&mut self, who: &str, text: &str) {
        let (s, ms) = (self.now / 1000, self.now % 1000);
        self.log.push(format!("{s:>4}.{ms:03}  {who:<6} {text}"));
    }

    /// Goes on until a moment, or until something is wrong.
    pub(super) fn run(&mut self, until: u64) {
        while let Some(Reverse((at, serial))) = self.queue.pop() {
            if at > until || self.checks.broken.is_some() {
                self.queue.push(Reverse((at, serial)));
                break;
            }
            self.now = at;
            let event = self.events.remove(&serial).expect("queued once");
            self.handle(event);
        }
        self.now = self.now.max(until);
    }

    /// Whether the daemon of an event still lives; if it is stopped, the event waits.
    fn waits(&mut self, node: usize, life: u64, event: Ev) -> Option<Ev> {
        let this = &self.nodes[node];
        if this.daemon.is_none() || this.life != life {
            return None;
        }
        if let Some(until) = this.stopped(self.now) {
            let late = until - self.now + self.rng.range(0, 3);
            self.push(late, event);
            return None;
        }
        Some(event)
    }

    fn handle(&mut self, event: Ev) {
        let event = match event {
            Ev::Tick(node, life)
            | Ev::Poll(node, life)
            | Ev::ToAgent(node, life, _)
            | Ev::ToCoordinator(node, life, _)
            | Ev::Do(node, life, _)
            | Ev::Lead(node, life, _) => match self.waits(node, life, event) {
                Some(event) => event,
                None => return,
            },
            other => other,
        };
        match event {
            Ev::Tick(node, life) => {
                self.push(250, Ev::Tick(node, life));
                self.agent(node, agent::Event::Tick);
            }
            Ev::Poll(node, life) => self.poll(node, life),
            Ev::ToAgent(node, _, told) => self.tell(node, told),
            Ev::ToCoordinator(node, _, heard) => self.hear(node, heard),
            Ev::Do(node, life, effect) => self.perform(node, life, *effect),
            Ev::Lead(node, life, effect) => self.lead(node, life, *effect),
            Ev::Pet(node, life) => {
                if self.nodes[node].life == life && self.nodes[node].petted.is_some() {
                    self.petted(node);
                }
            }
            Ev::Request { node, life, from, id, txn } => self.request(node, life, from, id, &txn),
            Ev::GaveUp { node, life, from, id } => self.answer(0, node, life, from, id, Answer::Unknown),
            Ev::Write(node, vm, id) => self.write(node, vm, id),
            Ev::Dies(node, vm, id) => {
                if self.nodes[node].qemus.get(&vm).is_some_and(|qemu| qemu.id == id) {
                    self.nodes[node].qemus.remove(&vm);
                }
            }
            Ev::WatchdogFires(node, petted) => {
                if self.nodes[node].powered && self.nodes[node].petted == Some(petted) {
                    self.say(&host_id(node).0, "its watchdog fires");
                    self.nodes[node].touched = Some(self.now);
                    let reset = self.setup.timing.reset_ms - self.setup.timing.drain_ms;
                    let (after, boot) = (self.rng.range(reset / 2, reset.max(2)), self.nodes[node].boot);
                    self.push(after, Ev::Reset(node, boot));
                }
            }
            Ev::Reset(node, boot) => {
                if self.nodes[node].boot == boot && self.nodes[node].powered {
                    self.power_off(node);
                    let after = self.rng.range(15_000, 60_000);
                    self.push(after, Ev::Boot(node));
                }
            }
            Ev::Boot(node) => self.boot(node),
            Ev::StartDaemon(node) => self.start_daemon(node),
            Ev::Role(role) => self.role(role),
            Ev::Fault(fault) => self.fault(fault),
        }
    }

    pub(super) fn power_off(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        (this.powered, this.daemon, this.petted, this.remembered) = (false, None, None, None);
        this.qemus.clear();
        self.say(&host_id(node).0, "is off");
    }

    fn boot(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        if this.powered {
            return;
        }
        (this.powered, this.booted_at, this.stopped_until, this.frozen_until) = (true, self.now, 0, 0);
        (this.boot, this.revoked, this.edge) = (this.boot + 1, false, false);
        self.say(&host_id(node).0, "boots");
        let after = self.rng.range(500, 3_000);
        self.push(after, Ev::StartDaemon(node));
    }

    pub(super) fn start_daemon(&mut self, n: usize) {
        let (now, timing) = (self.now, self.setup.timing.clone());
        let failsafe = self.setup.failsafe;
        let node = &mut self.nodes[n];
        if !node.powered || node.daemon.is_some() {
            return;
        }
        let me = agent::Identity {
            host: host_id(n),
            boot_id: node.boot_id(),
            timing: timing.clone(),
            watchdog_optional: true,
            memory_bytes: 16 << 30,
            fence_devices: u32::from(node.bmc != Bmc::Missing),
            failsafe,
        };
        node.life += 1;
        node.duties.clear();
        let (life, local) = (node.life, node.local(now));
        let (agent, effects) = match node.remembered.clone() {
            Some(mine) => Agent::resumed(me, local, mine),
            None => (Agent::new(me), Vec::new()),
        };
        let coordinator = Coordinator::new(host_id(n), timing);
        node.daemon = Some(Daemon { agent, coordinator, leading: false });
        self.say(&host_id(n).0, "its daemon starts");
        self.carry_out(n, effects);
        self.agent(n, agent::Event::Enable(true));
        self.push(1, Ev::Tick(n, life));
        self.push(2, Ev::Poll(n, life));
    }

    pub(super) fn agent(&mut self, node: usize, event: agent::Event<'_>) {
        let local = self.nodes[node].local(self.now);
        let daemon = self.nodes[node].daemon.as_mut().expect("events of the dead are dropped");
        let effects = daemon.agent.step(local, event);
        self.carry_out(node, effects);
    }

    fn carry_out(&mut self, node: usize, effects: Vec<agent::Effect>) {
        let life = self.nodes[node].life;
        for effect in effects {
            if let agent::Effect::Say(text) = &effect {
                self.say(&host_id(node).0, text);
                continue;
            }
            let late = if self.setup.fast { 0 } else { self.rng.range(0, 5) };
            self.push(late, Ev::Do(node, life, Box::new(effect)));
        }
    }

    fn coordinator(&mut self, node: usize, event: coordinator::Event<'_>) {
        let local = self.nodes[node].local(self.now);
        let life = self.nodes[node].life;
        let daemon = self.nodes[node].daemon.as_mut().expect("events of the dead are dropped");
        for effect in daemon.coordinator.step(local, event) {
            if let coordinator::Effect::Say(text) = &effect {
                self.say(&host_id(node).0, text);
                continue;
            }
            self.push(0, Ev::Lead(node, life, Box::new(effect)));
        }
    }

    fn latency(&mut self) -> u64 {
        match (self.setup.fast, self.store_slow) {
            (true, _) => self.rng.range(1, 6),
            (false, false) => self.rng.range(1, 60),
            (false, true) => self.rng.range(200, 2_500),
        }
    }

    fn poll(&mut self, node: usize, life: u64) {
        self.push(if self.setup.fast { 100 } else { 600 }, Ev::Poll(node, life));
        if self.nodes[node].store_cut || self.store_down {
            return;
        }
        // Whoever leads; sometimes a second one believes to.
        let lives = |node: &Node, now| node.daemon.is_some() && !node.store_cut && node.stopped(now).is_none();
        let first = (0..self.nodes.len()).find(|n| lives(&self.nodes[*n], self.now));
        let leads = first == Some(node) || self.rng.percent(1);
        let daemon = self.nodes[node].daemon.as_mut().expect("checked");
        if std::mem::replace(&mut daemon.leading, leads) != leads {
            self.coordinator(node, coordinator::Event::Leading(leads));
        }
        let asked = self.nodes[node].local(self.now);
        let view = self.kv.view();
        let late = self.latency();
        self.push(late, Ev::ToCoordinator(node, life, Heard::View(Rc::clone(&view), asked)));
        self.push(late, Ev::ToAgent(node, life, Told::View(view)));
    }

    fn tell(&mut self, node: usize, told: Told) {
        match told {
            Told::View(view) => {
                self.agent(node, agent::Event::View(&view));
                self.see_roles(node, &view);
            }
            Told::Answered(id, answer) => self.agent(node, agent::Event::Answered { id, answer }),
            Told::Armed(class) => {
                let timeout_ms = self.setup.timing.watchdog_ms;
                self.agent(node, agent::Event::WatchdogArmed { timeout_ms, class });
            }
            Told::Guests(asked) => {
                let local = |qemu: &Qemu| LocalVm { running: qemu.running, never_ran: !qemu.ran, direct: true };
                let alive = self.nodes[node].qemus.iter().map(|(vm, qemu)| (*vm, local(qemu))).collect();
                self.agent(node, agent::Event::Guests { asked, alive });
            }
            Told::Peer(asked, peer, ack) => {
                self.agent(node, agent::Event::PeerAnswered { asked, peer: host_id(peer), ack });
            }
            Told::Started(vm, generation, early, done) => self.started(node, vm, generation, early, done),
            Told::Ended(vm, how) => self.agent(node, agent::Event::GuestEnded { vm, how }),
        }
    }

    fn hear(&mut self, node: usize, heard: Heard) {
        match heard {
            Heard::View(view, asked) => self.coordinator(node, coordinator::Event::View { view: &view, asked }),
            Heard::Answered(id, answer) => self.coordinator(node, coordinator::Event::Answered { id, answer }),
            Heard::Question(from, life, asked, epoch) => {
                let daemon = self.nodes[node].daemon.as_ref().expect("checked");
                let ack = daemon.coordinator.word(&host_id(from), epoch);
                if ack {
                    self.coordinator(node, coordinator::Event::AskedBy(host_id(from)));
                }
                if !self.nodes[node].deaf.contains(&from) {
                    let late = self.rng.range(1, 50);
                    self.push(late, Ev::ToAgent(from, life, Told::Peer(asked, node, ack)));
                }
            }
            Heard::Fenced(host, epoch, outcome) => {
                self.coordinator(node, coordinator::Event::Fenced { host, epoch, outcome });
            }
            Heard::Revoked(host, epoch, result) => {
                self.coordinator(node, coordinator::Event::Revoked { host, epoch, result });
            }
        }
    }

    fn lead(&mut self, node: usize, life: u64, effect: coordinator::Effect) {
        match effect {
            coordinator::Effect::Txn { id, txn, what } => {
                self.say(&host_id(node).0, &format!("▸ {what}"));
                self.send(node, life, From::Coordinator, id, txn);
            }
            coordinator::Effect::Fence { host, epoch } => self.fence(node, life, host, epoch),
            coordinator::Effect::Revoke { host, epoch, .. } => {
                let result = if self.setup.revoke {
                    self.nodes[host_number(&host)].revoked = true;
                    Ok("refused by the storage".to_owned())
                } else {
                    Ok(String::new())
                };
                self.push(200, Ev::ToCoordinator(node, life, Heard::Revoked(host, epoch, result)));
            }
            // Devices act at once here.
            coordinator::Effect::StopFencing { .. } | coordinator::Effect::Say(_) => {}
        }
    }

    fn fence(&mut self, node: usize, life: u64, host: HostId, epoch: u64) {
        let target = host_number(&host);
        let fails = |why: &str| FenceOutcome::Failed { why: why.into() };
        let (after, outcome) = match self.nodes[target].bmc {
            Bmc::Missing => (1, FenceOutcome::NoDevice),
            Bmc::NoPower => (3_000, fails("no answer")),
            Bmc::Lies => (1_000, FenceOutcome::Unverified { why: "says done, reads back on".into() }),
            Bmc::Slow if self.rng.percent(50) => (60_000, fails("timed out")),
            Bmc::Slow | Bmc::Works => {
                self.say(&host.0, "its fence device cuts the power");
                if self.nodes[target].powered {
                    self.power_off(target);
                    let back = self.rng.range(20_000, 90_000);
                    self.push(back, Ev::Boot(target));
                }
                let after = if self.setup.fast { 20 } else { self.rng.range(500, 3_000) };
                (after, FenceOutcome::Off { device: "bmc".into() })
            }
        };
        self.push(after, Ev::ToCoordinator(node, life, Heard::Fenced(host, epoch, outcome)));
    }

    /// A transaction on its way. Cut off: refused at the door, lost, or performed with the answer lost.
    pub(super) fn send(&mut self, node: usize, life: u64, from: From, id: u64, txn: Txn) {
        let txn = Box::new(txn);
        if self.nodes[node].store_cut || self.store_down {
            let answer = if self.rng.percent(50) { Answer::Unavailable } else { Answer::Unknown };
            let late = if answer == Answer::Unavailable { 5 } else { self.setup.deadline };
            return self.answer(late, node, life, from, id, answer);
        }
        let late = if !self.setup.fast && self.rng.percent(1) { self.rng.range(1_000, 20_000) } else { self.latency() };
        if late >= self.setup.deadline {
            self.push(self.setup.deadline, Ev::GaveUp { node, life, from, id });
        }
        self.push(late, Ev::Request { node, life, from, id, txn });
    }

    fn request(&mut self, node: usize, life: u64, from: From, id: u64, txn: &Txn) {
        let before = self.kv.view();
        let answer = self.kv.txn(txn);
        if let Answer::Done { .. } = answer {
            let after = self.kv.view();
            self.check_commit(&before, &after);
        }
        let cut = self.nodes[node].store_cut;
        let (late, answer) = match cut {
            // Performed at once, answered late: the time that counts is when it was sent.
            _ if self.nodes[node].edge => (self.setup.deadline - 100, answer),
            true => (self.setup.deadline, Answer::Unknown),
            false => (self.latency(), answer),
        };
        self.answer(late, node, life, from, id, answer);
    }

    fn answer(&mut self, late: u64, node: usize, life: u64, from: From, id: u64, answer: Answer) {
        self.push(
            late,
            match from {
                From::Agent => Ev::ToAgent(node, life, Told::Answered(id, answer)),
                From::Coordinator => Ev::ToCoordinator(node, life, Heard::Answered(id, answer)),
            },
        );
    }

    pub(super) fn petted(&mut self, node: usize) {
        self.nodes[node].petted = Some(self.now);
        let fires = scale(self.setup.timing.watchdog_ms, self.nodes[node].watchdog_rate_ppm);
        self.push(fires, Ev::WatchdogFires(node, self.now));
    }

    fn perform(&mut self, node: usize, life: u64, effect: agent::Effect) {
        use agent::Effect;
        let local = self.nodes[node].local(self.now);
        match effect {
            Effect::Txn { id, txn, what } => {
                if !what.starts_with("heartbeat") && !what.starts_with("record of") {
                    self.say(&host_id(node).0, &format!("▸ {what}"));
                }
                self.send(node, life, From::Agent, id, txn);
            }
            Effect::ArmWatchdog { .. } => {
                let class = self.nodes[node].class;
                if class != WatchdogClass::None {
                    self.petted(node);
                }
                self.push(1, Ev::ToAgent(node, life, Told::Armed(class)));
            }
            Effect::DisarmWatchdog => self.nodes[node].petted = None,
            Effect::Pet { until } => self.pet(node, life, local, until),
            Effect::AskPeers { asked, peers, epoch } => {
                for peer in peers.iter().map(host_number) {
                    if self.nodes[node].deaf.contains(&peer) {
                        continue;
                    }
                    let (late, their) = (self.rng.range(1, 50), self.nodes[peer].life);
                    self.push(late, Ev::ToCoordinator(peer, their, Heard::Question(node, life, asked, epoch)));
                }
            }
            Effect::KillAll => {
                let vms: Vec<VmId> = self.nodes[node].qemus.keys().copied().collect();
                for vm in vms {
                    self.kill(node, vm);
                }
                self.push(50, Ev::ToAgent(node, life, Told::Guests(local)));
            }
            Effect::LookAtGuests => self.push(20, Ev::ToAgent(node, life, Told::Guests(local))),
            Effect::Start { vm, generation, .. } => self.start(node, life, vm, generation),
            Effect::Resume { vm, generation, until } => self.resume(node, vm, generation, local, until),
            Effect::Kill { vm, why } => {
                self.say(&host_id(node).0, &format!("kills v{}: {why}", vm.as_u128()));
                self.kill(node, vm);
            }
            Effect::Remember(mine) => self.nodes[node].remembered = mine,
            Effect::Say(_) => {}
        }
    }

    /// The adversary performs the last pets of a host that was cut off as late as its watchdog lets it, then nothing more.
    fn pet(&mut self, node: usize, life: u64, local: Moment, until: Moment) {
        if local > until {
            return;
        }
        let Some(petted) = self.nodes[node].petted else { return };
        let left = until.since(local);
        if self.nodes[node].edge && self.nodes[node].store_cut && left < self.setup.timing.watchdog_ms / 5 {
            let fires = scale(self.setup.timing.watchdog_ms, self.nodes[node].watchdog_rate_ppm);
            let at = (petted + fires).saturating_sub(50).max(self.now);
            self.push(at - self.now, Ev::Pet(node, life));
            self.nodes[node].stopped_until = self.now + 600_000;
            self.say(&host_id(node).0, "stops right before a pet; the pet will be late");
            return;
        }
        self.petted(node);
    }

    pub(super) fn kill(&mut self, node: usize, vm: VmId) {
        let now = self.now;
        let Some(qemu) = self.nodes[node].qemus.get_mut(&vm) else { return };
        // One in the kernel's hands may go on writing; any other begins no write after the signal.
        qemu.dying |= qemu.stuck_until <= now;
        let landed = self.flying.iter().filter(|(_, id, _)| *id == qemu.id).map(|(.., at)| *at).max().unwrap_or(0);
        let (id, at) = (qemu.id, landed.max(qemu.stuck_until).max(self.now + 1));
        self.push(at - self.now, Ev::Dies(node, vm, id));
    }

    /// Makes the process, takes the lease somewhere on the way.
    fn start(&mut self, node: usize, life: u64, vm: VmId, generation: u64) {
        self.nodes[node].qemus.remove(&vm);
        self.nodes[node].starting.insert(vm, generation);
        let after = match (self.setup.fast, self.storage_slow) {
            (true, _) => 100,
            (false, true) => self.rng.range(1_000, 60_000),
            (false, false) => self.rng.range(300, 3_000),
        };
        let early = self.rng.percent(50);
        if early && !self.take_lease(node, vm, generation) {
            return self.push(after, Ev::ToAgent(node, life, Told::Started(vm, generation, true, false)));
        }
        self.push(after, Ev::ToAgent(node, life, Told::Started(vm, generation, early, true)));
    }

    fn take_lease(&mut self, node: usize, vm: VmId, generation: u64) -> bool {
        let newer = |(on_disk, host): &(u64, usize)| *on_disk > generation || (*on_disk == generation && *host != node);
        if self.leases.get(&vm).is_some_and(newer) && !planted(Planted::IgnoreLease) {
            return false;
        }
        self.leases.insert(vm, (generation, node));
        true
    }

    fn started(&mut self, node: usize, vm: VmId, generation: u64, early: bool, done: bool) {
        if self.nodes[node].starting.get(&vm) != Some(&generation) {
            return;
        }
        if !done || (!early && !self.take_lease(node, vm, generation)) {
            let disk_generation = self.leases.get(&vm).map(|(generation, _)| *generation);
            let why = "the disk's lease is newer".to_owned();
            return self.agent(node, agent::Event::StartFailed { vm, generation, why, disk_generation });
        }
        self.serial += 1;
        let qemu = Qemu {
            id: self.serial,
            generation,
            running: false,
            ran: false,
            stuck_until: 0,
            dying: false,
            leads: false,
        };
        self.nodes[node].qemus.insert(vm, qemu);
        self.agent(node, agent::Event::Started { vm, generation });
    }

    fn resume(&mut self, node: usize, vm: VmId, generation: u64, local: Moment, until: Moment) {
        let Some(qemu) = self.nodes[node].qemus.get_mut(&vm) else { return };
        if qemu.generation != generation || qemu.running {
            return;
        }
        if local > until {
            return self.kill(node, vm);
        }
        (qemu.running, qemu.ran) = (true, true);
        let id = qemu.id;
        self.say(&host_id(node).0, &format!("v{} runs, generation {generation}", vm.as_u128()));
        self.check_writer(node, vm, id);
        self.push(10, Ev::Write(node, vm, id));
    }

    fn write(&mut self, node: usize, vm: VmId, id: u64) {
        if !self.nodes[node].powered || self.nodes[node].qemus.get(&vm).is_none_or(|qemu| qemu.id != id) {
            return;
        }
        let every = if self.setup.fast { 200 } else { 1_000 };
        self.push(every, Ev::Write(node, vm, id));
        let now = self.now;
        let dying = self.nodes[node].qemus.get(&vm).is_some_and(|qemu| qemu.dying);
        if dying || self.nodes[node].revoked || self.nodes[node].frozen_until > now {
            return;
        }
        self.flying.retain(|(.., at)| *at > now);
        let drain = self.setup.timing.drain_ms;
        let slow = self.setup.fast || self.rng.percent(20);
        let late = if slow { self.rng.range(drain / 2, drain) } else { self.rng.range(1, 100) };
        self.flying.push((vm, id, now + late));
    }
}
