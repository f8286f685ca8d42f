//! The daemon as one thing: everything that its loops and its API share.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use uuid::Uuid;
use virtward_api::{BalanceRound, Code, HostDrain, Problem, RepositoryState, Said, Saying, Severity};
use virtward_cluster::Revision;
use virtward_engine::{
    Env,
    ha::run::Ha,
    reconcile::inventory::{Connector, Inventory},
};

use crate::{
    access::Access,
    alarms::Alarms,
    cluster::{
        claims::Claims,
        fleet::{Fleet, Registry},
        leader::Leader,
        nodes::{Me, Nodes},
    },
    config::Config,
    events::{Audit, Events, Note},
    failures::Result,
    health::Health,
    hub::Hub,
    jobs::{
        Jobs,
        record::{NewJob, Place, Work},
    },
    kv::{self, Kv},
    metrics::Metrics,
    moves,
    peers::{self, Identity, Peers, Served, proxy::Sessions},
    policies::Policies,
    repositories::{Entry, Repositories},
    scheduler::Planned,
    table::Table,
    tls::Certificate,
    views,
};

/// Everything.
pub struct Daemon {
    config: RwLock<Arc<Config>>,
    /// State.
    pub kv: Kv,
    /// What the host has.
    pub inventory: Arc<Inventory>,
    /// The daemons of the cluster.
    pub nodes: Arc<Nodes>,
    /// Who may do what to which VM.
    pub claims: Arc<Claims>,
    /// The way to the others.
    pub peers: Arc<Peers>,
    /// What of this node's is served to the others.
    pub served: Served,
    /// Backups that are read and stored for the others.
    pub proxied: Sessions,
    /// What the other hosts have.
    pub registry: Registry,
    /// Whether this daemon leads.
    pub leader: Leader,
    /// Something is to be told to the others.
    pub publish: Notify,
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
    /// Troubles that last, as all daemons know them.
    pub alarms: Alarms,
    /// Counters.
    pub metrics: Metrics,
    /// High availability, if this host takes part in it.
    pub ha: Option<Ha>,
    /// Hosts that take no VMs, by node.
    pub drained: Table<String, HostDrain>,
    /// What is known of this host's hardware.
    pub health: Health,
    /// Rounds of balancing.
    pub rounds: Table<String, BalanceRound>,
    /// The way to other hosts' hypervisors.
    pub others: Arc<dyn Connector>,
    /// Wakes the scheduler.
    pub schedule: Notify,
    /// When it started.
    pub started: Timestamp,
    certificate: RwLock<Option<Certificate>>,
    planned: RwLock<Arc<Planned>>,
    followed: watch::Sender<Revision>,
    stopping: AtomicBool,
}

/// What [`Daemon::new`] puts together; see the fields of the same names.
#[allow(missing_docs)]
pub struct Parts {
    pub config: Config,
    pub kv: Kv,
    pub inventory: Arc<Inventory>,
    pub others: Arc<dyn Connector>,
    pub hub: Arc<Hub>,
    pub events: Events,
    pub audit: Audit,
    pub me: Me,
    pub identity: Option<Arc<Identity>>,
    pub ha: Option<Ha>,
    pub now: Timestamp,
}

impl Daemon {
    /// Loads what the state store has.
    pub async fn new(parts: Parts) -> Result<Self> {
        let Parts { config, kv, inventory, others, hub, events, audit, me, identity, ha, now } = parts;
        let is_cluster = config.cluster.is_some();
        let nodes = Arc::new(Nodes::load(kv.clone(), me, is_cluster).await?);
        let peers = Arc::new(Peers::new(nodes.clone(), identity)?);
        let claims = Arc::new(Claims::load(kv.clone(), nodes.clone()).await?);
        Ok(Self {
            registry: Registry::load(&kv, nodes.clone(), inventory.clone()).await?,
            leader: Leader::new(is_cluster),
            publish: Notify::new(),
            followed: watch::Sender::new(Revision::default()),
            vms: KnownVms::load(kv.clone()).await?,
            repositories: Repositories::load(kv.clone(), &config.repositories, peers.clone()).await?,
            jobs: Arc::new(Jobs::load(kv.clone(), hub.clone(), nodes.clone(), claims.clone()).await?),
            nodes,
            peers,
            served: Served::default(),
            proxied: Sessions::default(),
            claims,
            policies: Policies::load(kv.clone()).await?,
            alarms: Alarms::load(&kv).await?,
            access: Access::load(kv.clone()).await?,
            drained: Table::load(&kv, moves::drained::PREFIX).await?,
            health: Health::default(),
            rounds: Table::load(&kv, moves::balance::PREFIX).await?,
            others,
            config: RwLock::new(Arc::new(config)),
            kv,
            inventory,
            hub,
            events,
            audit,
            metrics: Metrics::default(),
            ha,
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
            ("[cluster]", now.node != next.node || now.cluster != next.cluster),
            ("[ha]", now.ha != next.ha),
        ] {
            if differs {
                tracing::warn!("{what} changed in the configuration; that needs a restart of the daemon");
            }
        }
        self.repositories.reconfigure(&next.repositories);
        let kept = (now.listen, now.socket.clone(), now.state_dir.clone(), now.connect.clone());
        let (listen, socket, state_dir, connect) = kept;
        let (node, cluster, ha) = (now.node.clone(), now.cluster.clone(), now.ha.clone());
        let next = Config { listen, socket, state_dir, connect, node, cluster, ha, ..next };
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        self.events.notifier.reconfigure();
        self.schedule.notify_one();
        self.jobs.wake.notify_one();
        Ok(())
    }

    /// The listener's certificate.
    pub fn certificate(&self) -> Option<Certificate> {
        self.certificate.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another certificate is in use.
    pub fn set_certificate(&self, certificate: Certificate) {
        *self.certificate.write().unwrap_or_else(PoisonError::into_inner) = Some(certificate);
    }

    /// The host's name as far as it is known.
    pub fn host_name(&self) -> String {
        self.inventory.world().host.name.clone()
    }

    /// Every host and VM as they are known now.
    pub fn fleet(&self) -> Arc<Fleet> {
        self.registry.fleet()
    }

    /// The node that serves a repository, if it is not for every node to reach by itself.
    pub fn owner_of(&self, repository: &str) -> Option<String> {
        let entry = self.repositories.find(Some(repository)).ok()?;
        peers::served_by(&entry.config.location).map(|(node, _)| node.to_owned())
    }

    /// This host.
    pub fn here(&self) -> Place {
        Place { node: self.nodes.me.name.clone(), host: self.host_name() }
    }

    /// Where a job is to be done: a backup or a move where its VM is, a removal where the repository is, the rest here.
    pub fn place_for(&self, new: &NewJob) -> Place {
        let fleet = self.fleet();
        let placed = new.vm.as_ref().and_then(|vm| fleet.vms.get(&vm.uuid));
        match (&new.work, placed) {
            (work, Some(placed)) if work.follows_its_vm() => {
                Place { node: placed.node.clone(), host: placed.host.clone() }
            }
            // Others may only add to what a node serves: it deletes itself.
            (Work::Prune { .. } | Work::Gc {}, _) => match self.owner_of(&new.repository) {
                Some(node) => {
                    let host = fleet.hosts.get(&node).map_or_else(|| node.clone(), |host| host.name.clone());
                    Place { node, host }
                }
                None => self.here(),
            },
            _ => self.here(),
        }
    }

    /// Everything up to a revision of the state store is known here.
    pub fn follow_to(&self, revision: Revision) {
        self.followed.send_replace(revision);
    }

    /// Waits until everything up to a revision is known here.
    pub async fn caught_up(&self, revision: Revision) {
        // The sender lives as long as this does.
        let _ = self.followed.subscribe().wait_for(|followed| *followed >= revision).await;
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

    /// Hosts whose daemon answers, by name: they can read and store for others, whatever is with their libvirt.
    pub fn daemons(&self) -> BTreeSet<String> {
        let fleet = self.fleet();
        let there = fleet.hosts.iter().filter(|(node, _)| self.nodes.is_there(node));
        there.map(|(_, host)| host.name.clone()).collect()
    }

    /// Names of the hosts.
    pub fn host_names(&self) -> BTreeSet<String> {
        self.fleet().hosts.values().map(|host| host.name.clone()).collect()
    }

    /// Names of the repositories.
    pub fn repository_names(&self) -> BTreeSet<String> {
        self.repositories.all().iter().map(|entry| entry.config.name.clone()).collect()
    }

    /// Measures how large a repository is and tells of it.
    pub async fn measure(&self, entry: &Arc<Entry>) {
        match self.repositories.measure(entry).await {
            Ok(()) => self.hub.send("repositories", "repository", &views::repository(self, entry)),
            Err(problem) => {
                tracing::warn!(repository = entry.config.name, %problem, "it could not be measured");
            }
        }
    }

    /// Reads a repository's restore points again and tells of it.
    pub async fn refresh(&self, entry: &Arc<Entry>) {
        let changed = entry.refresh().await;
        let view = entry.view();
        if changed {
            let name = entry.config.name.clone();
            let mut note = match &view.error {
                None => Note::new(Severity::Info, "repository-state", format!("repository {name} can be used"))
                    .says(Said::from(Saying::RepositoryUsable).with("repository", name.as_str())),
                Some(error) => {
                    let text = format!("repository {name} cannot be used: {error}");
                    tracing::error!("{text}");
                    let said = Said::from(Saying::RepositoryUnusable).with("repository", name.as_str());
                    Note::new(Severity::Error, "repository-state", text).says(said.with("why", error.to_string()))
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
    /// By UUID.
    pub table: Table<Uuid, Known>,
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
        Ok(Self { table: Table::load(&kv, "/v1/vms/").await?, kv })
    }

    /// When a VM was first seen; now, if it was not.
    pub fn first_seen(&self, vm: Uuid) -> Timestamp {
        self.known(vm).map_or_else(Timestamp::now, |known| known.first_seen)
    }

    /// What is remembered.
    pub fn known(&self, vm: Uuid) -> Option<Known> {
        self.table.get(&vm).map(|known| Known::clone(&known))
    }

    /// Remembers VMs with their names and tags, in as few transactions as they fit in; those that are new.
    pub async fn see(&self, seen: &[(Uuid, &str, &[String])]) -> Result<BTreeSet<Uuid>> {
        let (mut new, mut changed) = (BTreeSet::new(), Vec::new());
        for (vm, name, tags) in seen {
            let before = self.known(*vm);
            let first_seen = before.as_ref().map_or_else(Timestamp::now, |known| known.first_seen);
            let known = Known { name: (*name).to_owned(), first_seen, tags: tags.to_vec() };
            if before.is_none() {
                new.insert(*vm);
            }
            if before.as_ref() != Some(&known) {
                changed.push((*vm, known));
            }
        }
        for some in changed.chunks(virtward_cluster::TXN_LEN_MAX) {
            let put = |(vm, known): &(Uuid, Known)| kv::put(&format!("/v1/vms/{vm}"), known);
            let ops = some.iter().map(put).collect::<Result<Vec<_>>>()?;
            if let Some(at) = self.kv.commit(Vec::new(), ops).await? {
                some.iter().for_each(|(vm, known)| _ = self.table.put(*vm, at, known.clone()));
            }
        }
        Ok(new)
    }
}
