//! Records and transactions of the machines, in the cluster's store.

use virtward_cluster::{Compare, Error, Op, Revision, Store};
use virtward_decide::ha::{
    Answer, HostId, Txn, View, VmId, pair,
    record::{HostPhase, HostRecord, PREFIX, host_key},
    txn::{Change, Expect},
};

/// Definitions of protected VMs, beside the records, as they are large and seldom read.
const XML_PREFIX: &str = "/ha-xml/";

/// Key of a protected VM's definition.
pub fn xml_key(vm: VmId) -> String {
    format!("{XML_PREFIX}{vm}")
}

/// All records, no older than this call.
pub async fn view(store: &dyn Store) -> Result<View, Error> {
    let listing = store.list(PREFIX.as_bytes()).await?;
    let mut view = View { revision: listing.revision.0, ..View::default() };
    for entry in &listing.entries {
        view.insert(&String::from_utf8_lossy(&entry.key), &entry.value, entry.revision.0);
    }
    Ok(view)
}

fn compare(expect: &Expect) -> Compare {
    match expect {
        Expect::At { key, revision } => Compare::at(key.clone(), Revision(*revision)),
        Expect::Absent { key } => Compare::absent(key.clone()),
    }
}

fn op(change: &Change) -> Op {
    match change {
        Change::Put { key, value } => Op::put(key.clone(), value.clone()),
        Change::Delete { key } => Op::delete(key.clone()),
    }
}

/// The host that a transaction puts a proof about, if it does.
pub(super) fn proved(txn: &Txn) -> Option<HostId> {
    txn.changes.iter().find_map(|change| {
        let Change::Put { key, .. } = change else { return None };
        let (host, _) = key.strip_prefix(PREFIX)?.strip_prefix("proof/")?.rsplit_once('/')?;
        Some(HostId::from(host))
    })
}

/// Whether the store says now that an epoch of a host is still to be proved over. No answer is no yes: without the store
/// no proof could be written.
pub(super) async fn is_being_fenced(store: &dyn Store, host: &HostId, epoch: u64) -> bool {
    let Ok(Some(entry)) = store.get(host_key(host).as_bytes()).await else { return false };
    let record = serde_json::from_slice::<HostRecord>(&entry.value);
    record.is_ok_and(|record| record.phase == HostPhase::Fencing && record.ended() == Some(epoch))
}

/// Lets the standby of a VM's pair take over, if it can now.
pub async fn switch(store: &dyn Store, vm: VmId, why: &str) -> Result<(), String> {
    const TRIES: usize = 4;
    for _ in 0..TRIES {
        let view = view(store).await.map_err(|error| error.to_string())?;
        let (key, pair) = view.pair_of(vm).ok_or("there is no standby")?;
        if pair.value.active != vm {
            return Err("it is not the active one of its pair".into());
        }
        let txn = pair::switch(&view, key, why).map_err(|unfit| unfit.to_string())?;
        match perform(store, &txn).await {
            Answer::Done { .. } => return Ok(()),
            // A heartbeat or a note about one of both came between.
            Answer::Refused => {}
            Answer::Unavailable | Answer::Unknown => return Err("the state store did not say that it was done".into()),
        }
    }
    Err("their records changed again and again".into())
}

/// Performs a transaction, once.
pub async fn perform(store: &dyn Store, txn: &Txn) -> Answer {
    let outcome = store.txn(txn.expects.iter().map(compare).collect(), txn.changes.iter().map(op).collect()).await;
    match outcome {
        Ok(outcome) if outcome.succeeded => Answer::Done { revision: outcome.revision.0 },
        Ok(_) => Answer::Refused,
        Err(Error::Indeterminate { .. }) => Answer::Unknown,
        Err(error) => {
            tracing::debug!(%error, "a transaction of high availability did not happen");
            Answer::Unavailable
        }
    }
}
