//! What people do: protect VMs, start them, arm and disarm, vouch for a host, test fence devices.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use serde::Serialize;
use uuid::Uuid;
use virtward_api::{Code, HaFenceDevice, HaFenceTest, HaFinding, HaPolicy, HaVm, Principal, Problem};
use virtward_cluster::Op;
use virtward_decide::ha::{
    Answer, HostId, Owner, Txn, View, VmId,
    agent::Stage,
    record::{Desired, Gate, HostPhase, VmPhase, VmPolicy, VmRecord, cluster_key, host_key, pair_key, vm_key},
    room::Change,
};
use virtward_engine::ha::{
    fence,
    hook::Protected,
    lease,
    run::{Ha, store},
};
use virtward_hypervisor::XmlView;

use super::{capacity, of, pairs, services, views};
use crate::{
    cluster::leader,
    daemon::Daemon,
    failures::{self, Result},
    peers::client::good,
};

/// How long storage may take for a lease.
pub(super) const LEASE_MAX: Duration = Duration::from_secs(10);
/// Tries against others who change the same record.
pub(super) const TRIES: usize = 8;

/// The records as they are now.
pub(super) async fn fresh(daemon: &Daemon) -> Result<View> {
    let view = store::view(&*daemon.kv.store()).await.map_err(|error| failures::state(&error))?;
    Ok(View { closed: super::drained(daemon), ..view })
}

pub(super) async fn commit(daemon: &Daemon, txn: &Txn) -> Result<bool> {
    match store::perform(&*daemon.kv.store(), txn).await {
        Answer::Done { .. } => Ok(true),
        Answer::Refused => Ok(false),
        Answer::Unavailable | Answer::Unknown => {
            Err(Problem::new(Code::StateUnavailable, "the state store did not say that the change was made")
                .hint("look at virtward ha status, and try again"))
        }
    }
}

/// Has another node do the same.
pub(super) async fn forward(
    daemon: &Daemon,
    node: &str,
    path: &str,
    body: &impl Serialize,
    who: &Principal,
) -> Result<Bytes> {
    let body = serde_json::to_vec(body).unwrap_or_default();
    let (status, answer) = daemon.peers.forward(node, path, body.into(), who).await?;
    good(node, status, answer)
}

/// Protects a VM, or changes how it is protected.
pub async fn enable(daemon: &Daemon, name: &str, wanted: &HaPolicy, who: &Principal) -> Result<HaVm> {
    let ha = of(daemon)?;
    let view = fresh(daemon).await?;
    if let Ok(vm) = views::find(&view, name) {
        let changed = change(daemon, vm, |view, record| {
            record.policy = policy(view, record.policy.clone(), wanted)?;
            Ok(())
        })
        .await?;
        return with_standby(daemon, vm, wanted, changed).await;
    }
    let fleet = daemon.fleet();
    let placed = fleet.find(name).ok_or_else(|| {
        Problem::new(Code::NotFound, format!("there is no VM {name}"))
            .hint("virtward vm list shows the VMs of this host")
    })?;
    let vm = placed.view.vm.uuid;
    if placed.node != ha.settings().host.0 {
        let path = format!("/api/v1/ha/vms/{vm}/enable");
        let answer = forward(daemon, &placed.node, &path, wanted, who).await?;
        return serde_json::from_slice(&answer).map_err(|error| Problem::new(Code::Internal, error.to_string()));
    }
    let made = protect(daemon, ha, vm, wanted).await?;
    with_standby(daemon, vm, wanted, made).await
}

/// Gives it its standby as well, if one is named.
async fn with_standby(daemon: &Daemon, vm: VmId, wanted: &HaPolicy, done: HaVm) -> Result<HaVm> {
    let Some(standby) = &wanted.standby else { return Ok(done) };
    pairs::set(daemon, vm, standby).await?;
    Ok(views::one(&fresh(daemon).await?, vm, None))
}

/// Begins to protect a VM of this host.
async fn protect(daemon: &Daemon, ha: &Ha, vm: Uuid, wanted: &HaPolicy) -> Result<HaVm> {
    let settings = ha.settings();
    let (me, status) = (&settings.host, ha.status());
    if let Some(why) = status.hook_error {
        return Err(Problem::new(Code::Conflict, format!("{me} could start it without asking: {why}")));
    }
    let Stage::Armed { epoch } = status.stage else {
        return Err(Problem::new(Code::Conflict, format!("{me} is not in service")).hint("virtward ha status says why"));
    };
    let hypervisor = daemon.env()?.hypervisor;
    let known = hypervisor.lookup(&vm.to_string()).await.map_err(|error| failures::hyper(&error))?;
    let machine = hypervisor.machine(vm).await.map_err(|error| failures::hyper(&error))?;
    let xml = hypervisor.xml(vm, XmlView::Inactive).await.map_err(|error| failures::hyper(&error))?;
    let is_active = known.state.is_active();

    // The hook first: should the rest fail, a VM that does not start says why.
    let hook = settings.hook();
    let was = hypervisor.set_autostart(vm, false).await.map_err(|error| failures::hyper(&error))?;
    let protected = Protected { name: known.name.clone(), autostart: was };
    let written = failures::blocking(move || {
        hook.protect(vm, &protected)
            .map_err(|error| Problem::new(Code::StorageFull, format!("the hook cannot be told: {error}")))
    });
    written.await?;
    let mut generation = 1;
    for place in &settings.leases {
        let found = lease::read(place, vm, LEASE_MAX).await.map_err(|error| lease_problem(&error))?;
        generation = generation.max(found.map_or(0, |found| found.generation) + 1);
    }
    if is_active {
        let claim = lease::Claim { vm, generation, epoch, host: me.0.clone() };
        lease::take(&settings.leases, &claim, LEASE_MAX).await.map_err(|error| lease_problem(&error))?;
    }
    let view = fresh(daemon).await?;
    let base = VmPolicy { memory_bytes: machine.memory_bytes, ..VmPolicy::default() };
    let record = VmRecord {
        name: known.name,
        generation,
        owner: is_active.then(|| Owner { host: me.clone(), epoch }),
        moving_to: None,
        phase: if is_active { VmPhase::Running } else { VmPhase::Stopped },
        desired: if is_active { Desired::Running } else { Desired::Stopped },
        ready: false,
        failed_on: Default::default(),
        service_moves: 0,
        blocked: None,
        note: "protection began".into(),
        policy: policy(&view, base, wanted)?,
    };
    let host = view.hosts.get(me).filter(|host| host.value.phase == HostPhase::Armed && host.value.epoch == epoch);
    let host = host.ok_or_else(|| failures::changed("the state of this host"))?;
    let txn = Txn::default()
        .expect_at(host_key(me), host.revision)
        .expect::<VmRecord>(vm_key(vm), None)
        .put(vm_key(vm), &record);
    let put = Op::put(store::xml_key(vm), xml);
    daemon.kv.commit(Vec::new(), vec![put]).await?;
    if !commit(daemon, &txn).await? {
        return Err(failures::changed("the protection of the VM"));
    }
    Ok(views::one(&fresh(daemon).await?, vm, None))
}

pub(super) fn lease_problem(error: &lease::Error) -> Problem {
    Problem::new(Code::Conflict, format!("the lease beside the disks: {error}"))
}

/// The policy with what is wanted changed.
fn policy(view: &View, mut policy: VmPolicy, wanted: &HaPolicy) -> Result<VmPolicy> {
    let invalid = |text: String| Problem::new(Code::Invalid, text);
    if let Some(tier) = wanted.tier {
        if tier > 9 {
            return Err(invalid(format!("tier {tier}: from 0 to 9")));
        }
        policy.tier = tier;
    }
    if let Some(after) = &wanted.after {
        policy.after = after.iter().map(|name| views::find(view, name)).collect::<Result<BTreeSet<VmId>>>()?;
    }
    match wanted.gate.as_deref() {
        None => {}
        Some("agent") => policy.gate = Gate::Agent,
        Some("running") => policy.gate = Gate::Running,
        Some(other) => return Err(invalid(format!("gate {other:?}: agent or running"))),
    }
    if let Some(host) = &wanted.only_on {
        policy.only_on = match host.as_str() {
            "" => None,
            name if view.hosts.contains_key(&HostId::from(name)) => Some(HostId::from(name)),
            name => return Err(invalid(format!("{name} is no host of high availability"))),
        };
    }
    let ms = |s: u64| s.saturating_mul(1000).min(86_400_000 * 7);
    policy.ready_ms = wanted.ready_s.map_or(policy.ready_ms, ms);
    policy.resets_max = wanted.resets_max.unwrap_or(policy.resets_max);
    policy.resets_window_ms = wanted.resets_window_s.map_or(policy.resets_window_ms, ms);
    policy.hang_ms = wanted.hang_s.map_or(policy.hang_ms, ms);
    if let Some(wanted) = &wanted.services {
        policy.services = services::read(wanted)?;
    }
    Ok(policy)
}

/// Changes a VM's record by compare-and-swap.
async fn change(daemon: &Daemon, vm: VmId, change: impl Fn(&View, &mut VmRecord) -> Result<()>) -> Result<HaVm> {
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let Some(old) = view.vms.get(&vm) else { return Err(failures::changed("the protection of the VM")) };
        let mut record = old.value.clone();
        change(&view, &mut record)?;
        let txn = Txn::default().expect(vm_key(vm), Some(old)).put(vm_key(vm), &record);
        if commit(daemon, &txn).await? {
            return Ok(views::one(&fresh(daemon).await?, vm, None));
        }
    }
    Err(failures::changed("the protection of the VM"))
}

/// Protects a VM no longer.
pub async fn disable(daemon: &Daemon, name: &str) -> Result<()> {
    let ha = of(daemon)?;
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let vm = views::find(&view, name)?;
        let old = &view.vms[&vm];
        let is_settled = match old.value.phase {
            VmPhase::Stopped => true,
            VmPhase::Running => {
                old.value.moving_to.is_none() && old.value.owner.as_ref().is_some_and(|owner| view.is_armed(owner))
            }
            VmPhase::Claimed | VmPhase::Starting => false,
        };
        if !is_settled {
            return Err(Problem::new(
                Code::Busy,
                format!("{name} is being started, moved, or lost: who may write to its disks must be known first"),
            )
            .hint(format!("virtward ha explain {name}")));
        }
        let mut txn = Txn::default().expect(vm_key(vm), Some(old)).delete(vm_key(vm)).delete(store::xml_key(vm));
        if let Some((key, pair)) = view.pair_of(vm) {
            txn = txn.expect(pair_key(key), Some(pair)).delete(pair_key(key));
        }
        if commit(daemon, &txn).await? {
            if let Err(error) = lease::clear(&ha.settings().leases, vm, LEASE_MAX).await {
                tracing::warn!(%error, "the lease beside the disks stays");
            }
            return Ok(());
        }
    }
    Err(failures::changed("the protection of the VM"))
}

/// Wants a protected VM to run. Refused if that took room which is kept for host failures, unless forced.
pub async fn start_vm(daemon: &Daemon, name: &str, force: bool, who: &Principal) -> Result<HaVm> {
    of(daemon)?;
    let vm = views::find(&fresh(daemon).await?, name)?;
    change(daemon, vm, |view, record| {
        if record.phase == VmPhase::Stopped {
            pairs::may_start(view, vm)?;
            // One that is to run already is counted already.
            if record.desired == Desired::Stopped {
                capacity::admit(view, &Change::Start(vm), force)?;
            }
            record.desired = Desired::Running;
            record.failed_on.clear();
            record.service_moves = 0;
            record.blocked = None;
            record.note = format!("{} wants it to run", who.name);
        }
        Ok(())
    })
    .await
}

/// Arms or disarms the cluster.
pub async fn arm(daemon: &Daemon, armed: bool, reason: &str, who: &Principal) -> Result<()> {
    of(daemon)?;
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let fencing = view.hosts.iter().find(|(_, host)| host.value.phase == HostPhase::Fencing);
        if let (false, Some((host, _))) = (armed, fencing) {
            return Err(Problem::new(Code::Busy, format!("{host} is being fenced; its VMs would stay down"))
                .hint("virtward ha status says what is waited for"));
        }
        let mut switches = view.switches();
        switches.armed = armed;
        let reason: String = reason.chars().filter(|c| !c.is_control()).take(200).collect();
        let word = if armed { "armed" } else { "disarmed" };
        switches.note = format!("{word} by {} {reason}", who.name).trim_end().to_owned();
        let txn = Txn::default().expect(cluster_key(), view.cluster.as_ref()).put(cluster_key(), &switches);
        if commit(daemon, &txn).await? {
            return Ok(());
        }
    }
    Err(failures::changed("the switches of high availability"))
}

/// A person's word that a host is off.
pub async fn confirm_off(daemon: &Daemon, host: &str, who: &Principal, path: &str) -> Result<()> {
    let ha = of(daemon)?;
    let view = fresh(daemon).await?;
    let id = HostId::from(host);
    if !view.hosts.contains_key(&id) {
        return Err(Problem::new(Code::NotFound, format!("{host} is no host of high availability"))
            .hint("virtward ha status shows them"));
    }
    ha.confirm_down(id, who.name.clone());
    // Only the leader declares a host dead that is in maintenance; here it is enough for one that is.
    let leads = leader::current(&daemon.kv).await?.map(|leader| leader.node);
    let other = leads.filter(|node| *node != daemon.nodes.me.name && *node != host);
    if let Some(node) = other.filter(|node| daemon.nodes.is_there(node)) {
        let body = virtward_api::HaReason::default();
        forward(daemon, &node, path, &body, who).await?;
    }
    Ok(())
}

/// Tests the fence devices of a host.
pub async fn test_fencing(daemon: &Daemon, host: &str, power_cycle: bool) -> Result<HaFenceTest> {
    let ha = of(daemon)?;
    let id = HostId::from(host);
    let devices = ha.settings().devices.get(&id).cloned().unwrap_or_default();
    if devices.is_empty() {
        let text = format!("the configuration of {} names no fence device for {host}", ha.settings().host);
        return Err(Problem::new(Code::NotFound, text).hint("add [[ha.fence]] with host, name and agent: docs/ha.md"));
    }
    let finding = |found: fence::Finding| {
        let (good, text) = match found.outcome {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        HaFinding { step: found.step.into(), good, text }
    };
    let mut all = Vec::new();
    for device in &devices {
        let findings: Vec<HaFinding> = fence::check(device).await.into_iter().map(finding).collect();
        let good = !findings.is_empty() && findings.iter().all(|finding| finding.good);
        all.push(HaFenceDevice { name: device.name.clone(), level: device.level, good, findings });
    }
    if power_cycle {
        cycle(daemon, &id, &devices, &mut all).await?;
    }
    let good = all.iter().all(|device| device.good);
    Ok(HaFenceTest { host: host.into(), from: ha.settings().host.0.clone(), good, devices: all })
}

async fn cycle(daemon: &Daemon, host: &HostId, devices: &[fence::Device], all: &mut [HaFenceDevice]) -> Result<()> {
    let view = fresh(daemon).await?;
    let record = view.hosts.get(host).map(|host| &host.value);
    if *host == of(daemon)?.settings().host || record.is_some_and(|of| of.phase == HostPhase::Armed && !of.maintenance)
    {
        return Err(Problem::new(
            Code::Conflict,
            format!("{host} is in service; switching it off would end its guests"),
        )
        .hint("stop its daemon first, after its guests were moved away, and ask another host"));
    }
    for (device, told) in devices.iter().zip(all) {
        let (outcome, on) = fence::cycle(std::slice::from_ref(device)).await;
        let (good, text) = match outcome {
            fence::Outcome::Off { .. } => (true, "off, read back".to_owned()),
            fence::Outcome::Unproven { reasons } => (false, reasons.join("; ")),
        };
        told.findings.push(HaFinding { step: "off".into(), good, text });
        let text = if on.is_empty() { "on, read back".to_owned() } else { on.join("; ") };
        told.findings.push(HaFinding { step: "on".into(), good: on.is_empty(), text });
        told.good = told.findings.iter().all(|finding| finding.good);
    }
    Ok(())
}
