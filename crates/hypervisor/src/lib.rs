//! One interface to whatever runs the virtual machines, with two implementations behind it: libvirt, and a simulator
//! for what cannot be provoked for real. One contract suite (`contract`) holds both to the same behaviour.
//!
//! Invariants: no method blocks the async caller's thread; errors keep the hypervisor's own code and message;
//! `unsafe` stays inside `libvirt/ffi`. Not here: policy, retries beyond the connection, interpretation of backups.

mod error;
#[doc(hidden)]
pub mod fuzz;
pub mod libvirt;
pub mod sim;
mod types;
mod uri;
mod xml;

use async_trait::async_trait;
use tokio::sync::broadcast;
use uuid::Uuid;
use virtward_model::{Fit, HostOffer, Machine, Pool, Vm, Volume};

pub use error::{Error, ErrorKind, Result};
pub use types::*;
pub use uri::host_of;

/// The memory that a domain's XML gives to its guest, in bytes; none if that is not to be read from it.
pub fn memory_of(xml: &str) -> Option<u64> {
    xml::DomainXml::parse(xml).ok().map(|domain| domain.memory_bytes).filter(|bytes| *bytes > 0)
}

/// A connection to one host's hypervisor. Domains are named by UUID, which survives renames and migrations.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// Identity and versions of the host behind the connection.
    async fn host(&self) -> Result<HostInfo>;
    /// Every domain, active and inactive, sorted by name. A domain whose process hangs cannot be looked into; it is
    /// listed with the disks that were last seen, or none, and [`Hypervisor::lookup`] fails for it.
    async fn list(&self) -> Result<Vec<Vm>>;
    /// One domain by name or UUID text. [`ErrorKind::NoDomain`] if there is none.
    async fn lookup(&self, name_or_uuid: &str) -> Result<Vm>;
    /// The domain's XML, secrets included where the connection may see them.
    async fn xml(&self, vm: Uuid, view: XmlView) -> Result<String>;
    /// Defines (or redefines) a persistent domain and returns it.
    async fn define(&self, xml: &str) -> Result<Vm>;
    /// Removes the definition together with checkpoint and snapshot metadata; disks are left alone.
    async fn undefine(&self, vm: Uuid, options: UndefineOptions) -> Result<()>;
    /// Discards the memory that an inactive domain would resume from (`virsh managedsave`); whether there was any. Once
    /// its disks are other ones, resuming from it would ruin their file systems.
    async fn managed_save_remove(&self, _vm: Uuid) -> Result<bool> {
        Ok(false)
    }
    /// Whether an inactive domain would resume from saved memory.
    async fn managed_save(&self, _vm: Uuid) -> Result<bool> {
        Ok(false)
    }
    /// Whether a persistent domain starts with its host, before this call; from now on it does as `on` says.
    async fn set_autostart(&self, _vm: Uuid, _on: bool) -> Result<bool> {
        Ok(false)
    }
    /// Starts an inactive domain, paused if asked.
    async fn start(&self, vm: Uuid, options: StartOptions) -> Result<()>;
    /// Asks the guest to shut down (ACPI or agent); returns when asked, not when done.
    async fn shutdown(&self, vm: Uuid) -> Result<()>;
    /// Ends the domain's process at once.
    async fn destroy(&self, vm: Uuid) -> Result<()>;
    /// Stops vCPUs.
    async fn suspend(&self, vm: Uuid) -> Result<()>;
    /// Lets vCPUs run again.
    async fn resume(&self, vm: Uuid) -> Result<()>;
    /// Presses the reset button.
    async fn reset(&self, vm: Uuid) -> Result<()>;
    /// CPU, memory, disk and network counters of every active domain in one call.
    async fn stats(&self) -> Result<Vec<DomainStats>>;

    /// Sends one JSON command to the guest agent and returns its JSON answer. [`ErrorKind::AgentUnavailable`] if the
    /// agent is not configured, not connected or does not answer within `timeout_s`.
    async fn agent(&self, vm: Uuid, command: &str, timeout_s: u32) -> Result<String>;
    /// Freezes all guest file systems; the number frozen.
    async fn fs_freeze(&self, vm: Uuid) -> Result<u32>;
    /// Opens whatever [`Hypervisor::fs_thaw`] needs, so that the guest does not wait for that frozen. A failure shows there.
    async fn prepare_thaw(&self) {}
    /// Thaws all guest file systems; the number thawed.
    async fn fs_thaw(&self, vm: Uuid) -> Result<u32>;

    /// Begins a pull-mode backup, creating `checkpoint` at the same instant if given.
    async fn backup_begin(&self, vm: Uuid, spec: &BackupSpec, checkpoint: Option<&CheckpointSpec>) -> Result<()>;
    /// The backup job's XML if one runs (whoever started it).
    async fn backup_xml(&self, vm: Uuid) -> Result<Option<String>>;
    /// The domain-wide job that runs now (backup, migration …), if any.
    async fn job(&self, vm: Uuid) -> Result<Option<JobInfo>>;
    /// Ends the domain-wide job. For a pull-mode backup this is how it completes.
    async fn abort_job(&self, vm: Uuid) -> Result<()>;
    /// Checkpoints that the hypervisor knows of, oldest first.
    async fn checkpoints(&self, vm: Uuid) -> Result<Vec<CheckpointInfo>>;
    /// Makes an existing bitmap known again as a checkpoint, after its metadata was lost. Fails with
    /// [`ErrorKind::CheckpointInconsistent`] if a bitmap is missing or unusable.
    async fn checkpoint_redefine(&self, vm: Uuid, spec: &CheckpointSpec, created_unix_s: i64) -> Result<()>;
    /// Deletes a checkpoint and its bitmaps, or only the metadata.
    async fn checkpoint_delete(&self, vm: Uuid, name: &str, metadata_only: bool) -> Result<()>;
    /// The persistent bitmaps that QEMU holds for each disk of an active domain.
    async fn bitmaps(&self, vm: Uuid) -> Result<Vec<DiskBitmap>>;
    /// Each disk of an active domain with its virtual size in bytes, as QEMU serves it. Waits for whoever else asks QEMU
    /// something, where [`Hypervisor::stats`] would tell what was last seen, or guess from the file.
    async fn disk_sizes(&self, vm: Uuid) -> Result<Vec<(String, u64)>>;
    /// Removes one persistent bitmap from the active layer of a disk of an active domain, whatever made it.
    async fn bitmap_remove(&self, vm: Uuid, target: &str, bitmap: &str) -> Result<()>;
    /// One QMP command, answered with QEMU's `return` value. For what libvirt hides.
    async fn monitor(&self, vm: Uuid, command: &serde_json::Value) -> Result<serde_json::Value>;

    /// What became of the last domain-wide job that ended, as far as the hypervisor remembers. After a migration the
    /// destination tells.
    async fn job_done(&self, vm: Uuid) -> Result<Option<JobInfo>>;

    /// Starts mirroring a disk of a running domain to another image.
    async fn block_copy(&self, vm: Uuid, target: &str, spec: &BlockCopySpec) -> Result<()>;
    /// The block job on a disk, if any.
    async fn block_job(&self, vm: Uuid, target: &str) -> Result<Option<BlockJobInfo>>;
    /// Ends a block job: cancels it, or pivots to the copy.
    async fn block_job_end(&self, vm: Uuid, target: &str, pivot: bool) -> Result<()>;

    /// Migrates a domain to another host; returns when it runs there (or with the error that left it here).
    async fn migrate(&self, vm: Uuid, spec: &MigrateSpec) -> Result<()>;

    /// Changes a migration that runs, or the downtime limit of one that will. [`ErrorKind::WrongState`] for the rest if
    /// none runs.
    async fn migration_steer(&self, vm: Uuid, steer: Steer) -> Result<()>;

    /// What a domain asks of the host that runs it.
    async fn machine(&self, vm: Uuid) -> Result<Machine>;
    /// What this host offers.
    async fn offer(&self) -> Result<HostOffer>;
    /// Whether this host's hypervisor can run such a machine; `cpu` is the `<cpu>` that the guest sees, if it is known.
    async fn fit(&self, machine: &Machine, cpu: Option<&str>) -> Result<Fit>;
    /// The `<cpu>` with all that this host can give to such a machine.
    async fn host_cpu(&self, machine: &Machine) -> Result<String>;
    /// The `<cpu>` that hosts with these CPUs have in common.
    async fn cpu_baseline(&self, machine: &Machine, cpus: &[String]) -> Result<String>;

    /// Storage pools, sorted by name.
    async fn pools(&self) -> Result<Vec<Pool>>;
    /// The image at an absolute path of the host, if there is one.
    async fn volume(&self, path: &str) -> Result<Option<Volume>>;
    /// Free in a directory of the host, in bytes.
    async fn room(&self, directory: &str) -> Result<u64>;
    /// Makes an empty, thin image at an absolute path where nothing is; its directory must exist.
    async fn volume_create(&self, path: &str, format: &str, capacity_bytes: u64) -> Result<()>;
    /// Removes the image at an absolute path; whether there was one.
    async fn volume_remove(&self, path: &str) -> Result<bool>;

    /// Subscribes to domain events. Lagging receivers lose the oldest; a lost connection is announced by
    /// [`DomainEventKind::ConnectionLost`] and its return by [`DomainEventKind::ConnectionRestored`].
    fn events(&self) -> broadcast::Receiver<DomainEvent>;
    /// Closes the connection and ends its threads. Safe to call twice.
    async fn close(&self);
}
