//! Keeps what outlives the daemon in step with the records: which VMs the hook guards, that libvirt does not start them
//! with the host, the hook itself, and the definitions that other hosts would start them from.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::watch as latest;
use virtward_cluster::{Compare, Op, Revision, Store};
use virtward_decide::ha::{
    Moment, View, VmId,
    record::{VmPhase, VmPolicy, VmRecord, vm_key},
    room,
};
use virtward_hypervisor::{ErrorKind, Hypervisor, XmlView};

use super::{Host, Input};
use crate::ha::{
    hook::{self, Protected},
    run::{Ha, Looked, Outside, Weight, clock, lock, store},
};

/// Between two looks whether libvirt asks the hook.
const HOOK_EVERY: Duration = Duration::from_secs(5);
/// The same while it does not.
const HOOK_AGAIN: Duration = Duration::from_secs(1);
/// Between two looks at a definition.
const XML_EVERY_MS: u64 = 20_000;
/// Longest definition that is kept.
const XML_BYTES_MAX: usize = virtward_cluster::VALUE_BYTES_MAX;

/// Keeps files, libvirt and the store in step. Tasks of its own do it.
#[derive(Clone)]
pub(super) struct Protector {
    ha: Ha,
    hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
    outside: Arc<dyn Outside>,
    store: Arc<dyn Store>,
    /// Definitions as they were put, and when that was looked at.
    put: Arc<Mutex<BTreeMap<VmId, (String, Moment)>>>,
}

impl Host {
    /// Takes note of who is protected. The set in memory changes at once, files and libvirt follow.
    pub(super) fn protect(&mut self, looked: &Looked) {
        let view = &looked.view;
        let wanted: BTreeMap<VmId, String> = view.vms.iter().map(|(vm, of)| (*vm, of.value.name.clone())).collect();
        // An emptied store says nothing about who should be protected.
        let knows_us = view.hosts.contains_key(&self.ha.settings().host);
        let unreadable = |vm: &VmId| view.unreadable.contains_key(&vm_key(*vm));
        let gone: BTreeSet<VmId> = match knows_us {
            true => self.protected.iter().filter(|vm| !wanted.contains_key(vm) && !unreadable(vm)).copied().collect(),
            false => BTreeSet::new(),
        };
        let new: BTreeMap<VmId, String> = wanted.into_iter().filter(|(vm, _)| !self.protected.contains(vm)).collect();
        if !new.is_empty() {
            let all = self.protected.iter().copied().chain(new.keys().copied()).collect();
            self.protected = Arc::new(all);
        }
        let epoch = match self.agent.stage() {
            super::Stage::Armed { epoch } => *epoch,
            _ => 0,
        };
        let me = &self.ha.settings().host;
        let mine: Vec<(VmId, u64)> = view
            .vms
            .iter()
            .filter(|(_, of)| of.value.is_owned_by(me, epoch) && of.value.phase == VmPhase::Running)
            .map(|(vm, of)| (*vm, of.revision))
            .collect();
        if !gone.is_empty() {
            let left = self.protected.iter().filter(|vm| !gone.contains(vm)).copied().collect();
            self.protected = Arc::new(left);
        }
        self.protector.clone().follow(new, gone, mine);
    }
}

impl Protector {
    pub(super) fn new(
        ha: &Ha,
        hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
        outside: Arc<dyn Outside>,
        store: Arc<dyn Store>,
    ) -> Self {
        Self { ha: ha.clone(), hypervisor, outside, store, put: Arc::default() }
    }

    fn there(&self) -> Option<Arc<dyn Hypervisor>> {
        self.hypervisor.borrow().clone()
    }

    /// Puts the hook where libvirt finds it, and looks again and again whether libvirt asks it.
    pub(super) fn install(&self) {
        let (ha, answers) = (self.ha.clone(), self.ha.0.to_agent.clone());
        tokio::spawn(async move {
            loop {
                let of = ha.clone();
                let error = tokio::task::spawn_blocking(move || hook_error(&of)).await.ok().flatten();
                let pause = if error.is_none() { HOOK_EVERY } else { HOOK_AGAIN };
                if answers.send(Input::Hook(error)).is_err() {
                    return;
                }
                tokio::time::sleep(pause).await;
            }
        });
    }

    fn follow(self, new: BTreeMap<VmId, String>, gone: BTreeSet<VmId>, mine: Vec<(VmId, u64)>) {
        if !new.is_empty() || !gone.is_empty() {
            let this = self.clone();
            tokio::spawn(async move {
                for (vm, name) in new {
                    this.protect(vm, name).await;
                }
                for vm in gone {
                    this.release(vm).await;
                }
            });
        }
        let now = clock::now();
        let mut put = lock(&self.put);
        put.retain(|vm, _| mine.iter().any(|(of, _)| of == vm));
        let due = |vm: &VmId| put.get(vm).is_none_or(|(_, at)| now.since(*at) >= XML_EVERY_MS);
        let due: Vec<(VmId, u64)> = mine.iter().filter(|(vm, _)| due(vm)).copied().collect();
        for (vm, _) in &due {
            put.entry(*vm).or_default().1 = now;
        }
        drop(put);
        if !due.is_empty() {
            tokio::spawn(async move {
                for (vm, revision) in due {
                    if let Err(why) = self.keep_definition(vm, revision).await {
                        tracing::debug!(%vm, why, "its definition stays as the cluster has it");
                    }
                }
            });
        }
    }

    async fn protect(&self, vm: VmId, name: String) {
        let write = |autostart| {
            let (hook, name) = (self.ha.settings().hook(), name.clone());
            tokio::task::spawn_blocking(move || hook.protect(vm, &Protected { name, autostart }))
        };
        if let Ok(Err(error)) = write(false).await {
            self.outside.say(Weight::Error, &format!("the hook cannot be told that {name} is protected: {error}"));
        }
        let Some(hypervisor) = self.there() else { return };
        match hypervisor.set_autostart(vm, false).await {
            Ok(true) => _ = write(true).await,
            Ok(false) => {}
            Err(error) if error.kind == ErrorKind::NoDomain => {}
            Err(error) => self.outside.say(Weight::Warning, &format!("{name} may start with its host: {error}")),
        }
    }

    async fn release(&self, vm: VmId) {
        let hook = self.ha.settings().hook();
        let before = tokio::task::spawn_blocking(move || hook.unprotect(vm)).await;
        match before {
            Ok(Ok(Some(before))) if before.autostart => {
                let Some(hypervisor) = self.there() else { return };
                if let Err(error) = hypervisor.set_autostart(vm, true).await {
                    self.outside
                        .say(Weight::Warning, &format!("{} does not start with its host: {error}", before.name));
                }
            }
            Ok(Err(error)) => self.outside.say(Weight::Error, &format!("the hook still guards {vm}: {error}")),
            _ => {}
        }
    }

    /// Puts a VM's definition into the store if it is another one than was put, and the memory that it gives into its record.
    async fn keep_definition(&self, vm: VmId, revision: u64) -> Result<(), String> {
        let hypervisor = self.there().ok_or("the hypervisor does not answer")?;
        let xml = hypervisor.xml(vm, XmlView::Inactive).await.map_err(|error| error.to_string())?;
        if lock(&self.put).get(&vm).is_some_and(|(known, _)| *known == xml) {
            return Ok(());
        }
        let key = store::xml_key(vm);
        let there = self.store.get(key.as_bytes()).await.map_err(|error| error.to_string())?;
        let mut puts = Vec::new();
        if there.is_none_or(|there| there.value[..] != *xml.as_bytes()) {
            if xml.len() > XML_BYTES_MAX {
                return Err(format!("it has {} bytes", xml.len()));
            }
            puts.push(Op::put(key, xml.clone()));
        }
        let view = store::view(&*self.store).await.map_err(|error| error.to_string())?;
        let resized = match virtward_hypervisor::memory_of(&xml) {
            Some(memory) => resized(&view, vm, revision, memory)?,
            None => None,
        };
        if let Some(resized) = &resized {
            let value = serde_json::to_vec(&resized.record).map_err(|error| error.to_string())?;
            puts.push(Op::put(vm_key(vm), value));
        }
        if !puts.is_empty() {
            // Only while the VM is as it was seen: this host's.
            let guard = Compare::at(vm_key(vm), Revision(revision));
            let done = self.store.txn(vec![guard], puts).await.map_err(|error| error.to_string())?;
            if !done.succeeded {
                return Err("its record changed".into());
            }
        }
        if let Some(resized) = resized {
            self.outside.say(resized.weight, &resized.text);
        }
        if let Some(known) = lock(&self.put).get_mut(&vm) {
            known.0 = xml;
        }
        Ok(())
    }
}

/// A VM whose definition gives it other memory than is counted with: its record, and what people are to hear of it.
struct Resized {
    record: VmRecord,
    weight: Weight,
    text: String,
}

/// It was changed in libvirt, which asked nobody: what is left is to count with it, and to say what it costs.
fn resized(view: &View, vm: VmId, revision: u64, memory: u64) -> Result<Option<Resized>, String> {
    let old = view.vms.get(&vm).filter(|of| of.revision == revision).ok_or("its record changed")?;
    let (name, before) = (&old.value.name, old.value.policy.memory_bytes);
    if memory == before {
        return Ok(None);
    }
    let policy = VmPolicy { memory_bytes: memory, ..old.value.policy.clone() };
    let text = format!("{name} has {} MiB by its definition, before {} MiB", memory >> 20, before >> 20);
    let (weight, text) = match room::admit(view, &room::Change::Resize(vm, memory)) {
        Ok(()) => (Weight::Info, text),
        Err(why) => (Weight::Error, format!("{text}: that takes room away that is kept for host failures: {why}")),
    };
    Ok(Some(Resized { record: VmRecord { policy, ..old.value.clone() }, weight, text }))
}

/// Installs the hook if need be; why it does not hold, if it does not.
fn hook_error(ha: &Ha) -> Option<String> {
    let settings = ha.settings();
    if let Err(error) = hook::install(&settings.hooks_dir, &settings.program, &settings.state_dir) {
        return Some(format!("libvirt's hook cannot be installed in {}: {error}", settings.hooks_dir.display()));
    }
    // The system's own daemon is not this host's, where this host's is elsewhere.
    let files = settings.libvirt_pid_files.iter().filter(|file| file.exists());
    let files: Vec<_> = files.take(1).cloned().collect();
    hook::must_restart(&settings.hooks_dir, &files).then(|| {
        "libvirt was started before its hook was there and does not ask it: restart libvirt's daemon (guests run on)".into()
    })
}
