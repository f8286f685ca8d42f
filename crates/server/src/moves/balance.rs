//! Balancing by rounds: the leader looks at all hosts now and then, and says what should move, or has it moved.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;
use virtward_api::{
    BalanceHost, BalanceMode, BalanceRound, BalanceStatus, Code, HostState, Job, Origin, PlannedMove, Problem, Said,
    Saying, Severity, VmLeft, VmRef,
};
use virtward_cluster::Compare;
use virtward_decide::{
    balance::{Eagerness, Memory, Policy, Report, Weekly, after, loads, part, round},
    placement::{self, Plan},
};
use virtward_engine::{
    Cancel,
    survey::{Surveyed, survey},
};
use virtward_model::world::{Mode, World};

use super::{drained, jobs::rules_of, reach};
use crate::{
    config::BalanceConfig,
    daemon::Daemon,
    events::Note,
    failures::{self, Result},
    jobs::record::{NewJob, Work},
    kv,
};

/// Where rounds are kept.
pub const PREFIX: &str = "/v1/balance/";
const MEMORY_KEY: &str = "/balance/memory";
const WEEKLY_KEY: &str = "/balance/weekly/";
/// Between two looks whether a round is due.
const TICK: Duration = Duration::from_secs(1);
/// Rounds in which something should move that are kept.
const KEPT_MAX: usize = 200;
/// Key of the last round, whatever it said; the others have the time at their beginning.
const LAST: &str = "last";
/// Hours ahead for which demand is expected.
const AHEAD: usize = 1;

/// What VMs wanted in weeks before.
#[derive(Default)]
pub struct History {
    weekly: BTreeMap<Uuid, (Weekly, usize)>,
    memory: Memory,
    /// Which leadership it was read under.
    of: Option<u64>,
}

/// What it is told, and what it said last.
pub fn status(daemon: &Daemon) -> BalanceStatus {
    let config = daemon.config().balance.clone();
    BalanceStatus {
        mode: shown(config.mode),
        eagerness: config.eagerness.level(),
        interval_s: config.interval.as_secs(),
        is_here: daemon.leader.is_leader(),
        last: daemon.rounds.get(&LAST.to_owned()).map(|round| BalanceRound::clone(&round)),
    }
}

/// Rounds in which something should move, newest first.
pub fn history(daemon: &Daemon, limit: usize) -> Vec<BalanceRound> {
    let rounds = daemon.rounds.all();
    let kept = rounds.iter().rev().filter(|(key, _)| key != LAST);
    kept.take(limit).map(|(_, round)| BalanceRound::clone(round)).collect()
}

fn shown(mode: Mode) -> BalanceMode {
    match mode {
        Mode::Off => BalanceMode::Off,
        Mode::Recommend => BalanceMode::Recommend,
        Mode::Automatic => BalanceMode::Automatic,
    }
}

/// Makes rounds until cancelled.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let mut history = History::default();
    let mut last: Option<Instant> = None;
    while !cancel.is_cancelled() {
        let config = daemon.config().balance.clone();
        let is_due = last.is_none_or(|last| last.elapsed() >= config.interval);
        let is_wanted = config.mode != Mode::Off && daemon.leader.is_leader() && !daemon.nodes.is_removed();
        if is_due && is_wanted && !is_busy(&daemon) {
            last = Some(Instant::now());
            tokio::select! {
                outcome = one(&daemon, &config, &mut history) => {
                    if let Err(problem) = outcome {
                        tracing::warn!(%problem, "a round of balancing was not made");
                    }
                }
                () = cancel.cancelled() => return,
            }
        }
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = cancel.cancelled() => return,
        }
    }
}

/// While VMs are on their way by a plan, what hosts show is not how they will be.
fn is_busy(daemon: &Daemon) -> bool {
    daemon
        .jobs
        .records()
        .iter()
        .any(|record| !record.job.state.is_final() && matches!(record.work, Work::Balance { .. } | Work::Drain { .. }))
}

/// One round that comes by itself.
async fn one(daemon: &Arc<Daemon>, config: &BalanceConfig, history: &mut History) -> Result<()> {
    let guard = daemon.leader.guard()?;
    history.read(daemon).await?;
    let mut world = match look(daemon, config.watch).await {
        Ok(world) => world,
        Err(problem) => {
            let failed = BalanceRound { error: Some(problem.detail), ..empty(daemon, "balance", config.mode) };
            return keep(daemon, &failed, guard).await;
        }
    };
    history.expect(daemon, &mut world).await?;
    let (plan, report, mut memory) = round(&world, &policy(config), &history.memory);
    sound(&world, &plan)?;
    let recommended = (0..plan.steps.len()).filter(|at| !report.automatic.contains(at));
    let stay: Vec<Uuid> = recommended.map(|at| plan.steps[at].vm).collect();
    memory.forget_moves(&stay);
    let mut told = describe(daemon, "balance", config.mode, (&world, &plan, &report));
    let chosen = part(&plan, &report.automatic);
    if !chosen.steps.is_empty() {
        let job = submit(daemon, chosen, config.parallel, "balance", guard.clone()).await?;
        told.job = Some(job.id);
    }
    daemon.kv.put(MEMORY_KEY, &memory).await?;
    history.memory = memory;
    if told.job.is_none() && !told.moves.is_empty() {
        let text = format!("{} VMs should move for the sake of load: virtward balance history", told.moves.len());
        let note = Note::new(Severity::Info, "balance-recommended", text)
            .says(Said::from(Saying::BalanceRecommended).with("count", told.moves.len()));
        daemon.events.add(note.about("balance", false));
    }
    keep(daemon, &told, guard).await
}

/// How eagerly, as configured.
fn policy(config: &BalanceConfig) -> Policy {
    Policy {
        mode: config.mode,
        eagerness: config.eagerness,
        hold: config.hold,
        min_gain_percent: config.min_gain_percent,
        link: config.link.0.max(1),
        ..Policy::default()
    }
}

/// A look and a plan for somebody who asks now: there is no history to hold against it.
pub async fn ask(
    daemon: &Arc<Daemon>,
    eagerness: Option<u8>,
    watch: Duration,
    by: &str,
) -> Result<(BalanceRound, Plan)> {
    let config = daemon.config().balance.clone();
    let eagerness = eagerness.and_then(Eagerness::new).unwrap_or(config.eagerness);
    let world = look(daemon, watch).await?;
    let policy = Policy { mode: Mode::Automatic, eagerness, hold: Some(1), ..policy(&config) };
    let (plan, report, _) = round(&world, &policy, &Memory::default());
    sound(&world, &plan)?;
    Ok((describe(daemon, by, Mode::Recommend, (&world, &plan, &report)), plan))
}

/// Asks for the job that carries a plan out.
pub async fn submit(daemon: &Daemon, plan: Plan, parallel: usize, by: &str, guard: Vec<Compare>) -> Result<Job> {
    let origin = Origin { by: by.to_owned(), policy: None, due: None, attempt: 1, after: None };
    let new = NewJob::without_repository(Work::Balance { plan, parallel }, None, origin);
    Ok(daemon.jobs.submit(new, &daemon.here(), None, guard).await?.0)
}

/// All hosts that answer, with the administrator's rules. What a host that does not answer has is left out with it:
/// nothing goes there or comes from there.
async fn look(daemon: &Arc<Daemon>, watch: Duration) -> Result<World> {
    let fleet = daemon.fleet();
    let up: Vec<String> =
        fleet.hosts.iter().filter(|(_, host)| host.state == HostState::Up).map(|(node, _)| node.clone()).collect();
    let mut all = Vec::new();
    let mut failed = None;
    for node in up {
        match reach::destination(daemon, &node).await {
            Ok(to) => all.push((node, to)),
            Err(problem) => failed = Some(problem),
        }
    }
    let surveyed: Vec<Surveyed> = all
        .iter()
        .map(|(node, to)| Surveyed {
            hypervisor: to.hypervisor.clone(),
            closed: drained::closed(daemon, node),
            with_inactive: false,
        })
        .collect();
    let world = match failed {
        Some(problem) => Err(problem),
        None => survey(&surveyed, watch).await.map_err(|error| failures::engine(&error)),
    };
    reach::close(daemon, all).await;
    let mut world = world?;
    if let Some(rules) = rules_of(daemon)? {
        for name in rules.apply(&mut world) {
            tracing::debug!(name, "the rules name what is not there");
        }
    }
    Ok(world)
}

fn sound(world: &World, plan: &Plan) -> Result<()> {
    match placement::check(world, plan).first() {
        None => Ok(()),
        Some(wrong) => Err(Problem::new(Code::Internal, format!("the plan that was made is wrong: {wrong}"))
            .hint("nothing was moved; please report this with the output of virtward inventory export")),
    }
}

fn empty(daemon: &Daemon, by: &str, mode: Mode) -> BalanceRound {
    BalanceRound {
        at: Timestamp::now(),
        by: by.to_owned(),
        node: daemon.nodes.me.name.clone(),
        mode: shown(mode),
        hosts: Vec::new(),
        moves: Vec::new(),
        left: Vec::new(),
        nothing: None,
        job: None,
        error: None,
    }
}

fn describe(daemon: &Daemon, by: &str, mode: Mode, (world, plan, report): (&World, &Plan, &Report)) -> BalanceRound {
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let hosts = loads(world, &after(world, plan)).into_iter().map(|load| BalanceHost {
        closed: world.hosts.iter().find(|host| host.name == load.host).and_then(|host| host.why.clone()),
        host: load.host.0,
        cpu_percent: load.cpu_percent[0],
        cpu_percent_after: load.cpu_percent[1],
        memory_percent: load.memory_percent[0],
        memory_percent_after: load.memory_percent[1],
        vms: number(load.vms[0]),
        vms_after: number(load.vms[1]),
    });
    let size = |vm: Uuid| world.vms.iter().find(|of| of.id == vm).map_or(0, |of| of.size.memory.0);
    let moves = plan.steps.iter().map(|step| PlannedMove {
        vm: VmRef { uuid: step.vm, name: step.name.clone() },
        from: step.from.0.clone(),
        to: step.to.0.clone(),
        memory_bytes: size(step.vm),
        after: step.after.iter().map(|at| plan.steps[*at].name.clone()).collect(),
        why: step.why.to_string(),
    });
    let left = report.plan.set_aside.iter().map(|aside| VmLeft {
        vm: VmRef { uuid: aside.vm, name: aside.name.clone() },
        reasons: vec![format!("{}: {}", aside.wanted, aside.because)],
        choices: Vec::new(),
    });
    BalanceRound {
        hosts: hosts.collect(),
        moves: moves.collect(),
        left: left.collect(),
        nothing: report.nothing.clone(),
        ..empty(daemon, by, mode)
    }
}

/// Keeps a round: as the last one, and for later if something should move.
async fn keep(daemon: &Daemon, told: &BalanceRound, guard: Vec<Compare>) -> Result<()> {
    let mut ops = vec![kv::put(&format!("{PREFIX}{LAST}"), told)?];
    let key = format!("{:015}", told.at.as_millisecond());
    if !told.moves.is_empty() {
        ops.push(kv::put(&format!("{PREFIX}{key}"), told)?);
    }
    let Some(revision) = daemon.kv.commit(guard, ops).await? else { return Ok(()) };
    daemon.rounds.put(LAST.into(), revision, told.clone());
    if !told.moves.is_empty() {
        daemon.rounds.put(key, revision, told.clone());
    }
    daemon.hub.send("inventory", "balance", told);
    let kept: Vec<String> = daemon.rounds.all().into_iter().map(|(key, _)| key).filter(|key| key != LAST).collect();
    let old = kept.len().saturating_sub(KEPT_MAX);
    let keys: Vec<String> = kept[..old].iter().map(|key| format!("{PREFIX}{key}")).collect();
    if let Some(revision) = daemon.kv.delete(&keys).await? {
        kept[..old].iter().for_each(|key| daemon.rounds.delete(key, revision));
    }
    Ok(())
}

impl History {
    /// Reads what another leader remembered.
    async fn read(&mut self, daemon: &Daemon) -> Result<()> {
        let epoch = daemon.leader.epoch().map(|epoch| epoch.0);
        if self.of == epoch && epoch.is_some() {
            return Ok(());
        }
        self.memory = daemon.kv.get::<Memory>(MEMORY_KEY).await?.map(|(memory, _)| memory).unwrap_or_default();
        let weekly = daemon.kv.list::<Weekly>(WEEKLY_KEY).await?;
        let of = |(key, weekly): (String, Weekly)| Some((key.rsplit('/').next()?.parse().ok()?, (weekly, usize::MAX)));
        self.weekly = weekly.into_iter().filter_map(of).collect();
        self.of = epoch;
        Ok(())
    }

    /// Sees what VMs want now, and has the world want what it will soon.
    async fn expect(&mut self, daemon: &Daemon, world: &mut World) -> Result<()> {
        let hour = usize::try_from(Timestamp::now().as_second() / 3600).unwrap_or_default();
        let mut ended = Vec::new();
        for vm in &mut world.vms {
            let (weekly, seen) = self.weekly.entry(vm.id).or_default();
            weekly.observe(hour, vm.demand.cpu_milli);
            vm.demand.cpu_milli = weekly.demand(vm.demand.cpu_milli, hour, AHEAD, vm.size.cpu_milli);
            // An hour's peak is known when the next one has begun.
            if std::mem::replace(seen, hour) != hour {
                ended.push((vm.id, weekly.clone()));
            }
        }
        for (vm, weekly) in ended {
            daemon.kv.put(&format!("{WEEKLY_KEY}{vm}"), &weekly).await?;
        }
        Ok(())
    }
}
