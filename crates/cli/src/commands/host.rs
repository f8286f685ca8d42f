//! `virtward host`: the CPU that hosts have in common, emptying a host, and taking it into service again.

mod drain;

pub use self::drain::left;

use std::{collections::BTreeSet, path::PathBuf};

use jiff::SignedDuration;
use serde::Serialize;
use virtward_engine::{Destination, DrainOptions, Drained, drain_host};
use virtward_hypervisor::Hypervisor;
use virtward_model::{CpuFit, Machine};

use crate::{
    app::App,
    commands::{
        ha::Passage,
        vm::migrate::{How, line},
    },
    connect,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show the CPU that several hosts have in common, and which VMs use more than it
    Cpu(CpuArgs),
    /// Move every running VM of this host to others
    Drain(Box<DrainArgs>),
    /// Take a drained host into service again
    Resume(ResumeArgs),
}

/// Arguments of `host cpu`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
VMs with this CPU can move between all of these hosts. Put it into a VM's
definition (virsh edit) and start the VM anew for it to count.

Examples:
  virtward host cpu --with h2 --with h3
  virtward host cpu --with qemu+tls://h2/system --json | jq -r .cpu")]
pub struct CpuArgs {
    /// Another host; may be repeated
    #[arg(long, value_name = "HOST|URI")]
    pub with: Vec<String>,
}

/// Arguments of `host drain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --to the daemon does it, over all hosts of its cluster. From now on the
host takes no VMs until `host resume`. Backups of Virtward give way. What cannot
move is named with the reason and the choices, and stays. Where high
availability protects VMs, a drain after which one more host failure would not
be survived is refused: virtward ha capacity --without HOST.

Examples:
  virtward host drain --dry-run
  virtward host drain h2 && ssh h2 reboot
  virtward host drain --to h2 --to h3 --dry-run
  virtward host drain --to h2 --to h3 --first db1 --parallel 4
  virtward host drain --to h2 --timeout 30m && reboot")]
pub struct DrainArgs {
    /// A host of the daemon's cluster [default: this one]
    #[arg(value_name = "HOST", conflicts_with = "to")]
    pub host: Option<String>,
    /// A host to which VMs may go, without the daemon; may be repeated
    #[arg(long, value_name = "HOST|URI")]
    pub to: Vec<String>,
    /// VMs that move at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub parallel: u8,
    /// A VM that goes first; may be repeated. The others follow by priority, those with most memory first
    #[arg(long, value_name = "VM")]
    pub first: Vec<String>,
    /// No move begins later than this
    #[arg(long = "within", value_name = "TIME")]
    pub within: Option<SignedDuration>,
    /// Move the definitions of VMs that are off, too
    #[arg(long)]
    pub with_inactive: bool,
    /// Only say what would go where, and what could not
    #[arg(long)]
    pub dry_run: bool,
    /// Also if afterwards not all protected VMs would survive the host failures that are to be survived
    #[arg(long)]
    pub force: bool,
    /// Rules and importance: a TOML file (docs/balance.md)
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,
    #[command(flatten)]
    pub how: How,
}

/// Arguments of `host resume`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward host resume\n  virtward host resume h2")]
pub struct ResumeArgs {
    /// A host of the daemon's cluster [default: this one]
    #[arg(value_name = "HOST")]
    pub host: Option<String>,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Cpu(args) => cpu(app, args).await,
        Command::Drain(args) => drain(app, args).await,
        Command::Resume(args) => resume(app, args).await,
    }
}

/// The mark of a host that takes no VMs.
fn mark(app: &App, uuid: uuid::Uuid) -> PathBuf {
    connect::dirs(&app.settings).runtime.join("drained").join(uuid.to_string())
}

/// Why a host takes no VMs, if it takes none.
pub async fn closed(app: &App, hypervisor: &dyn Hypervisor) -> Option<String> {
    let host = hypervisor.host().await.ok()?;
    mark(app, host.uuid).exists().then(|| format!("{} is drained and takes no VMs", host.name))
}

async fn drain(app: &App, args: &DrainArgs) -> Result<(), Failure> {
    if args.to.is_empty() {
        return drain::by_daemon(app, args).await;
    }
    let hypervisor = connect::hypervisor(app).await?;
    let mut destinations = Vec::new();
    let outcome = drain_to(app, args, hypervisor.clone(), &mut destinations).await;
    hypervisor.close().await;
    for to in destinations {
        to.hypervisor.close().await;
    }
    let drained = outcome?;
    match app.json {
        true => out::json(&drained)?,
        false => out::text(&text(&drained))?,
    }
    if app.cancel.is_cancelled() {
        return Err(Failure::new(Kind::Cancelled, "cancelled").hint("virtward host resume takes the host into service"));
    }
    match drained.left.len() {
        0 => Ok(()),
        left if drained.dry_run => Err(Failure::new(Kind::Refused, format!("{left} VMs could not leave")).reported()),
        left => Err(Failure::new(Kind::Partial, format!("{left} VMs are still on {}", drained.host))
            .hint("each is named above with what can be done; virtward host resume takes the host into service again")),
    }
}

async fn drain_to(
    app: &App,
    args: &DrainArgs,
    hypervisor: std::sync::Arc<dyn Hypervisor>,
    destinations: &mut Vec<Destination>,
) -> Result<Drained, Failure> {
    for to in &args.to {
        let to = connect::destination(app, to, args.how.data_address.as_deref()).await?;
        match closed(app, &*to.hypervisor).await {
            Some(why) => {
                app.progress.warn(&why);
                to.hypervisor.close().await;
            }
            None => destinations.push(to),
        }
    }
    if destinations.is_empty() {
        return Err(Failure::new(Kind::Refused, "there is no host that takes VMs").hint("name another one with --to"));
    }
    let host = hypervisor.host().await?;
    let passage = Passage::of(app, args.force);
    let refused = passage.may_not_drain(&host.name).await.map_err(|why| {
        Failure::new(Kind::Other, format!("whether room for host failures would be left is not known: {why}"))
            .hint("virtward ha status; --force empties the host all the same")
    });
    if let Some(why) = if args.force { None } else { refused? } {
        let text = format!("emptying {} would take room away that is kept for host failures: {why}", host.name);
        return Err(Failure::new(Kind::Refused, text)
            .hint("virtward ha capacity --without HOST shows the room there would be; --force does it all the same"));
    }
    if !args.dry_run {
        let mark = mark(app, host.uuid);
        let made =
            mark.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&mark, &host.name));
        made.map_err(Failure::io(format!("cannot write {}", mark.display())))?;
    }
    let mut migrate = args.how.options();
    migrate.backups_give_way = true;
    // Judged as a whole: on the way the host still counts as one that may fail.
    migrate.passage = Some(std::sync::Arc::new(Passage::of(app, true)));
    let options = DrainOptions {
        migrate,
        parallel: usize::from(args.parallel),
        first: args.first.clone(),
        timeout: args.within.map(|time| time.unsigned_abs()),
        with_inactive: args.with_inactive,
        dry_run: args.dry_run,
        rules: args.rules.as_deref().map(super::world::rules_of).transpose()?.map(std::sync::Arc::new),
        ..DrainOptions::default()
    };
    let env = connect::env(app, hypervisor);
    let drained = drain_host(&env, destinations, &options, &*app.progress, &app.cancel).await;
    if let Ok(drained) = &drained {
        drained.plan.iter().for_each(|assigned| app.progress.finish(&assigned.vm));
    }
    Ok(drained?)
}

fn text(drained: &Drained) -> String {
    let mut text = String::new();
    if drained.dry_run {
        let mut table = Table::new(&["VM", "MEMORY", "FROM", "TO", "AFTER", "WHY"]);
        for assigned in &drained.plan {
            let memory = virtward_model::Bytes(assigned.memory_bytes).to_string();
            table.row([
                assigned.vm.clone(),
                memory,
                assigned.from.clone(),
                assigned.to.clone(),
                assigned.after.join(" "),
                assigned.why.clone(),
            ]);
        }
        text += &table.render(out::stdout_is_terminal());
    }
    for migrated in &drained.moved {
        text += &(line(migrated) + "\n");
    }
    if drained.dry_run {
        drained.warnings.iter().for_each(|warning| text += &(render::printable(&format!("note: {warning}")) + "\n"));
    }
    for left in &drained.left {
        text += &(render::printable(&format!("{} stays:", left.vm)) + "\n");
        left.reasons.iter().for_each(|reason| text += &(render::printable(&format!("  {reason}")) + "\n"));
        left.choices.iter().for_each(|choice| text += &(render::printable(&format!("  → {choice}")) + "\n"));
    }
    if drained.left.is_empty() && !drained.dry_run {
        text += &(render::printable(&format!("no VM runs on {} any more", drained.host)) + "\n");
    }
    text
}

async fn resume(app: &App, args: &ResumeArgs) -> Result<(), Failure> {
    if let Some(was_drained) = drain::resume_by_daemon(app, args.host.as_deref()).await? {
        return resumed(app, was_drained.0, was_drained.1);
    }
    let hypervisor = connect::hypervisor(app).await?;
    let host = hypervisor.host().await;
    hypervisor.close().await;
    let host = host?;
    let mark = mark(app, host.uuid);
    let was_drained = match std::fs::remove_file(&mark) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(Failure::io(format!("cannot remove {}", mark.display()))(error)),
    };
    resumed(app, host.name, was_drained)
}

fn resumed(app: &App, host: String, was_drained: bool) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Resumed {
        host: String,
        was_drained: bool,
    }
    if app.json {
        return out::json(&Resumed { host, was_drained });
    }
    let before = if was_drained { "takes VMs again" } else { "was not drained" };
    out::text(&(render::printable(&format!("{host} {before}")) + "\n"))
}

/// The common CPU as JSON.
#[derive(Debug, Serialize)]
struct Baseline {
    hosts: Vec<String>,
    virt: String,
    cpu: String,
    vms: Vec<VmCpu>,
}

#[derive(Debug, Serialize)]
struct VmCpu {
    host: String,
    vm: String,
    cpu: String,
    /// Runs on every one of the hosts; null if that is not known.
    everywhere: Option<bool>,
    lacking: Vec<String>,
}

async fn cpu(app: &App, args: &CpuArgs) -> Result<(), Failure> {
    let mut hosts = vec![connect::hypervisor(app).await?];
    let mut outcome = Ok(());
    for with in &args.with {
        match connect::destination(app, with, None).await {
            Ok(to) => hosts.push(to.hypervisor),
            Err(failure) => outcome = Err(failure),
        }
    }
    let found = match outcome {
        Ok(()) => baseline(&hosts).await,
        Err(failure) => Err(failure),
    };
    for host in hosts {
        host.close().await;
    }
    let found = found?;
    if app.json {
        return out::json(&found);
    }
    let mut text = render::printable(&format!("common to {} ({}):", found.hosts.join(", "), found.virt)) + "\n";
    text += found.cpu.trim_end();
    text.push_str("\n\n");
    let mut table = Table::new(&["VM", "HOST", "CPU", "EVERYWHERE", "LACKING"]);
    for vm in &found.vms {
        let everywhere = match vm.everywhere {
            Some(true) => "yes",
            Some(false) => "no",
            None => "unknown",
        };
        table.row([vm.vm.clone(), vm.host.clone(), vm.cpu.clone(), everywhere.to_owned(), vm.lacking.join("; ")]);
    }
    text += &table.render(out::stdout_is_terminal());
    out::text(&text)
}

async fn baseline(hosts: &[std::sync::Arc<dyn Hypervisor>]) -> Result<Baseline, Failure> {
    let mut machine = Machine { arch: "x86_64".into(), virt: "kvm".into(), ..Machine::default() };
    // A host without KVM still has a CPU for guests that are emulated.
    if hosts[0].host_cpu(&machine).await.is_err() {
        machine.virt = "qemu".into();
    }
    let (mut names, mut cpus) = (Vec::new(), Vec::new());
    for host in hosts {
        names.push(host.host().await?.name);
        cpus.push(host.host_cpu(&machine).await?);
    }
    let cpu = hosts[0].cpu_baseline(&machine, &cpus).await?;
    let mut vms = Vec::new();
    for (host, name) in hosts.iter().zip(&names) {
        for vm in host.list().await? {
            let Ok(needs) = host.machine(vm.uuid).await else { continue };
            vms.push(judge(hosts, &names, name, vm.name, &needs).await?);
        }
    }
    Ok(Baseline { hosts: names, virt: machine.virt, cpu, vms })
}

async fn judge(
    hosts: &[std::sync::Arc<dyn Hypervisor>],
    names: &[String],
    host: &str,
    vm: String,
    needs: &Machine,
) -> Result<VmCpu, Failure> {
    let (mut lacking, mut unknown) = (BTreeSet::new(), false);
    let own = hosts.iter().zip(names).find(|(_, name)| *name == host).map(|(own, _)| own);
    let xml = match (needs.cpu.mode.as_str(), own) {
        ("host-passthrough" | "host-model" | "maximum", Some(own)) => own.host_cpu(needs).await.ok(),
        ("", _) => None,
        _ => needs.cpu.xml.clone(),
    };
    for (other, name) in hosts.iter().zip(names) {
        match other.fit(needs, xml.as_deref()).await?.cpu {
            CpuFit::Lacking(what) => {
                lacking.insert(format!("{name}: {what}"));
            }
            CpuFit::Unknown(_) => unknown = true,
            CpuFit::Identical | CpuFit::Superset => {}
        }
    }
    let everywhere = match (lacking.is_empty(), unknown) {
        (false, _) => Some(false),
        (true, true) => None,
        (true, false) => Some(true),
    };
    let cpu = needs.cpu.model.clone().unwrap_or_else(|| match needs.cpu.mode.as_str() {
        "" => "default".to_owned(),
        mode => mode.to_owned(),
    });
    Ok(VmCpu { host: host.to_owned(), vm, cpu, everywhere, lacking: lacking.into_iter().collect() })
}
