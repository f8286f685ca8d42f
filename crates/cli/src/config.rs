//! Where settings come from: flag, then environment, then configuration file, then default.
//!
//! The configuration file is TOML. A key that is not known is an error, because a misspelt `bandwith` that is silently
//! ignored is found on the day it matters. Pure but for reading that one file; the environment is handed in.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use virtward_decide::{pointref, retention::Age};
use virtward_model::{Bytes, QuiesceRequest, world::Mode};
use virtward_repo::{
    Compression,
    store::{
        StoreOptions,
        cache::CacheOptions,
        s3::{LockMode, ObjectLock, S3Options},
    },
};

use crate::{
    cli::Global,
    exit::{Failure, Kind},
    health_config::{self, Health},
    notify_config::{self, Notify},
};

/// Where the configuration is unless said otherwise. The key that `repo init` makes is put beside it.
pub const DEFAULT_CONFIG: &str = "/etc/virtward/config.toml";
const DEFAULT_REPO: &str = "/var/lib/virtward/repo";
const DEFAULT_CONNECT: &str = "qemu:///system";
const DEFAULT_KEY_NAME: &str = "repo.key";

/// The configuration file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct File {
    repo: Option<String>,
    connect: Option<String>,
    password_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    scratch_dir: Option<PathBuf>,
    append_only: Option<bool>,
    cache_dir: Option<PathBuf>,
    #[serde(deserialize_with = "size")]
    cache_size: Option<Bytes>,
    s3: S3,
    backup: BackupDefaults,
    retention: Retention,
    server: Server,
    cluster: Option<Cluster>,
    ha: Option<Ha>,
    moves: Moves,
    balance: Balance,
    health: Health,
    repositories: BTreeMap<String, OtherRepository>,
    notify: Notify,
}

/// `[moves]`: how VMs move between the hosts of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Moves {
    /// URI by which other hosts reach this one's libvirt.
    pub uri: Option<String>,
    /// Address to which they send memory and disks; default: that of the URI.
    pub address: Option<String>,
    /// Send at most so much per second.
    #[serde(deserialize_with = "rate")]
    pub bandwidth: Option<Bytes>,
    /// Connections at a time for one VM.
    pub connections: Option<u32>,
    /// Encrypt by the hosts' certificates for migration.
    pub tls: Option<bool>,
    /// Where certificates of the cluster for migrations are kept.
    pub tls_dir: Option<PathBuf>,
    /// The group that may read their key.
    pub tls_group: Option<String>,
    /// Rules and importance (TOML), for drains and balancing.
    pub rules: Option<PathBuf>,
}

/// `[balance]`: when VMs move for the sake of load.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Balance {
    /// `off`, `recommend` or `automatic`.
    pub mode: Option<Mode>,
    /// From 1 (only what must move) to 5 (for small gains).
    pub eagerness: Option<u8>,
    /// Rounds for which a host must have been loaded.
    pub hold: Option<u32>,
    /// Least part, in percent, of unmet demand that a plan must remove.
    pub min_gain_percent: Option<u64>,
    /// Seconds between two rounds.
    pub interval_s: Option<u64>,
    /// Seconds for which each round watches what VMs use.
    pub watch_s: Option<u64>,
    /// VMs that move at the same time.
    pub parallel: Option<u8>,
    /// What a migration can send per second.
    #[serde(deserialize_with = "rate")]
    pub link: Option<Bytes>,
}

/// `[cluster]`: how the daemons of several hosts work together. Written by `cluster init` and `cluster join`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Cluster {
    /// Name of this node; default: the host's.
    pub name: Option<String>,
    /// Where peers are answered.
    pub listen: Option<SocketAddr>,
    /// `HOST:PORT` by which peers reach this node; default: `listen`.
    pub address: Option<String>,
    /// URLs of the members of etcd.
    pub etcd: Vec<String>,
    /// What every key begins with there.
    pub etcd_prefix: Option<String>,
    /// Authorities (PEM) that etcd's certificates may come from.
    pub etcd_ca: Option<PathBuf>,
    /// Certificate chain (PEM) of this node towards etcd.
    pub etcd_cert: Option<PathBuf>,
    /// Its key.
    pub etcd_key: Option<PathBuf>,
    /// Directory of this node's certificate and keys.
    pub dir: Option<PathBuf>,
    /// Seconds that a daemon which vanished counts as present, and a leader as leading.
    pub lease_s: Option<u64>,
}

/// `[ha]`: this host restarts VMs of others, and lets its own be restarted. Times are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Ha {
    /// `/dev/watchdog`, or a keeper's socket.
    pub watchdog: Option<PathBuf>,
    /// Directories on shared storage for the disks' leases.
    pub lease_dirs: Vec<PathBuf>,
    /// Ask the other hosts when etcd is lost, instead of ending the guests.
    pub failsafe: Option<bool>,
    /// Memory for guests; default: the host's, less an eighth and 1 GiB.
    #[serde(deserialize_with = "size")]
    pub memory: Option<Bytes>,
    /// Fence devices, of every host.
    pub fence: Vec<Fence>,
    /// libvirt's directory of hooks.
    pub hooks_dir: Option<PathBuf>,
    /// libvirt's runtime directory.
    pub libvirt_dir: Option<PathBuf>,
    /// h.
    pub heartbeat_ms: Option<u64>,
    /// m.
    pub fresh_ms: Option<u64>,
    /// W.
    pub watchdog_ms: Option<u64>,
    /// R.
    pub reset_ms: Option<u64>,
    /// The part of R for writes in flight.
    pub drain_ms: Option<u64>,
    /// Clocks differ by at most so many millionths.
    pub drift_ppm: Option<u64>,
    /// Silence after which a host is declared dead.
    pub silence_ms: Option<u64>,
    /// How long a watchdog's firing is waited for.
    pub wait_ms: Option<u64>,
    /// How long a VM may take to start.
    pub start_ms: Option<u64>,
}

/// `[[ha.fence]]`: a device that takes a host's power away.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Fence {
    /// Node whose power it switches.
    pub host: String,
    /// What people call it.
    pub name: String,
    /// Fence agent, such as `fence_ipmilan`, or an absolute path.
    pub agent: String,
    /// Level 1 is tried first.
    pub level: Option<u8>,
    /// The agent's parameters.
    pub parameters: BTreeMap<String, String>,
    /// Parameters whose value is the first line of a file.
    pub secrets: BTreeMap<String, PathBuf>,
    /// Seconds that one call may take.
    pub timeout_s: Option<u16>,
    /// Seconds after a switch that the device may still say on.
    pub verify_s: Option<u16>,
    /// Further attempts.
    pub retries: Option<u8>,
}

/// `[server]`: what `virtward serve` does.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Server {
    /// Address of HTTPS, such as `0.0.0.0:8460`; off without.
    pub listen: Option<SocketAddr>,
    /// Certificate chain (PEM) for HTTPS; made by itself without.
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    pub tls_key: Option<PathBuf>,
    /// Directory of the state.
    pub state_dir: Option<PathBuf>,
    /// Most jobs at a time.
    pub jobs_max: Option<u32>,
    /// Most backups at a time in the cluster.
    pub cluster_backups_max: Option<u32>,
    /// Most backups at a time that read from one storage.
    pub storage_backups_max: Option<u32>,
    /// Most backups at a time that write to one repository.
    pub repository_backups_max: Option<u32>,
    /// Seconds between two complete looks at the hypervisor.
    pub reconcile_s: Option<u64>,
    /// Seconds that running jobs may take to clean up when the daemon stops.
    pub stop_timeout_s: Option<u64>,
}

/// `[repositories.NAME]`: a repository beside the main one, for policies.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OtherRepository {
    /// Directory or URL.
    pub location: String,
    /// File with its password.
    pub password_file: Option<PathBuf>,
    /// Its key file; without either, what opens the main repository.
    pub key_file: Option<PathBuf>,
}

/// `[retention]`: what `backup prune` keeps unless told otherwise on the command line.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Retention {
    /// Rules, as on the command line.
    pub keep_last: u32,
    /// Hours.
    pub keep_hourly: u32,
    /// Days.
    pub keep_daily: u32,
    /// Weeks.
    pub keep_weekly: u32,
    /// Months.
    pub keep_monthly: u32,
    /// Years.
    pub keep_yearly: u32,
    /// Everything that is not much older than the newest.
    #[serde(deserialize_with = "age")]
    pub keep_within: Option<Age>,
    /// Everything with one of these tags.
    pub keep_tags: Vec<String>,
    /// Nothing younger is removed.
    #[serde(deserialize_with = "age")]
    pub min_age: Option<Age>,
}

/// `[s3]`: how object storage is reached.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct S3 {
    endpoint: Option<String>,
    region: Option<String>,
    path_style: Option<bool>,
    ca_file: Option<PathBuf>,
    #[serde(deserialize_with = "lock_mode")]
    object_lock_mode: Option<LockMode>,
    object_lock_days: Option<u32>,
    emulate_conditions: bool,
}

/// `[backup]`: what `backup run` and `backup image` do unless told otherwise on the command line.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BackupDefaults {
    /// Quiescing.
    pub quiesce: Option<QuiesceRequest>,
    /// Command before the freeze.
    pub pre_freeze: Option<String>,
    /// Command after the thaw.
    pub post_thaw: Option<String>,
    /// Read limit per second.
    #[serde(deserialize_with = "rate")]
    pub bandwidth: Option<Bytes>,
    /// Compression of new data.
    #[serde(deserialize_with = "compression")]
    pub compression: Option<Compression>,
    /// Space that must stay free where the scratch images are.
    #[serde(deserialize_with = "size")]
    pub scratch_reserve: Option<Bytes>,
    /// Seconds until a silent guest agent counts as absent.
    pub agent_timeout_s: Option<u64>,
}

/// Section of any repository: their names are the operator's.
const ANY_REPOSITORY: &str = "repositories.NAME";

/// Sections whose sections have names that are the operator's.
const NAMED: [(&str, &str); 3] = [("repositories", ANY_REPOSITORY), ("webhook", "webhook.NAME"), ("mail", "mail.NAME")];

/// Every key that the file may have, as it is written there.
const KEYS: [(&str, &[&str]); 11] = [
    (
        "",
        &[
            "repo",
            "connect",
            "password-file",
            "key-file",
            "runtime-dir",
            "scratch-dir",
            "append-only",
            "cache-dir",
            "cache-size",
            "s3",
            "backup",
            "retention",
            "server",
            "cluster",
            "ha",
            "moves",
            "balance",
            "health",
            "repositories",
            "notify",
        ],
    ),
    (
        "server",
        &[
            "listen",
            "tls-cert",
            "tls-key",
            "state-dir",
            "jobs-max",
            "cluster-backups-max",
            "storage-backups-max",
            "repository-backups-max",
            "reconcile-s",
            "stop-timeout-s",
        ],
    ),
    (
        "cluster",
        &["name", "listen", "address", "etcd", "etcd-prefix", "etcd-ca", "etcd-cert", "etcd-key", "dir", "lease-s"],
    ),
    (
        "ha",
        &[
            "watchdog",
            "lease-dirs",
            "failsafe",
            "memory",
            "fence",
            "hooks-dir",
            "libvirt-dir",
            "heartbeat-ms",
            "fresh-ms",
            "watchdog-ms",
            "reset-ms",
            "drain-ms",
            "drift-ppm",
            "silence-ms",
            "wait-ms",
            "start-ms",
        ],
    ),
    ("moves", &["uri", "address", "bandwidth", "connections", "tls", "tls-dir", "tls-group", "rules"]),
    ("balance", &["mode", "eagerness", "hold", "min-gain-percent", "interval-s", "watch-s", "parallel", "link"]),
    ("ha.fence", &["host", "name", "agent", "level", "parameters", "secrets", "timeout-s", "verify-s", "retries"]),
    (ANY_REPOSITORY, &["location", "password-file", "key-file"]),
    (
        "s3",
        &["endpoint", "region", "path-style", "ca-file", "object-lock-mode", "object-lock-days", "emulate-conditions"],
    ),
    (
        "backup",
        &["quiesce", "pre-freeze", "post-thaw", "bandwidth", "compression", "scratch-reserve", "agent-timeout-s"],
    ),
    (
        "retention",
        &[
            "keep-last",
            "keep-hourly",
            "keep-daily",
            "keep-weekly",
            "keep-monthly",
            "keep-yearly",
            "keep-within",
            "keep-tags",
            "min-age",
        ],
    ),
];

fn size<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<Bytes>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Number(u64),
        Text(String),
    }
    match Size::deserialize(input)? {
        Size::Number(bytes) => Ok(Some(Bytes(bytes))),
        Size::Text(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

fn age<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<Age>, D::Error> {
    String::deserialize(input)?.parse().map(Some).map_err(serde::de::Error::custom)
}

fn compression<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<Compression>, D::Error> {
    String::deserialize(input)?.parse().map(Some).map_err(serde::de::Error::custom)
}

fn lock_mode<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<LockMode>, D::Error> {
    String::deserialize(input)?.parse().map(Some).map_err(serde::de::Error::custom)
}

fn rate<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<Bytes>, D::Error> {
    match size(input)? {
        Some(Bytes(0)) => {
            Err(serde::de::Error::custom("a limit of nothing would never end; leave it out for no limit"))
        }
        rate => Ok(rate),
    }
}

/// How the repository is to be opened, as far as it was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// The first line of this file is the password.
    PasswordFile(PathBuf),
    /// This file is the key.
    KeyFile(PathBuf),
    /// Nothing was said: the key at this place if it is there, else ask.
    Default(PathBuf),
}

/// The settings after precedence.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Repository location.
    pub repo: String,
    /// How it is reached.
    pub store: StoreOptions,
    /// libvirt URI.
    pub connect: String,
    /// Secret.
    pub secret: SecretSource,
    /// Directory for locks and sockets, if not the default.
    pub runtime_dir: Option<PathBuf>,
    /// Directory for scratch images, if not the default.
    pub scratch_dir: Option<PathBuf>,
    /// Defaults of backups.
    pub backup: BackupDefaults,
    /// Defaults of pruning.
    pub retention: Retention,
    /// What the daemon does.
    pub server: Server,
    /// How the daemons of several hosts work together, if they do.
    pub cluster: Option<Cluster>,
    /// High availability, if this host takes part in it.
    pub ha: Option<Ha>,
    /// How VMs move between hosts.
    pub moves: Moves,
    /// When they move for the sake of load.
    pub balance: Balance,
    /// Who knows how this host's hardware is.
    pub health: Health,
    /// Repositories beside the main one.
    pub repositories: BTreeMap<String, OtherRepository>,
    /// Whom the daemon tells of what happens.
    pub notify: Notify,
    /// The configuration file.
    pub file: PathBuf,
}

impl Settings {
    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime_dir.clone().unwrap_or_else(|| "/run/virtward".into()).join("api.sock")
    }
}

/// Reads the configuration file and settles every setting. `env` answers for environment variables.
pub fn load(flags: &Global, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Settings, Failure> {
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    let named = flags.config.clone().or_else(|| env("VIRTWARD_CONFIG").map(PathBuf::from));
    let path = named.clone().unwrap_or_else(|| DEFAULT_CONFIG.into());
    let file = match std::fs::read_to_string(&path) {
        Ok(text) => parse(&path, &text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => File::default(),
        Err(error) => return Err(Failure::io(format!("cannot read the configuration {}", path.display()))(error)),
    };
    settle(flags, &env, file, &path)
}

fn settle(
    flags: &Global,
    env: &dyn Fn(&str) -> Option<OsString>,
    file: File,
    path: &Path,
) -> Result<Settings, Failure> {
    let text = |flag: &Option<String>, name: &str, file: Option<String>, default: &str| match (flag, env(name)) {
        (Some(value), _) => Ok(value.clone()),
        (None, Some(value)) => value
            .into_string()
            .map_err(|value| Failure::new(Kind::Usage, format!("{name} is not valid UTF-8: {}", value.display()))),
        (None, None) => Ok(file.unwrap_or_else(|| default.to_owned())),
    };
    let store = store_options(flags, env, &file)?;
    let layers = [
        ("the command line", flags.password_file.clone(), flags.key_file.clone()),
        (
            "the environment",
            env("VIRTWARD_PASSWORD_FILE").map(PathBuf::from),
            env("VIRTWARD_KEY_FILE").map(PathBuf::from),
        ),
        ("the configuration", file.password_file, file.key_file),
    ];
    let mut secret = SecretSource::Default(path.with_file_name(DEFAULT_KEY_NAME));
    for (layer, password, key) in layers {
        secret = match (password, key) {
            (None, None) => continue,
            (Some(path), None) => SecretSource::PasswordFile(path),
            (None, Some(path)) => SecretSource::KeyFile(path),
            (Some(_), Some(_)) => {
                return Err(Failure::new(
                    Kind::Usage,
                    format!("{layer} names both a password file and a key file for the repository"),
                )
                .hint("name the one that opens it"));
            }
        };
        break;
    }
    Ok(Settings {
        repo: text(&flags.repo, "VIRTWARD_REPO", file.repo, DEFAULT_REPO)?,
        store,
        connect: text(&flags.connect, "VIRTWARD_CONNECT", file.connect, DEFAULT_CONNECT)?,
        secret,
        runtime_dir: file.runtime_dir,
        scratch_dir: file.scratch_dir,
        backup: file.backup,
        retention: file.retention,
        server: file.server,
        cluster: file.cluster,
        ha: file.ha,
        moves: file.moves,
        balance: file.balance,
        health: file.health,
        repositories: file.repositories,
        notify: file.notify,
        file: path.to_owned(),
    })
}

/// Bytes of local copies per repository, unless said otherwise.
const DEFAULT_CACHE: Bytes = Bytes(8 << 30);

fn store_options(flags: &Global, env: &dyn Fn(&str) -> Option<OsString>, file: &File) -> Result<StoreOptions, Failure> {
    let text = |name: &str, file: &Option<String>| match env(name) {
        Some(value) => value
            .into_string()
            .map(Some)
            .map_err(|value| Failure::new(Kind::Usage, format!("{name} is not valid UTF-8: {}", value.display()))),
        None => Ok(file.clone()),
    };
    let path_style = match text("VIRTWARD_S3_PATH_STYLE", &None)?.as_deref() {
        None => file.s3.path_style,
        Some("true" | "1" | "yes") => Some(true),
        Some("false" | "0" | "no") => Some(false),
        Some(other) => {
            let message = format!("VIRTWARD_S3_PATH_STYLE is {other:?}; give true or false");
            return Err(Failure::new(Kind::Usage, message));
        }
    };
    let object_lock = match (file.s3.object_lock_mode, file.s3.object_lock_days) {
        (None, None) => None,
        (mode, Some(days @ 1..)) => Some(ObjectLock { mode: mode.unwrap_or(LockMode::Governance), days }),
        (_, None | Some(0)) => {
            let failure = Failure::new(Kind::Usage, "[s3] asks for object lock and not for how long");
            return Err(failure.hint("set object-lock-days to the days that nobody may delete what was written"));
        }
    };
    // `HOME` may be unset or not writable for a service; root has a place of its own.
    let cache_dir = file.cache_dir.clone().or_else(|| {
        let user = env("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || env("HOME").filter(|_| !rustix::process::geteuid().is_root());
        let user = user.or_else(|| home().map(|home| Path::new(&home).join(".cache")));
        Some(user.map_or_else(|| "/var/cache/virtward".into(), |dir| dir.join("virtward")))
    });
    let max_bytes = file.cache_size.unwrap_or(DEFAULT_CACHE).0;
    Ok(StoreOptions {
        s3: S3Options {
            endpoint: text("VIRTWARD_S3_ENDPOINT", &file.s3.endpoint)?,
            region: text("VIRTWARD_S3_REGION", &file.s3.region)?,
            path_style,
            ca_file: env("VIRTWARD_S3_CA_FILE").map(PathBuf::from).or_else(|| file.s3.ca_file.clone()),
            object_lock,
            emulate_conditions: file.s3.emulate_conditions,
        },
        append_only: flags.append_only || file.append_only.unwrap_or(false),
        cache: cache_dir.filter(|_| max_bytes > 0).map(|dir| CacheOptions { dir, max_bytes }),
    })
}

fn parse(path: &Path, text: &str) -> Result<File, Failure> {
    let wrong = |offset: usize, what: &str| {
        let line = 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count();
        Failure::new(Kind::Usage, format!("{}, line {line}: {what}", path.display()))
    };
    let failed = |error: toml::de::Error| wrong(error.span().map_or(0, |span| span.start), error.message());
    let table = DeTable::parse(text).map_err(failed)?;
    check_keys("", table.get_ref(), &wrong)?;
    toml::from_str(text).map_err(failed)
}

fn check_keys(section: &str, table: &DeTable<'_>, wrong: &dyn Fn(usize, &str) -> Failure) -> Result<(), Failure> {
    let mut all = KEYS.iter().chain(&notify_config::KEYS).chain(&health_config::KEYS);
    let known = all.find(|(name, _)| *name == section).map_or(&[][..], |(_, keys)| keys);
    for (key, value) in table {
        let name = key.get_ref().as_ref();
        // The names below these are the operator's.
        if let Some(each) = NAMED.iter().find_map(|(parent, each)| (*parent == section).then_some(*each)) {
            if let DeValue::Table(inner) = value.get_ref() {
                check_keys(each, inner, wrong)?;
            }
            continue;
        }
        if !known.contains(&name) {
            let place = if section.is_empty() { String::new() } else { format!(" in [{section}]") };
            let failure = wrong(key.span().start, &format!("unknown key {name:?}{place}"));
            let near = pointref::nearest(name, known.iter().copied());
            return Err(match near.first() {
                Some(near) => failure.hint(format!("did you mean {near:?}?")),
                None => failure.hint(format!("known keys: {}", known.join(", "))),
            });
        }
        match value.get_ref() {
            // The names of an agent's parameters are the agent's.
            DeValue::Table(_) if section == "ha.fence" => {}
            DeValue::Table(inner) => check_keys(name, inner, wrong)?,
            DeValue::Array(items) if (section, name) == ("ha", "fence") => {
                for item in items {
                    if let DeValue::Table(inner) = item.get_ref() {
                        check_keys("ha.fence", inner, wrong)?;
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(flags: &Global, env: &[(&str, &str)], file: &str) -> Result<Settings, Failure> {
        let path = Path::new("/etc/virtward/config.toml");
        let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
        settle(flags, &env, parse(path, file)?, path)
    }

    #[test]
    fn nothing_said_gives_the_defaults() {
        let settings = settled(&Global::default(), &[], "").unwrap();
        assert_eq!(settings.repo, "/var/lib/virtward/repo");
        assert_eq!(settings.connect, "qemu:///system");
        assert_eq!(settings.secret, SecretSource::Default("/etc/virtward/repo.key".into()));
    }

    #[test]
    fn flag_beats_environment_beats_file() {
        let file = "repo = \"/file\"\nconnect = \"test:///file\"\nkey-file = \"/file.key\"\n";
        let env = [("VIRTWARD_REPO", "/env"), ("VIRTWARD_PASSWORD_FILE", "/env.pw")];
        let from_file = settled(&Global::default(), &[], file).unwrap();
        assert_eq!((from_file.repo.as_str(), from_file.connect.as_str()), ("/file", "test:///file"));
        assert_eq!(from_file.secret, SecretSource::KeyFile("/file.key".into()));
        let from_env = settled(&Global::default(), &env, file).unwrap();
        assert_eq!((from_env.repo.as_str(), from_env.connect.as_str()), ("/env", "test:///file"));
        assert_eq!(from_env.secret, SecretSource::PasswordFile("/env.pw".into()));
        let flags = Global { repo: Some("/flag".into()), key_file: Some("/flag.key".into()), ..Global::default() };
        let from_flags = settled(&flags, &env, file).unwrap();
        assert_eq!(from_flags.repo, "/flag");
        assert_eq!(from_flags.secret, SecretSource::KeyFile("/flag.key".into()));
    }

    #[test]
    fn object_storage_is_told_by_environment_and_file() {
        let file = "append-only = true\ncache-dir = \"/c\"\ncache-size = \"1GiB\"\n[s3]\nendpoint = \"http://f\"\n\
                    region = \"f-1\"\npath-style = true\nca-file = \"/ca\"\nobject-lock-days = 14\n\
                    object-lock-mode = \"compliance\"\n";
        let store = settled(&Global::default(), &[("VIRTWARD_S3_ENDPOINT", "http://e")], file).unwrap().store;
        assert_eq!((store.s3.endpoint.as_deref(), store.s3.region.as_deref()), (Some("http://e"), Some("f-1")));
        assert_eq!((store.s3.path_style, store.append_only), (Some(true), true));
        assert_eq!(store.s3.object_lock, Some(ObjectLock { mode: LockMode::Compliance, days: 14 }));
        assert_eq!(store.cache, Some(CacheOptions { dir: "/c".into(), max_bytes: 1 << 30 }));
        assert_eq!(settled(&Global::default(), &[], "cache-size = 0").unwrap().store.cache, None);
        let xdg = settled(&Global::default(), &[("XDG_CACHE_HOME", "/x")], "").unwrap().store;
        assert_eq!(xdg.cache.unwrap().dir, Path::new("/x/virtward"));
        let flag = Global { append_only: true, ..Global::default() };
        assert!(settled(&flag, &[], "").unwrap().store.append_only);
        for (text, says) in [
            ("[s3]\nobject-lock-mode = \"governance\"", "how long"),
            ("[s3]\nobject-lock-days = 0", "how long"),
            ("[s3]\nobject-lock-mode = \"strict\"\nobject-lock-days = 1", "strict"),
            ("[s3]\nendpont = \"x\"", "endpont"),
        ] {
            let failure = settled(&Global::default(), &[], text).unwrap_err();
            assert!(failure.message.contains(says), "{failure}");
        }
    }

    #[test]
    fn whatever_is_written_is_settled_or_refused() {
        const WRITTEN: &str = "repo = \"s3://b/p\"\ncache-size = \"1.5GiB\" # c\n[s3]\nobject-lock-days = 0x1e\n[backup]\n\
            bandwidth = '1MiB'\n[retention]\nkeep-within = \"1y2mo\"\nkeep-tags = [\"a\"]\n[repositories.x]\nrepo = \"/x\"\n\
            [[ha.fence]]\nhost = \"h\"\nparameters = { a = 1 }\n[notify]\n";
        const WITH: [&str; 12] = ["\"", "'''", "[", "]]", "=", ".", "\n", "\\u12", "\0", "\u{10ffff}", "9e99", "{"];
        let check = |text: &str| {
            if let Err(failure) = settled(&Global::default(), &[], text) {
                assert!(!failure.message.is_empty());
            }
        };
        for at in 0..WRITTEN.len() {
            let (before, after) = WRITTEN.split_at(at);
            check(before);
            for with in WITH {
                check(&format!("{before}{with}{after}"));
                check(&format!("{before}{with}{}", &after[1..]));
            }
        }
        for deep in ["a.", "[", "x = [", "{a=", "[a."] {
            let deep = deep.repeat(100_000);
            check(&deep);
            check(&format!("[repositories]\nx = {deep}"));
            check(&format!("{deep}b = 1"));
            check(&format!("[repositories.{deep}b]"));
        }
    }

    #[test]
    fn two_secrets_in_one_place_are_refused() {
        let failure = settled(&Global::default(), &[], "key-file = \"/a\"\npassword-file = \"/b\"").unwrap_err();
        assert_eq!(failure.kind, Kind::Usage);
        assert!(failure.message.contains("both"), "{failure}");
    }

    #[test]
    fn a_misspelt_key_is_named_with_its_line_and_the_key_that_was_meant() {
        let text = "repo = \"/r\"\n\n[backup]\nbandwith = \"1MiB\"\n";
        let failure = settled(&Global::default(), &[], text).unwrap_err();
        assert_eq!(
            failure.to_string(),
            "error: /etc/virtward/config.toml, line 4: unknown key \"bandwith\" in [backup]\n\
             hint: did you mean \"bandwidth\"?"
        );
        let failure = settled(&Global::default(), &[], "zzzzzzzzzz = 1").unwrap_err();
        assert!(failure.hint.unwrap().starts_with("known keys: repo, connect"));
    }

    #[test]
    fn wrong_values_and_wrong_syntax_name_their_line() {
        for (text, line, word) in [
            ("repo = \"a\"\nconnect = 3\n", 2, "string"),
            ("[backup]\nbandwidth = \"fast\"\n", 2, "not a size"),
            ("[backup]\nbandwidth = 0\n", 2, "never end"),
            ("[backup]\nquiesce = \"maybe\"\n", 2, "maybe"),
            ("repo = \n", 1, ""),
            ("repo = \"a\"\nrepo = \"b\"\n", 2, "duplicate"),
        ] {
            let failure = settled(&Global::default(), &[], text).unwrap_err();
            assert_eq!(failure.kind, Kind::Usage);
            assert!(failure.message.contains(&format!("line {line}: ")), "{failure}");
            assert!(failure.message.contains(word), "{failure}");
        }
    }

    #[test]
    fn retention_defaults_are_read() {
        let text = "[retention]\nkeep-daily = 7\nkeep-within = \"30d\"\nkeep-tags = [\"gold\"]\nmin-age = \"12h\"";
        let retention = settled(&Global::default(), &[], text).unwrap().retention;
        assert_eq!((retention.keep_daily, retention.keep_last), (7, 0));
        assert_eq!(retention.keep_within.unwrap().to_string(), "30d");
        assert_eq!((retention.keep_tags, retention.min_age.unwrap().to_string()), (vec!["gold".into()], "12h".into()));
        let failure = settled(&Global::default(), &[], "[retention]\nkeep-within = \"6m\"").unwrap_err();
        assert!(failure.message.contains("line 2") && failure.message.contains("6mo"), "{failure}");
    }

    #[test]
    fn backup_defaults_are_read() {
        let text =
            "[backup]\nbandwidth = \"100MiB\"\nquiesce = \"required\"\nagent-timeout-s = 3\nscratch-reserve = 1024";
        let backup = settled(&Global::default(), &[], text).unwrap().backup;
        assert_eq!(backup.bandwidth, Some(Bytes::mib(100)));
        assert_eq!(backup.quiesce, Some(QuiesceRequest::Required));
        assert_eq!(backup.agent_timeout_s, Some(3));
        assert_eq!(backup.scratch_reserve, Some(Bytes(1024)));
    }
}
