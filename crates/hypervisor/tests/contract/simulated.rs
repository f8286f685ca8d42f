//! The contract's bench over simulated hosts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;
use virtward_hypervisor::sim::{AgentMode, SimHost, SimWorld};
use virtward_hypervisor::{Hypervisor, StartOptions};
use virtward_model::Vm;

use crate::bench::{Bench, disk_xml, domain_xml};

pub struct Simulated {
    host: SimHost,
    other: SimHost,
    dir: PathBuf,
}

impl Simulated {
    pub fn new() -> Simulated {
        let world = SimWorld::new();
        Simulated { host: world.host("h1"), other: world.host("h2"), dir: PathBuf::from("/sim") }
    }
}

#[async_trait]
impl Bench for Simulated {
    fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        Arc::new(self.host.clone())
    }

    async fn other(&self) -> (Arc<dyn Hypervisor>, String, Option<String>) {
        (Arc::new(self.other.clone()), self.other.uri(), None)
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn make_image(&self, path: &Path, _format: &str, size: u64) {
        self.host.resize(path.to_str().expect("UTF-8"), size);
    }

    async fn agent_guest(&self) -> Uuid {
        let disk = disk_xml(&self.dir.join("agent.qcow2"), "qcow2", "vda");
        let vm = self.host.define(&domain_xml("agent", &disk)).await.expect("define");
        self.host.start(vm.uuid, StartOptions::default()).await.expect("start");
        self.host.set_agent(vm.uuid, AgentMode::Answers { filesystems: 1 });
        vm.uuid
    }

    async fn hang_agent(&self, vm: Uuid) {
        self.host.set_agent(vm, AgentMode::Hung);
    }

    async fn guest_writes(&self, vm: Uuid, target: &str, offset: u64, length: u64) {
        self.host.write(vm, target, offset, length);
    }

    async fn kill(&self, vm: &Vm) {
        self.host.crash(vm.uuid);
    }

    async fn restart_daemon(&self) {
        self.host.set_connected(false);
        let host = self.host.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            host.set_connected(true);
        });
    }

    fn serves_nbd(&self, _socket: &Path) -> bool {
        // The simulator has no data to serve; that a job exists is checked by the contract.
        true
    }
}
