//! Plans for people.

use serde::Serialize;
use uuid::Uuid;
use virtward_decide::{
    admission::{Method, Verdict},
    balance::HostLoad,
    placement::{Line, Outcome, Plan, Request, SetAside, Step, WhyNot, place},
};
use virtward_model::world::{HostName, Resource, World};

use super::{ExplainArgs, Planned, plan};
use crate::{
    app::App,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// A plan, the hosts before and after it, and what stays and why.
pub fn planned(world: &World, planned: &Planned) -> String {
    let mut text = hosts(&planned.hosts);
    text += "\n";
    text += &steps(&planned.plan);
    text += &aside(&planned.report.plan.set_aside);
    if let Some(nothing) = &planned.report.nothing {
        text += &(render::printable(&format!("nothing moves: {nothing}")) + "\n");
    } else if let Some(why) = &planned.report.plan.no_load_moves {
        text += &(render::printable(&format!("nothing moves for load: {why}")) + "\n");
    }
    text + &failover(world, &planned.failover)
}

/// A table of hosts.
pub fn hosts(loads: &[HostLoad]) -> String {
    let mut table = Table::new(&["HOST", "STATE", "CPU", "MEMORY", "VMS"]);
    let change = |[before, after]: [u64; 2], unit: &str| match before == after {
        true => format!("{before}{unit}"),
        false => format!("{before}{unit} → {after}{unit}"),
    };
    for load in loads {
        table.row([
            load.host.to_string(),
            load.state.clone(),
            change(load.cpu_percent, " %"),
            change(load.memory_percent, " %"),
            change(load.vms.map(|count| count as u64), ""),
        ]);
    }
    table.render(out::stdout_is_terminal())
}

/// A table of steps.
pub fn steps(plan: &Plan) -> String {
    if plan.steps.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["STEP", "VM", "FROM", "TO", "AFTER", "WHY"]);
    for (at, step) in plan.steps.iter().enumerate() {
        let after: Vec<String> = step.after.iter().map(|at| (at + 1).to_string()).collect();
        table.row([
            (at + 1).to_string(),
            step.name.clone(),
            step.from.to_string(),
            step.to.to_string(),
            after.join(" "),
            why(step),
        ]);
    }
    table.render(out::stdout_is_terminal())
}

fn why(step: &Step) -> String {
    if step.temporary { format!("{} (for a while)", step.why) } else { step.why.to_string() }
}

/// What should move and does not.
pub fn aside(set_aside: &[SetAside]) -> String {
    let line = |aside: &SetAside| {
        render::printable(&format!("{} stays on {} ({}): {}", aside.name, aside.host, aside.wanted, aside.because))
    };
    set_aside.iter().map(|aside| line(aside) + "\n").collect()
}

/// What the room for failures comes to.
pub fn failover(world: &World, verdict: &Verdict) -> String {
    let unit = if world.failover.domain_level.is_some() { "fault domains" } else { "hosts" };
    let mut text = match (verdict.method, verdict.holds) {
        (Method::NotAsked, _) => return String::new(),
        (Method::TooMany, _) => {
            format!("whether {} failures are survived is not known: too many combinations\n", verdict.failures)
        }
        (_, true) => format!("any {} {unit} may fail: every VM that is to be restarted has room\n", verdict.failures),
        (_, false) => format!("{} of {} failures would not be survived:\n", verdict.losses_total, verdict.scenarios),
    };
    for loss in verdict.losses.iter().take(10) {
        let failed: Vec<String> = loss.failed.iter().map(ToString::to_string).collect();
        let lost: Vec<&str> = loss.lost.iter().map(|lost| lost.name.as_str()).take(10).collect();
        let proof = loss.proof.as_ref().map_or(String::new(), |proof| format!(" ({proof})"));
        let line =
            format!("  {}: {} VMs would stay down, {}{proof}", failed.join(" and "), loss.lost.len(), lost.join(", "));
        text += &(render::printable(&line) + "\n");
    }
    text
}

/// A VM's hosts as JSON.
#[derive(Debug, Serialize)]
struct Explained {
    vm: String,
    uuid: Uuid,
    host: Option<HostName>,
    steps: Vec<Step>,
    set_aside: Option<SetAside>,
    /// What else could take it, with everything else where it is; and why the others could not.
    elsewhere: Line,
    unmet: Vec<Unmet>,
}

/// What a VM wants of a resource, of which its host has too little for all.
#[derive(Debug, Serialize)]
struct Unmet {
    resource: Resource,
    host_percent: u64,
}

/// Why one VM moves or stays.
pub fn explain(app: &App, world: &World, args: &ExplainArgs) -> Result<(), Failure> {
    let Some(vm) = world.vms.iter().find(|vm| vm.name == args.vm || vm.id.to_string() == args.vm) else {
        return Err(Failure::new(Kind::NotFound, format!("no VM called {} runs on these hosts", args.vm))
            .hint("VMs that are off take nothing and are not balanced; virtward vm place says where one could start"));
    };
    let planned = plan(world, args.eager)?;
    let mut request = Request::initial([vm.id]);
    // Where it is now is not asked.
    request.avoid.entry(vm.id).or_default().extend(vm.host.clone());
    let (_, report) = place(world, &request);
    let elsewhere = report.lines.into_iter().next();
    let elsewhere = elsewhere.unwrap_or(Line { vm: vm.id, name: vm.name.clone(), outcome: Outcome::Unknown });
    let loads = planned.hosts.iter().filter(|load| Some(&load.host) == vm.host.as_ref());
    let unmet =
        loads.flat_map(|load| [(Resource::Cpu, load.cpu_percent[0]), (Resource::Memory, load.memory_percent[0])]);
    let explained = Explained {
        vm: vm.name.clone(),
        uuid: vm.id,
        host: vm.host.clone(),
        steps: planned.plan.steps.iter().filter(|step| step.vm == vm.id).cloned().collect(),
        set_aside: planned.report.plan.set_aside.iter().find(|aside| aside.vm == vm.id).cloned(),
        elsewhere,
        unmet: unmet
            .filter(|(_, percent)| *percent > 100)
            .map(|(resource, host_percent)| Unmet { resource, host_percent })
            .collect(),
    };
    if app.json { out::json(&explained) } else { out::text(&words(&explained, &planned)) }
}

fn words(explained: &Explained, planned: &Planned) -> String {
    let host = explained.host.as_ref().map_or("no host".to_owned(), ToString::to_string);
    let mut lines = vec![format!("{} is on {host}", explained.vm)];
    for unmet in &explained.unmet {
        lines.push(format!("  {host} is asked for {} % of the {} that it has", unmet.host_percent, unmet.resource));
    }
    match (&explained.steps[..], &explained.set_aside) {
        ([], None) => {
            let why = planned.report.nothing.as_ref().or(planned.report.plan.no_load_moves.as_ref());
            let why = why.map_or("nothing would be gained by its leaving".to_owned(), Clone::clone);
            lines.push(format!("it stays: {why}"));
        }
        ([], Some(aside)) => lines.push(format!("it should move ({}) and stays: {}", aside.wanted, aside.because)),
        (steps, _) => lines.extend(steps.iter().map(|step| format!("it moves to {}: {}", step.to, why(step)))),
    }
    match &explained.elsewhere.outcome {
        Outcome::Placed { host, unmet, candidates } => {
            let broken = if unmet.is_empty() { String::new() } else { format!(", against {}", unmet.join(", ")) };
            lines.push(format!("{candidates} other hosts have room for it, {host} the most{broken}"));
        }
        Outcome::NotPlaced { hosts, .. } => {
            lines.push("no other host can take it as things are:".to_owned());
            lines.extend(
                hosts.iter().filter(|(why, _)| *why != WhyNot::Avoided).map(|(why, hosts)| refusal(why, hosts)),
            );
        }
        Outcome::Unknown => {}
    }
    lines.iter().map(|line| render::printable(line) + "\n").collect()
}

/// Hosts that cannot take a VM for one reason.
pub fn refusal(why: &WhyNot, hosts: &[HostName]) -> String {
    let names: Vec<String> = hosts.iter().take(10).map(ToString::to_string).collect();
    let more = hosts.len().saturating_sub(names.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("  {}{more}: {why}", names.join(", "))
}
