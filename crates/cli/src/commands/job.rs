//! `virtward job`: the daemon's jobs.

use std::time::Duration;

use serde_json::Value;
use virtward_api::{Job, JobLogEntry, JobState, Page, client::Client};
use virtward_model::Bytes;

use crate::{
    app::App,
    daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List jobs, newest first
    List(ListArgs),
    /// Show one job and what it did
    Show(ShowArgs),
    /// Stop a job
    Cancel(CancelArgs),
    /// Follow a job until it ends
    Watch(WatchArgs),
}

/// Arguments of `job list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward job list
  virtward job list --state running,queued
  virtward job list --vm web1 --state failed --json")]
pub struct ListArgs {
    /// Only in these states: queued, running, succeeded, failed, cancelled, interrupted
    #[arg(long, value_name = "STATE,…")]
    pub state: Option<String>,
    /// Only of this kind: backup, restore, verify, copy, prune, migrate, move-disk, drain, balance
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// Only about this VM
    #[arg(long, value_name = "VM")]
    pub vm: Option<String>,
    /// Only of this policy
    #[arg(long, value_name = "NAME")]
    pub policy: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub limit: u16,
}

/// Arguments of `job show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward job show 0199b0c2-…\n  virtward job show 0199b0c2-… --json | jq .error")]
pub struct ShowArgs {
    /// Id of the job
    pub job: String,
}

/// Arguments of `job cancel`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A running job cleans up before it ends; `virtward job watch` waits for that.

Examples:
  virtward job cancel 0199b0c2-…")]
pub struct CancelArgs {
    /// Id of the job
    pub job: String,
}

/// Arguments of `job watch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exits as the job ended: 0 if it succeeded, otherwise with the status that the
same failure has on the command line. Stopping to watch does not stop the job.

Examples:
  virtward job watch 0199b0c2-…")]
pub struct WatchArgs {
    /// Id of the job
    pub job: String,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    let client = daemon::client(app);
    match command {
        Command::List(args) => list(app, &client, args).await,
        Command::Show(args) => show(app, &client, &args.job).await,
        Command::Cancel(args) => {
            let job: Job = client.post(&format!("{}/cancel", path(&args.job)), &Value::Null, None).await?;
            match app.json {
                true => out::json(&job),
                false => out::text(&format!("{}\n", line(&job))),
            }
        }
        Command::Watch(args) => watch(app, &client, &args.job).await,
    }
}

fn path(id: &str) -> String {
    format!("/api/v1/jobs/{}", escaped(id))
}

/// A part of a path or a value of a query, with everything that is not plain written as `%XX`.
pub fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

async fn list(app: &App, client: &Client, args: &ListArgs) -> Result<(), Failure> {
    let mut query = format!("/api/v1/jobs?limit={}", args.limit);
    let filters = [("state", &args.state), ("kind", &args.kind), ("vm", &args.vm), ("policy", &args.policy)];
    for (name, value) in filters.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
        query.push_str(&format!("&{name}={}", escaped(value)));
    }
    let page: Page<Job> = client.get(&query).await?;
    if app.json {
        return out::json(&page.items);
    }
    let mut table = Table::new(&["ID", "KIND", "STATE", "VM", "POLICY", "CREATED", "PROGRESS"]);
    for job in &page.items {
        table.row([
            job.id.to_string(),
            render::word(&job.kind),
            render::word(&job.state),
            job.vm.as_ref().map(|vm| vm.name.clone()).unwrap_or_default(),
            job.origin.policy.clone().unwrap_or_default(),
            render::local_time(job.created),
            progress(job),
        ]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
}

fn progress(job: &Job) -> String {
    match (job.state, &job.waiting_for, &job.error) {
        (JobState::Queued, Some(why), _) => why.clone(),
        (JobState::Running, ..) if job.progress.detail.is_some() => job.progress.detail.clone().unwrap_or_default(),
        (JobState::Running, ..) if job.progress.total_bytes > 0 => {
            let percent = job.progress.done_bytes.saturating_mul(100) / job.progress.total_bytes;
            format!("{percent} %, {}/s", Bytes(job.progress.rate_bytes_s))
        }
        (JobState::Running, ..) => job.progress.phase.clone().unwrap_or_default(),
        (.., Some(error)) => error.message.clone(),
        _ => String::new(),
    }
}

fn line(job: &Job) -> String {
    let of = if job.repository.is_empty() { job.host.as_str() } else { job.repository.as_str() };
    let vm = job.vm.as_ref().map_or(of, |vm| vm.name.as_str());
    let detail = progress(job);
    let detail = if detail.is_empty() { detail } else { format!(": {detail}") };
    render::printable(&format!(
        "{} of {vm} ({}) is {}{detail}",
        render::word(&job.kind),
        job.id,
        render::word(&job.state)
    ))
}

async fn show(app: &App, client: &Client, id: &str) -> Result<(), Failure> {
    let job: Job = client.get(&path(id)).await?;
    if app.json {
        return out::json(&job);
    }
    let log: Vec<JobLogEntry> = client.get(&format!("{}/log", path(id))).await?;
    let mut text = format!("{}\n", line(&job));
    for entry in log {
        let entry = format!("{}  {:7} {}", render::local_time(entry.at), render::word(&entry.level), entry.message);
        text.push_str(&format!("  {}\n", render::printable(&entry)));
    }
    if let Some(hint) = job.error.as_ref().and_then(|error| error.hint.as_ref()) {
        text.push_str(&format!("  hint: {}\n", render::printable(hint)));
    }
    out::text(&text)
}

/// Asks now and then: simple, and right also when the daemon starts again meanwhile.
async fn watch(app: &App, client: &Client, id: &str) -> Result<(), Failure> {
    const EVERY: Duration = Duration::from_secs(1);
    let mut said = String::new();
    let job: Job = loop {
        let job: Job = client.get(&path(id)).await?;
        if job.state.is_final() {
            break job;
        }
        let now = line(&job);
        if now != said {
            app.progress.note(&now);
            said = now;
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = app.cancel.cancelled() => {
                return Err(Failure::new(Kind::Cancelled, "stopped watching; the job goes on")
                    .hint(format!("virtward job cancel {id} stops it")));
            }
        }
    };
    match app.json {
        true => out::json(&job)?,
        false => out::text(&format!("{}\n", line(&job)))?,
    }
    match &job.error {
        None => Ok(()),
        Some(error) => {
            let problem = virtward_api::Problem::new(error.code, error.message.clone());
            Err(Failure { hint: error.hint.clone(), ..Failure::from(problem) }.reported())
        }
    }
}
