//! The host's own right to run guests: joining, heartbeats, pets, the peers' word, the soft fence.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{About, Agent, Effect, Stage, vms::Then};
use crate::ha::{
    planted::{Planted, planted},
    record::{
        Heartbeat, HostId, HostPhase, HostRecord, Proof, ProofKind, View, VmId, VmRecord, WatchdogClass, heartbeat_key,
        host_key, proof_key, vm_key,
    },
    timing::Moment,
    txn::{Answer, Txn, Versioned},
};

/// The host's own record, as this agent put it. Kept by the shell over restarts of the daemon within one boot
/// ([`Effect::Remember`]), so that a restart while the store is away loses no guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mine {
    /// Revision that heartbeats compare with.
    pub revision: u64,
    /// Record.
    pub record: HostRecord,
}

/// Sending heartbeats.
#[derive(Debug, Default)]
pub(super) struct Beat {
    seq: u64,
    sent: Option<Moment>,
    /// A heartbeat was refused and no view has explained it yet.
    doubt: bool,
}

/// A question to the peers.
#[derive(Debug)]
pub(super) struct Question {
    asked: Moment,
    peers: BTreeSet<HostId>,
    acked: BTreeSet<HostId>,
}

/// What the store says about this host.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    host: Option<Versioned<HostRecord>>,
    /// Whether there is a proof for the epoch that the record says has ended, or will end with it.
    proved: BTreeSet<u64>,
    /// Who else is in service.
    others: BTreeSet<HostId>,
    /// Epochs of this host that VMs refer to, that are over and for which there is no proof: a restored store.
    orphaned: BTreeSet<u64>,
    /// VMs of an ended epoch that the store has as running, though their guests had shut themselves down.
    downs: Vec<(VmId, Versioned<VmRecord>)>,
}

impl Agent {
    pub(super) fn enable(&mut self, on: bool, out: &mut Vec<Effect>) {
        self.want_out = !on;
        if on && self.stage == Stage::Out {
            self.stage = Stage::Joining;
            out.push(Effect::LookAtGuests);
        }
    }

    pub(super) fn seen(&mut self, now: Moment, view: &View, out: &mut Vec<Effect>) {
        let me = &self.me.host;
        if view.unreadable.contains_key(&host_key(me)) {
            self.say_once("the store's record of this host cannot be read; left as it is".into(), out);
            return;
        }
        let epoch = self.host.as_ref().map_or(0, |mine| mine.record.epoch);
        let orphaned = view
            .vms
            .values()
            .flat_map(|vm| vm.value.owner.iter().chain(&vm.value.moving_to))
            .filter(|owner| owner.host == *me && owner.epoch < epoch && !view.is_over(owner))
            .map(|owner| owner.epoch)
            .collect();
        let in_service = |(_, host): &(&HostId, &Versioned<HostRecord>)| host.value.phase == HostPhase::Armed;
        self.seen = Some(Seen {
            host: view.hosts.get(me).cloned(),
            proved: view.proofs.keys().filter(|(host, _)| host == me).map(|(_, epoch)| *epoch).collect(),
            others: view
                .hosts
                .iter()
                .filter(in_service)
                .map(|(host, _)| host.clone())
                .filter(|host| host != me)
                .collect(),
            orphaned,
            downs: self.downs.keys().filter_map(|vm| Some((*vm, view.vms.get(vm)?.clone()))).collect(),
        });
        if let Stage::Armed { epoch } = self.stage {
            self.check_record(now, epoch, out);
        }
        if matches!(self.stage, Stage::Armed { .. }) {
            self.see_vms(now, view, out);
        }
    }

    /// Whether the record still is what this agent put; if others ended the epoch, the guests end now. A record that is
    /// gone or older is a store that lost data: no reason to end anything, and no heartbeat either.
    fn check_record(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        let Some(record) = self.seen.as_ref().and_then(|seen| seen.host.clone()) else {
            return self.say_once("the store has lost this host's record; it was emptied or restored".into(), out);
        };
        let Some(mine) = &mut self.host else { return };
        let (value, revision) = (record.value, record.revision);
        if value.epoch == epoch && value.phase == HostPhase::Armed && value.boot_id == self.me.boot_id {
            if revision > mine.revision {
                // One of this agent's own changes whose answer was lost: what was sent before can happen no more.
                *mine = Mine { revision, record: value };
                (self.beat.doubt, self.unsettled, self.changing) = (false, false, None);
                self.maybe_peers.clear();
                out.push(Effect::Remember(self.host.clone()));
            } else if revision < mine.revision && self.beat.doubt {
                // A store that was restored. Who was a peer is asked as well: asking more is never wrong.
                self.maybe_peers.extend(mine.record.peers.iter().cloned());
                *mine = Mine { revision, record: value };
                self.beat.doubt = false;
            }
        } else if value.epoch > epoch || (value.epoch == epoch && value.phase != HostPhase::Armed) {
            self.soft_fence(now, epoch, format!("epoch {epoch} of this host was ended by others"), out);
        } else {
            let text = format!("the store is older than this host: epoch {} there, {epoch} here", value.epoch);
            self.say_once(text, out);
            if self.beat.doubt {
                self.put_again(now, &Versioned { value, revision }, out);
            }
        }
    }

    pub(super) fn answered(&mut self, now: Moment, id: u64, answer: Answer, out: &mut Vec<Effect>) {
        let Some(pending) = self.pending.remove(&id) else { return };
        let armed = matches!(self.stage, Stage::Armed { .. });
        if let (Answer::Done { .. }, true, About::Heartbeat { .. } | About::Vm { .. } | About::Record) =
            (answer, armed, &pending.about)
        {
            // All three are guarded by the host's record, so any of them is a heartbeat.
            let since = if planted(Planted::FreshFromAnswer) { now } else { pending.sent };
            self.earn(since);
        }
        match (pending.about, answer) {
            (About::Heartbeat { revision }, Answer::Refused) => {
                self.beat.doubt |= self.host.as_ref().is_some_and(|mine| mine.revision == revision);
            }
            (About::Join { epoch }, Answer::Done { revision }) if self.stage == Stage::Joining => {
                self.joined(epoch, revision, pending.sent, out);
            }
            (About::Record, Answer::Done { revision }) => self.record_put(revision, out),
            (About::Record, Answer::Unknown) => self.unsettled = true,
            (About::Record, _) if !self.unsettled => self.changing = None,
            (About::Drained, Answer::Done { .. }) if matches!(self.stage, Stage::Drained { .. }) => {
                self.stage = Stage::Joining;
                self.seen = None;
            }
            (About::Leave, Answer::Done { .. }) => {
                (self.stage, self.host, self.basis, self.seen) = (Stage::Out, None, None, None);
                self.watchdog = None;
                out.extend([Effect::Remember(None), Effect::DisarmWatchdog, Effect::Say("out of service".into())]);
            }
            (About::Vm { vm, then }, answer) => self.vm_answered(now, vm, then, pending.sent, answer, out),
            _ => {}
        }
    }

    fn earn(&mut self, basis: Moment) {
        self.basis = Some(self.basis.map_or(basis, |old| old.max(basis)));
        self.resume_by = None;
    }

    fn joined(&mut self, epoch: u64, revision: u64, sent: Moment, out: &mut Vec<Effect>) {
        let Some(record) = self.joining.take() else { return };
        self.host = Some(Mine { revision, record });
        self.stage = Stage::Armed { epoch };
        self.basis = Some(sent);
        self.beat = Beat::default();
        self.vms.clear();
        self.told.clear();
        out.push(Effect::Remember(self.host.clone()));
        out.push(Effect::Say(format!("in service, epoch {epoch}")));
    }

    fn record_put(&mut self, revision: u64, out: &mut Vec<Effect>) {
        let (Some(mine), Some(record)) = (&mut self.host, self.changing.take()) else { return };
        let off = record.maintenance && !mine.record.maintenance;
        *mine = Mine { revision, record };
        (self.beat.doubt, self.unsettled) = (false, false);
        self.maybe_peers.clear();
        out.push(Effect::Remember(self.host.clone()));
        if off {
            self.watchdog = None;
            out.push(Effect::DisarmWatchdog);
        }
    }

    pub(super) fn watchdog_armed(&mut self, now: Moment, timeout_ms: u64, class: WatchdogClass, out: &mut Vec<Effect>) {
        if timeout_ms > self.me.timing.watchdog_ms {
            let wanted = self.me.timing.watchdog_ms;
            return self.watchdog_failed(&format!("it reads back {timeout_ms} ms, more than {wanted} ms"), out);
        }
        // Arming is a pet. The shell was asked when it was allowed; what it took since then is within the second W.
        self.last_pet = now;
        self.watchdog = Some(class);
    }

    pub(super) fn watchdog_failed(&mut self, why: &str, out: &mut Vec<Effect>) {
        self.say_once(format!("the watchdog could not be armed: {why}"), out);
        if self.me.watchdog_optional {
            self.watchdog = Some(WatchdogClass::None);
        }
    }

    pub(super) fn peer_answered(&mut self, asked: Moment, peer: &HostId, ack: bool, out: &mut Vec<Effect>) {
        let Some(question) = self.asked.as_mut().filter(|question| question.asked == asked) else { return };
        if !ack {
            let text = format!("{peer} says that this host was declared dead");
            return self.say_once(text, out);
        }
        question.acked.insert(peer.clone());
        if question.acked == question.peers && matches!(self.stage, Stage::Armed { .. }) {
            self.earn(asked);
            self.say_once("the store is out of reach; every peer says that this host is fine".into(), out);
        }
    }

    /// Everything that time or state asks for.
    pub(super) fn go_on(&mut self, now: Moment, out: &mut Vec<Effect>) {
        match self.stage.clone() {
            Stage::Out => {}
            Stage::Joining => self.join(now, out),
            Stage::Armed { epoch } => self.stay(now, epoch, out),
            Stage::Killing { epoch, since, .. } => self.kill_on(now, epoch, since, out),
            Stage::Drained { epoch } => self.tell_drained(now, epoch, out),
        }
        self.pet(now, out);
    }

    fn no_guests(&self) -> bool {
        self.guests.as_ref().is_some_and(|guests| guests.is_empty())
    }

    fn join(&mut self, now: Moment, out: &mut Vec<Effect>) {
        if self.want_out {
            self.stage = Stage::Out;
            return;
        }
        let Some(seen) = self.seen.clone() else { return };
        let same_boot = |record: &HostRecord| {
            record.phase == HostPhase::Armed && record.boot_id == self.me.boot_id && record.epoch > self.ended
        };
        if let Some(record) = seen.host.as_ref().filter(|record| same_boot(&record.value)) {
            let mine = Mine { revision: record.revision, record: record.value.clone() };
            return self.resume(now, mine, out);
        }
        if now.since(self.last_look) >= self.me.timing.heartbeat_ms {
            self.last_look = now;
            out.push(if self.guests.as_ref().is_some_and(|guests| !guests.is_empty()) {
                Effect::KillAll
            } else {
                Effect::LookAtGuests
            });
            if self.watchdog.is_none() {
                out.push(Effect::ArmWatchdog { timeout_ms: self.me.timing.watchdog_ms });
            }
        }
        let known = self.no_guests() && now.since(self.guests_as_of) <= 2 * self.me.timing.heartbeat_ms;
        if known && let Some(watchdog) = self.watchdog {
            self.join_txn(now, &seen, watchdog, out);
        }
    }

    /// The same boot, and the record says ARMED: a daemon that was restarted. Its guests go on; pets begin again with
    /// the first heartbeat.
    pub(super) fn resume(&mut self, now: Moment, mine: Mine, out: &mut Vec<Effect>) {
        self.stage = Stage::Armed { epoch: mine.record.epoch };
        self.host = Some(mine);
        self.basis = None;
        self.resume_by = Some(now.plus(self.me.timing.fresh_ms));
        self.beat = Beat { doubt: true, ..Beat::default() };
        self.watchdog = None;
        out.push(Effect::LookAtGuests);
        out.push(Effect::Remember(self.host.clone()));
    }

    fn join_txn(&mut self, now: Moment, seen: &Seen, watchdog: WatchdogClass, out: &mut Vec<Effect>) {
        if self.pending.values().any(|pending| matches!(pending.about, About::Join { .. })) {
            return;
        }
        let old = seen.host.as_ref();
        let epoch = old.map_or(0, |old| old.value.epoch) + 1;
        let record = HostRecord {
            epoch,
            phase: HostPhase::Armed,
            boot_id: self.me.boot_id.clone(),
            timing: self.me.timing.clone(),
            watchdog,
            peers: if self.me.failsafe { seen.others.clone() } else { BTreeSet::new() },
            maintenance: false,
            memory_bytes: self.me.memory_bytes,
            fence_devices: self.me.fence_devices,
        };
        let (host, heartbeat) = (host_key(&self.me.host), heartbeat_key(&self.me.host));
        let mut txn = Txn::default().expect(host.clone(), old).put(host, &record);
        txn = txn.put(heartbeat, &Heartbeat { epoch, seq: 0 });
        let mut what = format!("join with epoch {epoch}");
        if let Some(ended) = old.and_then(|old| unproved(&old.value, &seen.proved)) {
            let rebooted = old.is_some_and(|old| old.value.boot_id != self.me.boot_id);
            let kind = match rebooted {
                true => ProofKind::Rebooted { boot_id: self.me.boot_id.clone() },
                false => ProofKind::Drained,
            };
            what = format!("{what}, {kind}");
            txn = self.with_proof(txn, ended, kind);
        }
        self.joining = Some(record);
        self.txn(now, About::Join { epoch }, txn, what, out);
    }

    fn with_proof(&self, txn: Txn, epoch: u64, kind: ProofKind) -> Txn {
        let key = proof_key(&self.me.host, epoch);
        txn.expect::<Proof>(key.clone(), None).put(key, &Proof { kind, by: self.me.host.clone() })
    }

    fn stay(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        let timing = self.me.timing.clone();
        let quiet = self.host.as_ref().is_some_and(|mine| mine.record.maintenance)
            && self.changing.is_none()
            && !self.unsettled;
        let expired = match (self.basis, self.resume_by) {
            (Some(basis), _) => now.since(basis) > timing.fresh_ms,
            (None, by) => by.is_none_or(|by| now > by),
        };
        if expired && !quiet {
            return self.soft_fence(now, epoch, "no heartbeat was taken for too long".into(), out);
        }
        // One that is not answered yet is not waited for: the next one may get through.
        let confirmed = self.basis >= self.beat.sent;
        let pause = if confirmed { timing.heartbeat_ms } else { timing.heartbeat_ms / 4 };
        if self.beat.sent.is_none_or(|sent| now.since(sent) >= pause) {
            self.beat(now, epoch, out);
        }
        self.ask_peers(now, epoch, out);
        if now.since(self.last_look) >= timing.heartbeat_ms {
            self.last_look = now;
            out.push(Effect::LookAtGuests);
            let fresh = self.basis.is_some_and(|basis| now.since(basis) <= timing.fresh_ms);
            let wanted = self.host.as_ref().is_some_and(|mine| !mine.record.maintenance || !self.want_maintenance);
            if self.watchdog.is_none() && fresh && wanted {
                out.push(Effect::ArmWatchdog { timeout_ms: timing.watchdog_ms });
            }
        }
        self.keep_record(now, out);
        self.prove_orphans(now, out);
        self.vms_go_on(now, epoch, out);
    }

    fn beat(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        const OPEN_MAX: usize = 8;
        let open = self.pending.values().filter(|pending| matches!(pending.about, About::Heartbeat { .. })).count();
        let Some(revision) = self.host.as_ref().map(|mine| mine.revision).filter(|_| open < OPEN_MAX) else { return };
        self.beat.seq += 1;
        self.beat.sent = Some(now);
        let mut txn = Txn::default().put(heartbeat_key(&self.me.host), &Heartbeat { epoch, seq: self.beat.seq });
        if !planted(Planted::UnguardedHeartbeat) {
            txn = txn.expect_at(host_key(&self.me.host), revision);
        }
        let what = format!("heartbeat {epoch}.{}", self.beat.seq);
        self.txn(now, About::Heartbeat { revision }, txn, what, out);
    }

    /// Once half of m is over, peers are asked with every beat.
    fn ask_peers(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        let Some(mine) = &self.host else { return };
        let timing = &self.me.timing;
        let late = self.basis.is_none_or(|basis| now.since(basis) > timing.fresh_ms / 2);
        let asked = self.asked.as_ref().is_some_and(|question| now.since(question.asked) < timing.heartbeat_ms);
        let peers: BTreeSet<HostId> = mine.record.peers.union(&self.maybe_peers).cloned().collect();
        if !late || asked || peers.is_empty() {
            return;
        }
        self.asked = Some(Question { asked: now, peers: peers.clone(), acked: BTreeSet::new() });
        out.push(Effect::AskPeers { asked: now, peers, epoch });
    }

    /// Puts the record again if maintenance, the watchdog or the list of peers changed.
    fn keep_record(&mut self, now: Moment, out: &mut Vec<Effect>) {
        let (Some(mine), Some(seen)) = (&self.host, &self.seen) else { return };
        if self.is_pending(&About::Record) || self.basis.is_none() {
            return;
        }
        let maintenance = self.want_maintenance;
        let watchdog = match (maintenance, self.watchdog) {
            (true, _) => WatchdogClass::None,
            (false, Some(watchdog)) => watchdog,
            // Not armed again yet: what was said stands.
            (false, None) => mine.record.watchdog,
        };
        if !maintenance && mine.record.maintenance && self.watchdog.is_none() {
            return;
        }
        let peers = if self.me.failsafe { seen.others.clone() } else { BTreeSet::new() };
        let fence_devices = self.me.fence_devices;
        let record = HostRecord { maintenance, watchdog, peers, fence_devices, ..mine.record.clone() };
        if record == mine.record {
            return;
        }
        let key = host_key(&self.me.host);
        let txn = Txn::default().expect_at(key.clone(), mine.revision).put(key, &record);
        self.maybe_peers.extend(record.peers.iter().cloned());
        self.changing = Some(record);
        self.txn(now, About::Record, txn, "record of this host".into(), out);
    }

    /// This host joined without a guest, so whatever it began in an earlier epoch is over; if the store has forgotten the
    /// proof of that, it is said again.
    fn prove_orphans(&mut self, now: Moment, out: &mut Vec<Effect>) {
        let Some(seen) = &mut self.seen else { return };
        for epoch in std::mem::take(&mut seen.orphaned) {
            let txn = self.with_proof(Txn::default(), epoch, ProofKind::Drained);
            if let (false, Some(txn)) = (self.is_pending(&About::Orphan { epoch }), self.guarded(txn)) {
                self.txn(now, About::Orphan { epoch }, txn, format!("epoch {epoch} has long been over"), out);
            }
        }
    }

    /// A restored store knows an earlier epoch of this host. That one is over, since this one was joined without a guest:
    /// the host says again where it is.
    fn put_again(&mut self, now: Moment, seen: &Versioned<HostRecord>, out: &mut Vec<Effect>) {
        let Some(mine) = &self.host else { return };
        if self.is_pending(&About::Record) || self.basis.is_none() {
            return;
        }
        let (key, record) = (host_key(&self.me.host), mine.record.clone());
        let mut txn = Txn::default().expect(key.clone(), Some(seen)).put(key, &record);
        let proved = self.seen.as_ref().map(|seen| seen.proved.clone()).unwrap_or_default();
        if let Some(ended) = unproved(&seen.value, &proved) {
            txn = self.with_proof(txn, ended, ProofKind::Drained);
        }
        self.maybe_peers.extend(record.peers.iter().cloned());
        self.changing = Some(record);
        self.txn(now, About::Record, txn, "this host again: the store went back in time".into(), out);
    }

    pub(super) fn soft_fence(&mut self, now: Moment, epoch: u64, why: String, out: &mut Vec<Effect>) {
        out.push(Effect::Say(format!("soft fence: {why}")));
        out.push(Effect::KillAll);
        self.stage = Stage::Killing { epoch, since: now, why };
        (self.basis, self.resume_by, self.host, self.asked, self.changing) = (None, None, None, None, None);
        (self.last_look, self.ended) = (now, epoch);
        let downs = self.vms_down();
        if let Some(seen) = &mut self.seen {
            seen.downs = downs.iter().map(|(vm, (_, record))| (*vm, record.clone())).collect();
        }
        self.downs = downs.into_iter().map(|(vm, (note, _))| (vm, note)).collect();
        self.vms.clear();
        self.maybe_peers.clear();
        self.pending.retain(|_, pending| pending.about == About::Drained);
    }

    fn kill_on(&mut self, now: Moment, epoch: u64, since: Moment, out: &mut Vec<Effect>) {
        if self.no_guests() && self.guests_as_of >= since && !self.indirect {
            self.stage = Stage::Drained { epoch };
            out.push(Effect::Remember(None));
            out.push(Effect::Say("all guests are gone".into()));
            return self.tell_drained(now, epoch, out);
        }
        if now.since(self.last_look) >= self.me.timing.heartbeat_ms / 2 {
            self.last_look = now;
            out.push(Effect::KillAll);
        }
    }

    /// "Drained" is the fastest proof; it is written as soon as the store can be reached.
    fn tell_drained(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        let Some(old) = self.seen.as_ref().and_then(|seen| seen.host.clone()) else { return };
        let ended = match old.value.phase {
            HostPhase::Armed => old.value.epoch,
            HostPhase::Fencing => old.value.epoch - 1,
            HostPhase::Fenced | HostPhase::Out => return self.stage = Stage::Joining,
        };
        if ended != epoch || self.is_pending(&About::Drained) {
            return;
        }
        let key = host_key(&self.me.host);
        let record = HostRecord { epoch: epoch + 1, phase: HostPhase::Fenced, ..old.value.clone() };
        let mut txn = Txn::default().expect(key.clone(), Some(&old)).put(key, &record);
        if !self.seen.as_ref().is_some_and(|seen| seen.proved.contains(&epoch)) {
            txn = self.with_proof(txn, epoch, ProofKind::Drained);
        }
        // In the same breath, or they would be started again elsewhere.
        const DOWNS_MAX: usize = 40;
        let downs = self.seen.iter().flat_map(|seen| &seen.downs);
        let mine = downs.filter(|(_, record)| record.value.is_owned_by(&self.me.host, epoch));
        for (vm, record) in mine.take(DOWNS_MAX) {
            let note = self.downs.get(vm).cloned().unwrap_or_default();
            txn = txn.expect(vm_key(*vm), Some(record)).put(vm_key(*vm), &record.value.stopped(note));
        }
        self.txn(now, About::Drained, txn, format!("epoch {epoch} is over, {}", ProofKind::Drained), out);
    }

    /// Takes the host out of service, if nothing is left that it would leave alone.
    pub(super) fn leave(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        let Some(mine) = &self.host else { return };
        if !self.want_out || self.is_pending(&About::Leave) || !self.no_guests() || !self.vms.is_empty() {
            return;
        }
        let key = host_key(&self.me.host);
        let record = HostRecord { epoch: epoch + 1, phase: HostPhase::Out, ..mine.record.clone() };
        let txn = Txn::default().expect_at(key.clone(), mine.revision).put(key, &record);
        let txn = self.with_proof(txn, epoch, ProofKind::Drained);
        self.txn(now, About::Leave, txn, "leave".into(), out);
    }

    fn pet(&mut self, now: Moment, out: &mut Vec<Effect>) {
        if self.watchdog.is_none_or(|class| class == WatchdogClass::None) {
            return;
        }
        let until = match &self.stage {
            Stage::Out => return,
            Stage::Joining | Stage::Drained { .. } if self.no_guests() => Moment(u64::MAX),
            Stage::Armed { .. } => match self.allowed_until() {
                Some(until) => until,
                None => return,
            },
            Stage::Killing { .. } if planted(Planted::PetWhileKilling) => Moment(u64::MAX),
            _ => return,
        };
        if now <= until && now.since(self.last_pet) >= self.me.timing.watchdog_ms / 5 {
            self.last_pet = now;
            out.push(Effect::Pet { until });
        }
    }

    /// The guard of everything that this host writes about its VMs.
    pub(super) fn guarded(&self, txn: Txn) -> Option<Txn> {
        let mine = self.host.as_ref()?;
        Some(txn.expect_at(host_key(&self.me.host), mine.revision))
    }

    pub(super) fn vm_txn(
        &mut self,
        now: Moment,
        vm: super::VmId,
        then: Then,
        txn: Txn,
        what: String,
        out: &mut Vec<Effect>,
    ) {
        if let Some(txn) = self.guarded(txn) {
            self.txn(now, About::Vm { vm, then }, txn, what, out);
        }
    }
}

/// The epoch that a host of this record has to prove over before it joins again.
fn unproved(record: &HostRecord, proved: &BTreeSet<u64>) -> Option<u64> {
    let ended = match record.phase {
        HostPhase::Armed => record.epoch,
        HostPhase::Fencing => record.epoch.saturating_sub(1),
        HostPhase::Fenced | HostPhase::Out => return None,
    };
    (!proved.contains(&ended)).then_some(ended)
}
