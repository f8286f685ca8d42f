//! `virtward repo check`: whether everything that restore points refer to is there and consistent.

use virtward_model::Bytes;
use virtward_repo::CheckReport;

use crate::{
    app::App,
    commands::backup::verify,
    connect::{self, blocking},
    exit::Failure,
    out,
    progress::Watch,
};

/// Arguments of `repo check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Checks the structure: that index, packs and restore points are readable and
that every restore point has all it needs. The data itself is read by virtward
backup verify.

Examples:
  virtward repo check
  virtward repo check --json")]
pub struct Args {}

/// Checks.
pub async fn run(app: &App, _: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let watch = Watch::new(app, "check");
    let report = blocking(move || Ok(repository.check(&watch)?)).await;
    app.progress.finish("check");
    let report = report?;
    match app.json {
        true => out::json(&report)?,
        false => out::text(&text(&report))?,
    }
    verify::damaged(
        report.is_ok(),
        report.damaged.len(),
        verify::Toll::of_all(&report.damaged, report.damaged_points.len()),
    )
}

fn text(report: &CheckReport) -> String {
    let mut text = format!(
        "checked {} restore points, {} chunks in {} packs, {} keys\n",
        report.points, report.chunks, report.packs, report.keys
    );
    if report.unlisted_packs > 0 {
        text.push_str(&format!(
            "{} packs ({}) belong to runs that go on or were killed; that is harmless\n",
            report.unlisted_packs,
            Bytes(report.unlisted_bytes)
        ));
    }
    text.push_str(&verify::objects(&report.damaged));
    report.damaged_points.iter().for_each(|point| text.push_str(&verify::losses(point)));
    text
}
