//! Protected guests that run here, each with its machine: does it live, is it ready, is it to be reset.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::{broadcast, watch as latest};
use virtward_decide::ha::{
    Moment, View, VmId,
    guest::{Effect, Event, Guest},
    record::{Gate, VmPolicy},
};
use virtward_hypervisor::{DomainEventKind, Hypervisor};
use virtward_model::VmState;

use super::{Input, guests};
use crate::ha::run::{Ha, Outside, Weight, clock, lock};

/// Between two looks at a guest.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The same while its readiness is waited for.
const READY_EVERY: Duration = Duration::from_secs(1);
/// How long a guest's agent may take, in seconds.
const PING_S: u32 = 3;
/// How long the counters may take.
const STATS_MAX: Duration = Duration::from_secs(4);
/// A guest that runs for so long after an I/O error has got over it.
const MENDED_MS: u64 = 30_000;
/// A stop and an I/O error are one thing if they are told within this time. QEMU tells of a disk's errors once a second (since
/// 10.0): a guest that is let run and fails at once is told to be stopped first, and why only later.
const NEAR_MS: u64 = 3_000;

/// Why a guest's vCPUs do not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Still {
    IoError,
    /// A person's doing, or a job's: nothing follows from its silence.
    Other,
}

struct One {
    name: String,
    guest: Guest,
    still: Option<Still>,
    /// When that began.
    still_since: Moment,
    /// When an error of one of its disks was told last.
    error_told: Option<Moment>,
    /// When it last stood still for an I/O error.
    io_error: Option<Moment>,
    gate: Gate,
    is_ready: bool,
    policy: VmPolicy,
}

/// All of them.
#[derive(Clone)]
pub(super) struct Monitors {
    ha: Ha,
    hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
    outside: Arc<dyn Outside>,
    guests: Arc<Mutex<BTreeMap<VmId, One>>>,
}

impl Monitors {
    pub(super) fn new(
        ha: Ha,
        hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
        outside: Arc<dyn Outside>,
    ) -> Self {
        let this = Self { ha, hypervisor, outside, guests: Arc::default() };
        tokio::spawn(this.clone().listen());
        this
    }

    /// Watches what runs here, and nothing else.
    pub(super) fn follow(&self, view: &View, epoch: Option<u64>) {
        let me = &self.ha.settings().host;
        let mut guests = lock(&self.guests);
        let runs_here =
            |vm: &VmId| view.vms.get(vm).filter(|of| epoch.is_some_and(|epoch| of.value.runs_on(me, epoch)));
        guests.retain(|vm, _| runs_here(vm).is_some());
        let mut new = Vec::new();
        for vm in view.vms.keys() {
            let Some(record) = runs_here(vm) else { continue };
            let record = &record.value;
            let one = guests.entry(*vm).or_insert_with(|| {
                new.push(*vm);
                One {
                    name: record.name.clone(),
                    guest: Guest::new(record.policy.clone(), clock::now()),
                    still: None,
                    still_since: Moment::default(),
                    error_told: None,
                    io_error: None,
                    gate: record.policy.gate,
                    is_ready: record.ready,
                    policy: record.policy.clone(),
                }
            });
            one.is_ready = record.ready;
            if one.policy != record.policy {
                one.policy = record.policy.clone();
                one.gate = record.policy.gate;
                one.guest.set_policy(record.policy.clone());
            }
        }
        drop(guests);
        for vm in new {
            tokio::spawn(self.clone().watch(vm));
        }
    }

    /// A guest's process was made anew.
    pub(super) fn started(&self, vm: VmId) {
        self.step(vm, Event::Started);
    }

    /// Looks at one guest for as long as it is watched.
    async fn watch(self, vm: VmId) {
        self.look_whether_it_stands_still(vm).await;
        loop {
            let seen = lock(&self.guests).get(&vm).map(|one| (one.is_ready, one.gate, one.still, one.io_error));
            let Some((is_ready, gate, still, io_error)) = seen else { return };
            if still.is_some() || io_error.is_some() {
                match (still, io_error) {
                    (Some(Still::IoError), _) => self.step(vm, Event::IoPaused),
                    (None, Some(at)) if clock::now().since(at) > MENDED_MS => {
                        self.note(vm, |one| one.io_error = None);
                        self.step(vm, Event::Running);
                    }
                    _ => {}
                }
                if still.is_some() {
                    tokio::time::sleep(LOOK_EVERY).await;
                    continue;
                }
            }
            if !is_ready && gate == Gate::Running {
                let _ = self.ha.0.to_agent.send(Input::Ready { vm });
            }
            let hypervisor = self.hypervisor.borrow().clone();
            if let Some(hypervisor) = hypervisor {
                let sample = sample(&*hypervisor, vm).await;
                self.step(vm, sample);
                // Said once by the machine; again here, should the store not have heard it.
                if !is_ready && matches!(sample, Event::Sample { agent: Some(true), .. }) {
                    let _ = self.ha.0.to_agent.send(Input::Ready { vm });
                }
            }
            tokio::time::sleep(if is_ready { LOOK_EVERY } else { READY_EVERY }).await;
        }
    }

    fn note(&self, vm: VmId, change: impl FnOnce(&mut One)) {
        if let Some(one) = lock(&self.guests).get_mut(&vm) {
            change(one);
        }
    }

    /// Events tell from now on; whether it stands still already, nobody tells.
    async fn look_whether_it_stands_still(&self, vm: VmId) {
        let hypervisor = self.hypervisor.borrow().clone();
        let Some(hypervisor) = hypervisor else { return };
        if hypervisor.lookup(&vm.to_string()).await.is_ok_and(|vm| vm.state == VmState::Paused) {
            self.note(vm, |one| one.still = one.still.or(Some(Still::Other)));
        }
    }

    fn step(&self, vm: VmId, event: Event) {
        let effects = match lock(&self.guests).get_mut(&vm) {
            Some(one) => {
                let name = one.name.clone();
                let effects = one.guest.step(clock::now(), event);
                effects.into_iter().map(|effect| (name.clone(), effect)).collect::<Vec<_>>()
            }
            None => return,
        };
        for (name, effect) in effects {
            tokio::spawn(self.clone().perform(vm, name, effect));
        }
    }

    async fn perform(self, vm: VmId, name: String, effect: Effect) {
        let hypervisor = self.hypervisor.borrow().clone();
        let answers = &self.ha.0.to_agent;
        match (effect, hypervisor) {
            (Effect::Say(text), _) => self.outside.say(Weight::Warning, &format!("{name}: {text}")),
            (Effect::Ready, _) => _ = answers.send(Input::Ready { vm }),
            (Effect::Reset(why), Some(hypervisor)) => {
                self.outside.say(Weight::Error, &format!("{name} is reset: {why}"));
                if let Err(error) = hypervisor.reset(vm).await {
                    self.outside.say(Weight::Error, &format!("{name} could not be reset: {error}"));
                }
                // A panicked or paused guest does not run after a reset alone.
                let _ = hypervisor.resume(vm).await;
            }
            (Effect::Resume, Some(hypervisor)) => {
                let outcome = hypervisor.resume(vm).await.map_or_else(|error| error.to_string(), |()| "done".into());
                self.outside
                    .say(Weight::Error, &format!("{name} was stopped by an I/O error; let run again: {outcome}"));
            }
            (Effect::Relocate(why), _) => {
                self.outside.say(Weight::Error, &format!("{name} is given up on this host: {why}"));
                guests::give_up(&self.ha, &*self.outside, vm, why, false).await;
            }
            (Effect::Reset(_) | Effect::Resume, None) => {}
        }
    }

    /// Its vCPUs stopped.
    fn stopped(&self, vm: VmId, for_io_error: bool) {
        let now = clock::now();
        let mut is_error = false;
        self.note(vm, |one| {
            is_error = for_io_error || is_near(one.error_told, now);
            one.still_since = now;
            one.still = Some(if is_error { Still::IoError } else { Still::Other });
            one.io_error = if is_error { Some(now) } else { one.io_error };
        });
        if is_error {
            self.step(vm, Event::IoPaused);
        }
    }

    /// One of its disks had an error; whether that stops it is told by itself, before or after.
    fn disk_failed(&self, vm: VmId) {
        let now = clock::now();
        let mut is_error = false;
        self.note(vm, |one| {
            one.error_told = Some(now);
            is_error = one.still == Some(Still::Other) && is_near(Some(one.still_since), now);
            if is_error {
                (one.still, one.io_error) = (Some(Still::IoError), Some(now));
            }
        });
        if is_error {
            self.step(vm, Event::IoPaused);
        }
    }

    /// What the hypervisor tells by itself.
    async fn listen(self) {
        let mut connection = self.hypervisor.clone();
        let Ok(Some(hypervisor)) = connection.wait_for(Option::is_some).await.map(|there| there.clone()) else {
            return;
        };
        let mut events = hypervisor.events();
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            };
            let vm = event.uuid;
            match &event.kind {
                DomainEventKind::Watchdog => self.step(vm, Event::Watchdog),
                DomainEventKind::Crashed => self.step(vm, Event::Panicked),
                DomainEventKind::Suspended { detail } => self.stopped(vm, detail == "ioerror"),
                DomainEventKind::IoError { .. } => self.disk_failed(vm),
                DomainEventKind::Resumed { .. } | DomainEventKind::Started { .. } => {
                    self.note(vm, |one| one.still = None);
                }
                _ => {}
            }
        }
    }
}

fn is_near(then: Option<Moment>, now: Moment) -> bool {
    then.is_some_and(|then| now.since(then) <= NEAR_MS)
}

/// Whether the agent answers, and what the disks have done so far. What is not known is none.
async fn sample(hypervisor: &dyn Hypervisor, vm: VmId) -> Event {
    let ping = hypervisor.agent(vm, r#"{"execute":"guest-ping"}"#, PING_S);
    let agent = match ping.await {
        Ok(_) => Some(true),
        Err(error) if error.kind == virtward_hypervisor::ErrorKind::AgentUnavailable => Some(false),
        Err(_) => None,
    };
    let stats = tokio::time::timeout(STATS_MAX, hypervisor.stats()).await;
    let io = stats.ok().and_then(Result::ok).and_then(|all| {
        let of = all.into_iter().find(|of| of.uuid == vm)?;
        Some(of.disks.iter().map(|disk| disk.read_ops + disk.write_ops + disk.flush_ops).sum::<u64>())
    });
    Event::Sample { agent, io }
}
