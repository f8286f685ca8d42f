//! The stores that keep the contract, ready to be tested.

use std::{any::Any, future::Future, pin::Pin, sync::Arc, time::Duration};

use virtward_cluster::{
    EmbeddedOptions, EmbeddedStore, EtcdOptions, EtcdStore, MemStore, Revision, Store,
    clock::ManualClock,
    mem::{History, MemOptions},
};

use crate::server::Etcd;

/// History of the stores on one machine: short, so that a test outruns it.
pub const HISTORY: History = History { transactions_max: 500, bytes_max: 64 << 20 };

type Compact = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// A fresh store.
pub struct Backend {
    /// A client.
    pub store: Arc<dyn Store>,
    /// Another client of the same state, or the same one where there can be only one.
    pub other: Arc<dyn Store>,
    clock: Option<ManualClock>,
    compact: Compact,
    _keep: Box<dyn Any + Send + Sync>,
}

impl Backend {
    /// Lets time pass for leases.
    pub async fn pass(&self, time: Duration) {
        match &self.clock {
            Some(clock) => clock.advance(time),
            None => tokio::time::sleep(time).await,
        }
    }

    /// Makes the store forget its history.
    pub async fn compact(&self) {
        (self.compact)().await;
    }
}

pub async fn mem() -> Backend {
    let clock = ManualClock::new();
    let options = MemOptions { clock: Arc::new(clock.clone()), history: HISTORY, ..MemOptions::default() };
    let store = MemStore::with(options);
    let compacting = store.clone();
    Backend {
        other: Arc::new(store.client()),
        store: Arc::new(store),
        clock: Some(clock),
        compact: Box::new(move || {
            compacting.compact();
            Box::pin(async {})
        }),
        _keep: Box::new(()),
    }
}

pub async fn embedded() -> Backend {
    let dir = tempfile::tempdir().unwrap();
    let options = EmbeddedOptions { history: HISTORY, ..EmbeddedOptions::default() };
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(dir.path().join("state.db"), options).unwrap());
    let writing = store.clone();
    Backend {
        other: store.clone(),
        store,
        clock: None,
        compact: Box::new(move || {
            let store = writing.clone();
            Box::pin(async move {
                for n in 0..=HISTORY.transactions_max {
                    put(&*store, "/other/noise", &n.to_string()).await;
                }
            })
        }),
        _keep: Box::new(dir),
    }
}

pub async fn etcd() -> Backend {
    on_etcd(1).await
}

pub async fn etcd3() -> Backend {
    on_etcd(3).await
}

async fn on_etcd(members: usize) -> Backend {
    let etcd = Etcd::start(members).await;
    let mut urls = etcd.urls();
    let connect = |urls: &[String]| -> Arc<dyn Store> {
        Arc::new(EtcdStore::new(EtcdOptions::new(urls, "/virtward/contract/")).unwrap())
    };
    let store = connect(&urls);
    // Talks to another member, if there is one.
    urls.rotate_left(1);
    let other = connect(&urls);
    let compacting = etcd.client(&etcd.members[0]).await.unwrap();
    // Keys of others, before and behind: nobody may see them.
    let mut noise = compacting.clone();
    for key in ["/virtward/contract", "/virtward/contract0", "/virtward/contracu/x", "zzz"] {
        noise.put(key, "noise", None).await.unwrap();
    }
    Backend {
        store,
        other,
        clock: None,
        compact: Box::new(move || {
            let mut client = compacting.clone();
            Box::pin(async move {
                let now = client.put("zzz", "", None).await.unwrap().header().unwrap().revision();
                client.compact(now, None).await.unwrap();
            })
        }),
        _keep: Box::new(etcd),
    }
}

/// Puts one key, whatever was there.
pub async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    let op = virtward_cluster::Op::put(key.to_owned(), value.to_owned());
    let outcome = store.txn(vec![], vec![op]).await.unwrap();
    assert!(outcome.succeeded);
    outcome.revision
}

/// A value as text.
pub async fn value(store: &dyn Store, key: &str) -> Option<String> {
    let entry = store.get(key.as_bytes()).await.unwrap()?;
    Some(String::from_utf8(entry.value.to_vec()).unwrap())
}
