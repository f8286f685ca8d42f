//! `virtward repo`: the repository itself and its keys.

pub mod check;
pub mod copy;
pub mod gc;
pub mod heal;
pub mod info;
pub mod init;
pub mod key;
pub mod rebuild_index;

use crate::{app::App, exit::Failure};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Create a repository
    Init(init::Args),
    /// Show what a repository is and how much it holds
    Info(info::Args),
    /// Check that everything a restore needs is there
    Check(check::Args),
    /// Give back the space that no restore point needs
    Gc(gc::Args),
    /// Copy restore points to another repository
    Copy(copy::Args),
    /// Store lost data anew from another repository
    Heal(heal::Args),
    /// Make the index anew from the packs
    RebuildIndex(rebuild_index::Args),
    /// Passwords and key files that open the repository
    #[command(subcommand)]
    Key(key::Command),
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Init(args) => init::run(app, args).await,
        Command::Info(args) => info::run(app, args).await,
        Command::Check(args) => check::run(app, args).await,
        Command::Gc(args) => gc::run(app, args).await,
        Command::Copy(args) => copy::run(app, args).await,
        Command::Heal(args) => heal::run(app, args).await,
        Command::RebuildIndex(args) => rebuild_index::run(app, args).await,
        Command::Key(command) => key::run(app, command).await,
    }
}
