//! `virtward backup image`: disk image files that belong to no VM of libvirt.

use std::path::PathBuf;

use virtward_engine::{ImageSet, backup_images};

use crate::{
    app::App,
    commands::backup::run::{self, Common},
    connect,
    exit::{Failure, Kind},
};

/// Arguments of `backup image`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The files of one call make one restore point, one disk each. qcow2 is read with
its backing files. For the disks of a VM use virtward backup run.

Examples:
  virtward backup image /srv/appliance.vmdk
  virtward backup image system.qcow2 data.raw --name old-server
  virtward backup image dump.img --format raw")]
pub struct Args {
    /// Image files: raw, qcow2, VMDK (also split), VHD, VHDX, VDI
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Name in the repository [default: the name of the first file without its extension]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Format of the files [default: what extension and header say]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    #[command(flatten)]
    pub common: Common,
}

/// Backs up the files as one restore point.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let stem = args.files.first().and_then(|file| file.file_stem()).map(|stem| stem.to_string_lossy().into_owned());
    let name = args.name.clone().or(stem).unwrap_or_default();
    if name.is_empty() || name.contains(['@', '/']) || name.chars().any(char::is_control) {
        return Err(Failure::new(Kind::Usage, format!("{name:?} cannot be the name of a backup"))
            .hint("give it one without @ and / with --name"));
    }
    let repository = connect::repository(app).await?;
    repository.look_ahead();
    let set = ImageSet { name: name.clone(), files: args.files.clone(), format: args.format.clone() };
    let options = run::common(&args.common, &app.settings.backup);
    let outcome = backup_images(&repository, &set, &options, &*app.progress, &app.cancel).await;
    app.progress.finish(&name);
    run::print(app, &outcome?)
}
