//! The agent's shell: one task owns the machine, the watchdog and what is known of this host, and waits for nothing but
//! news. Everything that may take time is done by tasks that send their outcome back.

mod guests;
mod monitor;
mod pairs;
mod protect;
mod services;
mod start;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, broadcast, mpsc, oneshot, watch as latest},
    task::JoinHandle,
};
use virtward_cluster::Store;
use virtward_decide::ha::{
    Answer, HostId, Moment, VmId,
    agent::{Agent, Effect, Ended, Event, Identity, LocalVm, Mine, Stage},
    record::WatchdogClass,
};
use virtward_hypervisor::Hypervisor;

use super::{Ha, Looked, Outside, Weight, clock, lock, store};
use crate::ha::watchdog::{Class, Watchdog};

/// Parts of h between two ticks.
const TICKS: u64 = 10;
/// Between two tries to reach the hypervisor.
const CONNECT_AGAIN: Duration = Duration::from_secs(2);

/// Before the first look at the hook.
pub(super) const HOOK_UNKNOWN: &str = "whether libvirt asks before it starts a protected VM is not known yet";

/// What comes to the loop.
pub(super) enum Input {
    Answered {
        id: u64,
        answer: Answer,
    },
    Armed(Result<Watchdog, String>),
    Disarmed(Result<(), String>),
    Guests {
        asked: Moment,
        alive: BTreeMap<VmId, LocalVm>,
    },
    PeerAnswered {
        asked: Moment,
        peer: HostId,
        ack: bool,
    },
    Started {
        vm: VmId,
        generation: u64,
    },
    StartFailed {
        vm: VmId,
        generation: u64,
        why: String,
        disk_generation: Option<u64>,
    },
    /// The vCPUs of a guest were let go.
    Resumed {
        vm: VmId,
    },
    Ended {
        vm: VmId,
        how: Ended,
    },
    GivingUp {
        vm: VmId,
    },
    Relocate {
        vm: VmId,
        why: String,
        for_service: bool,
    },
    /// It was ended, and stays down.
    StoodDown {
        vm: VmId,
        why: String,
    },
    /// All of its services are up.
    Well {
        vm: VmId,
    },
    Ready {
        vm: VmId,
    },
    /// Whether libvirt asks the hook.
    Hook(Option<String>),
    /// The daemon is about to end.
    Stop(oneshot::Sender<()>),
}

/// A start under way.
struct Starting {
    task: JoinHandle<()>,
    /// Until when this host may run guests.
    allowed: latest::Sender<Moment>,
}

/// The task's own.
struct Host {
    ha: Ha,
    store: Arc<dyn Store>,
    outside: Arc<dyn Outside>,
    hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
    agent: Agent,
    boot_id: String,
    watchdog: Option<Watchdog>,
    watchdog_text: String,
    arming: bool,
    disarming: bool,
    /// VMs that are protected, as far as this host knows.
    protected: Arc<BTreeSet<VmId>>,
    starting: BTreeMap<VmId, Starting>,
    monitors: monitor::Monitors,
    services: services::Services,
    pairs: pairs::Pairs,
    protector: protect::Protector,
    looking: bool,
    kills: Arc<Semaphore>,
    stopping: Option<oneshot::Sender<()>>,
    hook_error: Option<String>,
}

/// What is kept over a restart of the daemon.
#[derive(Serialize, Deserialize)]
struct Remembered {
    boot_id: String,
    mine: Mine,
}

/// Runs until the process ends.
pub(super) async fn run(
    ha: Ha,
    store: Arc<dyn Store>,
    outside: Arc<dyn Outside>,
    mut inputs: mpsc::UnboundedReceiver<Input>,
) {
    let settings = ha.settings().clone();
    let boot_id = loop {
        match clock::boot_id() {
            Ok(boot_id) => break boot_id,
            Err(error) => outside.say(Weight::Error, &format!("this boot has no name: {error}")),
        }
        tokio::time::sleep(CONNECT_AGAIN).await;
    };
    // A permit of an earlier daemon is nobody's any more.
    if let Err(error) = settings.hook().forbid_all() {
        outside.say(Weight::Error, &format!("permits of an earlier daemon cannot be taken back: {error}"));
    }
    let (hypervisor, connection) = latest::channel(None);
    tokio::spawn(connect(outside.clone(), hypervisor, ha.clone()));
    let me = Identity {
        host: settings.host.clone(),
        boot_id: boot_id.clone(),
        timing: settings.timing.clone(),
        watchdog_optional: settings.watchdog.is_none(),
        memory_bytes: settings.memory_bytes,
        fence_devices: settings.devices.get(&settings.host).map_or(0, Vec::len) as u32,
        failsafe: settings.failsafe,
    };
    let (agent, effects) = match remembered(&ha, &boot_id) {
        Some(mine) => Agent::resumed(me, clock::now(), mine),
        None => (Agent::new(me), Vec::new()),
    };
    if effects.is_empty() {
        // Of a boot before this one, or of guests that are gone.
        guests::forget_new(&ha);
    }
    let protected = settings.hook().protected().unwrap_or_default();
    let mut host = Host {
        protected: Arc::new(protected.into_iter().map(|(vm, _)| vm).collect()),
        monitors: monitor::Monitors::new(ha.clone(), connection.clone(), outside.clone()),
        services: services::Services::new(ha.clone(), connection.clone(), outside.clone(), store.clone()),
        pairs: pairs::Pairs::new(&ha, connection.clone(), outside.clone(), store.clone()),
        protector: protect::Protector::new(&ha, connection.clone(), outside.clone(), store.clone()),
        ha,
        store,
        outside,
        hypervisor: connection,
        agent,
        boot_id,
        watchdog: None,
        watchdog_text: String::new(),
        arming: false,
        disarming: false,
        starting: BTreeMap::new(),
        looking: false,
        kills: guests::kills(),
        stopping: None,
        hook_error: Some(HOOK_UNKNOWN.into()),
    };
    host.perform_all(effects);
    host.step(Event::Enable(true));
    host.protector.install();
    let mut looked = host.ha.0.looked.subscribe();
    let mut tick = tokio::time::interval(Duration::from_millis((settings.timing.heartbeat_ms / TICKS).max(20)));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(input) = inputs.recv() => host.take(input),
            changed = looked.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = looked.borrow_and_update().clone();
                if let Some(now) = now {
                    host.seen(&now);
                }
            }
            _ = tick.tick() => host.step(Event::Tick),
        }
        host.show();
    }
}

/// Connects to the hypervisor, then passes on how guests end.
async fn connect(outside: Arc<dyn Outside>, connection: latest::Sender<Option<Arc<dyn Hypervisor>>>, ha: Ha) {
    let hypervisor = loop {
        match outside.hypervisor().await {
            Ok(hypervisor) => break hypervisor,
            Err(error) => tracing::warn!(error, "high availability does not reach the hypervisor"),
        }
        tokio::time::sleep(CONNECT_AGAIN).await;
    };
    let mut events = hypervisor.events();
    connection.send_replace(Some(hypervisor));
    loop {
        match events.recv().await {
            Ok(event) => {
                if let Some(how) = guests::ended(&event.kind) {
                    let _ = ha.0.to_agent.send(Input::Ended { vm: event.uuid, how });
                }
            }
            // What was missed is seen by the next look at the processes.
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

fn mine_file(ha: &Ha) -> PathBuf {
    ha.settings().run_dir.join("mine.json")
}

fn remembered(ha: &Ha, boot_id: &str) -> Option<Mine> {
    let text = fs::read(mine_file(ha)).ok()?;
    let remembered: Remembered = serde_json::from_slice(&text).ok()?;
    (remembered.boot_id == boot_id).then_some(remembered.mine)
}

impl Host {
    fn say(&self, weight: Weight, text: &str) {
        self.outside.say(weight, text);
    }

    fn send(&self) -> mpsc::UnboundedSender<Input> {
        self.ha.0.to_agent.clone()
    }

    fn step(&mut self, event: Event<'_>) {
        let effects = self.agent.step(clock::now(), event);
        self.perform_all(effects);
    }

    fn perform_all(&mut self, effects: Vec<Effect>) {
        effects.into_iter().for_each(|effect| self.perform(effect));
    }

    fn seen(&mut self, looked: &Looked) {
        let switches = looked.view.switches();
        self.step(Event::Maintenance(!switches.armed || self.stopping.is_some()));
        self.protect(looked);
        self.step(Event::View(&looked.view));
        let epoch = match self.agent.stage() {
            Stage::Armed { epoch } => Some(*epoch),
            _ => None,
        };
        self.monitors.follow(&looked.view, epoch);
        self.services.follow(&looked.view, epoch.filter(|_| switches.armed));
        self.pairs.follow(&looked.view, epoch);
        self.renew_permits();
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Answered { id, answer } => {
                if answer == Answer::Refused {
                    // Whatever changed the record is to be seen at once.
                    self.ha.look_now();
                }
                self.step(Event::Answered { id, answer });
            }
            Input::Armed(outcome) => self.armed(outcome),
            Input::Disarmed(outcome) => {
                self.disarming = false;
                match outcome {
                    Ok(()) => self.watchdog_text = "off".into(),
                    Err(why) => self.say(Weight::Error, &why),
                }
            }
            Input::Guests { asked, alive } => {
                self.looking = false;
                self.step(Event::Guests { asked, alive });
            }
            Input::PeerAnswered { asked, peer, ack } => self.step(Event::PeerAnswered { asked, peer, ack }),
            Input::Started { vm, generation } => {
                self.starting.remove(&vm);
                self.step(Event::Started { vm, generation });
            }
            Input::StartFailed { vm, generation, why, disk_generation } => {
                self.starting.remove(&vm);
                self.step(Event::StartFailed { vm, generation, why, disk_generation });
            }
            Input::Resumed { vm } => {
                self.monitors.started(vm);
                self.services.started(vm);
            }
            Input::Ended { vm, how } if self.protected.contains(&vm) => self.step(Event::GuestEnded { vm, how }),
            Input::Ended { .. } => {}
            Input::GivingUp { vm } => self.step(Event::GivingUp { vm }),
            Input::Relocate { vm, why, for_service } => self.step(Event::Relocate { vm, why, for_service }),
            Input::StoodDown { vm, why } => self.step(Event::StoodDown { vm, why }),
            Input::Well { vm } => self.step(Event::Well { vm }),
            Input::Ready { vm } => self.step(Event::Ready { vm }),
            Input::Hook(error) => self.hook_told(error),
            Input::Stop(done) => {
                self.stopping = Some(done);
                self.step(Event::Maintenance(true));
                if !matches!(self.agent.stage(), Stage::Armed { .. }) {
                    self.step(Event::Enable(false));
                }
            }
        }
        self.is_stopped();
    }

    /// Whether the daemon may end without its guests being taken.
    fn is_stopped(&mut self) {
        if self.stopping.is_none() {
            return;
        }
        match self.agent.stage() {
            Stage::Armed { .. } if !self.agent.is_resting() || self.watchdog.is_some() => return,
            Stage::Killing { .. } => return,
            _ => {}
        }
        if self.watchdog.is_some() {
            return self.disarm();
        }
        if self.disarming || self.arming {
            return;
        }
        if let Some(done) = self.stopping.take() {
            let _ = done.send(());
        }
    }

    fn hook_told(&mut self, error: Option<String>) {
        if self.hook_error != error {
            match &error {
                Some(why) => self.say(Weight::Error, why),
                None => self.say(Weight::Info, "libvirt asks before it starts a protected VM"),
            }
        }
        self.hook_error = error;
    }

    fn show(&self) {
        let now = clock::now();
        let mut status = lock(&self.ha.0.status);
        status.stage = self.agent.stage().clone();
        status.watchdog = self.agent.watchdog();
        status.watchdog_text.clone_from(&self.watchdog_text);
        status.allowed_ms = self.agent.allowed_until().map(|until| until.since(now));
        status.hook_error.clone_from(&self.hook_error);
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Txn { id, txn, what } => self.txn(id, txn, what),
            Effect::ArmWatchdog { timeout_ms } => self.arm(timeout_ms),
            Effect::DisarmWatchdog => self.disarm(),
            Effect::Pet { until } => self.pet(until),
            Effect::AskPeers { asked, peers, epoch } => self.ask(asked, peers, epoch),
            Effect::KillAll => self.kill_all(),
            Effect::LookAtGuests => self.look(),
            Effect::Start { vm, generation, epoch } => self.start(vm, generation, epoch),
            Effect::Resume { vm, generation, until } => self.resume(vm, generation, until),
            Effect::Kill { vm, why } => {
                self.say(Weight::Warning, &format!("{} is ended on this host: {why}", self.ha.name(vm)));
                self.kill_one(vm);
            }
            Effect::Remember(mine) => self.remember(mine),
            Effect::Say(text) => {
                let weight = if text.starts_with("soft fence") { Weight::Error } else { Weight::Warning };
                self.say(weight, &format!("{}: {text}", self.ha.settings().host));
            }
        }
    }

    fn txn(&self, id: u64, txn: virtward_decide::ha::Txn, what: String) {
        let (store, answers) = (self.store.clone(), self.send());
        let (outside, me) = (self.outside.clone(), self.ha.settings().host.clone());
        tokio::spawn(async move {
            let answer = store::perform(&*store, &txn).await;
            let is_news = !what.starts_with("heartbeat") && !what.starts_with("record of");
            match answer {
                Answer::Done { .. } if is_news => outside.say(Weight::Info, &format!("{me}: {what}")),
                Answer::Done { .. } => tracing::trace!(what, "done"),
                other => tracing::debug!(what, ?other, "not done"),
            }
            let _ = answers.send(Input::Answered { id, answer });
        });
    }

    fn arm(&mut self, timeout_ms: u64) {
        let Some(path) = self.ha.settings().watchdog.clone() else {
            self.watchdog_text = "none is configured".into();
            return self.step(Event::WatchdogFailed { why: self.watchdog_text.clone() });
        };
        // Arming again is a pet, and the machine says when it wants one.
        if let Some(watchdog) = &mut self.watchdog {
            if watchdog.pet().is_ok() {
                return self.is_armed();
            }
            self.watchdog = None;
        }
        if std::mem::replace(&mut self.arming, true) {
            return;
        }
        let answers = self.send();
        let timeout_s = u32::try_from(timeout_ms / 1000).unwrap_or(u32::MAX);
        tokio::task::spawn_blocking(move || {
            let armed = Watchdog::arm(&path, timeout_s).map_err(|error| error.to_string());
            let _ = answers.send(Input::Armed(armed));
        });
    }

    fn armed(&mut self, outcome: Result<Watchdog, String>) {
        self.arming = false;
        match outcome {
            Ok(watchdog) => {
                self.watchdog_text = watchdog.identity().to_owned();
                self.watchdog = Some(watchdog);
                self.is_armed();
            }
            Err(why) => {
                self.watchdog_text.clone_from(&why);
                self.step(Event::WatchdogFailed { why });
            }
        }
    }

    fn is_armed(&mut self) {
        let Some(watchdog) = &self.watchdog else { return };
        let class = match watchdog.class() {
            // A keeper is outside of what it ends.
            Class::Hardware | Class::Keeper => WatchdogClass::Hardware,
            Class::Softdog => WatchdogClass::Software,
        };
        let timeout_ms = u64::from(watchdog.timeout_s()) * 1000;
        self.step(Event::WatchdogArmed { timeout_ms, class });
    }

    fn disarm(&mut self) {
        let Some(watchdog) = self.watchdog.take() else { return };
        self.disarming = true;
        let answers = self.send();
        tokio::task::spawn_blocking(move || {
            let outcome = watchdog.disarm().map_err(|error| error.to_string());
            let _ = answers.send(Input::Disarmed(outcome));
        });
    }

    fn pet(&mut self, until: Moment) {
        let Some(watchdog) = &mut self.watchdog else { return };
        // The last look at the clock: what comes after it is what the second W is for.
        if clock::now() > until {
            return;
        }
        if let Err(error) = watchdog.pet() {
            self.say(Weight::Error, &error.to_string());
        }
    }

    fn ask(&self, asked: Moment, peers: BTreeSet<HostId>, epoch: u64) {
        let limit = Duration::from_millis(self.ha.settings().timing.heartbeat_ms);
        for peer in peers {
            let (outside, answers) = (self.outside.clone(), self.send());
            tokio::spawn(async move {
                if let Ok(Some(ack)) = tokio::time::timeout(limit, outside.ask(&peer, epoch)).await {
                    let _ = answers.send(Input::PeerAnswered { asked, peer, ack });
                }
            });
        }
    }

    fn remember(&self, mine: Option<Mine>) {
        let file = mine_file(&self.ha);
        let written = match mine {
            None => match fs::remove_file(&file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            Some(mine) => {
                let text = serde_json::to_vec(&Remembered { boot_id: self.boot_id.clone(), mine }).unwrap_or_default();
                let new = file.with_extension("new");
                let dir = fs::create_dir_all(&self.ha.settings().run_dir);
                dir.and_then(|()| fs::write(&new, text)).and_then(|()| fs::rename(&new, &file))
            }
        };
        if let Err(error) = written {
            self.say(Weight::Error, &format!("cannot write {}: {error}", file.display()));
        }
    }
}
