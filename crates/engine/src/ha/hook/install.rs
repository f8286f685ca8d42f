//! Putting the hook where libvirt finds it, and taking it away.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{gone, write_whole};

/// The hook's file, below libvirt's directory of hooks.
pub const SCRIPT: &str = "qemu.d/50-virtward";
/// By this line a file is known as ours.
const MARK: &str = "# Written by virtward ha enable; removed by virtward ha disable.";

/// The unit of times in /proc, part of the kernel's interface.
const TICKS_PER_SECOND: f64 = 100.0;

/// What [`install`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installed {
    /// It is there now. libvirt looks for hooks when its daemon starts: see [`must_restart`].
    New,
    /// It was there as it should be.
    Unchanged,
}

/// Installs the hook below `hooks` (`/etc/libvirt/hooks`), to call `program` with `state`. Replaces a file of ours, never
/// one of others.
pub fn install(hooks: &Path, program: &Path, state: &Path) -> io::Result<Installed> {
    let path = hooks.join(SCRIPT);
    let script = script(program, state)?;
    match fs::read_to_string(&path) {
        Ok(there) if there == script => return Ok(Installed::Unchanged),
        Ok(there) if !there.contains(MARK) => {
            let why = format!("{} is not Virtward's; move it to another name first", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    write_whole(&path, script.as_bytes(), 0o755)?;
    Ok(Installed::New)
}

/// Whether the hook is installed.
pub fn is_installed(hooks: &Path) -> bool {
    fs::read_to_string(hooks.join(SCRIPT)).is_ok_and(|there| there.contains(MARK))
}

/// Removes the hook if it is ours. Hooks of others, and directories that they are in, stay.
pub fn remove(hooks: &Path) -> io::Result<()> {
    if is_installed(hooks) {
        gone(fs::remove_file(hooks.join(SCRIPT)))?;
    }
    Ok(())
}

/// The script. Without the program (a package was removed by hand) it protects by itself: what is listed does not start.
fn script(program: &Path, state: &Path) -> io::Result<String> {
    let quoted = |path: &Path| {
        let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
        let why =
            || io::Error::new(io::ErrorKind::InvalidInput, format!("{} cannot stand in a script", path.display()));
        text.map(|text| format!("'{}'", text.replace('\'', r"'\''"))).ok_or_else(why)
    };
    let (program, state) = (quoted(program)?, quoted(state)?);
    Ok(format!(
        "#!/bin/sh\n\
         # libvirt asks before it starts a VM: those that high availability protects start only when claimed.\n\
         {MARK}\n\
         program={program}\n\
         state={state}\n\
         [ -x \"$program\" ] && exec \"$program\" hook qemu --state \"$state\" -- \"$@\"\n\
         case $2 in prepare | start | migrate | restore | attach) ;; *) exit 0 ;; esac\n\
         uuid=$(sed -n 's,.*<uuid>\\([0-9a-f-]*\\)</uuid>.*,\\1,p' | head -n 1)\n\
         if [ -n \"$uuid\" ] && [ -e \"$state/protected/$uuid\" ]; then\n\
         \x20   echo \"$1 is protected by Virtward, and $program is gone; it is not started, as another host may run it\" >&2\n\
         \x20   exit 1\n\
         fi\n\
         exit 0\n"
    ))
}

/// Whether a libvirt daemon runs that started before the hook was there and so never asks it. `pid_files` are those of
/// `libvirtd` and `virtqemud`.
pub fn must_restart(hooks: &Path, pid_files: &[PathBuf]) -> bool {
    let Ok(installed) = fs::metadata(hooks.join(SCRIPT)).and_then(|meta| meta.modified()) else { return false };
    let pids = pid_files.iter().filter_map(|file| fs::read_to_string(file).ok()?.trim().parse::<i32>().ok());
    pids.filter_map(started).any(|at| at < installed)
}

/// When a process started, by the kernel's count of ticks since boot.
fn started(pid: i32) -> Option<SystemTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The fields after the name, which is in parentheses and may hold anything; the start is the 22nd of all.
    let ticks: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let up = Duration::from_millis(super::boottime_ms());
    let age = up.checked_sub(Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND))?;
    SystemTime::now().checked_sub(age)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, process::Command};

    use super::*;

    #[test]
    fn hooks_of_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (hooks, state) = (dir.path(), Path::new("/var/lib/it's/ha"));
        fs::write(hooks.join("qemu"), "#!/bin/sh\nexit 0\n").unwrap();
        let program = Path::new("/usr/local/bin/virtward");
        assert_eq!(install(hooks, program, state).unwrap(), Installed::New);
        assert_eq!(install(hooks, program, state).unwrap(), Installed::Unchanged);
        assert_eq!(install(hooks, Path::new("/usr/bin/virtward"), state).unwrap(), Installed::New);
        assert!(is_installed(hooks));
        remove(hooks).unwrap();
        remove(hooks).unwrap();
        assert!(!is_installed(hooks) && hooks.join("qemu").exists());
        fs::write(hooks.join(SCRIPT), "#!/bin/sh\n# somebody's\n").unwrap();
        let why = install(hooks, program, state).unwrap_err();
        assert!(why.to_string().contains("is not Virtward's"), "{why}");
        remove(hooks).unwrap();
        assert!(hooks.join(SCRIPT).exists());
        assert!(install(hooks, Path::new("/bin/a\nb"), state).is_err());
    }

    #[test]
    fn without_the_program_the_script_still_protects() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("it's");
        fs::create_dir_all(state.join("protected")).unwrap();
        let vm = uuid::Uuid::new_v4();
        fs::write(state.join("protected").join(vm.to_string()), "{}").unwrap();
        install(dir.path(), Path::new("/nonexistent/virtward"), &state).unwrap();
        let ask = |operation: &str, vm: uuid::Uuid| {
            let mut child = Command::new("sh")
                .arg(dir.path().join(SCRIPT))
                .args(["web1", operation, "begin", "-"])
                .stdin(std::process::Stdio::piped())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            let xml = format!("<domain>\n  <name>web1</name>\n  <uuid>{vm}</uuid>\n</domain>\n");
            let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
            child.wait().unwrap().success()
        };
        assert!(!ask("prepare", vm));
        assert!(ask("stopped", vm));
        assert!(ask("prepare", uuid::Uuid::new_v4()));
    }

    #[test]
    fn a_daemon_that_is_older_than_the_hook_must_be_restarted() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = [dir.path().join("libvirtd.pid")];
        fs::write(&pid_file[0], format!("{}\n", std::process::id())).unwrap();
        assert!(!must_restart(dir.path(), &pid_file), "no hook");
        install(dir.path(), Path::new("/bin/true"), dir.path()).unwrap();
        let script = fs::File::options().append(true).open(dir.path().join(SCRIPT)).unwrap();
        script.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
        assert!(must_restart(dir.path(), &pid_file));
        script.set_modified(SystemTime::now() - Duration::from_secs(365 * 86_400)).unwrap();
        assert!(!must_restart(dir.path(), &pid_file));
    }
}
