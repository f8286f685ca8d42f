//! The store in memory: its faults do what they say, and nothing else.

use std::{sync::Arc, time::Duration};

use virtward_cluster::{
    Compare, Error, MemStore, Op, Store,
    clock::ManualClock,
    mem::{Call, Fault, MemOptions},
};

use crate::{
    backend::{put, value},
    contract::next,
};

fn with_clock() -> (MemStore, ManualClock) {
    let clock = ManualClock::new();
    (MemStore::with(MemOptions { clock: Arc::new(clock.clone()), ..MemOptions::default() }), clock)
}

/// Lets a call begin to wait, then moves time.
async fn after<T: Send + 'static>(
    clock: &ManualClock,
    time: Duration,
    call: impl Future<Output = T> + Send + 'static,
) -> T {
    let waiting = tokio::spawn(call);
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished(), "it did not wait");
    clock.advance(time);
    tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_client_that_is_cut_off_changes_nothing_and_others_go_on() {
    let store = MemStore::new();
    let other = store.client();
    let mut watch = store.watch(b"", put(&store, "/k", "1").await);
    assert_eq!(next(&mut watch).await, ["/k=1"]);
    store.faults().cut_off(true);
    for error in [
        store.get(b"/k").await.unwrap_err(),
        store.list(b"").await.unwrap_err(),
        store.txn(vec![], vec![Op::delete("/k")]).await.unwrap_err(),
        store.grant(Duration::from_secs(1)).await.unwrap_err(),
        watch.next().await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::Unavailable { .. }) && error.is_retryable(), "{error:?}");
    }
    put(&other, "/k", "2").await;
    put(&other, "/k", "3").await;
    store.faults().cut_off(false);
    assert_eq!(next(&mut watch).await, ["/k=2"]);
    assert_eq!(next(&mut watch).await, ["/k=3"]);
}

#[tokio::test]
async fn a_break_interrupts_a_waiting_watch_which_then_goes_on() {
    let store = MemStore::new();
    let mut watch = store.watch(b"", put(&store, "/k", "1").await.next());
    let waiting = tokio::spawn(async move { (watch.next().await, watch) });
    tokio::time::sleep(Duration::from_millis(20)).await;
    store.faults().break_watches();
    let (broken, mut watch) = waiting.await.unwrap();
    assert!(matches!(broken, Err(Error::Unavailable { .. })));
    put(&store, "/k", "2").await;
    assert_eq!(next(&mut watch).await, ["/k=2"]);
}

#[tokio::test]
async fn an_indeterminate_transaction_happened_or_not_and_says_neither() {
    let store = MemStore::new();
    for (happens, expected) in [(true, Some("x")), (false, None)] {
        let key = format!("/{happens}");
        store.faults().once(Call::Txn, Fault::Indeterminate { happens });
        let txn = || store.txn(vec![Compare::absent(key.clone())], vec![Op::put(key.clone(), "x")]);
        let error = txn().await.unwrap_err();
        assert!(matches!(error, Error::Indeterminate { .. }) && !error.is_retryable(), "{error:?}");
        assert_eq!(value(&store, &key).await.as_deref(), expected);
        // The same once more is done once in all.
        assert_eq!(txn().await.unwrap().succeeded, !happens);
    }
}

#[tokio::test]
async fn a_late_transaction_happens_after_its_sender_gave_up() {
    let (store, clock) = with_clock();
    store.faults().once(Call::Txn, Fault::Late(Duration::from_secs(30)));
    let sender = store.clone();
    let answer = after(&clock, Duration::from_secs(5), async move {
        sender.txn(vec![Compare::absent("/k")], vec![Op::put("/k", "late")]).await
    });
    assert!(matches!(answer.await, Err(Error::Indeterminate { .. })));
    assert_eq!(value(&store, "/k").await, None);
    let mut watch = store.watch(b"", store.list(b"").await.unwrap().revision.next());
    clock.advance(Duration::from_secs(24));
    assert_eq!(value(&store, "/k").await, None);
    let seen = after(&clock, Duration::from_secs(1), async move { next(&mut watch).await });
    assert_eq!(seen.await, ["/k=late"]);
}

#[tokio::test]
async fn slow_calls_take_their_time_and_too_slow_ones_fail() {
    let (store, clock) = with_clock();
    put(&store, "/k", "1").await;
    store.faults().once(Call::Read, Fault::Delay(Duration::from_secs(3)));
    let reader = store.clone();
    let entry = after(&clock, Duration::from_secs(3), async move { value(&reader, "/k").await });
    assert_eq!(entry.await.as_deref(), Some("1"));
    store.faults().always(Call::Txn, Some(Fault::Delay(Duration::from_secs(60))));
    let writer = store.clone();
    let error =
        after(
            &clock,
            Duration::from_secs(5),
            async move { writer.txn(vec![], vec![Op::delete("/k")]).await.unwrap_err() },
        );
    assert!(matches!(error.await, Error::Indeterminate { .. }));
    clock.advance(Duration::from_secs(600));
    assert_eq!(value(&store, "/k").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn leases_end_by_the_injected_clock_in_the_order_in_which_they_are_over() {
    let (store, clock) = with_clock();
    let short = store.grant(Duration::from_secs(5)).await.unwrap();
    let long = store.grant(Duration::from_secs(9)).await.unwrap();
    let ops = vec![Op::put_leased("/long", "", long.id), Op::put_leased("/short", "", short.id)];
    let revision = store.txn(vec![], ops).await.unwrap().revision;
    let mut watch = store.watch(b"", revision.next());
    // Both at once: a host that was suspended.
    clock.advance(Duration::from_secs(100));
    assert_eq!(next(&mut watch).await, ["-/short"]);
    assert_eq!(next(&mut watch).await, ["-/long"]);
}
