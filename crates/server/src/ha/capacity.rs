//! Whether every protected VM would run again after any so many host failures at once.

use virtward_api::{HaCapacity, HaLoss, HaRoom};
use virtward_decide::{
    admission,
    ha::{
        View,
        record::{Desired, HostPhase},
    },
};
use virtward_model::{
    Bytes,
    world::{Failover, Host, HostState, Priority, Resources, Stuck, Vm, World},
};

use super::{of, views};
use crate::{daemon::Daemon, failures::Result};

fn memory(bytes: u64) -> Resources {
    Resources { memory: Bytes(bytes), ..Resources::default() }
}

/// The records as a world that placement decides on.
fn world(view: &View) -> World {
    let mut world =
        World { failover: Failover { failures: view.switches().failures, domain_level: None }, ..World::default() };
    for (name, host) in &view.hosts {
        let host = &host.value;
        let mut made = Host::new(&name.0, memory(host.memory_bytes));
        made.state = match (host.phase, host.maintenance) {
            (HostPhase::Armed, false) => HostState::Up,
            (HostPhase::Armed, true) => HostState::Maintenance,
            _ => HostState::Down,
        };
        world.hosts.push(made);
    }
    for (id, record) in view.vms.iter().filter(|(_, record)| record.value.desired == Desired::Running) {
        let record = &record.value;
        let mut vm = Vm::new(*id, record.name.clone(), memory(record.policy.memory_bytes));
        vm.host = record.owner.as_ref().map(|owner| owner.host.0.as_str().into());
        vm.failover = true;
        // Tiers 0 to 9 are five priorities.
        vm.priority = Priority::new(record.policy.tier / 2 + 1).unwrap_or_default();
        vm.stuck = record.policy.only_on.as_ref().map(|host| Stuck::Device(format!("a place on {host} alone")));
        world.vms.push(vm);
    }
    world
}

/// What would not run if hosts were lost.
pub fn capacity(daemon: &Daemon) -> Result<HaCapacity> {
    let view = views::looked(of(daemon)?)?.view;
    let verdict = admission::check(&world(&view));
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
        let on =
            |vm: &&virtward_decide::ha::record::VmRecord| vm.owner.as_ref().is_some_and(|owner| owner.host.0 == name);
        view.vms.values().map(|vm| &vm.value).filter(on).map(|vm| vm.policy.memory_bytes).sum()
    };
    let hosts = view.hosts.iter().map(|(name, host)| HaRoom {
        host: name.0.clone(),
        memory_bytes: host.value.memory_bytes,
        used_bytes: used(&name.0),
    });
    Ok(HaCapacity { failures: verdict.failures, enough: verdict.holds, losses, hosts: hosts.collect() })
}
