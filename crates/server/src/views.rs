//! What the daemon knows, in the shapes of the API.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use jiff::Timestamp;
use uuid::Uuid;
use virtward_api::{
    Guest, Host, HostDrain, HostState, JobKind, JobState, LastFailure, LastGood, Network, Point, PointDisk,
    PointQuiesce, Policy, PowerState, Protection, ProtectionState, Repository, RepositoryState, Said, Saying,
    UpcomingRun, Usage, Vm, VmDetail, VmDisk, VmRef,
};
use virtward_decide::schedule::{self, Line, State};
use virtward_engine::{
    collect::Nic,
    guest::GuestFacts,
    reconcile::inventory::{self, VmView, World},
};
use virtward_model::{Disk, DiskDevice, DiskSource, RestorePoint, VmState};

use crate::{
    cluster::fleet::{Fleet, Placed},
    daemon::Daemon,
    jobs::record::{Attempt, Outcome, Record},
    policies::Stored,
    repositories::{self, Entry},
    said::{self, Sentence},
    scheduler::Planned,
    storages,
};

/// Everything that views of VMs are made from, gathered once for many.
pub struct Views<'a> {
    daemon: &'a Daemon,
    world: Arc<World>,
    /// Every host and VM.
    pub fleet: Arc<Fleet>,
    planned: Arc<Planned>,
    repositories: Vec<(Arc<Entry>, Arc<repositories::View>)>,
    jobs: HashMap<Uuid, Uuid>,
    history: HashMap<Uuid, BTreeMap<String, Attempt>>,
}

impl<'a> Views<'a> {
    /// Gathers.
    pub fn new(daemon: &'a Daemon) -> Self {
        let open = |record: &&Arc<Record>| !record.job.state.is_final();
        let jobs = daemon.jobs.records();
        let jobs = jobs.iter().filter(open).filter_map(|record| Some((record.job.vm.as_ref()?.uuid, record.job.id)));
        Self {
            daemon,
            world: daemon.inventory.world(),
            fleet: daemon.fleet(),
            planned: daemon.plan(),
            repositories: daemon.repositories.all().into_iter().map(|entry| (entry.clone(), entry.view())).collect(),
            jobs: jobs.collect(),
            history: daemon.jobs.history(),
        }
    }

    /// The newest restore point of a VM, and where it is.
    fn newest(&self, vm: Uuid) -> Option<(&Arc<RestorePoint>, &str)> {
        let each = self
            .repositories
            .iter()
            .filter_map(|(entry, view)| Some((view.points.get(&vm)?.first()?, entry.config.name.as_str())));
        each.max_by_key(|(point, _)| point.taken)
    }

    fn lines(&self, vm: Uuid) -> impl Iterator<Item = &Line> {
        let numbers = self.planned.lines.get(&vm).map(Vec::as_slice).unwrap_or_default();
        numbers.iter().filter_map(|number| self.planned.report.lines.get(*number))
    }

    fn policy(&self, line: &Line) -> Option<&virtward_model::Policy> {
        self.planned.input.policies.get(line.policy).map(schedule::Compiled::policy)
    }

    /// A VM in a list.
    pub fn vm(&self, placed: &Placed) -> Vm {
        let view = &*placed.view;
        let uuid = view.vm.uuid;
        let newest = self.newest(uuid);
        Vm {
            uuid,
            name: view.vm.name.clone(),
            host: placed.host.clone(),
            hostname: view.guest.as_ref().and_then(|guest| guest.hostname.clone()),
            state: power(view.vm.state),
            is_stale: placed.host_state != HostState::Up,
            tags: view.details.tags.clone(),
            size_bytes: size(view, newest.map(|(point, _)| &**point)),
            protection: self.state(uuid).0,
            policies: self.lines(uuid).filter_map(|line| Some(self.policy(line)?.name.clone())).collect(),
            last_point: newest.map(|(point, _)| point.taken),
            next_run: self.next(uuid).map(|next| next.at),
            job: self.jobs.get(&uuid).copied(),
        }
    }

    /// Whether a VM is protected, and why.
    pub fn standing(&self, vm: Uuid) -> (ProtectionState, Sentence) {
        self.state(vm)
    }

    fn state(&self, vm: Uuid) -> (ProtectionState, Sentence) {
        let mut worst = (ProtectionState::Unprotected, Sentence::new("no policy selects it", Saying::NoPolicy));
        let mut rank = 0;
        for line in self.lines(vm) {
            let Some(policy) = self.policy(line) else { continue };
            let (place, found) = self.by_policy(vm, line, policy);
            if place > rank {
                (rank, worst) = (place, found);
            }
        }
        worst
    }

    /// What one policy says, and how much that matters.
    fn by_policy(&self, vm: Uuid, line: &Line, policy: &virtward_model::Policy) -> (u8, (ProtectionState, Sentence)) {
        let name = &policy.name;
        let of = |saying: Saying| Said::from(saying).with("policy", name.as_str());
        let found = self.repositories.iter().find(|(entry, _)| entry.config.name == policy.repository);
        let Some((_, view)) = found.filter(|(_, view)| view.state == RepositoryState::Ok) else {
            let text = format!("repository {} of policy {name} cannot be looked into", policy.repository);
            let said = of(Saying::RepositoryUnreadable).with("repository", policy.repository.as_str());
            return (4, (ProtectionState::Unknown, Sentence::new(text, said)));
        };
        let breach = self.planned.report.rpo.iter().find(|breach| breach.vm == vm && breach.policy == line.policy);
        let newest = view.points.get(&vm).and_then(|points| points.first());
        if let (Some(breach), Some(_)) = (breach, newest) {
            let text = format!("the newest restore point is {} old, policy {name} promises {}", breach.age, breach.rpo);
            let said = of(Saying::PointTooOld).with("age_s", breach.age.0).with("rpo_s", breach.rpo.0);
            return (5, (ProtectionState::Overdue, Sentence::new(text, said)));
        }
        let last = self.history.get(&vm).and_then(|of| of.get(name));
        let failed = last.is_some_and(|last| last.outcome != Outcome::Succeeded);
        let left_out = matches!(line.state, State::Idle { left_out: Some(_), .. });
        match newest {
            None if breach.is_some() || failed || left_out => {
                let text = format!("policy {name} has made no restore point of it yet, and should have");
                (5, (ProtectionState::Overdue, Sentence::new(text, of(Saying::PointMissing))))
            }
            None => {
                let text = format!("the first backup of policy {name} is not due yet");
                (3, (ProtectionState::Pending, Sentence::new(text, of(Saying::FirstNotDue))))
            }
            Some(_) if left_out && policy.rpo.is_none() => {
                let text = format!("the last run of policy {name} did not succeed");
                (5, (ProtectionState::Overdue, Sentence::new(text, of(Saying::LastRunFailed))))
            }
            Some(_) => (2, (ProtectionState::Protected, Sentence::new(format!("policy {name}"), of(Saying::ByPolicy)))),
        }
    }

    fn next(&self, vm: Uuid) -> Option<UpcomingRun> {
        let each = self.lines(vm).filter_map(|line| {
            let policy = self.policy(line)?.name.clone();
            let zone = self.planned.input.policies.get(line.policy)?.zone();
            match &line.state {
                State::Idle { next, .. } => Some(upcoming(policy, (*next)?)),
                State::Waits { due, why } => Some(UpcomingRun {
                    waiting_for: Some(why.text(zone)),
                    waiting_said: Some(said::why(why)),
                    ..upcoming(policy, *due)
                }),
                State::Starts { due, .. } => Some(upcoming(policy, *due)),
                State::Paused | State::Running { .. } => None,
            }
        });
        each.min_by_key(|run| run.at)
    }

    /// How a VM is protected.
    pub fn protection(&self, vm: Uuid, now: Timestamp) -> Protection {
        let (state, Sentence { text: reason, said }) = self.state(vm);
        let newest = self.newest(vm);
        let policies: Vec<&virtward_model::Policy> = self.lines(vm).filter_map(|line| self.policy(line)).collect();
        Protection {
            state,
            reason,
            said,
            rpo_s: policies.iter().filter_map(|policy| policy.rpo).min().map(|rpo| rpo.0),
            policies: policies.iter().map(|policy| policy.name.clone()).collect(),
            age_s: newest.map(|(point, _)| seconds(point.taken, now)),
            last_failure: self.last_failure(vm),
            last_good: newest.map(|(point, repository)| LastGood {
                point: point.id.to_string(),
                repository: repository.to_owned(),
                taken: point.taken,
            }),
            next: self.next(vm),
        }
    }

    fn last_failure(&self, vm: Uuid) -> Option<LastFailure> {
        for record in self.daemon.jobs.records().iter().rev() {
            let job = &record.job;
            if job.kind != JobKind::Backup || job.vm.as_ref().is_none_or(|of| of.uuid != vm) {
                continue;
            }
            match job.state {
                JobState::Succeeded => return None,
                JobState::Failed | JobState::Interrupted => {
                    let message = job.error.as_ref().map(|error| error.message.clone()).unwrap_or_default();
                    let code = job.error.as_ref().map(|error| error.code);
                    return Some(LastFailure { job: job.id, at: job.finished.unwrap_or(job.created), message, code });
                }
                _ => {}
            }
        }
        None
    }

    /// A VM with everything.
    pub fn detail(&self, placed: &Placed, now: Timestamp) -> VmDetail {
        let view = &*placed.view;
        let points = self.repositories.iter().map(|(_, of)| of.points.get(&view.vm.uuid).map_or(0, Vec::len) as u64);
        let newest = self.newest(view.vm.uuid).map(|(point, _)| &**point);
        VmDetail {
            vm: self.vm(placed),
            title: view.details.title.clone(),
            metadata: view.details.metadata.clone(),
            vcpus: view.details.vcpus,
            memory_bytes: view.details.memory_bytes,
            also_on: placed.also_on.clone(),
            disks: view.vm.disks.iter().map(|disk| vm_disk(disk, view, newest)).collect(),
            networks: view.details.networks.iter().map(|nic| network(nic, view.guest.as_deref())).collect(),
            guest: view.details.has_agent_channel.then(|| Guest {
                is_agent_connected: view.agent == Some(true),
                hostname: view.guest.as_ref().and_then(|guest| guest.hostname.clone()),
                os: view.guest.as_ref().and_then(|guest| guest.os.clone()),
            }),
            usage: view.usage.as_ref().map(|usage| Usage {
                cpu: usage.cpu,
                memory_rss_bytes: usage.memory_rss_bytes,
                read_bytes_s: usage.read_bytes_s,
                write_bytes_s: usage.write_bytes_s,
                rx_bytes_s: usage.rx_bytes_s,
                tx_bytes_s: usage.tx_bytes_s,
            }),
            protected: self.protection(view.vm.uuid, now),
            points: points.sum(),
        }
    }

    /// Every host, by name.
    pub fn hosts(&self) -> Vec<Host> {
        let mut hosts = self.daemon.registry.other_hosts();
        hosts.push(self.host());
        let mut running: HashMap<String, u32> = HashMap::new();
        for record in self.daemon.jobs.records().iter().filter(|record| record.job.state == JobState::Running) {
            *running.entry(record.job.host.clone()).or_default() += 1;
        }
        for host in &mut hosts {
            host.jobs_running = running.get(&host.name).copied().unwrap_or_default();
            let node = self.fleet.node_of(&host.name).map(str::to_owned);
            let drain = node.and_then(|node| self.daemon.drained.get(&node));
            host.drained = drain.map(|drain| HostDrain::clone(&drain));
        }
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        hosts
    }

    /// This host.
    pub fn host(&self) -> Host {
        let (world, host) = (&self.world, &self.world.host);
        let is_local = is_local(&host.uri);
        let memory = is_local.then(memory).flatten();
        let running = |view: &&Arc<VmView>| view.vm.state == VmState::Running;
        let jobs = self.daemon.jobs.progress().len();
        Host {
            name: host.name.clone(),
            uuid: host.uuid,
            state: host_state(host.state),
            reason: host.reason.clone(),
            since: host.since,
            seen: host.seen,
            uri: host.uri.clone(),
            libvirt_version: host.libvirt_version.map(version),
            qemu_version: host.qemu_version.map(version),
            cpus: is_local.then(cpus).flatten(),
            load: is_local.then(load).flatten(),
            memory_bytes: memory.map(|(total, _)| total),
            memory_available_bytes: memory.map(|(_, available)| available),
            vms: count(world.vms.len()),
            vms_running: count(world.vms.values().filter(running).count()),
            jobs_running: count(jobs),
            storage: if is_local { storages::of_host(world) } else { Vec::new() },
            is_local,
            drained: None,
            health: self.daemon.health.now(),
        }
    }
}

/// A number of things that fits.
pub fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn seconds(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.duration_since(from).as_secs()).unwrap_or(0)
}

fn size(view: &VmView, newest: Option<&RestorePoint>) -> Option<u64> {
    let disks = view.vm.disks.iter().filter(|disk| disk.device == DiskDevice::Disk && !disk.read_only);
    disks.map(|disk| disk_size(disk, view, newest)).try_fold(0, |sum: u64, size| Some(sum.saturating_add(size?)))
}

fn disk_size(disk: &Disk, view: &VmView, newest: Option<&RestorePoint>) -> Option<u64> {
    let live = view.usage.as_ref().and_then(|usage| usage.disks.get(&disk.target)).map(|(size, _)| *size);
    let backed_up = || newest?.disks.iter().find(|known| known.target == disk.target).map(|known| known.size_bytes);
    live.filter(|size| *size > 0).or_else(backed_up)
}

fn vm_disk(disk: &Disk, view: &VmView, newest: Option<&RestorePoint>) -> VmDisk {
    let device = match disk.device {
        DiskDevice::Disk => "disk",
        DiskDevice::Cdrom => "cdrom",
        DiskDevice::Floppy => "floppy",
        DiskDevice::Lun => "lun",
    };
    VmDisk {
        target: disk.target.clone(),
        device: device.into(),
        format: disk.format.clone(),
        source: match &disk.source {
            DiskSource::File { path } | DiskSource::Block { path } => path.clone(),
            DiskSource::Network { protocol, name } => format!("{protocol}:{name}"),
            DiskSource::Volume { pool, volume } => format!("{pool}/{volume}"),
            DiskSource::None => String::new(),
        },
        size_bytes: disk_size(disk, view, newest),
        allocated_bytes: view.usage.as_ref().and_then(|usage| usage.disks.get(&disk.target)).map(|(_, used)| *used),
        is_read_only: disk.read_only,
        is_backed_up: disk.device == DiskDevice::Disk && !disk.read_only && !disk.shareable && !disk.transient,
    }
}

fn network(nic: &Nic, guest: Option<&GuestFacts>) -> Network {
    let addresses = nic.mac.as_ref().and_then(|mac| guest?.addresses.get(&mac.to_ascii_lowercase()));
    Network {
        source: nic.source.clone(),
        mac: nic.mac.clone(),
        model: nic.model.clone(),
        addresses: addresses.into_iter().flatten().map(ToString::to_string).collect(),
    }
}

/// The state of a VM's process.
pub fn power(state: VmState) -> PowerState {
    match state {
        VmState::Running => PowerState::Running,
        VmState::Paused => PowerState::Paused,
        VmState::ShutOff => PowerState::ShutOff,
        VmState::Crashed => PowerState::Crashed,
        VmState::Other => PowerState::Other,
    }
}

/// The state of a host.
pub fn host_state(state: inventory::HostState) -> HostState {
    match state {
        inventory::HostState::Up => HostState::Up,
        inventory::HostState::LibvirtdDown => HostState::LibvirtdDown,
        inventory::HostState::Down => HostState::Down,
        inventory::HostState::Unknown => HostState::Unknown,
    }
}

/// `11.3.0` from libvirt's number.
fn version(number: u64) -> String {
    format!("{}.{}.{}", number / 1_000_000, number / 1_000 % 1_000, number % 1_000)
}

/// Whether a libvirt URI means this host.
pub fn is_local(uri: &str) -> bool {
    uri.split_once("://").is_none_or(|(scheme, rest)| scheme.ends_with("+unix") || rest.starts_with('/'))
}

fn cpus() -> Option<u32> {
    std::thread::available_parallelism().ok().map(|cpus| count(cpus.get()))
}

fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// A repository.
pub fn repository(daemon: &Daemon, entry: &Entry) -> Repository {
    let view = entry.view();
    let name = &entry.config.name;
    let running = |record: &&Arc<Record>| record.job.state == JobState::Running && record.job.repository == *name;
    let running = daemon.jobs.records().iter().filter(running).count();
    Repository {
        name: name.clone(),
        location: entry.config.location.clone(),
        id: view.id.clone(),
        state: view.state,
        error: view.error.clone(),
        is_append_only: entry.config.store.append_only,
        points: view.count,
        usage: view.kept.usage.clone(),
        history: view.kept.history.clone(),
        last_verify: view.kept.last_verify.clone(),
        last_prune: view.kept.last_prune.clone(),
        last_gc: view.kept.last_gc.clone(),
        jobs_running: count(running),
    }
}

fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A restore point.
pub fn point(point: &RestorePoint, repository: &str, held: Option<&String>) -> Point {
    let sum = |of: fn(&virtward_model::DiskRecord) -> u64| point.disks.iter().map(of).sum();
    let ms = point.finished.as_millisecond() - point.started.as_millisecond();
    Point {
        id: point.id.to_string(),
        repository: repository.to_owned(),
        vm: point.vm.clone(),
        uuid: point.vm_uuid,
        host: point.host.clone(),
        kind: word(point.kind),
        source: word(point.source),
        taken: point.taken,
        started: point.started,
        finished: point.finished,
        duration_ms: u64::try_from(ms).unwrap_or(0),
        parent: point.parent.map(|id| id.to_string()),
        quiesce: PointQuiesce {
            requested: word(point.quiesce.requested),
            outcome: word(point.quiesce.outcome),
            frozen_ms: point.quiesce.frozen_ms,
            reason: point.quiesce.reason.clone(),
        },
        disks: point
            .disks
            .iter()
            .map(|disk| PointDisk {
                target: disk.target.clone(),
                size_bytes: disk.size_bytes,
                data_bytes: disk.data_bytes,
                read_bytes: disk.read_bytes,
                new_bytes: disk.new_bytes,
                stored_bytes: disk.stored_bytes,
                tracking: word(disk.tracking.state),
                reason: disk.tracking.reason.clone(),
                format: disk.format.clone(),
                source: disk.source.clone(),
            })
            .collect(),
        skipped: point.skipped.clone(),
        tags: point.tags.clone(),
        warnings: point.warnings.clone(),
        held: held.cloned(),
        size_bytes: sum(|disk| disk.size_bytes),
        read_bytes: sum(|disk| disk.read_bytes),
        stored_bytes: sum(|disk| disk.stored_bytes),
    }
}

/// A policy.
pub fn policy(daemon: &Daemon, stored: &Stored) -> Policy {
    let planned = daemon.plan();
    let next_run = daemon
        .policies
        .get(&stored.policy.name)
        .ok()
        .and_then(|entry| entry.1.as_ref().filter(|_| !stored.policy.paused)?.upcoming(Timestamp::now(), 1).pop());
    Policy {
        name: stored.policy.name.clone(),
        revision: stored.revision,
        updated: stored.updated,
        updated_by: stored.updated_by.clone(),
        is_paused: stored.policy.paused,
        policy: serde_json::to_value(&stored.policy).unwrap_or_default(),
        source: stored.source.clone(),
        vms: selected(&stored.policy, &planned.input.vms),
        next_run,
    }
}

/// The VMs that a policy selects, by name.
pub fn selected(policy: &virtward_model::Policy, vms: &[schedule::VmFacts]) -> Vec<VmRef> {
    let chosen = vms.iter().filter(|vm| schedule::select::judge(&policy.select, vm).is_selected());
    let mut chosen: Vec<VmRef> = chosen.map(|vm| VmRef { uuid: vm.uuid, name: vm.name.clone() }).collect();
    chosen.sort_by(|a, b| (&a.name, a.uuid).cmp(&(&b.name, b.uuid)));
    chosen
}

fn upcoming(policy: String, at: Timestamp) -> UpcomingRun {
    UpcomingRun { policy, at, waiting_for: None, waiting_said: None }
}
