//! A VM's QEMU process: found for certain, killed, and its end confirmed.
//!
//! libvirt is not asked: its daemon may be blocked or gone when a VM must end. A process counts as a VM's only if its
//! command line carries the VM's UUID and it was seen so after its pidfd was opened, so a number that the kernel gave to
//! another process is never hit. A process whose pidfd has become readable has closed its files and has no request to a
//! disk on its way; one that SIGKILL does not end (it hangs in the kernel, on dead storage) is reported, not waited for.

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::Instant;
use uuid::Uuid;

/// Where libvirt keeps the pid files of its QEMUs.
pub const LIBVIRT_RUN_DIR: &str = "/run/libvirt/qemu";

/// A QEMU process, held by a descriptor.
#[derive(Debug)]
pub struct Qemu {
    /// The VM that it runs.
    pub vm: Uuid,
    /// Its process number, for people.
    pub pid: i32,
    fd: OwnedFd,
}

/// A process that is still there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// The VM that it runs.
    pub vm: Uuid,
    /// Its process number.
    pub pid: i32,
    /// Its state as the kernel shows it: `D` hangs in the kernel; `?` if it cannot be seen.
    pub state: char,
    /// Where in the kernel it waits, if that can be seen.
    pub waits_in: Option<String>,
}

impl std::fmt::Display for Survivor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QEMU {} of VM {} does not end on SIGKILL (state {}", self.pid, self.vm, self.state)?;
        match &self.waits_in {
            Some(place) => write!(f, ", waits in {place})"),
            None => f.write_str(")"),
        }
    }
}

/// Every QEMU of this host's libvirt, from its pid files in `run_dir` and, as those may be lost, from the process table.
/// Processes of other network namespaces (containers, other hosts of a lab) are not this host's.
pub fn find_all(run_dir: &Path) -> Vec<Qemu> {
    let mut pids = pid_files(run_dir);
    let own = network(std::process::id() as i32);
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // The network is looked at last: it is the dearest question.
    pids.extend(all.filter(|pid| vm_of(*pid).is_some() && network(*pid) == own));
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().filter_map(open).collect()
}

/// The QEMU processes of one VM: none, one, or more while an old one is ending.
pub fn find(run_dir: &Path, vm: Uuid) -> Vec<Qemu> {
    find_all(run_dir).into_iter().filter(|qemu| qemu.vm == vm).collect()
}

fn pid_files(run_dir: &Path) -> Vec<i32> {
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = entries.filter(|path: &PathBuf| path.extension().is_some_and(|extension| extension == "pid"));
    files.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok()).collect()
}

fn network(pid: i32) -> Option<(u64, u64)> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// The UUID on the command line of a process that is a QEMU.
fn vm_of(pid: i32) -> Option<Uuid> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    let program = words.next()?;
    if !program.windows(4).any(|part| part == b"qemu") && !program.ends_with(b"kvm") {
        return None;
    }
    words.find(|word| *word == b"-uuid")?;
    Uuid::try_parse_ascii(words.next()?).ok()
}

fn open(pid: i32) -> Option<Qemu> {
    let fd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
    let vm = vm_of(pid)?;
    Some(Qemu { vm, pid, fd })
}

impl Qemu {
    /// Whether it has ended, without waiting.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn survivor(&self) -> Survivor {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // The state follows the name, which is in parentheses and may hold anything.
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next()).unwrap_or('?');
        let place = fs::read_to_string(format!("/proc/{}/wchan", self.pid)).ok();
        let waits_in = place.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty() && text != "0");
        Survivor { vm: self.vm, pid: self.pid, state, waits_in }
    }
}

/// Kills processes and waits for their end, for at most `limit`. Those that are left: none means that no request of
/// theirs can reach a disk any more.
pub async fn kill(processes: Vec<Qemu>, limit: Duration) -> Vec<Survivor> {
    let deadline = Instant::now() + limit;
    for process in &processes {
        // A failure means that it has ended, which is looked at below.
        let _ = pidfd_send_signal(&process.fd, Signal::KILL);
    }
    let mut left = Vec::new();
    for process in processes {
        if !ended_by(&process, deadline).await {
            left.push(process.survivor());
        }
    }
    left
}

/// Kills every QEMU of the given VMs, looking again until none is found: one may have been starting meanwhile.
pub async fn kill_vms(run_dir: &Path, vms: &[Uuid], limit: Duration) -> Vec<Survivor> {
    let deadline = Instant::now() + limit;
    loop {
        let found: Vec<Qemu> =
            find_all(run_dir).into_iter().filter(|q| vms.contains(&q.vm) && !q.has_ended()).collect();
        if found.is_empty() {
            return Vec::new();
        }
        let left = kill(found, deadline.saturating_duration_since(Instant::now())).await;
        if !left.is_empty() || Instant::now() >= deadline {
            return left;
        }
    }
}

/// Looks again and again: registering a descriptor with the runtime takes `unsafe`, and an end comes within milliseconds.
async fn ended_by(process: &Qemu, deadline: Instant) -> bool {
    const PAUSE: Duration = Duration::from_millis(5);
    while !process.has_ended() {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(PAUSE).await;
    }
    true
}

/// The UUIDs of the VMs that have a process on this host now.
pub fn running(run_dir: &Path) -> BTreeMap<Uuid, i32> {
    find_all(run_dir).into_iter().filter(|qemu| !qemu.has_ended()).map(|qemu| (qemu.vm, qemu.pid)).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A real QEMU without a guest, as libvirt starts one.
    fn qemu(vm: Uuid) -> Child {
        Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "qemu-system-x86_64",
                "-name",
                "guest=x,debug-threads=on",
                "-S",
                "-M",
                "none",
            ])
            .args(["-uuid", &vm.to_string(), "-nodefaults", "-display", "none", "-monitor", "none"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64")
    }

    async fn appears(dir: &Path, vm: Uuid) -> Qemu {
        for _ in 0..600 {
            if let Some(found) = find(dir, vm).pop() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the QEMU of {vm} is not found");
    }

    #[tokio::test]
    async fn a_vms_process_is_found_killed_and_its_end_confirmed_and_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (Uuid::new_v4(), Uuid::new_v4());
        let (mut first, mut second) = (qemu(ours), qemu(other));
        let found = appears(dir.path(), ours).await;
        assert_eq!(found.pid, first.id() as i32);
        appears(dir.path(), other).await;
        assert!(!found.has_ended());
        assert_eq!(kill_vms(dir.path(), &[ours], Duration::from_secs(30)).await, vec![]);
        assert!(found.has_ended());
        assert!(running(dir.path()).contains_key(&other) && !running(dir.path()).contains_key(&ours));
        // Again: nothing to do.
        assert_eq!(kill_vms(dir.path(), &[ours], Duration::from_secs(1)).await, vec![]);
        let _ = second.kill();
        let _ = (first.wait(), second.wait());
    }

    #[tokio::test]
    async fn a_stopped_process_dies_as_well_and_a_stale_pid_file_kills_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let vm = Uuid::new_v4();
        let mut child = qemu(vm);
        let found = appears(dir.path(), vm).await;
        pidfd_send_signal(&found.fd, Signal::STOP).unwrap();
        // A pid file from before a reboot names a process that is something else now.
        let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(dir.path().join("web1.pid"), format!("{}\n", bystander.id())).unwrap();
        fs::write(dir.path().join("db1.pid"), "not a number").unwrap();
        assert_eq!(kill_vms(dir.path(), &[vm], Duration::from_secs(30)).await, vec![]);
        assert!(bystander.try_wait().unwrap().is_none(), "a bystander was killed");
        let _ = bystander.kill();
        let _ = (bystander.wait(), child.wait());
    }

    #[tokio::test]
    async fn what_does_not_end_in_time_is_reported() {
        // Nothing can be made to hang in the kernel here at will; no time at all shows the same answer.
        let dir = tempfile::tempdir().unwrap();
        let vm = Uuid::new_v4();
        let mut child = qemu(vm);
        let found = appears(dir.path(), vm).await;
        let survivor = found.survivor();
        assert_eq!((survivor.vm, survivor.pid), (vm, child.id() as i32));
        assert!(survivor.to_string().contains("does not end on SIGKILL"), "{survivor}");
        assert!(!ended_by(&found, Instant::now()).await);
        assert_eq!(kill(vec![found], Duration::from_secs(30)).await, vec![]);
        let _ = child.wait();
    }
}
