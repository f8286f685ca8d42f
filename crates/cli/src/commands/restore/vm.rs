//! `virtward restore vm`: a whole VM, disks first and definition last.

use std::path::PathBuf;

use virtward_engine::{RestoreVmOptions, RestoredVm, restore_vm};
use virtward_model::Bytes;

use crate::{
    app::App,
    commands::restore::POINT_HELP,
    connect,
    exit::{Failure, Kind},
    out, render,
};

/// Arguments of `restore vm`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
A new name gives a new VM beside the old one, with its own UUID and MAC\n\
addresses. Nothing that exists is overwritten unless --overwrite is given, and\n\
a VM that runs never is.\n\n\
Examples:\n  virtward restore vm web1@latest --name web1-r --start\n  virtward restore vm web1@2026-11-22T10:00 --overwrite\n  \
virtward restore vm 4f1c --disk-dir /srv/images --connect qemu+ssh://h2/system"))]
pub struct Args {
    /// Restore point
    #[arg(value_name = "POINT")]
    pub point: String,
    /// Name of the restored VM [default: the name it had]
    #[arg(long, value_name = "NEW")]
    pub name: Option<String>,
    /// Start it
    #[arg(long)]
    pub start: bool,
    /// Replace a VM of that name, which must be shut off, and its disk files
    #[arg(long)]
    pub overwrite: bool,
    /// Directory for the disks [default: where each disk was]
    #[arg(long, value_name = "DIR")]
    pub disk_dir: Option<PathBuf>,
}

/// Restores.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    repository.look_ahead();
    connect::readable(&repository).await?;
    let all = connect::points(app, &repository).await?;
    let point = connect::point(app, &all, &args.point)?;
    if point.vm_uuid.is_nil() {
        return Err(Failure::new(Kind::Refused, format!("restore point {} holds image files, not a VM", point.id))
            .hint("restore its disks one by one with virtward restore disk"));
    }
    let disk_dir = match &args.disk_dir {
        None => None,
        Some(dir) => {
            Some(std::path::absolute(dir).map_err(Failure::io(format!("cannot tell where {} is", dir.display())))?)
        }
    };
    let options = RestoreVmOptions {
        name: args.name.clone(),
        start: args.start,
        overwrite: args.overwrite,
        disk_dir,
        threads: 0,
    };
    let hypervisor = connect::hypervisor(app).await?;
    let env = connect::env(app, hypervisor.clone());
    let outcome = restore_vm(&env, &repository, point.id, &options, &*app.progress, &app.cancel).await;
    app.progress.finish(args.name.as_deref().unwrap_or(&point.vm));
    hypervisor.close().await;
    let restored = outcome?;
    match app.json {
        true => out::json(&restored),
        false => out::text(&text(&restored)),
    }
}

fn text(restored: &RestoredVm) -> String {
    let state = if restored.started { "running" } else { "shut off" };
    let head = format!("restored {} ({}) from {}, {state}", restored.vm, restored.uuid, restored.point);
    let mut text = render::printable(&head);
    text.push('\n');
    for disk in &restored.disks {
        text.push_str(&format!(
            "  {}: {} ({}, {} written)\n",
            render::printable(&disk.target),
            render::printable(&disk.path),
            Bytes(disk.size_bytes),
            Bytes(disk.written_bytes)
        ));
    }
    text
}
