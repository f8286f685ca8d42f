//! Arguments and answers of the [`crate::Hypervisor`] calls.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The host behind a connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostInfo {
    /// Host name as the hypervisor gives it.
    pub name: String,
    /// Host UUID.
    pub uuid: Uuid,
    /// libvirt version, `major*1_000_000 + minor*1_000 + release`.
    pub libvirt_version: u64,
    /// QEMU version, same encoding; 0 if unknown.
    pub qemu_version: u64,
    /// URI in the hypervisor's own words.
    pub uri: String,
}

/// Which XML is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XmlView {
    /// What runs now (same as `Inactive` when nothing runs).
    Live,
    /// What the next start would use.
    Inactive,
    /// What runs now, without runtime state, as another host would accept it.
    Migratable,
}

/// Options of undefine.
#[derive(Clone, Copy, Debug, Default)]
pub struct UndefineOptions {
    /// Also delete the NVRAM file; otherwise it is kept.
    pub delete_nvram: bool,
}

/// Options of start.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartOptions {
    /// Create the process with vCPUs stopped.
    pub paused: bool,
    /// End the process when the connection ends, so that whoever needed it for a moment leaves nothing behind.
    pub ends_with_us: bool,
}

/// Counters of one active domain. Monotonic since the domain's start, except memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DomainStats {
    /// Domain.
    pub uuid: Uuid,
    /// Domain name.
    pub name: String,
    /// CPU time used, in nanoseconds.
    pub cpu_time_ns: u64,
    /// vCPUs online.
    pub vcpus: u32,
    /// Time that vCPUs waited for a physical CPU, in nanoseconds, summed; absent where the host does not tell.
    pub cpu_delay_ns: Option<u64>,
    /// Current balloon size, in bytes.
    pub memory_bytes: u64,
    /// Resident set of the QEMU process, in bytes.
    pub memory_rss_bytes: u64,
    /// Dirty rate if it was measured, in bytes per second.
    pub dirty_rate_bytes_s: Option<u64>,
    /// Per disk.
    pub disks: Vec<DiskStats>,
    /// Per network interface.
    pub nets: Vec<NetStats>,
}

/// Counters of one disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskStats {
    /// Target name.
    pub target: String,
    /// Host path, if any.
    pub path: Option<String>,
    /// Read requests.
    pub read_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Time spent in reads, in nanoseconds.
    pub read_time_ns: u64,
    /// Write requests.
    pub write_ops: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Time spent in writes, in nanoseconds.
    pub write_time_ns: u64,
    /// Flush requests.
    pub flush_ops: u64,
    /// Bytes allocated in the image.
    pub allocation_bytes: u64,
    /// Virtual size in bytes.
    pub capacity_bytes: u64,
}

/// Counters of one network interface.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NetStats {
    /// Host-side interface name.
    pub name: String,
    /// Bytes received by the guest.
    pub rx_bytes: u64,
    /// Bytes sent by the guest.
    pub tx_bytes: u64,
}

/// Where the backup's NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupServer {
    /// A Unix socket that QEMU creates at this absolute path on the host.
    Unix {
        /// Socket path.
        path: String,
    },
    /// A TCP port on the host. The port is not chosen by libvirt.
    Tcp {
        /// Address to listen on.
        address: String,
        /// Port.
        port: u16,
        /// Use the host's TLS environment (`default_tls_x509_cert_dir`).
        tls: bool,
    },
}

/// One disk of a pull-mode backup. Disks not named are left out of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDisk {
    /// Target name, also the NBD export name.
    pub target: String,
    /// Checkpoint since which changes are exported as bitmap `backup-<target>`; none for a full backup.
    pub incremental: Option<String>,
    /// qcow2 scratch (fleecing) image on the host.
    pub scratch: String,
}

/// A pull-mode backup job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupSpec {
    /// NBD server.
    pub server: BackupServer,
    /// Disks.
    pub disks: Vec<BackupDisk>,
    /// The scratch images are there, empty and as large as their disks; else the hypervisor makes them, which takes time
    /// while the guest may be frozen.
    pub scratch_is_there: bool,
}

/// A checkpoint to create or redefine: one bitmap of that name on each disk named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSpec {
    /// Name of the checkpoint and of its bitmaps.
    pub name: String,
    /// Free text shown by other tools.
    pub description: String,
    /// Target names that get a bitmap; others get none.
    pub disks: Vec<String>,
}

/// A checkpoint that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Name.
    pub name: String,
    /// Creation time, seconds since 1970.
    pub created_unix_s: i64,
    /// Parent checkpoint.
    pub parent: Option<String>,
    /// Targets that have a bitmap, with the size of the disk then, in bytes; 0 where the hypervisor did not record it
    /// (libvirt never does).
    pub disks: Vec<(String, u64)>,
}

/// A dirty bitmap of the active layer of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBitmap {
    /// Target name.
    pub target: String,
    /// Bitmap name.
    pub name: String,
    /// Bytes per bit.
    pub granularity_bytes: u64,
    /// Kept in the image when QEMU closes it.
    pub persistent: bool,
    /// Records writes now.
    pub recording: bool,
    /// Was not saved cleanly and cannot be used.
    pub inconsistent: bool,
    /// Held by a job.
    pub busy: bool,
    /// Dirty bytes as QEMU counts them.
    pub dirty_bytes: u64,
}

/// The kind of a domain-wide job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Backup.
    Backup,
    /// Outgoing migration.
    MigrationOut,
    /// Incoming migration.
    MigrationIn,
    /// Snapshot, save, dump.
    Other,
}

/// Progress of a domain-wide job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobInfo {
    /// Kind.
    pub kind: JobKind,
    /// Time since it began, in milliseconds.
    pub elapsed_ms: u64,
    /// Bytes in all, as far as known.
    pub total_bytes: u64,
    /// Bytes done.
    pub processed_bytes: u64,
    /// Bytes left.
    pub remaining_bytes: u64,
    /// Backup: bytes of scratch space in use.
    pub scratch_used_bytes: u64,
    /// Backup: bytes of scratch space in all.
    pub scratch_total_bytes: u64,
    /// What only a migration tells.
    pub migration: Option<MigrationInfo>,
}

/// Progress of a migration, or what it came to. Bytes of memory unless disks are named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// Memory in all.
    pub memory_total_bytes: u64,
    /// Memory sent, more than once included.
    pub memory_processed_bytes: u64,
    /// Memory left in this pass.
    pub memory_remaining_bytes: u64,
    /// Memory sent per second of late.
    pub memory_bytes_s: u64,
    /// Non-shared disks in all; 0 without any.
    pub disk_total_bytes: u64,
    /// Non-shared disks: left.
    pub disk_remaining_bytes: u64,
    /// Memory that the guest dirties per second.
    pub dirty_rate_bytes_s: u64,
    /// While it runs: expected downtime. When it is done: from the stop of the vCPUs here to their run there. In
    /// milliseconds.
    pub downtime_ms: Option<u64>,
    /// Number of the pass over memory; 0 before the first.
    pub iteration: u64,
    /// How much of their time the vCPUs are held back by auto-converge, in percent.
    pub throttle_percent: u64,
    /// Pages that the guest asked for after a switch to post-copy.
    pub postcopy_requests: u64,
}

/// Target of a block copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockCopySpec {
    /// Absolute path of the new image; created by the caller if `reuse`.
    pub path: String,
    /// Format of the new image.
    pub format: String,
    /// The file exists with the right size.
    pub reuse: bool,
    /// Limit in bytes per second; 0 is none.
    pub bandwidth_bytes_s: u64,
}

/// Progress of a block job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobInfo {
    /// Bytes done.
    pub current_bytes: u64,
    /// Bytes in all.
    pub end_bytes: u64,
    /// The copy is in step with the source and can be pivoted to.
    pub ready: bool,
}

/// A migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MigrateSpec {
    /// libvirt URI of the destination.
    pub destination: String,
    /// `tcp://address[:port]` for the data; none lets libvirt choose.
    pub data_uri: Option<String>,
    /// Running VM stays running.
    pub live: bool,
    /// Copy non-shared disks too.
    pub with_storage: bool,
    /// Keep the definition at the destination, remove it at the source.
    pub persist: bool,
    /// Skip libvirt's checks of cache modes and shared storage.
    pub force_unsafe: bool,
    /// Non-shared disks to copy, by target; empty for all.
    pub disks: Vec<String>,
    /// Allow a switch to post-copy.
    pub postcopy: bool,
    /// Throttle the guest's CPUs until it converges.
    pub auto_converge: bool,
    /// Number of parallel connections; 0 is one without multifd.
    pub parallel: u32,
    /// How memory is compressed.
    pub compression: Option<Compression>,
    /// Encrypt and authenticate the data by the hosts' own certificates.
    pub tls: bool,
    /// Name that the destination's certificate must have; none takes it from the address.
    pub tls_name: Option<String>,
    /// Bandwidth in MiB/s; 0 is none.
    pub bandwidth_mib_s: u64,
}

/// How a migration compresses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// zstd, over parallel connections.
    Zstd,
    /// zlib, over parallel connections.
    Zlib,
    /// Differences to pages sent before, on one connection.
    Xbzrle,
}

/// A change to a migration that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// Switch over when the rest is expected to take no longer than this.
    MaxDowntime {
        /// Milliseconds.
        ms: u64,
    },
    /// Send no faster than this.
    Bandwidth {
        /// MiB/s.
        mib_s: u64,
    },
    /// Run the guest at the destination now and fetch the rest of its memory as it is needed. Needs
    /// [`MigrateSpec::postcopy`]. From here on a failure of either host or the network loses the running guest.
    Postcopy,
}

/// Something happened to a domain or to the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEvent {
    /// The domain; nil for events of the connection.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// What.
    pub kind: DomainEventKind,
}

/// Kinds of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainEventKind {
    /// Defined or changed.
    Defined,
    /// Undefined.
    Undefined,
    /// Started, for whatever reason (`booted`, `migrated`, `restored` …).
    Started {
        /// libvirt's detail.
        detail: String,
    },
    /// vCPUs stopped.
    Suspended {
        /// libvirt's detail (`paused`, `ioerror`, `migrated` …).
        detail: String,
    },
    /// vCPUs run again.
    Resumed {
        /// libvirt's detail.
        detail: String,
    },
    /// Process gone.
    Stopped {
        /// libvirt's detail (`shutdown`, `destroyed`, `crashed`, `migrated`, `failed` …).
        detail: String,
    },
    /// Guest crashed (pvpanic).
    Crashed,
    /// Guest was reset.
    Rebooted,
    /// Guest's watchdog fired.
    Watchdog,
    /// I/O error on a disk.
    IoError {
        /// Target name.
        target: String,
    },
    /// Guest agent connected or disconnected.
    Agent {
        /// Whether it is connected now.
        connected: bool,
    },
    /// A block job changed state.
    BlockJob {
        /// Target name.
        target: String,
        /// libvirt's status (`completed`, `failed`, `canceled`, `ready`).
        status: String,
    },
    /// A domain-wide job ended.
    JobCompleted,
    /// A migration begins another pass over memory.
    MigrationPass {
        /// Number of the pass.
        iteration: u64,
    },
    /// The connection broke; calls fail until it is restored.
    ConnectionLost,
    /// The connection works again; state must be read anew.
    ConnectionRestored,
}
