//! A client of the API: over the Unix socket of the host, or over HTTPS with a token.
//!
//! One connection per request: requests are few, and a connection that was idle for long is no connection.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::Incoming,
    client::conn::http1,
    header::{self, HeaderMap, HeaderName, HeaderValue},
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::Problem;

/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Largest event of a stream.
const EVENT_BYTES_MAX: usize = 4 << 20;
/// Time for a connection, and for an answer.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const ANSWER_MAX: Duration = Duration::from_secs(90);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers.
    #[error("no daemon answers at {at}: {why}")]
    Unreachable {
        /// Where.
        at: String,
        /// Why not.
        why: String,
    },
    /// It answered that it will not or cannot.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// It answered something that makes no sense.
    #[error("{at} does not speak this API: {why}")]
    Protocol {
        /// Where.
        at: String,
        /// What is wrong.
        why: String,
    },
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Where the daemon is.
#[derive(Clone)]
enum Target {
    Unix(PathBuf),
    Https { host: String, port: u16, tls: Arc<rustls::ClientConfig> },
}

/// A client.
#[derive(Clone)]
pub struct Client {
    target: Target,
    token: Option<String>,
}

/// An answer with its head.
#[derive(Debug)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Client {
    /// Over the socket of this host.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self { target: Target::Unix(path.into()), token: None }
    }

    /// Over HTTPS. `tls` says which certificates are trusted.
    pub fn https(host: &str, port: u16, tls: Arc<rustls::ClientConfig>, token: Option<String>) -> Self {
        Self { target: Target::Https { host: host.to_owned(), port, tls }, token }
    }

    /// Where it asks, for people.
    pub fn at(&self) -> String {
        match &self.target {
            Target::Unix(path) => path.display().to_string(),
            Target::Https { host, port, .. } => format!("https://{host}:{port}"),
        }
    }

    fn unreachable(&self, why: impl std::fmt::Display) -> Error {
        Error::Unreachable { at: self.at(), why: why.to_string() }
    }

    fn protocol(&self, why: impl std::fmt::Display) -> Error {
        Error::Protocol { at: self.at(), why: why.to_string() }
    }

    /// Reads.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.read(self.send(Method::GET, path, &[], None).await?)
    }

    /// Makes or starts something. With a key a repetition is harmless.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize, key: Option<&str>) -> Result<T> {
        let body = serde_json::to_vec(body).map_err(|error| self.protocol(error))?;
        let key: Vec<(&str, &str)> = key.map(|key| (crate::IDEMPOTENCY_KEY, key)).into_iter().collect();
        self.read(self.send(Method::POST, path, &key, Some(body)).await?)
    }

    /// Does something that is answered with nothing.
    pub async fn act(&self, path: &str, body: &impl Serialize) -> Result<()> {
        let body = serde_json::to_vec(body).map_err(|error| self.protocol(error))?;
        let answer = self.send(Method::POST, path, &[], Some(body)).await?;
        self.check(&answer)
    }

    /// Sets something, at a revision if one is given.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        revision: Option<u64>,
    ) -> Result<T> {
        let body = serde_json::to_vec(body).map_err(|error| self.protocol(error))?;
        let revision = revision.map(|revision| revision.to_string());
        let headers: Vec<(&str, &str)> = revision.iter().map(|revision| ("if-match", revision.as_str())).collect();
        self.read(self.send(Method::PUT, path, &headers, Some(body)).await?)
    }

    /// Removes something.
    pub async fn delete(&self, path: &str) -> Result<()> {
        let answer = self.send(Method::DELETE, path, &[], None).await?;
        self.check(&answer)
    }

    fn check(&self, answer: &Answer) -> Result<()> {
        if (200..300).contains(&answer.status) {
            return Ok(());
        }
        match serde_json::from_slice::<Problem>(&answer.body) {
            Ok(problem) => Err(Error::Problem(Box::new(problem))),
            Err(_) => Err(self.protocol(format!("status {}", answer.status))),
        }
    }

    fn read<T: DeserializeOwned>(&self, answer: Answer) -> Result<T> {
        self.check(&answer)?;
        serde_json::from_slice(&answer.body).map_err(|error| self.protocol(error))
    }

    /// Any request; whatever the answer is.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Result<Answer> {
        let exchange = async {
            let response = self.exchange(method, path, headers, body).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| self.unreachable(error))?;
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: body.to_bytes() })
        };
        match tokio::time::timeout(ANSWER_MAX, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(self.unreachable(format!("no answer within {} s", ANSWER_MAX.as_secs()))),
        }
    }

    /// Follows the stream, from after the event `last` if it is given.
    pub async fn stream(&self, path: &str, last: Option<&str>) -> Result<Stream> {
        let headers: Vec<(&str, &str)> = last.map(|last| ("last-event-id", last)).into_iter().collect();
        let response = self.exchange(Method::GET, path, &headers, None).await?;
        let status = response.status().as_u16();
        if status != 200 {
            let headers = response.headers().clone();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| self.unreachable(error))?.to_bytes();
            self.check(&Answer { status, headers, body })?;
            return Err(self.protocol(format!("status {status}")));
        }
        Ok(Stream { body: response.into_body(), rest: BytesMut::new(), at: self.at() })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(path);
        let host = match &self.target {
            Target::Unix(_) => "localhost",
            Target::Https { host, .. } => host,
        };
        request = request.header(header::HOST, host);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if body.is_some() && !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        for (name, value) in headers {
            let name = HeaderName::try_from(*name).map_err(|error| self.protocol(error))?;
            request = request.header(name, HeaderValue::try_from(*value).map_err(|error| self.protocol(error))?);
        }
        let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())));
        let request = request.map_err(|error| self.protocol(error))?;
        match &self.target {
            Target::Unix(path) => {
                let stream = self.in_time(UnixStream::connect(path)).await?;
                self.over(stream, request).await
            }
            Target::Https { host, port, tls } => {
                let stream = self.in_time(TcpStream::connect((host.as_str(), *port))).await?;
                let name = ServerName::try_from(host.clone()).map_err(|error| self.protocol(error))?;
                let connector = tokio_rustls::TlsConnector::from(tls.clone());
                let stream = self.in_time(connector.connect(name, stream)).await?;
                self.over(stream, request).await
            }
        }
    }

    async fn in_time<T>(&self, connecting: impl Future<Output = std::io::Result<T>>) -> Result<T> {
        match tokio::time::timeout(CONNECT_MAX, connecting).await {
            Ok(outcome) => outcome.map_err(|error| self.unreachable(error)),
            Err(_) => Err(self.unreachable(format!("no connection within {} s", CONNECT_MAX.as_secs()))),
        }
    }

    async fn over<S>(&self, stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.unreachable(error))?;
        // It ends with the body of the answer.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|error| self.unreachable(error))
    }
}

/// Changes as they come.
pub struct Stream {
    body: Incoming,
    rest: BytesMut,
    at: String,
}

/// One event of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamEvent {
    /// What to send as `Last-Event-ID` to go on after it.
    pub id: String,
    /// Its name: `job`, `progress` …
    pub name: String,
    /// JSON.
    pub data: String,
}

impl Stream {
    /// The next event; none when the daemon ended the stream.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>> {
        loop {
            if let Some(end) = self.rest.windows(2).position(|two| two == b"\n\n") {
                let block = self.rest.split_to(end + 2);
                if let Some(event) = parse(&String::from_utf8_lossy(&block)) {
                    return Ok(Some(event));
                }
                continue;
            }
            if self.rest.len() > EVENT_BYTES_MAX {
                return Err(Error::Protocol { at: self.at.clone(), why: "an event is too large".into() });
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => {
                    return Err(Error::Unreachable { at: self.at.clone(), why: error.to_string() });
                }
            }
        }
    }
}

/// One block of server-sent events; none for comments.
fn parse(block: &str) -> Option<StreamEvent> {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let event = StreamEvent {
        id: field("id").unwrap_or_default().to_owned(),
        name: field("event").unwrap_or("message").to_owned(),
        data: field("data")?.to_owned(),
    };
    Some(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_comments_passed_over() {
        let event = parse("id: b-7\nevent: job\ndata: {\"a\": 1}\n\n").unwrap();
        assert_eq!((&*event.id, &*event.name, &*event.data), ("b-7", "job", "{\"a\": 1}"));
        assert_eq!(parse(": alive\n\n"), None);
        assert_eq!(parse("retry: 2000\n\n"), None);
    }
}
