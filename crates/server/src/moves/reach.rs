//! How the hosts of a cluster reach each other's libvirt: each says it of itself.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use virtward_api::{Code, Problem};
use virtward_cluster::ca::node_server_name;
use virtward_engine::Destination;
use virtward_hypervisor::{Hypervisor, host_of};

use crate::{
    config::Config,
    daemon::Daemon,
    failures::{self, Result},
    views::is_local,
};

/// How long another host's libvirt may take to answer.
const CONNECT_MAX: Duration = Duration::from_secs(20);

/// How others reach a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// URI of its libvirt.
    pub uri: String,
    /// Address to which memory and disks of VMs are sent; none: that of the URI.
    #[serde(default)]
    pub address: Option<String>,
    /// Its QEMU has certificates of the cluster.
    #[serde(default)]
    pub certified: bool,
}

/// How others reach this host: as it says itself, else as this daemon does if that is over the network, else over SSH at
/// the address that peers use.
pub fn own(config: &Config) -> Option<Reach> {
    let address = config.cluster.as_ref().and_then(|cluster| cluster.address.as_deref());
    let peers = address.and_then(|address| address.rsplit_once(':')).map(|(host, _)| host);
    let uri = match (&config.moves.uri, is_local(&config.connect)) {
        (Some(uri), _) => uri.clone(),
        (None, false) => config.connect.clone(),
        (None, true) => format!("qemu+ssh://{}/system", peers?),
    };
    let address = config.moves.address.clone().or_else(|| host_of(&uri).map(str::to_owned));
    let is_node = config.cluster.as_ref().is_some_and(|cluster| cluster.listen.is_some());
    Some(Reach { address, uri, certified: is_node && config.moves.certificates.is_some() })
}

/// The name that a node's QEMU shows, if it and this host's have certificates of the cluster.
pub fn certified(daemon: &Daemon, node: &str) -> Option<String> {
    let has = |reach: Option<Reach>| reach.is_some_and(|reach| reach.certified);
    let there = daemon.registry.hosts.get(&node.to_owned()).and_then(|record| record.reach.clone());
    (has(own(&daemon.config())) && has(there)).then(|| node_server_name(node))
}

/// The node of a host that a request names.
pub fn node_of(daemon: &Daemon, host: &str) -> Result<String> {
    daemon.fleet().node_of(host).map(str::to_owned).ok_or_else(|| {
        Problem::new(Code::NotFound, format!("there is no host {host}"))
            .hint("virtward cluster status (GET /api/v1/hosts) lists the hosts")
    })
}

/// Connects to a node's libvirt; to this node's it is connected already. To be closed with [`close`].
pub async fn destination(daemon: &Daemon, node: &str) -> Result<Destination> {
    let is_me = node == daemon.nodes.me.name;
    let told = match is_me {
        true => own(&daemon.config()),
        false => daemon.registry.hosts.get(&node.to_owned()).and_then(|record| record.reach.clone()),
    };
    let reach = told.ok_or_else(|| {
        Problem::new(Code::Conflict, format!("{node} does not say how its libvirt is reached by other hosts"))
            .hint("set uri in [moves] of its configuration, such as qemu+tls://kvm2/system")
    })?;
    let hypervisor = match is_me {
        true => daemon.env()?.hypervisor,
        false => connect(daemon, node, &reach.uri).await?,
    };
    Ok(Destination { hypervisor, uri: reach.uri, address: reach.address })
}

async fn connect(daemon: &Daemon, node: &str, uri: &str) -> Result<Arc<dyn Hypervisor>> {
    let hint = format!("check that this host reaches it: virsh --connect {uri} list; or set uri in [moves] on {node}");
    match tokio::time::timeout(CONNECT_MAX, daemon.others.other(uri)).await {
        Ok(Ok(hypervisor)) => Ok(hypervisor),
        Ok(Err(error)) => {
            let inner = failures::hyper(&error);
            let detail = format!("cannot reach the libvirt of {node} at {uri}: {}", inner.detail);
            Err(Problem::new(Code::HypervisorUnreachable, detail).hint(hint))
        }
        Err(_) => Err(Problem::new(
            Code::HypervisorUnreachable,
            format!("the libvirt of {node} at {uri} did not answer within {} s", CONNECT_MAX.as_secs()),
        )
        .hint(hint)),
    }
}

/// Closes connections to other nodes.
pub async fn close(daemon: &Daemon, all: impl IntoIterator<Item = (String, Destination)>) {
    for (node, to) in all {
        if node != daemon.nodes.me.name {
            to.hypervisor.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_for_memory_is_that_of_the_uri() {
        assert_eq!(host_of("qemu+ssh://root@kvm1:22/system"), Some("kvm1"));
        assert_eq!(host_of("qemu+tls://[fd00::1]:16514/system?x=y"), Some("fd00::1"));
        assert_eq!(host_of("qemu:///system"), None);
        assert_eq!(host_of("nonsense"), None);
    }
}
