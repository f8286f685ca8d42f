//! What the contract needs of whatever it is held against, and small helpers of its parts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::broadcast;
use uuid::Uuid;
use virtward_hypervisor::{
    BackupDisk, BackupServer, BackupSpec, CheckpointSpec, DomainEvent, DomainEventKind, ErrorKind, Hypervisor, Result,
    StartOptions, UndefineOptions,
};
use virtward_model::Vm;

/// Longest wait for anything that happens by itself.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A host under test, a second one to migrate to, and hands to reach around the interface.
#[async_trait]
pub trait Bench: Send + Sync {
    /// The host.
    fn hypervisor(&self) -> Arc<dyn Hypervisor>;
    /// The other host and the URI under which the first one reaches it.
    async fn other(&self) -> (Arc<dyn Hypervisor>, String, Option<String>);
    /// A directory for images and sockets that both hosts see.
    fn dir(&self) -> &Path;
    /// Makes an image; size in bytes.
    fn make_image(&self, path: &Path, format: &str, size: u64);
    /// A running guest with an agent, a data disk, and at least one file system to freeze.
    async fn agent_guest(&self) -> Uuid;
    /// Makes the agent of [`Bench::agent_guest`] stop answering without going away.
    async fn hang_agent(&self, vm: Uuid);
    /// Writes to a disk of a running guest as the guest would.
    async fn guest_writes(&self, vm: Uuid, target: &str, offset: u64, length: u64);
    /// Kills the QEMU process.
    async fn kill(&self, vm: &Vm);
    /// Restarts the daemon behind the connection.
    async fn restart_daemon(&self);
    /// Whether an NBD server greets at this socket.
    fn serves_nbd(&self, socket: &Path) -> bool;
}

/// The disks of a [`Guest`]: format and size.
pub const DISK_BYTES: u64 = 32 << 20;

/// A small guest without an operating system, gone when the part ends.
pub struct Guest<'a> {
    pub bench: &'a dyn Bench,
    pub hv: Arc<dyn Hypervisor>,
    pub name: String,
    pub uuid: Uuid,
}

impl<'a> Guest<'a> {
    /// Defines a guest with a qcow2 disk per format (`vda`, `vdb`, …) and an agent channel that nobody serves.
    pub async fn define(bench: &'a dyn Bench, part: &str, formats: &[&str]) -> Guest<'a> {
        let hv = bench.hypervisor();
        let name = format!("{part}-{:08x}", Uuid::new_v4().as_fields().0);
        let mut disks = String::new();
        for (format, letter) in formats.iter().zip('a'..='z') {
            let path = bench.dir().join(format!("{name}-vd{letter}.{format}"));
            bench.make_image(&path, format, DISK_BYTES);
            disks += &disk_xml(&path, format, &format!("vd{letter}"));
        }
        let vm = hv.define(&domain_xml(&name, &disks)).await.expect("define");
        Guest { bench, hv, name, uuid: vm.uuid }
    }

    /// [`Guest::define`] and start.
    pub async fn start(bench: &'a dyn Bench, part: &str, formats: &[&str]) -> Guest<'a> {
        let guest = Guest::define(bench, part, formats).await;
        guest.hv.start(guest.uuid, StartOptions::default()).await.expect("start");
        guest
    }

    /// The guest as the host sees it now.
    pub async fn vm(&self) -> Vm {
        self.hv.lookup(&self.name).await.expect("lookup")
    }

    /// A path in the shared directory that belongs to this guest.
    pub fn path(&self, what: &str) -> PathBuf {
        self.bench.dir().join(format!("{}-{what}", self.name))
    }

    /// A backup of these disks, each since the checkpoint given.
    pub fn backup(&self, disks: &[(&str, Option<&str>)]) -> BackupSpec {
        let text = |p: PathBuf| p.to_str().expect("UTF-8").to_owned();
        BackupSpec {
            server: BackupServer::Unix { path: text(self.path("nbd.sock")) },
            disks: disks
                .iter()
                .map(|(target, since)| BackupDisk {
                    target: (*target).to_owned(),
                    incremental: since.map(str::to_owned),
                    scratch: text(self.path(&format!("{target}.scratch"))),
                })
                .collect(),
            scratch_is_there: false,
        }
    }

    /// Ends the job and waits until it is gone.
    pub async fn end_job(&self) {
        self.hv.abort_job(self.uuid).await.expect("abort");
        eventually("the job ends", async || self.hv.job(self.uuid).await.expect("job").is_none()).await;
    }

    /// Names of the checkpoints, in order.
    pub async fn checkpoints(&self) -> Vec<String> {
        self.hv.checkpoints(self.uuid).await.expect("checkpoints").into_iter().map(|c| c.name).collect()
    }

    /// Ends and removes the guest.
    pub async fn remove(self) {
        let _ = self.hv.destroy(self.uuid).await;
        self.hv.undefine(self.uuid, UndefineOptions::default()).await.expect("undefine");
        let gone = self.hv.lookup(&self.name).await;
        expect_kind(gone, ErrorKind::NoDomain);
    }
}

/// A checkpoint on these disks.
pub fn checkpoint(name: &str, disks: &[&str]) -> CheckpointSpec {
    let disks = disks.iter().map(|d| (*d).to_owned()).collect();
    CheckpointSpec { name: name.into(), description: "made by <the> contract & co".into(), disks }
}

/// One `<disk>`.
pub fn disk_xml(path: &Path, format: &str, target: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
         <target dev='{target}' bus='virtio'/></disk>",
        path.display()
    )
}

/// A guest that does nothing but exist.
pub fn domain_xml(name: &str, disks: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name>\
         <metadata><v:note xmlns:v='urn:virtward:contract' level='gold'>kept &amp; safe</v:note></metadata>\
         <memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><cpu mode='custom'><model>qemu64</model></cpu>\
         <devices>{disks}<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <memballoon model='none'/></devices></domain>"
    )
}

/// Requires a failure of this kind; its message comes along for a closer look.
#[track_caller]
pub fn expect_kind<T: std::fmt::Debug>(outcome: Result<T>, kind: ErrorKind) -> String {
    match outcome {
        Err(e) if e.kind == kind => {
            assert!(!e.message.is_empty() && !e.call.is_empty(), "an error that says nothing: {e:?}");
            e.to_string()
        }
        other => panic!("expected {kind:?}, got {other:?}"),
    }
}

/// Waits until the condition holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for an event of this domain (nil: of the connection) that `wanted` accepts.
pub async fn event(
    events: &mut broadcast::Receiver<DomainEvent>,
    vm: Uuid,
    what: &str,
    wanted: impl Fn(&DomainEventKind) -> bool,
) {
    let mut seen = Vec::new();
    let search = async {
        loop {
            let event = events.recv().await.expect("the event stream ended");
            if event.uuid == vm && wanted(&event.kind) {
                return;
            }
            seen.push(event);
        }
    };
    if tokio::time::timeout(PATIENCE, search).await.is_err() {
        panic!("no event within {PATIENCE:?}: {what}; seen: {seen:?}");
    }
}
