//! The list of routes. The server, the OpenAPI document and their tests all follow it.

use crate::{Role, openapi::Shape, types::*};

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

const HOSTS: &[Param] = &[
    text("name", "Only names that contain this; with `*` or `?`, only names that match it whole."),
    text("state", "Only hosts in this state: up, libvirtd-down, down, unknown."),
    LIMIT,
    CURSOR,
];
const VMS: &[Param] = &[
    text("name", "Only names that contain this; with `*` or `?`, only names that match it whole."),
    text("tag", "Only VMs with this tag."),
    text("host", "Only VMs of this host."),
    text("state", "Only VMs in this state: running, paused, shut-off, crashed, other."),
    text("protection", "Only VMs so protected: protected, overdue, pending, unprotected, unknown."),
    text("policy", "Only VMs that this policy selects."),
    text(
        "sort",
        "name (default), host, state, protection, size, last-point, next-run; with - before it from the other end.",
    ),
    LIMIT,
    CURSOR,
];
const POINTS: &[Param] = &[REPOSITORY, LIMIT, CURSOR];
const JOBS: &[Param] = &[
    text("state", "Only jobs in this state; several with commas between them."),
    text("kind", "Only jobs of this kind: backup, restore, verify, copy, prune, migrate, move-disk, drain, balance."),
    text("vm", "Only jobs about this VM, by name or UUID."),
    text("policy", "Only jobs of this policy."),
    text("repository", "Only jobs that use this repository."),
    text("host", "Only jobs of this host."),
    LIMIT,
    CURSOR,
];
const EVENTS: &[Param] = &[
    text("severity", "Only events that matter at least so much: info, warning, error."),
    text("kind", "Only events of this kind."),
    text("vm", "Only events about this VM, by UUID."),
    text("job", "Only events about this job."),
    NODE,
    LIMIT,
    CURSOR,
];
const AUDIT: &[Param] = &[
    text("who", "Only what this one did."),
    text("action", "Only this action, such as policy.put."),
    NODE,
    LIMIT,
    CURSOR,
];
const LOG: &[Param] = &[
    Param { name: "after", kind: "integer", help: "Only entries with a greater `seq`." },
    Param { name: "limit", kind: "integer", help: "Most entries, 1 to 1000; default 1000." },
];
const STREAM: &[Param] = &[text(
    "topics",
    "What to send, with commas: jobs, inventory, events, policies, repositories; default: all of them.",
)];

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

/// Every route.
pub const ROUTES: &[Route] = &[
    Route {
        path: "/healthz",
        name: "health",
        tag: "system",
        summary: "Whether the daemon lives",
        help: "Answers as long as the daemon is not stuck. Says nothing about what it depends on.",
        access: ANYBODY,
        response: Body::Text("text/plain"),
        ..GET
    },
    Route {
        path: "/readyz",
        name: "ready",
        tag: "system",
        summary: "Whether the daemon can do its work",
        help: "503 with one line per trouble while the state store does not answer or the daemon starts or stops. A \
               hypervisor or repository that is away is no such trouble: the daemon is there to tell of it.",
        access: ANYBODY,
        response: Body::Text("text/plain"),
        ..GET
    },
    Route {
        path: "/metrics",
        name: "metrics",
        tag: "system",
        summary: "Metrics for Prometheus",
        help: "Text format 0.0.4.",
        response: Body::Text("text/plain"),
        ..GET
    },
    Route {
        path: "/api/v1/openapi.json",
        name: "openapi",
        tag: "system",
        summary: "This document",
        access: ANYBODY,
        response: Body::Text("application/json"),
        ..GET
    },
    Route {
        path: "/api/v1/version",
        name: "version",
        tag: "system",
        summary: "What answers",
        response: Body::One(Shape::of::<Version>()),
        ..GET
    },
    Route {
        path: "/api/v1/overview",
        name: "overview",
        tag: "system",
        summary: "Everything at a glance",
        response: Body::One(Shape::of::<Overview>()),
        ..GET
    },
    Route {
        path: "/api/v1/settings",
        name: "settings",
        tag: "system",
        summary: "What the daemon was told, without secrets",
        response: Body::One(Shape::of::<Settings>()),
        ..GET
    },
    Route {
        path: "/api/v1/stream",
        name: "stream",
        tag: "system",
        summary: "Changes as they happen",
        help: "Server-sent events, each with JSON in `data`: `job` (Job: began, ended, or its state changed), `progress` \
               ({\"id\", \"progress\": Progress}, at most once a second per job), `vm` (Vm), `vm-removed` ({\"uuid\"}), \
               `host` (Host), `event` (Event), `policy` ({\"name\", \"revision\"}; revision null: deleted), `repository` \
               (Repository), `balance` (BalanceRound), and `reset` (StreamReset): changes may have been missed, read again what is shown. Send \
               `Last-Event-ID` to go on where the connection broke; browsers do so by themselves. A comment comes every \
               15 seconds.",
        query: STREAM,
        response: Body::Text("text/event-stream"),
        ..GET
    },
    Route {
        path: "/api/v1/cluster",
        name: "cluster",
        tag: "cluster",
        summary: "The cluster: nodes, leader, state",
        response: Body::One(Shape::of::<ClusterStatus>()),
        ..GET
    },
    Route {
        path: "/api/v1/cluster/tokens",
        name: "cluster-token",
        tag: "cluster",
        summary: "Make a token by which one host can join",
        access: ADMIN,
        request: Body::One(Shape::of::<NewJoinToken>()),
        status: 201,
        response: Body::One(Shape::of::<JoinTokenMade>()),
        ..POST
    },
    Route {
        method: Method::Delete,
        path: "/api/v1/cluster/nodes/{node}",
        name: "cluster-remove",
        tag: "cluster",
        summary: "Take a node out of the cluster",
        help: "Its daemon starts nothing any more, its claims are void, and its peers refuse it. Its VMs run on.",
        access: ADMIN,
        status: 204,
        ..GET
    },
    Route {
        path: "/api/v1/cluster/state-backup",
        name: "cluster-backup",
        tag: "cluster",
        summary: "Write the state into a file of the host",
        help: "Only over the Unix socket.",
        access: ADMIN,
        response: Body::One(Shape::of::<StateBackup>()),
        status: 200,
        ..POST
    },
    Route {
        path: "/api/v1/ha",
        name: "ha",
        tag: "ha",
        summary: "High availability: hosts, how well each is protected, and protected VMs",
        response: Body::One(Shape::of::<HaStatus>()),
        ..GET
    },
    Route {
        path: "/api/v1/ha/arm",
        name: "ha-arm",
        tag: "ha",
        summary: "Fence silent hosts and restart VMs (again)",
        access: ADMIN,
        request: Body::One(Shape::of::<HaReason>()),
        response: Body::One(Shape::of::<HaStatus>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/disarm",
        name: "ha-disarm",
        tag: "ha",
        summary: "Fence nobody and restart nothing until it is armed again",
        help: "Guests run on and watchdogs are stopped. Refused while a host is being fenced.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaReason>()),
        response: Body::One(Shape::of::<HaStatus>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/capacity",
        name: "ha-capacity",
        tag: "ha",
        summary: "What would not run again if hosts were lost",
        query: &[
            text("without", "As if this host were empty and took nothing; and whether it may be emptied."),
            text("vm", "As if this VM had the memory of `memory_bytes`; and whether it may have it."),
            Param { name: "memory_bytes", kind: "integer", help: "With `vm`." },
        ],
        response: Body::One(Shape::of::<HaCapacity>()),
        ..GET
    },
    Route {
        path: "/api/v1/ha/hosts/{host}/test-fencing",
        name: "ha-test-fencing",
        tag: "ha",
        summary: "Test the fence devices of a host",
        help: "Looks at them in every way that switches nothing; with `power_cycle` also switches the host off and on, \
               which is refused while it is in service.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaFenceTestRequest>()),
        response: Body::One(Shape::of::<HaFenceTest>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/hosts/{host}/confirm-off",
        name: "ha-confirm-off",
        tag: "ha",
        summary: "A person's word that a host is off",
        help: "Frees its VMs where nothing else proves that it does not run them any more. If it does run them, their \
               disks are lost. Not believed of a host that sends heartbeats.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaReason>()),
        status: 202,
        response: Body::One(Shape::of::<HaStatus>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}",
        name: "ha-vm",
        tag: "ha",
        summary: "A protected VM: where it is, why, and what it waits for",
        response: Body::One(Shape::of::<HaExplanation>()),
        ..GET
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/enable",
        name: "ha-enable",
        tag: "ha",
        summary: "Protect a VM, or change how it is protected",
        help: "Its host has to be in service. From then on libvirt starts it only when it was claimed.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaPolicy>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/disable",
        name: "ha-disable",
        tag: "ha",
        summary: "Protect a VM no longer",
        help: "It runs on where it runs. Refused while it is lost: nobody would know who may write to its disks.",
        access: ADMIN,
        status: 204,
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/move",
        name: "ha-move",
        tag: "ha",
        summary: "Announce that a protected VM migrates, or say where it is after that",
        help: "For whoever migrates it, as `virtward vm migrate` does. Between the two calls both hosts count as having it.",
        access: OPERATOR,
        request: Body::One(Shape::of::<HaMove>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/start",
        name: "ha-start",
        tag: "ha",
        summary: "Start a protected VM, on the host that is best",
        help: "Refused if room that is kept for host failures would be taken, unless forced.",
        access: OPERATOR,
        status: 202,
        request: Body::One(Shape::of::<HaStart>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/switch",
        name: "ha-switch",
        tag: "ha",
        summary: "Let the standby of a protected VM take over",
        help: "The active one is ended first. Answers with the standby, which is the active one from then on; refused while \
               it could not take over.",
        access: OPERATOR,
        status: 202,
        request: Body::One(Shape::of::<HaReason>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/hosts",
        name: "hosts",
        tag: "inventory",
        summary: "Hosts",
        query: HOSTS,
        response: Body::Page(Shape::of::<Host>()),
        ..GET
    },
    Route {
        path: "/api/v1/hosts/{host}",
        name: "host",
        tag: "inventory",
        summary: "One host",
        response: Body::One(Shape::of::<Host>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms",
        name: "vms",
        tag: "inventory",
        summary: "Virtual machines",
        query: VMS,
        response: Body::Page(Shape::of::<Vm>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms/{vm}",
        name: "vm",
        tag: "inventory",
        summary: "One virtual machine, by name or UUID",
        response: Body::One(Shape::of::<VmDetail>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms/{vm}/points",
        name: "vm-points",
        tag: "inventory",
        summary: "Restore points of a VM, newest first",
        help: "Also those of a VM that no longer exists.",
        query: POINTS,
        response: Body::Page(Shape::of::<Point>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms/{vm}/explain",
        name: "vm-explain",
        tag: "inventory",
        summary: "Why a VM is, or is not, backed up",
        response: Body::One(Shape::of::<Explanation>()),
        ..GET
    },
    Route {
        path: "/api/v1/points",
        name: "points",
        tag: "inventory",
        summary: "Restore points of all VMs, newest first",
        query: POINTS,
        response: Body::Page(Shape::of::<Point>()),
        ..GET
    },
    Route {
        path: "/api/v1/points/{point}",
        name: "point",
        tag: "inventory",
        summary: "One restore point, by its id",
        query: &[REPOSITORY],
        response: Body::One(Shape::of::<Point>()),
        ..GET
    },
    Route {
        path: "/api/v1/repositories",
        name: "repositories",
        tag: "repositories",
        summary: "Repositories",
        response: Body::List(Shape::of::<Repository>()),
        ..GET
    },
    Route {
        path: "/api/v1/repositories/{repository}",
        name: "repository",
        tag: "repositories",
        summary: "One repository",
        response: Body::One(Shape::of::<Repository>()),
        ..GET
    },
    Route {
        path: "/api/v1/policies",
        name: "policies",
        tag: "policies",
        summary: "Policies, by name",
        response: Body::List(Shape::of::<Policy>()),
        ..GET
    },
    Route {
        path: "/api/v1/policies/{policy}",
        name: "policy",
        tag: "policies",
        summary: "One policy",
        response: Body::One(Shape::of::<Policy>()),
        ..GET
    },
    Route {
        method: Method::Put,
        path: "/api/v1/policies/{policy}",
        name: "policy-put",
        tag: "policies",
        summary: "Apply a policy",
        help: "Makes it or replaces it. With `If-Match: REVISION` (0: there is none yet) it is refused with 412 if it was \
               changed since it was read. What is not valid is refused with 422 and every mistake in `errors`.",
        access: ADMIN,
        request: Body::One(Shape::of::<PolicyDocument>()),
        response: Body::One(Shape::of::<Policy>()),
        ..GET
    },
    Route {
        method: Method::Delete,
        path: "/api/v1/policies/{policy}",
        name: "policy-delete",
        tag: "policies",
        summary: "Delete a policy",
        help: "Its restore points stay, and no rule removes them any more.",
        access: ADMIN,
        status: 204,
        ..GET
    },
    Route {
        path: "/api/v1/policies/validate",
        name: "policy-validate",
        tag: "policies",
        summary: "What is wrong with a policy, and what it would do",
        help: "Changes nothing. Answers 200 also for a policy that is not valid.",
        request: Body::One(Shape::of::<PolicyDocument>()),
        response: Body::One(Shape::of::<PolicyReport>()),
        ..POST
    },
    Route {
        path: "/api/v1/policies/diff",
        name: "policy-diff",
        tag: "policies",
        summary: "What applying a policy would change",
        help: "Changes nothing.",
        request: Body::One(Shape::of::<PolicyDocument>()),
        response: Body::One(Shape::of::<PolicyDiff>()),
        ..POST
    },
    Route {
        path: "/api/v1/jobs",
        name: "jobs",
        tag: "jobs",
        summary: "Jobs, newest first",
        query: JOBS,
        response: Body::Page(Shape::of::<Job>()),
        ..GET
    },
    Route {
        path: "/api/v1/jobs/{job}",
        name: "job",
        tag: "jobs",
        summary: "One job",
        response: Body::One(Shape::of::<Job>()),
        ..GET
    },
    Route {
        path: "/api/v1/jobs/{job}/log",
        name: "job-log",
        tag: "jobs",
        summary: "What a job did, oldest first",
        query: LOG,
        response: Body::List(Shape::of::<JobLogEntry>()),
        ..GET
    },
    Route {
        path: "/api/v1/hosts/{host}/drain",
        name: "host-drain",
        tag: "moves",
        summary: "Empty a host",
        help: "From now on it takes no VMs. Each of its VMs goes to another host of the cluster by a job of its own, as the \
               plan says; backups give way. With `dry_run` answers 200 with the plan and changes nothing.",
        access: OPERATOR,
        request: Body::One(Shape::of::<DrainRequest>()),
        status: 202,
        response: Body::Either(Shape::of::<Job>(), Shape::of::<DrainPlan>()),
        ..POST
    },
    Route {
        path: "/api/v1/hosts/{host}/resume",
        name: "host-resume",
        tag: "moves",
        summary: "Take a drained host into service again",
        access: OPERATOR,
        response: Body::One(Shape::of::<Host>()),
        ..POST
    },
    Route {
        path: "/api/v1/vms/{vm}/migrate",
        name: "vm-migrate",
        tag: "moves",
        summary: "Move a VM to another host",
        help: "While it runs, or its definition while it is off. With `dry_run` answers 200 with what was found and changes \
               nothing.",
        access: OPERATOR,
        request: Body::One(Shape::of::<MigrateRequest>()),
        status: 202,
        response: Body::Either(Shape::of::<Job>(), Shape::of::<MigratePlan>()),
        ..POST
    },
    Route {
        path: "/api/v1/vms/{vm}/move-disk",
        name: "vm-move-disk",
        tag: "moves",
        summary: "Move a disk to another file, format or storage",
        help: "While the VM runs, or while it is off.",
        access: OPERATOR,
        request: Body::One(Shape::of::<MoveDiskRequest>()),
        status: 202,
        response: Body::One(Shape::of::<Job>()),
        ..POST
    },
    Route {
        path: "/api/v1/balance",
        name: "balance",
        tag: "moves",
        summary: "How load is balanced, and what the last round said",
        response: Body::One(Shape::of::<BalanceStatus>()),
        ..GET
    },
    Route {
        path: "/api/v1/balance/history",
        name: "balance-history",
        tag: "moves",
        summary: "Rounds in which something should move, newest first",
        query: &[LIMIT],
        response: Body::List(Shape::of::<BalanceRound>()),
        ..GET
    },
    Route {
        path: "/api/v1/balance/plan",
        name: "balance-plan",
        tag: "moves",
        summary: "Look at all hosts now, and say what should move",
        help: "Changes nothing. Answers after `interval_s`.",
        access: OPERATOR,
        request: Body::One(Shape::of::<BalanceRequest>()),
        response: Body::One(Shape::of::<BalanceRound>()),
        ..POST
    },
    Route {
        path: "/api/v1/balance/apply",
        name: "balance-apply",
        tag: "moves",
        summary: "Look at all hosts now, and move what should move",
        access: OPERATOR,
        request: Body::One(Shape::of::<BalanceRequest>()),
        status: 202,
        response: Body::One(Shape::of::<Job>()),
        ..POST
    },
    Route {
        path: "/api/v1/jobs/backup",
        name: "job-backup",
        tag: "jobs",
        summary: "Back up a VM now",
        access: OPERATOR,
        request: Body::One(Shape::of::<BackupRequest>()),
        status: 202,
        response: Body::One(Shape::of::<Job>()),
        ..POST
    },
    Route {
        path: "/api/v1/jobs/restore",
        name: "job-restore",
        tag: "jobs",
        summary: "Restore a VM, or say what a restore would do",
        help: "With `dry_run` the answer is 200 with a plan and nothing is changed; otherwise 202 with a job.",
        access: OPERATOR,
        request: Body::One(Shape::of::<RestoreRequest>()),
        status: 202,
        response: Body::Either(Shape::of::<Job>(), Shape::of::<RestorePlan>()),
        ..POST
    },
    Route {
        path: "/api/v1/jobs/verify",
        name: "job-verify",
        tag: "jobs",
        summary: "Check stored data",
        access: OPERATOR,
        request: Body::One(Shape::of::<VerifyRequest>()),
        status: 202,
        response: Body::One(Shape::of::<Job>()),
        ..POST
    },
    Route {
        path: "/api/v1/jobs/{job}/cancel",
        name: "job-cancel",
        tag: "jobs",
        summary: "Cancel a job",
        help: "Answers at once; the job ends when it has cleaned up. 409 if it has ended already.",
        access: OPERATOR,
        status: 202,
        response: Body::One(Shape::of::<Job>()),
        ..POST
    },
    Route {
        path: "/api/v1/events",
        name: "events",
        tag: "events",
        summary: "What happened, newest first",
        query: EVENTS,
        response: Body::Page(Shape::of::<Event>()),
        ..GET
    },
    Route {
        path: "/api/v1/audit",
        name: "audit",
        tag: "events",
        summary: "Who changed what, newest first",
        access: ADMIN,
        query: AUDIT,
        response: Body::Page(Shape::of::<AuditEntry>()),
        ..GET
    },
    Route {
        path: "/api/v1/notifications",
        name: "notifications",
        tag: "system",
        summary: "Where notifications go, and whether they arrive",
        help: "Those of the daemon that is asked.",
        response: Body::List(Shape::of::<NotifyChannel>()),
        ..GET
    },
    Route {
        path: "/api/v1/notifications/test",
        name: "notify-test",
        tag: "system",
        summary: "Send a test message",
        help: "Answers when the last channel has accepted it or not.",
        access: ADMIN,
        request: Body::One(Shape::of::<NotifyTest>()),
        response: Body::List(Shape::of::<NotifyOutcome>()),
        ..POST
    },
    Route {
        path: "/api/v1/session",
        name: "login",
        tag: "access",
        summary: "Log in from a browser",
        help: "Sets the cookie `virtward_session` (HttpOnly, Secure, SameSite=Strict). Changes then need the header \
               `X-CSRF-Token` with the token from the answer. Limited: 429 after ten failures in a minute from one \
               address.",
        access: ANYBODY,
        request: Body::One(Shape::of::<Login>()),
        response: Body::One(Shape::of::<Session>()),
        ..POST
    },
    Route {
        method: Method::Delete,
        path: "/api/v1/session",
        name: "logout",
        tag: "access",
        summary: "Log out",
        status: 204,
        ..GET
    },
    Route {
        path: "/api/v1/whoami",
        name: "whoami",
        tag: "access",
        summary: "Who asks",
        response: Body::One(Shape::of::<Principal>()),
        ..GET
    },
    Route {
        path: "/api/v1/tokens",
        name: "tokens",
        tag: "access",
        summary: "Tokens, without their secrets",
        access: ADMIN,
        response: Body::List(Shape::of::<Token>()),
        ..GET
    },
    Route {
        path: "/api/v1/tokens",
        name: "token-create",
        tag: "access",
        summary: "Make a token",
        access: ADMIN,
        request: Body::One(Shape::of::<NewToken>()),
        status: 201,
        response: Body::One(Shape::of::<TokenCreated>()),
        ..POST
    },
    Route {
        method: Method::Delete,
        path: "/api/v1/tokens/{token}",
        name: "token-revoke",
        tag: "access",
        summary: "Revoke a token, by id or name",
        help: "It and the sessions that began with it end at once.",
        access: ADMIN,
        status: 204,
        ..GET
    },
];

/// A route by its name.
pub fn find(name: &str) -> Option<&'static Route> {
    ROUTES.iter().find(|route| route.name == name)
}
