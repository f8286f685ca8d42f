//! Three real hosts with etcd on them: made into a cluster by the commands, then through its bad days.

use std::{
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{HEARTBEAT, Lab, VIRTWARD, run, text, wait};

/// A node: its configuration, and its daemon while it runs. Killed when the test ends, however it ends.
pub struct Node<'a> {
    lab: &'a Lab,
    pub name: &'static str,
    address: String,
    daemon: Option<Child>,
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

impl<'a> Node<'a> {
    pub fn new(lab: &'a Lab, name: &'static str, repo: &str) -> Self {
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

    pub fn dir(&self) -> PathBuf {
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

    pub fn output(&self, arguments: &[&str]) -> Output {
        run(self.virtward(arguments), Duration::from_secs(60))
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{}: virtward {arguments:?}: {}", self.name, text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_slice(&self.output(&[arguments, &["--json"]].concat()).stdout).unwrap_or(Value::Null)
    }

    pub fn start(&mut self) {
        let log = std::fs::File::options().append(true).create(true).open(self.dir().join("log")).unwrap();
        let daemon = self.virtward(&["serve"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.daemon = Some(daemon.expect("the daemon starts"));
    }

    /// Its daemon's process.
    pub fn pid(&self) -> String {
        self.daemon.as_ref().expect("it runs").id().to_string()
    }

    /// As if the power went: no word, no clean-up.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// The node as this one's daemon sees it.
    pub fn sees(&self, node: &str) -> Value {
        let status = self.json(&["cluster", "status"]);
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.into_iter().find(|of| of["name"] == node).unwrap_or(Value::Null)
    }

    fn leader(&self) -> Option<String> {
        self.json(&["cluster", "status"])["leader"]["node"].as_str().map(str::to_owned)
    }

    pub fn job(&self, id: &str) -> Value {
        self.json(&["job", "show", id])
    }
}

fn backup(lab: &Lab, node: &Node<'_>, vm: &str) -> String {
    ask_backup(lab, node, &format!("{{\"vm\":\"{vm}\",\"full\":true,\"bandwidth_bytes_s\":{}}}", 2 << 20))
}

/// Asks a node's daemon for a backup; the job's id.
pub fn ask_backup(lab: &Lab, node: &Node<'_>, request: &str) -> String {
    let mut curl = lab.host_exec(node.name);
    let socket = node.dir().join("run/api.sock").display().to_string();
    curl.args(["curl", "-sS", "--unix-socket", &socket, "-H", "content-type: application/json", "-d", request]);
    curl.arg("http://localhost/api/v1/jobs/backup");
    let output = run(curl, Duration::from_secs(30));
    let job: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    job["id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned()
}

pub const SOON: Duration = Duration::from_secs(60);

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

/// Makes a cluster of three hosts over one directory that all see, a guest on each.
fn three<'a>(lab: &'a Lab, guests: &[&str; 3]) -> [Node<'a>; 3] {
    for (host, guest) in ["h1", "h2", "h3"].into_iter().zip(guests) {
        lab.lab(&["vm", "create", guest, "--host", host, "--disk", "1GiB", "--fill", "40MiB"]);
    }
    guests.iter().for_each(|guest| _ = lab.lab(&["vm", "wait", guest]));
    joined(lab, guests.len())
}

/// Makes a cluster of three hosts over one directory that all see, on which there are so many guests.
pub fn joined(lab: &Lab, guests: usize) -> [Node<'_>; 3] {
    let repo = lab.path("repo").display().to_string();
    let mut nodes = ["h1", "h2", "h3"].map(|name| Node::new(lab, name, &repo));
    let etcd: Vec<String> = nodes.iter().map(|node| format!("http://{}:2379", node.address)).collect();
    nodes[0].ok(&["cluster", "init", "--etcd", &etcd.join(","), "--name", "h1", "--address", &nodes[0].peer()]);
    nodes[0].start();
    wait("the first node to lead", SOON, || nodes[0].leader().as_deref() == Some("h1"));
    for number in [1, 2] {
        let token = nodes[0].json(&["cluster", "token"])["token"].as_str().expect("a token").to_owned();
        let (at, node) = (nodes[0].peer(), &mut nodes[number]);
        node.ok(&["cluster", "join", &token, "--at", &at, "--name", node.name, "--address", &node.peer()]);
        node.start();
    }
    for node in &nodes {
        wait("every node to see all", SOON, || {
            let is_up = |of: &&str| node.sees(of)["is_there"] == true && node.sees(of)["host_state"] == "up";
            ["h1", "h2", "h3"].iter().all(is_up) && node.json(&["status"])["vms"]["total"] == guests
        });
    }
    nodes
}

pub const JOB: Duration = Duration::from_secs(180);

pub fn succeeds(node: &Node<'_>, id: &str) {
    wait("the job's result", JOB, || {
        let job = node.job(id);
        assert!(!matches!(job["state"].as_str(), Some("failed" | "cancelled" | "interrupted")), "{job}");
        job["state"] == "succeeded"
    });
}

#[test]
fn a_host_that_is_cut_off_goes_on_with_its_job_and_nobody_does_it_twice() {
    let lab = Lab::with_etcd(3);
    let [mut h1, mut h2, mut h3] = three(&lab, &["web1", "web2", "web3"]);
    lab.guest_sh("web2", HEARTBEAT);
    let id = backup(&lab, &h1, "web2");
    wait("the job to copy", SOON, || h2.job(&id)["progress"]["done_bytes"].as_u64() > Some(0));
    lab.lab(&["partition", "h2"]);

    // The others: its daemon is silent, its host is not known to be down, its VM is shown as it was.
    for node in [&h1, &h3] {
        wait("its silence", SOON, || node.sees("h2")["is_there"] == false);
        assert_eq!(node.sees("h2")["host_state"], "unknown", "{}", node.sees("h2"));
        assert_eq!(node.json(&["status"])["vms"]["total"], 3);
        wait("a leader among the many", SOON, || node.leader().is_some_and(|leader| leader != "h2"));
    }
    assert_eq!(h3.job(&id)["state"], "running", "nobody knows better");
    // It itself: without the state, with its host, and its job goes on.
    wait("the loss of the state to be told", SOON, || h2.json(&["cluster", "status"])["state_error"].is_string());
    assert_eq!(h2.sees("h2")["host_state"], "up");
    wait("others to be unknown to it", SOON, || h2.sees("h1")["host_state"] == "unknown");
    assert_eq!(h2.json(&["cluster", "status"])["leader"], Value::Null, "it does not know who leads");
    let before = h2.job(&id)["progress"]["done_bytes"].as_u64();
    wait("its job to go on", SOON, || {
        let job = h2.job(&id);
        job["progress"]["done_bytes"].as_u64() > before || job["progress"]["phase"] != "copying"
    });
    // Asked for meanwhile: kept for the host, done by nobody else. Work of others is done.
    let second = backup(&lab, &h3, "web2");
    succeeds(&h3, &backup(&lab, &h3, "web1"));
    assert_eq!(h1.job(&second)["state"], "queued");
    assert_eq!(h1.job(&second)["host"], h1.job(&id)["host"]);

    lab.lab(&["heal"]);
    for id in [&id, &second] {
        succeeds(&h1, id);
    }
    for node in [&h1, &h2, &h3] {
        wait("one cluster again", SOON, || {
            let status = node.json(&["cluster", "status"]);
            status["state_error"].is_null()
                && status["leader"]["node"] == h1.json(&["cluster", "status"])["leader"]["node"]
                && ["h1", "h2", "h3"].iter().all(|of| node.sees(of)["host_state"] == "up")
        });
    }
    lab.assert_guest_went_on("web2");
    assert_eq!(lab.points("web2").len(), 2, "the job of before and the one that was asked for meanwhile");
    assert_eq!(h1.json(&["job", "list", "--vm", "web2"]).as_array().map(Vec::len), Some(2));
    for node in [&mut h1, &mut h2, &mut h3] {
        node.kill();
    }
    lab.assert_sound();
}

/// Due all the time, on the guest of one host.
fn minutely(vm: &str) -> String {
    format!(
        "[[policy]]\nname = \"often\"\nrepository = \"default\"\nselect.any = [\"name:{vm}\"]\n\
         retention.keep-last = 50\nschedule = {{ cron = \"* * * * *\", time-zone = \"UTC\" }}\n"
    )
}

#[test]
fn the_leader_is_killed_in_its_own_job_and_nothing_is_lost_or_done_twice() {
    let lab = Lab::with_etcd(3);
    let guests = ["web1", "web2", "web3"];
    let mut nodes = three(&lab, &guests);
    let leader = nodes[0].leader().expect("a leader");
    let at = ["h1", "h2", "h3"].iter().position(|name| **name == *leader).expect("one of them");
    // The guest of the leader, that of one who watches, and that of one whose policy is due every minute.
    let (other, third) = ((at + 1) % 3, (at + 2) % 3);
    let policy = lab.path("often.toml");
    std::fs::write(&policy, minutely(guests[third])).unwrap();
    nodes[other].ok(&["policy", "apply", "-f", policy.to_str().unwrap()]);
    let own = backup(&lab, &nodes[other], guests[at]);
    let others = backup(&lab, &nodes[at], guests[other]);
    for id in [&own, &others] {
        wait("the jobs to copy", SOON, || nodes[third].job(id)["progress"]["done_bytes"].as_u64() > Some(0));
    }

    nodes[at].kill();
    wait("another leader", SOON, || nodes[other].leader().is_some_and(|next| next != leader));
    succeeds(&nodes[other], &others);
    // What was planned goes on to be planned: a run that is due after the death is done.
    let planned = |node: &Node<'_>| {
        let jobs = node.json(&["job", "list", "--vm", guests[third]]);
        let jobs = jobs.as_array().cloned().unwrap_or_default();
        let backups = jobs.into_iter().filter(|job| job["kind"] == "backup" && job["state"] == "succeeded");
        backups.map(|job| job["origin"]["due"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let before = planned(&nodes[other]).len();
    wait("the policy to go on", JOB, || planned(&nodes[other]).len() >= before + 2);
    assert_eq!(nodes[other].job(&own)["state"], "running", "its host has not told what became of it");

    nodes[at].start();
    wait("its interruption", SOON, || nodes[other].job(&own)["state"] == "interrupted");
    let again = || {
        let jobs = nodes[other].json(&["job", "list", "--vm", guests[at]]);
        jobs.as_array().cloned().unwrap_or_default()
    };
    wait("its job to be done again", JOB, || {
        let jobs = again();
        assert!(jobs.iter().all(|job| job["state"] != "failed"), "{jobs:?}");
        jobs.iter().any(|job| job["state"] == "succeeded")
    });
    let jobs = again();
    assert_eq!(jobs.len(), 2, "once interrupted, once done: {jobs:?}");
    assert_eq!(jobs[0]["origin"]["after"], own.as_str(), "{jobs:?}");
    assert_eq!(lab.points(guests[at]).len(), 1);
    assert_eq!(lab.points(guests[other]).len(), 1);
    let mut dues = planned(&nodes[other]);
    let all = dues.len();
    dues.sort_unstable();
    dues.dedup();
    assert_eq!(dues.len(), all, "a time of the schedule was served twice: {dues:?}");
    nodes[other].ok(&["policy", "delete", "often"]);
    for node in &mut nodes {
        node.kill();
    }
    lab.assert_sound();
}
