//! The coordinator's shell: every daemon watches, the leading one fences and gives VMs to hosts.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::AbortHandle};
use virtward_cluster::Store;
use virtward_decide::ha::{
    Answer, HostId,
    coordinator::{Effect, Event, FenceOutcome},
};

use super::{Ha, Outside, Weight, clock, lock, store};
use crate::ha::fence::{self, Device, Outcome};

/// At least twice a second.
const TICK: Duration = Duration::from_millis(250);

/// What comes to the loop.
pub(super) enum Input {
    /// A transaction was answered.
    Answered {
        /// Its number.
        id: u64,
        /// What became of it.
        answer: Answer,
        /// What it was, if it made a proof.
        over: Option<HostId>,
    },
    /// A fence device is done.
    Fenced { host: HostId, epoch: u64, outcome: FenceOutcome },
    /// The storage is done.
    Revoked { host: HostId, epoch: u64, result: Result<String, String> },
    /// A person's word.
    ConfirmDown { host: HostId, by: String },
}

struct Shell {
    ha: Ha,
    store: Arc<dyn Store>,
    outside: Arc<dyn Outside>,
    /// Devices at work, by host and the epoch that is to be over.
    fencing: BTreeMap<(HostId, u64), AbortHandle>,
}

/// Runs until the process ends.
pub(super) async fn run(
    ha: Ha,
    store: Arc<dyn Store>,
    outside: Arc<dyn Outside>,
    mut inputs: mpsc::UnboundedReceiver<Input>,
) {
    let mut shell = Shell { ha, store, outside, fencing: BTreeMap::new() };
    let mut looked = shell.ha.0.looked.subscribe();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut leading = false;
    loop {
        tokio::select! {
            Some(input) = inputs.recv() => shell.take(input),
            changed = looked.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = looked.borrow_and_update().clone();
                if let Some(now) = now {
                    shell.step(Event::View { view: &now.view, asked: now.asked });
                }
            }
            _ = tick.tick() => shell.step(Event::Tick),
        }
        let leads = shell.leads();
        if leads != leading {
            leading = leads;
            shell.step(Event::Leading(leads));
        }
    }
}

impl Shell {
    fn take(&mut self, input: Input) {
        match input {
            Input::Answered { id, answer, over } => {
                self.step(Event::Answered { id, answer });
                self.ha.look_now();
                if let (Some(host), Answer::Done { .. }) = (over, answer) {
                    let outside = self.outside.clone();
                    tokio::spawn(async move { outside.is_over(&host).await });
                }
            }
            Input::Fenced { host, epoch, outcome } => {
                self.fencing.remove(&(host.clone(), epoch));
                self.step(Event::Fenced { host, epoch, outcome });
            }
            Input::Revoked { host, epoch, result } => self.step(Event::Revoked { host, epoch, result }),
            Input::ConfirmDown { host, by } => self.step(Event::ConfirmDown { host, by }),
        }
    }

    fn leads(&self) -> bool {
        let deputises = || {
            let leader = self.outside.leader();
            leader.is_some_and(|leader| lock(&self.ha.0.coordinator).deputises(&leader))
        };
        self.outside.is_leading() || deputises()
    }

    fn step(&mut self, event: Event<'_>) {
        let effects = lock(&self.ha.0.coordinator).step(clock::now(), event);
        effects.into_iter().for_each(|effect| self.perform(effect));
    }

    fn perform(&mut self, effect: Effect) {
        let answers = self.ha.0.to_coordinator.clone();
        match effect {
            Effect::Txn { id, txn, what } => {
                let (store, outside) = (self.store.clone(), self.outside.clone());
                tokio::spawn(async move {
                    let answer = store::perform(&*store, &txn).await;
                    let over = store::proved(&txn);
                    match answer {
                        Answer::Done { .. } => outside.say(weight(&what), &what),
                        other => tracing::debug!(what, ?other, "not done"),
                    }
                    let _ = answers.send(Input::Answered { id, answer, over });
                });
            }
            Effect::Fence { host, epoch } => {
                let devices = self.ha.0.settings.devices.get(&host).cloned().unwrap_or_default();
                let (store, outside) = (self.store.clone(), self.outside.clone());
                let case = (host.clone(), epoch);
                let task = tokio::spawn(async move {
                    let outcome = fence(&*store, &*outside, &host, epoch, &devices).await;
                    let _ = answers.send(Input::Fenced { host, epoch, outcome });
                });
                self.fencing.insert(case, task.abort_handle());
            }
            // Its agents end with it.
            Effect::StopFencing { host, epoch } => {
                if let Some(task) = self.fencing.remove(&(host, epoch)) {
                    task.abort();
                }
            }
            // There is no storage that can refuse a host here: no such rung.
            Effect::Revoke { host, epoch, .. } => {
                let _ = answers.send(Input::Revoked { host, epoch, result: Ok(String::new()) });
            }
            Effect::Say(text) => self.outside.say(Weight::Warning, &text),
        }
    }
}

async fn fence(
    store: &dyn Store,
    outside: &dyn Outside,
    host: &HostId,
    epoch: u64,
    devices: &[Device],
) -> FenceOutcome {
    if devices.is_empty() {
        return FenceOutcome::NoDevice;
    }
    let device = match fence::off_while(devices, &|| Box::pin(store::is_being_fenced(store, host, epoch))).await {
        Outcome::Off { devices, .. } => devices.join("+"),
        Outcome::Unproven { reasons } => return FenceOutcome::Failed { why: reasons.join("; ") },
    };
    // A host that answers has power, whatever its device says.
    match outside.answers(host).await {
        true => FenceOutcome::Unverified { why: format!("{device} says off, but the host's daemon answers") },
        false => FenceOutcome::Off { device },
    }
}

fn weight(what: &str) -> Weight {
    if what.starts_with("FENCING") { Weight::Error } else { Weight::Warning }
}
