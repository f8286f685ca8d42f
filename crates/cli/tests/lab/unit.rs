//! The package under systemd: its unit, with all that it takes away from the daemon, on a system of its own where systemd is
//! the first process and libvirt runs a guest.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use virtward_api::client::Client;

use crate::harness::{VIRTWARD, run, text, tool, wait};

const SOON: Duration = Duration::from_secs(60);

/// A system with systemd as its first process; gone when the test ends, with all that ran in it.
struct System {
    outer: Child,
    init: String,
    cgroup: PathBuf,
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl System {
    fn boot() -> Self {
        let dir = tempfile::Builder::new().prefix("virtward-unit-").tempdir().expect("a directory");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = sources.join("../../scripts/deb.sh").display().to_string();
        // A test's binary is large, and compressing it well takes minutes.
        let out = dir.path().display().to_string();
        let made = tool("env", &["DEB_COMPRESSION=none", &script, "--binary", VIRTWARD, "--out", &out]);
        let cgroup = cgroups().join(format!("virtward-unit-{}", std::process::id()));
        let place = dir.path().join("system");
        std::fs::create_dir(&place).expect("a directory");
        let outer = Command::new("bash")
            .arg(sources.join("tests/lab/unit/boot.sh"))
            .args([&cgroup, &place])
            .arg(String::from_utf8_lossy(&made.stdout).trim())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("bash");
        let mut system = Self {
            outer,
            init: String::new(),
            cgroup,
            dir,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime"),
        };
        let pid = system.outer.id();
        wait("systemd to be there", SOON, || {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            system.init = children.trim().to_owned();
            let name = std::fs::read_to_string(format!("/proc/{}/comm", system.init)).unwrap_or_default();
            name.trim() == "systemd"
        });
        wait("the system to be up", SOON, || {
            let state = system.sh("systemctl is-system-running || true");
            matches!(state.trim(), "running" | "degraded")
        });
        system
    }

    fn output(&self, script: &str) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init, "--all", "--root", "--wd", "bash", "-c", script]);
        run(command, SOON)
    }

    /// Runs a command in the system, which must succeed; its output.
    #[track_caller]
    fn sh(&self, script: &str) -> String {
        let output = self.output(script);
        assert!(output.status.success(), "{script}: {}\n{}", text(&output), self.journal());
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn journal(&self) -> String {
        text(&self.output("journalctl --no-pager -u virtward | tail -n 40"))
    }

    /// A property of the daemon's unit.
    fn show(&self, property: &str) -> String {
        self.sh(&format!("systemctl show --value --property {property} virtward"))
    }

    fn api(&self) -> Client {
        Client::unix(format!("/proc/{}/root/run/virtward/api.sock", self.init))
    }

    fn get(&self, path: &str) -> Value {
        self.runtime.block_on(self.api().get(&format!("/api/v1/{path}"))).expect("an answer")
    }

    fn sees_the_guest(&self) {
        wait("the guest to be seen", SOON, || {
            self.get("vms")["items"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|vm| vm["name"] == "web1" && vm["state"] == "running")
        });
    }

    fn begin(&self, kind: &str, request: &Value) -> String {
        let path = format!("/api/v1/jobs/{kind}");
        let job: Value = self.runtime.block_on(self.api().post(&path, request, None)).expect("a job");
        job["id"].as_str().expect("an id").to_owned()
    }

    fn ended(&self, job: &str) -> Value {
        let mut ended = Value::Null;
        wait("a job to end", SOON, || {
            ended = self.get(&format!("jobs/{job}"));
            !ended["finished"].is_null()
        });
        ended
    }

    #[track_caller]
    fn succeeds(&self, kind: &str, request: &Value) -> String {
        let job = self.begin(kind, request);
        let ended = self.ended(&job);
        assert_eq!(ended["state"], "succeeded", "{ended:#}\n{}", self.journal());
        job
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.dir.path().join("system.log")).unwrap_or_default());
        }
        // With it the kernel ends its child, the first process in there, and with that one all others.
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        let mut emptied = false;
        for _ in 0..100 {
            let mut find = Command::new("find");
            find.arg(&self.cgroup).args(["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"]);
            let _ = run(find, Duration::from_secs(10));
            emptied = !self.cgroup.exists();
            if emptied {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if !emptied {
            eprintln!("{} is left, with processes of {}", self.cgroup.display(), self.dir.path().display());
        }
    }
}

/// Where the hierarchy of control groups is that systemd uses.
fn cgroups() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    let found = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|words| words[2] == "cgroup2");
    PathBuf::from(found.expect("control groups of the second version")[1])
}

const GUEST: &str = "set -e
truncate -s 64M /tmp/disk; mkfs.ext4 -q -L data /tmp/disk
qemu-img convert -O qcow2 /tmp/disk /var/lib/libvirt/images/web1.qcow2
cat >/root/web1.xml <<'xml'
<domain type='qemu'><name>web1</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>/var/cache/virtward-lab/current/vmlinuz</kernel>
<initrd>/var/cache/virtward-lab/current/initramfs.img</initrd><cmdline>console=ttyS0 quiet vm=web1</cmdline></os>
<features><acpi/><apic/></features><cpu mode='custom' match='exact'><model>qemu64</model></cpu>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/var/lib/libvirt/images/web1.qcow2'/><target dev='vda' bus='virtio'/></disk>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<serial type='pty'/><memballoon model='none'/></devices></domain>
xml
virsh -q define /root/web1.xml; virsh -q start web1";

/// What the children of the daemon may, and what they may not. Fence agents run in PID namespaces.
const HOOK: &str = "setpriv --pdeathsig KILL unshare --fork --pid --kill-child=KILL touch /srv/hook /home/hook \
                    /etc/virtward/hook && ! touch /etc/hook && ! touch /usr/hook && ! unshare --net true";

#[test]
fn the_unit_of_the_package_does_under_systemd_what_it_promises() {
    let system = System::boot();
    let said = system.sh("dpkg --install /root/virtward.deb 2>&1");
    assert!(said.contains("the daemon is not enabled"), "{said}");
    assert_eq!(system.sh("systemctl is-enabled virtward || true"), "disabled");
    system.sh("systemctl start libvirtd.service");
    system.sh(GUEST);
    system.sh("printf '[server]\\nlisten = \"127.0.0.1:443\"\\nreconcile-s = 2\\n' >/etc/virtward/config.toml");
    system.sh("virtward repo init");
    system.sh("systemctl enable --now virtward");
    // It has said that it is ready: it answers at once, on its socket and on a port of root's.
    let version = system.get("version");
    assert!(version["version"].is_string(), "{version}");
    system.sh("exec 3<>/dev/tcp/127.0.0.1/443");
    assert_eq!((system.show("SubState"), system.show("NotifyAccess")), ("running".into(), "main".into()));
    // The lower the better, of 100; this much is left because of what the unit itself says.
    system.sh("systemd-analyze security --no-pager --threshold=45 virtward");
    works(&system);
    works_confined(&system);
    reloads(&system);
    restarts(&system);

    // An upgrade goes on as the new version; a removal ends the daemon, and no guest.
    let before = system.show("MainPID");
    system.sh("dpkg --install /root/virtward.deb");
    assert_eq!(system.sh("systemctl is-active virtward"), "active");
    assert_ne!(system.show("MainPID"), before);
    system.sh("dpkg --remove virtward");
    assert_eq!(system.sh("systemctl is-active virtward || true"), "inactive");
    assert_eq!(system.sh("virsh domstate web1"), "running");
}

/// Backs up a running guest, frozen, and restores it to a place that the unit does not name.
fn works(system: &System) {
    wait("the guest's agent", Duration::from_secs(180), || {
        system.output(r#"virsh qemu-agent-command web1 '{"execute":"guest-ping"}'"#).status.success()
    });
    system.sees_the_guest();
    let quiet = json!({"vm": "web1", "quiesce": "required"});
    system.succeeds("backup", &quiet);
    let job = system.succeeds("backup", &quiet);
    let points = system.get("vms/web1/points");
    assert_eq!((&points["items"][0]["kind"], &points["total"]), (&json!("incremental"), &json!(2)), "{points}");
    system.sh("mkdir /srv/vms");
    let restore = json!({"point": "web1@latest", "name": "web2", "disk_dir": "/srv/vms"});
    system.succeeds("restore", &restore);
    system.sh("test -s /srv/vms/web2-vda.qcow2 && virsh dominfo web2");
    // What it says is in the journal with its fields.
    let entries = system.sh(&format!("journalctl --no-pager --output json VIRTWARD_JOB={job}"));
    let entries: Vec<Value> = entries.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(entries.iter().all(|entry| entry["_SYSTEMD_UNIT"] == "virtward.service"), "{entries:?}");
    let end = entries.iter().find(|entry| entry["VIRTWARD_EVENT"] == "job-succeeded").expect("its end");
    assert_eq!(end["MESSAGE"], "backup of web1 succeeded");
}

/// The same with the drop-in of docs/operations.md, which lets it write to a few places only.
fn works_confined(system: &System) {
    let docs = include_str!("../../../../docs/operations.md");
    let drop_in = docs.split("# systemctl edit virtward\n").nth(1).expect("the drop-in").split("\n\n").next();
    let drop_in: Vec<&str> = drop_in.into_iter().flat_map(str::lines).map(str::trim).collect();
    assert!(drop_in.contains(&"ProtectSystem=strict"), "{drop_in:?}");
    let dir = "/run/systemd/system/virtward.service.d";
    system.sh(&format!("mkdir -p /srv/backup {dir}; echo '{}' >{dir}/confined.conf", drop_in.join("\n")));
    system.sh("systemctl daemon-reload; systemctl restart virtward");
    system.sees_the_guest();
    system.succeeds("backup", &json!({"vm": "web1", "quiesce": "required"}));
    let elsewhere = json!({"point": "web1@latest", "name": "web3", "disk_dir": "/srv/vms"});
    let refused = system.begin("restore", &elsewhere);
    let refused = system.ended(&refused);
    assert_eq!(refused["state"], "failed", "{refused}");
    assert!(refused["error"]["message"].as_str().is_some_and(|why| why.contains("Read-only file system")), "{refused}");
    let there = json!({"point": "web1@latest", "name": "web3", "disk_dir": "/var/lib/libvirt/images"});
    system.succeeds("restore", &there);
    system.sh(&format!("rm {dir}/confined.conf; systemctl daemon-reload; systemctl restart virtward"));
    system.sees_the_guest();
}

/// Takes over the configuration without another process, hooks among it, which run in the same sandbox.
fn reloads(system: &System) {
    let before = system.show("MainPID");
    let read = "journalctl --no-pager -u virtward | grep -c 'the configuration was read again' || true";
    assert_eq!(system.sh(read), "0");
    system.sh(&format!("printf '[backup]\\npre-freeze = \"%s\"\\n' '{HOOK}' >>/etc/virtward/config.toml"));
    system.sh("systemctl reload virtward");
    wait("the configuration to be read", SOON, || system.sh(read) == "1");
    assert_eq!(system.show("MainPID"), before);
    system.succeeds("backup", &json!({"vm": "web1", "quiesce": "required"}));
    system.sh("test -e /srv/hook && test -e /home/hook && test -e /etc/virtward/hook");
}

/// Is stopped in the middle of a backup and goes on without it; is killed when it hangs and started again.
fn restarts(system: &System) {
    let slow = json!({"vm": "web1", "full": true, "bandwidth_bytes_s": 16 << 10});
    let job = system.begin("backup", &slow);
    wait("its data to flow", SOON, || system.get(&format!("jobs/{job}"))["progress"]["phase"] == "copying");
    system.sh("systemctl restart virtward");
    assert_eq!(system.ended(&job)["state"], "interrupted");
    assert!(system.sh("virsh domjobinfo web1").contains("None"));
    assert_eq!(system.show("Result"), "success");

    system.sh("mkdir -p /run/systemd/system/virtward.service.d; cd /run/systemd/system/virtward.service.d
         printf '[Service]\\nWatchdogSec=2\\n' >watchdog.conf; systemctl daemon-reload; systemctl restart virtward");
    // It feeds the watchdog: nothing happens for some of its time.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(system.show("NRestarts"), "0");
    system.sh("kill -STOP $(systemctl show --value --property MainPID virtward)");
    wait("the daemon to be started again", SOON, || {
        system.show("NRestarts") == "1" && system.show("SubState") == "running"
    });
    assert!(system.get("version")["version"].is_string());
}
