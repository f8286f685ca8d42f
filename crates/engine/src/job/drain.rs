//! Emptying a host: every VM that runs there goes to another host, several at a time, those that matter most first. What
//! cannot go is named with its reasons and the choices that remain.
//!
//! Where each goes is [`placement`]'s to say, as for balance and failover: rules, reservations, room that is true at every
//! step, others that make room. The checks before a migration (CPU, machine type, disks, devices) are made of each VM and
//! host beforehand and told to the planner as what a host offers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use uuid::Uuid;
use virtward_decide::{
    admission,
    migration::{Finding, blockers},
    placement::{self, Because, Goal, Plan, Reason, SetAside, Step, WhyNot, rules::Rules},
};
use virtward_model::world::{HostName, HostState, Priority, World};

use super::steps::{Pace, carry_out};
use crate::{
    Cancel, Env, Error, Event, Observer, Result,
    job::migrate::{Destination, MigrateOptions, Migrated, MigrationPlan, migrate_vm, plan_migration},
    survey::{Surveyed, survey},
};

/// What a host offers that a VM's checks found fit.
const FITS: &str = "fits:";

/// Options of [`drain_host`].
#[derive(Clone, Debug)]
pub struct DrainOptions {
    /// How each VM moves.
    pub migrate: MigrateOptions,
    /// VMs that move at the same time.
    pub parallel: usize,
    /// VMs that go first, in this order; the others follow by priority, large ones first.
    pub first: Vec<String>,
    /// Nothing begins after this time.
    pub timeout: Option<Duration>,
    /// Move definitions of VMs that are off, too.
    pub with_inactive: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// What the administrator says of VMs and hosts.
    pub rules: Option<Arc<Rules>>,
    /// For how long to watch what VMs use.
    pub interval: Duration,
}

impl Default for DrainOptions {
    fn default() -> Self {
        Self {
            migrate: MigrateOptions { backups_give_way: true, ..MigrateOptions::default() },
            parallel: 2,
            first: Vec::new(),
            timeout: None,
            with_inactive: false,
            dry_run: false,
            rules: None,
            interval: Duration::from_secs(1),
        }
    }
}

/// What a drain is to do.
#[derive(Clone, Debug)]
pub struct Evacuation {
    /// The host.
    pub host: String,
    /// Its steps; those of other hosts' VMs make room.
    pub plan: Plan,
    /// The same, for people.
    pub moves: Vec<Assigned>,
    /// What stays, and why.
    pub left: Vec<Left>,
    /// What else should be known.
    pub warnings: Vec<String>,
}

/// What a drain came to, or would.
#[derive(Clone, Debug, Serialize)]
pub struct Drained {
    /// The host.
    pub host: String,
    /// Nothing was done.
    pub dry_run: bool,
    /// What goes where, in the order in which it begins.
    pub plan: Vec<Assigned>,
    /// What arrived.
    pub moved: Vec<Migrated>,
    /// What is still there, and why.
    pub left: Vec<Left>,
    /// What else should be known.
    pub warnings: Vec<String>,
}

/// One VM of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct Assigned {
    /// VM.
    pub vm: String,
    /// UUID.
    pub uuid: Uuid,
    /// Where it is: the host itself, or another one that makes room.
    pub from: String,
    /// Host.
    pub to: String,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// VMs that must have moved before.
    pub after: Vec<String>,
    /// Why, in words.
    pub why: String,
}

/// A VM that stays.
#[derive(Clone, Debug, Serialize)]
pub struct Left {
    /// VM.
    pub vm: String,
    /// UUID.
    pub uuid: Uuid,
    /// Why, per host that was tried.
    pub reasons: Vec<String>,
    /// What can be done about it.
    pub choices: Vec<String>,
}

/// Says what a drain would do. Changes nothing.
pub async fn plan_drain(env: &Env, destinations: &[Destination], options: &DrainOptions) -> Result<Evacuation> {
    let (mut world, host) = look(env, destinations, options).await?;
    let checks = check_all(env, destinations, options, &mut world, &host).await?;
    let mut warnings = Vec::new();
    if let Some(rules) = &options.rules {
        let unknown = rules.apply(&mut world);
        warnings.extend(unknown.iter().map(|name| format!("the rules name {name}, which is not there")));
    }
    for vm in world.vms.iter_mut().filter(|vm| options.first.contains(&vm.name)) {
        vm.priority = Priority::new(1).unwrap_or_default();
    }
    // An administrator insists; what that costs is told.
    let goal = Goal { give_up_failover_room: true, only_leaving: true, ..Goal::default() };
    let (plan, report) = placement::plan(&world, &goal);
    if let Some(wrong) = placement::check(&world, &plan).first() {
        return Err(Error::Refused(format!(
            "the plan that was made is wrong: {wrong}; nothing was moved; report this with the output of virtward \
             inventory export"
        )));
    }
    warnings.extend(lost_room(&world, &plan, &host));
    let ours = report.set_aside.iter().filter(|aside| aside.host == host);
    Ok(Evacuation {
        moves: moves(&world, &plan, options),
        left: ours.map(|aside| stuck(aside, checks.get(&aside.vm))).collect(),
        host: host.0,
        plan,
        warnings,
    })
}

/// Moves every running VM away.
pub async fn drain_host(
    env: &Env,
    destinations: &[Destination],
    options: &DrainOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<Drained> {
    let evacuation = plan_drain(env, destinations, options).await?;
    let Evacuation { host, plan, moves, mut left, warnings } = evacuation;
    warnings.iter().for_each(|text| observer.event(&host, Event::Warning(text)));
    let mut moved = Vec::new();
    if !options.dry_run {
        let named = names(destinations).await?;
        let step = |step: &Step| {
            let (id, name) = (step.vm.to_string(), step.name.clone());
            let to = named.get(&step.to).copied();
            let from = named.get(&step.from).copied();
            async move {
                let Some(to) = to else { return Err(format!("{name} should go to a host that is not connected")) };
                let env = from.map_or_else(|| env.clone(), |from| at(env, from));
                migrate_vm(&env, &id, to, &options.migrate, observer, cancel).await.map_err(|error| {
                    let text = error.to_string();
                    observer.event(&name, Event::Warning(&text));
                    text
                })
            }
        };
        let pace = Pace { parallel: options.parallel, within: options.timeout, first: &options.first };
        let carried = carry_out(&plan, &pace, cancel, step).await;
        let late = carried.late;
        moved = carried.done.into_iter().map(|(_, migrated)| migrated).collect();
        left.extend(carried.failed.iter().map(|(at, why)| stays(&plan.steps[*at], why)));
        let why = match (late, cancel.is_cancelled()) {
            (true, _) => "its turn did not come within --within",
            (_, true) => "cancelled",
            _ => "what it waits for did not move",
        };
        left.extend(carried.not_started.iter().map(|at| stays(&plan.steps[*at], why)));
    }
    Ok(Drained { host, dry_run: options.dry_run, plan: moves, moved, left, warnings })
}

/// A job's environment at another host.
fn at(env: &Env, host: &Destination) -> Env {
    Env { hypervisor: host.hypervisor.clone(), uri: host.uri.clone(), ..env.clone() }
}

async fn names(destinations: &[Destination]) -> Result<BTreeMap<HostName, &Destination>> {
    let mut named = BTreeMap::new();
    for to in destinations {
        let host = to.hypervisor.host().await.map_err(Error::hyper("ask a destination who it is"))?;
        named.insert(HostName(host.name), to);
    }
    Ok(named)
}

/// All hosts as they are; the first one is to be empty.
async fn look(env: &Env, destinations: &[Destination], options: &DrainOptions) -> Result<(World, HostName)> {
    let first = Surveyed {
        hypervisor: env.hypervisor.clone(),
        closed: Some("it is drained".into()),
        with_inactive: options.with_inactive,
    };
    let others = destinations.iter().map(|to| Surveyed {
        hypervisor: to.hypervisor.clone(),
        closed: None,
        with_inactive: false,
    });
    let surveyed: Vec<Surveyed> = std::iter::once(first).chain(others).collect();
    let world = survey(&surveyed, options.interval).await?;
    let host = world.hosts[0].name.clone();
    Ok((world, host))
}

/// The checks of each VM against each host, by VM and host; the world is told of them.
type Checks = BTreeMap<Uuid, BTreeMap<HostName, MigrationPlan>>;

async fn check_all(
    env: &Env,
    destinations: &[Destination],
    options: &DrainOptions,
    world: &mut World,
    host: &HostName,
) -> Result<Checks> {
    let mut checks = Checks::new();
    let World { hosts, vms, .. } = world;
    for vm in vms.iter_mut().filter(|vm| vm.host.as_ref() == Some(host)) {
        let label = format!("{FITS}{}", vm.id);
        for (to, there) in destinations.iter().zip(hosts.iter_mut().skip(1)) {
            let plan = plan_migration(env, &vm.id.to_string(), to, &options.migrate).await?;
            if standing(&plan, options).next().is_none() {
                there.offers.insert(label.clone());
            }
            checks.entry(vm.id).or_default().insert(there.name.clone(), plan);
        }
        // They looked closer than the survey.
        vm.requires = BTreeSet::from([label]);
        vm.stuck = None;
    }
    Ok(checks)
}

/// What stands in a VM's way. A backup gives way when its turn comes, and memory is the planner's to count.
fn standing<'a>(plan: &'a MigrationPlan, options: &DrainOptions) -> impl Iterator<Item = &'a Finding> {
    let gives_way = options.migrate.backups_give_way;
    blockers(&plan.findings).filter(move |finding| {
        let is_backup = gives_way && finding.check == "job" && finding.text.starts_with("a backup");
        !is_backup && finding.check != "memory"
    })
}

/// What the cluster could bear before and cannot while the host is out.
fn lost_room(world: &World, plan: &Plan, host: &HostName) -> Option<String> {
    let before = admission::check(world);
    let mut after = world.clone();
    for step in &plan.steps {
        after.vms.iter_mut().filter(|vm| vm.id == step.vm).for_each(|vm| vm.host = Some(step.to.clone()));
    }
    after.hosts.iter_mut().filter(|of| of.name == *host).for_each(|of| of.state = HostState::Maintenance);
    admission::is_worse(&before, &admission::check(&after))
        .then(|| format!("while {host} is out, not every failure that room is kept for can be survived"))
}

fn moves(world: &World, plan: &Plan, options: &DrainOptions) -> Vec<Assigned> {
    let mut moves: Vec<Assigned> = plan
        .steps
        .iter()
        .map(|step| {
            let vm = world.vms.iter().find(|vm| vm.id == step.vm);
            Assigned {
                vm: step.name.clone(),
                uuid: step.vm,
                from: step.from.0.clone(),
                to: step.to.0.clone(),
                memory_bytes: vm.map_or(0, |vm| vm.size.memory.0),
                after: step.after.iter().map(|at| plan.steps[*at].name.clone()).collect(),
                why: match step.temporary {
                    true => format!("{} (for a while)", step.why),
                    false => step.why.to_string(),
                },
            }
        })
        .collect();
    moves.sort_by_key(|of| options.first.iter().position(|name| *name == of.vm).unwrap_or(usize::MAX));
    moves
}

fn stays(step: &Step, reason: &str) -> Left {
    Left {
        vm: step.name.clone(),
        uuid: step.vm,
        reasons: vec![format!("{}: {reason}", step.to)],
        choices: vec!["run the drain again".into(), format!("virsh shutdown {}", step.name)],
    }
}

/// Why a VM has no place, and what remains.
fn stuck(aside: &SetAside, checks: Option<&BTreeMap<HostName, MigrationPlan>>) -> Left {
    let (mut reasons, mut choices) = (Vec::new(), Vec::new());
    let Because::NoHost { hosts } = &aside.because else {
        return Left {
            vm: aside.name.clone(),
            uuid: aside.vm,
            reasons: vec![aside.because.to_string()],
            choices: last_choices(&aside.name),
        };
    };
    for (why, names) in hosts {
        for name in names.iter().filter(|name| **name != aside.host) {
            let found = checks.and_then(|checks| checks.get(name));
            match (why, found) {
                (WhyNot::Lacks { label }, Some(plan)) if label.starts_with(FITS) => {
                    for finding in blockers(&plan.findings) {
                        reasons.push(format!("{name}: {}: {}", finding.check, finding.text));
                        choices.extend(finding.advice.clone());
                    }
                }
                _ => reasons.push(format!("{name}: {why}")),
            }
        }
    }
    if matches!(aside.wanted, Reason::Evacuate { .. }) && reasons.is_empty() {
        reasons.push("there is no host that takes VMs".into());
    }
    choices.extend(last_choices(&aside.name));
    choices.dedup();
    Left { vm: aside.name.clone(), uuid: aside.vm, reasons, choices }
}

fn last_choices(vm: &str) -> Vec<String> {
    vec![format!("shut it down: virsh shutdown {vm}"), "leave it, and let it stop with the host".to_owned()]
}
