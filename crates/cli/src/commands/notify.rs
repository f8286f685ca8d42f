//! `virtward notify`: whom the daemon tells of what happens, and whether that arrives.

use virtward_api::{NotifyChannel, NotifyOutcome, NotifyTest, client::Error};
use virtward_server::notify;

use crate::{
    app::App,
    commands::serve,
    connect, daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Send a test message, and say whether it was accepted
    Test(TestArgs),
    /// Show where messages go and whether they arrive
    List(ListArgs),
}

/// Arguments of `notify test`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Channels are in the configuration, for example
  [notify.webhook.ops]
  url = \"https://hooks.example.org/virtward\"
  secret-file = \"/etc/virtward/webhook.secret\"
  [notify.mail.admins]
  server = \"smtp.example.org\"
  from = \"virtward@example.org\"
  to = [\"admins@example.org\"]
The daemon sends the message if one runs, else this command does. It goes out at
once, whatever severity the channel asks for. Fails if one channel did not take it.

Examples:
  virtward notify test
  virtward notify test admins --json")]
pub struct TestArgs {
    /// Only through this channel
    pub channel: Option<String>,
}

/// Arguments of `notify list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward notify list\n  virtward notify list --json")]
pub struct ListArgs {}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Test(args) => test(app, args).await,
        Command::List(_) => list(app).await,
    }
}

async fn test(app: &App, args: &TestArgs) -> Result<(), Failure> {
    let asked = NotifyTest { channel: args.channel.clone() };
    let answered: Result<Vec<NotifyOutcome>, Error> =
        daemon::client(app).post("/api/v1/notifications/test", &asked, None).await;
    let outcomes = match answered {
        Ok(outcomes) => outcomes,
        Err(Error::Unreachable { .. }) => {
            let config = serve::configuration(&app.settings, connect::thaw_guard())?;
            notify::test(&config, args.channel.as_deref()).await?
        }
        Err(error) => return Err(error.into()),
    };
    if outcomes.is_empty() {
        return Err(Failure::new(Kind::NotFound, "the configuration has no notification channel")
            .hint("put one into [notify] of the configuration, see virtward notify test --help; then systemctl reload virtward"));
    }
    let failed: Vec<&NotifyOutcome> = outcomes.iter().filter(|outcome| !outcome.is_ok).collect();
    if app.json {
        out::json(&outcomes)?;
    } else {
        for outcome in &outcomes {
            let (name, kind) = (&outcome.channel, render::word(&outcome.kind));
            let said = match &outcome.error {
                None => format!("accepted in {} ms", outcome.took_ms),
                Some(error) => format!("FAILED: {error}"),
            };
            out::text(&format!("{name} ({kind} to {}): {said}\n", outcome.target))?;
        }
    }
    match failed.first() {
        None => Ok(()),
        Some(first) => {
            let error = first.error.clone().unwrap_or_default();
            let failure = Failure::new(Kind::Other, format!("{} did not take the message: {error}", first.channel))
                .hint("mend [notify] in the configuration, then systemctl reload virtward");
            Err(if app.json { failure.reported() } else { failure })
        }
    }
}

async fn list(app: &App) -> Result<(), Failure> {
    let channels: Vec<NotifyChannel> = daemon::client(app).get("/api/v1/notifications").await?;
    if app.json {
        return out::json(&channels);
    }
    let mut table = Table::new(&[
        "CHANNEL",
        "KIND",
        "TARGET",
        "FROM SEVERITY",
        ">WAITING",
        ">DELIVERED",
        ">GIVEN UP",
        "LAST",
        "TROUBLE",
    ]);
    for channel in channels {
        table.row([
            channel.name,
            render::word(&channel.kind),
            channel.target,
            render::word(&channel.severity),
            channel.waiting.to_string(),
            channel.delivered.to_string(),
            channel.given_up.to_string(),
            channel.last_delivered.map(render::local_time).unwrap_or_default(),
            channel.error.unwrap_or_default(),
        ]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
}
