//! When rounds move VMs, and when they leave them.

use virtward_model::{
    Bytes,
    world::{Failover, Host, HostState, Resources, Stuck, Vm},
};

use super::*;
use crate::placement::check;

fn world(loads: &[(&str, &[u64])]) -> World {
    let mut world = World::default();
    for (name, vms) in loads {
        let capacity = Resources { memory: Bytes::gib(64), cpu_milli: 10_000, ..Resources::default() };
        world.hosts.push(Host::new(name, capacity));
        for cpu in *vms {
            let id = Uuid::from_u128(world.vms.len() as u128);
            let size = Resources { memory: Bytes::gib(2), cpu_milli: 4000, ..Resources::default() };
            let mut vm = Vm::new(id, format!("vm{}", world.vms.len()), size);
            vm.host = Some((*name).into());
            vm.demand.cpu_milli = *cpu;
            world.vms.push(vm);
        }
    }
    world
}

fn automatic() -> Policy {
    Policy { mode: Mode::Automatic, ..Policy::default() }
}

fn carry_out(world: &mut World, plan: &Plan) {
    for step in &plan.steps {
        world.vms.iter_mut().find(|vm| vm.id == step.vm).unwrap().host = Some(step.to.clone());
    }
}

#[test]
fn a_peak_that_passes_moves_nothing_and_one_that_lasts_does() {
    let busy = world(&[("a", &[3000, 3000, 3500, 3000]), ("b", &[500])]);
    let calm = world(&[("a", &[1000, 1000, 1000, 1000]), ("b", &[500])]);
    let mut memory = Memory::default();
    let mut moved = Vec::new();
    for world in [&busy, &calm, &busy, &calm, &busy, &busy] {
        let (plan, report, next) = round(world, &automatic(), &memory);
        assert_eq!(plan.steps.is_empty(), report.nothing.is_some());
        moved.push(!plan.steps.is_empty());
        memory = next;
    }
    assert_eq!(moved, [false, false, false, false, false, true]);
}

#[test]
fn after_a_plan_there_is_rest() {
    let mut world = world(&[("a", &[3000, 3000, 3500, 3000]), ("b", &[500]), ("c", &[6000])]);
    let mut memory = Memory::default();
    let mut moves = 0;
    for _ in 0..50 {
        let (plan, _, next) = round(&world, &automatic(), &memory);
        assert_eq!(check(&world, &plan), []);
        carry_out(&mut world, &plan);
        moves += plan.steps.len();
        memory = next;
    }
    assert!((1..=2).contains(&moves), "{moves}");
}

#[test]
fn modes_and_overrides() {
    let mut world = world(&[("a", &[3000, 3000, 3500, 3000]), ("b", &[500])]);
    let memory = Memory { loaded: [("a".into(), 9)].into(), ..Memory::default() };
    let (plan, report, _) = round(&world, &Policy { mode: Mode::Off, ..Policy::default() }, &memory);
    assert!(plan.steps.is_empty() && report.nothing.unwrap().contains("off"));
    let (plan, report, _) = round(&world, &Policy::default(), &memory);
    assert!(!plan.steps.is_empty() && report.automatic.is_empty());
    let (plan, report, _) = round(&world, &automatic(), &memory);
    assert_eq!(report.automatic.len(), plan.steps.len());
    world.vms.iter_mut().for_each(|vm| vm.mode = Some(Mode::Off));
    let (plan, _, _) = round(&world, &automatic(), &memory);
    assert!(plan.steps.is_empty());
    // What must move does, whatever the mode for load is; it is only not done by itself.
    world.hosts[0].state = HostState::Failing;
    let (plan, report, _) = round(&world, &automatic(), &memory);
    assert_eq!((plan.steps.len(), report.automatic.len()), (4, 0));
}

#[test]
fn eagerness_is_a_matter_of_degree() {
    let mild = world(&[("a", &[2600, 2600, 2600]), ("b", &[2000, 2000]), ("c", &[2000])]);
    let moves: Vec<usize> = (1..=5)
        .map(|level| {
            let policy = Policy { eagerness: Eagerness::new(level).unwrap(), hold: Some(1), ..automatic() };
            round(&mild, &policy, &Memory::default()).0.steps.len()
        })
        .collect();
    assert_eq!(moves[..3], [0, 0, 0]);
    assert!(moves[4] > 0, "{moves:?}");
}

#[test]
fn a_guest_that_dirties_memory_faster_than_the_network_stays() {
    let mut world = world(&[("a", &[3000, 3000, 3500, 3000]), ("b", &[500])]);
    world.vms.iter_mut().for_each(|vm| vm.dirty_rate = 950_000_000);
    let policy = Policy { hold: Some(1), ..automatic() };
    assert!(round(&world, &policy, &Memory::default()).0.steps.is_empty());
}

#[test]
fn all_hosts_can_be_serviced_one_after_the_other() {
    let mut world = world(&[("a", &[100, 100]), ("b", &[100]), ("c", &[])]);
    world.failover = Failover { failures: 1, domain_level: None };
    world.vms.iter_mut().for_each(|vm| vm.failover = true);
    world.vms[2].stuck = Some(Stuck::Device("0000:03:00.0".into()));
    let upgrade = upgrade(&world);
    let order: Vec<&str> = upgrade.services.iter().map(|service| service.host.0.as_str()).collect();
    assert_eq!(order[0], "c");
    assert_eq!(order.len(), 3);
    for service in &upgrade.services {
        assert!(service.keeps_failover_room, "{service:?}");
        assert_eq!(service.stays.len(), usize::from(service.host.0 == "b"));
    }
    let moved: usize = upgrade.services.iter().map(|service| service.plan.steps.len()).sum();
    assert!(moved >= 2);
}
