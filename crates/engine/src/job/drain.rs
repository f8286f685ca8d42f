//! Emptying a host: every VM that runs there goes to another host, several at a time, those that matter most first. What
//! cannot go is named with its reasons and the choices that remain.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use futures::StreamExt;
use serde::Serialize;
use uuid::Uuid;
use virtward_decide::migration::{Finding, blockers, check::needed_memory};
use virtward_model::Vm;

use crate::{
    Cancel, Env, Error, Event, Observer, Result,
    job::migrate::{Destination, MigrateOptions, Migrated, MigrationPlan, migrate_vm, plan_migration},
};

/// Options of [`drain_host`].
#[derive(Clone, Debug)]
pub struct DrainOptions {
    /// How each VM moves.
    pub migrate: MigrateOptions,
    /// VMs that move at the same time.
    pub parallel: usize,
    /// VMs that go first, in this order; the others follow, large ones first.
    pub first: Vec<String>,
    /// Nothing begins after this time.
    pub timeout: Option<Duration>,
    /// Move definitions of VMs that are off, too.
    pub with_inactive: bool,
    /// Only say what would be done.
    pub dry_run: bool,
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
        }
    }
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
}

/// One VM of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct Assigned {
    /// VM.
    pub vm: String,
    /// UUID.
    pub uuid: Uuid,
    /// Host.
    pub to: String,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    #[serde(skip)]
    place: usize,
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

/// Moves every running VM away.
pub async fn drain_host(
    env: &Env,
    destinations: &[Destination],
    options: &DrainOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<Drained> {
    let host = env.hypervisor.host().await.map_err(Error::hyper("ask the host who it is"))?.name;
    let began = tokio::time::Instant::now();
    let all = env.hypervisor.list().await.map_err(Error::hyper("list the VMs"))?;
    let wanted: Vec<Vm> = all.into_iter().filter(|vm| vm.state.is_active() || options.with_inactive).collect();
    let (plan, mut left) = assign(env, destinations, options, wanted).await?;
    let mut drained = Drained { host, dry_run: options.dry_run, plan, moved: Vec::new(), left: Vec::new() };
    if options.dry_run {
        drained.left = left;
        return Ok(drained);
    }
    let failed = Mutex::new(Vec::new());
    let moves = drained.plan.iter().map(|assigned| {
        let (failed, options) = (&failed, &options);
        async move {
            let late = options.timeout.is_some_and(|limit| began.elapsed() > limit);
            if late || cancel.is_cancelled() {
                let why = if late { "its turn did not come within --timeout" } else { "cancelled" };
                failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(stays(assigned, why.to_owned()));
                return None;
            }
            let id = assigned.uuid.to_string();
            let to = &destinations[assigned.place];
            match migrate_vm(env, &id, to, &options.migrate, observer, cancel).await {
                Ok(migrated) => Some(migrated),
                Err(error) => {
                    let text = error.to_string();
                    observer.event(&assigned.vm, Event::Warning(&text));
                    failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(stays(assigned, text));
                    None
                }
            }
        }
    });
    let moved: Vec<Option<Migrated>> =
        futures::stream::iter(moves).buffer_unordered(options.parallel.max(1)).collect().await;
    drained.moved = moved.into_iter().flatten().collect();
    left.extend(failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner));
    drained.left = left;
    Ok(drained)
}

fn stays(assigned: &Assigned, reason: String) -> Left {
    Left {
        vm: assigned.vm.clone(),
        uuid: assigned.uuid,
        reasons: vec![format!("{}: {reason}", assigned.to)],
        choices: vec!["run the drain again".into(), format!("virsh shutdown {}", assigned.vm)],
    }
}

/// Which VM goes where: those named first, then by size; each to the host that has most room left for it.
async fn assign(
    env: &Env,
    destinations: &[Destination],
    options: &DrainOptions,
    wanted: Vec<Vm>,
) -> Result<(Vec<Assigned>, Vec<Left>)> {
    let mut rooms = Vec::new();
    for to in destinations {
        let offer = to.hypervisor.offer().await.map_err(Error::hyper("look at a destination"))?;
        rooms.push(offer.memory_available_bytes);
    }
    let mut plans: Vec<(Vm, BTreeMap<usize, MigrationPlan>)> = Vec::new();
    for vm in wanted {
        let mut of = BTreeMap::new();
        for (place, to) in destinations.iter().enumerate() {
            of.insert(place, plan_migration(env, &vm.uuid.to_string(), to, &options.migrate).await?);
        }
        plans.push((vm, of));
    }
    let rank = |vm: &Vm| options.first.iter().position(|name| name == &vm.name).unwrap_or(usize::MAX);
    let memory = |of: &BTreeMap<usize, MigrationPlan>| of.values().next().map_or(0, |plan| plan.memory_bytes);
    plans.sort_by_key(|(vm, of)| (rank(vm), std::cmp::Reverse(memory(of)), vm.name.clone()));
    let (mut assigned, mut left) = (Vec::new(), Vec::new());
    for (vm, of) in plans {
        let memory_bytes = memory(&of);
        let needed = if vm.state.is_active() { needed_memory(memory_bytes) } else { 0 };
        let fits = of.iter().filter(|(place, plan)| goes(plan, options) && rooms[**place] >= needed);
        match fits.max_by_key(|(place, _)| (rooms[**place], std::cmp::Reverse(**place))) {
            Some((place, plan)) => {
                rooms[*place] -= needed;
                let (place, to) = (*place, plan.to.clone());
                assigned.push(Assigned { vm: vm.name.clone(), uuid: vm.uuid, to, memory_bytes, place });
            }
            None => left.push(stuck(&vm, &of, options)),
        }
    }
    Ok((assigned, left))
}

/// Whether it can go; a backup that holds it gives way when its turn comes.
fn goes(plan: &MigrationPlan, options: &DrainOptions) -> bool {
    standing(plan, options).next().is_none()
}

fn standing<'a>(plan: &'a MigrationPlan, options: &DrainOptions) -> impl Iterator<Item = &'a Finding> {
    let gives_way = options.migrate.backups_give_way;
    blockers(&plan.findings)
        .filter(move |finding| !(gives_way && finding.check == "job" && finding.text.starts_with("a backup")))
}

fn stuck(vm: &Vm, of: &BTreeMap<usize, MigrationPlan>, options: &DrainOptions) -> Left {
    let mut reasons = Vec::new();
    let mut choices = Vec::new();
    for plan in of.values() {
        let mut stands = standing(plan, options).peekable();
        if stands.peek().is_none() {
            reasons.push(format!("{}: the VMs that go there before it take the memory that it needs", plan.to));
        }
        for finding in stands {
            reasons.push(format!("{}: {}: {}", plan.to, finding.check, finding.text));
            choices.extend(finding.advice.clone());
        }
    }
    choices.push(format!("shut it down: virsh shutdown {}", vm.name));
    choices.push("leave it, and let it stop with the host".to_owned());
    choices.dedup();
    Left { vm: vm.name.clone(), uuid: vm.uuid, reasons, choices }
}
