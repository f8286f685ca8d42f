//! Pairs of an active VM and its standby: what the host that runs one of both does about its role.
//!
//! Before anything is done in a guest the store is asked once more: what was decided from may have been seen some time ago.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::watch as latest;
use virtward_cluster::Store;
use virtward_decide::ha::{
    Answer, Owner, View, VmId,
    pair::{self, Duty, Floating, PairRecord},
    probe::Restart,
};
use virtward_hypervisor::Hypervisor;

use super::guests;
use crate::ha::{
    probe,
    run::{Ha, Outside, Weight, lock, store},
};

/// How long a hook may take.
const HOOK_MAX: Duration = Duration::from_secs(120);
/// How long a command about an address may take.
const ADDRESS_MAX: Duration = Duration::from_secs(10);
/// How long a guest's agent may take, in seconds.
const PING_S: u32 = 3;
/// After something that failed.
const AGAIN: Duration = Duration::from_secs(3);
/// After something that was done, or is not to be done: until the records show it.
const REST: Duration = Duration::from_secs(1);
/// Tries to make a guest follow before it is ended.
const DEMOTIONS_MAX: u32 = 3;

/// All of them.
#[derive(Clone)]
pub(super) struct Pairs {
    ha: Ha,
    hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
    outside: Arc<dyn Outside>,
    store: Arc<dyn Store>,
    /// Guests that are being told, and those that could not be made to follow, with how often that was tried.
    at_work: Arc<Mutex<BTreeSet<VmId>>>,
    failed: Arc<Mutex<BTreeMap<VmId, u32>>>,
}

impl Pairs {
    pub(super) fn new(
        ha: &Ha,
        hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
        outside: Arc<dyn Outside>,
        store: Arc<dyn Store>,
    ) -> Self {
        Self { ha: ha.clone(), hypervisor, outside, store, at_work: Arc::default(), failed: Arc::default() }
    }

    /// Does what is due for the VMs of pairs that run here.
    pub(super) fn follow(&self, view: &View, epoch: Option<u64>) {
        let Some(epoch) = epoch else { return };
        let me = Owner { host: self.ha.settings().host.clone(), epoch };
        let both = view.pairs.values().flat_map(|pair| [pair.value.active, pair.value.standby]);
        for vm in both {
            let is_due = duty(view, vm, &me).is_some_and(|duty| !matches!(duty, Duty::Wait(_)));
            if is_due && lock(&self.at_work).insert(vm) {
                tokio::spawn(self.clone().perform(vm, me.clone()));
            }
        }
    }

    async fn perform(self, vm: VmId, me: Owner) {
        let pause = match self.act(vm, &me).await {
            Ok(()) => REST,
            Err(why) => {
                self.outside.say(Weight::Error, &format!("{}: {why}", self.ha.name(vm)));
                AGAIN
            }
        };
        tokio::time::sleep(pause).await;
        lock(&self.at_work).remove(&vm);
    }

    async fn act(&self, vm: VmId, me: &Owner) -> Result<(), String> {
        let view = store::view(&*self.store).await.map_err(|error| format!("its role is not known: {error}"))?;
        let Some((duty, (_, pair))) = duty(&view, vm, me).zip(view.pair_of(vm)) else { return Ok(()) };
        let pair = &pair.value;
        let name = self.ha.name(vm);
        // A guest that is still starting has no agent yet: that is no failure of a hook.
        if duty != Duty::StandDown && !self.answers(vm).await {
            tracing::debug!(name, "its role is to be told, and its agent does not answer yet");
            return Ok(());
        }
        match duty {
            Duty::Wait(_) => return Ok(()),
            Duty::StandDown => {
                self.stand_down(vm, &pair.note).await;
                return Ok(());
            }
            Duty::Lead => {
                self.lead(vm, &name, pair).await?;
                self.outside.say(Weight::Warning, &format!("{name} is the active one of its pair"));
            }
            Duty::Follow => {
                if let Err(why) = self.hook(vm, &pair.demote).await {
                    return self.not_demoted(vm, why).await;
                }
                lock(&self.failed).remove(&vm);
                self.outside.say(Weight::Warning, &format!("{name} is the standby of its pair"));
            }
        }
        // From the same records: should they have changed meanwhile, it is told again.
        let txn = pair::told(&view, vm, me).ok_or("it does not run here any more")?;
        match store::perform(&*self.store, &txn).await {
            Answer::Done { .. } | Answer::Refused => self.ha.look_now(),
            Answer::Unavailable | Answer::Unknown => tracing::debug!(name, "that it was told its role is not kept yet"),
        }
        Ok(())
    }

    /// Addresses first, so that the service finds them; the neighbours are told while it starts.
    async fn lead(&self, vm: VmId, name: &str, pair: &PairRecord) -> Result<(), String> {
        for floating in &pair.addresses {
            let Floating { address, device } = floating;
            let add = ["ip", "address", "replace", address, "dev", device];
            let added = self.command(vm, &add, ADDRESS_MAX).await;
            added.map_err(|why| format!("its address {address} could not be added: {why}"))?;
        }
        let announce = async {
            for Floating { address, device } in &pair.addresses {
                let bare = address.split('/').next().unwrap_or_default();
                let words = ["arping", "-U", "-c", "2", "-I", device, bare];
                if let Err(why) = self.command(vm, &words, ADDRESS_MAX).await {
                    let text = format!("{name}: its neighbours may look for {bare} elsewhere for minutes: {why}");
                    self.outside.say(Weight::Warning, &text);
                }
            }
        };
        let (promoted, ()) = tokio::join!(self.hook(vm, &pair.promote), announce);
        promoted.map_err(|why| format!("it is to be the active one, and the promote hook failed: {why}"))
    }

    async fn not_demoted(&self, vm: VmId, why: String) -> Result<(), String> {
        let tries = {
            let mut failed = lock(&self.failed);
            let tries = failed.entry(vm).or_default();
            *tries += 1;
            *tries
        };
        let text = format!("it is to be the standby, and the demote hook failed {tries} times: {why}");
        if tries >= DEMOTIONS_MAX {
            lock(&self.failed).remove(&vm);
            self.stand_down(vm, &text).await;
        }
        Err(text)
    }

    async fn stand_down(&self, vm: VmId, why: &str) {
        self.outside.say(Weight::Error, &format!("{} is ended: {why}", self.ha.name(vm)));
        guests::stand_down(&self.ha, &*self.outside, vm, why.to_owned()).await;
    }

    async fn answers(&self, vm: VmId) -> bool {
        let hypervisor = self.hypervisor.borrow().clone();
        let Some(hypervisor) = hypervisor else { return false };
        hypervisor.agent(vm, r#"{"execute":"guest-ping"}"#, PING_S).await.is_ok()
    }

    async fn hook(&self, vm: VmId, command: &[String]) -> Result<(), String> {
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        self.command(vm, &words, HOOK_MAX).await
    }

    async fn command(&self, vm: VmId, command: &[&str], limit: Duration) -> Result<(), String> {
        let hypervisor = self.hypervisor.borrow().clone().ok_or("the hypervisor does not answer")?;
        let command = Restart::Command(command.iter().map(|word| (*word).to_owned()).collect());
        probe::restart(&*hypervisor, vm, &command, limit).await
    }
}

/// What this host has to do about a VM's role.
fn duty(view: &View, vm: VmId, me: &Owner) -> Option<Duty> {
    let runs_here = view.vms.get(&vm).is_some_and(|of| of.value.runs_on(&me.host, me.epoch));
    pair::duty(view, vm).filter(|_| runs_here)
}
