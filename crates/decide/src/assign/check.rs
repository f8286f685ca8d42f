//! Feasibility and cost from nothing but the problem and an assignment; shares no code with the search.

use std::collections::{BTreeMap, BTreeSet};

use super::Problem;

/// What an assignment breaks; numbers are indices.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Broken {
    /// Not one machine for each process, or one that does not exist.
    #[error("the assignment does not give one existing machine to each process")]
    Shape,
    /// More than there is.
    #[error("machine {machine} has {capacity} of resource {resource}, {used} are used")]
    Capacity {
        /// Where.
        machine: usize,
        /// Of what.
        resource: usize,
        /// What there is.
        capacity: i64,
        /// What is used, by those that left as well where the resource is transient.
        used: i128,
    },
    /// Two of a service, or two rivals, together.
    #[error("processes {0} and {1} are together and must not be")]
    Together(usize, usize),
    /// A process where it may never be.
    #[error("process {0} may not be on machine {1}")]
    Forbidden(usize, usize),
    /// Too few locations.
    #[error("service {service} is in {found} locations, {needed} are needed")]
    Spread {
        /// Which.
        service: usize,
        /// Distinct locations.
        found: usize,
        /// At least.
        needed: usize,
    },
    /// A dependency that is not near.
    #[error("service {service} is in neighbourhood {neighbourhood}, service {needs} that it depends on is not")]
    Dependency {
        /// Which.
        service: usize,
        /// On which.
        needs: usize,
        /// Where.
        neighbourhood: u32,
    },
}

/// The cost of an assignment, or what it breaks first.
pub fn check(problem: &Problem, machines: &[u32]) -> Result<i128, Broken> {
    if machines.len() != problem.processes() || machines.iter().any(|&m| m as usize >= problem.machines()) {
        return Err(Broken::Shape);
    }
    let resources = problem.resources;
    let mut used = vec![0i128; problem.machines() * resources];
    let mut held = used.clone();
    for (process, &machine) in machines.iter().enumerate() {
        let first = problem.initial[process];
        for r in 0..resources {
            let need = i128::from(problem.need[process * resources + r]);
            used[machine as usize * resources + r] += need;
            if problem.transient[r] && first != machine {
                held[first as usize * resources + r] += need;
            }
        }
    }
    for (at, (&used, &held)) in used.iter().zip(&held).enumerate() {
        if used + held > i128::from(problem.capacity[at]) {
            let (machine, resource) = (at / resources, at % resources);
            return Err(Broken::Capacity { machine, resource, capacity: problem.capacity[at], used: used + held });
        }
    }
    services(problem, machines)?;
    others(problem, machines)?;
    Ok(cost(problem, machines, &used))
}

fn services(problem: &Problem, machines: &[u32]) -> Result<(), Broken> {
    let mut places: BTreeMap<(u32, u32), usize> = BTreeMap::new();
    let mut locations = vec![BTreeSet::new(); problem.services()];
    let mut neighbourhoods = vec![BTreeSet::new(); problem.services()];
    for (process, &machine) in machines.iter().enumerate() {
        let service = problem.service[process];
        if let Some(other) = places.insert((service, machine), process) {
            return Err(Broken::Together(other, process));
        }
        locations[service as usize].insert(problem.location[machine as usize]);
        neighbourhoods[service as usize].insert(problem.neighbourhood[machine as usize]);
    }
    for service in 0..problem.services() {
        let (found, needed) = (locations[service].len(), problem.spread[service] as usize);
        if found < needed {
            return Err(Broken::Spread { service, found, needed });
        }
        for &needs in &problem.depends[service] {
            let needs = needs as usize;
            if let Some(&neighbourhood) = neighbourhoods[service].difference(&neighbourhoods[needs]).next() {
                return Err(Broken::Dependency { service, needs, neighbourhood });
            }
        }
    }
    Ok(())
}

fn others(problem: &Problem, machines: &[u32]) -> Result<(), Broken> {
    for (process, &machine) in machines.iter().enumerate() {
        if !problem.class.is_empty() && !problem.allowed[problem.class[process] as usize][machine as usize] {
            return Err(Broken::Forbidden(process, machine as usize));
        }
    }
    for (process, rivals) in problem.rivals.iter().enumerate() {
        if let Some(&rival) = rivals.iter().find(|&&rival| machines[rival as usize] == machines[process]) {
            return Err(Broken::Together(process, rival as usize));
        }
    }
    for (process, rivals) in problem.zone_rivals.iter().enumerate() {
        let zone = |level: u32, process: usize| problem.zone[level as usize][machines[process] as usize];
        if let Some(&(rival, _)) =
            rivals.iter().find(|&&(rival, level)| zone(level, rival as usize) == zone(level, process))
        {
            return Err(Broken::Together(process, rival as usize));
        }
    }
    Ok(())
}

fn cost(problem: &Problem, machines: &[u32], used: &[i128]) -> i128 {
    let resources = problem.resources;
    let mut cost = 0;
    for machine in 0..problem.machines() {
        for r in 0..resources {
            let over = used[machine * resources + r] - i128::from(problem.soft[machine * resources + r]);
            cost += i128::from(problem.load_weight[r]) * over.max(0);
        }
        let free = |r: usize| i128::from(problem.capacity[machine * resources + r]) - used[machine * resources + r];
        for balance in &problem.balances {
            let missing = i128::from(balance.target) * free(balance.first) - free(balance.second);
            cost += i128::from(balance.weight) * missing.max(0);
        }
    }
    let mut moved = vec![0i128; problem.services()];
    for (process, &machine) in machines.iter().enumerate() {
        let first = problem.initial[process];
        if first != machine {
            moved[problem.service[process] as usize] += 1;
            cost += i128::from(problem.move_weight) * i128::from(problem.move_cost[process]);
        }
        if !problem.distance.is_empty() {
            let distance = problem.distance[first as usize * problem.machines() + machine as usize];
            cost += i128::from(problem.distance_weight) * i128::from(distance);
        }
    }
    cost + i128::from(problem.service_weight) * moved.into_iter().max().unwrap_or(0)
}
