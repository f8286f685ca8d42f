//! The daemon as a process: killed in the middle of a job, started twice, stopped in order, asked by the command line.
//! libvirt's test driver gives it VMs; their images are real files.

use std::{
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::{Ran, Sandbox, fill};
use serde_json::Value;

pub const LIMIT: Duration = Duration::from_secs(60);
const UUID: &str = "6f1f3a3e-8d0b-4a57-9f0a-1f2e3d4c5b6a";

/// A sandbox with a VM that is off, whose disk takes a while to read.
pub fn place() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    fill(&sandbox.path("web1.raw"), 0, 48 << 20, 7);
    let node = format!(
        "<node><domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>\
         <test:runstate>5</test:runstate><name>web1</name><uuid>{UUID}</uuid><memory>8192</memory>\
         <os><type>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{}'/><target dev='vda'/></disk></devices></domain></node>",
        sandbox.text("web1.raw")
    );
    sandbox.write("node.xml", node);
    let config = format!(
        "runtime-dir = {:?}\nscratch-dir = {:?}\n[backup]\nbandwidth = \"8MiB\"\n\
         [server]\nstate-dir = {:?}\n",
        sandbox.text("run"),
        sandbox.text("scratch"),
        sandbox.text("state"),
    );
    sandbox.write("etc/config.toml", config);
    sandbox
}

/// Where the VM is.
pub fn connect(sandbox: &Sandbox) -> String {
    format!("test://{}", sandbox.text("node.xml"))
}

/// A daemon that is killed when it goes out of scope.
pub struct Daemon(pub Child, PathBuf);

impl Daemon {
    pub fn start(sandbox: &Sandbox) -> Self {
        let mut command = sandbox.command(&["serve", "--connect", &connect(sandbox)]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self::spawn(sandbox, command)
    }

    /// With a command of one's own.
    pub fn spawn(sandbox: &Sandbox, mut command: std::process::Command) -> Self {
        let child = command.spawn().unwrap();
        let mut daemon = Self(child, sandbox.path("run/api.sock"));
        let until = Instant::now() + LIMIT;
        while sandbox.run(&["status", "--json"]).code != 0 {
            assert!(daemon.0.try_wait().unwrap().is_none(), "the daemon ended");
            assert!(Instant::now() < until, "the daemon does not answer");
            thread::sleep(Duration::from_millis(100));
        }
        daemon
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the daemon does not end");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks the API as any program would.
pub fn ask(daemon: &Daemon, method: &str, path: &str, body: &str) -> Value {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(&daemon.1).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

pub fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < until, "waited too long for {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn job(sandbox: &Sandbox, id: &str) -> Value {
    sandbox.run(&["job", "show", id, "--json"]).ok().json()
}

fn start_backup(sandbox: &Sandbox, daemon: &Daemon) -> String {
    wait("the VM", || ask(daemon, "GET", "/api/v1/vms", "")["total"] == 1);
    let made = ask(daemon, "POST", "/api/v1/jobs/backup", "{\"vm\": \"web1\"}");
    let id = made["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
    wait("the job to copy", || {
        let job = job(sandbox, &id);
        assert!(matches!(job["state"].as_str(), Some("queued" | "running")), "{job}");
        job["progress"]["done_bytes"].as_u64() > Some(0)
    });
    id
}

#[test]
fn killed_in_the_middle_of_a_job_it_records_that_and_does_it_again() {
    let sandbox = place();
    let mut daemon = Daemon::start(&sandbox);
    let id = start_backup(&sandbox, &daemon);
    // Nobody else works on the VM meanwhile, with or without the daemon.
    sandbox
        .run(&["backup", "run", "web1", "--connect", &connect(&sandbox)])
        .code(5)
        .says("another job of Virtward works on web1");
    daemon.signal(rustix::process::Signal::KILL);
    daemon.wait();

    let daemon = Daemon::start(&sandbox);
    let interrupted = job(&sandbox, &id);
    assert_eq!(interrupted["state"], "interrupted", "{interrupted}");
    let jobs = sandbox.run(&["job", "list", "--json"]).ok().json();
    let again = &jobs[0];
    assert_eq!(again["origin"]["after"], id.as_str(), "{jobs}");
    let watched = sandbox.run(&["job", "watch", again["id"].as_str().unwrap(), "--json"]).ok().json();
    assert_eq!(watched["state"], "succeeded", "{watched}");
    drop(daemon);
    // What was made is whole, and the command line works without the daemon.
    sandbox.run(&["backup", "verify", "web1@latest"]).ok();
    let points = sandbox.run(&["backup", "list", "--json"]).ok().json();
    assert_eq!(points.as_array().map(Vec::len), Some(1), "{points}");
}

#[test]
fn told_to_stop_it_stops_its_jobs_and_ends_well() {
    let sandbox = place();
    let mut daemon = Daemon::start(&sandbox);
    let id = start_backup(&sandbox, &daemon);
    let asked = Instant::now();
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.wait().success());
    assert!(asked.elapsed() < Duration::from_secs(30));
    assert!(!sandbox.path("run/api.sock").exists(), "the socket is left");
    let daemon = Daemon::start(&sandbox);
    assert_eq!(job(&sandbox, &id)["state"], "interrupted");
    drop(daemon);
    let ran: Ran = sandbox.run(&["status"]).code(1);
    ran.says("no daemon answers").says("systemctl start virtward");
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let sandbox = place();
    let daemon = Daemon::start(&sandbox);
    let pid = daemon.0.id().to_string();
    sandbox.run(&["serve"]).code(5).says("state.db").says(&pid);
    // With a state of its own it still does not take the socket away.
    let config = std::fs::read_to_string(sandbox.path("etc/config.toml")).unwrap();
    sandbox.write("etc/config.toml", config.replace("/state\"", "/state2\""));
    sandbox.run(&["serve"]).code(5).says("another daemon answers there");
    assert_eq!(ask(&daemon, "GET", "/api/v1/version", "")["product"], "virtward");
}

#[test]
fn policies_and_tokens_are_managed_from_the_command_line() {
    let sandbox = place();
    let file = sandbox.write(
        "gold.toml",
        "[[policy]]\nname = \"gold\"\nrepository = \"default\"\nselect.any = [\"name:web*\"]\n\
         schedule = { cron = \"0 3 * * *\", time-zone = \"Europe/Berlin\" }\nretention = { keep-daily = 7 }\n",
    );
    sandbox.run(&["policy", "check", "-f", &file]).ok();
    let bad = sandbox.write("bad.toml", "[[policy]]\nname = \"gold\"\nrepositroy = \"default\"\n");
    sandbox.run(&["policy", "check", "-f", &bad]).code(2).says("bad.toml:3:");
    let daemon = Daemon::start(&sandbox);
    wait("the VM", || ask(&daemon, "GET", "/api/v1/vms", "")["total"] == 1);
    let ran = sandbox.run(&["policy", "diff", "-f", &file]).ok();
    assert!(ran.stdout.contains("policy gold is new"), "{}", ran.stdout);
    sandbox.run(&["policy", "apply", "-f", &file]).ok();
    wait("the plan", || {
        let explained = sandbox.run(&["policy", "explain", "web1"]).ok();
        explained.stdout.contains("selected by name:web*")
    });
    let again = sandbox.run(&["policy", "get", "gold"]).ok().stdout;
    let again = sandbox.write("again.toml", again);
    let ran = sandbox.run(&["policy", "diff", "-f", &again]).ok();
    assert!(ran.stdout.contains("does not change"), "{}", ran.stdout);
    sandbox.run(&["policy", "explain", "nope"]).code(3);
    sandbox.run(&["policy", "delete", "gold"]).ok();
    sandbox.run(&["policy", "delete", "gold"]).code(3);

    let secret = sandbox.run(&["token", "create", "ci", "--role", "operator"]).ok().stdout;
    assert!(secret.starts_with("vwt_"), "{secret}");
    sandbox.run(&["token", "create", "ci"]).code(4).says("already");
    let tokens = sandbox.run(&["token", "list", "--json"]).ok();
    assert_eq!(tokens.json()[0]["role"], "operator");
    assert!(!tokens.stdout.contains(secret.trim().rsplit('_').next().unwrap()));
    sandbox.run(&["token", "revoke", "ci"]).ok();
    sandbox.run(&["token", "revoke", "ci"]).code(3);
}
