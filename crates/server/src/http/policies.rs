//! Policies.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode, header},
};
use jiff::Timestamp;
use serde::Serialize;
use virtward_api::{Change, Code, PolicyDiff, PolicyDocument, PolicyReport, Problem, Said, Saying, Severity, VmRef};
use virtward_decide::policy::diff;

use super::{
    answer::{Answer, ok},
    params::{self, Body, Name, Who},
};
use crate::{
    daemon::Daemon,
    events::Note,
    policies::{Parsed, refusal},
    views,
};

/// Runs that are foretold.
const UPCOMING: usize = 5;

#[derive(Serialize)]
struct Changed<'a> {
    name: &'a str,
    revision: Option<u64>,
}

pub async fn list(State(daemon): State<Arc<Daemon>>) -> Answer {
    let all: Vec<_> = daemon.policies.all().iter().map(|entry| views::policy(&daemon, &entry.0)).collect();
    ok(&all)
}

pub async fn one(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    let entry = daemon.policies.get(&name)?;
    ok(&views::policy(&daemon, &entry.0))
}

pub async fn put(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    Who(who): Who,
    headers: HeaderMap,
    Body(document, _): Body<PolicyDocument>,
) -> Answer {
    let revision = match headers.get(header::IF_MATCH) {
        None => None,
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.trim().trim_matches('"').parse::<u64>().ok());
            Some(number.ok_or_else(|| params::bad("if-match", "the revision of the policy, a number"))?)
        }
    };
    let parsed = daemon.policies.parse(&document, &daemon.repository_names(), &daemon.host_names())?;
    if !parsed.findings.is_empty() {
        return Err(refusal(&parsed.findings).into());
    }
    let [policy] = &parsed.policies[..] else {
        let found = parsed.policies.len();
        return Err(
            Problem::new(Code::Invalid, format!("the document has {found} policies; send them one by one")).into()
        );
    };
    if policy.name != name {
        let detail = format!("the policy is called {:?}, the path {name:?}", policy.name);
        return Err(Problem::new(Code::Invalid, detail)
            .hint("to rename a policy, apply it and delete the old one")
            .into());
    }
    let stored = daemon.policies.put(policy.clone(), document.source.clone(), revision, &who.name).await?;
    let text = format!("{} applied policy {name}", who.name);
    told(&daemon, &name, Some(stored.revision), text, Said::from(Saying::PolicyApplied).with("who", who.name));
    ok(&views::policy(&daemon, &stored))
}

pub async fn delete(State(daemon): State<Arc<Daemon>>, Name(name): Name, Who(who): Who) -> Answer<StatusCode> {
    daemon.policies.delete(&name).await?;
    let text = format!("{} deleted policy {name}", who.name);
    told(&daemon, &name, None, text, Said::from(Saying::PolicyDeleted).with("who", who.name));
    Ok(StatusCode::NO_CONTENT)
}

fn told(daemon: &Daemon, name: &str, revision: Option<u64>, text: String, said: Said) {
    daemon.hub.send("policies", "policy", &Changed { name, revision });
    let mut note = Note::new(Severity::Info, "policy-changed", text).says(said.with("policy", name));
    note.policy = Some(name.to_owned());
    daemon.events.add(note);
    daemon.schedule.notify_one();
}

fn report(daemon: &Daemon, parsed: &Parsed) -> PolicyReport {
    let planned = daemon.plan();
    let mut vms = BTreeSet::new();
    let mut next_runs = BTreeSet::new();
    for policy in &parsed.policies {
        vms.extend(views::selected(policy, &planned.input.vms).into_iter().map(|vm| (vm.name.clone(), vm)));
        if let Some(compiled) = daemon.policies.try_compile(policy.clone(), Timestamp::now()) {
            next_runs.extend(compiled.upcoming(Timestamp::now(), UPCOMING));
        }
    }
    PolicyReport {
        is_valid: parsed.findings.is_empty(),
        findings: parsed.findings.clone(),
        name: parsed.policies.first().map(|policy| policy.name.clone()).filter(|_| parsed.policies.len() == 1),
        vms: vms.into_iter().map(|(_, vm)| vm).collect(),
        next_runs: next_runs.into_iter().take(UPCOMING).collect(),
    }
}

pub async fn validate(State(daemon): State<Arc<Daemon>>, Body(document, _): Body<PolicyDocument>) -> Answer {
    let parsed = daemon.policies.parse(&document, &daemon.repository_names(), &daemon.host_names())?;
    ok(&report(&daemon, &parsed))
}

pub async fn diff(State(daemon): State<Arc<Daemon>>, Body(document, _): Body<PolicyDocument>) -> Answer {
    let parsed = daemon.policies.parse(&document, &daemon.repository_names(), &daemon.host_names())?;
    let [new] = &parsed.policies[..] else {
        return Err(match parsed.findings.is_empty() {
            true => Problem::new(Code::Invalid, "the document must have one policy").into(),
            false => refusal(&parsed.findings).into(),
        });
    };
    let old = daemon.policies.policy(&new.name);
    let differences = diff::diff(old.as_slice(), std::slice::from_ref(new));
    let changes = differences.into_iter().flat_map(|difference| match difference.change {
        diff::Change::Changed { fields } => fields,
        diff::Change::Added | diff::Change::Removed => Vec::new(),
    });
    let changes = changes.map(|change| Change {
        field: change.field,
        from: change.old.unwrap_or_default(),
        to: change.new.unwrap_or_default(),
    });
    let planned = daemon.plan();
    let selects = |policy| views::selected(policy, &planned.input.vms);
    let (now, then) = (old.as_ref().map(selects).unwrap_or_default(), selects(new));
    let without = |one: &[VmRef], other: &[VmRef]| one.iter().filter(|vm| !other.contains(vm)).cloned().collect();
    ok(&PolicyDiff {
        name: new.name.clone(),
        is_new: old.is_none(),
        changes: changes.collect(),
        vms_added: without(&then, &now),
        vms_removed: without(&now, &then),
        report: report(&daemon, &parsed),
    })
}
