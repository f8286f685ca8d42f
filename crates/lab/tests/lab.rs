//! The lab as a user drives it, for real: hosts, guests, power cuts, partitions, and nothing left at the end.
//!
//! Needs root and what `scripts/setup.sh lab` installs; without them these tests fail and say so, since a lab that was
//! skipped would hide that nothing else was tested either. Each test has a lab of its own name and removes it, also
//! when it fails.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_virtward-lab");

/// A lab that is taken down when the test ends, however it ends.
struct Lab {
    name: String,
}

impl Lab {
    fn new(test: &str) -> Self {
        assert!(
            geteuid().is_root(),
            "the lab's tests make namespaces and links and so need root; run: sudo -E make test"
        );
        assert!(
            fs::metadata("/var/cache/virtward-lab/current/vmlinuz").is_ok(),
            "the lab's packages and guest image are missing; run: scripts/setup.sh lab"
        );
        Self { name: format!("{test}-{}", std::process::id()) }
    }

    fn output(&self, words: &[&str]) -> Output {
        // The lab's name comes first, as everything after a `--` belongs to somebody else.
        Command::new(PROGRAM).args(["--name", &self.name]).args(words).output().expect("virtward-lab runs")
    }

    fn run(&self, words: &[&str]) -> String {
        let output = self.output(words);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{words:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn fails(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(!output.status.success(), "{words:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.run(&[words, &["--json"]].concat())).expect("the output is JSON")
    }

    fn virsh(&self, host: usize, words: &[&str]) -> String {
        let uri = self.json(&["status"])["hosts"][host]["tcp_uri"].as_str().expect("a URI").to_owned();
        let output = Command::new("virsh").args(["-q", "-c", &uri]).args(words).output().expect("virsh runs");
        assert!(output.status.success(), "virsh {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Whether host `from` reaches the libvirt of the host with this address.
    fn reaches(&self, from: &str, address: &str) -> bool {
        let connect = format!("exec 3<>/dev/tcp/{address}/16509");
        self.output(&["host", "exec", from, "--", "timeout", "1", "bash", "-c", &connect]).status.success()
    }

    /// Everything on the machine that has this lab's name on it.
    fn traces(&self) -> Vec<String> {
        let name = &self.name;
        let mut found = Vec::new();
        for path in [format!("/run/virtward-lab/{name}"), format!("/var/lib/virtward-lab/{name}")] {
            found.extend(fs::metadata(&path).is_ok().then_some(path));
        }
        let links = Command::new("ip").arg("link").output().expect("ip runs").stdout;
        let links = String::from_utf8_lossy(&links).into_owned();
        found.extend(links.lines().filter(|l| l.ends_with(&format!("virtward-lab:{name}"))).map(str::to_owned));
        let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names = names.map(|e| e.file_name().to_string_lossy().into_owned());
        found.extend(names.filter(|n| n.starts_with(&format!("vwlab.{name}."))));
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts are readable");
        found.extend(mounts.lines().filter(|l| l.contains(&format!("virtward-lab/{name}"))).map(str::to_owned));
        for process in fs::read_dir("/proc").expect("/proc").flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let ours = ["of lab ", "virtward-lab/", "--name "].iter().any(|before| {
                command.split_once(&format!("{before}{name}")).is_some_and(|(_, after)| !after.starts_with('-'))
            });
            found.extend(ours.then_some(command));
        }
        let lock = format!("/run/virtward-lab/.{name}.lock");
        found.extend(fs::metadata(&lock).is_ok().then_some(lock));
        let target = fs::read_link("/run/libvirt/libvirt-sock").unwrap_or_default();
        found.extend(target.to_string_lossy().contains(&format!("/{name}/")).then(|| "the default socket".to_owned()));
        found
    }

    fn down_and_check(&self) {
        self.run(&["down"]);
        assert_eq!(self.traces(), Vec::<String>::new(), "left behind");
        // Once more: nothing to do is no error.
        assert_eq!(self.json(&["down"])["removed"], false);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let output = self.output(&["down"]);
        if !output.status.success() && !thread::panicking() {
            panic!("down: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// The story of a lab: one test, as hosts and guests are dear.
#[test]
fn a_lab_from_up_to_down() {
    let lab = Lab::new("story");
    let status = lab.json(&["up", "--hosts", "2"]);
    assert_eq!(status["hosts"].as_array().map(Vec::len), Some(2));
    assert!(lab.fails(&["up"]).contains("already up"));
    assert!(lab.fails(&["host", "power", "off", "h7"]).contains("h1, h2"));
    hosts_are_apart(&lab);
    partitions(&lab, &status);

    let made = lab.json(&["vm", "create", "web1", "--host", "h1", "--disk", "256MiB", "--fill", "40MiB", "--wait"]);
    let disk = made["disks"][0].as_str().expect("a disk").to_owned();
    assert!(lab.fails(&["vm", "create", "web1", "--host", "h2"]).contains("on h1"));
    guest_commands(&lab);
    power_cut(&lab);

    lab.run(&["vm", "rm", "web1"]);
    assert!(fs::metadata(&disk).is_err(), "{disk} is still there");
    lab.down_and_check();
}

fn hosts_are_apart(lab: &Lab) {
    assert_eq!(lab.run(&["host", "exec", "h2", "--", "hostname"]).trim(), "h2");
    assert_eq!(lab.output(&["host", "exec", "h1", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    // Each has its own libvirt with its own UUID.
    let uuids: Vec<String> = (0..2)
        .map(|n| lab.virsh(n, &["capabilities"]).lines().find(|l| l.contains("<uuid>")).expect("a UUID").to_owned())
        .collect();
    assert_ne!(uuids[0], uuids[1]);
    // Local storage is seen by its own host (and the machine) only.
    let local = lab.json(&["status"])["hosts"][0]["local_storage"].as_str().expect("a path").to_owned();
    fs::write(format!("{local}/mark"), "x").expect("local storage is writable");
    let ls = |host| lab.run(&["host", "exec", host, "--", "ls", &local]);
    assert_eq!((ls("h1").trim(), ls("h2").trim()), ("mark", ""));
}

fn partitions(lab: &Lab, status: &Value) {
    let address = |n: usize| status["hosts"][n]["address"].as_str().expect("an address").to_owned();
    assert!(lab.reaches("h1", &address(1)) && lab.reaches("h2", &address(0)));
    lab.run(&["partition", "h1", "--from", "h2"]);
    assert!(!lab.reaches("h1", &address(1)) && !lab.reaches("h2", &address(0)));
    lab.run(&["heal"]);
    assert!(lab.reaches("h1", &address(1)));
    assert!(lab.fails(&["partition", "h1", "--from", "h1"]).contains("itself"));
    lab.run(&["net", "limit", "h1", "100mbit"]);
    assert_eq!(lab.json(&["status"])["hosts"][0]["rate_limit"], "100mbit");
    lab.run(&["net", "limit", "h1", "none"]);
}

fn guest_commands(lab: &Lab) {
    let sums = ["vm", "exec", "web1", "--", "sh", "-c", "cd /data && sha256sum -c -s SHA256SUMS && cat .lab/boots"];
    assert_eq!(lab.run(&sums).trim(), "1", "data as made, first boot");
    let output = lab.output(&["vm", "exec", "web1", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert!(lab.fails(&["vm", "exec", "web9", "--", "true"]).contains("web9"));
    // An orderly shutdown by the power button keeps what was written without a sync.
    lab.run(&["vm", "exec", "web1", "--", "sh", "-c", "echo kept > /data/note"]);
    lab.virsh(0, &["shutdown", "web1", "--mode", "acpi"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while lab.virsh(0, &["domstate", "web1"]) != "shut off" {
        assert!(Instant::now() < deadline, "the guest does not heed its power button");
        thread::sleep(Duration::from_millis(100));
    }
    assert!(lab.fails(&["vm", "exec", "web1", "--", "true"]).contains("shut off"));
}

fn power_cut(lab: &Lab) {
    lab.virsh(0, &["start", "web1"]);
    lab.run(&["vm", "wait", "web1"]);
    lab.run(&["host", "power", "off", "h1"]);
    let status = lab.json(&["status"]);
    assert_eq!((status["hosts"][0]["power"].as_str(), status["hosts"][1]["power"].as_str()), (Some("off"), Some("on")));
    let web1 = format!("guest={},", "web1");
    let runs = fs::read_dir("/proc").expect("/proc").flatten().any(|p| {
        let command = fs::read(p.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        command.contains(&web1) && command.contains(&format!("virtward-lab/{}/", lab.name))
    });
    assert!(!runs, "QEMU outlived the power cut");
    assert!(lab.fails(&["host", "exec", "h1", "--", "true"]).contains("no power"));
    lab.run(&["host", "power", "on", "h1"]);
    // Definitions are on disk, running guests are not.
    assert_eq!(lab.virsh(0, &["domstate", "web1"]), "shut off");
    lab.virsh(0, &["start", "web1"]);
    lab.run(&["vm", "wait", "web1"]);
    assert_eq!(lab.run(&["vm", "exec", "web1", "--", "cat", "/data/note", "/data/.lab/boots"]), "kept\n3\n");
}

/// What goes wrong with hosts, and the proof that two hosts never ran one guest: one lab for all of it.
#[test]
fn faults_of_hosts_and_the_records_of_writers() {
    let lab = Lab::new("faults");
    let status = lab.json(&["up", "--hosts", "2"]);
    lab.run(&["vm", "create", "w1", "--host", "h1", "--writer", "--wait"]);
    watchdog(&lab, status["hosts"][1]["watchdog"].as_str().expect("a socket"));
    fence_agent(&lab, status["fence_agent"].as_str().expect("a program"));

    let (stop, go) = (["host", "pause", "h1"], ["host", "resume", "h1"]);
    writer_stops_and_goes_on(&lab, &stop, &go);
    let (stop, go) = (["storage", "stall", "h1"], ["storage", "heal", "h1"]);
    writer_stops_and_goes_on(&lab, &stop, &go);
    two_writers_are_found(&lab);
    lab.down_and_check();
}

/// The records of the guest w1, which must be without fault.
fn records(lab: &Lab) -> u64 {
    let report = lab.json(&["vm", "check-writers", "w1"]);
    assert_eq!(report["faults"].as_array().map(Vec::len), Some(0), "{report}");
    report["records"].as_u64().expect("a number")
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        thread::sleep(Duration::from_millis(100));
    }
}

fn writer_stops_and_goes_on(lab: &Lab, stop: &[&str], go: &[&str]) {
    let before = records(lab);
    until("the guest writes", || records(lab) > before + 3);
    lab.run(stop);
    // What was on its way arrives; then nothing more.
    thread::sleep(Duration::from_millis(500));
    let stopped = records(lab);
    thread::sleep(Duration::from_secs(2));
    assert_eq!(records(lab), stopped, "{stop:?}");
    lab.run(go);
    until("the guest goes on", || records(lab) > stopped + 3);
}

fn watchdog(lab: &Lab, socket: &str) {
    let power = || lab.json(&["status"])["hosts"][1]["power"].as_str().expect("a state").to_owned();
    let mut first = UnixStream::connect(socket).expect("the watchdog");
    let answer = |stream: &mut UnixStream, word: &str| {
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        stream.write_all(format!("{word}\n").as_bytes()).expect("it listens");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("an answer");
        line.trim().to_owned()
    };
    assert!(answer(&mut first, "arm 0").starts_with("a timeout is"));
    drop(first);
    let mut armed = UnixStream::connect(socket).expect("the watchdog");
    assert!(answer(&mut armed, "arm 3").starts_with("armed 3 "));
    let mut second = UnixStream::connect(socket).expect("the watchdog");
    assert_eq!(answer(&mut second, "arm 600"), "busy");
    // Petted: longer than the timeout.
    for _ in 0..8 {
        armed.write_all(b"pet\n").expect("it listens");
        thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(answer(&mut armed, "V"), "off");
    drop(armed);
    thread::sleep(Duration::from_secs(4));
    assert_eq!(power(), "on", "stopped in order, and fired");
    // The daemon dies: closed without the magic character.
    let mut armed = UnixStream::connect(socket).expect("the watchdog");
    assert!(answer(&mut armed, "arm 1").starts_with("armed 1 "));
    drop(armed);
    until("the watchdog fires", || power() == "off");
}

fn fence_agent(lab: &Lab, agent: &str) {
    let call = |parameters: &str| {
        let mut child = Command::new(agent)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the agent runs");
        child.stdin.take().expect("a pipe").write_all(parameters.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let power = || lab.json(&["status"])["hosts"][1]["power"].as_str().expect("a state").to_owned();
    let boot = || lab.run(&["host", "exec", "h2", "--", "cat", "/proc/sys/kernel/random/boot_id"]);
    assert_eq!(call("action=status\nplug=h2\n"), (Some(2), "Status: OFF".into()));
    assert_eq!(call("action=on\nport=h2\n").0, Some(0));
    assert_eq!(call("action=status\nplug=h2\n"), (Some(0), "Status: ON".into()));
    let first = boot();
    lab.run(&["host", "fence-mode", "h2", "lying"]);
    assert_eq!(call("action=off\nplug=h2\n").0, Some(0));
    assert_eq!(call("action=status\nplug=h2\n"), (Some(2), "Status: OFF".into()));
    assert_eq!(power(), "on", "the device lies, and switched");
    lab.run(&["host", "fence-mode", "h2", "dead"]);
    assert_eq!(call("action=off\nplug=h2\n").0, Some(1));
    assert_eq!(power(), "on");
    lab.run(&["host", "fence-mode", "h2", "honest"]);
    assert_eq!(call("action=reboot\nplug=h2\n").0, Some(0));
    assert_eq!(power(), "on");
    assert_ne!(boot(), first, "a power cut is a new boot");
    assert_eq!(call("action=monitor\nplug=h9\n").0, Some(1));
    assert!(call("action=metadata\n").1.contains("<resource-agent name=\"fence_virtward_lab\""));
}

fn two_writers_are_found(lab: &Lab) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), lab.virsh(0, &["dumpxml", "w1", "--inactive"])).expect("written");
    lab.virsh(1, &["define", &file.path().to_string_lossy()]);
    lab.virsh(1, &["start", "w1"]);
    until("the second writer is seen", || !lab.output(&["vm", "check-writers", "w1"]).status.success());
    lab.virsh(1, &["destroy", "w1"]);
}

#[test]
fn down_clears_up_after_a_crash_and_labs_do_not_touch_each_other() {
    let (lab, other) = (Lab::new("crash"), Lab::new("other"));
    lab.run(&["up", "--hosts", "1"]);
    other.run(&["up", "--hosts", "1"]);
    assert_ne!(lab.json(&["status"])["subnet"], other.json(&["status"])["subnet"]);

    // Everything in the host dies, and somebody loses the state file and half of the rest.
    let netns = format!("vwlab.{}.h1", lab.name);
    let pids = Command::new("ip").args(["netns", "pids", &netns]).output().expect("ip runs").stdout;
    let pids =
        String::from_utf8_lossy(&pids).lines().filter_map(|l| Pid::from_raw(l.parse().ok()?)).collect::<Vec<_>>();
    assert!(pids.len() >= 2, "a keeper and a libvirtd");
    for pid in pids {
        let _ = kill_process(pid, Signal::KILL);
    }
    fs::remove_file(format!("/run/virtward-lab/{}/state.json", lab.name)).expect("there is a state file");
    lab.down_and_check();

    assert_eq!(other.json(&["status"])["hosts"][0]["libvirtd"], "running");
    // The namespace's name is gone, its processes are not.
    let deleted = Command::new("ip").args(["netns", "del", &format!("vwlab.{}.h1", other.name)]).status();
    assert!(deleted.expect("ip runs").success());
    other.down_and_check();
}

#[test]
fn an_up_that_fails_leaves_nothing() {
    let lab = Lab::new("half");
    // A file where the lab's disks should go.
    let blocker = format!("/var/lib/virtward-lab/{}", lab.name);
    // Another test's `down` may remove the directory in between, when its lab was the last one.
    let block = || fs::create_dir_all("/var/lib/virtward-lab").and_then(|()| fs::write(&blocker, "x"));
    assert!((0..100).any(|_| block().is_ok()), "{blocker} can be made");
    let message = lab.fails(&["up", "--hosts", "1"]);
    let _ = fs::remove_file(&blocker);
    assert!(message.contains(&lab.name), "{message}");
    assert!(lab.fails(&["status"]).contains("is not up"));
    assert_eq!(lab.traces(), Vec::<String>::new());
}

#[test]
fn without_root_the_error_says_so() {
    assert!(geteuid().is_root(), "the lab's tests need root; run: sudo -E make test");
    // Copied, since nobody but root may be allowed into the build directory.
    let copy = std::env::temp_dir().join(format!("virtward-lab-{}", std::process::id()));
    fs::copy(PROGRAM, &copy).expect("the program can be copied");
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups"])
        .arg(&copy)
        .arg("status")
        .current_dir("/")
        .output();
    let _ = fs::remove_file(&copy);
    let output = output.expect("setpriv runs");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && message.contains("run this as root"), "{message}");
}
