//! `virtward vm move-disk`: to another file, format or storage.

use virtward_api::MoveDiskRequest;
use virtward_engine::{DiskPlace, MoveDiskOptions, MovedDisk, move_disk};
use virtward_model::Bytes;

use crate::{app::App, commands::job::escaped, connect, daemon, exit::Failure, out, render};

/// Formats that QEMU writes to while a guest runs.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Format {
    /// QEMU's own, thin; keeps change tracking
    Qcow2,
    /// Plain bytes
    Raw,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }
}

/// Arguments of `vm move-disk`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
The VM may run: its writes go to both places until the switch. A VM that is off
is opened without running. The old file is removed after the switch, unless
--keep-source is given. Interrupted before the switch, nothing has changed.

Examples:
  virtward vm move-disk web1 --disk vda --to fast
  virtward vm move-disk web1 --disk vda --to /srv/images/web1.qcow2 --format qcow2
  virtward vm move-disk web1 --disk vdb --to fast --bandwidth 100MiB")]
pub struct Args {
    /// VM, by name or UUID
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Disk, as virtward vm list names it
    #[arg(long, value_name = "TARGET")]
    pub disk: String,
    /// A storage pool, or the absolute path of a file that does not exist
    #[arg(long, value_name = "POOL|FILE")]
    pub to: String,
    /// Format of the new file [default: as it is]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Copy no more than this per second
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<Bytes>,
    /// Leave the old file
    #[arg(long)]
    pub keep_source: bool,
}

/// Moves: by the daemon if there is one, since it knows who else works on the VM.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    if daemon::knows_vm(app, &args.vm).await {
        return by_daemon(app, args).await;
    }
    let hypervisor = connect::hypervisor(app).await?;
    let env = connect::env(app, hypervisor.clone());
    let to = match args.to.contains('/') {
        true => DiskPlace::File(args.to.clone()),
        false => DiskPlace::Pool(args.to.clone()),
    };
    let format = args.format.map(|format| format.name().to_owned());
    let options = MoveDiskOptions { format, bandwidth: args.bandwidth, keep_source: args.keep_source };
    let outcome = move_disk(&env, &args.vm, &args.disk, &to, &options, &*app.progress, &app.cancel).await;
    app.progress.finish(&args.vm);
    hypervisor.close().await;
    let moved = outcome?;
    match app.json {
        true => out::json(&moved),
        false => out::text(&(line(&moved) + "\n")),
    }
}

async fn by_daemon(app: &App, args: &Args) -> Result<(), Failure> {
    let request = MoveDiskRequest {
        disk: args.disk.clone(),
        to: args.to.clone(),
        format: args.format.map(|format| format.name().to_owned()),
        bandwidth_bytes_s: args.bandwidth.map(|bytes| bytes.0),
        keep_source: args.keep_source,
    };
    let path = format!("/api/v1/vms/{}/move-disk", escaped(&args.vm));
    let job = daemon::done(app, &path, &request, &args.vm).await?;
    daemon::tell(app, &job, |job| {
        let result = job.result.clone().unwrap_or_default();
        let (to, total) = (result.to.unwrap_or_default(), render::duration_ms(result.total_ms.unwrap_or(0)));
        render::printable(&format!("{} {} moved to {to} in {total}", args.vm, args.disk)) + "\n"
    })
}

/// One line about a disk that has moved.
pub fn line(moved: &MovedDisk) -> String {
    render::printable(&match moved.already_there {
        true => format!("{} {} is at {} already", moved.vm, moved.target, moved.to),
        false => format!(
            "{} {} moved to {} ({}, {}) in {}",
            moved.vm,
            moved.target,
            moved.to,
            moved.format,
            Bytes(moved.size_bytes),
            render::duration_ms(moved.total_ms)
        ),
    })
}
