//! VMs that are shut off: real images, a simulated hypervisor.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use virtward_engine::{BackupOptions, Cancel, Dirs, DiskFormat, Env, Error, Silent, backup_vm};
use virtward_hypervisor::{Hypervisor, sim::SimWorld};
use virtward_model::{BackupKind, RestorePoint, SourceKind, TrackingState};
use virtward_repo::{Repository, Secret, VerifyOptions, store};

use crate::common::*;

const UUID: &str = "5d1e6a52-7f0c-4a6e-9d3b-2f4b8c1d0e9f";

/// Defines a VM with these disks on a simulated host.
async fn define(bench: &Bench, disks: &[(&Path, &str)]) -> Env {
    let host = SimWorld::new().host("h1");
    let disk = |(number, (path, format)): (usize, &(&Path, &str))| {
        let letter = char::from(b'a' + number as u8);
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
             <target dev='vd{letter}' bus='virtio'/></disk>",
            path.display()
        )
    };
    let disks: String = disks.iter().enumerate().map(disk).collect();
    let xml = format!(
        "<domain type='kvm'><name>vm</name><uuid>{UUID}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{disks}</devices></domain>"
    );
    host.define(&xml).await.unwrap();
    let dirs = Dirs { runtime: bench.path("run"), scratch: bench.path("scratch") };
    Env { uri: host.uri(), hypervisor: Arc::new(host), dirs, thaw_guard: None }
}

async fn back_up(env: &Env, repo: &Repository) -> Result<RestorePoint, Error> {
    backup_vm(env, repo, "vm", &BackupOptions::default(), &Silent, &Cancel::default()).await
}

/// Opens the repository as a later run does: with nothing remembered.
fn reopen(bench: &Bench) -> Repository {
    Repository::open(store::open(text(&bench.path("repo"))).unwrap(), &Secret::password("secret")).unwrap()
}

fn qcow2(bench: &Bench, name: &str, size: &str) -> PathBuf {
    let path = bench.path(name);
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), size]);
    path
}

fn write(path: &Path, command: &str) {
    run("qemu-io", &["-f", "qcow2", "-c", command, text(path)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_disk_is_raw_whatever_a_guest_writes_into_it() {
    let bench = Bench::new();
    let secret = bench.raw("secret", &noise(8, 1 << 20));
    // The guest wrote the header of an image with a backing file into the first sectors of its disk.
    let trap = bench.path("trap");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&secret), text(&trap), "4M"]);
    let mut content = std::fs::read(&trap).unwrap();
    content.resize((5 << 20) + 100, 0);
    let disk = bench.raw("disk.img", &content);
    let env = define(&bench, &[(&disk, "raw")]).await;
    let point = back_up(&env, &bench.repo).await.unwrap();
    assert_eq!((point.source, &*point.disks[0].format), (SourceKind::Cold, "raw"));
    // A guest sees whole sectors.
    content.resize(content.len().next_multiple_of(512), 0);
    assert_eq!(point.disks[0].size_bytes, content.len() as u64);
    bench.restore(point.id, &bench.path("out.raw"), Some(DiskFormat::Raw)).await.unwrap();
    assert!(std::fs::read(bench.path("out.raw")).unwrap() == content);
    // The next one is read again, and stored not at all.
    let point = back_up(&env, &bench.repo).await.unwrap();
    assert_eq!((point.disks[0].tracking.state, point.disks[0].stored_bytes), (TrackingState::Unsupported, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_files_that_headers_may_name_are_read() {
    let bench = Bench::new();
    let base = bench.raw("base.raw", &noise(8, 2 << 20));
    let overlay = bench.path("overlay.qcow2");
    let create = |options: &[&str]| {
        let _ = std::fs::remove_file(&overlay);
        run("qemu-img", &[&["create", "-q", "-u", "-f", "qcow2"], options, &[text(&overlay), "4M"]].concat());
    };
    create(&["-F", "raw", "-b", text(&base)]);
    write(&overlay, "write -q -P 7 1M 64k");
    let env = define(&bench, &[(&overlay, "qcow2")]).await;
    let point = back_up(&env, &bench.repo).await.unwrap();
    bench.restore(point.id, &bench.path("out.qcow2"), None).await.unwrap();
    assert_same(&overlay, "qcow2", &bench.path("out.qcow2"), "qcow2");
    let evil = "json:{\"driver\":\"file\",\"filename\":\"/etc/hostname\"}";
    for options in
        [&["-F", "raw", "-b", "nbd:unix:/x"][..], &["-F", "raw", "-b", evil], &["-F", "qcow2", "-b", text(&base)]]
    {
        create(options);
        let error = back_up(&env, &bench.repo).await.unwrap_err();
        assert!(matches!(error, Error::Refused(_)) && error.to_string().contains("backing file"), "{error}");
    }
    assert_eq!(bench.repo.points().unwrap().points.len(), 1);
}

/// A VM with a disk of two levels of pages, backed up once, of which parts were written again since, with what was there:
/// pages of the next backup are the very pages that are damaged here.
async fn backed_up_and_changed(bench: &Bench) -> (Env, PathBuf) {
    let disk = qcow2(bench, "disk.qcow2", "600M");
    write(&disk, "write -q -P 7 10M 3M");
    write(&disk, "write -q -P 8 500M 2M");
    let env = define(bench, &[(&disk, "qcow2")]).await;
    let first = back_up(&env, &bench.repo).await.unwrap();
    assert_eq!(first.kind, BackupKind::Full);
    write(&disk, "write -q -P 7 11M 64k");
    write(&disk, "write -q -P 8 501M 64k");
    (env, disk)
}

/// Damages the first record of each pack of a class, or all of them.
fn damage(packs: &Path, all: bool) {
    for entry in std::fs::read_dir(packs).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            damage(&path, all);
            continue;
        }
        let mut bytes = std::fs::read(&path).unwrap();
        let footer = bytes.len() - 128;
        let table = u32::from_le_bytes(bytes[footer..footer + 4].try_into().unwrap()) as usize;
        let end = if all { table } else { 264 };
        bytes[260..end].iter_mut().step_by(8).for_each(|byte| *byte ^= 1);
        std::fs::write(&path, bytes).unwrap();
    }
}

/// The next backup must be full, say why in these words, and be sound; the one after it is incremental again.
async fn assert_heals(bench: &Bench, env: &Env, disk: &Path, words: &str) {
    let point = back_up(env, &reopen(bench)).await.unwrap();
    let (record, reason) = (&point.disks[0], point.disks[0].tracking.reason.clone().unwrap_or_default());
    assert_eq!((point.kind, record.tracking.state), (BackupKind::Full, TrackingState::Foreign), "{reason}");
    assert!(reason.contains("the previous restore point") && reason.contains(words), "{reason}");
    assert!((5 << 20..6 << 20).contains(&record.read_bytes), "{record:?}");
    bench.restore(point.id, &bench.path("healed.qcow2"), None).await.unwrap();
    assert_same(disk, "qcow2", &bench.path("healed.qcow2"), "qcow2");
    write(disk, "write -q -P 10 12M 64k");
    let next = back_up(env, &reopen(bench)).await.unwrap();
    assert_eq!(next.kind, BackupKind::Incremental, "{:?}", next.disks[0].tracking);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_built_on_a_base_whose_pages_are_damaged_below_its_root() {
    let bench = Bench::new();
    let (env, disk) = backed_up_and_changed(&bench).await;
    // The first record of the pack of pages is that of a leaf; the root is its last.
    damage(&bench.path("repo/meta"), false);
    assert_heals(&bench, &env, &disk, "damaged").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_built_on_a_base_whose_root_is_damaged() {
    let bench = Bench::new();
    let (env, disk) = backed_up_and_changed(&bench).await;
    damage(&bench.path("repo/meta"), true);
    assert_heals(&bench, &env, &disk, "damaged").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_built_on_a_base_whose_data_was_found_damaged() {
    let bench = Bench::new();
    let (env, disk) = backed_up_and_changed(&bench).await;
    damage(&bench.path("repo/data"), false);
    assert!(!reopen(&bench).verify(&VerifyOptions::default(), &()).unwrap().is_ok());
    assert_heals(&bench, &env, &disk, "lost or damaged").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_rests_on_a_sound_base() {
    let bench = Bench::new();
    let (env, disk) = backed_up_and_changed(&bench).await;
    let next = back_up(&env, &reopen(&bench)).await.unwrap();
    assert_eq!(next.kind, BackupKind::Incremental, "{:?}", next.disks[0].tracking);
    assert!(next.disks[0].read_bytes <= 2 << 20, "{:?}", next.disks[0]);
    bench.restore(next.id, &bench.path("out.qcow2"), None).await.unwrap();
    assert_same(&disk, "qcow2", &bench.path("out.qcow2"), "qcow2");
}
