//! What every request passes: limits and headers around it, who asks and whether they may, and the record of it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use virtward_api::{
    CSRF_TOKEN, Code, Principal, PrincipalKind, Problem, Role, SESSION_COOKIE,
    routes::{Access as Needs, ROUTES, Route},
};

use super::answer::Failed;
use crate::{access, daemon::Daemon, events::Deed, failures::blocking};

/// Longest time for a request; those that follow changes have none. A plan of balancing may watch for 60 s.
const TIME_MAX: Duration = Duration::from_secs(90);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub enum Peer {
    /// A user of this host, by the kernel's word.
    Local {
        /// Its number.
        uid: u32,
    },
    /// Somebody on the network.
    Remote {
        /// From where.
        address: IpAddr,
    },
    /// A node of the cluster, by its certificate.
    Node {
        /// Its name.
        name: String,
    },
}

/// More for the record of a request than its path says.
#[derive(Clone, Debug)]
pub struct Remark(pub String);

/// Headers of every answer, and the time limit.
pub async fn surround(request: Request, next: Next) -> Response {
    let is_stream = request.uri().path().ends_with("/stream");
    let mut response = if is_stream {
        next.run(request).await
    } else {
        match tokio::time::timeout(TIME_MAX, next.run(request)).await {
            Ok(response) => response,
            Err(_) => Failed(Problem::new(Code::Unavailable, "the request took too long")).into_response(),
        }
    };
    const HEADERS: [(&str, &str); 8] = [
        (
            "content-security-policy",
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
             frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
        ),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
        ("permissions-policy", "camera=(), microphone=(), geolocation=()"),
        ("strict-transport-security", "max-age=31536000"),
    ];
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// What of a request says who asks. A request cannot be looked at across threads; this can.
struct Asking {
    peer: Option<Peer>,
    authorization: Option<String>,
    cookie: Option<String>,
    csrf: String,
    /// Whom a node asks for.
    on_behalf: Option<String>,
    is_safe: bool,
}

impl Asking {
    fn of(request: &Request) -> Self {
        let text = |name: &str| {
            let value = request.headers().get(name)?;
            // What is no text is no token either, and still an attempt.
            Some(value.to_str().unwrap_or_default().to_owned())
        };
        Self {
            peer: request.extensions().get::<Peer>().cloned(),
            on_behalf: text(crate::peers::client::FOR),
            authorization: text(header::AUTHORIZATION.as_str()),
            cookie: cookie(request.headers()),
            csrf: text(CSRF_TOKEN).unwrap_or_default(),
            is_safe: matches!(*request.method(), Method::GET | Method::HEAD),
        }
    }
}

/// Finds out who asks and whether they may, and records changes.
pub async fn guard(State(daemon): State<Arc<Daemon>>, mut request: Request, next: Next) -> Response {
    let Some(route) = route(&request) else { return next.run(request).await };
    let address = match request.extensions().get::<Peer>() {
        Some(Peer::Remote { address }) => Some(*address),
        _ => None,
    };
    let is_change = !matches!(*request.method(), Method::GET | Method::HEAD) && !is_question(route);
    let (path, action) = (request.uri().path().to_owned(), action(route));
    let asking = Asking::of(&request);
    let admitted = admit(&daemon, route, &asking, address).await;
    let (who, response) = match admitted {
        Err(problem) => (None, Failed(problem).into_response()),
        Ok(who) => {
            if let Some(who) = &who {
                request.extensions_mut().insert(who.clone());
            }
            (who, next.run(request).await)
        }
    };
    let status = response.status().as_u16();
    daemon.metrics.answered(route.name, status);
    if !is_change {
        return response;
    }
    let target = target(route, &path);
    // Whoever logs in is nobody before.
    let who = who.or_else(|| response.extensions().get::<Principal>().cloned());
    let detail = response.extensions().get::<Remark>().map(|remark| remark.0.clone());
    let deed = Deed {
        who: who.as_ref().map_or_else(|| "nobody".to_owned(), |who| who.name.clone()),
        via: who.as_ref().map_or(PrincipalKind::Token, |who| who.kind),
        address: address.map(|address| address.to_string()),
        action,
        target,
        status,
        detail,
    };
    let audited = {
        let daemon = daemon.clone();
        blocking(move || {
            daemon.audit.add(deed).map_err(|error| Problem::new(Code::StorageFull, format!("the audit log: {error}")))
        })
        .await
    };
    if let Err(problem) = audited {
        tracing::error!(%problem, route = route.name, "a change was made and is not recorded yet");
    }
    response
}

fn route(request: &Request) -> Option<&'static Route> {
    let path = request.extensions().get::<MatchedPath>()?;
    let method = match *request.method() {
        Method::HEAD => "GET",
        ref method => method.as_str(),
    };
    ROUTES.iter().find(|route| route.path == path.as_str() && route.method.as_str() == method)
}

/// A POST that changes nothing.
fn is_question(route: &Route) -> bool {
    matches!(route.name, "policy-validate" | "policy-diff" | "balance-plan")
}

/// `policy.put` from `policy-put`.
fn action(route: &Route) -> String {
    match route.name {
        "login" | "logout" => format!("session.{}", route.name),
        name => name.replacen('-', ".", 1),
    }
}

/// What stands in the place of the parameter of a path.
fn target(route: &Route, path: &str) -> Option<String> {
    let parts = route.path.split('/').zip(path.split('/'));
    let found = parts.filter(|(pattern, _)| pattern.starts_with('{')).map(|(_, part)| part.to_owned()).next();
    found.map(|target| target.chars().take(200).collect())
}

/// Who asks, if they may; nobody, if the route is for everybody.
async fn admit(
    daemon: &Daemon,
    route: &Route,
    asking: &Asking,
    address: Option<IpAddr>,
) -> Result<Option<Principal>, Problem> {
    let Needs::Role(role) = route.access else {
        return match route.name {
            "login" => match daemon.access.is_limited(address) {
                Some(wait) => Err(limited(wait)),
                None => Ok(None),
            },
            _ => Ok(None),
        };
    };
    let who = who(daemon, asking, address).await?;
    if who.role < role {
        let (has, needs) = (word(who.role), word(role));
        return Err(Problem::new(Code::Forbidden, format!("{} is {has}; this needs the role {needs}", who.name)));
    }
    if who.kind == PrincipalKind::Session
        && !asking.is_safe
        && !access::is_equal(&asking.csrf, who.csrf_token.as_deref().unwrap_or_default())
    {
        return Err(Problem::new(Code::CsrfRequired, "a session's change needs its CSRF token")
            .hint(format!("send what GET /api/v1/whoami gives as csrf_token in the header {CSRF_TOKEN}")));
    }
    Ok(Some(who))
}

pub fn word(role: Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    }
}

fn limited(wait: u64) -> Problem {
    Problem::new(Code::RateLimited, "too many failed log-ins from this address").hint(format!("wait {wait} seconds"))
}

async fn who(daemon: &Daemon, asking: &Asking, address: Option<IpAddr>) -> Result<Principal, Problem> {
    match &asking.peer {
        Some(Peer::Local { uid }) => return local(*uid),
        // Members let in whom they would let do it themselves.
        Some(Peer::Node { .. }) => {
            crate::peers::member(daemon, asking.peer.as_ref())?;
            let decoded = asking.on_behalf.as_ref().and_then(|hexed| hex::decode(hexed).ok());
            let principal = decoded.and_then(|bytes| serde_json::from_slice::<Principal>(&bytes).ok());
            // Its session was checked where it came in.
            let principal = principal.map(|who| Principal { kind: PrincipalKind::Token, ..who });
            return principal.ok_or_else(|| Problem::new(Code::Unauthenticated, "a node did not say for whom it asks"));
        }
        _ => {}
    }
    match (&asking.authorization, &asking.cookie) {
        (Some(value), _) => {
            if let Some(wait) = daemon.access.is_limited(address) {
                return Err(limited(wait));
            }
            let token = value.split_once(' ');
            let token =
                token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map_or("", |(_, token)| token);
            let found = daemon.access.by_token(token.trim());
            if found.is_err() {
                daemon.access.failed(address);
            }
            found
        }
        (None, Some(cookie)) => daemon.access.by_cookie(cookie).await,
        (None, None) => Err(Problem::new(Code::Unauthenticated, "nobody is logged in")
            .hint("send a token: Authorization: Bearer vwt_…; virtward token create makes one")),
    }
}

fn local(uid: u32) -> Result<Principal, Problem> {
    let own = rustix::process::geteuid().as_raw();
    if uid != 0 && uid != own {
        return Err(Problem::new(Code::Forbidden, format!("user {uid} of this host may not use the socket"))
            .hint("use sudo, or a token over HTTPS"));
    }
    let name = if uid == 0 { "root".to_owned() } else { format!("uid {uid}") };
    let (kind, role) = (PrincipalKind::Local, Role::Admin);
    Ok(Principal { name, kind, role, vm_tags: Vec::new(), expires: None, csrf_token: None })
}

/// The session's cookie.
pub fn cookie(headers: &HeaderMap) -> Option<String> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let mut found = pairs.filter(|(name, value)| *name == SESSION_COOKIE && !value.is_empty());
    found.next().map(|(_, value)| value.to_owned())
}
