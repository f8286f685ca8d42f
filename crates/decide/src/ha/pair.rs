//! An active VM and its standby: who is who, and how they change roles.
//!
//! Both run, on different hosts, and the service in the standby follows the one in the active. The roles are a record of
//! their own; it changes hands once, by a transaction, and the new active one begins only when the old one is over.
//!
//! ```text
//!   generation n, active A ──A is lost or given up; a service of A stays down; a person──► n + 1, active S, A meant to be off
//!        ▲                    txn: pair, A and S as they were seen, S's host in service        │
//!        │                                                                                    │ A's host ends it, or the
//!        │                                                                                    │ death of A's host is proved
//!        └──────────── told: S has led since n + 1 ◄── addresses, promote hook in S ◄──────────┘
//!                      (with a demote hook A starts again, and is told to follow)
//! ```
//!
//! Invariants:
//! - A VM is told to lead only if the other one is down and meant to be, or was told to follow in this generation.
//! - What led in a generation before and was not told to follow runs only to be told that, after the switch is done.
//! - They are never placed on one host.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    planted::{Planted, planted},
    record::{Desired, Gate, HostId, Owner, Standing, View, VmId, VmPhase, VmRecord, host_key, pair_key, vm_key},
    txn::{Txn, Versioned},
};

/// An address that is where the active one is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floating {
    /// IPv4 with the length of its prefix: `10.0.0.9/24`.
    pub address: String,
    /// The guest's network device.
    pub device: String,
}

/// When a VM was told its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Generation of the pair.
    pub pair: u64,
    /// Generation of the VM.
    pub vm: u64,
}

/// `/ha/pair/P`, by the VM that was the active one when the pair was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairRecord {
    /// Rises whenever the roles change.
    pub generation: u64,
    /// Who leads.
    pub active: VmId,
    /// Who follows.
    pub standby: VmId,
    /// Addresses of the active one.
    #[serde(default)]
    pub addresses: Vec<Floating>,
    /// Program and arguments that make a guest the active one. Ends with 0 as well if it is.
    pub promote: Vec<String>,
    /// The same to make one follow that led. Empty: what led stays down.
    #[serde(default)]
    pub demote: Vec<String>,
    /// Who was told its role, when.
    #[serde(default)]
    pub told: BTreeMap<VmId, Told>,
    /// The old active one is started again once the new one leads.
    #[serde(default)]
    pub returns: bool,
    /// What happened last, for people.
    #[serde(default)]
    pub note: String,
}

impl PairRecord {
    /// The other one of both.
    pub fn other(&self, vm: VmId) -> VmId {
        if vm == self.active { self.standby } else { self.active }
    }

    /// Whether a VM is one of both.
    pub fn has(&self, vm: VmId) -> bool {
        vm == self.active || vm == self.standby
    }

    fn was_told(&self, vm: VmId) -> bool {
        self.told.get(&vm).is_some_and(|told| told.pair == self.generation || planted(Planted::KeepTold))
    }

    /// Whether the active one has led in this generation, so that no switch is under way.
    pub fn is_settled(&self) -> bool {
        self.was_told(self.active)
    }

    /// Whether a VM may run: as the active one, as one that has never led since it was told to follow, or to be told that.
    pub fn may_run(&self, vm: VmId) -> bool {
        vm == self.active || self.was_told(vm) || (!self.demote.is_empty() && self.is_settled())
    }
}

/// Why the roles cannot change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// No such pair, or one of both is not protected.
    Unknown,
    /// A switch is under way.
    Switching,
    /// The standby does not run, is not ready, or does not follow.
    Standby(String),
    /// The active one is on its way to another host.
    Moving,
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown => f.write_str("there is no standby"),
            Self::Switching => f.write_str("the last switch is not done yet"),
            Self::Standby(why) => write!(f, "its standby cannot take over: {why}"),
            Self::Moving => f.write_str("it is being migrated"),
        }
    }
}

impl View {
    /// The pair that a VM belongs to, by its key.
    pub fn pair_of(&self, vm: VmId) -> Option<(VmId, &Versioned<PairRecord>)> {
        self.pairs.iter().find(|(_, pair)| pair.value.has(vm)).map(|(key, pair)| (*key, pair))
    }

    /// Hosts where a VM must not be, as the other one of its pair is or may be there.
    pub fn apart_from(&self, vm: VmId) -> BTreeSet<HostId> {
        let Some((_, pair)) = self.pair_of(vm) else { return BTreeSet::new() };
        let other = self.vms.get(&pair.value.other(vm)).map(|of| &of.value);
        let other = other.filter(|of| of.phase != VmPhase::Stopped);
        other.into_iter().flat_map(|of| of.owner.iter().chain(&of.moving_to)).map(|owner| owner.host.clone()).collect()
    }

    /// Whether nobody runs a VM, and nobody is to.
    fn is_down(&self, vm: &VmRecord) -> bool {
        let mut owners = vm.owner.iter().chain(&vm.moving_to);
        vm.desired == Desired::Stopped && (vm.phase == VmPhase::Stopped || owners.all(|owner| self.is_over(owner)))
    }
}

/// Pairs whose standby has to take over, with the reason: the active one is in nobody's hands, and the standby is fit.
/// `usable`: hosts that are in service and not silent.
pub fn due(view: &View, usable: impl Fn(&HostId) -> bool) -> BTreeMap<VmId, String> {
    let lost = |pair: &PairRecord| {
        let active = &view.vms.get(&pair.active)?.value;
        let name = &active.name;
        if active.desired != Desired::Running || active.blocked.is_some() {
            return None;
        }
        match (view.standing(active), active.phase) {
            (Standing::Lost, _) => Some(format!("{name} is lost with its host")),
            (Standing::Claimable, VmPhase::Stopped) if active.failed_on.is_empty() => None,
            (Standing::Claimable, VmPhase::Stopped) => Some(format!("{name} was given up: {}", active.note)),
            (Standing::Claimable, _) => Some(format!("{name} is lost with its host")),
            _ => None,
        }
    };
    let wanted = view.pairs.iter().filter_map(|(key, pair)| Some((*key, lost(&pair.value)?)));
    wanted.filter(|(key, _)| fit(view, *key).is_ok_and(|owner| usable(&owner.host))).collect()
}

/// The host that has the standby, if that could take over now.
pub fn fit(view: &View, key: VmId) -> Result<Owner, Unfit> {
    let pair = &view.pairs.get(&key).ok_or(Unfit::Unknown)?.value;
    let active = &view.vms.get(&pair.active).ok_or(Unfit::Unknown)?.value;
    let standby = &view.vms.get(&pair.standby).ok_or(Unfit::Unknown)?.value;
    if !pair.is_settled() {
        return Err(Unfit::Switching);
    }
    let unfit = |why: &str| Err(Unfit::Standby(format!("{} {why}", standby.name)));
    let runs = standby.phase == VmPhase::Running && standby.desired == Desired::Running;
    let Some(owner) = standby.owner.as_ref().filter(|owner| runs && view.is_armed(owner)) else {
        return unfit("does not run on a host that is in service");
    };
    if standby.moving_to.is_some() {
        return unfit("is being migrated");
    }
    if !standby.ready && standby.policy.gate == Gate::Agent {
        return unfit("does not answer yet");
    }
    if !pair.was_told(pair.standby) {
        return unfit("was not told to follow yet");
    }
    if active.owner.iter().chain(&active.moving_to).any(|of| of.host == owner.host) {
        return unfit("is on the same host");
    }
    Ok(owner.clone())
}

/// The transaction by which the standby becomes the active one, once: it fails if anything of it is not as it was seen.
pub fn switch(view: &View, key: VmId, why: &str) -> Result<Txn, Unfit> {
    let owner = fit(view, key)?;
    let pair = &view.pairs[&key];
    let (old, new) = (pair.value.active, pair.value.standby);
    let (active, standby, host) = (&view.vms[&old], &view.vms[&new], &view.hosts[&owner.host]);
    if active.value.moving_to.is_some() && view.standing(&active.value) != Standing::Lost {
        return Err(Unfit::Moving);
    }
    let note = format!("{} takes over: {why}", standby.value.name);
    let value = PairRecord {
        generation: pair.value.generation + 1,
        active: new,
        standby: old,
        told: if planted(Planted::KeepTold) { pair.value.told.clone() } else { BTreeMap::new() },
        returns: !pair.value.demote.is_empty() && active.value.desired == Desired::Running,
        note: note.clone(),
        ..pair.value.clone()
    };
    let off = VmRecord { desired: Desired::Stopped, note, ..active.value.clone() };
    let txn = Txn::default()
        .expect(pair_key(key), Some(pair))
        .expect(vm_key(old), Some(active))
        .expect(vm_key(new), Some(standby))
        .expect(host_key(&owner.host), Some(host))
        .put(pair_key(key), &value)
        .put(vm_key(old), &off);
    Ok(txn)
}

/// What the host that runs a VM has to do about its role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Make it lead: addresses and promote hook, then [`told`].
    Lead,
    /// Make it follow: demote hook, then [`told`].
    Follow,
    /// End it: its standby has taken over.
    StandDown,
    /// It is to lead, and the other one may still do.
    Wait(VmId),
}

/// What the host that runs a VM has to do about its role, if anything.
pub fn duty(view: &View, vm: VmId) -> Option<Duty> {
    let (_, pair) = view.pair_of(vm)?;
    let pair = &pair.value;
    let record = &view.vms.get(&vm)?.value;
    if pair.told.get(&vm) == Some(&Told { pair: pair.generation, vm: record.generation }) {
        return None;
    }
    if vm == pair.active {
        let other = pair.standby;
        let is_down = view.vms.get(&other).is_some_and(|of| view.is_down(&of.value));
        let may_lead = is_down || pair.was_told(other) || planted(Planted::LeadWithoutProof);
        return Some(if may_lead { Duty::Lead } else { Duty::Wait(other) });
    }
    match (record.desired, pair.demote.is_empty()) {
        (Desired::Stopped, _) => Some(Duty::StandDown),
        (Desired::Running, false) => Some(Duty::Follow),
        // It never led since it followed: nothing has to be said.
        (Desired::Running, true) => (!pair.was_told(vm)).then_some(Duty::StandDown),
    }
}

/// The transaction that keeps that a VM was told its role by the host that runs it. After a switch it lets the old active
/// one come back.
pub fn told(view: &View, vm: VmId, me: &Owner) -> Option<Txn> {
    let (key, pair) = view.pair_of(vm)?;
    let record = view.vms.get(&vm).filter(|of| of.value.runs_on(&me.host, me.epoch))?;
    let host = view.hosts.get(&me.host).filter(|_| view.is_armed(me))?;
    let mut value = pair.value.clone();
    value.told.insert(vm, Told { pair: value.generation, vm: record.value.generation });
    let mut txn = Txn::default()
        .expect(pair_key(key), Some(pair))
        .expect(vm_key(vm), Some(record))
        .expect(host_key(&me.host), Some(host));
    if vm == value.active && std::mem::take(&mut value.returns) {
        let old = view.vms.get(&value.standby).filter(|of| of.value.desired == Desired::Stopped);
        if let Some(old) = old {
            let again = VmRecord {
                desired: Desired::Running,
                failed_on: BTreeMap::new(),
                note: "comes back as standby".into(),
                ..old.value.clone()
            };
            txn = txn.expect(vm_key(value.standby), Some(old)).put(vm_key(value.standby), &again);
        }
    }
    Some(txn.put(pair_key(key), &value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::record::fixture;
    use crate::ha::{
        Moment,
        record::{HostPhase, HostRecord, Proof, ProofKind},
        recovery::{Candidate, Held, Memory, plan},
        txn::Expect,
    };

    fn a() -> VmId {
        VmId::from_u128(1)
    }

    fn s() -> VmId {
        VmId::from_u128(2)
    }

    fn owner(host: &str) -> Owner {
        Owner { host: host.into(), epoch: 1 }
    }

    /// a leads on h1, s follows on h2, h3 is empty.
    fn view(demote: bool) -> View {
        let mut view = View { revision: 50, ..View::default() };
        for host in ["h1", "h2", "h3"] {
            let record = HostRecord { memory_bytes: 8 << 30, ..fixture::host() };
            view.hosts.insert(host.into(), Versioned { value: record, revision: 1 });
        }
        for (vm, name, host) in [(a(), "a", "h1"), (s(), "s", "h2")] {
            let record = VmRecord {
                owner: Some(owner(host)),
                phase: VmPhase::Running,
                ready: true,
                ..fixture::vm(name, 1 << 30)
            };
            view.vms.insert(vm, Versioned { value: record, revision: 2 });
        }
        let pair = PairRecord {
            generation: 1,
            active: a(),
            standby: s(),
            addresses: Vec::new(),
            promote: vec!["/promote".into()],
            demote: if demote { vec!["/demote".into()] } else { Vec::new() },
            told: [a(), s()].map(|vm| (vm, Told { pair: 1, vm: 1 })).into(),
            returns: false,
            note: String::new(),
        };
        view.pairs.insert(a(), Versioned { value: pair, revision: 3 });
        view
    }

    fn fencing(view: &mut View, host: &str) {
        let record = view.hosts.get_mut(&host.into()).expect("there");
        (record.value.phase, record.value.epoch) = (HostPhase::Fencing, 2);
    }

    fn prove(view: &mut View, host: &str) {
        let proof = Proof { kind: ProofKind::Drained, by: host.into() };
        view.proofs.insert((host.into(), 1), Versioned { value: proof, revision: 9 });
    }

    /// The records after a transaction.
    fn after(view: &View, txn: &Txn) -> View {
        let mut view = view.clone();
        view.revision += 1;
        for change in &txn.changes {
            let super::super::txn::Change::Put { key, value } = change else { panic!("{change:?}") };
            view.insert(key, value.as_bytes(), view.revision);
        }
        view
    }

    fn is_due(view: &View) -> bool {
        !due(view, |_| true).is_empty()
    }

    fn vm(view: &mut View, vm: VmId) -> &mut VmRecord {
        &mut view.vms.get_mut(&vm).expect("there").value
    }

    #[test]
    fn a_standby_takes_over_from_one_that_is_lost_or_given_up_and_from_no_other() {
        let mut view = view(false);
        assert!(!is_due(&view), "all is well");
        let given_up = |view: &View| {
            let mut view = view.clone();
            (vm(&mut view, a()).phase, vm(&mut view, a()).owner) = (VmPhase::Stopped, None);
            view
        };
        assert!(!is_due(&given_up(&view)), "it is only being started");
        let mut failed = given_up(&view);
        vm(&mut failed, a()).failed_on.insert("h1".into(), 1);
        assert!(is_due(&failed));
        fencing(&mut view, "h1");
        assert!(is_due(&view), "before anything is proved: the switch itself waits for that");
        for (what, change) in [
            ("shut down on purpose", (|v| vm(v, a()).desired = Desired::Stopped) as fn(&mut View)),
            ("not ready", |v| vm(v, s()).ready = false),
            ("moving", |v| vm(v, s()).moving_to = Some(owner("h3"))),
            ("not running", |v| vm(v, s()).phase = VmPhase::Claimed),
            ("lost as well", |v| fencing(v, "h2")),
            ("on the same host", |v| vm(v, a()).owner = Some(owner("h2"))),
            ("not following", |v| _ = v.pairs.get_mut(&a()).expect("there").value.told.remove(&s())),
            ("a switch before", |v| _ = v.pairs.get_mut(&a()).expect("there").value.told.remove(&a())),
        ] {
            let mut other = view.clone();
            change(&mut other);
            assert!(!is_due(&other), "{what}");
        }
        assert!(due(&view, |host| host.0 != "h2").is_empty(), "its host is silent");
    }

    #[test]
    fn it_leads_only_when_the_old_one_is_over_and_that_stays_down() {
        let mut seen = view(false);
        fencing(&mut seen, "h1");
        let txn = switch(&seen, a(), "h1 is lost").expect("fit");
        let keys = [pair_key(a()), vm_key(a()), vm_key(s()), host_key(&"h2".into())];
        for key in &keys {
            let compares = |expect: &Expect| matches!(expect, Expect::At { key: of, .. } if of == key);
            assert!(txn.expects.iter().any(compares), "{key} is not compared");
        }
        let mut now = after(&seen, &txn);
        assert_eq!(duty(&now, s()), Some(Duty::Wait(a())));
        assert_eq!(switch(&now, a(), "again"), Err(Unfit::Switching));
        prove(&mut now, "h1");
        assert_eq!(duty(&now, s()), Some(Duty::Lead));
        let led = after(&now, &told(&now, s(), &owner("h2")).expect("it runs there"));
        assert_eq!((duty(&led, s()), led.vms[&a()].value.desired), (None, Desired::Stopped));
        assert!(!led.pairs[&a()].value.may_run(a()));
        // Started anew it is told again.
        let mut again = led.clone();
        vm(&mut again, s()).generation = 2;
        assert_eq!(duty(&again, s()), Some(Duty::Lead));
    }

    #[test]
    fn an_old_active_one_that_lives_is_ended_first_and_comes_back_to_follow_if_it_can() {
        let seen = view(true);
        let mut now = after(&seen, &switch(&seen, a(), "its service is down").expect("fit"));
        assert_eq!((duty(&now, a()), duty(&now, s())), (Some(Duty::StandDown), Some(Duty::Wait(a()))));
        assert!(!now.pairs[&a()].value.may_run(a()), "not while the switch goes on");
        (vm(&mut now, a()).phase, vm(&mut now, a()).owner) = (VmPhase::Stopped, None);
        let mut led = after(&now, &told(&now, s(), &owner("h2")).expect("it runs there"));
        assert_eq!(led.vms[&a()].value.desired, Desired::Running);
        assert!(led.pairs[&a()].value.may_run(a()));
        (vm(&mut led, a()).phase, vm(&mut led, a()).owner) = (VmPhase::Running, Some(owner("h3")));
        assert_eq!(duty(&led, a()), Some(Duty::Follow));
        let follows = after(&led, &told(&led, a(), &owner("h3")).expect("it runs there"));
        assert_eq!(duty(&follows, a()), None);
        assert!(fit(&follows, a()).is_ok_and(|owner| owner.host.0 == "h3"), "and may take over in its turn");
    }

    #[test]
    fn they_are_never_placed_on_one_host_nor_is_one_that_led_started_before_it_may() {
        let mut view = view(false);
        let candidates = |hosts: &[&str]| -> Vec<Candidate> {
            let one = |host: &&str| Candidate { owner: owner(host), revision: 1, memory_bytes: 8 << 30 };
            hosts.iter().map(one).collect()
        };
        let planned = |view: &View, hosts: &[&str]| {
            let (claims, held) = plan(Moment(0), view, &Memory::default(), &candidates(hosts), 1000);
            (claims.into_iter().map(|claim| (claim.vm, claim.to.host.0)).collect::<Vec<_>>(), held)
        };
        for of in [a(), s()] {
            (vm(&mut view, of).phase, vm(&mut view, of).owner) = (VmPhase::Stopped, None);
        }
        let (claims, _) = planned(&view, &["h1", "h2"]);
        assert!(claims.len() == 2 && claims[0].1 != claims[1].1, "{claims:?}");
        let (claims, held) = planned(&view, &["h1"]);
        assert_eq!((claims.len(), held.get(&s())), (1, Some(&Held::Apart(a()))));
        let pair = &mut view.pairs.get_mut(&a()).expect("there").value;
        (pair.generation, pair.active, pair.standby) = (2, s(), a());
        assert_eq!(planned(&view, &["h1", "h2"]).1.get(&a()), Some(&Held::Standby(s())));
    }

    #[test]
    fn a_move_of_the_lost_ones_destination_is_waited_for_too() {
        let mut view = view(false);
        vm(&mut view, a()).moving_to = Some(owner("h3"));
        fencing(&mut view, "h1");
        assert!(!is_due(&view), "it may be arriving");
        fencing(&mut view, "h3");
        let mut now = after(&view, &switch(&view, a(), "both are lost").expect("fit"));
        prove(&mut now, "h1");
        assert_eq!(duty(&now, s()), Some(Duty::Wait(a())));
        prove(&mut now, "h3");
        assert_eq!(duty(&now, s()), Some(Duty::Lead));
    }
}
