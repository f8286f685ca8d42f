//! `virtward balance apply`: the steps of a plan, each as soon as those that it waits for have succeeded.

use std::collections::BTreeMap;

use serde::Serialize;
use virtward_decide::placement::{Plan, Step};
use virtward_engine::{Destination, Migrated, Pace, carry_out, migrate_vm};
use virtward_model::world::HostName;

use super::{ApplyArgs, plan, show};
use crate::{
    app::App,
    commands::{
        vm::migrate::line,
        world::{Looked, Source, look},
    },
    connect,
    exit::{Failure, Kind},
    out, render,
};

/// What became of a plan.
#[derive(Debug, Serialize)]
struct Applied {
    plan: Plan,
    moved: Vec<Migrated>,
    failed: Vec<Failed>,
    /// Steps, by index, that did not start: what they wait for failed, or the time was over.
    not_started: Vec<usize>,
}

#[derive(Debug, Serialize)]
struct Failed {
    step: usize,
    vm: String,
    to: HostName,
    error: String,
}

/// Plans and moves.
pub async fn run(app: &App, args: &ApplyArgs) -> Result<(), Failure> {
    let source = Source { hosts: args.hosts.clone(), snapshot: None, rules: args.rules.clone() };
    let looked = look(app, &source).await?;
    let outcome = apply(app, args, &looked).await;
    let world = looked.close().await;
    let (planned, applied) = outcome?;
    if app.json {
        out::json(&applied)?;
    } else {
        let mut text: String = applied.moved.iter().map(|moved| line(moved) + "\n").collect();
        for failed in &applied.failed {
            text +=
                &(render::printable(&format!("{} did not go to {}: {}", failed.vm, failed.to, failed.error)) + "\n");
        }
        text += &show::aside(&planned.report.plan.set_aside);
        if let Some(nothing) = &planned.report.nothing {
            text += &(render::printable(&format!("nothing moves: {nothing}")) + "\n");
        }
        out::text(&(text + &show::failover(&world, &planned.failover)))?;
    }
    if app.cancel.is_cancelled() {
        return Err(Failure::new(Kind::Cancelled, "cancelled; each VM runs where it was or where it arrived"));
    }
    match applied.failed.len() + applied.not_started.len() {
        0 => Ok(()),
        left => Err(Failure::new(Kind::Partial, format!("{left} of {} moves were not made", applied.plan.steps.len()))
            .hint("what was moved is right as it is; plan again: virtward balance plan")),
    }
}

async fn apply(app: &App, args: &ApplyArgs, looked: &Looked) -> Result<(super::Planned, Applied), Failure> {
    let planned = plan(&looked.world, args.eager)?;
    reachable(&planned.plan, &looked.hosts)?;
    let pace = Pace {
        parallel: usize::from(args.parallel),
        within: args.within.map(|limit| limit.unsigned_abs()),
        first: &[],
    };
    let carried = carry_out(&planned.plan, &pace, &app.cancel, async |step: &Step| {
        let outcome = one(app, args, &looked.hosts, step).await;
        if let Err(failure) = &outcome {
            app.progress.warn(&format!("{} stays on {}: {failure}", step.name, step.from));
        }
        outcome
    })
    .await;
    let told = |(at, failure): &(usize, Failure)| {
        let step = &planned.plan.steps[*at];
        Failed { step: *at, vm: step.name.clone(), to: step.to.clone(), error: failure.to_string() }
    };
    let applied = Applied {
        plan: planned.plan.clone(),
        moved: carried.done.into_iter().map(|(_, migrated)| migrated).collect(),
        failed: carried.failed.iter().map(told).collect(),
        not_started: carried.not_started.into_iter().collect(),
    };
    Ok((planned, applied))
}

async fn one(
    app: &App,
    args: &ApplyArgs,
    hosts: &BTreeMap<HostName, Destination>,
    step: &Step,
) -> Result<Migrated, Failure> {
    let (Some(from), Some(to)) = (hosts.get(&step.from), hosts.get(&step.to)) else {
        return Err(Failure::new(Kind::Other, format!("{} or {} is not connected", step.from, step.to)));
    };
    let env = connect::env(app, from.hypervisor.clone());
    let mut options = args.how.options();
    options.passage = Some(std::sync::Arc::new(crate::commands::ha::Passage::of(app, false)));
    let migrated = migrate_vm(&env, &step.vm.to_string(), to, &options, &*app.progress, &app.cancel).await;
    app.progress.finish(&step.name);
    migrated.map_err(Failure::from)
}

/// The source's libvirt talks to the destination's: a URI that is local here leads it to itself.
fn reachable(plan: &Plan, hosts: &BTreeMap<HostName, Destination>) -> Result<(), Failure> {
    let local = |step: &&Step| hosts.get(&step.to).is_some_and(|to| virtward_hypervisor::host_of(&to.uri).is_none());
    match plan.steps.iter().find(local) {
        None => Ok(()),
        Some(step) => Err(Failure::new(
            Kind::Refused,
            format!(
                "{} should go to {}, which is named by a URI that only leads there from itself",
                step.name, step.to
            ),
        )
        .hint(format!("name it as the others reach it: --connect qemu+ssh://{}/system", step.to))),
    }
}
