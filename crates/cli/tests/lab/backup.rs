//! The main job: back up a running VM, full then incremental, and get it back.

use std::time::{Duration, Instant};

use crate::harness::{CHECKSUMS, Lab, bytes, disk, wait};

#[test]
fn a_running_vm_is_backed_up_by_its_changes_and_comes_back_whole() {
    let lab = Lab::up(1);
    lab.guest("web1", &[]);

    let full = lab.backup("web1", &[]);
    assert_eq!(full["kind"], "full");
    assert_eq!(full["quiesce"]["outcome"], "frozen");
    let vda = disk(&full, "vda");
    assert_eq!(vda["tracking"], "first");
    assert_eq!(bytes(&vda, "size_bytes"), 1 << 30);
    assert!(bytes(&vda, "read_bytes") < 200 << 20, "unallocated space was read: {vda}");
    let before = lab.guest_sh("web1", CHECKSUMS);

    lab.guest_sh("web1", "dd if=/dev/urandom of=/data/new bs=1M count=16 2>/dev/null; sync");
    let increment = lab.backup("web1", &[]);
    assert_eq!(increment["kind"], "incremental", "{increment}");
    let vda = disk(&increment, "vda");
    assert_eq!(vda["tracking"], "valid");
    assert!((16 << 20..64 << 20).contains(&bytes(&vda, "read_bytes")), "{vda}");
    assert!(bytes(&vda, "stored_bytes") >= 16 << 20, "16 MiB of noise cannot be stored in less: {vda}");
    let after = lab.guest_sh("web1", CHECKSUMS);
    assert_ne!(before, after);

    lab.assert_nothing_left("h1", "web1");
    lab.assert_sound();
    lab.assert_boots(full["id"].as_str().unwrap(), "web1-before", &before);
    lab.assert_boots("web1@latest", "web1-after", &after);

    // A restore never touches what exists unless asked, and then only what is shut off.
    lab.fails(&["restore", "vm", "web1@latest"], 4, &["web1", "--name", "--overwrite"]);
    lab.fails(&["restore", "vm", "web1@latest", "--overwrite"], 4, &["running", "virsh shutdown"]);
    lab.virsh("h1", &["destroy", "web1"]);
    lab.ok(&["restore", "vm", full["id"].as_str().unwrap(), "--overwrite", "--start"]);
    lab.lab(&["vm", "wait", "web1"]);
    assert_eq!(lab.guest_sh("web1", CHECKSUMS), before);
}

#[test]
fn what_is_backed_up_can_be_chosen_and_what_cannot_be_is_said() {
    let lab = Lab::quick(1);
    lab.guest("web1", &["--disk", "128MiB", "--no-start"]);
    let dir = lab.shared();
    let file = |name: &str| dir.join(name).display().to_string();
    for name in ["seed.iso", "tools.img"] {
        std::fs::write(dir.join(name), vec![7_u8; 1 << 20]).unwrap();
    }
    let attach = |name: &str, more: &[&str]| {
        let source = file(name);
        let disk =
            ["attach-disk", "web1", "--config", "--sourcetype", "file", "--driver", "qemu", "--mode", "readonly"];
        lab.virsh_ok("h1", &[&disk[..], &["--source", &source], more].concat());
    };
    attach("tools.img", &["--target", "vdc"]);
    attach("seed.iso", &["--target", "sda", "--targetbus", "sata", "--type", "cdrom"]);
    lab.virsh_ok("h1", &["start", "web1"]);
    lab.lab(&["vm", "wait", "web1"]);

    let all = lab.backup("web1", &["--tag", "first"]);
    assert_eq!(all["disks"].as_array().unwrap().len(), 2, "{all}");
    let skipped = all["skipped"].to_string();
    assert!(skipped.contains("vdc: read-only") && skipped.contains("sda: CD-ROM"), "{skipped}");

    // Leaving a disk out costs it nothing: the next run of it still reads changes only.
    let one = lab.backup("web1", &["--disk", "vdb"]);
    assert_eq!((one["kind"].as_str(), one["disks"].as_array().unwrap().len()), (Some("incremental"), 1), "{one}");
    assert!(one["skipped"].to_string().contains("vda: left out by request"), "{one}");
    lab.guest_sh("web1", "dd if=/dev/urandom of=/data/new bs=1M count=4 2>/dev/null; sync");
    let other = lab.backup("web1", &["--exclude-disk", "vdb"]);
    assert_eq!(other["kind"], "incremental", "{other}");
    assert!(bytes(&disk(&other, "vda"), "new_bytes") >= 4 << 20, "{other}");
    let both = lab.backup("web1", &[]);
    assert_eq!(both["kind"], "incremental", "{both}");
    lab.assert_nothing_left("h1", "web1");

    lab.fails(&["backup", "run", "web1", "--disk", "sda"], 4, &["sda", "CD-ROM"]);
    lab.fails(&["backup", "run", "web1", "--disk", "vdz"], 3, &["web1 has no disk vdz", "vda, vdb"]);
    lab.fails(&["backup", "run", "web2"], 3, &["no VM web2", "did you mean web1?"]);
    lab.fails(&["backup", "run", "nothing-like-it"], 3, &["virtward vm list"]);

    // A VM without disks has a definition worth keeping.
    lab.lab(&["vm", "create", "bare1", "--no-start"]);
    let bare = lab.backup("bare1", &[]);
    assert_eq!(bare["disks"].as_array().map(Vec::len), Some(0));
    assert!(bare["warnings"].to_string().contains("only its definition"), "{bare}");

    // With the CPUs stopped for the cut; a guest that its operator paused stays paused.
    assert_eq!(lab.backup("web1", &["--mode", "warm"])["source"], "warm");
    assert_eq!(lab.state("h1", "web1"), "running");
    lab.virsh_ok("h1", &["suspend", "web1"]);
    for mode in ["auto", "warm"] {
        let paused = lab.backup("web1", &["--mode", mode]);
        assert_eq!(paused["kind"], "incremental", "{paused}");
        assert!(paused["quiesce"]["reason"].to_string().contains("paused"), "{paused}");
        assert_eq!(lab.state("h1", "web1"), "paused");
    }
    lab.virsh_ok("h1", &["resume", "web1"]);
    lab.lab(&["vm", "wait", "web1"]);

    // libvirt away: said at once, and all is well when it is back.
    lab.lab(&["host", "libvirtd", "stop", "h1"]);
    let asked = Instant::now();
    lab.fails(&["backup", "run", "web1"], 6, &["cannot reach the hypervisor", "check that libvirt runs"]);
    assert!(asked.elapsed() < Duration::from_secs(20));
    lab.lab(&["host", "libvirtd", "start", "h1"]);
    wait("libvirt", Duration::from_secs(20), || lab.virsh("h1", &["domstate", "web1"]).status.success());
    assert_eq!(lab.backup("web1", &[])["kind"], "incremental");
}
