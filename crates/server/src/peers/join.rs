//! How a host becomes a member: it shows a token to a node that shows the authority that the token names, and is given a
//! certificate, what opens the authority's key, and where the state is.

use std::{sync::Arc, time::Duration};

use axum::extract::State;
use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use virtward_api::{Code, Problem, Said, Saying, Severity};
use virtward_cluster::{
    Compare, Op,
    ca::{self, ClusterKey, Identity as Certified, JoinToken, NewKey, Role, Subject},
};

use super::{
    client,
    identity::{self, Files, problem},
};
use crate::{
    cluster::nodes::{NodeRecord, node_key},
    config::{ClusterConfig, Etcd},
    daemon::Daemon,
    events::Note,
    failures::Result,
    http::{
        answer::{self, Answer},
        params::Body,
    },
    kv,
};

/// What a new node says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The token, all of it.
    pub token: String,
    /// Name that it wants to have.
    pub name: String,
    /// `HOST:PORT` by which its peers will reach it.
    pub address: String,
    /// Signing request, DER in base64.
    pub request: String,
}

/// What it is given.
#[derive(Serialize, Deserialize)]
pub struct Joined {
    /// Its certificate and the authority's, PEM.
    pub certificate_pem: String,
    /// The authority's certificate, PEM.
    pub authority_pem: String,
    /// Opens the authority's key.
    pub cluster_key: String,
    /// URLs of etcd's members.
    pub etcd: Vec<String>,
    /// What every key begins with there.
    pub etcd_prefix: String,
    /// Authorities of etcd's certificates, PEM.
    pub etcd_ca_pem: Option<String>,
}

/// The names and addresses for a certificate, of an address with port.
pub fn names_of(address: Option<&str>) -> Vec<String> {
    let host = address.and_then(|address| address.rsplit_once(':')).map(|(host, _)| host);
    host.map(|host| host.trim_matches(['[', ']']).to_owned()).into_iter().collect()
}

/// A name and an address that a node can have.
pub fn check(name: &str, address: &str) -> Result<()> {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    if name.len() > 200 || !name.split('.').all(label) {
        return Err(Problem::new(Code::Invalid, format!("{name:?} cannot be the name of a node"))
            .hint("use letters, digits, hyphens and dots; --name or name in [cluster] sets it"));
    }
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    if !matches!(port, Some(Ok(1..))) || address.starts_with("0.0.0.0") || address.starts_with("[::]") {
        return Err(Problem::new(
            Code::Invalid,
            format!("{address:?} is no address by which peers can reach this node"),
        )
        .hint("give HOST:PORT, such as 10.0.0.2:8461"));
    }
    Ok(())
}

/// Admits a node. Whoever asks is nobody until the token says otherwise.
pub async fn admit(State(daemon): State<Arc<Daemon>>, Body(request, _): Body<JoinRequest>) -> Answer {
    let name = request.name.clone();
    let outcome = admitted(&daemon, request).await;
    let note = match &outcome {
        Ok(_) => Note::new(Severity::Warning, "node-joined", format!("{name} joined the cluster"))
            .says(Said::from(Saying::NodeJoined).with("node", name.as_str())),
        Err(problem) => {
            let name: String = name.chars().take(100).collect();
            Note::new(
                Severity::Warning,
                "join-refused",
                format!("{name:?} was not let into the cluster: {}", problem.detail),
            )
            .says(Said::from(Saying::JoinRefused).with("node", name).with("why", problem.detail.as_str()))
        }
    };
    tracing::warn!("{}", note.message);
    daemon.events.add(note);
    answer::ok(&outcome?)
}

async fn admitted(daemon: &Daemon, request: JoinRequest) -> Result<Joined> {
    check(&request.name, &request.address)?;
    let config = daemon.config();
    let (Some(cluster), Some(identity)) = (&config.cluster, daemon.peers.identity()) else {
        return Err(Problem::new(Code::Conflict, "this daemon is no node of a cluster"));
    };
    let token: JoinToken = request.token.parse().map_err(|error| problem(&error))?;
    let key = node_key(&request.name);
    let taken = || {
        Problem::new(Code::Conflict, format!("there is a node called {} already", request.name))
            .hint(format!("choose another name, or remove it first: virtward cluster remove {}", request.name))
    };
    if daemon.kv.get::<NodeRecord>(&key).await?.is_some() {
        return Err(taken());
    }
    let request_der =
        STANDARD.decode(&request.request).map_err(|_| Problem::new(Code::BadRequest, "request: no base64"))?;
    let store = daemon.kv.store();
    let authority = ca::load_ca(&*store, &identity.cluster_key).await.map_err(|error| problem(&error))?;
    let now = Timestamp::now();
    ca::redeem_token(&*store, &token, &request.name, now).await.map_err(|error| problem(&error))?;
    let record = new_node(&request.address, now);
    if daemon.kv.commit(vec![Compare::absent(key.clone())], vec![kv::put(&key, &record)?]).await?.is_none() {
        return Err(taken());
    }
    let addresses = names_of(Some(&request.address));
    let subject = Subject { name: request.name.clone(), role: Role::Node, addresses };
    let certificate_pem = authority.issue(&request_der, &subject, now).map_err(|error| problem(&error))?;
    let etcd_ca_pem = match &cluster.etcd.ca {
        Some(path) => Some(std::fs::read_to_string(path).map_err(|error| {
            Problem::new(Code::StateUnavailable, format!("cannot read {}: {error}", path.display()))
        })?),
        None => None,
    };
    Ok(Joined {
        certificate_pem,
        authority_pem: authority.certificate_pem().to_owned(),
        cluster_key: identity.cluster_key.expose().to_string(),
        etcd: cluster.etcd.endpoints.clone(),
        etcd_prefix: cluster.etcd.prefix.clone(),
        etcd_ca_pem,
    })
}

/// The record of a node that is new.
pub fn new_node(address: &str, now: Timestamp) -> NodeRecord {
    NodeRecord {
        boot: None,
        address: Some(address.to_owned()),
        joined: now,
        started: None,
        stopped: None,
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

/// Joins: asks the node at `at`, and keeps what it gives in the directory of `own`. The configuration to come.
pub async fn join(token: &str, at: &str, name: &str, own: &ClusterConfig) -> Result<ClusterConfig> {
    let address = own.address.clone().unwrap_or_default();
    check(name, &address)?;
    let parsed: JoinToken = token.parse().map_err(|error| problem(&error))?;
    let key = NewKey::generate().map_err(|error| problem(&error))?;
    let tls = ca::join_client_config(parsed.fingerprint()).map_err(|error| problem(&error))?;
    // Which node answers is of no importance, only whose authority it shows.
    let expected =
        ServerName::try_from("node.virtward.internal").map_err(|_| Problem::new(Code::Internal, "a name"))?;
    let request = JoinRequest {
        token: token.to_owned(),
        name: name.to_owned(),
        address,
        request: STANDARD.encode(&key.request_der),
    };
    let body = serde_json::to_vec(&request).map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    let asked = client::once(at, Arc::new(tls), expected, "POST", "/peer/v1/join", body);
    let bytes = tokio::time::timeout(Duration::from_secs(30), asked).await.unwrap_or_else(|_| {
        Err(Problem::new(Code::Unavailable, format!("{at} did not answer in time"))
            .hint("is it the peer address of a node (port 8461), and does its daemon run?"))
    })?;
    let joined: Joined = serde_json::from_slice(&bytes).map_err(|error| {
        Problem::new(Code::Conflict, format!("{at} answered something that makes no sense: {error}"))
    })?;
    let given = Certified::of_pem(&joined.certificate_pem).map_err(|error| problem(&error))?;
    if given.name != name {
        return Err(Problem::new(Code::Conflict, format!("{at} gave a certificate for {:?}", given.name)));
    }
    let cluster_key = ClusterKey::parse(&joined.cluster_key).map_err(|error| problem(&error))?;
    let files = Files {
        certificate_pem: &joined.certificate_pem,
        key_pem: &key.key_pem,
        authority_pem: &joined.authority_pem,
        cluster_key: &cluster_key,
    };
    identity::write(&own.dir, &files)?;
    let ca = match (&own.etcd.ca, &joined.etcd_ca_pem) {
        (Some(ca), _) => Some(ca.clone()),
        (None, None) => None,
        (None, Some(pem)) => {
            let path = own.dir.join("etcd-ca.crt");
            ca::write_secret(&path, pem.as_bytes()).map_err(|error| problem(&error))?;
            Some(path)
        }
    };
    let etcd = Etcd { endpoints: joined.etcd, prefix: joined.etcd_prefix, ca, identity: own.etcd.identity.clone() };
    Ok(ClusterConfig { etcd, ..own.clone() })
}

/// The op that makes a node a member, if there is none of its name.
pub fn membership(name: &str, address: &str, now: Timestamp) -> Result<(Compare, Op)> {
    let key = node_key(name);
    Ok((Compare::absent(key.clone()), kv::put(&key, &new_node(address, now))?))
}
