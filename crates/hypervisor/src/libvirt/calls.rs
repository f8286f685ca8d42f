//! The trait's methods, each a few libvirt calls in one lane.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;
use uuid::Uuid;
use virt_sys as v;
use virtward_model::{DiskSource, Fit, HostOffer, Machine, Pool, Vm, VmState, Volume};

use super::error::{Attempt, Fault};
use super::ffi::{Conn, Domain, ParamsBuilder};
use super::known::Known;
use super::{
    CHANGE, Class, LIST, Libvirt, MIGRATE, READ, START, STATS, STORAGE, Shape, URGENT, invalid, migrate, numbers,
    offer, qmp, storage,
};
use crate::xml::{self, CheckpointXml, DomainXml};
use crate::{
    BackupSpec, BlockCopySpec, BlockJobInfo, CheckpointInfo, CheckpointSpec, DiskBitmap, DomainEvent, DomainStats,
    ErrorKind, HostInfo, Hypervisor, JobInfo, JobKind, MigrateSpec, Result, StartOptions, Steer, UndefineOptions,
    XmlView,
};

/// Longest agent timeout that libvirt is given.
const AGENT_TIMEOUT_S_MAX: u32 = 3600;
/// libvirt first synchronises with the agent, for up to 5 s; the rest is margin for a loaded host.
const AGENT_MARGIN_S: u64 = 10;
/// Time for the guest to write out what it has before it is frozen, and to come back.
const FREEZE_TIMEOUT_S: u32 = 30;

#[async_trait]
impl Hypervisor for Libvirt {
    async fn host(&self) -> Result<HostInfo> {
        self.host_call(READ, "describe the host", "", |conn| {
            Ok(HostInfo {
                name: conn.hostname()?,
                uuid: xml::host_uuid(&conn.capabilities()?)?,
                libvirt_version: conn.libvirt_version()?,
                // A driver may run without a hypervisor to ask; that is no reason to have no answer.
                qemu_version: conn.hypervisor_version().unwrap_or(0),
                uri: conn.uri()?,
            })
        })
        .await
    }

    async fn list(&self) -> Result<Vec<Vm>> {
        let known = Arc::clone(&self.known);
        self.host_call(LIST, "list the domains", "", move |conn| {
            let mut vms = Vec::new();
            for domain in conn.domains()? {
                match listed(conn, &domain, &known) {
                    Ok(vm) => vms.push(vm),
                    // Undefined or ended between the list and the look at it.
                    Err(fault) if fault.kind() == ErrorKind::NoDomain => {}
                    Err(fault) => return Err(fault.of(domain.name())),
                }
            }
            vms.sort_by(|a: &Vm, b: &Vm| a.name.cmp(&b.name));
            known.keep_only(&vms);
            Ok(vms)
        })
        .await
    }

    async fn lookup(&self, name_or_uuid: &str) -> Result<Vm> {
        let wanted = name_or_uuid.to_owned();
        self.host_call(READ, "find", name_or_uuid, move |conn| {
            let by_uuid = Uuid::try_parse(&wanted).ok().map(|uuid| conn.by_uuid(uuid).map_err(Fault::from));
            let domain = match by_uuid {
                Some(Ok(domain)) => domain,
                Some(Err(fault)) if fault.kind() != ErrorKind::NoDomain => return Err(fault),
                _ => conn.by_name(&wanted)?,
            };
            vm(conn, &domain)
        })
        .await
    }

    async fn xml(&self, vm: Uuid, view: XmlView) -> Result<String> {
        let view = match view {
            XmlView::Live => 0,
            XmlView::Inactive => v::VIR_DOMAIN_XML_INACTIVE,
            XmlView::Migratable => v::VIR_DOMAIN_XML_MIGRATABLE,
        };
        self.call(READ, "read the XML of", vm, move |_, d| Ok(d.xml(view | v::VIR_DOMAIN_XML_SECURE)?)).await
    }

    async fn define(&self, xml: &str) -> Result<Vm> {
        let name = DomainXml::parse(xml).map_err(|e| invalid("define a domain", e.to_string()))?.name;
        let xml = xml.to_owned();
        self.host_call(CHANGE, "define", &name, move |conn| vm(conn, &conn.define(&xml)?)).await
    }

    async fn undefine(&self, vm: Uuid, options: UndefineOptions) -> Result<()> {
        let nvram = if options.delete_nvram { v::VIR_DOMAIN_UNDEFINE_NVRAM } else { v::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM };
        let flags = v::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | v::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | v::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA;
        self.call(CHANGE, "undefine", vm, move |_, d| match d.undefine(flags | nvram) {
            // Drivers other than QEMU's know fewer flags and have nothing to remove.
            Err(e) if e.message.contains("unsupported flags") => Ok(d.undefine(0)?),
            other => Ok(other?),
        })
        .await
    }

    async fn managed_save(&self, vm: Uuid) -> Result<bool> {
        self.call(READ, "look for saved memory of", vm, |_, d| Ok(d.has_managed_save()?)).await
    }

    async fn managed_save_remove(&self, vm: Uuid) -> Result<bool> {
        self.call(CHANGE, "discard the saved memory of", vm, |_, d| {
            let saved = d.has_managed_save()?;
            if saved {
                d.managed_save_remove()?;
            }
            Ok(saved)
        })
        .await
    }

    async fn start(&self, vm: Uuid, options: StartOptions) -> Result<()> {
        let paused = if options.paused { v::VIR_DOMAIN_START_PAUSED } else { 0 };
        let ends = if options.ends_with_us { v::VIR_DOMAIN_START_AUTODESTROY } else { 0 };
        let flags = paused | ends;
        self.call(START, "start", vm, move |_, d| Ok(d.start(flags)?)).await
    }

    async fn shutdown(&self, vm: Uuid) -> Result<()> {
        // libvirt may try the agent first, and wait for it.
        let shape = Shape::new(Class::Agent, 60, false);
        self.call(shape, "shut down", vm, |_, d| Ok(d.shutdown()?)).await
    }

    async fn destroy(&self, vm: Uuid) -> Result<()> {
        self.call(URGENT, "end", vm, |_, d| Ok(d.destroy()?)).await
    }

    async fn set_autostart(&self, vm: Uuid, on: bool) -> Result<bool> {
        self.call(CHANGE, "change whether its host starts", vm, move |_, d| {
            let was = d.autostart()?;
            if was != on {
                d.set_autostart(on)?;
            }
            Ok(was)
        })
        .await
    }

    async fn suspend(&self, vm: Uuid) -> Result<()> {
        self.call(CHANGE, "suspend", vm, |_, d| {
            active(d)?;
            Ok(d.suspend()?)
        })
        .await
    }

    async fn resume(&self, vm: Uuid) -> Result<()> {
        self.call(URGENT, "resume", vm, |_, d| Ok(d.resume()?)).await
    }

    async fn reset(&self, vm: Uuid) -> Result<()> {
        self.call(CHANGE, "reset", vm, |_, d| Ok(d.reset()?)).await
    }

    async fn stats(&self) -> Result<Vec<DomainStats>> {
        self.host_call(STATS, "read the domains' statistics", "", |conn| {
            let records = conn.stats(numbers::GROUPS)?;
            Ok(records.into_iter().map(|(uuid, name, params)| numbers::stats(uuid, name, &params)).collect())
        })
        .await
    }

    async fn agent(&self, vm: Uuid, command: &str, timeout_s: u32) -> Result<String> {
        self.agent_call(Class::Agent, "ask the guest agent of", vm, command, timeout_s).await
    }

    async fn fs_freeze(&self, vm: Uuid) -> Result<u32> {
        let command = r#"{"execute":"guest-fsfreeze-freeze"}"#;
        let verb = "freeze the file systems of";
        count(verb, &self.agent_call(Class::Agent, verb, vm, command, FREEZE_TIMEOUT_S).await?)
    }

    async fn prepare_thaw(&self) {
        let _ = self.host_call(URGENT, "reach", "", |_| Ok(())).await;
    }

    async fn fs_thaw(&self, vm: Uuid) -> Result<u32> {
        let command = r#"{"execute":"guest-fsfreeze-thaw"}"#;
        let verb = "thaw the file systems of";
        count(verb, &self.agent_call(Class::Urgent, verb, vm, command, FREEZE_TIMEOUT_S).await?)
    }

    async fn backup_begin(&self, vm: Uuid, spec: &BackupSpec, checkpoint: Option<&CheckpointSpec>) -> Result<()> {
        let (spec, checkpoint) = (spec.clone(), checkpoint.cloned());
        self.call(CHANGE, "begin a backup of", vm, move |_, d| {
            let domain = DomainXml::parse(&d.xml(0)?)?;
            let targets = targets(&domain);
            let checkpoint = checkpoint.as_ref().map(|c| xml::checkpoint(c, &targets, None));
            no_job(d)?;
            Ok(d.backup_begin(&xml::backup(&spec, &targets), checkpoint.as_deref(), spec.scratch_is_there)?)
        })
        .await
    }

    async fn backup_xml(&self, vm: Uuid) -> Result<Option<String>> {
        self.call(READ, "read the backup job of", vm, |_, d| match d.backup_xml() {
            Ok(xml) => Ok(Some(xml)),
            Err(e) if e.code as u32 == v::VIR_ERR_NO_DOMAIN_BACKUP => Ok(None),
            Err(e) => Err(e.into()),
        })
        .await
    }

    async fn job(&self, vm: Uuid) -> Result<Option<JobInfo>> {
        self.call(READ, "read the job of", vm, |_, d| {
            if !d.is_active()? {
                return Ok(None);
            }
            let (kind, params) = d.job(false)?;
            Ok(numbers::job(kind, &params))
        })
        .await
    }

    async fn abort_job(&self, vm: Uuid) -> Result<()> {
        self.call(URGENT, "abort the job of", vm, |_, d| Ok(d.abort_job()?)).await
    }

    async fn job_done(&self, vm: Uuid) -> Result<Option<JobInfo>> {
        self.call(READ, "read the last job of", vm, |_, d| {
            let (_, params) = d.job(true)?;
            Ok(numbers::job(v::VIR_DOMAIN_JOB_BOUNDED, &params).filter(|_| params.u64("operation").is_some()))
        })
        .await
    }

    async fn checkpoints(&self, vm: Uuid) -> Result<Vec<CheckpointInfo>> {
        self.call(READ, "list the checkpoints of", vm, |_, d| {
            let mut list = Vec::new();
            for checkpoint in d.checkpoints()? {
                let xml = CheckpointXml::parse(&checkpoint.xml()?)?;
                list.push(CheckpointInfo {
                    name: xml.name,
                    created_unix_s: xml.created_unix_s,
                    parent: xml.parent,
                    disks: xml.targets.into_iter().map(|target| (target, 0)).collect(),
                });
            }
            // Stable: of one second, parents stay before children.
            list.sort_by_key(|c| c.created_unix_s);
            Ok(list)
        })
        .await
    }

    async fn checkpoint_redefine(&self, vm: Uuid, spec: &CheckpointSpec, created_unix_s: i64) -> Result<()> {
        let (verb, spec) = (format!("redefine checkpoint {} of", spec.name), spec.clone());
        self.call(CHANGE, &verb, vm, move |_, d| {
            let domain = DomainXml::parse(&d.xml(0)?)?;
            let xml = xml::checkpoint(&spec, &targets(&domain), Some(created_unix_s));
            let mut flags = v::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE;
            if d.is_active()? {
                flags |= v::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE;
            }
            d.checkpoint_create(&xml, flags)?;
            Ok(())
        })
        .await
    }

    async fn checkpoint_delete(&self, vm: Uuid, name: &str, metadata_only: bool) -> Result<()> {
        let (verb, name) = (format!("delete checkpoint {name} of"), name.to_owned());
        let flags = if metadata_only { v::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY } else { 0 };
        self.call(CHANGE, &verb, vm, move |_, d| Ok(d.checkpoint(&name)?.delete(flags)?)).await
    }

    async fn bitmaps(&self, vm: Uuid) -> Result<Vec<DiskBitmap>> {
        self.call(READ, "list the bitmaps of", vm, |_, d| {
            active(d)?;
            qmp::bitmaps(d)
        })
        .await
    }

    async fn disk_sizes(&self, vm: Uuid) -> Result<Vec<(String, u64)>> {
        self.call(READ, "read the disks' sizes of", vm, |_, d| {
            active(d)?;
            qmp::sizes(d)
        })
        .await
    }

    async fn bitmap_remove(&self, vm: Uuid, target: &str, bitmap: &str) -> Result<()> {
        let verb = format!("remove bitmap {bitmap} from {target} of");
        let (target, bitmap) = (target.to_owned(), bitmap.to_owned());
        self.call(CHANGE, &verb, vm, move |_, d| {
            active(d)?;
            qmp::bitmap_remove(d, &target, &bitmap)
        })
        .await
    }

    async fn monitor(&self, vm: Uuid, command: &serde_json::Value) -> Result<serde_json::Value> {
        let command = command.clone();
        self.call(CHANGE, "send a QMP command to", vm, move |_, d| qmp::command(d, &command)).await
    }

    async fn block_copy(&self, vm: Uuid, target: &str, spec: &BlockCopySpec) -> Result<()> {
        let verb = format!("copy disk {target} of");
        let (target, spec) = (target.to_owned(), spec.clone());
        self.call(CHANGE, &verb, vm, move |_, d| {
            let mut params = ParamsBuilder::new();
            if spec.bandwidth_bytes_s > 0 {
                params.u64("bandwidth", spec.bandwidth_bytes_s)?;
            }
            let reuse = if spec.reuse { v::VIR_DOMAIN_BLOCK_COPY_REUSE_EXT } else { 0 };
            // The guest cannot write faster than the copy follows.
            let flags = reuse | v::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB | v::VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES;
            Ok(d.block_copy(&target, &xml::block_copy(&spec), &params, flags)?)
        })
        .await
    }

    async fn block_job(&self, vm: Uuid, target: &str) -> Result<Option<BlockJobInfo>> {
        let (verb, target) = (format!("read the block job on {target} of"), target.to_owned());
        self.call(READ, &verb, vm, move |_, d| {
            let Some(job) = d.block_job(&target)? else { return Ok(None) };
            // libvirt keeps cur below end until the copy is in step with the source, also for an empty disk.
            let ready = job.end > 0
                && job.current == job.end
                && matches!(job.kind, v::VIR_DOMAIN_BLOCK_JOB_TYPE_COPY | v::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT);
            Ok(Some(BlockJobInfo { current_bytes: job.current, end_bytes: job.end, ready }))
        })
        .await
    }

    async fn block_job_end(&self, vm: Uuid, target: &str, pivot: bool) -> Result<()> {
        let (verb, target) = (format!("end the block job on {target} of"), target.to_owned());
        let flags = if pivot { v::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT } else { 0 };
        self.call(CHANGE, &verb, vm, move |_, d| Ok(d.block_job_abort(&target, flags)?)).await
    }

    async fn migrate(&self, vm: Uuid, spec: &MigrateSpec) -> Result<()> {
        let (verb, spec) = (format!("migrate to {}:", spec.destination), spec.clone());
        self.call(MIGRATE, &verb, vm, move |_, d| {
            no_job(d)?;
            migrate::run(d, &spec)
        })
        .await
    }

    async fn migration_steer(&self, vm: Uuid, steer: Steer) -> Result<()> {
        let verb = match steer {
            Steer::MaxDowntime { .. } => "set the longest downtime of",
            Steer::Bandwidth { .. } => "set the migration bandwidth of",
            Steer::Postcopy => "switch to post-copy:",
        };
        self.call(URGENT, verb, vm, move |_, d| {
            let (kind, params) = d.job(false)?;
            match (numbers::job(kind, &params), steer) {
                (None, Steer::MaxDowntime { .. }) => migrate::steer(d, steer),
                (Some(job), _) if job.kind == JobKind::MigrationOut => migrate::steer(d, steer),
                _ => Err(Fault::new(ErrorKind::WrongState, "no migration runs")),
            }
        })
        .await
    }

    async fn machine(&self, vm: Uuid) -> Result<Machine> {
        self.call(READ, "read the machine of", vm, |_, d| {
            let view = v::VIR_DOMAIN_XML_MIGRATABLE | v::VIR_DOMAIN_XML_SECURE;
            Ok(xml::machine(&d.xml(view)?)?)
        })
        .await
    }

    async fn offer(&self) -> Result<HostOffer> {
        self.host_call(READ, "describe the host", "", offer::offer).await
    }

    async fn fit(&self, machine: &Machine, cpu: Option<&str>) -> Result<Fit> {
        let (machine, cpu) = (machine.clone(), cpu.map(str::to_owned));
        let body = move |conn: &Conn| offer::fit(conn, &machine, cpu.as_deref());
        self.host_call(READ, "compare CPUs", "", body).await
    }

    async fn host_cpu(&self, machine: &Machine) -> Result<String> {
        let machine = machine.clone();
        self.host_call(READ, "read the host's CPU", "", move |conn| offer::host_cpu(conn, &machine)).await
    }

    async fn cpu_baseline(&self, machine: &Machine, cpus: &[String]) -> Result<String> {
        let (machine, cpus) = (machine.clone(), cpus.to_vec());
        self.host_call(READ, "find the common CPU", "", move |conn| offer::baseline(conn, &machine, &cpus)).await
    }

    async fn pools(&self) -> Result<Vec<Pool>> {
        self.host_call(LIST, "list the storage pools", "", storage::pools).await
    }

    async fn volume(&self, path: &str) -> Result<Option<Volume>> {
        let wanted = path.to_owned();
        self.host_call(STORAGE, "look for", path, move |conn| storage::volume(conn, &wanted)).await
    }

    async fn room(&self, directory: &str) -> Result<u64> {
        let wanted = directory.to_owned();
        self.host_call(STORAGE, "look for room in", directory, move |conn| storage::room(conn, &wanted)).await
    }

    async fn volume_create(&self, path: &str, format: &str, capacity_bytes: u64) -> Result<()> {
        let (wanted, format) = (path.to_owned(), format.to_owned());
        let body = move |conn: &Conn| storage::create(conn, &wanted, &format, capacity_bytes);
        self.host_call(STORAGE, "make", path, body).await
    }

    async fn volume_remove(&self, path: &str) -> Result<bool> {
        let wanted = path.to_owned();
        self.host_call(STORAGE, "remove", path, move |conn| storage::remove(conn, &wanted)).await
    }

    fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.session.events()
    }

    async fn close(&self) {
        self.end().await;
    }
}

impl Libvirt {
    async fn agent_call(&self, lane: Class, verb: &str, vm: Uuid, command: &str, timeout_s: u32) -> Result<String> {
        let (command, timeout_s) = (command.to_owned(), timeout_s.clamp(1, AGENT_TIMEOUT_S_MAX));
        let limit = Duration::from_secs(u64::from(timeout_s) + AGENT_MARGIN_S);
        let shape = Shape { lane, limit, read: false };
        let asked = self.call(shape, verb, vm, move |_, d| {
            active(d)?;
            d.agent(&command, timeout_s as i32).map_err(|e| agent_fault(e.into()))
        });
        asked.await.map_err(|mut e| {
            if e.kind == ErrorKind::Timeout {
                e.kind = ErrorKind::AgentUnavailable;
            }
            e
        })
    }
}

/// The number that a freeze or thaw answers with.
pub(super) fn count(verb: &str, answer: &str) -> Result<u32> {
    let number = serde_json::from_str::<serde_json::Value>(answer).ok().and_then(|a| a.get("return")?.as_u64());
    number.and_then(|n| u32::try_from(n).ok()).ok_or_else(|| {
        Fault::new(ErrorKind::AgentUnavailable, format!("unexpected answer: {answer:.200}")).into_error(verb, "")
    })
}

/// Refuses a domain without a QEMU process, in the words that libvirt uses.
fn active(domain: &Domain) -> Attempt<()> {
    match domain.is_active()? {
        true => Ok(()),
        false => Err(Fault::new(ErrorKind::WrongState, "domain is not running")),
    }
}

fn agent_fault(fault: Fault) -> Fault {
    let says = |part: &str| fault.message().contains(part);
    if says("has not been found") || says("has been disabled") || says("is disabled") || says("not supported") {
        return fault.with_kind(ErrorKind::Unsupported);
    }
    match fault.code() as u32 {
        // Not configured at all.
        v::VIR_ERR_ARGUMENT_UNSUPPORTED => fault.with_kind(ErrorKind::AgentUnavailable),
        _ => fault,
    }
}

/// Refuses at once what libvirt would refuse only after 30 s of waiting for its lock on the domain. Whoever comes in
/// between is still refused by libvirt.
fn no_job(domain: &Domain) -> Attempt<()> {
    if !domain.is_active()? {
        return Ok(());
    }
    let (kind, params) = domain.job(false)?;
    match numbers::job(kind, &params) {
        None => Ok(()),
        Some(job) => Err(Fault::new(ErrorKind::Busy, format!("a job of kind {:?} runs already", job.kind))),
    }
}

fn targets(domain: &DomainXml) -> Vec<&str> {
    domain.disks.iter().map(|d| d.disk.target.as_str()).collect()
}

/// A domain as it is now, or, when its QEMU hangs and libvirt therefore does not give its XML, as far as it is known:
/// one hung domain must not hide all others.
fn listed(conn: &Conn, domain: &Domain, known: &Known) -> Attempt<Vm> {
    let uuid = domain.uuid()?;
    let as_known = || Ok(Vm { name: domain.name(), uuid, state: state(domain.state()?), disks: known.disks(uuid) });
    if known.hangs(uuid) {
        return as_known();
    }
    match vm(conn, domain) {
        Ok(vm) => {
            known.learn(&vm);
            Ok(vm)
        }
        Err(fault) if fault.kind() == ErrorKind::Busy => {
            tracing::warn!(domain = domain.name(), error = fault.message(), "listed with its disks as last known");
            known.hung(uuid);
            as_known()
        }
        Err(fault) => Err(fault),
    }
}

/// A domain as it is now.
fn vm(conn: &Conn, domain: &Domain) -> Attempt<Vm> {
    let xml = DomainXml::parse(&domain.xml(0)?)?;
    let mut disks: Vec<_> = xml.disks.into_iter().map(|d| d.disk).collect();
    for disk in &mut disks {
        if let DiskSource::Volume { pool, volume } = &disk.source {
            // A pool that is not active leaves the source as it is written.
            if let Ok(found) = conn.volume_path(pool, volume) {
                let path = found.path;
                disk.source = if found.is_block { DiskSource::Block { path } } else { DiskSource::File { path } };
            }
        }
    }
    Ok(Vm { name: domain.name(), uuid: domain.uuid()?, state: state(domain.state()?), disks })
}

fn state(state: u32) -> VmState {
    match state {
        v::VIR_DOMAIN_RUNNING | v::VIR_DOMAIN_BLOCKED => VmState::Running,
        v::VIR_DOMAIN_PAUSED => VmState::Paused,
        v::VIR_DOMAIN_SHUTOFF => VmState::ShutOff,
        v::VIR_DOMAIN_CRASHED => VmState::Crashed,
        _ => VmState::Other,
    }
}
