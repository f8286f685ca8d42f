//! The members of an etcd cluster, one of which is in use.
//!
//! The client library's own balancing sends requests to members that are dead or frozen as readily as to others; here
//! every member has a connection of its own and the one in use is kept until it fails.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::{sync::OnceCell, time::Instant};

use super::EtcdOptions;
use crate::error::{Error, Result};

/// etcd takes pings more often than every 5 s, or without a request under way, for an attack.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// TLS towards etcd, in PEM.
#[derive(Clone)]
pub struct EtcdTls {
    /// Certificates of the authorities that etcd's certificate may come from.
    pub ca_pem: String,
    /// This client's certificate chain and private key.
    pub identity_pem: Option<(String, String)>,
    /// Name to expect in etcd's certificate, if it is not the one in the URL.
    pub server_name: Option<String>,
}

impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// One member.
pub(super) struct Member {
    url: String,
    options: ConnectOptions,
    tls: Option<EtcdTls>,
    client: OnceCell<Client>,
}

impl Member {
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn tls(&self) -> Option<&EtcdTls> {
        self.tls.as_ref()
    }

    /// A client that talks to this member alone. With name and password it logs in first.
    pub(super) async fn get(&self, deadline: Instant) -> Result<Client, etcd_client::Error> {
        let connect = self.client.get_or_try_init(|| Client::connect([&self.url], Some(self.options.clone())));
        match tokio::time::timeout_at(deadline, connect).await {
            Ok(client) => client.cloned(),
            Err(_) => Err(etcd_client::Error::IoError(std::io::ErrorKind::ConnectionRefused.into())),
        }
    }
}

/// All members.
pub(super) struct Members {
    members: Vec<Member>,
    current: AtomicUsize,
    location: String,
}

impl Members {
    pub(super) fn new(options: EtcdOptions) -> Result<Self> {
        if options.endpoints.is_empty() {
            return Err(Error::Invalid { what: "no endpoint of etcd is given".into() });
        }
        let mut connect = ConnectOptions::new()
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_require_leader(true);
        if let Some(tls) = &options.tls {
            connect = connect.with_tls(client_tls(tls));
        }
        if let Some((name, password)) = &options.user {
            connect = connect.with_user(name, password).with_auto_token_refresh(true);
        }
        let location = options.endpoints.join(",");
        for url in &options.endpoints {
            let secure = url.starts_with("https://");
            if !secure && !url.starts_with("http://") || secure != options.tls.is_some() {
                let what = format!("{url}: give https:// URLs with certificates, or http:// URLs without");
                return Err(Error::Invalid { what });
            }
        }
        let member = |url| Member { url, options: connect.clone(), tls: options.tls.clone(), client: OnceCell::new() };
        let members = options.endpoints.into_iter().map(member).collect();
        Ok(Self { members, current: AtomicUsize::new(0), location })
    }

    pub(super) fn location(&self) -> &str {
        &self.location
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// The member in use.
    pub(super) fn current(&self) -> (usize, &Member) {
        let number = self.current.load(Ordering::Relaxed);
        (number, &self.members[number])
    }

    /// Turns to the next member, unless somebody has done so since this one was taken.
    pub(super) fn leave(&self, number: usize) {
        let next = (number + 1) % self.members.len();
        let _ = self.current.compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

fn client_tls(tls: &EtcdTls) -> TlsOptions {
    let mut config = TlsOptions::new().ca_certificate(Certificate::from_pem(&tls.ca_pem));
    if let Some((chain, key)) = &tls.identity_pem {
        config = config.identity(Identity::from_pem(chain, key));
    }
    match &tls.server_name {
        Some(name) => config.domain_name(name),
        None => config,
    }
}
