//! How loaded hosts are before and after a plan.

use serde::{Deserialize, Serialize};
use virtward_model::world::{HostName, Vm, World};

use crate::placement::Plan;

/// How loaded a host is, in percent of what it has for VMs, before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLoad {
    /// The host.
    pub host: HostName,
    /// Whether it is in service, in words.
    pub state: String,
    /// CPU that VMs want.
    pub cpu_percent: [u64; 2],
    /// Memory that VMs were given.
    pub memory_percent: [u64; 2],
    /// VMs.
    pub vms: [usize; 2],
}

/// Loads of all hosts in both worlds.
pub fn loads(before: &World, after: &World) -> Vec<HostLoad> {
    let of = |world: &World, name: &HostName, amount: fn(&Vm) -> u64| -> u64 {
        world.vms.iter().filter(|vm| vm.host.as_ref() == Some(name)).map(amount).sum()
    };
    let count = |world: &World, name: &HostName| world.vms.iter().filter(|vm| vm.host.as_ref() == Some(name)).count();
    let percent = |part: u64, whole: u64| part.saturating_mul(100).checked_div(whole).unwrap_or(0);
    let hosts = after.hosts.iter().map(|host| {
        let usable = host.usable();
        let both = |amount: fn(&Vm) -> u64, whole: u64| {
            [before, after].map(|world| percent(of(world, &host.name, amount), whole))
        };
        HostLoad {
            host: host.name.clone(),
            state: host.state.to_string(),
            cpu_percent: both(|vm| vm.demand.cpu_milli, usable.cpu_milli),
            memory_percent: both(|vm| vm.size.memory.0, usable.memory.0),
            vms: [count(before, &host.name), count(after, &host.name)],
        }
    });
    hosts.collect()
}

/// The world after all steps.
pub fn after(world: &World, plan: &Plan) -> World {
    let mut world = world.clone();
    for step in &plan.steps {
        if let Some(vm) = world.vms.iter_mut().find(|vm| vm.id == step.vm) {
            vm.host = Some(step.to.clone());
        }
    }
    world
}

/// The part of a plan whose steps have these indices, which must hold what each waits for.
pub fn part(plan: &Plan, chosen: &[usize]) -> Plan {
    let place = |at: &usize| chosen.iter().position(|chosen| chosen == at);
    let steps = chosen.iter().filter_map(|at| plan.steps.get(*at)).map(|step| {
        let mut step = step.clone();
        step.after = step.after.iter().filter_map(place).collect();
        step
    });
    Plan { steps: steps.collect() }
}
