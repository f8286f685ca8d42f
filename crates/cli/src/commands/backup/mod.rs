//! `virtward backup`: making restore points and looking after them.

pub mod delete;
pub mod hold;
pub mod image;
pub mod list;
pub mod prune;
pub mod recover;
pub mod run;
pub mod show;
pub mod verify;

use crate::{app::App, exit::Failure};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Back up VMs
    Run(run::Args),
    /// Back up disk image files that belong to no VM
    Image(image::Args),
    /// List restore points
    List(list::Args),
    /// Show one restore point
    Show(show::Args),
    /// Check stored data
    Verify(verify::Args),
    /// Delete restore points
    Delete(delete::Args),
    /// Delete restore points by rules
    Prune(prune::Args),
    /// Bring deleted restore points back
    Recover(recover::Args),
    /// Keep restore points from being deleted
    #[command(subcommand)]
    Hold(hold::Command),
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Run(args) => run::run(app, args).await,
        Command::Image(args) => image::run(app, args).await,
        Command::List(args) => list::run(app, args).await,
        Command::Show(args) => show::run(app, args).await,
        Command::Verify(args) => verify::run(app, args).await,
        Command::Delete(args) => delete::run(app, args).await,
        Command::Prune(args) => prune::run(app, args).await,
        Command::Recover(args) => recover::run(app, args).await,
        Command::Hold(command) => hold::run(app, command).await,
    }
}
