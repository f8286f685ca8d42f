//! How long it takes to decide where all VMs of a dead host go, and how they are started under the cap.
//!
//!     cargo run --release -p virtward-decide --example failover_plan -- [VMS] [HOSTS]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use virtward_decide::ha::{
    HostId, Moment, Owner, Timing, Versioned, View,
    record::{Desired, HostPhase, HostRecord, Proof, ProofKind, VmPhase, VmPolicy, VmRecord, WatchdogClass},
    recovery::{Candidate, Memory, plan},
};

const GIB: u64 = 1 << 30;
const RUNS: usize = 20;

/// One dead host, proved, that had all of these; the others have a load of their own.
fn view(vms: usize, hosts: usize) -> View {
    let mut view = View { revision: 1, ..View::default() };
    let name = |n: usize| HostId(format!("h{n:03}"));
    for n in 0..hosts {
        let phase = if n == 0 { HostPhase::Fenced } else { HostPhase::Armed };
        let record = HostRecord {
            epoch: if n == 0 { 2 } else { 1 },
            phase,
            boot_id: String::new(),
            timing: Timing::default(),
            watchdog: WatchdogClass::Hardware,
            peers: BTreeSet::new(),
            maintenance: false,
            memory_bytes: 1024 * GIB,
            fence_devices: 1,
        };
        view.hosts.insert(name(n), Versioned { value: record, revision: 1 });
    }
    let proof = Proof { kind: ProofKind::Drained, by: name(1) };
    view.proofs.insert((name(0), 1), Versioned { value: proof, revision: 1 });
    for n in 0..vms * hosts {
        let at = n % hosts;
        let record = VmRecord {
            name: format!("v{n}"),
            generation: 1,
            owner: Some(Owner { host: name(at), epoch: 1 }),
            moving_to: None,
            phase: VmPhase::Running,
            desired: Desired::Running,
            ready: true,
            failed_on: BTreeMap::new(),
            service_moves: 0,
            blocked: None,
            note: String::new(),
            policy: VmPolicy { tier: (n % 10) as u8, memory_bytes: (1 + n as u64 % 4) * GIB, ..VmPolicy::default() },
        };
        view.vms.insert(uuid::Uuid::from_u128(n as u128), Versioned { value: record, revision: 1 });
    }
    view
}

fn candidates(view: &View) -> Vec<Candidate> {
    let up = view.hosts.iter().filter(|(_, host)| host.value.phase == HostPhase::Armed);
    up.map(|(host, record)| Candidate {
        owner: Owner { host: host.clone(), epoch: record.value.epoch },
        revision: record.revision,
        memory_bytes: record.value.memory_bytes,
    })
    .collect()
}

fn main() {
    let number = |at, usual| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (vms, hosts): (usize, usize) = (number(1, 200), number(2, 8));
    let mut view = view(vms, hosts);
    let candidates = candidates(&view);
    let mut memory = Memory::default();
    memory.note(Moment(1_000), &view);
    let mut took = Vec::new();
    for _ in 0..RUNS {
        let begun = Instant::now();
        let (claims, held) = plan(Moment(1_000), &view, &memory, &candidates, 120_000);
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
        assert_eq!(claims.len() + held.len(), vms, "each has a host or a reason");
    }
    took.sort_by(f64::total_cmp);
    let cap = view.switches().starts_max as usize;
    // As hosts report them running, the next ones are given out.
    let (mut rounds, mut most, mut left) = (0, 0, vms);
    while left > 0 {
        let (claims, _) = plan(Moment(1_000), &view, &memory, &candidates, 120_000);
        let mut starting = BTreeMap::<HostId, usize>::new();
        for claim in &claims {
            *starting.entry(claim.to.host.clone()).or_default() += 1;
            let record = view.vms.get_mut(&claim.vm).expect("it was claimed from there");
            record.value = VmRecord { owner: Some(claim.to.clone()), ..record.value.clone() };
        }
        assert!(!claims.is_empty(), "{left} are left and none is given out");
        most = most.max(starting.into_values().max().unwrap_or(0));
        assert!(most <= cap, "{most} starts at a time on one host, more than {cap}");
        (rounds, left) = (rounds + 1, left - claims.len());
    }
    let (median, slowest) = (took[RUNS / 2], took[RUNS - 1]);
    println!(
        "{{\"vms\": {vms}, \"hosts\": {hosts}, \"plan_ms\": {median:.2}, \"plan_ms_max\": {slowest:.2}, \
         \"rounds\": {rounds}, \"starts_at_a_time\": {most}}}"
    );
}
