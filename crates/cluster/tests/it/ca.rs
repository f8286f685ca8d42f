//! Certificates, tokens, and mutual TLS over real sockets.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use jiff::{Timestamp, ToSpan};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use virtward_cluster::{
    MemStore, Op, Store,
    ca::{
        Authority, CERTIFICATE_DAYS, ClientAuth, ClusterKey, Credentials, Error, Identity, JoinToken, NewKey, Role,
        Subject, client_config, create_ca, join_client_config, load_ca, make_token, node_server_name, read_secret,
        redeem_token, revoke_token, server_config, write_secret,
    },
    mem::{Call, Fault},
};

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> Authority {
    Authority::create("test", Timestamp::now()).unwrap()
}

/// A chain and a key in PEM.
fn issued(authority: &Authority, name: &str, role: Role, now: Timestamp) -> (String, String) {
    let key = NewKey::generate().unwrap();
    let subject = Subject { name: name.into(), role, addresses: vec![] };
    (authority.issue(&key.request_der, &subject, now).unwrap(), key.key_pem.to_string())
}

fn credentials(authority: &Authority, name: &str, role: Role, now: Timestamp) -> Credentials {
    let (chain, key) = issued(authority, name, role, now);
    Credentials::new(&chain, &key).unwrap()
}

fn days_ago(days: i64) -> Timestamp {
    Timestamp::now() - (days * 24).hours()
}

/// Serves one connection after another: tells the client who it is.
async fn serve(config: rustls::ServerConfig) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(socket).await else { continue };
            let peer = stream.get_ref().1.peer_certificates().and_then(|chain| Identity::of(&chain[0]).ok());
            let hello = peer.map_or("nobody".into(), |peer| format!("{} {}", peer.role, peer.name));
            let _ = stream.write_all(hello.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    address
}

/// What the server says, or why there is no connection.
async fn call(address: std::net::SocketAddr, name: &str, config: rustls::ClientConfig) -> Result<String, String> {
    let talk = async {
        let socket = TcpStream::connect(address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
        let mut text = String::new();
        // In TLS 1.3 a client learns here that its certificate was refused.
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), talk).await.expect("an answer in time");
    answer.map_err(|error| error.to_string())
}

#[tokio::test]
async fn nodes_of_one_cluster_know_each_other_and_nobody_else() {
    let (ours, theirs, now) = (authority(), authority(), Timestamp::now());
    let trust = ours.certificate_pem();
    let node_a = node_server_name("a");
    let server = credentials(&ours, "a", Role::Node, now);
    let address = serve(server_config(&server, trust, ClientAuth::Required).unwrap()).await;
    let client = |own: &Credentials, trust: &str| client_config(own, trust).unwrap();

    let b = credentials(&ours, "b", Role::Node, now);
    assert_eq!(call(address, &node_a, client(&b, trust)).await.unwrap(), "node b");
    let operator = credentials(&ours, "cli", Role::Client, now);
    assert_eq!(call(address, &node_a, client(&operator, trust)).await.unwrap(), "client cli");

    // Another node than the one that was meant.
    let error = call(address, &node_server_name("c"), client(&b, trust)).await.unwrap_err();
    assert!(error.contains("not valid for name"), "{error}");
    // A client of another cluster, and a server of another cluster.
    let stranger = credentials(&theirs, "b", Role::Node, now);
    call(address, &node_a, client(&stranger, trust)).await.unwrap_err();
    let error = call(address, &node_a, client(&b, theirs.certificate_pem())).await.unwrap_err();
    assert!(error.contains("invalid peer certificate"), "{error}");
    // Expired, on either side.
    let old = days_ago(CERTIFICATE_DAYS as i64 + 1);
    let error = call(address, &node_a, client(&credentials(&ours, "b", Role::Node, old), trust)).await.unwrap_err();
    assert!(error.contains("CertificateExpired") || error.contains("expired"), "{error}");
    let stale = credentials(&ours, "a", Role::Node, old);
    let stale = serve(server_config(&stale, trust, ClientAuth::Required).unwrap()).await;
    let error = call(stale, &node_a, client(&b, trust)).await.unwrap_err();
    assert!(error.contains("expired"), "{error}");
    // Nobody at all.
    let anonymous = join_client_config(ours.fingerprint()).unwrap();
    call(address, &node_a, anonymous).await.unwrap_err();
    // A client's certificate does not make a server.
    let false_server = credentials(&ours, "a", Role::Client, now);
    let false_server = serve(server_config(&false_server, trust, ClientAuth::Required).unwrap()).await;
    call(false_server, &node_a, client(&b, trust)).await.unwrap_err();
}

#[tokio::test]
async fn a_new_certificate_is_used_without_a_restart() {
    let (authority, now) = (authority(), Timestamp::now());
    let trust = authority.certificate_pem();
    let server = credentials(&authority, "a", Role::Node, days_ago(CERTIFICATE_DAYS as i64 + 1));
    let address = serve(server_config(&server, trust, ClientAuth::Required).unwrap()).await;
    let own = credentials(&authority, "b", Role::Node, now);
    let config = || client_config(&own, trust).unwrap();
    call(address, &node_server_name("a"), config()).await.unwrap_err();
    let (chain, key) = issued(&authority, "a", Role::Node, now);
    server.replace(&chain, &key).unwrap();
    assert_eq!(call(address, &node_server_name("a"), config()).await.unwrap(), "node b");
    assert!(!server.identity().unwrap().renewal_due(now));
    // A chain without its key is refused, and what was there stays.
    let (_, other_key) = issued(&authority, "a", Role::Node, now);
    assert!(server.replace(&chain, &other_key).is_err());
    assert_eq!(call(address, &node_server_name("a"), config()).await.unwrap(), "node b");
}

/// What a node that joins does: it knows the token only, and finds the cluster, or not.
#[tokio::test]
async fn a_node_that_joins_authenticates_the_cluster_by_its_token() {
    let (store, now) = (MemStore::new(), Timestamp::now());
    let key = ClusterKey::generate().unwrap();
    let authority = create_ca(&store, &key, "test", now).await.unwrap();
    let token = make_token(&store, authority.fingerprint(), Role::Node, "root@a", HOUR, now).await.unwrap();
    let carried: JoinToken = token.expose().parse().unwrap();
    let trust = authority.certificate_pem();
    let own = credentials(&authority, "a", Role::Node, now);
    let address = serve(server_config(&own, trust, ClientAuth::Offered).unwrap()).await;
    // By whatever name it is reached.
    let config = || join_client_config(carried.fingerprint()).unwrap();
    assert_eq!(call(address, "127.0.0.1", config()).await.unwrap(), "nobody");

    let impostor = Authority::create("test", now).unwrap();
    let false_own = credentials(&impostor, "a", Role::Node, now);
    let false_address =
        serve(server_config(&false_own, impostor.certificate_pem(), ClientAuth::Offered).unwrap()).await;
    let error = call(false_address, "127.0.0.1", config()).await.unwrap_err();
    assert!(error.contains("not the cluster that the join token is for"), "{error}");
    // One that shows the right authority and was not signed by it.
    let (chain, key_pem) = issued(&impostor, "a", Role::Node, now);
    let leaf = chain.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap();
    let mixed = Credentials::new(&format!("{leaf}{trust}"), &key_pem).unwrap();
    let mixed = serve(server_config(&mixed, trust, ClientAuth::Offered).unwrap()).await;
    call(mixed, "127.0.0.1", config()).await.unwrap_err();
    // A client of the cluster is no node of it, and an expired node is none either.
    for (role, since) in [(Role::Client, now), (Role::Node, days_ago(200))] {
        let own = credentials(&authority, "a", role, since);
        let address = serve(server_config(&own, trust, ClientAuth::Offered).unwrap()).await;
        call(address, "127.0.0.1", config()).await.unwrap_err();
    }

    // The leader's part, on any node that has the cluster key.
    let redeemed = redeem_token(&store, &carried, "b", now).await.unwrap();
    assert_eq!((redeemed.role, redeemed.made_by.as_str()), (Role::Node, "root@a"));
    let signer = load_ca(&store, &ClusterKey::parse(&key.expose()).unwrap()).await.unwrap();
    let new = NewKey::generate().unwrap();
    let subject = Subject { name: "b".into(), role: redeemed.role, addresses: vec!["192.0.2.7".into()] };
    let chain = signer.issue(&new.request_der, &subject, now).unwrap();
    let joined = Credentials::new(&chain, &new.key_pem).unwrap();
    let answer = call(address, &node_server_name("a"), client_config(&joined, trust).unwrap()).await;
    assert_eq!(answer.unwrap(), "node b");
}

#[tokio::test]
async fn a_token_works_once() {
    let (store, now) = (MemStore::new(), Timestamp::now());
    let make = || make_token(&store, authority().fingerprint(), Role::Node, "root", HOUR, now);
    let token = make().await.unwrap();
    let tasks: Vec<_> = (0..10)
        .map(|n| {
            let (store, token) = (store.client(), token.clone());
            tokio::spawn(async move { redeem_token(&store, &token, &format!("n{n}"), now).await })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => won += 1,
            Err(Error::TokenUsed { by, .. }) => assert!(by.starts_with('n')),
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!(won, 1);

    let late = redeem_token(&store, &make().await.unwrap(), "b", now + 61.minutes()).await;
    assert!(matches!(late, Err(Error::TokenExpired { .. })), "{late:?}");
    let revoked = make().await.unwrap();
    assert!(revoke_token(&store, &revoked.id()).await.unwrap());
    assert!(!revoke_token(&store, &revoked.id()).await.unwrap());
    assert!(matches!(redeem_token(&store, &revoked, "b", now).await, Err(Error::TokenUnknown)));
}

#[tokio::test]
async fn a_token_whose_redemption_got_no_answer_is_redeemed_once_all_the_same() {
    for happens in [true, false] {
        let (store, now) = (MemStore::new(), Timestamp::now());
        let token = make_token(&store, authority().fingerprint(), Role::Node, "root", HOUR, now).await.unwrap();
        let client = store.client();
        client.faults().once(Call::Txn, Fault::Indeterminate { happens });
        redeem_token(&client, &token, "b", now).await.unwrap();
        assert!(matches!(redeem_token(&store, &token, "c", now).await, Err(Error::TokenUsed { .. })));
    }
}

#[tokio::test]
async fn guessed_and_mangled_tokens_do_nothing_and_the_store_does_not_know_the_secret() {
    let (store, now) = (MemStore::new(), Timestamp::now());
    let token = make_token(&store, authority().fingerprint(), Role::Node, "root", HOUR, now).await.unwrap();
    let text = token.expose().to_string();
    let body = text.strip_prefix("vwj1.").unwrap();
    // The right name with another secret.
    let mut guess = body.as_bytes().to_vec();
    guess[30] = if guess[30] == b'A' { b'B' } else { b'A' };
    let guess: JoinToken = format!("vwj1.{}", String::from_utf8(guess).unwrap()).parse().unwrap();
    assert_eq!(guess.id(), token.id());
    assert!(matches!(redeem_token(&store, &guess, "b", now).await, Err(Error::TokenUnknown)));
    for bad in ["", "vwj1.", "vwj2.AAAA", &text[..40], &format!("{text}A"), &"A".repeat(100_000), "vwj1.é"] {
        assert!(matches!(bad.parse::<JoinToken>(), Err(Error::TokenMalformed)), "{bad:.40}");
    }
    assert!(!format!("{token:?}").contains(&body[15..40]));
    let stored = store.list(b"/join/").await.unwrap().entries.remove(0).value;
    let secret =
        base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, body).unwrap()[8..40].to_vec();
    assert!(!stored.windows(32).any(|part| part == secret));
    assert!(!String::from_utf8_lossy(&stored).contains(&hex::encode(&secret)));
    // Still good: wrong guesses use nothing up.
    redeem_token(&store, &token, "b", now).await.unwrap();
}

#[tokio::test]
async fn the_authority_is_made_once_and_opens_with_the_cluster_key_only() {
    let (store, now) = (MemStore::new(), Timestamp::now());
    let key = ClusterKey::generate().unwrap();
    assert!(matches!(load_ca(&store, &key).await, Err(Error::Missing)));
    let made = create_ca(&store, &key, "test", now).await.unwrap();
    assert!(matches!(create_ca(&store, &key, "test", now).await, Err(Error::Exists)));
    let loaded = load_ca(&store, &key).await.unwrap();
    assert_eq!(loaded.fingerprint(), made.fingerprint());
    assert!(matches!(load_ca(&store, &ClusterKey::generate().unwrap()).await, Err(Error::Sealed { .. })));
    let entry = store.get(b"/ca").await.unwrap().unwrap();
    assert!(!String::from_utf8_lossy(&entry.value).contains("PRIVATE KEY"));
    // The sealed key belongs to its certificate: with another one beside it, it does not open.
    let mut record: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
    record["certificate_pem"] = authority().certificate_pem().into();
    assert!(store.txn(vec![], vec![Op::put("/ca", record.to_string())]).await.unwrap().succeeded);
    assert!(matches!(load_ca(&store, &key).await, Err(Error::Sealed { .. })));
}

#[test]
fn a_request_gives_its_key_and_nothing_else() {
    let (authority, now) = (authority(), Timestamp::now());
    // Asks to be an authority, and the leader.
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["leader.node.virtward.internal".into()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = params.serialize_request(&key).unwrap();
    let subject = Subject { name: "b".into(), role: Role::Node, addresses: vec!["host-b".into(), "::1".into()] };
    let chain = authority.issue(request.der(), &subject, now).unwrap();
    let pem = x509_parser::pem::Pem::iter_from_buffer(chain.as_bytes()).next().unwrap().unwrap();
    let parsed = pem.parse_x509().unwrap();
    assert!(!parsed.is_ca());
    let names = format!("{:?}", parsed.subject_alternative_name().unwrap().unwrap().value.general_names);
    assert!(
        names.contains("b.node.virtward.internal") && names.contains("host-b") && !names.contains("leader"),
        "{names}"
    );
    let identity = Identity::of_pem(&chain).unwrap();
    assert_eq!((identity.name.as_str(), identity.role), ("b", Role::Node));
    let days = (identity.not_after.as_second() - now.as_second()) / 86400;
    assert_eq!(days, CERTIFICATE_DAYS as i64);
    assert!(!identity.renewal_due(now) && !identity.renewal_due(now + (59 * 24).hours()));
    assert!(identity.renewal_due(now + (61 * 24).hours()));

    // Without the private key, or without sense.
    let mut forged = request.der().to_vec();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    for (what, der) in
        [("signature", forged), ("empty", vec![]), ("noise", vec![0x30; 500]), ("long", vec![0; 1 << 20])]
    {
        assert!(matches!(authority.issue(&der, &subject, now), Err(Error::Request { .. })), "{what}");
    }
    for name in ["", "a b", "../x", "-a", "a..b", "a,OU=node", &"a".repeat(64), "é"] {
        let subject = Subject { name: name.into(), role: Role::Node, addresses: vec![] };
        assert!(matches!(authority.issue(request.der(), &subject, now), Err(Error::Request { .. })), "{name}");
    }
}

#[test]
fn secrets_on_disk_are_for_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    write_secret(&path, b"one").unwrap();
    write_secret(&path, b"two").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(&read_secret(&path).unwrap()[..], b"two");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let error = read_secret(&path).unwrap_err();
    assert!(matches!(error, Error::Exposed { .. }) && error.to_string().contains("chmod 600"), "{error}");
    let key = ClusterKey::generate().unwrap();
    key.save(&path).unwrap();
    assert_eq!(ClusterKey::load(&path).unwrap().expose(), key.expose());
}
