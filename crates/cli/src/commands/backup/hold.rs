//! `virtward backup hold`: restore points that must not be deleted, and why.

use std::collections::HashMap;

use virtward_decide::pointref::ShortIds;
use virtward_model::{PointId, RestorePoint};

use crate::{
    app::App,
    commands::restore::POINT_HELP,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    render::{self, Table},
    view::Holds,
};

/// The verbs of holds.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Hold restore points: nothing deletes them until the hold is removed
    Add(AddArgs),
    /// End holds
    Remove(RemoveArgs),
    /// List holds
    List(ListArgs),
}

/// Arguments of `backup hold add`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
A held restore point is refused by backup delete and kept by backup prune. The\n\
reason is shown by both, by backup list and by backup show.\n\n\
Examples:\n  virtward backup hold add web1@2026-11-22 --reason 'case 17, ask legal'\n  \
virtward backup hold add 4f1c 90aa --reason 'until the audit is over'"))]
pub struct AddArgs {
    /// Restore points
    #[arg(value_name = "POINT", required = true)]
    pub points: Vec<String>,
    /// Why they are held
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// Arguments of `backup hold remove`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
Examples:\n  virtward backup hold remove 4f1c"))]
pub struct RemoveArgs {
    /// Restore points
    #[arg(value_name = "POINT", required = true)]
    pub points: Vec<String>,
}

/// Arguments of `backup hold list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward backup hold list
  virtward backup hold list --json | jq -r '.[] | [.point, .reason] | @tsv'")]
pub struct ListArgs {}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Add(args) => add(app, args).await,
        Command::Remove(args) => remove(app, args).await,
        Command::List(_) => list(app).await,
    }
}

async fn add(app: &App, args: &AddArgs) -> Result<(), Failure> {
    let reason = args.reason.trim().to_owned();
    if reason.is_empty() || reason.len() > 1000 || reason.chars().any(char::is_control) {
        return Err(Failure::new(Kind::Usage, "the reason of a hold is one line of at most 1000 bytes, not empty"));
    }
    let repository = connect::repository(app).await?;
    let all = connect::points(app, &repository).await?;
    // All are found before the first is held.
    let chosen: Vec<&RestorePoint> =
        args.points.iter().map(|text| connect::point(app, &all, text)).collect::<Result<_, _>>()?;
    let mut holds = Vec::new();
    for point in chosen {
        let (repository, id, reason) = (repository.clone(), point.id, reason.clone());
        holds.push(blocking(move || Ok(repository.add_hold(id, &reason)?)).await?);
        if !app.json {
            out::text(&render::printable(&format!("held {} of {}", point.id, point.vm)))?;
            out::text("\n")?;
        }
    }
    if app.json { out::json(&holds) } else { Ok(()) }
}

async fn remove(app: &App, args: &RemoveArgs) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let all = connect::points(app, &repository).await?;
    let holds = connect::holds(&repository).await?;
    let ids: Vec<PointId> = args.points.iter().map(|text| held(app, &all, &holds, text)).collect::<Result<_, _>>()?;
    for id in &ids {
        let (repository, id) = (repository.clone(), *id);
        blocking(move || Ok(repository.remove_hold(id)?)).await?;
        if !app.json {
            out::text(&format!("released {id}\n"))?;
        }
    }
    if app.json { out::json(&serde_json::json!({ "released": ids })) } else { Ok(()) }
}

/// The held point that a person means. Its own object may be lost or unreadable: then its id does.
fn held(app: &App, all: &[RestorePoint], holds: &Holds, text: &str) -> Result<PointId, Failure> {
    let wanted = text.to_ascii_lowercase();
    let begins: Vec<PointId> =
        holds.keys().copied().filter(|id| !wanted.is_empty() && id.to_string().starts_with(&wanted)).collect();
    if let [id] = begins[..] {
        return Ok(id);
    }
    let point = connect::point(app, all, text)?;
    match holds.contains_key(&point.id) {
        true => Ok(point.id),
        false => Err(Failure::new(Kind::NotFound, format!("restore point {} is not held", point.id))
            .hint("virtward backup hold list shows the holds")),
    }
}

async fn list(app: &App) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let holds = connect::holds(&repository).await?;
    if app.json {
        return out::json(&holds.values().collect::<Vec<_>>());
    }
    if holds.is_empty() {
        app.progress.note("nothing is held");
        return Ok(());
    }
    out::text(&table(&connect::points(app, &repository).await?, &holds).render(out::stdout_is_terminal()))
}

fn table(all: &[RestorePoint], holds: &Holds) -> Table {
    let mut table = Table::new(&["ID", "VM", "TAKEN", "SINCE", "REASON"]);
    let (ids, known) = (ShortIds::new(all), all.iter().map(|point| (point.id, point)).collect::<HashMap<_, _>>());
    for (id, hold) in holds {
        let point = known.get(id);
        table.row([
            point.map_or_else(|| id.to_string(), |point| ids.of(point)),
            point.map_or_else(|| "not in the repository".into(), |point| point.vm.clone()),
            point.map(|point| render::local_time(point.taken)).unwrap_or_default(),
            hold.since.map(render::local_time).unwrap_or_default(),
            hold.reason.clone(),
        ]);
    }
    table
}
