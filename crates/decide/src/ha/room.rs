//! Whether a change leaves room for the host failures that are to be survived: the records as a world that
//! [`crate::admission`] packs, before the change and after it.
//!
//! A change is refused only for what it makes worse: with a host down already there may be no room left, and then a start
//! that takes none of it away is no reason to complain.

use std::fmt;

use virtward_model::{
    Bytes,
    world::{Failover, Host, HostName, HostState, Priority, Resources, Rule, RuleKind, Stuck, Vm, World},
};

use super::record::{Desired, HostId, HostPhase, View, VmId, VmRecord};
use crate::{
    admission::{self, Loss, Verdict},
    placement::{Request, place},
};

/// What somebody wants to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Start a VM that is off.
    Start(VmId),
    /// Move a VM to a host.
    Move(VmId, HostId),
    /// Empty a host, which takes nothing from then on.
    Drain(HostId),
    /// Give a VM so much memory, in bytes.
    Resize(VmId, u64),
}

/// Why a change is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No host has room for this VM now.
    NoHost {
        /// Its name.
        vm: String,
        /// What it needs, in bytes.
        needs: u64,
    },
    /// After the change some failures would not be survived that are survived now.
    NotCovered(Box<Verdict>),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHost { vm, needs } => write!(f, "no host has room for {vm}, which needs {} MiB", needs >> 20),
            Self::NotCovered(verdict) => match verdict.losses.first() {
                Some(loss) => write!(f, "if {} were lost then, {}", hosts(loss), stays_down(loss)),
                None => write!(f, "that {} host failures are survived could not be shown", verdict.failures),
            },
        }
    }
}

fn hosts(loss: &Loss) -> String {
    loss.failed.iter().map(|host| host.0.as_str()).collect::<Vec<_>>().join(" and ")
}

fn stays_down(loss: &Loss) -> String {
    let names: Vec<&str> = loss.lost.iter().map(|lost| lost.name.as_str()).collect();
    let why = loss.proof.as_ref().map_or_else(|| "no placement was found".into(), ToString::to_string);
    format!("{} would stay down: {why}", names.join(", "))
}

fn memory(bytes: u64) -> Resources {
    Resources { memory: Bytes(bytes), ..Resources::default() }
}

fn vm(id: VmId, record: &VmRecord) -> Vm {
    let mut vm = Vm::new(id, record.name.clone(), memory(record.policy.memory_bytes));
    // One that moves has its place where it goes.
    vm.host = record.moving_to.as_ref().or(record.owner.as_ref()).map(|owner| owner.host.0.as_str().into());
    vm.failover = true;
    // Tiers 0 to 9 are five priorities.
    vm.priority = Priority::new(record.policy.tier / 2 + 1).unwrap_or_default();
    vm.stuck = record.policy.only_on.as_ref().map(|host| Stuck::Device(format!("a place on {host} alone")));
    vm
}

/// The records as a world that placement decides on: memory of hosts and of VMs that should run.
pub fn world(view: &View) -> World {
    let mut world =
        World { failover: Failover { failures: view.switches().failures, domain_level: None }, ..World::default() };
    for (name, host) in &view.hosts {
        let host = &host.value;
        let mut made = Host::new(&name.0, memory(host.memory_bytes));
        made.state = match (host.phase, host.maintenance) {
            (HostPhase::Armed, false) if !view.closed.contains(name) => HostState::Up,
            (HostPhase::Armed, _) => HostState::Maintenance,
            _ => HostState::Down,
        };
        world.hosts.push(made);
    }
    let wanted = view.vms.iter().filter(|(_, record)| record.value.desired == Desired::Running);
    world.vms.extend(wanted.map(|(id, record)| vm(*id, &record.value)));
    let is_there = |id: &VmId| world.vms.iter().any(|vm| vm.id == *id);
    let apart = view.pairs.iter().map(|(key, pair)| (key, [pair.value.active, pair.value.standby]));
    let apart = apart.filter(|(_, both)| both.iter().all(is_there)).map(|(key, both)| Rule {
        name: format!("the pair {key}"),
        must: true,
        kind: RuleKind::Apart,
        vms: both.into(),
    });
    world.rules = apart.collect();
    world
}

/// What would not be survived once a host is empty and takes nothing.
pub fn without(view: &View, host: &HostId) -> World {
    let mut after = world(view);
    for one in after.hosts.iter_mut().filter(|one| one.name.0 == host.0) {
        one.state = HostState::Maintenance;
    }
    let leaving: Vec<VmId> = after
        .vms
        .iter()
        .filter(|vm| vm.host.as_ref().is_some_and(|at| at.0 == host.0) && vm.stuck.is_none())
        .map(|vm| vm.id)
        .collect();
    settle(&mut after, &leaving);
    after
}

/// What would not be survived once a VM has so much memory, in bytes.
pub fn resized(view: &View, id: VmId, bytes: u64) -> World {
    let mut after = world(view);
    for vm in after.vms.iter_mut().filter(|vm| vm.id == id) {
        vm.size = memory(bytes);
    }
    after
}

/// Gives VMs a host each, as far as there is room. Those that stay where they are have theirs.
fn settle(world: &mut World, vms: &[VmId]) {
    let (placement, _) = place(world, &Request::failover(vms));
    for place in placement.places {
        if let Some(vm) = world.vms.iter_mut().find(|vm| vm.id == place.vm) {
            vm.host = Some(place.host);
        }
    }
}

/// Whether a change leaves the room that is there. Nothing is refused of hosts and VMs that are not in the records.
pub fn admit(view: &View, change: &Change) -> Result<(), Refusal> {
    let before = world(view);
    let after = match change {
        Change::Drain(host) => without(view, host),
        Change::Move(id, to) => {
            let mut after = before.clone();
            for vm in after.vms.iter_mut().filter(|vm| vm.id == *id) {
                vm.host = Some(HostName::from(to.0.as_str()));
            }
            after
        }
        Change::Resize(id, bytes) => {
            let largest = before.hosts.iter().map(|host| host.capacity.memory.0).max().unwrap_or(0);
            if let Some(vm) = before.vms.iter().find(|vm| vm.id == *id).filter(|_| *bytes > largest) {
                return Err(Refusal::NoHost { vm: vm.name.clone(), needs: *bytes });
            }
            resized(view, *id, *bytes)
        }
        Change::Start(id) => {
            let Some(record) = view.vms.get(id).map(|record| &record.value) else { return Ok(()) };
            let mut after = before.clone();
            after.vms.retain(|vm| vm.id != *id);
            let mut new = vm(*id, record);
            // Where it was does not say where it goes, unless it may run there only.
            new.host = record.policy.only_on.as_ref().map(|host| host.0.as_str().into());
            let bound = new.host.is_some();
            after.vms.push(new);
            if !bound {
                settle(&mut after, &[*id]);
                if after.vms.last().is_some_and(|vm| vm.host.is_none()) {
                    let (vm, needs) = (record.name.clone(), record.policy.memory_bytes);
                    return Err(Refusal::NoHost { vm, needs });
                }
            }
            after
        }
    };
    admission::admit(&before, &after).map(drop).map_err(|verdict| Refusal::NotCovered(Box::new(verdict)))
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::ha::record::fixture;
    use crate::ha::{
        Owner, Versioned,
        record::{HostRecord, VmPhase},
    };

    const GIB: u64 = 1 << 30;

    fn id(n: u128) -> VmId {
        VmId::from_u128(n)
    }

    /// Hosts with so much memory, VMs with a host (none: off) and so much, in GiB.
    fn view(hosts: &[(&str, u64)], vms: &[(Option<&str>, u64)]) -> View {
        let mut view = View::default();
        for (name, gib) in hosts {
            let record = HostRecord { memory_bytes: gib * GIB, ..fixture::host() };
            view.hosts.insert((*name).into(), Versioned { value: record, revision: 1 });
        }
        for (n, (host, gib)) in vms.iter().enumerate() {
            let record = VmRecord {
                owner: host.map(|host| Owner { host: host.into(), epoch: 1 }),
                phase: if host.is_some() { VmPhase::Running } else { VmPhase::Stopped },
                desired: if host.is_some() { Desired::Running } else { Desired::Stopped },
                ready: true,
                ..fixture::vm(&format!("v{n}"), gib * GIB)
            };
            view.vms.insert(id(n as u128), Versioned { value: record, revision: 1 });
        }
        view
    }

    fn refused(view: &View, change: Change) -> String {
        admit(view, &change).expect_err("it takes room away").to_string()
    }

    #[test]
    fn a_start_that_takes_the_room_for_a_failure_is_refused_with_what_would_stay_down() {
        let three = [("h1", 8), ("h2", 8), ("h3", 8)];
        let used = [(Some("h1"), 6), (Some("h2"), 6), (None, 2), (None, 6), (None, 9)];
        let view = view(&three, &used);
        assert_eq!(admit(&view, &Change::Start(id(2))), Ok(()));
        let text = refused(&view, Change::Start(id(3)));
        assert!(text.contains("would stay down"), "{text}");
        assert!(refused(&view, Change::Start(id(4))).contains("no host has room for v4, which needs 9216 MiB"));
    }

    #[test]
    fn a_host_that_was_emptied_is_no_room() {
        let mut view = view(&[("h1", 8), ("h2", 8), ("h3", 8)], &[(Some("h1"), 6), (Some("h2"), 6)]);
        assert!(admission::check(&world(&view)).holds);
        view.closed.insert("h3".into());
        let verdict = admission::check(&world(&view));
        assert!(!verdict.holds && verdict.losses.iter().all(|loss| loss.failed.iter().all(|host| host.0 != "h3")));
    }

    #[test]
    fn a_move_into_the_only_room_for_a_large_one_is_refused() {
        let view = view(&[("h1", 6), ("h2", 8), ("h3", 16)], &[(Some("h1"), 2), (Some("h3"), 8)]);
        let text = refused(&view, Change::Move(id(0), "h2".into()));
        assert!(text.starts_with("if h3 were lost then, v1 would stay down"), "{text}");
        assert_eq!(admit(&view, &Change::Move(id(0), "h3".into())), Ok(()));
    }

    #[test]
    fn more_memory_is_refused_if_a_host_that_is_lost_would_then_be_missed_and_less_never_is() {
        let view = view(&[("h1", 8), ("h2", 8)], &[(Some("h1"), 4), (Some("h2"), 4)]);
        let text = refused(&view, Change::Resize(id(0), 5 * GIB));
        assert!(text.contains("would stay down"), "{text}");
        assert_eq!(admit(&view, &Change::Resize(id(0), GIB)), Ok(()));
        assert_eq!(admit(&view, &Change::Resize(id(9), 90 * GIB)), Ok(()), "nobody that is protected");
        assert!(refused(&view, Change::Resize(id(0), 9 * GIB)).contains("no host has room for v0"));
    }

    #[test]
    fn a_drain_is_refused_if_the_others_could_not_lose_one_more() {
        let roomy = view(&[("h1", 8), ("h2", 8), ("h3", 8)], &[(Some("h1"), 2), (Some("h2"), 2), (Some("h3"), 2)]);
        assert_eq!(admit(&roomy, &Change::Drain("h1".into())), Ok(()));
        let full = view(&[("h1", 8), ("h2", 8), ("h3", 8)], &[(Some("h1"), 4), (Some("h2"), 4), (Some("h3"), 4)]);
        let text = refused(&full, Change::Drain("h1".into()));
        assert!(text.contains("would stay down"), "{text}");
    }

    #[test]
    fn what_was_not_covered_before_is_no_reason_to_refuse() {
        let mut view = view(&[("h1", 8), ("h2", 8)], &[(Some("h1"), 6), (Some("h1"), 1), (Some("h2"), 6), (None, 1)]);
        assert!(!admission::check(&world(&view)).holds);
        assert_eq!(admit(&view, &Change::Move(id(1), "h2".into())), Ok(()), "the same number stays down");
        // A host is down already, and what it had runs again.
        view.hosts.get_mut(&"h2".into()).expect("there").value.phase = HostPhase::Fenced;
        assert_eq!(admit(&view, &Change::Drain("h9".into())), Ok(()));
    }
}
