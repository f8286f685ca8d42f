//! Block jobs and migration.

use virtward_hypervisor::{
    BlockCopySpec, DomainEventKind as Kind, ErrorKind, MigrateSpec, StartOptions, UndefineOptions,
};
use virtward_model::VmState;

use crate::bench::{Bench, DISK_BYTES, Guest, checkpoint, event, eventually, expect_kind};

pub async fn copy_and_pivot(bench: &dyn Bench) {
    let guest = Guest::start(bench, "copy", &["qcow2"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let mut events = hv.events();
    assert_eq!(hv.block_job(id, "vda").await.expect("no job"), None);
    expect_kind(hv.block_job_end(id, "vda", false).await, ErrorKind::Invalid);
    let to = |name: &str, reuse| BlockCopySpec {
        path: guest.path(name).to_str().expect("UTF-8").to_owned(),
        format: "qcow2".into(),
        reuse,
        bandwidth_bytes_s: 0,
    };
    let before = guest.vm().await.disks[0].source.clone();

    hv.block_copy(id, "vda", &to("one", false)).await.expect("copy");
    expect_kind(hv.block_copy(id, "vda", &to("two", false)).await, ErrorKind::Busy);
    ready(&guest).await;
    hv.block_job_end(id, "vda", false).await.expect("cancel");
    event(
        &mut events,
        id,
        "the copy ended",
        |k| matches!(k, Kind::BlockJob { target, status } if target == "vda" && status != "ready"),
    )
    .await;
    eventually("no block job", async || hv.block_job(id, "vda").await.expect("job").is_none()).await;
    assert_eq!(guest.vm().await.disks[0].source, before);

    let spec = to("three", true);
    bench.make_image(&guest.path("three"), "qcow2", DISK_BYTES);
    hv.block_copy(id, "vda", &spec).await.expect("copy onto an existing file");
    ready(&guest).await;
    hv.block_job_end(id, "vda", true).await.expect("pivot");
    event(
        &mut events,
        id,
        "completed",
        |k| matches!(k, Kind::BlockJob { target, status } if target == "vda" && status == "completed"),
    )
    .await;
    assert_eq!(guest.vm().await.disks[0].source.path(), Some(spec.path.as_str()));
    hv.destroy(id).await.expect("destroy");
    assert_eq!(guest.vm().await.disks[0].source.path(), Some(spec.path.as_str()), "the definition follows the pivot");
    guest.remove().await;
}

async fn ready(guest: &Guest<'_>) {
    eventually("the copy is in step", async || {
        guest.hv.block_job(guest.uuid, "vda").await.expect("job").is_some_and(|j| j.ready && j.end_bytes > 0)
    })
    .await;
}

pub async fn migration_keeps_bitmaps_and_loses_checkpoints(bench: &dyn Bench) {
    let guest = Guest::start(bench, "move", &["qcow2"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let (there, destination, data_uri) = bench.other().await;
    let mut arrivals = there.events();
    let mut departures = hv.events();
    hv.backup_begin(id, &guest.backup(&[("vda", None)]), Some(&checkpoint("c1", &["vda"]))).await.expect("full");
    let spec =
        MigrateSpec { destination, data_uri, live: true, persist: true, force_unsafe: true, ..Default::default() };
    expect_kind(hv.migrate(id, &spec).await, ErrorKind::Busy);
    guest.end_job().await;
    let made = hv.checkpoints(id).await.expect("checkpoints");
    bench.guest_writes(id, "vda", 0, 64 << 10).await;

    hv.migrate(id, &spec).await.expect("migrate");
    event(&mut arrivals, id, "arrived", |k| matches!(k, Kind::Started { detail } if detail == "migrated")).await;
    event(&mut departures, id, "left", |k| matches!(k, Kind::Stopped { detail } if detail == "migrated")).await;
    expect_kind(hv.lookup(&guest.name).await, ErrorKind::NoDomain);
    assert_eq!(there.lookup(&guest.name).await.expect("there").state, VmState::Running);
    assert_eq!(there.checkpoints(id).await.expect("checkpoints"), []);
    let bitmaps = there.bitmaps(id).await.expect("bitmaps");
    assert_eq!(bitmaps.len(), 1);
    assert_eq!((bitmaps[0].name.as_str(), bitmaps[0].dirty_bytes), ("c1", 64 << 10));
    there.checkpoint_redefine(id, &checkpoint("c1", &["vda"]), made[0].created_unix_s).await.expect("redefine");
    there.backup_begin(id, &guest.backup(&[("vda", Some("c1"))]), None).await.expect("incremental over there");
    there.destroy(id).await.expect("destroy");

    // Persistent there: it can be started again, and goes with its definition.
    there.start(id, StartOptions::default()).await.expect("start");
    there.destroy(id).await.expect("destroy");
    there.undefine(id, UndefineOptions::default()).await.expect("undefine");
    let nowhere = MigrateSpec { destination: "qemu+tcp://127.0.0.1:1/system".into(), live: true, ..Default::default() };
    let stays = Guest::start(bench, "stay", &["qcow2"]).await;
    expect_kind(stays.hv.migrate(stays.uuid, &nowhere).await, ErrorKind::Unreachable);
    assert_eq!(stays.vm().await.state, VmState::Running);
    stays.remove().await;
}
