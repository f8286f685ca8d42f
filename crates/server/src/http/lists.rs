//! Restore points, repositories, events, the audit log.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use serde::Deserialize;
use uuid::Uuid;
use virtward_api::{AuditEntry, Code, Event, Page, Point, Problem, Severity};
use virtward_model::{PointId, RestorePoint};

use super::{
    answer::{Answer, ok},
    everywhere::{self, AuditPlace, Whose},
    params::{self, Name, Params, Who},
};
use crate::{daemon::Daemon, failures::Result, repositories::Entry, views};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointParams {
    repository: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

/// Restore points that pass, newest first.
pub fn page_of_points(
    daemon: &Daemon,
    query: &PointParams,
    passes: impl Fn(&RestorePoint) -> bool,
) -> Result<Page<Point>> {
    let limit = params::limit(query.limit)?;
    let entries: Vec<Arc<Entry>> = match &query.repository {
        Some(name) => vec![daemon.repositories.find(Some(name))?],
        None => daemon.repositories.all(),
    };
    let views: Vec<_> = entries.iter().map(|entry| (entry.config.name.as_str(), entry.view())).collect();
    let mut items = Vec::new();
    for (name, view) in &views {
        for point in view.points.values().flatten().filter(|point| passes(point)) {
            // Counted down from the end of time, so that the newest come first.
            let place = format!("{:020}{}{name}", i64::MAX - point.taken.as_millisecond(), point.id);
            items.push((place, (point, *name, view)));
        }
    }
    items.sort_by(|a, b| a.0.cmp(&b.0));
    let page = params::page(items, query.cursor.as_deref(), limit)?;
    let shown = page.items.into_iter().map(|(point, name, view)| views::point(point, name, view.holds.get(&point.id)));
    Ok(Page { items: shown.collect(), next: page.next, total: page.total, missing: Vec::new() })
}

pub async fn points(State(daemon): State<Arc<Daemon>>, Params(query): Params<PointParams>) -> Answer {
    ok(&page_of_points(&daemon, &query, |_| true)?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryParam {
    repository: Option<String>,
}

pub async fn point(
    State(daemon): State<Arc<Daemon>>,
    Name(id): Name,
    Params(query): Params<RepositoryParam>,
) -> Answer {
    let id: PointId = id.parse().map_err(|error| Problem::new(Code::NotFound, format!("{error}")))?;
    let entries = match &query.repository {
        Some(name) => vec![daemon.repositories.find(Some(name))?],
        None => daemon.repositories.all(),
    };
    for entry in &entries {
        let view = entry.view();
        if let Some(point) = view.points.values().flatten().find(|point| point.id == id) {
            return ok(&views::point(point, &entry.config.name, view.holds.get(&id)));
        }
    }
    Err(Problem::new(Code::NotFound, format!("there is no restore point {id}")).into())
}

pub async fn repositories(State(daemon): State<Arc<Daemon>>) -> Answer {
    let all: Vec<_> = daemon.repositories.all().iter().map(|entry| views::repository(&daemon, entry)).collect();
    ok(&all)
}

pub async fn repository(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer {
    let entry = daemon.repositories.find(Some(&name))?;
    ok(&views::repository(&daemon, &entry))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventParams {
    severity: Option<String>,
    kind: Option<String>,
    vm: Option<Uuid>,
    job: Option<Uuid>,
    node: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

pub async fn events(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    RawQuery(raw): RawQuery,
    Params(query): Params<EventParams>,
) -> Answer {
    let raw = raw.unwrap_or_default();
    let asked = ("/api/v1/events", &*raw);
    let limit = params::limit(query.limit)?;
    let severity = query.severity.as_deref().map(|text| params::word::<Severity>("severity", text)).transpose()?;
    let before = query.cursor.as_deref().map(params::place).transpose()?;
    let whose = everywhere::whose(&daemon, query.node.as_deref())?;
    if let Whose::Of(node) = &whose {
        return ok(&everywhere::of::<Event>(&daemon, &who, node, asked).await?);
    }
    let mut own = daemon.events.page(limit, |event| {
        before.as_ref().is_none_or(|before| event.id < *before)
            && severity.is_none_or(|severity| event.severity >= severity)
            && query.kind.as_ref().is_none_or(|kind| event.kind == *kind)
            && query.vm.is_none_or(|vm| event.vm == Some(vm))
            && query.job.is_none_or(|job| event.job == Some(job))
    });
    let (others, missing) = match whose {
        Whose::All => {
            own.0.iter_mut().for_each(|event| event.node = Some(daemon.nodes.me.name.clone()));
            everywhere::of_others::<Event>(&daemon, &who, asked).await
        }
        _ => (Vec::new(), Vec::new()),
    };
    ok(&Page { missing, ..everywhere::events(own, others, limit) })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditParams {
    who: Option<String>,
    action: Option<String>,
    node: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

pub async fn audit(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    RawQuery(raw): RawQuery,
    Params(query): Params<AuditParams>,
) -> Answer {
    let raw = raw.unwrap_or_default();
    let asked = ("/api/v1/audit", &*raw);
    let (limit, me) = (params::limit(query.limit)?, daemon.nodes.me.name.clone());
    let before = query.cursor.as_deref().map(AuditPlace::parse).transpose()?;
    let whose = everywhere::whose(&daemon, query.node.as_deref())?;
    if let Whose::Of(node) = &whose {
        return ok(&everywhere::of::<AuditEntry>(&daemon, &who, node, asked).await?);
    }
    let (items, more) = daemon.audit.page(limit, |entry| {
        before.as_ref().is_none_or(|before| before.is_before(entry, &me))
            && query.who.as_ref().is_none_or(|who| entry.who == *who)
            && query.action.as_ref().is_none_or(|action| entry.action == *action)
    });
    if matches!(whose, Whose::All) {
        let (others, missing) = everywhere::of_others::<AuditEntry>(&daemon, &who, asked).await;
        return ok(&Page { missing, ..everywhere::audit((me, items, more), others, limit) });
    }
    let next = items.last().filter(|_| more).map(|entry| params::cursor(&entry.id.to_string()));
    ok(&Page { items, next, total: None, missing: Vec::new() })
}
