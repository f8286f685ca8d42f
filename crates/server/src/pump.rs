//! From changes of the inventory to events and to those who follow; and what is done now and then.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde::Serialize;
use tokio::sync::mpsc;
use uuid::Uuid;
use virtward_api::{Said, Saying, Severity, VmRef};
use virtward_engine::{
    Cancel,
    reconcile::inventory::{Change, HostState},
};

use crate::{daemon::Daemon, events::Note, views, views::Views};

/// Changes that are handled together.
const TOGETHER: usize = 100;
/// Between two looks at what other daemons changed.
const OTHERS_EVERY: Duration = Duration::from_secs(1);
/// Between two looks into the repositories.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Looks between two times of tidying up.
const LOOKS_PER_TIDY: u32 = 60;

#[derive(Serialize)]
struct Removed {
    uuid: Uuid,
}

/// Tells of changes until the inventory ends.
pub async fn run(daemon: Arc<Daemon>, mut changes: mpsc::Receiver<Change>) {
    let mut batch = Vec::with_capacity(TOGETHER);
    // At the first look everything is new, which is no news.
    let mut is_first = true;
    while changes.recv_many(&mut batch, TOGETHER).await > 0 {
        let world = daemon.inventory.world();
        let views = Views::new(&daemon);
        daemon.publish.notify_one();
        let seen = batch.iter().filter_map(|change| match change {
            Change::Added(uuid) | Change::Changed(uuid, _) => world.vms.get(uuid),
            _ => None,
        });
        let seen: Vec<_> = seen.map(|view| (view.vm.uuid, &*view.vm.name, &*view.details.tags)).collect();
        let new = daemon.vms.see(&seen).await.unwrap_or_else(|problem| {
            tracing::warn!(%problem, "{} VMs could not be remembered", seen.len());
            BTreeSet::new()
        });
        for change in batch.drain(..) {
            match change {
                Change::Host(was) => host(&daemon, &views, was),
                Change::Removed(uuid, name) => {
                    daemon.hub.send("inventory", "vm-removed", &Removed { uuid });
                    vm_event(&daemon, "vm-removed", (uuid, &name), "is gone", Saying::VmGone.into());
                }
                Change::Added(uuid) | Change::Changed(uuid, _) => {
                    let Some(view) = world.vms.get(&uuid) else { continue };
                    let name = view.vm.name.clone();
                    if let Some(placed) = views.fleet.vms.get(&uuid) {
                        daemon.hub.send("inventory", "vm", &views.vm(placed));
                    }
                    if let Change::Changed(_, Some(was)) = change {
                        let now = views::power(view.vm.state);
                        let now = serde_json::to_value(now).ok();
                        let now = now.as_ref().and_then(|now| now.as_str()).unwrap_or("other").to_owned();
                        tracing::debug!(vm = name, ?was, now, "state changed");
                        let said = Said::from(Saying::VmState).with("state", now.as_str());
                        vm_event(&daemon, "vm-state", (uuid, &name), &format!("is {now} now"), said);
                    } else if matches!(change, Change::Added(_)) && new.contains(&uuid) && !is_first {
                        vm_event(&daemon, "vm-added", (uuid, &name), "is new", Saying::VmNew.into());
                    }
                }
            }
        }
        is_first &= !world.is_complete;
        daemon.schedule.notify_one();
    }
}

fn vm_event(daemon: &Daemon, kind: &'static str, (uuid, name): (Uuid, &str), what: &str, said: Said) {
    let mut note = Note::new(Severity::Info, kind, format!("{name} {what}")).says(said.with("vm", name));
    note.vm = Some(VmRef { uuid, name: name.to_owned() });
    note.host = Some(daemon.host_name());
    daemon.events.add(note);
}

fn host(daemon: &Daemon, views: &Views<'_>, was: HostState) {
    let host = views.host();
    daemon.hub.send("inventory", "host", &host);
    let world = daemon.inventory.world();
    let why = host.reason.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    let (severity, what, saying) = match world.host.state {
        HostState::Up => (Severity::Info, "is up".to_owned(), Saying::HostUp),
        HostState::LibvirtdDown => {
            (Severity::Error, format!("answers, its libvirtd does not{why}"), Saying::HostLibvirtdDown)
        }
        HostState::Down => (Severity::Error, format!("does not answer{why}"), Saying::HostDown),
        HostState::Unknown => {
            (Severity::Warning, format!("cannot be reached, and why is not known{why}"), Saying::HostUnknown)
        }
    };
    let said = Said::from(saying).with("host", host.name.as_str()).with("why", host.reason.clone());
    tracing::debug!(host = host.name, ?was, now = ?world.host.state, "the host's state changed");
    let mut note = Note::new(severity, "host-state", format!("host {} {what}", host.name)).says(said);
    note.host = Some(host.name);
    note.log();
    daemon.events.add(note);
}

/// Tells followers of VMs of other hosts that changed, and looks again into repositories that other daemons wrote into;
/// until cancelled.
pub async fn others(daemon: Arc<Daemon>, cancel: Cancel) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(OTHERS_EVERY) => {}
            () = cancel.cancelled() => return,
        }
        let changed = daemon.registry.take_changed();
        if !changed.is_empty() {
            let views = Views::new(&daemon);
            for uuid in changed {
                match views.fleet.vms.get(&uuid) {
                    Some(placed) => daemon.hub.send("inventory", "vm", &views.vm(placed)),
                    None => daemon.hub.send("inventory", "vm-removed", &Removed { uuid }),
                }
            }
        }
        for entry in daemon.repositories.take_stale() {
            tokio::select! {
                () = daemon.refresh(&entry) => {}
                () = cancel.cancelled() => return,
            }
        }
    }
}

/// Looks into repositories, measures them, forgets what is old; until cancelled.
pub async fn housekeeping(daemon: Arc<Daemon>, cancel: Cancel) {
    let mut looks = 0;
    while !cancel.is_cancelled() {
        let is_time = looks % LOOKS_PER_TIDY == 0;
        let work = async {
            for entry in daemon.repositories.all() {
                daemon.refresh(&entry).await;
                if is_time && daemon.leader.is_leader() {
                    daemon.measure(&entry).await;
                }
            }
            if is_time && daemon.leader.is_leader() {
                for outcome in [daemon.jobs.prune().await, daemon.access.prune().await] {
                    if let Err(problem) = outcome {
                        tracing::warn!(%problem, "tidying up");
                    }
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = cancel.cancelled() => return,
        }
        looks += 1;
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = cancel.cancelled() => return,
        }
    }
}
