//! VMs, disks and hosts that move or are emptied, and the balance of load.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, Uri, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use virtward_api::{
    BalanceRequest, Code, DrainRequest, MigrateRequest, MoveDiskRequest, Origin, Principal, Problem, VmRef,
};
use virtward_decide::arbiter::Operation;

use super::{
    answer::{Answer, Failed, ok},
    jobs::submit,
    params::{self, Body, Name, Params, Who},
    vms,
};
use crate::{
    daemon::Daemon,
    failures::Result,
    jobs::record::{NewJob, Place, Work},
    moves,
    peers::client::good,
};

const WATCH_S: u64 = 5;
const WATCH_S_MAX: u64 = 60;
const PARALLEL_MAX: u8 = 4;

fn invalid(detail: &str) -> Failed {
    Problem::new(Code::Invalid, detail).into()
}

/// Has another node answer a question.
async fn asked_there(
    daemon: &Daemon,
    node: &str,
    uri: &Uri,
    body: axum::body::Bytes,
    who: &Principal,
) -> Result<Response> {
    let (status, answer) = daemon.peers.forward(node, uri.path(), body, who).await?;
    let answer = good(node, status, answer)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], answer).into_response())
}

pub async fn migrate(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    Who(who): Who,
    uri: Uri,
    headers: HeaderMap,
    Body(request, body): Body<MigrateRequest>,
) -> Result<Response, Failed> {
    if request.bandwidth_bytes_s == Some(0) || request.max_downtime_ms == Some(0) {
        return Err(invalid(
            "bandwidth_bytes_s, max_downtime_ms: nothing would ever arrive; leave them out for no limit",
        ));
    }
    let fleet = daemon.fleet();
    let placed = vms::find(&fleet, &name)?;
    moves::reach::node_of(&daemon, &request.to)?;
    if request.dry_run && placed.node != daemon.nodes.me.name {
        return Ok(asked_there(&daemon, &placed.node, &uri, body, &who).await?);
    }
    if request.dry_run {
        return Ok(ok(&moves::migrate_plan(&daemon, placed, &request).await?)?.into_response());
    }
    let view = &placed.view;
    if placed.host == request.to || placed.node == request.to {
        let detail = format!("{} is on {} already", view.vm.name, request.to);
        return Err(Problem::new(Code::Conflict, detail).into());
    }
    let vm = VmRef { uuid: view.vm.uuid, name: view.vm.name.clone() };
    let work = Work::Migrate { request, operation: Operation::Migrate };
    let new = NewJob::without_repository(work, Some(vm), Origin::from(&who));
    let place = daemon.place_for(&new);
    submit(&daemon, new, &place, &headers, &who, uri.path(), &body).await
}

pub async fn move_disk(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    Who(who): Who,
    uri: Uri,
    headers: HeaderMap,
    Body(request, body): Body<MoveDiskRequest>,
) -> Result<Response, Failed> {
    if request.bandwidth_bytes_s == Some(0) {
        return Err(invalid("bandwidth_bytes_s: a limit of nothing would never end; leave it out for no limit"));
    }
    if !matches!(request.format.as_deref(), None | Some("qcow2" | "raw")) {
        return Err(invalid("format: qcow2 or raw"));
    }
    if request.to.is_empty() || (request.to.contains('/') && !request.to.starts_with('/')) {
        return Err(invalid("to: the name of a storage pool, or an absolute path"));
    }
    let fleet = daemon.fleet();
    let view = &vms::find(&fleet, &name)?.view;
    if !view.vm.disks.iter().any(|disk| disk.target == request.disk) {
        let detail = format!("{} has no disk {}", view.vm.name, request.disk);
        return Err(Problem::new(Code::NotFound, detail).into());
    }
    let vm = VmRef { uuid: view.vm.uuid, name: view.vm.name.clone() };
    let new = NewJob::without_repository(Work::MoveDisk { request }, Some(vm), Origin::from(&who));
    let place = daemon.place_for(&new);
    submit(&daemon, new, &place, &headers, &who, uri.path(), &body).await
}

pub async fn drain(
    State(daemon): State<Arc<Daemon>>,
    Name(host): Name,
    Who(who): Who,
    uri: Uri,
    headers: HeaderMap,
    Body(request, body): Body<DrainRequest>,
) -> Result<Response, Failed> {
    if request.parallel.is_some_and(|parallel| !(1..=PARALLEL_MAX).contains(&parallel)) {
        return Err(invalid("parallel: from 1 to 4"));
    }
    let node = moves::reach::node_of(&daemon, &host)?;
    if request.dry_run && node != daemon.nodes.me.name {
        return Ok(asked_there(&daemon, &node, &uri, body, &who).await?);
    }
    if request.dry_run {
        return Ok(ok(&moves::drain_plan(&daemon, &request).await?)?.into_response());
    }
    moves::may_drain(&daemon, &node, request.force)?;
    if !daemon.nodes.is_there(&node) {
        let detail = format!("the daemon of {host} does not answer, and it is the one that empties it");
        return Err(Problem::new(Code::Unavailable, detail).hint("virtward cluster status shows the nodes").into());
    }
    if let Some(job) = moves::draining(&daemon, &node) {
        let detail = format!("{host} is being drained already by job {job}");
        return Err(Problem::new(Code::Conflict, detail).hint("virtward job watch follows it").into());
    }
    let fleet = daemon.fleet();
    let host = fleet.hosts.get(&node).map_or_else(|| node.clone(), |host| host.name.clone());
    let new = NewJob::without_repository(Work::Drain { request }, None, Origin::from(&who));
    submit(&daemon, new, &Place { node, host }, &headers, &who, uri.path(), &body).await
}

pub async fn resume(State(daemon): State<Arc<Daemon>>, Name(host): Name) -> Answer {
    let node = moves::reach::node_of(&daemon, &host)?;
    moves::drained::resume(&daemon, &node).await?;
    vms::shown_host(&daemon, &host)
}

pub async fn balance(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&moves::balance::status(&daemon))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryParams {
    limit: Option<usize>,
}

pub async fn history(State(daemon): State<Arc<Daemon>>, Params(query): Params<HistoryParams>) -> Answer {
    ok(&moves::balance::history(&daemon, params::limit(query.limit)?))
}

fn check(request: &BalanceRequest) -> Result<Duration, Failed> {
    if request.eagerness.is_some_and(|level| !(1..=5).contains(&level)) {
        return Err(invalid("eagerness: from 1 to 5"));
    }
    if request.parallel.is_some_and(|parallel| !(1..=PARALLEL_MAX).contains(&parallel)) {
        return Err(invalid("parallel: from 1 to 4"));
    }
    let watch = request.interval_s.unwrap_or(WATCH_S);
    if !(1..=WATCH_S_MAX).contains(&watch) {
        return Err(invalid("interval_s: from 1 to 60"));
    }
    Ok(Duration::from_secs(watch))
}

pub async fn plan(State(daemon): State<Arc<Daemon>>, Who(who): Who, Body(request, _): Body<BalanceRequest>) -> Answer {
    let watch = check(&request)?;
    ok(&moves::balance::ask(&daemon, request.eagerness, watch, &who.name).await?.0)
}

pub async fn apply(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    uri: Uri,
    headers: HeaderMap,
    Body(request, body): Body<BalanceRequest>,
) -> Result<Response, Failed> {
    let watch = check(&request)?;
    let (_, plan) = moves::balance::ask(&daemon, request.eagerness, watch, &who.name).await?;
    let parallel = request.parallel.map_or(daemon.config().balance.parallel, usize::from);
    let new = NewJob::without_repository(Work::Balance { plan, parallel }, None, Origin::from(&who));
    submit(&daemon, new, &daemon.here(), &headers, &who, uri.path(), &body).await
}
