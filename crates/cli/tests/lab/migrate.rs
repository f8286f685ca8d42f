//! Moving VMs and disks that are in use: what the guest's outside sees of it, what is left when it is cut short at any
//! moment, and that change tracking goes along.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::harness::{CHECKSUMS, Lab, bytes, disk, text, wait};

/// A guest that logs every 10 ms over a connection to here, with the time at which each line arrived.
struct Log {
    lines: Arc<Mutex<Vec<(Instant, u64)>>>,
}

impl Log {
    /// Gives the guest an address on the lab's network and has it log.
    fn start(lab: &Lab, vm: &str) -> Log {
        let tcp = lab.tcp_uri("h1");
        let address = tcp.trim_start_matches("qemu+tcp://").split(['/', ':']).next().expect("an address").to_owned();
        let network = address.rsplit_once('.').expect("IPv4").0.to_owned();
        let listener = TcpListener::bind((format!("{network}.1"), 0)).expect("listen");
        let port = listener.local_addr().expect("address").port();
        let lines: Arc<Mutex<Vec<(Instant, u64)>>> = Arc::default();
        let kept = Arc::clone(&lines);
        std::thread::spawn(move || {
            let Ok((stream, _)) = listener.accept() else { return };
            for line in BufReader::new(stream).lines() {
                let Some(number) = line.ok().and_then(|line| line.trim().parse().ok()) else { return };
                kept.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), number));
            }
        });
        let script = format!(
            "dev=$(ls /sys/class/net | grep -v lo | head -n 1)
            ip addr add {network}.77/24 dev $dev 2>/dev/null; ip link set $dev up
            (i=0; while :; do i=$((i+1)); echo $i; usleep 10000; done | nc {network}.1 {port}) >/dev/null 2>&1 </dev/null &"
        );
        lab.guest_sh(vm, &script);
        let log = Log { lines };
        wait("the guest's log", Duration::from_secs(20), || log.count() > 50);
        log
    }

    fn count(&self) -> usize {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Nothing was lost, and it still goes on; the longest gap, in milliseconds, since an instant.
    fn longest_gap(&self, since: Instant) -> u128 {
        let before = self.count();
        wait("the log goes on", Duration::from_secs(20), || self.count() > before + 20);
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(lines.windows(2).all(|pair| pair[1].1 == pair[0].1 + 1), "lines were lost");
        let pairs = lines.windows(2).filter(|pair| pair[1].0 >= since);
        pairs.map(|pair| pair[1].0.duration_since(pair[0].0).as_millis()).max().unwrap_or(0)
    }
}

/// `virtward vm migrate` from one host to the other.
fn migrate(lab: &Lab, vm: &str, from: &str, to: &str, more: &[&str]) -> Value {
    let (from, to) = (lab.tcp_uri(from), lab.tcp_uri(to));
    let arguments = [&["--json", "--connect", &from, "vm", "migrate", vm, "--to", &to][..], more].concat();
    serde_json::from_str(&lab.ok(&arguments)).expect("one JSON object")
}

/// The hosts on which a VM has a process.
fn running_on(lab: &Lab, vm: &str) -> Vec<&'static str> {
    ["h1", "h2"]
        .into_iter()
        .filter(|host| {
            let listed = text(&lab.virsh(host, &["list", "--name"]));
            listed.lines().any(|line| line.trim() == vm)
        })
        .collect()
}

fn nothing_under_way(lab: &Lab) {
    for dir in ["run/migrations", "run/moves", "run/probes"] {
        let left = std::fs::read_dir(lab.path(dir)).into_iter().flatten().flatten().count();
        assert_eq!(left, 0, "a journal is left in {dir}");
    }
    for host in ["h1", "h2"] {
        let pools = text(&lab.virsh(host, &["pool-list", "--all", "--name"]));
        assert!(!pools.contains("virtward-dir-"), "{host}: {pools}");
        let files = std::fs::read_dir(lab.shared()).expect("shared").flatten();
        let probes: Vec<_> = files.map(|f| f.file_name()).filter(|f| f.to_string_lossy().contains("probe")).collect();
        assert!(probes.is_empty(), "{probes:?}");
    }
}

fn assert_fine(migrated: &Value) {
    let gates = migrated["gates"].as_array().expect("gates");
    assert!(gates.iter().all(|gate| gate["level"] == "fine"), "{migrated}");
    let seen: Vec<&str> = gates.iter().filter_map(|gate| gate["check"].as_str()).collect();
    assert_eq!(seen, ["place", "disks", "clock", "network"], "{migrated}");
}

#[test]
fn a_vm_moves_under_load_is_called_back_and_survives_every_kill() {
    let lab = Lab::quick(2);
    lab.guest("web1", &[]);
    lab.backup("web1", &[]);
    let sums = lab.guest_sh("web1", CHECKSUMS);
    let log = Log::start(&lab, "web1");
    let load = "mkdir -p /dev/shm; while :; do dd if=/dev/urandom of=/dev/shm/x bs=256k count=8 conv=notrunc 2>/dev/null; \
                dd if=/dev/urandom of=/data/.lab/load bs=256k count=4 conv=fsync 2>/dev/null; sleep 0.05; done";
    lab.guest_sh("web1", &format!("(setsid sh -c '{load}') >/dev/null 2>&1 </dev/null &"));

    // First only looked at: what both hosts are, each disk's file on both.
    let plan = migrate(&lab, "web1", "h1", "h2", &["--dry-run"]);
    assert_eq!(plan["possible"], true, "{plan}");
    let shared = plan["findings"].as_array().expect("findings").iter().find(|f| f["check"] == "disk vda");
    assert_eq!(shared.expect("the disk")["text"], "both hosts see the same file", "{plan}");
    assert_eq!(running_on(&lab, "web1"), ["h1"]);

    let begun = Instant::now();
    let moved = migrate(&lab, "web1", "h1", "h2", &[]);
    assert_fine(&moved);
    assert_eq!(running_on(&lab, "web1"), ["h2"]);
    assert!(moved["downtime_ms"].as_u64().is_some() && moved["passes"].as_u64() >= Some(1), "{moved}");
    assert_eq!(moved["checkpoints"], 1, "{moved}");
    let gap = log.longest_gap(begun);
    println!(
        "moved in {} ms, downtime {} ms, longest gap of the log {gap} ms",
        moved["total_ms"], moved["downtime_ms"]
    );
    assert!(gap < 5000, "the guest stood still for {gap} ms");

    // Tracking came along: the next backup reads what changed only.
    lab.write_config("h2", "");
    let next = lab.backup("web1", &[]);
    assert_eq!(next["kind"], "incremental", "{next}");
    assert!(bytes(&disk(&next, "vda"), "read_bytes") < 100 << 20, "{next}");

    // Again is no error: it is where it was wanted.
    assert_eq!(migrate(&lab, "web1", "h1", "h2", &[])["already_there"], true);

    // Called back in the middle, and it never left.
    let (from, to) = (lab.tcp_uri("h2"), lab.tcp_uri("h1"));
    let back =
        ["--json", "--connect", &from, "vm", "migrate", "web1", "--to", &to, "--bandwidth", "4MiB", "--no-throttle"];
    let running = lab.start(&back);
    wait("memory moves", Duration::from_secs(30), || {
        text(&lab.virsh("h2", &["domjobinfo", "web1"])).contains("Memory processed")
    });
    running.signal("INT");
    let (code, out, err) = running.finish(Duration::from_secs(60));
    assert_eq!(code, Some(130), "{out}{err}");
    assert_eq!(running_on(&lab, "web1"), ["h2"]);
    nothing_under_way(&lab);

    // Killed at many moments: it runs exactly once, and the same command ends what was begun.
    let mut place = ("h2", "h1");
    for ms in [150, 400, 700, 1000, 1500, 2500] {
        let (from, to) = (lab.tcp_uri(place.0), lab.tcp_uri(place.1));
        let running = lab.start(&["--connect", &from, "vm", "migrate", "web1", "--to", &to, "--bandwidth", "48MiB"]);
        std::thread::sleep(Duration::from_millis(ms));
        running.signal("KILL");
        drop(running);
        let moved = migrate(&lab, "web1", place.0, place.1, &[]);
        assert_eq!(running_on(&lab, "web1"), [place.1], "killed after {ms} ms: {moved}");
        nothing_under_way(&lab);
        place = (place.1, place.0);
    }
    log.longest_gap(begun);
    lab.write_config(place.0, "");
    assert_eq!(lab.backup("web1", &[])["kind"], "incremental");

    // What stands in the way is said at once, all of it.
    let (from, to) = (lab.tcp_uri(place.0), lab.tcp_uri(place.1));
    lab.virsh_ok(place.1, &["define", namesake(&lab).to_str().expect("UTF-8")]);
    let words = ["another VM called web1", "virsh domrename"];
    lab.fails(&["--connect", &from, "vm", "migrate", "web1", "--to", &to], 4, &words);
    lab.virsh_ok(place.1, &["undefine", "web1"]);
    lab.lab(&["host", "libvirtd", "stop", place.1]);
    lab.fails(&["--connect", &from, "vm", "migrate", "web1", "--to", &to], 6, &["hint"]);
    lab.lab(&["host", "libvirtd", "start", place.1]);
    assert_eq!(running_on(&lab, "web1"), [place.0]);
    lab.guest_sh("web1", "pkill dd; pkill -f shm/x; true");
    lab.guest_sh("web1", "rm -f /data/.lab/load; sync");
    assert_eq!(lab.guest_sh("web1", CHECKSUMS), sums);
    lab.assert_sound();
}

/// The definition of another VM called web1.
fn namesake(lab: &Lab) -> std::path::PathBuf {
    let path = lab.path("namesake.xml");
    let xml = "<domain type='qemu'><name>web1</name><memory unit='MiB'>16</memory>
        <os><type arch='x86_64'>hvm</type></os></domain>";
    std::fs::write(&path, xml).expect("a file");
    path
}

#[test]
fn a_guest_that_writes_faster_than_the_link_carries_arrives_all_the_same() {
    let lab = Lab::quick(2);
    lab.guest("busy", &[]);
    // Not zeros: pages of zeros are told, not sent.
    let load = "mkdir -p /dev/shm; dd if=/dev/urandom of=/dev/shm/r bs=1M count=24 2>/dev/null; \
                while :; do dd if=/dev/shm/r of=/dev/shm/x bs=1M conv=notrunc 2>/dev/null; done";
    lab.guest_sh("busy", &format!("(setsid sh -c '{load}') >/dev/null 2>&1 </dev/null &"));
    wait("the guest's load", Duration::from_secs(30), || {
        lab.guest_sh("busy", "ls /dev/shm 2>/dev/null || true").contains('x')
    });
    for host in ["h1", "h2"] {
        lab.lab(&["net", "limit", host, "100mbit"]);
    }

    // As libvirt's own tool does it: passes without end, and one asks it to stop.
    let to = lab.tcp_uri("h2");
    let address = to.trim_start_matches("qemu+tcp://").split('/').next().expect("an address");
    let virsh = ["migrate", "--live", "--p2p", "--persistent", "--undefinesource", "--timeout", "40", "busy", &to];
    let plain = lab.virsh("h1", &[&virsh[..], &[&format!("tcp://{address}")]].concat());
    let job = text(&lab.virsh("h2", &["domjobinfo", "busy", "--completed"]));
    println!("virsh: {} {job}", text(&plain));
    // --timeout suspends the guest so that it can leave at all.
    let stopped: f64 = job
        .lines()
        .find_map(|line| line.strip_prefix("Total downtime:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0.0);
    println!("virsh --timeout 40: downtime {stopped} ms");

    // Refused a throttle, ours gives up in time, says why, and the guest goes on.
    let (from, to) = if running_on(&lab, "busy") == ["h2"] { ("h2", "h1") } else { ("h1", "h2") };
    let uris = (lab.tcp_uri(from), lab.tcp_uri(to));
    let command = ["--connect", &uris.0, "vm", "migrate", "busy", "--to", &uris.1];
    let limited = [&command[..], &["--no-throttle", "--timeout", "20s"]].concat();
    lab.fails(&limited, 13, &["the guest dirties", "300 ms are allowed", "goes on here"]);
    assert_eq!(running_on(&lab, "busy"), [from]);
    assert_eq!(lab.state(from, "busy"), "running");
    // Allowed it, it converges.
    let moved = migrate(&lab, "busy", from, to, &[]);
    assert_eq!(running_on(&lab, "busy"), [to]);
    println!("ours: {moved}");
    assert!(moved["throttle_percent"].as_u64() > Some(0), "{moved}");
    // And with post-copy there is nothing to converge.
    let moved = migrate(&lab, "busy", to, from, &["--no-throttle", "--postcopy-after", "5s"]);
    assert_eq!((moved["postcopy"].as_bool(), running_on(&lab, "busy")), (Some(true), vec![from]), "{moved}");
    nothing_under_way(&lab);
}

#[test]
fn disks_move_while_they_are_used_with_their_tracking_and_go_along_to_another_host() {
    let lab = Lab::with_small_scratch(2, "700m");
    lab.guest("db1", &[]);
    lab.backup("db1", &[]);
    let sums = lab.guest_sh("db1", CHECKSUMS);
    let shared = |name: &str| lab.shared().join(name).display().to_string();
    let load =
        "while :; do dd if=/dev/urandom of=/data/.lab/load bs=256k count=4 conv=fsync 2>/dev/null; sleep 0.1; done";
    lab.guest_sh("db1", &format!("(setsid sh -c '{load}') >/dev/null 2>&1 </dev/null &"));
    let move_disk = |to: &str, more: &[&str]| -> Value {
        let arguments = [&["--json", "vm", "move-disk", "db1", "--disk", "vda", "--to", to][..], more].concat();
        serde_json::from_str(&lab.ok(&arguments)).expect("JSON")
    };
    let source = || lab.virsh_ok("h1", &["domblklist", "db1"]);

    // A full destination is seen before anything is copied; a cancelled copy leaves nothing.
    let full = lab.path("scratch/db1.qcow2").display().to_string();
    let filler = std::fs::File::create(lab.path("scratch/filler")).expect("a file");
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, 690 << 20).expect("room");
    lab.fails(&["vm", "move-disk", "db1", "--disk", "vda", "--to", &full], 10, &["free", "takes"]);
    drop(filler);
    std::fs::remove_file(lab.path("scratch/filler")).expect("removed");
    let running =
        lab.start(&["vm", "move-disk", "db1", "--disk", "vda", "--to", &shared("a.qcow2"), "--bandwidth", "4MiB"]);
    wait("the copy", Duration::from_secs(30), || {
        text(&lab.virsh("h1", &["blockjob", "db1", "vda"])).contains("Block Copy")
    });
    running.signal("INT");
    assert_eq!(running.finish(Duration::from_secs(60)).0, Some(130));
    assert!(!lab.shared().join("a.qcow2").exists() && source().contains("db1-vda.qcow2"), "{}", source());
    nothing_under_way(&lab);

    // Killed in the middle: the next run goes on with the same copy.
    let running =
        lab.start(&["vm", "move-disk", "db1", "--disk", "vda", "--to", &shared("a.qcow2"), "--bandwidth", "24MiB"]);
    wait("the copy", Duration::from_secs(30), || {
        text(&lab.virsh("h1", &["blockjob", "db1", "vda"])).contains("Block Copy")
    });
    running.signal("KILL");
    drop(running);
    let moved = move_disk(&shared("a.qcow2"), &[]);
    assert!(moved["warnings"].to_string().contains("goes on"), "{moved}");
    assert!(source().contains("/a.qcow2") && !lab.shared().join("db1-vda.qcow2").exists(), "{}", source());
    assert_eq!(move_disk(&shared("a.qcow2"), &[])["already_there"], true);
    let next = lab.backup("db1", &[]);
    println!("after the move: {next}");
    assert_eq!(next["kind"], "incremental", "{next}");

    // To another format and back: raw holds no bitmap, which costs one full read and heals by itself.
    move_disk(&shared("b.raw"), &["--format", "raw", "--keep-source"]);
    assert!(lab.shared().join("a.qcow2").exists());
    assert_eq!(disk(&lab.backup("db1", &[]), "vda")["tracking"], "unsupported");
    move_disk(&shared("c.qcow2"), &["--format", "qcow2"]);
    lab.backup("db1", &[]);
    assert_eq!(lab.backup("db1", &[])["kind"], "incremental");

    // Along to a host that does not see it; the source's copy is left and named.
    for host in ["h1", "h2"] {
        lab.lab(&["host", "exec", host, "--", "mkdir", "-p", "/var/lib/libvirt/images"]);
    }
    move_disk("/var/lib/libvirt/images/d.qcow2", &[]);
    let (from, to) = (lab.tcp_uri("h1"), lab.tcp_uri("h2"));
    let words = ["does not see /var/lib/libvirt/images/d.qcow2", "--with-storage"];
    lab.fails(&["--connect", &from, "vm", "migrate", "db1", "--to", &to], 4, &words);
    let moved = migrate(&lab, "db1", "h1", "h2", &["--with-storage"]);
    assert_eq!(moved["copied"][0], "vda", "{moved}");
    assert_eq!(moved["left"][0], "/var/lib/libvirt/images/d.qcow2", "{moved}");
    assert_eq!(running_on(&lab, "db1"), ["h2"]);
    lab.write_config("h2", "");
    let next = lab.backup("db1", &[]);
    println!("after the move with storage: {next}");
    assert_eq!(next["kind"], "incremental", "{next}");

    // Off: opened without running, moved, and off again.
    lab.virsh_ok("h2", &["shutdown", "db1"]);
    lab.wait_off("h2", "db1");
    let moved = move_disk(&shared("e.qcow2"), &[]);
    assert_eq!(moved["cold"], true, "{moved}");
    assert_eq!(lab.state("h2", "db1"), "shut off");
    assert_eq!(lab.backup("db1", &[])["kind"], "incremental");
    lab.virsh_ok("h2", &["start", "db1"]);
    lab.lab(&["vm", "wait", "db1"]);
    lab.guest_sh("db1", "rm -f /data/.lab/load; sync");
    assert_eq!(lab.guest_sh("db1", CHECKSUMS), sums);
    nothing_under_way(&lab);
    lab.assert_sound();
}

#[test]
fn a_host_is_emptied_backups_give_way_and_what_cannot_go_is_named() {
    let lab = Lab::quick(2);
    lab.guest("web1", &[]);
    lab.guest("web2", &[]);
    // Tied to its host by a directory.
    lab.guest("tied", &["--no-start"]);
    let xml = lab.virsh_ok("h1", &["dumpxml", "tied"]);
    let tie = "<filesystem type='mount'><source dir='/tmp'/><target dir='t'/></filesystem></devices>";
    std::fs::write(lab.path("tied.xml"), xml.replace("</devices>", tie)).expect("a file");
    lab.virsh_ok("h1", &["define", lab.path("tied.xml").to_str().expect("UTF-8")]);
    lab.virsh_ok("h1", &["start", "tied"]);
    let (h1, h2) = (lab.tcp_uri("h1"), lab.tcp_uri("h2"));
    let backup = lab.slow_backup("web1", "2MiB");

    let dry = lab.output(&["--json", "--connect", &h1, "host", "drain", "--to", &h2, "--dry-run"]);
    assert_eq!(dry.status.code(), Some(4), "{}", text(&dry));
    let dry: Value = serde_json::from_slice(&dry.stdout).expect("JSON");
    assert_eq!(dry["plan"].as_array().map(Vec::len), Some(2), "{dry}");

    let output = lab.output(&["--json", "--connect", &h1, "host", "drain", "--to", &h2, "--first", "web2"]);
    assert_eq!(output.status.code(), Some(12), "{}", text(&output));
    let first = String::from_utf8_lossy(&output.stdout).lines().next().expect("a line").to_owned();
    let drained: Value = serde_json::from_str(&first).expect("JSON");
    assert_eq!(drained["moved"].as_array().map(Vec::len), Some(2), "{drained}");
    assert_eq!((drained["plan"][0]["vm"].as_str(), drained["left"][0]["vm"].as_str()), (Some("web2"), Some("tied")));
    assert!(drained["left"][0]["reasons"][0].as_str().expect("a reason").contains("/tmp is mounted"), "{drained}");
    assert!(drained["left"][0]["choices"].to_string().contains("virsh shutdown tied"), "{drained}");
    assert_eq!((running_on(&lab, "web1"), running_on(&lab, "web2")), (vec!["h2"], vec!["h2"]));
    assert_ne!(backup.finish(Duration::from_secs(60)).0, Some(0), "the backup gave way");

    // A drained host takes no VMs until it is taken into service again.
    let words = ["is drained and takes no VMs"];
    lab.fails(&["--connect", &h2, "vm", "migrate", "web1", "--to", &h1], 4, &words);
    lab.fails(&["--connect", &h2, "host", "drain", "--to", &h1], 4, &words);
    lab.ok(&["--connect", &h1, "host", "resume"]);
    migrate(&lab, "web1", "h2", "h1", &[]);
    assert_eq!(running_on(&lab, "web1"), ["h1"]);

    // The CPU that both have.
    let cpu: Value =
        serde_json::from_str(&lab.ok(&["--json", "--connect", &h1, "host", "cpu", "--with", &h2])).expect("JSON");
    assert!(cpu["cpu"].as_str().expect("a cpu").contains("<model"), "{cpu}");
    let web1 = cpu["vms"].as_array().expect("vms").iter().find(|vm| vm["vm"] == "web1").expect("web1");
    assert_eq!(web1["everywhere"], true, "{cpu}");
}
