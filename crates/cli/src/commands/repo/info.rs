//! `virtward repo info`: what a repository is and how much it holds.

use virtward_model::Bytes;
use virtward_repo::Info;

use crate::{
    app::App,
    connect::{self, blocking},
    exit::Failure,
    out, render,
};

/// Arguments of `repo info`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward repo info
  virtward repo info --json | jq .bytes")]
pub struct Args {}

/// Shows it.
pub async fn run(app: &App, _: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let info = blocking(move || Ok(repository.info()?)).await?;
    match app.json {
        true => out::json(&info),
        false => out::text(&text(&info)),
    }
}

fn text(info: &Info) -> String {
    let mut fields = vec![
        ("location", info.location.clone()),
        ("id", info.id.clone()),
        ("format", info.format.to_string()),
        ("created", render::exact_time(info.created)),
        ("keys", info.keys.len().to_string()),
        ("restore points", info.points.to_string()),
    ];
    if info.unreadable_points > 0 {
        fields.push(("unreadable", format!("{} restore points; run virtward repo check", info.unreadable_points)));
    }
    fields.extend([
        ("size on disk", format!("{} in {} packs", Bytes(info.bytes), info.packs)),
        ("disk data", format!("{} in all restore points", Bytes(info.data_bytes))),
        ("distinct data", format!("{} in {} chunks", Bytes(info.chunk_bytes), info.chunks)),
        ("deduplication", format!("{:.1} to 1", info.dedup_ratio)),
        ("compression", format!("{:.1} to 1", info.compression_ratio)),
    ]);
    render::fields(&fields)
}
