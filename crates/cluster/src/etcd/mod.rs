//! A store in an etcd cluster of three voters and more (version 3.4 and later).
//!
//! One member at a time is talked to; the next takes over when it fails. A read that fails is repeated with another
//! member within the call's deadline. A transaction is repeated only if it is certain that it was not sent or was
//! turned away: whatever else goes wrong with one is [`Error::Indeterminate`](crate::Error::Indeterminate). All keys
//! live under one prefix, so that clusters, and other users, can share an etcd.

mod member;
mod probe;
mod verdict;
mod watcher;

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{Client, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp};
use tokio::time::Instant;

use self::{
    member::{Member, Members},
    verdict::{Verdict, judge},
    watcher::EtcdSource,
};
use crate::{
    error::{Error, Result},
    store::{
        Compare, Lease, LeaseId, Listing, Op, Revision, Store, TxnOutcome, Versioned, check_key, check_ttl, check_txn,
    },
    watch::Watch,
};

pub use self::member::EtcdTls;

/// Largest answer that is read.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Keys per page of a listing.
const PAGE_LEN: i64 = 1000;
/// Between two rounds over all members.
const PAUSE: Duration = Duration::from_millis(100);

/// How an etcd cluster is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// URLs of the members, `https://` or `http://`.
    pub endpoints: Vec<String>,
    /// What every key begins with there; `/virtward/<cluster>/` for example.
    pub prefix: String,
    /// Deadline of every call; a listing of many pages may take four times as long.
    pub timeout: Duration,
    /// Who is trusted, and who this is.
    pub tls: Option<EtcdTls>,
    /// Name and password, where etcd asks for them.
    pub user: Option<(String, String)>,
}

impl EtcdOptions {
    /// Without TLS, with a deadline of 5 s.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>, prefix: impl Into<String>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            prefix: prefix.into(),
            timeout: Duration::from_secs(5),
            tls: None,
            user: None,
        }
    }
}

/// What both calls and watches need.
struct Shared {
    members: Members,
    prefix: Vec<u8>,
    timeout: Duration,
}

/// A store in an etcd cluster.
pub struct EtcdStore {
    shared: Arc<Shared>,
}

/// What it means that nobody answered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Asking again does no harm.
    Repeatable,
    /// It may have happened.
    Txn,
}

impl EtcdStore {
    /// Prepares to talk to etcd. Asks it nothing yet: a cluster that is away for the moment is no reason not to start.
    pub fn new(options: EtcdOptions) -> Result<Self> {
        if options.prefix.is_empty() {
            return Err(Error::Invalid { what: "the prefix of the keys in etcd cannot be empty".into() });
        }
        let prefix = options.prefix.clone().into_bytes();
        let timeout = options.timeout;
        Ok(Self { shared: Arc::new(Shared { members: Members::new(options)?, prefix, timeout }) })
    }
}

impl Shared {
    fn location(&self) -> &str {
        self.members.location()
    }

    fn full(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix, key].concat()
    }

    /// The entry that a pair of etcd's is. Keys outside the prefix cannot come: none are asked for.
    fn entry(&self, pair: &KeyValue) -> Versioned {
        let lease = pair.lease();
        Versioned {
            key: Bytes::copy_from_slice(pair.key().strip_prefix(&self.prefix[..]).unwrap_or_default()),
            value: Bytes::copy_from_slice(pair.value()),
            revision: revision(pair.mod_revision()),
            lease: (lease != 0).then_some(LeaseId(lease)),
        }
    }

    /// Makes a call, with one member after another as far as that is safe.
    async fn call<T, F>(&self, kind: Kind, call: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + self.timeout;
        // A member that hangs must leave time for the others, if they may be asked.
        let members = self.members.len() as u32;
        let share = match kind {
            Kind::Repeatable => (self.timeout / (members + 1)).max(Duration::from_millis(200)),
            Kind::Txn => self.timeout,
        };
        let (mut failures, mut untrusted) = (0, 0);
        loop {
            let (number, client) = self.members.current();
            let attempt = async { call(client.get(deadline).await?).await };
            let until = deadline.min(Instant::now() + share);
            let what = match tokio::time::timeout_at(until, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => match judge(self.location(), &error) {
                    Verdict::Final(error) => return Err(error),
                    Verdict::NotSent(what) => what,
                    Verdict::Untrusted(what) => {
                        untrusted += 1;
                        // A whole round of refusals, by members that may have certificates of their own.
                        if untrusted == members {
                            return Err(Error::Untrusted { location: self.location().into(), what });
                        }
                        what
                    }
                    Verdict::Unknown(what) if kind == Kind::Repeatable => what,
                    Verdict::Unknown(what) => {
                        self.members.leave(number);
                        return Err(Error::indeterminate(self.location(), what));
                    }
                },
                Err(_) => {
                    self.members.leave(number);
                    if kind == Kind::Txn {
                        let what = format!("no answer within {:?}", self.timeout);
                        return Err(Error::indeterminate(self.location(), what));
                    }
                    format!("no answer within {share:?}")
                }
            };
            self.members.leave(number);
            failures += 1;
            if failures % members == 0 {
                tokio::time::sleep_until(deadline.min(Instant::now() + PAUSE)).await;
            }
            if Instant::now() >= deadline {
                return Err(self.away(client, what).await);
            }
        }
    }

    /// Why there is no answer: a person has to act where it is for want of trust.
    async fn away(&self, last: &Member, what: String) -> Error {
        let refusal = match last.tls() {
            Some(tls) => probe::refusal(last.url(), tls).await,
            None => None,
        };
        match refusal {
            Some(what) => Error::Untrusted { location: self.location().into(), what },
            None => Error::unavailable(self.location(), what),
        }
    }

    /// All keys with a prefix, page by page at one revision. None if that revision was compacted in between.
    async fn list_once(&self, prefix: &[u8]) -> Result<Option<Listing>> {
        let start = self.full(prefix);
        let end = after_prefix(&start);
        let (mut entries, mut from, mut at) = (Vec::new(), start, 0);
        let mut limit = PAGE_LEN;
        loop {
            let options = GetOptions::new().with_range(end.clone()).with_limit(limit).with_revision(at);
            let page =
                self.call(Kind::Repeatable, |client| {
                    let (from, options) = (from.clone(), options.clone());
                    async move {
                        client.kv_client().max_decoding_message_size(MESSAGE_BYTES_MAX).get(from, Some(options)).await
                    }
                });
            let page = match page.await {
                Ok(page) => page,
                Err(Error::Compacted { .. }) if at != 0 => return Ok(None),
                // Large values: fewer of them at once.
                Err(Error::TooLarge { .. }) if limit > 1 => {
                    limit /= 10;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if at == 0 {
                at = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            entries.extend(page.kvs().iter().map(|pair| self.entry(pair)));
            match page.kvs().last() {
                Some(last) if page.more() => from = [last.key(), &[0]].concat(),
                _ => return Ok(Some(Listing { entries, revision: revision(at) })),
            }
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    fn location(&self) -> String {
        self.shared.location().into()
    }

    async fn get(&self, key: &[u8]) -> Result<Option<Versioned>> {
        check_key(key)?;
        let full = self.shared.full(key);
        let answer = self.shared.call(Kind::Repeatable, |mut client| {
            let full = full.clone();
            async move { client.get(full, None).await }
        });
        Ok(answer.await?.kvs().first().map(|pair| self.shared.entry(pair)))
    }

    async fn list(&self, prefix: &[u8]) -> Result<Listing> {
        let listing = async {
            loop {
                if let Some(listing) = self.shared.list_once(prefix).await? {
                    return Ok(listing);
                }
            }
        };
        // Every page has the whole deadline; a listing has it for all of its pages and a little patience.
        let timeout = self.shared.timeout * 4;
        let late = || Error::unavailable(self.shared.location(), format!("no complete listing within {timeout:?}"));
        tokio::time::timeout(timeout, listing).await.unwrap_or_else(|_| Err(late()))
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome> {
        check_txn(&compares, &ops)?;
        let shared = &self.shared;
        let lease = ops.iter().find_map(|op| if let Op::Put { lease, .. } = op { *lease } else { None });
        let compares: Vec<_> = compares
            .iter()
            .map(|compare| {
                let revision = i64::try_from(compare.revision.0).unwrap_or(i64::MAX);
                etcd_client::Compare::mod_revision(shared.full(&compare.key), CompareOp::Equal, revision)
            })
            .collect();
        let ops: Vec<_> = ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value, lease } => {
                    let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                    TxnOp::put(shared.full(key), value.to_vec(), options)
                }
                Op::Delete { key } => TxnOp::delete(shared.full(key), None),
            })
            .collect();
        let txn = Txn::new().when(compares).and_then(ops);
        let answer = shared.call(Kind::Txn, |mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        let answer = answer.await.map_err(|error| match (error, lease) {
            (Error::LeaseEnded { .. }, Some(lease)) => Error::LeaseEnded { lease },
            (error, _) => error,
        })?;
        let at = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(TxnOutcome { succeeded: answer.succeeded(), revision: revision(at) })
    }

    fn watch(&self, prefix: &[u8], from: Revision) -> Watch {
        Watch::new(prefix, from, Box::new(EtcdSource::new(self.shared.clone())))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        check_ttl(ttl)?;
        let seconds = ttl.as_millis().div_ceil(1000) as i64;
        let answer =
            self.shared.call(Kind::Repeatable, |mut client| async move { client.lease_grant(seconds, None).await });
        let answer = answer.await?;
        Ok(Lease { id: LeaseId(answer.id()), ttl: Duration::from_secs(answer.ttl().max(seconds) as u64) })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        let answer = self.shared.call(Kind::Repeatable, |mut client| async move {
            match client.lease_keep_alive(lease.0).await {
                Ok(_) => Ok(true),
                // The client's word for an answer with no time left.
                Err(etcd_client::Error::LeaseKeepAliveError(what)) if what == "lease not found" => Ok(false),
                Err(error) => Err(error),
            }
        });
        if answer.await? { Ok(()) } else { Err(Error::LeaseEnded { lease }) }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        let answer = self.shared.call(Kind::Repeatable, |mut client| async move { client.lease_revoke(lease.0).await });
        match answer.await {
            Ok(_) | Err(Error::LeaseEnded { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or_default())
}

/// The first key after all that begin with a prefix. The prefix is a text that is not empty, so there is one.
fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 255 {
            end.push(last + 1);
            break;
        }
    }
    end
}
