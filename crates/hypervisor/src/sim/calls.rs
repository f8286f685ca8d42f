//! The trait's methods on a simulated host.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use uuid::Uuid;
use virtward_model::{Fit, HostOffer, Machine, Pool, Vm, VmState, Volume};

use super::disk::Bitmap;
use super::domain::{Domain, Job};
use super::{AgentMode, Around, Outcome, SimHost, VERSIONS, announce, no_domain, refuse};
use crate::{
    BackupSpec, BlockCopySpec, BlockJobInfo, CheckpointInfo, CheckpointSpec, DiskBitmap, DiskStats, DomainEvent,
    DomainEventKind, DomainStats, ErrorKind, HostInfo, Hypervisor, JobInfo, JobKind, MigrateSpec, MigrationInfo,
    Result, StartOptions, Steer, UndefineOptions, XmlView, xml,
};

/// The CPU of every simulated host.
const CPU: &str = "<cpu mode='custom' match='exact'><model>qemu64</model></cpu>";

#[async_trait]
impl Hypervisor for SimHost {
    async fn host(&self) -> Result<HostInfo> {
        self.call("host", "describe the host", |world, name| {
            let uuid = world.hosts.get(name).map(|h| h.uuid).unwrap_or_default();
            let (libvirt_version, qemu_version) = VERSIONS;
            Ok(HostInfo { name: name.to_owned(), uuid, libvirt_version, qemu_version, uri: self.uri() })
        })
    }

    async fn list(&self) -> Result<Vec<Vm>> {
        self.call("list", "list the domains", |world, name| {
            let mut vms: Vec<_> = world.hosts[name].domains.values().map(Domain::vm).collect();
            vms.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(vms)
        })
    }

    async fn lookup(&self, name_or_uuid: &str) -> Result<Vm> {
        self.call("lookup", &format!("find {name_or_uuid}"), |world, name| {
            let domains = &world.hosts[name].domains;
            let by_uuid = Uuid::try_parse(name_or_uuid).ok().and_then(|u| domains.get(&u));
            let found = by_uuid.or_else(|| domains.values().find(|d| d.name == name_or_uuid));
            found.map(Domain::vm).ok_or_else(|| no_domain(name_or_uuid))
        })
    }

    async fn xml(&self, vm: Uuid, _view: XmlView) -> Result<String> {
        self.on("xml", "read the XML of", vm, |d, _| Ok(d.xml.clone()))
    }

    async fn define(&self, xml: &str) -> Result<Vm> {
        self.call("define", "define a domain", |world, name| {
            let mut new = Domain::define(xml)?;
            let Some(host) = world.hosts.get_mut(name) else { return Err(no_domain(name)) };
            if host.domains.values().any(|d| d.name == new.name && d.uuid != new.uuid) {
                let message = format!("operation failed: domain '{}' already exists with another uuid", new.name);
                return Err(refuse(ErrorKind::Invalid, message));
            }
            if let Some(old) = host.domains.remove(&new.uuid) {
                new.checkpoints = old.checkpoints;
                if old.state.is_active() {
                    // What runs keeps running as it is; only the definition changes.
                    (new.state, new.disks, new.live) = (old.state, old.disks, old.live);
                    (new.job, new.agent, new.frozen) = (old.job, old.agent, old.frozen);
                }
            }
            announce(&host.events, &new, DomainEventKind::Defined);
            let vm = new.vm();
            host.domains.insert(new.uuid, new);
            Ok(vm)
        })
    }

    async fn undefine(&self, vm: Uuid, _options: UndefineOptions) -> Result<()> {
        self.on("undefine", "undefine", vm, |d, around| {
            d.persistent = false;
            d.checkpoints.clear();
            around.gone = !d.state.is_active();
            around.announce(d, DomainEventKind::Undefined);
            Ok(())
        })
    }

    async fn start(&self, vm: Uuid, options: StartOptions) -> Result<()> {
        self.on("start", "start", vm, |d, around| {
            if d.state.is_active() {
                return Err(refuse(
                    ErrorKind::WrongState,
                    "Requested operation is not valid: domain is already running",
                ));
            }
            d.state = if options.paused { VmState::Paused } else { VmState::Running };
            d.open_disks(around.world);
            around.announce(d, DomainEventKind::Started { detail: "booted".into() });
            Ok(())
        })
    }

    async fn shutdown(&self, vm: Uuid) -> Result<()> {
        self.on("shutdown", "shut down", vm, |d, around| {
            d.active()?;
            // A guest with an agent is a guest with an operating system, which obeys.
            if matches!(d.agent, AgentMode::Answers { .. }) {
                d.end(around, true, "shutdown");
            }
            Ok(())
        })
    }

    async fn destroy(&self, vm: Uuid) -> Result<()> {
        self.on("destroy", "end", vm, |d, around| {
            d.active()?;
            d.end(around, true, "destroyed");
            Ok(())
        })
    }

    async fn suspend(&self, vm: Uuid) -> Result<()> {
        self.on("suspend", "suspend", vm, |d, around| {
            d.active()?;
            if d.state != VmState::Paused {
                d.state = VmState::Paused;
                around.announce(d, DomainEventKind::Suspended { detail: "paused".into() });
            }
            Ok(())
        })
    }

    async fn resume(&self, vm: Uuid) -> Result<()> {
        self.on("resume", "resume", vm, |d, around| {
            d.active()?;
            if d.state == VmState::Running {
                return Err(refuse(
                    ErrorKind::WrongState,
                    "Requested operation is not valid: domain is already running",
                ));
            }
            d.state = VmState::Running;
            around.announce(d, DomainEventKind::Resumed { detail: "unpaused".into() });
            Ok(())
        })
    }

    async fn reset(&self, vm: Uuid) -> Result<()> {
        self.on("reset", "reset", vm, |d, around| {
            d.active()?;
            d.frozen = 0;
            around.announce(d, DomainEventKind::Rebooted);
            Ok(())
        })
    }

    async fn stats(&self) -> Result<Vec<DomainStats>> {
        self.call("stats", "read the domains' statistics", |world, name| {
            let images = &world.images;
            let size = |path: &str| images.get(path).map_or(0, |i| i.size_bytes);
            Ok(world.hosts[name].domains.values().filter(|d| d.state.is_active()).map(|d| stats(d, size)).collect())
        })
    }

    async fn agent(&self, vm: Uuid, command: &str, timeout_s: u32) -> Result<String> {
        self.agent_call("agent", "ask the guest agent of", vm, command, timeout_s).await
    }

    async fn fs_freeze(&self, vm: Uuid) -> Result<u32> {
        self.freeze_call("fs_freeze", "freeze the file systems of", vm, "guest-fsfreeze-freeze").await
    }

    async fn fs_thaw(&self, vm: Uuid) -> Result<u32> {
        self.freeze_call("fs_thaw", "thaw the file systems of", vm, "guest-fsfreeze-thaw").await
    }

    async fn backup_begin(&self, vm: Uuid, spec: &BackupSpec, checkpoint: Option<&CheckpointSpec>) -> Result<()> {
        self.on("backup_begin", "begin a backup of", vm, |d, around| {
            d.active()?;
            d.idle()?;
            for disk in &spec.disks {
                d.disk(&disk.target)?;
                if let Some(name) = &disk.incremental {
                    usable(d, name, &disk.target)?;
                }
            }
            if let Some(checkpoint) = checkpoint {
                make_checkpoint(d, around, checkpoint)?;
            }
            d.job = Some(Job { kind: JobKind::Backup, backup: Some(spec.clone()), scratch_used_bytes: 0 });
            Ok(())
        })
    }

    async fn backup_xml(&self, vm: Uuid) -> Result<Option<String>> {
        self.on("backup_xml", "read the backup job of", vm, |d, _| {
            let targets: Vec<_> = d.disks.iter().map(|d| d.target.as_str()).collect();
            Ok(d.job.as_ref().and_then(|j| j.backup.as_ref()).map(|spec| xml::backup(spec, &targets)))
        })
    }

    async fn job(&self, vm: Uuid) -> Result<Option<JobInfo>> {
        self.on("job", "read the job of", vm, |d, around| {
            let Some(job) = &d.job else { return Ok(None) };
            let targets = job.backup.iter().flat_map(|b| &b.disks).map(|disk| disk.target.as_str());
            let paths = targets.filter_map(|t| d.disk(t).ok()?.source.path().map(str::to_owned));
            let total = paths.map(|p| around.world.image(&p).size_bytes).sum();
            Ok(Some(JobInfo {
                kind: job.kind,
                elapsed_ms: 0,
                total_bytes: 0,
                processed_bytes: 0,
                remaining_bytes: 0,
                scratch_used_bytes: job.scratch_used_bytes,
                scratch_total_bytes: total,
                migration: None,
            }))
        })
    }

    async fn abort_job(&self, vm: Uuid) -> Result<()> {
        self.on("abort_job", "abort the job of", vm, |d, around| {
            d.active()?;
            if d.job.is_none() {
                let message = "Requested operation is not valid: no job is active on the domain";
                return Err(refuse(ErrorKind::WrongState, message));
            }
            d.end_job(around);
            Ok(())
        })
    }

    async fn job_done(&self, vm: Uuid) -> Result<Option<JobInfo>> {
        self.on("job_done", "read the last job of", vm, |d, _| Ok(d.done.clone()))
    }

    async fn checkpoints(&self, vm: Uuid) -> Result<Vec<CheckpointInfo>> {
        self.on("checkpoints", "list the checkpoints of", vm, |d, _| {
            let mut list = d.checkpoints.clone();
            list.sort_by_key(|c| c.created_unix_s);
            Ok(list)
        })
    }

    async fn checkpoint_redefine(&self, vm: Uuid, spec: &CheckpointSpec, created_unix_s: i64) -> Result<()> {
        let verb = format!("redefine checkpoint {} of", spec.name);
        self.on("checkpoint_redefine", &verb, vm, |d, _| {
            for target in &spec.disks {
                if d.state.is_active() && d.bitmaps(target)?.get(&spec.name).is_none_or(|b| b.inconsistent) {
                    return Err(broken(&spec.name, target));
                }
            }
            d.checkpoints.retain(|c| c.name != spec.name);
            let parent = d.checkpoints.last().map(|c| c.name.clone());
            d.checkpoints.push(CheckpointInfo {
                name: spec.name.clone(),
                created_unix_s,
                parent,
                disks: spec.disks.iter().map(|t| (t.clone(), 0)).collect(),
            });
            Ok(())
        })
    }

    async fn checkpoint_delete(&self, vm: Uuid, name: &str, metadata_only: bool) -> Result<()> {
        self.on("checkpoint_delete", &format!("delete checkpoint {name} of"), vm, |d, _| {
            let index = d.checkpoints.iter().position(|c| c.name == name).ok_or_else(|| no_checkpoint(name))?;
            if !metadata_only {
                if !d.state.is_active() {
                    let message = "Operation not supported: cannot delete checkpoint for inactive domain";
                    return Err(refuse(ErrorKind::WrongState, message));
                }
                let targets: Vec<_> = d.checkpoints[index].disks.iter().map(|(t, _)| t.clone()).collect();
                for target in &targets {
                    if !d.bitmaps(target)?.contains_key(name) {
                        let message =
                            format!("internal error: bitmap '{name}' not found in backing chain of '{target}'");
                        return Err(refuse(ErrorKind::CheckpointInconsistent, message));
                    }
                }
                for target in &targets {
                    d.bitmaps(target)?.remove(name);
                }
            }
            d.checkpoints.remove(index);
            Ok(())
        })
    }

    async fn bitmaps(&self, vm: Uuid) -> Result<Vec<DiskBitmap>> {
        self.on("bitmaps", "list the bitmaps of", vm, |d, _| {
            d.active()?;
            let all =
                d.live.iter().flat_map(|(target, bitmaps)| bitmaps.iter().map(move |(name, b)| (target, name, b)));
            Ok(all
                .map(|(target, name, b)| DiskBitmap {
                    target: target.clone(),
                    name: name.clone(),
                    granularity_bytes: super::disk::GRANULARITY,
                    persistent: true,
                    recording: !b.inconsistent,
                    inconsistent: b.inconsistent,
                    busy: false,
                    dirty_bytes: b.dirty_bytes(),
                })
                .collect())
        })
    }

    async fn disk_sizes(&self, vm: Uuid) -> Result<Vec<(String, u64)>> {
        self.on("disk_sizes", "read the disks' sizes of", vm, |d, around| {
            d.active()?;
            let size = |path: &str| around.world.images.get(path).map_or(0, |image| image.size_bytes);
            Ok(d.disks.iter().map(|disk| (disk.target.clone(), disk.source.path().map_or(0, size))).collect())
        })
    }

    async fn bitmap_remove(&self, vm: Uuid, target: &str, bitmap: &str) -> Result<()> {
        self.on("bitmap_remove", &format!("remove bitmap {bitmap} from {target} of"), vm, |d, _| {
            d.active()?;
            d.disk(target)?;
            let removed = d.live.get_mut(target).and_then(|l| l.remove(bitmap));
            removed.map(drop).ok_or_else(|| refuse(ErrorKind::Invalid, format!("Dirty bitmap '{bitmap}' not found")))
        })
    }

    async fn monitor(&self, vm: Uuid, command: &Value) -> Result<Value> {
        self.on("monitor", "send a QMP command to", vm, |d, _| {
            d.active()?;
            match command.get("execute").and_then(Value::as_str) {
                Some("query-status") => {
                    let running = d.state == VmState::Running;
                    Ok(json!({ "status": if running { "running" } else { "paused" }, "running": running }))
                }
                Some(other) => Err(refuse(ErrorKind::Unsupported, format!("The command {other} has not been found"))),
                None => Err(refuse(ErrorKind::Invalid, "QMP input lacks member 'execute'")),
            }
        })
    }

    async fn block_copy(&self, vm: Uuid, target: &str, spec: &BlockCopySpec) -> Result<()> {
        self.on("block_copy", &format!("copy disk {target} of"), vm, |d, _| {
            d.active()?;
            d.disk(target)?;
            if d.copies.contains_key(target) {
                let message = format!("block copy error: disk '{target}' already in active block job");
                return Err(refuse(ErrorKind::Busy, message));
            }
            d.copies.insert(target.to_owned(), spec.clone());
            Ok(())
        })
    }

    async fn block_job(&self, vm: Uuid, target: &str) -> Result<Option<BlockJobInfo>> {
        self.on("block_job", &format!("read the block job on {target} of"), vm, |d, around| {
            d.active()?;
            let path = d.disk(target)?.source.path().unwrap_or_default().to_owned();
            if !d.copies.contains_key(target) {
                return Ok(None);
            }
            let size = around.world.image(&path).size_bytes;
            around.announce(d, DomainEventKind::BlockJob { target: target.to_owned(), status: "ready".into() });
            Ok(Some(BlockJobInfo { current_bytes: size, end_bytes: size, ready: true }))
        })
    }

    async fn block_job_end(&self, vm: Uuid, target: &str, pivot: bool) -> Result<()> {
        self.on("block_job_end", &format!("end the block job on {target} of"), vm, |d, around| {
            d.active()?;
            let path = d.disk(target)?.source.path().unwrap_or_default().to_owned();
            let Some(copy) = d.copies.remove(target) else {
                let message = format!("invalid argument: disk {target} does not have an active block job");
                return Err(refuse(ErrorKind::Invalid, message));
            };
            let status = if pivot { "completed" } else { "canceled" };
            if pivot {
                let size = around.world.image(&path).size_bytes;
                // The old image is closed in order; the bitmaps go along to the new one.
                let live = d.live.get(target).cloned().unwrap_or_default();
                around.world.image(&path).close(live.clone());
                let new = around.world.image(&copy.path);
                new.size_bytes = size;
                new.close(live);
                let live = new.open();
                d.live.insert(target.to_owned(), live);
                d.move_disk(target, &copy.path, &copy.format);
            }
            around.announce(d, DomainEventKind::BlockJob { target: target.to_owned(), status: status.into() });
            Ok(())
        })
    }

    async fn migrate(&self, vm: Uuid, spec: &MigrateSpec) -> Result<()> {
        self.on("migrate", &format!("migrate to {}:", spec.destination), vm, |d, around| migrate(d, around, spec))
    }

    async fn migration_steer(&self, vm: Uuid, steer: Steer) -> Result<()> {
        self.on("migration_steer", "steer the migration of", vm, |d, _| match &d.job {
            None if matches!(steer, Steer::MaxDowntime { .. }) => d.active(),
            Some(job) if job.kind == JobKind::MigrationOut => Ok(()),
            _ => Err(refuse(ErrorKind::WrongState, "no migration runs")),
        })
    }

    async fn machine(&self, vm: Uuid) -> Result<Machine> {
        self.on("machine", "read the machine of", vm, |d, _| {
            xml::machine(&d.xml).map_err(|e| refuse(ErrorKind::Invalid, e.to_string()))
        })
    }

    async fn offer(&self) -> Result<HostOffer> {
        self.call("offer", "describe the host", |world, name| Ok(world.hosts[name].offer.clone()))
    }

    async fn fit(&self, _machine: &Machine, _cpu: Option<&str>) -> Result<Fit> {
        self.call("fit", "compare CPUs", |world, name| Ok(world.hosts[name].fit.clone()))
    }

    async fn host_cpu(&self, _machine: &Machine) -> Result<String> {
        self.call("host_cpu", "read the host's CPU", |_, _| Ok(CPU.to_owned()))
    }

    async fn cpu_baseline(&self, _machine: &Machine, _cpus: &[String]) -> Result<String> {
        self.call("cpu_baseline", "find the common CPU", |_, _| Ok(CPU.to_owned()))
    }

    async fn pools(&self) -> Result<Vec<Pool>> {
        self.call("pools", "list the storage pools", |_, _| Ok(Vec::new()))
    }

    async fn volume(&self, path: &str) -> Result<Option<Volume>> {
        self.call("volume", &format!("look for {path}"), |world, _| {
            let found = world.images.get(path);
            Ok(found.map(|image| Volume {
                path: path.to_owned(),
                format: "qcow2".to_owned(),
                capacity_bytes: image.size_bytes,
                allocation_bytes: image.size_bytes,
            }))
        })
    }

    async fn room(&self, directory: &str) -> Result<u64> {
        self.call("room", &format!("look for room in {directory}"), |_, _| Ok(1 << 40))
    }

    async fn volume_create(&self, path: &str, _format: &str, capacity_bytes: u64) -> Result<()> {
        self.call("volume_create", &format!("make {path}"), |world, _| {
            if world.images.contains_key(path) {
                return Err(refuse(ErrorKind::Invalid, format!("storage vol '{path}' already exists")));
            }
            world.image(path).size_bytes = capacity_bytes;
            Ok(())
        })
    }

    async fn volume_remove(&self, path: &str) -> Result<bool> {
        self.call("volume_remove", &format!("remove {path}"), |world, _| Ok(world.images.remove(path).is_some()))
    }

    fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.events.subscribe()
    }

    async fn close(&self) {
        let mut world = self.lock();
        if let Some(host) = world.hosts.get_mut(&self.name) {
            host.closed = true;
        }
    }
}

impl SimHost {
    async fn freeze_call(&self, method: &str, verb: &str, vm: Uuid, command: &str) -> Result<u32> {
        let answer = self.agent_call(method, verb, vm, &json!({ "execute": command }).to_string(), 30).await?;
        let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        Ok(answer["return"].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(0))
    }

    async fn agent_call(&self, method: &str, verb: &str, vm: Uuid, command: &str, timeout_s: u32) -> Result<String> {
        let hung = self.on(method, verb, vm, |d, _| {
            d.active()?;
            let channel = if d.agent_channel { "connected" } else { "configured" };
            match d.agent {
                AgentMode::Absent => {
                    let message = format!("Guest agent is not responding: QEMU guest agent is not {channel}");
                    Err(refuse(ErrorKind::AgentUnavailable, message))
                }
                mode => Ok(mode == AgentMode::Hung),
            }
        })?;
        if hung {
            tokio::time::sleep(Duration::from_secs(u64::from(timeout_s))).await;
            let message = "Guest agent is not responding: Guest agent not available for now";
            return Err(refuse(ErrorKind::AgentUnavailable, message).into_error(verb, &vm.to_string()));
        }
        self.on(method, verb, vm, |d, _| agent(d, command))
    }
}

/// The agent inside the guest.
fn agent(domain: &mut Domain, command: &str) -> Outcome<String> {
    let command: Value =
        serde_json::from_str(command).map_err(|e| refuse(ErrorKind::Invalid, format!("no JSON command: {e}")))?;
    let (filesystems, honest) = match domain.agent {
        AgentMode::Answers { filesystems } => (filesystems, true),
        _ => (1, false),
    };
    let answer = match command["execute"].as_str().unwrap_or_default() {
        "guest-ping" | "guest-sync" => json!({}),
        "guest-fsfreeze-status" => json!(if domain.frozen > 0 { "frozen" } else { "thawed" }),
        "guest-fsfreeze-freeze" if domain.frozen > 0 => {
            let message = "internal error: unable to execute QEMU agent command 'guest-fsfreeze-freeze': Command \
                           guest-fsfreeze-freeze has been disabled: the command is not allowed";
            return Err(refuse(ErrorKind::Unsupported, message));
        }
        "guest-fsfreeze-freeze" => {
            domain.frozen = if honest { filesystems } else { 0 };
            json!(filesystems)
        }
        "guest-fsfreeze-thaw" => json!(std::mem::take(&mut domain.frozen)),
        other if domain.frozen > 0 => {
            let message = format!(
                "internal error: unable to execute QEMU agent command '{other}': Command {other} has been disabled: the \
                 command is not allowed"
            );
            return Err(refuse(ErrorKind::Unsupported, message));
        }
        "guest-get-host-name" => json!({ "host-name": domain.name }),
        "guest-get-osinfo" => json!({ "id": "simulated", "pretty-name": "Simulated GNU/Linux 1" }),
        "guest-network-get-interfaces" => interfaces(domain),
        other => {
            let message = format!(
                "internal error: unable to execute QEMU agent command '{other}': The command {other} has not been found"
            );
            return Err(refuse(ErrorKind::Unsupported, message));
        }
    };
    Ok(json!({ "return": answer }).to_string())
}

/// Each of a domain's interfaces with an address made of the end of its own.
fn interfaces(domain: &Domain) -> Value {
    let macs = domain.xml.split("<mac address=").skip(1).filter_map(|rest| rest.get(1..18));
    let found = macs.enumerate().map(|(number, mac)| {
        let last = mac.rsplit(':').next().and_then(|byte| u8::from_str_radix(byte, 16).ok()).unwrap_or(0);
        let address = json!({ "ip-address-type": "ipv4", "ip-address": format!("192.0.2.{last}"), "prefix": 24 });
        json!({ "name": format!("eth{number}"), "hardware-address": mac, "ip-addresses": [address] })
    });
    json!(found.collect::<Vec<_>>())
}

fn stats(domain: &Domain, size: impl Fn(&str) -> u64) -> DomainStats {
    let disks = domain.disks.iter().map(|disk| DiskStats {
        target: disk.target.clone(),
        path: disk.source.path().map(str::to_owned),
        write_bytes: domain.written_bytes.get(&disk.target).copied().unwrap_or(0),
        capacity_bytes: disk.source.path().map_or(0, &size),
        ..DiskStats::default()
    });
    DomainStats {
        uuid: domain.uuid,
        name: domain.name.clone(),
        vcpus: domain.vcpus,
        memory_bytes: domain.memory_bytes,
        disks: disks.collect(),
        ..DomainStats::default()
    }
}

fn no_checkpoint(name: &str) -> super::Refusal {
    refuse(
        ErrorKind::NoCheckpoint,
        format!("Domain checkpoint not found: no domain checkpoint with matching name '{name}'"),
    )
}

fn broken(name: &str, target: &str) -> super::Refusal {
    let message = format!("checkpoint inconsistent: missing or broken bitmap '{name}' for disk '{target}'");
    refuse(ErrorKind::CheckpointInconsistent, message)
}

/// Refuses a checkpoint from which no increment of this disk can be made.
fn usable(domain: &mut Domain, name: &str, target: &str) -> Outcome<()> {
    let known = domain.checkpoints.iter().any(|c| c.name == name && c.disks.iter().any(|(t, _)| t == target));
    if !known {
        return Err(no_checkpoint(name));
    }
    match domain.bitmaps(target)?.get(name) {
        Some(bitmap) if !bitmap.inconsistent => Ok(()),
        _ => Err(broken(name, target)),
    }
}

fn make_checkpoint(domain: &mut Domain, around: &mut Around<'_>, spec: &CheckpointSpec) -> Outcome<()> {
    if domain.checkpoints.iter().any(|c| c.name == spec.name) {
        let message = format!("operation failed: domain checkpoint {} already exists", spec.name);
        return Err(refuse(ErrorKind::Invalid, message));
    }
    for target in &spec.disks {
        if domain.bitmaps(target)?.contains_key(&spec.name) {
            return Err(refuse(ErrorKind::Invalid, format!("Bitmap already exists: {}", spec.name)));
        }
    }
    for target in &spec.disks {
        domain.bitmaps(target)?.insert(spec.name.clone(), Bitmap::default());
    }
    let parent = domain.checkpoints.last().map(|c| c.name.clone());
    domain.checkpoints.push(CheckpointInfo {
        name: spec.name.clone(),
        created_unix_s: around.world.tick(),
        parent,
        disks: spec.disks.iter().map(|t| (t.clone(), 0)).collect(),
    });
    Ok(())
}

fn migrate(domain: &mut Domain, around: &mut Around<'_>, spec: &MigrateSpec) -> Outcome<()> {
    domain.active()?;
    domain.idle()?;
    let name = spec.destination.strip_prefix("sim://").and_then(|u| u.strip_suffix("/system"));
    let reachable = name.filter(|n| around.world.hosts.get(*n).is_some_and(|h| h.powered));
    let name = reachable.ok_or_else(|| {
        refuse(ErrorKind::Unreachable, format!("unable to connect to server at '{}'", spec.destination))
    })?;
    if around.world.hosts.get(name).is_some_and(|h| h.events.same_channel(&around.events)) {
        return Err(refuse(ErrorKind::Invalid, "internal error: Attempt to migrate guest to the same host"));
    }
    let mut arrived = Domain::define(&domain.xml)?;
    let known = around.world.hosts.get(name).and_then(|h| h.domains.get(&domain.uuid));
    if known.is_some_and(|d| d.state.is_active()) {
        return Err(refuse(ErrorKind::WrongState, "Requested operation is not valid: domain is already active"));
    }
    arrived.persistent = spec.persist || known.is_some();
    arrived.state = domain.state;
    arrived.done = Some(done(domain.memory_bytes));
    arrived.disks.clone_from(&domain.disks);
    (arrived.agent, arrived.frozen) = (domain.agent, domain.frozen);
    // Bitmaps travel with the images; what the source knew of checkpoints stays there.
    let live: BTreeMap<_, _> = domain.live.clone();
    let leaves = spec.persist && domain.persistent;
    if leaves {
        domain.persistent = false;
        domain.checkpoints.clear();
    }
    domain.end(around, true, "migrated");
    for (target, bitmaps) in live {
        let path = arrived.disk(&target).ok().and_then(|d| d.source.path().map(str::to_owned));
        let opened = path.map(|p| {
            let image = around.world.image(&p);
            image.close(bitmaps);
            image.open()
        });
        arrived.live.insert(target, opened.unwrap_or_default());
    }
    if let Some(host) = around.world.hosts.get_mut(name) {
        announce(&host.events, &arrived, DomainEventKind::Started { detail: "migrated".into() });
        host.domains.insert(arrived.uuid, arrived);
    }
    Ok(())
}

/// What is told of a migration that is done.
fn done(memory_bytes: u64) -> JobInfo {
    let migration = MigrationInfo {
        memory_total_bytes: memory_bytes,
        memory_processed_bytes: memory_bytes,
        downtime_ms: Some(30),
        iteration: 2,
        ..MigrationInfo::default()
    };
    JobInfo {
        kind: JobKind::MigrationIn,
        elapsed_ms: 1000,
        total_bytes: memory_bytes,
        processed_bytes: memory_bytes,
        remaining_bytes: 0,
        scratch_used_bytes: 0,
        scratch_total_bytes: 0,
        migration: Some(migration),
    }
}
