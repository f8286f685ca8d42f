//! `virtward inventory`: a snapshot of hosts and VMs, to plan with elsewhere or later.

use std::path::PathBuf;

use super::world::{Source, look};
use crate::{app::App, exit::Failure, out};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Save what hosts have and what runs on them, as JSON
    Export(ExportArgs),
}

/// Arguments of `inventory export`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward inventory export --with h2 --with h3 --out today.json
  virtward inventory export --with h2 --rules rules.toml | jq '.vms | length'
  virtward balance simulate --snapshot today.json --without-host h2")]
pub struct ExportArgs {
    #[command(flatten)]
    pub source: Source,
    /// Write here instead of to standard output
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    let Command::Export(args) = command;
    write(&look(app, &args.source).await?.close().await, args)
}

fn write(world: &virtward_model::world::World, args: &ExportArgs) -> Result<(), Failure> {
    let Some(path) = &args.out else { return out::json(world) };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let save = || {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(&mut file, world)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    save().map_err(Failure::io(format!("cannot write {}", path.display())))
}
