//! Time of one planning cycle: `cargo run --release -p virtward-decide --example schedule_bench -- [VMS] [POLICIES]`.
//!
//! Prints one line of JSON: how long a cycle with everything idle takes, and one in which everything is due.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use jiff::{SignedDuration, Timestamp, tz::TimeZoneDatabase};
use uuid::Uuid;
use virtward_decide::schedule::{Attempt, Compiled, History, HostState, Outcome, ScheduleInput, VmFacts, plan};
use virtward_model::{Policy, Retention, Seconds};

fn main() {
    let mut numbers = std::env::args().skip(1).map(|number| number.parse().expect("a number"));
    let (vms, policies) = (numbers.next().unwrap_or(10_000), numbers.next().unwrap_or(20));
    let now: Timestamp = "2026-02-01T12:00:00Z".parse().expect("a time");
    let mut input = world(vms, policies, now);
    let idle = cycle(&input, now);
    input.history.clear();
    let due = cycle(&input, now);
    println!("{{\"vms\":{vms},\"policies\":{policies},\"idle_cycle_ms\":{idle:.1},\"all_due_cycle_ms\":{due:.1}}}");
}

/// The median of seven.
fn cycle(input: &ScheduleInput, now: Timestamp) -> f64 {
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            let begin = Instant::now();
            std::hint::black_box(plan(std::hint::black_box(input), now));
            begin.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[3]
}

fn world(vms: u32, policies: u32, now: Timestamp) -> ScheduleInput {
    let since = now - SignedDuration::from_hours(24 * 30);
    let policy = |number: u32| {
        let mut policy = Policy { name: format!("policy-{number}"), repository: "main".into(), ..Policy::default() };
        // Every VM is selected by each, by the last rule that is tried.
        policy.select.any = ["tag:gold", "name:web-*", "name:*"].map(|rule| rule.parse().expect("a rule")).into();
        policy.select.exclude = vec!["name:*-scratch".parse().expect("a rule")];
        policy.schedule.cron = vec![format!("{} */{} * * *", number % 60, 1 + number % 6)];
        policy.schedule.time_zone = "Europe/Berlin".into();
        policy.schedule.jitter = Seconds::minutes(30);
        policy.retention = Retention { daily: 7, ..Retention::default() };
        policy.rpo = Some(Seconds::hours(26));
        Compiled::new(policy, since, &TimeZoneDatabase::bundled()).expect("a good policy")
    };
    let policies: Vec<Compiled> = (0..policies).map(policy).collect();
    let facts: Vec<VmFacts> = (0..vms)
        .map(|number| VmFacts {
            uuid: Uuid::from_u128(u128::from(number) * 0x9e37_79b9_7f4a_7c15),
            name: format!("vm-{number:05}"),
            host: Some(format!("host-{:04}", number % 1000)),
            tags: vec!["silver".into(), "linux".into()],
            metadata: BTreeMap::from([("owner".into(), "finance".into())]),
            storages: vec![format!("pool-{}", number % 50)],
            first_seen: since,
        })
        .collect();
    let last = Attempt { due: now, started: now, ended: now, number: 1, outcome: Outcome::Succeeded };
    let history = History { last: Some(last), newest: Some(now) };
    let of_vm: BTreeMap<String, History> =
        policies.iter().map(|policy| (policy.policy().name.clone(), history.clone())).collect();
    let history: HashMap<Uuid, BTreeMap<String, History>> = facts.iter().map(|vm| (vm.uuid, of_vm.clone())).collect();
    let hosts = facts.iter().filter_map(|vm| vm.host.clone()).map(|host| (host, HostState::Up)).collect();
    ScheduleInput { policies, vms: facts, hosts, history, scheduling_since: since, ..ScheduleInput::default() }
}
