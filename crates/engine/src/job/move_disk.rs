//! Moving a disk of a VM to another file, format or storage, while the VM runs or while it does not.
//!
//! QEMU mirrors the disk, writes of the guest included, until both are in step; then it goes on with the copy, and the old
//! file is removed. A VM that is off is started for it without its vCPUs, and ends with this process if that is killed.
//!
//! Until the switch nothing has changed for the VM; after it, all has. A journal says on which side of it a killed run
//! was: the next run of the same command goes on from there.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;
use virtward_hypervisor::{BlockCopySpec, ErrorKind, StartOptions};
use virtward_model::{Bytes, Disk, DiskDevice, DiskSource, Vm, VmState};

use crate::{Cancel, Env, Error, Event, Observer, Phase, Result, lock::VmLock};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long libvirt may take to end a block job that it was told to end.
const ENDS_WITHIN: Duration = Duration::from_secs(60);
/// How long the hypervisor may be away while QEMU goes on copying.
const AWAY_MAX: Duration = Duration::from_secs(120);

/// Where a disk goes.
#[derive(Clone, Debug)]
pub enum DiskPlace {
    /// A storage pool, under the file name that it has.
    Pool(String),
    /// A file at an absolute path of the host.
    File(String),
}

/// Options of [`move_disk`].
#[derive(Clone, Debug, Default)]
pub struct MoveDiskOptions {
    /// Format of the copy; none keeps it.
    pub format: Option<String>,
    /// Limit per second.
    pub bandwidth: Option<Bytes>,
    /// Leave the old file.
    pub keep_source: bool,
}

/// What a move came to.
#[derive(Clone, Debug, Serialize)]
pub struct MovedDisk {
    /// VM.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Disk.
    pub target: String,
    /// Where it was.
    pub from: String,
    /// Where it is.
    pub to: String,
    /// Its format there.
    pub format: String,
    /// Virtual size, in bytes.
    pub size_bytes: u64,
    /// From the call to its end, in milliseconds.
    pub total_ms: u64,
    /// The VM was off.
    pub cold: bool,
    /// It was there already, or an earlier run had brought it there.
    pub already_there: bool,
    /// The old file is left.
    pub source_kept: bool,
    /// What else should be known.
    pub warnings: Vec<String>,
}

/// A move under way, on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Journal {
    from: String,
    to: String,
    format: String,
}

struct Run<'a> {
    env: &'a Env,
    observer: &'a dyn Observer,
    cancel: &'a Cancel,
    vm: Vm,
    target: String,
    warnings: Vec<String>,
}

impl Run<'_> {
    fn warn(&mut self, text: String) {
        self.observer.event(&self.vm.name, Event::Warning(&text));
        self.warnings.push(text);
    }

    fn phase(&self, phase: Phase) {
        self.observer.event(&self.vm.name, Event::Phase(phase));
    }

    fn journal_path(&self) -> PathBuf {
        self.env.dirs.runtime.join("moves").join(format!("{}-{}.json", self.vm.uuid, self.target))
    }

    fn load(&self) -> Option<Journal> {
        serde_json::from_slice(&std::fs::read(self.journal_path()).ok()?).ok()
    }

    fn save(&self, journal: &Journal) -> Result<()> {
        let path = self.journal_path();
        let write = || {
            let dir = path.parent().unwrap_or(&path);
            std::fs::create_dir_all(dir)?;
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            file.write_all(&serde_json::to_vec(journal)?)?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(Error::io(format!("write {}", path.display())))
    }

    fn forget(&self) {
        let _ = std::fs::remove_file(self.journal_path());
    }

    async fn look(&mut self) -> Result<()> {
        let id = self.vm.uuid.to_string();
        self.vm = self.env.hypervisor.lookup(&id).await.map_err(Error::hyper(format!("look at {}", self.vm.name)))?;
        Ok(())
    }

    fn source(&self) -> Option<String> {
        let disk = self.vm.disks.iter().find(|disk| disk.target == self.target)?;
        disk.source.path().map(str::to_owned)
    }
}

/// Moves one disk. Safe to repeat.
pub async fn move_disk(
    env: &Env,
    vm: &str,
    target: &str,
    to: &DiskPlace,
    options: &MoveDiskOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<MovedDisk> {
    let began = Instant::now();
    let found = env.hypervisor.lookup(vm).await.map_err(Error::hyper(format!("move disk {target} of {vm}")))?;
    let disk = movable(&found, target)?.clone();
    let _lock = VmLock::take(&env.dirs.runtime, found.uuid, &found.name, "disk move")?;
    let mut run = Run { env, observer, cancel, vm: found, target: target.to_owned(), warnings: Vec::new() };
    run.phase(Phase::Preparing);
    let source = run.source().unwrap_or_default();
    let format = options.format.clone().unwrap_or_else(|| disk.format.clone());
    let path = place(&run, to, &source, &disk.format, &format).await?;
    let cold = !run.vm.state.is_active();
    let size_bytes = size(&run, &source).await;
    let outcome = |run: &mut Run<'_>, from: String, already_there| MovedDisk {
        vm: run.vm.name.clone(),
        uuid: run.vm.uuid,
        target: run.target.clone(),
        from,
        to: path.clone(),
        format: format.clone(),
        size_bytes,
        total_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        cold,
        already_there,
        source_kept: options.keep_source,
        warnings: std::mem::take(&mut run.warnings),
    };
    let earlier = run.load();
    if source == path {
        let from = match earlier.filter(|journal| journal.to == path) {
            Some(journal) => {
                retire(&mut run, &journal.from, options).await;
                journal.from
            }
            None => path.clone(),
        };
        run.forget();
        return Ok(outcome(&mut run, from, true));
    }
    let journal = Journal { from: source.clone(), to: path.clone(), format: format.clone() };
    let goes_on = take_up(&mut run, earlier, &journal).await?;
    if !goes_on {
        room(&mut run, &source, &path, size_bytes).await?;
    }
    copy(&mut run, &journal, options, cold, goes_on).await?;
    retire(&mut run, &source, options).await;
    run.forget();
    Ok(outcome(&mut run, source, false))
}

fn movable<'a>(vm: &'a Vm, target: &str) -> Result<&'a Disk> {
    let disk = vm.disks.iter().find(|disk| disk.target == target).ok_or_else(|| {
        let all: Vec<&str> = vm.disks.iter().map(|disk| disk.target.as_str()).collect();
        Error::NotFound(format!("{} has no disk {target}; it has {}", vm.name, all.join(", ")))
    })?;
    let refuse = |why: &str| Err(Error::Refused(format!("disk {target} of {} {why}", vm.name)));
    match (&disk.source, disk.device) {
        (_, DiskDevice::Cdrom | DiskDevice::Floppy) => {
            refuse("is a removable medium; change it with virsh change-media")
        }
        _ if disk.read_only => refuse("is read-only, which is not copied while in use; copy the file and edit the VM"),
        (DiskSource::File { .. } | DiskSource::Block { .. }, _) => Ok(disk),
        _ => refuse("is no file or device of this host"),
    }
}

/// The path that a place comes to.
async fn place(run: &Run<'_>, to: &DiskPlace, source: &str, old: &str, new: &str) -> Result<String> {
    match to {
        DiskPlace::File(path) if path.starts_with('/') => Ok(path.clone()),
        DiskPlace::File(path) => Err(Error::Refused(format!("{path} is no absolute path"))),
        DiskPlace::Pool(name) => {
            let pools = run.env.hypervisor.pools().await.map_err(Error::hyper("list the storage pools"))?;
            let pool = pools.iter().find(|pool| &pool.name == name).ok_or_else(|| {
                let all: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
                Error::NotFound(format!(
                    "there is no storage pool {name}; the host has {}",
                    if all.is_empty() { "none: give the absolute path of a file".to_owned() } else { all.join(", ") }
                ))
            })?;
            let directory = match (&pool.path, pool.active) {
                (Some(path), true) if matches!(pool.kind.as_str(), "dir" | "fs" | "netfs") => path,
                (_, false) => {
                    return Err(Error::Refused(format!("pool {name} is not active; start it with virsh pool-start")));
                }
                _ => return Err(Error::Refused(format!("pool {name} ({}) does not hold files", pool.kind))),
            };
            let name = Path::new(source).file_name().and_then(|name| name.to_str()).unwrap_or("disk");
            let name = match name.strip_suffix(&format!(".{old}")) {
                Some(stem) => format!("{stem}.{new}"),
                None => name.to_owned(),
            };
            Ok(format!("{}/{name}", directory.trim_end_matches('/')))
        }
    }
}

async fn size(run: &Run<'_>, source: &str) -> u64 {
    if let Ok(stats) = run.env.hypervisor.stats().await
        && let Some(disk) = stats
            .iter()
            .filter(|stats| stats.uuid == run.vm.uuid)
            .flat_map(|stats| &stats.disks)
            .find(|disk| disk.target == run.target)
    {
        return disk.capacity_bytes;
    }
    run.env.hypervisor.volume(source).await.ok().flatten().map_or(0, |volume| volume.capacity_bytes)
}

/// Whether a copy that an earlier run began goes on. What it left otherwise is cleared away.
async fn take_up(run: &mut Run<'_>, earlier: Option<Journal>, now: &Journal) -> Result<bool> {
    let hypervisor = run.env.hypervisor.clone();
    let runs = match run.vm.state.is_active() {
        true => {
            hypervisor.block_job(run.vm.uuid, &run.target).await.map_err(Error::hyper("look at the disk's jobs"))?
        }
        false => None,
    };
    match (runs, earlier) {
        (Some(_), Some(journal)) if journal.to == now.to => {
            run.warn(format!("a copy of {} that an earlier run began goes on", run.target));
            Ok(true)
        }
        (Some(_), Some(journal)) => {
            run.warn(format!("a copy to {} that an earlier run began was ended", journal.to));
            end(run).await?;
            let _ = hypervisor.volume_remove(&journal.to).await;
            Ok(false)
        }
        (Some(_), None) => Err(Error::Busy(format!(
            "another job holds disk {} of {}; look at it with virsh blockjob {} {}",
            run.target, run.vm.name, run.vm.name, run.target
        ))),
        (None, Some(journal)) => {
            let _ = hypervisor.volume_remove(&journal.to).await;
            Ok(false)
        }
        (None, None) => Ok(false),
    }
}

async fn room(run: &mut Run<'_>, source: &str, path: &str, size_bytes: u64) -> Result<()> {
    let hypervisor = run.env.hypervisor.clone();
    if hypervisor.volume(path).await.is_ok_and(|there| there.is_some()) {
        return Err(Error::Refused(format!("{path} exists; choose another file, or remove it")));
    }
    let parent = path.rsplit_once('/').map_or("/", |(parent, _)| if parent.is_empty() { "/" } else { parent });
    let free = hypervisor.room(parent).await.map_err(Error::hyper(format!("look into {parent}")))?;
    let used = hypervisor.volume(source).await.ok().flatten().map_or(0, |volume| volume.allocation_bytes);
    if free < used.min(size_bytes) {
        let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
        return Err(Error::Io {
            context: format!("{} has {} free, and disk {} takes {}", parent, Bytes(free), run.target, Bytes(used)),
            source,
        });
    }
    if free < size_bytes {
        run.warn(format!(
            "{parent} has {} free, less than the {} to which the disk may grow",
            Bytes(free),
            Bytes(size_bytes)
        ));
    }
    Ok(())
}

async fn copy(
    run: &mut Run<'_>,
    journal: &Journal,
    options: &MoveDiskOptions,
    cold: bool,
    goes_on: bool,
) -> Result<()> {
    let hypervisor = run.env.hypervisor.clone();
    let uuid = run.vm.uuid;
    if cold {
        if hypervisor.managed_save(uuid).await.map_err(Error::hyper("look for saved memory"))? {
            return Err(Error::Refused(format!(
                "{} has saved memory that needs the disk where it is; start it and move the disk while it runs, or \
                 discard the memory with virsh managedsave-remove",
                run.vm.name
            )));
        }
        let quiet = StartOptions { paused: true, ends_with_us: true };
        hypervisor.start(uuid, quiet).await.map_err(Error::hyper(format!("open the disks of {}", run.vm.name)))?;
    }
    run.save(journal)?;
    run.phase(Phase::Copying);
    let outcome = match begin(run, journal, options, goes_on).await {
        Ok(()) => mirror(run).await,
        Err(error) => Err(error),
    };
    let outcome = match outcome {
        Ok(()) => {
            run.phase(Phase::Publishing);
            pivot(run, journal).await
        }
        Err(error) => {
            run.phase(Phase::CleaningUp);
            let _ = end(run).await;
            Err(error)
        }
    };
    if cold {
        let _ = hypervisor.destroy(uuid).await;
    }
    if let Err(error) = outcome {
        run.look().await?;
        if run.source().as_ref() != Some(&journal.to) {
            let _ = hypervisor.volume_remove(&journal.to).await;
            run.forget();
        }
        return Err(error);
    }
    Ok(())
}

async fn begin(run: &Run<'_>, journal: &Journal, options: &MoveDiskOptions, goes_on: bool) -> Result<()> {
    if goes_on {
        return Ok(());
    }
    let spec = BlockCopySpec {
        path: journal.to.clone(),
        format: journal.format.clone(),
        reuse: false,
        bandwidth_bytes_s: options.bandwidth.map_or(0, Bytes::get),
    };
    let begun = run.env.hypervisor.block_copy(run.vm.uuid, &run.target, &spec).await;
    begun.map_err(Error::hyper(format!("copy disk {} of {}", run.target, run.vm.name)))
}

/// Waits until the copy is in step.
async fn mirror(run: &mut Run<'_>) -> Result<()> {
    let mut tick = tokio::time::interval(LOOK_EVERY);
    let mut away: Option<Instant> = None;
    loop {
        tokio::select! {
            () = run.cancel.cancelled() => return Err(Error::Cancelled),
            _ = tick.tick() => {}
        }
        match run.env.hypervisor.block_job(run.vm.uuid, &run.target).await {
            Ok(Some(job)) => {
                away = None;
                run.observer.event(&run.vm.name, Event::Total { bytes: job.end_bytes });
                run.observer.event(&run.vm.name, Event::Done { bytes: job.current_bytes });
                if job.ready {
                    return Ok(());
                }
            }
            Ok(None) => return Err(broken(run).await),
            Err(error) if error.kind == ErrorKind::Unreachable => {
                if away.get_or_insert_with(Instant::now).elapsed() > AWAY_MAX {
                    return Err(Error::hyper("watch the copy")(error));
                }
            }
            Err(_) => return Err(broken(run).await),
        }
    }
}

/// The copy ended by itself before it was in step.
async fn broken(run: &mut Run<'_>) -> Error {
    let runs = run.look().await.is_ok() && run.vm.state.is_active();
    Error::SourceGone(match runs {
        true => format!(
            "the copy of disk {} of {} failed: the destination is full or broken, or somebody ended it; the VM goes on \
             with its old disk",
            run.target, run.vm.name
        ),
        false => format!("{} stopped while its disk {} was copied; nothing was changed", run.vm.name, run.target),
    })
}

/// Looks at the copy, switches to it, and sees that the VM runs on it.
async fn pivot(run: &mut Run<'_>, journal: &Journal) -> Result<()> {
    let hypervisor = run.env.hypervisor.clone();
    verify(run, journal).await?;
    let state = run.vm.state;
    let pivoted = hypervisor.block_job_end(run.vm.uuid, &run.target, true).await;
    run.look().await?;
    if run.source().as_ref() == Some(&journal.to) {
        if state == VmState::Running && run.vm.state != VmState::Running {
            run.warn(format!("{} is {:?} after the switch", run.vm.name, run.vm.state));
        }
        return Ok(());
    }
    let failed = format!("switch disk {} of {} to its copy", run.target, run.vm.name);
    let _ = end(run).await;
    Err(match pivoted {
        Err(error) => Error::hyper(failed)(error),
        Ok(()) => Error::Tool(format!("{failed}: libvirt said yes and did not")),
    })
}

/// The copy is what it should be, as QEMU itself has it open: format, size, not marked corrupt, and QEMU's count of
/// what is still to be copied is nothing.
async fn verify(run: &Run<'_>, journal: &Journal) -> Result<()> {
    let ask = async |command: &str| {
        let command = json!({ "execute": command });
        let answer = run.env.hypervisor.monitor(run.vm.uuid, &command).await;
        answer.map_err(Error::hyper(format!("verify the copy of disk {} of {}", run.target, run.vm.name)))
    };
    let nodes = ask("query-named-block-nodes").await?;
    // A raw image has no layer of its own over the file with newer versions of libvirt.
    let is = |node: &Value, format: &str| {
        let driver = node["drv"].as_str().unwrap_or_default();
        driver == format || format == "raw" && matches!(driver, "file" | "host_device")
    };
    let images = |path: &str, format: Option<&str>| {
        let nodes = nodes.as_array().into_iter().flatten();
        let of = nodes.filter(|node| node["file"] == path && format.is_none_or(|format| is(node, format)));
        of.map(|node| node["image"].clone()).next()
    };
    let wrong = |what: String| {
        Error::Tool(format!(
            "the copy of disk {} of {} is not as it should be: {what}; the old disk stays",
            run.target, run.vm.name
        ))
    };
    let copy =
        images(&journal.to, Some(&journal.format)).ok_or_else(|| wrong(format!("QEMU has no {} open", journal.to)))?;
    let old = images(&journal.from, None).ok_or_else(|| wrong(format!("QEMU has no {} open", journal.from)))?;
    if copy["virtual-size"] != old["virtual-size"] {
        return Err(wrong(format!("{} bytes instead of {}", copy["virtual-size"], old["virtual-size"])));
    }
    if copy["format-specific"]["data"]["corrupt"] == true {
        return Err(wrong("it is marked corrupt".into()));
    }
    let jobs = ask("query-block-jobs").await?;
    let bad = |job: &&serde_json::Value| job["type"] == "mirror" && (job["io-status"] != "ok" || job["ready"] != true);
    if let Some(job) = jobs.as_array().into_iter().flatten().find(bad) {
        return Err(wrong(format!("QEMU says of the copy: {}, ready {}", job["io-status"], job["ready"])));
    }
    Ok(())
}

/// Ends the block job, and waits for its end.
async fn end(run: &Run<'_>) -> Result<()> {
    let hypervisor = &run.env.hypervisor;
    let deadline = Instant::now() + ENDS_WITHIN;
    loop {
        match hypervisor.block_job(run.vm.uuid, &run.target).await {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(error) if matches!(error.kind, ErrorKind::WrongState | ErrorKind::NoDomain) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(Error::hyper("end the copy")(error)),
            Err(_) => {}
        }
        if Instant::now() > deadline {
            return Err(Error::Busy(format!("the copy of disk {} does not end", run.target)));
        }
        let _ = hypervisor.block_job_end(run.vm.uuid, &run.target, false).await;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Removes the old file, which nothing uses any more.
async fn retire(run: &mut Run<'_>, old: &str, options: &MoveDiskOptions) {
    if options.keep_source || run.source().as_deref() == Some(old) {
        return;
    }
    match run.env.hypervisor.volume_remove(old).await {
        Ok(_) => {}
        Err(error) => {
            run.warn(format!("the old disk {old} is not needed any more and could not be removed: {}", error.message))
        }
    }
}
