//! A whole lab: up, status, down.
//!
//! `down` trusts no state file: it finds processes by their namespaces, links by their alias, namespaces by name and
//! files by path, so that it also removes what a crash or a half-way `up` left, and can be repeated.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    bmc,
    cli::UpArgs,
    daemon, etcd, fence,
    host::HostRef,
    names::{HostName, LabName},
    net,
    proc::Membership,
    state::{Fault, Host, Lab, Lock, RUN_ROOT, VAR_ROOT, all_labs, netns_prefix, write_atomically},
    storage,
};

/// Where a libvirt client looks for the machine's own libvirt.
const DEFAULT_SOCKET: &str = "/run/libvirt/libvirt-sock";
/// Says that labs made /run/libvirt, so the last one removes it.
const MADE_RUN_LIBVIRT: &str = "/run/virtward-lab/.made-run-libvirt";

/// Starts a lab. When that fails, nothing of it stays.
pub fn up(name: &LabName, args: &UpArgs) -> Result<Status> {
    let lock = Lock::lab(name)?;
    if let Some(lab) = Lab::find(name)? {
        let half = if lab.complete { "already up" } else { "there, but only half" };
        bail!("lab {name} is {half}; remove it with: virtward-lab down --name {name}");
    }
    match build(name, args) {
        Ok(lab) => Ok(status(&lab)),
        Err(error) => {
            let cleanup = dismantle(name).and_then(|()| {
                lock.remove();
                remove_common()
            });
            if let Err(cleanup) = cleanup {
                bail!("{error:#}; and what was started cannot be removed: {cleanup:#}");
            }
            Err(error)
        }
    }
}

fn build(name: &LabName, args: &UpArgs) -> Result<Lab> {
    let mut lab = reserve(name, args)?;
    write_atomically(&Lab::run_dir(name).join("hosts"), hosts_file(&lab).as_bytes())?;
    let shared = lab.shared_dir();
    fs::create_dir_all(&shared).with_context(|| format!("cannot create {}", shared.display()))?;
    fence::install(&lab)?;
    for host in &lab.hosts {
        net::create_host(&lab, host)?;
        HostRef::new(&lab, host).prepare()?;
        bmc::start(HostRef::new(&lab, host))?;
    }
    // The hosts start side by side: most of the time libvirtd waits for the emulators that it probes.
    thread::scope(|scope| {
        let lab = &lab;
        let starting: Vec<_> =
            lab.hosts.iter().map(|host| scope.spawn(move || HostRef::new(lab, host).power_on())).collect();
        starting.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| bail!("starting a host failed")))
    })?;
    if !lab.etcd.is_empty() {
        etcd::wait_ready(&lab)?;
    }
    if lab.daemon.is_some() {
        daemon::found(&lab, &args.daemon_config()?)?;
    }
    link_default_socket(&lab)?;
    lab.complete = true;
    lab.save()?;
    Ok(lab)
}

/// Chooses the lab's network and claims it, apart from every other `up`.
fn reserve(name: &LabName, args: &UpArgs) -> Result<Lab> {
    let _machine = Lock::machine()?;
    let index = net::choose_index()?;
    let host = |n: u8| Host {
        name: HostName::numbered(n),
        address: format!("{}.{}", net::subnet(index), 10 + n),
        uuid: Uuid::new_v4(),
        rate_limit: None,
    };
    let lab = Lab {
        name: name.clone(),
        index,
        hosts: (1..=args.hosts).map(host).collect(),
        etcd: if args.etcd { etcd::members(args.hosts) } else { Vec::new() },
        root: args.root.as_deref().map(other_system).transpose()?,
        faults: Vec::new(),
        daemon: args.daemon()?,
        complete: false,
    };
    lab.save()?;
    net::create_bridge(&lab)?;
    // Hosts mount their own directory on /run/libvirt, which a machine without a libvirt of its own does not have.
    if !Path::new("/run/libvirt").exists() {
        write_atomically(Path::new(MADE_RUN_LIBVIRT), b"")?;
        fs::create_dir("/run/libvirt").context("cannot create /run/libvirt")?;
    }
    Ok(lab)
}

/// The directory of another system, if it has what a host needs.
fn other_system(root: &Path) -> Result<PathBuf> {
    let root = fs::canonicalize(root).with_context(|| format!("cannot use the system in {}", root.display()))?;
    for program in ["usr/sbin/libvirtd", "usr/bin/virsh", "usr/bin/qemu-system-x86_64", "usr/bin/qemu-img"] {
        if !root.join(program).exists() {
            bail!("the system in {} has no {program}; install libvirt and QEMU in it", root.display());
        }
    }
    Ok(root)
}

fn hosts_file(lab: &Lab) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for host in &lab.hosts {
        text.push_str(&format!("{} {}\n", host.address, host.name));
    }
    text
}

/// On a machine without a libvirt of its own, the first host answers for it. Never touches one that is there.
fn link_default_socket(lab: &Lab) -> Result<()> {
    let _machine = Lock::machine()?;
    let taken = [DEFAULT_SOCKET, "/run/libvirt/virtqemud-sock"].iter().any(|s| fs::symlink_metadata(s).is_ok());
    let Some(first) = lab.hosts.first() else { return Ok(()) };
    if taken {
        return Ok(());
    }
    let target = lab.socket(first);
    for suffix in ["", "-ro"] {
        let (target, link) = (format!("{}{suffix}", target.display()), format!("{DEFAULT_SOCKET}{suffix}"));
        std::os::unix::fs::symlink(&target, &link).with_context(|| format!("cannot link {link} to {target}"))?;
    }
    Ok(())
}

/// Whether the machine's default libvirt socket is this lab's.
fn owns_default_socket(name: &LabName) -> bool {
    fs::read_link(DEFAULT_SOCKET).is_ok_and(|target| target.starts_with(Lab::run_dir(name)))
}

/// Stops a lab and removes everything of it. Tells whether there was anything.
pub fn down(name: &LabName) -> Result<bool> {
    let lock = Lock::lab(name)?;
    let found = Lab::run_dir(name).is_dir()
        || Lab::var_dir(name).is_dir()
        || !net::namespaces(name).is_empty()
        || owns_default_socket(name);
    dismantle(name)?;
    lock.remove();
    remove_common()?;
    Ok(found)
}

fn dismantle(name: &LabName) -> Result<()> {
    for host in host_names(name) {
        // First, so that nothing switches a host on again.
        bmc::end(name, &host);
        storage::heal(name, &host)?;
        Membership::new(name, &host, &format!("{}{host}", netns_prefix(name))).kill_all()?;
    }
    net::remove_all(name)?;
    if owns_default_socket(name) {
        for suffix in ["", "-ro"] {
            let _ = fs::remove_file(format!("{DEFAULT_SOCKET}{suffix}"));
        }
    }
    for dir in [Lab::run_dir(name), Lab::var_dir(name)] {
        unmount_below(&dir)?;
        // Anything but a directory there is not the lab's.
        if dir.is_dir() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Every host that a lab may have, from whatever trace there is.
fn host_names(name: &LabName) -> Vec<HostName> {
    let prefix = netns_prefix(name);
    let from_netns = net::namespaces(name).into_iter().filter_map(|n| n.strip_prefix(&prefix)?.parse().ok());
    let from_files = [Lab::run_dir(name), Lab::var_dir(name)]
        .into_iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flat_map(|entries| entries.flatten())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut names: Vec<HostName> = from_netns.chain(from_files).collect();
    names.sort();
    names.dedup();
    names
}

/// Detaches what somebody mounted inside a lab's directory, before its files are removed.
fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut inside: Vec<PathBuf> = points.filter(|p| p.starts_with(dir)).collect();
    inside.reverse();
    for point in inside {
        unmount(&point, UnmountFlags::DETACH).with_context(|| format!("cannot unmount {}", point.display()))?;
    }
    Ok(())
}

/// After the last lab, also what labs share goes.
fn remove_common() -> Result<()> {
    let machine = Lock::machine()?;
    if !all_labs().is_empty() {
        return Ok(());
    }
    if Path::new(MADE_RUN_LIBVIRT).exists() {
        // Not when somebody put something there since.
        let _ = fs::remove_dir("/run/libvirt");
        let _ = fs::remove_file(MADE_RUN_LIBVIRT);
    }
    let _ = fs::remove_dir(VAR_ROOT);
    machine.remove();
    // Fails while another lab's lock file is there, whose `down` will do it.
    let _ = fs::remove_dir(RUN_ROOT);
    Ok(())
}

/// What `status` shows.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The lab's name.
    pub name: LabName,
    /// Its network.
    pub subnet: String,
    /// Its bridge on the machine; the machine has address 1.
    pub bridge: String,
    /// The directory that every host sees.
    pub shared_storage: PathBuf,
    /// Whether qemu:///system on this machine leads to the first host.
    pub answers_default_uri: bool,
    /// Its hosts.
    pub hosts: Vec<HostStatus>,
    /// Its etcd, when it has one.
    pub etcd: Option<EtcdStatus>,
    /// The partitions in force.
    pub partitions: Vec<Fault>,
    /// The fence agent that switches the hosts' power.
    pub fence_agent: PathBuf,
}

/// One host in `status`.
#[derive(Debug, Serialize)]
pub struct HostStatus {
    /// Its name.
    pub name: HostName,
    /// Its address.
    pub address: String,
    /// Whether it has power.
    pub power: &'static str,
    /// Whether its libvirtd runs.
    pub libvirtd: &'static str,
    /// Its libvirt for clients on this machine.
    pub uri: String,
    /// Its libvirt for clients on the lab's network.
    pub tcp_uri: String,
    /// The directory that only this host sees.
    pub local_storage: PathBuf,
    /// The rate its link is limited to.
    pub rate_limit: Option<String>,
    /// Whether everything in it is stopped (`host pause`).
    pub paused: bool,
    /// Whether the shared storage does not answer it (`storage stall`).
    pub storage_stalled: bool,
    /// How its fence device behaves.
    pub fence_mode: &'static str,
    /// Its watchdog, as a Unix socket.
    pub watchdog: PathBuf,
    /// Its daemon, in a lab that runs them.
    pub daemon: Option<DaemonStatus>,
}

/// A host's daemon in `status`.
#[derive(Debug, Serialize)]
pub struct DaemonStatus {
    /// Whether it runs.
    pub running: bool,
    /// Its configuration, for `virtward --config`.
    pub config: PathBuf,
    /// Its log.
    pub log: PathBuf,
}

/// The etcd in `status`.
#[derive(Debug, Serialize)]
pub struct EtcdStatus {
    /// Where clients reach it.
    pub endpoints: Vec<String>,
}

/// Looks at a lab.
pub fn status(lab: &Lab) -> Status {
    let host_status = |host: &Host| {
        let at = HostRef::new(lab, host);
        HostStatus {
            name: host.name.clone(),
            address: host.address.clone(),
            power: if at.keeper().is_some() { "on" } else { "off" },
            libvirtd: if at.libvirtd().is_some() { "running" } else { "stopped" },
            uri: lab.uri(host),
            tcp_uri: lab.tcp_uri(host),
            local_storage: lab.local_dir(host),
            rate_limit: host.rate_limit.clone(),
            paused: at.members().is_frozen(),
            storage_stalled: storage::is_stalled(&lab.name, &host.name),
            fence_mode: fence::Mode::of(lab, host).as_str(),
            watchdog: bmc::watchdog_socket(lab, host),
            daemon: lab.daemon.is_some().then(|| DaemonStatus {
                running: daemon::pid(at).is_some(),
                config: daemon::config(at),
                log: daemon::log(at),
            }),
        }
    };
    Status {
        name: lab.name.clone(),
        subnet: format!("{}.0/24", net::subnet(lab.index)),
        bridge: lab.bridge(),
        shared_storage: lab.shared_dir(),
        answers_default_uri: owns_default_socket(&lab.name),
        hosts: lab.hosts.iter().map(host_status).collect(),
        etcd: (!lab.etcd.is_empty()).then(|| EtcdStatus { endpoints: etcd::endpoints(lab) }),
        partitions: lab.faults.clone(),
        fence_agent: fence::agent(lab),
    }
}

impl Status {
    /// For a person.
    pub fn text(&self) -> String {
        let mut text =
            format!("lab {}: network {}, shared storage {}\n", self.name, self.subnet, self.shared_storage.display());
        for h in &self.hosts {
            let limit = h.rate_limit.as_ref().map_or_else(String::new, |r| format!(", limited to {r}"));
            text.push_str(&format!(
                "  {:<4}{:<15}power {:<4}libvirtd {:<9}{}{limit}{}{}{}{}\n",
                h.name,
                h.address,
                h.power,
                h.libvirtd,
                h.uri,
                if h.paused { ", paused" } else { "" },
                if h.storage_stalled { ", storage stalled" } else { "" },
                match &h.daemon {
                    Some(daemon) if !daemon.running => ", daemon stopped",
                    _ => "",
                },
                if h.fence_mode == "honest" { String::new() } else { format!(", fence device {}", h.fence_mode) },
            ));
        }
        if let Some(etcd) = &self.etcd {
            text.push_str(&format!("  etcd: {}\n", etcd.endpoints.join(" ")));
        }
        for p in &self.partitions {
            text.push_str(&format!("  partition: {p}\n"));
        }
        if self.answers_default_uri {
            text.push_str("  qemu:///system on this machine is h1, as there is no other libvirt here\n");
        }
        text
    }
}
