//! Change tracking that heals itself: whatever became of a bitmap, the next backup works, says why it read what it
//! read, and the one after it reads changes only again.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use crate::harness::{CHECKSUMS, Lab, bytes, disk, run, text, wait};

/// The tracking state and the reason of a disk.
fn tracking(result: &Value, target: &str) -> (String, String) {
    let disk = disk(result, target);
    let said = |field: &str| disk[field].as_str().unwrap_or_default().to_owned();
    (said("tracking"), said("reason"))
}

fn assert_incremental(result: &Value) {
    assert_eq!(result["kind"], "incremental", "{result}");
}

fn monitor(lab: &Lab, vm: &str, command: &Value) -> Value {
    let answer = lab.virsh_ok("h1", &["qemu-monitor-command", vm, &command.to_string()]);
    serde_json::from_str(&answer).expect("JSON of QEMU")
}

/// Deletes every bitmap of ours behind libvirt's back.
fn delete_bitmaps(lab: &Lab, vm: &str) -> usize {
    let mut deleted = 0;
    for node in monitor(lab, vm, &json!({"execute": "query-named-block-nodes"}))["return"].as_array().expect("nodes") {
        for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
            let Some(name) = bitmap["name"].as_str().filter(|name| name.starts_with("virtward-")) else { continue };
            let arguments = json!({"node": node["node-name"], "name": name});
            monitor(lab, vm, &json!({"execute": "block-dirty-bitmap-remove", "arguments": arguments}));
            deleted += 1;
        }
    }
    deleted
}

fn checkpoints(lab: &Lab, host: &str, vm: &str) -> Vec<String> {
    let listed = lab.virsh_ok(host, &["checkpoint-list", vm, "--name"]);
    listed.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn tracking_of_each_disk_heals_by_itself_while_the_vm_runs() {
    let lab = Lab::quick(1);
    lab.guest("web1", &["--no-start"]);
    let raw = lab.shared().join("web1-raw.img");
    let content: Vec<u8> = (0..8_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(&raw, content).unwrap();
    let source = raw.display().to_string();
    let attach = ["attach-disk", "web1", "--config", "--source", &source, "--target", "vdb", "--subdriver", "raw"];
    lab.virsh_ok("h1", &[&attach[..], &["--sourcetype", "file", "--driver", "qemu"]].concat());
    lab.virsh_ok("h1", &["start", "web1"]);
    lab.lab(&["vm", "wait", "web1"]);

    // One disk that can be tracked and one that cannot, in one job.
    let full = lab.backup("web1", &[]);
    assert_eq!((tracking(&full, "vda").0.as_str(), tracking(&full, "vdb").0.as_str()), ("first", "unsupported"));
    let second = lab.backup("web1", &[]);
    assert_eq!((tracking(&second, "vda").0.as_str(), tracking(&second, "vdb").0.as_str()), ("valid", "unsupported"));
    assert!(tracking(&second, "vdb").1.contains("raw images hold no persistent bitmap"), "{second}");
    assert_eq!(bytes(&disk(&second, "vdb"), "read_bytes"), 8 << 20, "{second}");
    assert_eq!(bytes(&disk(&second, "vdb"), "new_bytes"), 0, "what the repository has is not stored again: {second}");
    assert!(bytes(&disk(&second, "vda"), "read_bytes") < 8 << 20, "{second}");
    lab.virsh_ok("h1", &["detach-disk", "web1", "vdb", "--config"]);

    // Another tool's checkpoint is none of our business.
    lab.virsh_ok(
        "h1",
        &["checkpoint-create-as", "web1", "nightly", "--diskspec", "vda", "--diskspec", "vdb,checkpoint=no"],
    );
    lab.backup("web1", &["--disk", "vda"]);
    assert_incremental(&lab.backup("web1", &["--disk", "vda"]));
    let listed = checkpoints(&lab, "h1", "web1");
    assert!(listed.contains(&"nightly".to_owned()), "{listed:?}");
    assert_eq!(listed.iter().filter(|name| name.starts_with("virtward-")).count(), 1, "{listed:?}");

    // Metadata lost, as a migration loses it: told again, nothing is read for it.
    let ours = listed.iter().find(|name| name.starts_with("virtward-")).unwrap();
    lab.virsh_ok("h1", &["checkpoint-delete", "web1", ours, "--metadata"]);
    lab.guest_sh("web1", "dd if=/dev/urandom of=/data/a bs=1M count=4 2>/dev/null; sync");
    let healed = lab.backup("web1", &["--disk", "vda"]);
    assert_incremental(&healed);
    assert!((4 << 20..20 << 20).contains(&bytes(&disk(&healed, "vda"), "new_bytes")), "{healed}");

    // Bitmap lost: that disk is read in full, with the reason, and tracked again.
    assert!(delete_bitmaps(&lab, "web1") > 0);
    let lost = lab.backup("web1", &["--disk", "vda"]);
    assert_eq!((lost["kind"].as_str(), tracking(&lost, "vda").0.as_str()), (Some("full"), "missing"), "{lost}");
    assert!(tracking(&lost, "vda").1.contains("is gone"), "{lost}");
    assert_incremental(&lab.backup("web1", &["--disk", "vda"]));

    // A disk that grew, and its restore has the new size.
    lab.virsh_ok("h1", &["blockresize", "web1", "vda", "1088MiB"]);
    let grown = lab.backup("web1", &["--disk", "vda"]);
    assert_eq!(tracking(&grown, "vda").0, "resized", "{grown}");
    assert_eq!(bytes(&disk(&grown, "vda"), "size_bytes"), 1088 << 20);
    assert_incremental(&lab.backup("web1", &["--disk", "vda"]));
    let sums = lab.guest_sh("web1", CHECKSUMS);
    let last = lab.backup("web1", &["--disk", "vda"]);

    // The same VM, rolled back: its new disks have no bitmap.
    lab.virsh_ok("h1", &["destroy", "web1"]);
    lab.ok(&["restore", "vm", last["id"].as_str().unwrap(), "--overwrite", "--start"]);
    lab.lab(&["vm", "wait", "web1"]);
    assert_eq!(lab.guest_sh("web1", CHECKSUMS), sums);
    let back = lab.backup("web1", &["--disk", "vda"]);
    assert_eq!(tracking(&back, "vda").0, "missing", "{back}");
    assert_eq!(bytes(&disk(&back, "vda"), "size_bytes"), 1088 << 20);
    assert_incremental(&lab.backup("web1", &["--disk", "vda"]));
    lab.assert_sound();
}

/// An image opened for writing by something that is no VM.
struct Opened(Child);

impl Opened {
    fn by_qemu_nbd(image: &Path, socket: &Path) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "-f", "qcow2", "--socket"]).arg(socket).arg(image);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("qemu-nbd starts");
        let opened = Self(child);
        wait("qemu-nbd", Duration::from_secs(20), || socket.exists());
        opened
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        let _ = self.0.wait();
    }
}

fn image(lab: &Lab, vm: &str) -> PathBuf {
    lab.virsh_ok("h1", &["domblklist", vm])
        .lines()
        .find_map(|line| line.trim().strip_prefix("vda"))
        .expect("vda")
        .trim()
        .into()
}

/// Changes every data cluster of an image without QEMU's knowledge.
fn change_silently(image: &Path) {
    let mut command = Command::new("qemu-img");
    command.args(["map", "--output=json"]).arg(image);
    let map: Value = serde_json::from_slice(&run(command, Duration::from_secs(30)).stdout).expect("a map");
    let file = std::fs::File::options().write(true).open(image).expect("the image");
    for extent in map.as_array().expect("extents").iter().filter(|extent| extent["data"] == true) {
        let (Some(offset), Some(length)) = (extent["offset"].as_u64(), extent["length"].as_u64()) else { continue };
        for at in (offset..offset + length).step_by(64 << 10) {
            file.write_all_at(b"written behind QEMU's back", at + 512).expect("a write");
        }
    }
}

#[test]
fn tracking_outlives_the_vm_being_switched_off_and_crashes_are_noticed() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let write = |name: &str| {
        lab.guest_sh("web1", &format!("dd if=/dev/urandom of=/data/{name} bs=1M count=4 2>/dev/null; sync"))
    };
    let off = || {
        lab.virsh_ok("h1", &["shutdown", "web1", "--mode", "acpi"]);
        lab.wait_off("h1", "web1");
    };
    let on = || {
        lab.virsh_ok("h1", &["start", "web1"]);
        lab.lab(&["vm", "wait", "web1"]);
    };
    assert_eq!(lab.backup("web1", &[])["kind"], "full");

    // Hot, cold, cold, hot: one chain.
    write("a");
    off();
    let cold = lab.backup("web1", &[]);
    assert_eq!((cold["source"].as_str(), cold["kind"].as_str()), (Some("cold"), Some("incremental")), "{cold}");
    assert!((4 << 20..40 << 20).contains(&bytes(&disk(&cold, "vda"), "read_bytes")), "{cold}");
    assert_eq!(bytes(&disk(&lab.backup("web1", &[]), "vda"), "read_bytes"), 0);
    on();
    write("b");
    let hot = lab.backup("web1", &[]);
    assert_eq!((hot["source"].as_str(), hot["kind"].as_str()), (Some("hot"), Some("incremental")), "{hot}");
    assert!((4 << 20..40 << 20).contains(&bytes(&disk(&hot, "vda"), "read_bytes")), "{hot}");
    let sums = lab.guest_sh("web1", CHECKSUMS);
    let id = hot["id"].as_str().unwrap().to_owned();

    // QEMU dies before it wrote its newest bitmap to the image.
    let die = || {
        let pid = lab.lab(&["host", "exec", "h1", "--", "sh", "-c", "cat /run/libvirt/qemu/web1.pid"]);
        assert!(Command::new("kill").args(["-KILL", pid.trim()]).status().unwrap().success());
        lab.wait_off("h1", "web1");
    };
    die();
    let crashed = lab.backup("web1", &[]);
    assert_eq!(
        (crashed["kind"].as_str(), tracking(&crashed, "vda").0.as_str()),
        (Some("full"), "missing"),
        "{crashed}"
    );
    assert!(tracking(&crashed, "vda").1.contains("crash"), "{crashed}");
    // And with a bitmap that the image had: it was not closed and is not believed.
    on();
    die();
    let crashed = lab.backup("web1", &[]);
    assert_eq!((crashed["kind"].as_str(), tracking(&crashed, "vda").0.as_str()), (Some("full"), "in-use"), "{crashed}");
    assert!(tracking(&crashed, "vda").1.contains("not closed cleanly"), "{crashed}");
    assert_incremental(&lab.backup("web1", &[]));

    // Started in the middle of a cold backup: the guest comes first, the backup goes on hot.
    let mut running = lab.start(&["--json", "backup", "run", "web1", "--full", "--bandwidth", "8MiB"]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(running.is_running());
    lab.virsh_ok("h1", &["start", "web1"]);
    let (code, out, err) = running.finish(Duration::from_secs(60));
    assert_eq!(code, Some(0), "{err}");
    let result: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(result["source"], "hot", "{result}");
    assert!(result["warnings"].to_string().contains("was started during the backup"), "{result}");
    // libvirt misses the agent of a guest that comes up while a backup job runs, until it looks again.
    lab.lab(&["host", "libvirtd", "restart", "h1"]);
    lab.lab(&["vm", "wait", "web1"]);
    assert_incremental(&lab.backup("web1", &[]));
    off();
    assert_incremental(&lab.backup("web1", &[]));

    // Open elsewhere, as by another host that runs the VM: not read.
    let path = image(&lab, "web1");
    let opened = Opened::by_qemu_nbd(&path, &lab.path("elsewhere.sock"));
    lab.fails(&["backup", "run", "web1"], 5, &["open for writing", "another host"]);
    drop(opened);
    assert_incremental(&lab.backup("web1", &[]));

    // Changed without QEMU's knowledge: found by the sample, read in full.
    change_silently(&path);
    let silent = lab.backup("web1", &[]);
    assert_eq!((silent["kind"].as_str(), tracking(&silent, "vda").0.as_str()), (Some("full"), "untrusted"), "{silent}");
    assert_incremental(&lab.backup("web1", &[]));
    lab.assert_sound();
    lab.assert_boots(&id, "web1-r", &sums);
}

#[test]
fn tracking_follows_the_vm_to_another_host_and_heals_after_a_power_cut() {
    let lab = Lab::quick(2);
    lab.guest("web1", &[]);
    assert_eq!(lab.backup("web1", &[])["kind"], "full");
    let migrate = |from: &str, to: &str| {
        let to = lab.tcp_uri(to);
        lab.virsh(from, &["migrate", "--live", "--unsafe", "--persistent", "--undefinesource", "web1", &to])
    };

    // Asked to move in mid-backup, libvirt waits or refuses; either way the backup is whole.
    let running = lab.slow_backup("web1", "8MiB");
    let asked = migrate("h1", "h2");
    let (code, out, err) = running.finish(Duration::from_secs(60));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).expect("JSON")["source"], "hot");
    if !asked.status.success() {
        assert!(text(&asked).contains("lock") || text(&asked).contains("job"), "{}", text(&asked));
        let moved = migrate("h1", "h2");
        assert!(moved.status.success(), "{}", text(&moved));
    }

    lab.fails(&["backup", "run", "web1"], 3, &["no VM web1"]);
    lab.write_config("h2", "");
    assert_eq!(checkpoints(&lab, "h2", "web1"), Vec::<String>::new(), "libvirt takes checkpoints along by now");
    lab.guest_sh("web1", "dd if=/dev/urandom of=/data/moved bs=1M count=4 2>/dev/null; sync");
    let moved = lab.backup("web1", &[]);
    assert_incremental(&moved);
    assert!((4 << 20..40 << 20).contains(&bytes(&disk(&moved, "vda"), "read_bytes")), "{moved}");
    assert_eq!(moved["host"], "h2");
    let sums = lab.guest_sh("web1", CHECKSUMS);

    lab.lab(&["host", "power", "off", "h2"]);
    lab.fails(&["backup", "run", "web1"], 6, &["cannot reach the hypervisor"]);
    lab.lab(&["host", "power", "on", "h2"]);
    wait("libvirt", Duration::from_secs(20), || lab.virsh("h2", &["start", "web1"]).status.success());
    lab.lab(&["vm", "wait", "web1"]);
    let after = lab.backup("web1", &[]);
    assert_eq!(after["kind"], "full");
    let (state, reason) = tracking(&after, "vda");
    assert!(["in-use", "missing"].contains(&state.as_str()), "{after}");
    assert!(reason.contains("power cut"), "{reason}");
    assert_incremental(&lab.backup("web1", &[]));
    lab.assert_nothing_left("h2", "web1");
    lab.assert_sound();
    lab.virsh_ok("h2", &["destroy", "web1"]);
    lab.assert_boots(moved["id"].as_str().unwrap(), "web1-r", &sums);
}
