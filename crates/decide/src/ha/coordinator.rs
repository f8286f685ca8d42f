//! The coordinator: suspects hosts, declares them dead, collects proofs, gives their VMs to others. Every daemon runs
//! one; the leading one acts. Two that act at once do no harm: everything is a compare-and-swap.
//!
//! ```text
//!   ARMED(e) ──silence──► SUSPECT ──txn: heartbeat and record unchanged──► FENCING(e+1) ──► FENCED, proof for e
//!      ▲                    │ most others silent too: held                   │
//!      └────heartbeat───────┘ it asks its peers: not silent                  ├ P0 the host: "drained"
//!                                                                            ├ P1 device: off, read back, + drain
//!                                                                            ├ P2 storage: refuses it
//!                                                                            ├ P3 T_self since *this process* knew of it
//!                                                                            ├ P4 the host: another boot
//!                                                                            └ P5 a person
//! ```
//!
//! Invariants:
//! - Silence is measured between two looks at the store of this process, and looks that were missed start it anew: a
//!   coordinator that could not see accuses nobody.
//! - T_self is counted from when this process first knew of FENCING; a successor starts again. A process may use it only
//!   for a host that has a hardware watchdog and would ask this process before it believes that nobody declared it dead
//!   (`peers` of its record).
//! - A VM that ran is claimed only with the proof for its owner's epoch as a compare.

mod cases;

use std::collections::{BTreeMap, BTreeSet};

use self::cases::Case;
use super::{
    pair,
    planted::{Planted, planted},
    record::{
        HostId, HostPhase, HostRecord, Owner, Proof, Standing, View, VmId, VmPhase, VmRecord, heartbeat_key, host_key,
        pair_key, proof_key, vm_key,
    },
    recovery::{self, Candidate, Held},
    timing::{Moment, Timing},
    txn::{Answer, Txn, Versioned},
};

/// What a fence device achieved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FenceOutcome {
    /// It was switched off, and the device read back "off".
    Off {
        /// Device.
        device: String,
    },
    /// The command was taken, and "off" could not be read back.
    Unverified {
        /// What happened.
        why: String,
    },
    /// Nothing was achieved.
    Failed {
        /// What happened.
        why: String,
    },
    /// There is none for this host.
    NoDevice,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Time passed. At least twice a second.
    Tick,
    /// The store's records, read for this process.
    View {
        /// Records.
        view: &'a View,
        /// When the read was sent: they are no older.
        asked: Moment,
    },
    /// A transaction was answered.
    Answered {
        /// Its number.
        id: u64,
        /// What became of it.
        answer: Answer,
    },
    /// This daemon leads, or no longer does.
    Leading(bool),
    /// A host asked this daemon whether anybody declared it dead ([`Coordinator::word`] is the answer): it lives.
    AskedBy(HostId),
    /// A fence device of [`Effect::Fence`] is done.
    Fenced {
        /// Host.
        host: HostId,
        /// Epoch that is to be over.
        epoch: u64,
        /// What was achieved.
        outcome: FenceOutcome,
    },
    /// The storage of [`Effect::Revoke`] refuses the host, for all disks of all VMs that it had; or says why not.
    Revoked {
        /// Host.
        host: HostId,
        /// Epoch.
        epoch: u64,
        /// In the storage's words.
        result: Result<String, String>,
    },
    /// A person says that a host is down.
    ConfirmDown {
        /// Host.
        host: HostId,
        /// Who.
        by: String,
    },
}

/// What the shell has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A transaction.
    Txn {
        /// Number.
        id: u64,
        /// Transaction.
        txn: Txn,
        /// For the log.
        what: String,
    },
    /// Switch a host off by its devices, level after level, and read back "off". Never a bare reboot.
    Fence {
        /// Host.
        host: HostId,
        /// Epoch that is to be over.
        epoch: u64,
    },
    /// The epoch is proved to be over by something else: end what [`Effect::Fence`] began, at once. The host may be about to
    /// join again, and a device that is still at work would take the power of a host that is in service.
    StopFencing {
        /// Host.
        host: HostId,
        /// Epoch that is over.
        epoch: u64,
    },
    /// Have the storage refuse the host for these VMs, if it can.
    Revoke {
        /// Host.
        host: HostId,
        /// Epoch.
        epoch: u64,
        /// All VMs that it had.
        vms: BTreeSet<VmId>,
    },
    /// For the log and the events of the cluster.
    Say(String),
}

#[derive(Debug)]
struct Watched {
    record: u64,
    heartbeat: Option<u64>,
    since: Moment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum About {
    Fencing { host: HostId, epoch: u64 },
    Proof { host: HostId, epoch: u64 },
    Claim { vm: VmId },
    Switch { pair: VmId },
}

/// The coordinator of one daemon. A new process begins with a new one.
#[derive(Debug)]
pub struct Coordinator {
    me: HostId,
    timing: Timing,
    leading: bool,
    watched: BTreeMap<HostId, Watched>,
    /// Hosts in service.
    armed: BTreeSet<HostId>,
    looked: Option<Moment>,
    cases: BTreeMap<(HostId, u64), Case>,
    /// Hosts that were declared dead as far as this process knows or fears: up to which epoch.
    declared: BTreeMap<HostId, u64>,
    confirmed: BTreeMap<HostId, String>,
    memory: recovery::Memory,
    held: BTreeMap<VmId, Held>,
    pending: BTreeMap<u64, (Moment, About)>,
    next_id: u64,
    told: BTreeMap<String, Moment>,
}

/// A transaction whose answer is this late is taken for unknown.
const ANSWER_MS: u64 = 30_000;
/// The same thing is said again after this.
const SAY_AGAIN_MS: u64 = 60_000;

impl Coordinator {
    /// A coordinator that has seen nothing and does not lead.
    pub fn new(me: HostId, timing: Timing) -> Self {
        Self {
            me,
            timing,
            leading: false,
            watched: BTreeMap::new(),
            armed: BTreeSet::new(),
            looked: None,
            cases: BTreeMap::new(),
            declared: BTreeMap::new(),
            confirmed: BTreeMap::new(),
            memory: recovery::Memory::default(),
            held: BTreeMap::new(),
            pending: BTreeMap::new(),
            next_id: 1,
            told: BTreeMap::new(),
        }
    }

    /// The answer to a host that asks whether anybody declared it dead: true if this process knows of nobody, and has sent
    /// no such transaction that may still happen. Whoever is told true is waited for from later than now.
    pub fn word(&self, host: &HostId, epoch: u64) -> bool {
        planted(Planted::AckWhileFencing) || self.declared.get(host).is_none_or(|ended| *ended < epoch)
    }

    /// Why VMs that should run are not being started.
    pub fn held(&self) -> &BTreeMap<VmId, Held> {
        &self.held
    }

    /// Hosts under suspicion or being fenced, with what their proof waits for, for people.
    pub fn cases(&self, now: Moment) -> BTreeMap<HostId, String> {
        self.cases.iter().map(|((host, _), case)| (host.clone(), case.explain(now))).collect()
    }

    /// How long a host has been silent, in milliseconds.
    pub fn silent_ms(&self, host: &HostId) -> Option<u64> {
        self.watched.get(host).zip(self.looked).map(|(watched, looked)| looked.since(watched.since))
    }

    /// Whether this process is to act though another one led last: the leader's host is silent or was declared dead, and of
    /// the hosts in service that are not silent, this one's is first. Two that act do no harm; nobody who acts costs as
    /// long as an election.
    pub fn deputises(&self, leader: &HostId) -> bool {
        let is_here =
            |host: &HostId| self.armed.contains(host) && self.silence(host, self.looked) <= self.timing.silence_ms;
        self.watched.contains_key(leader)
            && !is_here(leader)
            && self.armed.iter().find(|host| is_here(host)) == Some(&self.me)
    }

    /// One step.
    pub fn step(&mut self, now: Moment, event: Event<'_>) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Tick => {}
            Event::View { view, asked } => self.seen(now, view, asked, &mut out),
            Event::Answered { id, answer } => self.answered(now, id, answer),
            Event::Leading(leading) => self.leading = leading,
            Event::AskedBy(host) => {
                if let Some(watched) = self.watched.get_mut(&host) {
                    watched.since = now;
                }
            }
            Event::Fenced { host, epoch, outcome } => self.fenced(now, host, epoch, outcome, &mut out),
            Event::Revoked { host, epoch, result } => self.revoked(now, host, epoch, result, &mut out),
            Event::ConfirmDown { host, by } => {
                self.confirmed.insert(host, by);
            }
        }
        out
    }

    fn seen(&mut self, now: Moment, view: &View, asked: Moment, out: &mut Vec<Effect>) {
        self.pending.retain(|_, (sent, _)| now.since(*sent) < ANSWER_MS);
        self.watch(view, asked, now);
        self.memory.note(now, view);
        self.open_cases(now, view, out);
        let stale = now.since(asked) > self.timing.silence_ms / 2;
        if stale {
            return;
        }
        if self.leading && view.switches().armed {
            self.accuse(now, view, out);
        }
        self.prove(now, view, out);
        if self.leading && view.switches().armed {
            self.give(now, view, out);
        }
    }

    /// Since when each host is silent. A gap between two looks is nobody's silence.
    fn watch(&mut self, view: &View, asked: Moment, now: Moment) {
        let gap = self.looked.is_none_or(|looked| asked.since(looked) > self.timing.silence_ms / 2);
        self.looked = Some(asked);
        let armed = view.hosts.iter().filter(|(_, record)| record.value.phase == HostPhase::Armed);
        self.armed = armed.map(|(host, _)| host.clone()).collect();
        self.watched.retain(|host, _| view.hosts.contains_key(host));
        for (host, record) in &view.hosts {
            let heartbeat = view.heartbeats.get(host).map(|heartbeat| heartbeat.revision);
            let new = Watched { record: record.revision, heartbeat, since: now };
            let watched = self.watched.entry(host.clone()).or_insert(Watched { record: 0, ..new });
            let changed = watched.record != record.revision || watched.heartbeat != heartbeat;
            if changed || (gap && !planted(Planted::CountBlindness)) {
                *watched = Watched { record: record.revision, heartbeat, since: now };
            }
        }
    }

    fn silence(&self, host: &HostId, asked: Option<Moment>) -> u64 {
        self.watched.get(host).zip(asked).map_or(0, |(watched, asked)| asked.since(watched.since))
    }

    /// Declares hosts dead that are silent, one transaction each, which a heartbeat refuses.
    fn accuse(&mut self, now: Moment, view: &View, out: &mut Vec<Effect>) {
        let armed: Vec<(&HostId, &Versioned<HostRecord>)> = view
            .hosts
            .iter()
            .filter(|(host, record)| record.value.phase == HostPhase::Armed && **host != self.me)
            .collect();
        let silent_ms: BTreeMap<HostId, u64> =
            armed.iter().map(|(host, _)| ((*host).clone(), self.silence(host, self.looked))).collect();
        let silent = silent_ms.values().filter(|ms| **ms > self.timing.silence_ms).count();
        let most = silent >= 2 && 2 * silent > armed.len();
        let mut guilty = Vec::new();
        for (host, record) in &armed {
            if silent_ms[*host] <= self.timing.silence_ms {
                if self.confirmed.remove(*host).is_some() {
                    out.push(Effect::Say(format!("{host} was confirmed down, but it sends heartbeats: not believed")));
                }
                continue;
            }
            let by_person = self.confirmed.contains_key(*host);
            // Most hosts at once is a fault of the network or the store before it is one of the hosts. By the time
            // that this ends, hosts that lost the store have ended their guests themselves.
            let held = most && silent_ms[*host] <= self.timing.silence_ms + record.value.timing.bound_ms();
            if held && !by_person {
                self.say(now, format!("{silent} of {} hosts are silent at once: held", armed.len()), out);
            } else if by_person || !record.value.maintenance {
                guilty.push((*host, *record));
            }
        }
        for (host, record) in guilty {
            self.declare(now, view, host, record, out);
        }
    }

    fn declare(
        &mut self,
        now: Moment,
        view: &View,
        host: &HostId,
        record: &Versioned<HostRecord>,
        out: &mut Vec<Effect>,
    ) {
        let epoch = record.value.epoch;
        let about = About::Fencing { host: host.clone(), epoch };
        if self.is_pending(&about) {
            return;
        }
        self.declared.entry(host.clone()).and_modify(|ended| *ended = epoch.max(*ended)).or_insert(epoch);
        let fencing = HostRecord { epoch: epoch + 1, phase: HostPhase::Fencing, ..record.value.clone() };
        let txn = Txn::default()
            .expect(host_key(host), Some(record))
            .expect(heartbeat_key(host), view.heartbeats.get(host))
            .put(host_key(host), &fencing);
        let silent = self.silence(host, self.looked);
        self.txn(now, about, txn, format!("FENCING {host} epoch {epoch}: silent for {silent} ms"), out);
    }

    fn answered(&mut self, now: Moment, id: u64, answer: Answer) {
        let Some((_, about)) = self.pending.remove(&id) else { return };
        match (about, answer) {
            (About::Fencing { host, epoch }, Answer::Done { .. }) => {
                self.cases.entry((host, epoch)).or_insert_with(|| Case::new(now));
            }
            // It did not happen and never will: unless a view said so, nobody declared it dead.
            (About::Fencing { host, epoch }, Answer::Refused | Answer::Unavailable)
                if !self.cases.contains_key(&(host.clone(), epoch)) && self.declared.get(&host) == Some(&epoch) =>
            {
                self.declared.remove(&host);
            }
            _ => {}
        }
    }

    /// Gives VMs to hosts in service.
    fn give(&mut self, now: Moment, view: &View, out: &mut Vec<Effect>) {
        let usable = |(host, record): &(&HostId, &Versioned<HostRecord>)| {
            let silent = self.silence(host, self.looked) > 2 * record.value.timing.heartbeat_ms + 500;
            record.value.phase == HostPhase::Armed && !record.value.maintenance && !silent
        };
        let in_service: Vec<(&HostId, &Versioned<HostRecord>)> = view.hosts.iter().filter(usable).collect();
        // A standby that still runs on a host that is being emptied may take over; nothing is started there.
        let due = pair::due(view, |host| in_service.iter().any(|(one, _)| *one == host));
        let candidates: Vec<Candidate> = in_service
            .into_iter()
            .filter(|(host, _)| !view.closed.contains(*host))
            .map(|(host, record)| Candidate {
                owner: Owner { host: host.clone(), epoch: record.value.epoch },
                revision: record.revision,
                memory_bytes: record.value.memory_bytes,
            })
            .collect();
        let (claims, held) = recovery::plan(now, view, &self.memory, &candidates, self.timing.start_ms);
        self.held = held;
        let mut taken_over = BTreeSet::new();
        for (key, why) in due {
            let of = &view.pairs[&key].value;
            taken_over.insert(of.active);
            self.held.insert(of.active, Held::Standby(of.standby));
            self.switch(now, view, key, &why, out);
        }
        for claim in claims.into_iter().filter(|claim| !taken_over.contains(&claim.vm)) {
            if !self.is_pending(&About::Claim { vm: claim.vm }) {
                self.claim(now, view, &claim, out);
            }
        }
    }

    /// Lets a standby take over.
    fn switch(&mut self, now: Moment, view: &View, key: VmId, why: &str, out: &mut Vec<Effect>) {
        if self.is_pending(&About::Switch { pair: key }) {
            return;
        }
        let Ok(txn) = pair::switch(view, key, why) else { return };
        let standby = view.vms.get(&view.pairs[&key].value.standby).map(|of| of.value.name.clone()).unwrap_or_default();
        let what = format!("{standby} takes over as the active one: {why}");
        self.txn(now, About::Switch { pair: key }, txn, what, out);
    }

    fn claim(&mut self, now: Moment, view: &View, claim: &recovery::Claim, out: &mut Vec<Effect>) {
        let old = &view.vms[&claim.vm];
        let key = vm_key(claim.vm);
        let mut txn =
            Txn::default().expect(key.clone(), Some(old)).expect_at(host_key(&claim.to.host), claim.host_revision);
        if view.standing(&old.value) == Standing::Claimable && old.value.phase != VmPhase::Stopped {
            for owner in old.value.owner.iter().chain(&old.value.moving_to) {
                let Some(proof) = view.proofs.get(&(owner.host.clone(), owner.epoch)) else { continue };
                txn = txn.expect(proof_key(&owner.host, owner.epoch), Some(proof));
            }
        }
        // Two that claim at once must not put both of a pair on one host.
        if let Some((pair, of)) = view.pair_of(claim.vm) {
            let other = of.value.other(claim.vm);
            txn = txn.expect(pair_key(pair), Some(of)).expect(vm_key(other), view.vms.get(&other));
        }
        let value = VmRecord {
            generation: old.value.generation + 1,
            owner: Some(claim.to.clone()),
            moving_to: None,
            phase: VmPhase::Claimed,
            ready: false,
            ..old.value.clone()
        };
        let what = format!("{} generation {} goes to {}", value.name, value.generation, claim.to.host);
        self.txn(now, About::Claim { vm: claim.vm }, txn.put(key, &value), what, out);
    }

    fn txn(&mut self, now: Moment, about: About, txn: Txn, what: String, out: &mut Vec<Effect>) {
        let id = self.next_id;
        self.next_id += 1;
        self.pending.insert(id, (now, about));
        out.push(Effect::Txn { id, txn, what });
    }

    fn is_pending(&self, about: &About) -> bool {
        self.pending.values().any(|(_, pending)| pending == about)
    }

    fn say(&mut self, now: Moment, text: String, out: &mut Vec<Effect>) {
        self.told.retain(|_, at| now.since(*at) < SAY_AGAIN_MS);
        if !self.told.contains_key(&text) {
            self.told.insert(text.clone(), now);
            out.push(Effect::Say(text));
        }
    }
}

/// The transaction that puts a proof, and says so in the host's record.
fn proof_txn(host: &HostId, record: &Versioned<HostRecord>, epoch: u64, proof: &Proof) -> Txn {
    let key = proof_key(host, epoch);
    let fenced = HostRecord { phase: HostPhase::Fenced, ..record.value.clone() };
    Txn::default()
        .expect(host_key(host), Some(record))
        .expect::<Proof>(key.clone(), None)
        .put(host_key(host), &fenced)
        .put(key, proof)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::record::{Heartbeat, VmRecord, fixture};

    /// What three hosts' records are after some seconds, during which `silent` sent no heartbeat.
    fn view(seconds: u64, silent: &str) -> View {
        let mut view = View { revision: 100 + seconds, ..View::default() };
        for name in ["h1", "h2", "h3"] {
            let revision = if name == silent { 1 } else { 100 + seconds };
            let heartbeat = Versioned { value: Heartbeat { epoch: 1, seq: revision }, revision };
            view.hosts.insert(name.into(), Versioned { value: fixture::host(), revision: 1 });
            view.heartbeats.insert(name.into(), heartbeat);
        }
        view
    }

    #[test]
    fn a_device_that_is_at_work_is_stopped_when_the_host_itself_says_that_it_is_over() {
        let mut coordinator = Coordinator::new("h2".into(), Timing::default());
        let _ = coordinator.step(Moment(0), Event::Leading(true));
        let mut fencing = view(1, "h1");
        fencing.hosts.get_mut(&"h1".into()).expect("there").value =
            HostRecord { epoch: 2, phase: HostPhase::Fencing, ..fixture::host() };
        let case = (HostId::from("h1"), 1);
        let asked = coordinator.step(Moment(1000), Event::View { view: &fencing, asked: Moment(1000) });
        assert!(asked.contains(&Effect::Fence { host: case.0.clone(), epoch: 1 }), "{asked:?}");
        // It drained and joined again at once, both between two looks.
        let mut over = view(2, "");
        over.hosts.get_mut(&case.0).expect("there").value.epoch = 3;
        let proof = Proof { kind: super::super::record::ProofKind::Drained, by: case.0.clone() };
        over.proofs.insert(case.clone(), Versioned { value: proof, revision: 102 });
        let stopped = coordinator.step(Moment(1500), Event::View { view: &over, asked: Moment(1500) });
        assert_eq!(stopped, [Effect::StopFencing { host: case.0, epoch: 1 }]);
        let later = coordinator.step(Moment(2000), Event::View { view: &over, asked: Moment(2000) });
        assert!(later.is_empty(), "{later:?}");
    }

    #[test]
    fn nothing_is_started_on_a_host_that_was_emptied() {
        let lost = |closed: &[&str]| {
            let mut coordinator = Coordinator::new("h2".into(), Timing::default());
            let _ = coordinator.step(Moment(0), Event::Leading(true));
            let mut view = view(1, "");
            view.closed = closed.iter().map(|host| HostId::from(*host)).collect();
            let record = fixture::vm("web1", 1 << 20);
            view.vms.insert(VmId::from_u128(1), Versioned { value: record, revision: 1 });
            let effects = coordinator.step(Moment(1000), Event::View { view: &view, asked: Moment(1000) });
            effects.into_iter().find_map(|effect| match effect {
                Effect::Txn { txn, .. } => Some(format!("{txn:?}")),
                _ => None,
            })
        };
        let anywhere = lost(&[]).expect("it is given to a host");
        assert!(anywhere.contains("h1") || anywhere.contains("h2") || anywhere.contains("h3"), "{anywhere}");
        let elsewhere = lost(&["h1", "h2"]).expect("it is given to the third");
        assert!(elsewhere.contains("/ha/host/h3") && !elsewhere.contains("/ha/host/h1"), "{elsewhere}");
        assert_eq!(lost(&["h1", "h2", "h3"]), None);
    }

    #[test]
    fn the_first_host_that_is_not_silent_acts_for_a_leader_that_is() {
        for (me, silent, acts) in [("h2", "h1", true), ("h3", "h1", false), ("h1", "h2", true), ("h2", "h3", false)] {
            let mut coordinator = Coordinator::new(me.into(), Timing::default());
            let leader = HostId::from(silent);
            for second in 0..=10 {
                let now = Moment(1_000_000 + second * 1000);
                let _ = coordinator.step(now, Event::View { view: &view(second, silent), asked: now });
                let early = second <= 5;
                assert_eq!(coordinator.deputises(&leader), acts && !early, "{me} for {silent}, after {second} s");
            }
            // Declared dead, it leads no more than before.
            let now = Moment(1_011_000);
            let mut after = view(11, silent);
            after.hosts.get_mut(&leader).expect("there").value.phase = HostPhase::Fencing;
            let _ = coordinator.step(now, Event::View { view: &after, asked: now });
            assert_eq!(coordinator.deputises(&leader), acts, "{me} for {silent}, being fenced");
        }
        let stranger = Coordinator::new("h1".into(), Timing::default());
        assert!(!stranger.deputises(&"h9".into()));
    }

    #[test]
    fn a_claim_of_one_of_a_pair_compares_where_the_other_one_is() {
        use crate::ha::{pair::PairRecord, txn::Expect};
        let mut coordinator = Coordinator::new("h2".into(), Timing::default());
        let (a, s) = (VmId::from_u128(1), VmId::from_u128(2));
        let mut seen = view(1, "");
        for vm in [a, s] {
            let record = VmRecord { generation: 0, ..fixture::vm(&vm.to_string(), 1 << 20) };
            seen.vms.insert(vm, Versioned { value: record, revision: 7 });
        }
        let told = [(s, pair::Told { pair: 1, vm: 0 })].into();
        let record = PairRecord {
            generation: 1,
            active: a,
            standby: s,
            addresses: Vec::new(),
            promote: Vec::new(),
            demote: Vec::new(),
            told,
            returns: false,
            note: String::new(),
        };
        seen.pairs.insert(a, Versioned { value: record, revision: 8 });
        let _ = coordinator.step(Moment(0), Event::Leading(true));
        let effects = coordinator.step(Moment(0), Event::View { view: &seen, asked: Moment(0) });
        let claims: Vec<&Txn> = effects
            .iter()
            .filter_map(|effect| if let Effect::Txn { txn, .. } = effect { Some(txn) } else { None })
            .collect();
        assert_eq!(claims.len(), 2, "{effects:?}");
        for key in [vm_key(a), vm_key(s), pair_key(a)] {
            let compares = |expect: &Expect| matches!(expect, Expect::At { key: of, .. } if *of == key);
            assert!(claims.iter().all(|txn| txn.expects.iter().any(compares)), "{key}");
        }
    }
}
