//! What is known of both hosts before a VM moves.

use std::collections::BTreeMap;

use virtward_decide::migration::check::{DiskThere, Namesake, Seen, Snapshot};
use virtward_hypervisor::{ErrorKind, Hypervisor, JobKind};
use virtward_model::{DiskSource, Machine, Vm, VmState};

use super::{MigrateOptions, probes::Probes};
use crate::{Env, Error, Result};

/// Target and source of each disk.
pub(super) fn sources(vm: &Vm) -> Vec<(String, String)> {
    let text = |source: &DiskSource| match source {
        DiskSource::File { path } | DiskSource::Block { path } => path.clone(),
        DiskSource::Network { protocol, name } => format!("{protocol}:{name}"),
        DiskSource::Volume { pool, volume } => format!("{pool}/{volume}"),
        DiskSource::None => String::new(),
    };
    vm.disks.iter().map(|disk| (disk.target.clone(), text(&disk.source))).collect()
}

/// Looks at both hosts.
pub(super) async fn gather(
    env: &Env,
    here: &dyn Hypervisor,
    there: &dyn Hypervisor,
    vm: &Vm,
    options: &MigrateOptions,
) -> Result<Snapshot> {
    let context = || format!("look at {}", vm.name);
    let at_destination = || "look at the destination".to_owned();
    let mut machine = here.machine(vm.uuid).await.map_err(Error::hyper(context()))?;
    // As the host resolves them: volumes of pools are files.
    for used in &mut machine.disks {
        if let Some(disk) = vm.disks.iter().find(|disk| disk.target == used.disk.target) {
            used.disk.source = disk.source.clone();
        }
    }
    let source = here.offer().await.map_err(Error::hyper(context()))?;
    let destination = there.offer().await.map_err(Error::hyper(at_destination()))?;
    let others = there.list().await.map_err(Error::hyper(at_destination()))?;
    let namesakes = others
        .into_iter()
        .filter(|other| other.uuid == vm.uuid || other.name == vm.name)
        .map(|other| Namesake { active: other.state.is_active(), name: other.name, uuid: other.uuid })
        // The VM itself, if both are one host.
        .filter(|_| source.uuid != destination.uuid || source.uuid.is_nil())
        .collect();
    let cpu = cpu(here, &machine).await?;
    let fit = there.fit(&machine, cpu.as_deref()).await.map_err(Error::hyper(at_destination()))?;
    let same = source.uuid == destination.uuid && !source.uuid.is_nil();
    let disks = if same { Vec::new() } else { disks(env, here, there, vm, &machine).await? };
    Ok(Snapshot {
        vm: vm.name.clone(),
        uuid: vm.uuid,
        state: vm.state,
        machine,
        busy: busy(here, vm).await?,
        source,
        destination,
        namesakes,
        fit,
        disks,
        apart: options.apart.clone(),
        closed: options.closed.clone(),
    })
}

/// The `<cpu>` that the guest sees: its own, or what its host gives it.
async fn cpu(here: &dyn Hypervisor, machine: &Machine) -> Result<Option<String>> {
    match machine.cpu.mode.as_str() {
        "" => Ok(None),
        "host-passthrough" | "host-model" | "maximum" => match here.host_cpu(machine).await {
            Ok(cpu) => Ok(Some(cpu)),
            Err(error) if error.kind == ErrorKind::Unreachable => Err(Error::hyper("read the host's CPU")(error)),
            Err(_) => Ok(machine.cpu.xml.clone()),
        },
        _ => Ok(machine.cpu.xml.clone()),
    }
}

/// What holds the VM.
async fn busy(here: &dyn Hypervisor, vm: &Vm) -> Result<Option<String>> {
    if !vm.state.is_active() {
        return Ok(None);
    }
    let context = || format!("look at {}", vm.name);
    if let Some(job) = here.job(vm.uuid).await.map_err(Error::hyper(context()))? {
        let what = match job.kind {
            JobKind::Backup => "a backup",
            JobKind::MigrationOut | JobKind::MigrationIn => "another migration",
            JobKind::Other => "another job",
        };
        return Ok(Some(what.to_owned()));
    }
    if vm.state == VmState::Crashed {
        return Ok(None);
    }
    for disk in &vm.disks {
        if here.block_job(vm.uuid, &disk.target).await.is_ok_and(|job| job.is_some()) {
            return Ok(Some(format!("a copy of disk {}", disk.target)));
        }
    }
    Ok(None)
}

/// How two hosts see one directory.
#[derive(Clone)]
enum Directory {
    Shared,
    Separate,
    Unknown(String),
}

async fn disks(
    env: &Env,
    here: &dyn Hypervisor,
    there: &dyn Hypervisor,
    vm: &Vm,
    machine: &Machine,
) -> Result<Vec<DiskThere>> {
    let mut probes = Probes::begin(env, vm.uuid, here, there).await?;
    let mut directories: BTreeMap<String, Directory> = BTreeMap::new();
    let mut seen = Vec::new();
    for disk in machine.disks.iter().map(|used| &used.disk) {
        let unknown = |why: &str| DiskThere {
            target: disk.target.clone(),
            seen: Seen::Unknown(why.to_owned()),
            size_bytes: 0,
            room_bytes: None,
        };
        match &disk.source {
            DiskSource::File { path } => {
                let parent =
                    path.rsplit_once('/').map_or("/", |(parent, _)| if parent.is_empty() { "/" } else { parent });
                if !directories.contains_key(parent) {
                    directories.insert(parent.to_owned(), directory(&mut probes, here, there, parent).await?);
                }
                let directory = directories[parent].clone();
                seen.push(file(here, there, vm, disk, path, parent, &directory).await?);
            }
            DiskSource::Block { .. } => seen.push(unknown("block devices cannot be compared from here")),
            DiskSource::Volume { .. } => seen.push(unknown("its pool is not active here")),
            DiskSource::Network { .. } | DiskSource::None => {}
        }
    }
    Ok(seen)
}

/// Whether both hosts see the same directory: what one makes there, the other one cannot make.
async fn directory(
    probes: &mut Probes,
    here: &dyn Hypervisor,
    there: &dyn Hypervisor,
    path: &str,
) -> Result<Directory> {
    let probe = probes.next(path)?;
    if let Err(error) = here.volume_create(&probe, "raw", 0).await {
        return Ok(Directory::Unknown(error.message));
    }
    let seen = probe_there(there, &probe).await;
    let _ = here.volume_remove(&probe).await;
    seen
}

/// Looking is not enough: a network file system may remember for a while what was not there.
async fn probe_there(there: &dyn Hypervisor, probe: &str) -> Result<Directory> {
    match there.volume_create(probe, "raw", 0).await {
        Ok(()) => {
            let _ = there.volume_remove(probe).await;
            Ok(Directory::Separate)
        }
        Err(error) if error.kind == ErrorKind::Unreachable => Err(Error::hyper("look at the destination")(error)),
        Err(error) if error.message.contains("exist") && !error.message.contains("not exist") => Ok(Directory::Shared),
        Err(error) if error.message.contains("No such file") => Ok(Directory::Separate),
        // A directory that cannot be written to, there, can be looked into.
        Err(error) => Ok(match there.volume(probe).await {
            Ok(Some(_)) => Directory::Shared,
            Ok(None) => Directory::Separate,
            Err(_) => Directory::Unknown(error.message),
        }),
    }
}

async fn file(
    here: &dyn Hypervisor,
    there: &dyn Hypervisor,
    vm: &Vm,
    disk: &virtward_model::Disk,
    path: &str,
    parent: &str,
    directory: &Directory,
) -> Result<DiskThere> {
    let size_bytes = size(here, vm, &disk.target, path).await;
    let (seen, room_bytes) = match directory {
        Directory::Shared => (Seen::Shared, None),
        Directory::Unknown(why) if !disk.read_only => (Seen::Unknown(why.clone()), None),
        Directory::Separate | Directory::Unknown(_) => match there.volume(path).await {
            Ok(Some(other)) => {
                let mine = here.volume(path).await.ok().flatten();
                let alike =
                    mine.is_some_and(|mine| mine.capacity_bytes == other.capacity_bytes && mine.format == other.format);
                (if disk.read_only && alike { Seen::Shared } else { Seen::Differs }, None)
            }
            Ok(None) => (Seen::Absent, there.room(parent).await.ok()),
            Err(error) if error.kind == ErrorKind::Unreachable => {
                return Err(Error::hyper("look at the destination")(error));
            }
            // No such directory.
            Err(_) => (Seen::Absent, None),
        },
    };
    Ok(DiskThere { target: disk.target.clone(), seen, size_bytes, room_bytes })
}

/// Virtual size of a disk, as QEMU or else as libvirt sees it; 0 if neither tells.
async fn size(here: &dyn Hypervisor, vm: &Vm, target: &str, path: &str) -> u64 {
    if vm.state.is_active()
        && let Ok(stats) = here.stats().await
        && let Some(disk) =
            stats.iter().filter(|s| s.uuid == vm.uuid).flat_map(|s| &s.disks).find(|disk| disk.target == target)
    {
        return disk.capacity_bytes;
    }
    here.volume(path).await.ok().flatten().map_or(0, |volume| volume.capacity_bytes)
}
