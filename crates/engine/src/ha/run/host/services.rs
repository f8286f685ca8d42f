//! Services inside of protected guests that run here: probed, and the ladder climbed when one stays down.
//!
//! One task per VM asks all of its probes, so that what was done to the VM for one service gives the others time too.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::watch as latest;
use virtward_cluster::Store;
use virtward_decide::ha::{
    Moment, View, VmId,
    probe::{Effect, Found, Rung, Watch, Watched},
};
use virtward_hypervisor::Hypervisor;

use super::{Input, guests};
use crate::ha::{
    probe::{self, Target, Verdict},
    run::{Ha, Outside, Weight, clock, lock, store},
};

/// How long a command that restarts a service may take.
const RESTART_MAX: Duration = Duration::from_secs(60);
/// Shortest time between two looks at what is due.
const PAUSE: Duration = Duration::from_millis(250);

/// What is watched of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Of {
    name: String,
    services: Vec<Watched>,
    moves: u32,
    /// It is the active one of a pair.
    has_standby: bool,
    /// Counts starts of the guest that this process knows of.
    starts: u64,
}

/// All of them.
#[derive(Clone)]
pub(super) struct Services {
    ha: Ha,
    hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
    outside: Arc<dyn Outside>,
    store: Arc<dyn Store>,
    vms: Arc<Mutex<BTreeMap<VmId, Of>>>,
}

/// One service while it is watched.
struct One {
    watched: Watched,
    target: Target,
    watch: Watch,
    due: Moment,
}

impl Services {
    pub(super) fn new(
        ha: Ha,
        hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
        outside: Arc<dyn Outside>,
        store: Arc<dyn Store>,
    ) -> Self {
        Self { ha, hypervisor, outside, store, vms: Arc::default() }
    }

    /// Watches what runs here and is to be watched; nothing while the cluster is disarmed.
    pub(super) fn follow(&self, view: &View, epoch: Option<u64>) {
        let me = &self.ha.settings().host;
        let mut vms = lock(&self.vms);
        let runs_here = |vm: &VmId| {
            let record = view.vms.get(vm).map(|of| &of.value);
            let here = record.filter(|of| epoch.is_some_and(|epoch| of.runs_on(me, epoch)));
            here.map(|record| (record, watched(view, *vm))).filter(|(_, (services, _))| !services.is_empty())
        };
        vms.retain(|vm, _| runs_here(vm).is_some());
        for vm in view.vms.keys() {
            let Some((record, (services, has_standby))) = runs_here(vm) else { continue };
            let moves = record.service_moves;
            match vms.get_mut(vm) {
                Some(of) => (of.services, of.moves, of.has_standby) = (services, moves, has_standby),
                None => {
                    vms.insert(*vm, Of { name: record.name.clone(), services, moves, has_standby, starts: 0 });
                    tokio::spawn(self.clone().watch(*vm));
                }
            }
        }
    }

    /// A guest's process was made anew.
    pub(super) fn started(&self, vm: VmId) {
        if let Some(of) = lock(&self.vms).get_mut(&vm) {
            of.starts += 1;
        }
    }

    fn of(&self, vm: VmId) -> Option<Of> {
        lock(&self.vms).get(&vm).cloned()
    }

    /// Watches one VM for as long as it is to be watched.
    async fn watch(self, vm: VmId) {
        let mut known = None;
        let mut all: Vec<One> = Vec::new();
        while let Some(of) = self.of(vm) {
            if known.as_ref() != Some(&of) {
                all = self.begin(&of);
                known = Some(of.clone());
            }
            for at in 0..all.len() {
                if clock::now() >= all[at].due {
                    self.look(vm, &of.name, &mut all, at).await;
                }
            }
            if of.moves > 0 && !all.is_empty() && all.iter().all(|one| one.watch.is_well()) {
                let _ = self.ha.0.to_agent.send(Input::Well { vm });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn begin(&self, of: &Of) -> Vec<One> {
        let now = clock::now();
        let one = |watched: &Watched| match Target::parse(&watched.check) {
            Ok(target) => {
                let watch = Watch::new(watched.ladder(of.moves, of.has_standby), now, watched.grace_ms);
                Some(One { watched: watched.clone(), target, watch, due: now })
            }
            // Written by a newer version, which knows more.
            Err(why) => {
                self.outside.say(Weight::Warning, &format!("{}: not watched: {why}", of.name));
                None
            }
        };
        of.services.iter().filter_map(one).collect()
    }

    async fn look(&self, vm: VmId, name: &str, all: &mut [One], at: usize) {
        let hypervisor = self.hypervisor.borrow().clone();
        let verdict = all[at].target.ask(hypervisor.as_deref(), vm).await;
        let now = clock::now();
        let one = &mut all[at];
        one.due = now.plus(one.watched.every_ms);
        let (found, why) = match verdict {
            Verdict::Up(_) => (Found::Up, String::new()),
            Verdict::Down(why) => (Found::Down, why),
            Verdict::Unknown(why) => {
                tracing::debug!(name, check = one.watched.check, why, "a service could not be probed");
                (Found::Unknown, why)
            }
        };
        let service = format!("{name}: {}", one.watched.check);
        for effect in one.watch.step(now, found) {
            match effect {
                Effect::Say(text) => self.outside.say(Weight::Warning, &format!("{service}: {text}")),
                Effect::Act(rung) => {
                    let held_ms = one_grace(&all[at].watched, rung);
                    // It may have moved, or been shut down, while it was probed.
                    if self.of(vm).is_none() {
                        return;
                    }
                    self.act(vm, &service, &why, &all[at].watched, rung).await;
                    if rung != Rung::RestartService {
                        all.iter_mut().for_each(|one| one.watch.hold(clock::now(), held_ms));
                    }
                }
            }
        }
    }

    async fn act(&self, vm: VmId, service: &str, why: &str, watched: &Watched, rung: Rung) {
        let hypervisor = self.hypervisor.borrow().clone();
        let outcome = match (rung, hypervisor) {
            (Rung::RestartService, Some(hypervisor)) => match &watched.restart {
                Some(how) => {
                    self.outside.say(Weight::Error, &format!("{service} is down ({why}): the service is restarted"));
                    probe::restart(&*hypervisor, vm, how, RESTART_MAX).await
                }
                None => Ok(()),
            },
            (Rung::RestartVm, Some(hypervisor)) => {
                self.outside.say(Weight::Error, &format!("{service} is down ({why}): the VM is reset"));
                let reset = hypervisor.reset(vm).await.map_err(|error| error.to_string());
                // One that stood still does not run after a reset alone.
                let _ = hypervisor.resume(vm).await;
                reset
            }
            (Rung::Relocate, _) => {
                self.outside.say(Weight::Error, &format!("{service} is down ({why}): the VM is started elsewhere"));
                let why = format!("{} is down: {why}", watched.check);
                guests::give_up(&self.ha, &*self.outside, vm, why, true).await;
                Ok(())
            }
            (Rung::SwitchToStandby, _) => {
                self.outside.say(Weight::Error, &format!("{service} is down ({why}): its standby takes over"));
                let why = format!("{} is down: {why}", watched.check);
                store::switch(&*self.store, vm, &why).await.map(|()| self.ha.look_now())
            }
            (Rung::RestartService | Rung::RestartVm, None) => Err("the hypervisor does not answer".into()),
        };
        if let Err(error) = outcome {
            self.outside.say(Weight::Error, &format!("{service}: that did not succeed: {error}"));
        }
    }
}

/// The services that are watched in a VM, and whether it has a standby. Those of both of a pair are watched in the active
/// one, and in the other none.
fn watched(view: &View, vm: VmId) -> (Vec<Watched>, bool) {
    let of = |vm: VmId| view.vms.get(&vm).map(|of| of.value.policy.services.clone()).unwrap_or_default();
    let Some((_, pair)) = view.pair_of(vm) else { return (of(vm), false) };
    // Until it leads there is nothing to be watched.
    if vm != pair.value.active || !pair.value.is_settled() {
        return (Vec::new(), false);
    }
    let mut services = of(vm);
    for watched in of(pair.value.standby) {
        if services.iter().all(|one| one.check != watched.check) {
            services.push(watched);
        }
    }
    (services, true)
}

/// For how long failures do not count after a step.
fn one_grace(watched: &Watched, rung: Rung) -> u64 {
    watched.policy.steps.iter().find(|step| step.action == rung).map_or(watched.grace_ms, |step| step.grace_ms)
}
