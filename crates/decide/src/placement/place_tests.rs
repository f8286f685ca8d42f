//! Where VMs go, and what is said when they go nowhere.

use virtward_model::{
    Bytes,
    world::{Host, HostState, Priority, Resources, Rule, RuleKind, Vm},
};

use super::*;

fn size(gib: u64) -> Resources {
    Resources { memory: Bytes::gib(gib), cpu_milli: 2000, ..Resources::default() }
}

fn host(name: &str, gib: u64) -> Host {
    Host::new(name, Resources { memory: Bytes::gib(gib), cpu_milli: 16_000, ..Resources::default() })
}

fn vm(number: u128, gib: u64) -> Vm {
    Vm::new(Uuid::from_u128(number), format!("vm{number}"), size(gib))
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn world(hosts: Vec<Host>, vms: Vec<Vm>) -> World {
    World { hosts, vms, ..World::default() }
}

fn host_of(placement: &Placement, number: u128) -> Option<&str> {
    placement.places.iter().find(|place| place.vm == id(number)).map(|place| place.host.0.as_str())
}

#[test]
fn the_least_loaded_host_by_what_is_wanted_not_by_memory_alone() {
    let mut busy = vm(1, 1);
    busy.host = Some("a".into());
    busy.demand.cpu_milli = 15_000;
    let mut big = vm(2, 10);
    big.host = Some("b".into());
    let world = world(vec![host("a", 64), host("b", 64)], vec![busy, big, vm(3, 2)]);
    assert_eq!(host_of(&place(&world, &Request::initial([id(3)])).0, 3), Some("b"));
}

#[test]
fn who_matters_most_runs_when_not_all_can() {
    let mut vms = vec![vm(1, 8), vm(2, 8), vm(3, 8)];
    vms[2].priority = Priority::new(1).unwrap();
    let world = world(vec![host("a", 10)], vms);
    let (placement, report) = place(&world, &Request::failover([id(1), id(2), id(3)]));
    assert_eq!(host_of(&placement, 3), Some("a"));
    assert_eq!(placement.places.len(), 1);
    assert!(matches!(report.impossible, Some(Impossible::Sum { .. } | Impossible::Big { .. })));
}

#[test]
fn every_host_is_given_with_its_reason() {
    let mut hosts = vec![host("a", 64), host("b", 64), host("c", 64), host("d", 64), host("e", 1), host("f", 64)];
    hosts[0].state = HostState::Draining;
    hosts[1].spare = true;
    let mut wanting = vm(1, 8);
    wanting.replicas.insert("c".into());
    wanting.requires.insert("network:lan".into());
    for at in [2, 4, 5] {
        hosts[at].offers.insert("network:lan".into());
    }
    let mut other = vm(2, 8);
    other.host = Some("f".into());
    let mut world = world(hosts, vec![wanting, other]);
    world.rules.push(Rule { name: "ha-pair".into(), must: true, kind: RuleKind::Apart, vms: vec![id(1), id(2)] });
    let (placement, report) = place(&world, &Request::initial([id(1), id(9)]));
    assert!(placement.places.is_empty());
    let Outcome::NotPlaced { hosts, proven } = &report.lines[0].outcome else { panic!("{report:?}") };
    let mut told: Vec<String> = hosts.iter().map(|(why, hosts)| format!("{}: {why}", hosts[0])).collect();
    told.sort();
    assert_eq!(
        told,
        [
            "a: being drained",
            "b: kept empty for failover",
            "c: holds its DR copy",
            "d: does not offer network:lan",
            "e: 7.0 GiB of memory too little",
            "f: rule ha-pair",
        ]
    );
    assert!(proven);
    assert_eq!(report.lines[1].outcome, Outcome::Unknown);
}

#[test]
fn units_stay_on_one_host_and_should_rules_give_way_to_room() {
    let mut world = world(vec![host("a", 10), host("b", 24)], vec![vm(1, 8), vm(2, 8), vm(3, 8)]);
    world.rules.push(Rule { name: "app".into(), must: true, kind: RuleKind::Together, vms: vec![id(1), id(2)] });
    world.rules.push(Rule {
        name: "near".into(),
        must: false,
        kind: RuleKind::OnHosts { hosts: vec!["b".into()] },
        vms: vec![id(3)],
    });
    world.vms[2].priority = Priority::new(4).unwrap();
    let (placement, _) = place(&world, &Request::initial([id(1), id(2), id(3)]));
    assert_eq!((host_of(&placement, 1), host_of(&placement, 2)), (Some("b"), Some("b")));
    assert_eq!(host_of(&placement, 3), Some("b"));
    world.hosts[1].capacity.memory = Bytes::gib(20);
    let (placement, report) = place(&world, &Request::initial([id(1), id(2), id(3)]));
    assert_eq!(host_of(&placement, 3), Some("a"));
    let line = report.lines.iter().find(|line| line.vm == id(3)).unwrap();
    assert!(matches!(&line.outcome, Outcome::Placed { unmet, .. } if unmet == &["near"]), "{line:?}");
}

#[test]
fn a_designated_host_is_taken_and_an_avoided_one_is_not() {
    let mut world = world(vec![host("a", 64), host("b", 64), host("c", 64)], vec![vm(1, 8), vm(2, 8)]);
    world.vms[1].host = Some("b".into());
    let mut request = Request::failover([id(1)]);
    request.prefer.insert(id(1), "b".into());
    assert_eq!(host_of(&place(&world, &request).0, 1), Some("b"));
    request.avoid.insert(id(1), ["b".into(), "a".into()].into());
    assert_eq!(host_of(&place(&world, &request).0, 1), Some("c"));
}

#[test]
fn a_thousand_hosts_take_two_hundred_vms_with_rules() {
    let hosts: Vec<Host> = (0..1000).map(|at| host(&format!("h{at}"), 256)).collect();
    let mut vms: Vec<Vm> = (0..4000).map(|number| vm(number, 8 + (number % 7) as u64)).collect();
    for (at, vm) in vms.iter_mut().enumerate().skip(200) {
        vm.host = Some(format!("h{}", 1 + at % 999).as_str().into());
    }
    let mut world = world(hosts, vms);
    let pairs = (0..100).map(|pair| Rule {
        name: format!("pair{pair}"),
        must: true,
        kind: RuleKind::Apart,
        vms: vec![id(2 * pair), id(2 * pair + 1)],
    });
    world.rules.extend(pairs);
    let ids: Vec<Uuid> = (0..200).map(id).collect();
    let (placement, report) = place(&world, &Request::failover(ids));
    assert!(report.is_complete());
    for pair in 0..100 {
        assert_ne!(host_of(&placement, 2 * pair), host_of(&placement, 2 * pair + 1));
    }
}
