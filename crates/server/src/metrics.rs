//! Counters and gauges in Prometheus' text format 0.0.4.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde::Serialize;
use virtward_api::{HealthLevel, Job, JobKind, JobState};
use virtward_engine::Migrated;

use crate::{alarms, cluster::fleet::Fleet, daemon::Daemon, views, wire_up};

/// What is counted since the daemon started.
#[derive(Default)]
pub struct Metrics {
    ended: Mutex<BTreeMap<(String, String), u64>>,
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    read_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    job_ms: AtomicU64,
    cycle_us: AtomicU64,
    cycles: AtomicU64,
    migrations: AtomicU64,
    downtime_ms: AtomicU64,
    sent_bytes: AtomicU64,
}

/// Kinds that are counted from the start.
const KINDS: [JobKind; 10] = [
    JobKind::Backup,
    JobKind::Restore,
    JobKind::Verify,
    JobKind::Copy,
    JobKind::Prune,
    JobKind::Gc,
    JobKind::Migrate,
    JobKind::MoveDisk,
    JobKind::Drain,
    JobKind::Balance,
];

fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

impl Metrics {
    /// A job ended.
    pub fn ended(&self, job: &Job) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended.entry((word(job.kind), word(job.state))).or_default() += 1;
        if let Some(result) = &job.result {
            self.read_bytes.fetch_add(result.read_bytes.unwrap_or(0), Relaxed);
            self.stored_bytes.fetch_add(result.stored_bytes.unwrap_or(0), Relaxed);
        }
        if let (Some(started), Some(finished)) = (job.started, job.finished) {
            let ms = finished.as_millisecond() - started.as_millisecond();
            self.job_ms.fetch_add(u64::try_from(ms).unwrap_or(0), Relaxed);
        }
    }

    /// A VM arrived elsewhere.
    pub fn migrated(&self, migrated: &Migrated) {
        self.migrations.fetch_add(1, Relaxed);
        self.downtime_ms.fetch_add(migrated.downtime_ms.unwrap_or(0), Relaxed);
        self.sent_bytes.fetch_add(migrated.sent_bytes, Relaxed);
    }

    /// A request was answered.
    pub fn answered(&self, route: &'static str, status: u16) {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner).entry((route, status)).or_default() += 1;
    }

    /// A plan was made.
    pub fn cycle(&self, took: Duration) {
        self.cycle_us.store(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
        self.cycles.fetch_add(1, Relaxed);
    }
}

/// Text that grows by families.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str, samples: &[(String, f64)]) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
}

fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

fn labels(all: &[(&str, &str)]) -> String {
    let all: Vec<String> = all.iter().map(|(name, value)| label(name, value)).collect();
    format!("{{{}}}", all.join(","))
}

/// All metrics.
pub fn text(daemon: &Daemon) -> String {
    let mut text = Text::default();
    let one = |value: f64| vec![(String::new(), value)];
    let version = labels(&[("version", env!("CARGO_PKG_VERSION"))]);
    text.family("virtward_info", "gauge", "What runs.", &[(version, 1.0)]);
    text.family("virtward_start_time_seconds", "gauge", "When it started.", &one(daemon.started.as_second() as f64));
    let leads = if daemon.leader.is_leader() { 1.0 } else { 0.0 };
    text.family("virtward_leader", "gauge", "1 if this daemon leads; alone, it does.", &one(leads));
    let answers = daemon.nodes.lost_store().is_none() && daemon.kv.full().is_none();
    let help = "1 if the state store answers this daemon and takes changes.";
    text.family("virtward_state_store_up", "gauge", help, &one(f64::from(u8::from(answers))));
    let mut by_protection: BTreeMap<String, f64> = BTreeMap::new();
    let mut newest = Vec::new();
    let views = views::Views::new(daemon);
    hosts(daemon, &views.fleet, &mut text);
    for placed in views.fleet.vms.values() {
        let vm = views.vm(placed);
        *by_protection.entry(word(vm.protection)).or_default() += 1.0;
        if let Some(at) = vm.last_point {
            newest.push((labels(&[("vm", &vm.name), ("uuid", &vm.uuid.to_string())]), at.as_second() as f64));
        }
    }
    let protection: Vec<_> =
        by_protection.into_iter().map(|(state, count)| (labels(&[("state", &state)]), count)).collect();
    text.family("virtward_vms", "gauge", "VMs by protection.", &protection);
    text.family("virtward_vm_last_point_seconds", "gauge", "When the newest restore point was taken.", &newest);
    jobs(daemon, &mut text);
    moves(daemon, &mut text);
    operations(daemon, &mut text);
    repositories(daemon, &mut text);
    high_availability(daemon, &mut text);
    let requests: Vec<_> = {
        let requests = daemon.metrics.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let sample = |((route, status), count): (&(&str, u16), &u64)| {
            (labels(&[("route", route), ("status", &status.to_string())]), *count as f64)
        };
        requests.iter().map(sample).collect()
    };
    text.family("virtward_http_requests_total", "counter", "Requests by route and status.", &requests);
    text.0
}

/// Every host as this daemon knows it: the state of one whose daemon is gone has to come from another.
fn hosts(daemon: &Daemon, fleet: &Fleet, text: &mut Text) {
    let (mut states, mut daemons) = (Vec::new(), Vec::new());
    for (node, host) in &fleet.hosts {
        for name in ["up", "libvirtd-down", "down", "unknown"] {
            let is_it = word(host.state) == name;
            states.push((labels(&[("host", &host.name), ("state", name)]), if is_it { 1.0 } else { 0.0 }));
        }
        let is_there = daemon.nodes.is_there(node);
        daemons.push((labels(&[("node", node)]), if is_there { 1.0 } else { 0.0 }));
    }
    text.family("virtward_host_state", "gauge", "1 for the state that a host is in, as this daemon knows it.", &states);
    let others = daemon.registry.other_hosts().into_iter().map(|host| (host.name, host.health));
    let health = others.chain([(daemon.host_name(), daemon.health.now())]).filter_map(|(host, health)| {
        let level = match health?.level {
            HealthLevel::Unknown => return None,
            HealthLevel::Ok => 0.0,
            HealthLevel::Warning => 1.0,
            HealthLevel::Critical => 2.0,
        };
        Some((labels(&[("host", &host)]), level))
    });
    let health: Vec<_> = health.collect();
    text.family("virtward_host_health", "gauge", "A host's hardware: 0 well, 1 needs a look, 2 fails.", &health);
    text.family("virtward_node_up", "gauge", "1 if the daemon of a node tells that it is there.", &daemons);
}

fn jobs(daemon: &Daemon, text: &mut Text) {
    let metrics = &daemon.metrics;
    let mut now = BTreeMap::from([("queued", 0.0), ("running", 0.0)]);
    for record in daemon.jobs.records() {
        match record.job.state {
            JobState::Queued => *now.entry("queued").or_default() += 1.0,
            JobState::Running => *now.entry("running").or_default() += 1.0,
            _ => {}
        }
    }
    let now: Vec<_> = now.into_iter().map(|(state, count)| (labels(&[("state", state)]), count)).collect();
    text.family("virtward_jobs", "gauge", "Jobs that wait or run.", &now);
    let ended: Vec<_> = {
        let ended = metrics.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ended = ended.clone();
        // From zero on: what appears with its first failure is no increase for Prometheus.
        for kind in KINDS {
            for state in [JobState::Succeeded, JobState::Failed, JobState::Cancelled, JobState::Interrupted] {
                ended.entry((word(kind), word(state))).or_default();
            }
        }
        let sample = |((kind, state), count): (&(String, String), &u64)| {
            (labels(&[("kind", kind), ("state", state)]), *count as f64)
        };
        ended.iter().map(sample).collect()
    };
    text.family("virtward_jobs_ended_total", "counter", "Jobs that ended since the daemon started.", &ended);
    let one = |value: f64| vec![(String::new(), value)];
    let read = metrics.read_bytes.load(Relaxed) as f64;
    text.family("virtward_job_read_bytes_total", "counter", "Bytes that jobs read.", &one(read));
    let stored = metrics.stored_bytes.load(Relaxed) as f64;
    text.family("virtward_job_stored_bytes_total", "counter", "Bytes that jobs stored.", &one(stored));
    let seconds = metrics.job_ms.load(Relaxed) as f64 / 1e3;
    text.family("virtward_job_seconds_total", "counter", "Time that jobs took.", &one(seconds));
    let cycle = metrics.cycle_us.load(Relaxed) as f64 / 1e6;
    text.family("virtward_schedule_cycle_seconds", "gauge", "How long the last plan took.", &one(cycle));
    let cycles = metrics.cycles.load(Relaxed) as f64;
    text.family("virtward_schedule_cycles_total", "counter", "Plans that were made.", &one(cycles));
}

/// VMs that move, and hosts that take none.
fn moves(daemon: &Daemon, text: &mut Text) {
    let metrics = &daemon.metrics;
    let one = |value: f64| vec![(String::new(), value)];
    let count = metrics.migrations.load(Relaxed) as f64;
    text.family("virtward_migrations_total", "counter", "VMs that this host sent to another one.", &one(count));
    let downtime = metrics.downtime_ms.load(Relaxed) as f64 / 1e3;
    let help = "Time for which guests stood still while they were sent to another host.";
    text.family("virtward_migration_downtime_seconds_total", "counter", help, &one(downtime));
    let sent = metrics.sent_bytes.load(Relaxed) as f64;
    text.family("virtward_migration_sent_bytes_total", "counter", "Memory that was sent to other hosts.", &one(sent));
    let drained: Vec<_> = daemon.drained.all().iter().map(|(node, _)| (labels(&[("node", node)]), 1.0)).collect();
    text.family("virtward_host_drained", "gauge", "1 for hosts that take no VMs until they are resumed.", &drained);
}

/// Whether the daemon itself is well.
fn operations(daemon: &Daemon, text: &mut Text) {
    let alarms = daemon.alarms.counts().into_iter();
    let alarms: Vec<_> = alarms.map(|(kind, count)| (labels(&[("kind", &kind)]), count as f64)).collect();
    text.family("virtward_alarms", "gauge", "Troubles that last, of the whole cluster, by kind.", &alarms);
    let config = daemon.config();
    let free = alarms::state_free(&config.state_dir).map(|free| (String::new(), free as f64));
    let help = "Bytes free where the daemon's state is.";
    text.family("virtward_state_free_bytes", "gauge", help, &free.into_iter().collect::<Vec<_>>());
    let newest = virtward_cluster::embedded::backups(&config.state_dir.join(wire_up::STATE_FILE));
    let newest = newest.first().map(|backup| (String::new(), backup.made.as_second() as f64));
    let help = "When the newest automatic backup of the state file was made.";
    text.family("virtward_state_backup_seconds", "gauge", help, &newest.into_iter().collect::<Vec<_>>());
    let ends = daemon.certificate().map(|certificate| (labels(&[("use", "https")]), certificate.ends));
    let own = daemon.peers.identity().and_then(|identity| identity.credentials.identity().ok());
    let own = own.map(|own| (labels(&[("use", "cluster")]), own.not_after));
    let ends: Vec<_> = [ends, own].into_iter().flatten().map(|(of, at)| (of, at.as_second() as f64)).collect();
    text.family("virtward_certificate_ends_seconds", "gauge", "When a certificate of this daemon ends.", &ends);
    let channels = daemon.events.notifier.channels();
    let each: Vec<_> = channels
        .iter()
        .flat_map(|channel| {
            let sample =
                |outcome: &str, count: u64| (labels(&[("channel", &channel.name), ("outcome", outcome)]), count as f64);
            [sample("delivered", channel.delivered), sample("given-up", channel.given_up)]
        })
        .collect();
    text.family("virtward_notifications_total", "counter", "Messages to people.", &each);
    let failing = channels
        .iter()
        .map(|channel| (labels(&[("channel", &channel.name)]), f64::from(u8::from(channel.error.is_some()))));
    let help = "1 if the last try of a channel failed.";
    text.family("virtward_notification_failing", "gauge", help, &failing.collect::<Vec<_>>());
}

fn high_availability(daemon: &Daemon, text: &mut Text) {
    let Ok(status) = crate::ha::status(daemon) else { return };
    let one = |value: f64| vec![(String::new(), value)];
    let armed = one(if status.armed { 1.0 } else { 0.0 });
    text.family("virtward_ha_armed", "gauge", "1 if silent hosts are fenced and VMs restarted.", &armed);
    let each = |of: &dyn Fn(&virtward_api::HaHost) -> Option<f64>| -> Vec<(String, f64)> {
        status.hosts.iter().filter_map(|host| Some((labels(&[("host", &host.name)]), of(host)?))).collect()
    };
    let grade = each(&|host| Some(["none", "degraded", "full"].iter().position(|word| *word == host.grade)? as f64));
    text.family("virtward_ha_host_grade", "gauge", "How well a host is protected: 0 none, 1 degraded, 2 full.", &grade);
    let silent = each(&|host| Some(host.silent_ms? as f64 / 1e3));
    text.family("virtward_ha_host_silent_seconds", "gauge", "How long nothing was heard of a host.", &silent);
    let phases: Vec<_> =
        status.hosts.iter().map(|host| (labels(&[("host", &host.name), ("phase", &host.phase)]), 1.0)).collect();
    text.family("virtward_ha_host_phase", "gauge", "1 for the phase that a host is in.", &phases);
    let mut vms: BTreeMap<&str, f64> = BTreeMap::new();
    for vm in &status.vms {
        *vms.entry(&vm.phase).or_default() += 1.0;
    }
    let vms: Vec<_> = vms.into_iter().map(|(phase, count)| (labels(&[("phase", phase)]), count)).collect();
    text.family("virtward_ha_vms", "gauge", "Protected VMs by phase.", &vms);
    let down = status.vms.iter().filter(|vm| vm.should_run && vm.phase != "running").count() as f64;
    text.family("virtward_ha_vms_down", "gauge", "Protected VMs that should run and do not.", &one(down));
    let active = status.vms.iter().filter_map(|vm| Some((vm, vm.pair.as_ref().filter(|pair| pair.role == "active")?)));
    let ready = |pair: &virtward_api::HaPair| if pair.takes_over { 1.0 } else { 0.0 };
    let standby: Vec<_> = active.map(|(vm, pair)| (labels(&[("vm", &vm.name)]), ready(pair))).collect();
    text.family("virtward_ha_standby_ready", "gauge", "1 if the standby of a VM could take over now.", &standby);
}

fn repositories(daemon: &Daemon, text: &mut Text) {
    let all: Vec<_> = daemon.repositories.all().iter().map(|entry| views::repository(daemon, entry)).collect();
    let each = |of: &dyn Fn(&virtward_api::Repository) -> Option<f64>| -> Vec<(String, f64)> {
        all.iter().filter_map(|one| Some((labels(&[("repository", &one.name)]), of(one)?))).collect()
    };
    let is_ok = each(&|one| Some(if one.error.is_none() { 1.0 } else { 0.0 }));
    text.family("virtward_repository_usable", "gauge", "1 if a repository can be used.", &is_ok);
    text.family("virtward_repository_points", "gauge", "Restore points.", &each(&|one| Some(one.points as f64)));
    let bytes = each(&|one| Some(one.usage.as_ref()?.bytes as f64));
    text.family("virtward_repository_bytes", "gauge", "Bytes stored.", &bytes);
    let free = each(&|one| Some(one.usage.as_ref()?.free_bytes? as f64));
    text.family("virtward_repository_free_bytes", "gauge", "Bytes free in its file system.", &free);
    let total = each(&|one| Some(one.usage.as_ref()?.total_bytes? as f64));
    text.family("virtward_repository_size_bytes", "gauge", "Size of its file system.", &total);
    let data = each(&|one| Some(one.usage.as_ref()?.data_bytes as f64));
    text.family("virtward_repository_data_bytes", "gauge", "Bytes of data in all restore points.", &data);
}
