//! `virtward restore disk`: one disk of a restore point to a file, in any of the usual formats.

use std::path::PathBuf;

use virtward_engine::{DiskFormat, RestoreDiskOptions, restore_disk};
use virtward_model::Bytes;

use crate::{app::App, commands::restore::POINT_HELP, connect, exit::Failure, out, render};

/// Arguments of `restore disk`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
Examples:\n  virtward restore disk web1@latest --disk vda --to /tmp/web1.qcow2\n  \
virtward restore disk web1@latest --disk vda --to web1.vmdk --format vmdk-split\n  \
virtward restore disk image/appliance@latest --to appliance.raw --format raw"))]
pub struct Args {
    /// Restore point
    #[arg(value_name = "POINT")]
    pub point: String,
    /// Disk, as virtward backup show names it; may be left out when there is one
    #[arg(long, value_name = "TARGET")]
    pub disk: Option<String>,
    /// File to create
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
    /// Format [default: by the file's extension, else as it was]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Replace an existing file
    #[arg(long)]
    pub overwrite: bool,
}

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// QEMU's own, thin
    Qcow2,
    /// Plain bytes, sparse
    Raw,
    /// VMware, one growing file
    Vmdk,
    /// VMware, in pieces of at most 2 GB
    VmdkSplit,
    /// Hyper-V
    Vhdx,
    /// VirtualBox
    Vdi,
}

impl From<Format> for DiskFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => DiskFormat::Qcow2,
            Format::Raw => DiskFormat::Raw,
            Format::Vmdk => DiskFormat::Vmdk,
            Format::VmdkSplit => DiskFormat::VmdkSplit,
            Format::Vhdx => DiskFormat::Vhdx,
            Format::Vdi => DiskFormat::Vdi,
        }
    }
}

/// Restores.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    repository.look_ahead();
    connect::readable(&repository).await?;
    let all = connect::points(app, &repository).await?;
    let point = connect::point(app, &all, &args.point)?;
    let options = RestoreDiskOptions {
        disk: args.disk.clone(),
        to: args.to.clone(),
        format: args.format.map(DiskFormat::from),
        overwrite: args.overwrite,
        threads: 0,
    };
    let outcome = restore_disk(&repository, point.id, &options, &*app.progress, &app.cancel).await;
    app.progress.finish(&point.vm);
    let disk = outcome?;
    if app.json {
        return out::json(&disk);
    }
    out::text(&format!(
        "restored {} to {} ({}, {}, {} written)\n",
        render::printable(&disk.target),
        render::printable(&disk.path),
        render::word(&disk.format),
        Bytes(disk.size_bytes),
        Bytes(disk.written_bytes)
    ))
}
