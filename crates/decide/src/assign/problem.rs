//! What is assigned to what, what must hold and what it costs.

/// Σ over machines of `weight · max(0, target · free(first) − free(second))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    /// A resource.
    pub first: usize,
    /// A resource that should stay free in proportion.
    pub second: usize,
    /// The proportion.
    pub target: i64,
    /// Cost of each unit that is missing.
    pub weight: i64,
}

/// A problem. Tables are flat: `table[row * columns + column]`. Amounts and costs are 64-bit, as sums exceed 32.
#[derive(Clone, Debug, Default)]
pub struct Problem {
    /// Number of resources.
    pub resources: usize,
    /// By resource: a process that moved counts on the machine that it left as well.
    pub transient: Vec<bool>,
    /// By resource: cost of each unit above the soft capacity.
    pub load_weight: Vec<i64>,
    /// By machine and resource: never exceeded.
    pub capacity: Vec<i64>,
    /// By machine and resource: more costs.
    pub soft: Vec<i64>,
    /// By machine.
    pub location: Vec<u32>,
    /// By machine.
    pub neighbourhood: Vec<u32>,
    /// By machine and machine: cost of moving from one to the other; empty: nothing.
    pub distance: Vec<u32>,
    /// By process: its service; no two of a service share a machine.
    pub service: Vec<u32>,
    /// By process and resource.
    pub need: Vec<i64>,
    /// By process: cost of being elsewhere than at first.
    pub move_cost: Vec<i64>,
    /// By service: over how many locations its processes must at least spread.
    pub spread: Vec<u32>,
    /// By service: services that must be in every neighbourhood where it is.
    pub depends: Vec<Vec<u32>>,
    /// Costs of what is left free.
    pub balances: Vec<Balance>,
    /// Weight of `move_cost`.
    pub move_weight: i64,
    /// Weight of the largest number of moved processes of one service.
    pub service_weight: i64,
    /// Weight of `distance`.
    pub distance_weight: i64,
    /// By process: which row of `allowed` it obeys; empty: every process may be on every machine.
    pub class: Vec<u32>,
    /// By class, then machine.
    pub allowed: Vec<Vec<bool>>,
    /// By process: others that it must not share a machine with, beyond its service; empty: nobody.
    pub rivals: Vec<Vec<u32>>,
    /// By process: others whose machine must differ from its own in `zone` at this level; empty: nobody.
    pub zone_rivals: Vec<Vec<(u32, u32)>>,
    /// By level, then machine.
    pub zone: Vec<Vec<u32>>,
    /// By process: where it is at first.
    pub initial: Vec<u32>,
}

/// Why a problem cannot be worked on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Problem {
    /// Number of machines.
    pub fn machines(&self) -> usize {
        self.location.len()
    }
    /// Number of processes.
    pub fn processes(&self) -> usize {
        self.service.len()
    }
    /// Number of services.
    pub fn services(&self) -> usize {
        self.spread.len()
    }
    /// What a process needs, by resource.
    pub fn need_of(&self, process: usize) -> &[i64] {
        &self.need[process * self.resources..][..self.resources]
    }
    /// Whether a process may ever be on a machine.
    pub fn may(&self, process: usize, machine: usize) -> bool {
        self.class.is_empty() || self.allowed[self.class[process] as usize][machine]
    }
    /// Cost of moving between two machines.
    pub fn distance(&self, from: usize, to: usize) -> i64 {
        if self.distance.is_empty() { 0 } else { i64::from(self.distance[from * self.machines() + to]) }
    }

    /// Whether tables have the sizes that they must have and refer to what exists.
    pub fn validate(&self) -> Result<(), Malformed> {
        let (r, m, p, s) = (self.resources, self.machines(), self.processes(), self.services());
        let sizes = [
            ("transient", self.transient.len(), r),
            ("load weights", self.load_weight.len(), r),
            ("capacities", self.capacity.len(), m * r),
            ("soft capacities", self.soft.len(), m * r),
            ("neighbourhoods", self.neighbourhood.len(), m),
            ("needs", self.need.len(), p * r),
            ("move costs", self.move_cost.len(), p),
            ("dependencies", self.depends.len(), s),
            ("initial machines", self.initial.len(), p),
        ];
        for (what, found, wanted) in sizes {
            if found != wanted {
                return Err(Malformed(format!("{found} {what} are given where {wanted} are needed")));
            }
        }
        range("service", self.service.iter().copied(), s)?;
        range("service", self.depends.iter().flatten().copied(), s)?;
        range("machine", self.initial.iter().copied(), m)?;
        let balances = self.balances.iter().flat_map(|balance| [balance.first as u32, balance.second as u32]);
        range("resource", balances, r)?;
        // Sums over all processes must fit; a file may say anything.
        let large = self.need.iter().chain(&self.capacity).chain(&self.soft).find(|&&n| !(0..=1 << 44).contains(&n));
        if let Some(amount) = large {
            return Err(Malformed(format!("the amount {amount} is not between 0 and 2^44")));
        }
        let total = |table: &[i64], row: usize| table.iter().skip(row).step_by(r).map(|&n| i128::from(n)).sum::<i128>();
        let totals: Vec<i128> = (0..r).map(|row| total(&self.need, row)).collect();
        let most = |row: usize| totals[row].max(1 << 44);
        let load = (0..r).map(|row| i128::from(self.load_weight[row]) * most(row));
        let balance = self.balances.iter().map(|balance| {
            i128::from(balance.weight) * (i128::from(balance.target) * most(balance.first) + most(balance.second))
        });
        match load.chain(balance).find(|cost| !(0..=1 << 59).contains(cost)) {
            Some(cost) => Err(Malformed(format!("a load could cost {cost}, which is not between 0 and 2^59"))),
            None => Ok(()),
        }
    }
}

fn range(what: &str, mut numbers: impl Iterator<Item = u32>, limit: usize) -> Result<(), Malformed> {
    match numbers.find(|&number| number as usize >= limit) {
        Some(number) => Err(Malformed(format!("{what} {number} does not exist, there are {limit}"))),
        None => Ok(()),
    }
}
