//! The daemon on a real host: a policy that is due backs up a running guest by itself.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use virtward_api::client::Client;

use crate::harness::{CHECKSUMS, HEARTBEAT, Lab, wait};

/// Killed when the test ends, however it ends.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    /// Starts it, and waits until it sees the guest.
    fn start(lab: &Lab) -> Self {
        let command = lab.virtward(&["serve"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let daemon = Self(command.expect("the daemon starts"));
        wait("the daemon to see the guest", Duration::from_secs(60), || {
            json(lab, &["status", "--json"])["vms"]["running"] == 1
        });
        daemon
    }
}

fn json(lab: &Lab, arguments: &[&str]) -> Value {
    let output = lab.output(arguments);
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

#[test]
fn a_policy_that_is_due_protects_a_running_guest() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let state = lab.path("state").display().to_string();
    // Hooks around the freeze see that nobody else of this host may talk to the agent: a policy that requires a frozen
    // guest fails with the first of them.
    let is_taken = format!("! flock --nonblock {}/*.agent true", lab.path("run/locks").display());
    let hooks = format!("[backup]\npre-freeze = {is_taken:?}\npost-thaw = {is_taken:?}\n");
    lab.write_config("h1", &format!("[server]\nstate-dir = {state:?}\nreconcile-s = 5\n{hooks}"));
    lab.guest_sh("web1", "echo 'PRETTY_NAME=\"Lab Linux 1\"' > /etc/os-release");
    let hostname = lab.guest_sh("web1", "hostname");
    lab.guest_sh("web1", "ip addr add 192.0.2.77/24 dev $(ls /sys/class/net | grep -v lo | head -n 1)");
    let _daemon = Daemon::start(&lab);
    says_who_it_is(&lab, hostname.trim());
    let policy = lab.path("gold.toml");
    let text = "[[policy]]\nname = \"gold\"\nrepository = \"default\"\nselect.any = [\"name:web*\"]\n\
                quiesce = \"required\"\nschedule = { cron = \"* * * * *\", time-zone = \"UTC\" }\n\
                retention = { keep-last = 5 }\n";
    std::fs::write(&policy, text).expect("a policy file");
    let before = lab.guest_sh("web1", CHECKSUMS);
    lab.ok(&["policy", "apply", "-f", &policy.display().to_string()]);
    wait("the policy's backup", Duration::from_secs(150), || {
        let jobs = json(&lab, &["job", "list", "--policy", "gold", "--kind", "backup", "--json"]);
        let failed = jobs.as_array().into_iter().flatten().find(|job| job["state"] == "failed");
        assert!(failed.is_none(), "{jobs}");
        jobs.as_array().into_iter().flatten().any(|job| job["state"] == "succeeded")
    });
    lab.ok(&["policy", "delete", "gold"]);
    wait("jobs to end", Duration::from_secs(120), || {
        json(&lab, &["job", "list", "--state", "running,queued", "--json"]) == Value::Array(Vec::new())
    });
    let points = json(&lab, &["backup", "list", "web1", "--json"]);
    assert_eq!(points[0]["quiesce"]["outcome"], "frozen", "{points}");
    lab.assert_nothing_left("h1", "web1");
    lab.assert_boots("web1@latest", "web1-restored", &before);

    // libvirtd away: the daemon says so, stays, and finds itself again.
    let host_state = || json(&lab, &["status", "--json"])["hosts"].clone();
    lab.lab(&["host", "libvirtd", "stop", "h1"]);
    wait("libvirtd's end to be seen", Duration::from_secs(60), || host_state()["libvirtd_down"] == 1);
    lab.lab(&["host", "libvirtd", "start", "h1"]);
    wait("its return to be seen", Duration::from_secs(60), || host_state()["up"] == 1);
}

/// A guest whose agent was there before the daemon tells it its names and addresses.
fn says_who_it_is(lab: &Lab, hostname: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let api = Client::unix(lab.path("run/api.sock"));
    let vm = || -> Value { runtime.block_on(api.get("/api/v1/vms/web1")).expect("an answer") };
    wait("the guest to be asked", Duration::from_secs(60), || !vm()["guest"]["hostname"].is_null());
    let expected = json!({"is_agent_connected": true, "hostname": hostname, "os": "Lab Linux 1"});
    assert_eq!(vm()["guest"], expected);
    let addresses = vm()["networks"][0]["addresses"].clone();
    assert!(addresses.as_array().is_some_and(|all| all.contains(&json!("192.0.2.77"))), "{addresses}");
}

/// Where in a backup the daemon is killed. The hooks make the moments around the freeze long enough to be met.
const MOMENTS: [(&str, u64); 6] =
    [("queued", 0), ("preparing", 0), ("quiescing", 0), ("quiescing", 500), ("copying", 100), ("copying", 900)];

#[test]
fn a_daemon_killed_in_any_phase_of_a_backup_does_it_again_and_the_guest_goes_on() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let state = lab.path("state").display().to_string();
    let hooks = "[backup]\npre-freeze = \"sleep 0.7\"\npost-thaw = \"sleep 0.3\"\n";
    lab.write_config("h1", &format!("[server]\nstate-dir = {state:?}\nreconcile-s = 5\n{hooks}"));
    lab.guest_sh("web1", HEARTBEAT);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let api = Client::unix(lab.path("run/api.sock"));
    let get = |path: &str| -> Value { runtime.block_on(api.get(path)).expect("an answer") };
    let mut daemon = Daemon::start(&lab);
    let mut known = lab.points("web1");
    for (moment, later) in MOMENTS {
        let request = json!({"vm": "web1", "full": true, "bandwidth_bytes_s": 16 << 20, "quiesce": "required"});
        let job: Value = runtime.block_on(api.post("/api/v1/jobs/backup", &request, None)).expect("a job");
        let path = format!("/api/v1/jobs/{}", job["id"].as_str().expect("an id"));
        // A phase can be over between two looks: the moment is there when its phase is reached or passed.
        let order = ["queued", "preparing", "quiescing", "copying"];
        let rank = |phase: &str| order.iter().position(|known| *known == phase).unwrap_or(order.len());
        wait(moment, Duration::from_secs(30), || {
            let job = get(&path);
            assert!(job["error"].is_null() && job["state"] != "succeeded", "{moment}: {job}");
            moment == "queued" || job["progress"]["phase"].as_str().is_some_and(|phase| rank(phase) >= rank(moment))
        });
        std::thread::sleep(Duration::from_millis(later));
        drop(daemon);

        daemon = Daemon::start(&lab);
        wait("the backup that was asked for", Duration::from_secs(90), || {
            let jobs = get("/api/v1/jobs?vm=web1&kind=backup");
            assert_ne!(jobs["items"][0]["state"], "failed", "{moment}: {jobs}");
            jobs["items"][0]["state"] == "succeeded"
        });
        lab.assert_nothing_left("h1", "web1");
        let now = lab.points("web1");
        assert!(now.len() > known.len() && known.iter().all(|id| now.contains(id)), "{moment}: {known:?} {now:?}");
        known = now;
    }
    lab.assert_guest_went_on("web1");
    lab.assert_sound();
}

/// The same command with the privileges that the systemd unit leaves it.
fn confined(command: &Command) -> Command {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging/virtward.service");
    let unit = std::fs::read_to_string(unit).expect("the unit");
    assert!(unit.contains("\nNoNewPrivileges=yes\n"));
    let kept = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("capabilities");
    let kept: Vec<String> =
        kept.split_whitespace().map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase())).collect();
    let mut inner = Command::new("setpriv");
    inner.arg(format!("--bounding-set=-all,{}", kept.join(","))).args(["--inh-caps=-all", "--no-new-privs"]);
    inner.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => inner.env(name, value),
            None => inner.env_remove(name),
        };
    }
    command.get_current_dir().map(|dir| inner.current_dir(dir));
    inner
}

#[test]
fn with_the_privileges_that_its_unit_leaves_the_daemon_backs_up_and_restores() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let state = lab.path("state").display().to_string();
    lab.write_config("h1", &format!("[server]\nstate-dir = {state:?}\nreconcile-s = 5\n"));
    let before = lab.guest_sh("web1", CHECKSUMS);
    let mut command = confined(&lab.virtward(&["serve"]));
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the daemon starts");
    let _daemon = Daemon(child);
    wait("the daemon to see the guest", Duration::from_secs(60), || {
        json(&lab, &["status", "--json"])["vms"]["running"] == 1
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let api = Client::unix(lab.path("run/api.sock"));
    let restore = json!({"point": "web1@latest", "name": "web1-by-daemon"});
    for (path, request) in
        [("/api/v1/jobs/backup", json!({"vm": "web1", "quiesce": "required"})), ("/api/v1/jobs/restore", restore)]
    {
        let job: Value = runtime.block_on(api.post(path, &request, None)).expect("a job");
        let job = format!("/api/v1/jobs/{}", job["id"].as_str().expect("an id"));
        wait(path, Duration::from_secs(120), || {
            let job: Value = runtime.block_on(api.get(&job)).expect("an answer");
            assert_ne!(job["state"], "failed", "{job}");
            job["state"] == "succeeded"
        });
    }
    assert_eq!(lab.state("h1", "web1-by-daemon"), "shut off");
    lab.assert_nothing_left("h1", "web1");
    lab.assert_boots("web1@latest", "web1-restored", &before);
}
