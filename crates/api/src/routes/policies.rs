//! Policies.

use super::{ADMIN, Body, GET, Method, POST, Route};
use crate::{openapi::Shape, types::*};

pub(super) const ROUTES: &[Route] = &[
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
];
