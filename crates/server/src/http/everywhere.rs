//! Events and the audit log of all nodes. Each node keeps its own, on its own disk; whoever wants to see them together has
//! them asked for and put together here. Nodes that do not answer in time are named: what they know is not in the list.

use std::{cmp::Reverse, collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use tokio::{sync::Semaphore, task::JoinSet};
use virtward_api::{AuditEntry, Code, Event, Page, Principal, Problem};

use super::params;
use crate::{daemon::Daemon, failures::Result, peers::client};

/// How long a node may take, and how many are asked at once.
const ANSWER_MAX: Duration = Duration::from_secs(3);
const AT_ONCE: usize = 32;
/// The word for all nodes.
const ALL: &str = "all";

/// Whose entries are wanted.
pub enum Whose {
    /// This node's.
    Own,
    /// Another node's.
    Of(String),
    /// Everybody's.
    All,
}

/// Whose, by the parameter `node`.
pub fn whose(daemon: &Daemon, node: Option<&str>) -> Result<Whose> {
    match node {
        None => Ok(Whose::Own),
        Some(ALL) => Ok(Whose::All),
        Some(name) if name == daemon.nodes.me.name => Ok(Whose::Own),
        Some(name) if daemon.nodes.records.get(&name.to_owned()).is_some() => Ok(Whose::Of(name.to_owned())),
        Some(name) => Err(Problem::new(Code::NotFound, format!("there is no node {name}"))
            .hint("virtward cluster status (GET /api/v1/cluster) lists the nodes; all stands for every one of them")),
    }
}

/// The same request as it came, for another node: without the parameter that names it.
fn passed_on(path: &str, query: &str) -> String {
    let rest: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("node=")).collect();
    format!("{path}?{}", rest.join("&"))
}

/// The page of one other node.
pub async fn of<T: DeserializeOwned>(
    daemon: &Daemon,
    who: &Principal,
    node: &str,
    (path, query): (&str, &str),
) -> Result<Page<T>> {
    let (status, body) = daemon.peers.read(node, &passed_on(path, query), who).await?;
    let body = client::good(node, status, body)?;
    serde_json::from_slice(&body)
        .map_err(|error| Problem::new(Code::Unavailable, format!("node {node} answered something else: {error}")))
}

/// The pages of all other nodes, each with its name; and those that did not answer.
pub async fn of_others<T: DeserializeOwned + Send + 'static>(
    daemon: &Arc<Daemon>,
    who: &Principal,
    (path, query): (&str, &str),
) -> (Vec<(String, Page<T>)>, Vec<String>) {
    let names = daemon.nodes.records.all().into_iter().map(|(name, _)| name);
    let (there, silent): (Vec<String>, Vec<String>) =
        names.filter(|name| *name != daemon.nodes.me.name).partition(|name| daemon.nodes.is_there(name));
    let (mut missing, mut pages): (BTreeSet<String>, Vec<_>) = (silent.into_iter().collect(), Vec::new());
    missing.extend(there.iter().cloned());
    let (room, path) = (Arc::new(Semaphore::new(AT_ONCE)), passed_on(path, query));
    let mut asked = JoinSet::new();
    for node in there {
        let (daemon, who, room, path) = (daemon.clone(), who.clone(), room.clone(), path.clone());
        asked.spawn(async move {
            let _place = room.acquire().await;
            let answer = tokio::time::timeout(ANSWER_MAX, daemon.peers.read(&node, &path, &who)).await;
            match answer {
                Ok(Ok((200, body))) => serde_json::from_slice::<Page<T>>(&body).ok().map(|page| (node, page)),
                Ok(Err(problem)) => {
                    tracing::debug!(node, %problem, "its part of a list is missing");
                    None
                }
                _ => None,
            }
        });
    }
    while let Some(answer) = asked.join_next().await {
        if let Ok(Some((node, page))) = answer {
            missing.remove(&node);
            pages.push((node, page));
        }
    }
    (pages, missing.into_iter().collect())
}

/// Events of several nodes as one list, newest first. Their ids rise with time, also between nodes.
pub fn events(own: (Vec<Event>, bool), others: Vec<(String, Page<Event>)>, limit: usize) -> Page<Event> {
    let (mut items, mut more) = own;
    for (node, page) in others {
        more |= page.next.is_some();
        items.extend(page.items.into_iter().map(|event| Event { node: Some(node.clone()), ..event }));
    }
    items.sort_by(|a, b| b.id.cmp(&a.id));
    more |= items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|event| params::cursor(&event.id));
    Page { items, next, total: None, missing: Vec::new() }
}

/// Where a page of the audit log goes on: each node has numbers of its own, so of several nodes it is a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuditPlace {
    /// Before this number of one node's log.
    Number(u64),
    /// Before this entry in the order of time.
    Time(Timestamp, String, u64),
}

impl AuditPlace {
    /// The place that a cursor means.
    pub fn parse(cursor: &str) -> Result<Self> {
        let place = params::place(cursor)?;
        let parse = || {
            if let Ok(number) = place.parse() {
                return Some(Self::Number(number));
            }
            let (at, rest) = place.split_once(' ')?;
            let (number, node) = rest.split_once(' ')?;
            Some(Self::Time(at.parse().ok()?, node.to_owned(), number.parse().ok()?))
        };
        parse().ok_or_else(|| params::bad("cursor", "this is not a cursor of this list"))
    }

    /// Whether an entry of a node's comes after this place, in a list that has the newest first.
    pub fn is_before(&self, entry: &AuditEntry, of: &str) -> bool {
        match self {
            Self::Number(number) => entry.id < *number,
            Self::Time(at, node, number) => (entry.at, of, entry.id) < (*at, &**node, *number),
        }
    }
}

/// Entries of several nodes' audit logs as one list, newest first.
pub fn audit(
    own: (String, Vec<AuditEntry>, bool),
    others: Vec<(String, Page<AuditEntry>)>,
    limit: usize,
) -> Page<AuditEntry> {
    let (me, entries, mut more) = own;
    let mut items: Vec<AuditEntry> = Vec::new();
    let mut add = |node: &str, entries: Vec<AuditEntry>| {
        items.extend(entries.into_iter().map(|entry| AuditEntry { node: Some(node.to_owned()), ..entry }));
    };
    add(&me, entries);
    for (node, page) in others {
        more |= page.next.is_some();
        add(&node, page.items);
    }
    items.sort_by_key(|entry| Reverse((entry.at, entry.node.clone(), entry.id)));
    more |= items.len() > limit;
    items.truncate(limit);
    let place = |entry: &AuditEntry| format!("{} {} {}", entry.at, entry.id, entry.node.as_deref().unwrap_or_default());
    let next = items.last().filter(|_| more).map(|entry| params::cursor(&place(entry)));
    Page { items, next, total: None, missing: Vec::new() }
}

#[cfg(test)]
mod tests {
    use virtward_api::PrincipalKind;

    use super::*;

    fn entry(at: i64, id: u64) -> AuditEntry {
        AuditEntry {
            id,
            at: Timestamp::from_second(at).unwrap(),
            who: "root".into(),
            via: PrincipalKind::Local,
            address: None,
            action: "job.backup".into(),
            target: None,
            status: 200,
            detail: None,
            node: None,
            chain: String::new(),
        }
    }

    /// What a node answers to a request with a limit and a cursor.
    fn page(of: &str, log: &[AuditEntry], limit: usize, before: Option<&AuditPlace>) -> Page<AuditEntry> {
        let mut rest = log.iter().rev().filter(|entry| before.is_none_or(|before| before.is_before(entry, of)));
        let items: Vec<AuditEntry> = rest.by_ref().take(limit).cloned().collect();
        Page { items, next: rest.next().map(|_| "more".into()), total: None, missing: Vec::new() }
    }

    #[test]
    fn pages_of_several_audit_logs_repeat_nothing_and_leave_nothing_out() {
        // At the same instants, with the same numbers.
        let logs: Vec<(&str, Vec<AuditEntry>)> = ["h1", "h2", "h3"]
            .iter()
            .zip([7, 12, 1])
            .map(|(node, count)| (*node, (1..=count).map(|id| entry(id as i64 / 2, id)).collect()))
            .collect();
        let (mut seen, mut before): (Vec<(String, u64)>, Option<AuditPlace>) = (Vec::new(), None);
        loop {
            let mut pages: Vec<_> =
                logs.iter().map(|(node, log)| ((*node).to_owned(), page(node, log, 3, before.as_ref()))).collect();
            let (me, own) = pages.remove(0);
            let page = audit((me, own.items, own.next.is_some()), pages, 3);
            seen.extend(page.items.iter().map(|entry| (entry.node.clone().unwrap(), entry.id)));
            let Some(next) = page.next else { break };
            before = Some(AuditPlace::parse(&next).unwrap());
        }
        assert_eq!(seen.len(), 20);
        assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 20);
        assert!(AuditPlace::parse("zz").is_err() && AuditPlace::parse(&params::cursor("a b c")).is_err());
        assert_eq!(AuditPlace::parse(&params::cursor("7")).unwrap(), AuditPlace::Number(7));
    }

    #[test]
    fn what_is_passed_on_does_not_name_a_node() {
        let path = "/api/v1/events";
        assert_eq!(passed_on(path, "node=all&limit=5&kind=a%26b"), "/api/v1/events?limit=5&kind=a%26b");
        assert_eq!(passed_on(path, "limit=5&node=h2"), "/api/v1/events?limit=5");
        assert_eq!(passed_on(path, ""), "/api/v1/events?");
    }
}
