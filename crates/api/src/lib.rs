//! The HTTP API of the daemon, seen from outside: what is asked, what is answered, and under which paths.
//!
//! [`routes::ROUTES`] is the one list of routes; the OpenAPI document ([`openapi`], checked in as `openapi.json`), the
//! server and its tests follow it. Types serialise as they are sent. Fields are added and never renamed or removed
//! within a version of the API; whoever reads must ignore what it does not know.
//!
//! Not here: what a request does, who may make it (only which role the route asks for), how a server answers.

pub mod client;
pub mod openapi;
mod page;
mod problem;
pub mod routes;
pub mod types;

pub use self::{
    page::Page,
    problem::{Code, FieldError, PROBLEM_JSON, Problem},
    types::*,
};

/// Path that everything but health, metrics and the web interface is under.
pub const BASE: &str = "/api/v1";
/// Header that makes a repeated POST harmless.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Header that proves that a change was asked for by the page that logged in.
pub const CSRF_TOKEN: &str = "x-csrf-token";
/// Name of the session's cookie.
pub const SESSION_COOKIE: &str = "virtward_session";
