//! Records and transactions of the machines, in the cluster's store.

use virtward_cluster::{Compare, Error, Op, Revision, Store};
use virtward_decide::ha::{
    Answer, HostId, Txn, View, VmId,
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
