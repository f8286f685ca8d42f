//! One behaviour each.

use virtward_model::policy::{Retries, Window};

use super::*;

fn nightly() -> Compiled {
    policy("nightly", "0 1 * * *", |_| {})
}

/// Runs of the 31st of January that went well, so that nothing is owed from before the 1st of February.
fn settled(vms: &[&str], policies: Vec<Compiled>) -> ScheduleInput {
    let mut world = world(vms, policies);
    let names: Vec<(String, String)> = world
        .vms
        .iter()
        .flat_map(|vm| world.policies.iter().map(|policy| (vm.name.clone(), policy.policy().name.clone())))
        .collect();
    for (vm, policy) in names {
        world.ran(&vm, &policy, "2026-01-31T23:00:00Z", "2026-01-31T23:00:00Z", 1, Outcome::Succeeded);
    }
    world
}

#[test]
fn nothing_to_do_until_the_next_time() {
    let world = settled(&["h1/a"], vec![nightly()]);
    assert!(world.starts("2026-02-01T00:59:59Z").is_empty());
    assert_eq!(world.says("2026-02-01T00:59:59Z", "a", "nightly"), "nothing to do, next at 2026-02-01 01:00");
    assert_eq!(plan(&world, at("2026-02-01T00:59:59Z")).1.wake_at, Some(at("2026-02-01T01:00:00Z")));
    assert_eq!(world.starts("2026-02-01T01:00:00Z"), ["a nightly"]);
}

#[test]
fn guests_of_one_host_start_one_after_the_other() {
    let mut world = settled(&["h1/a", "h1/b", "h2/c"], vec![nightly()]);
    let first = world.starts("2026-02-01T01:00:00Z");
    assert_eq!(first.len(), 2, "{first:?}");
    let (begun, waiting) = if first.contains(&"a nightly".to_owned()) { ("a", "b") } else { ("b", "a") };
    assert_eq!(
        world.says("2026-02-01T01:00:00Z", waiting, "nightly"),
        "due 2026-02-01 01:00, waits: a backup just started on host h1, the next may at 2026-02-01 01:00:20"
    );
    for vm in [begun, "c"] {
        world.job(vm, "nightly", "2026-02-01T01:00:00Z");
    }
    assert!(world.starts("2026-02-01T01:00:19Z").is_empty());
    assert_eq!(plan(&world, at("2026-02-01T01:00:19Z")).1.wake_at, Some(at("2026-02-01T01:00:20Z")));
    assert_eq!(world.starts("2026-02-01T01:00:20Z"), [format!("{waiting} nightly")]);
    // A job that ended already counts as well.
    world.running.clear();
    world.ran(begun, "nightly", "2026-02-01T01:00:00Z", "2026-02-01T01:00:01Z", 1, Outcome::Succeeded);
    assert_eq!(world.starts("2026-02-01T01:00:20Z"), ["c nightly"]);
}

#[test]
fn higher_priorities_first_then_who_waits_longest() {
    let first = policy("first", "30 1 * * *", |policy| policy.priority = 10);
    let mut world = settled(&["h1/a", "h2/b", "h3/c"], vec![nightly(), first]);
    world.limits.total = 1;
    let start = world.starts("2026-02-01T01:40:00Z");
    assert!(start.len() == 1 && start[0].ends_with(" first"), "{start:?}");
    assert_eq!(
        world.says("2026-02-01T01:40:00Z", if start[0].starts_with('a') { "b" } else { "a" }, "nightly"),
        "due 2026-02-01 01:00, waits: 1 backups run in the cluster, no more may"
    );
    let jittered = policy("nightly", "0 1 * * *", |policy| policy.schedule.jitter = Seconds::minutes(50));
    let mut vms: Vec<(Seconds, &str)> =
        [("a", 1), ("b", 2), ("c", 3)].map(|(name, uuid)| (jittered.jitter(Uuid::from_u128(uuid)), name)).into();
    vms.sort_unstable();
    world.policies = vec![jittered];
    world.limits.total = 64;
    let names: Vec<String> = vms.iter().map(|(_, name)| format!("{name} nightly")).collect();
    assert_eq!(world.starts("2026-02-01T02:00:00Z"), names);
}

#[test]
fn one_vm_never_has_two_backups_at_once() {
    let weekly = policy("weekly", "0 1 * * sun", |policy| policy.priority = 1);
    // 1 February 2026 is a Sunday.
    let mut world = settled(&["h1/a"], vec![nightly(), weekly]);
    assert_eq!(world.starts("2026-02-01T01:00:00Z"), ["a weekly"]);
    assert_eq!(
        world.says("2026-02-01T01:00:00Z", "a", "nightly"),
        "due 2026-02-01 01:00, waits: the backup of policy weekly goes first"
    );
    world.job("a", "weekly", "2026-02-01T01:00:00Z");
    assert!(world.starts("2026-02-01T01:05:00Z").is_empty());
    assert_eq!(world.says("2026-02-01T01:05:00Z", "a", "weekly"), "runs since 2026-02-01 01:00");
    let waits = world.says("2026-02-01T01:05:00Z", "a", "nightly");
    assert_eq!(waits, "due 2026-02-01 01:00, waits: a backup of this VM is under way");
    world.running.clear();
    world.ran("a", "weekly", "2026-02-01T01:00:00Z", "2026-02-01T01:00:00Z", 1, Outcome::Succeeded);
    assert_eq!(world.starts("2026-02-01T01:05:00Z"), ["a nightly"]);
}

#[test]
fn limits_of_hosts_storages_and_repositories() {
    let now = "2026-02-01T01:10:00Z";
    let mut world = settled(&["h1/a", "h1/b", "h2/c"], vec![nightly()]);
    world.job("a", "nightly", "2026-02-01T01:00:00Z");
    world.limits.per_host = Limit { each: 2, named: BTreeMap::from([("h1".into(), 1)]) };
    assert_eq!(world.starts(now), ["c nightly"]);
    assert!(world.says(now, "b", "nightly").ends_with("waits: 1 backups run on host h1, no more may"));
    world.limits.per_storage = Limit::each(1);
    assert!(world.starts(now).is_empty());
    assert!(world.says(now, "c", "nightly").ends_with("waits: 1 backups read from storage nfs, no more may"));
    world.limits.per_repository = Limit { each: 9, named: BTreeMap::from([("main".into(), 0)]) };
    assert!(world.says(now, "c", "nightly").ends_with("waits: 0 backups write to repository main, no more may"));
}

#[test]
fn hosts_that_are_not_up_and_vms_that_are_busy_wait() {
    let now = "2026-02-01T01:00:00Z";
    let mut world = settled(&["h1/a", "h2/b", "h3/c", "h4/d", "h5/e"], vec![nightly()]);
    world.hosts.insert("h1".into(), HostState::Down);
    world.hosts.insert("h2".into(), HostState::Unknown);
    world.hosts.remove("h3");
    world.vms[3].host = None;
    world.claims.push((world.uuid("e"), Operation::Failover));
    assert!(world.starts(now).is_empty());
    for (vm, why) in [
        ("a", "host h1 is down"),
        ("b", "host h2 does not answer"),
        ("c", "host h3 does not answer"),
        ("d", "nobody knows which host the VM is on"),
        ("e", "a failover of this VM is under way"),
    ] {
        assert_eq!(world.says(now, vm, "nightly"), format!("due 2026-02-01 01:00, waits: {why}"));
    }
}

#[test]
fn of_missed_runs_the_last_is_caught_up() {
    let mut world = settled(&["h1/a"], vec![nightly()]);
    world.scheduling_since = at("2026-02-04T09:00:00Z");
    assert_eq!(world.starts("2026-02-04T09:00:05Z"), ["a nightly"]);
    assert_eq!(world.says("2026-02-04T09:00:05Z", "a", "nightly"), "starts, was missed at 2026-02-04 01:00");
    world.policies = vec![policy("nightly", "0 1 * * *", |policy| policy.schedule.catch_up = false)];
    assert!(world.starts("2026-02-04T09:00:05Z").is_empty());
    assert_eq!(
        world.says("2026-02-04T09:00:05Z", "a", "nightly"),
        "2026-02-04 01:00: was missed, and the policy does not catch up; next at 2026-02-05 01:00"
    );
    // A change of coordinator is no outage.
    world.scheduling_since = at("2026-02-04T01:04:00Z");
    assert_eq!(world.starts("2026-02-04T01:04:00Z"), ["a nightly"]);
}

#[test]
fn what_cannot_start_in_time_is_left_out() {
    let strict = policy("nightly", "0 1 * * *", |policy| policy.schedule.max_lateness = Some(Seconds::hours(2)));
    let world = settled(&["h1/a"], vec![strict]);
    assert_eq!(world.starts("2026-02-01T03:00:00Z"), ["a nightly"]);
    assert!(world.starts("2026-02-01T03:00:01Z").is_empty());
    assert_eq!(
        world.says("2026-02-01T03:00:01Z", "a", "nightly"),
        "2026-02-01 01:00: could not start in time; next at 2026-02-02 01:00"
    );
}

#[test]
fn failures_are_retried_ever_later_and_then_given_up() {
    let stubborn = policy("nightly", "0 1 * * *", |policy| {
        policy.retries = Retries { count: 2, backoff: Seconds::minutes(10) };
    });
    let mut world = settled(&["h1/a"], vec![stubborn]);
    let due = "2026-02-01T01:00:00Z";
    world.ran("a", "nightly", due, "2026-02-01T01:00:00Z", 1, Outcome::Failed);
    assert!(world.starts("2026-02-01T01:12:59Z").is_empty());
    let waits = world.says("2026-02-01T01:12:59Z", "a", "nightly");
    assert_eq!(waits, "due 2026-02-01 01:00, waits: tries again at 2026-02-01 01:13:00");
    assert_eq!(world.starts("2026-02-01T01:13:00Z"), ["a nightly"]);
    let again = world.says("2026-02-01T01:13:00Z", "a", "nightly");
    assert_eq!(again, "starts try 2 for 2026-02-01 01:00");
    world.ran("a", "nightly", due, "2026-02-01T01:13:00Z", 2, Outcome::Failed);
    assert!(world.starts("2026-02-01T01:35:59Z").is_empty());
    assert_eq!(world.starts("2026-02-01T01:36:00Z"), ["a nightly"]);
    world.ran("a", "nightly", due, "2026-02-01T01:36:00Z", 3, Outcome::Failed);
    assert!(world.starts("2026-02-01T23:00:00Z").is_empty());
    assert_eq!(
        world.says("2026-02-01T23:00:00Z", "a", "nightly"),
        "2026-02-01 01:00: failed 3 times; next at 2026-02-02 01:00"
    );
    assert_eq!(world.starts("2026-02-02T01:00:00Z"), ["a nightly"]);
}

#[test]
fn a_retry_just_before_the_next_time_does_not_stand_for_it() {
    let mut world =
        settled(&["h1/a"], vec![policy("hourly", "0 * * * *", |policy| policy.schedule.jitter = Seconds::minutes(30))]);
    let jitter = world.policies[0].jitter(world.uuid("a"));
    assert!(jitter > Seconds::minutes(1), "{jitter}");
    world.ran("a", "hourly", "2026-02-01T01:00:00Z", "2026-02-01T02:00:10Z", 2, Outcome::Succeeded);
    let ready = later(at("2026-02-01T02:00:00Z"), jitter);
    assert_eq!(world.starts(&ready.to_string()), ["a hourly"]);
}

#[test]
fn an_interruption_is_no_failure_and_a_cancelled_run_stays_cancelled() {
    let mut world = settled(&["h1/a"], vec![nightly()]);
    let due = "2026-02-01T01:00:00Z";
    world.ran("a", "nightly", due, due, 3, Outcome::Interrupted);
    let waits = world.says("2026-02-01T01:04:00Z", "a", "nightly");
    assert_eq!(waits, "due 2026-02-01 01:00, waits: tries again at 2026-02-01 01:08:00");
    let (starts, _) = plan(&world, at("2026-02-01T01:08:00Z"));
    assert_eq!((starts[0].attempt, starts[0].cause), (3, Cause::Resumed));
    world.ran("a", "nightly", due, due, 1, Outcome::Cancelled);
    assert!(world.starts("2026-02-01T20:00:00Z").is_empty());
    let cancelled = world.says("2026-02-01T20:00:00Z", "a", "nightly");
    assert_eq!(cancelled, "2026-02-01 01:00: was cancelled; next at 2026-02-02 01:00");
}

#[test]
fn nothing_starts_outside_the_window() {
    let night = policy("nightly", "0 1,12 * * *", |policy| {
        policy.schedule.window =
            Some(Window { start: "22:00".parse().unwrap(), end: "05:00".parse().unwrap(), days: Vec::new() });
    });
    let world = settled(&["h1/a"], vec![night]);
    assert_eq!(world.starts("2026-02-01T04:59:59Z"), ["a nightly"]);
    assert!(world.starts("2026-02-01T05:00:00Z").is_empty());
    assert_eq!(
        world.says("2026-02-01T13:00:00Z", "a", "nightly"),
        "due 2026-02-01 12:00, waits: the window opens at 2026-02-01 22:00:00"
    );
    assert_eq!(plan(&world, at("2026-02-01T13:00:00Z")).1.wake_at, Some(at("2026-02-01T22:00:00Z")));
    assert_eq!(world.starts("2026-02-01T22:00:00Z"), ["a nightly"]);
}

#[test]
fn new_vms_and_new_schedules_owe_nothing_from_before() {
    let mut world = world(&["h1/a"], vec![nightly()]);
    assert_eq!(world.starts("2026-02-01T12:00:00Z"), ["a nightly"], "no run was ever made");
    world.vms[0].first_seen = at("2026-02-01T11:00:00Z");
    assert!(world.starts("2026-02-01T12:00:00Z").is_empty());
    let mut world = settled(&["h1/a"], vec![nightly()]);
    let changed = policy("nightly", "0 11 * * *", |_| {}).policy().clone();
    let zones = TimeZoneDatabase::bundled();
    world.policies = vec![Compiled::new(changed, at("2026-02-01T12:00:00Z"), &zones).unwrap()];
    assert!(world.starts("2026-02-01T12:01:00Z").is_empty());
    assert_eq!(world.starts("2026-02-02T11:00:00Z"), ["a nightly"]);
}

#[test]
fn paused_policies_start_nothing_and_still_tell_old_restore_points() {
    let paused = policy("nightly", "0 1 * * *", |policy| {
        policy.paused = true;
        policy.rpo = Some(Seconds::hours(26));
    });
    let world = settled(&["h1/a"], vec![paused]);
    assert!(world.starts("2026-02-05T01:00:00Z").is_empty());
    assert_eq!(world.says("2026-02-05T01:00:00Z", "a", "nightly"), "the policy is paused");
    assert!(plan(&world, at("2026-02-02T01:00:00Z")).1.rpo.is_empty());
    let breach = plan(&world, at("2026-02-02T01:00:01Z")).1.rpo.remove(0);
    assert_eq!((breach.age, breach.newest), (Seconds(26 * 3600 + 1), Some(at("2026-01-31T23:00:00Z"))));
}

#[test]
fn a_vm_without_restore_points_breaks_its_objective_from_when_the_policy_was_for_it() {
    let hourly = policy("hourly", "0 * * * *", |policy| policy.rpo = Some(Seconds::hours(2)));
    let mut world = world(&["h1/a", "h1/b"], vec![hourly]);
    world.vms[1].first_seen = at("2026-02-01T11:00:00Z");
    let report = plan(&world, at("2026-02-01T12:00:00Z")).1;
    assert_eq!(report.rpo.iter().map(|breach| breach.vm).collect::<Vec<_>>(), [world.uuid("a")]);
    assert_eq!(report.rpo[0].newest, None);
}

#[test]
fn a_clock_that_was_ahead_does_not_stop_backups() {
    let mut world = settled(&["h1/a"], vec![nightly()]);
    world.ran("a", "nightly", "2031-01-01T01:00:00Z", "2031-01-01T01:00:00Z", 1, Outcome::Succeeded);
    assert_eq!(world.starts("2026-02-01T01:00:00Z"), ["a nightly"]);
    world.vms[0].first_seen = at("2031-01-01T01:00:00Z");
    assert_eq!(world.starts("2026-02-01T01:00:00Z"), ["a nightly"]);
}

#[test]
fn one_vm_is_explained() {
    let gold = policy("gold", "0 * * * *", |policy| {
        policy.select.all = vec!["metadata:owner=finance".parse().unwrap()];
        policy.select.any = vec!["tag:gold".parse().unwrap(), "name:db-*".parse().unwrap()];
        policy.rpo = Some(Seconds::hours(2));
    });
    let none = policy("test", "0 * * * *", |policy| policy.select.exclude = vec!["host:h1".parse().unwrap()]);
    let other = policy("other", "0 * * * *", |policy| policy.select.any = vec!["tag:silver".parse().unwrap()]);
    let mut world = settled(&["h1/db-1", "h2/x"], vec![gold, none, other]);
    world.vms[0].metadata.insert("owner".into(), "finance".into());
    let now = at("2026-02-01T02:30:00Z");
    let (_, report) = plan(&world, now);
    let explained = explain(&world, now, &report, world.uuid("db-1")).unwrap();
    let shown: Vec<String> = explained.policies.iter().map(|one| one.selection.to_string()).collect();
    assert_eq!(
        shown,
        [
            "selected by metadata:owner=finance and name:db-*",
            "excluded by host:h1",
            "not selected: no rule of any holds"
        ]
    );
    let gold = &explained.policies[0];
    assert!(matches!(gold.state, Some(State::Starts { .. })), "{gold:?}");
    assert_eq!((gold.next, gold.rpo_exceeded), (Some(at("2026-02-01T03:00:00Z")), Some(Seconds(3 * 3600 + 1800))));
    assert_eq!(gold.newest, Some(at("2026-01-31T23:00:00Z")));
    assert_eq!((explained.policies[1].state, explained.policies[1].next), (None, None));
    assert_eq!(
        explain(&world, now, &report, world.uuid("x")).unwrap().policies[0].selection.to_string(),
        "not selected: metadata:owner=finance does not hold"
    );
    assert_eq!(explain(&world, now, &report, Uuid::from_u128(99)), None);
    assert!(report.unprotected.is_empty());
    world.policies.remove(1);
    assert_eq!(plan(&world, now).1.unprotected, [world.uuid("x")]);
}

#[test]
fn a_proxy_takes_what_it_may_and_where_none_answers_the_own_host_does_it() {
    let through = policy("nightly", "0 1 * * *", |policy| policy.proxy = vec!["b1".into()]);
    let mut world = settled(&["h1/a", "h2/b"], vec![through]);
    world.limits.per_host = Limit::each(1);
    world.daemons = ["h1", "h2", "b1"].map(str::to_owned).into();
    let now = "2026-02-01T01:00:00Z";
    let told = |world: &ScheduleInput| {
        let (starts, report) = plan(world, at(now));
        let waits = report.lines.iter().filter(|line| matches!(line.state, State::Waits { .. }));
        let waits = waits.map(|line| line.state.text(&jiff::tz::TimeZone::UTC)).collect::<Vec<_>>();
        (starts.iter().map(|start| start.proxy.clone()).collect::<Vec<_>>(), waits)
    };
    assert_eq!(world.starts(now).len(), 1);
    let waits = "due 2026-02-01 01:00, waits: 1 backups run on host b1, no more may";
    assert_eq!(told(&world), (vec![Some("b1".into())], vec![waits.to_owned()]));
    let explained = |world: &ScheduleInput| {
        let report = plan(world, at(now)).1;
        explain(world, at(now), &report, world.uuid("a")).unwrap().policies[0].carrier.as_ref().unwrap().text("h1")
    };
    assert!(explained(&world).ends_with("read and stored by b1, a proxy of the policy"), "{}", explained(&world));
    world.daemons.remove("b1");
    assert_eq!(world.starts(now).len(), 2);
    assert_eq!(told(&world), (vec![None, None], Vec::new()));
    assert!(explained(&world).ends_with("no proxy of the policy answers (b1)"), "{}", explained(&world));
}

/// The linter must find what is wrong, or its silence means nothing.
#[test]
fn the_linter_finds_broken_plans() {
    let night = policy("nightly", "0 1 * * *", |policy| {
        policy.schedule.window =
            Some(Window { start: "22:00".parse().unwrap(), end: "05:00".parse().unwrap(), days: Vec::new() });
    });
    let now = at("2026-02-01T01:00:00Z");
    let mut world = settled(&["h1/a", "h2/b"], vec![night, policy("low", "0 1 * * *", |policy| policy.priority = -1)]);
    let (starts, report) = plan(&world, now);
    assert_eq!(starts.len(), 2);
    let finds = |world: &ScheduleInput, now: Timestamp, starts: &[Start], what: &str| {
        let found = lint::check(world, now, starts, &report);
        assert!(found.iter().any(|found| found.contains(what)), "{what}: {found:?}");
    };
    let twice = [starts[0].clone(), starts[0].clone()];
    finds(&world, now, &twice, "starts twice");
    finds(&world, now, &twice, "on one host at once");
    finds(&world, now, &starts[..1], "1 starts, 2 of them told");
    finds(&world, at("2026-02-01T05:00:00Z"), &starts, "outside the window");
    finds(&world, at("2026-02-01T00:59:59Z"), &starts, "its time has not come");
    let change = |change: fn(&mut Start)| {
        let mut changed = starts.clone();
        change(&mut changed[0]);
        changed
    };
    finds(&world, now, &change(|start| start.due -= minutes(1)), "the schedule has no such time");
    finds(&world, now, &change(|start| start.cause = Cause::Retry), "a retry of nothing that failed");
    finds(&world, now, &change(|start| start.attempt = 9), "too many tries");
    finds(&world, now, &change(|start| start.policy = "gone".into()), "no such VM or policy");
    finds(&world, now, &change(|start| start.policy = "low".into()), "a lower priority");
    finds(&world, now, &change(|start| start.proxy = Some("b1".into())), "another host than its policy's proxies");
    world.limits.per_storage = Limit::each(1);
    finds(&world, now, &starts, "2 backups on storage nfs");
    world.hosts.clear();
    finds(&world, now, &starts, "its host is not up");
    world.claims.push((world.uuid("a"), Operation::Migrate));
    finds(&world, now, &starts, "something else is done to it");
}
