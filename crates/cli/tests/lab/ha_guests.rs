//! High availability of guests and of what runs in them, on hosts that are well: a service that stays down, a QEMU that
//! dies again and again, a disk with errors, and changes that would take the room which is kept for the loss of a host.

use std::time::Duration;

use serde_json::Value;

use crate::{
    ha_failover::{Cluster, HOSTS, Place, SOON},
    harness::{check_failure, text, wait},
};

/// In the guest: gives it an address, and starts its service, without any init system.
const SERVICE: &str = "#!/bin/sh\nip addr add ADDRESS/24 dev eth0 2>/dev/null\nexec httpd -p 5000 -h /tmp\n";

#[test]
fn a_guest_is_mended_where_it_is_then_taken_elsewhere_and_room_is_kept() {
    // Two guests fit on a host.
    let cluster = Cluster::up("500MiB");
    for (vm, host) in [("w1", "h1"), ("w2", "h2")] {
        cluster.lab.lab(&["vm", "create", vm, "--host", host, "--writer"]);
    }
    behind_a_way_of_each_host_to_its_disk(&cluster, "w3", "h3");
    cluster.lab.lab(&["vm", "create", "big", "--host", "h1", "--memory", "400MiB", "--no-start"]);
    for vm in ["w1", "w2", "w3"] {
        cluster.lab.lab(&["vm", "wait", vm]);
    }
    cluster.enable("h1", &["w1", "w2", "w3", "big"]);
    wait("three protected guests", SOON, || cluster.places("h1").len() == 3);
    room_for_the_loss_of_a_host_is_kept(&cluster);
    a_service_is_restarted_then_its_vm_then_it_is_moved_once(&cluster);
    a_qemu_that_dies_twice_is_started_elsewhere(&cluster);
    a_guest_whose_host_has_errors_on_its_way_to_the_disk_waits_then_is_taken_elsewhere(&cluster);
    cluster.check_writers(&["w1", "w2", "w3"]);
}

fn room_for_the_loss_of_a_host_is_kept(cluster: &Cluster) {
    let refused = |arguments: &[&str], why: &str| {
        let output = cluster.virtward("h1", arguments);
        check_failure(&output, arguments, 4, &["kept for host failures", why, "--force"]);
    };
    refused(&["ha", "start", "big"], "no host has room for big, which needs 400 MiB");
    // Three guests on two hosts: one of both could not have them all.
    let (h2, h3) = (cluster.lab.tcp_uri("h2"), cluster.lab.tcp_uri("h3"));
    let drain = ["host", "drain", "--dry-run", "--to", &h2, "--to", &h3];
    refused(&drain, "would stay down");
    let forced = [&drain[..], &["--force"]].concat();
    assert!(cluster.ok("h1", &forced).contains("w1"), "it is a person's decision");
    let without = cluster.virtward("h1", &["ha", "capacity", "--without", "h1", "--json"]);
    let found: Value = serde_json::from_slice(&without.stdout).expect("JSON");
    assert!(found["enough"] == false && found["refused"].is_string(), "{found}");
    more_memory_is_judged_before_and_said_after(cluster);
    // A move that leaves room goes through, there and back.
    for (from, to) in [("h1", "h2"), ("h2", "h1")] {
        cluster.ok(from, &["vm", "migrate", "w1", "--to", &cluster.lab.tcp_uri(to)]);
        wait("w1 to have moved", SOON, || cluster.places("h3").get("w1").is_some_and(|place| place.host == to));
    }
}

/// libvirt asks nobody when a definition is changed: it is asked about before, and counted with after.
fn more_memory_is_judged_before_and_said_after(cluster: &Cluster) {
    let fits = ["ha", "capacity", "--vm", "w3", "--memory", "300MiB"];
    assert!(cluster.ok("h1", &fits).contains("every protected VM runs again"));
    let too_much = ["ha", "capacity", "--vm", "w3", "--memory", "400MiB"];
    let why = ["without h3: w3 would stay down", "it would take room away that is kept for host failures"];
    check_failure(&cluster.virtward("h1", &too_much), &too_much, 4, &why);
    cluster.lab.virsh_ok("h3", &["setmaxmem", "w3", "400MiB", "--config"]);
    wait("that to be said", SOON, || {
        said(cluster, &["w3 has 400 MiB by its definition, before 192 MiB: that takes room away", "w3 would stay down"])
    });
    let capacity = ["ha", "capacity"];
    // Each host has a look of its own, and they are not of the same moment.
    let all_say =
        |code: i32| ["h1", "h2", "h3"].iter().all(|host| cluster.virtward(host, &capacity).status.code() == Some(code));
    wait("all hosts to count with it", SOON, || all_say(4));
    check_failure(&cluster.virtward("h1", &capacity), &capacity, 4, &["w3 would stay down"]);
    cluster.lab.virsh_ok("h3", &["setmaxmem", "w3", "192MiB", "--config"]);
    wait("that to be counted with", SOON, || all_say(0));
}

fn said(cluster: &Cluster, words: &[&str]) -> bool {
    cluster.story().lines().any(|line| words.iter().all(|word| line.contains(word)))
}

fn a_service_is_restarted_then_its_vm_then_it_is_moved_once(cluster: &Cluster) {
    let lab = &cluster.lab;
    let status: Value = serde_json::from_str(&lab.lab(&["status", "--json"])).expect("JSON");
    let address = status["subnet"].as_str().expect("a subnet").replace(".0/24", ".201");
    let script = SERVICE.replace("ADDRESS", &address).replace('\n', "\\n");
    lab.guest_sh("w1", &format!("printf '{script}' > /tmp/service; chmod 755 /tmp/service; /tmp/service"));
    let probe = format!("tcp://{address}:5000");
    let watch = ["ha", "enable", "w1", "--service", &probe, "--every", "1s", "--failures", "2", "--grace", "6s"];
    cluster.ok("h2", &[&watch[..], &["--restart-command", "/tmp/service"]].concat());
    let before = cluster.settled();
    std::thread::sleep(Duration::from_secs(8));

    lab.guest_sh("w1", "killall httpd");
    wait("the service to be restarted", SOON, || {
        text(&lab.lab_output(&["vm", "exec", "w1", "--", "pidof", "httpd"])).trim().parse::<u32>().is_ok()
    });
    assert!(said(cluster, &[&probe, "is down", "the service is restarted"]), "{}", cluster.story());
    assert_eq!(cluster.places("h2"), before, "nothing else was done");

    // After a reset its script is gone, and nothing that is tried brings it back.
    cluster.ok("h2", &[&watch[..], &["--action", "restart-vm", "--action", "relocate"]].concat());
    lab.guest_sh("w1", "killall httpd");
    wait("the VM to be reset", SOON, || said(cluster, &[&probe, "the VM is reset"]));
    wait("it to be started elsewhere", SOON, || {
        cluster.places("h2").get("w1").is_some_and(|now| *now.host != before["w1"].host)
    });
    let there = cluster.places("h2")["w1"].clone();
    assert_eq!(there.generation, before["w1"].generation + 1);
    assert!(said(cluster, &[&probe, "the VM is started elsewhere"]));
    // What did not help on two hosts is not tried on the third.
    wait("it to be given up", SOON, || said(cluster, &[&probe, "nothing that is allowed has helped"]));
    assert_eq!(cluster.places("h2")["w1"], there);
    cluster.ok("h2", &["ha", "enable", "w1", "--service", "none"]);
    let others = |places: &std::collections::BTreeMap<String, Place>| (places["w2"].clone(), places["w3"].clone());
    assert_eq!(others(&cluster.places("h2")), others(&before), "one service touches one VM");
}

fn a_qemu_that_dies_twice_is_started_elsewhere(cluster: &Cluster) {
    cluster.ok("h1", &["ha", "enable", "w2", "--resets", "1"]);
    let before = cluster.places("h1")["w2"].clone();
    let kill = || {
        let at = cluster.places("h1")["w2"].host.clone();
        let file = format!("/run/virtward-lab/{}/{at}/libvirt/qemu/w2.pid", cluster.lab.name);
        let pid = std::fs::read_to_string(file).expect("the pid of its QEMU").trim().to_owned();
        cluster.lab.signal(&[pid], "KILL");
    };
    kill();
    wait("it to be started again where it was", SOON, || {
        let now = cluster.places("h1").get("w2").cloned();
        now.is_some_and(|now| now.host == before.host && now.generation == before.generation + 1)
    });
    cluster.lab.lab(&["vm", "wait", "w2"]);
    kill();
    wait("it to be started elsewhere", SOON, || {
        cluster.places("h1").get("w2").is_some_and(|now| now.host != before.host && HOSTS.contains(&&*now.host))
    });
    assert!(said(cluster, &["w2", "crashed more than 1 times"]), "{}", cluster.story());
    cluster.lab.lab(&["vm", "wait", "w2"]);
}

/// Where each host reaches that disk; the directory is a host's own.
const WAY: &str = "/run/libvirt/disk.sock";

/// There is an error for all that is written from that host while this file is there.
fn trouble(cluster: &Cluster, host: &str) -> std::path::PathBuf {
    cluster.lab.path(&format!("trouble-{host}"))
}

/// Makes a guest whose host reaches the disk by a server of its own, and starts it: one host's way can fail then, and the
/// others' do not. It stops on an error, as is usual for disks in a network.
fn behind_a_way_of_each_host_to_its_disk(cluster: &Cluster, vm: &str, host: &str) {
    let lab = &cluster.lab;
    let definition = lab.path("disk.xml").display().to_string();
    lab.lab(&["vm", "create", vm, "--host", host, "--writer", "--no-start", "--xml-to", &definition]);
    let disk = lab.shared().join(format!("{vm}-writes.raw")).display().to_string();
    for host in HOSTS {
        let trouble = format!("error-file={}", trouble(cluster, host).display());
        let serve = ["nbdkit", "--unix", WAY, "--filter=error", "file", &disk, "error=EIO", "error-pwrite-rate=100%"];
        lab.lab(&[&["host", "exec", host, "--"], &serve[..], &[&trouble]].concat());
    }
    let xml = std::fs::read_to_string(&definition).expect("its definition");
    let (before, after) = xml.split_once(&format!("<source file='{disk}'/>")).expect("the disk of its records");
    let (before, driver) = before.rsplit_once("<disk type='file'").expect("a disk");
    let driver = driver.replace("cache=", "error_policy='stop' rerror_policy='stop' cache=");
    let source = format!("<source protocol='nbd'><host transport='unix' socket='{WAY}'/></source>");
    std::fs::write(&definition, format!("{before}<disk type='network'{driver}{source}{after}")).expect("a definition");
    lab.virsh_ok(host, &["define", &definition]);
    lab.virsh_ok(host, &["start", vm]);
}

fn a_guest_whose_host_has_errors_on_its_way_to_the_disk_waits_then_is_taken_elsewhere(cluster: &Cluster) {
    let lab = &cluster.lab;
    let before = cluster.places("h1")["w3"].clone();
    let trouble = trouble(cluster, &before.host);
    std::fs::write(&trouble, "").expect("trouble");
    wait("it to be stopped", SOON, || lab.state(&before.host, "w3") == "paused");
    wait("that to be said", SOON, || said(cluster, &["w3 was stopped by an I/O error", "let run again"]));
    std::fs::remove_file(&trouble).expect("trouble");
    wait("it to run", SOON, || lab.state(&before.host, "w3") == "running");
    let written = cluster.records("w3");
    wait("it to write", SOON, || cluster.records("w3") > written);
    assert_eq!(cluster.places("h1")["w3"], before, "a short trouble is waited out");

    std::fs::write(&trouble, "").expect("trouble");
    wait("it to be started elsewhere", SOON, || {
        cluster.places("h1").get("w3").is_some_and(|now| now.host != before.host && HOSTS.contains(&&*now.host))
    });
    assert_eq!(cluster.places("h1")["w3"].generation, before.generation + 1);
    assert!(said(cluster, &["w3 is given up on this host", "paused by I/O errors 5 times"]), "{}", cluster.story());
    lab.lab(&["vm", "wait", "w3"]);
    let written = cluster.records("w3");
    wait("it to write there", SOON, || cluster.records("w3") > written);
    std::fs::remove_file(&trouble).expect("trouble");
}
