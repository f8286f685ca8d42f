//! Asks running guests, one after the other and seldom, what they say of themselves.
//!
//! It takes its turn at each agent ([`crate::lock::AgentTurn`]): while a backup talks to one, or has its guest frozen, that
//! guest is left alone and asked later. An agent that does not answer is asked less and less. Nothing waits for any of it:
//! what is heard is handed to the inventory.

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};
use uuid::Uuid;
use virtward_model::VmState;

use super::inventory::{HostState, Inventory, VmView};
use crate::{
    Cancel,
    guest::{self, GuestFacts},
    job::backup::quiesce::frozen_marker,
    lock::AgentTurn,
};

/// How often guests are asked, and when again if they were busy or silent.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two looks for guests that are due.
    pub tick: Duration,
    /// Between two times that a guest is asked.
    pub every: Duration,
    /// After a first silence; each further one doubles it, up to `every`.
    pub retry: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { tick: Duration::from_secs(2), every: Duration::from_secs(600), retry: Duration::from_secs(30) }
    }
}

/// Guests that are asked at the same time. Few: agents' calls of backups and probes share the way to the hypervisor.
const AT_ONCE: usize = 2;

/// When a guest is asked next.
struct Next {
    at: Instant,
    silences: u32,
}

/// What became of a guest's turn.
enum Outcome {
    /// It said this.
    Said(GuestFacts),
    /// Its agent does not answer.
    Silent,
    /// Somebody else talks to its agent.
    Busy,
}

/// Asks until cancelled. `runtime` is the directory of locks that jobs on this host use.
pub async fn run(inventory: Arc<Inventory>, runtime: PathBuf, pace: Pace, cancel: Cancel) {
    let mut next: HashMap<Uuid, Next> = HashMap::new();
    let mut due: VecDeque<Uuid> = VecDeque::new();
    let mut asking = JoinSet::new();
    let mut tick = tokio::time::interval(pace.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                // A guest that went is asked at once when it is back.
                let world = inventory.world();
                next.retain(|uuid, _| world.vms.get(uuid).is_some_and(|view| can_answer(view)));
                if due.is_empty() && world.host.state == HostState::Up {
                    let now = Instant::now();
                    let is_due = |view: &&Arc<VmView>| {
                        can_answer(view) && next.get(&view.vm.uuid).is_none_or(|next| next.at <= now)
                    };
                    due.extend(world.vms.values().filter(is_due).map(|view| view.vm.uuid));
                }
            }
            Some(answered) = asking.join_next() => {
                let Ok((uuid, outcome)) = answered else { continue };
                let known = next.entry(uuid).or_insert(Next { at: Instant::now(), silences: 0 });
                let wait = match outcome {
                    Outcome::Said(facts) => {
                        inventory.hear(uuid, facts);
                        known.silences = 0;
                        pace.every
                    }
                    Outcome::Busy => pace.retry,
                    Outcome::Silent => {
                        known.silences = (known.silences + 1).min(16);
                        (pace.retry * (1 << (known.silences - 1))).min(pace.every)
                    }
                };
                known.at = Instant::now() + wait;
            }
            () = cancel.cancelled() => return,
        }
        while asking.len() < AT_ONCE
            && let Some(uuid) = due.pop_front()
        {
            let Some(view) = inventory.world().vms.get(&uuid).filter(|view| can_answer(view)).cloned() else {
                continue;
            };
            // Not due again while it is asked.
            next.entry(uuid).or_insert(Next { at: Instant::now(), silences: 0 }).at = Instant::now() + pace.every;
            let (inventory, runtime) = (inventory.clone(), runtime.clone());
            asking.spawn(async move { (uuid, turn(&inventory, &runtime, &view).await) });
        }
    }
}

fn can_answer(view: &VmView) -> bool {
    view.agent == Some(true) && view.details.has_agent_channel && view.vm.state == VmState::Running
}

async fn turn(inventory: &Inventory, runtime: &Path, view: &VmView) -> Outcome {
    let uuid = view.vm.uuid;
    let Some(hypervisor) = inventory.hypervisor() else { return Outcome::Busy };
    let _turn = match AgentTurn::try_take(runtime, uuid) {
        Ok(Some(turn)) => turn,
        Ok(None) => return Outcome::Busy,
        Err(error) => {
            tracing::debug!(vm = view.vm.name, %error, "no lock for its guest agent");
            return Outcome::Busy;
        }
    };
    // Left by a backup that died; whoever thaws the guest takes this away.
    if frozen_marker(runtime, uuid).exists() {
        return Outcome::Busy;
    }
    let known = view.guest.as_deref().cloned().unwrap_or_default();
    match guest::ask(&*hypervisor, uuid, &view.details.networks, &known).await {
        Ok(facts) => Outcome::Said(facts),
        Err(error) => {
            tracing::debug!(vm = view.vm.name, %error, "its guest agent says nothing");
            Outcome::Silent
        }
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use jiff::Timestamp;
    use tokio::sync::mpsc;
    use virtward_hypervisor::{
        Hypervisor, StartOptions,
        sim::{AgentMode, SimHost, SimWorld},
    };

    use super::*;
    use crate::reconcile::inventory::Connector;

    const SOON: Duration = Duration::from_secs(30);
    const QUICK: Pace =
        Pace { tick: Duration::from_millis(10), every: Duration::from_millis(50), retry: Duration::from_millis(20) };
    const ANSWERS: AgentMode = AgentMode::Answers { filesystems: 1 };

    struct Here(SimHost);

    #[async_trait]
    impl Connector for Here {
        fn uri(&self) -> String {
            self.0.uri()
        }
        fn name(&self) -> String {
            "h1".into()
        }
        async fn connect(&self) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>> {
            Ok(Arc::new(self.0.clone()))
        }
        async fn probe(&self) -> HostState {
            HostState::Unknown
        }
    }

    struct Host {
        sim: SimHost,
        inventory: Arc<Inventory>,
        runtime: tempfile::TempDir,
        cancel: Cancel,
    }

    impl Host {
        async fn start() -> Self {
            let sim = SimWorld::new().host("h1");
            let inventory = Arc::new(Inventory::new(Arc::new(Here(sim.clone())), Timestamp::now()));
            let (runtime, cancel) = (tempfile::tempdir().unwrap(), Cancel::default());
            let (sender, mut changes) = mpsc::channel(16);
            tokio::spawn(async move { while changes.recv().await.is_some() {} });
            let (looking, last) = (inventory.clone(), cancel.clone());
            tokio::spawn(async move { looking.run(SOON, sender, last).await });
            tokio::spawn(run(inventory.clone(), runtime.path().to_owned(), QUICK, cancel.clone()));
            // From now on events tell of agents; the simulator's XML does not.
            while !inventory.world().is_complete {
                tokio::time::sleep(QUICK.tick).await;
            }
            Self { sim, inventory, runtime, cancel }
        }

        async fn vm(&self, name: &str) -> Uuid {
            let xml = format!(
                "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type>hvm</type></os>\
                 <devices><interface type='network'><mac address='52:54:00:00:00:0a'/></interface>\
                 <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"
            );
            let uuid = self.sim.define(&xml).await.unwrap().uuid;
            self.sim.start(uuid, StartOptions::default()).await.unwrap();
            uuid
        }

        fn hostname(&self, vm: Uuid) -> Option<String> {
            self.inventory.world().vms.get(&vm)?.guest.as_ref()?.hostname.clone()
        }

        async fn says(&self, vm: Uuid, hostname: Option<&str>) {
            let said = async {
                while self.hostname(vm).as_deref() != hostname {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(SOON, said).await.unwrap_or_else(|_| panic!("never {hostname:?}"));
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            self.cancel.cancel();
        }
    }

    #[tokio::test]
    async fn guests_are_asked_when_their_agent_comes_and_forgotten_when_they_end() {
        let host = Host::start().await;
        let (web, db) = (host.vm("web1").await, host.vm("db1").await);
        host.sim.set_agent(db, AgentMode::Hung);
        host.sim.set_agent(web, ANSWERS);
        host.says(web, Some("web1")).await;
        let world = host.inventory.world();
        let facts = world.vms[&web].guest.clone().unwrap();
        assert_eq!(facts.os.as_deref(), Some("Simulated GNU/Linux 1"));
        assert_eq!(facts.addresses["52:54:00:00:00:0a"].iter().next().unwrap().to_string(), "192.0.2.10");
        // What was said stays known while the agent is away, and is forgotten with the guest.
        host.sim.set_agent(web, AgentMode::Absent);
        tokio::time::sleep(QUICK.every * 4).await;
        assert_eq!((host.hostname(web).as_deref(), host.hostname(db)), (Some("web1"), None));
        host.sim.destroy(web).await.unwrap();
        host.says(web, None).await;
    }

    #[tokio::test]
    async fn a_guest_that_a_backup_talks_to_or_left_frozen_is_not_asked() {
        let host = Host::start().await;
        let web = host.vm("web1").await;
        let marker = frozen_marker(host.runtime.path(), web);
        std::fs::create_dir_all(marker.parent().unwrap()).unwrap();
        std::fs::write(&marker, "web1").unwrap();
        let turn = AgentTurn::try_take(host.runtime.path(), web).unwrap().expect("nobody has it");
        host.sim.set_agent(web, ANSWERS);
        tokio::time::sleep(QUICK.retry * 10).await;
        assert_eq!(host.hostname(web), None);
        drop(turn);
        tokio::time::sleep(QUICK.retry * 10).await;
        assert_eq!(host.hostname(web), None, "its file systems may be frozen");
        std::fs::remove_file(marker).unwrap();
        host.says(web, Some("web1")).await;
        // Frozen by others, its agent refuses: what is known stays.
        host.sim.fs_freeze(web).await.unwrap();
        tokio::time::sleep(QUICK.every * 4).await;
        assert_eq!(host.hostname(web).as_deref(), Some("web1"));
    }
}
