//! Daemons that work together.

use super::{ADMIN, Body, GET, Method, POST, Route};
use crate::{openapi::Shape, types::*};

pub(super) const ROUTES: &[Route] = &[
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
];
