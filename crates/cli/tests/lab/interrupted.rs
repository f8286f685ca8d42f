//! Backups that are interrupted: by what becomes of the VM, by libvirt, by signals. Nothing that was published is lost,
//! nothing stays behind, and the next backup works.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{CHECKSUMS, HEARTBEAT, Lab, Running, disk};

fn finished(running: Running) -> Value {
    let (code, out, err) = running.finish(Duration::from_secs(90));
    assert_eq!(code, Some(0), "{out}{err}");
    serde_json::from_str(&out).expect("JSON")
}

#[test]
fn whatever_becomes_of_the_vm_in_mid_backup_is_noticed_and_costs_nothing_published() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let first = lab.backup("web1", &[]);
    let sums = lab.guest_sh("web1", CHECKSUMS);

    // libvirtd restarted: QEMU goes on serving, the backup succeeds.
    let running = lab.slow_backup("web1", "8MiB");
    lab.lab(&["host", "libvirtd", "restart", "h1"]);
    let result = finished(running);
    assert_eq!((result["source"].as_str(), result["kind"].as_str()), (Some("hot"), Some("full")), "{result}");
    lab.assert_nothing_left("h1", "web1");

    // Two at once: the second is told who is at it.
    let running = lab.slow_backup("web1", "8MiB");
    let pid = format!("pid {}", running.pid());
    lab.fails(&["backup", "run", "web1"], 5, &["another job of Virtward works on web1", &pid]);
    // Stopped by the operator: soon, and with nothing left.
    let asked = Instant::now();
    running.signal("INT");
    let (code, _, err) = running.finish(Duration::from_secs(20));
    assert_eq!(code, Some(130), "{err}");
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    lab.assert_nothing_left("h1", "web1");
    let next = lab.backup("web1", &[]);
    assert_eq!(next["kind"], "incremental", "a full backup that was stopped cost the tracking: {next}");

    // Another tool's backup.
    let job = lab.path("other.xml");
    let socket = lab.path("other.sock");
    let xml =
        format!("<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>", socket.display());
    std::fs::write(&job, xml).unwrap();
    lab.virsh_ok("h1", &["backup-begin", "web1", job.to_str().unwrap()]);
    lab.fails(&["backup", "run", "web1"], 5, &["another tool is backing up web1", "virsh domjobabort web1"]);
    lab.virsh_ok("h1", &["domjobabort", "web1"]);
    assert_eq!(lab.backup("web1", &[])["kind"], "incremental");

    // Switched off: begun again from the images at rest.
    let running = lab.slow_backup("web1", "8MiB");
    lab.virsh_ok("h1", &["destroy", "web1"]);
    let cold = finished(running);
    assert_eq!(cold["source"], "cold", "{cold}");
    assert!(cold["warnings"].to_string().contains("during the backup; the backup was begun again"), "{cold}");
    lab.virsh_ok("h1", &["start", "web1"]);
    lab.lab(&["vm", "wait", "web1"]);
    assert_eq!(lab.backup("web1", &[])["kind"], "incremental");

    // Shut down by itself.
    let running = lab.slow_backup("web1", "4MiB");
    lab.virsh_ok("h1", &["shutdown", "web1", "--mode", "acpi"]);
    let cold = finished(running);
    assert_eq!(cold["source"], "cold", "{cold}");
    assert_eq!(disk(&cold, "vda")["reason"], "a full read was asked for", "{cold}");
    assert_eq!(lab.backup("web1", &[])["kind"], "incremental");

    // Reset: a reset guest keeps its disks. libvirt 11.3 is deaf to the domain for 30 s after it (the next backup waits),
    // and to its agent until libvirtd is restarted.
    lab.virsh_ok("h1", &["start", "web1"]);
    lab.lab(&["vm", "wait", "web1"]);
    let running = lab.slow_backup("web1", "8MiB");
    lab.virsh_ok("h1", &["reset", "web1"]);
    assert_eq!(finished(running)["source"], "hot");
    let next = lab.backup("web1", &["--quiesce", "off"]);
    assert_eq!(next["kind"], "incremental", "{next}");
    lab.assert_nothing_left("h1", "web1");
    lab.lab(&["host", "libvirtd", "restart", "h1"]);
    lab.lab(&["vm", "wait", "web1"]);

    // Deleted.
    let running = lab.slow_backup("web1", "2MiB");
    lab.virsh_ok("h1", &["undefine", "web1", "--checkpoints-metadata"]);
    lab.virsh_ok("h1", &["destroy", "web1"]);
    let (code, _, err) = running.finish(Duration::from_secs(60));
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("web1 was deleted during the backup") && err.contains("nothing was published"), "{err}");

    // Every restore point is still there, and whole.
    assert!(lab.points("web1").contains(&first["id"].as_str().unwrap().to_owned()));
    lab.assert_sound();
    lab.assert_boots(first["id"].as_str().unwrap(), "web1-r", &sums);
}

const KILLS: u32 = 50;

#[test]
fn a_backup_killed_at_any_point_leaves_the_repository_and_the_guest_whole() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let sums = lab.guest_sh("web1", CHECKSUMS);
    let first_id = lab.backup("web1", &[])["id"].as_str().unwrap().to_owned();
    let measure = |more: &[&str]| {
        let began = Instant::now();
        lab.backup("web1", more);
        began.elapsed()
    };
    // The longer of two: the first is slower than the rest.
    measure(&["--full"]);
    let (full, increment) = (measure(&["--full"]), measure(&[]));
    lab.guest_sh("web1", HEARTBEAT);

    let mut known = lab.points("web1");
    let mut died = 0;
    for n in 0..KILLS {
        let (more, length): (&[&str], _) = if n % 2 == 0 { (&["--full"], full) } else { (&[], increment) };
        let mut running = lab.start(&[&["--json", "backup", "run", "web1"], more].concat());
        std::thread::sleep(length * n / KILLS);
        if running.is_running() {
            died += 1;
            running.signal("KILL");
        }
        running.finish(Duration::from_secs(5));

        lab.ok(&["repo", "check"]);
        let now = lab.points("web1");
        assert!(known.iter().all(|id| now.contains(id)), "kill {n}: restore points are gone: {known:?} {now:?}");
        known = now;
        // Mostly the next backup finishes; now and then it is killed too, amid what this one left.
        if n % 5 != 3 {
            let next = lab.backup("web1", &[]);
            assert_eq!(next["kind"], "incremental", "kill {n}: {next}");
            assert_eq!(next["quiesce"]["outcome"], "frozen", "kill {n}: {next}");
            lab.assert_nothing_left("h1", "web1");
            known = lab.points("web1");
        }
        if n % 25 == 24 {
            lab.ok(&["backup", "verify", "--all", "--mode", "full"]);
        }
    }
    assert!(died > KILLS / 2, "only {died} of {KILLS} backups were still running when they were killed");

    lab.assert_guest_went_on("web1");
    assert_eq!(lab.guest_sh("web1", "cd /data && sha256sum -c -s SHA256SUMS && echo whole").trim(), "whole");
    lab.assert_boots(&first_id, "web1-r", &sums);
}
