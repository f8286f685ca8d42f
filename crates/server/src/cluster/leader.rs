//! Who plans: on one host its daemon, in a cluster the daemon that won the election.
//!
//! Planning is pure and done by every daemon, because pages show it; only the leader asks for jobs, and every
//! transaction by which it does carries its guard. Before a new leader plans it writes `/v1/leader` and waits until the
//! news of that reaches it: then it knows everything that leaders before it did.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use virtward_api::{Code, Problem, Said, Saying, Severity};
use virtward_cluster::{
    Compare, Revision,
    election::{Candidate, Leadership},
};
use virtward_engine::Cancel;

use crate::{
    daemon::Daemon,
    events::Note,
    failures::Result,
    kv::{self, Kv},
};

const KEY: &str = "/v1/leader";
/// Between two records that planning goes on.
const PLANNED_EVERY: Duration = Duration::from_secs(60);
/// A break in planning shorter than this is none.
const BREAK_MAX: SignedDuration = SignedDuration::from_mins(3);

/// Who leads, for everybody to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// Name of the node.
    pub node: String,
    /// Fencing number.
    pub epoch: u64,
    /// Since when it leads.
    pub since: Timestamp,
    /// Since when somebody has been planning without a break.
    pub planning_since: Timestamp,
    /// When it last planned, to a minute.
    pub planned: Timestamp,
}

enum Lead {
    /// There is nobody else.
    Alone,
    Follows,
    Leads {
        guard: Compare,
        epoch: Revision,
        planning_since: Timestamp,
    },
}

/// Whether this daemon leads.
pub struct Leader {
    lead: RwLock<Lead>,
    /// Changes whenever it begins or ends to.
    pub changed: watch::Sender<u64>,
}

impl Leader {
    /// In a cluster nobody leads at first; alone, this daemon does.
    pub fn new(is_cluster: bool) -> Self {
        let lead = if is_cluster { Lead::Follows } else { Lead::Alone };
        Self { lead: RwLock::new(lead), changed: watch::Sender::new(0) }
    }

    /// Whether it leads, as far as it knows.
    pub fn is_leader(&self) -> bool {
        !matches!(*self.lead.read().unwrap_or_else(PoisonError::into_inner), Lead::Follows)
    }

    /// What every transaction of the leader's has to compare; an error if this daemon does not lead.
    pub fn guard(&self) -> Result<Vec<Compare>> {
        match &*self.lead.read().unwrap_or_else(PoisonError::into_inner) {
            Lead::Alone => Ok(Vec::new()),
            Lead::Leads { guard, .. } => Ok(vec![guard.clone()]),
            Lead::Follows => Err(Problem::new(Code::Unavailable, "this daemon does not lead the cluster (any more)")),
        }
    }

    /// Fencing number of this leadership: rises with every leader. Zero on one host.
    pub fn epoch(&self) -> Option<Revision> {
        match &*self.lead.read().unwrap_or_else(PoisonError::into_inner) {
            Lead::Alone => Some(Revision::default()),
            Lead::Leads { epoch, .. } => Some(*epoch),
            Lead::Follows => None,
        }
    }

    /// Since when somebody plans without a break; `started` on one host.
    pub fn planning_since(&self, started: Timestamp) -> Timestamp {
        match &*self.lead.read().unwrap_or_else(PoisonError::into_inner) {
            Lead::Leads { planning_since, .. } => *planning_since,
            _ => started,
        }
    }

    fn set(&self, lead: Lead) {
        *self.lead.write().unwrap_or_else(PoisonError::into_inner) = lead;
        self.changed.send_modify(|changes| *changes += 1);
    }
}

/// Who leads, as the store has it.
pub async fn current(kv: &Kv) -> Result<Option<LeaderRecord>> {
    Ok(kv.get::<LeaderRecord>(KEY).await?.map(|(record, _)| record))
}

/// Stands for election again and again until cancelled. `ttl` is how long a leader that vanishes is waited for.
pub async fn run(daemon: Arc<Daemon>, ttl: Duration, cancel: Cancel) {
    let me = daemon.nodes.me.name.clone();
    let candidate = Candidate::new(daemon.kv.store(), "scheduler", &me, ttl);
    while !cancel.is_cancelled() {
        if daemon.nodes.is_removed() {
            tokio::select! {
                () = tokio::time::sleep(ttl) => continue,
                () = cancel.cancelled() => return,
            }
        }
        let won = tokio::select! {
            won = candidate.campaign() => won,
            () = cancel.cancelled() => return,
        };
        match won {
            Ok(leadership) => {
                tokio::select! {
                    () = term(&daemon, &leadership) => {}
                    () = cancel.cancelled() => {}
                }
                daemon.leader.set(Lead::Follows);
                leadership.resign().await;
            }
            Err(error) => tracing::warn!(%error, "no election"),
        }
        tokio::select! {
            () = tokio::time::sleep(ttl / 10) => {}
            () = cancel.cancelled() => return,
        }
    }
}

/// One leadership, until it is lost.
async fn term(daemon: &Arc<Daemon>, leadership: &Leadership) {
    let Some(record) = begin(daemon, leadership).await else { return };
    let (epoch, planning_since) = (leadership.epoch(), record.planning_since);
    daemon.leader.set(Lead::Leads { guard: leadership.guard(), epoch, planning_since });
    let note = format!("{} leads the cluster (epoch {epoch})", record.node);
    let said = Said::from(Saying::NodeLeads).with("node", record.node.as_str()).with("epoch", epoch.to_string());
    tracing::info!("{note}");
    daemon.events.add(Note::new(Severity::Info, "leader", note).says(said));
    daemon.schedule.notify_one();
    let lost = leadership.lost();
    tokio::pin!(lost);
    loop {
        tokio::select! {
            () = &mut lost => return,
            () = tokio::time::sleep(PLANNED_EVERY) => {}
        }
        if daemon.nodes.is_removed() {
            return;
        }
        let record = LeaderRecord { planned: Timestamp::now(), ..record.clone() };
        let Ok(put) = kv::put(KEY, &record) else { return };
        match daemon.kv.commit(vec![leadership.guard()], vec![put]).await {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(problem) => tracing::debug!(%problem, "leading goes on without a record of it"),
        }
    }
}

/// Says who leads, and waits until everything before that is known here.
async fn begin(daemon: &Daemon, leadership: &Leadership) -> Option<LeaderRecord> {
    let now = Timestamp::now();
    let before = current(&daemon.kv).await.ok()?;
    let unbroken = before.filter(|before| now.duration_since(before.planned) < BREAK_MAX);
    let record = LeaderRecord {
        node: daemon.nodes.me.name.clone(),
        epoch: leadership.epoch().0,
        since: now,
        planning_since: unbroken.map_or(now, |before| before.planning_since),
        planned: now,
    };
    let put = kv::put(KEY, &record).ok()?;
    let revision = daemon.kv.commit(vec![leadership.guard()], vec![put]).await.ok()??;
    tokio::select! {
        () = daemon.caught_up(revision) => Some(record),
        () = leadership.lost() => None,
    }
}
