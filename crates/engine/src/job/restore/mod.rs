//! Restoring a VM or one of its disks from a restore point.
//!
//! Invariants: nothing that exists is overwritten unless asked; files appear under their real names only when complete;
//! a definition appears only when its disks are in place; a failure takes everything back.

mod disk;
mod place;
mod plan;
mod vm;
mod xml;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_model::{DiskRecord, PointId, RestorePoint};
use virtward_repo::Repository;

use self::{
    disk::DiskJob,
    place::{Placed, Staging},
};
use crate::{Cancel, Env, Error, Event, Observer, Phase, Result, job::backup::blocking, tool};

/// Image format of a restored disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// QEMU's own format, thin.
    Qcow2,
    /// Plain bytes, sparse where the file system allows it.
    Raw,
    /// VMware, one growing file.
    Vmdk,
    /// VMware, split into extents of at most 2 GB.
    VmdkSplit,
    /// Hyper-V.
    Vhdx,
    /// VirtualBox.
    Vdi,
}

/// Options of [`restore_vm`].
#[derive(Clone, Debug, Default)]
pub struct RestoreVmOptions {
    /// Name of the restored VM; a name other than the original's gets a new UUID and new MAC addresses.
    pub name: Option<String>,
    /// Start it when restored.
    pub start: bool,
    /// Replace a VM of that name (it must be shut off) and its disk files.
    pub overwrite: bool,
    /// Directory for the disks; default: where each disk was.
    pub disk_dir: Option<PathBuf>,
    /// Threads that decode; 0 means one per core.
    pub threads: usize,
}

/// A disk that was written.
#[derive(Clone, Debug, Serialize)]
pub struct RestoredDisk {
    /// Target name.
    pub target: String,
    /// Where it is now.
    pub path: String,
    /// Format.
    pub format: DiskFormat,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Bytes written (not known to be zero).
    pub written_bytes: u64,
}

/// A VM that was restored.
#[derive(Clone, Debug, Serialize)]
pub struct RestoredVm {
    /// Name.
    pub vm: String,
    /// UUID.
    pub uuid: Uuid,
    /// Restore point it came from.
    pub point: PointId,
    /// Whether it was started.
    pub started: bool,
    /// Disks.
    pub disks: Vec<RestoredDisk>,
    /// Things the operator should know.
    pub warnings: Vec<String>,
}

/// Options of [`restore_disk`].
#[derive(Clone, Debug)]
pub struct RestoreDiskOptions {
    /// Target name (`vda`); may be left out when the point holds one disk.
    pub disk: Option<String>,
    /// File to create.
    pub to: PathBuf,
    /// Format; default: by the file's extension, else that of the source.
    pub format: Option<DiskFormat>,
    /// Replace an existing file.
    pub overwrite: bool,
    /// Threads that decode; 0 means one per core.
    pub threads: usize,
}

/// See [`crate::fuzz`].
pub(crate) fn any_definition(xml: &str) {
    self::xml::any(xml);
}

/// Restores a whole VM: disks first, definition last, so that a failure leaves no half VM.
pub async fn restore_vm(
    env: &Env,
    repo: &Repository,
    point: PointId,
    options: &RestoreVmOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestoredVm> {
    vm::run(env, repo, point, options, observer, cancel).await
}

/// What [`restore_vm`] would make.
#[derive(Clone, Debug)]
pub struct PlannedVm {
    /// The restore point.
    pub point: RestorePoint,
    /// Name.
    pub name: String,
    /// UUID; none if it gets a new one.
    pub uuid: Option<Uuid>,
    /// A VM of that name would be replaced.
    pub replaces: bool,
    /// Disks that would be written.
    pub disks: Vec<PlannedDisk>,
}

/// A disk that [`restore_vm`] would write.
#[derive(Clone, Debug)]
pub struct PlannedDisk {
    /// What is restored.
    pub record: DiskRecord,
    /// Where it would be.
    pub path: PathBuf,
    /// Format.
    pub format: DiskFormat,
}

/// Decides what [`restore_vm`] would do with the same options, or says why it would refuse. Changes nothing.
pub async fn plan_restore_vm(
    env: &Env,
    repo: &Repository,
    point: PointId,
    options: &RestoreVmOptions,
) -> Result<PlannedVm> {
    vm::preview(env, repo, point, options).await
}

/// Restores one disk to a file or block device. Needs no hypervisor.
pub async fn restore_disk(
    repo: &Repository,
    point: PointId,
    options: &RestoreDiskOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestoredDisk> {
    let point = load_point(repo, point).await?;
    let record = choose_disk(&point, options.disk.as_deref())?;
    let to = tool::absolute(&options.to)?;
    observer.event(&point.vm, Event::Phase(Phase::Copying));
    observer.event(&point.vm, Event::Total { bytes: record.data_bytes });
    let done = Arc::default();
    let job = DiskJob { repo, record, subject: &point.vm, threads: options.threads, observer, cancel, done: &done };
    let (format, written_bytes) = if disk::is_device(&to) {
        device(&job, &to, options).await?
    } else {
        let format = format_for(&to, options.format, record)?;
        (format, file(&job, &to, format, options.overwrite).await?)
    };
    Ok(RestoredDisk {
        target: record.target.clone(),
        path: to.to_string_lossy().into_owned(),
        format,
        size_bytes: record.size_bytes,
        written_bytes,
    })
}

fn format_for(to: &Path, asked: Option<DiskFormat>, record: &DiskRecord) -> Result<DiskFormat> {
    if let Some(format) = asked.or_else(|| DiskFormat::of_extension(to)) {
        return Ok(format);
    }
    // Another format under this name would mislead whoever finds the file.
    if to.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("vhd") || ext.eq_ignore_ascii_case("vpc")) {
        return Err(Error::Refused(format!(
            "{}: VHD images are read, not written; choose a .vhdx file, or another format with --format",
            to.display()
        )));
    }
    Ok(DiskFormat::of_driver(&record.format))
}

async fn device(job: &DiskJob<'_>, to: &Path, options: &RestoreDiskOptions) -> Result<(DiskFormat, u64)> {
    if !options.overwrite {
        return Err(Error::Refused(format!("{} is a block device; confirm with --overwrite", to.display())));
    }
    if options.format.is_some_and(|format| format != DiskFormat::Raw) {
        return Err(Error::Refused(format!("{} is a block device; only --format raw fits it", to.display())));
    }
    Ok((DiskFormat::Raw, disk::write_device(job, to).await?))
}

async fn file(job: &DiskJob<'_>, to: &Path, format: DiskFormat, overwrite: bool) -> Result<u64> {
    if !overwrite && to.symlink_metadata().is_ok() {
        return Err(place::exists(to));
    }
    place::replaceable(to)?;
    let staging = Staging::create(to.parent().unwrap_or(Path::new("/")))?;
    let written = disk::write_file(job, &staging.file(place::file_name(to)?), format).await?;
    if job.cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    let mut placed = Placed::default();
    placed.place(&staging, to, overwrite)?;
    placed.keep();
    Ok(written)
}

async fn load_point(repo: &Repository, id: PointId) -> Result<RestorePoint> {
    let repo = repo.clone();
    blocking(move || Ok(repo.point(id)?)).await
}

fn choose_disk<'a>(point: &'a RestorePoint, asked: Option<&str>) -> Result<&'a DiskRecord> {
    let known = || point.disks.iter().map(|disk| disk.target.as_str()).collect::<Vec<_>>().join(", ");
    match (asked, point.disks.as_slice()) {
        (Some(target), disks) => disks.iter().find(|disk| disk.target == target).ok_or_else(|| {
            Error::NotFound(format!(
                "restore point {} of {} has no disk {target}; it has {}",
                point.id,
                point.vm,
                known()
            ))
        }),
        (None, [only]) => Ok(only),
        (None, []) => Err(Error::NotFound(format!("restore point {} of {} holds no disk", point.id, point.vm))),
        (None, _) => Err(Error::Refused(format!("say which disk with --disk: {}", known()))),
    }
}
