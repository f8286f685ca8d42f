//! `fence_virtward_lab`: a fence agent for the lab's hosts, which speaks the fence-agents API: `key=value` lines on
//! standard input (`action`, `plug`), `Status: ON|OFF` and exit status 0, 1 or 2.
//!
//! How it behaves is set per host (`host fence-mode`): honest; dead, as a controller that lost its power too; slow; or
//! lying: it says that it switched, and that the host is off, and did nothing.

use std::{fs, io::BufRead, os::unix::fs::PermissionsExt, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    bmc,
    names::HostName,
    state::{Host, Lab, write_atomically},
};

/// How long a dead controller is waited for, and a slow one takes.
const DEAD: Duration = Duration::from_secs(8);
const SLOW: Duration = Duration::from_secs(6);

/// How a host's fence device behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Does what it says.
    Honest,
    /// Does not answer.
    Dead,
    /// Takes 6 s for every answer.
    Slow,
    /// Says that it switched the host off, and did not.
    Lying,
}

impl Mode {
    fn path(lab: &Lab, host: &Host) -> PathBuf {
        lab.host_run_dir(host).join("fence-mode")
    }

    /// The mode of a host's device.
    pub fn of(lab: &Lab, host: &Host) -> Self {
        let text = fs::read_to_string(Self::path(lab, host)).unwrap_or_default();
        Self::from_str(text.trim(), true).unwrap_or(Self::Honest)
    }

    /// Changes it.
    pub fn set(self, lab: &Lab, host: &Host) -> Result<()> {
        let _ = fs::remove_file(lie(lab, host));
        write_atomically(&Self::path(lab, host), self.as_str().as_bytes())
    }

    /// As it is typed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Honest => "honest",
            Self::Dead => "dead",
            Self::Slow => "slow",
            Self::Lying => "lying",
        }
    }
}

/// Is there while a lying device claims that its host is off.
fn lie(lab: &Lab, host: &Host) -> PathBuf {
    lab.host_run_dir(host).join("fence-lie")
}

/// The lab's fence agent as a program of its own.
pub fn agent(lab: &Lab) -> PathBuf {
    Lab::run_dir(&lab.name).join("fence_virtward_lab")
}

/// Writes the agent.
pub fn install(lab: &Lab) -> Result<()> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let own = own.to_str().context("this program's path is not UTF-8")?.replace('\'', r"'\''");
    let path = agent(lab);
    write_atomically(&path, format!("#!/bin/sh\nexec '{own}' fence-agent --name {}\n", lab.name).as_bytes())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("cannot make the fence agent executable")
}

/// Runs the agent; its exit status.
pub fn run(lab: &Lab, input: impl BufRead) -> u8 {
    match perform(lab, input) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ERROR: {error:#}");
            1
        }
    }
}

fn perform(lab: &Lab, input: impl BufRead) -> Result<u8> {
    let (mut action, mut plug) = ("reboot".to_owned(), None);
    for line in input.take(64 << 10).lines() {
        let line = line.context("cannot read the parameters")?;
        match line.trim().split_once('=') {
            Some(("action", value)) => action = value.to_owned(),
            Some(("plug" | "port", value)) => plug = Some(value.to_owned()),
            // As the distribution's agents do.
            Some((name, _)) => eprintln!("WARNING: Parse error: Ignoring unknown option '{name}'"),
            None => {}
        }
    }
    if action == "metadata" {
        print!("{METADATA}");
        return Ok(0);
    }
    let name: HostName = plug.context("You have to enter plug number or machine identification")?.parse()?;
    let host = lab.host(&name)?;
    if action == "validate-all" {
        return Ok(0);
    }
    let mode = Mode::of(lab, host);
    match mode {
        Mode::Dead => {
            thread::sleep(DEAD);
            bail!("Connection timed out");
        }
        Mode::Slow => thread::sleep(SLOW),
        Mode::Honest | Mode::Lying => {}
    }
    act(lab, host, &action, mode == Mode::Lying)
}

fn act(lab: &Lab, host: &Host, action: &str, lying: bool) -> Result<u8> {
    let switch = |to: &str| match bmc::ask(lab, host, to)?.as_str() {
        "ok" => Ok(()),
        other => bail!("{other}"),
    };
    match action {
        "status" if lying && lie(lab, host).exists() => {
            println!("Status: OFF");
            Ok(2)
        }
        "status" => match bmc::ask(lab, host, "status")?.as_str() {
            "on" => {
                println!("Status: ON");
                Ok(0)
            }
            "off" => {
                println!("Status: OFF");
                Ok(2)
            }
            other => bail!("{other}"),
        },
        "monitor" => bmc::ask(lab, host, "status").map(|_| 0),
        "off" | "reboot" if lying => {
            write_atomically(&lie(lab, host), b"")?;
            println!("Success: Powered OFF");
            Ok(0)
        }
        "off" => switch("off").map(|()| println!("Success: Powered OFF")).map(|()| 0),
        "on" => {
            let _ = fs::remove_file(lie(lab, host));
            switch("on").map(|()| println!("Success: Powered ON")).map(|()| 0)
        }
        "reboot" => switch("off").and_then(|()| switch("on")).map(|()| println!("Success: Rebooted")).map(|()| 0),
        other => bail!("Failed: Unrecognised action '{other}'"),
    }
}

const METADATA: &str = r#"<?xml version="1.0" ?>
<resource-agent name="fence_virtward_lab" shortdesc="Fence agent for hosts of virtward-lab">
<longdesc>Switches the power of a host of a lab.</longdesc>
<vendor-url>https://github.com/virtward/virtward</vendor-url>
<parameters>
	<parameter name="action" unique="0" required="1">
		<content type="string" default="reboot" />
		<shortdesc lang="en">Fencing action</shortdesc>
	</parameter>
	<parameter name="plug" unique="0" required="1" obsoletes="port">
		<content type="string" />
		<shortdesc lang="en">Name of the host</shortdesc>
	</parameter>
	<parameter name="port" unique="0" required="1" deprecated="1">
		<content type="string" />
		<shortdesc lang="en">Name of the host</shortdesc>
	</parameter>
</parameters>
<actions>
	<action name="on" automatic="0"/>
	<action name="off" />
	<action name="reboot" />
	<action name="status" />
	<action name="monitor" />
	<action name="metadata" />
	<action name="validate-all" />
</actions>
</resource-agent>
"#;
