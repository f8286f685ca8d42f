//! One host that was declared dead, and the rungs that may prove it. All are tried at once; the first wins.

use std::collections::BTreeSet;

use super::{About, Coordinator, Effect, FenceOutcome, proof_txn};
use crate::ha::{
    planted::{Planted, planted},
    record::{HostId, HostPhase, HostRecord, Proof, ProofKind, View, VmId, WatchdogClass},
    timing::Moment,
    txn::Versioned,
};

/// First pause after a device failed; doubles with each more.
const RETRY_MS: u64 = 5_000;
/// Longest pause.
const RETRY_MS_MAX: u64 = 60_000;

/// A rung that needs somebody else to act.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Rung {
    /// Not asked, or failed so often and asked again at this moment.
    Due { failures: u32, at: Moment, why: String },
    /// Under way.
    Asked,
    /// Done, in these words.
    Done { at: Moment, word: String },
    /// There is no such thing.
    Missing,
}

impl Rung {
    fn failed(&self, now: Moment, failures: u32, why: String) -> Self {
        let pause = (RETRY_MS << failures.min(8)).min(RETRY_MS_MAX);
        Self::Due { failures: failures + 1, at: now.plus(pause), why }
    }

    fn explain(&self, name: &str) -> String {
        match self {
            Self::Due { failures: 0, .. } | Self::Asked => format!("{name} under way"),
            Self::Due { failures, why, .. } => format!("{name} failed {failures} times ({why})"),
            Self::Done { word, .. } => format!("{name} done ({word})"),
            Self::Missing => format!("no {name}"),
        }
    }
}

/// One epoch of one host that is to be proved over.
#[derive(Debug)]
pub(super) struct Case {
    /// When this process first knew.
    since: Moment,
    device: Rung,
    device_failures: u32,
    storage: Rung,
    storage_failures: u32,
    /// T_self, once the host's record was seen; none if time proves nothing here, and why.
    wait_ms: Result<u64, &'static str>,
}

impl Case {
    pub(super) fn new(now: Moment) -> Self {
        let due = || Rung::Due { failures: 0, at: now, why: String::new() };
        let since = if planted(Planted::WaitNotRestarted) { Moment(0) } else { now };
        let wait_ms = Err("not seen yet");
        Self { since, device: due(), device_failures: 0, storage: due(), storage_failures: 0, wait_ms }
    }

    pub(super) fn explain(&self, now: Moment) -> String {
        let time = match self.wait_ms {
            Ok(wait) => format!("watchdog: {} s of {} s", now.since(self.since) / 1000, wait.div_ceil(1000)),
            Err(why) => format!("no proof by time: {why}"),
        };
        format!("{}; {}; {time}", self.device.explain("fence device"), self.storage.explain("storage revoke"))
    }

    fn time(&self, now: Moment) -> Option<ProofKind> {
        let wait = self.wait_ms.ok()?;
        let waited_ms = now.since(self.since);
        (waited_ms > wait).then_some(ProofKind::SelfFenced { waited_ms })
    }

    /// Writes that were on their way when the power went have landed.
    fn off(&self, now: Moment, drain_ms: u64) -> Option<ProofKind> {
        match &self.device {
            Rung::Done { at, word } if now.since(*at) > drain_ms || planted(Planted::SkipDrain) => {
                Some(ProofKind::FencedOff { device: word.clone() })
            }
            _ => None,
        }
    }

    fn revoked(&self, now: Moment, drain_ms: u64) -> Option<ProofKind> {
        match &self.storage {
            Rung::Done { at, word } if now.since(*at) > drain_ms => {
                Some(ProofKind::StorageRevoked { what: word.clone() })
            }
            _ => None,
        }
    }
}

impl Coordinator {
    /// Opens cases for what the store says, and forgets those that are closed.
    pub(super) fn open_cases(&mut self, now: Moment, view: &View, out: &mut Vec<Effect>) {
        let mut open = BTreeSet::new();
        for (host, record) in &view.hosts {
            let Some(ended) = record.value.ended() else { continue };
            self.declared.entry(host.clone()).and_modify(|known| *known = ended.max(*known)).or_insert(ended);
            if record.value.phase == HostPhase::Fencing && !view.proofs.contains_key(&(host.clone(), ended)) {
                open.insert((host.clone(), ended));
                let wait = self.wait_ms(&record.value);
                let case = self.cases.entry((host.clone(), ended)).or_insert_with(|| Case::new(now));
                case.wait_ms = wait;
            }
        }
        self.cases.retain(|case, state| {
            let proved = view.proofs.contains_key(case);
            if proved && state.device == Rung::Asked {
                out.push(Effect::StopFencing { host: case.0.clone(), epoch: case.1 });
            }
            // A case whose FENCING this process has just written may not be in the view yet.
            open.contains(case) || (!proved && now.since(state.since) < 10_000)
        });
    }

    fn wait_ms(&self, record: &HostRecord) -> Result<u64, &'static str> {
        if record.watchdog != WatchdogClass::Hardware && !planted(Planted::TrustAnyWatchdog) {
            return Err("it has no hardware watchdog");
        }
        if !record.peers.is_empty() && !record.peers.contains(&self.me) {
            return Err("it would not have asked this daemon");
        }
        let timing = &record.timing;
        // Whichever is stricter: what the host registered, or what this daemon was told.
        let mut wait = timing.self_fence_ms().max(self.timing.wait_ms.unwrap_or(0));
        if planted(Planted::WaitOneTimeout) {
            wait = timing.stretched(timing.fresh_ms + timing.watchdog_ms + timing.reset_ms);
        }
        // The leader goes first, so that the others' transactions need not be refused.
        Ok(wait + if self.leading { 0 } else { 2 * timing.heartbeat_ms })
    }

    pub(super) fn fenced(
        &mut self,
        now: Moment,
        host: HostId,
        epoch: u64,
        outcome: FenceOutcome,
        out: &mut Vec<Effect>,
    ) {
        let Some(case) = self.cases.get_mut(&(host.clone(), epoch)) else { return };
        case.device = match outcome {
            FenceOutcome::Off { device } => Rung::Done { at: now, word: device },
            FenceOutcome::Unverified { why } if planted(Planted::BelieveUnverified) => {
                Rung::Done { at: now, word: why }
            }
            FenceOutcome::Unverified { why } | FenceOutcome::Failed { why } => {
                out.push(Effect::Say(format!("{host} could not be fenced by its device: {why}")));
                case.device_failures += 1;
                case.device.failed(now, case.device_failures - 1, why)
            }
            FenceOutcome::NoDevice => Rung::Missing,
        };
    }

    pub(super) fn revoked(
        &mut self,
        now: Moment,
        host: HostId,
        epoch: u64,
        result: Result<String, String>,
        out: &mut Vec<Effect>,
    ) {
        let Some(case) = self.cases.get_mut(&(host.clone(), epoch)) else { return };
        case.storage = match result {
            Ok(word) if word.is_empty() => Rung::Missing,
            Ok(word) => Rung::Done { at: now, word },
            Err(why) => {
                out.push(Effect::Say(format!("the storage could not be closed to {host}: {why}")));
                case.storage_failures += 1;
                case.storage.failed(now, case.storage_failures - 1, why)
            }
        };
    }

    /// Asks for proofs, and writes the first that is there.
    pub(super) fn prove(&mut self, now: Moment, view: &View, out: &mut Vec<Effect>) {
        let open: Vec<(HostId, u64)> = self.cases.keys().cloned().collect();
        for (host, epoch) in open {
            let Some(record) = view.hosts.get(&host).filter(|record| record.value.ended() == Some(epoch)) else {
                continue;
            };
            if record.value.phase != HostPhase::Fencing {
                continue;
            }
            if self.leading {
                self.ask_rungs(now, view, &host, epoch, out);
            }
            self.write_proof(now, &host, record, epoch, out);
        }
    }

    fn ask_rungs(&mut self, now: Moment, view: &View, host: &HostId, epoch: u64, out: &mut Vec<Effect>) {
        let Some(case) = self.cases.get_mut(&(host.clone(), epoch)) else { return };
        if matches!(&case.device, Rung::Due { at, .. } if now >= *at) {
            case.device = Rung::Asked;
            out.push(Effect::Fence { host: host.clone(), epoch });
        }
        if matches!(&case.storage, Rung::Due { at, .. } if now >= *at) {
            case.storage = Rung::Asked;
            let had = |owner: &crate::ha::Owner| owner.host == *host && owner.epoch == epoch;
            let vms: BTreeSet<VmId> = view
                .vms
                .iter()
                .filter(|(_, vm)| vm.value.owner.iter().chain(&vm.value.moving_to).any(had))
                .map(|(vm, _)| *vm)
                .collect();
            out.push(Effect::Revoke { host: host.clone(), epoch, vms });
        }
    }

    fn write_proof(
        &mut self,
        now: Moment,
        host: &HostId,
        record: &Versioned<HostRecord>,
        epoch: u64,
        out: &mut Vec<Effect>,
    ) {
        let about = About::Proof { host: host.clone(), epoch };
        let Some(case) = self.cases.get(&(host.clone(), epoch)).filter(|_| !self.is_pending(&about)) else { return };
        let drain_ms = record.value.timing.stretched(record.value.timing.drain_ms);
        let person = || self.confirmed.get(host).map(|name| ProofKind::Person { name: name.clone() });
        let Some(kind) =
            case.off(now, drain_ms).or_else(|| case.revoked(now, drain_ms)).or_else(|| case.time(now)).or_else(person)
        else {
            return;
        };
        if matches!(kind, ProofKind::Person { .. }) {
            self.confirmed.remove(host);
        }
        let what = format!("{host} epoch {epoch} is over, {kind}");
        let proof = Proof { kind, by: self.me.clone() };
        self.txn(now, about, proof_txn(host, record, epoch, &proof), what, out);
    }
}
