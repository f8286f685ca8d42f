//! Packing VMs into what hosts have left: constructive passes, lower bounds, and an exact search where that is small.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};
use virtward_model::world::Resource;

use super::space::{Amounts, DIMENSIONS, MEANING, NOWHERE, Occupancy, Space, Wants, add};

/// VMs that are placed as one: usually one VM, several if a must rule holds them together.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub vms: Vec<u32>,
    pub need: Amounts,
    pub want: Wants,
    /// The only host that is left, because others of the unit are there.
    pub bound_to: Option<u32>,
    /// Most important of its VMs.
    pub priority: u8,
}

/// Why no packing exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "proof", rename_all = "kebab-case")]
pub enum Impossible {
    /// No open host can take the VM even before any other is placed.
    NoHost {
        /// Its name.
        vm: String,
    },
    /// All that is needed is more than all that is free.
    Sum {
        /// Of which resource.
        resource: Resource,
        /// By all together.
        needed: u64,
        /// On all hosts together.
        free: u64,
    },
    /// The big ones do not fit beside each other.
    Big {
        /// By which resource.
        resource: Resource,
        /// How many VMs need at least `size`.
        vms: u64,
        /// What each of them needs at least.
        size: u64,
        /// For how many of that size there is room.
        places: u64,
    },
    /// Every way was tried.
    Searched {
        /// Partial placements looked at.
        nodes: u64,
    },
}

impl std::fmt::Display for Impossible {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Impossible::NoHost { vm } => write!(f, "no host can take {vm}"),
            Impossible::Sum { resource, needed, free } => {
                write!(f, "{} of {resource} are needed, {} are free", resource.show(*needed), resource.show(*free))
            }
            Impossible::Big { resource, vms, size, places } => write!(
                f,
                "{vms} VMs need {} of {resource} or more each, and there is room for {places} such VMs",
                resource.show(*size)
            ),
            Impossible::Searched { nodes } => write!(f, "every way was tried ({nodes} partial placements)"),
        }
    }
}

/// Which host of those that fit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The first after the last one chosen: fast.
    Next,
    /// Fewest should rules broken, then the least full afterwards.
    Spread,
    /// The fullest afterwards, so that big holes stay whole.
    Tight,
}

/// Makes items of VMs that are nowhere in `at`.
pub(crate) fn items(space: &Space, vms: &[u32], at: &[u32]) -> Vec<Item> {
    let mut wanted: Vec<(u32, u32)> = vms.iter().map(|&vm| (space.unit[vm as usize], vm)).collect();
    wanted.sort_unstable();
    wanted.dedup();
    wanted
        .chunk_by(|one, other| one.0 == other.0)
        .map(|chunk| {
            let vms: Vec<u32> = chunk.iter().map(|&(_, vm)| vm).collect();
            let (mut need, mut want) = ([0; DIMENSIONS], [0; 3]);
            for &vm in &vms {
                add(&mut need, &space.need[vm as usize]);
                want.iter_mut().zip(&space.want[vm as usize]).for_each(|(to, what)| *to += what);
            }
            let mates = &space.units[chunk[0].0 as usize];
            let bound_to = mates.iter().map(|&vm| at[vm as usize]).find(|&host| host != NOWHERE);
            let priority = vms.iter().map(|&vm| space.world.vms[vm as usize].priority.level()).min().unwrap_or(5);
            Item { vms, need, want, bound_to, priority }
        })
        .collect()
}

/// Whether the item fits on the host beside what is there.
pub(crate) fn fits(space: &Space, occupancy: &Occupancy, item: &Item, host: u32) -> bool {
    item.bound_to.is_none_or(|only| only == host)
        && space.short(&item.need, host, &occupancy.used[host as usize]).is_none()
        && item.vms.iter().all(|&vm| space.may(vm, host) && space.conflict(vm, host, &occupancy.at).is_none())
        && apart_within(space, item)
}

/// Whether rules allow the item's own VMs on one host: together and apart at once is a contradiction.
fn apart_within(space: &Space, item: &Item) -> bool {
    item.vms.len() == 1
        || item.vms.iter().all(|&vm| {
            space.apart_of[vm as usize].iter().all(|&group| {
                item.vms.iter().all(|other| *other == vm || !space.apart[group as usize].members.contains(other))
            })
        })
}

/// What the hosts have in all.
pub(crate) fn total(space: &Space, open: &[u32]) -> Amounts {
    let mut total = [0u64; DIMENSIONS];
    open.iter().for_each(|&host| add(&mut total, &space.room[host as usize]));
    total
}

/// By priority, then the largest share of what the open hosts have in all, so that what is hard to place comes first.
pub(crate) fn order(items: &mut [Item], total: &Amounts) {
    items.sort_by_key(|item| {
        let share =
            (0..DIMENSIONS).map(|d| (u128::from(item.need[d]) << 32) / u128::from(total[d].max(1))).max().unwrap_or(0);
        (item.priority, item.bound_to.is_none(), Reverse(share), item.vms[0])
    });
}

/// Places items in order; `None` for those that found no host. `start` is where [`Choice::Next`] begins, and goes on.
pub(crate) fn pack(
    space: &Space,
    occupancy: &mut Occupancy,
    items: &[Item],
    open: &[u32],
    choice: Choice,
    start: &mut usize,
) -> Vec<Option<u32>> {
    items
        .iter()
        .map(|item| {
            let host = match choice {
                Choice::Next => {
                    let found = (0..open.len())
                        .map(|step| (*start + step) % open.len())
                        .find(|&at| fits(space, occupancy, item, open[at]));
                    found.map(|at| {
                        *start = at + 1;
                        open[at]
                    })
                }
                Choice::Spread => {
                    let fitting = open.iter().copied().filter(|&host| fits(space, occupancy, item, host));
                    fitting.min_by_key(|&host| {
                        let unmet: usize = item.vms.iter().map(|&vm| space.unmet_wishes(vm, host, &occupancy.at)).sum();
                        (unmet, occupancy.pressure(space, host, &item.need, &item.want), host)
                    })
                }
                Choice::Tight => {
                    let fitting = open.iter().copied().filter(|&host| fits(space, occupancy, item, host));
                    fitting.min_by_key(|&host| (left(space, occupancy, item, host), host))
                }
            };
            if let Some(host) = host {
                item.vms.iter().for_each(|&vm| occupancy.put(space, vm, host));
            }
            host
        })
        .collect()
}

/// The largest share that stays free in a dimension that the item needs; in thousandths.
fn left(space: &Space, occupancy: &Occupancy, item: &Item, host: u32) -> u64 {
    let (room, used) = (&space.room[host as usize], &occupancy.used[host as usize]);
    (0..DIMENSIONS)
        .filter(|&d| item.need[d] > 0 && room[d] != u64::MAX)
        .map(|d| {
            let free = room[d].saturating_sub(used[d]).saturating_sub(item.need[d]);
            (u128::from(free) * 1000 / u128::from(room[d].max(1))) as u64
        })
        .max()
        .unwrap_or(0)
}

/// A proof that the items cannot all be placed, if one of the bounds gives one.
pub(crate) fn bound(space: &Space, occupancy: &Occupancy, items: &[Item], open: &[u32]) -> Option<Impossible> {
    for item in items {
        if !open.iter().any(|&host| fits(space, occupancy, item, host)) {
            return Some(Impossible::NoHost { vm: space.world.vms[item.vms[0] as usize].name.clone() });
        }
    }
    let usable: Vec<u32> =
        open.iter().copied().filter(|&host| items.iter().any(|item| fits(space, occupancy, item, host))).collect();
    (0..DIMENSIONS).find_map(|d| {
        let free: Vec<u64> = usable
            .iter()
            .map(|&host| space.room[host as usize][d].saturating_sub(occupancy.used[host as usize][d]))
            .collect();
        let resource = MEANING[d];
        let needed: u128 = items.iter().map(|item| u128::from(item.need[d])).sum();
        let all: u128 = free.iter().map(|&free| u128::from(free)).sum();
        if needed > all {
            let clip = |amount: u128| amount.min(u128::from(u64::MAX)) as u64;
            return Some(Impossible::Sum { resource, needed: clip(needed), free: clip(all) });
        }
        let mut sizes: Vec<u64> = items.iter().map(|item| item.need[d]).filter(|&size| size > 0).collect();
        sizes.sort_unstable_by_key(|&size| Reverse(size));
        let mut tried = 0;
        sizes.iter().enumerate().find_map(|(at, &size)| {
            // Sizes in order: each that differs from the next is a threshold; a bounded number of them is looked at.
            if sizes.get(at + 1) == Some(&size) || tried > 64 {
                return None;
            }
            tried += 1;
            let places: u128 = free.iter().map(|&free| u128::from(free / size)).sum();
            let vms = at as u64 + 1;
            (u128::from(vms) > places).then_some(Impossible::Big { resource, vms, size, places: places as u64 })
        })
    })
}

/// What the exact search came to.
pub(crate) enum Exact {
    /// A host for every item.
    Found(Vec<u32>),
    /// There is none; with the number of nodes.
    None(u64),
    /// The budget was used up.
    Unknown,
}

/// Looks for a place for every item by depth-first search over at most `budget` nodes. Hosts that are alike for an item
/// are tried once.
pub(crate) fn exact(space: &Space, occupancy: &mut Occupancy, items: &[Item], open: &[u32], budget: u64) -> Exact {
    let mut search = Search { space, open, items, nodes: 0, budget, chosen: Vec::new() };
    // The whole recursion is bounded by the number of items, which the caller keeps small.
    match search.place(occupancy, 0) {
        Some(true) => Exact::Found(search.chosen),
        Some(false) => Exact::None(search.nodes),
        None => Exact::Unknown,
    }
}

struct Search<'a> {
    space: &'a Space<'a>,
    open: &'a [u32],
    items: &'a [Item],
    nodes: u64,
    budget: u64,
    chosen: Vec<u32>,
}

impl Search<'_> {
    fn place(&mut self, occupancy: &mut Occupancy, depth: usize) -> Option<bool> {
        let Some(item) = self.items.get(depth) else { return Some(true) };
        self.nodes += 1;
        if self.nodes > self.budget {
            return None;
        }
        if !self.sum_fits(occupancy, depth) {
            return Some(false);
        }
        let mut tried: Vec<u32> = Vec::new();
        let mut hosts: Vec<u32> =
            self.open.iter().copied().filter(|&host| fits(self.space, occupancy, item, host)).collect();
        hosts.sort_by_key(|&host| left(self.space, occupancy, item, host));
        for host in hosts {
            if tried.iter().any(|&other| self.alike(occupancy, host, other)) {
                continue;
            }
            tried.push(host);
            item.vms.iter().for_each(|&vm| occupancy.put(self.space, vm, host));
            self.chosen.push(host);
            let outcome = self.place(occupancy, depth + 1);
            item.vms.iter().for_each(|&vm| occupancy.take(self.space, vm));
            match outcome {
                Some(false) => self.chosen.pop(),
                done => return done,
            };
        }
        Some(false)
    }

    fn sum_fits(&self, occupancy: &Occupancy, depth: usize) -> bool {
        (0..DIMENSIONS).all(|d| {
            let needed: u128 = self.items[depth..].iter().map(|item| u128::from(item.need[d])).sum();
            let free = |&host: &u32| {
                u128::from(self.space.room[host as usize][d].saturating_sub(occupancy.used[host as usize][d]))
            };
            needed <= self.open.iter().map(free).sum::<u128>()
        })
    }

    /// Whether two hosts are the same for all that is still to be placed: as much free, allowed for the same classes,
    /// and no rule tells them apart.
    fn alike(&self, occupancy: &Occupancy, one: u32, other: u32) -> bool {
        let free = |host: u32| -> Amounts {
            std::array::from_fn(|d| self.space.room[host as usize][d].saturating_sub(occupancy.used[host as usize][d]))
        };
        free(one) == free(other)
            && self.items.iter().all(|item| {
                item.bound_to.is_none()
                    && item.vms.iter().all(|&vm| {
                        self.space.apart_of[vm as usize].is_empty()
                            && self.space.may(vm, one) == self.space.may(vm, other)
                    })
            })
    }
}
