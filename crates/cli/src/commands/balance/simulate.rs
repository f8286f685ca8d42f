//! `virtward balance simulate`: a snapshot with a host less or VMs more.

use serde::Serialize;
use uuid::Uuid;
use virtward_decide::{
    admission,
    placement::{Outcome, Report, Request, place},
};
use virtward_model::{
    Bytes,
    world::{HostName, HostState, Resources, Vm, World},
};

use super::{Eager, Planned, plan, show};
use crate::{
    app::App,
    commands::world::{Source, look},
    exit::{Failure, Kind},
    out, render,
};

/// Arguments of `balance simulate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Nothing is changed. Hosts left out are taken for dead: their VMs are started on
others, all of them, as after a failure.

Examples:
  virtward balance simulate --snapshot today.json --without-host h2
  virtward balance simulate --with h2 --with h3 --without-host h2
  virtward balance simulate --snapshot today.json --add-vm 10x2:4GiB --rules rules.toml")]
pub struct Args {
    #[command(flatten)]
    pub source: Source,
    #[command(flatten)]
    pub eager: Eager,
    /// This host is gone; may be repeated
    #[arg(long, value_name = "HOST")]
    pub without_host: Vec<String>,
    /// More VMs: how many, with how many CPUs and how much memory each; may be repeated
    #[arg(long, value_name = "[COUNTx]CPUS:MEMORY")]
    pub add_vm: Vec<More>,
}

/// VMs of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct More {
    count: u32,
    cpus: u32,
    memory: Bytes,
}

impl std::str::FromStr for More {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write CPUs and memory, such as 2:4GiB, or 10x2:4GiB for ten of them".to_owned();
        let (count, one) = match text.split_once('x') {
            Some((count, one)) => (count.parse().map_err(|_| wrong())?, one),
            None => (1, text),
        };
        let (cpus, memory) = one.split_once(':').ok_or_else(wrong)?;
        let cpus = cpus.parse().map_err(|_| wrong())?;
        let memory = memory.parse().map_err(|_| wrong())?;
        match (1..=100_000).contains(&count) && (1..=10_000).contains(&cpus) {
            true => Ok(Self { count, cpus, memory }),
            false => Err(wrong()),
        }
    }
}

/// What would be.
#[derive(Debug, Serialize)]
struct Simulated {
    /// Where VMs of hosts that are gone, and new ones, would start.
    placement: Report,
    /// What balancing would do then.
    then: Planned,
    /// Room for failures then.
    failover: admission::Verdict,
}

/// Simulates.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let mut world = look(app, &args.source).await?.close().await;
    let lost = lose(&mut world, &args.without_host)?;
    let added = add(&mut world, &args.add_vm);
    let (_, mut report) = place(&world, &Request::failover(lost));
    settle(&mut world, &report);
    let (_, more) = place(&world, &Request::initial(added));
    settle(&mut world, &more);
    report.lines.extend(more.lines);
    report.impossible = report.impossible.or(more.impossible);
    let simulated =
        Simulated { placement: report, then: plan(&world, args.eager)?, failover: admission::check(&world) };
    if app.json {
        out::json(&simulated)?;
    } else {
        out::text(&text(&world, &simulated))?;
    }
    match simulated.placement.is_complete() {
        true => Ok(()),
        false => Err(Failure::new(Kind::Refused, "not all VMs would have a host").reported()),
    }
}

/// Takes hosts for dead; the VMs that ran there.
fn lose(world: &mut World, names: &[String]) -> Result<Vec<Uuid>, Failure> {
    for name in names {
        let known: Vec<&str> = world.hosts.iter().map(|host| host.name.0.as_str()).take(20).collect();
        let known = known.join(", ");
        let Some(host) = world.hosts.iter_mut().find(|host| &host.name.0 == name) else {
            return Err(
                Failure::new(Kind::NotFound, format!("there is no host {name}")).hint(format!("there are: {known}"))
            );
        };
        host.state = HostState::Down;
    }
    let gone = |host: &HostName| names.contains(&host.0);
    Ok(world.vms.iter().filter(|vm| vm.host.as_ref().is_some_and(gone)).map(|vm| vm.id).collect())
}

fn add(world: &mut World, more: &[More]) -> Vec<Uuid> {
    let sizes = more.iter().flat_map(|more| std::iter::repeat_n(*more, more.count as usize));
    let mut added = Vec::new();
    for (at, more) in sizes.enumerate() {
        let cpu_milli = u64::from(more.cpus) * 1000;
        let size = Resources { cpu_milli, memory: more.memory, ..Resources::default() };
        // As if half busy: nothing is known of what it will do.
        let demand = Resources { cpu_milli: cpu_milli / 2, ..Resources::default() };
        let vm = Vm { demand, ..Vm::new(Uuid::new_v4(), format!("new-{}", at + 1), size) };
        added.push(vm.id);
        world.vms.push(vm);
    }
    added
}

/// Puts VMs where they were placed.
fn settle(world: &mut World, report: &Report) {
    for line in &report.lines {
        let host = match &line.outcome {
            Outcome::Placed { host, .. } => Some(host.clone()),
            _ => None,
        };
        world.vms.iter_mut().filter(|vm| vm.id == line.vm).for_each(|vm| vm.host.clone_from(&host));
    }
}

fn text(world: &World, simulated: &Simulated) -> String {
    let mut text = String::new();
    for line in &simulated.placement.lines {
        let told = match &line.outcome {
            Outcome::Placed { host, unmet, .. } if unmet.is_empty() => format!("{} would start on {host}", line.name),
            Outcome::Placed { host, unmet, .. } => {
                format!("{} would start on {host}, against {}", line.name, unmet.join(", "))
            }
            Outcome::NotPlaced { .. } => format!("{} would have no host:", line.name),
            Outcome::Unknown => continue,
        };
        text += &(render::printable(&told) + "\n");
        if let Outcome::NotPlaced { hosts, .. } = &line.outcome {
            hosts.iter().for_each(|(why, hosts)| text += &(render::printable(&show::refusal(why, hosts)) + "\n"));
        }
    }
    if let Some(proof) = &simulated.placement.impossible {
        text += &(render::printable(&format!("no placement for all exists: {proof}")) + "\n");
    }
    text + "\n" + &show::planned(world, &simulated.then)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_refused() {
        let size: More = "10x2:4GiB".parse().unwrap();
        assert_eq!(size, More { count: 10, cpus: 2, memory: Bytes(4 << 30) });
        assert_eq!("1:512MiB".parse::<More>().unwrap().count, 1);
        for wrong in ["", "2", "2:", "x2:4GiB", "0x2:4GiB", "0:4GiB", "999999999x1:1GiB"] {
            assert!(wrong.parse::<More>().unwrap_err().contains("10x2:4GiB"), "{wrong}");
        }
    }
}
