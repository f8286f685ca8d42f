//! Three real hosts with etcd on them: made into a cluster by the commands, then through its bad days.

use std::{
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{HEARTBEAT, Lab, VIRTWARD, run, text, wait};

/// A node: its configuration, and its daemon while it runs. Killed when the test ends, however it ends.
struct Node<'a> {
    lab: &'a Lab,
    name: &'static str,
    address: String,
    daemon: Option<Child>,
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

impl<'a> Node<'a> {
    fn new(lab: &'a Lab, name: &'static str, repo: &str) -> Self {
        let address = lab.tcp_uri(name).trim_start_matches("qemu+tcp://").split(['/', ':']).next().unwrap().to_owned();
        let node = Self { lab, name, address, daemon: None };
        std::fs::create_dir_all(node.dir()).unwrap();
        let path = |name: &str| node.dir().join(name).display().to_string();
        let text = format!(
            "repo = {repo:?}\nconnect = {:?}\nkey-file = {:?}\nruntime-dir = {:?}\nscratch-dir = {:?}\ncache-size = 0\n\
             [server]\nstate-dir = {:?}\nreconcile-s = 3\n",
            lab.uri(name),
            lab.path("repo.key"),
            path("run"),
            path("scratch"),
            path("state"),
        );
        std::fs::write(node.dir().join("config.toml"), text).unwrap();
        node
    }

    fn dir(&self) -> PathBuf {
        self.lab.path(self.name)
    }

    fn peer(&self) -> String {
        format!("{}:8461", self.address)
    }

    /// The product, in the host, with this node's configuration.
    fn virtward(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.host_exec(self.name);
        command.arg(VIRTWARD).arg("--config").arg(self.dir().join("config.toml")).args(arguments);
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        run(self.virtward(arguments), Duration::from_secs(60))
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{}: virtward {arguments:?}: {}", self.name, text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_slice(&self.output(&[arguments, &["--json"]].concat()).stdout).unwrap_or(Value::Null)
    }

    fn start(&mut self) {
        let log = std::fs::File::options().append(true).create(true).open(self.dir().join("log")).unwrap();
        let daemon = self.virtward(&["serve"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.daemon = Some(daemon.expect("the daemon starts"));
    }

    /// As if the power went: no word, no clean-up.
    fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// The node as this one's daemon sees it.
    fn sees(&self, node: &str) -> Value {
        let status = self.json(&["cluster", "status"]);
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.into_iter().find(|of| of["name"] == node).unwrap_or(Value::Null)
    }

    fn leader(&self) -> Option<String> {
        self.json(&["cluster", "status"])["leader"]["node"].as_str().map(str::to_owned)
    }

    fn job(&self, id: &str) -> Value {
        self.json(&["job", "show", id])
    }
}

fn backup(lab: &Lab, node: &Node<'_>, vm: &str) -> String {
    let request = format!("{{\"vm\":\"{vm}\",\"full\":true,\"bandwidth_bytes_s\":{}}}", 2 << 20);
    let mut curl = lab.host_exec(node.name);
    let socket = node.dir().join("run/api.sock").display().to_string();
    curl.args(["curl", "-sS", "--unix-socket", &socket, "-H", "content-type: application/json", "-d", &request]);
    curl.arg("http://localhost/api/v1/jobs/backup");
    let output = run(curl, Duration::from_secs(30));
    let job: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    job["id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned()
}

const SOON: Duration = Duration::from_secs(60);

#[test]
fn three_hosts_become_a_cluster_and_bear_its_bad_days() {
    let lab = Lab::with_etcd(3);
    lab.guest("web1", &[]);
    lab.lab(&["vm", "create", "web2", "--host", "h2", "--disk", "1GiB", "--fill", "40MiB"]);
    lab.lab(&["vm", "wait", "web2"]);
    let mut h1 = Node::new(&lab, "h1", &lab.path("repo").display().to_string());
    let mut h2 = Node::new(&lab, "h2", "node://h1/default");
    let mut h3 = Node::new(&lab, "h3", "node://h1/default");
    let etcd: Vec<String> = [&h1, &h2, &h3].iter().map(|node| format!("http://{}:2379", node.address)).collect();

    // Made and joined by the commands; a second use of a token is refused.
    h1.ok(&["cluster", "init", "--etcd", &etcd.join(","), "--name", "h1", "--address", &h1.peer()]);
    h1.start();
    wait("the first node to lead", SOON, || h1.leader().as_deref() == Some("h1"));
    for (node, of) in [(&h2, "h2"), (&h3, "h3")] {
        let token = h1.json(&["cluster", "token"])["token"].as_str().expect("a token").to_owned();
        let join = ["cluster", "join", &token, "--at", &h1.peer(), "--name", of, "--address", &node.peer()];
        node.ok(&join);
        let again = node.output(&join);
        assert!(!again.status.success() && text(&again).contains("already"), "{}", text(&again));
    }
    h2.start();
    h3.start();
    for node in [&h1, &h2, &h3] {
        wait("every node to see all", SOON, || {
            ["h1", "h2", "h3"].iter().all(|of| node.sees(of)["is_there"] == true && node.sees(of)["host_state"] == "up")
                && node.json(&["status"])["vms"]["total"] == 2
        });
    }

    // Asked of the third node, done on the second, into the directory of the first.
    lab.guest_sh("web2", HEARTBEAT);
    let id = backup(&lab, &h3, "web2");
    wait("progress from afar", SOON, || h3.job(&id)["progress"]["done_bytes"].as_u64() > Some(0));

    // The leader is killed in the middle of that: another leads, and the backup goes on.
    h1.kill();
    wait("another leader", SOON, || h3.leader().is_some_and(|leader| leader != "h1"));
    wait("the first node to be unknown, not down", SOON, || h3.sees("h1")["host_state"] == "unknown");
    h1.start();
    wait("its backup's end", Duration::from_secs(120), || {
        let job = h3.job(&id);
        assert!(matches!(job["state"].as_str(), Some("running" | "succeeded")), "{job}");
        job["state"] == "succeeded"
    });
    lab.assert_guest_went_on("web2");

    // A node is killed in the middle of its own job: found when it returns, and done again.
    let id = backup(&lab, &h1, "web2");
    wait("the job to copy", SOON, || h1.job(&id)["progress"]["done_bytes"].as_u64() > Some(0));
    h2.kill();
    wait("silence", SOON, || h1.sees("h2")["is_there"] == false);
    h2.start();
    wait("its interruption", SOON, || h1.job(&id)["state"] == "interrupted");
    wait("another try that succeeds", Duration::from_secs(120), || {
        let jobs = h1.json(&["job", "list", "--vm", "web2"]);
        assert_ne!(jobs[0]["state"], "failed", "{jobs}");
        jobs[0]["state"] == "succeeded"
    });

    lab.guest_sh("web2", HEARTBEAT);
    // etcd stands still in the middle of a job: VM and backup go on, and the result is recorded when it is back.
    let id = backup(&lab, &h2, "web2");
    wait("the job to copy", SOON, || h2.job(&id)["progress"]["done_bytes"].as_u64() > Some(0));
    let members = lab.etcd_pids();
    assert_eq!(members.len(), 3);
    lab.signal(&members, "STOP");
    wait("the loss of the state to be told", SOON, || h2.json(&["cluster", "status"])["state_error"].is_string());
    assert_eq!(h2.json(&["status"])["vms"]["total"], 2, "what is known stays");
    std::thread::sleep(Duration::from_secs(8));
    lab.signal(&members, "CONT");
    wait("the job's result", Duration::from_secs(120), || {
        let job = h1.job(&id);
        assert!(!matches!(job["state"].as_str(), Some("failed" | "cancelled" | "interrupted")), "{job}");
        job["state"] == "succeeded"
    });
    lab.assert_guest_went_on("web2");
    wait("a leader again", SOON, || h3.leader().is_some());

    // Removed: its peers refuse it, and it starts nothing.
    h1.ok(&["cluster", "backup-state", &lab.path("state.json").display().to_string()]);
    h1.ok(&["cluster", "remove", "h3"]);
    wait("the removal", SOON, || h3.json(&["cluster", "status"])["warnings"].to_string().contains("not a member"));
    assert_eq!(h1.sees("h3"), Value::Null);
    let running = h1.output(&["cluster", "restore-state", &lab.path("state.json").display().to_string()]);
    assert!(text(&running).contains("daemons run on this state"), "{}", text(&running));
    for node in [&mut h1, &mut h2, &mut h3] {
        node.kill();
    }
    lab.assert_sound();
}
