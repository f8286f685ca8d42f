//! Backing up a VM (hot, warm, cold) or plain image files into one restore point.
//!
//! ```text
//! lock ─ look up ─┬ running ─► hot:   repair ─ freeze ─ begin ─ thaw ─ copy ─ end job ─ publish ─ drop old checkpoint
//!                 └ shut off ► cold:  open read-only ─────────────────── copy ─ new bitmap ─ publish ─ drop old bitmap
//! ```
//!
//! Of these, what a backup costs (copy, publish: `store`) can be done by another host; all else is this one's.
//!
//! Invariant: until the new restore point is published, the previous one's checkpoint stays; once it is, the new
//! checkpoint is the one to keep. A run killed anywhere leaves at worst one checkpoint too many, a job, and scratch
//! files, all recognisable as ours, which the next run removes before it begins.

pub(crate) mod attach;
mod cold;
mod copy;
mod disks;
mod hot;
mod images;
mod origin;
pub(crate) mod quiesce;
mod scratch;
mod select;
mod session;
mod store;
mod watch;

use std::{path::PathBuf, time::Duration};

use futures::TryFutureExt;
use jiff::Timestamp;
use virtward_hypervisor::HostInfo;
use virtward_model::{
    BackupKind, Bytes, DiskRecord, PointId, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind, Vm,
};
use virtward_repo::{Attachment, Compression, Repository, Writer, WriterOptions};

use self::store::Store;
pub use self::store::{DiskJob, Proxy, Terms, store_exports};
use crate::{Cancel, Env, Error, Event, Observer, Phase, Result, lock::VmLock};

/// How a running VM is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupMode {
    /// Without a pause: hot if it runs, cold if it is off.
    #[default]
    Auto,
    /// vCPUs stopped for the instant of the cut.
    Warm,
}

/// Commands run on this host around the freeze, through `sh -c`, with `VIRTWARD_VM` in the environment.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    /// Before the freeze; a failure fails a `required` quiesce and is a warning otherwise.
    pub pre_freeze: Option<String>,
    /// After the thaw, always run once `pre_freeze` was started.
    pub post_thaw: Option<String>,
    /// Limit for each; default 30 s.
    pub timeout: Option<Duration>,
}

/// Options of [`backup_vm`].
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Hot/cold or warm.
    pub mode: BackupMode,
    /// Quiescing.
    pub quiesce: QuiesceRequest,
    /// How long the agent may take to answer before it counts as absent.
    pub agent_timeout: Duration,
    /// Hook commands.
    pub hooks: Hooks,
    /// Read limit in bytes per second over all disks; none is unlimited.
    pub bandwidth: Option<Bytes>,
    /// Ignore change tracking and read everything that is allocated.
    pub full: bool,
    /// Back up only these disks.
    pub only_disks: Vec<String>,
    /// Leave these disks out.
    pub exclude_disks: Vec<String>,
    /// Labels for the restore point.
    pub tags: Vec<String>,
    /// How data that the repository does not have is compressed.
    pub compression: Compression,
    /// Free space that must remain on the scratch file system; the backup is given up below it.
    pub scratch_reserve: Bytes,
    /// Number of clean regions re-read to check the tracking.
    pub sample_regions: usize,
    /// Threads that hash, compress and encrypt; 0 means one per core.
    pub threads: usize,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            mode: BackupMode::Auto,
            quiesce: QuiesceRequest::Auto,
            agent_timeout: Duration::from_secs(10),
            hooks: Hooks::default(),
            bandwidth: None,
            full: false,
            only_disks: Vec::new(),
            exclude_disks: Vec::new(),
            tags: Vec::new(),
            compression: Compression::default(),
            scratch_reserve: Bytes::mib(512),
            sample_regions: 4,
            threads: 0,
        }
    }
}

/// Image files that belong to no domain, backed up together as one restore point.
#[derive(Clone, Debug)]
pub struct ImageSet {
    /// Name in the repository (`image/NAME` cannot collide with a VM's: its UUID is nil).
    pub name: String,
    /// Image files, each its own disk.
    pub files: Vec<PathBuf>,
    /// Format of all of them; none: by extension and header, refused where the two disagree.
    pub format: Option<String>,
}

/// Backs up one VM, by name or UUID.
pub async fn backup_vm(
    env: &Env,
    repo: &Repository,
    vm: &str,
    options: &BackupOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestorePoint> {
    backup_vm_through(None, env, repo, vm, options, observer, cancel).await
}

/// The same, with the data read and stored by another host, if one is given. What comes of it is the same; `repo` is only
/// asked for restore points then.
pub async fn backup_vm_through(
    proxy: Option<&dyn Proxy>,
    env: &Env,
    repo: &Repository,
    vm: &str,
    options: &BackupOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestorePoint> {
    let started = Timestamp::now();
    let found = env.hypervisor.lookup(vm).await.map_err(Error::hyper(format!("back up {vm}")))?;
    let _lock = VmLock::take(&env.dirs.runtime, found.uuid, &found.name, "backup")?;
    observer.event(&found.name, Event::Phase(Phase::Preparing));
    let host = env.hypervisor.host().map_err(Error::hyper("ask the host who it is"));
    let (host, history) = futures::try_join!(host, history(repo, &found))?;
    let mut job =
        Job { env, repo, proxy, vm: found, host, options, observer, cancel, started, history, warnings: Vec::new() };
    let outcome = attempt(&mut job).await;
    // A guest that shut itself down, or was started, in the middle is backed up the other way: once.
    match outcome {
        Err(Error::SourceGone(why)) if !cancel.is_cancelled() => {
            let now =
                env.hypervisor.lookup(&job.vm.uuid.to_string()).await.map_err(|_| Error::SourceGone(why.clone()))?;
            if now.state.is_active() == job.vm.state.is_active() {
                return Err(Error::SourceGone(why));
            }
            job.vm = now;
            job.warn(format!("{why}; the backup was begun again"));
            attempt(&mut job).await
        }
        other => other,
    }
}

/// Whether a backup job that the hypervisor knows is one of ours.
pub(crate) fn owns_backup(env: &Env, vm: uuid::Uuid, xml: &str) -> bool {
    scratch::Scratch::of(env, vm).owns(xml)
}

async fn attempt(job: &mut Job<'_>) -> Result<RestorePoint> {
    match job.vm.state.is_active() {
        true => hot::run(job).await,
        false => cold::run(job).await,
    }
}

/// Backs up image files. Needs no hypervisor.
pub async fn backup_images(
    repo: &Repository,
    set: &ImageSet,
    options: &BackupOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestorePoint> {
    images::run(repo, set, options, observer, cancel).await
}

/// One run of [`backup_vm`].
struct Job<'a> {
    env: &'a Env,
    repo: &'a Repository,
    /// Who reads and stores; none: this process.
    proxy: Option<&'a dyn Proxy>,
    vm: Vm,
    host: HostInfo,
    options: &'a BackupOptions,
    observer: &'a dyn Observer,
    cancel: &'a Cancel,
    started: Timestamp,
    /// Restore points of this VM, newest first.
    history: Vec<RestorePoint>,
    warnings: Vec<String>,
}

/// What a way of reading found out, to be made a restore point.
struct Taken {
    id: PointId,
    source: SourceKind,
    taken: Timestamp,
    quiesce: QuiesceRecord,
    disks: Vec<DiskRecord>,
    skipped: Vec<String>,
}

impl Job<'_> {
    fn phase(&self, phase: Phase) {
        self.observer.event(&self.vm.name, Event::Phase(phase));
    }

    fn warn(&mut self, text: String) {
        self.observer.event(&self.vm.name, Event::Warning(&text));
        self.warnings.push(text);
    }

    /// Prefix of the checkpoints that belong to this repository.
    fn checkpoint_prefix(&self) -> String {
        let repository: String = self.repo.id().chars().filter(char::is_ascii_hexdigit).take(8).collect();
        format!("virtward-{repository}-")
    }

    fn checkpoint_name(&self, id: PointId) -> String {
        format!("{}{}", self.checkpoint_prefix(), &id.to_string()[..16])
    }

    /// Makes the restore point visible. From here on it is acknowledged.
    async fn publish(&self, store: Store<'_>, taken: Taken, attachments: Vec<Attachment>) -> Result<RestorePoint> {
        self.phase(Phase::Publishing);
        let point = RestorePoint {
            id: taken.id,
            vm: self.vm.name.clone(),
            vm_uuid: self.vm.uuid,
            host: self.host.name.clone(),
            source: taken.source,
            kind: kind_of(&taken.disks),
            taken: taken.taken,
            started: self.started,
            finished: Timestamp::now(),
            parent: self.history.first().map(|point| point.id),
            quiesce: taken.quiesce,
            disks: taken.disks,
            skipped: taken.skipped,
            tags: self.options.tags.clone(),
            warnings: self.warnings.clone(),
            copied_from: None,
        };
        store.publish(self, point, attachments).await
    }
}

fn kind_of(disks: &[DiskRecord]) -> BackupKind {
    match !disks.is_empty() && disks.iter().all(disks::was_incremental) {
        true => BackupKind::Incremental,
        false => BackupKind::Full,
    }
}

async fn open_writer(repo: &Repository, options: &BackupOptions, cancel: &Cancel) -> Result<Writer> {
    let repo = repo.clone();
    let options = WriterOptions {
        threads: options.threads,
        compression: options.compression,
        cancel: Some(cancel.flag()),
        ..WriterOptions::default()
    };
    blocking(move || Ok(repo.writer(options)?)).await
}

async fn publish(writer: Writer, point: RestorePoint, attachments: Vec<Attachment>) -> Result<RestorePoint> {
    blocking(move || {
        writer.publish(point.clone(), attachments)?;
        Ok(point)
    })
    .await
}

/// The restore points of a VM in a repository, newest first.
async fn history(repo: &Repository, vm: &Vm) -> Result<Vec<RestorePoint>> {
    let (repo, uuid) = (repo.clone(), vm.uuid);
    let listed = blocking(move || Ok(repo.points()?)).await?;
    let mut points: Vec<RestorePoint> = listed.points.into_iter().filter(|point| point.vm_uuid == uuid).collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.taken));
    Ok(points)
}

/// Runs repository work, which blocks, away from the async threads.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Tool(format!("a worker of the repository failed: {error}"))),
    }
}
