//! The list of routes, with a file for each heading. The server, the OpenAPI document and their tests all follow it.

mod access;
mod cluster;
mod events;
mod ha;
mod inventory;
mod jobs;
mod moves;
mod policies;
mod repositories;
mod system;

use crate::{Role, openapi::Shape};

/// An HTTP method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// Read.
    Get,
    /// Make or start.
    Post,
    /// Set.
    Put,
    /// Remove.
    Delete,
}

impl Method {
    /// As it is sent.
    pub const fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Delete => "DELETE",
        }
    }
}

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody who reaches the daemon.
    Anybody,
    /// Whoever has at least this role.
    Role(Role),
}

/// A parameter in the query.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Name.
    pub name: &'static str,
    /// `string`, `integer`, `boolean`.
    pub kind: &'static str,
    /// What it does.
    pub help: &'static str,
}

/// What is sent or answered.
#[derive(Clone, Copy, Debug)]
pub enum Body {
    /// Nothing.
    None,
    /// One of these, as JSON.
    One(Shape),
    /// A page of these.
    Page(Shape),
    /// A plain list of these.
    List(Shape),
    /// Either of the two.
    Either(Shape, Shape),
    /// Text of this media type.
    Text(&'static str),
}

/// A route.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Method.
    pub method: Method,
    /// Path, with parameters in braces.
    pub path: &'static str,
    /// Unique name: that of the function in a generated client.
    pub name: &'static str,
    /// Heading that it is under.
    pub tag: &'static str,
    /// One line.
    pub summary: &'static str,
    /// More.
    pub help: &'static str,
    /// Who may use it.
    pub access: Access,
    /// Parameters of the query.
    pub query: &'static [Param],
    /// What is sent.
    pub request: Body,
    /// Status if it went well.
    pub status: u16,
    /// What is answered.
    pub response: Body,
}

const fn text(name: &'static str, help: &'static str) -> Param {
    Param { name, kind: "string", help }
}

const LIMIT: Param = Param { name: "limit", kind: "integer", help: "Items per page, 1 to 1000; default 100." };
const CURSOR: Param = text("cursor", "The `next` of the page before.");
const REPOSITORY: Param = text("repository", "Name of a repository; default: all of them, or `default` for one point.");

const NODE: Param = text(
    "node",
    "Whose: the name of a node, or `all`; default: the daemon's that answers. `missing` names who did not.",
);

const ANYBODY: Access = Access::Anybody;
const VIEWER: Access = Access::Role(Role::Viewer);
const OPERATOR: Access = Access::Role(Role::Operator);
const ADMIN: Access = Access::Role(Role::Admin);

/// What most routes have in common.
const GET: Route = Route {
    method: Method::Get,
    path: "",
    name: "",
    tag: "",
    summary: "",
    help: "",
    access: VIEWER,
    query: &[],
    request: Body::None,
    status: 200,
    response: Body::None,
};
const POST: Route = Route { method: Method::Post, ..GET };

/// The headings, with what is under each, in the order in which they are shown.
pub const HEADINGS: [(&str, &str); 10] = [
    ("system", "The daemon itself, everything at a glance, changes as they happen, whom it tells."),
    ("cluster", "Daemons that work together."),
    ("ha", "High availability: who is protected, what happens when a host is lost, what a person decides."),
    ("inventory", "Hosts, VMs and their restore points."),
    ("repositories", "Where restore points are stored."),
    ("policies", "Which VMs are backed up when, and what is kept."),
    ("jobs", "Backups, restores and checks: what runs, what ran, what is to run."),
    ("moves", "VMs and disks that move: migration, drained hosts, balance."),
    ("events", "What happened, and who changed what."),
    ("access", "Log-in, tokens, roles."),
];

/// By heading, in the order in which they are shown.
const GROUPS: [&[Route]; 10] = [
    system::ROUTES,
    cluster::ROUTES,
    ha::ROUTES,
    inventory::ROUTES,
    repositories::ROUTES,
    policies::ROUTES,
    jobs::ROUTES,
    moves::ROUTES,
    events::ROUTES,
    access::ROUTES,
];

/// Every route.
pub const ROUTES: &[Route] = &JOINED;
const JOINED: [Route; LENGTH] = joined();
const LENGTH: usize = {
    let (mut length, mut group) = (0, 0);
    while group < GROUPS.len() {
        length += GROUPS[group].len();
        group += 1;
    }
    length
};

const fn joined() -> [Route; LENGTH] {
    let mut all = [GET; LENGTH];
    let (mut at, mut group) = (0, 0);
    while group < GROUPS.len() {
        let mut route = 0;
        while route < GROUPS[group].len() {
            all[at] = GROUPS[group][route];
            at += 1;
            route += 1;
        }
        group += 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_heading_has_one_home_and_no_route_is_lost() {
        let headings: Vec<&str> = GROUPS.iter().map(|group| group[0].tag).collect();
        assert_eq!(headings, HEADINGS.map(|(name, _)| name));
        assert_eq!(headings.iter().collect::<BTreeSet<_>>().len(), GROUPS.len());
        for (heading, group) in headings.iter().zip(GROUPS) {
            assert!(group.iter().all(|route| route.tag == *heading && !route.path.is_empty()), "{heading}");
        }
        let names: BTreeSet<&str> = ROUTES.iter().map(|route| route.name).collect();
        assert_eq!(names.len(), GROUPS.iter().map(|group| group.len()).sum::<usize>());
    }

    /// With `UPDATE_OPENAPI=1` it is written anew.
    #[test]
    fn the_table_in_the_documentation_has_every_route() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/api.md");
        let text = std::fs::read_to_string(file).unwrap();
        let head = "| | path | | role |\n|---|---|---|---|\n";
        let mut table = head.to_owned();
        for route in ROUTES {
            let role = match route.access {
                Access::Anybody => "—".to_owned(),
                Access::Role(role) => serde_json::to_value(role).unwrap().as_str().unwrap().to_owned(),
            };
            table += &format!("| {} | `{}` | {} | {role} |\n", route.method.as_str(), route.path, route.summary);
        }
        let (before, rest) = text.split_once(head).expect("the table of routes");
        let after: String =
            rest.lines().skip_while(|line| line.starts_with('|')).map(|line| format!("{line}\n")).collect();
        let wanted = format!("{before}{table}{after}");
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(file, wanted).unwrap();
            return;
        }
        assert!(text == wanted, "docs/api.md lacks routes: UPDATE_OPENAPI=1 cargo test -p virtward-api");
    }
}
