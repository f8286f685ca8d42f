//! Hosts and virtual machines.

use std::sync::Arc;

use axum::extract::State;
use jiff::Timestamp;
use serde::Deserialize;
use virtward_api::{
    Code, Explanation, HostState, PolicyVerdict, PowerState, Problem, ProtectionState, Said, Saying, Vm, VmRef,
};
use virtward_decide::{pointref, schedule};
use virtward_engine::reconcile::inventory::VmView;
use virtward_model::select::Pattern;

use super::{
    answer::{Answer, ok},
    lists::{PointParams, page_of_points},
    params::{self, Name, Params},
};
use crate::{
    cluster::fleet::{Fleet, Placed},
    daemon::Daemon,
    failures::Result,
    said,
    views::Views,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostParams {
    name: Option<String>,
    state: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

pub async fn hosts(State(daemon): State<Arc<Daemon>>, Params(query): Params<HostParams>) -> Answer {
    let state = query.state.as_deref().map(|text| params::word::<HostState>("state", text)).transpose()?;
    let hosts = Views::new(&daemon).hosts().into_iter();
    let hosts = hosts.filter(|host| is_named(query.name.as_deref(), &host.name));
    let hosts = hosts.filter(|host| state.is_none_or(|state| state == host.state));
    let items = hosts.map(|host| (host.name.clone(), host)).collect();
    ok(&params::page(items, query.cursor.as_deref(), params::limit(query.limit)?)?)
}

pub async fn host(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    shown_host(&daemon, &name)
}

/// A host by name or UUID.
pub fn shown_host(daemon: &Daemon, name: &str) -> Answer {
    let is_it = |host: &virtward_api::Host| host.name == name || host.uuid.is_some_and(|it| it.to_string() == name);
    match Views::new(daemon).hosts().into_iter().find(is_it) {
        Some(host) => ok(&host),
        None => Err(Problem::new(Code::NotFound, format!("there is no host {name}")).into()),
    }
}

/// Whether a name has a part, or matches a pattern whole.
fn is_named(wanted: Option<&str>, name: &str) -> bool {
    match wanted {
        None => true,
        Some(pattern) if pattern.contains(['*', '?']) => Pattern::new(pattern).matches(name),
        Some(part) => name.contains(part),
    }
}

/// Whether a VM is known by such a name, outside or inside of it, or is reached there.
fn is_found(wanted: &str, view: &VmView) -> bool {
    let guest = view.guest.as_deref();
    let hostname = guest.and_then(|guest| guest.hostname.as_ref());
    let mut addresses = guest.into_iter().flat_map(|guest| guest.addresses.values().flatten());
    is_named(Some(wanted), &view.vm.name)
        || hostname.is_some_and(|name| is_named(Some(wanted), name))
        || addresses.any(|address| is_named(Some(wanted), &address.to_string()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmParams {
    name: Option<String>,
    search: Option<String>,
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
    let views = Views::new(&daemon);
    let mut items: Vec<(String, Vm)> = views
        .fleet
        .vms
        .values()
        .filter(|placed| is_named(query.name.as_deref(), &placed.view.vm.name))
        .filter(|placed| query.search.as_ref().is_none_or(|wanted| is_found(wanted, &placed.view)))
        .filter(|placed| query.tag.as_ref().is_none_or(|tag| placed.view.details.tags.contains(tag)))
        .map(|placed| views.vm(placed))
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
    let items = taken.into_iter().map(|(_, vm)| vm).collect();
    ok(&virtward_api::Page { items, next, total, missing: Vec::new() })
}

/// A VM by name or UUID. That there is none is only said when every host has been looked at.
pub fn find<'a>(fleet: &'a Fleet, name: &str) -> Result<&'a Placed> {
    fleet.find(name).ok_or_else(|| {
        let near = pointref::nearest(name, fleet.vms.values().map(|placed| placed.view.vm.name.as_str()));
        let hosts: Vec<&str> = fleet.hosts.values().map(|host| host.name.as_str()).collect();
        let of = match &hosts[..] {
            [one] => format!("host {one}"),
            all => format!("the {} hosts of the cluster", all.len()),
        };
        let unseen: Vec<&str> =
            fleet.hosts.values().filter(|host| !host.is_complete).map(|host| host.name.as_str()).collect();
        if !unseen.is_empty() {
            let text = format!("no VM {name} is known, and what runs on {} has not been seen yet", unseen.join(", "));
            return Problem::new(Code::HypervisorUnreachable, text)
                .hint("a daemon that just started looks at once: ask again; GET /api/v1/hosts says if libvirt does not answer");
        }
        let problem = Problem::new(Code::NotFound, format!("there is no VM {name} on {of}"));
        match near.is_empty() {
            true => problem.hint("virtward vm list (GET /api/v1/vms) lists the VMs"),
            false => problem.hint(format!("did you mean {}?", near.join(" or "))),
        }
    })
}

pub async fn one(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    let views = Views::new(&daemon);
    ok(&views.detail(find(&views.fleet, &name)?, Timestamp::now()))
}

pub async fn points(State(daemon): State<Arc<Daemon>>, Name(name): Name, Params(query): Params<PointParams>) -> Answer {
    let fleet = daemon.fleet();
    let is_here = find(&fleet, &name).map(|placed| placed.view.vm.uuid);
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
    let fleet = daemon.fleet();
    let placed = find(&fleet, &name)?;
    let view = &placed.view;
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
        let mut reasons_said = vec![said::selection(&policy.selection)];
        let zone = planned.input.policies.get(number).map(schedule::Compiled::zone);
        let mut waiting_for = None;
        if let (Some(state), Some(zone)) = (policy.state, zone) {
            reasons.push(state.text(zone));
            reasons_said.push(said::state(state));
            if let schedule::State::Waits { why, .. } = state {
                waiting_for = Some(why.text(zone));
            }
        }
        let host = placed.host.as_str();
        reasons.extend(policy.carrier.as_ref().map(|carrier| carrier.text(host)));
        reasons_said.extend(policy.carrier.as_ref().map(|carrier| said::carrier(carrier, host)));
        reasons.extend(policy.rpo_exceeded.map(|age| format!("the newest restore point is too old: {age}")));
        reasons_said.extend(policy.rpo_exceeded.map(|age| Said::from(Saying::PointOld).with("age_s", age.0)));
        PolicyVerdict {
            policy: policy.policy.to_owned(),
            is_selected: policy.selection.is_selected(),
            reasons,
            reasons_said,
            next_run: policy.next,
            waiting_for,
            runs_on: policy.carrier.as_ref().map(|carrier| carrier.proxy().unwrap_or(host).to_owned()),
        }
    });
    ok(&Explanation { vm, policies: policies.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fleet::FleetHost;

    #[test]
    fn a_host_that_was_not_seen_yet_may_have_any_vm() {
        let mut fleet = Fleet::default();
        let host = FleetHost { name: "h1".into(), state: HostState::Up, is_complete: false };
        fleet.hosts.insert("h1".into(), host);
        assert_eq!(find(&fleet, "web1").err().map(|problem| problem.code), Some(Code::HypervisorUnreachable));
        fleet.hosts.get_mut("h1").unwrap().is_complete = true;
        assert_eq!(find(&fleet, "web1").err().map(|problem| problem.code), Some(Code::NotFound));
    }
}
