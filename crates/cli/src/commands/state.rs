//! `virtward state`: the state file of a host that is no node of a cluster, and its automatic backups.

use std::path::PathBuf;

use virtward_server::admin;

use crate::{
    app::App,
    commands::serve,
    connect,
    exit::Failure,
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List the automatic backups of the state file
    List(ListArgs),
    /// Put a backup in the place of the state file
    Restore(RestoreArgs),
}

/// Arguments of `state list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The daemon makes a backup every day, and before a new version first writes to
the file; the newest ten are kept, beside it.

Examples:
  virtward state list
  virtward state list --json")]
pub struct ListArgs {}

/// Arguments of `state restore`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
For a state file that is damaged or gone. The daemon has to be stopped. Without
FILE the newest automatic backup that is intact is taken; FILE may also be what
virtward cluster backup-state wrote. The file that was there is kept beside it.
What was done after the backup is not in it: jobs of that time are missing from
the history, policies and tokens are as they were. Restore points are in the
repository and not concerned.

Examples:
  systemctl stop virtward
  virtward state restore
  virtward state restore /var/lib/virtward/state.backups/20260101T030000Z-r812.db
  systemctl start virtward")]
pub struct RestoreArgs {
    /// Backup to restore
    pub file: Option<PathBuf>,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    let config = serve::configuration(&app.settings, connect::thaw_guard())?;
    match command {
        Command::List(_) => {
            let backups = admin::state_backups(&config)?;
            if app.json {
                return out::json(&backups);
            }
            let mut table = Table::new(&["MADE", ">BYTES", "FILE"]);
            for backup in backups {
                table.row([
                    render::local_time(backup.made),
                    backup.bytes.to_string(),
                    backup.file.display().to_string(),
                ]);
            }
            out::text(&table.render(out::stdout_is_terminal()))
        }
        Command::Restore(args) => {
            let restored = admin::restore_embedded(&config, args.file.as_deref()).await?;
            if app.json {
                return out::json(&restored);
            }
            for skipped in &restored.skipped {
                app.progress.warn(skipped);
            }
            if let Some(aside) = &restored.set_aside {
                app.progress.note(&format!("what was there is kept as {}", aside.display()));
            }
            app.progress.note(&format!(
                "the state is that of {} now; start the daemon: systemctl start virtward",
                restored.from.display()
            ));
            Ok(())
        }
    }
}
