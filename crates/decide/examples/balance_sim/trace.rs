//! A day of a cluster: who runs where and what each VM wants every five minutes; made from a seed, or read from a file.
//!
//! As text: `hosts N cpus C memory_gib G`, then a line for each VM with its host, vCPUs, memory in GiB, megabytes dirtied
//! a second, and 288 demands in percent of its vCPUs.

use std::fmt::Write;

/// Five minutes each.
pub const TICKS: usize = 288;

/// One VM's day.
pub struct Load {
    pub host: usize,
    pub vcpus: u64,
    pub memory_gib: u64,
    pub dirty_mb: u64,
    /// Percent of its vCPUs, by tick.
    pub percent: Vec<u8>,
}

/// A cluster's day.
pub struct Trace {
    pub hosts: usize,
    pub cpus: u64,
    pub memory_gib: u64,
    pub vms: Vec<Load>,
}

/// A small generator of random numbers; the trace must be the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

impl Trace {
    /// Half of the VMs follow the day, with their peaks at a few hours; others run batches, or are quiet with spikes. VMs of
    /// a kind tend to be together, as people who fill a cluster do it project by project.
    pub fn generate(hosts: usize, vms: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut trace = Self { hosts, cpus: 32, memory_gib: 256, vms: Vec::with_capacity(vms) };
        let mut used = vec![0; hosts];
        let kinds: Vec<u64> = (0..hosts).map(|_| random.below(4)).collect();
        for number in 0..vms {
            let memory_gib = [4, 4, 8, 8, 16][random.below(5) as usize];
            let mut host = number % hosts;
            // The next host with room; no more than a bounded look.
            for _ in 0..hosts {
                if used[host] + memory_gib <= trace.memory_gib {
                    break;
                }
                host = (host + 1) % hosts;
            }
            used[host] += memory_gib;
            let kind = if random.below(10) < 6 { kinds[host] } else { random.below(4) };
            let vcpus = [1, 2, 2, 4][random.below(4) as usize];
            let percent = day(kind, &mut random);
            trace.vms.push(Load { host, vcpus, memory_gib, dirty_mb: random.below(60), percent });
        }
        trace
    }

    /// As text.
    pub fn write(&self) -> String {
        let mut text = format!("hosts {} cpus {} memory_gib {}\n", self.hosts, self.cpus, self.memory_gib);
        for vm in &self.vms {
            let _ = write!(text, "{} {} {} {}", vm.host, vm.vcpus, vm.memory_gib, vm.dirty_mb);
            for percent in &vm.percent {
                let _ = write!(text, " {percent}");
            }
            text.push('\n');
        }
        text
    }

    /// From text.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut lines = text.lines().enumerate();
        let (_, first) = lines.next().ok_or("the trace is empty")?;
        let words: Vec<&str> = first.split_ascii_whitespace().collect();
        let [_, hosts, _, cpus, _, memory] = words[..] else {
            return Err("line 1 is not `hosts N cpus C memory_gib G`".into());
        };
        let number = |line: usize, word: &str| {
            word.parse::<u64>().map_err(|_| format!("line {}: {word:?} is not a number", line + 1))
        };
        let mut trace = Self {
            hosts: number(0, hosts)? as usize,
            cpus: number(0, cpus)?,
            memory_gib: number(0, memory)?,
            vms: Vec::new(),
        };
        for (at, line) in lines {
            let numbers: Vec<u64> =
                line.split_ascii_whitespace().map(|word| number(at, word)).collect::<Result<_, _>>()?;
            let [host, vcpus, memory_gib, dirty_mb, percent @ ..] = &numbers[..] else {
                return Err(format!("line {}: a VM has 4 numbers and {TICKS} demands", at + 1));
            };
            if percent.len() != TICKS || *host as usize >= trace.hosts {
                return Err(format!("line {}: {} demands instead of {TICKS}, or no such host", at + 1, percent.len()));
            }
            trace.vms.push(Load {
                host: *host as usize,
                vcpus: *vcpus,
                memory_gib: *memory_gib,
                dirty_mb: *dirty_mb,
                percent: percent.iter().map(|&percent| percent.min(100) as u8).collect(),
            });
        }
        Ok(trace)
    }
}

fn day(kind: u64, random: &mut Random) -> Vec<u8> {
    let base = 10 + random.below(25) as i64;
    let height = 30 + random.below(50) as i64;
    // Offices at ten, evenings at twenty, batches at night, and spikes at any time.
    let (peak, width) = match kind {
        0 => (10 * 12 + random.below(24) as i64, 48),
        1 => (20 * 12 + random.below(12) as i64, 30),
        2 => (2 * 12 + random.below(36) as i64, 18),
        _ => (random.below(TICKS as u64) as i64, 6),
    };
    let noise = 1 + random.below(10);
    (0..TICKS as i64)
        .map(|tick| {
            let away = (tick - peak).abs();
            let away = away.min(TICKS as i64 - away);
            let hill = (height * (width - away)).max(0) / width;
            (base + hill + random.below(noise * 2) as i64 - noise as i64).clamp(0, 100) as u8
        })
        .collect()
}
