//! Whether every protected VM would run again after any so many host failures at once, and what may be changed.

use virtward_api::{Code, HaCapacity, HaLoss, HaRoom, Problem};
use virtward_decide::{
    admission,
    ha::{
        HostId, View,
        record::VmRecord,
        room::{self, Change},
    },
};

use super::{of, views};
use crate::{daemon::Daemon, failures::Result};

/// What capacity is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum If {
    /// As it is.
    Now,
    /// Once a host, by name or address, is empty and takes nothing.
    Without(String),
    /// Once a VM, by name or UUID, has so much memory, in bytes.
    Resized(String, u64),
}

/// What would not run if hosts were lost: now, or after a change, and whether that may be made.
pub fn capacity(daemon: &Daemon, question: &If) -> Result<HaCapacity> {
    let view = views::looked(of(daemon)?)?.view;
    let fleet = daemon.fleet();
    let change = match question {
        If::Now => None,
        If::Without(name) => {
            Some(Change::Drain(HostId(fleet.node_of(name).map_or_else(|| name.to_owned(), str::to_owned))))
        }
        If::Resized(name, bytes) => Some(Change::Resize(views::find(&view, name)?, *bytes)),
    };
    let world = match &change {
        Some(Change::Drain(host)) => room::without(&view, host),
        Some(Change::Resize(vm, bytes)) => room::resized(&view, *vm, *bytes),
        _ => room::world(&view),
    };
    let verdict = admission::check(&world);
    let loss = |loss: &admission::Loss| HaLoss {
        hosts: loss.failed.iter().map(|host| host.0.clone()).collect(),
        vms: loss.lost.iter().map(|lost| lost.name.clone()).collect(),
        why: loss.proof.as_ref().map_or_else(|| "no placement was found".into(), ToString::to_string),
    };
    let mut losses: Vec<HaLoss> = verdict.losses.iter().map(loss).collect();
    if !verdict.bound_to_host.is_empty() {
        let vms = verdict.bound_to_host.iter().map(|lost| lost.name.clone()).collect();
        losses.push(HaLoss { hosts: Vec::new(), vms, why: "they may run on one host only".into() });
    }
    let used = |name: &str| {
        let on = |vm: &&VmRecord| vm.owner.as_ref().is_some_and(|owner| owner.host.0 == name);
        view.vms.values().map(|vm| &vm.value).filter(on).map(|vm| vm.policy.memory_bytes).sum()
    };
    let hosts = view.hosts.iter().map(|(name, host)| HaRoom {
        host: name.0.clone(),
        memory_bytes: host.value.memory_bytes,
        used_bytes: used(&name.0),
    });
    let refused = change.and_then(|change| room::admit(&view, &change).err()).map(|why| why.to_string());
    Ok(HaCapacity { failures: verdict.failures, enough: verdict.holds, losses, hosts: hosts.collect(), refused })
}

/// Refuses a change that takes away room for host failures which is there now, unless a person forces it.
pub(super) fn admit(view: &View, change: &Change, force: bool) -> Result<()> {
    match room::admit(view, change) {
        Err(why) if force => {
            tracing::warn!(%why, ?change, "forced: room for host failures is taken away");
            Ok(())
        }
        Err(why) => {
            let text = format!("it would take room away that is kept for host failures: {why}");
            Err(Problem::new(Code::Conflict, text)
                .hint("virtward ha capacity shows the room there is; --force does it all the same"))
        }
        Ok(()) => Ok(()),
    }
}
