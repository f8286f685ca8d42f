//! In which order lost VMs come back, and where.
//!
//! Lower tiers first; a VM waits for those that it depends on, until they are ready or its patience ends (so that a cycle
//! or a dependency without room delays and never blocks); so many starts at a time on one host; a VM that failed is
//! tried again for ever, with growing pauses, elsewhere first. Everything that is not done is said with its reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::{
    planted::{Planted, planted},
    record::{Desired, Gate, HostId, Owner, Standing, View, VmId, VmPhase, VmRecord},
    timing::Moment,
};

/// First pause after a failed start; doubles with each more.
const BACKOFF_MS: u64 = 5_000;
/// Longest pause.
const BACKOFF_MS_MAX: u64 = 300_000;

/// What this process remembers about VMs: since when their record is as it is.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    seen: BTreeMap<VmId, Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    revision: u64,
    standing: Standing,
    since: Moment,
}

impl Memory {
    /// Takes note of a view.
    pub fn note(&mut self, now: Moment, view: &View) {
        self.seen.retain(|vm, _| view.vms.contains_key(vm));
        for (vm, record) in &view.vms {
            let standing = view.standing(&record.value);
            let seen = self.seen.entry(*vm).or_insert(Seen { revision: record.revision, standing, since: now });
            if seen.revision != record.revision || seen.standing != standing {
                *seen = Seen { revision: record.revision, standing, since: now };
            }
        }
    }

    fn since(&self, vm: VmId, now: Moment) -> Moment {
        self.seen.get(&vm).map_or(now, |seen| seen.since)
    }
}

/// A host that may be given VMs.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Host and epoch.
    pub owner: Owner,
    /// Revision of its record, for the compare.
    pub revision: u64,
    /// Memory for guests, in bytes.
    pub memory_bytes: u64,
}

/// A VM to be given to a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// VM.
    pub vm: VmId,
    /// To whom.
    pub to: Owner,
    /// Revision of the host's record.
    pub host_revision: u64,
}

/// Why a VM is not started now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Its owner is not proved dead.
    NoProof(HostId),
    /// Waits for another VM.
    After(VmId),
    /// Failed before; tried again after so many milliseconds.
    Pause(u64),
    /// Every host that could take it starts as many as it may.
    Busy,
    /// No host in service has room.
    NoRoom {
        /// What it needs, in bytes.
        needs: u64,
        /// The most that is free on a host that may have it, in bytes.
        most_free: u64,
    },
    /// The only host that it may run on is not in service.
    OnlyOn(HostId),
    /// The only hosts that could have it are where the other one of its pair is.
    Apart(VmId),
    /// Its standby takes over, or has done so.
    Standby(VmId),
    /// The disk is ahead of the store, or its record cannot be judged.
    Blocked(String),
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoProof(host) => write!(f, "waits for a proof that {host} does not run it any more"),
            Self::After(vm) => write!(f, "waits until {vm} is ready"),
            Self::Pause(ms) => write!(f, "failed; tried again in {} s", ms.div_ceil(1000)),
            Self::Busy => f.write_str("waits for a turn: its hosts start as many VMs as they may"),
            Self::NoRoom { needs, most_free } => {
                write!(f, "no host has room: it needs {} MiB, at most {} MiB are free", needs >> 20, most_free >> 20)
            }
            Self::OnlyOn(host) => write!(f, "may run on {host} only, which is not in service"),
            Self::Apart(other) => write!(f, "must not run on the same host as {other}, and no other has it"),
            Self::Standby(other) => write!(f, "does not run as {other} takes over from it"),
            Self::Blocked(why) => write!(f, "blocked: {why}"),
        }
    }
}

/// What is given out now, and why the rest is not. Claims are in order; each must be done with its compares or not at all.
pub fn plan(
    now: Moment,
    view: &View,
    memory: &Memory,
    candidates: &[Candidate],
    start_ms: u64,
) -> (Vec<Claim>, BTreeMap<VmId, Held>) {
    let mut hosts = Hosts::new(view, candidates);
    let mut wanted: Vec<(&VmId, &VmRecord)> = Vec::new();
    let mut held = BTreeMap::new();
    for (vm, record) in &view.vms {
        let record = &record.value;
        match view.standing(record) {
            Standing::Claimable => wanted.push((vm, record)),
            Standing::Lost if planted(Planted::ClaimWithoutProof) => wanted.push((vm, record)),
            Standing::Lost if record.desired == Desired::Running => {
                let host = record.owner.as_ref().map(|owner| owner.host.clone()).unwrap_or_default();
                held.insert(*vm, Held::NoProof(host));
            }
            // Not begun or not done in time by a host that lives: it cannot go on once another has it.
            Standing::Owned(VmPhase::Claimed | VmPhase::Starting)
                if record.moving_to.is_none() && now.since(memory.since(*vm, now)) > start_ms =>
            {
                wanted.push((vm, record));
            }
            Standing::Idle if record.blocked.is_some() => {
                held.insert(*vm, Held::Blocked(record.blocked.clone().unwrap_or_default()));
            }
            _ => {}
        }
    }
    wanted.sort_by_key(|(vm, record)| (record.policy.tier, std::cmp::Reverse(record.policy.memory_bytes), **vm));
    let mut claims = Vec::new();
    for (vm, record) in wanted {
        let waits = pause(now, *vm, record, memory)
            .or_else(|| dependency(now, *vm, record, view, memory))
            .or_else(|| role(view, *vm));
        match waits.map_or_else(|| hosts.choose(record, apart(view, *vm, &claims).as_ref()), Err) {
            Ok(at) => claims.push(hosts.take(at, *vm, record)),
            Err(why) => {
                held.insert(*vm, why);
            }
        }
    }
    (claims, held)
}

/// One of a pair that has led and was not told to follow since.
fn role(view: &View, vm: VmId) -> Option<Held> {
    let (_, pair) = view.pair_of(vm)?;
    (!pair.value.may_run(vm)).then_some(Held::Standby(pair.value.active))
}

/// The other one of a VM's pair, and the hosts where that is or is about to be.
fn apart(view: &View, vm: VmId, claims: &[Claim]) -> Option<(VmId, BTreeSet<HostId>)> {
    let (_, pair) = view.pair_of(vm)?;
    let other = pair.value.other(vm);
    let mut hosts = view.apart_from(vm);
    hosts.extend(claims.iter().filter(|claim| claim.vm == other).map(|claim| claim.to.host.clone()));
    Some((other, hosts))
}

fn pause(now: Moment, vm: VmId, record: &VmRecord, memory: &Memory) -> Option<Held> {
    let failures: u32 = record.failed_on.values().sum();
    let shift = failures.checked_sub(1)?.min(16);
    let pause = (BACKOFF_MS << shift).min(BACKOFF_MS_MAX);
    let waited = now.since(memory.since(vm, now));
    (waited < pause).then(|| Held::Pause(pause - waited))
}

/// A VM that this one has to wait for. One that should not run, or that nobody knows, holds up nobody.
fn dependency(now: Moment, vm: VmId, record: &VmRecord, view: &View, memory: &Memory) -> Option<Held> {
    if now.since(memory.since(vm, now)) >= record.policy.ready_ms {
        return None;
    }
    let holds = |other: &&VmId| {
        view.vms.get(*other).is_some_and(|first| {
            let first = &first.value;
            let up = first.phase == VmPhase::Running && matches!(view.standing(first), Standing::Owned(_));
            let passed = up && (first.ready || first.policy.gate == Gate::Running);
            let patience = first.policy.ready_ms;
            let tired = up && now.since(memory.since(**other, now)) >= patience;
            first.desired == Desired::Running && first.blocked.is_none() && !passed && !tired
        })
    };
    record.policy.after.iter().filter(|other| **other != vm).find(holds).map(|other| Held::After(*other))
}

/// What hosts can take, as the plan goes on.
struct Hosts<'a> {
    list: Vec<(&'a Candidate, i128, u32)>,
    starts_max: u32,
}

impl<'a> Hosts<'a> {
    fn new(view: &View, candidates: &'a [Candidate]) -> Self {
        let mut free: BTreeMap<&HostId, (i128, u32)> =
            candidates.iter().map(|one| (&one.owner.host, (i128::from(one.memory_bytes), 0))).collect();
        for record in view.vms.values().map(|record| &record.value).filter(|record| record.phase != VmPhase::Stopped) {
            for owner in record.owner.iter().chain(&record.moving_to) {
                if let Some((bytes, starts)) = free.get_mut(&owner.host) {
                    *bytes -= i128::from(record.policy.memory_bytes);
                    *starts += u32::from(record.phase != VmPhase::Running);
                }
            }
        }
        let list = candidates.iter().map(|one| (one, free[&one.owner.host].0, free[&one.owner.host].1)).collect();
        Self { list, starts_max: view.switches().starts_max.max(1) }
    }

    /// Elsewhere than where it failed, then where most memory is free.
    fn choose(&self, record: &VmRecord, apart: Option<&(VmId, BTreeSet<HostId>)>) -> Result<usize, Held> {
        let needs = i128::from(record.policy.memory_bytes);
        let only = record.policy.only_on.as_ref();
        let mut allowed = self
            .list
            .iter()
            .enumerate()
            .filter(|(_, (one, ..))| only.is_none_or(|host| *host == one.owner.host))
            .peekable();
        if let (Some(host), None) = (only, allowed.peek()) {
            return Err(Held::OnlyOn(host.clone()));
        }
        let unfit = |one: &Candidate| {
            record.owner.as_ref().is_some_and(|owner| record.phase != VmPhase::Stopped && *owner == one.owner)
        };
        let allowed: Vec<_> = allowed.filter(|(_, (one, ..))| !unfit(one)).collect();
        let is_apart = |host: &HostId| apart.is_none_or(|(_, hosts)| !hosts.contains(host));
        if let Some((other, _)) =
            apart.filter(|_| !allowed.is_empty() && allowed.iter().all(|(_, (one, ..))| !is_apart(&one.owner.host)))
        {
            return Err(Held::Apart(*other));
        }
        let allowed: Vec<_> = allowed.into_iter().filter(|(_, (one, ..))| is_apart(&one.owner.host)).collect();
        let fits = allowed.iter().filter(|(_, (_, free, _))| *free >= needs);
        let turn = fits.clone().filter(|(_, (_, _, starts))| *starts < self.starts_max);
        let failures = |host: &HostId| record.failed_on.get(host).copied().unwrap_or(0);
        let best =
            turn.min_by_key(|(_, (one, free, starts))| (failures(&one.owner.host), *starts, -*free, &one.owner.host));
        match best {
            Some((at, _)) => Ok(*at),
            None if fits.count() > 0 => Err(Held::Busy),
            None => {
                let most = allowed.iter().map(|(_, (_, free, _))| *free).max().unwrap_or(0).max(0);
                Err(Held::NoRoom { needs: record.policy.memory_bytes, most_free: u64::try_from(most).unwrap_or(0) })
            }
        }
    }

    fn take(&mut self, at: usize, vm: VmId, record: &VmRecord) -> Claim {
        let (one, free, starts) = &mut self.list[at];
        *free -= i128::from(record.policy.memory_bytes);
        *starts += 1;
        Claim { vm, to: one.owner.clone(), host_revision: one.revision }
    }
}
