//! Which of the backups that wait the limits let begin. Policies' are asked for when there is room; what people ask for
//! waits here until there is.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use jiff::{Timestamp, tz::TimeZone};
use uuid::Uuid;
use virtward_api::JobState;
use virtward_decide::schedule;

use super::record::{Record, Work};
use crate::{
    daemon::Daemon,
    said::{self, Sentence},
    scheduler, storages,
};

/// What the limits make of the backups of this node that wait.
#[derive(Default)]
pub struct Queue {
    /// Those that have to wait, with what they wait for.
    pub held: HashMap<Uuid, Sentence>,
    /// Those that may begin, with the host that reads and stores in place of this one.
    pub admitted: HashMap<Uuid, Option<String>>,
}

/// Judges the queue. `records`: all jobs, oldest first.
pub fn look(daemon: &Daemon, records: &[Arc<Record>], now: Timestamp) -> Queue {
    let backups = || records.iter().filter(|record| matches!(record.work, Work::Backup { .. }));
    let me = &daemon.nodes.me.name;
    if !backups().any(|record| record.job.state == JobState::Queued && record.node == *me) {
        return Queue::default();
    }
    let (fleet, names) = (daemon.fleet(), storages::Names::new(&daemon.registry));
    let as_job = |record: &Record| {
        let (job, vm) = (&record.job, record.job.vm.as_ref()?);
        let placed = fleet.vms.get(&vm.uuid);
        Some(schedule::Job {
            vm: vm.uuid,
            policy: job.origin.policy.clone(),
            host: job.host.clone(),
            proxies: match job.state {
                JobState::Running => job.proxy.clone().into_iter().collect(),
                _ => record.work.proxies().to_vec(),
            },
            storages: placed.map(|placed| names.of(&placed.node, &placed.host, &placed.view)).unwrap_or_default(),
            repository: job.repository.clone(),
            started: job.started.unwrap_or(job.created),
        })
    };
    let running: Vec<schedule::Job> =
        backups().filter(|record| record.job.state == JobState::Running).filter_map(|record| as_job(record)).collect();
    // What cannot begin for other reasons keeps nobody waiting.
    let claimed: HashSet<Uuid> = backups()
        .filter(|record| record.job.state == JobState::Queued)
        .filter_map(|record| record.job.vm.as_ref().map(|vm| vm.uuid))
        .filter(|vm| !daemon.claims.on(*vm).is_empty())
        .collect();
    let may_begin = |record: &&Arc<Record>| {
        record.job.state == JobState::Queued
            && record.not_before.is_none_or(|until| until <= now)
            && daemon.nodes.is_there(&record.node)
            && record.job.vm.as_ref().is_some_and(|vm| !claimed.contains(&vm.uuid))
    };
    let (waiting, jobs): (Vec<&Arc<Record>>, Vec<schedule::Job>) =
        backups().filter(may_begin).filter_map(|record| Some((record, as_job(record)?))).unzip();
    let answers = schedule::admit(&running, &jobs, &scheduler::limits(daemon), &daemon.daemons());
    let mut queue = Queue::default();
    for (record, answer) in waiting.iter().zip(answers).filter(|(record, _)| record.node == *me) {
        let id = record.job.id;
        match answer {
            Err(why) => _ = queue.held.insert(id, Sentence::new(why.text(&TimeZone::UTC), said::why(&why))),
            Ok(admitted) => _ = queue.admitted.insert(id, admitted.proxy),
        }
    }
    queue
}
