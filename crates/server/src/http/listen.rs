//! Connections: the Unix socket of the host, and HTTPS.
//!
//! Bounded in number and in the time that a client may take to say what it wants. At the end of the daemon connections
//! finish the request that they are in, and no more.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::{Router, body::Body};
use hyper::{body::Incoming, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use virtward_engine::Cancel;

use super::guard::Peer;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;
/// Time for the TLS handshake, and for the head of a request.
const HEAD_MAX: Duration = Duration::from_secs(15);
/// Time for requests to end when the daemon does.
const END_MAX: Duration = Duration::from_secs(5);

/// TLS as it is now; it can be replaced while connections come.
pub type Tls = Arc<RwLock<Arc<rustls::ServerConfig>>>;

/// Binds the socket so that it never exists with other permissions than its own.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another daemon answers there"));
    }
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Serves the socket until cancelled.
pub async fn unix(listener: UnixListener, router: Router, cancel: Cancel) {
    let mut connections = Connections::new(cancel.clone());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cancel.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => match uid(&stream) {
                Some(uid) => connections.spawn(async move { Ok((stream, Peer::Local { uid })) }, &router),
                None => tracing::warn!("a connection without credentials was closed"),
            },
            Err(error) => pause(&error).await,
        }
    }
    connections.end().await;
}

fn uid(stream: &UnixStream) -> Option<u32> {
    stream.peer_cred().ok().map(|peer| peer.uid())
}

/// Serves HTTPS until cancelled. Whatever certificate a client shows is of no importance.
pub async fn https(listener: TcpListener, tls: Tls, router: Router, cancel: Cancel) {
    over_tls(listener, tls, router, cancel, |_, address| Peer::Remote { address }).await;
}

/// Serves the nodes of the cluster until cancelled.
pub async fn peers(listener: TcpListener, tls: Tls, router: Router, cancel: Cancel) {
    over_tls(listener, tls, router, cancel, crate::peers::peer).await;
}

/// Serves connections over TLS; `who` tells who it is from the certificate that was verified, and the address.
async fn over_tls(
    listener: TcpListener,
    tls: Tls,
    router: Router,
    cancel: Cancel,
    who: fn(Option<&[u8]>, IpAddr) -> Peer,
) {
    let mut connections = Connections::new(cancel.clone());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cancel.cancelled() => break,
        };
        match accepted {
            Ok((stream, from)) => {
                let acceptor = TlsAcceptor::from(tls.read().unwrap_or_else(PoisonError::into_inner).clone());
                let handshake = async move {
                    let _ = stream.set_nodelay(true);
                    let stream = tokio::time::timeout(HEAD_MAX, acceptor.accept(stream)).await;
                    let stream = stream.map_err(|_| io::ErrorKind::TimedOut)??;
                    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                    let peer = who(shown.map(|certificate| certificate.as_ref()), plain(from));
                    Ok((stream, peer))
                };
                connections.spawn(handshake, &router);
            }
            Err(error) => pause(&error).await,
        }
    }
    connections.end().await;
}

/// An IPv4 address that came over IPv6 is still that address.
fn plain(from: SocketAddr) -> IpAddr {
    from.ip().to_canonical()
}

/// Out of file descriptors, for example: trying again at once would only burn time.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

struct Connections {
    tasks: JoinSet<()>,
    room: Arc<Semaphore>,
    cancel: Cancel,
}

impl Connections {
    fn new(cancel: Cancel) -> Self {
        Self { tasks: JoinSet::new(), room: Arc::new(Semaphore::new(CONNECTIONS_MAX)), cancel }
    }

    fn spawn<S>(&mut self, connected: impl Future<Output = io::Result<(S, Peer)>> + Send + 'static, router: &Router)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        while self.tasks.try_join_next().is_some() {}
        // Dropping what is beyond is the only answer that costs nothing.
        let Ok(place) = self.room.clone().try_acquire_owned() else { return };
        let (router, cancel) = (router.clone(), self.cancel.clone());
        self.tasks.spawn(async move {
            match connected.await {
                Ok((stream, peer)) => serve(stream, peer, router, cancel).await,
                Err(error) => tracing::debug!(%error, "a connection was not established"),
            }
            drop(place);
        });
    }

    async fn end(mut self) {
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(END_MAX, all).await;
    }
}

async fn serve<S>(stream: S, peer: Peer, router: Router, cancel: Cancel)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.clone());
        router.call(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = &mut connection => outcome,
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended early");
    }
}
