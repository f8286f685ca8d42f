//! The contract's bench over real libvirt and QEMU, in a lab of two hosts that is gone afterwards, also on failure.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::task::JoinHandle;
use uuid::Uuid;
use virtward_hypervisor::Hypervisor;
use virtward_hypervisor::libvirt::Libvirt;
use virtward_model::Vm;

use crate::bench::Bench;

pub struct Lab {
    // Dropped first: connections end before their hosts do.
    hypervisor: Arc<Libvirt>,
    other: Arc<Libvirt>,
    hosts: Vec<Value>,
    dir: PathBuf,
    /// Boots beside the first parts of the contract.
    booting: Mutex<Option<JoinHandle<Value>>>,
    guard: Arc<Guard>,
}

/// Takes the lab down when dropped.
struct Guard {
    name: String,
}

impl Guard {
    /// Runs `virtward-lab --name … --json ARGS` and returns what it prints.
    fn run(&self, args: &[&str]) -> Value {
        let program = program();
        let output = Command::new(&program).args(["--name", &self.name, "--json"]).args(args).output();
        let output = output.unwrap_or_else(|e| panic!("cannot run {}: {e}", program.display()));
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "virtward-lab {args:?}: {}\n{out}{err}", output.status);
        serde_json::from_str(&out).unwrap_or(Value::Null)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = Command::new(program()).args(["--name", &self.name, "down"]).output();
    }
}

/// The lab's binary, beside the directory that this test was built in.
fn program() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let dir = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let program = dir.join("virtward-lab");
    assert!(
        program.exists(),
        "{} does not exist: build it with `cargo build -p virtward-lab` (`make test` does)",
        program.display()
    );
    program
}

impl Lab {
    pub async fn up() -> Lab {
        let guard = Arc::new(Guard { name: format!("hv{:07x}", Uuid::new_v4().as_fields().0 >> 4) });
        let lab = guard.run(&["up", "--hosts", "2"]);
        let hosts = lab["hosts"].as_array().expect("hosts").clone();
        let connect =
            async |uri: &Value| Arc::new(Libvirt::connect(uri.as_str().expect("a URI")).await.expect("connect"));
        // One over its Unix socket, one over TCP.
        let (hypervisor, other) = (connect(&hosts[0]["uri"]).await, connect(&hosts[1]["tcp_uri"]).await);
        let dir = PathBuf::from(lab["shared_storage"].as_str().expect("shared storage"));
        let hands = Arc::clone(&guard);
        let boot = move || hands.run(&["vm", "create", "agent", "--host", "h1", "--disk", "64MiB", "--wait"]);
        let booting = Mutex::new(Some(tokio::task::spawn_blocking(boot)));
        Lab { hypervisor, other, hosts, dir, booting, guard }
    }
}

#[async_trait]
impl Bench for Lab {
    fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        Arc::clone(&self.hypervisor) as Arc<dyn Hypervisor>
    }

    async fn other(&self) -> (Arc<dyn Hypervisor>, String, Option<String>) {
        let uri = self.hosts[1]["tcp_uri"].as_str().expect("tcp_uri").to_owned();
        let address = self.hosts[1]["address"].as_str().expect("address");
        (Arc::clone(&self.other) as Arc<dyn Hypervisor>, uri, Some(format!("tcp://{address}")))
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn make_image(&self, path: &Path, format: &str, size: u64) {
        let status =
            Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(path).arg(size.to_string()).status();
        assert!(status.expect("qemu-img").success());
    }

    async fn agent_guest(&self) -> Uuid {
        let booting = self.booting.lock().expect("no panic").take().expect("asked for once");
        let made = booting.await.expect("the guest with an agent boots");
        made["uuid"].as_str().expect("uuid").parse().expect("a UUID")
    }

    async fn hang_agent(&self, _vm: Uuid) {
        // Later than the command that orders it, which the agent still has to answer.
        let order = "(sleep 1; kill -STOP $(pidof qemu-ga)) >/dev/null 2>&1 &";
        tokio::task::block_in_place(|| self.guard.run(&["vm", "exec", "agent", "--", "sh", "-c", order]));
        tokio::time::sleep(Duration::from_secs(3)).await;
    }

    async fn guest_writes(&self, vm: Uuid, target: &str, offset: u64, length: u64) {
        let index = u32::from(target.as_bytes()[2] - b'a');
        let line =
            format!("qemu-io -d /machine/peripheral/virtio-disk{index}/virtio-backend \"write -q {offset} {length}\"");
        let command = serde_json::json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } });
        let answer = self.hypervisor.monitor(vm, &command).await.expect("qemu-io");
        assert_eq!(answer.as_str(), Some(""), "qemu-io complained");
    }

    async fn kill(&self, vm: &Vm) {
        let socket = self.hosts[0]["uri"].as_str().and_then(|u| u.split_once("socket=")).expect("a socket").1;
        let pid = Path::new(socket).with_file_name(format!("qemu/{}.pid", vm.name));
        let pid = std::fs::read_to_string(&pid).unwrap_or_else(|e| panic!("{}: {e}", pid.display()));
        let status = Command::new("kill").args(["-KILL", pid.trim()]).status();
        assert!(status.expect("kill").success());
    }

    async fn restart_daemon(&self) {
        tokio::task::block_in_place(|| self.guard.run(&["host", "libvirtd", "restart", "h1"]));
    }

    fn serves_nbd(&self, socket: &Path) -> bool {
        let greeting = UnixStream::connect(socket).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut magic = [0; 8];
            stream.read_exact(&mut magic)?;
            Ok(magic)
        });
        matches!(greeting, Ok(magic) if &magic == b"NBDMAGIC")
    }
}
