//! A day of load on a cluster under four movers, in one run: demand that is not met, moves, imbalance, violations.
//!
//!     balance_sim [--hosts N] [--vms N] [--seed S] [--trace FILE] [--save FILE] [--eagerness 1..5] [--json]
//!
//! What cannot be met by any mover, as all hosts together have less than is wanted, is told apart. Every migration takes
//! a tenth of both hosts while it lasts, whoever asks for it.

mod movers;
mod trace;

use std::{collections::HashMap, error::Error, fs};

use movers::{Balancer, Moves, View, greedy, random};
use trace::{Random, TICKS, Trace};
use virtward_decide::{
    balance::{Eagerness, Memory, Policy},
    placement::migration_seconds,
};
use virtward_model::{
    Bytes,
    world::{Failover, Host, Mode, Resources, Vm, World},
};

/// What a day came to.
#[derive(Default)]
struct Day {
    /// CPU hours that were wanted and not got.
    unmet: f64,
    moves: usize,
    /// Mean over the day of the standard deviation of hosts' loads, in percent of a host.
    imbalance: f64,
    /// Hosts given more memory than they have, and what the linter said.
    violations: usize,
    /// Moves back to a host that the VM had left within two hours.
    back_and_forth: usize,
    slowest_s: f64,
}

enum Mover {
    Nothing,
    Random(Random),
    Greedy,
    Balance(Box<Balancer>),
}

fn world(trace: &Trace) -> World {
    let capacity =
        Resources { cpu_milli: trace.cpus * 1000, memory: Bytes::gib(trace.memory_gib), ..Resources::default() };
    let hosts: Vec<Host> = (0..trace.hosts).map(|at| Host::new(&format!("h{at}"), capacity)).collect();
    let vms = trace.vms.iter().enumerate().map(|(at, load)| {
        let size =
            Resources { cpu_milli: load.vcpus * 1000, memory: Bytes::gib(load.memory_gib), ..Resources::default() };
        let mut vm = Vm::new(uuid::Uuid::from_u128(at as u128), format!("vm{at}"), size);
        vm.host = Some(hosts[load.host].name.clone());
        vm.dirty_rate = load.dirty_mb * 1_000_000;
        vm.failover = true;
        vm
    });
    let vms = vms.collect();
    World { hosts, vms, failover: Failover { failures: 1, domain_level: None }, ..World::default() }
}

fn simulate(trace: &Trace, mut mover: Mover) -> Day {
    let mut world = world(trace);
    let mut at: Vec<usize> = trace.vms.iter().map(|load| load.host).collect();
    let memory: Vec<u64> = trace.vms.iter().map(|load| load.memory_gib << 30).collect();
    let (cpu, host_memory) = (trace.cpus * 1000, trace.memory_gib << 30);
    let mut left: HashMap<(usize, usize), usize> = HashMap::new();
    let mut day = Day::default();
    for tick in 0..TICKS {
        let want: Vec<u64> = trace.vms.iter().map(|load| load.vcpus * 10 * u64::from(load.percent[tick])).collect();
        let view = View { at: &at, want: &want, memory: &memory, cpu, host_memory, hosts: trace.hosts };
        let moves: Moves = match &mut mover {
            Mover::Nothing => Vec::new(),
            Mover::Random(numbers) => random(&view, numbers),
            Mover::Greedy => greedy(&view, trace.hosts * 2),
            Mover::Balance(balancer) => {
                for (vm, facts) in world.vms.iter_mut().enumerate() {
                    facts.demand.cpu_milli = want[vm];
                    facts.host = Some(world.hosts[at[vm]].name.clone());
                }
                balancer.moves(&world)
            }
        };
        let mut load = vec![0.0; trace.hosts];
        for &(vm, to) in &moves {
            let from = std::mem::replace(&mut at[vm], to);
            day.moves += 1;
            day.back_and_forth += usize::from(left.get(&(vm, to)).is_some_and(|&then| tick - then <= 24));
            left.insert((vm, from), tick);
            let dirty = trace.vms[vm].dirty_mb * 1_000_000;
            let seconds = migration_seconds(memory[vm], dirty, 1_000_000_000).unwrap_or(300.0).min(300.0);
            [from, to].iter().for_each(|&host| load[host] += 0.1 * cpu as f64 * seconds / 300.0);
        }
        account(&mut day, &at, &want, &memory, load, cpu as f64, host_memory);
    }
    day.imbalance /= TICKS as f64;
    if let Mover::Balance(balancer) = mover {
        day.slowest_s = balancer.slowest_s;
        day.violations += balancer.violations;
    }
    day
}

fn account(day: &mut Day, at: &[usize], want: &[u64], memory: &[u64], mut load: Vec<f64>, cpu: f64, host_memory: u64) {
    let mut used = vec![0; load.len()];
    for (vm, &host) in at.iter().enumerate() {
        load[host] += want[vm] as f64;
        used[host] += memory[vm];
    }
    let hours = 24.0 / TICKS as f64;
    day.unmet += load.iter().map(|load| (load - cpu).max(0.0)).sum::<f64>() / 1000.0 * hours;
    day.violations += used.iter().filter(|&&used| used > host_memory).count();
    let mean = load.iter().sum::<f64>() / load.len() as f64;
    let variance = load.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / load.len() as f64;
    day.imbalance += variance.sqrt() * 100.0 / cpu;
}

/// CPU hours that no mover can give: more is wanted than all hosts have.
fn unavoidable(trace: &Trace) -> f64 {
    let all = (trace.cpus * 1000 * trace.hosts as u64) as f64;
    (0..TICKS)
        .map(|tick| {
            let want: u64 = trace.vms.iter().map(|load| load.vcpus * 10 * u64::from(load.percent[tick])).sum();
            (want as f64 - all).max(0.0) / 1000.0 * 24.0 / TICKS as f64
        })
        .sum()
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut hosts, mut vms, mut seed, mut eagerness) = (100, 2000, 1, 4);
    let (mut read, mut save, mut json) = (None, None, false);
    let mut given = std::env::args().skip(1);
    while let Some(option) = given.next() {
        let mut value = || given.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--hosts" => hosts = value()?.parse()?,
            "--vms" => vms = value()?.parse()?,
            "--seed" => seed = value()?.parse()?,
            "--eagerness" => eagerness = value()?.parse()?,
            "--trace" => read = Some(value()?),
            "--save" => save = Some(value()?),
            "--json" => json = true,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let trace = match read {
        Some(path) => Trace::read(&fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?)?,
        None => Trace::generate(hosts, vms, seed),
    };
    if let Some(path) = save {
        fs::write(&path, trace.write()).map_err(|error| format!("{path}: {error}"))?;
    }
    let policy = Policy {
        mode: Mode::Automatic,
        eagerness: Eagerness::new(eagerness).ok_or("--eagerness is from 1 to 5")?,
        ..Policy::default()
    };
    let balancer = Balancer { policy, memory: Memory::default(), slowest_s: 0.0, rounds_with_moves: 0, violations: 0 };
    let movers = [
        ("nothing", Mover::Nothing),
        ("random", Mover::Random(Random(seed))),
        ("greedy", Mover::Greedy),
        ("virtward", Mover::Balance(Box::new(balancer))),
    ];
    let floor = unavoidable(&trace);
    if !json {
        println!("{} hosts, {} VMs, 24 hours; no mover can meet {floor:.1} CPU hours", trace.hosts, trace.vms.len());
        println!(
            "mover      unmet CPU h  avoidable removed    moves  back and forth  imbalance  violations  slowest plan"
        );
    }
    let mut avoidable = 0.0;
    for (name, mover) in movers {
        let day = simulate(&trace, mover);
        if name == "nothing" {
            avoidable = day.unmet - floor;
        }
        let removed = if avoidable > 0.0 { 100.0 * (1.0 - (day.unmet - floor) / avoidable) } else { 0.0 };
        match json {
            true => println!(
                "{{\"mover\": \"{name}\", \"unmet_cpu_h\": {:.3}, \"removed_percent\": {removed:.2}, \"moves\": {}, \"back_and_forth\": {}, \"imbalance_percent\": {:.2}, \"violations\": {}, \"slowest_plan_s\": {:.3}}}",
                day.unmet, day.moves, day.back_and_forth, day.imbalance, day.violations, day.slowest_s
            ),
            false => println!(
                "{name:<9} {:>12.1} {removed:>17.1} % {:>8} {:>15} {:>8.1} % {:>11} {:>11.2} s",
                day.unmet, day.moves, day.back_and_forth, day.imbalance, day.violations, day.slowest_s
            ),
        }
    }
    Ok(())
}
