//! `virtward repo heal`: lost data comes back from a repository that holds copies.

use std::path::PathBuf;

use virtward_model::Bytes;
use virtward_repo::{HealReport, VerifyMode, VerifyOptions, WriterOptions};

use crate::{
    app::App,
    commands::backup::verify::{self, Mode},
    connect::{self, OtherSecret, blocking},
    exit::Failure,
    out,
    progress::Watch,
    render,
};

/// Arguments of `repo heal`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
First this repository is verified as deep as --mode says, and what earlier
verifications found counts too. Then everything that restore points have lost is
read from their copies in the other repository (or from the originals, if these
are the copies), checked against what was lost, and stored anew. Restore points
stay what they are.

Examples:
  virtward repo heal --from /mnt/offsite/repo
  virtward repo heal --from /mnt/offsite/repo --mode full
  virtward repo heal --from /mnt/offsite/repo --from-password-file /root/offsite.pw")]
pub struct Args {
    /// The other repository
    #[arg(long, value_name = "LOCATION")]
    pub from: String,
    /// File whose first line is the other repository's password [default: what opens this one]
    #[arg(long, value_name = "FILE", conflicts_with = "from_key_file")]
    pub from_password_file: Option<PathBuf>,
    /// Key file of the other repository
    #[arg(long, value_name = "FILE")]
    pub from_key_file: Option<PathBuf>,
    /// How deep to look for damage first
    #[arg(long, value_enum, default_value = "light")]
    pub mode: Mode,
}

/// Heals.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let (repository, secret) = connect::repository_and_secret(app).await?;
    let own = OtherSecret {
        password_file: args.from_password_file.clone(),
        key_file: args.from_key_file.clone(),
        flags: "--from-password-file or --from-key-file",
    };
    let mirror = connect::other(app, &args.from, &own, secret).await?;
    connect::readable(&mirror).await?;
    let options = VerifyOptions { mode: VerifyMode::from(args.mode), ..VerifyOptions::default() };
    let (watch, verified) = (Watch::new(app, "verify"), repository.clone());
    let looked = blocking(move || Ok(verified.verify(&options, &watch)?)).await;
    app.progress.finish("verify");
    let looked = looked?;
    let options =
        WriterOptions { compression: app.settings.backup.compression.unwrap_or_default(), ..WriterOptions::default() };
    let watch = Watch::new(app, "heal");
    let report = blocking(move || Ok(repository.heal_from(&mirror, &options, &watch)?)).await;
    app.progress.finish("heal");
    let report = report?;
    match app.json {
        true => out::json(&report)?,
        false => out::text(&text(&report, looked.damaged.len()))?,
    }
    let whole = report.damaged_points.is_empty() && report.unreadable.is_empty();
    verify::damaged(whole, report.unreadable.len(), verify::Toll::Points(report.damaged_points.len()))
}

fn text(report: &HealReport, damaged: usize) -> String {
    let mut text = format!(
        "{damaged} damaged objects were found; {} restore points healed, {} chunks stored anew ({})\n",
        report.healed.len(),
        report.stored,
        Bytes(report.stored_bytes)
    );
    for id in &report.healed {
        text.push_str(&format!("healed: {id}\n"));
    }
    for point in &report.damaged_points {
        text.push_str(&verify::losses(point));
        if report.without_copy.contains(&point.id) {
            text.push_str("  the other repository has no copy of it\n");
        }
    }
    for object in &report.unreadable {
        text.push_str(&render::printable(&format!(
            "unreadable: {object}: it is damaged, and the other repository has no whole copy"
        )));
        text.push('\n');
    }
    text
}
