//! From a claim to vCPUs: the disk's lease, a paused process, and, when the store still agrees, the guest runs.
//!
//! What an earlier start of the same VM left is ended first. A start that fails leaves no process behind; one whose process
//! cannot be ended is not reported, so that nobody else takes the VM for free.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch as latest;
use virtward_cluster::Store;
use virtward_decide::ha::{Moment, VmId};
use virtward_hypervisor::{Hypervisor, StartOptions};

use super::{Host, Input, Starting, guests};
use crate::ha::{
    lease,
    run::{Ha, Weight, clock, store},
};

/// How long an old process is waited for.
const END_MAX: Duration = Duration::from_secs(20);
/// How long the storage may take for a lease.
const LEASE_MAX: Duration = Duration::from_secs(10);
/// How long the hypervisor is waited for when it is not there.
const CONNECT_MAX: Duration = Duration::from_secs(20);
/// Between two looks whether it is known for how long this host may run guests.
const PERMIT_PAUSE: Duration = Duration::from_millis(100);

/// A failed start.
struct Failed {
    why: String,
    disk_generation: Option<u64>,
}

impl From<String> for Failed {
    fn from(why: String) -> Self {
        Self { why, disk_generation: None }
    }
}

/// What one start works with.
struct Start {
    ha: Ha,
    store: Arc<dyn Store>,
    hypervisor: latest::Receiver<Option<Arc<dyn Hypervisor>>>,
    vm: VmId,
    generation: u64,
    epoch: u64,
    /// Until when this host may run guests; follows the heartbeats.
    allowed: latest::Receiver<Moment>,
}

impl Host {
    pub(super) fn start(&mut self, vm: VmId, generation: u64, epoch: u64) {
        let before = self.starting.remove(&vm).map(|starting| starting.task);
        let (allowed, follows) = latest::channel(self.agent.allowed_until().unwrap_or_default());
        let start = Start {
            ha: self.ha.clone(),
            store: self.store.clone(),
            hypervisor: self.hypervisor.clone(),
            vm,
            generation,
            epoch,
            allowed: follows,
        };
        let answers = self.send();
        let limit = Duration::from_millis(self.ha.settings().timing.start_ms);
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                before.abort();
                let _ = before.await;
            }
            let started = tokio::time::timeout(limit, start.run()).await;
            let failed = match started {
                Ok(Ok(())) => {
                    let _ = answers.send(Input::Started { vm, generation });
                    return;
                }
                Ok(Err(failed)) => failed,
                Err(_) => format!("it took longer than {} s", limit.as_secs()).into(),
            };
            let _ = start.ha.settings().hook().forbid(vm);
            while let Err(why) = guests::end(&start.ha, vm, END_MAX).await {
                tracing::error!(why, "a start that failed cannot be cleared away");
            }
            let (why, disk_generation) = (failed.why, failed.disk_generation);
            let _ = answers.send(Input::StartFailed { vm, generation, why, disk_generation });
        });
        self.starting.insert(vm, Starting { task, allowed });
    }

    /// A start may take longer than one heartbeat's right: its permit follows the heartbeats.
    pub(super) fn renew_permits(&self) {
        let Some(until) = self.agent.allowed_until() else { return };
        for starting in self.starting.values() {
            starting.allowed.send_replace(until);
        }
    }

    pub(super) fn resume(&mut self, vm: VmId, generation: u64, until: Moment) {
        let (ha, answers, outside) = (self.ha.clone(), self.send(), self.outside.clone());
        let name = self.ha.name(vm);
        let hypervisor = self.hypervisor.borrow().clone();
        tokio::spawn(async move {
            let outcome = match hypervisor {
                Some(_) if clock::now() > until => Err("its time had run out before it could run".to_owned()),
                Some(hypervisor) => hypervisor.resume(vm).await.map_err(|error| error.to_string()),
                None => Err("the hypervisor does not answer".into()),
            };
            match outcome {
                Ok(()) => {
                    guests::unmark_new(&ha, vm);
                    outside.say(Weight::Info, &format!("{name} runs, generation {generation}"));
                    let _ = answers.send(Input::Resumed { vm });
                }
                Err(why) => {
                    outside.say(Weight::Warning, &format!("{name} cannot be let run: {why}"));
                    if clock::now() > until {
                        let _ = guests::end(&ha, vm, END_MAX).await;
                    }
                }
            }
        });
    }
}

impl Start {
    async fn run(&self) -> Result<(), Failed> {
        let settings = self.ha.settings();
        let hook = settings.hook();
        hook.forbid(self.vm).map_err(|error| format!("its permit cannot be taken back: {error}"))?;
        guests::end(&self.ha, self.vm, END_MAX).await?;
        let hypervisor = self.hypervisor().await?;
        self.lease().await?;
        let xml = self.definition().await?;
        hypervisor.define(&xml).await.map_err(|error| error.to_string())?;
        // Memory of another time and these disks do not belong together.
        hypervisor.managed_save_remove(self.vm).await.map_err(|error| error.to_string())?;
        let paused = StartOptions { paused: true, ..StartOptions::default() };
        // The first permit is written before libvirt can ask for it: the branches are polled in this order.
        let started = tokio::select! {
            biased;
            error = self.permit() => Err(error),
            started = hypervisor.start(self.vm, paused) => started.map_err(|error| error.to_string()),
        };
        let forbidden = hook.forbid(self.vm).map_err(|error| format!("its permit cannot be taken back: {error}"));
        started?;
        forbidden?;
        let Some(pid) = guests::process(&self.ha, self.vm).await else {
            return Err("its process ended at once; QEMU's log says why".to_owned().into());
        };
        guests::mark_new(&self.ha, self.vm, pid).map_err(|error| format!("cannot note its process: {error}"))?;
        Ok(())
    }

    async fn hypervisor(&self) -> Result<Arc<dyn Hypervisor>, String> {
        let mut connection = self.hypervisor.clone();
        let there = tokio::time::timeout(CONNECT_MAX, connection.wait_for(Option::is_some)).await;
        there
            .ok()
            .and_then(Result::ok)
            .and_then(|hypervisor| hypervisor.clone())
            .ok_or_else(|| format!("the hypervisor did not answer within {} s", CONNECT_MAX.as_secs()))
    }

    /// Keeps a permit as long as this host may run guests. Ends with an error only.
    async fn permit(&self) -> String {
        let hook = self.ha.settings().hook();
        let mut given = Moment(0);
        loop {
            let until = *self.allowed.borrow();
            if until > given {
                let valid = Duration::from_millis(until.since(clock::now()));
                if let Err(error) = hook.permit(self.vm, self.generation, false, valid) {
                    return format!("its permit cannot be written: {error}");
                }
                given = until;
            }
            tokio::time::sleep(PERMIT_PAUSE).await;
        }
    }

    async fn lease(&self) -> Result<(), Failed> {
        let settings = self.ha.settings();
        let claim =
            lease::Claim { vm: self.vm, generation: self.generation, epoch: self.epoch, host: settings.host.0.clone() };
        lease::take(&settings.leases, &claim, LEASE_MAX).await.map_err(|error| Failed {
            why: error.to_string(),
            disk_generation: match &error {
                lease::Error::Newer { found, .. } | lease::Error::Twice { found, .. } => Some(found.generation),
                _ => None,
            },
        })
    }

    async fn definition(&self) -> Result<String, String> {
        let found = self.store.get(store::xml_key(self.vm).as_bytes()).await;
        let entry = found.map_err(|error| error.to_string())?;
        let entry = entry.ok_or("the cluster does not have its definition; enable it again where it is defined")?;
        String::from_utf8(entry.value.to_vec()).map_err(|_| "its definition is no text".to_owned())
    }
}
