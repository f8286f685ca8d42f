//! The faults that a simulated host can be given, as a caller of the interface sees them.

use virtward_hypervisor::sim::{AgentMode, SimHost, SimWorld};
use virtward_hypervisor::{
    BackupDisk, BackupServer, BackupSpec, CheckpointSpec, DomainEventKind as Kind, ErrorKind, Hypervisor, StartOptions,
};
use virtward_model::{Vm, VmState};

const XML: &str = "<domain type='qemu'><name>web1</name><devices><disk type='file'><driver type='qcow2'/>\
    <source file='/s/web1.qcow2'/><target dev='vda'/></disk></devices></domain>";

async fn running() -> (SimHost, Vm) {
    let host = SimWorld::new().host("h1");
    let vm = host.define(XML).await.unwrap();
    host.start(vm.uuid, StartOptions::default()).await.unwrap();
    (host, vm)
}

async fn backup(host: &SimHost, vm: &Vm, since: Option<&str>, checkpoint: &str) -> Result<(), ErrorKind> {
    let disk = BackupDisk { target: "vda".into(), incremental: since.map(str::to_owned), scratch: "/s/scratch".into() };
    let spec =
        BackupSpec { server: BackupServer::Unix { path: "/s/nbd".into() }, disks: vec![disk], scratch_is_there: false };
    let checkpoint = CheckpointSpec { name: checkpoint.into(), description: String::new(), disks: vec!["vda".into()] };
    host.backup_begin(vm.uuid, &spec, Some(&checkpoint)).await.map_err(|e| e.kind)?;
    host.set_scratch_used(vm.uuid, 4096);
    let job = host.job(vm.uuid).await.unwrap().expect("the backup");
    assert_eq!(job.scratch_used_bytes, 4096);
    host.abort_job(vm.uuid).await.map_err(|e| e.kind)
}

#[tokio::test]
async fn a_power_cut_ends_everything_and_spoils_the_bitmaps() {
    let (host, vm) = running().await;
    assert_eq!(backup(&host, &vm, None, "c1").await, Ok(()));
    host.destroy(vm.uuid).await.unwrap();
    host.start(vm.uuid, StartOptions::default()).await.unwrap();
    assert_eq!(backup(&host, &vm, Some("c1"), "c2").await, Ok(()));
    let mut events = host.events();

    host.set_power(false);
    assert_eq!(host.list().await.unwrap_err().kind, ErrorKind::Unreachable);
    host.set_power(true);
    let heard: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.kind).collect();
    assert_eq!(heard, [Kind::ConnectionLost, Kind::ConnectionRestored]);
    assert_eq!(host.lookup("web1").await.unwrap().state, VmState::ShutOff);

    host.start(vm.uuid, StartOptions::default()).await.unwrap();
    for since in ["c1", "c2"] {
        assert_eq!(backup(&host, &vm, Some(since), "c3").await, Err(ErrorKind::CheckpointInconsistent), "{since}");
    }
}

#[tokio::test]
async fn bitmaps_that_vanish_or_spoil_behind_the_back() {
    for spoil in [false, true] {
        let (host, vm) = running().await;
        assert_eq!(backup(&host, &vm, None, "c1").await, Ok(()));
        match spoil {
            true => host.spoil_bitmap(vm.uuid, "vda", "c1"),
            false => host.lose_bitmap(vm.uuid, "vda", "c1"),
        }
        assert_eq!(backup(&host, &vm, Some("c1"), "c2").await, Err(ErrorKind::CheckpointInconsistent));
        host.lose_checkpoints(vm.uuid);
        assert_eq!(backup(&host, &vm, Some("c1"), "c2").await, Err(ErrorKind::NoCheckpoint));
    }
}

#[tokio::test]
async fn an_agent_that_lies_freezes_nothing() {
    let (host, vm) = running().await;
    host.set_agent(vm.uuid, AgentMode::Lying);
    assert_eq!(host.fs_freeze(vm.uuid).await.unwrap(), 1);
    assert_eq!(host.frozen(vm.uuid), 0);
    host.set_agent(vm.uuid, AgentMode::Answers { filesystems: 3 });
    assert_eq!(host.fs_freeze(vm.uuid).await.unwrap(), 3);
    assert_eq!(host.frozen(vm.uuid), 3);
}

#[tokio::test]
async fn ordered_failures_come_once_and_in_order() {
    let (host, vm) = running().await;
    host.fail_next("suspend", ErrorKind::Busy, "first");
    host.fail_next("suspend", ErrorKind::Other, "second");
    for (kind, message) in [(ErrorKind::Busy, "first"), (ErrorKind::Other, "second")] {
        let error = host.suspend(vm.uuid).await.unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (kind, message));
    }
    host.suspend(vm.uuid).await.unwrap();
    host.io_error(vm.uuid, "vda");
    assert_eq!(host.lookup("web1").await.unwrap().state, VmState::Paused);
}
