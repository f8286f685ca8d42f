//! `virtward policy`: what is backed up, when, and what is kept.

use std::{collections::BTreeSet, fs, io::Read, path::PathBuf};

use jiff::tz::TimeZoneDatabase;
use serde::Serialize;
use virtward_api::{
    Explanation, Host, Page, Policy as Applied, PolicyDiff, PolicyDocument, PolicyReport, client::Client,
};
use virtward_decide::policy::{check::Known, file};
use virtward_model::Policy;

use crate::{
    app::App,
    commands::job::escaped,
    daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// Largest policy file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Check a policy file, without a daemon
    Check(FileArgs),
    /// Show what applying a policy file would change
    Diff(FileArgs),
    /// Apply the policies of a file
    Apply(FileArgs),
    /// Show policies
    Get(GetArgs),
    /// Delete a policy
    Delete(DeleteArgs),
    /// Say why a VM is, or is not, backed up
    Explain(ExplainArgs),
}

/// A policy file.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A file has one [[policy]] for each policy; docs/policies.md says what it may say.
What is wrong is named by file, line and column. Policies that the file does not
name are left alone.

Examples:
  virtward policy check -f policies.toml
  virtward policy diff -f policies.toml
  virtward policy apply -f policies.toml")]
pub struct FileArgs {
    /// The file; - is standard input
    #[arg(long, short, value_name = "FILE")]
    pub file: PathBuf,
}

/// Arguments of `policy get`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward policy get
  virtward policy get gold > gold.toml
  virtward policy get --json | jq -r '.[].name'")]
pub struct GetArgs {
    /// Only this one, as a policy file
    pub name: Option<String>,
}

/// Arguments of `policy delete`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Restore points stay, and no rule removes them any more.\n\nExamples:\n  virtward policy delete gold"
)]
pub struct DeleteArgs {
    /// Its name
    pub name: String,
}

/// Arguments of `policy explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward policy explain web1")]
pub struct ExplainArgs {
    /// The VM, by name or UUID
    pub vm: String,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    let client = daemon::client(app);
    match command {
        Command::Check(args) => check(app, args),
        Command::Diff(args) => diff(app, &client, args).await,
        Command::Apply(args) => apply(app, &client, args).await,
        Command::Get(args) => get(app, &client, args.name.as_deref()).await,
        Command::Delete(args) => {
            client.delete(&path(&args.name)).await?;
            app.progress.note(&format!("policy {} is deleted", args.name));
            Ok(())
        }
        Command::Explain(args) => explain(app, &client, &args.vm).await,
    }
}

fn path(name: &str) -> String {
    format!("/api/v1/policies/{}", escaped(name))
}

/// The text of the file and its name for messages.
fn read(args: &FileArgs) -> Result<(String, String), Failure> {
    let name = args.file.display().to_string();
    let mut text = String::new();
    let outcome = match name.as_str() {
        "-" => std::io::stdin().lock().take(FILE_BYTES_MAX).read_to_string(&mut text),
        _ => fs::File::open(&args.file).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text)),
    };
    outcome.map_err(Failure::io(format!("cannot read the policy file {name}")))?;
    Ok((name, text))
}

/// Names of the hosts that the daemon knows; none if they are more than it tells at once: it checks them itself.
async fn hosts(client: &Client) -> Result<Option<BTreeSet<String>>, Failure> {
    let all: Page<Host> = client.get("/api/v1/hosts?limit=1000").await?;
    Ok(all.next.is_none().then(|| all.items.into_iter().map(|host| host.name).collect()))
}

/// The policies of the file, checked as far as that can be done without a daemon, or against the hosts that one knows.
fn policies(app: &App, args: &FileArgs, hosts: Option<&BTreeSet<String>>) -> Result<Vec<Policy>, Failure> {
    let (name, text) = read(args)?;
    let mut known: BTreeSet<String> = app.settings.repositories.keys().cloned().collect();
    known.insert(virtward_server::config::DEFAULT_REPOSITORY.to_owned());
    let zones = TimeZoneDatabase::from_env();
    file::parse(&name, &text, &Known { zones: &zones, repositories: Some(&known), hosts }).map_err(|problems| {
        let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
        Failure::new(Kind::Usage, lines.join("\n"))
    })
}

fn document(policy: &Policy) -> Result<PolicyDocument, Failure> {
    let policy = serde_json::to_value(policy).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    Ok(PolicyDocument { policy: Some(policy), ..PolicyDocument::default() })
}

#[derive(Serialize)]
struct Checked {
    policies: Vec<String>,
}

fn check(app: &App, args: &FileArgs) -> Result<(), Failure> {
    let names: Vec<String> = policies(app, args, None)?.into_iter().map(|policy| policy.name).collect();
    match app.json {
        true => out::json(&Checked { policies: names }),
        false => out::text(&format!("good: {}\n", names.join(", "))),
    }
}

async fn diff(app: &App, client: &Client, args: &FileArgs) -> Result<(), Failure> {
    let mut all = Vec::new();
    for policy in policies(app, args, hosts(client).await?.as_ref())? {
        let diff: PolicyDiff = client.post("/api/v1/policies/diff", &document(&policy)?, None).await?;
        all.push(diff);
    }
    match app.json {
        true => out::json(&all),
        false => out::text(&all.iter().map(text).collect::<String>()),
    }
}

fn text(diff: &PolicyDiff) -> String {
    let names = |vms: &[virtward_api::VmRef]| vms.iter().map(|vm| vm.name.clone()).collect::<Vec<_>>().join(", ");
    let mut text = match (diff.is_new, diff.changes.is_empty()) {
        (true, _) => format!("policy {} is new\n", diff.name),
        (false, true) => format!("policy {} does not change\n", diff.name),
        (false, false) => format!("policy {} changes\n", diff.name),
    };
    for change in &diff.changes {
        text.push_str(&format!("  {}: {} → {}\n", change.field, change.from, change.to));
    }
    if !diff.vms_added.is_empty() {
        text.push_str(&format!("  + {}\n", names(&diff.vms_added)));
    }
    if !diff.vms_removed.is_empty() {
        text.push_str(&format!("  - {}\n", names(&diff.vms_removed)));
    }
    render::printable_lines(&text)
}

async fn apply(app: &App, client: &Client, args: &FileArgs) -> Result<(), Failure> {
    let policies = policies(app, args, hosts(client).await?.as_ref())?;
    // All of them are good for the daemon too, before any is applied.
    for policy in &policies {
        let report: PolicyReport = client.post("/api/v1/policies/validate", &document(policy)?, None).await?;
        if let Some(finding) = report.findings.first() {
            let message = format!("policy {}: {}: {}", policy.name, finding.field, finding.message);
            return Err(Failure::new(Kind::Usage, message).hint("nothing was applied"));
        }
    }
    let mut applied: Vec<Applied> = Vec::new();
    for policy in &policies {
        let one: Applied = client.put(&path(&policy.name), &document(policy)?, None).await?;
        if !app.json {
            let next = one.next_run.map(|at| format!(", next run {}", render::local_time(at))).unwrap_or_default();
            out::text(&format!("applied {}: {} VMs{next}\n", one.name, one.vms.len()))?;
        }
        applied.push(one);
    }
    if app.json { out::json(&applied) } else { Ok(()) }
}

async fn get(app: &App, client: &Client, name: Option<&str>) -> Result<(), Failure> {
    let Some(name) = name else {
        let all: Vec<Applied> = client.get("/api/v1/policies").await?;
        if app.json {
            return out::json(&all);
        }
        let mut table = Table::new(&["NAME", "VMS", "NEXT RUN", "PAUSED", "UPDATED", "BY"]);
        for policy in all {
            table.row([
                policy.name,
                policy.vms.len().to_string(),
                policy.next_run.map(render::local_time).unwrap_or_default(),
                if policy.is_paused { "yes" } else { "no" }.into(),
                render::local_time(policy.updated),
                policy.updated_by,
            ]);
        }
        return out::text(&table.render(out::stdout_is_terminal()));
    };
    let found: Applied = client.get(&path(name)).await?;
    if app.json {
        return out::json(&found);
    }
    let policy: Policy =
        serde_json::from_value(found.policy).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    let text = file::render(&[policy]).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    out::text(&text)
}

async fn explain(app: &App, client: &Client, vm: &str) -> Result<(), Failure> {
    let found: Explanation = client.get(&format!("/api/v1/vms/{}/explain", escaped(vm))).await?;
    if app.json {
        return out::json(&found);
    }
    let mut text = format!("{} ({})\n", found.vm.name, found.vm.uuid);
    if found.policies.is_empty() {
        text.push_str("  there are no policies; virtward policy apply -f FILE makes some\n");
    }
    for policy in &found.policies {
        text.push_str(&format!("  {}: {}\n", policy.policy, policy.reasons.join("; ")));
    }
    out::text(&render::printable_lines(&text))
}
