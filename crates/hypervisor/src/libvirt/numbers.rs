//! libvirt's typed parameters as our counters: domain stats and domain-wide jobs.

use uuid::Uuid;

use super::ffi::Params;
use crate::{DiskStats, DomainStats, JobInfo, JobKind, MigrationInfo, NetStats};

/// Most vCPUs, disks or interfaces read from one record; guards against a nonsensical count.
const GROUP_MAX: u64 = 4096;

/// Groups that [`stats`] reads.
pub(super) const GROUPS: u32 = virt_sys::VIR_DOMAIN_STATS_CPU_TOTAL
    | virt_sys::VIR_DOMAIN_STATS_BALLOON
    | virt_sys::VIR_DOMAIN_STATS_VCPU
    | virt_sys::VIR_DOMAIN_STATS_INTERFACE
    | virt_sys::VIR_DOMAIN_STATS_BLOCK
    | virt_sys::VIR_DOMAIN_STATS_DIRTYRATE;

/// Counters of one domain.
pub(super) fn stats(uuid: Uuid, name: String, p: &Params) -> DomainStats {
    let n = |key: &str| p.u64(key).unwrap_or(0);
    let kib = |key: &str| n(key).saturating_mul(1024);
    let count = |key: &str| n(key).min(GROUP_MAX);
    let delays: Vec<u64> = (0..count("vcpu.maximum")).filter_map(|i| p.u64(&format!("vcpu.{i}.delay"))).collect();
    DomainStats {
        uuid,
        name,
        cpu_time_ns: n("cpu.time"),
        vcpus: u32::try_from(n("vcpu.current")).unwrap_or(u32::MAX),
        cpu_delay_ns: (!delays.is_empty()).then(|| delays.iter().fold(0, |a: u64, d| a.saturating_add(*d))),
        memory_bytes: kib("balloon.current"),
        memory_rss_bytes: kib("balloon.rss"),
        dirty_rate_bytes_s: p.u64("dirtyrate.megabytes_per_second").map(|m| m.saturating_mul(1 << 20)),
        disks: (0..count("block.count")).filter_map(|i| disk(p, i)).collect(),
        nets: (0..count("net.count")).filter_map(|i| net(p, i)).collect(),
    }
}

fn disk(p: &Params, i: u64) -> Option<DiskStats> {
    let n = |key: &str| p.u64(&format!("block.{i}.{key}")).unwrap_or(0);
    Some(DiskStats {
        target: p.text(&format!("block.{i}.name"))?.to_owned(),
        path: p.text(&format!("block.{i}.path")).map(str::to_owned),
        read_ops: n("rd.reqs"),
        read_bytes: n("rd.bytes"),
        read_time_ns: n("rd.times"),
        write_ops: n("wr.reqs"),
        write_bytes: n("wr.bytes"),
        write_time_ns: n("wr.times"),
        flush_ops: n("fl.reqs"),
        allocation_bytes: n("allocation"),
        capacity_bytes: n("capacity"),
    })
}

fn net(p: &Params, i: u64) -> Option<NetStats> {
    let n = |key: &str| p.u64(&format!("net.{i}.{key}")).unwrap_or(0);
    let name = p.text(&format!("net.{i}.name"))?.to_owned();
    Some(NetStats { name, rx_bytes: n("rx.bytes"), tx_bytes: n("tx.bytes") })
}

/// A running domain-wide job; none if none runs.
pub(super) fn job(kind: u32, p: &Params) -> Option<JobInfo> {
    if !matches!(kind, virt_sys::VIR_DOMAIN_JOB_BOUNDED | virt_sys::VIR_DOMAIN_JOB_UNBOUNDED) {
        return None;
    }
    let n = |key: &str| p.u64(key).unwrap_or(0);
    let operation = p.u64("operation").and_then(|o| u32::try_from(o).ok());
    let kind = match operation {
        Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_BACKUP) => JobKind::Backup,
        Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT) => JobKind::MigrationOut,
        Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN) => JobKind::MigrationIn,
        _ => JobKind::Other,
    };
    // Backups count disk bytes only; migrations memory and disks together.
    let sum = |data: &str, disk: &str| p.u64(data).unwrap_or_else(|| n(disk));
    Some(JobInfo {
        kind,
        elapsed_ms: n("time_elapsed"),
        total_bytes: sum("data_total", "disk_total"),
        processed_bytes: sum("data_processed", "disk_processed"),
        remaining_bytes: sum("data_remaining", "disk_remaining"),
        scratch_used_bytes: n("disk_temp_used"),
        scratch_total_bytes: n("disk_temp_total"),
        migration: matches!(kind, JobKind::MigrationOut | JobKind::MigrationIn).then(|| migration(p)),
    })
}

fn migration(p: &Params) -> MigrationInfo {
    let n = |key: &str| p.u64(key).unwrap_or(0);
    MigrationInfo {
        memory_total_bytes: n("memory_total"),
        memory_processed_bytes: n("memory_processed"),
        memory_remaining_bytes: n("memory_remaining"),
        memory_bytes_s: n("memory_bps"),
        disk_total_bytes: n("disk_total"),
        disk_remaining_bytes: n("disk_remaining"),
        dirty_rate_bytes_s: n("memory_dirty_rate").saturating_mul(n("memory_page_size")),
        downtime_ms: p.u64("downtime"),
        iteration: n("memory_iteration"),
        throttle_percent: n("auto_converge_throttle"),
        postcopy_requests: n("memory_postcopy_requests"),
    }
}
