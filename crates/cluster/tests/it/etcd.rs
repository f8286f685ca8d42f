//! Several voters: what their clients notice when members die, freeze, or lose their majority. And TLS.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use virtward_cluster::{
    Compare, Error, EtcdOptions, EtcdStore, Op, Revision, Store, Versioned,
    ca::{Authority, NewKey, Role, Subject},
    etcd::EtcdTls,
};

use crate::{
    backend::{put, value},
    contract::lines,
    server::{Etcd, Tls},
};

const SOON: Duration = Duration::from_secs(60);

fn connect(etcd: &Etcd, timeout: Duration) -> Arc<EtcdStore> {
    let options = EtcdOptions { timeout, ..EtcdOptions::new(etcd.urls(), "/virtward/test/") };
    Arc::new(EtcdStore::new(options).unwrap())
}

/// The counter, from a store that may be away for a while.
async fn count(store: &EtcdStore) -> u64 {
    let deadline = Instant::now() + SOON;
    loop {
        match store.get(b"/n").await {
            Ok(entry) => return entry.map_or(0, |entry| number(&entry)),
            Err(error) => assert!(error.is_retryable() && Instant::now() < deadline, "{error:?}"),
        }
    }
}

fn number(entry: &Versioned) -> u64 {
    std::str::from_utf8(&entry.value).unwrap().parse().unwrap()
}

/// Counts up with compare-and-swap, as a careful client does, until told to stop: after doubt it reads. Gives the
/// number of increments that were acknowledged, and of those in doubt.
async fn count_up(store: Arc<EtcdStore>, stop: Arc<AtomicBool>) -> (u64, u64) {
    let (mut acknowledged, mut doubtful) = (0, 0);
    while !stop.load(Ordering::SeqCst) {
        let Ok(entry) = store.get(b"/n").await else { continue };
        let next = entry.as_ref().map_or(0, number) + 1;
        let compare = entry.map_or(Compare::absent("/n"), |entry| entry.unchanged());
        match store.txn(vec![compare], vec![Op::put("/n", next.to_string())]).await {
            Ok(outcome) => acknowledged += u64::from(outcome.succeeded),
            Err(Error::Indeterminate { .. }) => doubtful += 1,
            Err(Error::Unavailable { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    (acknowledged, doubtful)
}

/// Watches the counter until it has this value: each change once and in order, whatever breaks.
async fn watch_until(store: Arc<EtcdStore>, last: impl Fn() -> Option<u64>) -> u64 {
    let (mut watch, mut seen) = (store.watch(b"/n", Revision(1)), 0);
    let deadline = Instant::now() + SOON * 8;
    loop {
        if last() == Some(seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "seen {seen}, wanted {:?}", last());
        match tokio::time::timeout(Duration::from_millis(200), watch.next()).await {
            Ok(Ok(changes)) => {
                seen += 1;
                assert_eq!(lines(&changes), [format!("/n={seen}")]);
            }
            Ok(Err(error)) => {
                assert!(error.is_retryable(), "{error:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(_) => {}
        }
    }
}

/// Counts with several clients while something happens to the members, and compares what was acknowledged with what is
/// there and with what a watch saw.
async fn survives(etcd: &mut Etcd, happen: impl AsyncFnOnce(&mut Etcd)) {
    let store = connect(etcd, Duration::from_secs(3));
    let last = Arc::new(Mutex::new(None));
    let watching = tokio::spawn(watch_until(store.clone(), {
        let last = last.clone();
        move || *last.lock().unwrap()
    }));
    let stop = Arc::new(AtomicBool::new(false));
    let counting: Vec<_> =
        (0..3).map(|_| tokio::spawn(count_up(connect(etcd, Duration::from_secs(3)), stop.clone()))).collect();
    let reaches = async |goal: u64| {
        let deadline = Instant::now() + SOON;
        while count(&store).await < goal {
            assert!(Instant::now() < deadline, "{goal} is not reached");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    reaches(10).await;
    happen(etcd).await;
    let after = count(&store).await;
    reaches(after + 10).await;
    stop.store(true, Ordering::SeqCst);
    let (mut acknowledged, mut doubtful) = (0, 0);
    for task in counting {
        let (sure, unsure) = task.await.unwrap();
        acknowledged += sure;
        doubtful += unsure;
    }
    let there = count(&store).await;
    // Nothing acknowledged is lost, nothing happened that nobody asked for.
    assert!(acknowledged <= there && there <= acknowledged + doubtful, "{acknowledged} {doubtful} {there}");
    // What was in doubt may still come; after one more compare-and-swap it cannot.
    let deadline = Instant::now() + SOON;
    let end = loop {
        assert!(Instant::now() < deadline, "no last increment");
        let Ok(Some(entry)) = store.get(b"/n").await else { continue };
        let next = number(&entry) + 1;
        let put = Op::put("/n", next.to_string());
        if store.txn(vec![entry.unchanged()], vec![put]).await.is_ok_and(|outcome| outcome.succeeded) {
            break next;
        }
    };
    *last.lock().unwrap() = Some(end);
    let seen = tokio::time::timeout(SOON * 3, watching).await.unwrap().unwrap();
    assert_eq!(seen, end);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_member_loses_nothing() {
    let mut etcd = Etcd::start(3).await;
    // The one that clients talk to first.
    survives(&mut etcd, async |etcd: &mut Etcd| etcd.members[0].kill()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_leader_loses_nothing_and_its_thaw_neither() {
    let mut etcd = Etcd::start(3).await;
    survives(&mut etcd, async |etcd: &mut Etcd| {
        let leader = etcd.leader().await;
        etcd.members[leader].freeze();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_ne!(etcd.leader().await, leader);
        etcd.members[leader].thaw();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_answered_and_nothing_claimed() {
    let etcd = Etcd::start(3).await;
    let store = connect(&etcd, Duration::from_secs(2));
    put(&*store, "/k", "before").await;
    let revision = store.get(b"/k").await.unwrap().unwrap().revision;
    for member in &etcd.members[1..] {
        member.freeze();
    }
    let started = Instant::now();
    for error in [store.get(b"/k").await.unwrap_err(), store.grant(Duration::from_secs(5)).await.unwrap_err()] {
        assert!(matches!(error, Error::Unavailable { .. }), "no stale read, no doubt about one: {error:?}");
    }
    let error = store.txn(vec![Compare::at("/k", revision)], vec![Op::put("/k", "during")]).await.unwrap_err();
    assert!(matches!(error, Error::Indeterminate { .. } | Error::Unavailable { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(20), "deadlines are kept: {:?}", started.elapsed());
    for member in &etcd.members[1..] {
        member.thaw();
    }
    let deadline = Instant::now() + SOON;
    let entry = loop {
        match store.get(b"/k").await {
            Ok(entry) => break entry.unwrap(),
            Err(error) => assert!(error.is_retryable() && Instant::now() < deadline, "{error:?}"),
        }
    };
    // Either is right; it was not said which.
    assert!(entry.revision == revision || &entry.value[..] == b"during");
    // The same again happens once in all, whether or not the first one did or still will.
    loop {
        match store.txn(vec![Compare::at("/k", revision)], vec![Op::put("/k", "during")]).await {
            // Refused where the first one came through by now, also after it was read.
            Ok(outcome) => break assert!(!outcome.succeeded || entry.revision == revision),
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
    }
    assert_eq!(value(&*store, "/k").await.unwrap(), "during");
}

#[tokio::test]
async fn nobody_there_is_unavailable_for_transactions_too() {
    let mut etcd = Etcd::start(1).await;
    let store = connect(&etcd, Duration::from_secs(2));
    put(&*store, "/k", "1").await;
    etcd.members[0].kill();
    // The first may have been on its way when the connection was found dead.
    let _ = store.txn(vec![], vec![Op::put("/k", "2")]).await;
    let error = store.txn(vec![], vec![Op::put("/k", "3")]).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "a refused connection carried nothing: {error:?}");
    assert!(error.to_string().contains(&etcd.members[0].url), "{error}");
}

/// A certificate and key for `name`, in PEM.
fn certified(authority: &Authority, name: &str, role: Role, now: Timestamp) -> (String, String) {
    let key = NewKey::generate().unwrap();
    let subject = Subject { name: name.into(), role, addresses: vec!["127.0.0.1".into()] };
    (authority.issue(&key.request_der, &subject, now).unwrap(), key.key_pem.to_string())
}

#[tokio::test]
async fn tls_with_client_certificates() {
    let now = Timestamp::now();
    let (authority, stranger) = (Authority::create("test", now).unwrap(), Authority::create("other", now).unwrap());
    let (cert_pem, key_pem) = certified(&authority, "etcd", Role::Node, now);
    let tls = |trust: &Authority, identity| EtcdTls {
        ca_pem: trust.certificate_pem().into(),
        identity_pem: identity,
        server_name: None,
    };
    let good = tls(&authority, Some(certified(&authority, "host-a", Role::Client, now)));
    let etcd = Etcd::start_with(1, Some(Tls { cert_pem, key_pem, client: good.clone() })).await;
    let open = |tls| {
        let options =
            EtcdOptions { tls: Some(tls), timeout: Duration::from_secs(3), ..EtcdOptions::new(etcd.urls(), "/v/") };
        EtcdStore::new(options).unwrap()
    };
    let store = open(good);
    put(&store, "/k", "over TLS").await;
    assert_eq!(value(&store, "/k").await.unwrap(), "over TLS");

    let expired = now - jiff::SignedDuration::from_hours(24 * 100);
    for (what, tls) in [
        ("no certificate", tls(&authority, None)),
        ("a stranger's certificate", tls(&authority, Some(certified(&stranger, "host-a", Role::Client, now)))),
        ("an old certificate", tls(&authority, Some(certified(&authority, "host-a", Role::Client, expired)))),
        ("a server that is not trusted", tls(&stranger, Some(certified(&authority, "host-a", Role::Client, now)))),
    ] {
        let store = open(tls);
        let error = store.get(b"/k").await.unwrap_err();
        assert!(matches!(error, Error::Untrusted { .. }) && !error.is_retryable(), "{what}: {error:?}");
        assert!(error.to_string().contains("ertificate"), "{what}: {error}");
        let error = store.txn(vec![], vec![Op::put("/k", "changed")]).await.unwrap_err();
        let no = matches!(error, Error::Untrusted { .. } | Error::Indeterminate { .. } | Error::Unavailable { .. });
        assert!(no, "{what}: {error:?}");
    }
    assert_eq!(value(&store, "/k").await.unwrap(), "over TLS");
    let mixed = EtcdOptions::new(etcd.urls(), "/v/");
    assert!(matches!(EtcdStore::new(mixed), Err(Error::Invalid { .. })), "https without certificates");
}

#[tokio::test]
async fn users_without_permission_are_denied() {
    let etcd = Etcd::start(1).await;
    let mut root = etcd.client(&etcd.members[0]).await.unwrap();
    root.user_add("root", "secret", None).await.unwrap();
    root.user_grant_role("root", "root").await.ok();
    root.role_add("root").await.ok();
    root.user_grant_role("root", "root").await.ok();
    root.user_add("guest", "guest", None).await.unwrap();
    root.auth_enable().await.unwrap();
    let open = |user: Option<(&str, &str)>| {
        let user = user.map(|(name, password)| (name.to_owned(), password.to_owned()));
        EtcdStore::new(EtcdOptions { user, ..EtcdOptions::new(etcd.urls(), "/v/") }).unwrap()
    };
    put(&open(Some(("root", "secret"))), "/k", "1").await;
    for user in [None, Some(("guest", "guest")), Some(("root", "wrong"))] {
        let store = open(user);
        let error = store.get(b"/k").await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }) && !error.is_retryable(), "{user:?}: {error:?}");
        let error = store.txn(vec![], vec![Op::put("/k", "2")]).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{user:?}: {error:?}");
        let mut watch = store.watch(b"", Revision(1));
        let error = tokio::time::timeout(Duration::from_secs(10), watch.next()).await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{user:?}: {error:?}");
    }
}
