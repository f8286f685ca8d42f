//! Which implementations the daemon runs with. Nothing else chooses.

use std::{
    fs, io,
    net::{TcpStream, ToSocketAddrs},
    path::Path,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use virtward_api::{Code, Problem};
use virtward_cluster::{EmbeddedOptions, EmbeddedStore, EtcdOptions, EtcdStore, Store, etcd::EtcdTls};
use virtward_engine::reconcile::inventory::{Connector, HostState};
use virtward_hypervisor::{Hypervisor, libvirt::Libvirt};

use crate::{
    config::{Config, Etcd},
    failures::{self, Result},
    views::is_local,
};

/// How long a host may take to answer when only that is asked.
const PROBE_MAX: Duration = Duration::from_secs(2);

/// The state file of a host that is no node of a cluster, in its state directory.
pub const STATE_FILE: &str = "state.db";

/// What a daemon is built on.
pub struct Wiring {
    /// The host.
    pub connector: Arc<dyn Connector>,
    /// The state.
    pub store: Arc<dyn Store>,
}

impl Wiring {
    /// libvirt, and the state that the configuration names.
    pub fn production(config: &Config) -> Result<Self> {
        let connector = Arc::new(LibvirtConnector { uri: config.connect.clone() });
        Ok(Self { connector, store: state(config)? })
    }
}

/// The state: in etcd where the configuration has a cluster, else in a file of this host's.
pub fn state(config: &Config) -> Result<Arc<dyn Store>> {
    let dir = &config.state_dir;
    make(dir).map_err(|error| {
        Problem::new(Code::StateUnavailable, format!("cannot use {} for the state: {error}", dir.display()))
            .hint("run as root, or name another directory with state-dir in [server] of the configuration")
    })?;
    match &config.cluster {
        Some(cluster) if !cluster.etcd.endpoints.is_empty() => Ok(Arc::new(etcd(&cluster.etcd)?)),
        _ => {
            let store = EmbeddedStore::open(dir.join(STATE_FILE), EmbeddedOptions::default());
            Ok(Arc::new(store.map_err(|error| failures::state(&error))?))
        }
    }
}

/// The state for the loops of high availability: with connections of its own, this host's own member of etcd first, and
/// calls that end within `limit`. On one host it is the daemon's own.
pub fn ha_store(config: &Config, own: Arc<dyn Store>, limit: Duration) -> Result<Arc<dyn Store>> {
    let Some(cluster) = &config.cluster else { return Ok(own) };
    let mut of = cluster.etcd.clone();
    let host = |url: &str| -> Option<String> {
        let authority = url.split_once("://")?.1.split('/').next()?;
        Some(authority.rsplit_once(':').map_or(authority, |(host, _)| host).to_owned())
    };
    let address =
        cluster.address.as_deref().and_then(|address| address.rsplit_once(':')).map(|(host, _)| host.to_owned());
    of.endpoints.sort_by_key(|url| address.is_none() || host(url) != address);
    Ok(Arc::new(etcd_within(&of, Some(limit))?))
}

/// A store in etcd.
pub fn etcd(etcd: &Etcd) -> Result<EtcdStore> {
    etcd_within(etcd, None)
}

fn etcd_within(etcd: &Etcd, limit: Option<Duration>) -> Result<EtcdStore> {
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| {
            Problem::new(Code::StateUnavailable, format!("cannot read {} for etcd: {error}", path.display()))
                .hint("name the right files with etcd-ca, etcd-cert and etcd-key in [cluster] of the configuration")
        })
    };
    let tls = match &etcd.ca {
        None => None,
        Some(ca) => {
            let identity = etcd.identity.as_ref().map(|(cert, key)| Ok((read(cert)?, read(key)?)));
            Some(EtcdTls { ca_pem: read(ca)?, identity_pem: identity.transpose()?, server_name: None })
        }
    };
    let mut options = EtcdOptions { tls, ..EtcdOptions::new(etcd.endpoints.clone(), etcd.prefix.clone()) };
    options.timeout = limit.unwrap_or(options.timeout);
    EtcdStore::new(options).map_err(|error| failures::state(&error))
}

/// Scratch images are in there by default, and QEMU runs as another user: it may pass through and not look around.
fn make(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)
}

struct LibvirtConnector {
    uri: String,
}

impl LibvirtConnector {
    /// `HOST` and a port that something should answer at, of `qemu+ssh://root@HOST:2222/system`.
    fn authority(&self) -> Option<(String, u16)> {
        let (scheme, rest) = self.uri.split_once("://")?;
        let authority = rest.split(['/', '?']).next()?;
        let address = authority.rsplit('@').next().filter(|address| !address.is_empty())?;
        let default = match scheme.rsplit('+').next()? {
            "tls" => 16514,
            "tcp" => 16509,
            _ => 22,
        };
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (address, default),
        };
        Some((host.trim_matches(['[', ']']).to_owned(), port))
    }
}

#[async_trait]
impl Connector for LibvirtConnector {
    fn uri(&self) -> String {
        self.uri.clone()
    }

    fn name(&self) -> String {
        match self.authority() {
            Some((host, _)) if !is_local(&self.uri) => host,
            _ => node_name(),
        }
    }

    async fn connect(&self) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>> {
        Ok(Arc::new(Libvirt::connect(&self.uri).await?))
    }

    async fn other(&self, uri: &str) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>> {
        Ok(Arc::new(Libvirt::connect(uri).await?))
    }

    async fn probe(&self) -> HostState {
        if is_local(&self.uri) {
            // We run on it.
            return HostState::LibvirtdDown;
        }
        let Some(authority) = self.authority() else { return HostState::Unknown };
        tokio::task::spawn_blocking(move || probe(&authority)).await.unwrap_or(HostState::Unknown)
    }
}

/// Whether anything answers at a port, if only to say that nothing listens there.
fn probe((host, port): &(String, u16)) -> HostState {
    let addresses = (host.as_str(), *port).to_socket_addrs();
    let Some(address) = addresses.ok().and_then(|mut all| all.next()) else { return HostState::Unknown };
    match TcpStream::connect_timeout(&address, PROBE_MAX) {
        Ok(_) => HostState::LibvirtdDown,
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => HostState::LibvirtdDown,
            io::ErrorKind::HostUnreachable => HostState::Down,
            _ => HostState::Unknown,
        },
    }
}

/// Name of the host that this process runs on.
pub fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_found_in_every_kind_of_uri() {
        for (uri, expected) in [
            ("qemu+ssh://root@kvm1/system", Some(("kvm1", 22))),
            ("qemu+ssh://root@kvm1:2222/system?x=y", Some(("kvm1", 2222))),
            ("qemu+tls://[fd00::1]/system", Some(("fd00::1", 16514))),
            ("qemu+tcp://10.0.0.1/system", Some(("10.0.0.1", 16509))),
            ("qemu:///system", None),
        ] {
            let found = LibvirtConnector { uri: uri.into() }.authority();
            assert_eq!(found, expected.map(|(host, port)| (host.to_owned(), port)), "{uri}");
        }
        assert!(is_local("qemu:///system") && is_local("qemu+unix:///system?socket=/x") && is_local("test:///default"));
        assert!(!is_local("qemu+ssh://root@kvm1/system"));
    }

    #[test]
    fn a_port_that_refuses_means_a_host_that_lives() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(probe(&("127.0.0.1".into(), port)), HostState::LibvirtdDown);
        drop(listener);
        assert_eq!(probe(&("127.0.0.1".into(), port)), HostState::LibvirtdDown);
        assert_eq!(probe(&("no-such-host.invalid".into(), 22)), HostState::Unknown);
    }
}
