//! Who of all that are due starts now: by priority, then by how long they wait, as far as limits allow.
//!
//! A greedy pass: whoever comes first takes room on its host, storages and repository; who finds none waits and does not
//! keep those behind from starting elsewhere. On one host at most one backup starts in a pass, and none within
//! `host_gap` of the last. Low priorities can wait for as long as higher ones fill the limits.

use std::collections::HashMap;

use jiff::Timestamp;
use uuid::Uuid;
use virtward_model::{Policy, Seconds};

use super::{
    Carrier, HostState, Job, Line, Report, RpoBreach, ScheduleInput, Start, State, VmFacts, Why,
    due::{Candidate, Current, Owed},
    later,
    room::Taken,
    select,
};
use crate::arbiter::{self, Operation, Ruling};

/// Plans: what starts now, in order, and a report on everything.
pub fn plan(input: &ScheduleInput, now: Timestamp) -> (Vec<Start>, Report) {
    let current: Vec<Current<'_>> =
        input.policies.iter().map(|policy| Current::new(policy, now, input.scheduling_since)).collect();
    let mut room = Room::new(input, now);
    let jobs: HashMap<Uuid, &Job> = input.running.iter().map(|job| (job.vm, job)).collect();
    let mut report = Report::default();
    let mut candidates: Vec<(Candidate, &VmFacts, usize, usize)> = Vec::new();
    for vm in &input.vms {
        let before = report.lines.len();
        let histories = input.history.get(&vm.uuid);
        for (number, current) in current.iter().enumerate() {
            let policy = current.compiled.policy();
            if !select::judge(&policy.select, vm).is_selected() {
                continue;
            }
            let history = histories.and_then(|histories| histories.get(&policy.name));
            room.started(vm, history.and_then(|history| history.last).map(|last| last.started));
            let newest = history.and_then(|history| history.newest);
            report.rpo.extend(breach(policy, newest, current.in_force(vm), now).map(|age| RpoBreach {
                vm: vm.uuid,
                policy: number,
                rpo: policy.rpo.unwrap_or_default(),
                age,
                newest,
            }));
            let job = jobs.get(&vm.uuid).filter(|job| job.policy.as_deref() == Some(&policy.name));
            let state = match (job, current.owed(vm, history)) {
                (Some(job), _) => State::Running { since: job.started },
                (None, Owed::Nothing(state)) => state,
                (None, Owed::Run(candidate)) => {
                    // Replaced below, when it is this candidate's turn.
                    let state = State::Waits { due: candidate.due, why: Why::NoHost };
                    candidates.push((candidate, vm, number, report.lines.len()));
                    state
                }
            };
            report.lines.push(Line { vm: vm.uuid, policy: number, state });
        }
        if report.lines.len() == before {
            report.unprotected.push(vm.uuid);
        }
    }
    candidates.sort_by_cached_key(|(candidate, vm, number, _)| {
        let priority = input.policies[*number].policy().priority;
        (std::cmp::Reverse(priority), candidate.ready, candidate.order, vm.uuid, *number)
    });
    let mut starts = Vec::new();
    for (candidate, vm, number, line) in candidates {
        let policy = input.policies[number].policy();
        let Candidate { due, attempt, cause, .. } = candidate;
        report.lines[line].state = match room.take(vm, policy) {
            Err(why) => State::Waits { due, why },
            Ok((host, proxy)) => {
                starts.push(Start { vm: vm.uuid, policy: policy.name.clone(), host, proxy, due, attempt, cause });
                State::Starts { due, attempt, cause }
            }
        };
    }
    report.wake_at = wake_at(&report, input, now);
    (starts, report)
}

/// When time alone changes something: a run comes due, or one that waits may start.
fn wake_at(report: &Report, input: &ScheduleInput, now: Timestamp) -> Option<Timestamp> {
    let states = report.lines.iter().filter_map(|line| line.state.until());
    let gap = later(now, input.limits.host_gap);
    let after_starts = report.lines.iter().any(|line| matches!(line.state, State::Starts { .. })).then_some(gap);
    states.chain(after_starts).filter(|at| *at > now).min()
}

/// The age of the newest restore point, if it is beyond the objective.
fn breach(policy: &Policy, newest: Option<Timestamp>, in_force: Timestamp, now: Timestamp) -> Option<Seconds> {
    let age = Seconds::of(now.duration_since(newest.unwrap_or(in_force)));
    policy.rpo.filter(|rpo| age > *rpo).map(|_| age)
}

/// What is taken, and what VMs are busy with.
struct Room<'a> {
    input: &'a ScheduleInput,
    now: Timestamp,
    taken: Taken<'a>,
    last_start: HashMap<&'a str, Timestamp>,
    /// What is under way on VMs.
    busy: HashMap<Uuid, Vec<Operation>>,
    /// VMs that a backup was planned for, with its policy.
    planned: HashMap<Uuid, &'a str>,
}

impl<'a> Room<'a> {
    fn new(input: &'a ScheduleInput, now: Timestamp) -> Self {
        let mut room = Self {
            input,
            now,
            taken: Taken::default(),
            last_start: HashMap::new(),
            busy: HashMap::new(),
            planned: HashMap::new(),
        };
        for job in &input.running {
            let proxy = job.proxies.first().map(String::as_str);
            room.occupy(&job.host, proxy, &job.storages, &job.repository, job.started);
            room.busy.entry(job.vm).or_default().push(Operation::Backup);
        }
        for (vm, operation) in &input.claims {
            room.busy.entry(*vm).or_default().push(*operation);
        }
        room
    }

    fn occupy(
        &mut self,
        host: &'a str,
        proxy: Option<&'a str>,
        storages: &'a [String],
        repository: &'a str,
        started: Timestamp,
    ) {
        self.taken.add(host, proxy, storages, repository);
        let last = self.last_start.entry(host).or_insert(started);
        *last = started.max(*last);
    }

    /// Notes when a run that may have ended since began on the VM's host. One in the future began before its clock was
    /// put right.
    fn started(&mut self, vm: &'a VmFacts, started: Option<Timestamp>) {
        if let (Some(host), Some(started)) = (&vm.host, started.filter(|started| *started <= self.now)) {
            let last = self.last_start.entry(host).or_insert(started);
            *last = started.max(*last);
        }
    }

    /// Takes room for a backup of a VM, or says what it waits for. Gives its host, and the proxy.
    fn take(&mut self, vm: &'a VmFacts, policy: &'a Policy) -> Result<(String, Option<String>), Why> {
        if let Some(other) = self.planned.get(&vm.uuid) {
            return Err(Why::OtherPolicy((*other).to_owned()));
        }
        let busy = self.busy.get(&vm.uuid).map_or(&[][..], Vec::as_slice);
        if let (Ruling::Wait | Ruling::Refuse | Ruling::CancelOther, Some(because)) =
            arbiter::admit(busy, Operation::Backup)
        {
            return Err(Why::Busy(because));
        }
        let host = vm.host.as_deref().ok_or(Why::NoHost)?;
        match self.input.hosts.get(host).copied().unwrap_or(HostState::Unknown) {
            HostState::Up => {}
            state => return Err(Why::Host(host.to_owned(), state)),
        }
        let proxy = match self.within_limits(vm, host, policy)? {
            Carrier::Proxy(name) => Some(name),
            _ => None,
        };
        self.occupy(host, proxy, &vm.storages, &policy.repository, self.now);
        self.planned.insert(vm.uuid, &policy.name);
        Ok((host.to_owned(), proxy.map(str::to_owned)))
    }

    fn within_limits(&self, vm: &VmFacts, host: &str, policy: &'a Policy) -> Result<Carrier<'a>, Why> {
        let limits = &self.input.limits;
        let proxies = (&*policy.proxy, &self.input.daemons);
        let carrier = self.taken.room(limits, host, proxies, &vm.storages, &policy.repository)?;
        match self.last_start.get(host).filter(|last| **last <= self.now).map(|last| later(*last, limits.host_gap)) {
            Some(until) if until > self.now => Err(Why::HostGap { host: host.to_owned(), until }),
            _ => Ok(carrier),
        }
    }
}
