//! High availability as people see it.

use std::collections::BTreeMap;

use virtward_api::{Code, HaExplanation, HaHost, HaPolicy, HaStatus, HaVm, Problem};
use virtward_decide::ha::{
    HostId, View, VmId,
    grade::{Around, grade},
    record::{Desired, Gate, HostPhase, Standing, VmPhase, VmRecord, WatchdogClass},
};
use virtward_engine::ha::run::{Ha, Looked};

use super::{of, pairs, services};
use crate::{daemon::Daemon, failures::Result};

/// A host that is silent for longer than this many of its heartbeats is shown as suspect.
const SUSPECT_BEATS: u64 = 3;

pub(super) fn looked(ha: &Ha) -> Result<Looked> {
    ha.looked().ok_or_else(|| {
        let why = ha.store_error().unwrap_or_else(|| "it was not read yet".into());
        Problem::new(Code::StateUnavailable, format!("the state of high availability is not known: {why}"))
    })
}

/// A protected VM by UUID or name.
pub(super) fn find(view: &View, name: &str) -> Result<VmId> {
    if let Some(vm) = name.parse().ok().filter(|vm| view.vms.contains_key(vm)) {
        return Ok(vm);
    }
    let named: Vec<VmId> = view.vms.iter().filter(|(_, record)| record.value.name == name).map(|(vm, _)| *vm).collect();
    match named[..] {
        [vm] => Ok(vm),
        [] => Err(Problem::new(Code::NotFound, format!("{name} is not protected by high availability"))
            .hint(format!("virtward ha enable {name}"))),
        _ => Err(Problem::new(Code::Conflict, format!("{} protected VMs are called {name}", named.len()))
            .hint("give its UUID")),
    }
}

/// Voters of the store as far as the configuration names them.
fn voters(daemon: &Daemon) -> usize {
    daemon.config().cluster.as_ref().map_or(1, |cluster| cluster.etcd.endpoints.len())
}

/// Everything.
pub fn status(daemon: &Daemon) -> Result<HaStatus> {
    let ha = of(daemon)?;
    let Looked { view, .. } = looked(ha)?;
    let switches = view.switches();
    let cases = ha.cases();
    let in_service = view.hosts.values().filter(|host| host.value.phase == HostPhase::Armed).count();
    let around = Around { voters: voters(daemon), in_service };
    let hosts = view.hosts.keys().map(|name| host(daemon, ha, &view, name, around, cases.get(name))).collect();
    let held = ha.held();
    let vms = view.vms.keys().map(|vm| one(&view, *vm, held.get(vm).map(ToString::to_string)));
    let mut vms: Vec<HaVm> = vms.collect();
    vms.sort_by(|a, b| (&a.name, a.uuid).cmp(&(&b.name, b.uuid)));
    Ok(HaStatus {
        armed: switches.armed,
        note: switches.note,
        failures: switches.failures,
        state_error: ha.store_error(),
        hosts,
        vms,
    })
}

fn host(daemon: &Daemon, ha: &Ha, view: &View, name: &HostId, around: Around, case: Option<&String>) -> HaHost {
    let record = &view.hosts[name].value;
    let silent_ms = ha.silent_ms(name);
    let is_suspect = silent_ms.is_some_and(|ms| ms > SUSPECT_BEATS * record.timing.heartbeat_ms);
    let phase = match record.phase {
        HostPhase::Out => "out",
        HostPhase::Armed if is_suspect && !record.maintenance => "suspect",
        HostPhase::Armed => "armed",
        HostPhase::Fencing => "fencing",
        HostPhase::Fenced => "fenced",
    };
    let (grade, mut reasons) = grade(record, around);
    if *name == ha.settings().host {
        let status = ha.status();
        reasons.extend(status.hook_error);
        if ha.settings().watchdog.is_some() && status.watchdog.is_none_or(|class| class == WatchdogClass::None) {
            reasons.push(format!("its watchdog is not armed: {}", status.watchdog_text));
        }
        if ha.settings().leases.is_empty() {
            reasons.push(
                "no lease-dirs are configured: a state that was restored from a backup would not be noticed".into(),
            );
        }
    }
    if !daemon.nodes.records.all().iter().any(|(node, _)| *node == name.0) {
        reasons.push("it is no node of the cluster any more".into());
    }
    let proof = record.ended().and_then(|ended| view.proofs.get(&(name.clone(), ended)));
    HaHost {
        name: name.0.clone(),
        phase: phase.into(),
        epoch: record.epoch,
        grade: grade.to_string(),
        reasons,
        watchdog: match record.watchdog {
            WatchdogClass::None => "none",
            WatchdogClass::Software => "software",
            WatchdogClass::Hardware => "hardware",
        }
        .into(),
        fence_devices: record.fence_devices,
        maintenance: record.maintenance,
        silent_ms,
        fencing: case.cloned(),
        proof: proof.map(|proof| proof.value.kind.to_string()),
        vms: view.vms.values().filter(|vm| vm.value.owner.as_ref().is_some_and(|owner| owner.host == *name)).count()
            as u32,
    }
}

fn phase(view: &View, record: &VmRecord) -> &'static str {
    match view.standing(record) {
        Standing::Lost => "lost",
        Standing::Claimable if record.phase != VmPhase::Stopped => "claimable",
        _ => match record.phase {
            VmPhase::Stopped => "stopped",
            VmPhase::Claimed => "claimed",
            VmPhase::Starting => "starting",
            VmPhase::Running => "running",
        },
    }
}

pub(super) fn one(view: &View, vm: VmId, waits: Option<String>) -> HaVm {
    let record = &view.vms[&vm].value;
    let policy = &record.policy;
    let name = |vm: &VmId| view.vms.get(vm).map_or_else(|| vm.to_string(), |of| of.value.name.clone());
    HaVm {
        uuid: vm,
        name: record.name.clone(),
        host: record.owner.as_ref().map(|owner| owner.host.0.clone()),
        phase: phase(view, record).into(),
        should_run: record.desired == Desired::Running,
        generation: record.generation,
        ready: record.ready,
        waits: waits.or_else(|| record.blocked.clone().map(|why| format!("blocked: {why}"))),
        note: record.note.clone(),
        pair: pairs::show(view, vm),
        policy: HaPolicy {
            tier: Some(policy.tier),
            after: Some(policy.after.iter().map(name).collect()),
            gate: Some(if policy.gate == Gate::Agent { "agent" } else { "running" }.into()),
            ready_s: Some(policy.ready_ms / 1000),
            only_on: policy.only_on.as_ref().map(|host| host.0.clone()),
            resets_max: Some(policy.resets_max),
            resets_window_s: Some(policy.resets_window_ms / 1000),
            hang_s: Some(policy.hang_ms / 1000),
            services: Some(services::show(&policy.services)),
            standby: pairs::policy(view, vm),
        },
    }
}

/// A protected VM.
pub fn vm(daemon: &Daemon, name: &str) -> Result<HaVm> {
    let ha = of(daemon)?;
    let Looked { view, .. } = looked(ha)?;
    let vm = find(&view, name)?;
    Ok(one(&view, vm, ha.held().get(&vm).map(ToString::to_string)))
}

/// Why a VM is where it is, and what would happen to it.
pub fn explain(daemon: &Daemon, name: &str) -> Result<HaExplanation> {
    let ha = of(daemon)?;
    let Looked { view, .. } = looked(ha)?;
    let id = find(&view, name)?;
    let (record, shown) = (&view.vms[&id].value, vm(daemon, name)?);
    let mut lines = Vec::new();
    let grades: BTreeMap<String, HaHost> =
        status(daemon)?.hosts.into_iter().map(|host| (host.name.clone(), host)).collect();
    match (&record.owner, view.standing(record)) {
        (Some(owner), Standing::Lost) => {
            lines.push(format!(
                "{} was declared dead; whether it still runs {} is not proved yet",
                owner.host, record.name
            ));
            if let Some(case) = grades.get(&owner.host.0).and_then(|host| host.fencing.clone()) {
                lines.push(format!("proofs: {case}"));
            }
        }
        (Some(owner), Standing::Claimable) => {
            lines.push(format!(
                "epoch {} of {} is proved to be over; it may be started elsewhere",
                owner.epoch, owner.host
            ));
        }
        (Some(owner), _) => {
            lines
                .push(format!("{} has it, in its epoch {}, generation {}", owner.host, owner.epoch, record.generation));
            if let Some(host) = grades.get(&owner.host.0) {
                lines.push(format!("{} is protected: {}", host.name, host.grade));
                lines.extend(host.reasons.iter().map(|reason| format!("  {reason}")));
            }
        }
        (None, _) if record.desired == Desired::Running => lines.push("nobody has it, and it should run".into()),
        (None, _) => lines.push(format!("it is meant to be off: {}", record.note)),
    }
    lines.extend(pairs::explain(&view, id));
    lines.extend(shown.waits.iter().map(|waits| format!("it {}", waits.trim_start_matches("it "))));
    for (host, failures) in &record.failed_on {
        lines.push(format!("it failed {failures} times on {host}"));
    }
    if !view.switches().armed {
        lines.push(format!("the cluster is disarmed, nothing is restarted: {}", view.switches().note));
    }
    Ok(HaExplanation { vm: shown, lines })
}
