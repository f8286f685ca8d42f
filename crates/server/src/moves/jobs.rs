//! How moves are made: from a job's record to a call of the engine, and what came of it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use uuid::Uuid;
use virtward_api::{
    Code, DrainPlan, DrainRequest, FindingLevel, HaMove, JobResult, MigratePlan, MigrateRequest, MoveDiskRequest,
    MoveFinding, PlannedMove, Principal, PrincipalKind, Problem, Role, VmLeft, VmRef,
};
use virtward_decide::{
    arbiter::Operation,
    migration::{Finding, Level},
    placement::{Plan, rules},
};
use virtward_engine::{
    Assigned, Cancel, Destination, DiskPlace, DrainOptions, Env, Evacuation, Event, Left, MigrateOptions, Migrated,
    MoveDiskOptions, Observer, Pace, migrate_vm, move_disk as move_disk_of, plan_drain, plan_migration,
};
use virtward_model::Bytes;

use super::{
    carry::{Carrier, Outcome},
    drained, reach,
};
use crate::{
    cluster::fleet::Placed,
    daemon::Daemon,
    failures::{self, Result},
    jobs::record::{Record, Work},
};

/// VMs that a drain moves at the same time, unless said otherwise.
const PARALLEL: u8 = 2;

/// High availability, told by this daemon itself.
struct Passage {
    daemon: Arc<Daemon>,
    /// Also if room is taken away that is kept for host failures.
    force: bool,
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passage").finish_non_exhaustive()
    }
}

impl Passage {
    async fn tell(&self, vm: Uuid, to: &str, has_moved: Option<bool>) -> Result<(), String> {
        match crate::ha::explain(&self.daemon, &vm.to_string()) {
            Ok(_) => {}
            // No part in high availability, or not protected.
            Err(problem) if matches!(problem.code, Code::NotFound | Code::Conflict) => return Ok(()),
            Err(problem) => return Err(problem.detail),
        }
        let how = HaMove { to: to.to_owned(), has_moved, force: self.force };
        let path = format!("/api/v1/ha/vms/{vm}/move");
        let told = crate::ha::moving(&self.daemon, &vm.to_string(), &how, &daemon_itself(), &path).await;
        told.map(drop).map_err(|problem| problem.detail)
    }
}

#[async_trait]
impl virtward_engine::Passage for Passage {
    async fn announce(&self, vm: Uuid, to: &str) -> Result<(), String> {
        self.tell(vm, to, None).await
    }

    async fn settle(&self, vm: Uuid, to: &str, has_moved: bool) -> Result<(), String> {
        self.tell(vm, to, Some(has_moved)).await
    }
}

fn daemon_itself() -> Principal {
    Principal {
        name: "virtward".into(),
        kind: PrincipalKind::Local,
        role: Role::Admin,
        vm_tags: Vec::new(),
        expires: None,
        csrf_token: None,
    }
}

/// Options of a migration that was asked for; what was not said is as configured.
fn options(daemon: &Arc<Daemon>, request: &MigrateRequest, node: &str, force: bool) -> MigrateOptions {
    let moves = daemon.config().moves.clone();
    let name = reach::certified(daemon, node);
    let mut options = MigrateOptions {
        bandwidth: request.bandwidth_bytes_s.map(Bytes).or(moves.bandwidth),
        with_storage: request.with_storage,
        unsafe_cache: request.unsafe_cache,
        parallel: moves.connections,
        tls: moves.tls || name.is_some(),
        tls_name: name,
        closed: drained::closed(daemon, node),
        passage: Some(Arc::new(Passage { daemon: daemon.clone(), force })),
        ..MigrateOptions::default()
    };
    options.pace.max_downtime_ms = request.max_downtime_ms.unwrap_or(options.pace.max_downtime_ms).max(1);
    options.pace.postcopy_after_ms = request.postcopy_after_s.map(|s| s.saturating_mul(1000));
    options.pace.timeout_ms = request.timeout_s.map(|s| s.saturating_mul(1000));
    options
}

/// What stands in a migration's way.
pub async fn migrate_plan(daemon: &Arc<Daemon>, placed: &Placed, request: &MigrateRequest) -> Result<MigratePlan> {
    let node = reach::node_of(daemon, &request.to)?;
    let to = reach::destination(daemon, &node).await?;
    let vm = placed.view.vm.uuid.to_string();
    let planned = plan_migration(&daemon.env()?, &vm, &to, &options(daemon, request, &node, request.force)).await;
    reach::close(daemon, [(node, to)]).await;
    let planned = planned.map_err(|error| failures::engine(&error))?;
    Ok(MigratePlan {
        vm: VmRef { uuid: planned.uuid, name: planned.vm },
        from: planned.from,
        to: planned.to,
        is_possible: planned.possible,
        findings: planned.findings.into_iter().map(finding).collect(),
        copy: planned.copy,
        memory_bytes: planned.memory_bytes,
    })
}

fn finding(finding: Finding) -> MoveFinding {
    let level = match finding.level {
        Level::Fine => FindingLevel::Fine,
        Level::Warning => FindingLevel::Warning,
        Level::Blocker => FindingLevel::Blocker,
    };
    MoveFinding { check: finding.check, level, text: finding.text, advice: finding.advice }
}

/// Moves a VM.
pub async fn migrate(
    daemon: &Arc<Daemon>,
    record: &Record,
    (request, operation): (&MigrateRequest, Operation),
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<JobResult> {
    let Some(vm) = &record.job.vm else { return Err(Problem::new(Code::Internal, "a migration of no VM")) };
    let node = reach::node_of(daemon, &request.to)?;
    let env = daemon.env()?;
    let here = env.hypervisor.lookup(&vm.uuid.to_string()).await;
    let runs_here = here.as_ref().is_ok_and(|vm| vm.state.is_active());
    if node == daemon.nodes.me.name && runs_here {
        return Ok(JobResult { to: Some(request.to.clone()), ..JobResult::default() });
    }
    if operation != Operation::Migrate && !runs_here {
        // A step of a plan: the one before it may have ended a moment ago.
        return Err(Problem::new(Code::Busy, format!("{} does not run on {} (yet)", vm.name, daemon.host_name())));
    }
    let to = reach::destination(daemon, &node).await?;
    // A drain was judged as a whole: on the way its host still counts as one that may fail.
    let mut options = options(daemon, request, &node, request.force || operation == Operation::Drain);
    options.backups_give_way = operation == Operation::Drain;
    let migrated = migrate_vm(&env, &vm.uuid.to_string(), &to, &options, observer, cancel).await;
    reach::close(daemon, [(node, to)]).await;
    daemon.inventory.look_again();
    let migrated = migrated.map_err(|error| failures::engine(&error))?;
    for gate in migrated.gates.iter().filter(|gate| gate.level != Level::Fine) {
        observer.event(&vm.name, Event::Warning(&format!("{}: {}", gate.check, gate.text)));
    }
    daemon.metrics.migrated(&migrated);
    Ok(of_migrated(migrated))
}

fn of_migrated(migrated: Migrated) -> JobResult {
    JobResult {
        from: Some(migrated.from),
        to: Some(migrated.to),
        downtime_ms: migrated.downtime_ms,
        total_ms: Some(migrated.total_ms),
        sent_bytes: Some(migrated.sent_bytes),
        ..JobResult::default()
    }
}

/// Moves a disk.
pub async fn move_disk(
    daemon: &Daemon,
    record: &Record,
    request: &MoveDiskRequest,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<JobResult> {
    let Some(vm) = &record.job.vm else { return Err(Problem::new(Code::Internal, "a disk of no VM")) };
    let to = match request.to.contains('/') {
        true => DiskPlace::File(request.to.clone()),
        false => DiskPlace::Pool(request.to.clone()),
    };
    let options = MoveDiskOptions {
        format: request.format.clone(),
        bandwidth: request.bandwidth_bytes_s.map(Bytes),
        keep_source: request.keep_source,
    };
    let env = daemon.env()?;
    let moved = move_disk_of(&env, &vm.uuid.to_string(), &request.disk, &to, &options, observer, cancel).await;
    daemon.inventory.look_again();
    let moved = moved.map_err(|error| failures::engine(&error))?;
    Ok(JobResult { from: Some(moved.from), to: Some(moved.to), total_ms: Some(moved.total_ms), ..JobResult::default() })
}

/// Every other host of the cluster that takes VMs, and why the others do not.
async fn takers(daemon: &Daemon) -> (Vec<(String, Destination)>, Vec<String>) {
    let (mut all, mut why_not) = (Vec::new(), Vec::new());
    for (node, host) in daemon.fleet().hosts.iter().filter(|(node, _)| **node != daemon.nodes.me.name) {
        if host.state != virtward_api::HostState::Up {
            why_not.push(format!("{} is left out: it does not answer", host.name));
        } else if let Some(why) = drained::closed(daemon, node) {
            why_not.push(why);
        } else {
            match reach::destination(daemon, node).await {
                Ok(to) => all.push((node.clone(), to)),
                Err(problem) => why_not.push(problem.detail),
            }
        }
    }
    (all, why_not)
}

/// The administrator's rules, read anew each time.
pub fn rules_of(daemon: &Daemon) -> Result<Option<Arc<rules::Rules>>> {
    let Some(path) = daemon.config().moves.rules.clone() else { return Ok(None) };
    let bad = |why: String| {
        Problem::new(Code::Conflict, format!("the rules in {} cannot be used: {why}", path.display()))
            .hint("mend the file that [moves] rules in the configuration names (docs/balance.md)")
    };
    let text = std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    rules::parse(&text).map(Arc::new).map(Some).map_err(bad)
}

async fn evacuation(daemon: &Arc<Daemon>, request: &DrainRequest) -> Result<(Evacuation, DrainOptions)> {
    let options = DrainOptions {
        migrate: MigrateOptions { backups_give_way: true, ..MigrateOptions::default() },
        parallel: usize::from(request.parallel.unwrap_or(PARALLEL)),
        first: request.first.clone(),
        timeout: request.within_s.map(Duration::from_secs),
        with_inactive: request.with_inactive,
        dry_run: request.dry_run,
        rules: rules_of(daemon)?,
        ..DrainOptions::default()
    };
    let env: Env = daemon.env()?;
    let (all, why_not) = takers(daemon).await;
    let destinations: Vec<Destination> = all.iter().map(|(_, to)| to.clone()).collect();
    let planned = plan_drain(&env, &destinations, &options).await;
    reach::close(daemon, all).await;
    let mut planned = planned.map_err(|error| failures::engine(&error))?;
    planned.warnings.extend(why_not);
    Ok((planned, options))
}

/// The job that empties a node now, if one does.
pub fn draining(daemon: &Daemon, node: &str) -> Option<Uuid> {
    let empties = |record: &Record| {
        matches!(record.work, Work::Drain { .. }) && record.node == node && !record.job.state.is_final()
    };
    daemon.jobs.records().iter().find(|record| empties(record)).map(|record| record.job.id)
}

/// Refuses to empty a host if the others would then have no room for the host failures that are to be survived.
pub fn may_drain(daemon: &Daemon, node: &str, force: bool) -> Result<()> {
    match crate::ha::capacity(daemon, &crate::ha::If::Without(node.to_owned())).map(|found| found.refused) {
        Ok(Some(why)) if !force => {
            let text = format!("emptying {node} would take room away that is kept for host failures: {why}");
            Err(Problem::new(Code::Conflict, text)
                .hint("virtward ha capacity --without HOST shows the room there would be; force does it all the same"))
        }
        // Also where high availability takes no part.
        _ => Ok(()),
    }
}

/// What draining this host would do.
pub async fn drain_plan(daemon: &Arc<Daemon>, request: &DrainRequest) -> Result<DrainPlan> {
    let (mut planned, _) = evacuation(daemon, request).await?;
    if let Err(problem) = may_drain(daemon, &daemon.nodes.me.name, request.force) {
        planned.warnings.push(problem.detail);
    }
    Ok(DrainPlan {
        host: planned.host,
        moves: planned.moves.into_iter().map(planned_move).collect(),
        left: planned.left.into_iter().map(vm_left).collect(),
        warnings: planned.warnings,
    })
}

fn planned_move(of: Assigned) -> PlannedMove {
    PlannedMove {
        vm: VmRef { uuid: of.uuid, name: of.vm },
        from: of.from,
        to: of.to,
        memory_bytes: of.memory_bytes,
        after: of.after,
        why: of.why,
    }
}

fn vm_left(left: Left) -> VmLeft {
    VmLeft { vm: VmRef { uuid: left.uuid, name: left.vm }, reasons: left.reasons, choices: left.choices }
}

/// Empties this host.
pub async fn drain(
    daemon: &Arc<Daemon>,
    record: &Record,
    request: &DrainRequest,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<JobResult> {
    drained::mark(daemon, &daemon.nodes.me.name, &record.job.origin.by).await?;
    let (planned, options) = evacuation(daemon, request).await?;
    planned.warnings.iter().for_each(|text| observer.event("", Event::Warning(text)));
    let sizes = planned.moves.iter().map(|of| (of.uuid, of.memory_bytes)).collect();
    let carrier = Carrier { daemon, parent: record, operation: Operation::Drain, sizes, observer, cancel };
    let pace = Pace { parallel: options.parallel, within: options.timeout, first: &options.first };
    let outcome = carrier.carry(&planned.plan, &pace).await;
    let stays = planned.left.into_iter().map(vm_left);
    ended(cancel, Outcome { left: stays.chain(outcome.left).collect(), ..outcome })
}

/// Carries out a plan of balancing.
pub async fn rebalance(
    daemon: &Arc<Daemon>,
    record: &Record,
    (plan, parallel): (&Plan, usize),
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<JobResult> {
    let sizes = BTreeMap::from_iter(plan.steps.iter().map(|step| (step.vm, 1)));
    let carrier = Carrier { daemon, parent: record, operation: Operation::Balance, sizes, observer, cancel };
    let outcome = carrier.carry(plan, &Pace { parallel, within: None, first: &[] }).await;
    ended(cancel, outcome)
}

fn ended(cancel: &Cancel, outcome: Outcome) -> Result<JobResult> {
    if cancel.is_cancelled() {
        let text = format!("cancelled; {} VMs have moved, the others run where they were", outcome.moved);
        return Err(Problem::new(Code::Cancelled, text));
    }
    Ok(JobResult { moved: Some(outcome.moved), left: outcome.left, ..JobResult::default() })
}
