//! What every store promises, checked on every store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use virtward_cluster::{
    Change, Compare, Error, KEY_BYTES_MAX, LeaseId, Op, REQUEST_BYTES_MAX, Revision, Store, TXN_LEN_MAX,
    VALUE_BYTES_MAX, Watch,
};

use crate::backend::{self, Backend, put, value};

const SOON: Duration = Duration::from_secs(20);

macro_rules! contract {
    ($backends:tt: $name:ident, $($names:ident),+) => {
        contract!($backends: $name);
        contract!($backends: $($names),+);
    };
    ([$($backend:ident),+]: $name:ident) => {
        mod $name {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $backend() {
                    let backend = super::backend::$backend().await;
                    let test = super::$name(&backend);
                    tokio::time::timeout(std::time::Duration::from_secs(120), test).await.expect("in time");
                }
            )+
        }
    };
}

contract!([mem, embedded, etcd, etcd3]:
    puts_and_gets_and_deletes,
    lists_by_prefix_in_order,
    lists_more_than_fits_into_one_answer,
    compares_decide,
    a_key_deleted_and_put_again_is_another,
    transactions_are_atomic_to_readers,
    concurrent_increments_lose_nothing,
    what_one_client_wrote_the_other_reads,
    a_watch_sees_the_past_then_the_present,
    a_watch_sees_transactions_whole_and_its_prefix_only,
    a_watch_resumes_where_another_ended,
    a_cancelled_wait_loses_nothing,
    a_watch_behind_history_is_told_to_list_again,
    leased_keys_vanish_when_nobody_keeps_the_lease,
    a_lease_kept_alive_lives,
    revoking_takes_the_keys_at_once,
    an_ended_lease_takes_no_keys,
    a_key_put_without_a_lease_outlives_the_old_one,
    limits_are_the_same_everywhere
);

async fn puts_and_gets_and_deletes(b: &Backend) {
    let s = &*b.store;
    assert_eq!(s.get(b"/k").await.unwrap(), None);
    let first = put(s, "/k", "one").await;
    let second = put(s, "/k", "two").await;
    assert!(second > first);
    let entry = s.get(b"/k").await.unwrap().unwrap();
    assert_eq!(
        (&entry.key[..], &entry.value[..], entry.revision, entry.lease),
        (&b"/k"[..], &b"two"[..], second, None)
    );

    let outcome = s.txn(vec![], vec![Op::delete("/absent")]).await.unwrap();
    assert!(outcome.succeeded);
    assert_eq!(outcome.revision, second, "deleting what is not there changes nothing");

    let outcome = s.txn(vec![], vec![Op::delete("/k")]).await.unwrap();
    assert!(outcome.succeeded && outcome.revision > second);
    assert_eq!(s.get(b"/k").await.unwrap(), None);

    // Keys and values are bytes.
    let key = [0u8, 255, b'/', 10];
    assert!(s.txn(vec![], vec![Op::put(key.to_vec(), vec![])]).await.unwrap().succeeded);
    assert_eq!(s.get(&key).await.unwrap().unwrap().value.len(), 0);
}

async fn lists_by_prefix_in_order(b: &Backend) {
    let s = &*b.store;
    assert_eq!(s.list(b"").await.unwrap().entries, []);
    for key in ["/vm/b", "/vm/a", "/vn", "/v", "/vm/\u{ff}", "/vm"] {
        put(s, key, key).await;
    }
    let keys = |entries: &[virtward_cluster::Versioned]| -> Vec<String> {
        entries.iter().map(|entry| String::from_utf8(entry.key.to_vec()).unwrap()).collect()
    };
    let listing = s.list(b"/vm/").await.unwrap();
    assert_eq!(keys(&listing.entries), ["/vm/a", "/vm/b", "/vm/\u{ff}"]);
    let last = put(s, "/other", "").await;
    assert!(last > listing.revision);
    let all = s.list(b"").await.unwrap();
    assert_eq!(keys(&all.entries), ["/other", "/v", "/vm", "/vm/a", "/vm/b", "/vm/\u{ff}", "/vn"]);
    assert!(all.revision >= last);
    assert_eq!(s.list(b"/none").await.unwrap().entries, []);
    // A prefix that no byte string comes after.
    assert!(s.txn(vec![], vec![Op::put(vec![255, 255, 1], "x")]).await.unwrap().succeeded);
    assert_eq!(s.list(&[255, 255]).await.unwrap().entries.len(), 1);
}

async fn lists_more_than_fits_into_one_answer(b: &Backend) {
    let s = &*b.store;
    let value = vec![7u8; 12 << 10];
    for block in 0..30 {
        let ops = (0..50).map(|n| Op::put(format!("/many/{:05}", block * 50 + n), value.clone())).collect();
        assert!(s.txn(vec![], ops).await.unwrap().succeeded);
    }
    let listing = s.list(b"/many/").await.unwrap();
    assert_eq!(listing.entries.len(), 1500);
    for (n, entry) in listing.entries.iter().enumerate() {
        assert_eq!(&entry.key[..], format!("/many/{n:05}").as_bytes());
        assert_eq!(entry.value.len(), value.len());
    }
}

async fn compares_decide(b: &Backend) {
    let s = &*b.store;
    let create = |value: &'static str| s.txn(vec![Compare::absent("/c")], vec![Op::put("/c", value)]);
    let created = create("one").await.unwrap();
    assert!(created.succeeded);
    let refused = create("two").await.unwrap();
    assert!(!refused.succeeded);
    assert_eq!(value(s, "/c").await.unwrap(), "one");

    let entry = s.get(b"/c").await.unwrap().unwrap();
    assert_eq!(entry.revision, created.revision);
    assert!(s.txn(vec![entry.unchanged()], vec![Op::put("/c", "three")]).await.unwrap().succeeded);
    assert!(!s.txn(vec![entry.unchanged()], vec![Op::put("/c", "four")]).await.unwrap().succeeded);
    assert!(!s.txn(vec![Compare::at("/absent", entry.revision)], vec![Op::delete("/c")]).await.unwrap().succeeded);

    // One that does not hold among many refuses all.
    let now = s.get(b"/c").await.unwrap().unwrap();
    let compares = vec![now.unchanged(), Compare::absent("/absent"), Compare::absent("/c")];
    let outcome = s.txn(compares, vec![Op::put("/d", "x"), Op::delete("/c")]).await.unwrap();
    assert!(!outcome.succeeded);
    assert_eq!((value(s, "/c").await.as_deref(), value(s, "/d").await), (Some("three"), None));
    // A transaction may only ask.
    assert!(s.txn(vec![now.unchanged()], vec![]).await.unwrap().succeeded);
    assert!(!s.txn(vec![entry.unchanged()], vec![]).await.unwrap().succeeded);
}

async fn a_key_deleted_and_put_again_is_another(b: &Backend) {
    let s = &*b.store;
    put(s, "/aba", "a").await;
    let before = s.get(b"/aba").await.unwrap().unwrap();
    assert!(s.txn(vec![], vec![Op::delete("/aba")]).await.unwrap().succeeded);
    assert!(!s.txn(vec![before.unchanged()], vec![]).await.unwrap().succeeded);
    put(s, "/aba", "a").await;
    assert!(!s.txn(vec![before.unchanged()], vec![Op::put("/aba", "b")]).await.unwrap().succeeded);
}

async fn transactions_are_atomic_to_readers(b: &Backend) {
    let done = Arc::new(AtomicBool::new(false));
    let reader = tokio::spawn({
        let (store, done) = (b.other.clone(), done.clone());
        async move {
            let mut seen = 0;
            loop {
                // Looked at first, so that at least one listing is of the end.
                let last = done.load(Ordering::SeqCst);
                let listing = store.list(b"/pair/").await.unwrap();
                let values: Vec<_> = listing.entries.iter().map(|entry| entry.value.clone()).collect();
                assert!(values.is_empty() || values.len() == 3, "{values:?}");
                assert!(values.windows(2).all(|two| two[0] == two[1]), "{values:?}");
                seen += 1;
                if last {
                    return seen;
                }
                tokio::task::yield_now().await;
            }
        }
    });
    for n in 0..60 {
        let value = n.to_string();
        let ops = ["/pair/a", "/pair/b", "/pair/c"]
            .map(|key| if n % 10 == 9 { Op::delete(key) } else { Op::put(key, value.clone()) });
        assert!(b.store.txn(vec![], ops.into()).await.unwrap().succeeded);
    }
    done.store(true, Ordering::SeqCst);
    assert!(reader.await.unwrap() > 0);
}

async fn concurrent_increments_lose_nothing(b: &Backend) {
    const TASKS: usize = 8;
    const EACH: usize = 12;
    let tasks: Vec<_> = (0..TASKS)
        .map(|n| {
            let store = if n % 2 == 0 { b.store.clone() } else { b.other.clone() };
            tokio::spawn(async move {
                let mut won = 0;
                while won < EACH {
                    let entry = store.get(b"/counter").await.unwrap();
                    let count: usize =
                        entry.as_ref().map_or(0, |entry| std::str::from_utf8(&entry.value).unwrap().parse().unwrap());
                    let compare = entry.map_or(Compare::absent("/counter"), |entry| entry.unchanged());
                    let op = Op::put("/counter", (count + 1).to_string());
                    if store.txn(vec![compare], vec![op]).await.unwrap().succeeded {
                        won += 1;
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(value(&*b.store, "/counter").await.unwrap(), (TASKS * EACH).to_string());
}

async fn what_one_client_wrote_the_other_reads(b: &Backend) {
    for n in 0..50 {
        let (writer, reader) = if n % 2 == 0 { (&b.store, &b.other) } else { (&b.other, &b.store) };
        let revision = put(&**writer, "/seen", &n.to_string()).await;
        let entry = reader.get(b"/seen").await.unwrap().unwrap();
        assert_eq!((entry.revision, &entry.value[..]), (revision, n.to_string().as_bytes()));
        assert!(reader.list(b"/seen").await.unwrap().revision >= revision);
    }
}

/// One line per change.
pub fn lines(changes: &virtward_cluster::Changes) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let each = changes.changes.iter().map(|change| match change {
        Change::Put(entry) => {
            assert_eq!(entry.revision, changes.revision);
            format!("{}={}", text(&entry.key), text(&entry.value))
        }
        Change::Delete { key } => format!("-{}", text(key)),
    });
    each.collect()
}

/// The next changes, which must come soon.
pub async fn next(watch: &mut Watch) -> Vec<String> {
    let before = watch.position();
    let changes = tokio::time::timeout(SOON, watch.next()).await.expect("a change").unwrap();
    assert!(changes.revision >= before && watch.position() == changes.revision.next());
    lines(&changes)
}

async fn nothing(watch: &mut Watch) {
    let wait = tokio::time::timeout(Duration::from_millis(200), watch.next()).await;
    assert!(wait.is_err(), "{wait:?}");
}

async fn a_watch_sees_the_past_then_the_present(b: &Backend) {
    let s = &*b.store;
    let start = s.list(b"/w/").await.unwrap().revision.next();
    put(s, "/w/a", "1").await;
    put(s, "/w/a", "2").await;
    let mut watch = b.other.watch(b"/w/", start);
    assert_eq!(next(&mut watch).await, ["/w/a=1"]);
    assert_eq!(next(&mut watch).await, ["/w/a=2"]);
    nothing(&mut watch).await;
    let waiting = tokio::spawn(async move {
        let changes = next(&mut watch).await;
        (changes, watch)
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(s.txn(vec![], vec![Op::delete("/w/a")]).await.unwrap().succeeded);
    let (changes, mut watch) = waiting.await.unwrap();
    assert_eq!(changes, ["-/w/a"]);
    // One that begins in the future waits for it.
    let now = put(s, "/w/b", "3").await;
    let mut later = s.watch(b"/w/", now.next());
    nothing(&mut later).await;
    put(s, "/w/b", "4").await;
    assert_eq!(next(&mut later).await, ["/w/b=4"]);
    assert_eq!(next(&mut watch).await, ["/w/b=3"]);
}

async fn a_watch_sees_transactions_whole_and_its_prefix_only(b: &Backend) {
    let s = &*b.store;
    let mut watch = s.watch(b"/w/", s.list(b"").await.unwrap().revision.next());
    put(s, "/w", "outside").await;
    put(s, "/w/gone", "").await;
    let ops = vec![Op::put("/w/z", "1"), Op::put("/v/x", "1"), Op::delete("/w/gone"), Op::put("/w/a", "2")];
    assert!(s.txn(vec![], ops).await.unwrap().succeeded);
    assert!(!s.txn(vec![Compare::absent("/w/a")], vec![Op::put("/w/never", "")]).await.unwrap().succeeded);
    put(s, "/w0", "outside").await;
    put(s, "/w/end", "").await;
    assert_eq!(next(&mut watch).await, ["/w/gone="]);
    assert_eq!(next(&mut watch).await, ["/w/a=2", "-/w/gone", "/w/z=1"]);
    assert_eq!(next(&mut watch).await, ["/w/end="]);
}

async fn a_watch_resumes_where_another_ended(b: &Backend) {
    let start = b.store.list(b"").await.unwrap().revision.next();
    let writer = tokio::spawn({
        let store = b.store.clone();
        async move {
            for n in 0..100 {
                put(&*store, "/w/n", &n.to_string()).await;
            }
        }
    });
    let mut seen = Vec::new();
    let mut position = start;
    while seen.len() < 100 {
        let store = if seen.len() % 2 == 0 { &b.other } else { &b.store };
        let mut watch = store.watch(b"/w/", position);
        for _ in 0..7.min(100 - seen.len()) {
            seen.extend(next(&mut watch).await);
        }
        position = watch.position();
    }
    writer.await.unwrap();
    assert_eq!(seen, (0..100).map(|n| format!("/w/n={n}")).collect::<Vec<_>>());
}

async fn a_cancelled_wait_loses_nothing(b: &Backend) {
    let mut watch = b.other.watch(b"/w/", b.store.list(b"").await.unwrap().revision.next());
    let writer = tokio::spawn({
        let store = b.store.clone();
        async move {
            for n in 0..60 {
                put(&*store, "/w/n", &n.to_string()).await;
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        }
    });
    let (mut seen, deadline) = (Vec::new(), Instant::now() + SOON);
    while seen.len() < 60 && Instant::now() < deadline {
        // Shorter than the time between two changes, so that most waits are cancelled.
        if let Ok(changes) = tokio::time::timeout(Duration::from_millis(2), watch.next()).await {
            seen.extend(lines(&changes.unwrap()));
        }
    }
    writer.await.unwrap();
    assert_eq!(seen, (0..60).map(|n| format!("/w/n={n}")).collect::<Vec<_>>());
}

async fn a_watch_behind_history_is_told_to_list_again(b: &Backend) {
    let s = &*b.store;
    let start = put(s, "/w/a", "1").await;
    put(s, "/w/a", "2").await;
    put(s, "/w/a", "3").await;
    let mut behind = s.watch(b"/w/", start);
    b.compact().await;
    let error = tokio::time::timeout(SOON, behind.next()).await.unwrap().unwrap_err();
    let Error::Compacted { oldest } = error else { panic!("{error}") };
    assert!(oldest > start, "{oldest} {start}");
    assert!(!error.is_retryable());
    assert!(matches!(behind.next().await, Err(Error::Compacted { .. })), "an ended watch stays ended");
    let listing = s.list(b"/w/").await.unwrap();
    assert_eq!(&listing.entries[0].value[..], b"3");
    let mut again = s.watch(b"/w/", listing.revision.next());
    put(s, "/w/a", "4").await;
    assert_eq!(next(&mut again).await, ["/w/a=4"]);
}

/// Waits until a key is gone.
async fn gone(store: &dyn Store, key: &str, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while Instant::now() < deadline {
        if value(store, key).await.is_none() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

async fn leased_keys_vanish_when_nobody_keeps_the_lease(b: &Backend) {
    let s = &*b.store;
    let lease = s.grant(Duration::from_secs(1)).await.unwrap();
    assert!(lease.ttl >= Duration::from_secs(1));
    let mut watch = b.other.watch(b"/p/", s.list(b"").await.unwrap().revision.next());
    let ops = vec![Op::put_leased("/p/a", "x", lease.id), Op::put_leased("/p/b", "y", lease.id), Op::put("/p/c", "z")];
    assert!(s.txn(vec![], ops).await.unwrap().succeeded);
    assert_eq!(s.get(b"/p/a").await.unwrap().unwrap().lease, Some(lease.id));
    assert_eq!(next(&mut watch).await.len(), 3);
    b.pass(lease.ttl / 4).await;
    assert_eq!(value(s, "/p/a").await.as_deref(), Some("x"), "never before its time");
    b.pass(lease.ttl).await;
    // Together, in one transaction.
    assert_eq!(next(&mut watch).await, ["-/p/a", "-/p/b"]);
    assert!(gone(&*b.other, "/p/a", SOON).await);
    assert_eq!(value(s, "/p/c").await.as_deref(), Some("z"));
    assert!(matches!(s.keep_alive(lease.id).await, Err(Error::LeaseEnded { lease: ended }) if ended == lease.id));
}

async fn a_lease_kept_alive_lives(b: &Backend) {
    let s = &*b.store;
    let lease = s.grant(Duration::from_secs(1)).await.unwrap();
    assert!(s.txn(vec![], vec![Op::put_leased("/p/a", "x", lease.id)]).await.unwrap().succeeded);
    for _ in 0..8 {
        b.pass(lease.ttl / 3).await;
        b.other.keep_alive(lease.id).await.unwrap();
    }
    assert_eq!(value(s, "/p/a").await.as_deref(), Some("x"));
    s.revoke(lease.id).await.unwrap();
}

async fn revoking_takes_the_keys_at_once(b: &Backend) {
    let s = &*b.store;
    let lease = s.grant(Duration::from_secs(600)).await.unwrap();
    assert!(s.txn(vec![], vec![Op::put_leased("/p/a", "x", lease.id)]).await.unwrap().succeeded);
    s.revoke(lease.id).await.unwrap();
    assert_eq!(value(s, "/p/a").await, None);
    s.revoke(lease.id).await.unwrap();
    s.revoke(LeaseId(12345)).await.unwrap();
}

async fn an_ended_lease_takes_no_keys(b: &Backend) {
    let s = &*b.store;
    let lease = s.grant(Duration::from_secs(600)).await.unwrap();
    s.revoke(lease.id).await.unwrap();
    let ops = vec![Op::put("/p/b", "y"), Op::put_leased("/p/a", "x", lease.id)];
    let error = s.txn(vec![], ops).await.unwrap_err();
    assert!(matches!(error, Error::LeaseEnded { .. }), "{error:?}");
    assert_eq!(s.list(b"/p/").await.unwrap().entries, [], "nothing half done");
    assert!(matches!(s.keep_alive(lease.id).await, Err(Error::LeaseEnded { .. })));
}

async fn a_key_put_without_a_lease_outlives_the_old_one(b: &Backend) {
    let s = &*b.store;
    let (one, two) =
        (s.grant(Duration::from_secs(600)).await.unwrap(), s.grant(Duration::from_secs(600)).await.unwrap());
    for key in ["/p/free", "/p/moved", "/p/kept"] {
        assert!(s.txn(vec![], vec![Op::put_leased(key, "x", one.id)]).await.unwrap().succeeded);
    }
    put(s, "/p/free", "y").await;
    assert!(s.txn(vec![], vec![Op::put_leased("/p/moved", "y", two.id)]).await.unwrap().succeeded);
    s.revoke(one.id).await.unwrap();
    assert_eq!(value(s, "/p/kept").await, None);
    assert_eq!(value(s, "/p/free").await.as_deref(), Some("y"));
    assert_eq!(value(s, "/p/moved").await.as_deref(), Some("y"));
    s.revoke(two.id).await.unwrap();
    assert_eq!(value(s, "/p/moved").await, None);
}

async fn limits_are_the_same_everywhere(b: &Backend) {
    let s = &*b.store;
    let before = s.list(b"").await.unwrap();
    let refused = [
        vec![Op::put(vec![b'k'; KEY_BYTES_MAX + 1], "")],
        vec![Op::put("/v", vec![0; VALUE_BYTES_MAX + 1])],
        (0..=TXN_LEN_MAX).map(|n| Op::put(format!("/n/{n}"), "")).collect(),
        (0..=REQUEST_BYTES_MAX / VALUE_BYTES_MAX)
            .map(|n| Op::put(format!("/n/{n}"), vec![0; VALUE_BYTES_MAX]))
            .collect(),
    ];
    for ops in refused {
        let error = s.txn(vec![], ops).await.unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
    }
    for ops in [vec![Op::put("", "x")], vec![Op::put("/twice", "x"), Op::delete("/twice")]] {
        let error = s.txn(vec![], ops).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    }
    assert!(matches!(s.get(b"").await, Err(Error::Invalid { .. })));
    assert!(matches!(s.grant(Duration::ZERO).await, Err(Error::Invalid { .. })));
    assert_eq!(s.list(b"").await.unwrap(), before);

    // What is just within them works.
    let key = vec![b'k'; KEY_BYTES_MAX];
    let big = vec![1u8; VALUE_BYTES_MAX];
    assert!(
        s.txn(vec![Compare::absent(key.clone())], vec![Op::put(key.clone(), big.clone())]).await.unwrap().succeeded
    );
    assert_eq!(s.get(&key).await.unwrap().unwrap().value.len(), big.len());
    let compares = (0..TXN_LEN_MAX).map(|n| Compare::absent(format!("/n/{n}"))).collect();
    let ops = (0..TXN_LEN_MAX).map(|n| Op::put(format!("/n/{n}"), vec![2; 8 << 10])).collect();
    assert!(s.txn(compares, ops).await.unwrap().succeeded);
    assert_eq!(s.list(b"/n/").await.unwrap().entries.len(), TXN_LEN_MAX);
    assert_eq!(Revision::default().next(), Revision(1));
}
