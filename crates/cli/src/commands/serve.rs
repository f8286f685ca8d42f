//! `virtward serve`: the daemon of this host.

use std::{env, path::PathBuf, sync::Arc, time::Duration};

use virtward_decide::{
    balance::Eagerness,
    schedule::{Limit, Limits},
};
use virtward_engine::{BackupOptions, Hooks};
use virtward_server::{
    Listening, Reload,
    config::{
        BalanceConfig, ClusterConfig, Config, DEFAULT_REPOSITORY, Etcd, MigrationCertificates, MovesConfig,
        RepositoryConfig, SecretFile,
    },
    notify,
    wire_up::Wiring,
};

use crate::{
    app::App,
    cli::Global,
    config::{self, Cluster, SecretSource, Server, Settings},
    connect,
    exit::{Failure, Kind},
    health_config, notify_config, out,
};

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Keeps an inventory of the VMs of this host, backs them up as policies say, and
answers the API on a Unix socket that only root may use. HTTPS is off until
listen in [server] of the configuration names an address, for example
  [server]
  listen = \"0.0.0.0:8460\"

Everything else comes from the same configuration as that of the other commands.
SIGHUP reads it again; SIGTERM stops running jobs, records them, and ends. A
daemon that was killed finds its jobs interrupted when it starts and runs those
of policies again. Logs go to standard error; VIRTWARD_LOG=debug says more.

Examples:
  virtward serve
  virtward serve --config /etc/virtward/config.toml
  systemctl reload virtward")]
pub struct Args {}

/// Runs it until it is told to stop.
pub async fn run(app: &App, global: &Global) -> Result<(), Failure> {
    let config = configuration(&app.settings, connect::thaw_guard())?;
    let wiring = {
        let config = config.clone();
        connect::blocking(move || Ok(Wiring::production(&config))).await?
    };
    let wiring = match wiring {
        Ok(wiring) => wiring,
        Err(problem) => {
            notify::start_failed(&config, &problem).await;
            return Err(problem.into());
        }
    };
    let (flags, settings) = (global.clone(), app.settings.clone());
    let guard = connect::thaw_guard();
    let reload: Reload = Arc::new(move || {
        let next = config::load(&flags, &|name| env::var_os(name)).map_err(|failure| failure.message)?;
        configuration(&next, guard.clone()).map_err(|failure| failure.message)
    });
    let (sender, ready) = tokio::sync::oneshot::channel::<Listening>();
    let socket = config.socket.clone();
    tokio::spawn(async move {
        let Ok(listening) = ready.await else { return };
        out::note(&format!("virtward answers on {}", socket.display()));
        match (listening.https, listening.certificate_sha256) {
            (Some(address), Some(fingerprint)) => {
                out::note(&format!("virtward answers on https://{address}, certificate SHA-256 {fingerprint}"));
                out::note("make a token to log in with: virtward token create NAME --role admin");
            }
            _ => out::note(&format!(
                "HTTPS is off; to switch it on, put listen = \"0.0.0.0:8460\" into [server] of {}",
                settings.file.display()
            )),
        }
    });
    let outcome = virtward_server::run(config.clone(), wiring, reload, app.cancel.clone(), sender).await;
    if let Err(problem) = &outcome {
        notify::start_failed(&config, problem).await;
    }
    Ok(outcome?)
}

/// What the daemon is told.
pub fn configuration(settings: &Settings, thaw_guard: Vec<String>) -> Result<Config, Failure> {
    let server = &settings.server;
    let tls = match (&server.tls_cert, &server.tls_key) {
        (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
        (None, None) => None,
        _ => {
            return Err(Failure::new(Kind::Usage, "[server] names one of tls-cert and tls-key")
                .hint("name both, or neither to have a certificate made"));
        }
    };
    let mut repositories = vec![RepositoryConfig {
        name: DEFAULT_REPOSITORY.into(),
        location: settings.repo.clone(),
        store: settings.store.clone(),
        secret: main_secret(&settings.secret),
    }];
    for (name, other) in &settings.repositories {
        if name == DEFAULT_REPOSITORY || other.location.is_empty() {
            return Err(Failure::new(Kind::Usage, format!("[repositories.{name}] cannot be used"))
                .hint("give it a location; the name default is that of the main repository, see repo"));
        }
        let secret = match (&other.password_file, &other.key_file) {
            (Some(path), None) => SecretFile::Password(path.clone()),
            (None, Some(path)) => SecretFile::Key(path.clone()),
            (None, None) => main_secret(&settings.secret),
            (Some(_), Some(_)) => {
                let message = format!("[repositories.{name}] names both a password file and a key file");
                return Err(Failure::new(Kind::Usage, message).hint("name the one that opens it"));
            }
        };
        let (location, store) = (other.location.clone(), settings.store.clone());
        repositories.push(RepositoryConfig { name: name.clone(), location, store, secret });
    }
    Ok(Config {
        config_file: settings.file.exists().then(|| settings.file.clone()),
        socket: settings.socket(),
        state_dir: server.state_dir.clone().unwrap_or_else(|| PathBuf::from("/var/lib/virtward")),
        listen: server.listen,
        tls,
        connect: settings.connect.clone(),
        dirs: connect::dirs(settings),
        thaw_guard: Some(thaw_guard),
        repositories,
        backup: backup(settings),
        jobs_max: server.jobs_max.unwrap_or(2).max(1),
        limits: limits(server),
        reconcile: Duration::from_secs(server.reconcile_s.unwrap_or(60).max(1)),
        stop_timeout: Duration::from_secs(server.stop_timeout_s.unwrap_or(60)),
        node: node(settings),
        cluster: settings.cluster.as_ref().map(|cluster| self::cluster(settings, cluster)).transpose()?,
        notify: notify_config::settle(&settings.notify)?,
        ha: settings.ha.as_ref().map(super::ha::configuration).transpose()?,
        moves: MovesConfig {
            uri: settings.moves.uri.clone(),
            address: settings.moves.address.clone(),
            bandwidth: settings.moves.bandwidth,
            connections: settings.moves.connections.unwrap_or(0).min(64),
            tls: settings.moves.tls.unwrap_or(false),
            certificates: certificates(&settings.moves)?,
            rules: settings.moves.rules.clone(),
        },
        balance: balance(&settings.balance)?,
        health: health_config::settle(&settings.health)?,
    })
}

/// Certificates of the cluster for migrations.
fn certificates(moves: &config::Moves) -> Result<Option<MigrationCertificates>, Failure> {
    match (&moves.tls_dir, &moves.tls_group) {
        (Some(dir), group) if dir.is_absolute() => {
            Ok(Some(MigrationCertificates { dir: dir.clone(), group: group.clone() }))
        }
        (Some(dir), _) => {
            let text = format!("[moves] tls-dir is {}; give an absolute path", dir.display());
            Err(Failure::new(Kind::Usage, text))
        }
        (None, Some(_)) => Err(Failure::new(Kind::Usage, "[moves] has tls-group and no tls-dir")),
        (None, None) => Ok(None),
    }
}

/// When VMs move for the sake of load.
fn balance(settings: &config::Balance) -> Result<BalanceConfig, Failure> {
    let base = BalanceConfig::default();
    let usage = |message: &str| Failure::new(Kind::Usage, format!("[balance] {message}"));
    let eagerness = match settings.eagerness {
        None => base.eagerness,
        Some(level) => Eagerness::new(level).ok_or_else(|| usage("eagerness is from 1 to 5"))?,
    };
    let interval = settings.interval_s.map_or(base.interval, Duration::from_secs);
    let watch = settings.watch_s.map_or(base.watch.min(interval / 2), Duration::from_secs);
    if watch.is_zero() || watch >= interval {
        return Err(usage("watch-s is at least 1 and less than interval-s"));
    }
    Ok(BalanceConfig {
        mode: settings.mode.unwrap_or(base.mode),
        eagerness,
        hold: settings.hold,
        min_gain_percent: settings.min_gain_percent,
        interval,
        watch,
        parallel: settings.parallel.map_or(base.parallel, |parallel| usize::from(parallel.clamp(1, 4))),
        link: settings.link.unwrap_or(base.link),
    })
}

/// How many backups may run at once beyond this host.
fn limits(server: &Server) -> Limits {
    let default = Limits::default();
    Limits {
        total: server.cluster_backups_max.unwrap_or(default.total).max(1),
        per_storage: server.storage_backups_max.map_or(default.per_storage, |most| Limit::each(most.max(1))),
        per_repository: server.repository_backups_max.map_or(default.per_repository, |most| Limit::each(most.max(1))),
        ..default
    }
}

/// Name of this node.
pub fn node(settings: &Settings) -> String {
    let named = settings.cluster.as_ref().and_then(|cluster| cluster.name.clone());
    named.unwrap_or_else(virtward_server::wire_up::node_name)
}

/// Port of peers.
pub const PEER_PORT: u16 = 8461;
/// What every key in etcd begins with, unless said otherwise.
pub const ETCD_PREFIX: &str = "/virtward";

fn cluster(settings: &Settings, cluster: &Cluster) -> Result<ClusterConfig, Failure> {
    let usage = |message: &str| Failure::new(Kind::Usage, format!("[cluster] {message}"));
    let identity = match (&cluster.etcd_cert, &cluster.etcd_key) {
        (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
        (None, None) => None,
        _ => return Err(usage("names one of etcd-cert and etcd-key").hint("name both, or neither")),
    };
    if cluster.etcd.is_empty() {
        return Err(
            usage("names no etcd").hint("put the URLs of its members there, as virtward cluster init --etcd does")
        );
    }
    Ok(ClusterConfig {
        listen: Some(cluster.listen.unwrap_or_else(|| (std::net::Ipv4Addr::UNSPECIFIED, PEER_PORT).into())),
        address: cluster.address.clone(),
        etcd: Etcd {
            endpoints: cluster.etcd.clone(),
            prefix: cluster.etcd_prefix.clone().unwrap_or_else(|| ETCD_PREFIX.into()),
            ca: cluster.etcd_ca.clone(),
            identity,
        },
        dir: cluster.dir.clone().unwrap_or_else(|| settings.file.with_file_name("cluster")),
        lease: Duration::from_secs(cluster.lease_s.unwrap_or(10).clamp(2, 300)),
    })
}

fn main_secret(source: &SecretSource) -> SecretFile {
    match source {
        SecretSource::PasswordFile(path) => SecretFile::Password(path.clone()),
        SecretSource::KeyFile(path) | SecretSource::Default(path) => SecretFile::Key(path.clone()),
    }
}

fn backup(settings: &Settings) -> BackupOptions {
    let (defaults, base) = (&settings.backup, BackupOptions::default());
    BackupOptions {
        quiesce: defaults.quiesce.unwrap_or_default(),
        hooks: Hooks { pre_freeze: defaults.pre_freeze.clone(), post_thaw: defaults.post_thaw.clone(), timeout: None },
        bandwidth: defaults.bandwidth,
        compression: defaults.compression.unwrap_or_default(),
        scratch_reserve: defaults.scratch_reserve.unwrap_or(base.scratch_reserve),
        agent_timeout: defaults.agent_timeout_s.map_or(base.agent_timeout, Duration::from_secs),
        ..base
    }
}
