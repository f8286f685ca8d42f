//! The API over HTTP: which path leads where, and what holds for every request.
//!
//! ```text
//! connection ─► headers, time limit ─► who asks ─► may they ─► CSRF ─► handler ─► audit ─► answer
//! ```
//!
//! Who may do what is written in `virtward_api::routes`, once; [`guard`] looks there. Handlers answer a [`Problem`] or a
//! value, nothing else.

pub mod answer;
mod cluster;
mod everywhere;
pub mod guard;
mod ha;
mod jobs;
pub mod listen;
mod lists;
mod moves;
mod notify;
pub mod params;
mod policies;
mod stream;
mod system;
mod tokens;
mod vms;

use std::sync::Arc;

use axum::{
    Router, middleware,
    routing::{delete, get, post},
};
use virtward_api::{Code, Problem};

use self::answer::Failed;
use crate::daemon::Daemon;

/// Largest body of a request.
pub const BODY_BYTES_MAX: usize = 1 << 20;

/// Everything that the daemon answers.
pub fn router(daemon: Arc<Daemon>) -> Router {
    let routes = Router::new()
        .route("/healthz", get(system::healthz))
        .route("/readyz", get(system::readyz))
        .route("/metrics", get(system::metrics))
        .route("/api/v1/openapi.json", get(system::openapi))
        .route("/api/v1/version", get(system::version))
        .route("/api/v1/overview", get(system::overview))
        .route("/api/v1/settings", get(system::settings))
        .route("/api/v1/stream", get(stream::follow))
        .route("/api/v1/cluster", get(cluster::status))
        .route("/api/v1/cluster/tokens", post(cluster::token))
        .route("/api/v1/cluster/nodes/{node}", delete(cluster::remove))
        .route("/api/v1/cluster/state-backup", post(cluster::backup_state))
        .route("/api/v1/ha", get(ha::status))
        .route("/api/v1/ha/arm", post(ha::arm))
        .route("/api/v1/ha/disarm", post(ha::disarm))
        .route("/api/v1/ha/capacity", get(ha::capacity))
        .route("/api/v1/ha/hosts/{host}/test-fencing", post(ha::test_fencing))
        .route("/api/v1/ha/hosts/{host}/confirm-off", post(ha::confirm_off))
        .route("/api/v1/ha/vms/{vm}", get(ha::explain))
        .route("/api/v1/ha/vms/{vm}/enable", post(ha::enable))
        .route("/api/v1/ha/vms/{vm}/disable", post(ha::disable))
        .route("/api/v1/ha/vms/{vm}/move", post(ha::moving))
        .route("/api/v1/ha/vms/{vm}/start", post(ha::start))
        .route("/api/v1/ha/vms/{vm}/switch", post(ha::switch))
        .route("/api/v1/hosts", get(vms::hosts))
        .route("/api/v1/hosts/{host}", get(vms::host))
        .route("/api/v1/hosts/{host}/drain", post(moves::drain))
        .route("/api/v1/hosts/{host}/resume", post(moves::resume))
        .route("/api/v1/vms", get(vms::list))
        .route("/api/v1/vms/{vm}", get(vms::one))
        .route("/api/v1/vms/{vm}/points", get(vms::points))
        .route("/api/v1/vms/{vm}/explain", get(vms::explain))
        .route("/api/v1/vms/{vm}/migrate", post(moves::migrate))
        .route("/api/v1/vms/{vm}/move-disk", post(moves::move_disk))
        .route("/api/v1/balance", get(moves::balance))
        .route("/api/v1/balance/history", get(moves::history))
        .route("/api/v1/balance/plan", post(moves::plan))
        .route("/api/v1/balance/apply", post(moves::apply))
        .route("/api/v1/points", get(lists::points))
        .route("/api/v1/points/{point}", get(lists::point))
        .route("/api/v1/repositories", get(lists::repositories))
        .route("/api/v1/repositories/{repository}", get(lists::repository))
        .route("/api/v1/policies", get(policies::list))
        .route("/api/v1/policies/validate", post(policies::validate))
        .route("/api/v1/policies/diff", post(policies::diff))
        .route("/api/v1/policies/{policy}", get(policies::one).put(policies::put).delete(policies::delete))
        .route("/api/v1/jobs", get(jobs::list))
        .route("/api/v1/jobs/backup", post(jobs::backup))
        .route("/api/v1/jobs/restore", post(jobs::restore))
        .route("/api/v1/jobs/gc", post(jobs::gc))
        .route("/api/v1/jobs/verify", post(jobs::verify))
        .route("/api/v1/jobs/{job}", get(jobs::one))
        .route("/api/v1/jobs/{job}/log", get(jobs::log))
        .route("/api/v1/jobs/{job}/cancel", post(jobs::cancel))
        .route("/api/v1/events", get(lists::events))
        .route("/api/v1/audit", get(lists::audit))
        .route("/api/v1/notifications", get(notify::list))
        .route("/api/v1/notifications/test", post(notify::test))
        .route("/api/v1/session", post(tokens::log_in).delete(tokens::log_out))
        .route("/api/v1/whoami", get(tokens::whoami))
        .route("/api/v1/tokens", get(tokens::list).post(tokens::create))
        .route("/api/v1/tokens/{token}", delete(tokens::revoke));
    routes
        .method_not_allowed_fallback(async || {
            Failed(Problem::new(Code::MethodNotAllowed, "this path does not take this method"))
        })
        .fallback(async || {
            Failed(Problem::new(Code::NotFound, "there is no such path").hint("/api/v1/openapi.json lists all paths"))
        })
        .merge(crate::web::routes())
        .layer(middleware::from_fn_with_state(daemon.clone(), guard::guard))
        .layer(middleware::from_fn(guard::surround))
        .with_state(daemon)
}
