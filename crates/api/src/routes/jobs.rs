//! Jobs: asking for them, following and stopping them.

use super::{Body, CURSOR, GET, LIMIT, OPERATOR, POST, Param, Route, text};
use crate::{openapi::Shape, types::*};

const JOBS: &[Param] = &[
    text("state", "Only jobs in this state; several with commas between them."),
    text(
        "kind",
        "Only jobs of this kind: backup, restore, verify, copy, prune, gc, migrate, move-disk, drain, balance.",
    ),
    text("vm", "Only jobs about this VM, by name or UUID."),
    text("policy", "Only jobs of this policy."),
    text("repository", "Only jobs that use this repository."),
    text("host", "Only jobs of this host, with those that it does as a proxy."),
    LIMIT,
    CURSOR,
];
const LOG: &[Param] = &[
    Param { name: "after", kind: "integer", help: "Only entries with a greater `seq`." },
    Param { name: "limit", kind: "integer", help: "Most entries, 1 to 1000; default 1000." },
];

pub(super) const ROUTES: &[Route] = &[
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
        path: "/api/v1/jobs/gc",
        name: "job-gc",
        tag: "jobs",
        summary: "Give back the space of data that no restore point needs",
        help: "Runs beside backups. Restore points that were deleted can be recovered for 7 days; their data stays so long.",
        access: OPERATOR,
        request: Body::One(Shape::of::<GcRequest>()),
        status: 202,
        response: Body::One(Shape::of::<Job>()),
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
];
