//! Restoring a whole VM: all disks, NVRAM, TPM state, then the definition, then (if asked) a start.

use std::{path::Path, sync::Arc};

use uuid::Uuid;
use virtward_hypervisor::StartOptions;
use virtward_model::{PointId, RestorePoint};
use virtward_repo::{Attachment, Repository};

use super::{
    DiskJob, Placed, PlannedDisk, PlannedVm, RestoreVmOptions, RestoredDisk, RestoredVm, Staging, disk, load_point,
    place,
    plan::{Plan, plan},
    xml::{PlacedDisk, Rewrite, rewrite},
};
use crate::{
    Cancel, Env, Error, Event, Observer, Phase, Result,
    job::backup::{attach, blocking},
    lock::VmLock,
};

/// All that is needed before anything is written.
struct Prepared {
    point: RestorePoint,
    attachments: Vec<Attachment>,
    xml: String,
    plan: Plan,
}

async fn prepare(env: &Env, repo: &Repository, point: PointId, options: &RestoreVmOptions) -> Result<Prepared> {
    let point = load_point(repo, point).await?;
    let attachments = load_attachments(repo, &point).await?;
    let xml = definition(&point, &attachments)?;
    let has_nvram = attachments.iter().any(|item| item.name == attach::NVRAM);
    let old_nvram = attach::nvram_path(&xml).filter(|_| has_nvram);
    let plan = plan(env, &point, old_nvram.as_deref(), options).await?;
    Ok(Prepared { point, attachments, xml, plan })
}

/// Decides and does nothing.
pub(super) async fn preview(
    env: &Env,
    repo: &Repository,
    point: PointId,
    options: &RestoreVmOptions,
) -> Result<PlannedVm> {
    let Prepared { point, plan, .. } = prepare(env, repo, point, options).await?;
    let disk = |disk: super::plan::DiskPlan| PlannedDisk { record: disk.record, path: disk.path, format: disk.format };
    let is_new = plan.copy && !plan.replaces;
    Ok(PlannedVm {
        point,
        uuid: (!is_new).then_some(plan.uuid),
        name: plan.name,
        replaces: plan.replaces,
        disks: plan.disks.into_iter().map(disk).collect(),
    })
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
    let Prepared { point, attachments, xml, plan } = prepare(env, repo, point, options).await?;
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
        let written_bytes = disk::write_file(&job, &staging.file(place::file_name(&item.path)?), item.format).await?;
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
    let mut warnings = define(env, &plan, &xml, &attachments, options, &mut placed).await?;
    placed.keep();
    warnings.extend(plan.left_over());
    warnings.extend(elsewhere(env, &plan).await);
    for text in &warnings {
        observer.event(&plan.name, Event::Warning(text));
    }
    let mut result =
        RestoredVm { vm: plan.name, uuid: plan.uuid, point: point.id, started: false, disks: restored, warnings };
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
    if let (Some(path), Some(content)) = (&plan.nvram, attachments.iter().find(|item| item.name == attach::NVRAM)) {
        write_small(path, &content.bytes, options.overwrite, placed)?;
    }
    let nvram = plan.nvram.as_ref().map(|path| path.to_string_lossy().into_owned());
    let change = Rewrite {
        name: &plan.name,
        uuid: plan.uuid,
        copy: plan.copy,
        disks: &disks,
        nvram,
        exists: &|path| Path::new(path).exists(),
    };
    let lacks = attach::TpmState::of(xml).and_then(|tpm| tpm.lacks);
    let (xml, mut warnings) = rewrite(xml, &change)?;
    warnings.extend(lacks);
    if let Err(error) = tpm(plan.uuid, attachments, placed) {
        warnings.push(format!("the TPM state was not restored: {error}"));
    }
    let context = format!("define {}; its disks were removed again", plan.name);
    env.hypervisor.define(&xml).await.map_err(Error::hyper(context))?;
    if plan.replaces {
        // Nothing can be taken back any more: the VM is defined and its disks are whole, so this is worth a warning.
        match env.hypervisor.managed_save_remove(plan.uuid).await {
            Ok(false) => {}
            Ok(true) => warnings.push("the memory saved by virsh managedsave belonged to the old disks; it was discarded".into()),
            Err(error) => warnings.push(format!(
                "look for saved memory before you start {0}, it does not fit the restored disks: virsh managedsave-remove \
                 {0} ({error})",
                plan.name
            )),
        }
    }
    Ok(warnings)
}

/// Says so if the VM's host is not this machine: the disks were written here.
async fn elsewhere(env: &Env, plan: &Plan) -> Option<String> {
    let authority = env.uri.split_once("://")?.1.split('/').next()?;
    let address = authority.rsplit('@').next()?;
    if address.is_empty()
        || address.starts_with("localhost")
        || address.starts_with("127.")
        || address.starts_with("[::1]")
    {
        return None;
    }
    let host = env.hypervisor.host().await.ok()?.name;
    let here = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let dir = plan.disks.first()?.path.parent()?.display().to_string();
    (short(&host) != short(&here)).then(|| {
        format!("{} is defined on {host}, its disks were written by {here}: {host} must see the same {dir}", plan.name)
    })
}

/// Puts back the state of an emulated TPM, readable for the user that runs it.
fn tpm(vm: Uuid, attachments: &[Attachment], placed: &mut Placed) -> Result<()> {
    let owner = tpm_owner();
    let own = |path: &Path| match owner {
        Some((user, group)) => std::os::unix::fs::chown(path, Some(user), Some(group))
            .map_err(Error::io(format!("give {} to the user of swtpm", path.display()))),
        None => Ok(()),
    };
    for item in attachments {
        let Some(relative) = item.name.strip_prefix(attach::TPM) else { continue };
        // The name comes from a restore point; it must not lead out of the VM's directory.
        if Path::new(relative).components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(Error::Refused(format!("{relative:?} is no name of a TPM file")));
        }
        let dir = attach::tpm_dir(vm);
        let path = dir.join(relative);
        write_small(&path, &item.bytes, true, placed)?;
        path.ancestors().take_while(|part| part.starts_with(&dir)).try_for_each(own)?;
    }
    Ok(())
}

/// User and group that libvirt runs swtpm as, on the distributions that give it one.
fn tpm_owner() -> Option<(u32, u32)> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, user, group, ..] = fields.as_slice() else { return None };
        if !matches!(*name, "tss" | "swtpm") {
            return None;
        }
        Some((user.parse().ok()?, group.parse().ok()?))
    })
}

fn write_small(path: &Path, bytes: &[u8], overwrite: bool, placed: &mut Placed) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).map_err(Error::io(format!("create {}", parent.display())))?;
    let staging = Staging::create(parent)?;
    let unfinished = staging.file(place::file_name(path)?);
    let written = std::fs::File::create_new(&unfinished).and_then(|mut file| {
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    });
    written.map_err(Error::io(format!("write {}", path.display())))?;
    placed.place(&staging, path, overwrite)
}
