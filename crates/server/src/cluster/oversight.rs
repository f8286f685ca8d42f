//! What the leader looks after besides planning: jobs of nodes that are gone, jobs whose VM is elsewhere by now, VMs that
//! run twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;
use virtward_api::{JobState, Said, Saying, Severity, VmRef};
use virtward_engine::Cancel;

use crate::{
    daemon::Daemon,
    events::Note,
    jobs::{
        self,
        record::{Place, Record, Work},
    },
};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(5);
/// A job of a daemon that is silent for so long is told as interrupted. If it goes on after all, its result counts.
const SILENT_MAX: Duration = Duration::from_secs(300);
/// A VM that is seen on two hosts for so long runs twice: while it moves, news of the two may be apart for a moment.
const TWICE_MIN: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Seen {
    silent: BTreeMap<String, Instant>,
    twice: BTreeMap<Uuid, Instant>,
    told_twice: BTreeSet<Uuid>,
}

/// Looks until cancelled; only while this daemon leads.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let mut seen = Seen::default();
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = cancel.cancelled() => return,
        }
        // Without the store nothing is known of anybody.
        if !daemon.leader.is_leader() || daemon.nodes.lost_store().is_some() {
            seen = Seen::default();
            continue;
        }
        silence(&daemon, &mut seen);
        for record in daemon.jobs.records() {
            match record.job.state {
                JobState::Running => lost(&daemon, &seen, &record).await,
                JobState::Queued => elsewhere(&daemon, &record).await,
                _ => {}
            }
        }
        twice(&daemon, &mut seen);
    }
}

fn silence(daemon: &Daemon, seen: &mut Seen) {
    let now = Instant::now();
    let silent = daemon.nodes.records.all().into_iter().map(|(name, _)| name);
    let silent: BTreeSet<String> = silent.filter(|name| !daemon.nodes.is_there(name)).collect();
    seen.silent.retain(|name, _| silent.contains(name));
    for name in silent {
        seen.silent.entry(name).or_insert(now);
    }
}

async fn lost(daemon: &Daemon, seen: &Seen, record: &Record) {
    let (saying, why) = if daemon.nodes.records.get(&record.node).is_none() {
        let why = format!("{} was removed from the cluster while this job ran", record.node);
        (Saying::JobNodeRemoved, why)
    } else if seen.silent.get(&record.node).is_some_and(|since| since.elapsed() >= SILENT_MAX) {
        let why =
            format!("the daemon of {} does not answer any more; whether this job still runs is not known", record.node);
        (Saying::JobNodeSilent, why)
    } else {
        return;
    };
    match daemon.jobs.presume_interrupted(record.job.id, why.clone()).await {
        Ok(()) => {
            let mut note = Note::new(Severity::Warning, "job-interrupted", why)
                .says(Said::from(saying).with("node", record.node.as_str()));
            (note.job, note.vm, note.host) =
                (Some(record.job.id), record.job.vm.clone(), Some(record.job.host.clone()));
            daemon.events.add(note.about(jobs::runner::condition(&record.job), false));
        }
        Err(problem) => tracing::debug!(job = %record.job.id, %problem, "it was not told as interrupted"),
    }
}

/// A backup that waits on a node that will not do it goes where its VM is.
async fn elsewhere(daemon: &Daemon, record: &Record) {
    if !matches!(record.work, Work::Backup { .. }) || daemon.nodes.is_there(&record.node) {
        return;
    }
    let fleet = daemon.fleet();
    let Some(placed) = record.job.vm.as_ref().and_then(|vm| fleet.vms.get(&vm.uuid)) else { return };
    if placed.node == record.node || !daemon.nodes.is_there(&placed.node) {
        return;
    }
    let place = Place { node: placed.node.clone(), host: placed.host.clone() };
    if let Err(problem) = daemon.jobs.move_to(record.job.id, place).await {
        tracing::debug!(job = %record.job.id, %problem, "it stays where it waits");
    }
}

fn twice(daemon: &Daemon, seen: &mut Seen) {
    let fleet = daemon.fleet();
    seen.twice.retain(|vm, _| fleet.twice.contains_key(vm));
    seen.told_twice.retain(|vm| fleet.twice.contains_key(vm));
    for (vm, hosts) in &fleet.twice {
        let since = *seen.twice.entry(*vm).or_insert_with(Instant::now);
        if since.elapsed() < TWICE_MIN || !seen.told_twice.insert(*vm) {
            continue;
        }
        let name = fleet.vms.get(vm).map_or_else(|| vm.to_string(), |placed| placed.view.vm.name.clone());
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        let text = format!("{name} runs on {} at the same time; shut one of them off at once", hosts.join(" and "));
        tracing::error!("{text}");
        let mut note = Note::new(Severity::Error, "vm-runs-twice", text)
            .says(Said::from(Saying::VmRunsTwice).with("vm", name.as_str()).with("hosts", hosts));
        note.vm = Some(VmRef { uuid: *vm, name });
        daemon.events.add(note);
    }
}
