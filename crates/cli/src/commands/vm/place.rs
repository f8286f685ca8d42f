//! `virtward vm place`: on which host a VM is best started.

use uuid::Uuid;
use virtward_decide::placement::{Outcome, Request, place};
use virtward_model::{
    Bytes,
    world::{Resources, Vm},
};

use crate::{
    app::App,
    commands::{
        balance::show::refusal,
        world::{Source, look},
    },
    exit::{Failure, Kind},
    out, render,
};

/// Arguments of `vm place`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Nothing is started or changed. Where several hosts have room, the one is taken
on which most stays free.

Examples:
  virtward vm place --cpus 4 --memory 8GiB --with h2 --with h3
  virtward vm place --cpus 2 --memory 4GiB --snapshot today.json --json | jq -r .lines[0].outcome.host")]
pub struct Args {
    /// CPUs that it is to have
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub cpus: u32,
    /// Memory that it is to have
    #[arg(long, value_name = "SIZE")]
    pub memory: Bytes,
    /// A libvirt network that it needs; may be repeated
    #[arg(long, value_name = "NAME")]
    pub network: Vec<String>,
    /// An image that it needs, by its path; may be repeated
    #[arg(long, value_name = "PATH")]
    pub image: Vec<String>,
    #[command(flatten)]
    pub source: Source,
}

/// Places.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let mut looked = look(app, &args.source).await?;
    let cpu_milli = u64::from(args.cpus) * 1000;
    let size = Resources { cpu_milli, memory: args.memory, ..Resources::default() };
    let mut vm = Vm::new(Uuid::new_v4(), "the VM", size);
    vm.requires.extend(args.network.iter().map(|name| format!("network:{name}")));
    for path in &args.image {
        let label = format!("image:{path}");
        for (name, host) in &looked.hosts {
            if host.hypervisor.volume(path).await.is_ok_and(|volume| volume.is_some()) {
                looked.world.hosts.iter_mut().filter(|h| &h.name == name).for_each(|h| {
                    h.offers.insert(label.clone());
                });
            }
        }
        vm.requires.insert(label);
    }
    let id = vm.id;
    let mut world = looked.close().await;
    world.vms.push(vm);
    let (_, report) = place(&world, &Request::initial([id]));
    if app.json {
        out::json(&report)?;
    }
    let Some(line) = report.lines.first() else { return Ok(()) };
    match &line.outcome {
        Outcome::Placed { host, unmet, candidates } => {
            let broken = if unmet.is_empty() { String::new() } else { format!(", against {}", unmet.join(", ")) };
            let text = format!("{host} ({candidates} hosts have room{broken})");
            if app.json { Ok(()) } else { out::text(&(render::printable(&text) + "\n")) }
        }
        Outcome::NotPlaced { hosts, .. } => {
            if !app.json {
                let lines = hosts.iter().map(|(why, hosts)| render::printable(&refusal(why, hosts)) + "\n");
                out::text(&lines.collect::<String>())?;
            }
            Err(Failure::new(Kind::Refused, "no host can take such a VM").reported())
        }
        Outcome::Unknown => Ok(()),
    }
}
