//! What a lab is, where its files are, and the locks that keep two commands apart.
//!
//! Invariants: the state file is replaced whole, under the lab's lock. Whether a host has power or a libvirtd runs is
//! never stored; it is seen in the processes (`proc`), so a crash cannot make the state lie.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::names::{HostName, LabName};

/// Sockets, pid files and states of all labs; gone after a reboot of the machine, like what they describe.
pub const RUN_ROOT: &str = "/run/virtward-lab";
/// Disks and libvirt's persistent files of all labs.
pub const VAR_ROOT: &str = "/var/lib/virtward-lab";

/// A lab as `up` made it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lab {
    /// Its name.
    pub name: LabName,
    /// Third byte of its network 10.167.x.0/24, and the number in its interfaces' names.
    pub index: u8,
    /// Its hosts.
    pub hosts: Vec<Host>,
    /// The hosts with an etcd member.
    #[serde(default)]
    pub etcd: Vec<HostName>,
    /// Where the system is installed whose programs the hosts run; the machine's own when absent.
    #[serde(default)]
    pub root: Option<PathBuf>,
    /// The partitions in force.
    #[serde(default)]
    pub faults: Vec<Fault>,
    /// The product that every host runs as a daemon.
    #[serde(default)]
    pub daemon: Option<PathBuf>,
    /// False while `up` is at work, so that a lab which it left half-way is not taken for a whole one.
    #[serde(default)]
    pub complete: bool,
}

/// A host of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: HostName,
    /// Its address on the lab's network.
    pub address: String,
    /// The host UUID its libvirtd reports.
    pub uuid: Uuid,
    /// The rate its link is limited to.
    #[serde(default)]
    pub rate_limit: Option<String>,
}

/// One partition: what is lost between a host and another one, or everybody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The host that is cut off.
    pub host: HostName,
    /// From whom; from everybody when absent.
    pub from: Option<HostName>,
    /// Whether only what `host` sends is lost.
    pub one_way: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (how, all) = if self.one_way { ("is not heard by", "anybody") } else { ("is cut off from", "everybody") };
        write!(f, "{} {how} {}", self.host, self.from.as_ref().map_or(all, HostName::as_str))
    }
}

impl Lab {
    /// The directory of a lab's sockets and states.
    pub fn run_dir(name: &LabName) -> PathBuf {
        Path::new(RUN_ROOT).join(name.as_str())
    }

    /// The directory of a lab's disks.
    pub fn var_dir(name: &LabName) -> PathBuf {
        Path::new(VAR_ROOT).join(name.as_str())
    }

    /// Reads the state of a lab that is up.
    pub fn load(name: &LabName) -> Result<Self> {
        let Some(lab) = Self::find(name)? else {
            bail!("lab {name} is not up; start it with: virtward-lab up --name {name}");
        };
        if !lab.complete {
            bail!("lab {name} did not come up completely; remove it with: virtward-lab down --name {name}");
        }
        Ok(lab)
    }

    /// Reads the state of a lab, whole or half; `None` when there is none.
    pub fn find(name: &LabName) -> Result<Option<Self>> {
        let path = Self::run_dir(name).join("state.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let lab = serde_json::from_slice(&text).with_context(|| {
            format!("{} is damaged; remove the lab with: virtward-lab down --name {name}", path.display())
        })?;
        Ok(Some(lab))
    }

    /// Replaces the state file.
    pub fn save(&self) -> Result<()> {
        let dir = Self::run_dir(&self.name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        write_atomically(&dir.join("state.json"), &serde_json::to_vec_pretty(self)?)
    }

    /// The host of this name, or an error that lists those there are.
    pub fn host(&self, name: &HostName) -> Result<&Host> {
        self.hosts.iter().find(|h| h.name == *name).with_context(|| {
            let known: Vec<&str> = self.hosts.iter().map(|h| h.name.as_str()).collect();
            format!("lab {} has no host {name}; its hosts are {}", self.name, known.join(", "))
        })
    }

    /// The host of this name, or the first one.
    pub fn host_or_first(&self, name: Option<&HostName>) -> Result<&Host> {
        match name {
            Some(name) => self.host(name),
            None => self.hosts.first().with_context(|| format!("lab {} has no hosts", self.name)),
        }
    }

    /// The storage that every host sees at this path.
    pub fn shared_dir(&self) -> PathBuf {
        Self::var_dir(&self.name).join("shared")
    }

    /// The host's directory of sockets and pid files.
    pub fn host_run_dir(&self, host: &Host) -> PathBuf {
        Self::run_dir(&self.name).join(host.name.as_str())
    }

    /// The host's directory of persistent files.
    pub fn host_var_dir(&self, host: &Host) -> PathBuf {
        Self::var_dir(&self.name).join(host.name.as_str())
    }

    /// The storage that only this host sees (and the machine itself, at the same path).
    pub fn local_dir(&self, host: &Host) -> PathBuf {
        self.host_var_dir(host).join("local")
    }

    /// The host's libvirt socket, as seen from the machine.
    pub fn socket(&self, host: &Host) -> PathBuf {
        self.host_run_dir(host).join("libvirt/libvirt-sock")
    }

    /// Where the host's libvirt answers on this machine.
    pub fn uri(&self, host: &Host) -> String {
        format!("qemu+unix:///system?socket={}", self.socket(host).display())
    }

    /// Where the host's libvirt answers on the lab's network.
    pub fn tcp_uri(&self, host: &Host) -> String {
        format!("qemu+tcp://{}/system", host.address)
    }

    /// The host's network namespace, as `ip netns` names it.
    pub fn netns(&self, host: &Host) -> String {
        format!("{}{}", netns_prefix(&self.name), host.name)
    }

    /// The lab's bridge.
    pub fn bridge(&self) -> String {
        format!("vwlab{}", self.index)
    }

    /// The host's port on the bridge.
    pub fn port(&self, host: &Host) -> String {
        format!("vwlab{}{}", self.index, host.name)
    }
}

/// What the names of a lab's network namespaces begin with. A lab's name has no dot, so no other lab's begin so.
pub fn netns_prefix(name: &LabName) -> String {
    format!("vwlab.{name}.")
}

/// The names of the labs that have left a trace in the file system.
pub fn all_labs() -> Vec<LabName> {
    let mut names: Vec<LabName> = [RUN_ROOT, VAR_ROOT]
        .iter()
        .filter_map(|root| fs::read_dir(root).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Writes a file so that a reader sees the old or the new content, never a part.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let attempt = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        std::io::Write::write_all(&mut file, content)?;
        file.persist(path)?;
        Ok(())
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}

/// An exclusive lock on a file, held until dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// The lock of one lab: commands that change it take turns.
    pub fn lab(name: &LabName) -> Result<Self> {
        Self::acquire(&Path::new(RUN_ROOT).join(format!(".{name}.lock")))
    }

    /// The lock of what labs share: the choice of networks, and directories that the last lab removes.
    pub fn machine() -> Result<Self> {
        Self::acquire(&Path::new(RUN_ROOT).join(".lock"))
    }

    /// Whoever held the lock before may have removed the file, so a lock counts only while the path still leads to it.
    fn acquire(path: &Path) -> Result<Self> {
        let context = || format!("cannot lock {}", path.display());
        loop {
            fs::create_dir_all(RUN_ROOT).with_context(context)?;
            let file = match OpenOptions::new().create(true).truncate(false).write(true).open(path) {
                Ok(file) => file,
                // The directory was removed in between.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(context),
            };
            flock(&file, FlockOperation::LockExclusive).with_context(context)?;
            let ours = file.metadata().with_context(context)?;
            if fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
                return Ok(Self { path: path.to_owned(), file });
            }
        }
    }

    /// Removes the lock file and gives the lock up.
    pub fn remove(self) {
        let _ = fs::remove_file(&self.path);
        drop(self.file);
    }
}
