//! A daemon of one's own for each test.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::{sync::oneshot, task::JoinHandle};
use virtward_api::{
    Code, NewToken, Problem, Role, TokenCreated,
    client::{Answer, Client},
};
use virtward_cluster::{MemStore, Store};
use virtward_decide::schedule::Limits;
use virtward_engine::{
    BackupOptions, Cancel, Dirs,
    reconcile::inventory::{Connector, HostState},
};
use virtward_hypervisor::{
    Hypervisor,
    sim::{SimHost, SimWorld},
};
use virtward_model::Bytes;
use virtward_repo::{InitOptions, KdfCost, Repository, Secret, store};
use virtward_server::{
    Listening,
    config::{ClusterConfig, Config, Etcd, RepositoryConfig, SecretFile},
    wire_up::Wiring,
};

/// Longest that anything is waited for.
pub const LIMIT: Duration = Duration::from_secs(30);

pub struct SimConnector {
    pub host: SimHost,
    pub reach: Arc<Mutex<HostState>>,
}

#[async_trait]
impl Connector for SimConnector {
    fn uri(&self) -> String {
        self.host.uri()
    }
    fn name(&self) -> String {
        self.host.uri().trim_start_matches("sim://").trim_end_matches("/system").to_owned()
    }
    async fn connect(&self) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>> {
        self.host.host().await?;
        Ok(Arc::new(self.host.clone()))
    }
    async fn probe(&self) -> HostState {
        *self.reach.lock().unwrap()
    }
}

/// A place for a daemon; what it leaves is there when it starts again.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub sim: SimHost,
    pub reach: Arc<Mutex<HostState>>,
    pub store: Arc<dyn Store>,
    pub repositories: Vec<&'static str>,
    /// Name of the node, and whether there may be others.
    pub node: &'static str,
    pub is_cluster: bool,
    /// Where the repositories are, if not in `dir`.
    shared: Option<PathBuf>,
    /// The repository, if it is not a directory.
    location: Option<String>,
    /// How etcd is reached, for a store in it.
    pub etcd: Etcd,
    /// Where peers are answered.
    pub peers: Option<std::net::SocketAddr>,
    defined: Mutex<Vec<String>>,
}

impl Place {
    pub fn new() -> Self {
        Self::with(&["default"])
    }

    pub fn with(repositories: &[&'static str]) -> Self {
        let dir = tempfile::Builder::new().prefix("virtward-server-").tempdir().unwrap();
        std::fs::write(dir.path().join("key"), "k".repeat(64)).unwrap();
        for name in repositories {
            let location = dir.path().join(name);
            let options =
                InitOptions { kdf: KdfCost::weak_for_tests(), label: "test".into(), ..InitOptions::default() };
            let secret = Secret::key_bytes("k".repeat(64).into_bytes()).unwrap();
            Repository::init(store::open(location.to_str().unwrap()).unwrap(), &secret, &options).unwrap();
        }
        let sim = SimWorld::new().host("h1");
        let reach = Arc::new(Mutex::new(HostState::LibvirtdDown));
        Self {
            dir,
            sim,
            reach,
            store: Arc::new(MemStore::new()),
            repositories: repositories.to_vec(),
            node: "h1",
            is_cluster: false,
            shared: None,
            location: None,
            etcd: Etcd::default(),
            peers: None,
            defined: Mutex::default(),
        }
    }

    /// Two hosts of one cluster: one state, one repository that both see.
    pub async fn two() -> (Self, Self) {
        let mut one = Self::new();
        one.is_cluster = true;
        let mut two = Self::new();
        (two.node, two.sim, two.is_cluster) = ("h2", SimWorld::new().host("h2"), true);
        (two.store, two.shared) = (one.store.clone(), Some(one.dir.path().to_owned()));
        for node in ["h1", "h2"] {
            let member = format!("{{\"joined\":\"{}\"}}", jiff::Timestamp::now());
            let put = virtward_cluster::Op::put(format!("/v1/nodes/{node}"), member);
            assert!(one.store.txn(Vec::new(), vec![put]).await.unwrap().succeeded);
        }
        (one, two)
    }

    /// This place with peers: it answers at a port that was free a moment ago.
    pub fn with_peers(mut self) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        self.is_cluster = true;
        self.peers = Some(std::net::SocketAddr::from(([127, 0, 0, 1], port)));
        self
    }

    /// A second host, with a state that is the same and a repository that is `of`.
    pub fn beside(other: &Self, node: &'static str, of: Option<&str>) -> Self {
        let mut place = Self::new().with_peers();
        (place.node, place.sim) = (node, SimWorld::new().host(node));
        place.store = other.store.clone();
        place.location = of.map(str::to_owned);
        place
    }

    /// A further host that sees the same repository directory.
    pub fn sharing(other: &Self, node: &'static str) -> Self {
        let mut place = Self::beside(other, node, None);
        place.shared = Some(other.dir.path().to_owned());
        place
    }

    /// The same VMs on a host that nobody is connected to.
    async fn fresh(mut self) -> Self {
        self.sim = SimWorld::new().host(self.node);
        let defined = self.defined.lock().unwrap().clone();
        for xml in defined {
            self.sim.define(&xml).await.unwrap();
        }
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A VM that is off, with a disk of noise.
    pub async fn vm(&self, name: &str, tags: &[&str], mib: usize) -> uuid::Uuid {
        let disk = self.path(&format!("{name}.raw"));
        noise(&disk, mib << 20);
        let tags: String = tags.iter().map(|tag| format!("<v:tag>{tag}</v:tag>")).collect();
        let uri = virtward_engine::collect::METADATA_URI;
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <metadata><v:vm xmlns:v='{uri}'>{tags}</v:vm></metadata><os><type>hvm</type></os>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk></devices></domain>",
            disk.display()
        );
        self.defined.lock().unwrap().push(xml.clone());
        self.sim.define(&xml).await.unwrap().uuid
    }

    pub fn config(&self) -> Config {
        let repository = |name: &&'static str| RepositoryConfig {
            name: (*name).into(),
            location: self
                .location
                .clone()
                .unwrap_or_else(|| self.shared.as_deref().unwrap_or(self.dir.path()).join(name).display().to_string()),
            store: store::StoreOptions::default(),
            secret: SecretFile::Key(self.path("key")),
        };
        Config {
            config_file: None,
            socket: self.path("run/api.sock"),
            state_dir: self.path("state"),
            listen: Some("127.0.0.1:0".parse().unwrap()),
            tls: None,
            connect: self.sim.uri(),
            dirs: Dirs { runtime: self.path("run"), scratch: self.path("scratch") },
            thaw_guard: None,
            repositories: self.repositories.iter().map(repository).collect(),
            backup: BackupOptions { scratch_reserve: Bytes(0), ..BackupOptions::default() },
            jobs_max: 2,
            limits: Limits::default(),
            reconcile: Duration::from_secs(1),
            stop_timeout: Duration::from_secs(10),
            node: self.node.into(),
            ha: None,
            moves: virtward_server::config::MovesConfig::default(),
            balance: virtward_server::config::BalanceConfig::default(),
            health: virtward_server::config::HealthConfig::default(),
            cluster: self.is_cluster.then(|| ClusterConfig {
                listen: self.peers,
                address: self.peers.map(|address| address.to_string()),
                etcd: self.etcd.clone(),
                dir: self.path("cluster"),
                lease: Duration::from_secs(1),
            }),
            notify: virtward_server::config::NotifyConfig::default(),
        }
    }

    pub async fn start(self) -> Daemon {
        let config = self.config();
        self.start_with(config).await
    }

    pub async fn start_with(self, config: Config) -> Daemon {
        let connector = Arc::new(SimConnector { host: self.sim.clone(), reach: self.reach.clone() });
        let wiring = Wiring { connector, store: self.store.clone() };
        let (sender, ready) = oneshot::channel();
        let stop = Cancel::default();
        let again = config.clone();
        let reload: virtward_server::Reload = Arc::new(move || Ok(again.clone()));
        let socket = config.socket.clone();
        let task = tokio::spawn(virtward_server::run(config, wiring, reload, stop.clone(), sender));
        let listening = tokio::time::timeout(LIMIT, ready).await.expect("it starts in time").expect("it starts");
        let daemon = Daemon { client: Client::unix(socket), place: self, stop, task, listening };
        daemon
            .wait("the inventory", async || {
                let hosts: Value = daemon.get("/api/v1/hosts").await;
                let hosts = hosts["items"].as_array().unwrap();
                hosts.iter().any(|host| host["name"] == daemon.place.node && host["state"] == "up")
            })
            .await;
        daemon
    }
}

/// Writes reproducible bytes that hardly compress.
pub fn noise(path: &Path, bytes: usize) {
    let mut state = 88_172_645_463_325_252_u64 ^ bytes as u64;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(bytes);
    std::fs::write(path, data).unwrap();
}

pub struct Daemon {
    pub client: Client,
    pub place: Place,
    pub stop: Cancel,
    pub task: JoinHandle<Result<(), Problem>>,
    pub listening: Listening,
}

impl Daemon {
    /// Stops it in order; its place can be started again.
    pub async fn end(self) -> Place {
        self.stop.cancel();
        let ended = tokio::time::timeout(LIMIT, self.task).await.expect("it stops in time");
        ended.expect("no panic").expect("it ends well");
        self.place.fresh().await
    }

    /// Takes it away without asking, as far as that is possible within one process.
    pub async fn kill(self) -> Place {
        self.task.abort();
        let _ = self.task.await;
        // Its tasks go one after the other.
        let socket = self.place.config().socket;
        let until = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            assert!(Instant::now() < until, "the socket is still served");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.place.fresh().await
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> impl Future<Output = Value> {
        let (client, path) = (self.client.clone(), path.to_owned());
        async move { client.get::<Value>(&path).await.unwrap_or_else(|error| panic!("{path}: {error}")) }
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        self.client.post::<Value>(path, &body, None).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// A request that fails.
    pub async fn fails(&self, method: &str, path: &str, body: Option<Value>, code: Code) -> Problem {
        let answer = send(&self.client, method, path, &[], body).await;
        problem(&answer, code)
    }

    /// Cancels all jobs, some of which were asked to be done at a byte a second, and waits until they have ended.
    pub async fn call_back_all(&self) {
        self.wait("the jobs that were called back to end", async || {
            let open = self.get("/api/v1/jobs?state=queued,running&limit=500").await;
            for job in open["items"].as_array().unwrap() {
                let path = format!("/api/v1/jobs/{}/cancel", job["id"].as_str().unwrap());
                send(&self.client, "POST", &path, &[], None).await;
            }
            open["total"] == 0
        })
        .await;
    }

    pub async fn wait(&self, what: &str, mut is_so: impl AsyncFnMut() -> bool) {
        let until = Instant::now() + LIMIT;
        while !is_so().await {
            assert!(Instant::now() < until, "waited too long for {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a job ended, and gives it.
    pub async fn ended(&self, id: &str) -> Value {
        let path = format!("/api/v1/jobs/{id}");
        let until = Instant::now() + LIMIT;
        loop {
            let job = self.get(&path).await;
            if !matches!(job["state"].as_str().unwrap(), "queued" | "running") {
                return job;
            }
            assert!(Instant::now() < until, "still: {job}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn running(&self, id: &str) {
        let path = format!("/api/v1/jobs/{id}");
        self.wait("the job to copy", async || {
            let job = self.get(&path).await;
            job["state"] == "running" && job["progress"]["done_bytes"].as_u64() > Some(0)
        })
        .await;
    }

    pub async fn backup(&self, vm: &str) -> Value {
        let job = self.post("/api/v1/jobs/backup", json!({ "vm": vm })).await;
        let job = self.ended(job["id"].as_str().unwrap()).await;
        assert_eq!(job["state"], "succeeded", "{job}");
        job
    }

    pub async fn token(&self, name: &str, role: Role, vm_tags: &[&str]) -> String {
        let vm_tags = vm_tags.iter().map(|tag| (*tag).to_owned()).collect();
        let new = NewToken { name: name.into(), role, vm_tags, expires_in_s: None };
        let made: TokenCreated = self.client.post("/api/v1/tokens", &new, None).await.unwrap();
        made.secret.expect("a secret")
    }

    /// A client over HTTPS that trusts the daemon's own certificate.
    pub fn https(&self, token: Option<String>) -> Client {
        use rustls::pki_types::{CertificateDer, pem::PemObject};
        let certificate = CertificateDer::from_pem_file(self.place.path("state/tls.crt")).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let port = self.listening.https.expect("HTTPS is on").port();
        Client::https("127.0.0.1", port, Arc::new(tls), token)
    }
}

/// Any request, whatever comes.
pub async fn send(client: &Client, method: &str, path: &str, headers: &[(&str, &str)], body: Option<Value>) -> Answer {
    let body = body.map(|body| serde_json::to_vec(&body).unwrap());
    let method = method.parse().unwrap();
    client.send(method, path, headers, body).await.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The problem that an answer must be.
#[track_caller]
pub fn problem(answer: &Answer, code: Code) -> Problem {
    let text = String::from_utf8_lossy(&answer.body);
    let problem: Problem = serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(problem.code, code, "{text}");
    assert_eq!(answer.status, code.status(), "{text}");
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    assert!(!problem.detail.is_empty());
    problem
}
