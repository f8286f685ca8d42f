//! The VMs that this host owns: from claim to vCPUs, and from a process that ended to what the store says about it.

use std::{cmp::Ordering, collections::BTreeMap};

use super::{About, Agent, Effect};
use crate::ha::{
    planted::{Planted, planted},
    record::{Desired, HostId, Owner, View, VmId, VmPhase, VmRecord, proof_key, vm_key},
    timing::Moment,
    txn::{Answer, Expect, Txn, Versioned},
};

/// A protected guest's process on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalVm {
    /// Its vCPUs run.
    pub running: bool,
    /// They never ran since the process was made.
    pub never_ran: bool,
    /// All its writable disks bypass the page cache (`cache=none` or `directsync`).
    pub direct: bool,
}

/// How a guest's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest shut itself down.
    ByGuest,
    /// A person ended it.
    ByPerson,
    /// It crashed, or its QEMU did.
    Crashed,
    /// It was migrated away.
    Migrated,
    /// It is gone, and nobody knows why.
    Unknown,
}

/// What an answered transaction about a VM leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Start,
    Run,
    Report,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Given to this host; nothing done.
    Claimed,
    /// The shell makes a process.
    Making,
    /// A process with stopped vCPUs, and the disk's lease.
    Made,
    /// The store says that it runs here.
    Running,
}

/// What the store has to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Report {
    /// Ended on purpose: stays down.
    Stopped(String),
    /// Cannot run here: somebody else may have it.
    Failed(String),
    /// A service in it does not come up here: somebody else is to have it.
    Moved(String),
    /// Its services are up, after it was taken elsewhere for one.
    Well,
    /// The disk is ahead of the store: nobody may have it until that is understood.
    Blocked(String),
    /// Crashed: again, here.
    Again(String),
    /// Runs here, whatever the store says.
    Here,
    /// Passed its gate.
    Ready,
}

/// What this host does about one VM.
#[derive(Debug)]
pub(super) struct Task {
    record: Versioned<VmRecord>,
    step: Step,
    since: Moment,
    report: Option<Report>,
    tried: Option<Moment>,
    /// Its process was seen to be gone.
    gone: Option<Moment>,
    putting: Option<VmRecord>,
    /// It is being ended to be started elsewhere: its end is no crash.
    given_up: bool,
}

/// How long a process may be gone before that is a crash: the reason arrives from the hypervisor within this time.
const REASON_MS: u64 = 5_000;

impl Agent {
    /// Takes note of what the store says about this host's VMs.
    pub(super) fn see_vms(&mut self, now: Moment, view: &View, out: &mut Vec<Effect>) {
        let Some(epoch) = self.host.as_ref().map(|mine| mine.record.epoch) else { return };
        let me = self.me.host.clone();
        // Protected anew, it may have a generation of then.
        self.stopped.retain(|vm, _| view.vms.contains_key(vm));
        for (vm, record) in &view.vms {
            if record.value.is_owned_by(&me, epoch) && record.value.phase != VmPhase::Stopped {
                self.mine_seen(now, *vm, record, view.revision);
            }
        }
        let mut lost = Vec::new();
        for (vm, task) in &self.vms {
            let Some(record) = view.vms.get(vm) else {
                if view.revision >= task.record.revision && !view.unreadable.contains_key(&vm_key(*vm)) {
                    lost.push((*vm, None));
                }
                continue;
            };
            let mine = record.value.is_owned_by(&me, epoch) && record.value.phase != VmPhase::Stopped;
            if !mine && view.revision >= task.record.revision && record.revision != task.record.revision {
                lost.push((*vm, Some(record.clone())));
            }
        }
        for (vm, record) in lost {
            self.lost(now, vm, record, out);
        }
        self.settle_moves(now, view, epoch, out);
    }

    /// The store says that a VM is this host's; `as_of` is the revision of all that was read with it.
    fn mine_seen(&mut self, now: Moment, vm: VmId, record: &Versioned<VmRecord>, as_of: u64) {
        let step = match record.value.phase {
            VmPhase::Running => Step::Running,
            // A process of an earlier daemon that never ran: the shell ends it before it makes a new one.
            _ => Step::Claimed,
        };
        let Some(task) = self.vms.get_mut(&vm) else {
            let known = self.stopped.get(&vm).filter(|(generation, _)| *generation == record.value.generation);
            let report = known.map(|(_, note)| Report::Stopped(note.clone()));
            let record = record.clone();
            let task =
                Task { record, step, since: now, report, tried: None, gone: None, putting: None, given_up: false };
            self.vms.insert(vm, task);
            return;
        };
        let runs = task.step == Step::Running && task.gone.is_none() && task.report.is_none();
        // Generations only rise, and a later look has this host's last word: otherwise the store was restored to a time before.
        let went_back = match record.revision.cmp(&task.record.revision) {
            Ordering::Less => as_of >= task.record.revision,
            Ordering::Equal => false,
            Ordering::Greater => record.value.generation < task.record.value.generation,
        };
        if went_back {
            // The VM was this host's then and is now, so what it has come to since is said again, whatever step it is at.
            task.record.revision = record.revision;
            task.tried = None;
            if runs {
                task.report = Some(Report::Here);
            }
            return;
        }
        if record.revision <= task.record.revision {
            return;
        }
        let newer = record.value.generation != task.record.value.generation;
        task.record = record.clone();
        if runs && step != Step::Running {
            // Given to the host that runs it: by a store that was restored. It goes on.
            (task.report, task.tried) = (Some(Report::Here), None);
        } else if newer {
            (task.step, task.since, task.report, task.tried, task.gone) = (step, now, None, None, None);
            task.given_up = false;
        } else if step == Step::Running && task.step != Step::Running {
            (task.step, task.since) = (step, now);
        }
    }

    /// The store says that a VM is not this host's any more. Generations only rise: a lower one, or the same one with
    /// another owner, is a store that lost data, and this host says again what it has.
    fn lost(&mut self, now: Moment, vm: VmId, record: Option<Versioned<VmRecord>>, out: &mut Vec<Effect>) {
        let Some(task) = self.vms.get(&vm) else { return };
        let runs = task.step == Step::Running && task.gone.is_none() && task.report.is_none();
        let ours = task.record.value.generation;
        let Some(record) = record else {
            self.say_once(format!("{} is no longer protected; it is left running", task.record.value.name), out);
            self.vms.remove(&vm);
            return;
        };
        let theirs = record.value.generation;
        let went_back = theirs < ours || (theirs == ours && record.value.owner != task.record.value.owner);
        let stopped = theirs == ours && record.value.phase == VmPhase::Stopped && record.value.blocked.is_none();
        if runs && went_back && !stopped {
            let value = VmRecord { generation: ours.max(theirs + 1), blocked: None, ..task.record.value.clone() };
            out.push(Effect::Say(format!("{}: the store went back in time; it runs here", value.name)));
            let txn = Txn::default().expect(vm_key(vm), Some(&record)).put(vm_key(vm), &value);
            let task = self.vms.get_mut(&vm).expect("looked up above");
            task.putting = Some(value);
            if !self.is_pending(&About::Vm { vm, then: Then::Report }) {
                self.vm_txn(now, vm, Then::Report, txn, format!("{vm} runs here"), out);
            }
            return;
        }
        self.vms.remove(&vm);
        if self.guests.as_ref().is_none_or(|guests| guests.contains_key(&vm)) {
            out.push(Effect::Kill {
                vm,
                why: format!("{} has generation {theirs}, given elsewhere", record.value.name),
            });
        }
    }

    /// A migration whose other side is proved dead: what is here decides.
    fn settle_moves(&mut self, now: Moment, view: &View, epoch: u64, out: &mut Vec<Effect>) {
        let mine = Owner { host: self.me.host.clone(), epoch };
        for (vm, record) in &view.vms {
            let (Some(owner), Some(to)) = (&record.value.owner, &record.value.moving_to) else { continue };
            let other = if *owner == mine { to } else { owner };
            if (*owner != mine && *to != mine) || !view.is_over(other) {
                continue;
            }
            let Some(local) = self.guests.as_ref().map(|guests| guests.get(vm).copied()) else { continue };
            let runs = local.is_some_and(|local| local.running);
            let value = match (*owner == mine, runs) {
                (true, _) => VmRecord { moving_to: None, ..record.value.clone() },
                (false, true) => VmRecord { owner: Some(mine.clone()), moving_to: None, ..record.value.clone() },
                (false, false) => {
                    if local.is_some() {
                        out.push(Effect::Kill { vm: *vm, why: "it was arriving when its source died".into() });
                        continue;
                    }
                    VmRecord {
                        owner: None,
                        moving_to: None,
                        phase: VmPhase::Stopped,
                        ready: false,
                        ..record.value.clone()
                    }
                }
            };
            let proof = Expect::At {
                key: proof_key(&other.host, other.epoch),
                revision: view.proofs[&(other.host.clone(), other.epoch)].revision,
            };
            let mut txn = Txn::default().expect(vm_key(*vm), Some(record)).put(vm_key(*vm), &value);
            txn.expects.push(proof);
            if !self.is_pending(&About::Vm { vm: *vm, then: Then::Report }) {
                self.vm_txn(now, *vm, Then::Report, txn, format!("{vm}: its migration is settled"), out);
            }
        }
    }

    /// Marks tasks whose process is gone.
    pub(super) fn compare_guests(&mut self, now: Moment) {
        let Some(guests) = &self.guests else { return };
        self.indirect = guests.values().any(|guest| !guest.direct) || (self.indirect && !guests.is_empty());
        for (vm, task) in &mut self.vms {
            if task.step != Step::Running || self.guests_as_of < task.since {
                continue;
            }
            task.gone = match (guests.contains_key(vm), task.gone) {
                (true, _) => None,
                (false, None) => Some(now),
                (false, gone) => gone,
            };
        }
    }

    pub(super) fn started(&mut self, vm: VmId, generation: u64) {
        if let Some(task) = self.task(vm, generation).filter(|task| task.step == Step::Making) {
            task.step = Step::Made;
            task.tried = None;
        }
    }

    pub(super) fn start_failed(
        &mut self,
        vm: VmId,
        generation: u64,
        why: String,
        disk_generation: Option<u64>,
        out: &mut Vec<Effect>,
    ) {
        let Some(task) = self.task(vm, generation) else { return };
        out.push(Effect::Say(format!("{} did not start: {why}", task.record.value.name)));
        task.tried = None;
        task.report = Some(match disk_generation {
            Some(disk) => {
                Report::Blocked(format!("generation {disk} is on its disk, {generation} in the store: {why}"))
            }
            None => Report::Failed(why),
        });
    }

    /// Guests that ended on purpose, which the store has not heard of.
    pub(super) fn vms_down(&self) -> BTreeMap<VmId, (String, Versioned<VmRecord>)> {
        let down = |(vm, task): (&VmId, &Task)| match &task.report {
            Some(Report::Stopped(note)) => Some((*vm, (note.clone(), task.record.clone()))),
            _ => None,
        };
        self.vms.iter().filter_map(down).collect()
    }

    fn task(&mut self, vm: VmId, generation: u64) -> Option<&mut Task> {
        self.vms.get_mut(&vm).filter(|task| task.record.value.generation == generation)
    }

    pub(super) fn guest_ended(&mut self, now: Moment, vm: VmId, how: Ended) {
        let Some(task) = self.vms.get(&vm).filter(|task| task.step == Step::Running) else { return };
        let policy = &task.record.value.policy;
        let (resets_max, window) = (policy.resets_max as usize, policy.resets_window_ms);
        let report = match how {
            Ended::ByGuest if planted(Planted::Resurrect) => Report::Again("crashed".into()),
            Ended::ByGuest => Report::Stopped("shut down by its guest".into()),
            Ended::ByPerson => Report::Stopped("stopped by a person".into()),
            Ended::Migrated => return,
            Ended::Crashed | Ended::Unknown if task.record.value.moving_to.is_some() || task.given_up => return,
            // Its standby has taken over.
            Ended::Crashed | Ended::Unknown if task.record.value.desired == Desired::Stopped => {
                Report::Stopped(task.record.value.note.clone())
            }
            Ended::Crashed | Ended::Unknown => {
                let crashes = self.crashes.entry(vm).or_default();
                crashes.retain(|crash| now.since(*crash) < window);
                crashes.push(now);
                let word = if how == Ended::Crashed { "crashed" } else { "its process is gone" };
                match crashes.len() > resets_max {
                    true => {
                        crashes.clear();
                        Report::Failed(format!("{word} more than {resets_max} times"))
                    }
                    false => Report::Again(word.into()),
                }
            }
        };
        let task = self.vms.get_mut(&vm).expect("looked up above");
        if let Report::Stopped(note) = &report {
            self.stopped.insert(vm, (task.record.value.generation, note.clone()));
        }
        if !matches!(task.report, Some(Report::Stopped(_) | Report::Failed(_) | Report::Moved(_))) {
            (task.report, task.tried, task.gone) = (Some(report), None, Some(now));
        }
    }

    pub(super) fn giving_up(&mut self, vm: VmId) {
        if let Some(task) = self.vms.get_mut(&vm) {
            task.given_up = true;
        }
    }

    pub(super) fn relocate(&mut self, vm: VmId, why: String, for_service: bool) {
        if let Some(task) = self.vms.get_mut(&vm).filter(|task| !matches!(task.report, Some(Report::Stopped(_)))) {
            let report = if for_service { Report::Moved(why) } else { Report::Failed(why) };
            (task.report, task.tried) = (Some(report), None);
        }
    }

    pub(super) fn stood_down(&mut self, vm: VmId, why: String) {
        if let Some(task) = self.vms.get_mut(&vm) {
            self.stopped.insert(vm, (task.record.value.generation, why.clone()));
            (task.report, task.tried) = (Some(Report::Stopped(why)), None);
        }
    }

    pub(super) fn well(&mut self, vm: VmId) {
        let moved = |task: &&mut Task| {
            task.step == Step::Running && task.record.value.service_moves > 0 && task.report.is_none()
        };
        if let Some(task) = self.vms.get_mut(&vm).filter(moved) {
            (task.report, task.tried) = (Some(Report::Well), None);
        }
    }

    pub(super) fn ready(&mut self, vm: VmId) {
        if let Some(task) = self.vms.get_mut(&vm).filter(|task| task.step == Step::Running)
            && !task.record.value.ready
            && task.report.is_none()
        {
            (task.report, task.tried) = (Some(Report::Ready), None);
        }
    }

    /// Everything that this host's VMs ask for now.
    pub(super) fn vms_go_on(&mut self, now: Moment, epoch: u64, out: &mut Vec<Effect>) {
        self.leave(now, epoch, out);
        let missing: Vec<VmId> = self.vms.iter().filter(|(_, task)| is_missing(task, now)).map(|(vm, _)| *vm).collect();
        for vm in missing {
            self.guest_ended(now, vm, Ended::Unknown);
        }
        let retry = self.me.timing.heartbeat_ms;
        let idle = |task: &Task| task.tried.is_none_or(|tried| now.since(tried) >= retry);
        let due: Vec<VmId> = self.vms.iter().filter(|(_, task)| idle(task)).map(|(vm, _)| *vm).collect();
        for vm in due {
            self.vm_go_on(now, vm, out);
        }
    }

    fn vm_go_on(&mut self, now: Moment, vm: VmId, out: &mut Vec<Effect>) {
        if [Then::Start, Then::Run, Then::Report].into_iter().any(|then| self.is_pending(&About::Vm { vm, then })) {
            return;
        }
        let me = self.me.host.clone();
        let local = self.guests.as_ref().and_then(|guests| guests.get(&vm).copied());
        let until = self.allowed_until();
        let Some(task) = self.vms.get_mut(&vm) else { return };
        let old = task.record.value.clone();
        let (then, value, what) = match (&task.report, task.step) {
            (Some(report), _) => (Then::Report, report.record(&old, &me), report.text()),
            (None, Step::Claimed) => {
                (Then::Start, VmRecord { phase: VmPhase::Starting, ..old }, "is being started".into())
            }
            (None, Step::Made) => {
                if planted(Planted::SkipRecheck) {
                    let (generation, until) = (old.generation, Moment(u64::MAX));
                    out.push(Effect::Resume { vm, generation, until });
                }
                (Then::Run, VmRecord { phase: VmPhase::Running, ready: false, ..old }, "runs".into())
            }
            (None, Step::Running) => {
                // The daemon ended between the transaction and the vCPUs.
                if let (Some(LocalVm { never_ran: true, .. }), Some(until)) =
                    (local, until.filter(|until| now <= *until))
                {
                    task.tried = Some(now);
                    out.push(Effect::Resume { vm, generation: old.generation, until });
                }
                return;
            }
            (None, Step::Making) => return,
        };
        task.tried = Some(now);
        let what = format!("{} generation {} {what}", value.name, value.generation);
        let txn = Txn::default().expect(vm_key(vm), Some(&task.record)).put(vm_key(vm), &value);
        task.putting = Some(value);
        self.vm_txn(now, vm, then, txn, what, out);
    }

    pub(super) fn vm_answered(
        &mut self,
        now: Moment,
        vm: VmId,
        then: Then,
        sent: Moment,
        answer: Answer,
        out: &mut Vec<Effect>,
    ) {
        let fresh_ms = self.me.timing.fresh_ms;
        let Some(epoch) = self.host.as_ref().map(|mine| mine.record.epoch) else { return };
        let me = self.me.host.clone();
        let Some(task) = self.vms.get_mut(&vm) else { return };
        let (Answer::Done { revision }, Some(value)) = (answer, task.putting.take()) else { return };
        let generation = value.generation;
        task.record = Versioned { value, revision };
        (task.since, task.tried) = (now, None);
        match then {
            Then::Start => {
                task.step = Step::Making;
                out.push(Effect::Start { vm, generation, epoch });
            }
            Then::Run => {
                task.step = Step::Running;
                let until = sent.plus(fresh_ms);
                if now <= until {
                    task.tried = Some(now);
                    out.push(Effect::Resume { vm, generation, until });
                }
            }
            Then::Report => {
                let again = matches!(task.report, Some(Report::Again(_)));
                task.report = None;
                if again {
                    (task.step, task.gone) = (Step::Claimed, None);
                } else if !task.record.value.is_owned_by(&me, epoch) || task.record.value.phase == VmPhase::Stopped {
                    self.vms.remove(&vm);
                }
            }
        }
    }
}

fn is_missing(task: &Task, now: Moment) -> bool {
    // One that moves may have arrived: whoever moves it, or the end of one of both hosts, says where it is.
    task.record.value.moving_to.is_none()
        && !task.given_up
        && task.report.is_none()
        && task.gone.is_some_and(|gone| now.since(gone) >= REASON_MS)
}

impl Report {
    fn record(&self, old: &VmRecord, me: &HostId) -> VmRecord {
        let down = VmRecord { owner: None, phase: VmPhase::Stopped, ready: false, ..old.clone() };
        match self {
            Self::Stopped(note) => old.stopped(note.clone()),
            Self::Failed(note) | Self::Moved(note) => {
                let mut failed_on = old.failed_on.clone();
                *failed_on.entry(me.clone()).or_default() += 1;
                let service_moves = old.service_moves + u32::from(matches!(self, Self::Moved(_)));
                VmRecord { note: note.clone(), failed_on, service_moves, ..down }
            }
            Self::Well => VmRecord { service_moves: 0, ..old.clone() },
            Self::Blocked(why) => VmRecord { note: why.clone(), blocked: Some(why.clone()), ..down },
            Self::Again(note) => VmRecord {
                generation: old.generation + 1,
                phase: VmPhase::Claimed,
                ready: false,
                note: note.clone(),
                ..old.clone()
            },
            Self::Here => VmRecord { phase: VmPhase::Running, ..old.clone() },
            Self::Ready => VmRecord { ready: true, failed_on: BTreeMap::new(), ..old.clone() },
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Stopped(why) => format!("is down: {why}"),
            Self::Failed(why) | Self::Moved(why) => format!("is given up here: {why}"),
            Self::Well => "has its services again".into(),
            Self::Blocked(why) => format!("is blocked: {why}"),
            Self::Again(why) => format!("is started again: {why}"),
            Self::Here => "runs here already".into(),
            Self::Ready => "is ready".into(),
        }
    }
}
