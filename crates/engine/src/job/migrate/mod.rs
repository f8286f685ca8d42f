//! Moving a VM to another host while it runs, or its definition while it does not.
//!
//! ```text
//! lock ─ take up what an earlier run left ─ look at both hosts ─ journal ─ images for disks to copy
//!      ─ libvirt, peer to peer ◄─ steered pass by pass ─ where does it run? ─ checkpoints told again ─ gates ─ journal away
//! ```
//!
//! libvirt's two daemons move the VM between them; this process only steers. Killed at any point it leaves the VM running
//! exactly once, and a journal by which the next run of the same command goes on: it takes up a migration that still
//! runs, finishes one that has arrived, and clears what one that failed had made.
//!
//! Invariant: what is reported is where the VM was seen to run after the fact, never what a call returned.

mod arrive;
mod drive;
mod facts;
mod journal;
mod probes;
mod watch;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::Serialize;
use uuid::Uuid;
use virtward_decide::migration::{
    Finding, Level, blockers,
    check::{self, Checked, Snapshot, Wishes},
    pace,
};
use virtward_hypervisor::{Compression, ErrorKind, Hypervisor};
use virtward_model::{Bytes, Vm, VmState};

use crate::{Cancel, Env, Error, Event, Observer, Phase, Result, lock::VmLock};
use journal::Journal;

/// QEMU can combine post-copy with parallel connections from this version on.
const POSTCOPY_PARALLEL_SINCE: u64 = 10_001_000;
/// Connections where compression needs parallel ones and none were asked for.
const PARALLEL_DEFAULT: u32 = 2;
/// How long a backup that has to give way may take to clean up.
const GIVES_WAY_WITHIN: Duration = Duration::from_secs(60);

/// Where a VM is to go.
#[derive(Clone)]
pub struct Destination {
    /// The host, as this process reaches it.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// libvirt's URI by which the source's libvirt reaches it.
    pub uri: String,
    /// Address to which memory and disks are sent; none lets libvirt choose.
    pub address: Option<String>,
}

/// Whoever has to know where a VM is, and may refuse that it goes: high availability.
#[async_trait]
pub trait Passage: std::fmt::Debug + Send + Sync {
    /// A running VM is about to go to the host of this name.
    async fn announce(&self, vm: Uuid, to: &str) -> std::result::Result<(), String>;
    /// It runs there now, or it has stayed.
    async fn settle(&self, vm: Uuid, to: &str, has_moved: bool) -> std::result::Result<(), String>;
}

/// Options of [`migrate_vm`].
#[derive(Clone, Debug, Default)]
pub struct MigrateOptions {
    /// What the pace is decided by.
    pub pace: pace::Policy,
    /// Limit per second.
    pub bandwidth: Option<Bytes>,
    /// Copy disks that the destination does not see.
    pub with_storage: bool,
    /// Move it although a disk's cache mode ignores flushes.
    pub unsafe_cache: bool,
    /// Parallel connections; 0 for one.
    pub parallel: u32,
    /// How memory is compressed.
    pub compression: Option<Compression>,
    /// Encrypt by the hosts' certificates.
    pub tls: bool,
    /// Name in the destination's certificate.
    pub tls_name: Option<String>,
    /// A backup of ours that runs is cancelled.
    pub backups_give_way: bool,
    /// Why the VM must not run there, by rules that the caller knows.
    pub apart: Vec<String>,
    /// Why the destination takes no VMs now.
    pub closed: Option<String>,
    /// Who has to know.
    pub passage: Option<Arc<dyn Passage>>,
}

/// What a migration would do, and what stands in its way.
#[derive(Clone, Debug, Serialize)]
pub struct MigrationPlan {
    /// VM.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its host.
    pub from: String,
    /// The destination.
    pub to: String,
    /// State.
    pub state: VmState,
    /// Nothing stands in the way.
    pub possible: bool,
    /// Everything that was looked at.
    pub findings: Vec<Finding>,
    /// Disks that would be copied.
    pub copy: Vec<String>,
    /// Memory, in bytes.
    pub memory_bytes: u64,
}

/// What a migration came to.
#[derive(Clone, Debug, Serialize)]
pub struct Migrated {
    /// VM.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Where it was.
    pub from: String,
    /// Where it is.
    pub to: String,
    /// Its state there.
    pub state: VmState,
    /// It was there already, or an earlier run had brought it there.
    pub already_there: bool,
    /// From the call to its end, in milliseconds.
    pub total_ms: u64,
    /// From the stop of its vCPUs here to their run there, in milliseconds, as QEMU measured it.
    pub downtime_ms: Option<u64>,
    /// Passes over memory.
    pub passes: u64,
    /// Memory sent, in bytes; more than it has if parts were sent again.
    pub sent_bytes: u64,
    /// How much its vCPUs were held back at most, in percent.
    pub throttle_percent: u64,
    /// The last part followed after the switch.
    pub postcopy: bool,
    /// Disks that were copied.
    pub copied: Vec<String>,
    /// Image files that are left at the source.
    pub left: Vec<String>,
    /// Checkpoints that the destination was told of, so that change tracking goes on.
    pub checkpoints: u64,
    /// What was looked at after the arrival.
    pub gates: Vec<Finding>,
    /// What else should be known.
    pub warnings: Vec<String>,
}

impl Migrated {
    /// Whether something at the new place needs to be looked at.
    pub fn has_failed_gate(&self) -> bool {
        blockers(&self.gates).next().is_some()
    }
}

/// One run.
pub(super) struct Run<'a> {
    env: &'a Env,
    to: &'a Destination,
    options: &'a MigrateOptions,
    observer: &'a dyn Observer,
    cancel: &'a Cancel,
    vm: Vm,
    warnings: Vec<String>,
}

impl Run<'_> {
    fn here(&self) -> &dyn Hypervisor {
        &*self.env.hypervisor
    }

    fn there(&self) -> &dyn Hypervisor {
        &*self.to.hypervisor
    }

    fn warn(&mut self, text: String) {
        self.observer.event(&self.vm.name, Event::Warning(&text));
        self.warnings.push(text);
    }

    fn phase(&self, phase: Phase) {
        self.observer.event(&self.vm.name, Event::Phase(phase));
    }

    fn wishes(&self) -> Wishes {
        Wishes { with_storage: self.options.with_storage, unsafe_cache: self.options.unsafe_cache }
    }
}

/// Looks at both hosts and says what a migration would do. Changes nothing, but for a file of a moment in the directory
/// of each disk, by which it is seen whether both hosts see the same one.
pub async fn plan_migration(env: &Env, vm: &str, to: &Destination, options: &MigrateOptions) -> Result<MigrationPlan> {
    let vm = env.hypervisor.lookup(vm).await.map_err(Error::hyper(format!("migrate {vm}")))?;
    let snapshot = facts::gather(env, &*env.hypervisor, &*to.hypervisor, &vm, options).await?;
    let wishes = Wishes { with_storage: options.with_storage, unsafe_cache: options.unsafe_cache };
    Ok(planned(&snapshot, check::check(&snapshot, wishes)))
}

fn planned(snapshot: &Snapshot, checked: Checked) -> MigrationPlan {
    let possible = blockers(&checked.findings).next().is_none();
    MigrationPlan {
        vm: snapshot.vm.clone(),
        uuid: snapshot.uuid,
        from: snapshot.source.name.clone(),
        to: snapshot.destination.name.clone(),
        state: snapshot.state,
        possible,
        findings: checked.findings,
        copy: checked.copy,
        memory_bytes: snapshot.machine.memory_bytes,
    }
}

/// Moves a VM, by name or UUID. Safe to repeat: a VM that is there already is left alone, and what an interrupted run
/// began is brought to its end.
pub async fn migrate_vm(
    env: &Env,
    vm: &str,
    to: &Destination,
    options: &MigrateOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<Migrated> {
    let (vm, is_here) = match env.hypervisor.lookup(vm).await {
        Ok(found) => (found, true),
        Err(error) if error.kind == ErrorKind::NoDomain => {
            let found = to.hypervisor.lookup(vm).await;
            (found.map_err(|_| Error::hyper(format!("migrate {vm}"))(error))?, false)
        }
        Err(error) => return Err(Error::hyper(format!("migrate {vm}"))(error)),
    };
    let mut run = Run { env, to, options, observer, cancel, vm, warnings: Vec::new() };
    run.phase(Phase::Preparing);
    let _lock = lock(&mut run).await?;
    let journal = Journal::load(env, run.vm.uuid)?;
    if !is_here {
        return arrive::again(&mut run, journal).await;
    }
    match take_up(&mut run, journal).await? {
        TakenUp::Runs(journal) => finish(&mut run, journal, true).await,
        TakenUp::Arrived(journal) => arrive::again(&mut run, Some(journal)).await,
        TakenUp::Nothing => {
            let journal = prepare(&mut run).await?;
            finish(&mut run, journal, false).await
        }
    }
}

/// One job of ours per VM. A backup gives way if the caller says so.
async fn lock(run: &mut Run<'_>) -> Result<VmLock> {
    let deadline = tokio::time::Instant::now() + GIVES_WAY_WITHIN;
    let mut told = false;
    loop {
        let taken = VmLock::take(&run.env.dirs.runtime, run.vm.uuid, &run.vm.name, "migration");
        let Err(error) = taken else { return taken };
        if !run.options.backups_give_way || tokio::time::Instant::now() > deadline || run.cancel.is_cancelled() {
            return Err(error);
        }
        let ours = run.here().backup_xml(run.vm.uuid).await.ok().flatten();
        let ours = ours.is_some_and(|xml| crate::job::backup::owns_backup(run.env, run.vm.uuid, &xml));
        if ours && run.here().abort_job(run.vm.uuid).await.is_ok() && !told {
            told = true;
            run.warn(format!(
                "the backup of {} was cancelled to let it move; run it again at its new place",
                run.vm.name
            ));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What an earlier run left.
enum TakenUp {
    /// Nothing, or it is cleared away.
    Nothing,
    /// A migration to the same destination that runs still.
    Runs(Journal),
    /// It has arrived; what remains is here as a definition at most.
    Arrived(Journal),
}

async fn take_up(run: &mut Run<'_>, journal: Option<Journal>) -> Result<TakenUp> {
    let Some(journal) = journal else { return Ok(TakenUp::Nothing) };
    let job = run.here().job(run.vm.uuid).await.map_err(Error::hyper(format!("look at {}", run.vm.name)))?;
    let moving = job.is_some_and(|job| job.kind == virtward_hypervisor::JobKind::MigrationOut);
    if moving && journal.destination == run.to.uri {
        run.warn(format!("a migration of {} that an earlier run began goes on", run.vm.name));
        return Ok(TakenUp::Runs(journal));
    }
    if moving {
        return Err(Error::Busy(format!(
            "{} is on its way to {}; wait for it, or end that migration: virsh domjobabort {}",
            run.vm.name, journal.destination, run.vm.name
        )));
    }
    let there = run.there().lookup(&run.vm.uuid.to_string()).await;
    let runs_there = there.is_ok_and(|vm| vm.state.is_active());
    if runs_there && !run.vm.state.is_active() && journal.destination == run.to.uri {
        return Ok(TakenUp::Arrived(journal));
    }
    if journal.destination == run.to.uri && !runs_there {
        clear(run, &journal).await;
    } else if !journal.made.is_empty() {
        run.warn(format!(
            "an earlier migration to {} made images that may be left there: {}",
            journal.destination,
            journal.made.join(", ")
        ));
    }
    journal.remove(run.env)?;
    Ok(TakenUp::Nothing)
}

/// Removes the images that were made at a destination to which the VM did not go.
async fn clear(run: &mut Run<'_>, journal: &Journal) {
    for path in &journal.made {
        if let Err(error) = run.there().volume_remove(path).await {
            run.warn(format!("{path} at the destination is not needed and could not be removed: {}", error.message));
        }
    }
}

/// Checks, writes the journal, makes images.
async fn prepare(run: &mut Run<'_>) -> Result<Journal> {
    let snapshot = facts::gather(run.env, run.here(), run.there(), &run.vm, run.options).await?;
    let checked = check::check(&snapshot, run.wishes());
    let stand: Vec<&Finding> = blockers(&checked.findings).collect();
    if !stand.is_empty() {
        return Err(Error::Refused(refusal(&snapshot, &stand)));
    }
    for finding in checked.findings.iter().filter(|finding| finding.level == Level::Warning) {
        run.warn(format!("{}: {}", finding.check, finding.text));
    }
    let mut journal = Journal::of(run, &snapshot, &checked).await?;
    journal.save(run.env)?;
    for disk in snapshot.machine.disks.iter().map(|used| &used.disk).filter(|d| checked.copy.contains(&d.target)) {
        let size = snapshot.disks.iter().find(|there| there.target == disk.target).map_or(0, |there| there.size_bytes);
        let Some(path) = disk.source.path() else { continue };
        journal.made.push(path.to_owned());
        journal.save(run.env)?;
        if let Err(error) = run.there().volume_create(path, &disk.format, size).await {
            journal.made.pop();
            clear(run, &journal).await;
            journal.remove(run.env)?;
            return Err(Error::hyper(format!("make {path} at {}", snapshot.destination.name))(error));
        }
    }
    Ok(journal)
}

fn refusal(snapshot: &Snapshot, blockers: &[&Finding]) -> String {
    let all: Vec<String> = blockers.iter().map(|finding| format!("{}: {}", finding.check, finding.text)).collect();
    let advice = blockers.iter().find_map(|finding| finding.advice.clone()).unwrap_or_default();
    let text = format!("{} cannot go to {}: {}", snapshot.vm, snapshot.destination.name, all.join("; also "));
    if advice.is_empty() { text } else { format!("{text}; {advice}") }
}

/// Tells whoever has to know that it goes.
async fn announce(run: &mut Run<'_>) -> std::result::Result<(), String> {
    let Some(passage) = run.options.passage.clone().filter(|_| run.vm.state.is_active()) else { return Ok(()) };
    let to = run.there().host().await.map_err(|error| error.to_string())?.name;
    passage.announce(run.vm.uuid, &to).await
}

/// Tells where it is.
pub(super) async fn settle(run: &mut Run<'_>, has_moved: bool) {
    let Some(passage) = run.options.passage.clone().filter(|_| run.vm.state.is_active()) else { return };
    let told = match run.there().host().await {
        Ok(host) => passage.settle(run.vm.uuid, &host.name, has_moved).await,
        Err(error) => Err(error.to_string()),
    };
    if let Err(why) = told {
        run.warn(format!("high availability was not told where {} is: {why}; run the command again", run.vm.name));
    }
}

/// Drives it to its end and looks where it runs.
async fn finish(run: &mut Run<'_>, mut journal: Journal, taken_up: bool) -> Result<Migrated> {
    if let Err(why) = announce(run).await {
        clear(run, &journal).await;
        journal.remove(run.env)?;
        return Err(Error::Refused(why));
    }
    run.phase(Phase::Copying);
    let before = arrive::before(run, &journal).await;
    let driven = drive::drive(run, &journal, taken_up).await;
    run.phase(Phase::Publishing);
    match watch::settle(run, &driven).await? {
        watch::Place::There => {
            settle(run, true).await;
            let migrated = arrive::arrived(run, &mut journal, driven, before).await?;
            journal.remove(run.env)?;
            Ok(migrated)
        }
        watch::Place::Here => {
            run.phase(Phase::CleaningUp);
            settle(run, false).await;
            clear(run, &journal).await;
            journal.remove(run.env)?;
            Err(driven.failure(run))
        }
    }
}
