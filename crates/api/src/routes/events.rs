//! What happened, and who did it.

use super::{ADMIN, Body, CURSOR, GET, LIMIT, NODE, Param, Route, text};
use crate::{openapi::Shape, types::*};

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

pub(super) const ROUTES: &[Route] = &[
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
];
