//! What moves VMs in the simulation: nothing, chance, the classic greedy mover, and balancing.

use std::{collections::HashMap, time::Instant};

use virtward_decide::{
    balance::{Memory, Policy, round},
    placement::check,
};
use virtward_model::world::World;

use crate::trace::Random;

/// Moves as (VM, host), by index.
pub type Moves = Vec<(usize, usize)>;

/// What a mover sees: by VM its host, demand in thousandths of a CPU and memory; by host what there is.
pub struct View<'a> {
    pub at: &'a [usize],
    pub want: &'a [u64],
    pub memory: &'a [u64],
    pub cpu: u64,
    pub host_memory: u64,
    pub hosts: usize,
}

impl View<'_> {
    fn loads(&self) -> (Vec<u64>, Vec<u64>, Vec<Vec<usize>>) {
        let (mut cpu, mut memory) = (vec![0; self.hosts], vec![0; self.hosts]);
        let mut on = vec![Vec::new(); self.hosts];
        for (vm, &host) in self.at.iter().enumerate() {
            cpu[host] += self.want[vm];
            memory[host] += self.memory[vm];
            on[host].push(vm);
        }
        (cpu, memory, on)
    }
}

/// From the most to the least loaded host, as long as they differ by more than a tenth of a host: the VM that brings them
/// nearest to each other.
pub fn greedy(view: &View, most: usize) -> Moves {
    let (mut cpu, mut memory, mut on) = view.loads();
    let mut moves = Vec::new();
    while moves.len() < most {
        let from = (0..view.hosts).max_by_key(|&host| cpu[host]).expect("there are hosts");
        let to = (0..view.hosts).min_by_key(|&host| cpu[host]).expect("there are hosts");
        let gap = cpu[from] - cpu[to];
        if gap <= view.cpu / 10 {
            break;
        }
        let fits = on[from].iter().copied().filter(|&vm| memory[to] + view.memory[vm] <= view.host_memory);
        let best = fits.min_by_key(|&vm| (2 * view.want[vm]).abs_diff(gap)).filter(|&vm| view.want[vm] < gap);
        let Some(vm) = best.filter(|&vm| view.want[vm] > 0) else { break };
        on[from].retain(|&other| other != vm);
        on[to].push(vm);
        (cpu[from], cpu[to]) = (cpu[from] - view.want[vm], cpu[to] + view.want[vm]);
        (memory[from], memory[to]) = (memory[from] - view.memory[vm], memory[to] + view.memory[vm]);
        moves.push((vm, to));
    }
    moves
}

/// A random VM of every host with unmet demand, to a random host with room.
pub fn random(view: &View, random: &mut Random) -> Moves {
    let (cpu, mut memory, on) = view.loads();
    let mut moves = Vec::new();
    for from in (0..view.hosts).filter(|&host| cpu[host] > view.cpu && !on[host].is_empty()) {
        let vm = on[from][random.below(on[from].len() as u64) as usize];
        let to = random.below(view.hosts as u64) as usize;
        if to != from && memory[to] + view.memory[vm] <= view.host_memory {
            memory[to] += view.memory[vm];
            moves.push((vm, to));
        }
    }
    moves
}

/// Balancing as the daemon does it, with what it remembers.
pub struct Balancer {
    pub policy: Policy,
    pub memory: Memory,
    pub slowest_s: f64,
    pub rounds_with_moves: usize,
    pub violations: usize,
}

impl Balancer {
    pub fn moves(&mut self, world: &World) -> Moves {
        let begun = Instant::now();
        let (plan, _, memory) = round(world, &self.policy, &self.memory);
        self.slowest_s = self.slowest_s.max(begun.elapsed().as_secs_f64());
        self.memory = memory;
        self.rounds_with_moves += usize::from(!plan.steps.is_empty());
        self.violations += check(world, &plan).len();
        let hosts: HashMap<_, _> = world.hosts.iter().enumerate().map(|(at, host)| (&host.name, at)).collect();
        plan.steps.iter().map(|step| (step.vm.as_u128() as usize, hosts[&step.to])).collect()
    }
}
