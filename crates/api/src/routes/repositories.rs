//! Repositories.

use super::{Body, GET, Route};
use crate::{openapi::Shape, types::*};

pub(super) const ROUTES: &[Route] = &[
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
];
