//! Who is where: feasibility and savings of moves in the time of a few resources, and undoing nothing twice.

use super::{
    Problem,
    load::{Load, Side},
};

/// No row.
const NONE: u32 = u32::MAX;

/// An assignment with everything that moves are judged by. Clones share nothing.
#[derive(Clone)]
pub struct State<'p> {
    problem: &'p Problem,
    /// By process.
    at: Vec<u32>,
    load: Load,
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
    moved_of: Vec<u32>,
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
        let (machines, services) = (problem.machines(), problem.services());
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
            load: Load::new(problem),
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
            moved_of: vec![0; services],
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
            self.load.hold(process, first);
            self.enter(process, machine);
            if first != machine {
                self.count_moved(problem.service[process] as usize, 1);
            }
            self.cost += self.place_cost(process, machine);
        }
        for machine in 0..problem.machines() {
            self.load.judge(machine);
            self.cost += self.load.cost(machine);
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
        self.load.cost(machine)
    }

    /// Cost of where a process is, whatever is around it.
    pub fn place_cost(&self, process: usize, machine: usize) -> i64 {
        let problem = self.problem;
        let first = problem.initial[process] as usize;
        let moved = if first == machine { 0 } else { problem.move_weight * problem.move_cost[process] };
        moved + problem.distance_weight * problem.distance(first, machine)
    }

    /// What all machines cost at least, wherever the processes are.
    pub(super) fn least(&self) -> i64 {
        self.load.least()
    }

    fn side(&self, machine: usize, comes: Option<usize>, goes: Option<usize>) -> Side {
        let home = |process: usize| (process, self.problem.initial[process] as usize == machine);
        Side { machine, comes: comes.map(home), goes: goes.map(home) }
    }

    /// Cost that a shift would add; negative is a saving.
    pub fn shift_delta(&self, process: usize, to: usize) -> i64 {
        let from = self.at(process);
        self.load.cost_delta(from, None, Some(process))
            + self.load.cost_delta(to, Some(process), None)
            + self.place_cost(process, to)
            - self.place_cost(process, from)
            + self.service_delta(process, from, to)
    }

    /// Cost that a swap would add, as far as service moves can be told without doing it.
    pub fn swap_delta(&self, one: usize, other: usize) -> i64 {
        let (a, b) = (self.at(one), self.at(other));
        self.load.cost_delta(a, Some(other), Some(one))
            + self.load.cost_delta(b, Some(one), Some(other))
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
        let moved = self.moved_of[self.problem.service[process] as usize] as usize;
        let step = i64::from(first != to) - i64::from(first != from);
        let changes = match step {
            1 => moved + 1 > self.most_moved,
            -1 => moved == self.most_moved && self.moved_histogram[moved] == 1,
            _ => false,
        };
        if changes { step * self.problem.service_weight } else { 0 }
    }

    /// Whether a machine has capacity for all that is there.
    pub(super) fn fits(&self, machine: usize) -> bool {
        self.load.fits(self.side(machine, None, None))
    }

    fn shift_fits(&self, process: usize, to: usize) -> bool {
        self.load.fits(self.side(to, Some(process), None))
    }

    fn swap_fits(&self, one: usize, other: usize) -> bool {
        let (a, b) = (self.at(one), self.at(other));
        self.load.fits(self.side(b, Some(one), Some(other))) && self.load.fits(self.side(a, Some(other), Some(one)))
    }

    /// Whether a process may move to a machine.
    pub fn can_shift(&self, process: usize, to: usize) -> bool {
        to != self.at(process) && self.rules_allow(process, to, None) && self.shift_fits(process, to)
    }

    /// Whether two processes may change places.
    pub fn can_swap(&self, one: usize, other: usize) -> bool {
        self.rules_allow_swap(one, other) && self.swap_fits(one, other)
    }

    /// Whether everything but capacity allows two processes to change places.
    fn rules_allow_swap(&self, one: usize, other: usize) -> bool {
        let (a, b) = (self.at(one), self.at(other));
        if a == b || !self.apart_in_zones(one, other) {
            return false;
        }
        // Who changes places within a service leaves it where it is.
        if self.problem.service[one] == self.problem.service[other] {
            return self.is_free_to(one, b, Some(other)) && self.is_free_to(other, a, Some(one));
        }
        self.rules_allow(one, b, Some(other)) && self.rules_allow(other, a, Some(one)) && !self.tied(one, other, a, b)
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

    /// Whether everything but capacity allows it.
    pub(super) fn rules_allow(&self, process: usize, to: usize, without: Option<usize>) -> bool {
        let problem = self.problem;
        let service = problem.service[process] as usize;
        let from = self.at(process);
        let row = self.row[service];
        if row != NONE && self.present[row as usize * self.words + to / 64] >> (to % 64) & 1 == 1 {
            return false;
        }
        self.is_free_to(process, to, without)
            && self.spread_allows(service, from, to)
            && self.near_allows(service, from, to)
    }

    /// Whether nothing but its service keeps a process from a machine.
    fn is_free_to(&self, process: usize, to: usize, without: Option<usize>) -> bool {
        self.problem.may(process, to) && self.rivals_allow(process, to, without)
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
        let from = self.at(process);
        self.leave(process, from);
        self.enter(process, to);
        self.moved(process, from);
        self.judge(from);
        self.judge(to);
    }

    /// Changes the places of two processes. Nothing is checked.
    pub fn swap(&mut self, one: usize, other: usize) {
        let (a, b) = (self.at(one), self.at(other));
        self.leave(one, a);
        self.leave(other, b);
        self.enter(one, b);
        self.enter(other, a);
        self.moved(one, a);
        self.moved(other, b);
        self.judge(a);
        self.judge(b);
    }

    fn judge(&mut self, machine: usize) {
        self.cost += self.load.judge(machine);
    }

    /// Counts what a move costs besides load.
    fn moved(&mut self, process: usize, from: usize) {
        let (to, first) = (self.at(process), self.problem.initial[process] as usize);
        self.cost += self.place_cost(process, to) - self.place_cost(process, from);
        let step = i64::from(first != to) - i64::from(first != from);
        if step != 0 {
            self.count_moved(self.problem.service[process] as usize, step);
        }
    }

    fn enter(&mut self, process: usize, machine: usize) {
        let problem = self.problem;
        let service = problem.service[process] as usize;
        self.at[process] = machine as u32;
        self.place[process] = self.on[machine].len() as u32;
        self.on[machine].push(process as u32);
        self.load.put(process, machine, problem.initial[process] as usize == machine, true);
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
        let service = problem.service[process] as usize;
        let place = self.place[process] as usize;
        self.on[machine].swap_remove(place);
        if let Some(&moved) = self.on[machine].get(place) {
            self.place[moved as usize] = place as u32;
        }
        self.load.put(process, machine, problem.initial[process] as usize == machine, false);
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
        let before = self.moved_of[service] as usize;
        let after = (before as i64 + step) as usize;
        self.moved_of[service] = after as u32;
        self.moved_histogram[before] -= 1;
        self.moved_histogram[after] += 1;
        self.most_moved = self.most_moved.max(after);
        while self.most_moved > 0 && self.moved_histogram[self.most_moved] == 0 {
            self.most_moved -= 1;
        }
    }
}
