//! Image files from backup to restore through the real binary, compared byte by byte by qemu-img.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use crate::common::{Sandbox, fill, signal, tool};
use serde_json::Value;

fn same(a: &Path, b: &Path) {
    tool("qemu-img", &["compare", a.to_str().unwrap(), b.to_str().unwrap()]);
}

/// A repository and a sparse raw image of 64 MiB with 9 MiB of data.
fn with_image() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    let image = sandbox.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    fill(&image, 0, 5 << 20, 1);
    fill(&image, 40 << 20, 4 << 20, 2);
    sandbox
}

fn backup(sandbox: &Sandbox, file: &str) -> Value {
    sandbox.json(&["backup", "image", file])
}

#[test]
fn a_raw_image_comes_back_in_every_format() {
    let sandbox = with_image();
    let point = backup(&sandbox, "disk.raw");
    assert_eq!(
        (point["vm"].as_str(), point["source"].as_str(), point["kind"].as_str()),
        (Some("disk"), Some("image"), Some("full"))
    );
    let disk = &point["disks"][0];
    assert_eq!(disk["size_bytes"].as_u64(), Some(64 << 20));
    assert!(disk["read_bytes"].as_u64().unwrap() <= 12 << 20, "holes are not read: {disk}");
    let image = sandbox.path("disk.raw");
    for (format, name) in [
        ("raw", "r.raw"),
        ("qcow2", "r.qcow2"),
        ("vmdk", "r.vmdk"),
        ("vmdk-split", "s.vmdk"),
        ("vhdx", "r.vhdx"),
        ("vdi", "r.vdi"),
    ] {
        let restored = sandbox.json(&["restore", "disk", "disk@latest", "--to", name, "--format", format]);
        assert_eq!(
            restored["format"].as_str().map(|name| name.replace('-', "")),
            Some(format.replace('-', "")),
            "{restored}"
        );
        same(&image, &sandbox.path(name));
    }
    let thin = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(sandbox.path("r.raw")).unwrap()) * 512;
    assert!(thin < 16 << 20, "the restored raw image is thick: {thin} bytes");
    sandbox.run(&["restore", "disk", "disk@latest", "--to", "r.raw"]).code(4);
    sandbox.run(&["restore", "disk", "disk@latest", "--to", "r.raw", "--overwrite"]).ok();
    same(&image, &sandbox.path("r.raw"));
}

#[test]
fn a_qcow2_chain_is_read_through_and_a_second_run_stores_little() {
    let sandbox = with_image();
    let (base, top) = (sandbox.text("base.qcow2"), sandbox.text("top.qcow2"));
    tool("qemu-img", &["convert", "-O", "qcow2", &sandbox.text("disk.raw"), &base]);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 20M 1M", &top]);
    let first = sandbox.json(&["backup", "image", &top, "--name", "chain", "--tag", "nightly"]);
    let second = sandbox.json(&["backup", "image", &top, "--name", "chain"]);
    let stored = |point: &Value| point["disks"][0]["new_bytes"].as_u64().unwrap();
    assert!(stored(&first) >= 9 << 20, "{first}");
    assert_eq!(stored(&second), 0, "nothing changed: {second}");
    sandbox.run(&["restore", "disk", "chain@latest", "--to", "back.qcow2"]).ok();
    same(Path::new(&top), &sandbox.path("back.qcow2"));
    let list = sandbox.json(&["backup", "list", "chain"]);
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!(list[0]["id"], first["id"], "oldest first");
    let tagged = sandbox.json(&["backup", "list", "--tag", "nightly"]);
    assert_eq!(tagged.as_array().unwrap().len(), 1);
}

#[test]
fn points_are_listed_shown_verified_and_deleted() {
    let sandbox = with_image();
    let point = backup(&sandbox, "disk.raw");
    let id = point["id"].as_str().unwrap();
    let table = sandbox.run(&["backup", "list"]).ok().stdout;
    assert!(table.starts_with("ID") && table.contains(&id[..8]) && table.contains("just now"), "{table}");
    assert_eq!(sandbox.json(&["backup", "show", &id[..6]]), point);
    assert!(sandbox.run(&["backup", "show", "disk@latest"]).ok().stdout.contains(id));
    for mode in ["light", "ciphertext", "full"] {
        sandbox.run(&["backup", "verify", "--all", "--mode", mode]).ok();
        let report = sandbox.json(&["backup", "verify", id, "--mode", mode]);
        assert_eq!(report["damaged"].as_array().map(Vec::len), Some(0), "{report}");
    }
    sandbox.run(&["backup", "verify", "--all", "--mode", "full", "--percent", "10"]).ok();
    sandbox.run(&["backup", "delete", "disk@latest"]).code(4).says("--yes");
    assert_eq!(sandbox.json(&["backup", "list"]).as_array().unwrap().len(), 1);
    sandbox.run(&["backup", "delete", id, "ffff", "--yes"]).code(3);
    assert_eq!(sandbox.json(&["backup", "list"]).as_array().unwrap().len(), 1, "all or nothing");
    assert_eq!(sandbox.json(&["backup", "delete", id, "--yes"])["deleted"][0].as_str(), Some(id));
    assert_eq!(sandbox.json(&["backup", "list"]), serde_json::json!([]));
    sandbox.run(&["repo", "check"]).ok();
}

#[test]
fn what_is_not_there_is_3_with_what_comes_near() {
    let sandbox = with_image();
    sandbox.run(&["backup", "show", "disk@latest"]).code(3).says("backup run");
    backup(&sandbox, "disk.raw");
    let ran = sandbox.run(&["restore", "disk", "dsik@latest", "--to", "x.raw", "--json"]).code(3);
    assert_eq!(ran.error()["message"], "no VM dsik in the repository; did you mean disk?");
    sandbox.run(&["backup", "list", "dsik"]).code(3).says("did you mean disk?");
    sandbox.run(&["backup", "show", "disk"]).code(3).says("disk@latest");
    sandbox.run(&["backup", "show", "disk@2001-01-01"]).code(3).says("the oldest is");
    sandbox.run(&["backup", "show", "disk@noon"]).code(2).says("2026-11-22T10:00");
    sandbox.run(&["restore", "disk", "disk@latest", "--disk", "vdz", "--to", "x.raw"]).code(3).says("vdz");
    sandbox.run(&["restore", "vm", "disk@latest"]).code(4).says("restore disk");
    sandbox.run(&["backup", "image", "nothing.raw"]).code(3).says("nothing.raw");
    assert!(!sandbox.path("x.raw").exists());
}

#[test]
fn flipped_data_is_found_and_named() {
    let sandbox = with_image();
    backup(&sandbox, "disk.raw");
    let mut packs = Vec::new();
    walk(&sandbox.path("repo"), &mut packs);
    let (_, largest) = packs.into_iter().max().unwrap();
    use std::os::unix::fs::{FileExt, PermissionsExt};
    fs::set_permissions(&largest, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&largest).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], 3 << 20).unwrap();
    for mode in ["ciphertext", "full"] {
        let ran = sandbox.run(&["backup", "verify", "--all", "--mode", mode, "--json"]).code(9);
        assert!(ran.stdout.contains("damaged"), "{}", ran.stdout);
    }
    let ran = sandbox.run(&["restore", "disk", "disk@latest", "--to", "x.raw"]).code(9);
    assert!(ran.stderr.contains("damaged"), "{}", ran.stderr);
}

fn walk(dir: &Path, files: &mut Vec<(u64, std::path::PathBuf)>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => walk(&entry.path(), files),
            false => files.push((entry.metadata().unwrap().len(), entry.path())),
        }
    }
}

#[test]
fn an_interrupt_cancels_cleanly_and_leaves_no_restore_point() {
    let sandbox = with_image();
    for name in ["INT", "TERM"] {
        let child = sandbox.command(&["backup", "image", "disk.raw", "--bandwidth", "256KiB"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        signal(child.id(), name);
        let asked = Instant::now();
        crate::common::finish(child).code(130);
        assert!(asked.elapsed() < Duration::from_secs(20), "stopping took {:?}", asked.elapsed());
    }
    assert_eq!(sandbox.json(&["backup", "list"]), serde_json::json!([]));
    sandbox.run(&["repo", "check"]).ok();
    backup(&sandbox, "disk.raw");
}

#[test]
fn progress_goes_to_standard_error_and_quiet_means_quiet() {
    let sandbox = with_image();
    let ran = sandbox.run(&["backup", "image", "disk.raw", "--json"]).ok();
    assert!(ran.stderr.contains("disk: copying"), "{}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), 1);
    let quiet = sandbox.run(&["backup", "image", "disk.raw", "--quiet"]).ok();
    assert_eq!(quiet.stderr, "");
    assert!(quiet.stdout.contains("disk: image"), "{}", quiet.stdout);
}
