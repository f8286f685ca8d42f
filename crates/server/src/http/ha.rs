//! High availability over HTTP.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use virtward_api::{Code, HaFenceTestRequest, HaMove, HaPolicy, HaReason, HaStart, Problem};

use super::{
    answer::{Answer, Failed, ok, with},
    guard::Remark,
    params::{Body, Name, Params, Who},
};
use crate::{daemon::Daemon, ha};

pub async fn status(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&ha::status(&daemon)?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct If {
    without: Option<String>,
    vm: Option<String>,
    memory_bytes: Option<u64>,
}

pub async fn capacity(State(daemon): State<Arc<Daemon>>, Params(asked): Params<If>) -> Answer {
    let question = match (asked.without, asked.vm, asked.memory_bytes) {
        (None, None, None) => ha::If::Now,
        (Some(host), None, None) => ha::If::Without(host),
        (None, Some(vm), Some(bytes)) => ha::If::Resized(vm, bytes),
        _ => return Err(Problem::new(Code::Invalid, "give without, or vm and memory_bytes, or nothing").into()),
    };
    ok(&ha::capacity(&daemon, &question)?)
}

fn remarked(answer: impl IntoResponse, remark: String) -> Response {
    let mut response = answer.into_response();
    if !remark.is_empty() {
        response.extensions_mut().insert(Remark(remark));
    }
    response
}

pub async fn arm(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    Body(reason, _): Body<HaReason>,
) -> Result<Response, Failed> {
    ha::arm(&daemon, true, &reason.reason, &who).await?;
    Ok(remarked(ok(&ha::status(&daemon)?)?, reason.reason))
}

pub async fn disarm(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    Body(reason, _): Body<HaReason>,
) -> Result<Response, Failed> {
    ha::arm(&daemon, false, &reason.reason, &who).await?;
    Ok(remarked(ok(&ha::status(&daemon)?)?, reason.reason))
}

pub async fn confirm_off(
    State(daemon): State<Arc<Daemon>>,
    Name(host): Name,
    Who(who): Who,
    uri: Uri,
    Body(reason, _): Body<HaReason>,
) -> Result<Response, Failed> {
    ha::confirm_off(&daemon, &host, &who, uri.path()).await?;
    Ok(remarked(with(StatusCode::ACCEPTED, &ha::status(&daemon)?)?, reason.reason))
}

pub async fn test_fencing(
    State(daemon): State<Arc<Daemon>>,
    Name(host): Name,
    Body(how, _): Body<HaFenceTestRequest>,
) -> Result<Response, Failed> {
    let remark = if how.power_cycle { "with a power cycle" } else { "" };
    Ok(remarked(ok(&ha::test_fencing(&daemon, &host, how.power_cycle).await?)?, remark.into()))
}

pub async fn explain(State(daemon): State<Arc<Daemon>>, Name(vm): Name) -> Answer {
    ok(&ha::explain(&daemon, &vm)?)
}

pub async fn enable(
    State(daemon): State<Arc<Daemon>>,
    Name(vm): Name,
    Who(who): Who,
    Body(policy, _): Body<HaPolicy>,
) -> Answer {
    ok(&ha::enable(&daemon, &vm, &policy, &who).await?)
}

pub async fn disable(State(daemon): State<Arc<Daemon>>, Name(vm): Name) -> Answer<StatusCode> {
    ha::disable(&daemon, &vm).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn moving(
    State(daemon): State<Arc<Daemon>>,
    Name(vm): Name,
    Who(who): Who,
    uri: Uri,
    Body(how, _): Body<HaMove>,
) -> Answer {
    ok(&ha::moving(&daemon, &vm, &how, &who, uri.path()).await?)
}

pub async fn switch(
    State(daemon): State<Arc<Daemon>>,
    Name(vm): Name,
    Who(who): Who,
    Body(reason, _): Body<HaReason>,
) -> Result<Response, Failed> {
    let vm = ha::switch(&daemon, &vm, &reason.reason, &who).await?;
    Ok(remarked(with(StatusCode::ACCEPTED, &vm)?, reason.reason))
}

pub async fn start(
    State(daemon): State<Arc<Daemon>>,
    Name(vm): Name,
    Who(who): Who,
    Body(how, _): Body<HaStart>,
) -> Answer {
    with(StatusCode::ACCEPTED, &ha::start_vm(&daemon, &vm, how.force, &who).await?)
}
