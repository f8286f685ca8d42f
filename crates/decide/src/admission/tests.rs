//! What admission control promises, against brute force where all ways can be tried.

use proptest::prelude::*;
use virtward_model::{
    Bytes,
    world::{Failover, Host, Resources, Rule, RuleKind, Vm},
};

use super::*;

fn memory(gib: u64) -> Resources {
    Resources { memory: Bytes::gib(gib), ..Resources::default() }
}

/// Hosts by memory in GiB, each with VMs by memory in GiB, all protected.
fn world(failures: u32, hosts: &[(u64, &[u64])]) -> World {
    let mut world = World { failover: Failover { failures, domain_level: None }, ..World::default() };
    for (at, (size, vms)) in hosts.iter().enumerate() {
        let host = Host::new(&format!("h{at}"), memory(*size));
        for (number, vm) in vms.iter().enumerate() {
            let id = Uuid::from_u128((at as u128) << 32 | number as u128);
            let mut vm = Vm::new(id, format!("v{at}-{number}"), memory(*vm));
            vm.host = Some(host.name.clone());
            vm.failover = true;
            world.vms.push(vm);
        }
        world.hosts.push(host);
    }
    world
}

#[test]
fn half_of_the_memory_free_is_not_enough_if_no_hole_is_big_enough() {
    // 24 GiB are free on the survivors, but a VM of 16 GiB fits into no hole of 12.
    let verdict = check(&world(1, &[(32, &[16]), (32, &[20]), (32, &[20])]));
    assert!(!verdict.holds);
    let loss = verdict.losses.iter().find(|loss| loss.failed == ["h0".into()]).unwrap();
    assert_eq!(loss.lost[0].name, "v0-0");
    assert_eq!(loss.proof, Some(Impossible::NoHost { vm: "v0-0".into() }));
}

#[test]
fn a_packing_that_first_fit_misses_is_found() {
    // 6, 5, 4, 3, 3, 3 into holes of 12 and 12: first fit decreasing puts 6+5 and 4+3+3 and is left with 3.
    let verdict = check(&world(1, &[(24, &[6, 5, 4, 3, 3, 3]), (24, &[12]), (24, &[12])]));
    let h0 = verdict.losses.iter().find(|loss| loss.failed == ["h0".into()]);
    assert_eq!(h0, None);
}

#[test]
fn what_cannot_be_is_proved_and_says_how() {
    let sum = check(&world(1, &[(32, &[7, 7]), (32, &[22])]));
    let loss = sum.losses.iter().find(|loss| loss.failed == ["h0".into()]).unwrap();
    assert!(matches!(loss.proof, Some(Impossible::Sum { .. })), "{loss:?}");
    let big = check(&world(1, &[(32, &[7, 7, 7]), (16, &[3]), (16, &[3])]));
    let loss = big.losses.iter().find(|loss| loss.failed == ["h0".into()]).unwrap();
    assert!(matches!(loss.proof, Some(Impossible::Big { vms: 3, places: 2, .. })), "{loss:?}");
    // 5, 4, 4 into 7 and 7: the sums fit, but no packing does.
    let tried = check(&world(1, &[(32, &[5, 4, 4]), (16, &[9]), (16, &[9])]));
    let loss = tried.losses.iter().find(|loss| loss.failed == ["h0".into()]).unwrap();
    assert!(matches!(loss.proof, Some(Impossible::Big { .. } | Impossible::Searched { .. })), "{loss:?}");
}

#[test]
fn an_empty_spare_host_is_room_for_failover() {
    let mut spare = world(1, &[(32, &[16, 16]), (32, &[16, 16]), (32, &[])]);
    spare.hosts[2].spare = true;
    assert!(check(&spare).holds);
    assert!(!check_k(&spare, 2).holds);
    // A first start goes nowhere near it.
    let mut vm = Vm::new(Uuid::from_u128(99), "new", memory(1));
    vm.failover = true;
    spare.vms.push(vm);
    let (placement, report) = place(&spare, &Request::initial([Uuid::from_u128(99)]));
    assert!(placement.places.is_empty() && !report.is_complete());
}

#[test]
fn memory_may_be_overcommitted_after_a_failure_if_that_was_chosen() {
    let mut tight = world(1, &[(32, &[16]), (32, &[20]), (32, &[20])]);
    tight.overcommit.memory_failover_percent = 125;
    assert!(check(&tight).holds);
}

#[test]
fn rules_and_domains_count() {
    let hosts: [(u64, &[u64]); 3] = [(32, &[4]), (32, &[4]), (32, &[4])];
    let mut apart = world(1, &hosts);
    assert!(check(&apart).holds);
    let vms = apart.vms.iter().map(|vm| vm.id).collect();
    apart.rules.push(Rule { name: "quorum".into(), must: true, kind: RuleKind::Apart, vms });
    let verdict = check(&apart);
    assert_eq!((verdict.holds, verdict.losses_total), (false, 3));
    let mut racks = world(1, &[(32, &[16]), (32, &[16]), (32, &[8])]);
    assert!(check(&racks).holds);
    racks.failover.domain_level = Some(0);
    for (host, rack) in [(0, "a"), (1, "a"), (2, "b")] {
        racks.hosts[host].fault_domain = vec![rack.into()];
    }
    let verdict = check(&racks);
    assert_eq!(verdict.losses.len(), 1);
    assert_eq!(verdict.losses[0].failed, ["h0".into(), "h1".into()]);
}

#[test]
fn a_change_is_refused_for_the_violation_that_it_makes_not_for_one_that_was_there() {
    let good = world(1, &[(32, &[8]), (32, &[8])]);
    let mut bad = good.clone();
    bad.vms[0].size = memory(28);
    assert!(admit(&good, &bad).is_err());
    let mut as_bad = bad.clone();
    as_bad.vms[1].priority = Priority::new(1).unwrap();
    assert!(admit(&bad, &as_bad).is_ok());
    assert!(admit(&bad, &good).is_ok());
}

#[test]
fn a_vm_bound_to_its_host_is_named_and_keeps_no_room() {
    let mut bound = world(1, &[(32, &[30]), (32, &[8])]);
    bound.vms[0].stuck = Some(virtward_model::world::Stuck::Device("0000:03:00.0".into()));
    let verdict = check(&bound);
    assert!(verdict.holds || verdict.losses.iter().all(|loss| loss.failed != ["h0".into()]));
    assert_eq!(verdict.bound_to_host[0].name, "v0-0");
}

#[test]
fn large_clusters_are_answered_by_slack_or_by_packing_pairs() {
    let vms = [4u64; 10];
    let hosts: Vec<(u64, &[u64])> = (0..120).map(|_| (64, &vms[..])).collect();
    let verdict = check_k(&world(3, &hosts), 3);
    assert_eq!((verdict.holds, verdict.method), (true, Method::Slack));
    let full = [4u64; 15];
    let hosts: Vec<(u64, &[u64])> = (0..60).map(|_| (64, &full[..])).collect();
    let verdict = check_k(&world(2, &hosts), 2);
    assert_eq!((verdict.holds, verdict.method, verdict.scenarios), (true, Method::Packed, 1770));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Small worlds against every assignment there is.
    #[test]
    fn the_answer_is_right_where_all_ways_can_be_tried(
        hosts in prop::collection::vec((8u64..20, prop::collection::vec(1u64..8, 0..4)), 2..5),
        failures in 1u32..3,
    ) {
        let hosts: Vec<(u64, Vec<u64>)> = hosts
            .into_iter()
            .map(|(size, vms)| (size.max(vms.iter().sum()), vms))
            .collect();
        let described: Vec<(u64, &[u64])> = hosts.iter().map(|(size, vms)| (*size, &vms[..])).collect();
        let world = world(failures, &described);
        let verdict = check(&world);
        let k = (failures as usize).min(hosts.len());
        let mut lost = Vec::new();
        for failed in (0u32..1 << hosts.len()).filter(|set| set.count_ones() as usize == k) {
            let is_failed = |host: usize| failed >> host & 1 == 1;
            let mut free: Vec<u64> = hosts.iter().enumerate().filter(|(at, _)| !is_failed(*at))
                .map(|(_, (size, vms))| size - vms.iter().sum::<u64>()).collect();
            let vms: Vec<u64> = hosts.iter().enumerate().filter(|(at, _)| is_failed(*at))
                .flat_map(|(_, (_, vms))| vms.clone()).collect();
            if !brute(&vms, &mut free) {
                lost.push(failed);
            }
        }
        prop_assert_eq!(verdict.losses_total as usize, lost.len());
        prop_assert!(verdict.losses.iter().all(|loss| loss.proof.is_some()));
        prop_assert_eq!(verdict.holds, lost.is_empty());
        if verdict.holds && k == 1 {
            for host in &world.hosts {
                prop_assert!(recovery(&world, std::slice::from_ref(&host.name)).1.is_complete());
            }
        }
    }
}

fn brute(vms: &[u64], free: &mut Vec<u64>) -> bool {
    let Some((&vm, rest)) = vms.split_first() else { return true };
    (0..free.len()).any(|host| {
        if free[host] < vm {
            return false;
        }
        free[host] -= vm;
        let fits = brute(rest, free);
        free[host] += vm;
        fits
    })
}
