//! Guests: create, find, wait for, remove.
//!
//! A guest boots the lab's kernel and initramfs directly and keeps its data on virtio disks. Which host has it is asked
//! of the hosts each time, never remembered, so that a guest is found again after it moved.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use uuid::Uuid;
use virtward_model::Bytes;

use crate::{
    agent,
    cli::{CreateArgs, Pool},
    disk,
    host::HostRef,
    names::VmName,
    state::{Lab, write_atomically},
    virsh::Virsh,
    writers,
};

/// The kernel and initramfs that setup.sh built last.
const GUEST_IMAGE: &str = "/var/cache/virtward-lab/current";

/// Console and speed: what a kernel does at boot for real hardware or against hostile neighbours costs seconds under
/// emulation and gains nothing here.
const BOOT_OPTIONS: &str = "console=ttyS0 quiet panic=5 mitigations=off nokaslr audit=0 cryptomgr.notests \
                            no_timer_check tsc=reliable edd=off";

/// A guest as `vm list` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// The host that has it.
    pub host: String,
    /// Its state in libvirt's words.
    pub state: String,
}

/// What `vm create` made.
#[derive(Clone, Debug, Serialize)]
pub struct Created {
    /// The guest's name.
    pub name: VmName,
    /// The host that has it.
    pub host: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its disk files, vda first.
    pub disks: Vec<PathBuf>,
    /// Seconds that making the disks took.
    pub disks_seconds: f64,
    /// Seconds until it was up, when that was waited for.
    pub boot_seconds: Option<f64>,
}

/// Makes a guest. When that fails, nothing of it stays.
pub fn create(lab: &Lab, args: &CreateArgs) -> Result<Created> {
    let host = lab.host_or_first(args.host.as_ref())?;
    let at = HostRef::new(lab, host);
    let virsh = at.virsh();
    if let Some((_, found)) = find(lab, &args.vm) {
        bail!("there is a guest {} on {}; remove it with: virtward-lab vm rm {0}", args.vm, found.host);
    }
    if at.libvirtd().is_none() {
        bail!("libvirtd of host {0} does not run; start it with: virtward-lab host libvirtd start {0}", host.name);
    }
    let image = fs::canonicalize(GUEST_IMAGE)
        .with_context(|| format!("no guest image at {GUEST_IMAGE}; build it with: scripts/setup.sh lab"))?;
    let dir = match args.pool {
        Pool::Shared => lab.shared_dir(),
        Pool::Local => lab.local_dir(host),
    };
    let specs = disk_specs(args, &dir)?;
    for spec in &specs {
        spec.check()?;
    }
    let started = Instant::now();
    let disks: Vec<PathBuf> = specs.iter().map(|s| s.path.clone()).collect();
    let uuid = Uuid::new_v4();
    let attempt = || -> Result<(f64, Option<f64>)> {
        make_disks(&specs, &dir)?;
        if args.writer {
            writers::make(&writers::disk(lab, &args.vm))?;
        }
        let disks_seconds = started.elapsed().as_secs_f64();
        let writer = args.writer.then(|| writers::disk(lab, &args.vm));
        let xml = domain_xml(args, uuid, &image, &specs, writer.as_deref(), disk::permits_direct_io(&dir));
        if let Some(copy) = &args.xml_to {
            write_atomically(copy, xml.as_bytes())?;
        }
        define_and_start(lab, &virsh, args, &xml)?;
        let booting = Instant::now();
        if args.wait {
            wait(lab, &args.vm, Duration::from_secs(120))?;
        }
        Ok((disks_seconds, args.wait.then(|| booting.elapsed().as_secs_f64())))
    };
    match attempt() {
        Ok((disks_seconds, boot_seconds)) => {
            let host = host.name.to_string();
            Ok(Created { name: args.vm.clone(), host, uuid, disks, disks_seconds, boot_seconds })
        }
        Err(error) => {
            let _ = virsh.call(&["destroy", args.vm.as_str()]);
            let _ = virsh.call(&["undefine", args.vm.as_str()]);
            for disk in disks.iter().chain(&args.writer.then(|| writers::disk(lab, &args.vm))) {
                let _ = fs::remove_file(disk);
            }
            Err(error.context(format!("cannot create {}", args.vm)))
        }
    }
}

fn disk_specs(args: &CreateArgs, dir: &Path) -> Result<Vec<disk::Spec>> {
    if args.fill.len() > args.disks.len() {
        bail!("--fill is given {} times, but --disk {} times", args.fill.len(), args.disks.len());
    }
    if args.disks.len() > 20 {
        bail!("a guest has at most 20 disks");
    }
    if args.partitioned && args.disks.is_empty() {
        bail!("--partitioned needs a --disk");
    }
    let spec = |(n, &size): (usize, &Bytes)| disk::Spec {
        path: dir.join(format!("{}-{}.{}", args.vm, target(n), args.format.as_str())),
        format: args.format,
        size,
        fs: args.fs,
        fill: args.fill.get(n).copied().unwrap_or_default(),
        partitioned: args.partitioned && n == 0,
        label: label(n),
        seed: args.vm.to_string(),
    };
    let specs: Vec<disk::Spec> = args.disks.iter().enumerate().map(spec).collect();
    if let Some(taken) = specs.iter().find(|s| s.path.exists()) {
        bail!("{} exists already, from a guest that was undefined by other means; remove it", taken.path.display());
    }
    Ok(specs)
}

/// The device name of disk `n`: vda, vdb, ...
fn target(n: usize) -> String {
    format!("vd{}", char::from(b'a' + n as u8))
}

/// The label, serial number and mount point of disk `n`: data, data2, ...
fn label(n: usize) -> String {
    if n == 0 { "data".to_owned() } else { format!("data{}", n + 1) }
}

fn make_disks(specs: &[disk::Spec], dir: &Path) -> Result<()> {
    if specs.is_empty() {
        return Ok(());
    }
    let scratch =
        tempfile::Builder::new().prefix(".making-").tempdir_in(dir).context("cannot make a scratch directory")?;
    specs.iter().try_for_each(|spec| spec.make(scratch.path()))
}

fn define_and_start(lab: &Lab, virsh: &Virsh, args: &CreateArgs, xml: &str) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(Lab::run_dir(&lab.name)).context("cannot write the domain XML")?;
    std::io::Write::write_all(&mut file, xml.as_bytes()).context("cannot write the domain XML")?;
    virsh.call(&["define", &file.path().to_string_lossy()])?;
    if !args.no_start {
        virsh.call(&["start", args.vm.as_str()])?;
    }
    Ok(())
}

fn domain_xml(
    args: &CreateArgs,
    uuid: Uuid,
    image: &Path,
    specs: &[disk::Spec],
    writer: Option<&Path>,
    direct: bool,
) -> String {
    let name = &args.vm;
    let memory_kib = args.memory.get() >> 10;
    let cache = if direct { "none" } else { "writeback" };
    let disk = |format: &str, path: &Path, target: &str, serial: &str, more: &str| {
        format!(
            "    <disk type='file' device='disk'>\n\
             \x20     <driver name='qemu' type='{format}' cache='{cache}' discard='unmap'/>\n\
             \x20     <source file='{}'/>\n\
             \x20     <target dev='{target}' bus='virtio'/>\n\
             \x20     <serial>{serial}</serial>{more}\n\
             \x20   </disk>\n",
            path.display()
        )
    };
    let mut disks: String = specs
        .iter()
        .enumerate()
        .map(|(n, spec)| disk(spec.format.as_str(), &spec.path, &target(n), &label(n), ""))
        .collect();
    if let Some(path) = writer {
        // Shared, so that no lock of QEMU's hides what the records are to show: on one machine those locks reach every host.
        disks.push_str(&disk("raw", path, "vdz", writers::SERIAL, "<shareable/>"));
    }
    let mac = args.mac.as_ref().map_or_else(String::new, |mac| format!("<mac address='{mac}'/>"));
    let agent = if args.no_agent {
        ""
    } else {
        "    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n"
    };
    // type='qemu' (emulation) works on every machine; a /dev/kvm may exist and still not run ordinary guests.
    format!(
        "<domain type='qemu'>\n\
         \x20 <name>{name}</name>\n\
         \x20 <uuid>{uuid}</uuid>\n\
         \x20 <memory unit='KiB'>{memory_kib}</memory>\n\
         \x20 <vcpu>1</vcpu>\n\
         \x20 <os>\n\
         \x20   <type arch='x86_64' machine='q35'>hvm</type>\n\
         \x20   <kernel>{image}/vmlinuz</kernel>\n\
         \x20   <initrd>{image}/initramfs.img</initrd>\n\
         \x20   <cmdline>{BOOT_OPTIONS} vm={name}</cmdline>\n\
         \x20 </os>\n\
         \x20 <features><acpi/><apic/></features>\n\
         \x20 <cpu mode='custom' match='exact'><model>qemu64</model></cpu>\n\
         \x20 <clock offset='utc'/>\n\
         \x20 <on_poweroff>destroy</on_poweroff>\n\
         \x20 <on_reboot>restart</on_reboot>\n\
         \x20 <on_crash>destroy</on_crash>\n\
         \x20 <devices>\n\
         {disks}\
         \x20   <interface type='bridge'>{mac}<source bridge='br0'/><model type='virtio'/></interface>\n\
         {agent}\
         \x20   <serial type='pty'/>\n\
         \x20   <memballoon model='none'/>\n\
         \x20 </devices>\n\
         </domain>\n",
        image = image.display(),
    )
}

/// The guests of every host whose libvirt answers.
pub fn list(lab: &Lab) -> Vec<VmStatus> {
    let mut all = Vec::new();
    for host in &lab.hosts {
        let at = HostRef::new(lab, host);
        if at.libvirtd().is_none() {
            continue;
        }
        // Without the state in the same call a guest could vanish between two; "table" gives id, name, state.
        let Ok(table) = at.virsh().call(&["list", "--all"]) else { continue };
        for line in table.lines() {
            let mut words = line.split_whitespace();
            let (Some(_id), Some(name)) = (words.next(), words.next()) else { continue };
            let state = words.collect::<Vec<_>>().join(" ");
            all.push(VmStatus { name: name.to_owned(), host: host.name.to_string(), state });
        }
    }
    all
}

/// Finds a guest: on the host where it is active, else on one where it is defined.
fn find(lab: &Lab, vm: &VmName) -> Option<(Virsh, VmStatus)> {
    let mut places: Vec<VmStatus> = list(lab).into_iter().filter(|v| v.name == vm.as_str()).collect();
    places.sort_by_key(|v| v.state == "shut off");
    let place = places.into_iter().next()?;
    let host = lab.hosts.iter().find(|h| h.name.as_str() == place.host)?;
    Some((HostRef::new(lab, host).virsh(), place))
}

/// The libvirt of the host that runs the guest.
pub fn running(lab: &Lab, vm: &VmName) -> Result<Virsh> {
    match find(lab, vm) {
        None => bail!("no host of lab {} has a guest {vm} (virtward-lab vm list shows all)", lab.name),
        Some((virsh, place)) if place.state == "shut off" => {
            bail!("guest {vm} on {} is shut off; start it with: virsh -c '{}' start {vm}", place.host, virsh.uri())
        }
        Some((virsh, _)) => Ok(virsh),
    }
}

/// Waits until a guest is up.
pub fn wait(lab: &Lab, vm: &VmName, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut probe: Option<(Virsh, bool)> = None;
    let mut last = None;
    loop {
        // Where it runs is asked once and again after an error: it may have moved, or not have been started yet.
        let attempt = match probe.take() {
            Some(known) => Ok(known),
            None => running(lab, vm).and_then(|virsh| has_agent(&virsh, vm).map(|agent| (virsh, agent))),
        };
        match attempt.and_then(|(virsh, agent)| Ok((is_up(&virsh, vm, agent)?, (virsh, agent)))) {
            Ok((true, _)) => return Ok(()),
            Ok((false, known)) => probe = Some(known),
            Err(error) => last = Some(error),
        }
        if Instant::now() >= deadline {
            let reason = last.map_or_else(|| "it runs, but does not come up".to_owned(), |e| format!("{e:#}"));
            bail!("guest {vm} is not up after {} s: {reason}", timeout.as_secs());
        }
        // Each question is a process; asking more often would slow down the very boot that is waited for.
        thread::sleep(Duration::from_millis(400));
    }
}

fn has_agent(virsh: &Virsh, vm: &VmName) -> Result<bool> {
    Ok(virsh.call(&["dumpxml", vm.as_str()])?.contains("org.qemu.guest_agent.0"))
}

/// With an agent: it answers. Without: the guest has written to its first disk, which it does when it has mounted it.
fn is_up(virsh: &Virsh, vm: &VmName, agent: bool) -> Result<bool> {
    if agent {
        match agent::ping(virsh, vm.as_str()) {
            Ok(()) => return Ok(true),
            // Not connected yet, or not answering yet; anything else, such as a guest that is gone, is an error.
            Err(error) if format!("{error:#}").contains("guest agent") => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    let Ok(stats) = virsh.call(&["domblkstat", vm.as_str(), "vda"]) else {
        // No disk: nothing can be seen from outside but that it runs.
        return virsh.call(&["domstate", vm.as_str()]).map(|state| state.trim() == "running");
    };
    let written = stats.lines().find_map(|l| l.split_once("wr_bytes")).and_then(|(_, n)| n.trim().parse::<u64>().ok());
    Ok(written.unwrap_or(0) > 0)
}

/// Stops a guest at once, undefines it wherever it is, and deletes those of its disks that the lab made.
pub fn remove(lab: &Lab, vm: &VmName) -> Result<()> {
    let places: Vec<VmStatus> = list(lab).into_iter().filter(|v| v.name == vm.as_str()).collect();
    if places.is_empty() {
        bail!("no host of lab {} has a guest {vm}", lab.name);
    }
    for place in places {
        let Some(host) = lab.hosts.iter().find(|h| h.name.as_str() == place.host) else { continue };
        let virsh = HostRef::new(lab, host).virsh();
        let disks = virsh.call(&["domblklist", vm.as_str(), "--details"])?;
        if place.state != "shut off" {
            virsh.call(&["destroy", vm.as_str()])?;
        }
        let keep_nothing = ["--managed-save", "--snapshots-metadata", "--checkpoints-metadata", "--nvram"];
        match virsh.call(&[&["undefine", vm.as_str()][..], &keep_nothing].concat()) {
            // A transient guest is gone with its end.
            Err(error) if !format!("{error:#}").contains("failed to get domain") => return Err(error),
            _ => delete_disks(lab, &disks),
        }
    }
    Ok(())
}

/// Deletes what `domblklist` named (columns: type, device, target, source) inside the lab's own storage.
fn delete_disks(lab: &Lab, listed: &str) {
    for line in listed.lines() {
        // The path is the last column and may hold blanks.
        let Some(at) = line.find('/') else { continue };
        let path = Path::new(line[at..].trim_end());
        if path.starts_with(Lab::var_dir(&lab.name)) {
            let _ = fs::remove_file(path);
        }
    }
}
