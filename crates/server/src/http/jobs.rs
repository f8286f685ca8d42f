//! Jobs: seen, asked for, cancelled.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use jiff::tz::TimeZone;
use serde::Deserialize;
use uuid::Uuid;
use virtward_api::{
    BackupRequest, Code, GcRequest, Job, JobKind, JobState, Origin, Page, PlannedDisk, Principal, Problem, RestorePlan,
    RestoreRequest, VerifyRequest, VmRef,
};
use virtward_decide::pointref;
use virtward_engine::plan_restore_vm;
use virtward_model::{PointId, RestorePoint, policy::Hooks};

use super::{
    answer::{Answer, Failed, ok, with},
    guard::Remark,
    params::{self, Body, Name, Params, Who},
    vms,
};
use crate::{
    cluster::fleet::Placed,
    daemon::Daemon,
    failures::{self, Result},
    jobs::record::{NewJob, Place, Work},
    repositories::{Entry, file_system},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobParams {
    state: Option<String>,
    kind: Option<String>,
    vm: Option<String>,
    policy: Option<String>,
    repository: Option<String>,
    host: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

pub async fn list(State(daemon): State<Arc<Daemon>>, Params(query): Params<JobParams>) -> Answer {
    let limit = params::limit(query.limit)?;
    let states: Option<BTreeSet<JobState>> = match &query.state {
        Some(text) => Some(text.split(',').map(|word| params::word("state", word)).collect::<Result<_>>()?),
        None => None,
    };
    let kind = query.kind.as_deref().map(|text| params::word::<JobKind>("kind", text)).transpose()?;
    let before = query.cursor.as_deref().map(params::place).transpose()?;
    let wrong = |_| params::bad("cursor", "this is not a cursor of this list");
    let before = before.map(|place| place.parse::<Uuid>().map_err(wrong)).transpose()?;
    let of_vm = |vm: &Option<VmRef>| match &query.vm {
        None => true,
        Some(wanted) => vm.as_ref().is_some_and(|vm| vm.name == *wanted || vm.uuid.to_string() == *wanted),
    };
    let records = daemon.jobs.records();
    let mut found = records.iter().rev().filter(|record| {
        let job = &record.job;
        states.as_ref().is_none_or(|states| states.contains(&job.state))
            && kind.is_none_or(|kind| kind == job.kind)
            && of_vm(&job.vm)
            && query.policy.as_ref().is_none_or(|policy| job.origin.policy.as_ref() == Some(policy))
            && query.repository.as_ref().is_none_or(|repository| job.repository == *repository)
            && query.host.as_ref().is_none_or(|host| job.host == *host || job.proxy.as_ref() == Some(host))
    });
    let total = Some(found.clone().count() as u64);
    let mut rest = found.by_ref().filter(|record| before.is_none_or(|before| record.job.id < before));
    let items: Vec<Job> = rest.by_ref().take(limit).map(|record| daemon.jobs.view(record)).collect();
    let next = match rest.next() {
        Some(_) => items.last().map(|job| params::cursor(&job.id.to_string())),
        None => None,
    };
    ok(&Page { items, next, total, missing: Vec::new() })
}

fn id(text: &str) -> Result<Uuid> {
    text.parse().map_err(|_| Problem::new(Code::NotFound, format!("there is no job {text}")))
}

pub async fn one(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    ok(&daemon.jobs.job(id(&name)?)?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogParams {
    after: Option<u64>,
    limit: Option<usize>,
}

pub async fn log(State(daemon): State<Arc<Daemon>>, Name(name): Name, Params(query): Params<LogParams>) -> Answer {
    let limit = params::limit(query.limit.or(Some(1000)))?;
    ok(&daemon.jobs.log(id(&name)?, query.after.unwrap_or(0), limit).await?)
}

pub async fn cancel(State(daemon): State<Arc<Daemon>>, Name(name): Name, Who(who): Who) -> Answer {
    with(StatusCode::ACCEPTED, &daemon.jobs.cancel(id(&name)?, &who.name).await?)
}

/// Asks for a job; `path` tells requests with one idempotency key apart.
pub async fn submit(
    daemon: &Daemon,
    new: NewJob,
    place: &Place,
    headers: &HeaderMap,
    who: &Principal,
    path: &str,
    body: &[u8],
) -> Result<Response, Failed> {
    if daemon.is_stopping() {
        return Err(Problem::new(Code::Unavailable, "the daemon is stopping").hint("ask again when it runs").into());
    }
    let again = params::idempotency(headers, who, path, body)?;
    let target = match &new.vm {
        Some(vm) => format!("{} ({})", vm.name, vm.uuid),
        None if new.repository.is_empty() => place.host.clone(),
        None => new.repository.clone(),
    };
    let (job, _) = daemon.jobs.submit(new, place, again.as_ref(), Vec::new()).await?;
    let remark = Remark(format!("{target}, job {}", job.id));
    let mut response = with(StatusCode::ACCEPTED, &job)?.into_response();
    response.extensions_mut().insert(remark);
    Ok(response)
}

pub async fn backup(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    headers: HeaderMap,
    Body(mut request, body): Body<BackupRequest>,
) -> Result<Response, Failed> {
    let fleet = daemon.fleet();
    let placed = vms::find(&fleet, &request.vm)?;
    let view = &placed.view;
    let vm = VmRef { uuid: view.vm.uuid, name: view.vm.name.clone() };
    if request.bandwidth_bytes_s == Some(0) {
        let detail = "bandwidth_bytes_s: a limit of nothing would never end; leave it out for no limit";
        return Err(Problem::new(Code::Invalid, detail).into());
    }
    let hosts = daemon.host_names();
    if let Some(unknown) = request.proxy.iter().flatten().find(|name| !hosts.contains(*name)) {
        let known = hosts.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let detail = format!("proxy: there is no host {unknown}");
        return Err(Problem::new(Code::Invalid, detail).hint(format!("the hosts are {known}")).into());
    }
    let planned = daemon.plan();
    let line = planned.lines.get(&vm.uuid).and_then(|lines| planned.report.lines.get(*lines.first()?));
    let policy = line.and_then(|line| planned.input.policies.get(line.policy)).map(|policy| policy.policy());
    let name = request.repository.clone().or_else(|| policy.map(|policy| policy.repository.clone()));
    let repository = daemon.repositories.find(name.as_deref())?.config.name.clone();
    let of_policy = || policy.map(|policy| policy.proxy.clone()).unwrap_or_default();
    let proxies = request.proxy.take().unwrap_or_else(of_policy);
    let new = NewJob {
        work: Work::Backup { request, hooks: Hooks::default(), timeout: None, proxies },
        vm: Some(vm),
        repository,
        origin: Origin::from(&who),
        proxy: None,
    };
    let place = daemon.place_for(&new);
    submit(&daemon, new, &place, &headers, &who, "backup", &body).await
}

/// The restore point that is meant, from what the daemon knows or, if it does not, from the repository.
async fn resolve(daemon: &Daemon, entry: &Arc<Entry>, text: &str) -> Result<RestorePoint> {
    let look = || {
        let mut all: Vec<RestorePoint> =
            entry.view().points.values().flatten().map(|point| (**point).clone()).collect();
        all.sort_by_key(|point| (point.taken, point.id));
        match pointref::resolve(&all, text, &TimeZone::system()) {
            Ok(found) => Ok(found.point.clone()),
            Err(error) => Err(failures::point(&error)),
        }
    };
    match look() {
        Err(problem) if problem.code == Code::NotFound => {
            // Somebody else may have made it a moment ago.
            daemon.refresh(entry).await;
            if let Some(error) = &entry.view().error {
                return Err(Problem::new(Code::Repository, error.clone()));
            }
            look()
        }
        found => found,
    }
}

/// Whether somebody may restore a VM: of those who are limited to tags, only with one of them.
fn check_scope(daemon: &Daemon, who: &Principal, point: &RestorePoint, name: Option<&str>) -> Result<()> {
    if who.vm_tags.is_empty() {
        return Ok(());
    }
    let fleet = daemon.fleet();
    let tags = |uuid: Uuid| match fleet.vms.get(&uuid) {
        Some(placed) => placed.view.details.tags.clone(),
        None => daemon.vms.known(uuid).map(|known| known.tags).unwrap_or_default(),
    };
    let may = |uuid: Uuid| tags(uuid).iter().any(|tag| who.vm_tags.contains(tag));
    // What would be replaced must be theirs as well.
    let named = |placed: &&Placed| Some(&*placed.view.vm.name) == name;
    if may(point.vm_uuid) && fleet.vms.values().filter(named).all(|placed| may(placed.view.vm.uuid)) {
        return Ok(());
    }
    let allowed = who.vm_tags.join(", ");
    Err(Problem::new(Code::Forbidden, format!("{} may restore only VMs with one of the tags {allowed}", who.name)))
}

/// Where a restore is done: on the host that was named, else where the VM is that is made or replaced, else where the
/// restore point was taken if that host is there, else here.
fn restore_place(daemon: &Daemon, point: &RestorePoint, request: &RestoreRequest) -> Result<Place> {
    let fleet = daemon.fleet();
    let place = |node: &str| {
        let host = fleet.hosts.get(node).map_or_else(|| node.to_owned(), |host| host.name.clone());
        Place { node: node.to_owned(), host }
    };
    if let Some(host) = &request.host {
        return fleet.node_of(host).map(place).ok_or_else(|| {
            Problem::new(Code::NotFound, format!("there is no host {host}"))
                .hint("virtward cluster status (GET /api/v1/hosts) lists the hosts")
        });
    }
    let name = request.name.as_deref().unwrap_or(&point.vm);
    let existing = fleet.by_name(name).or_else(|| fleet.vms.get(&point.vm_uuid));
    let origin = fleet.node_of(&point.host).filter(|node| daemon.nodes.is_there(node));
    Ok(existing.map(|placed| place(&placed.node)).or_else(|| origin.map(place)).unwrap_or_else(|| daemon.here()))
}

pub async fn restore(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    headers: HeaderMap,
    Body(request, body): Body<RestoreRequest>,
) -> Result<Response, Failed> {
    let entry = daemon.repositories.find(request.repository.as_deref())?;
    let point = resolve(&daemon, &entry, &request.point).await?;
    check_scope(&daemon, &who, &point, request.name.as_deref())?;
    if request.disk_dir.as_ref().is_some_and(|dir| !std::path::Path::new(dir).is_absolute()) {
        return Err(Problem::new(Code::Invalid, "disk_dir: an absolute path on the host").into());
    }
    let place = restore_place(&daemon, &point, &request)?;
    if request.dry_run && place.node != daemon.nodes.me.name {
        let (status, answer) = daemon.peers.forward(&place.node, "/api/v1/jobs/restore", body, &who).await?;
        let answer = crate::peers::client::good(&place.node, status, answer)?;
        return Ok(([(axum::http::header::CONTENT_TYPE, "application/json")], answer).into_response());
    }
    if request.dry_run {
        return Ok(ok(&plan(&daemon, &entry, &point, &request).await?)?.into_response());
    }
    let name = request.name.clone().unwrap_or_else(|| point.vm.clone());
    // The arbiter keeps operations on the VM that is written apart from each other.
    let existing = daemon.fleet().by_name(&name).map(|placed| placed.view.vm.uuid);
    let new = NewJob {
        work: Work::Restore { point: point.id, request },
        vm: Some(VmRef { uuid: existing.unwrap_or(point.vm_uuid), name }),
        repository: entry.config.name.clone(),
        origin: Origin::from(&who),
        proxy: None,
    };
    submit(&daemon, new, &place, &headers, &who, "restore", &body).await
}

async fn plan(daemon: &Daemon, entry: &Entry, point: &RestorePoint, request: &RestoreRequest) -> Result<RestorePlan> {
    let options = crate::jobs::restore_options(request);
    let repository = entry.open().await?;
    let env = daemon.env()?;
    let planned = plan_restore_vm(&env, &repository, point.id, &options).await;
    let planned = planned.map_err(|error| failures::engine(&error))?;
    let mut warnings = Vec::new();
    let disks: Vec<PlannedDisk> = planned
        .disks
        .iter()
        .map(|disk| {
            let free_bytes = disk.path.parent().and_then(file_system).map(|(_, free)| free);
            if free_bytes.is_some_and(|free| free < disk.record.data_bytes) {
                let path = disk.path.display();
                warnings.push(format!("{path}: the data of the disk does not fit into the free space"));
            }
            PlannedDisk {
                target: disk.record.target.clone(),
                path: disk.path.display().to_string(),
                format: disk.format.driver().to_owned(),
                size_bytes: disk.record.size_bytes,
                data_bytes: disk.record.data_bytes,
                replaces: disk.path.exists(),
                free_bytes,
            }
        })
        .collect();
    Ok(RestorePlan {
        point: point.id.to_string(),
        taken: point.taken,
        name: planned.name,
        uuid: planned.uuid,
        host: daemon.host_name(),
        replaces: planned.replaces,
        start: request.start,
        data_bytes: disks.iter().map(|disk| disk.data_bytes).sum(),
        disks,
        warnings,
    })
}

pub async fn verify(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    headers: HeaderMap,
    Body(request, body): Body<VerifyRequest>,
) -> Result<Response, Failed> {
    if request.percent.is_some_and(|percent| !(1..=100).contains(&percent)) {
        return Err(Problem::new(Code::Invalid, "percent: a number from 1 to 100").into());
    }
    let entry = daemon.repositories.find(request.repository.as_deref())?;
    let mut points: Vec<PointId> = Vec::new();
    for text in &request.points {
        points.push(resolve(&daemon, &entry, text).await?.id);
    }
    let new = NewJob {
        work: Work::Verify { request, points },
        vm: None,
        repository: entry.config.name.clone(),
        origin: Origin::from(&who),
        proxy: None,
    };
    let place = daemon.place_for(&new);
    submit(&daemon, new, &place, &headers, &who, "verify", &body).await
}

pub async fn gc(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    headers: HeaderMap,
    Body(request, body): Body<GcRequest>,
) -> Result<Response, Failed> {
    let repository = daemon.repositories.find(request.repository.as_deref())?.config.name.clone();
    let new = NewJob { work: Work::Gc {}, vm: None, repository, origin: Origin::from(&who), proxy: None };
    let place = daemon.place_for(&new);
    submit(&daemon, new, &place, &headers, &who, "gc", &body).await
}
