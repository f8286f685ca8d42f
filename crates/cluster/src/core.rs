//! The state machine of a store on one machine: what a transaction does, which leases are over, what watches see.
//!
//! Pure: no clock, no I/O. [`MemStore`](crate::MemStore) applies what it decides at once, the embedded store after it
//! is in the file. Invariants: `revision` is that of the newest change; the log holds every change after `compacted`,
//! in order; every leased key is known to its lease.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;

use crate::{
    error::{Error, Result},
    store::{Compare, LeaseId, Listing, Op, Revision, TxnOutcome, Versioned},
    watch::{Change, Changes},
};

/// How much history is kept for watches that fall behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct History {
    /// Most transactions.
    pub transactions_max: usize,
    /// Most bytes of keys and values.
    pub bytes_max: usize,
}

impl Default for History {
    fn default() -> Self {
        Self { transactions_max: 10_000, bytes_max: 16 << 20 }
    }
}

/// Where an empty store stands, as a new etcd does.
pub(crate) const FIRST: Revision = Revision(1);

/// What a transaction comes to.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Nothing changes.
    Settled(TxnOutcome),
    /// This changes.
    Commit(Changes),
}

#[derive(Debug)]
struct LeaseState {
    ttl: Duration,
    ends: Duration,
    keys: BTreeSet<Bytes>,
}

/// All of a store's state.
#[derive(Debug)]
pub(crate) struct Core {
    revision: Revision,
    compacted: Revision,
    entries: BTreeMap<Bytes, Versioned>,
    log: VecDeque<Changes>,
    log_bytes: usize,
    leases: BTreeMap<LeaseId, LeaseState>,
    history: History,
}

impl Core {
    /// Empty.
    pub(crate) fn new(history: History) -> Self {
        Self::restored(history, FIRST, FIRST, Vec::new(), VecDeque::new())
    }

    /// As it was saved.
    pub(crate) fn restored(
        history: History,
        revision: Revision,
        compacted: Revision,
        entries: Vec<Versioned>,
        log: VecDeque<Changes>,
    ) -> Self {
        let entries = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        let log_bytes = log.iter().map(size).sum();
        Self { revision, compacted, entries, log, log_bytes, leases: BTreeMap::new(), history }
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn compacted(&self) -> Revision {
        self.compacted
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<&Versioned> {
        self.entries.get(key)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Versioned> {
        self.entries.values()
    }

    pub(crate) fn list(&self, prefix: &[u8]) -> Listing {
        let from = Bytes::copy_from_slice(prefix);
        let entries = self.entries.range(from..).map(|(_, entry)| entry);
        let entries = entries.take_while(|entry| entry.key.starts_with(prefix)).cloned().collect();
        Listing { entries, revision: self.revision }
    }

    /// What a checked transaction would do now.
    pub(crate) fn decide(&self, compares: &[Compare], ops: &[Op]) -> Result<Decision> {
        let at = |key: &Bytes| self.entries.get(key).map_or(Revision::default(), |entry| entry.revision);
        if !compares.iter().all(|compare| at(&compare.key) == compare.revision) {
            return Ok(Decision::Settled(TxnOutcome { succeeded: false, revision: self.revision }));
        }
        let revision = self.revision.next();
        let mut changes = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Put { lease: Some(lease), .. } if !self.leases.contains_key(lease) => {
                    return Err(Error::LeaseEnded { lease: *lease });
                }
                Op::Put { key, value, lease } => changes.push(Change::Put(Versioned {
                    key: key.clone(),
                    value: value.clone(),
                    revision,
                    lease: *lease,
                })),
                Op::Delete { key } if self.entries.contains_key(key) => {
                    changes.push(Change::Delete { key: key.clone() });
                }
                Op::Delete { .. } => {}
            }
        }
        if changes.is_empty() {
            return Ok(Decision::Settled(TxnOutcome { succeeded: true, revision: self.revision }));
        }
        changes.sort_by(|a, b| a.key().cmp(b.key()));
        Ok(Decision::Commit(Changes { revision, changes }))
    }

    /// Carries out what was decided on this very state, and forgets history beyond its bounds.
    pub(crate) fn apply(&mut self, commit: Changes) {
        debug_assert!(commit.revision > self.revision);
        for change in &commit.changes {
            let old = match change {
                Change::Put(entry) => self.entries.insert(entry.key.clone(), entry.clone()),
                Change::Delete { key } => self.entries.remove(key),
            };
            if let Some(Versioned { key, lease: Some(lease), .. }) = old
                && let Some(state) = self.leases.get_mut(&lease)
            {
                state.keys.remove(&key);
            }
            if let Change::Put(Versioned { key, lease: Some(lease), .. }) = change
                && let Some(state) = self.leases.get_mut(lease)
            {
                state.keys.insert(key.clone());
            }
        }
        self.revision = commit.revision;
        self.log_bytes += size(&commit);
        self.log.push_back(commit);
        // The newest stays in any case: who waited for it may be about to read it.
        while self.log.len() > 1
            && (self.log.len() > self.history.transactions_max || self.log_bytes > self.history.bytes_max)
        {
            self.forget_oldest();
        }
    }

    /// The part of the log that another commit would push out, oldest first.
    pub(crate) fn doomed_by<'a>(&'a self, commit: &Changes) -> impl Iterator<Item = &'a Changes> {
        let (mut len, mut bytes) = (self.log.len() + 1, self.log_bytes + size(commit));
        self.log.iter().take_while(move |old| {
            let over = len > self.history.transactions_max || bytes > self.history.bytes_max;
            len -= 1;
            bytes -= size(old);
            over
        })
    }

    fn forget_oldest(&mut self) {
        if let Some(old) = self.log.pop_front() {
            self.log_bytes -= size(&old);
            self.compacted = old.revision;
        }
    }

    /// Forgets all history.
    pub(crate) fn compact(&mut self) {
        self.log.clear();
        self.log_bytes = 0;
        self.compacted = self.revision;
    }

    /// The first changes at `from` or later that touch the prefix; none if there are none yet.
    pub(crate) fn changes_since(&self, prefix: &[u8], from: Revision) -> Result<Option<Changes>> {
        if from <= self.compacted && self.compacted > FIRST {
            return Err(Error::Compacted { oldest: self.compacted.next() });
        }
        let start = self.log.partition_point(|changes| changes.revision < from);
        Ok(self.log.range(start..).find_map(|all| {
            let touched = all.changes.iter().filter(|change| change.key().starts_with(prefix));
            let changes: Vec<_> = touched.cloned().collect();
            (!changes.is_empty()).then_some(Changes { revision: all.revision, changes })
        }))
    }

    pub(crate) fn grant(&mut self, lease: LeaseId, ttl: Duration, now: Duration) {
        self.leases.insert(lease, LeaseState { ttl, ends: now + ttl, keys: BTreeSet::new() });
    }

    pub(crate) fn keep_alive(&mut self, lease: LeaseId, now: Duration) -> Result<()> {
        let state = self.leases.get_mut(&lease).ok_or(Error::LeaseEnded { lease })?;
        state.ends = now + state.ttl;
        Ok(())
    }

    /// What ending a lease deletes, if that is anything. Apply it, then [`Core::end`] the lease.
    pub(crate) fn ending(&self, lease: LeaseId) -> Option<Changes> {
        let state = self.leases.get(&lease)?;
        let changes: Vec<_> = state.keys.iter().map(|key| Change::Delete { key: key.clone() }).collect();
        (!changes.is_empty()).then(|| Changes { revision: self.revision.next(), changes })
    }

    pub(crate) fn end(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
    }

    /// Lets a lease that is over, and whose keys cannot be deleted now, be found over again later.
    pub(crate) fn postpone(&mut self, lease: LeaseId, until: Duration) {
        if let Some(state) = self.leases.get_mut(&lease) {
            state.ends = until;
        }
    }

    /// The lease that is over longest.
    pub(crate) fn expired(&self, now: Duration) -> Option<LeaseId> {
        let over = self.leases.iter().filter(|(_, state)| state.ends <= now);
        over.min_by_key(|(id, state)| (state.ends, **id)).map(|(id, _)| *id)
    }

    /// When the next lease ends.
    pub(crate) fn next_expiry(&self) -> Option<Duration> {
        self.leases.values().map(|state| state.ends).min()
    }
}

/// A fresh name for a lease: positive, as etcd wants them.
pub(crate) fn new_lease_id() -> Result<LeaseId> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| Error::unavailable("(random numbers)", error.to_string()))?;
    Ok(LeaseId((i64::from_le_bytes(bytes) & i64::MAX).max(1)))
}

fn size(changes: &Changes) -> usize {
    let each = changes.changes.iter().map(|change| match change {
        Change::Put(entry) => entry.key.len() + entry.value.len(),
        Change::Delete { key } => key.len(),
    });
    each.sum::<usize>() + 32
}
