//! What a restore of a VM will make, and whether it may: decided before anything is written.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use virtward_hypervisor::ErrorKind;
use virtward_model::{DiskDevice, DiskRecord, RestorePoint, Vm};

use super::{DiskFormat, RestoreVmOptions, place};
use crate::{Env, Error, Result};

/// Where disks go when the original directory is not on this host.
const DEFAULT_DISK_DIR: &str = "/var/lib/libvirt/images";

/// The VM to make.
pub(super) struct Plan {
    pub name: String,
    pub uuid: Uuid,
    /// A new identity, so not a restore in place.
    pub copy: bool,
    pub disks: Vec<DiskPlan>,
    /// Where the UEFI variables go, if there are any.
    pub nvram: Option<PathBuf>,
    /// There is a VM of that name.
    pub replaces: bool,
    /// Disk files of the VM that is replaced.
    replaced: Vec<PathBuf>,
}

/// A disk to write.
pub(super) struct DiskPlan {
    pub record: DiskRecord,
    pub path: PathBuf,
    pub format: DiskFormat,
    pub overwrite: bool,
}

impl Plan {
    /// Files of the replaced VM that nothing uses any more.
    pub(super) fn left_over(&self) -> impl Iterator<Item = String> {
        let used = |path: &Path| self.disks.iter().any(|disk| is_same(&disk.path, path));
        self.replaced
            .iter()
            .filter(move |path| path.exists() && !used(path))
            .map(|path| format!("{} belonged to the replaced VM; delete it if nothing else uses it", path.display()))
    }
}

/// Decides everything, or says why not. `nvram` is where the original had its UEFI variables.
pub(super) async fn plan(
    env: &Env,
    point: &RestorePoint,
    nvram: Option<&str>,
    options: &RestoreVmOptions,
) -> Result<Plan> {
    let name = options.name.clone().unwrap_or_else(|| point.vm.clone());
    check_name(&name)?;
    let existing = find(env, &name).await?;
    if let Some(vm) = &existing {
        may_replace(vm, &name, options)?;
    }
    let copy = name != point.vm;
    let original = find(env, &point.vm_uuid.to_string()).await?;
    if let (false, Some(original)) = (copy, &original)
        && original.name != name
    {
        return Err(Error::Refused(format!(
            "the VM {name} of this restore point is called {} now; restore it under another name with --name",
            original.name
        )));
    }
    let uuid = match &existing {
        // libvirt keeps names and UUIDs together: the VM that is replaced keeps its own.
        Some(vm) => vm.uuid,
        None if copy => Uuid::new_v4(),
        None => point.vm_uuid,
    };
    let mut others = env.hypervisor.list().await.map_err(Error::hyper("list the VMs of the host"))?;
    others.retain(|vm| existing.as_ref().is_none_or(|existing| existing.uuid != vm.uuid));
    let mut disks: Vec<DiskPlan> = Vec::new();
    for record in &point.disks {
        let disk = place_disk(record, &name, copy, &disks, options)?;
        may_write(&disk.path, &others, options.overwrite)?;
        disks.push(disk);
    }
    let nvram = nvram.map(PathBuf::from).map(|old| match copy {
        true => old.with_file_name(format!("{name}_VARS.fd")),
        false => old,
    });
    if let Some(path) = nvram.as_deref().filter(|path| path.symlink_metadata().is_ok() && !options.overwrite) {
        return Err(Error::Refused(format!(
            "the UEFI variables {} exist; remove that file, or replace it with --overwrite",
            path.display()
        )));
    }
    let replaced = existing.iter().flat_map(|vm| &vm.disks).filter(|disk| disk.device == DiskDevice::Disk);
    let replaced = replaced.filter_map(|disk| disk.source.path().map(PathBuf::from)).collect();
    Ok(Plan { name, uuid, copy, disks, nvram, replaces: existing.is_some(), replaced })
}

async fn find(env: &Env, name_or_uuid: &str) -> Result<Option<Vm>> {
    match env.hypervisor.lookup(name_or_uuid).await {
        Ok(vm) => Ok(Some(vm)),
        Err(error) if error.kind == ErrorKind::NoDomain => Ok(None),
        Err(error) => Err(Error::hyper(format!("look for a VM called {name_or_uuid}"))(error)),
    }
}

fn may_replace(vm: &Vm, name: &str, options: &RestoreVmOptions) -> Result<()> {
    if vm.name != name {
        return Err(Error::Refused(format!(
            "{name} is the UUID of the VM {}; choose another name with --name",
            vm.name
        )));
    }
    if !options.overwrite {
        return Err(Error::Refused(format!(
            "a VM called {name} exists; restore under another name with --name, or replace it with --overwrite"
        )));
    }
    if vm.state.is_active() {
        return Err(Error::Refused(format!("{name} is running; shut it down first: virsh shutdown {name}")));
    }
    Ok(())
}

/// libvirt refuses most of these too, but only after the disks were written.
fn check_name(name: &str) -> Result<()> {
    let refuse = |why: &str| Err(Error::Refused(format!("{name:?} cannot be the name of a VM: {why}")));
    match name {
        "" => refuse("it is empty"),
        _ if name.contains('/') => refuse("it has a slash"),
        _ if name.starts_with('.') => refuse("it begins with a dot"),
        _ if name.chars().any(char::is_control) => refuse("it has a control character"),
        _ if name.trim() != name => refuse("it begins or ends with a space"),
        // Room for the names of its files.
        _ if name.len() > 200 => refuse("it is longer than 200 bytes"),
        _ => Ok(()),
    }
}

fn place_disk(
    record: &DiskRecord,
    name: &str,
    copy: bool,
    earlier: &[DiskPlan],
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
    let made = dir.join(format!("{name}-{}.{}", record.target.replace('/', "_"), format.driver()));
    let path = match source.file_name() {
        // The name may say what the format was, so it stays only with the format.
        Some(original) if !copy && was_file && format.driver() == record.format => dir.join(original),
        _ => made.clone(),
    };
    // Two disks of one file name, from two directories.
    let path = if earlier.iter().any(|disk| disk.path == path) { made } else { path };
    if let Some(other) = earlier.iter().find(|disk| disk.path == path) {
        return Err(Error::Refused(format!(
            "disks {} and {} would both be {}; restore them one by one with virtward restore disk",
            other.record.target,
            record.target,
            path.display()
        )));
    }
    Ok(DiskPlan { record: record.clone(), path, format, overwrite: options.overwrite })
}

fn may_write(path: &Path, others: &[Vm], overwrite: bool) -> Result<()> {
    let uses = |vm: &&Vm| {
        vm.disks.iter().any(|disk| {
            let backing = disk.backing.iter().map(String::as_str);
            disk.source.path().into_iter().chain(backing).any(|known| is_same(Path::new(known), path))
        })
    };
    if let Some(owner) = others.iter().find(uses) {
        return Err(Error::Refused(format!(
            "{} belongs to the VM {}; choose another place with --disk-dir",
            path.display(),
            owner.name
        )));
    }
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    if !overwrite {
        return Err(Error::Refused(format!(
            "{} exists; choose another place with --disk-dir, or replace it with --overwrite",
            path.display()
        )));
    }
    place::replaceable(path)
}

/// Whether two paths lead to one file, or would if it existed.
fn is_same(one: &Path, other: &Path) -> bool {
    let settled = |path: &Path| {
        std::fs::canonicalize(path)
            .or_else(|_| {
                let parent = std::fs::canonicalize(path.parent().unwrap_or(Path::new("/")))?;
                Ok::<_, std::io::Error>(parent.join(path.file_name().unwrap_or_default()))
            })
            .unwrap_or_else(|_| path.to_owned())
    };
    one == other || settled(one) == settled(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_libvirt_or_a_shell_would_choke_on_are_refused() {
        for name in ["", "a/b", ".hidden", "a\nb", "a\u{1}", " a", "a ", &"x".repeat(201)] {
            assert!(matches!(check_name(name), Err(Error::Refused(_))), "{name:?}");
        }
        for name in ["web1", "Büro, 2. Stock", "-x", "a:b"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn one_file_is_recognised_under_two_paths() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(is_same(&real.join("x"), &link.join("x")));
        assert!(is_same(&real.join("x"), &real.join("../real/x")));
        assert!(!is_same(&real.join("x"), &real.join("y")));
    }
}
