//! Hosts and virtual machines.

use std::sync::Arc;

use axum::extract::State;
use jiff::Timestamp;
use serde::Deserialize;
use uuid::Uuid;
use virtward_api::{Code, Explanation, PolicyVerdict, PowerState, Problem, ProtectionState, Vm, VmRef};
use virtward_decide::{pointref, schedule};
use virtward_engine::reconcile::inventory::{VmView, World};
use virtward_model::select::Pattern;

use super::{
    answer::{Answer, ok},
    lists::{PointParams, page_of_points},
    params::{self, Name, Params},
};
use crate::{daemon::Daemon, failures::Result, views::Views};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageParams {
    limit: Option<usize>,
    cursor: Option<String>,
}

pub async fn hosts(State(daemon): State<Arc<Daemon>>, Params(query): Params<PageParams>) -> Answer {
    let host = Views::new(&daemon).host();
    let items = vec![(host.name.clone(), host)];
    ok(&params::page(items, query.cursor.as_deref(), params::limit(query.limit)?)?)
}

pub async fn host(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    let host = Views::new(&daemon).host();
    if host.name != name && host.uuid.is_none_or(|uuid| uuid.to_string() != name) {
        return Err(Problem::new(Code::NotFound, format!("there is no host {name}")).into());
    }
    ok(&host)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmParams {
    name: Option<String>,
    tag: Option<String>,
    host: Option<String>,
    state: Option<String>,
    protection: Option<String>,
    policy: Option<String>,
    sort: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

/// What VMs are ordered by.
#[derive(Clone, Copy)]
enum Sort {
    Name,
    Host,
    State,
    Protection,
    Size,
    LastPoint,
    NextRun,
}

impl Sort {
    fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "name" => Sort::Name,
            "host" => Sort::Host,
            "state" => Sort::State,
            "protection" => Sort::Protection,
            "size" => Sort::Size,
            "last-point" => Sort::LastPoint,
            "next-run" => Sort::NextRun,
            _ => return Err(params::bad("sort", "name, host, state, protection, size, last-point or next-run")),
        })
    }

    /// A text that orders as the values do, and the UUID so that no two are equal.
    fn place(self, vm: &Vm) -> String {
        let time = |at: Option<Timestamp>| at.map_or(String::new(), |at| format!("{:020}", at.as_millisecond()));
        let key = match self {
            Sort::Name => vm.name.clone(),
            Sort::Host => format!("{}\u{0}{}", vm.host, vm.name),
            Sort::State => format!("{}\u{0}{}", vm.state as u8, vm.name),
            Sort::Protection => format!("{}\u{0}{}", vm.protection as u8, vm.name),
            Sort::Size => format!("{:020}\u{0}{}", vm.size_bytes.unwrap_or(0), vm.name),
            Sort::LastPoint => format!("{}\u{0}{}", time(vm.last_point), vm.name),
            Sort::NextRun => format!("{}\u{0}{}", time(vm.next_run), vm.name),
        };
        format!("{key}\u{0}{}", vm.uuid)
    }
}

pub async fn list(State(daemon): State<Arc<Daemon>>, Params(query): Params<VmParams>) -> Answer {
    let limit = params::limit(query.limit)?;
    let (sort, is_reverse) = match query.sort.as_deref() {
        None => (Sort::Name, false),
        Some(text) => match text.strip_prefix('-') {
            Some(text) => (Sort::parse(text)?, true),
            None => (Sort::parse(text)?, false),
        },
    };
    let state = query.state.as_deref().map(|text| params::word::<PowerState>("state", text)).transpose()?;
    let protection =
        query.protection.as_deref().map(|text| params::word::<ProtectionState>("protection", text)).transpose()?;
    let by_name = |name: &str| match &query.name {
        None => true,
        Some(pattern) if pattern.contains(['*', '?']) => Pattern::new(pattern.clone()).matches(name),
        Some(part) => name.contains(part.as_str()),
    };
    let views = Views::new(&daemon);
    let world = daemon.inventory.world();
    let mut items: Vec<(String, Vm)> = world
        .vms
        .values()
        .filter(|view| by_name(&view.vm.name))
        .filter(|view| query.tag.as_ref().is_none_or(|tag| view.details.tags.contains(tag)))
        .map(|view| views.vm(view))
        .filter(|vm| query.host.as_ref().is_none_or(|host| *host == vm.host))
        .filter(|vm| state.is_none_or(|state| state == vm.state))
        .filter(|vm| protection.is_none_or(|protection| protection == vm.protection))
        .filter(|vm| query.policy.as_ref().is_none_or(|policy| vm.policies.contains(policy)))
        .map(|vm| (sort.place(&vm), vm))
        .collect();
    items.sort_by(|a, b| a.0.cmp(&b.0));
    if !is_reverse {
        return ok(&params::page(items, query.cursor.as_deref(), limit)?);
    }
    items.reverse();
    // Places fall from here on: pages are cut by position.
    let after = query.cursor.as_deref().map(params::place).transpose()?;
    let total = Some(items.len() as u64);
    let mut rest = items.into_iter().filter(|(place, _)| after.as_ref().is_none_or(|after| place < after));
    let taken: Vec<(String, Vm)> = rest.by_ref().take(limit).collect();
    let next = match rest.next() {
        Some(_) => taken.last().map(|(place, _)| params::cursor(place)),
        None => None,
    };
    ok(&virtward_api::Page { items: taken.into_iter().map(|(_, vm)| vm).collect(), next, total })
}

/// A VM of the host by name or UUID.
pub fn find<'a>(world: &'a World, name: &str) -> Result<&'a VmView> {
    let by_uuid = name.parse::<Uuid>().ok().and_then(|uuid| world.vms.get(&uuid));
    let found = by_uuid.or_else(|| world.vms.values().find(|view| view.vm.name == name));
    found.ok_or_else(|| {
        let near = pointref::nearest(name, world.vms.values().map(|view| view.vm.name.as_str()));
        let problem = Problem::new(Code::NotFound, format!("there is no VM {name} on host {}", world.host.name));
        match near.is_empty() {
            true => problem.hint("GET /api/v1/vms lists the VMs"),
            false => problem.hint(format!("did you mean {}?", near.join(" or "))),
        }
    })
}

pub async fn one(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    let world = daemon.inventory.world();
    ok(&Views::new(&daemon).detail(find(&world, &name)?, Timestamp::now()))
}

pub async fn points(State(daemon): State<Arc<Daemon>>, Name(name): Name, Params(query): Params<PointParams>) -> Answer {
    let world = daemon.inventory.world();
    let is_here = find(&world, &name).map(|view| view.vm.uuid);
    let uuid = is_here.as_ref().ok().copied().or_else(|| name.parse().ok());
    let page = page_of_points(&daemon, &query, |point| match uuid {
        Some(uuid) => point.vm_uuid == uuid,
        None => point.vm == name,
    })?;
    match (is_here, page.total) {
        (Err(problem), Some(0)) => Err(problem.into()),
        _ => ok(&page),
    }
}

pub async fn explain(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    let world = daemon.inventory.world();
    let view = find(&world, &name)?;
    let vm = VmRef { uuid: view.vm.uuid, name: view.vm.name.clone() };
    let planned = daemon.plan();
    let found = schedule::explain(&planned.input, planned.at, &planned.report, vm.uuid);
    let Some(found) = found else {
        return Err(Problem::new(Code::Unavailable, format!("{} is new; the scheduler has not seen it yet", vm.name))
            .hint("ask again in a moment")
            .into());
    };
    let policies = found.policies.iter().enumerate().map(|(number, policy)| {
        let mut reasons = vec![policy.selection.to_string()];
        let zone = planned.input.policies.get(number).map(schedule::Compiled::zone);
        let mut waiting_for = None;
        if let (Some(state), Some(zone)) = (policy.state, zone) {
            reasons.push(state.text(zone));
            if let schedule::State::Waits { why, .. } = state {
                waiting_for = Some(why.text(zone));
            }
        }
        reasons.extend(policy.rpo_exceeded.map(|age| format!("the newest restore point is too old: {age}")));
        PolicyVerdict {
            policy: policy.policy.to_owned(),
            is_selected: policy.selection.is_selected(),
            reasons,
            next_run: policy.next,
            waiting_for,
        }
    });
    ok(&Explanation { vm, policies: policies.collect() })
}
