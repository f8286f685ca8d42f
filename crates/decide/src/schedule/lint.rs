//! An independent look at a finished plan: whether it keeps what every plan must keep. It shares no code with the planner
//! but the reading of cron expressions and patterns, counts everything anew, and finds nothing in a good plan.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use jiff::{SignedDuration, Timestamp};
use virtward_model::{Weekday, policy::Window};

use super::{
    Cause, Compiled, HostState, Job, Limit, Outcome, Report, ScheduleInput, Start, State, VmFacts, Why, select::holds,
};

/// Everything that a plan breaks, in words; empty for a good one.
pub fn check(input: &ScheduleInput, now: Timestamp, starts: &[Start], report: &Report) -> Vec<String> {
    let mut broken = Vec::new();
    let mut vms = BTreeSet::new();
    for start in starts {
        let Some((vm, policy)) = find(input, start) else {
            broken.push(format!("{start:?}: no such VM or policy"));
            continue;
        };
        if !vms.insert(start.vm) {
            broken.push(format!("{} starts twice", vm.name));
        }
        broken.extend(one(input, now, start, vm, policy).into_iter().map(|what| format!("{}: {what}", vm.name)));
    }
    let priority = |start: &Start| find(input, start).map(|(_, policy)| Reverse(policy.policy().priority));
    if !starts.is_sorted_by_key(priority) {
        broken.push("a lower priority starts before a higher one".to_owned());
    }
    let used = Used::count(input, &input.running, starts);
    broken.extend(used.beyond(input, starts));
    broken.extend(lines(input, starts, report, &used));
    broken
}

fn find<'a>(input: &'a ScheduleInput, start: &Start) -> Option<(&'a VmFacts, &'a Compiled)> {
    let vm = input.vms.iter().find(|vm| vm.uuid == start.vm)?;
    Some((vm, input.policies.iter().find(|policy| policy.policy().name == start.policy)?))
}

fn is_for(policy: &Compiled, vm: &VmFacts) -> bool {
    let select = &policy.policy().select;
    let any = select.any.is_empty() && !select.all.is_empty() || select.any.iter().any(|rule| holds(rule, vm));
    any && select.all.iter().all(|rule| holds(rule, vm)) && !select.exclude.iter().any(|rule| holds(rule, vm))
}

fn one(input: &ScheduleInput, now: Timestamp, start: &Start, vm: &VmFacts, compiled: &Compiled) -> Vec<&'static str> {
    let policy = compiled.policy();
    let jitter = compiled.jitter(vm.uuid).duration();
    let last = input.history.get(&vm.uuid).and_then(|of| of.get(&policy.name)).and_then(|history| history.last);
    let before = start.due - SignedDuration::from_nanos(1);
    let is_time = compiled.crons().iter().any(|cron| cron.next_after(before, compiled.zone()) == Some(start.due));
    let fresh = matches!(start.cause, Cause::Scheduled | Cause::CaughtUp);
    let follows = |outcome| last.is_some_and(|last| last.outcome == outcome && last.due == start.due);
    let gap = input.limits.host_gap.duration();
    let too_near = |job: &&Job| job.host == start.host && job.started <= now && job.started + gap > now;
    let named = |proxy: &String| policy.proxy.contains(proxy) && !policy.proxy.contains(&start.host);
    let may_store = |proxy: &String| named(proxy) && input.daemons.contains(proxy);
    let checks = [
        (policy.paused, "its policy is paused"),
        (!is_for(compiled, vm), "its policy is not for it"),
        (input.running.iter().any(|job| job.vm == vm.uuid), "a backup of it runs"),
        (input.claims.iter().any(|(claimed, _)| *claimed == vm.uuid), "something else is done to it"),
        (vm.host.as_ref() != Some(&start.host), "it is on another host"),
        (input.hosts.get(&start.host) != Some(&HostState::Up), "its host is not up"),
        (!policy.schedule.window.as_ref().is_none_or(|window| in_window(window, now, compiled)), "outside the window"),
        (start.due + jitter > now, "its time has not come"),
        (policy.schedule.max_lateness.is_some_and(|late| start.due + jitter + late.duration() < now), "too late"),
        (fresh && !is_time, "the schedule has no such time"),
        (fresh && last.is_some_and(|last| last.due == start.due && last.started <= now), "it ran already"),
        (fresh && start.attempt != 1, "a first try is not number 1"),
        (start.cause == Cause::Retry && !follows(Outcome::Failed), "a retry of nothing that failed"),
        (start.cause == Cause::Resumed && !follows(Outcome::Interrupted), "nothing was interrupted"),
        (start.attempt > 1 + policy.retries.count, "too many tries"),
        (
            start.proxy.as_ref().is_some_and(|proxy| !may_store(proxy)),
            "another host than its policy's proxies stores it",
        ),
        (start.proxy.is_none() && policy.proxy.iter().any(may_store), "a proxy answers and does not store it"),
        (input.running.iter().any(|job| too_near(&job)), "too soon after another start on its host"),
    ];
    checks.into_iter().filter(|(is_broken, _)| *is_broken).map(|(_, what)| what).collect()
}

/// By stepping back through the minutes to the opening, if there was one within a day.
fn in_window(window: &Window, now: Timestamp, compiled: &Compiled) -> bool {
    let here = now.to_zoned(compiled.zone().clone());
    let mut clock = here.date().at(here.hour(), here.minute(), 0, 0);
    for _ in 0..1440 {
        if clock.time() == window.end.civil() {
            return false;
        }
        if clock.time() == window.start.civil() {
            return window.days.is_empty() || window.days.contains(&Weekday::of(clock.date().weekday()));
        }
        clock = clock.saturating_sub(SignedDuration::from_mins(1));
    }
    false
}

/// Backups by what they use, running and starting.
#[derive(Default)]
struct Used<'a> {
    total: u32,
    hosts: BTreeMap<&'a str, u32>,
    storages: BTreeMap<&'a str, u32>,
    repositories: BTreeMap<&'a str, u32>,
}

impl<'a> Used<'a> {
    fn count(input: &'a ScheduleInput, running: &'a [Job], starts: &'a [Start]) -> Self {
        let mut used = Self::default();
        let running = running.iter().map(|job| {
            let proxy = job.proxies.first().map(String::as_str);
            (&*job.host, proxy, &job.storages, &*job.repository)
        });
        let starting = starts.iter().filter_map(|start| {
            let (vm, policy) = find(input, start)?;
            Some((&*start.host, start.proxy.as_deref(), &vm.storages, &*policy.policy().repository))
        });
        for (host, proxy, storages, repository) in running.chain(starting) {
            used.total += 1;
            [Some(host), proxy].into_iter().flatten().for_each(|host| *used.hosts.entry(host).or_default() += 1);
            *used.repositories.entry(repository).or_default() += 1;
            storages.iter().for_each(|storage| *used.storages.entry(storage).or_default() += 1);
        }
        used
    }

    /// Limits that starts broke. Running jobs alone may be beyond a limit that was lowered.
    fn beyond(&self, input: &ScheduleInput, starts: &[Start]) -> Vec<String> {
        let mut broken = Vec::new();
        let starting = Used::count(input, &[], starts);
        let mut over = |kind: &str, used: &BTreeMap<&str, u32>, mine: &BTreeMap<&str, u32>, limit: &Limit| {
            let names = used.iter().filter(|(name, count)| mine.contains_key(*name) && **count > limit.of(name));
            broken.extend(names.map(|(name, count)| format!("{count} backups on {kind} {name}")));
        };
        over("host", &self.hosts, &starting.hosts, &input.limits.per_host);
        over("storage", &self.storages, &starting.storages, &input.limits.per_storage);
        over("repository", &self.repositories, &starting.repositories, &input.limits.per_repository);
        if !starts.is_empty() && self.total > input.limits.total {
            broken.push(format!("{} backups in all", self.total));
        }
        let at: BTreeSet<&str> = starts.iter().map(|start| &*start.host).collect();
        if !input.limits.host_gap.is_zero() && at.len() < starts.len() {
            broken.push("two backups start on one host at once".to_owned());
        }
        broken
    }
}

/// Every VM and policy has its line, starts are told, and whoever waits for a limit waits for one that is reached.
fn lines(input: &ScheduleInput, starts: &[Start], report: &Report, used: &Used<'_>) -> Vec<String> {
    let mut broken = Vec::new();
    let pairs = |vm: &VmFacts| input.policies.iter().filter(|policy| is_for(policy, vm)).count();
    let told: BTreeSet<_> = report.lines.iter().map(|line| (line.vm, line.policy)).collect();
    if told.len() != report.lines.len() || told.len() != input.vms.iter().map(pairs).sum::<usize>() {
        broken.push("not every VM and policy has one line".to_owned());
    }
    let starting = report.lines.iter().filter(|line| matches!(line.state, State::Starts { .. })).count();
    if starting != starts.len() {
        broken.push(format!("{} starts, {starting} of them told", starts.len()));
    }
    for line in &report.lines {
        let State::Waits { why, .. } = &line.state else { continue };
        let count = |of: &BTreeMap<&str, u32>, name: &str| of.get(name).copied().unwrap_or_default();
        let justified = match why {
            Why::Total(limit) => used.total >= *limit && *limit == input.limits.total,
            Why::HostLimit(name, _) => count(&used.hosts, name) >= input.limits.per_host.of(name),
            Why::StorageLimit(name, _) => count(&used.storages, name) >= input.limits.per_storage.of(name),
            Why::RepositoryLimit(name, _) => count(&used.repositories, name) >= input.limits.per_repository.of(name),
            Why::OtherPolicy(policy) => starts.iter().any(|start| start.vm == line.vm && start.policy == *policy),
            Why::Busy(_) => {
                let claimed = input.claims.iter().any(|(vm, _)| *vm == line.vm);
                claimed || input.running.iter().any(|job| job.vm == line.vm)
            }
            _ => true,
        };
        if !justified {
            broken.push(format!("{}: waits without reason: {why:?}", line.vm));
        }
    }
    broken
}
