//! `virtward ha`: high availability, and `[ha]` of the configuration.

use std::{env, fs, path::PathBuf};

use async_trait::async_trait;
use uuid::Uuid;
use virtward_api::{
    Code, Event, HaAddress, HaCapacity, HaExplanation, HaFenceTest, HaFenceTestRequest, HaMove, HaPair, HaPolicy,
    HaReason, HaService, HaStandby, HaStart, HaStatus, HaVm, Page,
    client::{Client, Error},
};
use virtward_decide::ha::Timing;
use virtward_engine::ha::fence::Device;
use virtward_model::{Bytes, Seconds};
use virtward_server::ha::HaConfig;

use crate::{
    app::App,
    commands::job::escaped,
    config::Ha,
    daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// libvirt's own directories.
const HOOKS_DIR: &str = "/etc/libvirt/hooks";
const LIBVIRT_DIR: &str = "/run/libvirt";

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show hosts, how well each is protected and why not better, and protected VMs
    Status(StatusArgs),
    /// Protect VMs: should their host die, they are started elsewhere
    Enable(Box<EnableArgs>),
    /// Protect VMs no longer; they run on
    Disable(DisableArgs),
    /// Start a protected VM, on the host that is best
    Start(StartArgs),
    /// Let the standby of a protected VM take over
    Switch(SwitchOverArgs),
    /// Say where a protected VM is, why, and what it waits for
    Explain(ExplainArgs),
    /// Fence silent hosts and restart VMs (again)
    Arm(SwitchArgs),
    /// Fence nobody and restart nothing, for maintenance of the cluster
    Disarm(SwitchArgs),
    /// Say what would not run again if hosts were lost
    Capacity(CapacityArgs),
    /// Test the fence devices of a host
    TestFencing(TestFencingArgs),
    /// Vouch that a host is off
    ConfirmOff(ConfirmOffArgs),
    /// What happened
    Events(EventsArgs),
}

/// Arguments of `ha status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Grades: full (its VMs come back by themselves), degraded (later than they could,
or a second fault keeps them down), none (they stay down).

Examples:
  virtward ha status
  virtward ha status --json | jq '.hosts[] | select(.grade != \"full\")'")]
pub struct StatusArgs {}

/// Arguments of `ha enable`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The VM's host has to be in service: [ha] in its configuration, see docs/ha.md.
Its disks have to be on storage that the other hosts reach by the same paths.
Given again, the command changes how a VM is protected.

A service is watched from its VM's host: tcp://HOST:PORT, http://HOST/PATH,
https://..., tls://HOST:PORT?days=N, postgresql://HOST, mysql://HOST,
smtp://HOST; or in the guest, by its agent: unit:NAME, exec:/PROGRAM ARGUMENTS.
One that stays down is restarted, then its VM is, then the VM is moved, once;
last, its standby takes over.

A standby is a protected VM on another host that follows this one. It takes over
when this one's host dies: addresses are added in it, and the promote hook runs
in it, through its agent. docs/ha.md says what the hooks have to do.

Examples:
  virtward ha enable web1 db1
  virtward ha enable db1 --tier 1
  virtward ha enable web1 --tier 3 --after db1 --gate agent
  virtward ha enable web1 --service http://10.0.0.7/health --restart-unit nginx
  virtward ha enable pg1 --standby pg2 --promote /usr/local/bin/promote \\
    --address 10.0.0.9/24 --device eth0
  virtward ha enable pg1 --standby none")]
pub struct EnableArgs {
    /// VMs, by name or UUID
    #[arg(value_name = "VM", required = true)]
    pub vms: Vec<String>,
    /// Lower tiers are started first, 0 to 9 [default: 5]
    #[arg(long, value_name = "N")]
    pub tier: Option<u8>,
    /// A VM that must be ready before; may be repeated
    #[arg(long, value_name = "VM")]
    pub after: Vec<String>,
    /// When it is ready itself: its guest agent answers, or it runs [default: agent]
    #[arg(long, value_enum, value_name = "GATE")]
    pub gate: Option<GateArg>,
    /// Those that wait for it go on after this [default: 5m]
    #[arg(long, value_name = "TIME")]
    pub ready_within: Option<Seconds>,
    /// The only host that it may be started on; any: none of them in particular
    #[arg(long, value_name = "HOST")]
    pub only_on: Option<String>,
    /// Resets within an hour before it is taken elsewhere [default: 3]
    #[arg(long, value_name = "N")]
    pub resets: Option<u32>,
    /// A guest whose agent and disks are silent for so long is reset; 0s: never [default: 1m]
    #[arg(long, value_name = "TIME")]
    pub hang: Option<Seconds>,
    /// A service in it to watch; may be repeated, and takes the place of all that were watched; none: watch none
    #[arg(long, value_name = "URL")]
    pub service: Vec<String>,
    /// The systemd unit that restarts the services in the guest
    #[arg(long, value_name = "UNIT", requires = "service", conflicts_with = "restart_command")]
    pub restart_unit: Option<String>,
    /// The command that restarts them in the guest: a program by its whole path, and arguments
    #[arg(long, value_name = "COMMAND", requires = "service")]
    pub restart_command: Option<String>,
    /// Between two probes of a service [default: 10s]
    #[arg(long, value_name = "TIME", requires = "service")]
    pub every: Option<Seconds>,
    /// Failures in a row before something is done [default: 3]
    #[arg(long, value_name = "N", requires = "service")]
    pub failures: Option<u32>,
    /// After a start and after each action, failures do not count for so long [default: 1m, and 30s, 2m, 3m]
    #[arg(long, value_name = "TIME", requires = "service")]
    pub grace: Option<Seconds>,
    /// What may be done about a service that stays down, in this order; may be repeated [default: all]
    #[arg(long, value_enum, value_name = "ACTION", requires = "service")]
    pub action: Vec<ActionArg>,
    /// A protected VM that follows this one and takes over from it; none: none any more
    #[arg(long, value_name = "VM")]
    pub standby: Option<String>,
    /// The command that makes a guest the active one: a program by its whole path, and arguments
    #[arg(long, value_name = "COMMAND", requires = "standby")]
    pub promote: Option<String>,
    /// The command that makes a guest follow that was the active one; without it, that stays down
    #[arg(long, value_name = "COMMAND", requires = "promote")]
    pub demote: Option<String>,
    /// An address that is where the active one is, such as 10.0.0.9/24; may be repeated
    #[arg(long, value_name = "CIDR", requires = "promote")]
    pub address: Vec<String>,
    /// The guest's network device that has the addresses
    #[arg(long, value_name = "DEVICE", requires = "address", default_value = "eth0")]
    pub device: String,
}

/// `--action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum ActionArg {
    RestartService,
    RestartVm,
    Relocate,
    SwitchToStandby,
}

/// `--gate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum GateArg {
    Agent,
    Running,
}

/// Arguments of `ha disable`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward ha disable web1")]
pub struct DisableArgs {
    /// VMs, by name or UUID
    #[arg(value_name = "VM", required = true)]
    pub vms: Vec<String>,
}

/// Arguments of `ha start`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
libvirt refuses to start a protected VM by itself, as another host may run it.
Refused if room would be taken that is kept for host failures: ha capacity.

Examples:
  virtward ha start web1
  virtward ha start web1 --force")]
pub struct StartArgs {
    /// VM, by name or UUID
    pub vm: String,
    /// Also if afterwards not all protected VMs would survive the host failures that are to be survived
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `ha switch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The active one is ended first, then its standby has its addresses, and the
promote hook runs in it. Refused while the standby could not take over.

Examples:
  virtward ha switch pg1 --reason 'kernel update'
  virtward ha explain pg2")]
pub struct SwitchOverArgs {
    /// VM of the pair, by name or UUID
    pub vm: String,
    /// Why, for the others and for the audit log
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: String,
}

/// Arguments of `ha explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward ha explain web1")]
pub struct ExplainArgs {
    /// VM, by name or UUID
    pub vm: String,
}

/// Arguments of `ha arm` and `ha disarm`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Disarmed, guests run on without a watchdog, and no host is fenced. A daemon that
is stopped in order does this for its own host alone, until it runs again.

Examples:
  virtward ha disarm --reason 'new switches'
  virtward ha arm")]
pub struct SwitchArgs {
    /// Why, for the others and for the audit log
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: String,
}

/// Arguments of `ha capacity`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every combination of host failures is packed, not a percentage taken. Exit
status 4 if something would not run.

Examples:
  virtward ha capacity
  virtward ha capacity --without kvm2
  virtward ha capacity --vm web1 --memory 8GiB
  virtward ha capacity --json | jq .losses")]
pub struct CapacityArgs {
    /// As if this host were empty and took nothing
    #[arg(long, value_name = "HOST")]
    pub without: Option<String>,
    /// As if this VM had the memory of --memory; and whether it may have it
    #[arg(long, value_name = "VM", requires = "memory", conflicts_with = "without")]
    pub vm: Option<String>,
    /// How much
    #[arg(long, value_name = "SIZE", requires = "vm")]
    pub memory: Option<Bytes>,
}

/// Arguments of `ha test-fencing`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Looks at the devices in every way that switches nothing. --power-cycle also
switches the host off, reads that back, and on again: everything on it ends.
Ask the host that would have to do it, not the one that is to be fenced.

Examples:
  virtward ha test-fencing kvm2
  virtward ha test-fencing kvm2 --power-cycle")]
pub struct TestFencingArgs {
    /// Node whose devices are tested
    pub host: String,
    /// Also switch it off and on; refused while it is in service
    #[arg(long)]
    pub power_cycle: bool,
}

/// Arguments of `ha confirm-off`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Your word takes the place of a proof, and is kept with your name. Look at the
machine first: if it runs after all, two hosts write to the same disks.

Examples:
  virtward ha confirm-off kvm2 --yes --reason 'power cable pulled, ticket 4711'")]
pub struct ConfirmOffArgs {
    /// Node that is off
    pub host: String,
    /// You have made sure of it
    #[arg(long)]
    pub yes: bool,
    /// How you know, for the audit log
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: String,
}

/// Arguments of `ha events`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What this host's daemon did and saw; fencing and claims are told by the daemon
that led.

Examples:
  virtward ha events
  virtward ha events --limit 500 --json")]
pub struct EventsArgs {
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub limit: usize,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Status(_) => status(app).await,
        Command::Enable(args) => enable(app, args).await,
        Command::Disable(args) => {
            for vm in &args.vms {
                act(app, &format!("vms/{}/disable", escaped(vm)), &serde_json::json!({})).await?;
                app.progress.note(&format!("{vm} is not protected any more"));
            }
            Ok(())
        }
        Command::Start(args) => {
            let path = format!("/api/v1/ha/vms/{}/start", escaped(&args.vm));
            let vm: HaVm = daemon::client(app).post(&path, &HaStart { force: args.force }, None).await?;
            if app.json {
                return out::json(&vm);
            }
            app.progress.note(&format!("{} is to run; virtward ha explain {} says how far it is", vm.name, vm.name));
            Ok(())
        }
        Command::Switch(args) => {
            let path = format!("/api/v1/ha/vms/{}/switch", escaped(&args.vm));
            let vm: HaVm = daemon::client(app).post(&path, &HaReason { reason: args.reason.clone() }, None).await?;
            if app.json {
                return out::json(&vm);
            }
            app.progress.note(&format!("{} takes over; virtward ha explain {} says how far it is", vm.name, vm.name));
            Ok(())
        }
        Command::Explain(args) => explain(app, args).await,
        Command::Arm(args) => switch(app, "arm", &args.reason).await,
        Command::Disarm(args) => switch(app, "disarm", &args.reason).await,
        Command::Capacity(args) => capacity(app, args).await,
        Command::TestFencing(args) => test_fencing(app, args).await,
        Command::ConfirmOff(args) => confirm_off(app, args).await,
        Command::Events(args) => events(app, args).await,
    }
}

/// A change without an answer.
async fn act(app: &App, path: &str, body: &serde_json::Value) -> Result<(), Failure> {
    daemon::client(app).act(&format!("/api/v1/ha/{path}"), body).await?;
    Ok(())
}

async fn status(app: &App) -> Result<(), Failure> {
    let status: HaStatus = daemon::client(app).get("/api/v1/ha").await?;
    if app.json {
        return out::json(&status);
    }
    let mut text = String::new();
    if !status.armed {
        text.push_str(&format!("DISARMED: no host is fenced and no VM restarted ({})\n", status.note));
    }
    if let Some(error) = &status.state_error {
        text.push_str(&format!("what follows may be old: {error}\n"));
    }
    let mut hosts = Table::new(&["HOST", "PHASE", "PROTECTED", "WATCHDOG", "DEVICES", "EPOCH", "VMS", "SILENT"]);
    for host in &status.hosts {
        hosts.row([
            host.name.clone(),
            if host.maintenance { format!("{}, maintenance", host.phase) } else { host.phase.clone() },
            host.grade.clone(),
            host.watchdog.clone(),
            host.fence_devices.to_string(),
            host.epoch.to_string(),
            host.vms.to_string(),
            host.silent_ms.map(|ms| format!("{:.1} s", ms as f64 / 1000.0)).unwrap_or_default(),
        ]);
    }
    text.push_str(&hosts.render(out::stdout_is_terminal()));
    for host in &status.hosts {
        let proof = host.proof.iter().filter(|_| host.phase == "fenced").map(|proof| format!("fenced by {proof}"));
        let notes = host.reasons.iter().cloned().chain(host.fencing.clone()).chain(proof);
        for note in notes {
            text.push_str(&format!("{}: {note}\n", host.name));
        }
    }
    if !status.vms.is_empty() {
        let mut vms = Table::new(&["VM", "HOST", "PHASE", "READY", "TIER", "GENERATION", "NOTE"]);
        for vm in &status.vms {
            vms.row([
                vm.name.clone(),
                vm.host.clone().unwrap_or_default(),
                if vm.should_run { vm.phase.clone() } else { format!("{}, meant to be off", vm.phase) },
                if vm.ready { "yes" } else { "" }.into(),
                vm.policy.tier.map(|tier| tier.to_string()).unwrap_or_default(),
                vm.generation.to_string(),
                render::printable(vm.waits.as_ref().unwrap_or(&vm.note)),
            ]);
        }
        text.push('\n');
        text.push_str(&vms.render(out::stdout_is_terminal()));
        for (vm, pair) in status.vms.iter().filter_map(|vm| Some((vm, vm.pair.as_ref()?))) {
            if pair.role == "active" {
                text.push_str(&format!("{}: {}\n", vm.name, render::printable(&pair_line(pair))));
            }
        }
    }
    out::text(&text)
}

fn pair_line(pair: &HaPair) -> String {
    let HaPair { other, generation, note, .. } = pair;
    match (pair.settled, pair.takes_over) {
        (false, _) => format!("takes over from {other}, generation {generation}: {note}"),
        (true, true) => format!("active, {other} is its standby, generation {generation}: {note}"),
        (true, false) => {
            format!("active, and NOBODY would take over: {other} could not, generation {generation}: {note}")
        }
    }
}

async fn enable(app: &App, args: &EnableArgs) -> Result<(), Failure> {
    let policy = HaPolicy {
        tier: args.tier,
        after: (!args.after.is_empty()).then(|| args.after.clone()),
        gate: args.gate.map(|gate| if gate == GateArg::Agent { "agent" } else { "running" }.into()),
        ready_s: args.ready_within.map(|time| time.0),
        only_on: args.only_on.as_ref().map(|host| if host == "any" { String::new() } else { host.clone() }),
        resets_max: args.resets,
        resets_window_s: None,
        hang_s: args.hang.map(|time| time.0),
        services: services(args),
        standby: standby(args)?,
    };
    let client = daemon::client(app);
    let mut made = Vec::new();
    for vm in &args.vms {
        let path = format!("/api/v1/ha/vms/{}/enable", escaped(vm));
        let vm: HaVm = client.post(&path, &policy, None).await?;
        if !app.json {
            app.progress.note(&format!("{} is protected", vm.name));
        }
        made.push(vm);
    }
    if app.json { out::json(&made) } else { Ok(()) }
}

fn standby(args: &EnableArgs) -> Result<Option<HaStandby>, Failure> {
    let Some(vm) = &args.standby else { return Ok(None) };
    if vm == "none" {
        return Ok(Some(HaStandby::default()));
    }
    if args.vms.len() > 1 {
        return Err(Failure::new(Kind::Usage, "--standby is for one VM".to_owned()));
    }
    let Some(promote) = &args.promote else {
        return Err(Failure::new(Kind::Usage, "--standby needs --promote: what makes it the active one".to_owned()));
    };
    let words = |command: &String| command.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let address = |address: &String| HaAddress { address: address.clone(), device: args.device.clone() };
    Ok(Some(HaStandby {
        vm: vm.clone(),
        promote: words(promote),
        demote: args.demote.as_ref().map(words).unwrap_or_default(),
        addresses: args.address.iter().map(address).collect(),
    }))
}

fn services(args: &EnableArgs) -> Option<Vec<HaService>> {
    let command = args.restart_command.as_ref();
    let one = |check: &String| HaService {
        check: check.clone(),
        every_s: args.every.map(|time| time.0),
        failures: args.failures,
        grace_s: args.grace.map(|time| time.0),
        restart_unit: args.restart_unit.clone(),
        restart_command: command.map(|command| command.split_whitespace().map(str::to_owned).collect()),
        actions: (!args.action.is_empty()).then(|| args.action.iter().map(|action| action_name(*action)).collect()),
    };
    let given = args.service.iter().filter(|check| *check != "none");
    (!args.service.is_empty()).then(|| given.map(one).collect())
}

fn action_name(action: ActionArg) -> String {
    match action {
        ActionArg::RestartService => "restart-service",
        ActionArg::RestartVm => "restart-vm",
        ActionArg::Relocate => "relocate",
        ActionArg::SwitchToStandby => "switch-to-standby",
    }
    .into()
}

async fn explain(app: &App, args: &ExplainArgs) -> Result<(), Failure> {
    let found: HaExplanation = daemon::client(app).get(&format!("/api/v1/ha/vms/{}", escaped(&args.vm))).await?;
    if app.json {
        return out::json(&found);
    }
    let state =
        if found.vm.should_run { found.vm.phase.clone() } else { format!("{}, meant to be off", found.vm.phase) };
    let mut text = format!("{} ({}): {state}\n", found.vm.name, found.vm.uuid);
    for line in &found.lines {
        text.push_str(&format!("  {}\n", render::printable(line)));
    }
    if !found.vm.note.is_empty() {
        text.push_str(&format!("  last: {}\n", render::printable(&found.vm.note)));
    }
    out::text(&text)
}

async fn switch(app: &App, verb: &str, reason: &str) -> Result<(), Failure> {
    let body = HaReason { reason: reason.to_owned() };
    let status: HaStatus = daemon::client(app).post(&format!("/api/v1/ha/{verb}"), &body, None).await?;
    if app.json {
        return out::json(&status);
    }
    let what = match verb {
        "arm" => "armed: silent hosts are fenced and their VMs started elsewhere",
        _ => "disarmed: nothing is fenced or started until virtward ha arm",
    };
    app.progress.note(what);
    Ok(())
}

async fn capacity(app: &App, args: &CapacityArgs) -> Result<(), Failure> {
    let query = match (&args.without, &args.vm, args.memory) {
        (Some(host), ..) => format!("?without={}", escaped(host)),
        (None, Some(vm), Some(memory)) => format!("?vm={}&memory_bytes={}", escaped(vm), memory.0),
        _ => String::new(),
    };
    let found: HaCapacity = daemon::client(app).get(&format!("/api/v1/ha/capacity{query}")).await?;
    if app.json {
        out::json(&found)?;
    } else {
        let mut hosts = Table::new(&["HOST", "FOR GUESTS", "TAKEN"]);
        for host in &found.hosts {
            let (all, used) = (Bytes(host.memory_bytes).to_string(), Bytes(host.used_bytes).to_string());
            hosts.row([host.host.clone(), all, used]);
        }
        let mut text = hosts.render(out::stdout_is_terminal());
        for loss in &found.losses {
            let hosts = if loss.hosts.is_empty() { "whatever is lost".into() } else { loss.hosts.join(" and ") };
            text.push_str(&format!("without {hosts}: {} would stay down: {}\n", loss.vms.join(", "), loss.why));
        }
        if let Some(refused) = found.refused.as_ref().filter(|_| args.vm.is_some()) {
            text.push_str(&format!("it would take room away that is kept for host failures: {refused}\n"));
        }
        if found.enough {
            text.push_str(&format!("every protected VM runs again after any {} host failures\n", found.failures));
        }
        out::text(&text)?;
    }
    if found.enough {
        return Ok(());
    }
    let failure = Failure::new(Kind::Refused, "not every protected VM would run again");
    Err(if app.json { Failure { reported: true, ..failure } } else { failure })
}

async fn test_fencing(app: &App, args: &TestFencingArgs) -> Result<(), Failure> {
    let path = format!("/api/v1/ha/hosts/{}/test-fencing", escaped(&args.host));
    let how = HaFenceTestRequest { power_cycle: args.power_cycle };
    let test: HaFenceTest = daemon::client(app).post(&path, &how, None).await?;
    if app.json {
        out::json(&test)?;
    } else {
        let mut table = Table::new(&["DEVICE", "LEVEL", "STEP", "", "FOUND"]);
        for device in &test.devices {
            for finding in &device.findings {
                table.row([
                    device.name.clone(),
                    device.level.to_string(),
                    finding.step.clone(),
                    if finding.good { "ok" } else { "WRONG" }.into(),
                    render::printable(&finding.text),
                ]);
            }
        }
        out::text(&table.render(out::stdout_is_terminal()))?;
    }
    if test.good {
        return Ok(());
    }
    let failure = Failure::new(Kind::Refused, format!("the fence devices of {} cannot all be relied on", args.host));
    Err(if app.json { Failure { reported: true, ..failure } } else { failure })
}

async fn confirm_off(app: &App, args: &ConfirmOffArgs) -> Result<(), Failure> {
    if !args.yes {
        return Err(Failure::new(
            Kind::Usage,
            format!("if {} is not off, two hosts will write to the same disks and ruin them", args.host),
        )
        .hint(format!("look at the machine, then: virtward ha confirm-off {} --yes", args.host)));
    }
    let path = format!("/api/v1/ha/hosts/{}/confirm-off", escaped(&args.host));
    let status: HaStatus = daemon::client(app).post(&path, &HaReason { reason: args.reason.clone() }, None).await?;
    if app.json {
        return out::json(&status);
    }
    app.progress.note(&format!("taken down; virtward ha status shows what becomes of {}", args.host));
    Ok(())
}

async fn events(app: &App, args: &EventsArgs) -> Result<(), Failure> {
    let path = format!("/api/v1/events?kind=ha&limit={}", args.limit.clamp(1, 1000));
    let page: Page<Event> = daemon::client(app).get(&path).await?;
    if app.json {
        return out::json(&page.items);
    }
    let mut table = Table::new(&["WHEN", "SEVERITY", "WHAT"]);
    for event in page.items.iter().rev() {
        table.row([render::local_time(event.at), render::word(&event.severity), render::printable(&event.message)]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
}

/// Tells the daemon of this host that VMs move, as far as there is one and it protects them.
pub struct Passage {
    client: Client,
    /// Also if room is taken away that is kept for host failures.
    force: bool,
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passage").finish_non_exhaustive()
    }
}

impl Passage {
    /// To the daemon of this host.
    pub fn of(app: &App, force: bool) -> Self {
        Self { client: daemon::client(app), force }
    }

    /// Why a host is not to be emptied: the others would have no room for one more failure. None as well if nobody knows.
    pub async fn may_not_drain(&self, host: &str) -> Result<Option<String>, String> {
        let path = format!("/api/v1/ha/capacity?without={}", escaped(host));
        match self.client.get::<HaCapacity>(&path).await {
            Ok(found) => Ok(found.refused),
            Err(Error::Unreachable { .. }) => Ok(None),
            Err(Error::Problem(problem)) if matches!(problem.code, Code::NotFound | Code::Conflict) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn is_protected(&self, vm: Uuid) -> Result<bool, String> {
        match self.client.get::<HaExplanation>(&format!("/api/v1/ha/vms/{vm}")).await {
            Ok(_) => Ok(true),
            // No daemon, or one that takes no part; where it protects the VM, the destination's hook refuses it.
            Err(Error::Unreachable { .. }) => Ok(false),
            Err(Error::Problem(problem)) if matches!(problem.code, Code::NotFound | Code::Conflict) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn tell(&self, vm: Uuid, to: &str, has_moved: Option<bool>) -> Result<(), String> {
        let body = HaMove { to: to.to_owned(), has_moved, force: self.force };
        let answer = self.client.post::<HaVm>(&format!("/api/v1/ha/vms/{vm}/move"), &body, None).await;
        answer.map(drop).map_err(|error| error.to_string())
    }
}

#[async_trait]
impl virtward_engine::Passage for Passage {
    async fn announce(&self, vm: Uuid, to: &str) -> Result<(), String> {
        if self.is_protected(vm).await? { self.tell(vm, to, None).await } else { Ok(()) }
    }

    async fn settle(&self, vm: Uuid, to: &str, has_moved: bool) -> Result<(), String> {
        if self.is_protected(vm).await? { self.tell(vm, to, Some(has_moved)).await } else { Ok(()) }
    }
}

/// `[ha]` as the daemon takes it.
pub fn configuration(settings: &Ha) -> Result<HaConfig, Failure> {
    let usage = |message: String| Failure::new(Kind::Usage, format!("[ha] {message}"));
    let base = Timing::default();
    let timing = Timing {
        heartbeat_ms: settings.heartbeat_ms.unwrap_or(base.heartbeat_ms),
        fresh_ms: settings.fresh_ms.unwrap_or(base.fresh_ms),
        watchdog_ms: settings.watchdog_ms.unwrap_or(base.watchdog_ms),
        reset_ms: settings.reset_ms.unwrap_or(base.reset_ms),
        drain_ms: settings.drain_ms.unwrap_or(base.drain_ms),
        drift_ppm: settings.drift_ppm.unwrap_or(base.drift_ppm),
        silence_ms: settings.silence_ms.unwrap_or(base.silence_ms),
        wait_ms: settings.wait_ms.or(base.wait_ms),
        start_ms: settings.start_ms.unwrap_or(base.start_ms),
    };
    timing.check().map_err(|error| Failure::new(Kind::Usage, error.to_string()))?;
    if !timing.watchdog_ms.is_multiple_of(1000) {
        return Err(usage(format!("watchdog-ms = {}: watchdogs count in whole seconds", timing.watchdog_ms)));
    }
    let mut devices = Vec::new();
    for fence in &settings.fence {
        if fence.host.is_empty() || fence.name.is_empty() || fence.agent.is_empty() {
            return Err(usage("a fence device needs host, name and agent".into())
                .hint("[[ha.fence]] host = \"kvm2\", name = \"kvm2-bmc\", agent = \"fence_ipmilan\""));
        }
        let mut device = serde_json::json!({
            "name": fence.name, "agent": fence.agent, "parameters": fence.parameters, "secrets": fence.secrets,
        });
        for (name, value) in [
            ("level", fence.level.map(u64::from)),
            ("timeout_s", fence.timeout_s.map(u64::from)),
            ("verify_s", fence.verify_s.map(u64::from)),
            ("retries", fence.retries.map(u64::from)),
        ] {
            if let Some(value) = value {
                device[name] = value.into();
            }
        }
        let device: Device =
            serde_json::from_value(device).map_err(|error| usage(format!("{}: {error}", fence.name)))?;
        devices.push((fence.host.clone(), device));
    }
    Ok(HaConfig {
        timing,
        failsafe: settings.failsafe.unwrap_or(true),
        watchdog: settings.watchdog.clone(),
        lease_dirs: settings.lease_dirs.clone(),
        devices,
        memory_bytes: settings.memory.map_or_else(guest_memory, |memory| memory.0),
        hooks_dir: settings.hooks_dir.clone().unwrap_or_else(|| HOOKS_DIR.into()),
        libvirt_dir: settings.libvirt_dir.clone().unwrap_or_else(|| LIBVIRT_DIR.into()),
        program: env::current_exe().unwrap_or_else(|_| PathBuf::from("/usr/bin/virtward")),
    })
}

/// The host's memory, less an eighth and 1 GiB for the host itself.
fn guest_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    let total: u64 = total.unwrap_or(0) * 1024;
    (total - total / 8).saturating_sub(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_below_the_safe_bound_are_refused_with_the_bound() {
        let unsafe_wait = Ha { wait_ms: Some(20_000), ..Ha::default() };
        let failure = configuration(&unsafe_wait).unwrap_err();
        assert_eq!(failure.kind, Kind::Usage);
        assert!(failure.message.contains("wait-ms = 20000") && failure.message.contains("34069"), "{failure}");
        let hasty = Ha { silence_ms: Some(2_000), ..Ha::default() };
        assert!(configuration(&hasty).unwrap_err().message.contains("4500 or more"));
        assert!(configuration(&Ha { watchdog_ms: Some(10_500), ..Ha::default() }).is_err());
        assert_eq!(configuration(&Ha::default()).unwrap().timing, Timing::default());
    }

    #[test]
    fn a_fence_device_without_a_host_is_refused() {
        let fence = crate::config::Fence { name: "x".into(), agent: "fence_ipmilan".into(), ..Default::default() };
        let failure = configuration(&Ha { fence: vec![fence], ..Ha::default() }).unwrap_err();
        assert!(failure.message.contains("needs host"), "{failure}");
    }
}
