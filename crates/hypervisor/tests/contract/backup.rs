//! Backup jobs, checkpoints and the bitmaps behind them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use virtward_hypervisor::{DomainEventKind as Kind, ErrorKind, Hypervisor, JobKind, StartOptions};

use crate::bench::{Bench, DISK_BYTES, Guest, checkpoint, event, eventually, expect_kind};

pub async fn full_then_mixed_then_abort(bench: &dyn Bench) {
    let guest = Guest::start(bench, "backup", &["qcow2", "qcow2", "raw"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let mut events = hv.events();
    assert!(hv.job(id).await.expect("job").is_none());
    assert_eq!(hv.backup_xml(id).await.expect("backup XML"), None);

    hv.backup_begin(id, &guest.backup(&[("vda", None)]), Some(&checkpoint("c1", &["vda"]))).await.expect("full");
    assert!(bench.serves_nbd(&guest.path("nbd.sock")));
    let job = hv.job(id).await.expect("job").expect("a job");
    assert_eq!((job.kind, job.scratch_total_bytes), (JobKind::Backup, DISK_BYTES));
    assert!(hv.backup_xml(id).await.expect("backup XML").expect("a backup").contains("vda"));
    let begun = Instant::now();
    expect_kind(hv.backup_begin(id, &guest.backup(&[("vdb", None)]), None).await, ErrorKind::Busy);
    assert!(begun.elapsed() < Duration::from_secs(5), "a second backup is refused at once");
    let busy = hv.bitmaps(id).await.expect("bitmaps during a backup");
    assert!(busy.iter().any(|b| b.target == "vda" && b.name == "c1"), "hidden by the job's filter: {busy:?}");
    // Also while others ask, which is when statistics tell sizes of files.
    let (sizes, _, again) = tokio::join!(hv.disk_sizes(id), hv.bitmaps(id), hv.disk_sizes(id));
    let sizes = sizes.expect("sizes during a backup");
    assert!(sizes.contains(&("vda".to_owned(), DISK_BYTES)), "{sizes:?}");
    assert_eq!(again.expect("sizes"), sizes);
    guest.end_job().await;
    event(&mut events, id, "job completed", |k| *k == Kind::JobCompleted).await;
    expect_kind(hv.abort_job(id).await, ErrorKind::WrongState);
    assert!(!guest.path("nbd.sock").exists());

    let list = hv.checkpoints(id).await.expect("checkpoints");
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].name.as_str(), list[0].disks[0].0.as_str(), list[0].disks.len()), ("c1", "vda", 1));
    bench.guest_writes(id, "vda", 1 << 20, 256 << 10).await;
    let dirty = bitmap(hv.as_ref(), &guest, "vda", "c1").await;
    assert!(dirty.persistent && dirty.recording && !dirty.inconsistent, "{dirty:?}");
    assert_eq!(dirty.dirty_bytes, 256 << 10);

    // One job: a disk since a checkpoint, a disk in full without one, a disk without bitmaps.
    let mixed = guest.backup(&[("vda", Some("c1")), ("vdb", None), ("vdc", None)]);
    hv.backup_begin(id, &mixed, Some(&checkpoint("c2", &["vda", "vdb"]))).await.expect("mixed");
    let job = hv.job(id).await.expect("job").expect("a job");
    assert_eq!(job.scratch_total_bytes, 3 * DISK_BYTES);
    guest.end_job().await;
    let list = hv.checkpoints(id).await.expect("checkpoints");
    assert_eq!(list.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["c1", "c2"]);
    assert_eq!(list[1].parent.as_deref(), Some("c1"));
    assert_eq!(bitmap(hv.as_ref(), &guest, "vda", "c2").await.dirty_bytes, 0);
    assert_eq!(bitmap(hv.as_ref(), &guest, "vda", "c1").await.dirty_bytes, 256 << 10, "the older one records on");

    // Bitmaps survive an orderly end of the guest.
    hv.destroy(id).await.expect("destroy");
    hv.start(id, StartOptions::default()).await.expect("start");
    assert_eq!(bitmap(hv.as_ref(), &guest, "vda", "c1").await.dirty_bytes, 256 << 10);
    let since = guest.backup(&[("vda", Some("c2")), ("vdb", Some("c2"))]);
    hv.backup_begin(id, &since, None).await.expect("incremental after a restart");
    hv.destroy(id).await.expect("destroy in mid-backup");
    assert!(hv.job(id).await.expect("job of an inactive domain").is_none());
    guest.remove().await;
}

async fn bitmap(hv: &dyn Hypervisor, guest: &Guest<'_>, target: &str, name: &str) -> virtward_hypervisor::DiskBitmap {
    let all = hv.bitmaps(guest.uuid).await.expect("bitmaps");
    let found = all.iter().find(|b| b.target == target && b.name == name);
    found.unwrap_or_else(|| panic!("no bitmap {name} on {target}: {all:?}")).clone()
}

pub async fn refusals(bench: &dyn Bench) {
    let guest = Guest::define(bench, "refuse", &["qcow2", "raw"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let full = guest.backup(&[("vda", None)]);
    expect_kind(hv.backup_begin(id, &full, None).await, ErrorKind::WrongState);
    expect_kind(hv.bitmaps(id).await, ErrorKind::WrongState);
    expect_kind(hv.disk_sizes(id).await, ErrorKind::WrongState);
    expect_kind(hv.abort_job(id).await, ErrorKind::WrongState);
    expect_kind(hv.checkpoint_delete(id, "c1", false).await, ErrorKind::NoCheckpoint);
    assert_eq!(hv.checkpoints(id).await.expect("none yet"), []);

    hv.start(id, StartOptions::default()).await.expect("start");
    let since_unknown = guest.backup(&[("vda", Some("never"))]);
    expect_kind(hv.backup_begin(id, &since_unknown, None).await, ErrorKind::NoCheckpoint);
    expect_kind(hv.backup_begin(id, &guest.backup(&[("vdz", None)]), None).await, ErrorKind::Invalid);
    let on_raw = checkpoint("c1", &["vdb"]);
    expect_kind(hv.backup_begin(id, &guest.backup(&[("vdb", None)]), Some(&on_raw)).await, ErrorKind::Unsupported);
    assert!(hv.job(id).await.expect("job").is_none(), "a refused backup leaves no job");
    assert_eq!(guest.checkpoints().await, [""; 0], "a refused backup leaves no checkpoint");

    hv.backup_begin(id, &full, Some(&checkpoint("c1", &["vda"]))).await.expect("full");
    guest.end_job().await;
    let again = hv.backup_begin(id, &full, Some(&checkpoint("c1", &["vda"]))).await;
    expect_kind(again, ErrorKind::Invalid);
    expect_kind(hv.checkpoint_delete(id, "c2", false).await, ErrorKind::NoCheckpoint);
    expect_kind(hv.bitmap_remove(id, "vda", "c2").await, ErrorKind::Invalid);
    expect_kind(hv.bitmap_remove(id, "vdz", "c1").await, ErrorKind::Invalid);
    hv.destroy(id).await.expect("destroy");
    expect_kind(hv.checkpoint_delete(id, "c1", false).await, ErrorKind::WrongState);
    hv.checkpoint_delete(id, "c1", true).await.expect("metadata of an inactive domain");
    assert_eq!(guest.checkpoints().await, [""; 0]);
    guest.remove().await;
}

pub async fn checkpoints_are_forgotten_and_redefined(bench: &dyn Bench) {
    let guest = Guest::start(bench, "redef", &["qcow2", "qcow2"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let both = ["vda", "vdb"];
    for name in ["c1", "c2"] {
        let full = guest.backup(&[("vda", None), ("vdb", None)]);
        hv.backup_begin(id, &full, Some(&checkpoint(name, &both))).await.expect("full");
        guest.end_job().await;
    }
    let made = hv.checkpoints(id).await.expect("checkpoints");

    // Only the metadata goes; the bitmaps stay and can be made known again.
    for name in ["c1", "c2"] {
        hv.checkpoint_delete(id, name, true).await.expect("forget");
    }
    assert_eq!(guest.checkpoints().await, [""; 0]);
    assert_eq!(hv.bitmaps(id).await.expect("bitmaps").len(), 4);
    bench.guest_writes(id, "vda", 0, 64 << 10).await;
    for old in &made {
        hv.checkpoint_redefine(id, &checkpoint(&old.name, &both), old.created_unix_s).await.expect("redefine");
    }
    let again = hv.checkpoints(id).await.expect("checkpoints");
    // Redefined ones have no parents, so two of the same second may change places.
    let names_and_times = |list: &[virtward_hypervisor::CheckpointInfo]| -> BTreeSet<_> {
        list.iter().map(|c| (c.name.clone(), c.created_unix_s)).collect()
    };
    assert_eq!(names_and_times(&again), names_and_times(&made));
    let since = guest.backup(&[("vda", Some("c1")), ("vdb", Some("c2"))]);
    hv.backup_begin(id, &since, None).await.expect("incremental since a redefined checkpoint");
    guest.end_job().await;

    expect_kind(hv.checkpoint_redefine(id, &checkpoint("c9", &["vda"]), 5).await, ErrorKind::CheckpointInconsistent);
    // A bitmap removed behind the hypervisor's back.
    hv.bitmap_remove(id, "vda", "c1").await.expect("remove a bitmap");
    assert_eq!(hv.bitmaps(id).await.expect("bitmaps").len(), 3);
    let since = guest.backup(&[("vda", Some("c1"))]);
    expect_kind(hv.backup_begin(id, &since, None).await, ErrorKind::CheckpointInconsistent);
    expect_kind(hv.checkpoint_delete(id, "c1", false).await, ErrorKind::CheckpointInconsistent);
    hv.checkpoint_delete(id, "c1", true).await.expect("forget");
    hv.checkpoint_delete(id, "c2", false).await.expect("delete");
    let left = hv.bitmaps(id).await.expect("bitmaps");
    assert!(left.iter().all(|b| b.name == "c1" && b.target == "vdb"), "{left:?}");

    // While the domain is off nobody can look at the bitmaps, so a redefine is believed.
    hv.destroy(id).await.expect("destroy");
    hv.checkpoint_redefine(id, &checkpoint("c1", &["vdb"]), made[0].created_unix_s).await.expect("redefine offline");
    assert_eq!(guest.checkpoints().await, ["c1"]);
    guest.remove().await;
}

pub async fn bitmaps_after_a_crash(bench: &dyn Bench) {
    let guest = Guest::start(bench, "crash", &["qcow2"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let mut events = hv.events();
    let full = guest.backup(&[("vda", None)]);
    hv.backup_begin(id, &full, Some(&checkpoint("old", &["vda"]))).await.expect("full");
    guest.end_job().await;
    hv.destroy(id).await.expect("destroy");
    hv.start(id, StartOptions::default()).await.expect("start");
    let since = guest.backup(&[("vda", Some("old"))]);
    hv.backup_begin(id, &since, Some(&checkpoint("new", &["vda"]))).await.expect("incremental");
    bench.kill(&guest.vm().await).await;
    event(&mut events, id, "stopped", |k| matches!(k, Kind::Stopped { detail } if detail == "failed")).await;
    eventually("the host sees it off", async || !guest.vm().await.state.is_active()).await;

    hv.start(id, StartOptions::default()).await.expect("start after the crash");
    assert_eq!(guest.checkpoints().await, ["old", "new"], "the host believes in both still");
    let found = hv.bitmaps(id).await.expect("bitmaps");
    assert_eq!(found.len(), 1, "what was never saved is missing: {found:?}");
    assert!(found[0].name == "old" && found[0].inconsistent && !found[0].recording, "{found:?}");
    for name in ["old", "new"] {
        let since = guest.backup(&[("vda", Some(name))]);
        expect_kind(hv.backup_begin(id, &since, None).await, ErrorKind::CheckpointInconsistent);
    }
    expect_kind(hv.checkpoint_redefine(id, &checkpoint("old", &["vda"]), 5).await, ErrorKind::CheckpointInconsistent);
    // The way out that a backup takes.
    for name in ["new", "old"] {
        hv.checkpoint_delete(id, name, true).await.expect("forget");
    }
    hv.bitmap_remove(id, "vda", "old").await.expect("remove the broken bitmap");
    hv.backup_begin(id, &full, Some(&checkpoint("old", &["vda"]))).await.expect("full again, under the same name");
    guest.end_job().await;
    guest.remove().await;
}
