//! Calls to other nodes: mutual TLS, the name of the node that is meant in its certificate, connections kept for reuse.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, StatusCode, body::Incoming, client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use virtward_api::{Code, Principal, Problem};
use virtward_cluster::ca;

use super::identity::{Identity, problem};
use crate::{cluster::nodes::Nodes, failures::Result};

/// Time for a connection, and for the head of an answer.
const CONNECT_MAX: Duration = Duration::from_secs(5);
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Largest answer that is read whole.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Connections kept per node.
const IDLE_MAX: usize = 16;
/// Who a forwarded request is for.
pub const FOR: &str = "x-virtward-for";

type Sender = http1::SendRequest<Full<Bytes>>;
type Connection = http1::Connection<TokioIo<TlsStream<TcpStream>>, Full<Bytes>>;

/// A connection that carries bytes both ways.
pub type Stream = TokioIo<Upgraded>;

/// The way to other nodes.
pub struct Peers {
    nodes: Arc<Nodes>,
    identity: Option<Arc<Identity>>,
    tls: RwLock<Option<Arc<ClientConfig>>>,
    idle: Mutex<HashMap<String, Vec<Sender>>>,
}

/// A call.
pub struct Call<'a> {
    /// Method.
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// Headers.
    pub headers: &'a [(&'a str, &'a str)],
    /// Body.
    pub body: Bytes,
}

impl Peers {
    /// As this node; without an identity every call fails.
    pub fn new(nodes: Arc<Nodes>, identity: Option<Arc<Identity>>) -> Result<Self> {
        let peers = Self { nodes, identity, tls: RwLock::default(), idle: Mutex::default() };
        peers.renew()?;
        Ok(peers)
    }

    /// This node's identity, in a cluster.
    pub fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.clone()
    }

    /// The authorities may be others now.
    pub fn renew(&self) -> Result<()> {
        if let Some(identity) = &self.identity {
            let tls = ca::client_config(&identity.credentials, &identity.authorities());
            let tls = tls.map_err(|error| problem(&error))?;
            *self.tls.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(tls));
        }
        Ok(())
    }

    fn take_idle(&self, node: &str) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let of = idle.get_mut(node)?;
        while let Some(sender) = of.pop() {
            if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }

    /// A connection may be used again.
    fn keep(&self, node: &str, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let of = idle.entry(node.to_owned()).or_default();
        of.retain(|sender| !sender.is_closed());
        if of.len() < IDLE_MAX {
            of.push(sender);
        }
    }

    async fn connect(&self, node: &str) -> Result<Sender> {
        let (sender, connection) = self.open(node).await?;
        // It ends with the sender and the last body.
        tokio::spawn(connection);
        Ok(sender)
    }

    /// Makes a connection of its own to a node and turns it into a stream of bytes, by a protocol that both know.
    pub async fn upgrade(&self, node: &str, path: &str, protocol: &str) -> Result<Stream> {
        let (mut sender, connection) = self.open(node).await?;
        tokio::spawn(connection.with_upgrades());
        let headers = [("connection", "upgrade"), ("upgrade", protocol)];
        let call = Call { method: "GET", path, headers: &headers, body: Bytes::new() };
        let response = tokio::time::timeout(ANSWER_MAX, sender.send_request(request(&call)?)).await;
        let response = response.map_err(|_| unreachable(node, &"no answer in time"))?;
        let response = response.map_err(|error| unreachable(node, &error))?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let upgraded = hyper::upgrade::on(response).await.map_err(|error| unreachable(node, &error))?;
            return Ok(TokioIo::new(upgraded));
        }
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| unreachable(node, &error))?.to_bytes();
        good(node, status, body)?;
        Err(Problem::new(Code::Unavailable, format!("{node} answered with status {status}")))
    }

    async fn open(&self, node: &str) -> Result<(Sender, Connection)> {
        let tls = self.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
        let tls = tls.ok_or_else(|| {
            Problem::new(Code::Conflict, "this daemon is no node of a cluster").hint("virtward cluster join TOKEN")
        })?;
        let address = self.nodes.address(node)?;
        let name = ServerName::try_from(ca::node_server_name(node))
            .map_err(|error| Problem::new(Code::Conflict, format!("{node} is no name of a node: {error}")))?;
        open(&address, tls, name).await
    }

    /// Makes a call; the answer's head and its body to come. A connection that was idle may have died unseen: what a
    /// dead one was given is sent again once, so calls have to be repeatable.
    async fn call(&self, node: &str, call: &Call<'_>) -> Result<(Response<Incoming>, Sender)> {
        if let Some(mut sender) = self.take_idle(node)
            && let Ok(Ok(response)) = tokio::time::timeout(ANSWER_MAX, sender.send_request(request(call)?)).await
        {
            return Ok((response, sender));
        }
        let mut sender = self.connect(node).await?;
        match tokio::time::timeout(ANSWER_MAX, sender.send_request(request(call)?)).await {
            Ok(Ok(response)) => Ok((response, sender)),
            Ok(Err(error)) => Err(unreachable(node, &error)),
            Err(_) => Err(unreachable(node, &format!("no answer within {} s", ANSWER_MAX.as_secs()))),
        }
    }

    /// Makes a call whose answer is read bit by bit.
    pub async fn stream(&self, node: &str, call: &Call<'_>) -> Result<Response<Incoming>> {
        Ok(self.call(node, call).await?.0)
    }

    /// Makes a call; its status and all of its answer.
    pub async fn ask(&self, node: &str, call: &Call<'_>) -> Result<(u16, Bytes)> {
        let (response, sender) = self.call(node, call).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect();
        match tokio::time::timeout(ANSWER_MAX, body).await {
            Ok(Ok(body)) => {
                self.keep(node, sender);
                Ok((status, body.to_bytes()))
            }
            Ok(Err(error)) => Err(unreachable(node, &error)),
            Err(_) => Err(unreachable(node, &"its answer broke off")),
        }
    }

    /// Has a request of the public API answered by another node, for somebody who was admitted here.
    pub async fn forward(&self, node: &str, path: &str, body: Bytes, who: &Principal) -> Result<(u16, Bytes)> {
        let principal = principal(who)?;
        let headers = [("content-type", "application/json"), (FOR, &*principal)];
        self.ask(node, &Call { method: "POST", path, headers: &headers, body }).await
    }

    /// Reads something of the public API of another node, for somebody who was admitted here.
    pub async fn read(&self, node: &str, path: &str, who: &Principal) -> Result<(u16, Bytes)> {
        let principal = principal(who)?;
        self.ask(node, &Call { method: "GET", path, headers: &[(FOR, &*principal)], body: Bytes::new() }).await
    }
}

/// Who a request is for, as a header: that is ASCII, and a name may be anything.
fn principal(who: &Principal) -> Result<String> {
    let text = serde_json::to_string(who).map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    Ok(hex::encode(text))
}

fn request(call: &Call<'_>) -> Result<Request<Full<Bytes>>> {
    let mut request = Request::builder().method(call.method).uri(call.path).header("host", "node.virtward.internal");
    for (name, value) in call.headers {
        request = request.header(*name, *value);
    }
    let made = request.body(Full::new(call.body.clone()));
    made.map_err(|error| Problem::new(Code::Internal, format!("{}: {error}", call.path)))
}

fn unreachable(node: &str, why: &dyn std::fmt::Display) -> Problem {
    Problem::new(Code::Unavailable, format!("node {node} cannot be reached: {why}"))
        .hint("virtward cluster status shows which nodes answer; peers use port 8461")
}

async fn open(address: &str, tls: Arc<ClientConfig>, name: ServerName<'static>) -> Result<(Sender, Connection)> {
    let connected = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        tokio_rustls::TlsConnector::from(tls).connect(name, stream).await
    };
    let stream = match tokio::time::timeout(CONNECT_MAX, connected).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(unreachable(address, &error)),
        Err(_) => return Err(unreachable(address, &format!("no connection within {} s", CONNECT_MAX.as_secs()))),
    };
    http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(address, &error))
}

/// One request over a connection of its own; the body of a good answer, or the problem that it is.
pub async fn once(
    address: &str,
    tls: Arc<ClientConfig>,
    name: ServerName<'static>,
    method: &str,
    path: &str,
    body: Vec<u8>,
) -> Result<Bytes> {
    let (mut sender, connection) = open(address, tls, name).await?;
    tokio::spawn(connection);
    let headers = [("content-type", "application/json")];
    let call = Call { method, path, headers: &headers, body: body.into() };
    let response = sender.send_request(request(&call)?).await.map_err(|error| unreachable(address, &error))?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| unreachable(address, &error))?.to_bytes();
    good(address, status, body)
}

/// The body of a good answer, or the problem that it is.
pub fn good(node: &str, status: u16, body: Bytes) -> Result<Bytes> {
    if (200..300).contains(&status) {
        return Ok(body);
    }
    Err(serde_json::from_slice::<Problem>(&body)
        .unwrap_or_else(|_| Problem::new(Code::Unavailable, format!("{node} answered with status {status}"))))
}
