//! The trait [`Store`], its nouns and their limits. What the guarantees are is said at the trait.

use std::{collections::BTreeSet, fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    error::{Error, Result},
    watch::Watch,
};

/// Longest key.
pub const KEY_BYTES_MAX: usize = 512;
/// Longest value.
pub const VALUE_BYTES_MAX: usize = 256 << 10;
/// Most operations, and most compares, of one transaction.
pub const TXN_LEN_MAX: usize = 100;
/// Largest sum of keys and values of one transaction. Below what etcd accepts by default.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Position in the history of a store. Every transaction that changes something has a revision of its own, higher than
/// all before it. Zero is before everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The next one: watch from here to see what happens after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a lease, never used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A lease as it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// How long it lives without a keep-alive: at least what was asked for.
    pub ttl: Duration,
}

/// A key with its value and where it stands in history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// Key.
    pub key: Bytes,
    /// Value.
    pub value: Bytes,
    /// Revision of the transaction that put this value: the generation to compare with.
    pub revision: Revision,
    /// Lease that the key dies with.
    pub lease: Option<LeaseId>,
}

impl Versioned {
    /// That nobody changed or deleted this since it was read.
    pub fn unchanged(&self) -> Compare {
        Compare::at(self.key.clone(), self.revision)
    }
}

/// All keys with a prefix, as they stood together at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Ascending by key.
    pub entries: Vec<Versioned>,
    /// When they stood so. Watching from [`Revision::next`] of it misses nothing and repeats nothing.
    pub revision: Revision,
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    pub(crate) key: Bytes,
    /// Zero: the key is absent.
    pub(crate) revision: Revision,
}

impl Compare {
    /// The key exists and was last put at this revision.
    pub fn at(key: impl Into<Bytes>, revision: Revision) -> Self {
        Self { key: key.into(), revision }
    }

    /// The key does not exist.
    pub fn absent(key: impl Into<Bytes>) -> Self {
        Self { key: key.into(), revision: Revision::default() }
    }
}

/// One change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Key.
        key: Bytes,
        /// Value.
        value: Bytes,
        /// Lease that the key dies with. A put without one frees the key from the lease that it had.
        lease: Option<LeaseId>,
    },
    /// Removes a key, if it is there.
    Delete {
        /// Key.
        key: Bytes,
    },
}

impl Op {
    /// Sets a key that stays until it is deleted.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Op::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Sets a key that vanishes with a lease.
    pub fn put_leased(key: impl Into<Bytes>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        Op::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// Removes a key, if it is there.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Op::Delete { key: key.into() }
    }

    pub(crate) fn key(&self) -> &Bytes {
        match self {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }
    }
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a refused transaction changed nothing"]
pub struct TxnOutcome {
    /// Whether all compares held and all operations were done. If not, nothing was.
    pub succeeded: bool,
    /// Revision of the store right after: that of this transaction if it succeeded and changed something.
    pub revision: Revision,
}

/// The state that the daemons of a cluster share.
///
/// # Guarantees
///
/// - **Linearizable.** Transactions take effect one after another, each at one instant between call and answer. `get`
///   and `list` show every transaction that was answered, to whomever, before the read was called. There is no stale
///   read in this trait.
/// - **Atomic.** A transaction does all of its operations at one revision, or nothing. A listing is of one revision.
/// - **Durable.** What was acknowledged survives crashes and power cuts of every node, as far as the implementation
///   stores anything ([`MemStore`](crate::MemStore) lives and dies with its process).
/// - **Revisions** strictly rise, and a transaction that changed nothing (refused, empty, deletes of absent keys) has
///   none of its own. They are not dense: other users of an etcd take some. A compare with a revision can be true for
///   one incarnation of a key only; a key deleted and put again has another.
/// - **Honest about doubt.** [`Error::Unavailable`] means that no key was changed. A transaction that was sent and not
///   answered is [`Error::Indeterminate`]: it happened, or not, **or will happen later**. It is repeated safely when
///   its compares can hold once only, that is, if it puts or deletes a key that it compares. Lease calls can always be
///   repeated and are never indeterminate.
/// - **Watches** deliver every change of the matching keys, each once, in the order of revisions, the changes of one
///   transaction together, from the revision asked for; or they say [`Error::Compacted`]. A watch is no linearizable
///   read: changes arrive some time after they happened.
/// - **Leases.** A lease that is kept alive lives on. One that is not ends some time after its `ttl`, never before,
///   counted from when the store handled the last keep-alive; its keys are deleted then in one transaction that watches
///   see. Leases are hints: they tell who is probably gone and never prove it. What must not happen twice is guarded by
///   a compare.
/// - **Bounded in time.** Every call ends within the deadline that the store was made with. Dropping a call's future is
///   allowed at any time; the outcome of a dropped transaction is unknown.
///
/// Keys are bytes, by convention a path such as `/vm/web1`, 1 to [`KEY_BYTES_MAX`] long; order is by bytes.
#[async_trait]
pub trait Store: Send + Sync {
    /// Path or endpoints, for messages.
    fn location(&self) -> String;

    /// A key's value. Linearizable.
    async fn get(&self, key: &[u8]) -> Result<Option<Versioned>>;

    /// All keys that begin with a prefix (the empty one: all). Linearizable, and consistent at one revision.
    async fn list(&self, prefix: &[u8]) -> Result<Listing>;

    /// Does all of `ops` if all of `compares` hold, otherwise nothing. No key may occur twice among the operations.
    /// A put with a lease that has ended is [`Error::LeaseEnded`], and nothing is changed.
    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome>;

    /// Changes of keys that begin with a prefix, at revision `from` and later. Opening a watch asks the store nothing;
    /// what is wrong with it comes from [`Watch::next`].
    fn watch(&self, prefix: &[u8], from: Revision) -> Watch;

    /// Makes a lease. If the answer is lost, the lease ends by itself.
    async fn grant(&self, ttl: Duration) -> Result<Lease>;

    /// Lets a lease live for its `ttl` again. [`Error::LeaseEnded`] if it is too late.
    async fn keep_alive(&self, lease: LeaseId) -> Result<()>;

    /// Ends a lease now, and its keys with it. Fine if it has ended already.
    async fn revoke(&self, lease: LeaseId) -> Result<()>;
}

/// Shortest and longest life of a lease.
const TTL_MIN: Duration = Duration::from_millis(10);
const TTL_MAX: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn check_ttl(ttl: Duration) -> Result<()> {
    if (TTL_MIN..=TTL_MAX).contains(&ttl) {
        return Ok(());
    }
    Err(Error::Invalid { what: format!("a lease cannot live for {ttl:?}, only for {TTL_MIN:?} to {TTL_MAX:?}") })
}

pub(crate) fn check_key(key: &[u8]) -> Result<()> {
    match key.len() {
        0 => Err(Error::Invalid { what: "a key cannot be empty".into() }),
        bytes if bytes > KEY_BYTES_MAX => {
            Err(Error::TooLarge { what: format!("a key of {bytes} bytes; at most {KEY_BYTES_MAX} are possible") })
        }
        _ => Ok(()),
    }
}

/// What holds for a transaction whatever the state: the same on all implementations, so that nothing that works on one
/// host fails on a cluster.
pub(crate) fn check_txn(compares: &[Compare], ops: &[Op]) -> Result<()> {
    let len = compares.len().max(ops.len());
    if len > TXN_LEN_MAX {
        return Err(Error::TooLarge {
            what: format!("a transaction of {len} operations or compares; at most {TXN_LEN_MAX} are possible"),
        });
    }
    let mut total: usize = 0;
    for compare in compares {
        check_key(&compare.key)?;
        total += compare.key.len();
    }
    let mut seen = BTreeSet::new();
    for op in ops {
        check_key(op.key())?;
        total += op.key().len();
        if let Op::Put { key, value, .. } = op {
            if value.len() > VALUE_BYTES_MAX {
                let (key, bytes) = (key.escape_ascii(), value.len());
                return Err(Error::TooLarge {
                    what: format!("the value of {key} has {bytes} bytes; at most {VALUE_BYTES_MAX} are possible"),
                });
            }
            total += value.len();
        }
        if !seen.insert(op.key()) {
            return Err(Error::Invalid {
                what: format!("{} occurs twice among the operations of one transaction", op.key().escape_ascii()),
            });
        }
    }
    if total > REQUEST_BYTES_MAX {
        return Err(Error::TooLarge {
            what: format!("a transaction of {total} bytes; at most {REQUEST_BYTES_MAX} are possible"),
        });
    }
    Ok(())
}
