//! Probes of what runs in a guest: from outside, over the network, and from inside, through its agent.
//!
//! A probe asks the least that shows a service at work: a handshake, never a login or a change. Peers are untrusted: a
//! probe is bounded in time, reads at most [`READ_BYTES`], and repeats what they say only cut and without control
//! characters. A probe that could not be made (no agent, no such unit) is told apart from a service that fails, as only
//! the second one is a reason to restart anything.

mod inside;
mod lines;
mod sql;
mod target;
mod tls;
mod web;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
};

pub use inside::{InsideProbe, probe_inside, restart};
pub use target::Target;

/// The most that is read of any peer.
pub const READ_BYTES: usize = 64 << 10;

/// A service that can be asked from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Service {
    /// Something accepts connections.
    Tcp,
    /// A GET is answered.
    Http {
        /// Path and query.
        #[serde(default = "slash")]
        path: String,
        /// The `Host` header; the address unless given.
        host: Option<String>,
        /// Acceptable answers; 200 to 399 unless given.
        #[serde(default)]
        status: Vec<u16>,
        /// A text that the beginning of the body must hold.
        contains: Option<String>,
        /// Over TLS.
        tls: Option<Tls>,
    },
    /// A TLS handshake is made and the certificate stays valid long enough.
    Tls(Tls),
    /// PostgreSQL accepts sessions (what `pg_isready` asks).
    Postgresql,
    /// MySQL or MariaDB greets.
    Mysql,
    /// A mail server greets and answers EHLO.
    Smtp,
}

fn slash() -> String {
    "/".into()
}

/// What is asked of a certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The name asked for and, with `ca`, that the certificate must bear; the address unless given.
    pub name: Option<String>,
    /// A PEM file with the authorities to trust. Without it any issuer will do: the question is whether the service works.
    pub ca: Option<PathBuf>,
    /// Fails when fewer days of the certificate's validity are left.
    pub days_left: u16,
}

/// A probe from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Name or address of the guest.
    pub address: String,
    /// Port.
    pub port: u16,
    /// What to ask.
    pub service: Service,
    /// How long all of it may take, in milliseconds.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u32,
}

fn timeout_ms() -> u32 {
    5000
}

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The service works; what it said of itself.
    Up(String),
    /// It does not, and why.
    Down(String),
    /// The question could not be asked, and why: nothing is known about the service.
    Unknown(String),
}

/// Probes a service.
pub async fn probe(probe: &Probe) -> Verdict {
    let limit = Duration::from_millis(probe.timeout_ms.max(1).into());
    match tokio::time::timeout(limit, ask(probe)).await {
        Ok(Ok(said)) => Verdict::Up(tame(&said)),
        Ok(Err(Failed::Service(why))) => Verdict::Down(tame(&why)),
        Ok(Err(Failed::Question(why))) => Verdict::Unknown(tame(&why)),
        Err(_) => Verdict::Down(format!("no answer in {} ms", limit.as_millis())),
    }
}

/// Why there is no good answer.
enum Failed {
    Service(String),
    Question(String),
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Service(match error.kind() {
            std::io::ErrorKind::UnexpectedEof => "the connection was closed in the middle of an answer".into(),
            _ => error.to_string(),
        })
    }
}

async fn ask(probe: &Probe) -> Result<String, Failed> {
    let name = (probe.address.as_str(), probe.port);
    // The resolver's word says nothing about the guest.
    let resolved = tokio::net::lookup_host(name).await.map(Vec::from_iter);
    let addresses = resolved.map_err(|error| Failed::Question(format!("{}: {error}", probe.address)))?;
    let stream = TcpStream::connect(addresses.as_slice()).await?;
    match &probe.service {
        Service::Tcp => Ok("accepts connections".into()),
        Service::Smtp => lines::smtp(stream).await,
        Service::Postgresql => sql::postgresql(stream).await,
        Service::Mysql => sql::mysql(stream).await,
        Service::Tls(tls) => tls::connect(stream, &probe.address, tls).await.map(|(_, said)| said),
        Service::Http { path, host, status, contains, tls } => {
            let host = host.as_deref().unwrap_or(&probe.address);
            let question = web::Question { path, host, status, contains: contains.as_deref() };
            match tls {
                None => question.ask(stream).await,
                Some(tls) => {
                    let (stream, _) = tls::connect(stream, host, tls).await?;
                    question.ask(stream).await
                }
            }
        }
    }
}

/// Reads exactly `N` bytes.
async fn exactly<const N: usize>(stream: &mut (impl AsyncRead + Unpin)) -> Result<[u8; N], Failed> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// A stream to a service, encrypted or not.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// What others say, as it may be shown: one line, cut.
fn tame(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    clean.trim().to_owned()
}

#[cfg(test)]
mod tests;
