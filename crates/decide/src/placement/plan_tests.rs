//! Plans for small worlds with one thing wrong each, and for random ones: the linter accepts every plan.

use proptest::prelude::*;
use virtward_model::{
    Bytes,
    world::{Failover, Host, Priority, Resources, Rule, RuleKind, Stuck, Vm},
};

use super::{super::check, *};

fn host(name: &str, gib: u64) -> Host {
    Host::new(name, Resources { memory: Bytes::gib(gib), cpu_milli: 16_000, ..Resources::default() })
}

fn vm(number: u128, host: &str, gib: u64, cpu: u64) -> Vm {
    let size = Resources { memory: Bytes::gib(gib), cpu_milli: 2000, ..Resources::default() };
    let mut vm = Vm::new(Uuid::from_u128(number), format!("vm{number}"), size);
    vm.host = Some(host.into());
    vm.demand.cpu_milli = cpu;
    vm
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn world(hosts: Vec<Host>, vms: Vec<Vm>) -> World {
    World { hosts, vms, ..World::default() }
}

fn load() -> Goal {
    Goal { load: Some(Evening::default()), wishes: true, ..Goal::default() }
}

use super::super::Evening;

/// The plan of a world, which the linter has accepted.
fn planned(world: &World, goal: &Goal) -> (Plan, PlanReport) {
    let (plan, report) = plan(world, goal);
    assert_eq!(check(world, &plan), [], "{plan:#?}");
    (plan, report)
}

/// The world after all steps.
fn after(world: &World, plan: &Plan) -> World {
    let mut after = world.clone();
    for step in &plan.steps {
        after.vms.iter_mut().find(|vm| vm.id == step.vm).unwrap().host = Some(step.to.clone());
    }
    after
}

#[test]
fn a_host_is_emptied_and_what_cannot_move_is_told_with_the_reason() {
    let mut hosts = vec![host("a", 32), host("b", 16), host("c", 64)];
    hosts[0].state = HostState::Draining;
    hosts[2].state = HostState::Maintenance;
    let mut vms = vec![vm(1, "a", 4, 100), vm(2, "a", 4, 100), vm(3, "a", 30, 100)];
    vms[1].stuck = Some(Stuck::Backup);
    let (plan, report) = planned(&world(hosts, vms), &Goal::default());
    assert_eq!(plan.steps.len(), 1);
    assert_eq!((plan.steps[0].name.as_str(), plan.steps[0].to.0.as_str()), ("vm1", "b"));
    let mut told: Vec<String> =
        report.set_aside.iter().map(|aside| format!("{}: {}", aside.name, aside.because)).collect();
    told.sort();
    assert!(told[0].contains("a backup of it is running"), "{told:?}");
    assert!(told[1].contains("memory too little") && told[1].contains("in maintenance"), "{told:?}");
}

#[test]
fn two_full_hosts_exchange_through_a_third() {
    // vm1 must go to b, vm2 to a; neither has room for both, c has.
    let hosts = vec![host("a", 10), host("b", 10), host("c", 8)];
    let mut world = world(hosts, vec![vm(1, "a", 8, 0), vm(2, "b", 8, 0)]);
    for (name, number, to) in [("one", 1, "b"), ("two", 2, "a")] {
        let kind = RuleKind::OnHosts { hosts: vec![to.into()] };
        world.rules.push(Rule { name: name.into(), must: true, kind, vms: vec![id(number)] });
    }
    let space = Space::new(&world, false);
    let start = space.occupancy();
    let wanted = [Wanted { vm: 0, to: 1, reason: 0 }, Wanted { vm: 1, to: 0, reason: 0 }];
    // The rules forbid c even for a while: there is no way, and nothing is done by halves.
    let blocked = route(&space, &start, &wanted, &[0, 1, 2]);
    assert_eq!((blocked.hops.len(), blocked.blocked.len()), (0, 2));
    world.rules.clear();
    let space = Space::new(&world, false);
    let route = route(&space, &start, &wanted, &[0, 1, 2]);
    let plan = to_plan(&space, &route, &[Reason::Rule { rule: "x".into() }]);
    assert_eq!(plan.steps.len(), 3);
    assert!(plan.steps[0].temporary && plan.steps[0].to.0 == "c");
    assert_eq!(check(&world, &plan), []);
    // Without what it waits for, the same plan is refused.
    let mut hasty = plan.clone();
    hasty.steps[1].after.clear();
    assert!(check(&world, &hasty).iter().any(|violation| violation.what.contains("memory")), "{hasty:#?}");
}

#[test]
fn broken_rules_are_mended_by_the_less_important_vm() {
    let mut world = world(vec![host("a", 64), host("b", 64)], vec![vm(1, "a", 8, 0), vm(2, "a", 8, 0)]);
    world.vms[1].priority = Priority::new(1).unwrap();
    world.rules.push(Rule { name: "pair".into(), must: true, kind: RuleKind::Apart, vms: vec![id(1), id(2)] });
    let (plan, _) = planned(&world, &Goal::default());
    assert_eq!(plan.steps.len(), 1);
    assert_eq!((plan.steps[0].name.as_str(), plan.steps[0].to.0.as_str()), ("vm1", "b"));
    assert_eq!(plan.steps[0].why, Reason::Rule { rule: "pair".into() });
}

#[test]
fn an_overloaded_host_is_relieved_and_a_calm_cluster_is_left_alone() {
    let busy = (0..10).map(|n| vm(n, "a", 2, 2000));
    let idle = (10..12).map(|n| vm(n, "b", 2, 500));
    let mut world = world(vec![host("a", 64), host("b", 64)], busy.chain(idle).collect());
    let (plan, report) = planned(&world, &load());
    assert!(report.cost_before > 0 && report.cost_after < report.cost_before / 10, "{report:?}");
    assert!(plan.steps.len() <= 4, "{plan:#?}");
    assert!(matches!(plan.steps[0].why, Reason::Load { resource: Resource::Cpu, from_percent: 125, .. }));
    world = after(&world, &plan);
    let (plan, report) = planned(&world, &load());
    assert!(plan.steps.is_empty());
    assert!(report.no_load_moves.is_some());
}

#[test]
fn a_move_that_would_take_failover_room_is_not_made() {
    // b is the room for a's VM; filling it up for the sake of load would lose it.
    let mut vms = vec![vm(1, "a", 20, 9_000), vm(2, "a", 14, 9_000), vm(3, "b", 4, 100), vm(4, "c", 20, 100)];
    vms.iter_mut().for_each(|vm| vm.failover = true);
    let mut world = world(vec![host("a", 40), host("b", 40), host("c", 24)], vms);
    world.failover = Failover { failures: 1, domain_level: None };
    let before = admission::check(&world);
    assert!(before.holds, "{before:?}");
    let (plan, _) = planned(&world, &load());
    assert!(admission::check(&after(&world, &plan)).holds);
}

#[test]
fn what_the_linter_knows_of() {
    let mut world = world(vec![host("a", 64), host("b", 10)], vec![vm(1, "a", 8, 0), vm(2, "a", 8, 0)]);
    world.vms[0].replicas.insert("b".into());
    let step = |vm: u128, from: &str, to: &str| Step {
        vm: id(vm),
        name: format!("vm{vm}"),
        from: from.into(),
        to: to.into(),
        after: Vec::new(),
        layer: 0,
        temporary: false,
        why: Reason::Rule { rule: String::new() },
    };
    let found = |steps: Vec<Step>| {
        let told: Vec<String> = check(&world, &Plan { steps }).iter().map(ToString::to_string).collect();
        told.join("; ")
    };
    assert!(found(vec![step(1, "a", "b")]).contains("copy"));
    assert!(found(vec![step(2, "b", "a")]).contains("is not on b"));
    assert!(found(vec![step(2, "a", "nowhere")]).contains("no host nowhere"));
    let mut circle = step(2, "a", "b");
    circle.after = vec![0];
    assert!(found(vec![circle]).contains("waits for itself"));
    assert_eq!(found(vec![step(2, "a", "b")]), "");
}

/// Small worlds in which everything may be wrong at once.
fn worlds() -> impl Strategy<Value = World> {
    let host = (8u64..40, 0usize..10, any::<bool>());
    let vm = (1u64..10, 0u64..6000, 0usize..6, 0u8..24, 1u8..=5);
    let rule = (0usize..5, any::<bool>(), prop::collection::vec(0usize..14, 2..4), 0usize..6);
    (prop::collection::vec(host, 2..6), prop::collection::vec(vm, 1..14), prop::collection::vec(rule, 0..4), 0u32..3)
        .prop_map(|(hosts, vms, rules, failures)| build(&hosts, &vms, &rules, failures))
}

fn build(
    hosts: &[(u64, usize, bool)],
    vms: &[(u64, u64, usize, u8, u8)],
    rules: &[(usize, bool, Vec<usize>, usize)],
    failures: u32,
) -> World {
    let mut world = World { failover: Failover { failures, domain_level: None }, ..World::default() };
    for (at, (gib, state, rack)) in hosts.iter().enumerate() {
        let mut host = host(&format!("h{at}"), *gib);
        host.state = match state {
            0 => HostState::Draining,
            1 => HostState::Down,
            2 => HostState::Failing,
            _ => HostState::Up,
        };
        host.fault_domain = vec![if *rack { "r1" } else { "r2" }.into()];
        world.hosts.push(host);
    }
    for (at, (gib, cpu, place, odd, priority)) in vms.iter().enumerate() {
        let mut vm = vm(at as u128, &format!("h{}", place % hosts.len()), *gib, *cpu);
        vm.priority = Priority::new(*priority).unwrap();
        vm.failover = odd % 2 == 0;
        match odd {
            0 => vm.stuck = Some(Stuck::Backup),
            1 => {
                vm.replicas.insert(format!("h{}", (place + 1) % hosts.len()).as_str().into());
            }
            _ => {}
        }
        world.vms.push(vm);
    }
    for (at, (kind, must, members, place)) in rules.iter().enumerate() {
        let hosts = vec![format!("h{}", place % hosts.len()).as_str().into()];
        let kind = match kind {
            0 => RuleKind::Together,
            1 => RuleKind::Apart,
            2 => RuleKind::OnHosts { hosts },
            3 => RuleKind::NotOnHosts { hosts },
            _ => RuleKind::ApartDomains { level: 0 },
        };
        let vms = members.iter().filter(|&&n| n < vms.len()).map(|&n| id(n as u128)).collect();
        world.rules.push(Rule { name: format!("rule{at}"), must: *must, kind, vms });
    }
    world
}

/// How much hosts that take VMs are given beyond what they have.
fn overfull(world: &World) -> u64 {
    let hosts = world.hosts.iter().filter(|host| host.state.takes_vms());
    hosts
        .map(|host| {
            let vms = world.vms.iter().filter(|vm| vm.host.as_ref() == Some(&host.name));
            vms.map(|vm| vm.size.memory.0).sum::<u64>().saturating_sub(host.capacity.memory.0)
        })
        .sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_linter_accepts_every_plan(world in worlds()) {
        let (plan, report) = plan(&world, &load());
        prop_assert_eq!(check(&world, &plan), [], "{:#?}", plan);
        let then = after(&world, &plan);
        prop_assert!(overfull(&then) <= overfull(&world));
        // Whoever must leave and could move has left, or is told of.
        for vm in &then.vms {
            let host = then.hosts.iter().find(|host| Some(&host.name) == vm.host.as_ref()).unwrap();
            if host.state.is_leaving() {
                prop_assert!(report.set_aside.iter().any(|aside| aside.vm == vm.id), "{}", vm.name);
            }
        }
    }

    /// A plan carried out leaves nothing to do: no ping-pong.
    #[test]
    fn load_comes_to_rest(world in worlds()) {
        let mut world = world;
        world.rules.clear();
        let mut rounds = 0;
        loop {
            let (plan, _) = plan(&world, &load());
            if plan.steps.is_empty() {
                break;
            }
            world = after(&world, &plan);
            rounds += 1;
            prop_assert!(rounds < 6);
        }
    }
}
