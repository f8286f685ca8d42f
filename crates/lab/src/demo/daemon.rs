//! The daemon that is left running after the story: the same lab, looked after by a policy and shown in a browser.
//!
//! Its process id is in a file beside its configuration. It is ended only if that process really runs with that
//! configuration, so a number that was given to another process in between is never hit.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::Demo;
use crate::run::wait_until;

/// Where it answers if nobody else does there.
const PORT: u16 = 8460;
const PID_FILE: &str = "serve.pid";
const POLICY: &str = "\
[[policy]]
name = \"every-five-minutes\"
repository = \"default\"
rpo = \"15m\"
select.any = [\"name:*\"]
select.exclude = [\"name:*-before\"]
schedule = { cron = \"*/5 * * * *\", time-zone = \"UTC\" }
retention = { keep-last = 12 }
";

/// Starts the daemon, gives it a policy, and says how to log in.
pub fn leave(demo: &Demo) -> Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
    let config = demo.dir.join("config.toml");
    let before = fs::read_to_string(&config).with_context(|| format!("read {}", config.display()))?;
    let state = demo.dir.join("state");
    demo.write("config.toml", &format!("{before}\n[server]\nlisten = \"{address}\"\nstate-dir = {state:?}\n"))?;
    let log_path = demo.dir.join("serve.log");
    let log = fs::File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
    let errors = log.try_clone().with_context(|| format!("use {}", log_path.display()))?;
    let mut command = Command::new(&demo.virtward);
    command.arg("--config").arg(&config).arg("serve");
    // A group of its own: Ctrl-C at the terminal that the story was told at is not meant for it.
    let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0).spawn();
    let child = child.with_context(|| format!("start {} serve", demo.virtward.display()))?;
    demo.write(PID_FILE, &format!("{}\n", child.id()))?;
    let answers = wait_until(Duration::from_secs(30), || demo.virtward(&["status"]).is_ok());
    ensure!(answers, "the daemon does not answer; {} says why", log_path.display());
    demo.write("policy.toml", POLICY)?;
    demo.virtward(&["policy", "apply", "-f", &demo.dir.join("policy.toml").display().to_string()])?;
    let token = demo.virtward(&["token", "create", "demo", "--role", "admin", "--expires", "7d", "--json"])?;
    let token: Value = serde_json::from_str(&token).context("the token is not JSON")?;
    println!("The daemon looks after these guests now, every five minutes:\n");
    println!("   https://{address}/     (a certificate of its own: the browser asks once)");
    println!("   log in with the token {}", token["secret"].as_str().context("the token has no secret")?);
    println!("   from another machine: ssh -L {0}:{address} root@THIS-HOST\n", address.port());
    Ok(())
}

/// Ends the daemon of an earlier story, if one runs. Running jobs clean up first.
pub fn end(dir: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(dir.join(PID_FILE)) else { return Ok(()) };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(()) };
    // First the handle, then the look: what is seen is what the signal reaches.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    if !runs_with(pid, &dir.join("config.toml")) {
        return Ok(());
    }
    pidfd_send_signal(&process, Signal::TERM).context("end the daemon of the last demo")?;
    let gone = wait_until(Duration::from_secs(90), || !runs_with(pid, &dir.join("config.toml")));
    ensure!(gone, "the daemon of the last demo (process {}) does not end", pid.as_raw_nonzero());
    Ok(())
}

fn runs_with(pid: Pid, config: &Path) -> bool {
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|argument| argument == config.as_os_str().as_encoded_bytes())
}

/// The usual port, or any other if somebody has it.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT))
        .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .context("find a free port on the loopback interface")?;
    Ok(listener.local_addr().context("find a free port on the loopback interface")?.port())
}
