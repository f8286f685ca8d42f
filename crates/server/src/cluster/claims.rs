//! One operation at a time per VM, wherever in the cluster it runs: the arbiter's table over claims in the state store.
//!
//! ```text
//! acquire ─► nobody is in the way ─────────► acquired
//!         ─► the table says wait ──────────► waits: ask again when something changed
//!         ─► the table says cancel other ──► the other's claim is marked; its daemon cancels it; ask again
//!         ─► the table says refuse ────────► refused
//! ```
//!
//! All claims on a VM are in one record that is changed by compare-and-swap, so two daemons never both succeed. A claim
//! belongs to one start of one daemon: when that daemon starts anew, or its node is removed, the claim is void. A daemon
//! that merely does not answer keeps its claims; whoever *knows* that a host is gone (it was fenced) says so with
//! [`Claims::void_node`]. Jobs claim by themselves when they begin; others (failover, say) use [`Claims::acquire`].

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;
use virtward_api::{Code, Problem};
use virtward_cluster::{Compare, Op, Revision};
use virtward_decide::arbiter::{self, Operation, Ruling};
use virtward_engine::Cancel;

use super::nodes::{Nodes, node_key};
use crate::{
    failures::{self, Result},
    kv::{self, Kv},
    table::Table,
};

/// Tries against others who change the same record.
const TRIES: usize = 16;
/// Between two looks when no news comes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Who may do what to a VM now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// What.
    pub operation: Operation,
    /// Who: unique in the cluster, `job:ID` for jobs.
    pub holder: String,
    /// The node whose daemon does it.
    pub node: String,
    /// The start of that daemon.
    pub boot: Uuid,
    /// Since when.
    pub since: Timestamp,
    /// It is to stop, for this reason.
    #[serde(default)]
    pub cancel: Option<String>,
}

/// All claims on a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Oldest first.
    pub claims: Vec<Claim>,
}

/// What became of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is claimed; release it at the end.
    Acquired,
    /// Something else goes on first.
    Waits {
        /// What.
        operation: Operation,
        /// Who does it.
        holder: String,
    },
    /// Something else was told to stop, and has not yet.
    Cancelling {
        /// What.
        operation: Operation,
        /// Who does it.
        holder: String,
    },
    /// It may not be done, and is not kept for later.
    Refused {
        /// Why.
        reason: String,
    },
}

/// A change of the claims on one VM that is to be part of a transaction.
pub struct Draft {
    vm: Uuid,
    next: Held,
    /// Hold if nobody else changed them, and the nodes whose claims are void are what they are known to be here.
    pub compares: Vec<Compare>,
    /// The change.
    pub op: Op,
}

/// All claims.
pub struct Claims {
    kv: Kv,
    nodes: Arc<Nodes>,
    /// By VM.
    pub table: Table<Uuid, Held>,
    /// How those of this daemon are told to stop.
    stops: Mutex<HashMap<String, Cancel>>,
    changed: Notify,
}

fn key(vm: Uuid) -> String {
    format!("/v1/claims/{vm}")
}

/// The holder's name of a job.
pub fn of_job(job: Uuid) -> String {
    format!("job:{job}")
}

impl Claims {
    /// Those of the state store.
    pub async fn load(kv: Kv, nodes: Arc<Nodes>) -> Result<Self> {
        let table = Table::load(&kv, "/v1/claims/").await?;
        Ok(Self { kv, nodes, table, stops: Mutex::default(), changed: Notify::new() })
    }

    fn stops(&self) -> std::sync::MutexGuard<'_, HashMap<String, Cancel>> {
        self.stops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claims on a VM that count.
    pub fn on(&self, vm: Uuid) -> Vec<Claim> {
        let held = self.table.get(&vm).map(|held| held.claims.clone()).unwrap_or_default();
        held.into_iter().filter(|claim| !self.nodes.is_void(&claim.node, claim.boot)).collect()
    }

    /// Why a holder was told to stop, if it was.
    pub fn told_to_stop(&self, vm: Uuid, holder: &str) -> Option<String> {
        self.on(vm).into_iter().find(|claim| claim.holder == holder)?.cancel
    }

    fn draft(&self, vm: Uuid, claims: Vec<Claim>) -> Result<Draft> {
        let mut compares = vec![self.table.unchanged(&vm, &key(vm))];
        let held = self.table.get(&vm).map(|held| held.claims.clone()).unwrap_or_default();
        let void = held.into_iter().filter(|claim| claim.node != self.nodes.me.name);
        let void = void.filter(|claim| self.nodes.is_void(&claim.node, claim.boot)).map(|claim| claim.node);
        // What is known of a node may be older than its claim.
        let void: BTreeSet<String> = void.collect();
        compares.extend(void.iter().map(|node| self.nodes.records.unchanged(node, &node_key(node))));
        let next = Held { claims };
        let op = match next.claims.is_empty() {
            true => Op::delete(key(vm)),
            false => kv::put(&key(vm), &next)?,
        };
        Ok(Draft { vm, next, compares, op })
    }

    /// What the arbiter says of a wish as far as is known here, and the change that grants it if it may be granted, or
    /// tells others to stop if they must.
    pub fn wish(&self, vm: Uuid, operation: Operation, holder: &str) -> Result<(Answer, Option<Draft>)> {
        let mut claims = self.on(vm);
        if claims.iter().any(|claim| claim.holder == holder) {
            return Ok((Answer::Acquired, None));
        }
        let running: Vec<Operation> = claims.iter().map(|claim| claim.operation).collect();
        let (ruling, by) = arbiter::admit(&running, operation);
        let other = claims.iter().find(|claim| Some(claim.operation) == by);
        let other = other.map(|claim| (claim.operation, claim.holder.clone()));
        match (ruling, other) {
            (Ruling::Run, _) | (_, None) => {
                claims.push(Claim {
                    operation,
                    holder: holder.to_owned(),
                    node: self.nodes.me.name.clone(),
                    boot: self.nodes.me.boot,
                    since: Timestamp::now(),
                    cancel: None,
                });
                Ok((Answer::Acquired, Some(self.draft(vm, claims)?)))
            }
            (Ruling::Wait, Some((operation, holder))) => Ok((Answer::Waits { operation, holder }, None)),
            (Ruling::Refuse, Some((by, _))) => Ok((Answer::Refused { reason: arbiter::reason(by, operation) }, None)),
            (Ruling::CancelOther, Some((by, of))) => {
                let mut is_new = false;
                for claim in &mut claims {
                    let gives_way = arbiter::rule(claim.operation, operation) == Ruling::CancelOther;
                    if gives_way && claim.cancel.is_none() {
                        claim.cancel = Some(format!("a {operation} of the VM goes first"));
                        is_new = true;
                    }
                }
                let draft = is_new.then(|| self.draft(vm, claims)).transpose()?;
                Ok((Answer::Cancelling { operation: by, holder: of }, draft))
            }
        }
    }

    /// The change that gives a claim back; none if there is nothing to give back.
    pub fn giving_back(&self, vm: Uuid, holder: &str) -> Result<Option<Draft>> {
        let Some(held) = self.table.get(&vm) else { return Ok(None) };
        if !held.claims.iter().any(|claim| claim.holder == holder) {
            return Ok(None);
        }
        let rest = self.on(vm).into_iter().filter(|claim| claim.holder != holder).collect();
        self.draft(vm, rest).map(Some)
    }

    /// A draft's transaction succeeded.
    pub fn done(&self, draft: Draft, revision: Revision) {
        match draft.next.claims.is_empty() {
            true => self.table.delete(&draft.vm, revision),
            false => _ = self.table.put(draft.vm, revision, draft.next),
        }
        self.changed.notify_waiters();
    }

    /// Reads a VM's claims anew: what is known here is not what is there.
    pub async fn refresh(&self, vm: Uuid) -> Result<()> {
        let listing = self.kv.listing(&key(vm)).await?;
        match listing.entries.first() {
            Some(entry) => _ = self.table.follow(&entry.key, entry.revision, Some(&entry.value)),
            None => self.table.delete(&vm, listing.revision),
        }
        let held = self.table.get(&vm).map(|held| held.claims.clone()).unwrap_or_default();
        let others: BTreeSet<String> = held.into_iter().map(|claim| claim.node).collect();
        for node in others.into_iter().filter(|node| *node != self.nodes.me.name) {
            self.nodes.refresh(&node).await?;
        }
        Ok(())
    }

    /// How a holder of this daemon is told to stop.
    pub fn on_stop(&self, holder: &str, cancel: Cancel) {
        self.stops().insert(holder.to_owned(), cancel);
    }

    /// The holder has ended.
    pub fn forget(&self, holder: &str) {
        self.stops().remove(holder);
    }

    /// Wishes to do something to a VM. Returns at once; see [`Answer`].
    pub async fn acquire(&self, vm: Uuid, operation: Operation, holder: &str) -> Result<Answer> {
        for _ in 0..TRIES {
            let (answer, draft) = self.wish(vm, operation, holder)?;
            let Some(draft) = draft else { return Ok(answer) };
            match self.kv.commit(draft.compares.clone(), vec![draft.op.clone()]).await? {
                Some(revision) => {
                    self.done(draft, revision);
                    self.told(vm);
                    return Ok(answer);
                }
                None => self.refresh(vm).await?,
            }
        }
        Err(failures::changed("the claims on the VM"))
    }

    /// The same, waiting for what is in the way as long as `within`. `stop` is raised if something else goes first.
    pub async fn acquire_within(
        &self,
        vm: Uuid,
        operation: Operation,
        holder: &str,
        within: Duration,
        stop: &Cancel,
    ) -> Result<()> {
        let until = tokio::time::Instant::now() + within;
        self.on_stop(holder, stop.clone());
        loop {
            let news = self.changed.notified();
            let in_the_way = match self.acquire(vm, operation, holder).await {
                Ok(Answer::Acquired) => return Ok(()),
                Ok(Answer::Refused { reason }) => {
                    self.forget(holder);
                    return Err(Problem::new(Code::Busy, reason));
                }
                Ok(Answer::Waits { operation, .. } | Answer::Cancelling { operation, .. }) => operation,
                Err(problem) => {
                    self.forget(holder);
                    return Err(problem);
                }
            };
            let now = tokio::time::Instant::now();
            if now >= until || stop.is_cancelled() {
                self.forget(holder);
                let code = if stop.is_cancelled() { Code::Cancelled } else { Code::Busy };
                return Err(Problem::new(code, format!("a {in_the_way} of the VM is still under way")));
            }
            tokio::select! {
                () = news => {}
                () = stop.cancelled() => {}
                () = tokio::time::sleep_until(until.min(now + LOOK_EVERY)) => {}
            }
            // News may be late, or lost with the store's contact.
            if let Err(problem) = self.refresh(vm).await {
                tracing::debug!(%problem, "the claims on a VM are not known");
            }
        }
    }

    /// Gives a claim back. Fine if there is none.
    pub async fn release(&self, vm: Uuid, holder: &str) -> Result<()> {
        self.forget(holder);
        for _ in 0..TRIES {
            let Some(draft) = self.giving_back(vm, holder)? else { return Ok(()) };
            match self.kv.commit(draft.compares.clone(), vec![draft.op.clone()]).await? {
                Some(revision) => {
                    self.done(draft, revision);
                    return Ok(());
                }
                None => self.refresh(vm).await?,
            }
        }
        Err(failures::changed("the claims on the VM"))
    }

    /// Takes away every claim of a node's daemon. Only for who knows that nothing of it runs any more: the host was
    /// fenced.
    pub async fn void_node(&self, node: &str) -> Result<()> {
        let holds = |held: &Held| held.claims.iter().any(|claim| claim.node == node);
        for (vm, _) in self.table.all().into_iter().filter(|(_, held)| holds(held)) {
            for _ in 0..TRIES {
                let rest: Vec<Claim> = self.on(vm).into_iter().filter(|claim| claim.node != node).collect();
                let draft = self.draft(vm, rest)?;
                match self.kv.commit(draft.compares.clone(), vec![draft.op.clone()]).await? {
                    Some(revision) => {
                        self.done(draft, revision);
                        break;
                    }
                    None => self.refresh(vm).await?,
                }
            }
        }
        Ok(())
    }

    /// Stops those of this daemon that were told to.
    pub fn told(&self, vm: Uuid) {
        let me = &self.nodes.me;
        for claim in self.on(vm) {
            if claim.cancel.is_none() || claim.node != me.name || claim.boot != me.boot {
                continue;
            }
            if let Some(stop) = self.stops().get(&claim.holder) {
                stop.cancel();
            }
        }
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use virtward_cluster::MemStore;

    use super::{super::nodes::Me, *};

    /// Claims as the daemon of a node that just started sees them.
    async fn node(kv: &Kv, name: &str) -> Claims {
        let me = Me { name: name.into(), boot: Uuid::now_v7() };
        let nodes = Nodes::load(kv.clone(), me, false).await.unwrap();
        nodes.register(None, Timestamp::now()).await.unwrap();
        Claims::load(kv.clone(), Arc::new(nodes)).await.unwrap()
    }

    #[tokio::test]
    async fn one_operation_of_a_vm_across_nodes() {
        let kv = Kv::new(Arc::new(MemStore::new()));
        let vm = Uuid::now_v7();
        let one = node(&kv, "h1").await;
        let two = node(&kv, "h2").await;
        assert_eq!(one.acquire(vm, Operation::Backup, "a").await.unwrap(), Answer::Acquired);
        assert_eq!(one.acquire(vm, Operation::Backup, "a").await.unwrap(), Answer::Acquired, "asked again");
        // What the other knows is old, and it must not matter.
        let waits = Answer::Waits { operation: Operation::Backup, holder: "a".into() };
        assert_eq!(two.acquire(vm, Operation::Migrate, "b").await.unwrap(), waits);
        assert!(matches!(two.acquire(vm, Operation::Balance, "c").await.unwrap(), Answer::Refused { .. }));
        one.release(vm, "a").await.unwrap();
        two.refresh(vm).await.unwrap();
        assert_eq!(two.acquire(vm, Operation::Migrate, "b").await.unwrap(), Answer::Acquired);
        two.release(vm, "b").await.unwrap();
        two.release(vm, "b").await.unwrap();
        assert!(kv.get::<Held>(&key(vm)).await.unwrap().is_none(), "nothing is left behind");
    }

    #[tokio::test]
    async fn what_gives_way_is_told_to_stop_and_ends_first() {
        let kv = Kv::new(Arc::new(MemStore::new()));
        let vm = Uuid::now_v7();
        let (one, two) = (node(&kv, "h1").await, node(&kv, "h2").await);
        let stop = Cancel::default();
        one.on_stop("a", stop.clone());
        assert_eq!(one.acquire(vm, Operation::Backup, "a").await.unwrap(), Answer::Acquired);
        let cancelling = Answer::Cancelling { operation: Operation::Backup, holder: "a".into() };
        assert_eq!(two.acquire(vm, Operation::Drain, "b").await.unwrap(), cancelling);
        assert_eq!(two.acquire(vm, Operation::Drain, "b").await.unwrap(), cancelling, "it has not ended yet");
        assert!(!stop.is_cancelled());
        one.refresh(vm).await.unwrap();
        one.told(vm);
        assert!(stop.is_cancelled() && one.told_to_stop(vm, "a").is_some());
        one.release(vm, "a").await.unwrap();
        let give_up = Cancel::default();
        two.acquire_within(vm, Operation::Drain, "b", Duration::from_secs(5), &give_up).await.unwrap();
    }

    #[tokio::test]
    async fn claims_of_a_daemon_that_started_anew_are_void_and_those_of_a_silent_one_are_not() {
        let kv = Kv::new(Arc::new(MemStore::new()));
        let vm = Uuid::now_v7();
        let one = node(&kv, "h1").await;
        one.acquire(vm, Operation::Backup, "a").await.unwrap();
        let two = node(&kv, "h2").await;
        assert!(matches!(two.acquire(vm, Operation::Migrate, "b").await.unwrap(), Answer::Waits { .. }));
        let again = node(&kv, "h1").await;
        assert_eq!(again.acquire(vm, Operation::Backup, "a2").await.unwrap(), Answer::Acquired);
        let two = node(&kv, "h2").await;
        assert_eq!(two.on(vm).len(), 1, "{:?}", two.on(vm));
        two.void_node("h1").await.unwrap();
        assert_eq!(two.acquire(vm, Operation::Failover, "b").await.unwrap(), Answer::Acquired);
    }
}
