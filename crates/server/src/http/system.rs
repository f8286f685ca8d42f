//! The daemon itself: health, version, overview, settings, metrics.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use jiff::{SignedDuration, Timestamp};
use virtward_api::{
    Capacity, Counts, HostCounts, HostState, JobCounts, JobState, Overview, PowerState, ProtectionCounts,
    ProtectionState, RepositoryState, Settings, Severity, Version, openapi::DOCUMENT,
};

use super::answer::{Answer, ok};
use crate::{alarms, daemon::Daemon, metrics::text, views, views::Views};

/// Items of each list in the overview.
const SHOWN: usize = 20;

pub async fn healthz() -> &'static str {
    "ok\n"
}

pub async fn readyz(State(daemon): State<Arc<Daemon>>) -> Response {
    let mut troubles = Vec::new();
    if daemon.is_stopping() {
        troubles.push("the daemon is stopping".to_owned());
    }
    if let Err(problem) = daemon.kv.get::<serde_json::Value>("/v1/ready").await {
        troubles.push(problem.detail);
    }
    if let Some(why) = daemon.kv.full() {
        // Nothing may be written any more, or was: asked anew, so that it is ready as soon as there is room.
        let node = &daemon.nodes.me.name;
        if daemon.kv.put(&format!("/ready/{node}"), &Timestamp::now()).await.is_err() {
            troubles.push(why);
        }
    }
    let config = daemon.config();
    let dir = &config.state_dir;
    if alarms::state_free(dir).is_some_and(|free| free < alarms::STATE_MIN) {
        troubles.push(format!("there is no room left in {} for the daemon's state; free some", dir.display()));
    }
    match troubles.is_empty() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, troubles.join("\n") + "\n").into_response(),
    }
}

pub async fn metrics(State(daemon): State<Arc<Daemon>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text(&daemon)).into_response()
}

pub async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

pub async fn version(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&Version {
        product: "virtward".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        api: "v1".into(),
        host: daemon.host_name(),
        started: daemon.started,
    })
}

pub async fn settings(State(daemon): State<Arc<Daemon>>) -> Answer {
    let config = daemon.config();
    ok(&Settings {
        config_file: config.config_file.as_ref().map(|path| path.display().to_string()),
        state_dir: config.state_dir.display().to_string(),
        socket: config.socket.display().to_string(),
        listen: config.listen.map(|address| address.to_string()),
        certificate_sha256: daemon.certificate().map(|certificate| certificate.sha256),
        connect: config.connect.clone(),
        repositories: daemon.repository_names().into_iter().collect(),
        jobs_max: config.jobs_max,
        reconcile_s: config.reconcile.as_secs(),
    })
}

pub async fn overview(State(daemon): State<Arc<Daemon>>) -> Answer {
    let now = Timestamp::now();
    let views = Views::new(&daemon);
    let mut hosts = HostCounts { total: views::count(views.fleet.hosts.len()), ..HostCounts::default() };
    for host in views.fleet.hosts.values() {
        *match host.state {
            HostState::Up => &mut hosts.up,
            HostState::LibvirtdDown => &mut hosts.libvirtd_down,
            HostState::Down => &mut hosts.down,
            HostState::Unknown => &mut hosts.unknown,
        } += 1;
    }
    let (mut vms, mut protection) = (Counts::default(), ProtectionCounts::default());
    for placed in views.fleet.vms.values() {
        let vm = views.vm(placed);
        vms.total += 1;
        vms.running += u32::from(vm.state == PowerState::Running);
        *match vm.protection {
            ProtectionState::Protected => &mut protection.protected,
            ProtectionState::Overdue => &mut protection.overdue,
            ProtectionState::Pending => &mut protection.pending,
            ProtectionState::Unprotected => &mut protection.unprotected,
            ProtectionState::Unknown => &mut protection.unknown,
        } += 1;
    }
    let (day, week) = (SignedDuration::from_hours(24), SignedDuration::from_hours(24 * 7));
    let (mut jobs, mut running, mut failures) = (JobCounts::default(), Vec::new(), Vec::new());
    for record in daemon.jobs.records().iter().rev() {
        let age = now.duration_since(record.job.finished.unwrap_or(now));
        let is_recent = age <= day;
        match record.job.state {
            JobState::Queued => jobs.queued += 1,
            JobState::Running => {
                jobs.running += 1;
                if running.len() < SHOWN {
                    running.push(daemon.jobs.view(record));
                }
            }
            JobState::Failed | JobState::Interrupted => {
                jobs.failed += u32::from(is_recent);
                if age <= week && failures.len() < SHOWN {
                    failures.push(record.job.clone());
                }
            }
            JobState::Succeeded => jobs.succeeded += u32::from(is_recent),
            JobState::Cancelled => jobs.cancelled += u32::from(is_recent),
        }
    }
    let capacity = daemon.repositories.all().into_iter().map(|entry| {
        let view = entry.view();
        let usage = view.kept.usage.as_ref();
        Capacity {
            repository: entry.config.name.clone(),
            is_ok: view.state == RepositoryState::Ok,
            bytes: usage.map(|usage| usage.bytes),
            free_bytes: usage.and_then(|usage| usage.free_bytes),
            total_bytes: usage.and_then(|usage| usage.total_bytes),
            reduction: usage.map(|usage| usage.dedup_ratio * usage.compression_ratio),
        }
    });
    let capacity = capacity.collect();
    let (events, _) = daemon.events.page(SHOWN, |event| event.severity >= Severity::Warning);
    ok(&Overview { at: now, hosts, vms, protection, jobs, running, failures, capacity, events })
}
