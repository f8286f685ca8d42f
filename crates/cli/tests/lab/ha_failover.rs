//! High availability with everything real: three hosts with etcd, libvirt, QEMU and daemons, fence devices and watchdogs
//! beside them, and guests that write all the time. One lab, one bad day after the other; after each of them every guest
//! runs on one host, and never did on two.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Output,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::harness::{Lab, VIRTWARD, run, text, wait};

pub const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
pub const SOON: Duration = Duration::from_secs(120);
/// Longer than silence that makes a host suspect, by far.
const WHILE: Duration = Duration::from_secs(9);

pub struct Cluster {
    pub lab: Lab,
}

/// Where a protected VM is.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub host: String,
    pub generation: u64,
}

impl Cluster {
    pub fn up(memory: &str) -> Self {
        let lab = Lab::with_ha(3, &Self::config(memory));
        let cluster = Self { lab };
        // libvirt looks for hooks when it starts.
        for host in HOSTS {
            cluster.lab.lab(&["host", "libvirtd", "restart", host]);
        }
        wait("all hosts in service", SOON, || HOSTS.iter().all(|host| cluster.grade("h1", host) == "full"));
        cluster
    }

    fn config(memory: &str) -> String {
        let mut text = format!("[ha]\nwatchdog = \"@WATCHDOG@\"\nlease-dirs = [\"@SHARED@\"]\nmemory = \"{memory}\"\n");
        for host in HOSTS {
            text.push_str(&format!(
                "[[ha.fence]]\nhost = \"{host}\"\nname = \"pdu-{host}\"\nagent = \"@FENCE_AGENT@\"\nretries = 0\n\
                 timeout-s = 9\nverify-s = 2\nparameters = {{ plug = \"{host}\" }}\n"
            ));
        }
        text
    }

    /// The product on a host.
    pub fn virtward(&self, host: &str, arguments: &[&str]) -> Output {
        let config = format!("/var/lib/virtward-lab/{}/{host}/virtward/config.toml", self.lab.name);
        let mut command = self.lab.host_exec(host);
        command.arg(VIRTWARD).args(["--config", &config]).args(arguments);
        run(command, SOON)
    }

    pub fn ok(&self, host: &str, arguments: &[&str]) -> String {
        let output = self.virtward(host, arguments);
        assert!(output.status.success(), "{host}: virtward {arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Protects VMs, as soon as their hosts are seen to ask the hook.
    pub fn enable(&self, at: &str, vms: &[&str]) {
        let arguments = [&["ha", "enable"][..], vms, &["--tier", "2"]].concat();
        let since = Instant::now();
        loop {
            let output = self.virtward(at, &arguments);
            if output.status.success() {
                return;
            }
            assert!(since.elapsed() < SOON, "virtward {arguments:?}: {}", text(&output));
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// `ha status` as a host sees it; nothing if its daemon does not answer.
    pub fn status(&self, at: &str) -> Value {
        serde_json::from_slice(&self.virtward(at, &["ha", "status", "--json"]).stdout).unwrap_or_default()
    }

    fn host(&self, at: &str, host: &str) -> Value {
        let status = self.status(at);
        status["hosts"].as_array().into_iter().flatten().find(|of| of["name"] == host).cloned().unwrap_or_default()
    }

    fn grade(&self, at: &str, host: &str) -> String {
        let of = self.host(at, host);
        if of["phase"] == "armed" { of["grade"].as_str().unwrap_or_default().to_owned() } else { String::new() }
    }

    /// Every protected VM that runs.
    pub fn places(&self, at: &str) -> BTreeMap<String, Place> {
        let status = self.status(at);
        let running =
            status["vms"].as_array().cloned().unwrap_or_default().into_iter().filter(|vm| vm["phase"] == "running");
        running
            .filter_map(|vm| {
                let place = Place { host: vm["host"].as_str()?.to_owned(), generation: vm["generation"].as_u64()? };
                Some((vm["name"].as_str()?.to_owned(), place))
            })
            .collect()
    }

    /// Where all are, once all hosts see the same: each has a look of its own, and they are not of the same moment.
    pub fn settled(&self) -> BTreeMap<String, Place> {
        let mut seen = BTreeMap::new();
        wait("all hosts to see the same", SOON, || {
            seen = self.places("h1");
            HOSTS.iter().all(|at| self.places(at) == seen)
        });
        seen
    }

    /// Waits until the VMs run on another host than this, and answer there. How long it took until they ran.
    fn comes_back(&self, at: &str, vms: &[&str], not_on: &str) -> Duration {
        let since = Instant::now();
        wait(&format!("{vms:?} elsewhere than on {not_on}"), SOON, || {
            let places = self.places(at);
            vms.iter().all(|vm| places.get(*vm).is_some_and(|place| place.host != not_on))
        });
        let took = since.elapsed();
        for vm in vms {
            self.lab.lab(&["vm", "wait", vm]);
        }
        took
    }

    /// Nobody's guest was started anew.
    fn assert_nothing_moved(&self, before: &BTreeMap<String, Place>, after_what: &str) {
        for at in HOSTS {
            wait(&format!("{at} to see all guests where they were, {after_what}"), SOON, || self.places(at) == *before);
        }
        for host in HOSTS {
            wait(&format!("{host} in service, {after_what}"), SOON, || self.grade("h1", host) == "full");
        }
    }

    /// Never two wrote at once, and no write was lost.
    pub fn check_writers(&self, vms: &[&str]) {
        for vm in vms {
            let output = self.lab.lab_output(&["vm", "check-writers", vm]);
            assert!(output.status.success(), "{vm}: {}\n{}", text(&output), self.story());
        }
    }

    /// How many records a guest has written.
    pub fn records(&self, vm: &str) -> u64 {
        let report: Value = serde_json::from_str(&self.lab.lab(&["vm", "check-writers", vm, "--json"])).expect("JSON");
        report["records"].as_u64().expect("a number")
    }

    fn has_power(&self, host: &str) -> bool {
        let status: Value = serde_json::from_str(&self.lab.lab(&["status", "--json"])).expect("JSON");
        status["hosts"].as_array().expect("hosts").iter().any(|of| of["name"] == host && of["power"] == "on")
    }

    fn back_in_service(&self, host: &str, at: &str) {
        if !self.has_power(host) {
            self.lab.lab(&["host", "power", "on", host]);
        }
        wait(&format!("{host} in service again"), SOON, || self.grade(at, host) == "full");
    }

    /// What every daemon says that happened, for whoever reads a failure.
    pub fn story(&self) -> String {
        let log =
            |host: &str| PathBuf::from(format!("/var/lib/virtward-lab/{}/{host}/log/virtward.log", self.lab.name));
        HOSTS.map(|host| format!("--- {host}\n{}", std::fs::read_to_string(log(host)).unwrap_or_default())).concat()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story());
        }
    }
}

#[test]
fn guests_outlive_their_hosts_and_never_run_twice() {
    let cluster = Cluster::up("8GiB");
    let vms = ["w1", "w2", "w3"];
    for (vm, host) in [("w1", "h1"), ("w2", "h1"), ("w3", "h2")] {
        cluster.lab.lab(&["vm", "create", vm, "--host", host, "--writer"]);
    }
    for vm in vms {
        cluster.lab.lab(&["vm", "wait", vm]);
    }
    protection_begins_and_libvirt_asks(&cluster);
    a_migration_takes_the_protection_along(&cluster);
    what_is_no_death_of_a_host_moves_nothing(&cluster);
    a_power_cut(&cluster);
    a_pause_and_a_fence_device_that_is_slower(&cluster);
    cut_off_with_the_watchdog_alone(&cluster);
    a_fence_device_that_lies_about_a_host_which_answers(&cluster);
    storage_that_stops_answering_one_host(&cluster);
    the_leader_dies_while_it_recovers(&cluster);
    cluster.check_writers(&vms);
}

fn protection_begins_and_libvirt_asks(cluster: &Cluster) {
    // Asked of a host that does not run them.
    cluster.enable("h3", &["w1", "w2", "w3"]);
    let expected = |vm: &str| Place { host: if vm == "w3" { "h2" } else { "h1" }.into(), generation: 1 };
    wait("three protected guests", SOON, || {
        let places = cluster.places("h2");
        ["w1", "w2", "w3"].iter().all(|vm| places.get(*vm) == Some(&expected(vm)))
    });
    wait("their agents", SOON, || {
        let status = cluster.status("h1");
        status["vms"].as_array().is_some_and(|vms| vms.len() == 3 && vms.iter().all(|vm| vm["ready"] == true))
    });
    // Defined elsewhere as well, it does not start there behind everybody's back.
    let xml = cluster.lab.path("w1.xml");
    std::fs::write(&xml, cluster.lab.virsh_ok("h1", &["dumpxml", "--inactive", "w1"])).unwrap();
    cluster.lab.virsh_ok("h3", &["define", &xml.display().to_string()]);
    let refused = cluster.lab.virsh("h3", &["start", "w1"]);
    assert!(
        !refused.status.success() && text(&refused).contains("protected by high availability"),
        "{}",
        text(&refused)
    );
    assert!(cluster.ok("h2", &["ha", "explain", "w1"]).contains("h1 has it"));
    assert!(cluster.ok("h2", &["ha", "capacity"]).contains("runs again after any 1"));
    assert!(cluster.ok("h1", &["ha", "test-fencing", "h2"]).contains("status"));
}

fn a_migration_takes_the_protection_along(cluster: &Cluster) {
    let to = cluster.lab.tcp_uri("h3");
    // Not announced, it is not let in.
    let refused = cluster.lab.virsh("h2", &["migrate", "--live", "--unsafe", "w3", &to]);
    assert!(!refused.status.success() && text(&refused).contains("refuses to let in w3"), "{}", text(&refused));
    cluster.ok("h2", &["vm", "migrate", "w3", "--to", &to]);
    wait("w3 to belong to h3", SOON, || {
        cluster.places("h1").get("w3") == Some(&Place { host: "h3".into(), generation: 2 })
    });
    cluster.check_writers(&["w3"]);
}

fn what_is_no_death_of_a_host_moves_nothing(cluster: &Cluster) {
    let lab = &cluster.lab;
    let before = cluster.settled();
    for host in HOSTS {
        lab.lab(&["host", "daemon", "kill", host]);
    }
    cluster.assert_nothing_moved(&before, "after all daemons were killed");
    lab.lab(&["host", "libvirtd", "kill", "h1"]);
    std::thread::sleep(WHILE);
    lab.lab(&["host", "libvirtd", "start", "h1"]);
    cluster.assert_nothing_moved(&before, "after libvirtd was away");
    let libvirtd = std::fs::read_to_string(format!("/run/virtward-lab/{}/h1/libvirt/libvirtd.pid", lab.name)).unwrap();
    let libvirtd = [libvirtd.trim().to_owned()];
    lab.signal(&libvirtd, "STOP");
    // Stopped in order one after the other, as an upgrade does.
    for host in HOSTS {
        lab.lab(&["host", "daemon", "restart", host]);
    }
    lab.signal(&libvirtd, "CONT");
    cluster.assert_nothing_moved(&before, "after a rolling restart and a blocked libvirtd");
    // Longer than a heartbeat is good for: the hosts ask each other.
    let etcd = lab.etcd_pids();
    lab.signal(&etcd, "STOP");
    std::thread::sleep(Duration::from_secs(20));
    lab.signal(&etcd, "CONT");
    cluster.assert_nothing_moved(&before, "after etcd was away");
}

fn a_power_cut(cluster: &Cluster) {
    cluster.lab.lab(&["host", "power", "off", "h1"]);
    let took = cluster.comes_back("h2", &["w1", "w2"], "h1");
    eprintln!("power cut to guests running elsewhere: {:.1} s", took.as_secs_f64());
    cluster.check_writers(&["w1", "w2", "w3"]);
    let host = cluster.host("h2", "h1");
    assert_eq!(host["phase"], "fenced", "{host}");
    assert!(host["proof"].as_str().is_some_and(|proof| proof.contains("pdu-h1")), "{host}");
    cluster.back_in_service("h1", "h2");
    // It comes back with the old definitions, and starts nothing of it.
    assert!(cluster.lab.virsh_ok("h1", &["list", "--name"]).trim().is_empty());
}

/// Whoever runs a VM, and everything else that it runs.
fn victim(cluster: &Cluster, at: &str, vm: &str) -> (String, Vec<String>) {
    let places = cluster.places(at);
    let host = places[vm].host.clone();
    let all = places.into_iter().filter(|(_, place)| place.host == host).map(|(vm, _)| vm).collect();
    (host, all)
}

fn another(host: &str) -> &'static str {
    HOSTS.into_iter().find(|other| *other != host).expect("three hosts")
}

fn names(vms: &[String]) -> Vec<&str> {
    vms.iter().map(String::as_str).collect()
}

/// It wakes, finds that it was declared dead, ends its guests itself and says so: a proof that needs no device. The device,
/// which takes six seconds for every answer, is still being asked then, and must not take the power of a host that is back.
fn a_pause_and_a_fence_device_that_is_slower(cluster: &Cluster) {
    let (host, vms) = victim(cluster, "h2", "w3");
    let at = another(&host);
    cluster.lab.lab(&["host", "fence-mode", &host, "slow"]);
    cluster.lab.lab(&["host", "pause", &host]);
    let since = Instant::now();
    wait("it to be declared dead", SOON, || cluster.host(at, &host)["phase"] == "fencing");
    cluster.lab.lab(&["host", "resume", &host]);
    cluster.comes_back(at, &names(&vms), &host);
    cluster.check_writers(&names(&vms));
    // Silence, status, off.
    let switched = Duration::from_secs(6 + 6 + 6 + 2);
    std::thread::sleep(switched.saturating_sub(since.elapsed()));
    assert!(cluster.has_power(&host), "fenced after it had come back\n{}", cluster.story());
    cluster.lab.lab(&["host", "fence-mode", &host, "honest"]);
    cluster.back_in_service(&host, at);
}

fn cut_off_with_the_watchdog_alone(cluster: &Cluster) {
    let (host, vms) = victim(cluster, "h2", "w1");
    let at = another(&host);
    cluster.lab.lab(&["host", "fence-mode", &host, "dead"]);
    cluster.lab.lab(&["partition", &host]);
    let took = cluster.comes_back(at, &names(&vms), &host);
    eprintln!("cut off to guests running elsewhere, without a fence device: {:.1} s", took.as_secs_f64());
    let proof = cluster.host(at, &host)["proof"].clone();
    assert!(proof.as_str().is_some_and(|proof| proof.starts_with("P3")), "{proof}");
    // It ended its guests itself, long before that, and was not reset for it.
    assert!(cluster.has_power(&host));
    cluster.check_writers(&names(&vms));
    cluster.lab.lab(&["heal"]);
    cluster.lab.lab(&["host", "fence-mode", &host, "honest"]);
    cluster.back_in_service(&host, at);
}

/// The host loses etcd alone. It is declared dead, and its device says "off" without having done anything. But its daemon
/// answers: the device is not believed, and nobody has its guests before it must have ended them.
fn a_fence_device_that_lies_about_a_host_which_answers(cluster: &Cluster) {
    let (host, vms) = victim(cluster, "h2", "w3");
    let at = another(&host);
    // It may not have seen yet that the last one is back.
    wait("all hosts in service", SOON, || HOSTS.iter().all(|one| cluster.grade(at, one) == "full"));
    let others = others(cluster, at, &host, &vms);
    cluster.lab.lab(&["host", "fence-mode", &host, "lying"]);
    let cut = "add table inet cut; add chain inet cut out { type filter hook output priority 0; }; \
               add rule inet cut out tcp dport 2379 drop";
    cluster.lab.lab(&["host", "exec", &host, "--", "nft", cut]);
    let took = cluster.comes_back(at, &names(&vms), &host);
    eprintln!("etcd lost to guests running elsewhere, beside a device that lies: {:.1} s", took.as_secs_f64());
    let proof = cluster.host(at, &host)["proof"].clone();
    assert!(proof.as_str().is_some_and(|proof| proof.starts_with("P3")), "{proof}\n{}", cluster.story());
    assert!(cluster.story().contains(&format!("pdu-{host} says off, but the host's daemon answers")));
    assert!(cluster.has_power(&host), "it did lie");
    assert_eq!(self::others(cluster, at, &host, &vms), others, "others were touched");
    cluster.check_writers(&["w1", "w2", "w3"]);
    cluster.lab.lab(&["host", "exec", &host, "--", "nft", "delete table inet cut"]);
    cluster.lab.lab(&["host", "fence-mode", &host, "honest"]);
    cluster.back_in_service(&host, at);
}

/// Where VMs other than these are, and the epochs of hosts other than this one: one that is fenced has another.
fn others(cluster: &Cluster, at: &str, host: &str, vms: &[String]) -> (BTreeMap<String, Place>, Vec<Value>) {
    let mut places = cluster.places(at);
    places.retain(|vm, _| !vms.contains(vm));
    let epochs = HOSTS.into_iter().filter(|of| *of != host).map(|of| cluster.host(at, of)["epoch"].clone());
    (places, epochs.collect())
}

/// Its guests wait for their disks. That is no death of the host, and no hang of its guests: their agents answer. They go on
/// where they were.
fn storage_that_stops_answering_one_host(cluster: &Cluster) {
    let (host, vms) = victim(cluster, "h2", "w1");
    let before = cluster.settled();
    cluster.lab.lab(&["storage", "stall", &host]);
    std::thread::sleep(Duration::from_secs(2));
    let written = |vms: &[String]| vms.iter().map(|vm| cluster.records(vm)).collect::<Vec<_>>();
    let stalled = written(&vms);
    std::thread::sleep(2 * WHILE);
    assert_eq!(written(&vms), stalled, "a stall that stalls nothing shows nothing");
    cluster.assert_nothing_moved(&before, "while the storage of one host stood still");
    cluster.lab.lab(&["storage", "heal", &host]);
    wait("its guests to write again", SOON, || written(&vms).iter().zip(&stalled).all(|(now, before)| now > before));
    cluster.assert_nothing_moved(&before, "after the storage of one host stood still");
    cluster.check_writers(&["w1", "w2", "w3"]);
}

fn the_leader_dies_while_it_recovers(cluster: &Cluster) {
    let (host, vms) = victim(cluster, "h2", "w2");
    let at = another(&host);
    let leader = || {
        let config = format!("/var/lib/virtward-lab/{}/{at}/virtward/config.toml", cluster.lab.name);
        let mut command = cluster.lab.host_exec(at);
        command.arg(VIRTWARD).args(["--config", &config, "cluster", "status", "--json"]);
        let status: Value = serde_json::from_slice(&run(command, SOON).stdout).unwrap_or_default();
        status["leader"]["node"].as_str().map(str::to_owned)
    };
    cluster.lab.lab(&["host", "power", "off", &host]);
    wait("it to be fenced", SOON, || cluster.host(at, &host)["phase"] == "fenced");
    // Its successor goes on where it stopped.
    if let Some(leader) = leader().filter(|leader| *leader != host) {
        cluster.lab.lab(&["host", "daemon", "kill", &leader]);
    }
    cluster.comes_back(at, &names(&vms), &host);
    cluster.check_writers(&names(&vms));
    cluster.back_in_service(&host, at);
}

/// SplitMix64: a round that fails is played again by its seed.
struct Rng(u64);

impl Rng {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn host(&mut self) -> &'static str {
        HOSTS[self.below(3) as usize]
    }
}

/// Faults of all kinds in an order that a seed chooses, two at a time. `make chaos`; VIRTWARD_ROUNDS and VIRTWARD_SEED.
#[test]
#[ignore = "an hour of faults: make chaos"]
fn chaos() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let seed = number("VIRTWARD_SEED", std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs()));
    let mut rng = Rng(seed);
    let cluster = Cluster::up("8GiB");
    let vms = ["w1", "w2", "w3"];
    for (vm, host) in vms.iter().zip(HOSTS) {
        cluster.lab.lab(&["vm", "create", vm, "--host", host, "--writer", "--wait"]);
    }
    cluster.enable("h1", &vms);
    for round in 1..=number("VIRTWARD_ROUNDS", 30) {
        let faults = [one_fault(&cluster, &mut rng), one_fault(&cluster, &mut rng)];
        eprintln!("seed {seed}, round {round}: {}", faults.join(", then "));
        std::thread::sleep(Duration::from_millis(500 + rng.below(25_000)));
        all_is_mended(&cluster);
        cluster.check_writers(&vms);
    }
}

fn one_fault(cluster: &Cluster, rng: &mut Rng) -> String {
    let (host, other) = (rng.host(), rng.host());
    let what: Vec<&str> = match rng.below(11) {
        0 | 1 => vec!["host", "power", "off", host],
        2 => vec!["host", "pause", host],
        3 => vec!["partition", host],
        4 => vec!["partition", host, "--one-way"],
        5 if host != other => vec!["partition", host, "--from", other],
        6 => vec!["host", "daemon", "kill", host],
        7 => vec!["host", "libvirtd", "kill", host],
        8 => vec!["host", "fence-mode", host, "dead"],
        9 => vec!["host", "fence-mode", host, "slow"],
        10 => vec!["storage", "stall", host],
        _ => vec!["host", "daemon", "restart", host],
    };
    // What cannot be done to a host that is off already is no fault.
    let _ = cluster.lab.lab_output(&what);
    std::thread::sleep(Duration::from_millis(rng.below(8_000)));
    what.join(" ")
}

fn all_is_mended(cluster: &Cluster) {
    let _ = cluster.lab.lab_output(&["heal"]);
    for host in HOSTS {
        for mend in
            [vec!["host", "resume", host], vec!["storage", "heal", host], vec!["host", "fence-mode", host, "honest"]]
        {
            let _ = cluster.lab.lab_output(&mend);
        }
    }
    let long = Duration::from_secs(400);
    wait("all hosts in service", long, || {
        for host in HOSTS {
            if !cluster.has_power(host) {
                let _ = cluster.lab.lab_output(&["host", "power", "on", host]);
            }
            let _ = cluster.lab.lab_output(&["host", "libvirtd", "start", host]);
        }
        std::thread::sleep(Duration::from_secs(1));
        HOSTS.iter().all(|host| cluster.grade("h1", host) == "full")
    });
    wait("all guests", long, || cluster.places("h1").len() == 3);
    for vm in ["w1", "w2", "w3"] {
        cluster.lab.lab(&["vm", "wait", vm]);
    }
}
