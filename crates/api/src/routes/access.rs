//! Sessions and tokens.

use super::{ADMIN, ANYBODY, Body, GET, Method, POST, Route};
use crate::{openapi::Shape, types::*};

pub(super) const ROUTES: &[Route] = &[
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
