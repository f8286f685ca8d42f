//! The daemons of the cluster, and which of them are there.
//!
//! `/v1/nodes/NAME` stays until the node is removed; its `boot` changes with every start of the daemon, which makes void
//! whatever a former start claimed. `/v1/presence/NAME` dies with a lease: it tells who beats. A daemon that does not beat
//! is not known to be dead, and nothing that must not happen twice may follow from that alone.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;
use virtward_api::{Code, Problem};
use virtward_cluster::{Compare, Error, Lease, Op};
use virtward_engine::Cancel;

use crate::{
    failures::{self, Result},
    kv::{self, Kv},
    table::Table,
};

/// This daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Me {
    /// Name in the cluster.
    pub name: String,
    /// Another one at every start.
    pub boot: Uuid,
}

/// A node as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The start of its daemon that counts; none before the first.
    #[serde(default)]
    pub boot: Option<Uuid>,
    /// Where its peers reach it.
    #[serde(default)]
    pub address: Option<String>,
    /// When it became a member.
    pub joined: Timestamp,
    /// When its daemon started.
    #[serde(default)]
    pub started: Option<Timestamp>,
    /// When its daemon was stopped in order, if that is how it ended.
    #[serde(default)]
    pub stopped: Option<Timestamp>,
    /// Version of the program.
    #[serde(default)]
    pub version: String,
}

/// A node's sign of life.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// Which start.
    pub boot: Uuid,
    /// Since when.
    pub since: Timestamp,
}

/// Key of a node.
pub fn node_key(name: &str) -> String {
    format!("/v1/nodes/{name}")
}

fn presence_key(name: &str) -> String {
    format!("/v1/presence/{name}")
}

/// All nodes.
pub struct Nodes {
    kv: Kv,
    /// This one.
    pub me: Me,
    /// Members.
    pub records: Table<String, NodeRecord>,
    /// Who beats.
    pub beats: Table<String, Beat>,
    /// There may be others.
    pub is_cluster: bool,
    /// Beats are to be looked after now.
    pub wake: Notify,
    is_removed: AtomicBool,
    lost: RwLock<Option<(Timestamp, String)>>,
}

impl Nodes {
    /// Those of the state store.
    pub async fn load(kv: Kv, me: Me, is_cluster: bool) -> Result<Self> {
        Ok(Self {
            records: Table::load(&kv, "/v1/nodes/").await?,
            beats: Table::load(&kv, "/v1/presence/").await?,
            kv,
            me,
            is_cluster,
            wake: Notify::new(),
            is_removed: AtomicBool::new(false),
            lost: RwLock::default(),
        })
    }

    /// Makes this start the one that counts. On one host the node is made; in a cluster it must be a member.
    pub async fn register(&self, address: Option<String>, now: Timestamp) -> Result<()> {
        let key = node_key(&self.me.name);
        loop {
            let before = self.kv.get::<NodeRecord>(&key).await?;
            if before.is_none() && self.is_cluster {
                return Err(Problem::new(Code::Conflict, format!("{} is no node of this cluster", self.me.name))
                    .hint("it was removed, or never joined: virtward cluster join TOKEN"));
            }
            let record = NodeRecord {
                boot: Some(self.me.boot),
                address: address.clone(),
                joined: before.as_ref().map_or(now, |(record, _)| record.joined),
                started: Some(now),
                stopped: None,
                version: env!("CARGO_PKG_VERSION").into(),
            };
            let compare = match &before {
                Some((_, entry)) => entry.unchanged(),
                None => Compare::absent(key.clone()),
            };
            if let Some(revision) = self.kv.commit(vec![compare], vec![kv::put(&key, &record)?]).await? {
                self.records.put(self.me.name.clone(), revision, record);
                return Ok(());
            }
        }
    }

    /// Reads a node's record anew.
    pub async fn refresh(&self, name: &str) -> Result<()> {
        let key = node_key(name);
        let listing = self.kv.listing(&key).await?;
        match listing.entries.iter().find(|entry| entry.key == key.as_bytes()) {
            Some(entry) => _ = self.records.follow(&entry.key, entry.revision, Some(&entry.value)),
            None => self.records.delete(&name.to_owned(), listing.revision),
        }
        Ok(())
    }

    /// Whether a node's daemon beats, as far as is known here.
    pub fn is_there(&self, name: &str) -> bool {
        if name == self.me.name {
            return true;
        }
        let boot = self.records.get(&name.to_owned()).and_then(|record| record.boot);
        self.beats.get(&name.to_owned()).is_some_and(|beat| Some(beat.boot) == boot)
    }

    /// Whether something that the start `boot` of a node's daemon held is void: another start counts, or the node is no
    /// member any more.
    pub fn is_void(&self, name: &str, boot: Uuid) -> bool {
        if name == self.me.name {
            return boot != self.me.boot;
        }
        self.records.get(&name.to_owned()).is_none_or(|record| record.boot.is_some_and(|now| now != boot))
    }

    /// Where a node's peers reach it.
    pub fn address(&self, name: &str) -> Result<String> {
        let record = self.records.get(&name.to_owned());
        let address = record.and_then(|record| record.address.clone());
        address.ok_or_else(|| {
            Problem::new(Code::NotFound, format!("there is no node {name} that can be reached"))
                .hint("virtward cluster status shows the nodes")
        })
    }

    /// Whether this node was removed from the cluster while it ran.
    pub fn is_removed(&self) -> bool {
        self.is_removed.load(Relaxed)
    }

    /// This node was removed, or is back.
    pub fn removed(&self, is_removed: bool) -> bool {
        self.is_removed.swap(is_removed, Relaxed) != is_removed
    }

    /// Since when and why the state store does not answer, if it does not.
    pub fn lost_store(&self) -> Option<(Timestamp, String)> {
        self.lost.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The store answers, or does not; whether that is new.
    pub fn contact(&self, lost: Option<String>) -> bool {
        let mut now = self.lost.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = now.is_some() != lost.is_some();
        *now = match (lost, now.take()) {
            (None, _) => None,
            (Some(why), Some((since, _))) => Some((since, why)),
            (Some(why), None) => Some((Timestamp::now(), why)),
        };
        is_new
    }

    /// Beats until cancelled; then says that the daemon was stopped.
    pub async fn beat(self: Arc<Self>, ttl: Duration, cancel: Cancel) {
        while !cancel.is_cancelled() {
            let ended = tokio::select! {
                ended = self.one_lease(ttl) => ended,
                () = cancel.cancelled() => break,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "no beat");
            }
            tokio::select! {
                () = tokio::time::sleep(ttl / 10) => {}
                () = cancel.cancelled() => break,
            }
        }
        if let Err(problem) = self.leave().await {
            tracing::warn!(%problem, "the others were not told that this daemon stops");
        }
    }

    /// Beats under one lease until it ends.
    async fn one_lease(&self, ttl: Duration) -> std::result::Result<(), Error> {
        let store = self.kv.store();
        let lease: Lease = store.grant(ttl).await?;
        let beat = Beat { boot: self.me.boot, since: Timestamp::now() };
        let value = serde_json::to_vec(&beat).unwrap_or_default();
        let key = presence_key(&self.me.name);
        // Only for a member whose start counts still: a removed node and a second daemon of this name do not beat.
        let Some((revision, record)) = self.records.row(&self.me.name).filter(|(_, of)| of.boot == Some(self.me.boot))
        else {
            let _ = store.revoke(lease.id).await;
            return Ok(());
        };
        let member = Compare::at(node_key(&self.me.name), revision);
        let outcome = store.txn(vec![member], vec![Op::put_leased(key, value, lease.id)]).await?;
        if !outcome.succeeded {
            tracing::debug!(?record, "the node's record changed; no beat yet");
            let _ = store.revoke(lease.id).await;
            return Ok(());
        }
        self.beats.put(self.me.name.clone(), outcome.revision, beat);
        loop {
            tokio::select! {
                () = tokio::time::sleep(lease.ttl / 3) => {}
                () = self.wake.notified() => return Ok(()),
            }
            match store.keep_alive(lease.id).await {
                Ok(()) => {}
                Err(error) if error.is_retryable() => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn leave(&self) -> Result<()> {
        let key = node_key(&self.me.name);
        let Some((record, entry)) = self.kv.get::<NodeRecord>(&key).await? else { return Ok(()) };
        if record.boot != Some(self.me.boot) {
            return Ok(());
        }
        let record = NodeRecord { stopped: Some(Timestamp::now()), ..record };
        let ops = vec![kv::put(&key, &record)?, Op::delete(presence_key(&self.me.name))];
        self.kv.commit(vec![entry.unchanged()], ops).await.map(|_| ())
    }

    /// Takes a node out of the cluster: it beats no more, and what it claimed is void.
    pub async fn remove(&self, name: &str) -> Result<NodeRecord> {
        let key = node_key(name);
        let Some((record, entry)) = self.kv.get::<NodeRecord>(&key).await? else {
            return Err(Problem::new(Code::NotFound, format!("there is no node {name}"))
                .hint("virtward cluster status shows the nodes"));
        };
        let ops = vec![
            Op::delete(key),
            Op::delete(presence_key(name)),
            Op::delete(format!("/v1/hosts/{name}")),
            Op::delete(format!("/v1/progress/{name}")),
        ];
        let compares = vec![entry.unchanged()];
        if self.kv.commit(compares, ops).await?.is_none() {
            return Err(failures::changed(&format!("node {name}")));
        }
        let keys = self.kv.listing(&format!("/v1/inventory/{name}/")).await?.entries;
        let keys: Vec<String> = keys.iter().map(|entry| String::from_utf8_lossy(&entry.key).into_owned()).collect();
        self.kv.delete(&keys).await?;
        Ok(record)
    }
}
