//! libvirt's hook for QEMU: libvirt asks before it starts a VM, and a protected VM starts only if its start was claimed.
//!
//! Without it a host that boots again, or an administrator's `virsh start`, would run a VM that another host runs. The
//! hook answers from files alone: the list of protected VMs and the permits that the daemon writes just before it starts
//! one. So it is quick, calls no libvirt (which would wait for itself), and is right while the daemon is down: without
//! permits no protected VM starts, and all others do.
//!
//! ```text
//! STATE/protected/UUID   {"name","autostart"}: the VM is protected; whether it started with its host before
//! STATE/permits/UUID     {"boot","until_ms","generation","incoming"}: it may be started here until then
//! ```
//!
//! A permit ends by the clock of this boot (CLOCK_BOOTTIME): whoever writes one gives it no longer than this host's own
//! right to run VMs, so a permit that a dead daemon left is no danger.
//!
//! Installed beside hooks that exist (libvirt runs every file of `qemu.d`), never over one.

mod install;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use install::{Installed, SCRIPT, install, is_installed, must_restart, remove};

/// The most that is read of a domain's XML.
pub const XML_BYTES: u64 = 4 << 20;
/// The most that is read of a file of ours.
const FILE_BYTES: u64 = 64 << 10;

/// What is remembered of a protected VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protected {
    /// Its name when it was protected, for messages and for XML that cannot be read.
    pub name: String,
    /// Whether libvirt started it with its host before; put back when protection ends.
    #[serde(default)]
    pub autostart: bool,
}

/// Leave to start a VM here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    /// The boot in which it is valid.
    pub boot: String,
    /// Until when, in milliseconds of CLOCK_BOOTTIME.
    pub until_ms: u64,
    /// The generation that was claimed.
    pub generation: u64,
    /// Whether the VM may come in by a migration. A start is allowed as well: libvirt asks for both.
    pub incoming: bool,
}

/// Files of the hook.
#[derive(Clone, Debug)]
pub struct Hook {
    state: PathBuf,
    boot_id: PathBuf,
}

impl Hook {
    /// Over the directory of high availability's state on this host.
    pub fn new(state: &Path) -> Self {
        Self { state: state.to_owned(), boot_id: "/proc/sys/kernel/random/boot_id".into() }
    }

    fn protected_file(&self, vm: Uuid) -> PathBuf {
        self.state.join("protected").join(vm.to_string())
    }

    fn permit_file(&self, vm: Uuid) -> PathBuf {
        self.state.join("permits").join(vm.to_string())
    }

    /// Every protected VM. Files that are damaged count: what they protect is in their name.
    pub fn protected(&self) -> io::Result<Vec<(Uuid, Protected)>> {
        let entries = match fs::read_dir(self.state.join("protected")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let Some(vm) = path.file_name().and_then(|name| Uuid::try_parse(name.to_str()?).ok()) else { continue };
            let nameless = || Protected { name: String::new(), autostart: false };
            all.push((vm, read_json(&path).unwrap_or_else(|_| nameless())));
        }
        Ok(all)
    }

    /// Protects a VM: from now on it starts only with a permit. Durable when this returns. What was remembered of it
    /// before is kept, so that protecting twice does not forget its autostart.
    pub fn protect(&self, vm: Uuid, protected: &Protected) -> io::Result<()> {
        let autostart = read_json::<Protected>(&self.protected_file(vm)).is_ok_and(|before| before.autostart);
        let protected = Protected { name: protected.name.clone(), autostart: autostart || protected.autostart };
        write_json(&self.protected_file(vm), &protected)
    }

    /// Ends the protection; what was remembered, for whoever puts the autostart back.
    pub fn unprotect(&self, vm: Uuid) -> io::Result<Option<Protected>> {
        self.forbid(vm)?;
        let path = self.protected_file(vm);
        let before = read_json(&path).ok();
        gone(fs::remove_file(path))?;
        Ok(before)
    }

    /// Lets a VM start here for `valid` from now.
    pub fn permit(&self, vm: Uuid, generation: u64, incoming: bool, valid: Duration) -> io::Result<()> {
        let until_ms = boottime_ms() + valid.as_millis() as u64;
        write_json(&self.permit_file(vm), &Permit { boot: self.boot()?, until_ms, generation, incoming })
    }

    /// Takes a permit back.
    pub fn forbid(&self, vm: Uuid) -> io::Result<()> {
        gone(fs::remove_file(self.permit_file(vm)))
    }

    /// Takes every permit back: at the start of a daemon, and when this host loses its right.
    pub fn forbid_all(&self) -> io::Result<()> {
        gone(fs::remove_dir_all(self.state.join("permits")))
    }

    fn boot(&self) -> io::Result<String> {
        fs::read_to_string(&self.boot_id).map(|text| text.trim().to_owned())
    }

    /// Answers libvirt's question: `name`, `operation` and `sub` are the hook's arguments, `xml` reads its standard input
    /// and is called only if it is needed. An error is the reason for refusing.
    pub fn judge(&self, name: &str, operation: &str, xml: impl FnOnce() -> String) -> Result<(), String> {
        if !matches!(operation, "prepare" | "start" | "migrate" | "restore" | "attach") {
            return Ok(());
        }
        let protected = self.protected().map_err(|error| {
            format!(
                "Virtward cannot read which VMs are protected ({}: {error}), so {name} is not started",
                self.state.display()
            )
        })?;
        if protected.is_empty() {
            return Ok(());
        }
        let xml = xml();
        let vm = match uuid_of(&xml) {
            Some(vm) => protected.iter().find(|(id, _)| *id == vm),
            None => protected.iter().find(|(_, about)| about.name == name),
        };
        let Some((vm, _)) = vm else { return Ok(()) };
        self.permitted(*vm, operation).map_err(|why| {
            let instead = if operation == "migrate" { "virtward vm migrate" } else { "virtward ha start" };
            format!(
                "Virtward refuses to {} {name}: it is protected by high availability, and {why}. Another host may run it. \
                 Use: {instead} {name}; or take it out of protection: virtward ha disable {name}",
                if operation == "migrate" { "let in" } else { "start" },
            )
        })
    }

    fn permitted(&self, vm: Uuid, operation: &str) -> Result<(), String> {
        let permit: Permit = match read_json(&self.permit_file(vm)) {
            Ok(permit) => permit,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err("this start was not claimed".into()),
            Err(error) => return Err(format!("its permit cannot be read ({error})")),
        };
        if self.boot().ok().as_deref() != Some(permit.boot.as_str()) {
            return Err("its permit is from before this host booted".into());
        }
        if boottime_ms() >= permit.until_ms {
            return Err("its permit has run out (is the daemon running?)".into());
        }
        if operation == "migrate" && !permit.incoming {
            return Err("this migration was not announced".into());
        }
        Ok(())
    }
}

/// Milliseconds of this boot, suspends included.
fn boottime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// The UUID of a domain. Not a parse of the whole: the XML may be cut, and holds an element `uuid` right at its beginning.
fn uuid_of(xml: &str) -> Option<Uuid> {
    let start = xml.find("<domain")?;
    let value = xml[start..].split_once("<uuid>")?.1.split_once("</uuid>")?.0;
    Uuid::try_parse(value.trim()).ok()
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(fs::File::open(path)?, FILE_BYTES), &mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Replaces a file so that a reader sees the old or the new content, and a power cut leaves one of them.
fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_whole(path, &serde_json::to_vec(value)?, 0o600)
}

fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
    io::Write::write_all(&mut file, content)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: Uuid = Uuid::from_u128(0x6a1f_0b6e_9d3c_4f0a_8c3e_5b7d_2f4a_1c9e);

    fn hook() -> (tempfile::TempDir, Hook) {
        let dir = tempfile::tempdir().unwrap();
        let hook = Hook::new(&dir.path().join("ha"));
        (dir, hook)
    }

    fn xml(vm: Uuid) -> String {
        format!(
            "<domain type='qemu' id='3'>\n  <name>web1</name>\n  <uuid>{vm}</uuid>\n  <metadata><uuid>no</uuid></metadata>"
        )
    }

    fn web1(autostart: bool) -> Protected {
        Protected { name: "web1".into(), autostart }
    }

    #[test]
    fn a_protected_vm_starts_with_a_permit_only_and_others_start_always() {
        let (_dir, hook) = hook();
        let start = || hook.judge("web1", "prepare", || xml(VM));
        start().unwrap();
        hook.protect(VM, &web1(true)).unwrap();
        let why = start().unwrap_err();
        assert!(why.contains("not claimed") && why.contains("virtward ha disable web1"), "{why}");
        hook.judge("db1", "prepare", || xml(Uuid::from_u128(5))).unwrap();
        // Ends, reconnects and migrations out are nobody's business.
        for operation in ["started", "stopped", "release", "reconnect"] {
            hook.judge("web1", operation, || panic!("{operation} needs no XML")).unwrap();
        }
        hook.permit(VM, 4, false, Duration::from_secs(60)).unwrap();
        start().unwrap();
        hook.judge("web1", "start", || xml(VM)).unwrap();
        assert!(hook.judge("web1", "migrate", || xml(VM)).unwrap_err().contains("not announced"));
        hook.permit(VM, 4, true, Duration::from_secs(60)).unwrap();
        hook.judge("web1", "migrate", || xml(VM)).unwrap();
        hook.forbid(VM).unwrap();
        assert!(start().is_err());
        hook.forbid(VM).unwrap();
    }

    #[test]
    fn a_permit_ends_with_its_time_and_with_the_boot() {
        let (dir, mut hook) = hook();
        hook.protect(VM, &web1(false)).unwrap();
        hook.permit(VM, 4, false, Duration::ZERO).unwrap();
        assert!(hook.judge("web1", "start", || xml(VM)).unwrap_err().contains("run out"));
        hook.permit(VM, 4, false, Duration::from_secs(60)).unwrap();
        hook.boot_id = dir.path().join("boot");
        fs::write(&hook.boot_id, "another\n").unwrap();
        assert!(hook.judge("web1", "start", || xml(VM)).unwrap_err().contains("before this host booted"));
        hook.permit(VM, 4, false, Duration::from_secs(60)).unwrap();
        hook.judge("web1", "start", || xml(VM)).unwrap();
        hook.forbid_all().unwrap();
        assert!(hook.judge("web1", "start", || xml(VM)).is_err());
    }

    #[test]
    fn damage_protects() {
        let (_dir, hook) = hook();
        hook.protect(VM, &web1(true)).unwrap();
        hook.permit(VM, 4, false, Duration::from_secs(60)).unwrap();
        fs::write(hook.permit_file(VM), "{").unwrap();
        assert!(hook.judge("web1", "start", || xml(VM)).unwrap_err().contains("cannot be read"));
        // No UUID to be seen: its name is enough to be careful.
        assert!(hook.judge("web1", "start", || "<domain>".into()).is_err());
        hook.judge("db1", "start", String::new).unwrap();
        fs::write(hook.protected_file(VM), "").unwrap();
        assert!(hook.judge("web1", "start", || xml(VM)).is_err());
        // Where the list itself cannot be read, nothing is known.
        fs::remove_dir_all(hook.state.join("protected")).unwrap();
        fs::write(hook.state.join("protected"), "").unwrap();
        assert!(hook.judge("db1", "start", String::new).unwrap_err().contains("cannot read"));
    }

    #[test]
    fn autostart_is_remembered_once() {
        let (_dir, hook) = hook();
        hook.protect(VM, &web1(true)).unwrap();
        // Again, now that it is off.
        hook.protect(VM, &web1(false)).unwrap();
        assert_eq!(hook.protected().unwrap(), [(VM, web1(true))]);
        assert_eq!(hook.unprotect(VM).unwrap(), Some(web1(true)));
        assert_eq!(hook.unprotect(VM).unwrap(), None);
        hook.judge("web1", "start", || xml(VM)).unwrap();
    }
}
