//! The shared storage stops answering one host: what its guests read and write directly waits in the kernel, as it does
//! when an array or a switch port goes away. Processes that wait so do not end, not even on SIGKILL.
//!
//! Done by the kernel's limits of block I/O for a control group, at one byte a second. It meets the QEMU processes that
//! run at that moment: the rest of a host shares its disk with this machine. Buffered I/O is not met.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    host::HostRef,
    names::{HostName, LabName},
    run::wait_until,
};

/// Where control groups with limits of block I/O can be made: version 1, or version 2.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup/blkio", "/sys/fs/cgroup"];

fn group(root: &str, lab: &LabName, host: &HostName) -> PathBuf {
    Path::new(root).join(format!("virtward-lab.{lab}.{host}"))
}

/// Whether the shared storage does not answer the host.
pub fn is_stalled(lab: &LabName, host: &HostName) -> bool {
    ROOTS.iter().any(|root| group(root, lab, host).exists())
}

/// Stops answering the guests that run on the host.
pub fn stall(at: HostRef<'_>) -> Result<()> {
    let dir = at.lab.shared_dir();
    let device = whole_device(&dir)?;
    let root = ROOTS.into_iter().find(|root| {
        *root == ROOTS[0] && Path::new(root).is_dir() || Path::new(root).join("cgroup.controllers").is_file()
    });
    let root = root.context("this kernel has no limits of block I/O (cgroup blkio or io)")?;
    let group = group(root, &at.lab.name, &at.host.name);
    if root == ROOTS[1] {
        let enable = Path::new(root).join("cgroup.subtree_control");
        fs::write(&enable, "+io")
            .with_context(|| format!("cannot enable the io controller in {}", enable.display()))?;
    }
    match fs::create_dir(&group) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {}", group.display()));
        }
        _ => {}
    }
    limit(root, &group, &device, true)?;
    let mut met = 0;
    for pid in at.members().pids() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.starts_with("qemu-system") {
            // One that has just ended needs no stall.
            met += usize::from(fs::write(group.join("cgroup.procs"), pid.to_string()).is_ok());
        }
    }
    if met == 0 {
        heal(&at.lab.name, &at.host.name)?;
        bail!("no guest runs on host {}; a stall meets running guests", at.host.name);
    }
    Ok(())
}

/// Answers again. Does nothing when it answered.
pub fn heal(lab: &LabName, host: &HostName) -> Result<()> {
    for root in ROOTS {
        let group = group(root, lab, host);
        if !group.is_dir() {
            continue;
        }
        for device in limited(&group) {
            limit(root, &group, &device, false)?;
        }
        // A group ends when it is empty.
        let removed = wait_until(Duration::from_secs(20), || {
            for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
                let _ = fs::write(Path::new(root).join("cgroup.procs"), pid);
            }
            fs::remove_dir(&group).is_ok()
        });
        if !removed {
            bail!("cannot remove {}", group.display());
        }
    }
    Ok(())
}

fn limit(root: &str, group: &Path, device: &str, stalled: bool) -> Result<()> {
    let lines: Vec<(&str, String)> = match (root == ROOTS[0], stalled) {
        (true, _) => ["blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"]
            .map(|file| (file, format!("{device} {}", u8::from(stalled))))
            .into(),
        (false, true) => vec![("io.max", format!("{device} rbps=1 wbps=1"))],
        (false, false) => vec![("io.max", format!("{device} rbps=max wbps=max"))],
    };
    for (file, line) in lines {
        let path = group.join(file);
        fs::write(&path, &line).with_context(|| format!("cannot write {line:?} to {}", path.display()))?;
    }
    Ok(())
}

/// The devices that a group limits.
fn limited(group: &Path) -> Vec<String> {
    let files = ["blkio.throttle.write_bps_device", "io.max"].map(|file| fs::read_to_string(group.join(file)));
    let lines = files.into_iter().flatten().flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    lines.filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
}

/// `major:minor` of the disk that holds a directory.
fn whole_device(dir: &Path) -> Result<String> {
    let id = fs::metadata(dir).with_context(|| format!("cannot look at {}", dir.display()))?.dev();
    let (major, minor) = (rustix::fs::major(id), rustix::fs::minor(id));
    let about = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if !about.exists() {
        bail!("{} is not on a block device of its own, so it cannot be stalled", dir.display());
    }
    if !about.join("partition").exists() {
        return Ok(format!("{major}:{minor}"));
    }
    let disk = fs::canonicalize(&about).context("cannot follow the partition")?;
    let parent = disk.parent().context("a partition without a disk")?;
    Ok(fs::read_to_string(parent.join("dev")).context("cannot read the disk's number")?.trim().to_owned())
}
