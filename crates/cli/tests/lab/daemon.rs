//! The daemon on a real host: a policy that is due backs up a running guest by itself.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{CHECKSUMS, Lab, wait};

/// Killed when the test ends, however it ends.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
    lab.write_config("h1", &format!("[server]\nstate-dir = {state:?}\nreconcile-s = 5\n"));
    let command = lab.virtward(&["serve"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _daemon = Daemon(command.expect("the daemon starts"));
    wait("the daemon to see the guest", Duration::from_secs(60), || {
        json(&lab, &["status", "--json"])["vms"]["running"] == 1
    });
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
