//! `virtward balance`: which VMs should run where, and why; moving them; and what would be if.

mod apply;
mod by_daemon;
pub mod show;
mod simulate;

use jiff::SignedDuration;
use serde::Serialize;
use virtward_decide::{
    admission,
    balance::{Eagerness, HostLoad, Memory, Policy, after, loads, round},
    placement::{Plan, check},
};
use virtward_model::world::{Mode, World};

use super::{
    vm::migrate::How,
    world::{Hosts, Source, look},
};
use crate::{
    app::App,
    exit::{Failure, Kind},
    out,
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Say which VMs should move where, and why; and which cannot
    Plan(PlanArgs),
    /// Plan, and move the VMs
    Apply(Box<ApplyArgs>),
    /// Show how the daemon balances by itself, and what it said last
    Auto(AutoArgs),
    /// Show the daemon's rounds in which something should move
    History(HistoryArgs),
    /// Say of one VM why it moves or stays, and of each host whether it could take it
    Explain(ExplainArgs),
    /// What would be without a host, or with more VMs
    Simulate(simulate::Args),
}

/// How eagerly.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Eager {
    /// From 1 (only what must move) to 5 (for small gains)
    #[arg(long, value_name = "1-5", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    pub eagerness: u8,
    /// What a migration can send per second
    #[arg(long, value_name = "SIZE", default_value = "1GB")]
    pub link: virtward_model::Bytes,
}

impl Eager {
    /// One look stands for all: there is no history to hold against it.
    fn policy(self) -> Policy {
        Policy {
            mode: Mode::Automatic,
            eagerness: Eagerness::new(self.eagerness).unwrap_or_default(),
            hold: Some(1),
            link: self.link.0.max(1),
            ..Policy::default()
        }
    }
}

/// Arguments of `balance plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
If no hosts are named, the daemon plans for its whole cluster. Load is what VMs
used during --interval; a longer one is less easily misled.
Whatever must move (its host is to be empty, a must rule is broken) is planned
at every eagerness. No step takes away room that is kept for failures.

Examples:
  virtward balance plan --with h2 --with h3
  virtward balance plan --with h2 --rules rules.toml --interval 1m --eagerness 4
  virtward balance plan --snapshot today.json --json | jq '.plan.steps'")]
pub struct PlanArgs {
    #[command(flatten)]
    pub source: Source,
    #[command(flatten)]
    pub eager: Eager,
}

/// Arguments of `balance apply`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
If no hosts are named, the daemon does it for its whole cluster. Otherwise name
this host, too, by a URI that the others reach, if a VM may go to it.

Examples:
  virtward balance apply --connect qemu+ssh://h1/system --with h2 --with h3
  virtward balance apply --connect qemu+ssh://h1/system --with h2 --eagerness 5 --parallel 1")]
pub struct ApplyArgs {
    #[command(flatten)]
    pub hosts: Hosts,
    /// Rules and importance: a TOML file (docs/balance.md)
    #[arg(long, value_name = "FILE")]
    pub rules: Option<std::path::PathBuf>,
    #[command(flatten)]
    pub eager: Eager,
    /// VMs that move at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub parallel: u8,
    /// No move begins later than this
    #[arg(long, value_name = "TIME")]
    pub within: Option<SignedDuration>,
    #[command(flatten)]
    pub how: How,
}

/// Arguments of `balance auto`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Whether VMs move by themselves is said in the configuration of the daemons:
  [balance]
  mode = \"automatic\"    # or recommend, or off

Examples:
  virtward balance auto
  virtward balance auto --json | jq .last.hosts")]
pub struct AutoArgs {}

/// Arguments of `balance history`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward balance history\n  virtward balance history --limit 1 --json")]
pub struct HistoryArgs {
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub limit: u16,
}

/// Arguments of `balance explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward balance explain web1 --with h2 --with h3
  virtward balance explain web1 --snapshot today.json")]
pub struct ExplainArgs {
    /// VM, by name or UUID
    #[arg(value_name = "VM")]
    pub vm: String,
    #[command(flatten)]
    pub source: Source,
    #[command(flatten)]
    pub eager: Eager,
}

/// A plan as JSON.
#[derive(Debug, Serialize)]
pub struct Planned {
    plan: Plan,
    report: virtward_decide::balance::Report,
    hosts: Vec<HostLoad>,
    failover: admission::Verdict,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Plan(args) if args.source.is_unnamed() && by_daemon::is_for(app).await => {
            by_daemon::plan(app, args).await
        }
        Command::Apply(args) if args.hosts.with.is_empty() && by_daemon::is_for(app).await => {
            by_daemon::apply(app, args).await
        }
        Command::Auto(_) => by_daemon::auto(app).await,
        Command::History(args) => by_daemon::history(app, args).await,
        Command::Plan(args) => {
            let world = look(app, &args.source).await?.close().await;
            let planned = plan(&world, args.eager)?;
            if app.json { out::json(&planned) } else { out::text(&show::planned(&world, &planned)) }
        }
        Command::Apply(args) => apply::run(app, args).await,
        Command::Explain(args) => {
            let world = look(app, &args.source).await?.close().await;
            show::explain(app, &world, args)
        }
        Command::Simulate(args) => simulate::run(app, args).await,
    }
}

/// Plans, and has the plan checked by the linter, which shares no code with the planner.
fn plan(world: &World, eager: Eager) -> Result<Planned, Failure> {
    let (plan, report, _) = round(world, &eager.policy(), &Memory::default());
    sound(world, &plan)?;
    let after = after(world, &plan);
    let hosts = loads(world, &after);
    let failover = admission::check(&after);
    Ok(Planned { plan, report, hosts, failover })
}

fn sound(world: &World, plan: &Plan) -> Result<(), Failure> {
    match check(world, plan).first() {
        None => Ok(()),
        Some(wrong) => Err(Failure::new(Kind::Other, format!("the plan that was made is wrong: {wrong}"))
            .hint("nothing was moved; please report this with the output of: virtward inventory export")),
    }
}
