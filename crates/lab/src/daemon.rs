//! The product on the lab's hosts, as a service manager would run it: `virtward serve` in each of them, joined to one
//! cluster, started with the host, and started again a second after it died.
//!
//! What it is run with is below the host's own directory, so it outlives a power cut, as a disk does.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::process::Signal;

use crate::{
    bmc, etcd, fence,
    host::HostRef,
    run::{TOOL_TIMEOUT, output_of, wait_until},
    state::{Lab, write_atomically},
};

/// How long a daemon may take to end when told so, and to answer after its start.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The port on which daemons answer each other.
const PEER_PORT: u16 = 8461;

/// What can be done to a host's daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Start it.
    Start,
    /// Stop it in order; it stays stopped.
    Stop,
    /// Stop and start it.
    Restart,
    /// Kill it at once; it is started again a second later, as a service manager does.
    Kill,
}

fn dir(at: HostRef<'_>) -> PathBuf {
    at.lab.host_var_dir(at.host).join("virtward")
}

/// The daemon's configuration.
pub fn config(at: HostRef<'_>) -> PathBuf {
    dir(at).join("config.toml")
}

/// Where the daemon keeps certificates for QEMU.
pub fn migration_certificates(at: HostRef<'_>) -> PathBuf {
    dir(at).join("migration")
}

/// The daemon's log.
pub fn log(at: HostRef<'_>) -> PathBuf {
    at.lab.host_var_dir(at.host).join("log/virtward.log")
}

/// The process of the host's daemon, when it runs.
pub fn pid(at: HostRef<'_>) -> Option<i32> {
    at.members().pid_in_file(&at.lab.host_run_dir(at.host).join("daemon.pid"))
}

fn program(lab: &Lab) -> Result<&Path> {
    lab.daemon.as_deref().context("this lab runs no daemons; make one with: virtward-lab up --etcd --daemon PATH")
}

/// Makes a cluster of all hosts and starts their daemons. `more` is added to each configuration, with @HOST@, @WATCHDOG@
/// and @FENCE_AGENT@ replaced. Unless it has `[moves]`, the hosts reach each other's libvirt over TCP.
pub fn found(lab: &Lab, more: &str) -> Result<()> {
    let hosts: Vec<HostRef<'_>> = lab.hosts.iter().map(|host| HostRef::new(lab, host)).collect();
    let (first, others) = hosts.split_first().context("a lab without hosts")?;
    let key = dir(*first).join("repo.key");
    for at in &hosts {
        fs::create_dir_all(dir(*at)).with_context(|| format!("cannot create {}", dir(*at).display()))?;
        write_atomically(&config(*at), configuration(*at, &key, more).as_bytes())?;
    }
    virtward(*first, &["repo", "init"])?;
    let peer = |at: &HostRef<'_>| format!("{}:{PEER_PORT}", at.host.address);
    let endpoints = etcd::endpoints(lab).join(",");
    let name = first.host.name.as_str();
    virtward(*first, &["cluster", "init", "--etcd", &endpoints, "--name", name, "--address", &peer(first)])?;
    start(*first)?;
    // It gives out tokens once it leads.
    let mut token = None;
    wait_until(START_TIMEOUT, || {
        token = virtward(*first, &["cluster", "token"]).ok();
        token.is_some()
    });
    if token.is_none() {
        bail!("the first daemon gives no token; its log is {}", log(*first).display());
    }
    for at in others {
        let token = virtward(*first, &["cluster", "token"])?;
        let token = token.split_whitespace().find(|word| word.starts_with("vwj1.")).context("no token was printed")?;
        let name = at.host.name.as_str();
        virtward(*at, &["cluster", "join", token, "--at", &peer(first), "--name", name, "--address", &peer(at)])?;
        start(*at)?;
    }
    Ok(())
}

fn configuration(at: HostRef<'_>, key: &Path, more: &str) -> String {
    let dir = dir(at);
    let path = |name: &str| dir.join(name).display().to_string();
    let more = more
        .replace("@HOST@", at.host.name.as_str())
        .replace("@WATCHDOG@", &bmc::watchdog_socket(at.lab, at.host).display().to_string())
        .replace("@FENCE_AGENT@", &fence::agent(at.lab).display().to_string());
    let moves = match more.contains("[moves]") {
        true => String::new(),
        false => {
            let certificates = migration_certificates(at);
            format!("[moves]\nuri = {:?}\ntls-dir = {certificates:?}\n", at.lab.tcp_uri(at.host))
        }
    };
    format!(
        "repo = {:?}\nconnect = {:?}\nkey-file = {:?}\nruntime-dir = {:?}\nscratch-dir = {:?}\ncache-size = 0\n\
         [server]\nstate-dir = {:?}\n{moves}{more}\n",
        at.lab.shared_dir().join("repo").display().to_string(),
        at.lab.uri(at.host),
        key.display().to_string(),
        at.lab.host_run_dir(at.host).join("virtward").display().to_string(),
        path("scratch"),
        path("state"),
    )
}

/// Runs the product in a host.
fn virtward(at: HostRef<'_>, arguments: &[&str]) -> Result<String> {
    let program = program(at.lab)?.to_str().context("the daemon's path is not UTF-8")?;
    let mut command = at.command(program)?;
    command.arg("--config").arg(config(at)).args(arguments);
    output_of(&mut command, None, TOOL_TIMEOUT)
}

/// Starts a host's daemon, and whoever starts it again, and waits until it answers.
pub fn start(at: HostRef<'_>) -> Result<()> {
    let stop = at.lab.host_run_dir(at.host).join("daemon-stop");
    let _ = fs::remove_file(&stop);
    if pid(at).is_none() {
        let log_file =
            fs::File::options().create(true).append(true).open(log(at)).context("cannot write virtward.log")?;
        let mut command = at.command("setsid")?;
        let script = "while [ ! -e \"$4\" ]; do \"$1\" --config \"$2\" serve & echo $! >\"$3\"; wait $!; sleep 1; done";
        command.args(["sh", "-c", script, "virtward-lab"]).arg(program(at.lab)?).arg(config(at));
        command.arg(at.lab.host_run_dir(at.host).join("daemon.pid")).arg(&stop).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
        command.spawn().context("cannot run nsenter")?;
    }
    let socket = at.lab.host_run_dir(at.host).join("virtward/api.sock");
    if wait_until(START_TIMEOUT, || pid(at).is_some() && std::os::unix::net::UnixStream::connect(&socket).is_ok()) {
        return Ok(());
    }
    bail!("the daemon of host {} does not answer; its log is {}", at.host.name, log(at).display())
}

/// Acts on a host's daemon.
pub fn act(at: HostRef<'_>, action: Action) -> Result<()> {
    program(at.lab)?;
    match action {
        Action::Start => start(at),
        Action::Stop => stop(at),
        Action::Restart => stop(at).and_then(|()| start(at)),
        Action::Kill => {
            let pid = pid(at).with_context(|| format!("no daemon runs on host {}", at.host.name))?;
            at.members().signal(pid, Signal::KILL);
            Ok(())
        }
    }
}

fn stop(at: HostRef<'_>) -> Result<()> {
    write_atomically(&at.lab.host_run_dir(at.host).join("daemon-stop"), b"")?;
    for signal in [Signal::TERM, Signal::KILL] {
        let Some(pid) = pid(at) else { break };
        at.members().signal(pid, signal);
        if wait_until(STOP_TIMEOUT, || self::pid(at) != Some(pid)) {
            break;
        }
    }
    // The loop that starts it again looks for the word to stop within a second.
    std::thread::sleep(Duration::from_millis(1200));
    match pid(at) {
        None => Ok(()),
        Some(pid) => bail!("the daemon of host {} (process {pid}) does not end", at.host.name),
    }
}
