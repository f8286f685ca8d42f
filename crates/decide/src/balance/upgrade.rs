//! The order in which all hosts can be serviced, one at a time.

use serde::{Deserialize, Serialize};
use virtward_model::world::{HostName, HostState, World};

use crate::{
    admission,
    placement::{Goal, Plan, SetAside, plan},
};

/// One host's turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The host.
    pub host: HostName,
    /// Empties it.
    pub plan: Plan,
    /// What stays on it: must be shut down, or the host is left out.
    pub stays: Vec<SetAside>,
    /// Whether the failures that the cluster keeps room for are still survived while it is out.
    pub keeps_failover_room: bool,
}

/// The order, and what each turn takes. Every plan begins where the one before has left off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradePlan {
    /// In order.
    pub services: Vec<Service>,
}

/// Plans the service of every host that is up, those first that have the least to move.
pub fn upgrade(world: &World) -> UpgradePlan {
    let mut world = world.clone();
    let mut left: Vec<HostName> =
        world.hosts.iter().filter(|host| host.state.takes_vms()).map(|host| host.name.clone()).collect();
    let mut upgrade = UpgradePlan::default();
    while !left.is_empty() {
        let next = (0..left.len()).min_by_key(|&at| (memory_on(&world, &left[at]), at)).unwrap_or(0);
        let host = left.remove(next);
        let service = service(&mut world, host);
        upgrade.services.push(service);
    }
    upgrade
}

fn memory_on(world: &World, host: &HostName) -> u64 {
    world.vms.iter().filter(|vm| vm.host.as_ref() == Some(host)).map(|vm| vm.size.memory.0).sum()
}

/// Empties the host in the world, looks at what is left, and takes it back into service.
fn service(world: &mut World, name: HostName) -> Service {
    let set = |world: &mut World, state| {
        world.hosts.iter_mut().filter(|host| host.name == name).for_each(|host| host.state = state);
    };
    set(world, HostState::Draining);
    let (plan, report) = plan(world, &Goal { give_up_failover_room: true, only_leaving: true, ..Goal::default() });
    for step in &plan.steps {
        if let Some(vm) = world.vms.iter_mut().find(|vm| vm.id == step.vm) {
            vm.host = Some(step.to.clone());
        }
    }
    set(world, HostState::Down);
    let keeps_failover_room = admission::check(world).holds;
    set(world, HostState::Up);
    let stays = report.set_aside.into_iter().filter(|aside| aside.host == name).collect();
    Service { host: name, plan, stays, keeps_failover_room }
}
