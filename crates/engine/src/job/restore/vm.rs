//! Restoring a whole VM: all disks, NVRAM, TPM state, then the definition, then (if asked) a start.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;
use virtward_hypervisor::{ErrorKind, StartOptions};
use virtward_model::{DiskRecord, PointId, RestorePoint, Vm};
use virtward_repo::{Attachment, Repository};

use super::{
    DiskFormat, DiskJob, Placed, RestoreVmOptions, RestoredDisk, RestoredVm, Staging, disk, load_point, place,
    xml::{PlacedDisk, Rewrite, rewrite},
};
use crate::{
    Cancel, Env, Error, Event, Observer, Phase, Result,
    job::backup::{attach, blocking},
    lock::VmLock,
};

/// Where disks go when the original directory is not on this host.
const DEFAULT_DISK_DIR: &str = "/var/lib/libvirt/images";

/// What will be made, decided before anything is written.
struct Plan {
    name: String,
    uuid: Uuid,
    /// A new identity, so not a restore in place.
    copy: bool,
    disks: Vec<DiskPlan>,
}

struct DiskPlan {
    record: DiskRecord,
    path: PathBuf,
    format: DiskFormat,
    overwrite: bool,
}

/// Restores a VM.
pub(super) async fn run(
    env: &Env,
    repo: &Repository,
    point: PointId,
    options: &RestoreVmOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestoredVm> {
    let point = load_point(repo, point).await?;
    let attachments = load_attachments(repo, &point).await?;
    let xml = definition(&point, &attachments)?;
    let plan = plan(env, &point, options).await?;
    let _lock = VmLock::take(&env.dirs.runtime, plan.uuid, &plan.name, "restore")?;

    observer.event(&plan.name, Event::Phase(Phase::Copying));
    let bytes = plan.disks.iter().map(|disk| disk.record.data_bytes).sum();
    observer.event(&plan.name, Event::Total { bytes });
    let done = Arc::default();
    let mut staged = Vec::new();
    let mut restored = Vec::new();
    for item in &plan.disks {
        let job = DiskJob {
            repo,
            record: &item.record,
            subject: &plan.name,
            threads: options.threads,
            observer,
            cancel,
            done: &done,
        };
        let parent = item.path.parent().unwrap_or(Path::new("/"));
        let staging = Staging::create(parent)?;
        let written_bytes =
            disk::write_file(&job, &staging.file(&place::file_name(&item.path)?), item.format).await?;
        staged.push(staging);
        restored.push(RestoredDisk {
            target: item.record.target.clone(),
            path: item.path.to_string_lossy().into_owned(),
            format: item.format,
            size_bytes: item.record.size_bytes,
            written_bytes,
        });
    }
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }

    observer.event(&plan.name, Event::Phase(Phase::Publishing));
    let mut placed = Placed::default();
    for (item, staging) in plan.disks.iter().zip(&staged) {
        placed.place(staging, &item.path, item.overwrite)?;
    }
    let warnings = define(env, &plan, &xml, &attachments, options, &mut placed).await?;
    placed.keep();
    for text in &warnings {
        observer.event(&plan.name, Event::Warning(text));
    }
    let mut result = RestoredVm {
        vm: plan.name,
        uuid: plan.uuid,
        point: point.id,
        started: false,
        disks: restored,
        warnings,
    };
    if options.start {
        let started = env.hypervisor.start(plan.uuid, StartOptions::default()).await;
        started.map_err(Error::hyper(format!("{} was restored and defined, but its start failed", result.vm)))?;
        result.started = true;
    }
    Ok(result)
}

async fn load_attachments(repo: &Repository, point: &RestorePoint) -> Result<Vec<Attachment>> {
    let (repo, id) = (repo.clone(), point.id);
    blocking(move || Ok(repo.attachments(id)?)).await
}

fn definition(point: &RestorePoint, attachments: &[Attachment]) -> Result<String> {
    let found = attachments.iter().find(|item| item.name == attach::DOMAIN_XML).ok_or_else(|| {
        Error::Refused(format!(
            "restore point {} holds image files, no VM definition; use: virtward restore disk",
            point.id
        ))
    })?;
    Ok(String::from_utf8_lossy(&found.bytes).into_owned())
}

async fn find(env: &Env, name_or_uuid: &str) -> Result<Option<Vm>> {
    match env.hypervisor.lookup(name_or_uuid).await {
        Ok(vm) => Ok(Some(vm)),
        Err(error) if error.kind == ErrorKind::NoDomain => Ok(None),
        Err(error) => Err(Error::hyper(format!("look for a VM called {name_or_uuid}"))(error)),
    }
}

async fn plan(env: &Env, point: &RestorePoint, options: &RestoreVmOptions) -> Result<Plan> {
    let name = options.name.clone().unwrap_or_else(|| point.vm.clone());
    check_name(&name)?;
    let existing = find(env, &name).await?;
    let original = find(env, &point.vm_uuid.to_string()).await?;
    if let Some(vm) = &existing {
        if !options.overwrite {
            return Err(Error::Refused(format!(
                "a VM called {name} exists; restore under another name with --name, or replace it with --overwrite"
            )));
        }
        if vm.state.is_active() {
            return Err(Error::Refused(format!("{name} is running; shut it down first: virsh shutdown {name}")));
        }
    }
    let copy = name != point.vm;
    if let (false, Some(original)) = (copy, &original)
        && original.name != name
    {
        return Err(Error::Refused(format!(
            "the VM {name} of this restore point is called {} now; restore it under another name with --name",
            original.name
        )));
    }
    let uuid = match &existing {
        Some(vm) => vm.uuid,
        None if copy => Uuid::new_v4(),
        None => point.vm_uuid,
    };
    let mut others = env.hypervisor.list().await.map_err(Error::hyper("list the VMs of the host"))?;
    others.retain(|vm| existing.as_ref().is_none_or(|existing| existing.uuid != vm.uuid));
    let disks = point
        .disks
        .iter()
        .map(|record| place_disk(record, &name, copy, &others, options))
        .collect::<Result<Vec<_>>>()?;
    Ok(Plan { name, uuid, copy, disks })
}

/// libvirt refuses these too, but only after the disks were written.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['/', '\n']) || name.starts_with('.') {
        return Err(Error::Refused(format!("{name:?} cannot be the name of a VM: empty, or has a slash or a leading dot")));
    }
    Ok(())
}

fn place_disk(
    record: &DiskRecord,
    name: &str,
    copy: bool,
    others: &[Vm],
    options: &RestoreVmOptions,
) -> Result<DiskPlan> {
    let source = Path::new(&record.source);
    let was_file = source.is_absolute() && !source.starts_with("/dev");
    let format = DiskFormat::of_driver(&record.format);
    let dir = match (&options.disk_dir, source.parent()) {
        (Some(dir), _) => crate::tool::absolute(dir)?,
        (None, Some(parent)) if was_file && parent.is_dir() => parent.to_owned(),
        _ => PathBuf::from(DEFAULT_DISK_DIR),
    };
    if !dir.is_dir() {
        return Err(Error::NotFound(format!(
            "there is no directory {} for disk {}; create it, or choose another with --disk-dir",
            dir.display(),
            record.target
        )));
    }
    let path = match source.file_name() {
        Some(original) if !copy && was_file => dir.join(original),
        _ => dir.join(format!("{name}-{}.{}", record.target, format.driver())),
    };
    let uses = |vm: &Vm| {
        vm.disks.iter().any(|disk| {
            let backing = disk.backing.iter().map(String::as_str);
            disk.source.path().into_iter().chain(backing).any(|known| Path::new(known) == path)
        })
    };
    if let Some(owner) = others.iter().find(|vm| uses(vm)) {
        return Err(Error::Refused(format!(
            "{} belongs to the VM {}; choose another place with --disk-dir",
            path.display(),
            owner.name
        )));
    }
    let overwrite = options.overwrite;
    if path.symlink_metadata().is_ok() && !overwrite {
        return Err(Error::Refused(format!(
            "{} exists; choose another place with --disk-dir, or replace it with --overwrite",
            path.display()
        )));
    }
    Ok(DiskPlan { record: record.clone(), path, format, overwrite })
}

async fn define(
    env: &Env,
    plan: &Plan,
    xml: &str,
    attachments: &[Attachment],
    options: &RestoreVmOptions,
    placed: &mut Placed,
) -> Result<Vec<String>> {
    let disks: Vec<PlacedDisk> = plan
        .disks
        .iter()
        .map(|disk| PlacedDisk {
            target: disk.record.target.clone(),
            path: disk.path.to_string_lossy().into_owned(),
            format: disk.format.driver().to_owned(),
        })
        .collect();
    let nvram = nvram(plan, xml, attachments, options, placed)?;
    let change = Rewrite {
        name: &plan.name,
        identity: plan.copy.then_some(plan.uuid),
        disks: &disks,
        nvram,
        exists: &|path| Path::new(path).exists(),
    };
    let (xml, mut warnings) = rewrite(xml, &change)?;
    if let Err(error) = tpm(plan.uuid, attachments, placed) {
        warnings.push(format!("the TPM state was not restored: {error}"));
    }
    let context = format!("define {}; its disks were removed again", plan.name);
    env.hypervisor.define(&xml).await.map_err(Error::hyper(context))?;
    Ok(warnings)
}

/// Writes the NVRAM file and gives its new path, if it moves.
fn nvram(
    plan: &Plan,
    xml: &str,
    attachments: &[Attachment],
    options: &RestoreVmOptions,
    placed: &mut Placed,
) -> Result<Option<String>> {
    let Some(content) = attachments.iter().find(|item| item.name == attach::NVRAM) else { return Ok(None) };
    let Some(old) = attach::nvram_path(xml) else { return Ok(None) };
    let old = PathBuf::from(old);
    let new = match plan.copy {
        true => old.with_file_name(format!("{}_VARS.fd", plan.name)),
        false => old,
    };
    write_small(&new, &content.bytes, options.overwrite, placed)?;
    Ok(Some(new.to_string_lossy().into_owned()))
}

fn tpm(vm: Uuid, attachments: &[Attachment], placed: &mut Placed) -> Result<()> {
    for item in attachments {
        let Some(relative) = item.name.strip_prefix(attach::TPM) else { continue };
        let path = Path::new(relative);
        // The name comes from a restore point; it must not lead out of the VM's directory.
        if path.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(Error::Refused(format!("{relative:?} is no name of a TPM file")));
        }
        write_small(&attach::tpm_dir(vm).join(path), &item.bytes, true, placed)?;
    }
    Ok(())
}

fn write_small(path: &Path, bytes: &[u8], overwrite: bool, placed: &mut Placed) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).map_err(Error::io(format!("create {}", parent.display())))?;
    let staging = Staging::create(parent)?;
    let unfinished = staging.file(&place::file_name(path)?);
    std::fs::write(&unfinished, bytes).map_err(Error::io(format!("write {}", path.display())))?;
    placed.place(&staging, path, overwrite)
}
