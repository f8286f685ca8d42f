//! This node's certificate and keys: on disk, in use, renewed.
//!
//! ```text
//! DIR/node.crt   this node's certificate and the authority's      DIR/cluster.key   what opens the authority's key
//! DIR/node.key   its key                                          DIR/ca.crt        the authorities that are trusted
//! ```
//!
//! Whoever replaces the files, this daemon or a person, has them used for the next connection.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use virtward_api::{Code, Problem, Said, Saying, Severity};
use virtward_cluster::{
    Store,
    ca::{self, ClusterKey, Credentials, NewKey, Role, Subject},
};
use virtward_engine::Cancel;

use crate::{daemon::Daemon, events::Note, failures::Result};

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Between two tries to renew.
const RENEW_EVERY: Duration = Duration::from_secs(600);

/// What the files are called.
const CERTIFICATE: &str = "node.crt";
const KEY: &str = "node.key";
const AUTHORITIES: &str = "ca.crt";
const CLUSTER_KEY: &str = "cluster.key";

/// From the authority's errors.
pub fn problem(error: &ca::Error) -> Problem {
    let code = match error {
        ca::Error::Store(error) => return crate::failures::state(error),
        ca::Error::Exists | ca::Error::TokenUsed { .. } => Code::Conflict,
        ca::Error::Missing => Code::NotFound,
        ca::Error::TokenUnknown | ca::Error::TokenExpired { .. } => Code::Unauthenticated,
        ca::Error::TokenMalformed | ca::Error::Request { .. } => Code::BadRequest,
        _ => Code::Conflict,
    };
    let text = error.to_string();
    match text.rsplit_once("; ") {
        Some((message, hint)) => Problem::new(code, message).hint(hint),
        None => Problem::new(code, text),
    }
}

/// A node's identity, as it is in use.
pub struct Identity {
    dir: PathBuf,
    /// For connections.
    pub credentials: Credentials,
    authorities: RwLock<Arc<String>>,
    /// Opens the authority's key.
    pub cluster_key: ClusterKey,
    seen: Mutex<[Option<SystemTime>; 3]>,
}

/// What a node is given when it becomes a member.
pub struct Files<'a> {
    /// Chain.
    pub certificate_pem: &'a str,
    /// Key.
    pub key_pem: &'a str,
    /// The authority.
    pub authority_pem: &'a str,
    /// Opens the authority's key.
    pub cluster_key: &'a ClusterKey,
}

/// Writes a new identity, for root alone. Refuses to replace one.
pub fn write(dir: &Path, files: &Files<'_>) -> Result<()> {
    let failed = |what: &dyn std::fmt::Display| {
        Problem::new(Code::Conflict, format!("cannot keep this node's certificate in {}: {what}", dir.display()))
    };
    if dir.join(CLUSTER_KEY).exists() {
        return Err(failed(&"there is one already")
            .hint("this host is a member already; virtward cluster status shows it. To let it join anew, remove that directory"));
    }
    fs::create_dir_all(dir).map_err(|error| failed(&error))?;
    let parts = [(KEY, files.key_pem), (CERTIFICATE, files.certificate_pem), (AUTHORITIES, files.authority_pem)];
    for (name, text) in parts {
        ca::write_secret(&dir.join(name), text.as_bytes()).map_err(|error| failed(&error))?;
    }
    // Last: where it is, everything is.
    files.cluster_key.save(&dir.join(CLUSTER_KEY)).map_err(|error| failed(&error))
}

impl Identity {
    /// Reads the files.
    pub fn load(dir: &Path) -> Result<Self> {
        let missing = |path: &Path, error: &dyn std::fmt::Display| {
            Problem::new(Code::NotFound, format!("cannot use {} of this node: {error}", path.display())).hint(
                "virtward cluster join TOKEN makes this host a member of a cluster; virtward cluster init a new one",
            )
        };
        let secret = |name: &str| {
            let path = dir.join(name);
            let bytes = ca::read_secret(&path).map_err(|error| missing(&path, &error))?;
            String::from_utf8(bytes.to_vec()).map_err(|error| missing(&path, &error))
        };
        let credentials = Credentials::new(&secret(CERTIFICATE)?, &secret(KEY)?).map_err(|error| problem(&error))?;
        let path = dir.join(CLUSTER_KEY);
        let cluster_key = ClusterKey::load(&path).map_err(|error| missing(&path, &error))?;
        let authorities = RwLock::new(Arc::new(secret(AUTHORITIES)?));
        let identity = Self { dir: dir.to_owned(), credentials, authorities, cluster_key, seen: Mutex::default() };
        *identity.seen.lock().unwrap_or_else(PoisonError::into_inner) = identity.stamps();
        Ok(identity)
    }

    /// The authorities that are trusted, PEM.
    pub fn authorities(&self) -> Arc<String> {
        self.authorities.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stamps(&self) -> [Option<SystemTime>; 3] {
        [CERTIFICATE, KEY, AUTHORITIES].map(|name| fs::metadata(self.dir.join(name)).and_then(|it| it.modified()).ok())
    }

    /// Uses the files if they are others than before; whether they are.
    pub fn look_again(&self) -> Result<bool> {
        let now = self.stamps();
        if *self.seen.lock().unwrap_or_else(PoisonError::into_inner) == now {
            return Ok(false);
        }
        let next = Self::load(&self.dir)?;
        let read = |name: &str| -> Result<String> {
            let unreadable = |error: io::Error| Problem::new(Code::Conflict, format!("cannot read {name}: {error}"));
            fs::read_to_string(self.dir.join(name)).map_err(unreadable)
        };
        self.credentials.replace(&read(CERTIFICATE)?, &read(KEY)?).map_err(|error| problem(&error))?;
        *self.authorities.write().unwrap_or_else(PoisonError::into_inner) = next.authorities();
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = now;
        Ok(true)
    }

    /// Gets a new certificate if two thirds of this one's life are over; whether it did.
    pub async fn renew(&self, store: &dyn Store, addresses: Vec<String>, now: Timestamp) -> Result<bool> {
        let own = self.credentials.identity().map_err(|error| problem(&error))?;
        if !own.renewal_due(now) {
            return Ok(false);
        }
        // Any node can sign: the authority's key is in the store, and what opens it is here.
        let authority = ca::load_ca(store, &self.cluster_key).await.map_err(|error| problem(&error))?;
        let key = NewKey::generate().map_err(|error| problem(&error))?;
        let subject = Subject { name: own.name, role: Role::Node, addresses };
        let chain = authority.issue(&key.request_der, &subject, now).map_err(|error| problem(&error))?;
        ca::write_secret(&self.dir.join(KEY), key.key_pem.as_bytes()).map_err(|error| problem(&error))?;
        ca::write_secret(&self.dir.join(CERTIFICATE), chain.as_bytes()).map_err(|error| problem(&error))?;
        self.credentials.replace(&chain, &key.key_pem).map_err(|error| problem(&error))?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = self.stamps();
        Ok(true)
    }
}

/// Looks after the identity until cancelled: files that were replaced, certificates that grow old. `changed` is called
/// when the authorities may be others.
pub async fn keep(daemon: std::sync::Arc<Daemon>, identity: Arc<Identity>, changed: impl Fn(), cancel: Cancel) {
    let mut tried: Option<tokio::time::Instant> = None;
    loop {
        match identity.look_again() {
            Ok(false) => {}
            Ok(true) => {
                changed();
                told(
                    &daemon,
                    Severity::Info,
                    "this node's certificate was replaced on disk and is used from now on".into(),
                    Saying::NodeCertificateReplaced.into(),
                );
            }
            Err(problem) => tracing::warn!(%problem, "the certificate in use stays"),
        }
        if tried.is_none_or(|at| at.elapsed() >= RENEW_EVERY) {
            tried = Some(tokio::time::Instant::now());
            renew(&daemon, &identity).await;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = cancel.cancelled() => return,
        }
    }
}

async fn renew(daemon: &Daemon, identity: &Identity) {
    let config = daemon.config();
    let addresses = config.cluster.as_ref().map(|cluster| super::join::names_of(cluster.address.as_deref()));
    let now = Timestamp::now();
    match identity.renew(&*daemon.kv.store(), addresses.unwrap_or_default(), now).await {
        Ok(false) => {}
        Ok(true) => {
            told(
                daemon,
                Severity::Info,
                "this node's certificate was renewed".into(),
                Saying::NodeCertificateRenewed.into(),
            );
        }
        Err(problem) => {
            let until = identity.credentials.identity().map(|own| own.not_after).unwrap_or_default();
            let text =
                format!("this node's certificate ends at {until:.0} and could not be renewed: {}", problem.detail);
            let said = Said::from(Saying::NodeCertificateEnds).with("ends_at", until.to_string());
            told(daemon, Severity::Error, text, said.with("why", problem.detail.as_str()));
        }
    }
}

fn told(daemon: &Daemon, severity: Severity, text: String, said: Said) {
    tracing::info!("{text}");
    daemon.events.add(Note::new(severity, "node-certificate", text).says(said));
}

#[cfg(test)]
mod tests {
    use virtward_cluster::MemStore;

    use super::*;

    fn at(days_ago: i64) -> Timestamp {
        Timestamp::now() - jiff::SignedDuration::from_hours(24 * days_ago)
    }

    #[tokio::test]
    async fn a_certificate_is_renewed_at_two_thirds_and_a_replaced_one_is_picked_up() {
        let (store, dir) = (MemStore::new(), tempfile::tempdir().unwrap());
        let cluster_key = ClusterKey::generate().unwrap();
        let authority = ca::create_ca(&store, &cluster_key, "test", at(100)).await.unwrap();
        let issue = |days_ago: i64| {
            let key = NewKey::generate().unwrap();
            let subject = Subject { name: "h1".into(), role: Role::Node, addresses: vec!["10.0.0.1".into()] };
            (authority.issue(&key.request_der, &subject, at(days_ago)).unwrap(), key.key_pem)
        };
        let (chain, key) = issue(59);
        let files = Files {
            certificate_pem: &chain,
            key_pem: &key,
            authority_pem: authority.certificate_pem(),
            cluster_key: &cluster_key,
        };
        let home = dir.path().join("cluster");
        write(&home, &files).unwrap();
        assert!(write(&home, &files).unwrap_err().hint.unwrap().contains("member already"));
        let identity = Identity::load(&home).unwrap();
        let names = || vec!["10.0.0.1".to_owned()];
        assert!(!identity.renew(&store, names(), Timestamp::now()).await.unwrap(), "59 of 90 days");
        assert!(!identity.look_again().unwrap());

        // Somebody puts an older one there, by hand.
        let (chain, key) = issue(89);
        std::thread::sleep(Duration::from_millis(20));
        ca::write_secret(&home.join(KEY), key.as_bytes()).unwrap();
        ca::write_secret(&home.join(CERTIFICATE), chain.as_bytes()).unwrap();
        assert!(identity.look_again().unwrap());
        assert!(identity.credentials.identity().unwrap().renewal_due(Timestamp::now()));
        assert!(identity.renew(&store, names(), Timestamp::now()).await.unwrap());
        let now = identity.credentials.identity().unwrap();
        assert!(!now.renewal_due(Timestamp::now()) && now.name == "h1");
        assert_eq!(Identity::load(&home).unwrap().credentials.identity().unwrap(), now, "it is on disk too");

        // A key that others can read is not used.
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(home.join(CLUSTER_KEY), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Identity::load(&home).err().unwrap().detail.contains("can be read by others"));
    }
}
