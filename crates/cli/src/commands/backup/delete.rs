//! `virtward backup delete`: restore points that are no longer wanted, unless they are held. Their space comes back with garbage collection.

use std::io::{self, BufRead, Write};

use virtward_model::RestorePoint;
use virtward_repo::Error as RepoError;

use crate::{
    app::App,
    commands::restore::POINT_HELP,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out, render,
};

/// Arguments of `backup delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
Every restore point is complete by itself: deleting one never harms another.\n\
What was deleted can be brought back for 7 days: see virtward backup recover.\n\n\
Examples:\n  virtward backup delete web1@2026-11-01\n  virtward backup delete 4f1c 90aa --yes"))]
pub struct Args {
    /// Restore points
    #[arg(value_name = "POINT", required = true)]
    pub points: Vec<String>,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

/// Deletes.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let all = connect::points(app, &repository).await?;
    // All are found before the first is deleted: a typing error in the last deletes nothing.
    let mut chosen: Vec<&RestorePoint> = Vec::new();
    for text in &args.points {
        let point = connect::point(app, &all, text)?;
        if !chosen.iter().any(|other| other.id == point.id) {
            chosen.push(point);
        }
    }
    let holds = connect::holds(&repository).await?;
    if let Some(hold) = chosen.iter().find_map(|point| holds.get(&point.id)) {
        return Err(RepoError::Held { id: hold.point, reason: hold.reason.clone() }.into());
    }
    if !args.yes && !confirmed(&chosen)? {
        return Err(Failure::new(Kind::Refused, "not confirmed; nothing was deleted"));
    }
    let mut deleted = Vec::new();
    for point in &chosen {
        let (repository, id) = (repository.clone(), point.id);
        blocking(move || Ok(repository.delete_point(id)?)).await?;
        deleted.push(id.to_string());
        if !app.json {
            out::text(&format!("deleted {}\n", describe(point)))?;
        }
    }
    match app.json {
        true => out::json(&serde_json::json!({ "deleted": deleted })),
        false => Ok(()),
    }
}

fn confirmed(points: &[&RestorePoint]) -> Result<bool, Failure> {
    if !out::can_ask() {
        return Err(Failure::new(
            Kind::Refused,
            "deleting restore points has to be confirmed, and this is no terminal",
        )
        .hint("add --yes"));
    }
    for point in points {
        out::note(&describe(point));
    }
    let count = match points.len() {
        1 => "this restore point".to_owned(),
        n => format!("these {n} restore points"),
    };
    let _ = write!(io::stderr(), "Delete {count}? [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(Failure::io("cannot read the answer"))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn describe(point: &RestorePoint) -> String {
    render::printable(&format!("{} of {}, taken {}", point.id, point.vm, render::exact_time(point.taken)))
}
