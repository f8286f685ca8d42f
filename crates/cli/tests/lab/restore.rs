//! Restoring whole VMs: identity, what belongs to a VM besides its disks, refusals, and failures half-way.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{CHECKSUMS, Lab, Running, noise, text, tool, wait};

const UUID: &str = "5d1e6a52-7f0c-4a6e-9d3b-2f4b8c1d0e9f";
const MAC: &str = "52:54:00:12:34:56";
const LIMIT: Duration = Duration::from_secs(120);

/// A VM that is never started, with a bit of everything: two disks, UEFI variables, TPM state, a CD-ROM, metadata.
pub struct Still<'a> {
    lab: &'a Lab,
    dir: PathBuf,
    pub tpm: PathBuf,
}

impl<'a> Still<'a> {
    /// Defines it as `still` on `host`.
    pub fn define(lab: &'a Lab, host: &str) -> Self {
        let dir = lab.path("images");
        std::fs::create_dir_all(dir.join("second")).expect("a directory");
        std::os::unix::fs::symlink("/usr/bin/qemu-system-x86_64", dir.join("qemu")).expect("a link");
        // Where libvirt keeps it on every host; the UUID is this test's own.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let own = (std::process::id() << 4) + NUMBER.fetch_add(1, Ordering::Relaxed);
        let uuid = format!("{}{own:08x}{}", &UUID[..24], &UUID[32..]);
        let still = Self { lab, tpm: Path::new("/var/lib/libvirt/swtpm").join(&uuid), dir };
        still.write("disk.raw", &noise(1, 24 << 20));
        still.write("second/disk.raw", &noise(2, 3 << 20));
        still.write("code.fd", &[0xff; 1 << 20]);
        still.write("vars.fd", &noise(3, 500_000));
        still.write("medium.iso", &noise(4, 100_000));
        std::fs::create_dir_all(still.tpm.join("tpm2")).expect("a directory");
        std::fs::write(still.tpm.join("tpm2/tpm2-00.permall"), "endorsed").expect("TPM state");
        still.write("still.xml", still.xml(&uuid).as_bytes());
        still.virsh(host, &["define", still.path("still.xml").to_str().expect("UTF-8")]);
        still
    }

    fn xml(&self, uuid: &str) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        format!(
            "<domain type='qemu'><name>still</name><uuid>{uuid}</uuid><genid/>\
             <metadata><v:owner xmlns:v='urn:owner'>accounting</v:owner></metadata>\
             <memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type>\
             <loader readonly='yes' type='pflash'>{}</loader><nvram>{}</nvram></os>\
             <features><acpi/></features><devices><emulator>{}</emulator>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vdb' bus='virtio'/></disk>\
             <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk>\
             <interface type='user'><mac address='{MAC}'/><model type='virtio'/></interface>\
             </devices></domain>",
            path("code.fd"),
            path("vars.fd"),
            path("qemu"),
            path("disk.raw"),
            path("second/disk.raw"),
            path("medium.iso"),
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).expect("a file");
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn virsh(&self, host: &str, arguments: &[&str]) -> String {
        let output = self.lab.virsh(host, arguments);
        assert!(output.status.success(), "virsh {arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.dir)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn restore(&self, more: &[&str]) -> Value {
        let mut arguments = vec!["--json", "restore", "vm", "still@latest"];
        arguments.extend(more);
        serde_json::from_str(&self.lab.ok(&arguments)).expect("JSON")
    }

    fn uuid(&self) -> String {
        self.tpm.file_name().expect("a name").to_string_lossy().into_owned()
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.tpm);
    }
}

#[test]
fn a_copy_is_a_vm_of_its_own_and_a_lost_vm_comes_back_as_itself() {
    let lab = Lab::quick(1);
    let still = Still::define(&lab, "h1");
    lab.backup("still", &[]);
    std::fs::remove_file(still.path("medium.iso")).expect("the medium goes");

    let copies = lab.path("copies");
    std::fs::create_dir(&copies).expect("a directory");
    let copy = still.restore(&["--name", "copy, 2. Größe", "--disk-dir", copies.to_str().unwrap()]);
    let xml = still.virsh("h1", &["dumpxml", "--inactive", "copy, 2. Größe"]);
    let uuid = copy["uuid"].as_str().expect("a UUID");
    assert_ne!(uuid, still.uuid());
    assert!(xml.contains(uuid) && !xml.contains(&still.uuid()) && !xml.contains(MAC), "{xml}");
    assert!(xml.contains("accounting") && xml.contains("52:54:00:"), "{xml}");
    assert!(!xml.contains("medium.iso"), "{xml}");
    assert!(copy["warnings"].to_string().contains("sda"), "{copy}");
    for disk in copy["disks"].as_array().expect("disks") {
        let path = disk["path"].as_str().expect("a path");
        assert!(xml.contains(path), "{path} is not in {xml}");
        let original = if disk["target"] == "vda" { "disk.raw" } else { "second/disk.raw" };
        assert!(std::fs::read(path).expect("a disk") == still.read(original), "{path}");
    }
    assert!(still.read("copy, 2. Größe_VARS.fd") == still.read("vars.fd"), "UEFI variables");
    let copied_tpm = still.tpm.with_file_name(uuid);
    let state = std::fs::read_to_string(copied_tpm.join("tpm2/tpm2-00.permall"));
    let _ = std::fs::remove_dir_all(&copied_tpm);
    assert_eq!(state.expect("TPM state"), "endorsed");

    // What cannot be, and what belongs to others, is refused before anything is written.
    for name in ["a/b", ".hidden", " x", "new\nline", ""] {
        lab.fails(&["restore", "vm", "still@latest", "--name", name], 4, &["name of a VM"]);
    }
    lab.fails(&["restore", "vm", "still@latest"], 4, &["--name", "--overwrite"]);
    let stranger = copies.join("stranger-vda.raw");
    let thief = "<domain type='qemu'><name>owner</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>\
                 <disk type='file' device='disk'><source file='DISK'/><target dev='vda'/></disk></devices></domain>";
    // Under another path to the same directory.
    let same = copies.join("../copies/stranger-vda.raw");
    still.write("owner.xml", thief.replace("DISK", same.to_str().unwrap()).as_bytes());
    still.virsh("h1", &["define", still.path("owner.xml").to_str().unwrap()]);
    let arguments = ["restore", "vm", "still@latest", "--name", "stranger", "--overwrite", "--disk-dir"];
    lab.fails(&[&arguments[..], &[copies.to_str().unwrap()]].concat(), 4, &["owner", "--disk-dir"]);
    assert!(!stranger.exists());
    let nowhere = lab.path("nowhere");
    lab.fails(&[&arguments[..], &[nowhere.to_str().unwrap()]].concat(), 3, &["nowhere", "--disk-dir"]);

    // Lost with all that it had, it comes back with the identity that it had.
    let (first, second, vars) = (still.read("disk.raw"), still.read("second/disk.raw"), still.read("vars.fd"));
    still.virsh("h1", &["undefine", "still", "--nvram"]);
    let _ = std::fs::remove_file(still.path("vars.fd"));
    lab.fails(&["restore", "vm", "still@latest"], 4, &["disk.raw", "exists"]);
    for name in ["disk.raw", "second/disk.raw"] {
        std::fs::remove_file(still.path(name)).expect("lost");
    }
    let _ = std::fs::remove_dir_all(&still.tpm);
    let restored = still.restore(&[]);
    assert_eq!(restored["uuid"], still.uuid().as_str());
    let xml = still.virsh("h1", &["dumpxml", "--inactive", "still"]);
    assert!(xml.contains(MAC) && xml.contains("accounting") && xml.contains(&still.uuid()), "{xml}");
    assert!(
        still.read("disk.raw") == first && still.read("second/disk.raw") == second && still.read("vars.fd") == vars
    );
    assert_eq!(std::fs::read_to_string(still.tpm.join("tpm2/tpm2-00.permall")).expect("TPM state"), "endorsed");
    // Two disks of one name, into one directory.
    let both = lab.path("both");
    std::fs::create_dir(&both).expect("a directory");
    still.virsh("h1", &["undefine", "still", "--keep-nvram"]);
    lab.fails(&["restore", "vm", "still@latest", "--disk-dir", both.to_str().unwrap()], 4, &["vars.fd", "--overwrite"]);
    still.restore(&["--disk-dir", both.to_str().unwrap(), "--overwrite"]);
    assert!(std::fs::read(both.join("disk.raw")).expect("vda") == first);
    assert!(std::fs::read(both.join("still-vdb.raw")).expect("vdb") == second);
}

#[test]
fn a_restore_that_fails_half_way_keeps_the_old_vm_and_makes_no_half_new_one() {
    let lab = Lab::quick(1);
    let still = Still::define(&lab, "h1");
    lab.backup("still", &[]);
    let backed_up = still.read("disk.raw");
    // What the VM has become since.
    let now = noise(50, 24 << 20);
    still.write("disk.raw", &now);
    still.write("vars.fd", b"newer");
    let before = (still.names(), still.virsh("h1", &["dumpxml", "--inactive", "still"]));
    let unchanged = |what: &str| {
        assert_eq!(still.names(), before.0, "{what}");
        assert_eq!(still.virsh("h1", &["dumpxml", "--inactive", "still"]), before.1, "{what}");
        assert!(still.read("disk.raw") == now && still.read("vars.fd") == b"newer", "{what}");
        assert_eq!(std::fs::read_to_string(still.tpm.join("tpm2/tpm2-00.permall")).expect("TPM state"), "endorsed");
    };

    // libvirt refuses the definition when all disks are in place.
    let emulator = still.path("qemu");
    std::fs::rename(&emulator, still.path("qemv")).expect("the emulator goes");
    lab.virsh("h1", &["capabilities"]);
    let refused = lab.output(&["restore", "vm", "still@latest", "--overwrite"]);
    let alone = lab.output(&[
        "restore",
        "vm",
        "still@latest",
        "--name",
        "half",
        "--disk-dir",
        lab.dir.path().to_str().unwrap(),
    ]);
    std::fs::rename(still.path("qemv"), &emulator).expect("the emulator is back");
    for output in [refused, alone] {
        assert!(!output.status.success() && text(&output).contains("disks were removed again"), "{}", text(&output));
    }
    unchanged("after a definition that libvirt refused");
    assert!(!lab.virsh("h1", &["dominfo", "half"]).status.success(), "half a VM is defined");
    assert!(!lab.path("half-vda.raw").exists());

    // No room.
    let small = lab.path("small");
    std::fs::create_dir(&small).expect("a directory");
    tool("mount", &["-t", "tmpfs", "-o", "size=8M", "none", small.to_str().unwrap()]);
    let full = lab.output(&["restore", "vm", "still@latest", "--overwrite", "--disk-dir", small.to_str().unwrap()]);
    let left = std::fs::read_dir(&small).expect("a directory").count();
    tool("umount", &[small.to_str().unwrap()]);
    assert_eq!(full.status.code(), Some(10), "{}", text(&full));
    assert!(text(&full).contains(small.to_str().unwrap()) && !text(&full).contains("repository's"), "{}", text(&full));
    assert_eq!(left, 0);
    unchanged("after a full file system");

    // Killed while it writes: the VM is as it was, and the next restore clears up and succeeds.
    for delay in [0, 5, 20, 60] {
        let running = lab.start(&["restore", "vm", "still@latest", "--overwrite"]);
        wait("the staging directory", LIMIT, || {
            still.names().iter().any(|name| name.starts_with(".virtward-restore-"))
        });
        std::thread::sleep(Duration::from_millis(delay));
        running.signal("KILL");
        running.finish(LIMIT);
        let disk = still.read("disk.raw");
        assert!(disk == now || disk == backed_up, "half a disk after {delay} ms");
        assert!(lab.virsh("h1", &["dominfo", "still"]).status.success());
    }
    still.restore(&["--overwrite"]);
    assert!(still.read("disk.raw") == backed_up);
    let litter: Vec<String> = still.names().into_iter().filter(|name| name.starts_with(".virtward-restore-")).collect();
    assert!(litter.is_empty(), "{litter:?}");
    // And it can be backed up again.
    lab.backup("still", &[]);
    lab.assert_sound();
}

#[test]
fn a_vm_of_the_same_name_is_replaced_under_its_own_uuid() {
    let lab = Lab::quick(1);
    let still = Still::define(&lab, "h1");
    lab.backup("still", &[]);
    still.virsh("h1", &["undefine", "still", "--keep-nvram"]);
    // Made anew by hand under the old name, so libvirt gave it another UUID.
    let other = "<domain type='qemu'><name>still</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>\
                 <disk type='file' device='disk'><source file='DISK'/><target dev='vda'/></disk></devices></domain>";
    still.write("unused.raw", b"of the other VM");
    still.write("other.xml", other.replace("DISK", still.path("unused.raw").to_str().unwrap()).as_bytes());
    still.virsh("h1", &["define", still.path("other.xml").to_str().unwrap()]);
    let uuid = still.virsh("h1", &["domuuid", "still"]).trim().to_owned();
    let restored = still.restore(&["--overwrite"]);
    assert_eq!(restored["uuid"], uuid.as_str());
    assert_eq!(still.virsh("h1", &["domuuid", "still"]).trim(), uuid);
    let _ = std::fs::remove_dir_all(still.tpm.with_file_name(&uuid));
    // Its own disk is nobody's now, and is named rather than deleted.
    assert!(restored["warnings"].to_string().contains("unused.raw"), "{restored}");
    assert!(still.path("unused.raw").exists());
}

#[test]
fn memory_saved_before_a_restore_is_not_resumed_on_the_restored_disks() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let before = lab.guest_sh("web1", CHECKSUMS);
    lab.backup("web1", &[]);
    lab.guest_sh("web1", "echo in memory and on disk > /data/later; sync; echo only in memory > /tmp/later");
    let saved = lab.virsh("h1", &["managedsave", "web1"]);
    assert!(saved.status.success(), "{}", text(&saved));
    let said = lab.ok(&["--json", "restore", "vm", "web1@latest", "--overwrite", "--start"]);
    assert!(said.contains("managedsave"), "{said}");
    lab.lab(&["vm", "wait", "web1"]);
    assert_eq!(lab.guest_sh("web1", CHECKSUMS), before);
    assert!(lab.guest_sh("web1", "ls /tmp").find("later").is_none(), "the guest was resumed, not booted");
    assert_eq!(lab.backup("web1", &[])["kind"], "full", "tracking of the old disks was trusted");
}

#[test]
fn guests_boot_from_partitions_other_file_systems_and_raw_disks() {
    let lab = Lab::quick(1);
    let guests: [(&str, &[&str]); 3] = [
        ("parts", &["--partitioned", "--disk", "256MiB"]),
        ("flat", &["--fs", "xfs", "--format", "raw"]),
        ("tree", &["--fs", "btrfs"]),
    ];
    for (vm, more) in guests {
        lab.guest(vm, more);
        let before = lab.guest_sh(vm, CHECKSUMS);
        let point = lab.backup(vm, &[]);
        lab.guest_sh(vm, "rm -r /data/* 2>/dev/null; sync");
        lab.assert_boots(point["id"].as_str().expect("an id"), &format!("{vm}-2"), &before);
        lab.lab(&["vm", "exec", &format!("{vm}-2"), "--", "sh", "-c", "grep -c /data /proc/mounts"]);
        lab.virsh("h1", &["destroy", &format!("{vm}-2")]);
        lab.virsh("h1", &["destroy", vm]);
    }
}

#[test]
fn a_vm_comes_up_on_another_host_with_the_disks_where_both_see_them() {
    let lab = Lab::quick(2);
    lab.guest("web1", &[]);
    let before = lab.guest_sh("web1", CHECKSUMS);
    lab.backup("web1", &[]);
    // The host is lost with everything on it.
    lab.lab(&["host", "power", "off", "h1"]);
    let dir = lab.shared().join("rescued");
    std::fs::create_dir(&dir).expect("a directory");
    let said: Value = serde_json::from_str(&lab.ok(&[
        "--json",
        "restore",
        "vm",
        "web1@latest",
        "--start",
        "--connect",
        &lab.tcp_uri("h2"),
        "--disk-dir",
        dir.to_str().unwrap(),
    ]))
    .expect("JSON");
    assert_eq!(said["started"], true);
    assert!(said["warnings"].to_string().contains("h2 must see"), "{said}");
    lab.lab(&["vm", "wait", "web1"]);
    assert_eq!(lab.guest_sh("web1", CHECKSUMS), before);
}

/// Asks a TPM, given a copy of its state, for the public part of its endorsement key, which no two TPMs have in common.
fn endorsement_key(lab: &Lab, state: &Path) -> Vec<u8> {
    use std::io::{Read, Write};
    let copy = tempfile::tempdir_in(lab.dir.path()).expect("a directory");
    let state = state.join("tpm2/tpm2-00.permall");
    std::fs::copy(&state, copy.path().join("tpm2-00.permall")).unwrap_or_else(|error| panic!("{state:?}: {error}"));
    let socket = copy.path().join("tpm");
    let mut swtpm = Command::new("swtpm");
    swtpm.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"]);
    swtpm.arg(format!("dir={}", copy.path().display()));
    swtpm.arg("--server").arg(format!("type=unixio,path={}", socket.display()));
    let running = Running(swtpm.spawn().expect("swtpm (scripts/setup.sh test)"));
    wait("swtpm", LIMIT, || socket.exists());
    let mut tpm = std::os::unix::net::UnixStream::connect(&socket).expect("swtpm answers");
    // TPM2_ReadPublic of the persistent RSA key.
    tpm.write_all(&[0x80, 1, 0, 0, 0, 14, 0, 0, 1, 0x73, 0x81, 1, 0, 1]).expect("a command");
    let mut answer = vec![0; 4096];
    let length = tpm.read(&mut answer).expect("an answer");
    answer.truncate(length);
    running.signal("KILL");
    running.finish(LIMIT);
    assert!(length > 200 && answer[6..10] == [0; 4], "the TPM answers {answer:x?}");
    answer
}

#[test]
fn the_tpm_of_a_vm_and_the_variables_of_its_firmware_come_back() {
    let lab = Lab::quick(1);
    // It boots nothing; its firmware writes variables and uses the TPM all the same.
    let xml = format!(
        "<domain type='qemu'><name>sealed</name><memory unit='MiB'>128</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type>\
         <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\
         <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{}</nvram></os><features><acpi/></features>\
         <cpu mode='custom'><model>qemu64</model></cpu><devices><serial type='pty'/>\
         <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>",
        lab.path("VARS.fd").display()
    );
    std::fs::write(lab.path("sealed.xml"), xml).expect("a file");
    lab.virsh_ok("h1", &["define", lab.path("sealed.xml").to_str().unwrap()]);
    let uuid = lab.virsh_ok("h1", &["domuuid", "sealed"]);
    // The host's own /var/lib/libvirt, as this machine sees it.
    let state = lab.shared().with_file_name("h1").join("lib/swtpm").join(uuid.trim());
    let variables = || std::fs::read(lab.path("VARS.fd")).expect("variables");
    let fresh = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").expect("OVMF (scripts/setup.sh test)");
    lab.virsh_ok("h1", &["start", "sealed"]);
    wait("variables of the firmware", LIMIT, || variables() != fresh);
    let running = lab.ok_on("h1", &["--json", "backup", "run", "sealed"]);
    assert!(!running.contains("not in this restore point"), "{running}");
    // On another machine than the VM's host its TPM is not seen, which is said.
    let elsewhere = lab.backup("sealed", &[]);
    assert!(elsewhere["warnings"].to_string().contains("TPM state is not in this restore point"), "{elsewhere}");
    lab.virsh_ok("h1", &["destroy", "sealed"]);
    lab.ok_on("h1", &["--json", "backup", "run", "sealed"]);
    let (written, key) = (variables(), endorsement_key(&lab, &state));

    lab.virsh_ok("h1", &["undefine", "sealed", "--nvram"]);
    let _ = std::fs::remove_dir_all(&state);
    assert!(!lab.path("VARS.fd").exists());
    lab.ok_on("h1", &["restore", "vm", "sealed@latest"]);
    assert!(variables() == written, "other variables");
    assert!(endorsement_key(&lab, &state) == key, "another TPM");
    // Both are where libvirt, swtpm and the firmware look, and may be used by them.
    lab.virsh_ok("h1", &["start", "sealed"]);
    lab.ok_on("h1", &["--json", "backup", "run", "sealed"]);
    lab.virsh_ok("h1", &["destroy", "sealed"]);
    assert!(endorsement_key(&lab, &state) == key, "a new TPM was made");

    // A copy is a VM beside it, with what it needs to unseal its disks.
    lab.ok_on("h1", &["restore", "vm", "sealed@latest", "--name", "beside", "--start"]);
    let copy = state.with_file_name(lab.virsh_ok("h1", &["domuuid", "beside"]).trim());
    assert!(copy != state && endorsement_key(&lab, &copy) == key);
}
