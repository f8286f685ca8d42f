//! Protected guests as the kernel shows them, and their end. libvirt is not asked: it may be blocked.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use tokio::runtime::Handle;
use virtward_decide::ha::{
    VmId,
    agent::{Ended, LocalVm},
};
use virtward_hypervisor::DomainEventKind;

use super::{Host, Input};
use crate::ha::{
    qemu::{self, Qemu},
    run::{Ha, Outside, Weight, clock},
};

/// How long the end of all guests is waited for before it is asked again.
const KILL_MAX: Duration = Duration::from_secs(3);
/// How long the end of a guest that is given up is waited for before that is said, and asked again.
const END_MAX: Duration = Duration::from_secs(20);
/// Kills at the same time: each may hang in the kernel.
const KILLS_MAX: usize = 8;

/// Below the run directory: processes whose vCPUs were never let go, one file each, named by VM, holding the process number.
const NEW: &str = "new";

/// Notes that a VM's process was made and its vCPUs do not run.
pub(super) fn mark_new(ha: &Ha, vm: VmId, pid: i32) -> std::io::Result<()> {
    let dir = ha.settings().run_dir.join(NEW);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join(vm.to_string()), pid.to_string())
}

/// Its vCPUs run.
pub(super) fn unmark_new(ha: &Ha, vm: VmId) {
    let _ = fs::remove_file(ha.settings().run_dir.join(NEW).join(vm.to_string()));
}

/// There is no such process any more.
pub(super) fn forget_new(ha: &Ha) {
    let _ = fs::remove_dir_all(ha.settings().run_dir.join(NEW));
}

fn is_new(ha: &Ha, qemu: &Qemu) -> bool {
    let file = ha.settings().run_dir.join(NEW).join(qemu.vm.to_string());
    fs::read_to_string(file).is_ok_and(|pid| pid.trim() == qemu.pid.to_string())
}

/// What an event of the hypervisor says about a guest's end.
pub(super) fn ended(kind: &DomainEventKind) -> Option<Ended> {
    let DomainEventKind::Stopped { detail } = kind else { return None };
    Some(match detail.as_str() {
        "shutdown" => Ended::ByGuest,
        "destroyed" | "saved" | "from-snapshot" => Ended::ByPerson,
        "migrated" => Ended::Migrated,
        _ => Ended::Crashed,
    })
}

/// Whether all writable disks of a process bypass the page cache, by its command line.
fn is_direct(pid: i32) -> bool {
    let Ok(line) = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")) else { return false };
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let mut pairs = words.iter().zip(words.iter().skip(1));
    // Before libvirt 6 disks were given otherwise.
    if words.iter().any(|word| *word == b"-drive") {
        return false;
    }
    pairs.all(|(option, value)| *option != b"-blockdev" || is_direct_node(value))
}

fn is_direct_node(text: &[u8]) -> bool {
    let Ok(node) = serde_json::from_slice::<serde_json::Value>(text) else { return false };
    // Only the node that the device is on says outright whether it may be written to.
    node["read-only"] != serde_json::Value::Bool(false) || node["cache"]["direct"] == serde_json::Value::Bool(true)
}

fn alive(ha: &Ha, is_protected: impl Fn(VmId) -> bool) -> BTreeMap<VmId, LocalVm> {
    let found = qemu::find_all(&ha.settings().qemu_dir);
    let guests = found.into_iter().filter(|qemu| is_protected(qemu.vm) && !qemu.has_ended());
    let look = |qemu: Qemu| {
        let never_ran = is_new(ha, &qemu);
        (qemu.vm, LocalVm { running: !never_ran, never_ran, direct: is_direct(qemu.pid) })
    };
    guests.map(look).collect()
}

impl Host {
    /// Looks which protected guests there are. While one look hangs, no other is begun, and nothing is known.
    pub(super) fn look(&mut self) {
        if std::mem::replace(&mut self.looking, true) {
            return;
        }
        let (ha, answers, protected) = (self.ha.clone(), self.send(), self.protected.clone());
        tokio::task::spawn_blocking(move || {
            let asked = clock::now();
            let alive = alive(&ha, |vm| protected.contains(&vm));
            let _ = answers.send(Input::Guests { asked, alive });
        });
    }

    /// Ends every protected guest, whatever libvirt thinks of it.
    pub(super) fn kill_all(&mut self) {
        let vms: Vec<VmId> = self.protected.iter().copied().collect();
        for (_, starting) in std::mem::take(&mut self.starting) {
            starting.task.abort();
        }
        let hook = self.ha.settings().hook();
        tokio::task::spawn_blocking(move || hook.forbid_all());
        self.kill(vms);
    }

    /// Ends one guest.
    pub(super) fn kill_one(&mut self, vm: VmId) {
        if let Some(starting) = self.starting.remove(&vm) {
            starting.task.abort();
        }
        let hook = self.ha.settings().hook();
        tokio::task::spawn_blocking(move || hook.forbid(vm));
        self.kill(vec![vm]);
    }

    fn kill(&mut self, vms: Vec<VmId>) {
        let Ok(permit) = self.kills.clone().try_acquire_owned() else { return };
        let (ha, answers, outside, protected) =
            (self.ha.clone(), self.send(), self.outside.clone(), self.protected.clone());
        let runtime = Handle::current();
        // Looking at processes can hang in the kernel as well.
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let left = runtime.block_on(qemu::kill_vms(&ha.settings().qemu_dir, &vms, KILL_MAX));
            for survivor in left {
                outside.say(Weight::Error, &survivor.to_string());
            }
            let asked = clock::now();
            let alive = alive(&ha, |vm| protected.contains(&vm));
            let _ = answers.send(Input::Guests { asked, alive });
        });
    }
}

/// Ends every process of a VM, for a start that comes after it.
pub(super) async fn end(ha: &Ha, vm: VmId, within: Duration) -> Result<(), String> {
    let (dir, runtime) = (ha.settings().qemu_dir.clone(), Handle::current());
    let left = tokio::task::spawn_blocking(move || runtime.block_on(qemu::kill_vms(&dir, &[vm], within))).await;
    match left {
        Ok(left) => left.first().map_or(Ok(()), |survivor| Err(survivor.to_string())),
        Err(error) => Err(error.to_string()),
    }
}

/// Ends a guest here so that another host starts it.
pub(super) async fn give_up(ha: &Ha, outside: &dyn Outside, vm: VmId, why: String, for_service: bool) {
    end_for_good(ha, outside, vm).await;
    let _ = ha.0.to_agent.send(Input::Relocate { vm, why, for_service });
}

/// Ends a guest here, which stays down.
pub(super) async fn stand_down(ha: &Ha, outside: &dyn Outside, vm: VmId, why: String) {
    end_for_good(ha, outside, vm).await;
    let _ = ha.0.to_agent.send(Input::StoodDown { vm, why });
}

/// Returns when its process is gone.
async fn end_for_good(ha: &Ha, outside: &dyn Outside, vm: VmId) {
    let answers = &ha.0.to_agent;
    // Told before, or its end would be taken for a crash and it started again here.
    let _ = answers.send(Input::GivingUp { vm });
    // It must not be said to have failed while its process may write.
    while let Err(error) = end(ha, vm, END_MAX).await {
        outside.say(Weight::Error, &error);
    }
}

/// The process of a VM.
pub(super) async fn process(ha: &Ha, vm: VmId) -> Option<i32> {
    let dir = ha.settings().qemu_dir.clone();
    tokio::task::spawn_blocking(move || qemu::running(&dir).get(&vm).copied()).await.ok().flatten()
}

/// A semaphore's worth of kills.
pub(super) fn kills() -> std::sync::Arc<tokio::sync::Semaphore> {
    std::sync::Arc::new(tokio::sync::Semaphore::new(KILLS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_counts_as_direct_only_if_its_node_says_so() {
        for (node, direct) in [
            (r#"{"node-name":"libvirt-1-format","read-only":false,"cache":{"direct":true,"no-flush":false}}"#, true),
            (r#"{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"x"}"#, false),
            (r#"{"node-name":"libvirt-1-format","read-only":false,"cache":{"direct":false}}"#, false),
            (r#"{"node-name":"libvirt-2-format","read-only":true,"driver":"raw","file":"x"}"#, true),
            (r#"{"driver":"file","filename":"/x","node-name":"libvirt-1-storage","auto-read-only":true}"#, true),
            ("driver=file,filename=/x", false),
        ] {
            assert_eq!(is_direct_node(node.as_bytes()), direct, "{node}");
        }
    }

    #[test]
    fn a_shutdown_is_the_guests_and_a_lost_process_a_crash() {
        let stopped = |detail: &str| ended(&DomainEventKind::Stopped { detail: detail.into() });
        assert_eq!(stopped("shutdown"), Some(Ended::ByGuest));
        assert_eq!(stopped("destroyed"), Some(Ended::ByPerson));
        assert_eq!(stopped("failed"), Some(Ended::Crashed));
        assert_eq!(ended(&DomainEventKind::Crashed), None);
    }
}
