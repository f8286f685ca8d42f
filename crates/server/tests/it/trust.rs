//! Whom a daemon answers at the peers' port: real handshakes, with every certificate that somebody could come with.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use virtward_cluster::ca::{
    self, Authority, ClusterKey, Credentials, Identity, NewKey, Role, Subject, client_config, node_server_name,
};
use virtward_server::{admin, config::ClusterConfig};

use crate::common::{LIMIT, Place};

fn days_ago(days: i64) -> Timestamp {
    Timestamp::now() - SignedDuration::from_hours(24 * days)
}

fn issued(authority: &Authority, name: &str, role: Role, now: Timestamp) -> (String, String) {
    let key = NewKey::generate().unwrap();
    let subject = Subject { name: name.into(), role, addresses: vec!["127.0.0.1".into()] };
    (authority.issue(&key.request_der, &subject, now).unwrap(), key.key_pem.to_string())
}

fn credentials(authority: &Authority, name: &str, role: Role, now: Timestamp) -> Credentials {
    let (chain, key) = issued(authority, name, role, now);
    Credentials::new(&chain, &key).unwrap()
}

/// What a daemon answers to a ping, and who it says that it is.
async fn ping(address: std::net::SocketAddr, tls: rustls::ClientConfig) -> Result<(String, Identity), String> {
    let talk = async {
        let name = ServerName::try_from(node_server_name("h1")).unwrap();
        let stream = TcpStream::connect(address).await?;
        let mut stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
        stream.write_all(b"GET /peer/v1/ping HTTP/1.1\r\nhost: h1\r\nconnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>((text, Identity::of(&shown.expect("a certificate")).expect("a node's")))
    };
    tokio::time::timeout(LIMIT, talk).await.expect("an answer in time").map_err(|error| error.to_string())
}

/// A place whose cluster was founded, how it is configured, and the authority that its nodes trust.
async fn founded() -> (Place, ClusterConfig, Authority) {
    let place = Place::new().with_peers();
    let config = place.config();
    let cluster = config.cluster.clone().unwrap();
    admin::found(&*place.store, &config, &cluster, "test").await.unwrap();
    let cluster_key = ClusterKey::load(&cluster.dir.join("cluster.key")).unwrap();
    let ours = ca::load_ca(&*place.store, &cluster_key).await.unwrap();
    (place, cluster, ours)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_with_certificates_that_are_valid_are_answered() {
    let (place, _, ours) = founded().await;
    let foreign = Authority::create("other", Timestamp::now()).unwrap();
    let member = |name: &str| {
        let record = format!("{{\"joined\":\"{}\",\"address\":\"127.0.0.1:1\"}}", Timestamp::now());
        virtward_cluster::Op::put(format!("/v1/nodes/{name}"), record)
    };
    for name in ["h2", "h3"] {
        assert!(place.store.txn(Vec::new(), vec![member(name)]).await.unwrap().succeeded);
    }
    let daemon = place.start().await;
    let address = daemon.listening.peers.unwrap();
    let trust = ours.certificate_pem().to_owned();
    let come = async |own: Credentials| ping(address, client_config(&own, &trust).unwrap()).await;
    let now = Timestamp::now();

    let (answer, _) = come(credentials(&ours, "h2", Role::Node, now)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"node\":\"h1\""), "{answer}");
    // Its life is over, or has not begun: no handshake.
    for at in [days_ago(91), days_ago(-2)] {
        let error = come(credentials(&ours, "h2", Role::Node, at)).await.unwrap_err();
        assert!(error.contains("xpired") || error.contains("alert"), "{error}");
    }
    // Another cluster's, though it says the same name.
    let error = come(credentials(&foreign, "h2", Role::Node, now)).await.unwrap_err();
    assert!(error.contains("alert"), "{error}");
    // A server that is not of the cluster that is trusted: this end refuses.
    let stranger = client_config(&credentials(&ours, "h2", Role::Node, now), foreign.certificate_pem()).unwrap();
    assert!(ping(address, stranger).await.unwrap_err().contains("invalid peer certificate"));
    // One that calls nodes and is none; nobody at all; one that never was a member.
    let (answer, _) = come(credentials(&ours, "h2", Role::Client, now)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    let (answer, _) = ping(address, ca::join_client_config(ours.fingerprint()).unwrap()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    let (answer, _) = come(credentials(&ours, "h9", Role::Node, now)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("no node of the cluster"), "{answer}");

    // Removed while its certificate is good for months: refused from now on, and the others go on.
    let kept = credentials(&ours, "h3", Role::Node, now);
    assert!(come(kept.clone()).await.unwrap().0.starts_with("HTTP/1.1 200"));
    daemon.client.delete("/api/v1/cluster/nodes/h3").await.unwrap();
    daemon.wait("the removal", async || come(kept.clone()).await.unwrap().0.starts_with("HTTP/1.1 403")).await;
    assert!(come(credentials(&ours, "h2", Role::Node, now)).await.unwrap().0.starts_with("HTTP/1.1 200"));
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_renews_its_certificate_and_shows_the_new_one() {
    let (place, cluster, ours) = founded().await;
    // As if it had been running for ten weeks.
    let (chain, key) = issued(&ours, "h1", Role::Node, days_ago(70));
    ca::write_secret(&cluster.dir.join("node.key"), key.as_bytes()).unwrap();
    ca::write_secret(&cluster.dir.join("node.crt"), chain.as_bytes()).unwrap();
    let daemon = place.start().await;
    let address = daemon.listening.peers.unwrap();
    let own = credentials(&ours, "h1", Role::Node, Timestamp::now());
    let trust = ours.certificate_pem().to_owned();
    daemon
        .wait("the new certificate", async || {
            let (_, shown) = ping(address, client_config(&own, &trust).unwrap()).await.unwrap();
            !shown.renewal_due(Timestamp::now())
        })
        .await;
    let on_disk = std::fs::read_to_string(cluster.dir.join("node.crt")).unwrap();
    assert!(!Identity::of_pem(&on_disk).unwrap().renewal_due(Timestamp::now()), "it is kept");
    let events = daemon.get("/api/v1/events?kind=node-certificate").await;
    assert!(events["items"].to_string().contains("was renewed"), "{events}");

    // Expired files, put there by hand: the daemon goes on with them, renews at its next start, and peers refuse meanwhile.
    let place = daemon.end().await;
    let (chain, key) = issued(&ours, "h1", Role::Node, days_ago(95));
    ca::write_secret(&cluster.dir.join("node.key"), key.as_bytes()).unwrap();
    ca::write_secret(&cluster.dir.join("node.crt"), chain.as_bytes()).unwrap();
    let daemon = place.start().await;
    let address = daemon.listening.peers.unwrap();
    daemon
        .wait("a valid certificate after a long time off", async || {
            ping(address, client_config(&own, &trust).unwrap()).await.is_ok()
        })
        .await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    daemon.end().await;
}
