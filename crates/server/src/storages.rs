//! Where disks of VMs are: file systems as the API shows them, and the names by which backups that read from one storage
//! are counted.
//!
//! A directory of the same name is on every host; whether it is the same one, its file system tells: those of the network
//! and those that several hosts mount at once are one storage, all others are one per host.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use virtward_api::Storage;
use virtward_engine::reconcile::inventory::{VmView, World};
use virtward_model::DiskSource;

use crate::{cluster::fleet::Registry, repositories};

/// File systems that several hosts see at once, by the number of their kind: NFS, SMB (both), CephFS, GFS2, OCFS2, Lustre,
/// AFS, 9p, GPFS.
const SHARED: [u64; 10] = [
    0x6969,
    0xff53_4d42,
    0xfe53_4d42,
    0x00c3_6400,
    0x0116_1970,
    0x7461_636f,
    0x0bd0_0bd0,
    0x5346_414f,
    0x0102_1997,
    0x4750_4653,
];

/// The directory of an image, or of a device.
fn directory(source: &DiskSource) -> Option<String> {
    Some(Path::new(source.path()?).parent()?.to_string_lossy().into_owned())
}

fn is_shared(path: &Path) -> bool {
    let kind = rustix::fs::statfs(path).ok().and_then(|at| u64::try_from(at.f_type).ok());
    kind.is_some_and(|kind| SHARED.contains(&(kind & 0xffff_ffff)))
}

/// The file systems of this host that hold disks of its VMs.
pub fn of_host(world: &World) -> Vec<Storage> {
    let mut disks: BTreeMap<String, u32> = BTreeMap::new();
    for disk in world.vms.values().flat_map(|view| &view.vm.disks) {
        if let Some(dir) = directory(&disk.source) {
            *disks.entry(dir).or_default() += 1;
        }
    }
    let look = |(path, disks): (String, u32)| {
        let (total_bytes, free_bytes) = repositories::file_system(Path::new(&path))?;
        let is_shared = is_shared(Path::new(&path));
        Some(Storage { path, total_bytes, free_bytes, disks, is_shared })
    };
    disks.into_iter().filter_map(look).collect()
}

/// Names of storages, for all VMs.
pub struct Names {
    /// Directories on shared file systems, by node.
    shared: HashMap<String, HashSet<String>>,
    is_one_host: bool,
}

impl Names {
    /// As the hosts published what they have.
    pub fn new(registry: &Registry) -> Self {
        let hosts = registry.hosts.all();
        Self::of_hosts(hosts.iter().map(|(node, record)| (node.as_str(), &*record.host.storage)))
    }

    fn of_hosts<'a>(hosts: impl Iterator<Item = (&'a str, &'a [Storage])>) -> Self {
        let shared = |storage: &[Storage]| -> HashSet<String> {
            storage.iter().filter(|one| one.is_shared).map(|one| one.path.clone()).collect()
        };
        let shared: HashMap<String, HashSet<String>> =
            hosts.map(|(node, storage)| (node.to_owned(), shared(storage))).collect();
        Self { is_one_host: shared.len() < 2, shared }
    }

    /// The storages that a VM's disks are on, each once.
    pub fn of(&self, node: &str, host: &str, view: &VmView) -> Vec<String> {
        let name = |source: &DiskSource| match source {
            DiskSource::Network { protocol, name } => {
                let pool = name.rsplit_once('/').map_or(&**name, |(pool, _)| pool);
                Some(format!("{protocol}:{pool}"))
            }
            DiskSource::Volume { pool, .. } => Some(format!("{host}:pool {pool}")),
            source => {
                let dir = directory(source)?;
                let is_one = self.is_one_host || self.shared.get(node).is_some_and(|of| of.contains(&dir));
                Some(if is_one { dir } else { format!("{host}:{dir}") })
            }
        };
        let mut names: Vec<String> = view.vm.disks.iter().filter_map(|disk| name(&disk.source)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use virtward_model::{Disk, DiskDevice, Vm, VmState};

    use super::*;

    fn on(sources: &[DiskSource]) -> VmView {
        let disk = |source: &DiskSource| Disk {
            target: "vda".into(),
            device: DiskDevice::Disk,
            format: "raw".into(),
            source: source.clone(),
            read_only: false,
            shareable: false,
            transient: false,
            backing: Vec::new(),
        };
        let disks = sources.iter().map(disk).collect();
        let vm = Vm { name: "web1".into(), uuid: Uuid::nil(), state: VmState::Running, disks };
        VmView { vm, details: std::sync::Arc::default(), usage: None, agent: None, guest: None }
    }

    fn storage(path: &str, is_shared: bool) -> Storage {
        Storage { path: path.into(), total_bytes: 1, free_bytes: 1, disks: 1, is_shared }
    }

    #[test]
    fn one_path_on_two_hosts_is_one_storage_only_where_it_is_shared() {
        let file = |path: &str| DiskSource::File { path: path.into() };
        let all = [storage("/nfs", true), storage("/images", false)];
        let names = Names::of_hosts([("h1", &all[..]), ("h2", &all[..])].into_iter());
        let vm = on(&[file("/nfs/a.raw"), file("/images/b.raw"), file("/images/c.raw")]);
        assert_eq!(names.of("h1", "h1", &vm), ["/nfs", "h1:/images"]);
        assert_eq!(names.of("h2", "h2", &vm), ["/nfs", "h2:/images"]);
        let far = on(&[
            DiskSource::Network { protocol: "rbd".into(), name: "vms/web1".into() },
            DiskSource::Volume { pool: "default".into(), volume: "x".into() },
            DiskSource::None,
        ]);
        assert_eq!(names.of("h1", "kvm1", &far), ["kvm1:pool default", "rbd:vms"]);
        // A host alone has no need to say that it is meant.
        let alone = Names::of_hosts([("h1", &all[..])].into_iter());
        assert_eq!(alone.of("h1", "h1", &vm), ["/images", "/nfs"]);
        assert!(!is_shared(Path::new("/proc")) && !is_shared(Path::new("/no/such/directory")));
    }
}
