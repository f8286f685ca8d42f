//! What is done to a cluster as a whole: made, joined, looked at, saved, restored. For the command line, mostly while no
//! daemon runs on the host.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::Serialize;
use virtward_api::{ClusterLeader, ClusterNode, ClusterStatus, Code, HostState, Problem};
use virtward_cluster::{
    EmbeddedOptions, EmbeddedStore, Store,
    ca::{self, ClusterKey, Fingerprint, NewKey, Role, Subject},
    embedded,
    state::{self, Summary},
};

use crate::{
    cluster::leader,
    config::{ClusterConfig, Config},
    daemon::Daemon,
    failures::{self, Result},
    peers::{
        identity::{self, Files, problem},
        join::{self, membership, names_of},
    },
    wire_up,
};

/// What `cluster init` did.
#[derive(Clone, Debug)]
pub struct Made {
    /// SHA-256 of the authority's certificate.
    pub authority_sha256: String,
    /// What was taken over from the state file of this host, if there was one.
    pub moved: Option<Summary>,
}

/// Makes a cluster of which this host is the first node. `config` is what it will be: with its `[cluster]`.
pub async fn init(config: &Config, name: &str) -> Result<Made> {
    let cluster = cluster_of(config)?;
    let address = cluster.address.clone().unwrap_or_default();
    join::check(&config.node, &address)?;
    if cluster.dir.join("cluster.key").exists() {
        let dir = cluster.dir.display();
        return Err(Problem::new(Code::Conflict, format!("this host is a member of a cluster already, by {dir}"))
            .hint("virtward cluster status shows it"));
    }
    let store = wire_up::etcd(&cluster.etcd)?;
    let held = store.list(b"").await.map_err(|error| failures::state(&error))?;
    if !held.entries.is_empty() {
        let (count, at) = (held.entries.len(), store.location());
        return Err(Problem::new(Code::Conflict, format!("there are {count} records of a cluster in {at} already"))
            .hint("join it with a token: virtward cluster join TOKEN; or give another --etcd-prefix"));
    }
    let moved = take_over(config, &store).await?;
    found(&store, config, cluster, name).await.map(|authority| Made { authority_sha256: authority.to_string(), moved })
}

/// Makes the authority, the first node, and its identity.
pub async fn found(store: &dyn Store, config: &Config, cluster: &ClusterConfig, name: &str) -> Result<Fingerprint> {
    let now = Timestamp::now();
    let address = cluster.address.clone().unwrap_or_default();
    let wrong = |error: ca::Error| problem(&error);
    let cluster_key = ClusterKey::generate().map_err(wrong)?;
    let authority = ca::create_ca(store, &cluster_key, name, now).await.map_err(wrong)?;
    let key = NewKey::generate().map_err(wrong)?;
    let subject = Subject { name: config.node.clone(), role: Role::Node, addresses: names_of(Some(&address)) };
    let chain = authority.issue(&key.request_der, &subject, now).map_err(wrong)?;
    let files = Files {
        certificate_pem: &chain,
        key_pem: &key.key_pem,
        authority_pem: authority.certificate_pem(),
        cluster_key: &cluster_key,
    };
    identity::write(&cluster.dir, &files)?;
    let (compare, put) = membership(&config.node, &address, now)?;
    let outcome = store.txn(vec![compare], vec![put]).await.map_err(|error| failures::state(&error))?;
    // A node of this name that was taken over is this node.
    tracing::debug!(is_new = outcome.succeeded, "the first node");
    Ok(authority.fingerprint())
}

fn cluster_of(config: &Config) -> Result<&ClusterConfig> {
    config.cluster.as_ref().ok_or_else(|| {
        Problem::new(
            Code::Conflict,
            "the configuration names no cluster; the state of this host is in a file of its own",
        )
        .hint("virtward cluster init --etcd URLS makes a cluster")
    })
}

/// What this host did alone goes on in the cluster: policies, tokens, history.
async fn take_over(config: &Config, into: &dyn Store) -> Result<Option<Summary>> {
    let path = config.state_dir.join(wire_up::STATE_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let wrong = |error: virtward_cluster::Error| failures::state(&error);
    let alone = EmbeddedStore::open(&path, EmbeddedOptions::default()).map_err(|error| match error {
        virtward_cluster::Error::InUse { .. } => failures::state(&error)
            .hint("stop the daemon of this host first: systemctl stop virtward; start it again afterwards"),
        error => failures::state(&error),
    })?;
    let saved = config.state_dir.join(format!("state-before-cluster-{}.json", Timestamp::now().as_second()));
    let summary = state::export(&alone, &saved).await.map_err(wrong)?;
    state::import(into, &saved, false).await.map_err(wrong)?;
    Ok(Some(summary))
}

/// Makes this host a node of the cluster that the node at `at` belongs to; the configuration to come.
pub async fn join(token: &str, at: &str, name: &str, own: &ClusterConfig) -> Result<ClusterConfig> {
    join::join(token, at, name, own).await
}

/// Writes the state into a file.
pub async fn backup_state(config: &Config, file: &Path) -> Result<Summary> {
    let store = wire_up::state(config)?;
    state::export(&*store, file).await.map_err(|error| failures::state(&error))
}

/// Replaces the state by that of a file. Refused while any daemon beats, and, unless `replace`, where there is a state.
pub async fn restore_state(config: &Config, file: &Path, replace: bool) -> Result<Summary> {
    if config.cluster.is_none() && is_state_file(file)? {
        return Err(Problem::new(Code::Conflict, format!("{} is a copy of a state file, no export", file.display()))
            .hint(format!("virtward state restore {}", file.display())));
    }
    let store = wire_up::state(config)?;
    let wrong = |error: virtward_cluster::Error| failures::state(&error);
    let beats = store.list(b"/v1/presence/").await.map_err(wrong)?;
    if !beats.entries.is_empty() {
        let names = beats
            .entries
            .iter()
            .map(|entry| String::from_utf8_lossy(&entry.key).trim_start_matches("/v1/presence/").to_owned());
        let names = names.collect::<Vec<_>>().join(", ");
        return Err(Problem::new(Code::Busy, format!("daemons run on this state: {names}"))
            .hint("stop them all first: systemctl stop virtward on each node"));
    }
    state::import(&*store, file, replace).await.map_err(wrong)
}

/// The cluster as a daemon sees it.
pub async fn status(daemon: &Daemon) -> ClusterStatus {
    let nodes = &daemon.nodes;
    let mut state_error = nodes.lost_store().map(|(_, why)| why);
    let leader = match leader::current(&daemon.kv).await {
        Ok(record) => record,
        Err(problem) => {
            state_error.get_or_insert(problem.detail);
            None
        }
    };
    let fleet = daemon.fleet();
    let shown = nodes.records.all().into_iter().map(|(name, record)| {
        let host = fleet.hosts.get(&name);
        let reason = match name == nodes.me.name {
            true => daemon.inventory.world().host.reason.clone(),
            false => daemon.registry.hosts.get(&name).and_then(|of| daemon.registry.state_of(&name, &of).1),
        };
        ClusterNode {
            host: host.map(|host| host.name.clone()),
            address: record.address.clone(),
            is_there: nodes.is_there(&name),
            host_state: host.map_or(HostState::Unknown, |host| host.state),
            reason,
            joined: record.joined,
            started: record.started,
            version: Some(record.version.clone()).filter(|version| !version.is_empty()),
            name,
        }
    });
    let authority = daemon.peers.identity().and_then(|own| authority_of(&own.authorities()));
    ClusterStatus {
        node: nodes.me.name.clone(),
        is_cluster: nodes.is_cluster,
        state: daemon.kv.location(),
        state_error,
        authority_sha256: authority,
        leader: leader.filter(|of| nodes.is_there(&of.node)).map(|record| ClusterLeader {
            node: record.node,
            epoch: record.epoch,
            since: record.since,
        }),
        nodes: shown.collect(),
        warnings: warnings(daemon),
    }
}

fn authority_of(pem: &str) -> Option<String> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    Some(Fingerprint::of(&der).to_string())
}

/// What a person should look at.
fn warnings(daemon: &Daemon) -> Vec<String> {
    let mut warnings = Vec::new();
    if daemon.nodes.is_removed() {
        warnings
            .push("this node is not a member any more: it starts nothing; stop its daemon, or join again".to_owned());
    }
    let fleet = daemon.fleet();
    for (vm, hosts) in &fleet.twice {
        let name = fleet.vms.get(vm).map_or_else(|| vm.to_string(), |placed| placed.view.vm.name.clone());
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        warnings.push(format!(
            "{name} ({vm}) runs on {} at the same time; shut one of them off at once",
            hosts.join(" and ")
        ));
    }
    // One name has to be one repository everywhere, or a policy's backups end up in different ones.
    let mut ids: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (node, record) in daemon.registry.hosts.all() {
        for (name, id) in &record.repositories {
            if let Some(id) = id {
                ids.entry(name.clone()).or_default().entry(id.clone()).or_default().insert(node.clone());
            }
        }
    }
    for (name, of) in ids.into_iter().filter(|(_, of)| of.len() > 1) {
        let each: Vec<String> = of.values().map(|nodes| nodes.iter().cloned().collect::<Vec<_>>().join(", ")).collect();
        let each = each.join(" | ");
        warnings
            .push(format!("repository {name} is another one on different nodes: {each}; name one that all can reach"));
    }
    let versions: BTreeSet<String> =
        daemon.nodes.records.values().iter().map(|record| record.version.clone()).collect();
    let versions: Vec<String> = versions.into_iter().filter(|version| !version.is_empty()).collect();
    if versions.len() > 1 {
        warnings.push(format!("the nodes run different versions: {}", versions.join(", ")));
    }
    warnings
}

/// An automatic backup of the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StateCopy {
    /// The file.
    pub file: PathBuf,
    /// When it was made.
    pub made: Timestamp,
    /// Its size.
    pub bytes: u64,
}

/// What [`restore_embedded`] did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StateRestored {
    /// The backup that was taken.
    pub from: PathBuf,
    /// Where the file that was there is now.
    pub set_aside: Option<PathBuf>,
    /// Backups that were passed over, and why.
    pub skipped: Vec<String>,
    /// Revision that the state goes on from.
    pub revision: u64,
}

/// The state file of this host, if its state is in one.
fn state_file(config: &Config) -> Result<PathBuf> {
    match &config.cluster {
        Some(cluster) if !cluster.etcd.endpoints.is_empty() => Err(Problem::new(
            Code::Conflict,
            "the state of this host is that of its cluster, in etcd; there is no file of its own",
        )
        .hint("virtward cluster restore-state FILE brings a saved state of a cluster back")),
        _ => Ok(config.state_dir.join(wire_up::STATE_FILE)),
    }
}

/// The automatic backups of the state file, newest first.
pub fn state_backups(config: &Config) -> Result<Vec<StateCopy>> {
    let of = |backup: embedded::Backup| StateCopy { file: backup.path, made: backup.made, bytes: backup.bytes };
    Ok(embedded::backups(&state_file(config)?).into_iter().map(of).collect())
}

/// Puts a backup in the place of the state file, which no daemon may use: the one that is named, or the newest automatic
/// one that is intact. What was there is kept.
pub async fn restore_embedded(config: &Config, named: Option<&Path>) -> Result<StateRestored> {
    let path = state_file(config)?;
    let stopped = |error: virtward_cluster::Error| match error {
        virtward_cluster::Error::InUse { .. } => {
            failures::state(&error).hint("stop the daemon of this host first: systemctl stop virtward")
        }
        error => failures::state(&error),
    };
    let candidates = match named {
        Some(file) => vec![file.to_owned()],
        None => embedded::backups(&path).into_iter().map(|backup| backup.path).collect(),
    };
    let mut skipped = Vec::new();
    for from in candidates {
        let made = match is_state_file(&from)? {
            true => embedded::restore_backup(&path, &from),
            false => from_export(&path, &from).await,
        };
        match made {
            Ok(restored) => {
                let (set_aside, revision) = (restored.set_aside, restored.revision.0);
                return Ok(StateRestored { from, set_aside, skipped, revision });
            }
            Err(virtward_cluster::Error::Corrupt { what, .. }) if named.is_none() => {
                skipped.push(format!("{} is damaged ({what}); the next older one is tried", from.display()));
            }
            Err(virtward_cluster::Error::Corrupt { what, .. }) => {
                return Err(Problem::new(Code::Damaged, format!("{} is damaged ({what})", from.display()))
                    .hint("nothing was changed; virtward state list shows other backups"));
            }
            Err(error) => return Err(stopped(error)),
        }
    }
    let tried = if skipped.is_empty() { "there is none" } else { "all of them are damaged" };
    Err(Problem::new(Code::NotFound, format!("no automatic backup of {} can be used: {tried}", path.display())).hint(
        "name a copy or an export that is kept elsewhere; without one, move the state file away and the daemon begins anew: \
         apply the policies again, restore points are in the repository",
    ))
}

/// Whether a file is a copy of a state file; else it has to be an export.
fn is_state_file(path: &Path) -> Result<bool> {
    use std::io::Read;
    let mut begins = Vec::new();
    let file = std::fs::File::open(path).and_then(|file| file.take(16).read_to_end(&mut begins));
    file.map_err(|error| Problem::new(Code::NotFound, format!("cannot read {}: {error}", path.display())))?;
    // One that is cut short or empty is told as a damaged copy.
    Ok(begins.starts_with(b"SQLite format 3\0") || !begins.starts_with(b"{"))
}

/// Makes a state file of an export, and puts that in place.
async fn from_export(path: &Path, export: &Path) -> virtward_cluster::Result<embedded::Restored> {
    state::inspect(export)?;
    let staged = path.with_file_name("state-of-export.db");
    let clear = || {
        let _ = std::fs::remove_file(&staged);
        let _ = std::fs::remove_dir_all(staged.with_extension("backups"));
    };
    clear();
    let made = async {
        let store = EmbeddedStore::open(&staged, EmbeddedOptions::default())?;
        state::import(&store, export, false).await?;
        drop(store);
        embedded::restore_backup(path, &staged)
    };
    let made = made.await;
    clear();
    made
}
