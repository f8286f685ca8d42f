//! What the daemon is told. Made by the command line from the same configuration file that all commands read.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use virtward_decide::{balance::Eagerness, notify::Rules, schedule::Limits};
use virtward_engine::{BackupOptions, Dirs};
use virtward_model::{Bytes, world::Mode};
use virtward_repo::store::StoreOptions;

use crate::ha::HaConfig;

/// Name of the repository that `repo` names in the configuration.
pub const DEFAULT_REPOSITORY: &str = "default";

/// Everything that the daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that it was read from, for people.
    pub config_file: Option<PathBuf>,
    /// Unix socket.
    pub socket: PathBuf,
    /// Directory of the state, logs and certificate.
    pub state_dir: PathBuf,
    /// Address of the HTTPS listener; none: off.
    pub listen: Option<SocketAddr>,
    /// Certificate and key of the listener; none: made by itself.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// libvirt URI.
    pub connect: String,
    /// Directories of jobs.
    pub dirs: Dirs,
    /// See [`virtward_engine::Env::thaw_guard`].
    pub thaw_guard: Option<Vec<String>>,
    /// Repositories; the first is the default one.
    pub repositories: Vec<RepositoryConfig>,
    /// Backups, where neither request nor policy say otherwise.
    pub backup: BackupOptions,
    /// Most jobs at a time.
    pub jobs_max: u32,
    /// Most backups at a time in the cluster, of one storage and into one repository. That of one host is `jobs_max`.
    pub limits: Limits,
    /// Between two complete looks at the hypervisor.
    pub reconcile: Duration,
    /// How long running jobs may take to clean up when the daemon stops.
    pub stop_timeout: Duration,
    /// This daemon's name among others.
    pub node: String,
    /// Several daemons over one state; none: this host alone.
    pub cluster: Option<ClusterConfig>,
    /// Whom it tells of what happens.
    pub notify: NotifyConfig,
    /// High availability; none: this host takes no part in it.
    pub ha: Option<HaConfig>,
    /// How VMs move between hosts.
    pub moves: MovesConfig,
    /// When they move for the sake of load.
    pub balance: BalanceConfig,
    /// What is known of this host's hardware.
    pub health: HealthConfig,
}

/// Who knows how this host's hardware is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthConfig {
    /// Pages of metrics, as Prometheus reads them.
    pub metrics: Vec<String>,
    /// The management controller.
    pub redfish: Option<RedfishConfig>,
    /// Between two looks.
    pub interval: Duration,
    /// Whether a host that fails is emptied.
    pub evacuate: bool,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self { metrics: Vec::new(), redfish: None, interval: Duration::from_secs(60), evacuate: false }
    }
}

/// A management controller that speaks Redfish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedfishConfig {
    /// `https://HOST`.
    pub url: String,
    /// User, and the file whose first line is the password.
    pub login: Option<(String, PathBuf)>,
    /// Authorities that its certificate may come from; default: the system's.
    pub ca_file: Option<PathBuf>,
    /// Its certificate is not checked.
    pub insecure: bool,
}

/// How VMs move between hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MovesConfig {
    /// URI by which other hosts reach this one's libvirt; none: `connect`, if that is over the network, else SSH.
    pub uri: Option<String>,
    /// Address to which they send memory and disks; none: that of the URI.
    pub address: Option<String>,
    /// Send at most so much per second.
    pub bandwidth: Option<Bytes>,
    /// Connections at a time for one VM; 0 for one.
    pub connections: u32,
    /// Encrypt by the hosts' certificates for migration.
    pub tls: bool,
    /// Where certificates of the cluster for migrations are kept, and the group that may read their key; none: they are
    /// not. With them `tls` holds towards hosts that have them too.
    pub certificates: Option<MigrationCertificates>,
    /// What the administrator says of VMs and hosts.
    pub rules: Option<PathBuf>,
}

/// Certificates of the cluster for QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationCertificates {
    /// What `migrate_tls_x509_cert_dir` in libvirt's qemu.conf names.
    pub dir: PathBuf,
    /// QEMU's group; none: the one that distributions give it, if it is there.
    pub group: Option<String>,
}

/// When VMs move for the sake of load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalanceConfig {
    /// Nothing, recommend, or do.
    pub mode: Mode,
    /// How eagerly.
    pub eagerness: Eagerness,
    /// Rounds for which a host must have been loaded; none: as the eagerness says.
    pub hold: Option<u32>,
    /// Least part, in percent, of unmet demand that a plan must remove; none: as the eagerness says.
    pub min_gain_percent: Option<u64>,
    /// Between two rounds.
    pub interval: Duration,
    /// For how long each watches what VMs use.
    pub watch: Duration,
    /// VMs that move at the same time.
    pub parallel: usize,
    /// Bytes a second that a migration can use.
    pub link: Bytes,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Off,
            eagerness: Eagerness::default(),
            hold: None,
            min_gain_percent: None,
            interval: Duration::from_secs(300),
            watch: Duration::from_secs(20),
            parallel: 2,
            link: Bytes(1_000_000_000),
        }
    }
}

/// How several daemons make a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Where peers are answered; none: not at all.
    pub listen: Option<SocketAddr>,
    /// `HOST:PORT` by which peers reach this node; default: the address of `listen`.
    pub address: Option<String>,
    /// The state.
    pub etcd: Etcd,
    /// Directory of this node's certificate and keys.
    pub dir: PathBuf,
    /// How long a daemon that vanished counts as present, and a leader as leading.
    pub lease: Duration,
}

/// How etcd is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Etcd {
    /// URLs of its members.
    pub endpoints: Vec<String>,
    /// What every key begins with there.
    pub prefix: String,
    /// Authorities that its certificates may come from; needed for https.
    pub ca: Option<PathBuf>,
    /// This node's certificate chain and key towards etcd.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A repository.
#[derive(Clone, Debug, PartialEq)]
pub struct RepositoryConfig {
    /// Its name in policies and requests.
    pub name: String,
    /// Directory or URL.
    pub location: String,
    /// How it is reached.
    pub store: StoreOptions,
    /// What opens it.
    pub secret: SecretFile,
}

/// Where the secret of a repository is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretFile {
    /// The first line is the password.
    Password(PathBuf),
    /// The whole file is the key.
    Key(PathBuf),
}

/// Whom the daemon tells of what happens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NotifyConfig {
    /// Where its web interface is, for links in messages.
    pub link: Option<String>,
    /// Where messages go.
    pub channels: Vec<ChannelConfig>,
}

/// One way to people.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelConfig {
    /// Its name; unique.
    pub name: String,
    /// What is told, and how often.
    pub rules: Rules,
    /// Where it goes.
    pub target: Target,
}

/// Where messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// HTTP POST of JSON.
    Webhook(WebhookConfig),
    /// Mail by SMTP.
    Mail(MailConfig),
}

/// A text that may be secret: in the configuration, or in a file of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MaybeSecret {
    /// Itself.
    Here(String),
    /// The first line of this file.
    File(PathBuf),
}

/// A webhook. Files are read for each message, so that a secret that was replaced is used at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookConfig {
    /// Where to.
    pub url: MaybeSecret,
    /// Secret that messages are signed with.
    pub secret_file: Option<PathBuf>,
    /// Bearer token.
    pub token_file: Option<PathBuf>,
    /// Authorities that the server's certificate may come from; default: the system's.
    pub ca_file: Option<PathBuf>,
}

/// A mail server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailConfig {
    /// Name or address of the server.
    pub server: String,
    /// Its port.
    pub port: u16,
    /// How the connection is protected.
    pub tls: MailTls,
    /// Authorities that the server's certificate may come from; default: the system's.
    pub ca_file: Option<PathBuf>,
    /// User, and the file whose first line is the password.
    pub login: Option<(String, PathBuf)>,
    /// Sender.
    pub from: String,
    /// Recipients.
    pub to: Vec<String>,
}

/// How a connection to a mail server is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MailTls {
    /// STARTTLS, and nothing is sent without it.
    StartTls,
    /// TLS from the first byte.
    Implicit,
    /// Not at all.
    None,
}
