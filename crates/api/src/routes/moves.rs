//! Where VMs are: migrations, moves of disks, drains, balancing.

use super::{Body, GET, LIMIT, OPERATOR, POST, Route};
use crate::{openapi::Shape, types::*};

pub(super) const ROUTES: &[Route] = &[
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
];
