//! What this daemon tells the others of its host: a small record for the host, one for each VM, put only when they differ
//! from what is in the store; use of resources and progress of jobs now and then.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;
use virtward_api::{Host, Progress};
use virtward_cluster::{Op, TXN_LEN_MAX};
use virtward_engine::{
    Cancel,
    reconcile::inventory::{VmUsage, VmView, World},
};

use super::fleet::{HostRecord, VmRecord};
use crate::{daemon::Daemon, failures::Result, kv, views::Views};

/// Between two looks for what changed; news of the inventory come at once.
const TICK: Duration = Duration::from_secs(2);
/// Between two records that differ in numbers only.
const NUMBERS_EVERY: Duration = Duration::from_secs(30);
/// Nodes for which progress is told every [`TICK`]; with more of them it is told less often by each.
const NODES_PER_TICK: u32 = 20;

#[derive(Default)]
struct Told {
    numbers_at: Option<Instant>,
    progress_at: Option<Instant>,
    progress: BTreeMap<Uuid, Progress>,
}

/// Publishes until cancelled.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let mut told = Told::default();
    while !cancel.is_cancelled() {
        if !daemon.nodes.is_removed()
            && let Err(problem) = once(&daemon, &mut told).await
        {
            tracing::debug!(%problem, "the others are not told of this host for now");
        }
        tokio::select! {
            () = daemon.publish.notified() => {}
            () = tokio::time::sleep(TICK) => {}
            () = cancel.cancelled() => return,
        }
    }
}

async fn once(daemon: &Daemon, told: &mut Told) -> Result<()> {
    let now = Instant::now();
    let with_numbers = told.numbers_at.is_none_or(|at| now.duration_since(at) >= NUMBERS_EVERY);
    let world = daemon.inventory.world();
    host(daemon, &world, with_numbers).await?;
    if world.is_complete {
        vms(daemon, &world, with_numbers).await?;
    }
    if with_numbers {
        told.numbers_at = Some(now);
    }
    let nodes = u32::try_from(daemon.nodes.records.len()).unwrap_or(u32::MAX);
    let every = TICK * (nodes / NODES_PER_TICK).max(1);
    if told.progress_at.is_none_or(|at| now.duration_since(at) >= every) {
        let running = daemon.jobs.progress();
        if running != told.progress {
            daemon.kv.put(&format!("/v1/progress/{}", daemon.nodes.me.name), &running).await?;
            told.progress = running;
        }
        told.progress_at = Some(now);
    }
    Ok(())
}

/// Without what changes all the time.
fn essence(host: &Host) -> Host {
    Host { load: None, memory_available_bytes: None, seen: None, storage: Vec::new(), ..host.clone() }
}

async fn host(daemon: &Daemon, world: &World, with_numbers: bool) -> Result<()> {
    let me = &daemon.nodes.me;
    let host = Views::new(daemon).host();
    let repositories = daemon.repositories.all();
    let record = HostRecord {
        node: me.name.clone(),
        boot: me.boot,
        host,
        at: Timestamp::now(),
        repositories: repositories.iter().map(|entry| (entry.config.name.clone(), entry.view().id.clone())).collect(),
        is_complete: world.is_complete,
        reach: crate::moves::reach::own(&daemon.config()),
    };
    let before = daemon.registry.hosts.get(&me.name);
    let is_same = before.as_ref().is_some_and(|before| {
        before.boot == record.boot
            && before.repositories == record.repositories
            && (before.is_complete, &before.reach) == (record.is_complete, &record.reach)
            && match with_numbers {
                true => before.host == record.host,
                false => essence(&before.host) == essence(&record.host),
            }
    });
    if is_same {
        return Ok(());
    }
    let put = kv::put(&format!("/v1/hosts/{}", me.name), &record)?;
    if let Some(revision) = daemon.kv.commit(Vec::new(), vec![put]).await? {
        daemon.registry.hosts.put(me.name.clone(), revision, record);
    }
    Ok(())
}

/// Whether use of resources is about the same.
fn is_about(one: Option<&VmUsage>, other: Option<&VmUsage>) -> bool {
    let (one, other) = match (one, other) {
        (None, None) => return true,
        (Some(one), Some(other)) => (one, other),
        _ => return false,
    };
    let near = |a: u64, b: u64, least: u64| a.abs_diff(b) <= (a.max(b) / 10).max(least);
    const RATE: u64 = 256 << 10;
    (one.cpu - other.cpu).abs() <= 0.05_f64.max(one.cpu.max(other.cpu) / 10.0)
        && near(one.memory_rss_bytes, other.memory_rss_bytes, 16 << 20)
        && near(one.read_bytes_s, other.read_bytes_s, RATE)
        && near(one.write_bytes_s, other.write_bytes_s, RATE)
        && near(one.rx_bytes_s, other.rx_bytes_s, RATE)
        && near(one.tx_bytes_s, other.tx_bytes_s, RATE)
        && one.disks.len() == other.disks.len()
        && one
            .disks
            .iter()
            .zip(&other.disks)
            .all(|((name, a), (same, b))| name == same && a.0 == b.0 && near(a.1, b.1, 64 << 20))
}

fn is_same(before: &VmView, now: &VmView, with_numbers: bool) -> bool {
    (&before.vm, &before.details, before.agent, &before.guest) == (&now.vm, &now.details, now.agent, &now.guest)
        && (!with_numbers || is_about(before.usage.as_ref(), now.usage.as_ref()))
}

async fn vms(daemon: &Daemon, world: &World, with_numbers: bool) -> Result<()> {
    let me = &daemon.nodes.me.name;
    let key = |uuid: &Uuid| format!("/v1/inventory/{me}/{uuid}");
    let own = daemon.registry.vms.all().into_iter().filter(|((node, _), _)| node == me);
    let known: BTreeMap<Uuid, Arc<VmRecord>> = own.map(|((_, uuid), record)| (uuid, record)).collect();
    let mut batch: Vec<(Uuid, Option<VmRecord>)> = Vec::new();
    for (uuid, view) in &world.vms {
        let before = known.get(uuid);
        if before.is_some_and(|before| is_same(&before.view, view, with_numbers)) {
            continue;
        }
        let unchanged = before.filter(|before| before.view.vm.state == view.vm.state);
        let changed = unchanged.map_or_else(Timestamp::now, |before| before.changed);
        batch.push((*uuid, Some(VmRecord { view: view.clone(), changed })));
    }
    batch.extend(known.keys().filter(|uuid| !world.vms.contains_key(uuid)).map(|uuid| (*uuid, None)));
    // A value may have hundreds of kilobytes: half of what fits in number keeps below what fits in bytes.
    for some in batch.chunks(TXN_LEN_MAX / 2) {
        let op = |(uuid, record): &(Uuid, Option<VmRecord>)| match record {
            Some(record) => kv::put(&key(uuid), record),
            None => Ok(Op::delete(key(uuid))),
        };
        let ops = some.iter().map(op).collect::<Result<Vec<Op>>>()?;
        let Some(revision) = daemon.kv.commit(Vec::new(), ops).await? else { continue };
        for (uuid, record) in some {
            let row = (me.clone(), *uuid);
            match record {
                Some(record) => _ = daemon.registry.vms.put(row, revision, record.clone()),
                None => daemon.registry.vms.delete(&row, revision),
            }
        }
    }
    Ok(())
}
