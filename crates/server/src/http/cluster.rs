//! The cluster: who belongs to it, tokens to join it, its state in a file.

use std::sync::Arc;

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use jiff::{SignedDuration, Timestamp};
use virtward_api::{Code, JoinTokenMade, NewJoinToken, PrincipalKind, Problem, Said, Saying, Severity, StateBackup};
use virtward_cluster::{
    ca::{self, Role},
    state,
};

use super::{
    answer::{Answer, Failed, ok, with},
    guard::Remark,
    params::{Body, Name, Who},
};
use crate::{admin, daemon::Daemon, events::Note, failures, peers::identity};

/// Longest life of a token to join with.
const LIFE_MAX_S: u64 = 7 * 86_400;
const LIFE_DEFAULT_S: u64 = 3600;

pub async fn status(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&admin::status(&daemon).await)
}

pub async fn token(
    State(daemon): State<Arc<Daemon>>,
    Who(who): Who,
    Body(new, _): Body<NewJoinToken>,
) -> Result<Response, Failed> {
    let config = daemon.config();
    let (Some(cluster), Some(own)) = (&config.cluster, daemon.peers.identity()) else {
        return Err(Problem::new(
            Code::Conflict,
            "the state of this host is in a file of its own; others cannot join it",
        )
        .hint("virtward cluster init --etcd URLS makes a cluster of it")
        .into());
    };
    let life = new.expires_in_s.unwrap_or(LIFE_DEFAULT_S);
    if !(60..=LIFE_MAX_S).contains(&life) {
        return Err(Problem::new(Code::Invalid, "expires_in_s: from 60 to 604800 (a week)").into());
    }
    let store = daemon.kv.store();
    let wrong = |error: ca::Error| identity::problem(&error);
    let authority = ca::load_ca(&*store, &own.cluster_key).await.map_err(wrong)?;
    let (now, ttl) = (Timestamp::now(), std::time::Duration::from_secs(life));
    let token =
        ca::make_token(&*store, authority.fingerprint(), Role::Node, &who.name, ttl, now).await.map_err(wrong)?;
    let life = SignedDuration::from_secs(i64::try_from(life).unwrap_or(0));
    let address = daemon.nodes.address(&daemon.nodes.me.name).ok();
    let address = address.or_else(|| cluster.address.clone()).unwrap_or_default();
    let made = JoinTokenMade {
        id: token.id(),
        token: token.expose().to_string(),
        expires: now.checked_add(life).unwrap_or(now),
        address,
    };
    let mut response = with(StatusCode::CREATED, &made)?.into_response();
    response.extensions_mut().insert(Remark(format!("join token {}", made.id)));
    Ok(response)
}

pub async fn remove(State(daemon): State<Arc<Daemon>>, Name(name): Name, Who(who): Who) -> Answer<StatusCode> {
    if daemon.nodes.is_there(&name) && name == daemon.nodes.me.name && daemon.nodes.records.len() > 1 {
        return Err(Problem::new(
            Code::Conflict,
            format!("{name} is the node that was asked; it cannot remove itself"),
        )
        .hint("ask another node")
        .into());
    }
    if !daemon.nodes.is_cluster {
        return Err(Problem::new(Code::Conflict, "this host is alone; there is nobody to remove").into());
    }
    daemon.nodes.remove(&name).await?;
    let note = format!("{} removed {name} from the cluster", who.name);
    let said = Said::from(Saying::NodeRemoved).with("who", who.name.as_str()).with("node", name.as_str());
    tracing::warn!("{note}");
    daemon.events.add(Note::new(Severity::Warning, "node-removed", note).says(said));
    Ok(StatusCode::NO_CONTENT)
}

pub async fn backup_state(State(daemon): State<Arc<Daemon>>, Who(who): Who) -> Answer {
    if who.kind != PrincipalKind::Local {
        return Err(Problem::new(Code::Forbidden, "the state is written to a file of the host, for root on it alone")
            .hint("run virtward cluster backup-state on the host")
            .into());
    }
    let dir = daemon.config().state_dir.join("exports");
    let failed = |error: std::io::Error| {
        Problem::new(Code::StorageFull, format!("cannot write the state into {}: {error}", dir.display()))
    };
    std::fs::create_dir_all(&dir).map_err(failed)?;
    let file = dir.join(format!("state-{}.json", Timestamp::now().as_microsecond()));
    let summary = state::export(&*daemon.kv.store(), &file).await.map_err(|error| failures::state(&error))?;
    let made = StateBackup {
        file: file.display().to_string(),
        entries: summary.entries,
        revision: summary.revision.0,
        made: summary.made,
    };
    ok(&made)
}
