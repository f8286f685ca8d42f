//! `virtward cluster`: several hosts as one.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use virtward_api::{ClusterStatus, JoinTokenMade, NewJoinToken, StateBackup, client::Error};
use virtward_model::Seconds;
use virtward_server::{
    admin,
    config::{ClusterConfig, Config},
};

use crate::{
    app::App,
    commands::{job::escaped, serve},
    config::{Cluster, Settings},
    connect, daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a cluster, with this host as its first node
    Init(InitArgs),
    /// Make a token by which one host can join
    Token(TokenArgs),
    /// Make this host a node of a cluster
    Join(JoinArgs),
    /// Show nodes, leader and state
    Status(StatusArgs),
    /// Take a node out of the cluster
    Remove(RemoveArgs),
    /// Write the state (policies, tokens, history, authority) into a file
    BackupState(BackupStateArgs),
    /// Replace the state by that of a file
    RestoreState(RestoreStateArgs),
}

/// How etcd and peers are reached.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Reach {
    /// HOST:PORT by which the other nodes reach this one [port 8461 unless listen says otherwise]
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<String>,
    /// Where peers are answered [default: 0.0.0.0:8461]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Name of this node [default: the host's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Authorities of etcd's certificates (PEM), for https
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// This node's certificate towards etcd (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
}

/// Arguments of `cluster init`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The state of the cluster is in etcd, of three members or five, which you run.
What this host did alone (policies, tokens, history) is taken over; its daemon
has to be stopped meanwhile. Makes the cluster's certificate authority and this
node's certificate, and writes [cluster] into the configuration.

Examples:
  virtward cluster init --etcd http://10.0.0.1:2379 --address 10.0.0.1:8461
  virtward cluster init --address kvm1.example:8461 \\
      --etcd https://kvm1:2379 --etcd https://kvm2:2379 --etcd https://kvm3:2379 \\
      --etcd-ca /etc/etcd/ca.crt --etcd-cert /etc/etcd/kvm1.crt --etcd-key /etc/etcd/kvm1.key")]
pub struct InitArgs {
    /// URL of a member of etcd; may be repeated
    #[arg(long, value_name = "URL", required = true, value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// What every key begins with in etcd
    #[arg(long, value_name = "PREFIX", default_value = serve::ETCD_PREFIX)]
    pub etcd_prefix: String,
    /// Name of the cluster, for people
    #[arg(long, value_name = "NAME", default_value = "virtward")]
    pub cluster_name: String,
    #[command(flatten)]
    pub reach: Reach,
}

/// Arguments of `cluster token`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A token works once, for one host. It is printed on standard output.

Examples:
  virtward cluster token
  virtward cluster token --expires 10m --json | jq -r .token")]
pub struct TokenArgs {
    /// How long it can be used
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub expires: Seconds,
}

/// Arguments of `cluster join`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The token names the authority of the cluster: a server that does not show it is
told nothing. - reads the token from standard input, so that it is in no
process list. Afterwards start the daemon: systemctl start virtward

Examples:
  virtward cluster token --json | jq -r .token |
      ssh kvm2 virtward cluster join - --at 10.0.0.1:8461 --address 10.0.0.2:8461
  virtward cluster join - --at kvm1:8461 --address kvm2:8461 --name kvm2 < token")]
pub struct JoinArgs {
    /// The token, or - to read it from standard input
    pub token: String,
    /// Peer address of a node of the cluster
    #[arg(long, value_name = "HOST:PORT")]
    pub at: String,
    #[command(flatten)]
    pub reach: Reach,
}

/// Arguments of `cluster status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward cluster status\n  virtward cluster status --json")]
pub struct StatusArgs {}

/// Arguments of `cluster remove`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The node's daemon starts nothing any more, its claims are void, and its peers
refuse it. Its VMs run on, and what it backed up stays. A host that fell into
wrong hands also knows the cluster key: see docs/cluster.md.

Examples:
  virtward cluster remove kvm3")]
pub struct RemoveArgs {
    /// Name of the node
    pub node: String,
}

/// Arguments of `cluster backup-state`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The file is for root alone: it has hashes of tokens, and the authority's key,
sealed with the cluster key of the nodes (DIR/cluster.key): keep a copy of that
one apart from it.

Examples:
  virtward cluster backup-state /root/virtward-state.json")]
pub struct BackupStateArgs {
    /// File to write; must not exist
    pub file: PathBuf,
}

/// Arguments of `cluster restore-state`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every daemon of the cluster has to be stopped. An interrupted restore is simply
run again.

Examples:
  virtward cluster restore-state /root/virtward-state.json
  virtward cluster restore-state /root/virtward-state.json --replace")]
pub struct RestoreStateArgs {
    /// File that backup-state wrote
    pub file: PathBuf,
    /// Replace the state that there is
    #[arg(long)]
    pub replace: bool,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Init(args) => init(app, args).await,
        Command::Token(args) => token(app, args).await,
        Command::Join(args) => join(app, args).await,
        Command::Status(_) => status(app).await,
        Command::Remove(args) => {
            daemon::client(app).delete(&format!("/api/v1/cluster/nodes/{}", escaped(&args.node))).await?;
            app.progress.note(&format!("{} is no node of the cluster any more", args.node));
            Ok(())
        }
        Command::BackupState(args) => backup_state(app, args).await,
        Command::RestoreState(args) => {
            let summary = admin::restore_state(&configuration(&app.settings)?, &args.file, args.replace).await?;
            if app.json {
                return out::json(&summary);
            }
            app.progress.note(&format!(
                "{} records as of {} are the state now",
                summary.entries,
                render::exact_time(summary.made)
            ));
            Ok(())
        }
    }
}

fn configuration(settings: &Settings) -> Result<Config, Failure> {
    serve::configuration(settings, connect::thaw_guard())
}

/// The settings with a cluster that is to be.
fn with_cluster(
    settings: &Settings,
    reach: &Reach,
    etcd: &[String],
    prefix: Option<&str>,
) -> Result<Settings, Failure> {
    if let Some(cluster) = &settings.cluster
        && !cluster.etcd.is_empty()
    {
        return Err(Failure::new(Kind::Refused, format!("{} has a [cluster] already", settings.file.display()))
            .hint("virtward cluster status shows it; take the section away to begin anew"));
    }
    let listen = reach.listen.map_or(serve::PEER_PORT, |listen| listen.port());
    let address = match &reach.address {
        Some(address) if address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => {
            address.clone()
        }
        Some(host) => format!("{host}:{listen}"),
        None => format!("{}:{listen}", virtward_server::wire_up::node_name()),
    };
    let cluster = Cluster {
        name: Some(reach.name.clone().unwrap_or_else(virtward_server::wire_up::node_name)),
        listen: reach.listen,
        address: Some(address),
        etcd: etcd.to_vec(),
        etcd_prefix: prefix.map(str::to_owned),
        etcd_ca: reach.etcd_ca.clone(),
        etcd_cert: reach.etcd_cert.clone(),
        etcd_key: reach.etcd_key.clone(),
        ..settings.cluster.clone().unwrap_or_default()
    };
    Ok(Settings { cluster: Some(cluster), ..settings.clone() })
}

async fn init(app: &App, args: &InitArgs) -> Result<(), Failure> {
    let settings = with_cluster(&app.settings, &args.reach, &args.etcd, Some(&args.etcd_prefix))?;
    let config = configuration(&settings)?;
    let made = admin::init(&config, &args.cluster_name).await?;
    let cluster = config.cluster.ok_or_else(|| Failure::new(Kind::Other, "no cluster"))?;
    write_section(&settings.file, &config.node, &cluster)?;
    if app.json {
        return out::json(&serde_json::json!({
            "node": config.node,
            "address": cluster.address,
            "authority_sha256": made.authority_sha256,
            "records_taken_over": made.moved.map_or(0, |summary| summary.entries),
            "config_file": settings.file,
        }));
    }
    if let Some(summary) = &made.moved {
        app.progress.note(&format!("{} records of this host's own state were taken over", summary.entries));
    }
    app.progress.note(&format!(
        "{} is the first node of the cluster; its authority is {}\n\
         [cluster] was written into {}\n\
         keep a copy of {} apart from backups of the state\n\
         start the daemon (systemctl start virtward), then let other hosts join: virtward cluster token",
        config.node,
        made.authority_sha256,
        settings.file.display(),
        cluster.dir.join("cluster.key").display(),
    ));
    Ok(())
}

async fn token(app: &App, args: &TokenArgs) -> Result<(), Failure> {
    let new = NewJoinToken { expires_in_s: Some(args.expires.0) };
    let made: JoinTokenMade = daemon::client(app).post("/api/v1/cluster/tokens", &new, None).await?;
    if app.json {
        return out::json(&made);
    }
    app.progress.note(&format!(
        "works once, until {}; on the new host:\n  virtward cluster join - --at {} --address HOST:8461",
        render::local_time(made.expires),
        made.address
    ));
    out::text(&format!("{}\n", made.token))
}

/// The token itself, or the first line of standard input.
fn read_token(text: &str) -> Result<String, Failure> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(Failure::io("cannot read the token from standard input"))?;
    Ok(line.trim().to_owned())
}

async fn join(app: &App, args: &JoinArgs) -> Result<(), Failure> {
    // Where etcd is comes with the certificate.
    let placeholder = ["http://to-come:2379".to_owned()];
    let settings = with_cluster(&app.settings, &args.reach, &placeholder, None)?;
    let config = configuration(&settings)?;
    let own = config.cluster.ok_or_else(|| Failure::new(Kind::Other, "no cluster"))?;
    let token = read_token(&args.token)?;
    let cluster = admin::join(&token, &args.at, &config.node, &own).await?;
    write_section(&settings.file, &config.node, &cluster)?;
    if app.json {
        return out::json(&serde_json::json!({
            "node": config.node,
            "address": cluster.address,
            "etcd": cluster.etcd.endpoints,
            "config_file": settings.file,
        }));
    }
    app.progress.note(&format!(
        "{} is a node of the cluster now; [cluster] was written into {}\nstart the daemon: systemctl start virtward",
        config.node,
        settings.file.display()
    ));
    Ok(())
}

/// Adds `[cluster]` at the end of the configuration, which keeps everything else of it as it is.
fn write_section(file: &Path, node: &str, cluster: &ClusterConfig) -> Result<(), Failure> {
    let mut text = String::from("\n[cluster]\n");
    let mut line = |key: &str, value: String| text.push_str(&format!("{key} = {value}\n"));
    line("name", format!("{node:?}"));
    if let Some(listen) = cluster.listen {
        line("listen", format!("\"{listen}\""));
    }
    if let Some(address) = &cluster.address {
        line("address", format!("{address:?}"));
    }
    line("etcd", format!("{:?}", cluster.etcd.endpoints));
    line("etcd-prefix", format!("{:?}", cluster.etcd.prefix));
    let identity = cluster.etcd.identity.as_ref();
    let files = [
        ("etcd-ca", cluster.etcd.ca.as_ref()),
        ("etcd-cert", identity.map(|(certificate, _)| certificate)),
        ("etcd-key", identity.map(|(_, key)| key)),
        ("dir", Some(&cluster.dir)),
    ];
    for (key, path) in files {
        if let Some(path) = path {
            line(key, format!("{:?}", path.display().to_string()));
        }
    }
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir).map_err(Failure::io(format!("cannot create {}", dir.display())))?;
    }
    let written = fs::OpenOptions::new().append(true).create(true).open(file).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| {
        Failure::io(format!("cannot write [cluster] into {}", file.display()))(error)
            .hint(format!("this host is a member now; put these lines there yourself:{text}"))
    })
}

async fn status(app: &App) -> Result<(), Failure> {
    let status: ClusterStatus = daemon::client(app).get("/api/v1/cluster").await?;
    if app.json {
        return out::json(&status);
    }
    let mut text = String::new();
    match status.is_cluster {
        true => text.push_str(&format!("state     {}\n", status.state)),
        false => text.push_str(&format!("state     {} (this host alone)\n", status.state)),
    }
    if let Some(error) = &status.state_error {
        text.push_str(&format!("          does not answer: {error}\n"));
    }
    if let Some(leader) = &status.leader {
        let since = render::local_time(leader.since);
        text.push_str(&format!("leader    {} since {since} (epoch {})\n", leader.node, leader.epoch));
    } else if status.is_cluster {
        text.push_str("leader    nobody leads; schedules stand still\n");
    }
    if let Some(authority) = &status.authority_sha256 {
        text.push_str(&format!("authority {authority}\n"));
    }
    text.push('\n');
    let mut table = Table::new(&["NODE", "ADDRESS", "DAEMON", "HOST", "STATE", "VERSION", "REASON"]);
    for node in &status.nodes {
        table.row([
            node.name.clone(),
            node.address.clone().unwrap_or_default(),
            if node.is_there { "answers" } else { "silent" }.to_owned(),
            node.host.clone().unwrap_or_default(),
            render::word(&node.host_state),
            node.version.clone().unwrap_or_default(),
            node.reason.clone().unwrap_or_default(),
        ]);
    }
    text.push_str(&table.render(out::stdout_is_terminal()));
    out::text(&text)?;
    for warning in &status.warnings {
        app.progress.warn(warning);
    }
    Ok(())
}

async fn backup_state(app: &App, args: &BackupStateArgs) -> Result<(), Failure> {
    if args.file.exists() {
        return Err(Failure::new(Kind::Refused, format!("{} exists", args.file.display()))
            .hint("nothing is overwritten; choose another file"));
    }
    let nothing = serde_json::json!({});
    let asked: Result<StateBackup, Error> =
        daemon::client(app).post("/api/v1/cluster/state-backup", &nothing, None).await;
    let made = match asked {
        Ok(made) => {
            take(Path::new(&made.file), &args.file)?;
            StateBackup { file: args.file.display().to_string(), ..made }
        }
        Err(Error::Unreachable { .. }) => {
            let summary = admin::backup_state(&configuration(&app.settings)?, &args.file).await?;
            let file = args.file.display().to_string();
            StateBackup { file, entries: summary.entries, revision: summary.revision.0, made: summary.made }
        }
        Err(error) => return Err(error.into()),
    };
    if app.json {
        return out::json(&made);
    }
    app.progress.note(&format!("{} records (revision {}) are in {}", made.entries, made.revision, made.file));
    Ok(())
}

/// Moves a file that is for its owner alone, also to another file system, and overwrites nothing.
fn take(from: &Path, to: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::OpenOptionsExt;
    let wrong = || Failure::io(format!("cannot write {}", to.display()));
    let bytes = fs::read(from).map_err(Failure::io(format!("cannot read {}", from.display())))?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(wrong())?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(wrong())?;
    fs::remove_file(from).map_err(Failure::io(format!("cannot remove {}", from.display())))
}
