//! virtward-lab: several real libvirt hosts on one machine, made of namespaces, to test Virtward on or to try it.
//!
//! Drives the system's own tools (ip, nft, tc, virsh, qemu-img, mkfs) and keeps little state: what runs is found by
//! looking. It never touches a libvirt, a network or a process that it did not make.

mod agent;
mod bmc;
mod capabilities;
mod cli;
mod daemon;
mod demo;
mod disk;
mod etcd;
mod fence;
mod fill;
mod host;
mod lab;
mod names;
mod net;
mod proc;
mod run;
mod state;
mod storage;
mod virsh;
mod vm;
mod writers;

use std::{
    io::Write,
    process::{self, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;
use serde_json::json;

use crate::{
    cli::{Cli, Command, HostCommand, NetCommand, PartitionArgs, StorageCommand, Switch, VmCommand},
    host::HostRef,
    names::{HostName, LabName},
    state::{Fault, Lab, Lock},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match perform(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("virtward-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(cli: &Cli) -> Result<u8> {
    if !rustix::process::geteuid().is_root() {
        bail!("a lab is made of namespaces and links, which only root can make; run this as root");
    }
    let name = &cli.lab;
    match &cli.command {
        Command::Up(args) => {
            let started = Instant::now();
            let status = lab::up(name, args)?;
            print(cli, &status, || format!("{}up in {:.1} s", status.text(), started.elapsed().as_secs_f64()))?;
        }
        Command::Status => {
            let status = lab::status(&Lab::load(name)?);
            print(cli, &status, || status.text().trim_end().to_owned())?;
        }
        Command::Down => {
            let found = lab::down(name)?;
            let text = if found { "is down; nothing of it is left" } else { "was not up; there was nothing to remove" };
            print(cli, &json!({"name": name, "removed": found}), || format!("lab {name} {text}"))?;
        }
        Command::List => {
            let names = state::all_labs();
            print(cli, &names, || names.iter().map(LabName::as_str).collect::<Vec<_>>().join("\n"))?;
        }
        Command::Env(args) => {
            let lab = Lab::load(name)?;
            let uri = lab.uri(lab.host_or_first(args.host.as_ref())?);
            print(cli, &json!({"VIRTWARD_CONNECT": uri, "LIBVIRT_DEFAULT_URI": uri}), || {
                format!("export VIRTWARD_CONNECT='{uri}'\nexport LIBVIRT_DEFAULT_URI='{uri}'")
            })?;
        }
        Command::Host(command) => host_command(cli, command)?,
        Command::Partition(args) => partition(cli, args)?,
        Command::Heal => {
            let (_lock, mut lab) = locked(name)?;
            lab.faults.clear();
            net::apply_faults(&lab)?;
            lab.save()?;
            print(cli, &json!({"partitions": []}), || "every host hears every other one".to_owned())?;
        }
        Command::Net(NetCommand::Limit { host, rate }) => limit(cli, host, rate)?,
        Command::Storage(command) => storage_command(cli, command)?,
        Command::Vm(command) => return vm_command(cli, command),
        Command::Bmc { host } => {
            let lab = Lab::find(name)?.with_context(|| format!("lab {name} is not there"))?;
            bmc::serve(&lab, lab.host(host)?)?;
        }
        Command::FenceAgent => return Ok(fence::run(&Lab::load(name)?, std::io::stdin().lock())),
        Command::Demo { virtward, clear } => demo::run(virtward, *clear)?,
        Command::HostInit { host } => {
            // `up` calls this before the lab is complete.
            let lab = Lab::find(name)?.with_context(|| format!("lab {name} is not there"))?;
            match host::init(&lab, lab.host(host)?)? {}
        }
    }
    Ok(0)
}

/// A lab's state, to be changed under its lock.
fn locked(name: &LabName) -> Result<(Lock, Lab)> {
    // Looked at first, so that a wrong name leaves no lock file.
    Lab::load(name)?;
    let lock = Lock::lab(name)?;
    Ok((lock, Lab::load(name)?))
}

fn host_command(cli: &Cli, command: &HostCommand) -> Result<()> {
    match command {
        HostCommand::Exec { host, command } => {
            let lab = Lab::load(&cli.lab)?;
            match HostRef::new(&lab, lab.host(host)?).exec(command)? {}
        }
        HostCommand::Power { switch, host } => {
            let (_lock, lab) = locked(&cli.lab)?;
            let at = HostRef::new(&lab, lab.host(host)?);
            let state = match (switch, at.keeper().is_some()) {
                (Switch::On, true) => bail!("host {host} has power already"),
                (Switch::On, false) => at.power_on().map(|()| "on")?,
                (Switch::Off, _) => at.power_off().map(|()| "off")?,
            };
            print(cli, &json!({"host": host, "power": state}), || format!("host {host}: power {state}"))
        }
        HostCommand::Pause { host } => freeze(cli, host, true),
        HostCommand::Resume { host } => freeze(cli, host, false),
        HostCommand::Daemon { action, host } => {
            let (_lock, lab) = locked(&cli.lab)?;
            let at = HostRef::new(&lab, lab.host(host)?);
            daemon::act(at, *action)?;
            let state = if daemon::pid(at).is_some() { "running" } else { "stopped" };
            print(cli, &json!({"host": host, "daemon": state}), || format!("host {host}: daemon {state}"))
        }
        HostCommand::FenceMode { host, mode } => {
            let (_lock, lab) = locked(&cli.lab)?;
            mode.set(&lab, lab.host(host)?)?;
            let mode = mode.as_str();
            print(cli, &json!({"host": host, "fence_mode": mode}), || format!("host {host}: fence device {mode}"))
        }
        HostCommand::Libvirtd { action, host } => {
            let (_lock, lab) = locked(&cli.lab)?;
            let at = HostRef::new(&lab, lab.host(host)?);
            at.libvirtd_action(*action)?;
            let state = if at.libvirtd().is_some() { "running" } else { "stopped" };
            print(cli, &json!({"host": host, "libvirtd": state}), || format!("host {host}: libvirtd {state}"))
        }
    }
}

fn freeze(cli: &Cli, host: &HostName, stop: bool) -> Result<()> {
    let (_lock, lab) = locked(&cli.lab)?;
    let at = HostRef::new(&lab, lab.host(host)?);
    if at.keeper().is_none() {
        bail!("host {host} has no power");
    }
    at.members().freeze(stop)?;
    print(cli, &json!({"host": host, "paused": stop}), || {
        format!("host {host}: {}", if stop { "paused" } else { "goes on" })
    })
}

fn storage_command(cli: &Cli, command: &StorageCommand) -> Result<()> {
    let (_lock, lab) = locked(&cli.lab)?;
    let (host, stalled) = match command {
        StorageCommand::Stall { host } => {
            storage::stall(HostRef::new(&lab, lab.host(host)?))?;
            (host, true)
        }
        StorageCommand::Heal { host } => {
            storage::heal(&lab.name, &lab.host(host)?.name)?;
            (host, false)
        }
    };
    print(cli, &json!({"host": host, "storage_stalled": stalled}), || {
        format!("host {host}: shared storage {}", if stalled { "does not answer" } else { "answers" })
    })
}

fn partition(cli: &Cli, args: &PartitionArgs) -> Result<()> {
    let (_lock, mut lab) = locked(&cli.lab)?;
    lab.host(&args.host)?;
    if let Some(from) = &args.from {
        lab.host(from)?;
        if *from == args.host {
            bail!("a host cannot be cut off from itself");
        }
    }
    let fault = Fault { host: args.host.clone(), from: args.from.clone(), one_way: args.one_way };
    let text = format!("{fault}; undo with: virtward-lab heal");
    if !lab.faults.contains(&fault) {
        lab.faults.push(fault);
    }
    net::apply_faults(&lab)?;
    lab.save()?;
    print(cli, &json!({"partitions": lab.faults}), || text)
}

fn limit(cli: &Cli, host: &HostName, rate: &net::Rate) -> Result<()> {
    let (_lock, mut lab) = locked(&cli.lab)?;
    net::limit(&lab, lab.host(host)?, rate)?;
    if let Some(entry) = lab.hosts.iter_mut().find(|h| h.name == *host) {
        entry.rate_limit.clone_from(&rate.0);
    }
    lab.save()?;
    print(cli, &json!({"host": host, "rate_limit": rate.0}), || match &rate.0 {
        Some(rate) => format!("host {host}: limited to {rate} in each direction"),
        None => format!("host {host}: not limited"),
    })
}

fn vm_command(cli: &Cli, command: &VmCommand) -> Result<u8> {
    let lab = Lab::load(&cli.lab)?;
    match command {
        VmCommand::Create(args) => {
            let made = vm::create(&lab, args)?;
            print(cli, &made, || {
                let boot = made.boot_seconds.map_or_else(String::new, |s| format!(", up {s:.1} s after its start"));
                format!("guest {} on {}: disks made in {:.1} s{boot}", made.name, made.host, made.disks_seconds)
            })?;
        }
        VmCommand::Exec { vm, timeout, command } => {
            let virsh = vm::running(&lab, vm)?;
            let outcome = agent::exec(&virsh, vm.as_str(), command, *timeout)?;
            std::io::stdout().write_all(&outcome.stdout).context("cannot write the output")?;
            std::io::stderr().write_all(&outcome.stderr).context("cannot write the output")?;
            if outcome.truncated {
                eprintln!("virtward-lab: the agent kept only the beginning of the output");
            }
            return Ok(outcome.exit_code);
        }
        VmCommand::Wait { vm, timeout } => {
            let started = Instant::now();
            vm::wait(&lab, vm, *timeout)?;
            let seconds = started.elapsed().as_secs_f64();
            print(cli, &json!({"name": vm, "up": true, "waited_seconds": seconds}), || format!("guest {vm} is up"))?;
        }
        VmCommand::CheckWriters { vm } => {
            let report = writers::check(&writers::disk(&lab, vm))?;
            let good = report.faults.is_empty();
            print(cli, &report, || report.text())?;
            return Ok(u8::from(!good));
        }
        VmCommand::List => {
            let all = vm::list(&lab);
            print(cli, &all, || {
                let lines: Vec<String> =
                    all.iter().map(|v| format!("{:<24}{:<6}{}", v.name, v.host, v.state)).collect();
                lines.join("\n")
            })?;
        }
        VmCommand::Rm { vm } => {
            for vm in vm {
                vm::remove(&lab, vm)?;
            }
            print(cli, &json!({"removed": vm}), || format!("removed {} guest(s)", vm.len()))?;
        }
    }
    Ok(0)
}

/// Prints a result: JSON when asked, else text. A reader that went away (a closed pipe) is no error of ours.
fn print(cli: &Cli, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let line = if cli.json { serde_json::to_string(value).context("cannot write JSON")? } else { text() };
    if line.is_empty() {
        return Ok(());
    }
    match writeln!(std::io::stdout(), "{line}") {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => process::exit(0),
        other => other.context("cannot write the output"),
    }
}
