//! What machines carry, as rows that are all alike: what is free of something, already multiplied by what it costs.
//!
//! A resource is a row; so is a balance, as what it misses is linear in the load: `weight · (target · first − second)`
//! free is a sum over the processes too. Rows come in blocks of a fixed width, so that judging a move is a few
//! instructions for each block, without a branch.

use super::Problem;

/// Rows of a block.
const WIDTH: usize = 4;
type Block = [i64; WIDTH];
/// More than all processes together need.
const ENDLESS: i64 = 1 << 61;

/// Loads of all machines.
#[derive(Clone)]
pub(super) struct Load {
    /// Blocks of a machine or a process.
    blocks: usize,
    /// By process: what it needs, then what it needs of its own home, where transient resources were kept for it.
    need: Vec<Block>,
    /// By machine: what is free below soft capacity, then what is free at all.
    free: Vec<Block>,
    /// By machine.
    cost: Vec<i64>,
}

/// One side of a move: whether it is the home of those who come and go.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub machine: usize,
    pub comes: Option<(usize, bool)>,
    pub goes: Option<(usize, bool)>,
}

fn beyond(free: &[Block], more: Option<&[Block]>, less: Option<&[Block]>) -> i64 {
    let mut sums = [0; WIDTH];
    let mut add = |free: &Block, load: Block| {
        for lane in 0..WIDTH {
            sums[lane] += (load[lane] - free[lane]).max(0);
        }
    };
    match (more, less) {
        (Some(more), Some(less)) => {
            for ((free, more), less) in free.iter().zip(more).zip(less) {
                add(free, std::array::from_fn(|lane| more[lane] - less[lane]));
            }
        }
        (Some(more), None) => free.iter().zip(more).for_each(|(free, more)| add(free, *more)),
        (None, Some(less)) => free.iter().zip(less).for_each(|(free, less)| add(free, less.map(|need| -need))),
        (None, None) => free.iter().for_each(|free| add(free, [0; WIDTH])),
    }
    sums.iter().sum()
}

fn change(free: &mut [Block], need: &[Block], sign: i64) {
    for (free, need) in free.iter_mut().zip(need) {
        for lane in 0..WIDTH {
            free[lane] += sign * need[lane];
        }
    }
}

impl Load {
    /// Machines that nobody is on.
    pub fn new(problem: &Problem) -> Self {
        let (r, rows) = (problem.resources, problem.resources + problem.balances.len());
        let blocks = rows.div_ceil(WIDTH);
        let mut load = Self {
            blocks,
            need: vec![[0; WIDTH]; problem.processes() * 2 * blocks],
            free: vec![[ENDLESS; WIDTH]; problem.machines() * 2 * blocks],
            cost: vec![0; problem.machines()],
        };
        let weight = |row: usize| problem.load_weight[row].max(1);
        let balance = |row: usize, of: &[i64]| {
            let balance = &problem.balances[row - r];
            balance.weight * (balance.target * of[balance.first] - of[balance.second])
        };
        for process in 0..problem.processes() {
            let (base, need) = (process * 2 * blocks, problem.need_of(process));
            for row in 0..rows {
                let amount = if row < r { weight(row) * need[row] } else { -balance(row, need) };
                load.need[base + row / WIDTH][row % WIDTH] = amount;
                let at_home = if row < r && problem.transient[row] { 0 } else { amount };
                load.need[base + blocks + row / WIDTH][row % WIDTH] = at_home;
            }
        }
        for machine in 0..problem.machines() {
            let base = machine * 2 * blocks;
            let (soft, capacity) = (&problem.soft[machine * r..][..r], &problem.capacity[machine * r..][..r]);
            for row in 0..rows {
                load.free[base + row / WIDTH][row % WIDTH] = match row < r {
                    true if problem.load_weight[row] == 0 => ENDLESS,
                    true => weight(row) * soft[row],
                    false => -balance(row, capacity),
                };
                if row < r {
                    load.free[base + blocks + row / WIDTH][row % WIDTH] = weight(row) * capacity[row];
                }
            }
            load.judge(machine);
        }
        load
    }

    fn soft(&self, machine: usize) -> &[Block] {
        &self.free[machine * 2 * self.blocks..][..self.blocks]
    }
    fn hard(&self, machine: usize) -> &[Block] {
        &self.free[(machine * 2 + 1) * self.blocks..][..self.blocks]
    }
    fn need(&self, process: usize) -> &[Block] {
        &self.need[process * 2 * self.blocks..][..self.blocks]
    }
    /// What a process takes from the capacity of a machine that is its home or not, when it comes.
    fn takes(&self, process: usize, home: bool) -> &[Block] {
        &self.need[(process * 2 + usize::from(home)) * self.blocks..][..self.blocks]
    }

    /// Cost of a machine.
    pub fn cost(&self, machine: usize) -> i64 {
        self.cost[machine]
    }

    /// Cost that one side of a move would add.
    #[inline]
    pub fn cost_delta(&self, machine: usize, comes: Option<usize>, goes: Option<usize>) -> i64 {
        beyond(self.soft(machine), comes.map(|p| self.need(p)), goes.map(|p| self.need(p))) - self.cost[machine]
    }

    /// Whether all fits when one side of a move is done.
    #[inline]
    pub fn fits(&self, side: Side) -> bool {
        let takes = |who: Option<(usize, bool)>| who.map(|(process, home)| self.takes(process, home));
        beyond(self.hard(side.machine), takes(side.comes), takes(side.goes)) == 0
    }

    /// A process comes or goes; [`Load::judge`] is due. What transient resources it holds at home are held on.
    pub fn put(&mut self, process: usize, machine: usize, home: bool, comes: bool) {
        let (blocks, sign) = (self.blocks, if comes { -1 } else { 1 });
        let need = &self.need[process * 2 * blocks..][..2 * blocks];
        let (soft, hard) = self.free[machine * 2 * blocks..][..2 * blocks].split_at_mut(blocks);
        change(soft, &need[..blocks], sign);
        change(hard, &need[usize::from(home) * blocks..][..blocks], sign);
    }

    /// What a process needs of its home's transient resources is held there, wherever it is.
    pub fn hold(&mut self, process: usize, home: usize) {
        let blocks = self.blocks;
        let need = &self.need[process * 2 * blocks..][..2 * blocks];
        let hard = &mut self.free[(home * 2 + 1) * blocks..][..blocks];
        change(hard, &need[..blocks], -1);
        change(hard, &need[blocks..], 1);
    }

    /// Computes a machine's cost; returns what it changed by.
    pub fn judge(&mut self, machine: usize) -> i64 {
        let cost = beyond(self.soft(machine), None, None);
        let change = cost - self.cost[machine];
        self.cost[machine] = cost;
        change
    }

    /// What all machines together cost at least, wherever the processes are.
    pub fn least(&self) -> i64 {
        let machines = self.cost.len();
        let mut totals = vec![[0i128; WIDTH]; self.blocks];
        for machine in 0..machines {
            for (total, free) in totals.iter_mut().zip(self.soft(machine)) {
                total.iter_mut().zip(free).for_each(|(total, &free)| *total -= i128::from(free));
            }
        }
        totals.iter().flatten().map(|&over| over.max(0) as i64).sum()
    }
}
