//! What placement decides on: hosts that are looked at now, or a snapshot of them, with the administrator's rules.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::SignedDuration;
use virtward_decide::placement::rules;
use virtward_engine::{
    Destination,
    survey::{Surveyed, survey},
};
use virtward_model::world::{HostName, World};

use crate::{
    app::App,
    commands::host::closed,
    connect,
    exit::{Failure, Kind},
};

/// A snapshot of this size is no snapshot.
const SNAPSHOT_BYTES_MAX: u64 = 512 << 20;
const RULES_BYTES_MAX: u64 = 16 << 20;

/// Which hosts.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Hosts {
    /// Another host beside the one of --connect; may be repeated
    #[arg(long, value_name = "HOST|URI")]
    pub with: Vec<String>,
    /// For how long to watch what VMs use
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub interval: SignedDuration,
}

/// Which hosts, or which snapshot of some.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Source {
    #[command(flatten)]
    pub hosts: Hosts,
    /// Decide on what `inventory export` saved instead of looking at hosts
    #[arg(long, value_name = "FILE", conflicts_with = "with")]
    pub snapshot: Option<PathBuf>,
    /// Rules and importance: a TOML file (docs/balance.md)
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,
}

impl Source {
    /// Neither hosts nor a snapshot nor rules were named: all hosts of the daemon are meant.
    pub fn is_unnamed(&self) -> bool {
        self.hosts.with.is_empty() && self.snapshot.is_none() && self.rules.is_none()
    }
}

/// The world, and the connections by which it was read: none for a snapshot.
pub struct Looked {
    pub world: World,
    pub hosts: BTreeMap<HostName, Destination>,
}

impl Looked {
    /// Closes the connections; what was seen by them stays.
    pub async fn close(self) -> World {
        for host in self.hosts.into_values() {
            host.hypervisor.close().await;
        }
        self.world
    }
}

/// Reads the world.
pub async fn look(app: &App, source: &Source) -> Result<Looked, Failure> {
    let rules = source.rules.as_deref().map(rules_of).transpose()?;
    let mut looked = match &source.snapshot {
        Some(path) => {
            let text = read(path, SNAPSHOT_BYTES_MAX)?;
            let world = World::from_json(&text)
                .map_err(|error| Failure::new(Kind::Usage, format!("{}: {error}", path.display())))?;
            Looked { world, hosts: BTreeMap::new() }
        }
        None => from_hosts(app, &source.hosts).await?,
    };
    for name in rules.iter().flat_map(|rules| rules.apply(&mut looked.world)) {
        app.progress.warn(&format!("the rules name {name}, which is not there"));
    }
    Ok(looked)
}

/// A text file, or standard input for `-`.
fn read(path: &Path, most: u64) -> Result<String, Failure> {
    let mut text = String::new();
    let done = match path.to_str() {
        Some("-") => std::io::stdin().lock().take(most).read_to_string(&mut text),
        _ => fs::File::open(path).and_then(|file| file.take(most).read_to_string(&mut text)),
    };
    done.map_err(Failure::io(format!("cannot read {}", path.display())))?;
    if text.len() as u64 >= most {
        return Err(Failure::new(Kind::Usage, format!("{} is too large", path.display())));
    }
    Ok(text)
}

/// Reads a rules file.
pub fn rules_of(path: &Path) -> Result<rules::Rules, Failure> {
    let text = read(path, RULES_BYTES_MAX)?;
    rules::parse(&text).map_err(|why| Failure::new(Kind::Usage, format!("{}: {why}", path.display())))
}

/// Looks at every host.
pub async fn from_hosts(app: &App, hosts: &Hosts) -> Result<Looked, Failure> {
    let mut destinations = Vec::new();
    let seen = see(app, hosts, &mut destinations).await;
    match seen {
        Ok(world) => {
            let names = world.hosts.iter().map(|host| host.name.clone());
            let hosts = names.zip(destinations).collect();
            Ok(Looked { world, hosts })
        }
        Err(failure) => {
            for host in destinations {
                host.hypervisor.close().await;
            }
            Err(failure)
        }
    }
}

async fn see(app: &App, hosts: &Hosts, destinations: &mut Vec<Destination>) -> Result<World, Failure> {
    let interval = hosts.interval.unsigned_abs();
    if hosts.interval.is_negative() || !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&interval) {
        return Err(Failure::new(Kind::Usage, "--interval is from 100ms to 1h"));
    }
    let first = app.settings.connect.clone();
    for host in std::iter::once(&first).chain(&hosts.with) {
        destinations.push(connect::destination(app, host, None).await?);
    }
    let mut surveyed = Vec::new();
    for host in destinations.iter() {
        let closed = closed(app, &*host.hypervisor).await;
        surveyed.push(Surveyed { hypervisor: host.hypervisor.clone(), closed, with_inactive: false });
    }
    tokio::select! {
        world = survey(&surveyed, interval) => Ok(world?),
        () = app.cancel.cancelled() => Err(Failure::new(Kind::Cancelled, "cancelled")),
    }
}
