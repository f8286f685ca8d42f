//! `virtward backup run`: back up VMs of this host, one after the other.

use std::time::Duration;

use virtward_decide::pointref;
use virtward_engine::{BackupMode, BackupOptions, Env, Hooks, backup_vm};
use virtward_model::{Bytes, DiskDevice, QuiesceRequest, RestorePoint, Vm};
use virtward_repo::{Compression, Repository};

use crate::{
    app::{self, App},
    config::BackupDefaults,
    connect,
    exit::{Failure, Kind, combine},
    out,
    view::{self, PointView},
};

/// Arguments of `backup run`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("which").required(true).args(["vms", "all"])))]
#[command(after_help = "\
The first backup of a VM reads all that is allocated, later ones what changed.
Every restore point is complete by itself. Of several VMs, one that fails does
not stop the others; the exit status is then 12.

Examples:
  virtward backup run web1
  virtward backup run --all --bandwidth 100MiB
  virtward backup run db1 --quiesce required --tag before-upgrade
  virtward backup run web1 --json")]
pub struct Args {
    /// VMs, by name or UUID
    #[arg(value_name = "VM")]
    pub vms: Vec<String>,
    /// Every VM of this host that has a disk
    #[arg(long)]
    pub all: bool,
    /// How a running VM is cut: without a pause, or with its CPUs stopped for that instant
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: Mode,
    /// Freeze the guest's file systems for the cut: if its agent answers, always, or never [default: auto]
    #[arg(long, value_enum)]
    pub quiesce: Option<Quiesce>,
    /// Shell command on this host before the freeze, with VIRTWARD_VM set
    #[arg(long, value_name = "CMD")]
    pub pre_freeze: Option<String>,
    /// Shell command on this host after the thaw, with VIRTWARD_VM set
    #[arg(long, value_name = "CMD")]
    pub post_thaw: Option<String>,
    /// Only this disk (vda); may be repeated
    #[arg(long, value_name = "TARGET")]
    pub disk: Vec<String>,
    /// Not this disk; may be repeated
    #[arg(long, value_name = "TARGET", conflicts_with = "disk")]
    pub exclude_disk: Vec<String>,
    #[command(flatten)]
    pub common: Common,
}

/// Options that VMs and images share.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// Read at most this much per second, for example 100MiB
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub bandwidth: Option<Bytes>,
    /// Read everything, as if nothing were known of earlier backups
    #[arg(long)]
    pub full: bool,
    /// Compression of new data: off, lz4, zstd, or zstd:LEVEL up to 19 [default: zstd]
    #[arg(long, value_name = "HOW")]
    pub compression: Option<Compression>,
    /// Label for the restore point; may be repeated
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
}

fn rate(text: &str) -> Result<Bytes, String> {
    match text.parse() {
        Ok(Bytes(0)) => Err("a limit of nothing would never end; leave it out for no limit".into()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Hot if it runs, cold if it is off
    Auto,
    /// CPUs stopped for the instant of the cut
    Warm,
}

/// `--quiesce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Quiesce {
    /// If the guest agent answers
    Auto,
    /// Fail without it
    Required,
    /// Never
    Off,
}

/// Backs up one VM after the other.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    // A password is worth a tenth of a second of all cores, in which the hypervisor can say what it has.
    let surveyed = async {
        let hypervisor = connect::hypervisor(app).await?;
        let known = hypervisor.list().await;
        Ok((hypervisor, known))
    };
    let (repository, surveyed) = tokio::join!(connect::repository(app), surveyed);
    let (repository, hypervisor, known) = match (repository, surveyed) {
        (Ok(repository), Ok((hypervisor, known))) => (repository, hypervisor, known),
        (Err(failure), Ok((hypervisor, _))) => {
            hypervisor.close().await;
            return Err(failure);
        }
        (Err(failure), Err(_)) | (Ok(_), Err(failure)) => return Err(failure),
    };
    repository.look_ahead();
    let outcome = match known {
        Ok(known) => run_on(app, args, &repository, &connect::env(app, hypervisor.clone()), &known).await,
        Err(error) => Err(error.into()),
    };
    hypervisor.close().await;
    outcome
}

async fn run_on(app: &App, args: &Args, repository: &Repository, env: &Env, known: &[Vm]) -> Result<(), Failure> {
    let wanted = match args.all {
        true => protectable(app, known),
        false => args.vms.clone(),
    };
    if wanted.is_empty() {
        return Err(Failure::new(Kind::NotFound, format!("there is no VM with a disk at {}", env.uri))
            .hint("virtward vm list shows the VMs of this host"));
    }
    let options = options(args, &app.settings.backup);
    let mut failures = Vec::new();
    for name in &wanted {
        match one(app, repository, env, known, name, &options).await {
            Ok(point) => print(app, &point)?,
            Err(failure) => {
                let failure = failure.about(name);
                app::report(&failure, app.json);
                failures.push(failure);
            }
        }
        if app.cancel.is_cancelled() {
            break;
        }
    }
    match combine(wanted.len(), &failures) {
        None => Ok(()),
        Some(kind) => {
            Err(Failure::new(kind, format!("{} of {} backups failed", failures.len(), wanted.len())).reported())
        }
    }
}

/// Prints a finished backup, as JSON or for people.
pub fn print(app: &App, point: &RestorePoint) -> Result<(), Failure> {
    match app.json {
        true => out::json(&PointView::from(point)),
        false => out::text(&view::summary(point, out::stdout_is_terminal())),
    }
}

fn protectable(app: &App, known: &[Vm]) -> Vec<String> {
    let (with, without): (Vec<&Vm>, Vec<&Vm>) = known
        .iter()
        .partition(|vm| vm.disks.iter().any(|disk| matches!(disk.device, DiskDevice::Disk) && !disk.read_only));
    for vm in without {
        app.progress.note(&format!("{}: left out, it has no disk to back up", vm.name));
    }
    with.into_iter().map(|vm| vm.name.clone()).collect()
}

async fn one(
    app: &App,
    repository: &Repository,
    env: &Env,
    known: &[Vm],
    name: &str,
    options: &BackupOptions,
) -> Result<RestorePoint, Failure> {
    let Some(vm) = known.iter().find(|vm| vm.name == name || vm.uuid.to_string().eq_ignore_ascii_case(name)) else {
        return Err(unknown_vm(name, known, &env.uri));
    };
    let uuid = vm.uuid.to_string();
    let outcome = backup_vm(env, repository, &uuid, options, &*app.progress, &app.cancel).await;
    app.progress.finish(&vm.name);
    Ok(outcome?)
}

/// The error for a VM that the hypervisor does not have.
pub fn unknown_vm(name: &str, known: &[Vm], uri: &str) -> Failure {
    let near = pointref::nearest(name, known.iter().map(|vm| vm.name.as_str()));
    let hint = match near.is_empty() {
        true => "virtward vm list shows the VMs of this host".to_owned(),
        false => format!("did you mean {}?", near.join(" or ")),
    };
    Failure::new(Kind::NotFound, format!("there is no VM {name} at {uri}")).hint(hint)
}

fn options(args: &Args, defaults: &BackupDefaults) -> BackupOptions {
    let quiesce = match args.quiesce {
        Some(Quiesce::Auto) => QuiesceRequest::Auto,
        Some(Quiesce::Required) => QuiesceRequest::Required,
        Some(Quiesce::Off) => QuiesceRequest::Off,
        None => defaults.quiesce.unwrap_or_default(),
    };
    BackupOptions {
        mode: match args.mode {
            Mode::Auto => BackupMode::Auto,
            Mode::Warm => BackupMode::Warm,
        },
        quiesce,
        hooks: Hooks {
            pre_freeze: args.pre_freeze.clone().or_else(|| defaults.pre_freeze.clone()),
            post_thaw: args.post_thaw.clone().or_else(|| defaults.post_thaw.clone()),
            timeout: None,
        },
        only_disks: args.disk.clone(),
        exclude_disks: args.exclude_disk.clone(),
        ..common(&args.common, defaults)
    }
}

/// What VMs and images share of the options.
pub fn common(args: &Common, defaults: &BackupDefaults) -> BackupOptions {
    let base = BackupOptions::default();
    BackupOptions {
        agent_timeout: defaults.agent_timeout_s.map_or(base.agent_timeout, Duration::from_secs),
        bandwidth: args.bandwidth.or(defaults.bandwidth),
        full: args.full,
        tags: args.tag.clone(),
        compression: args.compression.or(defaults.compression).unwrap_or_default(),
        scratch_reserve: defaults.scratch_reserve.unwrap_or(base.scratch_reserve),
        ..base
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn flags_beat_the_configuration() {
        let defaults = BackupDefaults {
            quiesce: Some(QuiesceRequest::Required),
            bandwidth: Some(Bytes::mib(1)),
            agent_timeout_s: Some(3),
            ..BackupDefaults::default()
        };
        let plain = options(&Line::parse_from(["x", "web1"]).args, &defaults);
        assert_eq!((plain.quiesce, plain.bandwidth), (QuiesceRequest::Required, Some(Bytes::mib(1))));
        assert_eq!(plain.agent_timeout, Duration::from_secs(3));
        let asked = ["x", "web1", "--quiesce", "off", "--bandwidth", "2MiB", "--mode", "warm", "--tag", "a", "--full"];
        let asked = options(&Line::parse_from(asked).args, &defaults);
        assert_eq!((asked.quiesce, asked.bandwidth), (QuiesceRequest::Off, Some(Bytes::mib(2))));
        assert_eq!((asked.mode, asked.full, asked.tags), (BackupMode::Warm, true, vec!["a".to_owned()]));
    }

    #[test]
    fn a_vm_or_all_but_not_both() {
        assert!(Line::try_parse_from(["x"]).is_err());
        assert!(Line::try_parse_from(["x", "web1", "--all"]).is_err());
        assert!(Line::try_parse_from(["x", "--all"]).is_ok());
        assert!(Line::try_parse_from(["x", "web1", "--bandwidth", "fast"]).is_err());
        assert!(Line::try_parse_from(["x", "web1", "--bandwidth", "0"]).is_err());
        for (text, compression) in [
            ("off", Compression::Off),
            ("lz4", Compression::Lz4),
            ("zstd", Compression::Zstd(1)),
            ("zstd:7", Compression::Zstd(7)),
        ] {
            assert_eq!(text.parse(), Ok(compression));
        }
        for text in ["", "gzip", "zstd:0", "zstd:20", "lz4:1", "off:1"] {
            assert!(Line::try_parse_from(["x", "web1", "--compression", text]).is_err(), "{text}");
        }
    }
}
