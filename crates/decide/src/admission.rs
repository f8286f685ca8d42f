//! Whether room is left for any k failures: every VM that is to be restarted would have a host, without moving others.
//!
//! Not a percentage: each combination of failures is packed, or covered by a proof that packing cannot fail. "Yes" means
//! that a plan exists for every combination, and [`recovery`] returns it. "No" is either proved, by a bound or because
//! every way was tried, or says that no plan was found in the effort that was allowed; a [`Loss`] says which.

mod scenario;
mod slack;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_model::world::{HostName, HostState, Priority, World};

use crate::placement::{Impossible, Placement, Report, Request, Space, place};
use scenario::Scenarios;

/// Combinations that are packed one by one; with more, only the proof for all of them at once can say yes.
const MOST_SCENARIOS: u64 = 1_000_000;
/// Losses that are told one by one.
const MOST_LOSSES: usize = 1_000;

/// A VM that would stay down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub name: String,
    /// Its priority.
    pub priority: Priority,
}

/// A failure after which not all VMs would run again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The hosts that fail together.
    pub failed: Vec<HostName>,
    /// Who would stay down, in the best placement that was found.
    pub lost: Vec<Lost>,
    /// Why there is no placement for all; `None`: none was found, though there may be one.
    pub proof: Option<Impossible>,
}

/// How all combinations were covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// No failures are to be survived.
    NotAsked,
    /// Each was packed.
    Packed,
    /// So much is free everywhere that packing cannot fail.
    Slack,
    /// There are too many to pack, and the proof for all at once does not hold: nothing is known.
    TooMany,
}

/// What admission control says of a world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether a plan exists for every combination.
    pub holds: bool,
    /// How many failures at once.
    pub failures: u32,
    /// How many combinations there are.
    pub scenarios: u64,
    /// How they were covered.
    pub method: Method,
    /// Those that are not survived; the first thousand.
    pub losses: Vec<Loss>,
    /// How many are not survived.
    pub losses_total: u64,
    /// VMs that are to be restarted but could run on their own host only: no room is kept for them.
    pub bound_to_host: Vec<Lost>,
}

/// Checks whether the failures that the world asks for are survived.
pub fn check(world: &World) -> Verdict {
    check_k(world, world.failover.failures)
}

/// Checks whether any `failures` failures at once are survived.
pub fn check_k(world: &World, failures: u32) -> Verdict {
    let space = Space::new(world, true);
    let mut scenarios = Scenarios::new(&space);
    let failures_here = (failures as usize).min(scenarios.units());
    let mut verdict = Verdict {
        holds: true,
        failures,
        scenarios: if failures == 0 { 0 } else { combinations(scenarios.units() as u64, failures_here as u64) },
        method: Method::NotAsked,
        losses: Vec::new(),
        losses_total: 0,
        bound_to_host: bound_to_host(world),
    };
    if failures_here == 0 {
        return verdict;
    }
    if slack::suffices(&space, &scenarios, failures_here) {
        verdict.method = Method::Slack;
    } else if verdict.scenarios > MOST_SCENARIOS {
        verdict.method = Method::TooMany;
        verdict.holds = false;
    } else {
        verdict.method = Method::Packed;
        scenarios.each(failures_here, &mut |loss| {
            verdict.losses_total += 1;
            if verdict.losses.len() < MOST_LOSSES {
                verdict.losses.push(loss);
            }
        });
        verdict.holds = verdict.losses_total == 0;
    }
    verdict
}

/// The plan for a failure of these hosts, with the report that says who stays down and why.
pub fn recovery(world: &World, failed: &[HostName]) -> (Placement, Report) {
    let mut after = world.clone();
    for host in after.hosts.iter_mut().filter(|host| failed.contains(&host.name)) {
        host.state = HostState::Down;
    }
    let down = |vm: &&virtward_model::world::Vm| {
        vm.host
            .as_ref()
            .is_some_and(|name| after.hosts.iter().any(|host| host.name == *name && host.state == HostState::Down))
    };
    let vms: Vec<Uuid> = after.vms.iter().filter(|vm| is_protected(vm)).filter(down).map(|vm| vm.id).collect();
    place(&after, &Request::failover(vms))
}

/// Whether a change takes away room that was there: refuses what makes a new violation, and nothing for one that was
/// there before.
pub fn admit(before: &World, after: &World) -> Result<Verdict, Verdict> {
    let now = check(after);
    if now.holds || !is_worse(&check(before), &now) {
        return Ok(now);
    }
    Err(now)
}

/// Whether `after` has a violation that `before` does not have, or a worse one.
pub fn is_worse(before: &Verdict, after: &Verdict) -> bool {
    if after.holds || before.holds {
        return !after.holds;
    }
    let known: BTreeMap<&[HostName], usize> =
        before.losses.iter().map(|loss| (loss.failed.as_slice(), loss.lost.len())).collect();
    after.losses_total > before.losses_total
        || after.losses.iter().any(|loss| {
            let had = known.get(loss.failed.as_slice()).copied();
            // Beyond the losses that are told one by one, only their number can be compared.
            let untold = before.losses_total as usize > before.losses.len();
            had.map_or(!untold, |had| loss.lost.len() > had)
        })
}

/// Whether room is kept for a VM.
pub(crate) fn is_protected(vm: &virtward_model::world::Vm) -> bool {
    vm.failover && !vm.stuck.as_ref().is_some_and(virtward_model::world::Stuck::binds_to_host)
}

fn bound_to_host(world: &World) -> Vec<Lost> {
    world
        .vms
        .iter()
        .filter(|vm| vm.failover && !is_protected(vm))
        .map(|vm| Lost { vm: vm.id, name: vm.name.clone(), priority: vm.priority })
        .collect()
}

fn combinations(n: u64, k: u64) -> u64 {
    (0..k.min(n - k.min(n)))
        .try_fold(1u128, |product, i| product.checked_mul(u128::from(n - i)).map(|more| more / u128::from(i + 1)))
        .map_or(u64::MAX, |count| count.min(u128::from(u64::MAX)) as u64)
}

#[cfg(test)]
mod tests;
