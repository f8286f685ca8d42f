//! `virtward repo rebuild-index`: the index again from the packs, when segments of it are damaged or lost.

use virtward_repo::RebuildReport;

use crate::{
    app::{self, App},
    commands::backup::verify,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    progress::Watch,
};

/// Arguments of `repo rebuild-index`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The index says where each chunk is stored. Every pack has a table of its own, and
from these the index is made anew; what was there of it is removed once the new
one is written and read again. Backups may run meanwhile. The data itself is not
read: virtward backup verify does that.

If a pack's own table is damaged it is reported (exit status 9), and its chunks
are taken over from the old index as far as that can be read.

Examples:
  virtward repo rebuild-index
  virtward repo rebuild-index --json")]
pub struct Args {}

/// Rebuilds.
pub async fn run(app: &App, _: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let watch = Watch::new(app, "index");
    let report = blocking(move || Ok(repository.rebuild_index(&watch)?)).await;
    app.progress.finish("index");
    let report = report?;
    match app.json {
        true => out::json(&report)?,
        false => out::text(&text(&report))?,
    }
    if report.is_ok() {
        return Ok(());
    }
    let failure = Failure::new(Kind::Damaged, format!("{} packs have damaged tables", report.damaged.len()))
        .hint("virtward backup verify --all shows which restore points are affected");
    app::report(&failure, false);
    Err(failure.reported())
}

fn text(report: &RebuildReport) -> String {
    let mut text = format!(
        "indexed {} chunks in {} packs anew: {} segments, in place of {}\n",
        report.chunks, report.packs, report.segments, report.replaced
    );
    if report.salvaged > 0 {
        text.push_str(&format!("{} damaged packs were indexed from the old index\n", report.salvaged));
    }
    if !report.is_ok() {
        text.push_str(&verify::objects(&report.damaged));
    }
    text
}
