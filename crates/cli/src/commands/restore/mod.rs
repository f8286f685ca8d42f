//! `virtward restore`: bringing things back.

pub mod disk;
pub mod vm;

use crate::{app::App, exit::Failure};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Restore a whole VM
    Vm(vm::Args),
    /// Restore one disk to a file
    Disk(disk::Args),
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Vm(args) => vm::run(app, args).await,
        Command::Disk(args) => disk::run(app, args).await,
    }
}

/// How a restore point may be written on the command line; part of the help of every command that takes one.
pub const POINT_HELP: &str = "\
POINT is one of:
  web1@latest             the newest restore point of web1
  web1@2026-11-22T10:00   the newest at or before that local time; Z or +01:00
                          at the end for another zone
  4f1c                    the id of a restore point, or the beginning of one";
