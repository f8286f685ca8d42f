//! What a node answers its peers.

use std::sync::Arc;

use axum::{
    Extension, Router,
    extract::{DefaultBodyLimit, Query, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use serde_json::json;
use virtward_api::{Code, Problem};
use virtward_cluster::ca::{self, ClientAuth, Identity as Certified, Role};
use virtward_decide::ha::HostId;

use super::{Identity, identity::problem, join, proxy, store_server};
use crate::{
    daemon::Daemon,
    failures::Result,
    ha,
    http::{
        answer::{Answer, Failed, ok},
        guard::Peer,
        listen::Tls,
    },
};

/// Largest block of an object that is sent at once.
const BLOCK_BYTES_MAX: usize = 16 << 20;

/// TLS of the listener: members show their certificate, and who joins has none.
pub fn listen(identity: &Identity) -> Result<Arc<rustls::ServerConfig>> {
    let config = ca::server_config(&identity.credentials, &identity.authorities(), ClientAuth::Offered);
    config.map(Arc::new).map_err(|error| problem(&error))
}

/// Uses what the identity says now for connections to come.
pub fn renew(tls: &Tls, identity: &Identity) {
    match listen(identity) {
        Ok(next) => *tls.write().unwrap_or_else(std::sync::PoisonError::into_inner) = next,
        Err(problem) => tracing::error!(%problem, "the peers' listener stays as it was"),
    }
}

/// Who is at the other end of a connection that was made.
pub fn peer(certificate: Option<&[u8]>, address: std::net::IpAddr) -> Peer {
    let certified = certificate.and_then(|der| Certified::of(der).ok()).filter(|it| it.role == Role::Node);
    match certified {
        Some(certified) => Peer::Node { name: certified.name },
        None => Peer::Remote { address },
    }
}

/// Everything that peers are answered; what is not theirs alone is the public API.
pub fn router(daemon: Arc<Daemon>) -> Router {
    let members = Router::new()
        .route("/peer/v1/ping", get(ping))
        .route("/peer/v1/ha/word", get(word))
        .route("/peer/v1/proxy", get(proxy::serve))
        .route("/peer/v1/proxy/{session}/{number}/{disk}", get(proxy::disk))
        .route("/peer/v1/store/{repository}/size", get(store_server::size))
        .route("/peer/v1/store/{repository}/read", get(store_server::read))
        .route("/peer/v1/store/{repository}/list", get(store_server::list))
        .route("/peer/v1/store/{repository}/now", get(store_server::now))
        .route("/peer/v1/store/{repository}/put", put(store_server::put))
        .route("/peer/v1/store/{repository}/append", post(store_server::append))
        .route("/peer/v1/store/{repository}/finish", post(store_server::finish))
        .route("/peer/v1/store/{repository}/abandon", post(store_server::abandon))
        .route("/peer/v1/store/{repository}/delete", post(store_server::delete))
        .layer(DefaultBodyLimit::max(BLOCK_BYTES_MAX))
        .with_state(daemon.clone())
        .merge(crate::http::router(daemon.clone()))
        .layer(middleware::from_fn_with_state(daemon.clone(), members_only));
    let newcomers = Router::new()
        .route("/peer/v1/join", post(join::admit))
        .layer(middleware::from_fn_with_state(daemon.clone(), not_too_often))
        .with_state(daemon);
    members.merge(newcomers)
}

async fn ping(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&json!({ "node": daemon.nodes.me.name, "boot": daemon.nodes.me.boot }))
}

#[derive(serde::Deserialize)]
struct WordParams {
    epoch: u64,
}

/// Whether anybody declared the member that asks dead, as far as is known here.
async fn word(
    State(daemon): State<Arc<Daemon>>,
    Extension(Member(host)): Extension<Member>,
    Query(asked): Query<WordParams>,
) -> Answer {
    let fine = ha::of(&daemon)?.word(&HostId(host), asked.epoch);
    ok(&ha::Word { fine })
}

/// A certificate says who somebody was when it was issued; the list of members, who belongs here now.
pub fn member(daemon: &Daemon, peer: Option<&Peer>) -> Result<String> {
    let Some(Peer::Node { name }) = peer else {
        return Err(Problem::new(Code::Unauthenticated, "only nodes of the cluster are answered here")
            .hint("virtward cluster join TOKEN makes a host a node"));
    };
    match daemon.nodes.records.get(name) {
        Some(_) => Ok(name.clone()),
        None => Err(Problem::new(Code::Forbidden, format!("{name} is no node of the cluster (any more)"))
            .hint("virtward cluster join TOKEN lets it in again")),
    }
}

/// Name of the member that asks.
#[derive(Clone)]
pub struct Member(pub String);

async fn members_only(State(daemon): State<Arc<Daemon>>, mut request: Request, next: Next) -> Response {
    match member(&daemon, request.extensions().get::<Peer>()) {
        Ok(name) => {
            request.extensions_mut().insert(Member(name));
            next.run(request).await
        }
        Err(problem) => Failed(problem).into_response(),
    }
}

/// Tokens cannot be guessed, and nobody needs to be allowed to try for long.
async fn not_too_often(State(daemon): State<Arc<Daemon>>, request: Request, next: Next) -> Response {
    let address = match request.extensions().get::<Peer>() {
        Some(Peer::Remote { address }) => Some(*address),
        _ => None,
    };
    if let Some(wait) = daemon.access.is_limited(address) {
        let problem = Problem::new(Code::RateLimited, "too many attempts to join from this address");
        return Failed(problem.hint(format!("wait {wait} seconds"))).into_response();
    }
    let response = next.run(request).await;
    if !response.status().is_success() {
        daemon.access.failed(address);
    }
    response
}
