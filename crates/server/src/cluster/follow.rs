//! Keeps everything in memory in step with the state store: one watch over all records, in the order in which they were
//! written, so that whoever sees that a job has ended sees what it left as well.
//!
//! When the store does not answer, what is known stays, and the daemon says that it may be old. What happened meanwhile
//! comes when the store is back, or, if the store does not remember it any more, by reading everything anew.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use virtward_api::{Said, Saying, Severity};
use virtward_cluster::{Change, Revision};
use virtward_engine::Cancel;

use super::{
    fleet::{HostRecord, VmRecord},
    nodes::NodeRecord,
};
use crate::{
    daemon::Daemon,
    events::Note,
    failures::Result,
    jobs::record::Record,
    table::{Changed, RowKey, Table},
};

/// Between two tries when the store does not answer.
const RETRY: Duration = Duration::from_millis(500);
/// How often it is asked whether it answers while nothing changes.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// Everything that is followed.
pub const PREFIX: &str = "/v1/";

/// Follows until cancelled.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    while !cancel.is_cancelled() {
        tokio::select! {
            outcome = session(&daemon) => {
                if let Err(problem) = outcome {
                    contact(&daemon, Some(problem.detail));
                }
            }
            () = cancel.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = cancel.cancelled() => return,
        }
    }
}

/// Reads everything, then follows as long as the store remembers.
async fn session(daemon: &Arc<Daemon>) -> Result<()> {
    let from = everything(daemon).await?;
    contact(daemon, None);
    let mut watch = daemon.kv.watch(PREFIX, from.next());
    daemon.follow_to(from);
    loop {
        match tokio::time::timeout(ASK_EVERY, watch.next()).await {
            Ok(Ok(changes)) => {
                contact(daemon, None);
                for change in &changes.changes {
                    apply(daemon, change, changes.revision);
                }
                daemon.follow_to(changes.revision);
            }
            Ok(Err(error)) if error.is_retryable() => {
                contact(daemon, Some(error.to_string()));
                tokio::time::sleep(RETRY).await;
            }
            // Too far behind: everything is read anew.
            Ok(Err(error)) => {
                tracing::info!(%error, "the state is read anew");
                return Ok(());
            }
            // Nothing happens, or nobody answers: a watch alone cannot tell.
            Err(_) => match daemon.kv.store().get(b"/v1/leader").await {
                Ok(_) => contact(daemon, None),
                Err(error) => contact(daemon, Some(error.to_string())),
            },
        }
    }
}

/// Reads all tables anew; the oldest revision that one of them is from.
async fn everything(daemon: &Arc<Daemon>) -> Result<Revision> {
    // Nodes first: what counts of the rest depends on them.
    let mut from = None;
    let kv = &daemon.kv;
    macro_rules! read {
        ($table:expr, $news:expr) => {
            let listing = kv.listing($table.prefix()).await?;
            from.get_or_insert(listing.revision);
            let news = $news;
            $table.reset(&listing).into_iter().for_each(|changed| news(daemon, changed));
        };
    }
    read!(daemon.nodes.records, node);
    read!(daemon.nodes.beats, beat);
    read!(daemon.policies.table, policy);
    read!(daemon.access.table, |_: &Arc<Daemon>, _| {});
    read!(daemon.vms.table, |_: &Arc<Daemon>, _| {});
    read!(daemon.repositories.table, repository);
    read!(daemon.registry.hosts, |daemon: &Arc<Daemon>, changed| _ = host(daemon, None, changed));
    read!(daemon.registry.vms, |daemon: &Arc<Daemon>, changed| _ = vm(daemon, None, changed));
    read!(daemon.claims.table, claim);
    read!(daemon.jobs.cancels, cancel_asked);
    read!(daemon.jobs.remote, progress);
    read!(daemon.alarms.table, |_: &Arc<Daemon>, _| {});
    read!(daemon.drained, |_: &Arc<Daemon>, _| {});
    read!(daemon.rounds, |_: &Arc<Daemon>, _| {});
    read!(daemon.jobs.past, |_: &Arc<Daemon>, _| {});
    read!(daemon.jobs.table, job);
    settled(daemon);
    Ok(from.unwrap_or_default())
}

fn apply(daemon: &Arc<Daemon>, change: &Change, at: Revision) {
    let (key, value) = match change {
        Change::Put(entry) => (&entry.key, Some(&entry.value[..])),
        Change::Delete { key } => (key, None),
    };
    // Whether plans may depend on it; none if it is not of this table.
    fn to<K: RowKey, V: serde::de::DeserializeOwned>(
        table: &Table<K, V>,
        (key, at, value): (&[u8], Revision, Option<&[u8]>),
        news: impl FnOnce(Option<Arc<V>>, Changed<K, V>) -> bool,
    ) -> Option<bool> {
        if !key.starts_with(table.prefix().as_bytes()) {
            return None;
        }
        let before = table.known(key);
        Some(table.follow(key, at, value).is_some_and(|changed| news(before, changed)))
    }
    macro_rules! always {
        ($news:expr) => {
            |_, changed| {
                $news(daemon, changed);
                true
            }
        };
    }
    let it = (&key[..], at, value);
    let matters = to(&daemon.jobs.table, it, always!(job))
        .or_else(|| to(&daemon.jobs.past, it, |_, _| true))
        .or_else(|| to(&daemon.registry.vms, it, |before, changed| vm(daemon, before, changed)))
        .or_else(|| to(&daemon.registry.hosts, it, |before, changed| host(daemon, before, changed)))
        .or_else(|| {
            to(&daemon.jobs.remote, it, |_, changed| {
                progress(daemon, changed);
                false
            })
        })
        .or_else(|| to(&daemon.claims.table, it, always!(claim)))
        .or_else(|| to(&daemon.vms.table, it, |_, _| true))
        .or_else(|| to(&daemon.alarms.table, it, |_, _| false))
        .or_else(|| to(&daemon.drained, it, |_, _| false))
        .or_else(|| {
            to(&daemon.rounds, it, |_, changed| {
                if let Changed::Put(_, round) = changed {
                    daemon.hub.send("inventory", "balance", &*round);
                }
                false
            })
        })
        .or_else(|| to(&daemon.policies.table, it, always!(policy)))
        .or_else(|| to(&daemon.access.table, it, |_, _| false))
        .or_else(|| to(&daemon.repositories.table, it, always!(repository)))
        .or_else(|| to(&daemon.nodes.records, it, always!(node)))
        .or_else(|| to(&daemon.nodes.beats, it, always!(beat)))
        .or_else(|| to(&daemon.jobs.cancels, it, always!(cancel_asked)));
    if matters == Some(true) {
        settled(daemon);
    }
}

/// Something changed that a plan or a waiting job may depend on.
fn settled(daemon: &Daemon) {
    daemon.schedule.notify_one();
}

fn contact(daemon: &Daemon, lost: Option<String>) {
    if !daemon.nodes.contact(lost.clone()) {
        return;
    }
    daemon.registry.touch();
    let note = match lost {
        None => Note::new(Severity::Info, "state-store", "the cluster's state store answers again")
            .says(Saying::StateStoreAnswers),
        Some(why) => {
            let text = format!("the state store does not answer; what runs goes on, nothing new starts: {why}");
            let said = Said::from(Saying::StateStoreSilent).with("why", why);
            Note::new(Severity::Error, "state-store", text).says(said)
        }
    };
    tracing::warn!("{}", note.message);
    daemon.events.add(note);
}

fn job(daemon: &Arc<Daemon>, changed: Changed<uuid::Uuid, Record>) {
    if let Changed::Put(_, record) = changed {
        daemon.jobs.news(&record);
        if record.job.state.is_final() && record.node != daemon.nodes.me.name {
            daemon.repositories.is_stale(&record);
        }
    }
}

fn cancel_asked(daemon: &Arc<Daemon>, changed: Changed<uuid::Uuid, crate::jobs::record::CancelAsked>) {
    if let Changed::Put(id, asked) = changed {
        daemon.jobs.cancel_asked(id, &asked);
    }
}

fn progress(daemon: &Arc<Daemon>, changed: Changed<String, crate::jobs::record::Running>) {
    if let Changed::Put(node, running) = changed
        && node != daemon.nodes.me.name
    {
        daemon.jobs.told_of(&running);
    }
}

fn claim(daemon: &Arc<Daemon>, changed: Changed<uuid::Uuid, super::claims::Held>) {
    match changed {
        Changed::Put(vm, _) | Changed::Deleted(vm) => daemon.claims.told(vm),
    }
    daemon.jobs.wake.notify_one();
}

fn policy(daemon: &Arc<Daemon>, changed: Changed<String, crate::policies::Stored>) {
    let (Changed::Put(name, _) | Changed::Deleted(name)) = changed;
    daemon.policies.news(&name);
    let revision = daemon.policies.table.get(&name).map(|stored| stored.revision);
    daemon.hub.send("policies", "policy", &serde_json::json!({ "name": name, "revision": revision }));
}

fn repository(daemon: &Arc<Daemon>, changed: Changed<String, crate::repositories::Kept>) {
    if let Changed::Put(name, kept) = changed {
        daemon.repositories.news(&name, &kept);
    }
}

/// Hosts tell of their load all the time; plans depend on less.
fn host(daemon: &Arc<Daemon>, before: Option<Arc<HostRecord>>, changed: Changed<String, HostRecord>) -> bool {
    let Changed::Put(node, record) = changed else {
        daemon.registry.touch();
        return true;
    };
    let shared = |record: &HostRecord| -> Vec<String> {
        record.host.storage.iter().filter(|one| one.is_shared).map(|one| one.path.clone()).collect()
    };
    let is_same = before.is_some_and(|before| {
        (&before.host.name, before.host.state, before.is_complete)
            == (&record.host.name, record.host.state, record.is_complete)
            && shared(&before) == shared(&record)
    });
    if !is_same {
        daemon.registry.touch();
    }
    if node != daemon.nodes.me.name {
        let (state, reason) = daemon.registry.state_of(&node, &record);
        let host = virtward_api::Host { state, reason, is_local: false, ..record.host.clone() };
        daemon.hub.send("inventory", "host", &host);
    }
    !is_same
}

/// The same for VMs and their use of resources.
fn vm(daemon: &Arc<Daemon>, before: Option<Arc<VmRecord>>, changed: Changed<(String, uuid::Uuid), VmRecord>) -> bool {
    let (node, uuid, record) = match changed {
        Changed::Put((node, uuid), record) => (node, uuid, Some(record)),
        Changed::Deleted((node, uuid)) => (node, uuid, None),
    };
    if node == daemon.nodes.me.name {
        return false;
    }
    daemon.registry.touch();
    daemon.registry.is_changed(uuid);
    let is_same = before.zip(record).is_some_and(|(before, record)| {
        (&before.view.vm, &before.view.details) == (&record.view.vm, &record.view.details)
    });
    !is_same
}

fn node(daemon: &Arc<Daemon>, changed: Changed<String, NodeRecord>) {
    daemon.registry.touch();
    let me = &daemon.nodes.me;
    let (name, record) = match changed {
        Changed::Put(name, record) => (name, Some(record)),
        Changed::Deleted(name) => (name, None),
    };
    if name != me.name {
        return;
    }
    let is_out = record.as_ref().is_none_or(|record| record.boot.is_some_and(|boot| boot != me.boot));
    if !daemon.nodes.removed(is_out) {
        return;
    }
    if !is_out {
        daemon.nodes.wake.notify_one();
        return;
    }
    let saying = if record.is_none() { Saying::ThisNodeRemoved } else { Saying::NodeNameTaken };
    let why = match record {
        None => format!("{} was removed from the cluster: it starts nothing any more; stop its daemon", me.name),
        Some(_) => {
            format!("another daemon calls itself {}: this one starts nothing any more; stop one of them", me.name)
        }
    };
    tracing::error!("{why}");
    daemon
        .events
        .add(Note::new(Severity::Error, "node-removed", why).says(Said::from(saying).with("node", me.name.as_str())));
}

fn beat(daemon: &Arc<Daemon>, changed: Changed<String, super::nodes::Beat>) {
    daemon.registry.touch();
    let (name, is_there) = match changed {
        Changed::Put(name, _) => (name, true),
        Changed::Deleted(name) => (name, false),
    };
    if name == daemon.nodes.me.name {
        if !is_there {
            daemon.nodes.wake.notify_one();
        }
        return;
    }
    let Some(record) = daemon.registry.hosts.get(&name) else { return };
    let (state, reason) = daemon.registry.state_of(&name, &record);
    let host = virtward_api::Host { state, reason, is_local: false, ..record.host.clone() };
    daemon.hub.send("inventory", "host", &host);
    // Everybody sees it; the leader alone makes an event of it.
    if daemon.leader.is_leader() {
        let stopped = daemon.nodes.records.get(&name).and_then(|record| record.stopped);
        let (severity, what, saying) = match (is_there, stopped) {
            (true, _) => (Severity::Info, "answers", Saying::NodeAnswers),
            (false, Some(_)) => (Severity::Info, "was stopped", Saying::NodeStopped),
            (false, None) => {
                (Severity::Error, "does not answer; whether its host is up is not known", Saying::NodeSilent)
            }
        };
        let mut note = Note::new(severity, "node", format!("the daemon of {name} {what} ({:.0})", Timestamp::now()))
            .says(Said::from(saying).with("node", name));
        note.host = Some(host.name);
        daemon.events.add(note);
    }
}
