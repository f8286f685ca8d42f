//! Backups that another host reads and stores: what they hold is what the VM's own host would have stored, and nothing that
//! becomes of the proxy is the guest's trouble.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{
    cluster::{JOB, Node, SOON, ask_backup, joined, succeeds},
    harness::{CHECKSUMS, HEARTBEAT, Lab, run, text, wait},
    restore::Still,
};

/// The name of a node's host.
fn host(lab: &Lab, node: &Node<'_>) -> String {
    let mut command = lab.host_exec(node.name);
    command.arg("hostname");
    text(&run(command, Duration::from_secs(10))).trim().to_owned()
}

/// Asks for a backup of a VM through proxies; none: through those of its policy. The job's id.
fn backup(lab: &Lab, node: &Node<'_>, vm: &str, proxies: Option<&[&str]>, more: &str) -> String {
    let proxies = proxies.map(|names| format!(",\"proxy\":{names:?}")).unwrap_or_default();
    ask_backup(lab, node, &format!("{{\"vm\":{vm:?}{proxies}{more}}}"))
}

/// A backup as [`backup`], at its end.
fn backed_up(lab: &Lab, node: &Node<'_>, vm: &str, proxies: Option<&[&str]>, more: &str) -> Value {
    let id = backup(lab, node, vm, proxies, more);
    succeeds(node, &id);
    node.job(&id)
}

fn log(node: &Node<'_>) -> String {
    std::fs::read_to_string(node.dir().join("log")).unwrap_or_default()
}

/// No job, no scratch file and no socket of a VM on its host, and at most one checkpoint of ours.
fn assert_nothing_left(lab: &Lab, node: &Node<'_>, vm: &str) {
    for dir in ["scratch", "run/backup", "run/frozen"] {
        let left: Vec<_> = std::fs::read_dir(node.dir().join(dir)).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
    let job = lab.virsh(node.name, &["domjobinfo", vm]);
    assert!(!text(&job).contains("Backup"), "a job is left: {}", text(&job));
    let checkpoints = lab.virsh(node.name, &["checkpoint-list", vm, "--name"]);
    assert!(text(&checkpoints).lines().filter(|line| line.starts_with("virtward-")).count() <= 1);
}

fn policy(vm: &str, proxy: &str) -> String {
    format!(
        "[[policy]]\nname = \"often\"\nrepository = \"default\"\nproxy = {proxy}\nselect.any = [\"name:{vm}\"]\n\
         retention.keep-last = 50\nschedule = {{ cron = \"* * * * *\", time-zone = \"UTC\" }}\n"
    )
}

#[test]
fn a_policy_has_another_host_read_and_store_and_what_is_restored_is_the_same() {
    let lab = Lab::with_etcd(3);
    lab.lab(&["vm", "create", "web2", "--host", "h2", "--disk", "1GiB", "--fill", "40MiB", "--pool", "local"]);
    lab.lab(&["vm", "wait", "web2"]);
    let still = Still::define(&lab, "h2");
    let mut nodes = joined(&lab, 2);
    let [h1, h2, h3] = &nodes;
    let (own, proxy) = (host(&lab, h2), host(&lab, h3));

    // A host that is not there is no proxy, and the file says where that stands.
    let file = lab.path("often.toml");
    let file = file.to_str().unwrap();
    std::fs::write(file, policy("web2", &format!("[{proxy:?}, \"backpu\"]"))).unwrap();
    let refused = h1.output(&["policy", "apply", "-f", file]);
    let place = format!("often.toml:4:{}: there is no host \"backpu\"", 14 + proxy.len());
    assert!(!refused.status.success() && text(&refused).contains(&place), "{place}: {}", text(&refused));
    std::fs::write(file, policy("web2", &format!("{proxy:?}"))).unwrap();
    h1.ok(&["policy", "apply", "-f", file]);
    let explained = || h1.json(&["policy", "explain", "web2"])["policies"][0].clone();
    wait("the policy to be planned", SOON, || explained()["runs_on"] == proxy.as_str());
    let says = format!("it is cut on {own}, where the VM is, and read and stored by {proxy}, a proxy of the policy");
    assert!(explained()["reasons"].to_string().contains(&says), "{}", explained());

    // The first in full, the next what changed.
    let planned = || {
        let jobs = h1.json(&["job", "list", "--vm", "web2"]);
        let jobs = jobs.as_array().cloned().unwrap_or_default().into_iter().rev();
        jobs.filter(|job| job["kind"] == "backup").collect::<Vec<_>>()
    };
    for (number, kind) in [(0, "full"), (1, "incremental")] {
        wait("a run of the policy", JOB, || {
            let jobs = planned();
            assert!(jobs.iter().all(|job| job["state"] != "failed"), "{jobs:#?}");
            jobs.get(number).is_some_and(|job| job["state"] == "succeeded")
        });
        let job = &planned()[number];
        assert_eq!((job["host"].as_str(), job["proxy"].as_str()), (Some(&*own), Some(&*proxy)), "{job}");
        assert_eq!((&job["result"]["kind"], &job["warnings"]), (&kind.into(), &serde_json::json!([])), "{job}");
        lab.guest_sh("web2", &format!("dd if=/dev/urandom of=/data/new{number} bs=1M count=4 2>/dev/null; sync"));
    }
    assert!(log(h3).contains("a backup is read and stored for another host"), "{}", log(h3));
    // Who asks for one of that VM gets it the same way, unless he says otherwise.
    let by_hand = backed_up(&lab, h1, "web2", None, "");
    assert_eq!((by_hand["proxy"].as_str(), &by_hand["result"]["kind"]), (Some(&*proxy), &"incremental".into()));
    h1.ok(&["policy", "delete", "often"]);
    wait("the policy's last run", JOB, || planned().iter().all(|job| job["finished"].is_string()));

    // Whoever does it, tracking goes on.
    for proxies in [&[][..], &[&*proxy], &[&*own], &[&*proxy]] {
        lab.guest_sh("web2", "dd if=/dev/urandom of=/data/more bs=1M count=4 2>/dev/null; sync");
        let job = backed_up(&lab, h1, "web2", Some(proxies), "");
        let through = (proxies == [&*proxy]).then_some(&*proxy);
        assert_eq!((job["proxy"].as_str(), &job["result"]["kind"]), (through, &"incremental".into()), "{job}");
        let read = job["result"]["read_bytes"].as_u64().unwrap();
        assert!((4 << 20..24 << 20).contains(&read), "{job}");
    }
    let sums = lab.guest_sh("web2", CHECKSUMS);
    lab.guest_sh("web2", "sync");
    let last = backed_up(&lab, h1, "web2", Some(&[&proxy]), ",\"warm\":true");
    assert_eq!(last["result"]["kind"], "incremental", "{last}");
    assert_nothing_left(&lab, h2, "web2");

    // It is switched off, and on: its own host serves the images, and they are read in part as well.
    lab.virsh_ok("h2", &["shutdown", "web2"]);
    lab.wait_off("h2", "web2");
    wait("it to be known", SOON, || h1.json(&["vm", "show", "web2"])["power"] != "running");
    let cold = backed_up(&lab, h1, "web2", Some(&[&proxy]), "");
    assert_eq!((cold["proxy"].as_str(), &cold["result"]["kind"]), (Some(&*proxy), &"incremental".into()), "{cold}");
    assert!(cold["result"]["read_bytes"].as_u64().unwrap() < 24 << 20, "{cold}");

    // Raw images, UEFI variables and the state of a TPM, of a VM that is off: nothing is left out. The last of these is where
    // only its own host sees it.
    let dir = still.tpm.join("tpm2");
    let script = format!("mkdir -p {0} && printf endorsed > {0}/tpm2-00.permall", dir.display());
    let mut command = lab.host_exec("h2");
    command.args(["sh", "-c", &script]);
    assert!(run(command, Duration::from_secs(10)).status.success());
    // A proxy needs no libvirt.
    lab.lab(&["host", "libvirtd", "stop", "h3"]);
    wait("that to be known", SOON, || h1.sees("h3")["host_state"] == "libvirtd-down");
    let off = backed_up(&lab, h1, "still", Some(&[&proxy]), "");
    assert_eq!((off["proxy"].as_str(), &off["warnings"]), (Some(&*proxy), &serde_json::json!([])), "{off}");
    let copies = lab.path("copies");
    std::fs::create_dir(&copies).unwrap();
    let copies = copies.to_str().unwrap();
    let copy = lab.ok(&["--json", "restore", "vm", "still@latest", "--name", "copy", "--disk-dir", copies]);
    let copy: Value = serde_json::from_str(&copy).unwrap();
    for disk in copy["disks"].as_array().unwrap() {
        let original = if disk["target"] == "vda" { "disk.raw" } else { "second/disk.raw" };
        assert!(std::fs::read(disk["path"].as_str().unwrap()).unwrap() == still.read(original), "{disk}");
    }
    assert!(still.read("copy_VARS.fd") == still.read("vars.fd"), "UEFI variables");
    let tpm = still.tpm.with_file_name(copy["uuid"].as_str().unwrap());
    let state = std::fs::read_to_string(tpm.join("tpm2/tpm2-00.permall"));
    let _ = std::fs::remove_dir_all(&tpm);
    assert_eq!(state.expect("TPM state"), "endorsed");

    for node in &mut nodes {
        node.kill();
    }
    lab.assert_boots(last["result"]["point"].as_str().unwrap(), "back", &sums);
    lab.assert_sound();
}

#[test]
fn the_guest_goes_on_whatever_becomes_of_its_proxy() {
    let lab = Lab::with_etcd(3);
    lab.lab(&["vm", "create", "web2", "--host", "h2", "--disk", "1GiB", "--fill", "40MiB"]);
    lab.lab(&["vm", "wait", "web2"]);
    let [mut h1, mut h2, mut h3] = joined(&lab, 1);
    let proxy = host(&lab, &h3);
    let slow = format!(",\"full\":true,\"bandwidth_bytes_s\":{}", 2 << 20);
    let begun = |node: &Node<'_>| {
        let id = backup(&lab, node, "web2", Some(&[&proxy]), &slow);
        wait("the job to copy", SOON, || node.job(&id)["progress"]["done_bytes"].as_u64() > Some(0));
        assert_eq!(node.job(&id)["proxy"].as_str(), Some(&*proxy));
        id
    };
    let ends = |node: &Node<'_>, id: &str, state: &str, limit: u64| {
        let since = Instant::now();
        wait("the job's end", Duration::from_secs(limit), || node.job(id)["finished"].is_string());
        let job = node.job(id);
        assert_eq!(job["state"], state, "{job}");
        eprintln!("{state} after {:?}: {}", since.elapsed(), job["error"]["message"]);
        job
    };
    lab.guest_sh("web2", HEARTBEAT);

    // Cancelled: the proxy forgets it.
    let id = begun(&h1);
    h1.ok(&["job", "cancel", &id]);
    ends(&h1, &id, "cancelled", 20);
    wait("the proxy to forget it", SOON, || log(&h3).contains("the session of another host has ended"));
    assert_nothing_left(&lab, &h2, "web2");

    // Stopped in an orderly way: the job says so, and is one that the scheduler would run again.
    let id = begun(&h1);
    lab.signal(&[h3.pid()], "TERM");
    let job = ends(&h1, &id, "interrupted", 30);
    assert!(job["error"]["message"].as_str().unwrap().contains("its daemon is stopped"), "{job}");
    h3.kill();
    h3.start();
    wait("it to be there", SOON, || h1.sees("h3")["is_there"] == true);

    // Killed: the job ends at once, and nothing of it is left.
    let id = begun(&h1);
    h3.kill();
    let job = ends(&h1, &id, "failed", 20);
    assert!(job["error"]["message"].as_str().unwrap().contains("it was lost"), "{job}");
    assert_nothing_left(&lab, &h2, "web2");

    // Without it: the VM's own host does it, and says so.
    wait("its silence", SOON, || h1.sees("h3")["is_there"] == false);
    let job = backed_up(&lab, &h1, "web2", Some(&[&proxy]), "");
    assert_eq!((&job["proxy"], &job["result"]["kind"]), (&Value::Null, &"full".into()), "{job}");
    assert!(job["warnings"].to_string().contains("no proxy answers"), "{job}");
    h3.start();
    wait("it to be there", SOON, || h1.sees("h3")["is_there"] == true);
    let job = backed_up(&lab, &h1, "web2", Some(&[&proxy]), "");
    assert_eq!((job["proxy"].as_str(), &job["result"]["kind"]), (Some(&*proxy), &"incremental".into()), "{job}");

    // Standing still, as a host that lost its network: that is noticed.
    let id = begun(&h1);
    lab.signal(&[h3.pid()], "STOP");
    let job = ends(&h1, &id, "failed", 90);
    assert!(job["error"]["message"].as_str().unwrap().contains("nothing was heard of it"), "{job}");
    assert_nothing_left(&lab, &h2, "web2");
    lab.signal(&[h3.pid()], "CONT");
    wait("it to be there", SOON, || h1.sees("h3")["is_there"] == true);

    // The daemon of the VM's host is killed: the proxy forgets it, and what is left is cleared by the next run.
    let before = log(&h3).matches("the session of another host has ended").count();
    let id = begun(&h1);
    h2.kill();
    let ended = || log(&h3).matches("the session of another host has ended").count();
    wait("the proxy to forget it", SOON, || ended() > before);
    h2.start();
    wait("its interruption", SOON, || h1.job(&id)["state"] == "interrupted");
    wait("another try that succeeds", JOB, || {
        let jobs = h1.json(&["job", "list", "--vm", "web2"]);
        jobs[0]["state"] == "succeeded"
            && jobs[0]["proxy"] == proxy.as_str()
            && jobs[0]["origin"]["after"] == id.as_str()
    });
    assert_nothing_left(&lab, &h2, "web2");
    lab.assert_guest_went_on("web2");
    for node in [&mut h1, &mut h2, &mut h3] {
        node.kill();
    }
    lab.assert_sound();
}
