//! Which disks of a VM belong into a restore point. Pure.

use virtward_model::{Disk, DiskDevice, DiskSource, Vm};

use crate::{Error, Result};

/// The disks to back up, and the others as `target: reason`.
pub(super) fn select(vm: &Vm, only: &[String], exclude: &[String]) -> Result<(Vec<Disk>, Vec<String>)> {
    for asked in only.iter().chain(exclude) {
        if !vm.disks.iter().any(|disk| &disk.target == asked) {
            let known: Vec<&str> = vm.disks.iter().map(|disk| disk.target.as_str()).collect();
            return Err(Error::NotFound(format!("{} has no disk {asked}; it has {}", vm.name, known.join(", "))));
        }
    }
    for disk in vm.disks.iter().filter(|disk| only.contains(&disk.target)) {
        if let Some(reason) = holds_no_state(disk) {
            return Err(Error::Refused(format!(
                "disk {} of {} cannot be backed up ({reason}); leave out --disk {}",
                disk.target, vm.name, disk.target
            )));
        }
    }
    let mut chosen = Vec::new();
    let mut skipped = Vec::new();
    for disk in &vm.disks {
        match reason_to_skip(disk, only, exclude) {
            Some(reason) => skipped.push(format!("{}: {reason}", disk.target)),
            None => chosen.push(disk.clone()),
        }
    }
    Ok((chosen, skipped))
}

fn reason_to_skip(disk: &Disk, only: &[String], exclude: &[String]) -> Option<&'static str> {
    holds_no_state(disk).or_else(|| {
        let left_out = exclude.contains(&disk.target) || (!only.is_empty() && !only.contains(&disk.target));
        left_out.then_some("left out by request")
    })
}

fn holds_no_state(disk: &Disk) -> Option<&'static str> {
    match (disk.device, &disk.source) {
        (DiskDevice::Cdrom, _) => Some("CD-ROM"),
        (DiskDevice::Floppy, _) => Some("floppy"),
        (DiskDevice::Lun, _) => Some("SCSI LUN passed through; QEMU cannot read it for a backup"),
        (_, DiskSource::None) => Some("empty drive"),
        _ if disk.transient => Some("transient: its content is not meant to last"),
        _ if disk.read_only => Some("read-only"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use virtward_model::VmState;

    use super::*;

    fn vm() -> Vm {
        let disk = |target: &str| Disk {
            target: target.into(),
            device: DiskDevice::Disk,
            format: "qcow2".into(),
            source: DiskSource::File { path: format!("/images/{target}") },
            read_only: false,
            shareable: false,
            transient: false,
            backing: Vec::new(),
        };
        let mut cdrom = disk("sda");
        cdrom.device = DiskDevice::Cdrom;
        let mut seed = disk("vdc");
        seed.read_only = true;
        let disks = vec![disk("vda"), disk("vdb"), seed, cdrom];
        Vm { name: "web1".into(), uuid: Uuid::nil(), state: VmState::Running, disks }
    }

    #[test]
    fn what_holds_no_state_is_skipped_and_named() {
        let (chosen, skipped) = select(&vm(), &[], &[]).unwrap();
        assert_eq!(chosen.iter().map(|disk| disk.target.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
        assert_eq!(skipped, ["vdc: read-only", "sda: CD-ROM"]);
    }

    #[test]
    fn a_choice_is_honoured_and_a_typo_is_an_error() {
        let (chosen, skipped) = select(&vm(), &["vdb".into()], &[]).unwrap();
        assert_eq!((chosen[0].target.as_str(), chosen.len()), ("vdb", 1));
        assert_eq!(skipped[0], "vda: left out by request");
        let error = select(&vm(), &[], &["vdx".into()]).unwrap_err().to_string();
        assert_eq!(error, "web1 has no disk vdx; it has vda, vdb, vdc, sda");
        let error = select(&vm(), &["sda".into()], &[]).unwrap_err().to_string();
        assert!(error.contains("sda of web1 cannot be backed up (CD-ROM)"), "{error}");
    }
}
