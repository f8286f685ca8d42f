//! VMs that the daemons of a cluster move: asked for on any node, done where the VM is, beside everything else that is done
//! to it.

use std::time::Duration;

use serde_json::Value;

use crate::harness::{HEARTBEAT, Lab, VIRTWARD, run, text, wait};

const SOON: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(180);

/// The commands of a host, with its daemon's configuration.
struct Cluster {
    lab: Lab,
}

impl Cluster {
    fn output(&self, host: &str, arguments: &[&str]) -> std::process::Output {
        let config = format!("/var/lib/virtward-lab/{}/{host}/virtward/config.toml", self.lab.name);
        let mut command = self.lab.host_exec(host);
        command.args([VIRTWARD, "--config", &config]).args(arguments);
        run(command, LONG)
    }

    fn ok(&self, host: &str, arguments: &[&str]) -> Value {
        let arguments = [&["--json"], arguments].concat();
        let output = self.output(host, &arguments);
        assert!(output.status.success(), "{host}: {arguments:?}: {}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)))
    }

    /// The host on which a VM runs, as libvirt says.
    fn place(&self, vm: &str) -> Vec<&'static str> {
        let runs = |host: &&str| {
            let listed = text(&self.lab.virsh(host, &["list", "--name"]));
            listed.lines().any(|line| line.trim() == vm)
        };
        ["h1", "h2"].into_iter().filter(runs).collect()
    }

    /// What a host's daemon answers to a request, with a body or without.
    fn ask(&self, host: &str, path: &str, body: Option<&str>) -> Value {
        let socket = format!("/run/virtward-lab/{}/{host}/virtward/api.sock", self.lab.name);
        let mut curl = self.lab.host_exec(host);
        curl.args(["curl", "-sS", "--unix-socket", &socket, &format!("http://localhost/api/v1/{path}")]);
        curl.args(body.iter().flat_map(|body| ["-H", "content-type: application/json", "-d", body]));
        serde_json::from_slice(&run(curl, SOON).stdout).expect("JSON")
    }

    fn job(&self, host: &str, query: &[&str]) -> Vec<Value> {
        let jobs = self.ok(host, &[&["job", "list"], query].concat());
        jobs.as_array().cloned().unwrap_or_default()
    }
}

#[test]
fn the_daemons_of_a_cluster_move_vms_empty_a_host_and_take_it_back() {
    let lab = Lab::with_daemons(2);
    lab.guest("web1", &[]);
    lab.lab(&["vm", "create", "web2", "--host", "h1", "--wait"]);
    let cluster = Cluster { lab };
    let lab = &cluster.lab;
    wait("both nodes to know all", SOON, || {
        ["h1", "h2"].iter().all(|host| cluster.ok(host, &["status"])["vms"]["total"] == 2)
    });
    lab.guest_sh("web1", HEARTBEAT);

    // Looked at first: nothing happens, and from the other node it is told where the VM is already.
    let plan = cluster.ok("h1", &["vm", "migrate", "web1", "--to", "h2", "--dry-run"]);
    assert_eq!((&plan["is_possible"], &plan["to"]), (&true.into(), &"h2".into()), "{plan}");
    let there = cluster.output("h2", &["vm", "migrate", "web1", "--to", "h1", "--dry-run"]);
    assert!(!there.status.success() && text(&there).contains("runs on h1 already"), "{}", text(&there));
    assert_eq!(cluster.place("web1"), ["h1"], "{plan}");

    // What goes over the network is encrypted with certificates of the cluster: who does not know its authority sends nothing.
    let authority = format!("/var/lib/virtward-lab/{}/h1/virtward/migration/ca-cert.pem", lab.name);
    let whole = std::fs::read(&authority).expect("the authority of migrations");
    std::fs::write(&authority, "nonsense").expect("a file");
    let refused = cluster.output("h1", &["vm", "migrate", "web1", "--to", "h2"]);
    assert!(!refused.status.success() && text(&refused).contains("ca-cert.pem"), "{}", text(&refused));
    assert_eq!(cluster.place("web1"), ["h1"]);
    std::fs::write(&authority, whole).expect("a file");

    // Done as a job on the host that has it, with what it came to.
    let job = cluster.ok("h1", &["vm", "migrate", "web1", "--to", "h2"]);
    assert_eq!(
        (&job["kind"], &job["state"], &job["host"]),
        (&"migrate".into(), &"succeeded".into(), &"h1".into()),
        "{job}"
    );
    assert!(job["result"]["downtime_ms"].is_u64() && job["result"]["to"] == "h2", "{job}");
    assert_eq!(cluster.place("web1"), ["h2"]);
    lab.assert_guest_goes_on("web1");
    let audit = cluster.ok("h1", &["job", "show", job["id"].as_str().expect("an id")]);
    assert_eq!(audit["origin"]["by"], "root", "{audit}");

    // And back, asked of the node to which it goes.
    wait("the other node to know", SOON, || cluster.ok("h1", &["status"])["vms"]["total"] == 2);
    let asked = cluster.ask("h1", "vms/web1/migrate", Some("{\"to\":\"h1\"}"));
    assert_eq!(asked["host"], "h2", "{asked}");
    wait("its end", LONG, || {
        cluster.ok("h1", &["job", "show", asked["id"].as_str().expect("an id")])["state"] == "succeeded"
    });
    assert_eq!(cluster.place("web1"), ["h1"]);

    // The host is emptied by a plan, each VM by a job of its own; the plan is shown first.
    let dry = cluster.ok("h1", &["host", "drain", "--dry-run"]);
    assert_eq!(dry["moves"].as_array().map(Vec::len), Some(2), "{dry}");
    let drained = cluster.ok("h2", &["host", "drain", "h1", "--first", "web2"]);
    assert_eq!((&drained["result"]["moved"], &drained["host"]), (&2.into(), &"h1".into()), "{drained}");
    assert_eq!((cluster.place("web1"), cluster.place("web2")), (vec!["h2"], vec!["h2"]));
    let steps = cluster.job("h1", &["--kind", "migrate"]);
    let of_drain = steps.iter().filter(|job| job["origin"]["after"] == drained["id"]);
    assert_eq!(of_drain.count(), 2, "{steps:?}");
    lab.assert_guest_goes_on("web1");

    // It takes nothing until it is resumed; every node knows.
    let refused = cluster.output("h2", &["vm", "migrate", "web2", "--to", "h1"]);
    assert!(!refused.status.success() && text(&refused).contains("is drained and takes no VMs"), "{}", text(&refused));
    assert_eq!(cluster.place("web2"), ["h2"]);
    let resumed = cluster.ok("h2", &["host", "resume", "h1"]);
    assert_eq!(resumed["was_drained"], true, "{resumed}");

    // One operation of a VM at a time: the migration waits for the backup, and the disk stays in order.
    let body = format!("{{\"vm\":\"web1\",\"full\":true,\"bandwidth_bytes_s\":{}}}", 4 << 20);
    cluster.ask("h2", "jobs/backup", Some(&body));
    wait("the backup to run", SOON, || cluster.job("h2", &["--kind", "backup", "--state", "running"]).len() == 1);
    let job = cluster.ok("h2", &["vm", "migrate", "web1", "--to", "h1"]);
    let backups = cluster.job("h1", &["--kind", "backup"]);
    assert_eq!(backups[0]["state"], "succeeded", "it was not disturbed: {backups:?}");
    assert!(job["started"].as_str() >= backups[0]["finished"].as_str(), "{job} {backups:?}");
    assert_eq!(cluster.place("web1"), ["h1"]);

    // A disk moves by a job as well.
    let to = lab.shared().join("web1-moved.qcow2").display().to_string();
    let moved = cluster.ok("h1", &["vm", "move-disk", "web1", "--disk", "vda", "--to", &to]);
    assert_eq!((&moved["kind"], &moved["result"]["to"]), (&"move-disk".into(), &to.clone().into()), "{moved}");
    lab.assert_guest_goes_on("web1");

    the_daemon_dies_while_it_empties_its_host(&cluster);

    // Balance of the whole cluster, by whoever is asked.
    let round = cluster.ok("h2", &["balance", "plan", "--interval", "1s"]);
    assert_eq!(round["hosts"].as_array().map(Vec::len), Some(2), "{round}");
    assert!(round["error"].is_null(), "{round}");

    balances_by_itself(&cluster);
    empties_a_host_that_fails(&cluster);
}

/// Of a daemon that is killed in the middle of a drain and of a migration, the VM is on one host and goes on; the drain can
/// be asked for again, and finds what is left.
fn the_daemon_dies_while_it_empties_its_host(cluster: &Cluster) {
    let lab = &cluster.lab;
    assert_eq!((cluster.place("web1"), cluster.place("web2")), (vec!["h1"], vec!["h2"]));
    let drain = cluster.ask("h2", "hosts/h1/drain", Some("{}"));
    let migrates = || !cluster.job("h2", &["--kind", "migrate", "--state", "running"]).is_empty();
    wait("a migration to run", SOON, migrates);
    lab.lab(&["host", "daemon", "kill", "h1"]);
    wait("nothing to be on its way", LONG, || {
        let jobs = cluster.job("h2", &[]);
        jobs.iter().all(|job| !matches!(job["state"].as_str(), Some("queued" | "running")))
    });
    assert_eq!(drain["kind"], "drain", "{drain}");
    wait("the VM to be on one host", LONG, || cluster.place("web1").len() == 1);
    lab.assert_guest_goes_on("web1");
    wait("the daemon to answer", SOON, || cluster.output("h1", &["status"]).status.success());
    let again = cluster.ok("h2", &["host", "drain", "h1"]);
    assert!(again["state"] == "succeeded" && again["result"]["left"].is_null(), "{again}");
    assert_eq!((cluster.place("web1"), cluster.place("web2")), (vec!["h2"], vec!["h2"]));
    lab.assert_guest_goes_on("web1");
    cluster.ok("h2", &["host", "resume", "h1"]);
    cluster.ok("h2", &["vm", "migrate", "web1", "--to", "h1"]);
    assert_eq!(cluster.place("web1"), ["h1"]);
}

/// The leader sees that a rule is broken and has one of two VMs move to the other; it says so, and then leaves them alone.
fn balances_by_itself(cluster: &Cluster) {
    let lab = &cluster.lab;
    assert_ne!(cluster.place("web1"), cluster.place("web2"));
    let rules = lab.shared().join("rules.toml");
    let rule = "[[rule]]\nname = \"web together\"\nkind = \"together\"\nvms = [\"web1\", \"web2\"]\n";
    std::fs::write(&rules, rule).expect("rules");
    let balance = "\n[balance]\nmode = \"automatic\"\neagerness = 1\ninterval-s = 2\nwatch-s = 1\n";
    let moves = format!("[moves]\nrules = {rules:?}\n");
    for host in ["h1", "h2"] {
        let path = format!("/var/lib/virtward-lab/{}/{host}/virtward/config.toml", lab.name);
        let text = std::fs::read_to_string(&path).expect("the daemon's configuration");
        std::fs::write(&path, text.replace("[moves]\n", &moves) + balance).expect("the daemon's configuration");
        lab.lab(&["host", "daemon", "restart", host]);
    }
    // A daemon that was not there when the guests' agents came asks after them.
    for vm in ["web1", "web2"] {
        let path = format!("vms/{vm}");
        let is_known = |host: &&str| cluster.ask(host, &path, None)["guest"]["is_agent_connected"] == true;
        wait("its agent to be known", SOON, || ["h1", "h2"].iter().any(is_known));
    }
    wait("the two to be together", LONG, || {
        let (one, other) = (cluster.place("web1"), cluster.place("web2"));
        one.len() == 1 && one == other
    });
    let history = cluster.ok("h1", &["balance", "history"]);
    let round = history.as_array().and_then(|rounds| rounds.last()).expect("a round that was kept");
    assert!(round["moves"][0]["why"].as_str().is_some_and(|why| why.contains("web together")), "{round}");
    let job = round["job"].as_str().expect("the job that carries it out");
    wait("its job to end", LONG, || cluster.ok("h2", &["job", "show", job])["state"] == "succeeded");
    assert_eq!(cluster.ok("h1", &["job", "show", job])["origin"]["by"], "balance");
    lab.lab(&["vm", "wait", "web1"]);
    // Further rounds find nothing to do.
    let last = || cluster.ok("h1", &["balance", "auto"])["last"]["at"].as_str().map(str::to_owned);
    let seen = last();
    wait("another round", LONG, || last() > seen);
    assert_eq!(cluster.ok("h1", &["balance", "history"]).as_array().map(Vec::len), Some(1), "{history}");
}

/// A disk of the host on which both VMs run says that it fails; they are on the other host before it does.
fn empties_a_host_that_fails(cluster: &Cluster) {
    let lab = &cluster.lab;
    let (failing, other) = match cluster.place("web1")[..] {
        ["h1"] => ("h1", "h2"),
        _ => ("h2", "h1"),
    };
    assert_eq!((cluster.place("web1"), cluster.place("web2")), (vec![failing], vec![failing]));
    let said = lab.path("sensors");
    std::fs::create_dir_all(&said).expect("a directory");
    let disk = |is_well: u8| {
        // As an exporter's scripts do: a page is there whole or not at all.
        let page = format!("smartmon_device_smart_healthy{{disk=\"/dev/sda\",type=\"sat\"}} {is_well}\n");
        std::fs::write(said.join("new"), page).expect("a page");
        std::fs::rename(said.join("new"), said.join("smartmon.prom")).expect("a page");
    };
    disk(1);
    let directory = format!("--collector.textfile.directory={}", said.display());
    let exporter = ["host", "exec", failing, "--", "prometheus-node-exporter", "--collector.disable-defaults"];
    let further = ["--collector.textfile", &directory, "--web.listen-address=127.0.0.1:9100"];
    let _exporter = lab.start_lab(&[&exporter[..], &further[..]].concat());
    let path = format!("/var/lib/virtward-lab/{}/{failing}/virtward/config.toml", lab.name);
    let text = std::fs::read_to_string(&path).expect("the daemon's configuration");
    let health = "\n[health]\nmetrics = [\"http://127.0.0.1:9100/metrics\"]\ninterval-s = 1\nevacuate = true\n";
    std::fs::write(&path, text + health).expect("the daemon's configuration");
    lab.lab(&["host", "daemon", "restart", failing]);
    let level = |of: &str| cluster.ask(of, &format!("hosts/{failing}"), None)["health"]["level"].clone();
    // What one daemon reads all know.
    wait("the hardware to be looked at", SOON, || level(other) == "ok");
    wait("the exporter to answer", SOON, || {
        cluster.ask(failing, &format!("hosts/{failing}"), None)["health"]["unread"] == serde_json::json!([])
    });

    disk(0);
    wait("both VMs to have left", LONG, || cluster.place("web1") == [other] && cluster.place("web2") == [other]);
    lab.assert_guest_went_on("web1");
    wait("its end to be known", SOON, || {
        let jobs = cluster.job(other, &["--kind", "drain"]);
        jobs.iter().any(|job| job["origin"]["by"] == "health" && job["state"] == "succeeded")
    });
    let host = cluster.ask(other, &format!("hosts/{failing}"), None);
    assert_eq!((&host["health"]["level"], &host["drained"]["by"]), (&"critical".into(), &"health".into()), "{host}");
    let troubles = host["health"]["troubles"].to_string();
    assert!(troubles.contains("disk /dev/sda: SMART says that it fails"), "{host}");
}
