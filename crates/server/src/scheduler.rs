//! The shell around the planner: gathers what it needs, asks what starts now, and asks for those jobs. Every decision is
//! in `decide::schedule`; what was planned, and why all else was not, is kept for whoever asks.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use uuid::Uuid;
use virtward_api::{BackupRequest, JobKind, JobState, Origin, Quiesce, VmRef};
use virtward_decide::schedule::{self, History, HostState, Job, Report, ScheduleInput, Start, VmFacts};
use virtward_engine::Cancel;
use virtward_model::{Policy, QuiesceRequest, policy::Mode};

use crate::{
    cluster::fleet::Placed,
    daemon::Daemon,
    jobs::record::{NewJob, Work},
    storages,
};

/// Longest time between two plans.
const TICK: Duration = Duration::from_secs(30);
/// Times that a plan took, to rest after it: where ten thousand VMs change at once, planning must not eat a core.
const REST: u32 = 4;
const REST_MAX: Duration = Duration::from_secs(2);

/// What was planned last.
#[derive(Debug, Default)]
pub struct Planned {
    /// What the planner knew.
    pub input: ScheduleInput,
    /// What it said.
    pub report: Report,
    /// When.
    pub at: Timestamp,
    /// Lines of the report by VM.
    pub lines: HashMap<Uuid, Vec<usize>>,
}

/// Plans whenever something changed or time has come, until cancelled.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let since = Timestamp::now();
    while !cancel.is_cancelled() {
        let began = Instant::now();
        let wake_at = once(&daemon, since).await;
        let rest = (began.elapsed() * REST).min(REST_MAX);
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = cancel.cancelled() => break,
        }
        let wait = wake_at.map_or(TICK, |at| {
            let wait = at.duration_since(Timestamp::now());
            Duration::try_from(wait).unwrap_or_default().clamp(Duration::from_millis(100), TICK)
        });
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = daemon.schedule.notified() => {}
            () = cancel.cancelled() => break,
        }
    }
}

/// Plans once, and asks for what starts.
pub async fn once(daemon: &Arc<Daemon>, since: Timestamp) -> Option<Timestamp> {
    let began = Instant::now();
    let now = Timestamp::now();
    let input = input(daemon, since);
    let (starts, report) = schedule::plan(&input, now);
    // Until the first complete look it is not known what there is, and nothing may start on what is not known.
    let is_complete = daemon.fleet().hosts.values().any(|host| host.is_complete);
    let guard = daemon.leader.guard().ok().filter(|_| !daemon.nodes.is_removed());
    let broken = schedule::lint::check(&input, now, &starts, &report);
    if !broken.is_empty() {
        tracing::error!(?broken, "a plan breaks its own rules; nothing of it is started");
    }
    let wake_at = report.wake_at;
    let may_start = broken.is_empty() && is_complete && !daemon.is_stopping();
    let jobs: Vec<NewJob> = match may_start && guard.is_some() {
        true => starts.iter().filter_map(|start| job(&input, start)).collect(),
        false => Vec::new(),
    };
    daemon.planned(planned(input, report, now));
    daemon.metrics.cycle(began.elapsed());
    for new in jobs {
        let (vm, policy) = (new.vm.clone(), new.origin.policy.clone());
        let place = daemon.place_for(&new);
        match daemon.jobs.submit(new, &place, None, guard.clone().unwrap_or_default()).await {
            Ok((job, _)) => tracing::info!(job = %job.id, ?vm, ?policy, "a policy's backup is asked for"),
            Err(problem) => tracing::error!(?vm, ?policy, %problem, "a policy's backup could not be asked for"),
        }
    }
    wake_at
}

fn planned(input: ScheduleInput, report: Report, at: Timestamp) -> Planned {
    let mut lines: HashMap<Uuid, Vec<usize>> = HashMap::new();
    for (number, line) in report.lines.iter().enumerate() {
        lines.entry(line.vm).or_default().push(number);
    }
    Planned { input, report, at, lines }
}

/// Everything that the planner has to know.
pub fn input(daemon: &Daemon, since: Timestamp) -> ScheduleInput {
    let fleet = daemon.fleet();
    let hosts = fleet.hosts.values().map(|host| {
        let state = match host.state {
            virtward_api::HostState::Up if host.is_complete => HostState::Up,
            virtward_api::HostState::Down => HostState::Down,
            // Its backups cannot run, and nobody says that it is dead.
            _ => HostState::Unknown,
        };
        (host.name.clone(), state)
    });
    let names = storages::Names::new(&daemon.registry);
    let vms: Vec<VmFacts> = fleet.vms.values().map(|placed| facts(daemon, &names, placed)).collect();
    let storages: HashMap<Uuid, Vec<String>> = vms.iter().map(|vm| (vm.uuid, vm.storages.clone())).collect();
    let (mut running, mut claims) = (Vec::new(), Vec::new());
    for record in daemon.jobs.records() {
        let (job, Some(vm)) = (&record.job, &record.job.vm) else { continue };
        let operation = record.work.operation();
        // A queued backup is as good as running: it has been asked for.
        match (job.kind, job.state) {
            (JobKind::Backup, JobState::Queued | JobState::Running) => running.push(Job {
                vm: vm.uuid,
                policy: job.origin.policy.clone(),
                host: job.host.clone(),
                proxies: job.proxy.clone().into_iter().collect(),
                storages: storages.get(&vm.uuid).cloned().unwrap_or_default(),
                repository: job.repository.clone(),
                started: job.started.unwrap_or(job.created),
            }),
            (_, JobState::Queued | JobState::Running) => claims.extend(operation.map(|operation| (vm.uuid, operation))),
            _ => {}
        }
    }
    let policies = daemon.policies.compiled();
    let history = history(daemon, policies.iter().map(schedule::Compiled::policy));
    ScheduleInput {
        policies,
        vms,
        hosts: hosts.collect(),
        daemons: daemon.daemons(),
        history,
        running,
        claims,
        limits: limits(daemon),
        scheduling_since: daemon.leader.planning_since(since),
    }
}

/// How many backups may run at once, for what is planned and for what is asked for.
pub fn limits(daemon: &Daemon) -> schedule::Limits {
    let config = daemon.config();
    schedule::Limits { per_host: schedule::Limit::each(config.jobs_max), ..config.limits.clone() }
}

fn facts(daemon: &Daemon, names: &storages::Names, placed: &Placed) -> VmFacts {
    let view = &placed.view;
    VmFacts {
        uuid: view.vm.uuid,
        name: view.vm.name.clone(),
        host: Some(placed.host.clone()),
        tags: view.details.tags.clone(),
        metadata: view.details.metadata.clone(),
        storages: names.of(&placed.node, &placed.host, view),
        first_seen: daemon.vms.first_seen(view.vm.uuid),
    }
}

fn history<'a>(
    daemon: &Daemon,
    policies: impl Iterator<Item = &'a Policy>,
) -> HashMap<Uuid, BTreeMap<String, History>> {
    let mut all: HashMap<Uuid, BTreeMap<String, History>> = HashMap::new();
    for (vm, by_policy) in daemon.jobs.history() {
        for (policy, attempt) in by_policy {
            all.entry(vm).or_default().entry(policy).or_default().last = Some(attempt.into());
        }
    }
    for policy in policies {
        let Ok(entry) = daemon.repositories.find(Some(&policy.repository)) else { continue };
        for (vm, points) in &entry.view().points {
            if let Some(newest) = points.first() {
                all.entry(*vm).or_default().entry(policy.name.clone()).or_default().newest = Some(newest.taken);
            }
        }
    }
    all
}

/// The job that a start asks for.
fn job(input: &ScheduleInput, start: &Start) -> Option<NewJob> {
    let vm = input.vms.iter().find(|vm| vm.uuid == start.vm)?;
    let policy = input.policies.iter().map(schedule::Compiled::policy).find(|policy| policy.name == start.policy)?;
    let request = BackupRequest {
        vm: vm.uuid.to_string(),
        repository: Some(policy.repository.clone()),
        full: false,
        warm: policy.mode == Mode::Warm,
        quiesce: Some(match policy.quiesce {
            QuiesceRequest::Auto => Quiesce::Auto,
            QuiesceRequest::Required => Quiesce::Required,
            QuiesceRequest::Off => Quiesce::Off,
        }),
        bandwidth_bytes_s: policy.bandwidth.map(|bytes| bytes.0),
        only_disks: Vec::new(),
        exclude_disks: Vec::new(),
        tags: Vec::new(),
        proxy: None,
    };
    Some(NewJob {
        work: Work::Backup {
            request,
            hooks: policy.hooks.clone(),
            timeout: policy.timeout,
            proxies: policy.proxy.clone(),
        },
        vm: Some(VmRef { uuid: vm.uuid, name: vm.name.clone() }),
        repository: policy.repository.clone(),
        origin: Origin {
            by: "policy".into(),
            policy: Some(policy.name.clone()),
            due: Some(start.due),
            attempt: start.attempt,
            after: None,
        },
        proxy: start.proxy.clone(),
    })
}
