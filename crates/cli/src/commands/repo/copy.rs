//! `virtward repo copy`: restore points to another repository, with keys of its own.

use std::path::PathBuf;

use serde::Serialize;
use virtward_decide::pointref;
use virtward_model::{Bytes, PointId, RestorePoint};
use virtward_repo::{CopiedPoint, CopyReport, WriterOptions};

use crate::{
    app::{self, App},
    commands::restore::POINT_HELP,
    connect::{self, OtherSecret, blocking},
    exit::{Failure, Kind},
    out,
    progress::Watch,
    render,
};

/// Arguments of `repo copy`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
Restore points that the other repository has already are left out, so that the\n\
same command can run every night; of the others only what changed since a copied\n\
restore point of the same VM is read. An interrupted copy goes on where it was.\n\
Everything is decrypted, checked and encrypted again with the other keys.\n\n\
Examples:\n  virtward repo copy --to /mnt/offsite/repo\n  \
virtward repo copy --to /mnt/offsite/repo web1 db1@latest\n  \
virtward repo copy --to /mnt/offsite/repo --to-password-file /root/offsite.pw"))]
pub struct Args {
    /// VMs or restore points [default: everything]
    #[arg(value_name = "VM|POINT")]
    pub what: Vec<String>,
    /// The other repository, which must exist
    #[arg(long, value_name = "LOCATION")]
    pub to: String,
    /// File whose first line is the other repository's password [default: what opens this one]
    #[arg(long, value_name = "FILE", conflicts_with = "to_key_file")]
    pub to_password_file: Option<PathBuf>,
    /// Key file of the other repository
    #[arg(long, value_name = "FILE")]
    pub to_key_file: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    copied: Vec<CopiedPoint>,
    present: Vec<PointId>,
    failed: Vec<Failed>,
}

#[derive(Serialize)]
struct Failed {
    id: PointId,
    error: String,
}

/// Copies.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let (repository, secret) = connect::repository_and_secret(app).await?;
    connect::readable(&repository).await?;
    let own = OtherSecret {
        password_file: args.to_password_file.clone(),
        key_file: args.to_key_file.clone(),
        flags: "--to-password-file or --to-key-file",
    };
    let to = connect::other(app, &args.to, &own, secret).await?;
    let all = connect::points(app, &repository).await?;
    let ids = choose(app, &all, &args.what)?;
    let options =
        WriterOptions { compression: app.settings.backup.compression.unwrap_or_default(), ..WriterOptions::default() };
    let (watch, progress, json) = (Watch::new(app, "copy"), app.progress.clone(), app.json);
    let report = blocking(move || {
        let mut each = |copied: &CopiedPoint| {
            if !json {
                progress.note(&line(copied));
            }
        };
        Ok(repository.copy_points(&to, &ids, &options, &watch, &mut each)?)
    })
    .await;
    app.progress.finish("copy");
    let report = report?;
    let failed = report.failed.len();
    match app.json {
        true => out::json(&view(report))?,
        false => out::text(&text(&report))?,
    }
    if failed == 0 {
        return Ok(());
    }
    let failure = Failure::new(Kind::Damaged, format!("{failed} restore points could not be copied"))
        .hint("virtward backup verify shows what is damaged; virtward repo heal may mend it");
    app::report(&failure, false);
    Err(failure.reported())
}

/// A name that is a VM's means all its restore points.
fn choose(app: &App, all: &[RestorePoint], what: &[String]) -> Result<Vec<PointId>, Failure> {
    if what.is_empty() {
        return Ok(all.iter().map(|point| point.id).collect());
    }
    let mut ids = Vec::new();
    for text in what {
        match pointref::of_vm(all, text) {
            points if points.is_empty() => ids.push(connect::point(app, all, text)?.id),
            points => ids.extend(points.iter().map(|point| point.id)),
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn line(copied: &CopiedPoint) -> String {
    format!(
        "copied {} of {}, taken {}: {} read, {} stored",
        copied.id,
        copied.vm,
        render::exact_time(copied.taken),
        Bytes(copied.read_bytes),
        Bytes(copied.stored_bytes)
    )
}

fn text(report: &CopyReport) -> String {
    let sum = |of: fn(&CopiedPoint) -> u64| Bytes(report.copied.iter().map(of).sum());
    let mut text = format!(
        "copied {} restore points ({} read, {} stored), {} were there already\n",
        report.copied.len(),
        sum(|copied| copied.read_bytes),
        sum(|copied| copied.stored_bytes),
        report.present.len()
    );
    for (id, error) in &report.failed {
        text.push_str(&render::printable(&format!("not copied: {id}: {error}")));
        text.push('\n');
    }
    text
}

fn view(report: CopyReport) -> Report {
    let failed = |(id, error): (PointId, virtward_repo::Error)| Failed { id, error: error.to_string() };
    Report { copied: report.copied, present: report.present, failed: report.failed.into_iter().map(failed).collect() }
}
