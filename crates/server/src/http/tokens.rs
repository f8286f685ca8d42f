//! Log-in, log-out, tokens.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use virtward_api::{Login, NewToken, SESSION_COOKIE, Session, TokenCreated};

use super::{
    answer::{Answer, Failed, ok, with},
    guard::{self, Peer, Remark},
    params::{self, Body, Name, Who},
};
use crate::daemon::Daemon;

pub async fn log_in(State(daemon): State<Arc<Daemon>>, request: Request) -> Result<Response, Failed> {
    let address = match request.extensions().get::<Peer>() {
        Some(Peer::Remote { address }) => Some(*address),
        _ => None,
    };
    let Body(login, _) = <Body<Login> as axum::extract::FromRequest<()>>::from_request(request, &()).await?;
    match daemon.access.log_in(&login.token).await {
        Ok((principal, cookie)) => {
            let cookie = format!("{SESSION_COOKIE}={cookie}; Path=/; HttpOnly; Secure; SameSite=Strict");
            let session = ok(&Session { principal: principal.clone() })?;
            let mut response = ([(header::SET_COOKIE, cookie)], session).into_response();
            response.extensions_mut().insert(principal);
            Ok(response)
        }
        Err(problem) => {
            daemon.access.failed(address);
            Err(problem.into())
        }
    }
}

pub async fn log_out(State(daemon): State<Arc<Daemon>>, request: Request) -> Result<Response, Failed> {
    let cookie = guard::cookie(request.headers());
    drop(request);
    if let Some(cookie) = cookie {
        daemon.access.log_out(&cookie).await?;
    }
    let gone = format!("{SESSION_COOKIE}=; Path=/; HttpOnly; Secure; SameSite=Strict; Max-Age=0");
    Ok((StatusCode::NO_CONTENT, [(header::SET_COOKIE, gone)]).into_response())
}

pub async fn whoami(Who(who): Who) -> Answer {
    ok(&who)
}

pub async fn list(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&daemon.access.tokens())
}

pub async fn create(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    headers: HeaderMap,
    Body(new, body): Body<NewToken>,
) -> Result<Response, Failed> {
    let again = params::idempotency(&headers, &who, "token", &body)?;
    let (token, secret) = daemon.access.create(&new, &who.name, again.as_ref()).await?;
    let remark = Remark(format!("{} ({}, {})", token.name, token.id, guard::word(token.role)));
    let mut response = with(StatusCode::CREATED, &TokenCreated { token, secret })?.into_response();
    response.extensions_mut().insert(remark);
    Ok(response)
}

pub async fn revoke(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer<StatusCode> {
    daemon.access.revoke(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
