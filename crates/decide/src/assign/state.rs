//! Who is where: feasibility and savings of moves in the time of a few resources, and undoing nothing twice.

use super::Problem;

/// No row.
const NONE: u32 = u32::MAX;

/// An assignment with everything that moves are judged by. Clones share nothing.
#[derive(Clone)]
pub struct State<'p> {
    problem: &'p Problem,
    /// By process.
    at: Vec<u32>,
    /// By machine and resource.
    used: Vec<i64>,
    /// By machine and resource: kept for processes that left, where the resource is transient.
    held: Vec<i64>,
    /// By machine: cost of load and balance.
    machine_cost: Vec<i64>,
    /// By machine: what is used and held beyond capacity, by the weights of resources; nothing if all moves were checked.
    machine_excess: Vec<i64>,
    excess: i64,
    /// By machine: who is there.
    on: Vec<Vec<u32>>,
    /// By process: its place in `on`.
    place: Vec<u32>,
    /// Services of several processes have a row of bits, by machine.
    row: Vec<u32>,
    present: Vec<u64>,
    words: usize,
    /// Processes by row and location, where a spread is asked for.
    spread_row: Vec<u32>,
    by_location: Vec<u16>,
    locations: usize,
    distinct: Vec<u32>,
    /// Processes by row and neighbourhood, where dependencies are.
    near_row: Vec<u32>,
    by_neighbourhood: Vec<u16>,
    neighbourhoods: usize,
    needed_by: Vec<Vec<u32>>,
    /// By service: how many are not where they were; and how many services have that number.
    moved: Vec<u32>,
    moved_histogram: Vec<u32>,
    most_moved: usize,
    cost: i64,
}

fn rows(wanted: impl Iterator<Item = bool>) -> (Vec<u32>, usize) {
    let mut next = 0;
    let rows = wanted.map(|wanted| {
        let row = if wanted { next } else { NONE };
        next += u32::from(wanted);
        row
    });
    (rows.collect(), next as usize)
}

fn distinct_values(values: &[u32]) -> usize {
    values.iter().max().map_or(0, |&most| most as usize + 1)
}

impl<'p> State<'p> {
    /// From an assignment, which should be feasible: moves are judged against what they change only.
    pub fn new(problem: &'p Problem, at: &[u32]) -> Self {
        let (machines, services, r) = (problem.machines(), problem.services(), problem.resources);
        let mut sizes = vec![0u32; services];
        problem.service.iter().for_each(|&service| sizes[service as usize] += 1);
        let mut needed_by = vec![Vec::new(); services];
        for (service, needs) in problem.depends.iter().enumerate() {
            needs.iter().for_each(|&needs| needed_by[needs as usize].push(service as u32));
        }
        let (row, present_rows) = rows(sizes.iter().map(|&size| size > 1));
        let (spread_row, spread_rows) = rows(problem.spread.iter().map(|&spread| spread > 1));
        let (near_row, near_rows) =
            rows((0..services).map(|s| !problem.depends[s].is_empty() || !needed_by[s].is_empty()));
        let (locations, neighbourhoods) = (distinct_values(&problem.location), distinct_values(&problem.neighbourhood));
        let words = machines.div_ceil(64);
        let mut state = Self {
            problem,
            at: at.to_vec(),
            used: vec![0; machines * r],
            held: vec![0; machines * r],
            machine_cost: vec![0; machines],
            machine_excess: vec![0; machines],
            excess: 0,
            on: vec![Vec::new(); machines],
            place: vec![0; at.len()],
            row,
            present: vec![0; present_rows * words],
            words,
            spread_row,
            by_location: vec![0; spread_rows * locations],
            locations,
            distinct: vec![0; services],
            near_row,
            by_neighbourhood: vec![0; near_rows * neighbourhoods],
            neighbourhoods,
            needed_by,
            moved: vec![0; services],
            moved_histogram: vec![0; problem.processes() + 2],
            most_moved: 0,
            cost: 0,
        };
        state.fill();
        state
    }

    fn fill(&mut self) {
        let problem = self.problem;
        self.moved_histogram[0] = problem.services() as u32;
        for process in 0..self.at.len() {
            let (machine, first) = (self.at[process] as usize, problem.initial[process] as usize);
            self.enter(process, machine);
            if first != machine {
                for r in 0..problem.resources {
                    let need = problem.need_of(process)[r];
                    self.held[first * problem.resources + r] += if problem.transient[r] { need } else { 0 };
                }
                self.count_moved(problem.service[process] as usize, 1);
            }
            self.cost += self.place_cost(process, machine);
        }
        for machine in 0..problem.machines() {
            self.machine_cost[machine] = self.cost_of(machine, None, None);
            self.cost += self.machine_cost[machine];
            self.machine_excess[machine] = self.excess_of(machine, None, None);
            self.excess += self.machine_excess[machine];
        }
    }

    /// The problem.
    pub fn problem(&self) -> &'p Problem {
        self.problem
    }
    /// By process: its machine.
    pub fn machines(&self) -> &[u32] {
        &self.at
    }
    /// The machine of a process.
    pub fn at(&self, process: usize) -> usize {
        self.at[process] as usize
    }
    /// Who is on a machine.
    pub fn on(&self, machine: usize) -> &[u32] {
        &self.on[machine]
    }
    /// Cost of the whole assignment.
    pub fn cost(&self) -> i64 {
        self.cost + self.problem.service_weight * self.most_moved as i64
    }
    /// Cost of a machine's load and balance.
    pub fn machine_cost(&self, machine: usize) -> i64 {
        self.machine_cost[machine]
    }

    /// Cost of where a process is, whatever is around it.
    pub fn place_cost(&self, process: usize, machine: usize) -> i64 {
        let problem = self.problem;
        let first = problem.initial[process] as usize;
        let moved = if first == machine { 0 } else { problem.move_weight * problem.move_cost[process] };
        moved + problem.distance_weight * problem.distance(first, machine)
    }

    /// Cost of a machine with a process more, a process less, or both.
    pub(super) fn cost_of(&self, machine: usize, without: Option<usize>, with: Option<usize>) -> i64 {
        let problem = self.problem;
        let resources = problem.resources;
        let base = machine * resources;
        let mut load = [0i64; 32];
        let mut wide;
        let load: &mut [i64] = if resources <= 32 {
            &mut load[..resources]
        } else {
            wide = vec![0; resources];
            &mut wide
        };
        load.copy_from_slice(&self.used[base..base + resources]);
        if let Some(process) = without {
            load.iter_mut().zip(problem.need_of(process)).for_each(|(load, need)| *load -= need);
        }
        if let Some(process) = with {
            load.iter_mut().zip(problem.need_of(process)).for_each(|(load, need)| *load += need);
        }
        machine_cost(problem, machine, load)
    }

    /// What is used and held beyond capacity on all machines, by the weights of resources.
    pub(super) fn excess(&self) -> i64 {
        self.excess
    }

    /// The excess of a machine with a process more, a process less, or both.
    fn excess_of(&self, machine: usize, without: Option<usize>, with: Option<usize>) -> i64 {
        let problem = self.problem;
        let resources = problem.resources;
        let base = machine * resources;
        let at_home = |process: Option<usize>| process.is_some_and(|p| problem.initial[p] as usize == machine);
        // Whoever leaves home goes on counting there where the resource is transient, and comes back at no cost.
        let (leaves_home, comes_home) = (at_home(without), at_home(with));
        let (less, more) = (without.map(|p| problem.need_of(p)), with.map(|p| problem.need_of(p)));
        let (used, held) = (&self.used[base..base + resources], &self.held[base..base + resources]);
        let capacity = &problem.capacity[base..base + resources];
        (0..resources)
            .map(|r| {
                let transient = problem.transient[r];
                let less = less.map_or(0, |need| if leaves_home && transient { 0 } else { need[r] });
                let more = more.map_or(0, |need| if comes_home && transient { 0 } else { need[r] });
                (used[r] + held[r] + more - less - capacity[r]).max(0) * problem.load_weight[r].max(1)
            })
            .sum()
    }

    /// Excess that a shift would add.
    pub(super) fn shift_excess(&self, process: usize, to: usize) -> i64 {
        let from = self.at(process);
        self.excess_of(from, Some(process), None) + self.excess_of(to, None, Some(process))
            - self.machine_excess[from]
            - self.machine_excess[to]
    }

    /// Excess that a swap would add.
    pub(super) fn swap_excess(&self, one: usize, other: usize) -> i64 {
        let (a, b) = (self.at(one), self.at(other));
        self.excess_of(a, Some(one), Some(other)) + self.excess_of(b, Some(other), Some(one))
            - self.machine_excess[a]
            - self.machine_excess[b]
    }

    /// Cost that a shift would add; negative is a saving.
    pub fn shift_delta(&self, process: usize, to: usize) -> i64 {
        let from = self.at(process);
        self.cost_of(from, Some(process), None) + self.cost_of(to, None, Some(process))
            - self.machine_cost[from]
            - self.machine_cost[to]
            + self.place_cost(process, to)
            - self.place_cost(process, from)
            + self.service_delta(process, from, to)
    }

    /// Cost that a swap would add, as far as service moves can be told without doing it.
    pub fn swap_delta(&self, one: usize, other: usize) -> i64 {
        let (a, b) = (self.at(one), self.at(other));
        self.cost_of(a, Some(one), Some(other)) + self.cost_of(b, Some(other), Some(one))
            - self.machine_cost[a]
            - self.machine_cost[b]
            + self.place_cost(one, b)
            - self.place_cost(one, a)
            + self.place_cost(other, a)
            - self.place_cost(other, b)
            + self.service_delta(one, a, b)
            + self.service_delta(other, b, a)
    }

    /// Change of the service move cost; exact for one shift.
    fn service_delta(&self, process: usize, from: usize, to: usize) -> i64 {
        let first = self.problem.initial[process] as usize;
        let moved = self.moved[self.problem.service[process] as usize] as usize;
        let step = i64::from(first != to) - i64::from(first != from);
        let changes = match step {
            1 => moved + 1 > self.most_moved,
            -1 => moved == self.most_moved && self.moved_histogram[moved] == 1,
            _ => false,
        };
        if changes { step * self.problem.service_weight } else { 0 }
    }

    /// Whether a process may move to a machine.
    pub fn can_shift(&self, process: usize, to: usize) -> bool {
        to != self.at(process) && self.has_room(process, to, None) && self.rules_allow(process, to, None)
    }

    /// Whether two processes may change places.
    pub fn can_swap(&self, one: usize, other: usize) -> bool {
        let (a, b) = (self.at(one), self.at(other));
        self.has_room(one, b, Some(other)) && self.has_room(other, a, Some(one)) && self.rules_allow_swap(one, other)
    }

    /// Whether everything but capacity allows two processes to change places.
    pub(super) fn rules_allow_swap(&self, one: usize, other: usize) -> bool {
        let (a, b) = (self.at(one), self.at(other));
        a != b
            && self.problem.service[one] != self.problem.service[other]
            && self.rules_allow(one, b, Some(other))
            && self.rules_allow(other, a, Some(one))
            && self.apart_in_zones(one, other)
            && !self.tied(one, other, a, b)
    }

    /// Whether both changing places at once cannot be judged one after the other: one needs the other's service near.
    fn tied(&self, one: usize, other: usize, a: usize, b: usize) -> bool {
        let (s, t) = (self.problem.service[one], self.problem.service[other]);
        self.problem.neighbourhood[a] != self.problem.neighbourhood[b]
            && (self.problem.depends[s as usize].contains(&t) || self.problem.depends[t as usize].contains(&s))
    }

    fn apart_in_zones(&self, one: usize, other: usize) -> bool {
        let of = |process: usize, rival: usize| {
            self.problem.zone_rivals.get(process).is_none_or(|all| all.iter().all(|&(r, _)| r as usize != rival))
        };
        of(one, other) && of(other, one)
    }

    /// Whether the machine has room for the process when another one has left it.
    pub(super) fn has_room(&self, process: usize, to: usize, without: Option<usize>) -> bool {
        let problem = self.problem;
        let resources = problem.resources;
        let base = to * resources;
        let (used, held) = (&self.used[base..base + resources], &self.held[base..base + resources]);
        let capacity = &problem.capacity[base..base + resources];
        let need = problem.need_of(process);
        let home = problem.initial[process] as usize == to;
        match without {
            None if !home => (0..resources).all(|r| used[r] + held[r] + need[r] <= capacity[r]),
            without => {
                // Who comes home was counted there all along; who leaves home goes on counting.
                let leaves_home = without.is_some_and(|other| problem.initial[other] as usize == to);
                let leaving = without.map(|other| problem.need_of(other));
                (0..resources).all(|r| {
                    let transient = problem.transient[r];
                    let more = if home && transient { 0 } else { need[r] };
                    let less = if leaves_home && transient { 0 } else { leaving.map_or(0, |leaving| leaving[r]) };
                    used[r] + held[r] + more - less <= capacity[r]
                })
            }
        }
    }

    /// Whether everything but capacity allows it.
    pub(super) fn rules_allow(&self, process: usize, to: usize, without: Option<usize>) -> bool {
        let problem = self.problem;
        let service = problem.service[process] as usize;
        let from = self.at(process);
        let row = self.row[service];
        if row != NONE && self.present[row as usize * self.words + to / 64] >> (to % 64) & 1 == 1 {
            return false;
        }
        problem.may(process, to)
            && self.rivals_allow(process, to, without)
            && self.spread_allows(service, from, to)
            && self.near_allows(service, from, to)
    }

    fn rivals_allow(&self, process: usize, to: usize, without: Option<usize>) -> bool {
        let problem = self.problem;
        let free = |rival: u32| Some(rival as usize) == without;
        problem
            .rivals
            .get(process)
            .is_none_or(|rivals| rivals.iter().all(|&rival| free(rival) || self.at(rival as usize) != to))
            && problem.zone_rivals.get(process).is_none_or(|rivals| {
                rivals.iter().all(|&(rival, level)| {
                    let zone = &problem.zone[level as usize];
                    free(rival) || zone[self.at(rival as usize)] != zone[to]
                })
            })
    }

    fn spread_allows(&self, service: usize, from: usize, to: usize) -> bool {
        let row = self.spread_row[service];
        if row == NONE {
            return true;
        }
        let (a, b) = (self.problem.location[from] as usize, self.problem.location[to] as usize);
        let base = row as usize * self.locations;
        let loses = a != b && self.by_location[base + a] == 1 && self.by_location[base + b] > 0;
        !loses || self.distinct[service] > self.problem.spread[service]
    }

    fn near_allows(&self, service: usize, from: usize, to: usize) -> bool {
        let row = self.near_row[service];
        let (a, b) = (self.problem.neighbourhood[from] as usize, self.problem.neighbourhood[to] as usize);
        if row == NONE || a == b {
            return true;
        }
        let there = |service: usize, n: usize| {
            let row = self.near_row[service];
            row != NONE && self.by_neighbourhood[row as usize * self.neighbourhoods + n] > 0
        };
        let base = row as usize * self.neighbourhoods;
        let misses = self.by_neighbourhood[base + b] == 0
            && self.problem.depends[service]
                .iter()
                .any(|&needs| needs as usize != service && !there(needs as usize, b));
        let is_missed = self.by_neighbourhood[base + a] == 1
            && self.needed_by[service].iter().any(|&by| by as usize != service && there(by as usize, a));
        !misses && !is_missed
    }

    /// Moves a process, and keeps everything true. Nothing is checked.
    pub fn shift(&mut self, process: usize, to: usize) {
        let problem = self.problem;
        let from = self.at(process);
        let first = problem.initial[process] as usize;
        self.cost += self.place_cost(process, to) - self.place_cost(process, from);
        self.leave(process, from);
        self.enter(process, to);
        let step = i64::from(first != to) - i64::from(first != from);
        if step != 0 {
            for r in (0..problem.resources).filter(|&r| problem.transient[r]) {
                self.held[first * problem.resources + r] += step * problem.need_of(process)[r];
            }
            self.count_moved(problem.service[process] as usize, step);
        }
        for machine in [from, to] {
            let cost = self.cost_of(machine, None, None);
            self.cost += cost - self.machine_cost[machine];
            self.machine_cost[machine] = cost;
            let excess = self.excess_of(machine, None, None);
            self.excess += excess - self.machine_excess[machine];
            self.machine_excess[machine] = excess;
        }
    }

    /// Changes the places of two processes. Nothing is checked.
    pub fn swap(&mut self, one: usize, other: usize) {
        let (a, b) = (self.at(one), self.at(other));
        self.shift(one, b);
        self.shift(other, a);
    }

    fn enter(&mut self, process: usize, machine: usize) {
        let problem = self.problem;
        let (service, r) = (problem.service[process] as usize, problem.resources);
        self.at[process] = machine as u32;
        self.place[process] = self.on[machine].len() as u32;
        self.on[machine].push(process as u32);
        let used = &mut self.used[machine * r..][..r];
        used.iter_mut().zip(problem.need_of(process)).for_each(|(used, need)| *used += need);
        if self.row[service] != NONE {
            self.present[self.row[service] as usize * self.words + machine / 64] |= 1 << (machine % 64);
        }
        if self.spread_row[service] != NONE {
            let at = self.spread_row[service] as usize * self.locations + problem.location[machine] as usize;
            self.distinct[service] += u32::from(self.by_location[at] == 0);
            self.by_location[at] += 1;
        }
        if self.near_row[service] != NONE {
            let neighbourhood = problem.neighbourhood[machine] as usize;
            self.by_neighbourhood[self.near_row[service] as usize * self.neighbourhoods + neighbourhood] += 1;
        }
    }

    fn leave(&mut self, process: usize, machine: usize) {
        let problem = self.problem;
        let (service, r) = (problem.service[process] as usize, problem.resources);
        let place = self.place[process] as usize;
        self.on[machine].swap_remove(place);
        if let Some(&moved) = self.on[machine].get(place) {
            self.place[moved as usize] = place as u32;
        }
        let used = &mut self.used[machine * r..][..r];
        used.iter_mut().zip(problem.need_of(process)).for_each(|(used, need)| *used -= need);
        if self.row[service] != NONE {
            self.present[self.row[service] as usize * self.words + machine / 64] &= !(1 << (machine % 64));
        }
        if self.spread_row[service] != NONE {
            let at = self.spread_row[service] as usize * self.locations + problem.location[machine] as usize;
            self.by_location[at] -= 1;
            self.distinct[service] -= u32::from(self.by_location[at] == 0);
        }
        if self.near_row[service] != NONE {
            let neighbourhood = problem.neighbourhood[machine] as usize;
            self.by_neighbourhood[self.near_row[service] as usize * self.neighbourhoods + neighbourhood] -= 1;
        }
    }

    fn count_moved(&mut self, service: usize, step: i64) {
        let before = self.moved[service] as usize;
        let after = (before as i64 + step) as usize;
        self.moved[service] = after as u32;
        self.moved_histogram[before] -= 1;
        self.moved_histogram[after] += 1;
        self.most_moved = self.most_moved.max(after);
        while self.most_moved > 0 && self.moved_histogram[self.most_moved] == 0 {
            self.most_moved -= 1;
        }
    }
}

/// Cost of a load on a machine.
fn machine_cost(problem: &Problem, machine: usize, load: &[i64]) -> i64 {
    let resources = problem.resources;
    let soft = &problem.soft[machine * resources..][..resources];
    let capacity = &problem.capacity[machine * resources..][..resources];
    let over: i64 = load
        .iter()
        .zip(soft)
        .zip(&problem.load_weight)
        .map(|((load, soft), weight)| weight * (load - soft).max(0))
        .sum();
    let free = |r: usize| capacity[r] - load[r];
    let balances = problem
        .balances
        .iter()
        .map(|balance| balance.weight * (balance.target * free(balance.first) - free(balance.second)).max(0));
    over + balances.sum::<i64>()
}
