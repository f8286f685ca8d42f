//! A proof for all combinations at once: so much is free that greedy packing cannot fail.
//!
//! Let D(d) be the most that k units can need in dimension d, and s(d) the largest single need. If some VM found no host,
//! each host m that it may use would be short in some d, so would have taken more than free(m,d) − s(d). Then
//! Σ_m min_d (free(m,d) − s(d)) / D(d) would be less than the number of dimensions that are needed at all. Where that sum,
//! over hosts that every VM may use, without the k units and the hosts that rules may block where it is largest, is at
//! least that number, packing in any order succeeds.

use super::scenario::Scenarios;
use crate::placement::{DIMENSIONS, Space};

/// Whether the proof holds for any `k` units.
pub(super) fn suffices(space: &Space, scenarios: &Scenarios, k: usize) -> bool {
    let protected = || scenarios.protected.iter().flatten().chain(&scenarios.orphans).copied();
    let rules_in_the_way = space.apart.iter().any(|group| group.level.is_some())
        || protected().any(|vm| space.units[space.unit[vm as usize] as usize].len() > 1);
    if rules_in_the_way {
        return false;
    }
    let mut largest = [0u64; DIMENSIONS];
    let mut classes: Vec<u32> = Vec::new();
    let mut blocked = 0;
    for vm in protected() {
        (0..DIMENSIONS).for_each(|d| largest[d] = largest[d].max(space.need[vm as usize][d]));
        classes.push(space.class[vm as usize]);
        let groups = space.apart_of[vm as usize].iter().map(|&group| space.apart[group as usize].members.len() - 1);
        blocked = blocked.max(groups.sum::<usize>());
    }
    classes.sort_unstable();
    classes.dedup();
    let most = most_needed(space, scenarios, k);
    let dimensions = most.iter().filter(|&&needed| needed > 0.0).count();
    let by_host: Vec<(u32, f64)> = scenarios
        .open
        .iter()
        .filter(|&&host| classes.iter().all(|&class| space.allowed[class as usize][host as usize]))
        .map(|&host| (host, gain(space, scenarios, host, &largest, &most)))
        .collect();
    let mut units = vec![0.0; scenarios.units()];
    let mut of_host = vec![usize::MAX; space.world.hosts.len()];
    (0..scenarios.units()).for_each(|unit| scenarios.unit(unit).iter().for_each(|&h| of_host[h as usize] = unit));
    by_host.iter().for_each(|&(host, gain)| units[of_host[host as usize]] += gain);
    let mut gains: Vec<f64> = by_host.iter().map(|&(_, gain)| gain).collect();
    let all: f64 = gains.iter().sum();
    // Rounding must never turn a no into a yes.
    all - top(&mut units, k) - top(&mut gains, blocked) >= dimensions as f64 * (1.0 + 1e-9)
}

fn gain(space: &Space, scenarios: &Scenarios, host: u32, largest: &[u64], most: &[f64]) -> f64 {
    (0..DIMENSIONS)
        .filter(|&d| most[d] > 0.0)
        .map(|d| {
            let free = space.room[host as usize][d].saturating_sub(scenarios.occupancy.used[host as usize][d]);
            free.saturating_sub(largest[d]) as f64 / most[d]
        })
        .fold(f64::INFINITY, f64::min)
        // One host counts for no more than all that can be needed.
        .min(DIMENSIONS as f64 * 2.0)
}

/// By dimension: what the most demanding `k` units need, with those that wait already.
fn most_needed(space: &Space, scenarios: &Scenarios, k: usize) -> [f64; DIMENSIONS] {
    std::array::from_fn(|d| {
        let need = |vms: &[u32]| vms.iter().map(|&vm| space.need[vm as usize][d] as f64).sum::<f64>();
        let unit = |unit| scenarios.unit(unit).iter().map(|&host| need(&scenarios.protected[host as usize])).sum();
        let mut needs: Vec<f64> = (0..scenarios.units()).map(unit).collect();
        top(&mut needs, k) + need(&scenarios.orphans)
    })
}

/// The sum of the `k` largest.
fn top(values: &mut [f64], k: usize) -> f64 {
    values.sort_unstable_by(|one, other| other.total_cmp(one));
    values.iter().take(k).sum()
}
