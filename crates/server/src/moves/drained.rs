//! Hosts that take no VMs until they are taken into service again. `/v1/drained/NODE`.

use jiff::Timestamp;
use virtward_api::HostDrain;

use crate::{daemon::Daemon, failures::Result};

/// What a host's drain is kept under.
pub const PREFIX: &str = "/v1/drained/";

/// Why a node takes no VMs, if it takes none.
pub fn closed(daemon: &Daemon, node: &str) -> Option<String> {
    let drain = daemon.drained.get(&node.to_owned())?;
    Some(format!("{node} is drained and takes no VMs (since {:.0}, by {})", drain.since, drain.by))
}

/// From now on a node takes no VMs.
pub async fn mark(daemon: &Daemon, node: &str, by: &str) -> Result<()> {
    if daemon.drained.get(&node.to_owned()).is_some() {
        return Ok(());
    }
    let drain = HostDrain { by: by.to_owned(), since: Timestamp::now() };
    let revision = daemon.kv.put(&format!("{PREFIX}{node}"), &drain).await?;
    daemon.drained.put(node.to_owned(), revision, drain);
    Ok(())
}

/// It takes VMs again; whether it did not before.
pub async fn resume(daemon: &Daemon, node: &str) -> Result<bool> {
    let was = daemon.drained.get(&node.to_owned()).is_some();
    if let Some(revision) = daemon.kv.delete(&[format!("{PREFIX}{node}")]).await? {
        daemon.drained.delete(&node.to_owned(), revision);
    }
    Ok(was)
}
