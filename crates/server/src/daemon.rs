//! The daemon as one thing: everything that its loops and its API share.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;
use virtward_api::{Code, Problem, RepositoryState, Severity};
use virtward_engine::{Env, reconcile::inventory::Inventory};

use crate::{
    access::Access,
    config::Config,
    events::{Audit, Events, Note},
    failures::Result,
    hub::Hub,
    jobs::Jobs,
    kv::{self, Kv},
    metrics::Metrics,
    policies::Policies,
    repositories::{Entry, Repositories},
    scheduler::Planned,
    views,
};

/// Everything.
pub struct Daemon {
    config: RwLock<Arc<Config>>,
    /// State.
    pub kv: Kv,
    /// What the host has.
    pub inventory: Arc<Inventory>,
    /// What is remembered of VMs.
    pub vms: KnownVms,
    /// Repositories.
    pub repositories: Repositories,
    /// Jobs.
    pub jobs: Arc<Jobs>,
    /// Policies.
    pub policies: Policies,
    /// Tokens and sessions.
    pub access: Access,
    /// Those who follow.
    pub hub: Arc<Hub>,
    /// What happened.
    pub events: Events,
    /// Who changed what.
    pub audit: Audit,
    /// Counters.
    pub metrics: Metrics,
    /// Wakes the scheduler.
    pub schedule: Notify,
    /// When it started.
    pub started: Timestamp,
    /// Fingerprint of the listener's certificate.
    pub certificate: RwLock<Option<String>>,
    planned: RwLock<Arc<Planned>>,
    stopping: AtomicBool,
}

/// What [`Daemon::new`] puts together; see the fields of the same names.
#[allow(missing_docs)]
pub struct Parts {
    pub config: Config,
    pub kv: Kv,
    pub inventory: Arc<Inventory>,
    pub hub: Arc<Hub>,
    pub events: Events,
    pub audit: Audit,
    pub node: String,
    pub now: Timestamp,
}

impl Daemon {
    /// Loads what the state store has.
    pub async fn new(parts: Parts) -> Result<Self> {
        let Parts { config, kv, inventory, hub, events, audit, node, now } = parts;
        Ok(Self {
            vms: KnownVms::load(kv.clone()).await?,
            repositories: Repositories::load(kv.clone(), &config.repositories).await?,
            jobs: Arc::new(Jobs::load(kv.clone(), hub.clone(), node).await?),
            policies: Policies::load(kv.clone()).await?,
            access: Access::load(kv.clone()).await?,
            config: RwLock::new(Arc::new(config)),
            kv,
            inventory,
            hub,
            events,
            audit,
            metrics: Metrics::default(),
            schedule: Notify::new(),
            started: now,
            certificate: RwLock::default(),
            planned: RwLock::default(),
            stopping: AtomicBool::new(false),
        })
    }

    /// What it is told now.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over another configuration, as far as that is possible while it runs.
    pub async fn reconfigure(&self, next: Config) -> Result<()> {
        let now = self.config();
        for (what, differs) in [
            ("listen", now.listen != next.listen),
            ("state-dir", now.state_dir != next.state_dir),
            ("runtime-dir", now.socket != next.socket),
            ("connect", now.connect != next.connect),
        ] {
            if differs {
                tracing::warn!("{what} changed in the configuration; that needs a restart of the daemon");
            }
        }
        self.repositories.reconfigure(&next.repositories).await?;
        let kept = (now.listen, now.socket.clone(), now.state_dir.clone(), now.connect.clone());
        let (listen, socket, state_dir, connect) = kept;
        let next = Config { listen, socket, state_dir, connect, ..next };
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        self.schedule.notify_one();
        self.jobs.wake.notify_one();
        Ok(())
    }

    /// The host's name as far as it is known.
    pub fn host_name(&self) -> String {
        self.inventory.world().host.name.clone()
    }

    /// What a job needs; fails while the hypervisor was never reached.
    pub fn env(&self) -> Result<Env> {
        let config = self.config();
        let hypervisor = self.inventory.hypervisor().ok_or_else(|| {
            Problem::new(
                Code::HypervisorUnreachable,
                format!("the hypervisor at {} was not reached yet", config.connect),
            )
            .hint("check that libvirt runs on the host: systemctl status libvirtd, or virtqemud")
        })?;
        let (uri, dirs, thaw_guard) = (config.connect.clone(), config.dirs.clone(), config.thaw_guard.clone());
        Ok(Env { hypervisor, uri, dirs, thaw_guard })
    }

    /// It is on its way out.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    /// Begins the way out.
    pub fn stop(&self) {
        self.stopping.store(true, Relaxed);
    }

    /// What was planned last.
    pub fn plan(&self) -> Arc<Planned> {
        self.planned.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what was planned.
    pub fn planned(&self, planned: Planned) {
        *self.planned.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(planned);
    }

    /// Names of the repositories.
    pub fn repository_names(&self) -> BTreeSet<String> {
        self.repositories.all().iter().map(|entry| entry.config.name.clone()).collect()
    }

    /// Reads a repository's restore points again, measures it if asked, and tells of it.
    pub async fn refresh(&self, entry: &Arc<Entry>, measure: bool) {
        let changed = entry.refresh().await;
        if measure && let Err(problem) = self.repositories.measure(entry).await {
            tracing::warn!(repository = entry.config.name, %problem, "it could not be measured");
        }
        let view = entry.view();
        if changed {
            let name = entry.config.name.clone();
            let mut note = match &view.error {
                None => Note::new(Severity::Info, "repository-state", format!("repository {name} can be used")),
                Some(error) => {
                    let text = format!("repository {name} cannot be used: {error}");
                    tracing::error!("{text}");
                    Note::new(Severity::Error, "repository-state", text)
                }
            };
            note.repository = Some(name);
            self.events.add(note);
        }
        if changed || view.state == RepositoryState::Ok {
            self.hub.send("repositories", "repository", &views::repository(self, entry));
        }
        self.schedule.notify_one();
    }
}

/// What is remembered of VMs, also of those that are gone.
pub struct KnownVms {
    kv: Kv,
    all: RwLock<BTreeMap<Uuid, Known>>,
}

/// What is remembered of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Its last name.
    pub name: String,
    /// When it was first seen.
    pub first_seen: Timestamp,
    /// Its last tags.
    pub tags: Vec<String>,
}

impl KnownVms {
    async fn load(kv: Kv) -> Result<Self> {
        let all = kv.list::<Known>("/v1/vms/").await?;
        let uuid = |key: &str| key.strip_prefix("/v1/vms/").and_then(|uuid| uuid.parse().ok());
        let all = all.into_iter().filter_map(|(key, known)| Some((uuid(&key)?, known))).collect();
        Ok(Self { kv, all: RwLock::new(all) })
    }

    /// When a VM was first seen; now, if it was not.
    pub fn first_seen(&self, vm: Uuid) -> Timestamp {
        self.known(vm).map_or_else(Timestamp::now, |known| known.first_seen)
    }

    /// What is remembered.
    pub fn known(&self, vm: Uuid) -> Option<Known> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).get(&vm).cloned()
    }

    /// Remembers VMs with their names and tags, in as few transactions as they fit in; those that are new.
    pub async fn see(&self, seen: &[(Uuid, &str, &[String])]) -> Result<BTreeSet<Uuid>> {
        let (mut new, mut ops) = (BTreeSet::new(), Vec::new());
        for (vm, name, tags) in seen {
            let before = self.known(*vm);
            let first_seen = before.as_ref().map_or_else(Timestamp::now, |known| known.first_seen);
            let known = Known { name: (*name).to_owned(), first_seen, tags: tags.to_vec() };
            if before.is_none() {
                new.insert(*vm);
            }
            if before.as_ref() != Some(&known) {
                ops.push(kv::put(&format!("/v1/vms/{vm}"), &known)?);
                self.all.write().unwrap_or_else(PoisonError::into_inner).insert(*vm, known);
            }
        }
        while !ops.is_empty() {
            let some = ops.split_off(ops.len().saturating_sub(virtward_cluster::TXN_LEN_MAX));
            self.kv.commit(Vec::new(), some).await?;
        }
        Ok(new)
    }
}
