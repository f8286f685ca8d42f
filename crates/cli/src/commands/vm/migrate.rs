//! `virtward vm migrate`: to another host while it runs.

use jiff::SignedDuration;
use virtward_api::{Job, MigrateRequest};
use virtward_decide::migration::{Finding, Level, pace::Policy as PaceDefaults};
use virtward_engine::{MigrateOptions, Migrated, MigrationPlan, migrate_vm, plan_migration};
use virtward_hypervisor::Compression;
use virtward_model::Bytes;

use crate::{
    app::App,
    commands::job::escaped,
    connect, daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// How a VM moves; part of every command that moves some.
#[derive(Clone, Debug, clap::Args)]
pub struct How {
    /// Longest time for which the guest may stand still
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = duration)]
    pub max_downtime: SignedDuration,
    /// Send no more than this per second
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<Bytes>,
    /// Switch to post-copy after this time if it has not converged: from then on, until all memory is there, a failure of
    /// either host or the network loses the running guest
    #[arg(long, value_name = "TIME|never", default_value = "never", value_parser = duration_or_never)]
    pub postcopy_after: Never,
    /// Give up after this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<SignedDuration>,
    /// Never hold the guest's vCPUs back so that it converges
    #[arg(long)]
    pub no_throttle: bool,
    /// Copy disks that the destination does not see
    #[arg(long)]
    pub with_storage: bool,
    /// Send memory over so many connections at a time
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub connections: u32,
    /// Compress memory; zstd and zlib use parallel connections
    #[arg(long, value_enum, value_name = "METHOD")]
    pub compress: Option<Compress>,
    /// Encrypt memory and disks on the way, by the hosts' certificates for migration
    #[arg(long)]
    pub tls: bool,
    /// Name in the destination's certificate, if it is not the address
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub tls_name: Option<String>,
    /// Move it although the cache mode of a disk ignores flushes
    #[arg(long)]
    pub unsafe_cache: bool,
    /// Address of the destination for memory and disks [default: the one in its URI]
    #[arg(long, value_name = "ADDRESS")]
    pub data_address: Option<String>,
}

/// A time, or never.
#[derive(Clone, Copy, Debug)]
pub struct Never(pub Option<SignedDuration>);

/// `--compress`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Compress {
    /// Fast, good for most guests
    Zstd,
    /// Where QEMU has no zstd
    Zlib,
    /// Sends what changed of pages that are sent again
    Xbzrle,
}

/// Arguments of `vm migrate`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
HOST is a host of this daemon's cluster, which then does it as a job; or a libvirt
URI, or a host's name, which is reached the way this host is: over SSH if
--connect is local.

The VM runs on until the last moment, and goes on here if anything fails or
the command is interrupted before that moment. Run again, the command goes on
with what an interrupted run began. Where high availability protects it, a move
that takes the room kept for host failures is refused: virtward ha capacity.

Examples:
  virtward vm migrate web1 --to h2 --dry-run
  virtward vm migrate web1 --to h2
  virtward vm migrate db1 --to qemu+tls://h2/system --max-downtime 1s --tls
  virtward vm migrate db1 --to h2 --postcopy-after 120s
  virtward vm migrate app1 --to h2 --with-storage --bandwidth 200MiB")]
pub struct Args {
    /// VM, by name or UUID
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Where it goes
    #[arg(long, value_name = "HOST|URI")]
    pub to: String,
    /// Only say what stands in the way, and what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Also if afterwards not all protected VMs would survive the host failures that are to be survived
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub how: How,
}

fn duration(text: &str) -> Result<SignedDuration, String> {
    match text.parse::<SignedDuration>() {
        Ok(time) if time.is_positive() => Ok(time),
        _ => Err("write a time such as 300ms, 2s or 10m".to_owned()),
    }
}

fn duration_or_never(text: &str) -> Result<Never, String> {
    if text == "never" { Ok(Never(None)) } else { duration(text).map(|time| Never(Some(time))) }
}

fn ms(time: SignedDuration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

impl How {
    /// As the engine takes them.
    pub fn options(&self) -> MigrateOptions {
        let mut options = MigrateOptions {
            bandwidth: self.bandwidth,
            with_storage: self.with_storage,
            unsafe_cache: self.unsafe_cache,
            parallel: self.connections,
            tls: self.tls,
            tls_name: self.tls_name.clone(),
            compression: self.compress.map(|method| match method {
                Compress::Zstd => Compression::Zstd,
                Compress::Zlib => Compression::Zlib,
                Compress::Xbzrle => Compression::Xbzrle,
            }),
            ..MigrateOptions::default()
        };
        options.pace.max_downtime_ms = ms(self.max_downtime);
        options.pace.postcopy_after_ms = self.postcopy_after.0.map(ms);
        options.pace.timeout_ms = self.timeout.map(ms);
        options.pace.throttle = !self.no_throttle;
        options
    }

    /// Whether the daemon can be asked for all of it.
    pub fn is_for_daemon(&self) -> bool {
        self.connections == 0
            && self.compress.is_none()
            && !self.tls
            && !self.no_throttle
            && self.data_address.is_none()
    }

    /// Nothing was said: jobs of a plan move VMs as the daemon's configuration says.
    pub fn is_unsaid(&self) -> bool {
        self.is_for_daemon()
            && ms(self.max_downtime) == PaceDefaults::default().max_downtime_ms
            && self.bandwidth.is_none()
            && self.postcopy_after.0.is_none()
            && self.timeout.is_none()
            && !self.with_storage
            && !self.unsafe_cache
    }

    /// As the daemon takes them.
    fn request(&self, to: &str, force: bool, dry_run: bool) -> MigrateRequest {
        let seconds = |time: SignedDuration| u64::try_from(time.as_secs()).unwrap_or(1).max(1);
        MigrateRequest {
            to: to.to_owned(),
            max_downtime_ms: Some(ms(self.max_downtime)),
            bandwidth_bytes_s: self.bandwidth.map(|bytes| bytes.0),
            postcopy_after_s: self.postcopy_after.0.map(seconds),
            timeout_s: self.timeout.map(seconds),
            with_storage: self.with_storage,
            unsafe_cache: self.unsafe_cache,
            force,
            dry_run,
        }
    }
}

/// Migrates.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    if args.how.is_for_daemon() && daemon_knows(app, &args.to).await {
        return by_daemon(app, args).await;
    }
    let hypervisor = connect::hypervisor(app).await?;
    let to = match connect::destination(app, &args.to, args.how.data_address.as_deref()).await {
        Ok(to) => to,
        Err(failure) => {
            hypervisor.close().await;
            return Err(failure);
        }
    };
    let env = connect::env(app, hypervisor.clone());
    let mut options = args.how.options();
    options.closed = super::super::host::closed(app, &*to.hypervisor).await;
    options.passage = Some(std::sync::Arc::new(super::super::ha::Passage::of(app, args.force)));
    let outcome = match args.dry_run {
        true => plan_migration(&env, &args.vm, &to, &options).await.map(Outcome::Planned),
        false => migrate_vm(&env, &args.vm, &to, &options, &*app.progress, &app.cancel).await.map(Outcome::Done),
    };
    app.progress.finish(&args.vm);
    hypervisor.close().await;
    to.hypervisor.close().await;
    match outcome? {
        Outcome::Planned(plan) => tell_plan(app, &plan),
        Outcome::Done(migrated) => tell(app, &migrated),
    }
}

/// Whether the destination is another host of this daemon's cluster.
async fn daemon_knows(app: &App, to: &str) -> bool {
    let hosts = daemon::hosts(app).await.unwrap_or_default();
    hosts.iter().any(|host| host.name == to && !host.is_local) && hosts.iter().any(|host| host.is_local)
}

async fn by_daemon(app: &App, args: &Args) -> Result<(), Failure> {
    let path = format!("/api/v1/vms/{}/migrate", escaped(&args.vm));
    let request = args.how.request(&args.to, args.force, args.dry_run);
    if !args.dry_run {
        let job = daemon::done(app, &path, &request, &args.vm).await?;
        return daemon::tell(app, &job, moved);
    }
    let plan: virtward_api::MigratePlan = daemon::client(app).post(&path, &request, None).await?;
    if app.json {
        out::json(&plan)?;
    } else {
        let of = |found: &virtward_api::MoveFinding| Finding {
            check: found.check.clone(),
            level: match found.level {
                virtward_api::FindingLevel::Fine => Level::Fine,
                virtward_api::FindingLevel::Warning => Level::Warning,
                virtward_api::FindingLevel::Blocker => Level::Blocker,
            },
            text: found.text.clone(),
            advice: found.advice.clone(),
        };
        let found: Vec<Finding> = plan.findings.iter().map(of).collect();
        out::text(&format!("{}{}", findings(&found), verdict(plan.is_possible, &plan.vm.name, &plan.from, &plan.to)))?;
    }
    possible(plan.is_possible, &plan.vm.name, &plan.to)
}

/// One line about a migration job that succeeded.
pub fn moved(job: &Job) -> String {
    let vm = job.vm.as_ref().map_or("", |vm| vm.name.as_str());
    let Some(result) = &job.result else { return String::new() };
    let to = result.to.as_deref().unwrap_or_default();
    let Some(from) = &result.from else { return render::printable(&format!("{vm} is on {to} already")) + "\n" };
    let downtime = result.downtime_ms.map_or(String::new(), |ms| format!(", downtime {ms} ms"));
    let total = render::duration_ms(result.total_ms.unwrap_or(0));
    let sent = Bytes(result.sent_bytes.unwrap_or(0));
    render::printable(&format!("{vm} moved from {from} to {to} in {total}{downtime}, {sent} sent")) + "\n"
}

enum Outcome {
    Planned(MigrationPlan),
    Done(Migrated),
}

fn tell_plan(app: &App, plan: &MigrationPlan) -> Result<(), Failure> {
    match app.json {
        true => out::json(plan)?,
        false => {
            let verdict = verdict(plan.possible, &plan.vm, &plan.from, &plan.to);
            out::text(&format!("{}{verdict}", findings(&plan.findings)))?;
        }
    }
    possible(plan.possible, &plan.vm, &plan.to)
}

fn possible(is_possible: bool, vm: &str, to: &str) -> Result<(), Failure> {
    match is_possible {
        true => Ok(()),
        false => Err(Failure::new(Kind::Refused, format!("{vm} cannot go to {to}")).reported()),
    }
}

fn verdict(is_possible: bool, vm: &str, from: &str, to: &str) -> String {
    let text = match is_possible {
        true => format!("{vm} can go from {from} to {to}"),
        false => format!("{vm} cannot go to {to}"),
    };
    render::printable(&text) + "\n"
}

/// Findings as a table, with advice below those that have some.
pub fn findings(findings: &[Finding]) -> String {
    let mut table = Table::new(&["CHECK", "", "FOUND"]);
    for finding in findings {
        let level = match finding.level {
            Level::Fine => "ok",
            Level::Warning => "warning",
            Level::Blocker => "BLOCKS",
        };
        table.row([finding.check.clone(), level.to_owned(), finding.text.clone()]);
        if let Some(advice) = &finding.advice {
            table.row([String::new(), String::new(), format!("→ {advice}")]);
        }
    }
    table.render(out::stdout_is_terminal())
}

/// One line about a migration that is done.
pub fn line(migrated: &Migrated) -> String {
    if migrated.already_there {
        return render::printable(&format!("{} is on {} already", migrated.vm, migrated.to));
    }
    let downtime = match migrated.downtime_ms {
        Some(ms) => format!(", downtime {ms} ms"),
        None => String::new(),
    };
    let passes = if migrated.passes > 0 { format!(", {} passes", migrated.passes) } else { String::new() };
    let held = match migrated.throttle_percent {
        0 => String::new(),
        percent => format!(", vCPUs held back by up to {percent} %"),
    };
    let postcopy = if migrated.postcopy { ", post-copy" } else { "" };
    render::printable(&format!(
        "{} moved from {} to {} in {}{downtime}{passes}, {} sent{held}{postcopy}",
        migrated.vm,
        migrated.from,
        migrated.to,
        render::duration_ms(migrated.total_ms),
        Bytes(migrated.sent_bytes)
    ))
}

fn tell(app: &App, migrated: &Migrated) -> Result<(), Failure> {
    if app.json {
        out::json(migrated)?;
    } else {
        let mut text = line(migrated) + "\n";
        for path in &migrated.left {
            text += &render::printable(&format!("  left at {}: {path}", migrated.from));
            text.push('\n');
        }
        if migrated.gates.iter().any(|gate| gate.level != Level::Fine) {
            text += &findings(&migrated.gates);
        }
        out::text(&text)?;
    }
    match migrated.has_failed_gate() {
        false => Ok(()),
        true => Err(Failure::new(Kind::Other, format!("{} has moved, and is not as it should be there", migrated.vm))
            .hint("look at the findings above")),
    }
}
