//! The main job: back up a running VM, full then incremental, and get it back.

use crate::harness::{CHECKSUMS, Lab};

fn disk(result: &serde_json::Value, target: &str) -> serde_json::Value {
    let disks = result["disks"].as_array().expect("disks");
    disks.iter().find(|disk| disk["target"] == target).expect("the disk").clone()
}

fn bytes(disk: &serde_json::Value, field: &str) -> u64 {
    disk[field].as_u64().unwrap_or_else(|| panic!("no {field} in {disk}"))
}

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
