//! One host: its namespaces, its libvirtd, its power.
//!
//! A host lives as long as its keeper, a process that holds the mount and UTS namespaces and does nothing else. All
//! mounts are made inside the keeper's namespace, so the machine never sees them and they end with the last process of
//! the host; nothing has to be unmounted. The network namespace has a name and outlives a power cut, as a cable does.

use std::{
    convert::Infallible,
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount},
    process::Signal,
};

use crate::{
    capabilities,
    cli::LibvirtdAction,
    daemon, etcd, net,
    proc::{Membership, netns_path},
    run::{self, wait_until},
    state::{Host, Lab, write_atomically},
    virsh::Virsh,
};

/// How long libvirtd may take to end when told so, before it is killed.
const LIBVIRTD_STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Where libvirt lets swtpm log, on systems that have it.
const SWTPM_LOG: &str = "/var/log/swtpm";

/// What of a host is private, by the name it has below the host's directories.
const PRIVATE_DIRS: [(&str, &str); 4] = [
    ("lib", "/var/lib/libvirt"),
    ("etc", "/etc/libvirt"),
    ("log", "/var/log/libvirt"),
    ("cache", "/var/cache/libvirt"),
];

/// A host of a lab and what can be done with it.
#[derive(Clone, Copy, Debug)]
pub struct HostRef<'a> {
    /// The lab.
    pub lab: &'a Lab,
    /// The host.
    pub host: &'a Host,
}

impl<'a> HostRef<'a> {
    /// The host `host` of `lab`.
    pub fn new(lab: &'a Lab, host: &'a Host) -> Self {
        Self { lab, host }
    }

    /// The host's processes.
    pub fn members(self) -> Membership {
        Membership::new(&self.lab.name, &self.host.name, &self.lab.netns(self.host))
    }

    /// The keeper's process, when the host has power.
    pub fn keeper(self) -> Option<i32> {
        self.members().pid_in_file(&self.lab.host_run_dir(self.host).join("keeper.pid"))
    }

    /// The process of the host's libvirtd, when it runs.
    pub fn libvirtd(self) -> Option<i32> {
        self.members().pid_in_file(&self.lab.host_run_dir(self.host).join("libvirt/libvirtd.pid"))
    }

    /// Writes the host's directories and configuration. Done once; what libvirt adds later stays, as on a disk.
    pub fn prepare(self) -> Result<()> {
        let (run_dir, var_dir) = (self.lab.host_run_dir(self.host), self.lab.host_var_dir(self.host));
        let dirs = PRIVATE_DIRS.iter().map(|(name, _)| var_dir.join(name));
        // libvirtd does not start if a directory that its configuration names is not there.
        let named = [run_dir.join("libvirt"), self.lab.local_dir(self.host), daemon::migration_certificates(self)];
        for dir in dirs.chain(named) {
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        capabilities::seed(&var_dir.join("cache"), self.lab.root.as_deref());
        write_atomically(&var_dir.join("etc/libvirtd.conf"), self.libvirtd_conf().as_bytes())?;
        write_atomically(&var_dir.join("etc/qemu.conf"), self.qemu_conf().as_bytes())
    }

    fn libvirtd_conf(self) -> String {
        format!(
            "# A lab: no authentication, on a network that only this machine reaches.\n\
             host_uuid = \"{}\"\n\
             listen_tls = 0\nlisten_tcp = 1\nlisten_addr = \"0.0.0.0\"\nauth_tcp = \"none\"\n\
             auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
             max_clients = 500\n\
             log_outputs = \"3:file:/var/log/libvirt/libvirtd.log\"\n",
            self.host.uuid
        )
    }

    fn qemu_conf(self) -> String {
        format!(
            "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\ncgroup_controllers = []\n\
             namespaces = []\nstdio_handler = \"file\"\nremember_owner = 0\n\
             migrate_tls_x509_cert_dir = {:?}\nmigrate_tls_x509_verify = 1\n\
             shared_filesystems = [ \"{}\" ]\n",
            crate::daemon::migration_certificates(self),
            self.lab.shared_dir().display()
        )
    }

    /// Gives the host power: keeper, libvirtd, etcd member.
    pub fn power_on(self) -> Result<()> {
        // What a real host keeps in /run does not outlive a power cut.
        let run_dir = self.lab.host_run_dir(self.host);
        clear_directory(&run_dir.join("libvirt"))?;
        write_atomically(&run_dir.join("boot-id"), format!("{}\n", uuid::Uuid::new_v4()).as_bytes())?;
        self.start_keeper()?;
        net::set_port(self.lab, self.host, true)?;
        if self.lab.etcd.contains(&self.host.name) {
            etcd::start_member(self)?;
        }
        self.start_libvirtd()?;
        // While `up` is at work, the daemons come when all hosts are there.
        if self.lab.complete && self.lab.daemon.is_some() { daemon::start(self) } else { Ok(()) }
    }

    /// Takes the power away: everything in the host ends at once, and its cable is dead.
    pub fn power_off(self) -> Result<()> {
        self.members().kill_all()?;
        net::set_port(self.lab, self.host, false)
    }

    fn start_keeper(self) -> Result<()> {
        let own = std::env::current_exe().context("cannot find this program's own file")?;
        let (lab, host) = (self.lab.name.as_str(), self.host.name.as_str());
        let mut keeper = Command::new("nsenter")
            .arg(format!("--net={}", netns_path(&self.lab.netns(self.host)).display()))
            .args(["unshare", "--mount", "--uts", "--propagation", "slave", "--"])
            .arg(own)
            .args(["host-init", host, "--name", lab])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run nsenter (package util-linux)")?;
        let mut ended = None;
        let up = wait_until(Duration::from_secs(20), || {
            ended = keeper.try_wait().ok().flatten();
            ended.is_some() || self.keeper().is_some()
        });
        if up && ended.is_none() {
            return Ok(());
        }
        let mut reason = String::new();
        let _ = keeper.kill();
        let _ = keeper.wait();
        if let Some(mut pipe) = keeper.stderr.take() {
            let _ = pipe.read_to_string(&mut reason);
        }
        bail!("host {host} of lab {lab} does not start: {}", reason.trim());
    }

    /// A command that runs inside the host.
    pub fn command(self, program: &str) -> Result<Command> {
        let Some(keeper) = self.keeper() else {
            bail!("host {0} has no power; switch it on with: virtward-lab host power on {0}", self.host.name);
        };
        let mut command = Command::new("nsenter");
        command.args(["-t", &keeper.to_string(), "-m", "-u", "-n"]);
        // The root file system is the machine's, so the working directory means the same inside.
        if let Ok(dir) = std::env::current_dir() {
            command.arg(format!("--wdns={}", dir.display()));
        }
        command.arg("--").arg(program);
        Ok(command)
    }

    /// Replaces this process by a command in the host.
    pub fn exec(self, words: &[String]) -> Result<Infallible> {
        let (program, args) = words.split_first().context("no command given")?;
        let error = self.command(program)?.args(args).exec();
        Err(error).context("cannot run nsenter (package util-linux)")
    }

    /// Starts libvirtd and waits until it answers.
    pub fn start_libvirtd(self) -> Result<()> {
        if self.libvirtd().is_some() {
            return Ok(());
        }
        let mut command = self.command("libvirtd")?;
        command.args(["-d", "-l", "-p", "/run/libvirt/libvirtd.pid"]).current_dir("/");
        run::output_of(&mut command, None, run::TOOL_TIMEOUT).with_context(|| {
            let log = self.lab.host_var_dir(self.host).join("log/libvirtd.log");
            format!("libvirtd of host {} does not start (its log is {})", self.host.name, log.display())
        })?;
        // The first question makes libvirt probe its emulators, which takes a while; better here than in a test.
        self.virsh().call(&["capabilities"])?;
        capabilities::keep(&self.lab.host_var_dir(self.host).join("cache"), self.lab.root.as_deref());
        Ok(())
    }

    /// The host's libvirt.
    pub fn virsh(self) -> Virsh {
        Virsh::new(self.lab.uri(self.host))
    }

    /// Starts, stops, restarts or kills libvirtd; guests go on.
    pub fn libvirtd_action(self, action: LibvirtdAction) -> Result<()> {
        match action {
            LibvirtdAction::Start => self.start_libvirtd(),
            LibvirtdAction::Stop => self.stop_libvirtd(Signal::TERM),
            LibvirtdAction::Kill => self.stop_libvirtd(Signal::KILL),
            LibvirtdAction::Restart => {
                self.stop_libvirtd(Signal::TERM)?;
                self.start_libvirtd()
            }
        }
    }

    fn stop_libvirtd(self, signal: Signal) -> Result<()> {
        let Some(pid) = self.libvirtd() else { return Ok(()) };
        let members = self.members();
        members.signal(pid, signal);
        if wait_until(LIBVIRTD_STOP_TIMEOUT, || self.libvirtd() != Some(pid)) {
            return Ok(());
        }
        // libvirtd can wait for ever for one of its own threads; a host's service manager does not.
        eprintln!("libvirtd of host {} did not end in {LIBVIRTD_STOP_TIMEOUT:?} and is killed", self.host.name);
        members.signal(pid, Signal::KILL);
        if wait_until(LIBVIRTD_STOP_TIMEOUT, || self.libvirtd() != Some(pid)) {
            return Ok(());
        }
        bail!(
            "libvirtd of host {} (process {pid}) does not end, even killed; look at what it waits for",
            self.host.name
        )
    }
}

/// What the keeper does: it makes the host's mounts and name, reports itself, and sleeps. Runs inside the new
/// namespaces, whose mounts the machine does not see.
pub fn init(lab: &Lab, host: &Host) -> Result<Infallible> {
    // Out of the caller's session, so that closing its terminal does not end the host.
    rustix::process::setsid().context("cannot leave the session")?;
    rustix::system::sethostname(host.name.as_str().as_bytes()).context("cannot set the host name")?;
    // sysfs shows the network of whoever mounts it; the machine's would show the wrong interfaces.
    let _ = unmount("/sys", UnmountFlags::DETACH);
    mount("sysfs", "/sys", "sysfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
        .context("cannot mount /sys")?;
    if let Some(root) = &lab.root {
        bind(&root.join("usr"), Path::new("/usr"))?;
    }
    let var_dir = lab.host_var_dir(host);
    for (name, target) in PRIVATE_DIRS {
        bind(&var_dir.join(name), Path::new(target))?;
    }
    if Path::new("/usr/bin/swtpm").exists() {
        let log = var_dir.join("log/swtpm");
        for dir in [&log, Path::new(SWTPM_LOG)] {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        bind(&log, Path::new(SWTPM_LOG))?;
    }
    bind(&lab.host_run_dir(host).join("libvirt"), Path::new("/run/libvirt"))?;
    bind(&Lab::run_dir(&lab.name).join("hosts"), Path::new("/etc/hosts"))?;
    // Each power-on is a boot of its own.
    bind(&lab.host_run_dir(host).join("boot-id"), Path::new("/proc/sys/kernel/random/boot_id"))?;
    for other in lab.hosts.iter().filter(|other| other.name != host.name) {
        let dir = lab.local_dir(other);
        mount("none", &dir, "tmpfs", MountFlags::RDONLY, None)
            .with_context(|| format!("cannot hide {}", dir.display()))?;
    }
    let pid = std::process::id().to_string();
    write_atomically(&lab.host_run_dir(host).join("keeper.pid"), pid.as_bytes())?;
    let title = format!("virtward-lab: host {} of lab {}", host.name, lab.name);
    let error = Command::new("sleep").arg0(title).arg("infinity").exec();
    Err(error).context("cannot run sleep")
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount_bind(source, target).with_context(|| format!("cannot mount {} on {}", source.display(), target.display()))
}

/// Empties a directory and keeps it, since it is mounted elsewhere.
fn clear_directory(dir: &Path) -> Result<()> {
    let clear = || -> std::io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
        }
        Ok(())
    };
    clear().with_context(|| format!("cannot clear {}", dir.display()))
}
