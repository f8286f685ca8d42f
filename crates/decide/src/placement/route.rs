//! From wanted moves to steps that can be carried out: what waits for what, and who goes somewhere else for a while.
//!
//! Steps are found in layers. In a layer every moving VM counts on both its hosts, and rules hold against whoever is still
//! there; at its end the sources are free. A step then waits for exactly those departures from its target that its room
//! and its rules need: of each host always the first so many, so whatever order the executor takes, what is on a host is
//! never more than what was counted in some layer. A step that fails leaves its VM where it was, and what waits for it
//! does not start.

use super::{Amounts, DIMENSIONS, Occupancy, Space, add, subtract};

/// A move that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub vm: u32,
    pub to: u32,
    /// Index into the caller's reasons.
    pub reason: u32,
}

/// A move that can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hop {
    pub vm: u32,
    pub from: u32,
    pub to: u32,
    pub layer: u32,
    pub after: Vec<u32>,
    pub reason: u32,
    /// Not where the VM is to stay.
    pub temporary: bool,
}

/// Hops, and the moves for which there is no way.
pub(crate) struct Route {
    pub hops: Vec<Hop>,
    pub blocked: Vec<Wanted>,
    pub end: Occupancy,
}

struct Router<'a> {
    space: &'a Space<'a>,
    /// Who is where, with those that leave in this layer still on their source.
    now: Occupancy,
    /// Moves of the present layer.
    moving: Vec<(u32, u32)>,
    hops: Vec<Hop>,
    layer: u32,
    went_aside: Vec<bool>,
    /// Where a temporary stay may be.
    open: Vec<u32>,
}

/// Finds the steps of wanted moves, most important first.
pub(crate) fn route(space: &Space, start: &Occupancy, wanted: &[Wanted], open: &[u32]) -> Route {
    let mut router = Router {
        space,
        now: start.clone(),
        moving: Vec::new(),
        hops: Vec::new(),
        layer: 0,
        went_aside: vec![false; space.world.vms.len()],
        open: open.to_vec(),
    };
    let mut pending: Vec<Wanted> = wanted.to_vec();
    while !pending.is_empty() {
        let before = router.hops.len();
        pending.retain(|wanted| !router.start(*wanted, false));
        if router.hops.len() == before && !router.step_aside(&pending) {
            break;
        }
        router.end_layer();
    }
    let mut hops = router.hops;
    dependencies(space, start, &mut hops);
    Route { hops, blocked: pending, end: router.now }
}

impl Router<'_> {
    /// Starts a move in this layer if it can be made now.
    fn start(&mut self, wanted: Wanted, temporary: bool) -> bool {
        let Wanted { vm, to, reason } = wanted;
        let from = self.now.at[vm as usize];
        if from == to {
            return true;
        }
        let busy = self.moving.iter().any(|&(moving, _)| moving == vm);
        if busy
            || self.space.short(&self.space.need[vm as usize], to, &self.now.used[to as usize]).is_some()
            || self.space.conflict(vm, to, &self.now.at).is_some()
            || self.meets_arrival(vm, to)
        {
            return false;
        }
        add(&mut self.now.used[to as usize], &self.space.need[vm as usize]);
        self.moving.push((vm, to));
        self.hops.push(Hop { vm, from, to, layer: self.layer, after: Vec::new(), reason, temporary });
        true
    }

    /// Whether somebody who is on the way breaks a rule with the VM.
    fn meets_arrival(&self, vm: u32, to: u32) -> bool {
        self.space.apart_of[vm as usize].iter().map(|&group| &self.space.apart[group as usize]).any(|group| {
            let slot = self.space.slot(group.level, to);
            self.moving
                .iter()
                .any(|&(other, there)| group.members.contains(&other) && self.space.slot(group.level, there) == slot)
        })
    }

    fn end_layer(&mut self) {
        for (vm, to) in std::mem::take(&mut self.moving) {
            // It was added to its target when it started.
            subtract(&mut self.now.used[to as usize], &self.space.need[vm as usize]);
            self.now.take(self.space, vm);
            self.now.put(self.space, vm, to);
        }
        self.layer += 1;
    }

    /// Nothing can move: the smallest VM that waits goes somewhere else for a while, once.
    fn step_aside(&mut self, pending: &[Wanted]) -> bool {
        let mut waiting: Vec<&Wanted> = pending.iter().filter(|w| !self.went_aside[w.vm as usize]).collect();
        waiting.sort_by_key(|wanted| (self.space.need[wanted.vm as usize][0], wanted.vm));
        for wanted in waiting {
            let from = self.now.at[wanted.vm as usize];
            // Going aside helps only if somebody waits for the room.
            if !pending.iter().any(|other| other.to == from) {
                continue;
            }
            for at in 0..self.open.len() {
                let to = self.open[at];
                if to != from
                    && to != wanted.to
                    && self.space.may(wanted.vm, to)
                    && self.start(Wanted { to, ..*wanted }, true)
                {
                    self.went_aside[wanted.vm as usize] = true;
                    return true;
                }
            }
        }
        false
    }
}

/// What each hop waits for.
fn dependencies(space: &Space, start: &Occupancy, hops: &mut [Hop]) {
    let hosts = space.world.hosts.len();
    let mut arrivals: Vec<Vec<u32>> = vec![Vec::new(); hosts];
    let mut departures: Vec<Vec<u32>> = vec![Vec::new(); hosts];
    let mut last_of_vm = std::collections::HashMap::new();
    let mut hops_of: std::collections::HashMap<u32, Vec<u32>> = std::collections::HashMap::new();
    for (at, hop) in hops.iter().enumerate() {
        arrivals[hop.to as usize].push(at as u32);
        departures[hop.from as usize].push(at as u32);
        hops_of.entry(hop.vm).or_default().push(at as u32);
    }
    for (at, hop) in hops.iter_mut().enumerate() {
        hop.after.extend(last_of_vm.insert(hop.vm, at as u32));
    }
    for host in 0..hosts {
        room_dependencies(space, start.used[host], host as u32, &arrivals[host], &departures[host], hops);
    }
    for at in 0..hops.len() {
        rule_dependencies(space, at, &hops_of, hops);
        hops[at].after.sort_unstable();
        hops[at].after.dedup();
    }
}

/// Each arrival waits for as many of the first departures as the room of all arrivals up to it needs.
fn room_dependencies(
    space: &Space,
    mut load: Amounts,
    host: u32,
    arrivals: &[u32],
    departures: &[u32],
    hops: &mut [Hop],
) {
    let mut gone = 0;
    let room = &space.room[host as usize];
    for &arrival in arrivals {
        add(&mut load, &space.need[hops[arrival as usize].vm as usize]);
        while gone < departures.len() && (0..DIMENSIONS).any(|d| load[d] > room[d]) {
            subtract(&mut load, &space.need[hops[departures[gone] as usize].vm as usize]);
            gone += 1;
        }
        hops[arrival as usize].after.extend(&departures[..gone]);
    }
}

/// An arrival waits for those whom a rule keeps apart from it to have left.
fn rule_dependencies(space: &Space, at: usize, hops_of: &std::collections::HashMap<u32, Vec<u32>>, hops: &mut [Hop]) {
    let (vm, to, layer) = (hops[at].vm, hops[at].to, hops[at].layer);
    let mut after = Vec::new();
    for group in space.apart_of[vm as usize].iter().map(|&group| &space.apart[group as usize]) {
        let slot = space.slot(group.level, to);
        for other in group.members.iter().filter(|&&other| other != vm) {
            let theirs = hops_of.get(other).into_iter().flatten().copied();
            after.extend(theirs.filter(|&hop| {
                let hop = &hops[hop as usize];
                hop.layer < layer && space.slot(group.level, hop.from) == slot
            }));
        }
    }
    hops[at].after.extend(after);
}
