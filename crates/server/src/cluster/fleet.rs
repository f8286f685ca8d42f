//! Every host and every VM of the cluster, each VM once: this daemon's own inventory and what the others published.
//!
//! A VM is its UUID. After a migration a definition that is shut off may be left behind on the host that it came from: of
//! several hosts that list a VM, the one where it is active counts; of several where it is not, the one where it changed
//! last. A VM that is active on two hosts is a disaster that is told as one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_api::{Host, HostState};
use virtward_engine::{
    collect::Details,
    guest::GuestFacts,
    reconcile::inventory::{self, Inventory, VmUsage, VmView},
};
use virtward_model::{Vm, VmState};

use super::nodes::Nodes;
use crate::{failures::Result, kv::Kv, moves::Reach, table::Table};

/// A host as its daemon published it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// The node whose daemon it is.
    pub node: String,
    /// The start of that daemon.
    pub boot: Uuid,
    /// As it saw it.
    pub host: Host,
    /// When it published it.
    pub at: Timestamp,
    /// The repositories of its configuration, with the identity of each that could be opened.
    #[serde(default)]
    pub repositories: BTreeMap<String, Option<String>>,
    /// It has looked at all of its VMs.
    #[serde(default)]
    pub is_complete: bool,
    /// How other hosts reach its libvirt.
    #[serde(default)]
    pub reach: Option<Reach>,
}

/// A VM as a daemon published it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub struct VmRecord {
    /// What is known of it.
    pub view: Arc<VmView>,
    /// When its state was last another one.
    pub changed: Timestamp,
}

/// A VM's record as it is written.
#[derive(Serialize, Deserialize)]
struct Wire {
    vm: Vm,
    details: Details,
    #[serde(default)]
    usage: Option<VmUsage>,
    #[serde(default)]
    agent: Option<bool>,
    #[serde(default)]
    guest: Option<GuestFacts>,
    changed: Timestamp,
}

impl From<Wire> for VmRecord {
    fn from(wire: Wire) -> Self {
        let Wire { vm, details, usage, agent, guest, changed } = wire;
        let (details, guest) = (Arc::new(details), guest.map(Arc::new));
        Self { view: Arc::new(VmView { vm, details, usage, agent, guest }), changed }
    }
}

impl From<VmRecord> for Wire {
    fn from(record: VmRecord) -> Self {
        let VmView { vm, details, usage, agent, guest } = VmView::clone(&record.view);
        let (details, guest) = (Details::clone(&details), guest.as_deref().cloned());
        Self { vm, details, usage, agent, guest, changed: record.changed }
    }
}

/// A VM with where it is.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The node whose daemon takes care of it.
    pub node: String,
    /// Its host.
    pub host: String,
    /// What is known of that host.
    pub host_state: HostState,
    /// What is known of the VM; as last seen if the host is not up.
    pub view: Arc<VmView>,
    /// Other nodes that list it.
    pub also_on: Vec<String>,
}

/// Everything, at one instant.
#[derive(Debug, Default)]
pub struct Fleet {
    /// Hosts, by node.
    pub hosts: BTreeMap<String, FleetHost>,
    /// VMs, each once.
    pub vms: BTreeMap<Uuid, Placed>,
    /// VMs that are active on more than one host, with these.
    pub twice: BTreeMap<Uuid, BTreeSet<String>>,
}

/// A host in short.
#[derive(Clone, Debug, PartialEq)]
pub struct FleetHost {
    /// Its name.
    pub name: String,
    /// What is known of it.
    pub state: HostState,
    /// Its VMs are known.
    pub is_complete: bool,
}

impl Fleet {
    /// A VM by UUID, or by name.
    pub fn find(&self, name: &str) -> Option<&Placed> {
        let by_uuid = name.parse::<Uuid>().ok().and_then(|uuid| self.vms.get(&uuid));
        by_uuid.or_else(|| self.by_name(name))
    }

    /// A VM by name: names are unique on a host only, and a VM that is active is meant rather than another.
    pub fn by_name(&self, name: &str) -> Option<&Placed> {
        let named = self.vms.values().filter(|placed| placed.view.vm.name == name);
        named.max_by_key(|placed| placed.view.vm.state.is_active())
    }

    /// The node of a host.
    pub fn node_of(&self, host: &str) -> Option<&str> {
        self.hosts.iter().find(|(node, of)| of.name == host || *node == host).map(|(node, _)| node.as_str())
    }
}

/// What fleets are made of.
pub struct Registry {
    nodes: Arc<Nodes>,
    inventory: Arc<Inventory>,
    /// Hosts, by node.
    pub hosts: Table<String, HostRecord>,
    /// VMs, by node and UUID.
    pub vms: Table<(String, Uuid), VmRecord>,
    changed: Mutex<BTreeSet<Uuid>>,
    generation: AtomicU64,
    made: Mutex<(u64, u64, Arc<Fleet>)>,
}

impl Registry {
    /// From the state store, and the inventory of this host.
    pub async fn load(kv: &Kv, nodes: Arc<Nodes>, inventory: Arc<Inventory>) -> Result<Self> {
        Ok(Self {
            hosts: Table::load(kv, "/v1/hosts/").await?,
            vms: Table::load(kv, "/v1/inventory/").await?,
            nodes,
            inventory,
            changed: Mutex::default(),
            generation: AtomicU64::new(1),
            made: Mutex::default(),
        })
    }

    /// Something of what others published changed, or who is there.
    pub fn touch(&self) {
        self.generation.fetch_add(1, Relaxed);
    }

    /// A VM of another host changed: those who follow are told soon, many at once.
    pub fn is_changed(&self, vm: Uuid) {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).insert(vm);
    }

    /// VMs of other hosts that changed since this was last asked.
    pub fn take_changed(&self) -> BTreeSet<Uuid> {
        std::mem::take(&mut *self.changed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everything as it is known now.
    pub fn fleet(&self) -> Arc<Fleet> {
        let generation = self.generation.load(Relaxed);
        let world = self.inventory.world();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if (made.0, made.1) != (generation, world.generation) || made.2.hosts.is_empty() {
            *made = (generation, world.generation, Arc::new(self.make(&world)));
        }
        made.2.clone()
    }

    fn make(&self, world: &inventory::World) -> Fleet {
        let me = &self.nodes.me.name;
        let mut fleet = Fleet::default();
        let own = crate::views::host_state(world.host.state);
        let (name, is_complete) = (world.host.name.clone(), world.is_complete);
        fleet.hosts.insert(me.clone(), FleetHost { name: name.clone(), state: own, is_complete });
        let place = |view: &Arc<VmView>| Placed {
            node: me.clone(),
            host: name.clone(),
            host_state: own,
            view: view.clone(),
            also_on: Vec::new(),
        };
        fleet.vms = world.vms.iter().map(|(uuid, view)| (*uuid, place(view))).collect();
        let others = self.hosts.all().into_iter().filter(|(node, _)| node != me);
        for (node, record) in others {
            let state = self.state_of(&node, &record).0;
            let host = FleetHost { name: record.host.name.clone(), state, is_complete: record.is_complete };
            fleet.hosts.insert(node, host);
        }
        if !world.is_complete {
            // Before the first look, what this host had when its daemon last ran is the best that is known.
            for ((_, uuid), row) in self.vms.all().into_iter().filter(|((node, _), _)| node == me) {
                fleet.vms.entry(uuid).or_insert_with(|| place(&row.view));
            }
        }
        // When each of this daemon's own changed is in what it published.
        let rows = self.vms.all();
        let own_changed: BTreeMap<Uuid, Timestamp> =
            rows.iter().filter(|((node, _), _)| node == me).map(|((_, uuid), row)| (*uuid, row.changed)).collect();
        let mut changed = own_changed;
        for ((node, uuid), row) in rows.iter().filter(|((node, _), _)| node != me) {
            let Some(host) = fleet.hosts.get(node) else { continue };
            let theirs = Placed {
                node: node.clone(),
                host: host.name.clone(),
                host_state: host.state,
                view: row.view.clone(),
                also_on: Vec::new(),
            };
            let at = changed.get(uuid).copied().unwrap_or(Timestamp::MIN);
            merge(&mut fleet, *uuid, theirs, row.changed, at);
            changed.entry(*uuid).and_modify(|at| *at = (*at).max(row.changed)).or_insert(row.changed);
        }
        fleet
    }

    /// What is known of a host whose daemon is another one, and why.
    pub fn state_of(&self, node: &str, record: &HostRecord) -> (HostState, Option<String>) {
        if let Some((since, why)) = self.nodes.lost_store() {
            let why = format!("the cluster's state store does not answer this daemon since {since:.0}: {why}");
            return (HostState::Unknown, Some(why));
        }
        if self.nodes.is_there(node) {
            return (record.host.state, record.host.reason.clone());
        }
        let of = self.nodes.records.get(&node.to_owned());
        let why = match of.and_then(|of| of.stopped) {
            Some(at) => format!("its daemon was stopped at {at:.0}"),
            None => format!("its daemon does not answer; it last told of itself at {:.0}", record.at),
        };
        (HostState::Unknown, Some(why))
    }

    /// Hosts of others, as the API shows them.
    pub fn other_hosts(&self) -> Vec<Host> {
        let others = self.hosts.all().into_iter().filter(|(node, _)| *node != self.nodes.me.name);
        let show = |(node, record): (String, Arc<HostRecord>)| {
            let (state, reason) = self.state_of(&node, &record);
            let seen = if state == HostState::Up { Some(record.at) } else { record.host.seen };
            Host { state, reason, seen, is_local: false, ..record.host.clone() }
        };
        others.map(show).collect()
    }
}

/// Decides which of two places of one VM counts.
fn merge(fleet: &mut Fleet, uuid: Uuid, mut theirs: Placed, theirs_changed: Timestamp, changed: Timestamp) {
    let Some(known) = fleet.vms.get_mut(&uuid) else {
        fleet.vms.insert(uuid, theirs);
        return;
    };
    let (here, there) = (known.view.vm.state, theirs.view.vm.state);
    // While it moves it is paused on the host that it moves to. What a host that is gone ran is what it ran then.
    let are_up = known.host_state == HostState::Up && theirs.host_state == HostState::Up;
    if (here, there) == (VmState::Running, VmState::Running) && are_up {
        let both = fleet.twice.entry(uuid).or_default();
        both.extend([known.host.clone(), theirs.host.clone()]);
    }
    let rank = |placed: &Placed, state: VmState, at: Timestamp| {
        (state == VmState::Running, state.is_active(), placed.host_state == HostState::Up, at)
    };
    if rank(&theirs, there, theirs_changed) > rank(known, here, changed) {
        theirs.also_on = std::mem::take(&mut known.also_on);
        theirs.also_on.push(known.host.clone());
        *known = theirs;
    } else {
        known.also_on.push(theirs.host.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(host: &str, state: VmState, host_state: HostState) -> Placed {
        let vm = Vm { name: "web1".into(), uuid: Uuid::nil(), state, disks: Vec::new() };
        let view = VmView { vm, details: Arc::default(), usage: None, agent: None, guest: None };
        Placed { node: host.into(), host: host.into(), host_state, view: Arc::new(view), also_on: Vec::new() }
    }

    fn of(places: &[(&str, VmState, HostState, i64)]) -> Fleet {
        let mut fleet = Fleet::default();
        let mut newest = Timestamp::MIN;
        for (host, state, host_state, at) in places {
            let at = Timestamp::from_second(*at).unwrap();
            merge(&mut fleet, Uuid::nil(), placed(host, *state, *host_state), at, newest);
            newest = newest.max(at);
        }
        fleet
    }

    #[test]
    fn the_host_where_a_vm_runs_counts_whatever_else_lists_it() {
        use HostState::{Unknown, Up};
        use VmState::{Running, ShutOff};
        for (places, winner, also) in [
            (vec![("h1", ShutOff, Up, 9), ("h2", Running, Up, 1)], "h2", 1),
            (vec![("h2", Running, Up, 1), ("h1", ShutOff, Up, 9)], "h2", 1),
            // It ran there when it was last seen, and nothing tells that it does not.
            (vec![("h1", ShutOff, Up, 9), ("h2", Running, Unknown, 1)], "h2", 1),
            (vec![("h1", ShutOff, Up, 1), ("h2", ShutOff, Up, 2)], "h2", 1),
            (vec![("h1", ShutOff, Unknown, 3), ("h2", ShutOff, Up, 2), ("h3", ShutOff, Up, 1)], "h2", 2),
        ] {
            let fleet = of(&places);
            let found = &fleet.vms[&Uuid::nil()];
            assert_eq!((&*found.host, found.also_on.len()), (winner, also), "{places:?}");
            assert!(fleet.twice.is_empty());
        }
        let fleet = of(&[("h1", Running, Up, 1), ("h2", Running, Up, 2)]);
        assert_eq!(fleet.twice[&Uuid::nil()].iter().map(String::as_str).collect::<Vec<_>>(), ["h1", "h2"]);
        let fleet = of(&[("h1", Running, Unknown, 1), ("h2", Running, Up, 2)]);
        assert!(fleet.twice.is_empty(), "started elsewhere after its host died");
    }
}
