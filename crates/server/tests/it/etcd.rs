//! Three daemons over a real etcd that asks for client certificates, and what becomes of them when it has bad days.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::{Value, json};
use virtward_api::{Code, JoinTokenMade};
use virtward_cluster::{
    ca::{Authority, NewKey, Role, Subject, write_secret},
    etcd::EtcdTls,
};
use virtward_server::{admin, config::Etcd, wire_up};

use crate::common::{Daemon, Place, SimConnector};

#[allow(dead_code, reason = "the tests of the store use all of it")]
#[path = "../../../cluster/tests/it/server.rs"]
mod members;

/// Elections of etcd and of daemons, on a machine that runs all tests at once.
const SOON: Duration = Duration::from_secs(120);

async fn wait(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !is_so().await {
        assert!(Instant::now() < until, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What a request gives; nothing while there is no answer.
async fn ask(daemon: &Daemon, path: &str) -> Value {
    daemon.client.get::<Value>(path).await.unwrap_or_default()
}

async fn status(daemon: &Daemon) -> Value {
    ask(daemon, "/api/v1/cluster").await
}

async fn job(daemon: &Daemon, id: &str) -> Value {
    ask(daemon, &format!("/api/v1/jobs/{id}")).await
}

/// A backup of so many MiB/s, as soon as it copies.
async fn slow(daemon: &Daemon, vm: &str, rate: u64) -> String {
    let request = json!({ "vm": vm, "full": true, "bandwidth_bytes_s": rate << 20 });
    let id = daemon.post("/api/v1/jobs/backup", request).await["id"].as_str().unwrap().to_owned();
    wait("the job to copy", async || job(daemon, &id).await["progress"]["done_bytes"].as_u64() > Some(0)).await;
    id
}

async fn succeeds(daemon: &Daemon, id: &str) {
    wait("the job's result", async || {
        let job = job(daemon, id).await;
        let state = job["state"].as_str().unwrap_or("queued");
        assert!(matches!(state, "queued" | "running" | "succeeded"), "{job}");
        state == "succeeded"
    })
    .await;
}

/// Who may ask etcd, and the files that say so.
struct Trust {
    authority: Authority,
}

impl Trust {
    fn new() -> Self {
        Self { authority: Authority::create("etcd", Timestamp::now()).unwrap() }
    }

    fn certified(&self, name: &str, role: Role) -> (String, String) {
        let key = NewKey::generate().unwrap();
        let subject = Subject { name: name.into(), role, addresses: vec!["127.0.0.1".into()] };
        (self.authority.issue(&key.request_der, &subject, Timestamp::now()).unwrap(), key.key_pem.to_string())
    }

    async fn etcd(&self, count: usize) -> members::Etcd {
        let (cert_pem, key_pem) = self.certified("etcd", Role::Node);
        let identity_pem = Some(self.certified("test", Role::Client));
        let ca_pem = self.authority.certificate_pem().to_owned();
        let client = EtcdTls { ca_pem, identity_pem, server_name: None };
        members::Etcd::start_with(count, Some(members::Tls { cert_pem, key_pem, client })).await
    }

    /// The files of one node, and the configuration that names them.
    fn config(&self, place: &Place, endpoints: Vec<String>) -> Etcd {
        let (chain, key) = self.certified(place.node, Role::Client);
        let file = |name: &str, text: &str| -> PathBuf {
            let path = place.path(name);
            write_secret(&path, text.as_bytes()).unwrap();
            path
        };
        Etcd {
            endpoints,
            prefix: "/virtward".into(),
            ca: Some(file("etcd-ca.crt", self.authority.certificate_pem())),
            identity: Some((file("etcd.crt", &chain), file("etcd.key", &key))),
        }
    }
}

async fn joins(first: &Daemon, place: &Place) {
    let made: JoinTokenMade = first.client.post("/api/v1/cluster/tokens", &json!({}), None).await.unwrap();
    let own = place.config().cluster.unwrap();
    let config = admin::join(&made.token, &made.address, place.node, &own).await.unwrap();
    assert_eq!(config.etcd.endpoints, own.etcd.endpoints, "it is told where etcd is");
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_over_etcd_with_client_certificates_bear_its_bad_days() {
    let trust = Trust::new();
    let mut etcd = trust.etcd(3).await;
    let mut places = vec![Place::new().with_peers()];
    for node in ["h2", "h3"] {
        let place = Place::sharing(&places[0], node);
        places.push(place);
    }
    for (number, place) in places.iter_mut().enumerate() {
        let mut urls = etcd.urls();
        urls.rotate_left(number);
        let config = trust.config(place, urls);
        place.store = Arc::new(wire_up::etcd(&config).unwrap());
        place.etcd = config;
        place.vm(&format!("web{}", number + 1), &[], 48).await;
    }
    let config = places[0].config();
    admin::found(&*places[0].store, &config, config.cluster.as_ref().unwrap(), "test").await.unwrap();
    let mut places = places.into_iter();
    let mut daemons = vec![places.next().unwrap().start().await];
    for mut place in places {
        // Every node asks etcd in an order of its own; what it is told is the first node's.
        place.etcd.endpoints.clone_from(&daemons[0].place.etcd.endpoints);
        joins(&daemons[0], &place).await;
        daemons.push(place.start().await);
    }
    for daemon in &daemons {
        wait("all VMs", async || ask(daemon, "/api/v1/vms").await["total"] == 3).await;
        let status = status(daemon).await;
        assert!(status["state"].as_str().unwrap().contains("https://"), "{status}");
    }
    wait("a leader", async || status(&daemons[2]).await["leader"]["node"].is_string()).await;

    // One member of three is lost, the one that the second daemon talks to, in the middle of its backup.
    let id = slow(&daemons[2], "web2", 4).await;
    etcd.members[1].kill();
    succeeds(&daemons[2], &id).await;
    for daemon in &daemons {
        wait("contact again", async || status(daemon).await["state_error"].is_null()).await;
    }
    // New work is accepted and done with two of three.
    wait("the members to agree again", async || {
        daemons[0].client.post::<Value>("/api/v1/jobs/backup", &json!({ "vm": "web3" }), Some("after")).await.is_ok()
    })
    .await;
    let job3: Value =
        daemons[0].client.post("/api/v1/jobs/backup", &json!({ "vm": "web3" }), Some("after")).await.unwrap();
    succeeds(&daemons[1], job3["id"].as_str().unwrap()).await;

    // The rest stands still in the middle of a job: told, what is known stays, and the job goes on.
    let id = slow(&daemons[1], "web2", 1).await;
    etcd.members[0].freeze();
    etcd.members[2].freeze();
    for daemon in &daemons {
        wait("the loss to be told", async || status(daemon).await["state_error"].is_string()).await;
        assert_eq!(daemon.get("/api/v1/vms").await["total"], 3);
        let own = daemon.get(&format!("/api/v1/hosts/{}", daemon.place.node)).await;
        assert_eq!(own["state"], "up", "a daemon knows its own host: {own}");
    }
    let others = daemons[0].get("/api/v1/hosts/h2").await;
    assert_eq!(others["state"], "unknown", "{others}");
    let refused = daemons[0].client.post::<Value>("/api/v1/jobs/backup", &json!({ "vm": "web1" }), None).await;
    assert!(refused.is_err(), "nothing new is accepted that could not be kept");
    let before = job(&daemons[1], &id).await["progress"]["done_bytes"].as_u64();
    wait("the job to go on", async || job(&daemons[1], &id).await["progress"]["done_bytes"].as_u64() > before).await;
    etcd.members[0].thaw();
    etcd.members[2].thaw();
    succeeds(&daemons[0], &id).await;
    for daemon in &daemons {
        wait("contact again", async || {
            let status = status(daemon).await;
            status["state_error"].is_null() && status["leader"]["node"].is_string()
        })
        .await;
        wait("all hosts again", async || {
            let hosts = ask(daemon, "/api/v1/hosts").await;
            hosts["items"].as_array().is_some_and(|hosts| hosts.iter().all(|host| host["state"] == "up"))
        })
        .await;
    }
    // Each job once: two slow ones of web2, one of web3.
    wait("all restore points", async || ask(&daemons[0], "/api/v1/points").await["total"] == 3).await;
    let events = ask(&daemons[1], "/api/v1/events?kind=state-store").await;
    let told = events["items"].as_array().map(Vec::len);
    assert!(told >= Some(2), "lost and found are events: {events}");
    for daemon in daemons {
        daemon.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_etcd_does_not_trust_says_so_and_does_not_start() {
    let (trust, stranger) = (Trust::new(), Trust::new());
    let etcd = trust.etcd(1).await;
    let place = Place::new().with_peers();
    let good = trust.config(&place, etcd.urls());
    let wrong_ca = {
        let path = place.path("wrong-ca.crt");
        write_secret(&path, stranger.authority.certificate_pem().as_bytes()).unwrap();
        Etcd { ca: Some(path), ..good.clone() }
    };
    let wrong_client = {
        let (chain, key) = stranger.certified("h1", Role::Client);
        let (cert_file, key_file) = (place.path("wrong.crt"), place.path("wrong.key"));
        write_secret(&cert_file, chain.as_bytes()).unwrap();
        write_secret(&key_file, key.as_bytes()).unwrap();
        Etcd { identity: Some((cert_file, key_file)), ..good.clone() }
    };
    let nobody = Etcd { identity: None, ..good.clone() };
    for (what, etcd) in [("authority", wrong_ca), ("certificate", wrong_client), ("nobody", nobody)] {
        let connector = Arc::new(SimConnector { host: place.sim.clone(), reach: place.reach.clone() });
        let wiring = wire_up::Wiring { connector, store: Arc::new(wire_up::etcd(&etcd).unwrap()) };
        let (sender, _ready) = tokio::sync::oneshot::channel();
        let reload: virtward_server::Reload = Arc::new(|| Err("no".into()));
        let stop = virtward_engine::Cancel::default();
        let started = virtward_server::run(place.config(), wiring, reload, stop, sender);
        let Ok(ended) = tokio::time::timeout(SOON, started).await else { panic!("{what}: it goes on waiting") };
        let problem = ended.unwrap_err();
        assert_eq!(problem.code, Code::StateUnavailable, "{what}: {problem:?}");
        assert!(problem.detail.contains("do not trust each other's certificates"), "{what}: {problem:?}");
        assert!(problem.hint.as_ref().is_some_and(|hint| hint.contains("etcd-ca")), "{what}: {problem:?}");
    }
    let missing = Etcd { ca: Some(place.path("no-such-file")), ..good };
    let problem = wire_up::etcd(&missing).err().unwrap();
    assert!(problem.detail.contains("no-such-file") && problem.hint.unwrap().contains("etcd-ca"));
}
