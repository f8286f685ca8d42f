//! What high availability does on a host, against a lab: the hook with real libvirt, the fence device with its lies, the
//! watchdog, a storage that stalls. One lab for all of it.

use std::{fs, path::PathBuf, time::Duration};

use serde_json::json;
use uuid::Uuid;
use virtward_engine::ha::{
    fence::{self, Device, Outcome},
    hook::{self, Hook, Protected},
    lease::{self, Place},
    qemu,
    watchdog::{Class, Watchdog},
};

use crate::harness::{Lab, VIRTWARD, run, text, wait};

const SOON: Duration = Duration::from_secs(60);

struct Hands {
    lab: Lab,
    runtime: tokio::runtime::Runtime,
}

impl Hands {
    fn uuid(&self, vm: &str) -> Uuid {
        self.lab.virsh_ok("h1", &["domuuid", vm]).parse().expect("a UUID")
    }

    fn run_dir(&self, host: &str) -> PathBuf {
        PathBuf::from(format!("/run/virtward-lab/{}/{host}", self.lab.name))
    }

    fn has_power(&self, host: &str) -> bool {
        let status: serde_json::Value = serde_json::from_str(&self.lab.lab(&["status", "--json"])).expect("JSON");
        let hosts = status["hosts"].as_array().expect("hosts");
        hosts.iter().any(|of| of["name"] == host && of["power"] == "on")
    }

    fn device(&self, host: &str) -> Device {
        let agent = format!("/run/virtward-lab/{}/fence_virtward_lab", self.lab.name);
        let device = json!({"name": format!("pdu-{host}"), "agent": agent, "parameters": {"plug": host}, "retries": 0,
            "timeout_s": 10, "verify_s": 2});
        serde_json::from_value(device).expect("a device")
    }
}

#[test]
fn the_hands_of_high_availability_hold_a_real_host() {
    let lab = Lab::quick(2);
    for vm in ["p1", "o1"] {
        lab.lab(&["vm", "create", vm, "--host", "h1", "--writer", "--no-start"]);
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let hands = Hands { lab, runtime };
    hook_with_real_libvirt(&hands);
    storage_that_stalls_keeps_a_qemu_and_the_report_says_so(&hands);
    fence_device(&hands);
    watchdog(&hands);
}

fn hook_with_real_libvirt(hands: &Hands) {
    let state = hands.lab.path("ha");
    let hook = Hook::new(&state);
    let called = hands.lab.path("called");
    for host in ["h1", "h2"] {
        let hooks = PathBuf::from(format!("/var/lib/virtward-lab/{}/{host}/etc/hooks", hands.lab.name));
        fs::create_dir_all(&hooks).unwrap();
        // Somebody's own hook goes on being called.
        let own = hooks.join("qemu");
        fs::write(&own, format!("#!/bin/sh\necho \"$@\" >> {}\n", called.display())).unwrap();
        assert!(std::process::Command::new("chmod").arg("755").arg(&own).status().unwrap().success());
        hook::install(&hooks, VIRTWARD.as_ref(), &state).unwrap();
        let pid_file = hands.run_dir(host).join("libvirt/libvirtd.pid");
        assert!(hook::must_restart(&hooks, std::slice::from_ref(&pid_file)), "libvirt looks for hooks when it starts");
        hands.lab.lab(&["host", "libvirtd", "restart", host]);
        assert!(!hook::must_restart(&hooks, &[pid_file]));
    }
    let vm = hands.uuid("p1");
    hook.protect(vm, &Protected { name: "p1".into(), autostart: false }).unwrap();
    let refused = hands.lab.virsh("h1", &["start", "p1"]);
    assert!(!refused.status.success());
    assert!(
        text(&refused).contains("Virtward refuses to start p1") && text(&refused).contains("not claimed"),
        "{}",
        text(&refused)
    );
    hands.lab.virsh_ok("h1", &["start", "o1"]);

    // A permit of the host's own boot.
    let mut boot = hands.lab.host_exec("h1");
    boot.args(["cat", "/proc/sys/kernel/random/boot_id"]);
    let boot = String::from_utf8_lossy(&run(boot, SOON).stdout).trim().to_owned();
    let permit = json!({"boot": boot, "until_ms": u64::MAX, "generation": 1, "incoming": false});
    fs::create_dir_all(state.join("permits")).unwrap();
    fs::write(state.join("permits").join(vm.to_string()), permit.to_string()).unwrap();
    hands.lab.virsh_ok("h1", &["start", "p1"]);
    hands.lab.lab(&["vm", "wait", "p1"]);

    // Nobody announced this migration to the other host: it is refused there, and the guest runs on here.
    let migrated = hands.lab.virsh("h1", &["migrate", "--live", "--unsafe", "p1", &hands.lab.tcp_uri("h2")]);
    assert!(
        !migrated.status.success() && text(&migrated).contains("Virtward refuses to let in p1"),
        "{}",
        text(&migrated)
    );
    assert_eq!(hands.lab.virsh_ok("h1", &["domstate", "p1"]), "running");
    hands.lab.virsh_ok("h1", &["migrate", "--live", "--unsafe", "o1", &hands.lab.tcp_uri("h2")]);
    assert!(fs::read_to_string(&called).unwrap().contains("p1 prepare begin"));
}

fn storage_that_stalls_keeps_a_qemu_and_the_report_says_so(hands: &Hands) {
    let vm = hands.uuid("p1");
    let qemus = hands.run_dir("h1").join("libvirt/qemu");
    hands.lab.lab(&["storage", "stall", "h1"]);
    // Until the guest's next record waits in the kernel.
    let limit = Duration::from_secs(2);
    std::thread::sleep(limit);
    let left = hands.runtime.block_on(qemu::kill_vms(&qemus, &[vm], limit));
    assert!(left.len() == 1 && left[0].vm == vm && left[0].to_string().contains("does not end on SIGKILL"), "{left:?}");
    hands.lab.lab(&["storage", "heal", "h1"]);
    assert_eq!(hands.runtime.block_on(qemu::kill_vms(&qemus, &[vm], SOON)), vec![]);

    // A blocked libvirtd keeps nothing alive.
    wait("libvirt to see its end", SOON, || hands.lab.virsh_ok("h1", &["domstate", "p1"]) == "shut off");
    hands.lab.virsh_ok("h1", &["start", "p1"]);
    let daemon = fs::read_to_string(hands.run_dir("h1").join("libvirt/libvirtd.pid")).unwrap().trim().to_owned();
    hands.lab.signal(std::slice::from_ref(&daemon), "STOP");
    let left = hands.runtime.block_on(qemu::kill_vms(&qemus, &[vm], SOON));
    hands.lab.signal(&[daemon], "CONT");
    assert_eq!(left, vec![]);
    wait("libvirt to see its end", SOON, || hands.lab.virsh_ok("h1", &["domstate", "p1"]) == "shut off");
}

fn fence_device(hands: &Hands) {
    let device = hands.device("h2");
    let found = hands.runtime.block_on(fence::check(&device));
    assert!(found.len() == 4 && found.iter().all(|finding| finding.outcome.is_ok()), "{found:?}");
    let off = || hands.runtime.block_on(fence::off(std::slice::from_ref(&device)));
    hands.lab.lab(&["host", "fence-mode", "h2", "dead"]);
    assert!(matches!(off(), Outcome::Unproven { reasons } if reasons[0].contains("pdu-h2: ")), "a dead device");
    assert!(hands.has_power("h2"));
    hands.lab.lab(&["host", "fence-mode", "h2", "honest"]);
    assert_eq!(off(), Outcome::Off { level: 1, devices: vec!["pdu-h2".into()] });
    assert!(!hands.has_power("h2"));
    assert_eq!(hands.runtime.block_on(fence::on(std::slice::from_ref(&device))), Vec::<String>::new());
    assert!(hands.has_power("h2"));
}

fn watchdog(hands: &Hands) {
    let socket = hands.run_dir("h2").join("watchdog.sock");
    let mut armed = Watchdog::arm(&socket, 2).unwrap();
    assert_eq!((armed.class(), armed.timeout_s()), (Class::Keeper, 2));
    assert!(Watchdog::arm(&socket, 60).is_err(), "two at once");
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(500));
        armed.pet().unwrap();
    }
    armed.disarm().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(hands.has_power("h2"), "disarmed, and fired");
    // The lease of a host that is about to die is seen by the one that takes over.
    let place = [Place::Directory(format!("/var/lib/virtward-lab/{}/shared", hands.lab.name).into())];
    let claim = |generation, host: &str| lease::Claim { vm: hands.uuid("o1"), generation, epoch: 1, host: host.into() };
    hands.runtime.block_on(lease::take(&place, &claim(1, "h2"), SOON)).unwrap();
    // A daemon that dies does not disarm.
    drop(Watchdog::arm(&socket, 1).unwrap());
    wait("the watchdog to fire", SOON, || !hands.has_power("h2"));
    hands.runtime.block_on(lease::take(&place, &claim(2, "h1"), SOON)).unwrap();
    let late = hands.runtime.block_on(lease::take(&place, &claim(1, "h2"), SOON)).unwrap_err();
    assert!(matches!(late, lease::Error::Newer { .. }), "{late}");
}

/// What the tests of failover stand on: daemons that a lab runs come back as those of a service manager do.
#[test]
fn daemons_of_a_lab_come_back_after_a_kill_and_a_power_cut() {
    let lab = Lab::with_daemons(3);
    let config = |host: &str| format!("/var/lib/virtward-lab/{}/{host}/virtward/config.toml", lab.name);
    let status = |host: &str| {
        let mut command = lab.host_exec(host);
        command.args([VIRTWARD, "--config", &config(host), "cluster", "status", "--json"]);
        serde_json::from_slice::<serde_json::Value>(&run(command, SOON).stdout).unwrap_or_default()
    };
    let all_there = || {
        let status = status("h1");
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.len() == 3 && nodes.iter().all(|node| node["is_there"] == true && node["host_state"] == "up")
    };
    let running = |host: &str| {
        let status: serde_json::Value = serde_json::from_str(&lab.lab(&["status", "--json"])).expect("JSON");
        let of =
            status["hosts"].as_array().expect("hosts").iter().find(|of| of["name"] == host).expect("a host").clone();
        of["daemon"]["running"] == true
    };
    wait("all nodes", SOON, all_there);
    lab.lab(&["host", "daemon", "kill", "h2"]);
    wait("the daemon to be started again", SOON, || running("h2"));
    lab.lab(&["host", "daemon", "stop", "h3"]);
    assert!(!running("h3"));
    lab.lab(&["host", "daemon", "start", "h3"]);
    lab.lab(&["host", "power", "off", "h3"]);
    wait("its silence", SOON, || !all_there());
    lab.lab(&["host", "power", "on", "h3"]);
    assert!(running("h3"));
    wait("all nodes", SOON, all_there);
}
