//! The new place: change tracking goes on, switches learn the way, and the gates are looked at.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use virtward_decide::migration::gate::{self, Arrival};
use virtward_hypervisor::{CheckpointSpec, Hypervisor, MigrationInfo};
use virtward_model::VmState;

use super::{Journal, Migrated, Run, drive::Driven, facts};
use crate::{Error, Result};

/// An agent that does not answer within this is not waited for, in seconds.
const AGENT_TIMEOUT_S: u32 = 3;
/// A guest that is reachable answers, or refuses, within this.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// What was seen of the guest before it left.
pub(super) struct Before {
    clock_ms: Option<i64>,
    address: Option<IpAddr>,
    answers: Option<bool>,
}

/// Looks at a guest that is about to leave.
pub(super) async fn before(run: &Run<'_>, journal: &Journal) -> Before {
    if !journal.active || journal.paused {
        return Before { clock_ms: None, address: None, answers: None };
    }
    let clock_ms = clock(run.here(), run).await;
    // An agent that does not tell the time does not tell addresses either.
    let address = if clock_ms.is_some() { address(run.here(), run).await } else { None };
    let answers = match address {
        Some(address) => Some(answers(address).await),
        None => None,
    };
    Before { clock_ms, address, answers }
}

async fn ask(hypervisor: &dyn Hypervisor, run: &Run<'_>, command: &str) -> Option<Value> {
    let command = json!({ "execute": command }).to_string();
    let answer = hypervisor.agent(run.vm.uuid, &command, AGENT_TIMEOUT_S).await.ok()?;
    let mut answer: Value = serde_json::from_str(&answer).ok()?;
    Some(answer.get_mut("return")?.take())
}

/// The guest's clock minus ours, in milliseconds.
async fn clock(hypervisor: &dyn Hypervisor, run: &Run<'_>) -> Option<i64> {
    let guest = ask(hypervisor, run, "guest-get-time").await?.as_i64()? / 1_000_000;
    let ours = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_millis();
    Some(guest - i64::try_from(ours).ok()?)
}

/// An address of the guest that others could reach.
async fn address(hypervisor: &dyn Hypervisor, run: &Run<'_>) -> Option<IpAddr> {
    let interfaces = ask(hypervisor, run, "guest-network-get-interfaces").await?;
    let addresses = interfaces.as_array()?.iter().flat_map(|i| i["ip-addresses"].as_array().into_iter().flatten());
    let addresses = addresses.filter_map(|a| a["ip-address"].as_str()?.parse::<IpAddr>().ok());
    addresses
        .filter(|a| match a {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        })
        .min()
}

/// Whether anything comes back from an address: a refusal is as good as a welcome.
async fn answers(address: IpAddr) -> bool {
    let attempt = tokio::net::TcpStream::connect((address, 22));
    match tokio::time::timeout(ANSWERS_WITHIN, attempt).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

/// It has arrived: tell checkpoints, announce, judge.
pub(super) async fn arrived(
    run: &mut Run<'_>,
    journal: &mut Journal,
    driven: Driven,
    before: Before,
) -> Result<Migrated> {
    let total_ms = u64::try_from(driven.began.elapsed().as_millis()).unwrap_or(u64::MAX);
    if let Some(error) = &driven.error {
        run.warn(format!("it runs there, though libvirt reported: {}", error.message));
    }
    if matches!(driven.ended, Some(super::drive::Ended::Cancelled)) {
        run.warn("it had arrived when it was to be called back".into());
    }
    let told = told(run, &driven).await;
    let checkpoints = checkpoints(run, journal).await;
    let (state, gates) = gates(run, journal, before).await?;
    let left = journal.disks.iter().filter(|(target, _)| journal.copy.contains(target));
    Ok(Migrated {
        vm: journal.vm.clone(),
        uuid: journal.uuid,
        from: journal.from.clone(),
        to: journal.to.clone(),
        state,
        already_there: false,
        total_ms,
        downtime_ms: told.downtime_ms.filter(|_| journal.active && !journal.paused),
        passes: told.iteration,
        sent_bytes: told.memory_processed_bytes,
        throttle_percent: driven.throttle_percent,
        postcopy: driven.postcopy,
        copied: journal.copy.clone(),
        left: left.map(|(_, path)| path.clone()).collect(),
        checkpoints,
        gates,
        warnings: std::mem::take(&mut run.warnings),
    })
}

/// A VM that an earlier run brought to its destination, or that was there all the time.
pub(super) async fn again(run: &mut Run<'_>, journal: Option<Journal>) -> Result<Migrated> {
    super::settle(run, true).await;
    let context = || format!("look at {} at the destination", run.vm.name);
    let to = run.there().host().await.map_err(Error::hyper(context()))?.name;
    let from = run.here().host().await.map_err(Error::hyper(context()))?.name;
    let mut migrated = Migrated {
        vm: run.vm.name.clone(),
        uuid: run.vm.uuid,
        from,
        to,
        state: run.vm.state,
        already_there: true,
        total_ms: 0,
        downtime_ms: None,
        passes: 0,
        sent_bytes: 0,
        throttle_percent: 0,
        postcopy: false,
        copied: Vec::new(),
        left: Vec::new(),
        checkpoints: 0,
        gates: Vec::new(),
        warnings: Vec::new(),
    };
    if let Some(journal) = journal {
        if let Ok(Some(job)) = run.there().job_done(run.vm.uuid).await
            && let Some(told) = job.migration
        {
            (migrated.downtime_ms, migrated.passes) = (told.downtime_ms, told.iteration);
            (migrated.sent_bytes, migrated.total_ms) = (told.memory_processed_bytes, job.elapsed_ms);
        }
        migrated.checkpoints = checkpoints(run, &journal).await;
        let nothing = Before { clock_ms: None, address: None, answers: None };
        (migrated.state, migrated.gates) = gates(run, &journal, nothing).await?;
        migrated.copied.clone_from(&journal.copy);
        let left = journal.disks.iter().filter(|(target, _)| journal.copy.contains(target));
        migrated.left = left.map(|(_, path)| path.clone()).collect();
        journal.remove(run.env)?;
    }
    migrated.warnings = std::mem::take(&mut run.warnings);
    Ok(migrated)
}

/// What the destination tells of the migration, or else what was seen last.
async fn told(run: &Run<'_>, driven: &Driven) -> MigrationInfo {
    let told = run.there().job_done(run.vm.uuid).await.ok().flatten().and_then(|job| job.migration);
    let seen = driven.last.as_ref().and_then(|job| job.migration.clone());
    // What was only predicted is not told as measured.
    let seen = seen.map(|seen| MigrationInfo { downtime_ms: None, ..seen });
    told.or(seen).unwrap_or_default()
}

/// Tells the destination of the checkpoints whose bitmaps came along. One that cannot be told costs tracking, which the
/// next backup puts right; never the migration.
async fn checkpoints(run: &mut Run<'_>, journal: &Journal) -> u64 {
    if !journal.active || journal.checkpoints.is_empty() {
        return 0;
    }
    let known: Vec<String> = match run.there().checkpoints(journal.uuid).await {
        Ok(known) => known.into_iter().map(|info| info.name).collect(),
        Err(_) => Vec::new(),
    };
    let mut count = 0;
    for checkpoint in journal.checkpoints.iter().filter(|c| !known.contains(&c.name)) {
        let spec = CheckpointSpec {
            name: checkpoint.name.clone(),
            description: "Virtward change tracking".into(),
            disks: checkpoint.disks.clone(),
        };
        match run.there().checkpoint_redefine(journal.uuid, &spec, checkpoint.created_unix_s).await {
            Ok(()) => count += 1,
            Err(error) => run.warn(format!(
                "checkpoint {} did not come along ({}); the next backup puts tracking right",
                checkpoint.name, error.message
            )),
        }
    }
    count
}

async fn gates(
    run: &Run<'_>,
    journal: &Journal,
    before: Before,
) -> Result<(VmState, Vec<virtward_decide::migration::Finding>)> {
    let id = journal.uuid.to_string();
    let there = run.there().lookup(&id).await.map_err(Error::hyper(format!("look at {} there", journal.vm)))?;
    let here = run.here().lookup(&id).await;
    if there.state == VmState::Running {
        // QEMU announces the guest as it starts; once more costs nothing, and switches may have been slow to wake.
        let announce = json!({
            "execute": "announce-self",
            "arguments": { "initial": 50, "max": 550, "rounds": 5, "step": 50 }
        });
        if let Err(error) = run.there().monitor(journal.uuid, &announce).await {
            tracing::debug!(%error, "announce-self");
        }
    }
    let clock_after = if before.clock_ms.is_some() { clock(run.there(), run).await } else { None };
    let answers_after = match before.address.filter(|_| before.answers == Some(true)) {
        Some(address) => Some(answers(address).await),
        None => None,
    };
    let arrival = Arrival {
        uuid: journal.uuid,
        runs_here: here.is_ok_and(|vm| vm.state.is_active()),
        // A VM that was off is where its definition is.
        runs_there: there.state.is_active() || !journal.active,
        disks_before: journal.disks.clone(),
        disks_after: facts::sources(&there),
        clock_ms: (before.clock_ms, clock_after),
        answers: (before.answers, answers_after),
    };
    Ok((there.state, gate::judge(&arrival)))
}
