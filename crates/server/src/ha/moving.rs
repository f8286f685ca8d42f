//! A protected VM that is migrated while it runs.
//!
//! ```text
//!   announce: moving_to = destination, a permit there ──► libvirt migrates ──► settle: owner = destination, generation + 1
//!             until settled both hosts have it: neither's death alone frees it           or: it has stayed
//! ```
//!
//! The destination does both, as the permit is its own file and the lease its own record.

use std::time::Duration;

use virtward_api::{Code, HaMove, HaVm, Principal, Problem};
use virtward_decide::ha::{
    HostId, Owner, Txn, View, VmId,
    agent::Stage,
    record::{HostPhase, VmPhase, VmRecord, host_key, vm_key},
    room::Change,
};
use virtward_engine::ha::{lease, run::Ha};

use super::{
    actions::{LEASE_MAX, TRIES, commit, forward, fresh, lease_problem},
    capacity, of, views,
};
use crate::{
    daemon::Daemon,
    failures::{self, Result},
};

/// Announces a move, or says how it ended.
pub async fn moving(daemon: &Daemon, name: &str, how: &HaMove, who: &Principal, path: &str) -> Result<HaVm> {
    let ha = of(daemon)?;
    let fleet = daemon.fleet();
    let to = fleet.node_of(&how.to).map_or_else(|| how.to.clone(), str::to_owned);
    if to != ha.settings().host.0 {
        let answer = forward(daemon, &to, path, how, who).await?;
        return serde_json::from_slice(&answer).map_err(|error| Problem::new(Code::Internal, error.to_string()));
    }
    let vm = views::find(&fresh(daemon).await?, name)?;
    match how.has_moved {
        None => announce(daemon, ha, vm, how.force).await,
        Some(has_moved) => settle(daemon, ha, vm, has_moved).await,
    }
}

/// This host as it may own VMs now.
fn me(ha: &Ha, view: &View) -> Result<(Owner, u64)> {
    let host = &ha.settings().host;
    let refused = |why: &str| Problem::new(Code::Conflict, format!("{host} takes no VMs: {why}"));
    let Stage::Armed { epoch } = ha.status().stage else { return Err(refused("it is not in service")) };
    let record = view.hosts.get(host).filter(|of| of.value.phase == HostPhase::Armed && of.value.epoch == epoch);
    let record = record.ok_or_else(|| refused("it is not in service"))?;
    if record.value.maintenance {
        return Err(refused("it is in maintenance"));
    }
    Ok((Owner { host: host.clone(), epoch }, record.revision))
}

async fn announce(daemon: &Daemon, ha: &Ha, vm: VmId, force: bool) -> Result<HaVm> {
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let (here, revision) = me(ha, &view)?;
        let Some(old) = view.vms.get(&vm) else { return Err(failures::changed("the protection of the VM")) };
        let record = &old.value;
        let Some(owner) = record.owner.clone().filter(|owner| record.phase == VmPhase::Running && view.is_armed(owner))
        else {
            return Err(Problem::new(Code::Busy, format!("{} does not run in peace", record.name))
                .hint(format!("virtward ha explain {}", record.name)));
        };
        if owner.host == here.host {
            return Err(Problem::new(Code::Conflict, format!("{} is on {} already", record.name, here.host)));
        }
        if record.moving_to.as_ref().is_some_and(|to| *to != here) {
            return Err(Problem::new(Code::Busy, format!("{} is on its way to another host", record.name)));
        }
        if view.apart_from(vm).contains(&here.host) {
            return Err(Problem::new(
                Code::Conflict,
                format!("{} has the other one of the pair that {} belongs to", here.host, record.name),
            ));
        }
        capacity::admit(&view, &Change::Move(vm, here.host.clone()), force)?;
        let moving = VmRecord { moving_to: Some(here.clone()), ..record.clone() };
        let source = view.hosts.get(&owner.host).map_or(0, |host| host.revision);
        let txn = Txn::default()
            .expect(vm_key(vm), Some(old))
            .expect_at(host_key(&here.host), revision)
            .expect_at(host_key(&owner.host), source)
            .put(vm_key(vm), &moving);
        if commit(daemon, &txn).await? {
            permit(ha, vm, record.generation).await?;
            return Ok(views::one(&fresh(daemon).await?, vm, None));
        }
    }
    Err(failures::changed("the protection of the VM"))
}

/// Lets it in, for as long as this host may run guests.
async fn permit(ha: &Ha, vm: VmId, generation: u64) -> Result<()> {
    let hook = ha.settings().hook();
    let valid = Duration::from_millis(ha.status().allowed_ms.unwrap_or(0));
    let written = move || {
        hook.permit(vm, generation, true, valid)
            .map_err(|error| Problem::new(Code::StorageFull, format!("its permit cannot be written: {error}")))
    };
    failures::blocking(written).await
}

async fn settle(daemon: &Daemon, ha: &Ha, vm: VmId, has_moved: bool) -> Result<HaVm> {
    let hook = ha.settings().hook();
    let _ =
        failures::blocking(move || hook.forbid(vm).map_err(|error| Problem::new(Code::StorageFull, error.to_string())))
            .await;
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let (here, revision) = me(ha, &view)?;
        let Some(old) = view.vms.get(&vm) else { return Err(failures::changed("the protection of the VM")) };
        let record = &old.value;
        // Told before, or settled by the death of one of both.
        if record.moving_to.as_ref() != Some(&here) {
            return Ok(views::one(&view, vm, None));
        }
        let settled = match has_moved {
            true => VmRecord {
                generation: record.generation + 1,
                owner: Some(here.clone()),
                moving_to: None,
                note: format!("migrated to {}", here.host),
                ..record.clone()
            },
            false => VmRecord { moving_to: None, ..record.clone() },
        };
        let txn = Txn::default()
            .expect(vm_key(vm), Some(old))
            .expect_at(host_key(&here.host), revision)
            .put(vm_key(vm), &settled);
        if commit(daemon, &txn).await? {
            if has_moved {
                take_lease(ha, vm, settled.generation, here.epoch, &here.host).await?;
            }
            return Ok(views::one(&fresh(daemon).await?, vm, None));
        }
    }
    Err(failures::changed("the protection of the VM"))
}

async fn take_lease(ha: &Ha, vm: VmId, generation: u64, epoch: u64, host: &HostId) -> Result<()> {
    let claim = lease::Claim { vm, generation, epoch, host: host.0.clone() };
    lease::take(&ha.settings().leases, &claim, LEASE_MAX).await.map_err(|error| lease_problem(&error))
}
