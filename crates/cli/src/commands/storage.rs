//! `virtward storage`: pools and what is on them.

use serde::Serialize;
use virtward_engine::{DiskPlace, MoveDiskOptions, MovedDisk, move_disk};
use virtward_model::{Bytes, DiskDevice};

use crate::{
    app::App,
    commands::vm::move_disk::line,
    connect,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List storage pools with their room
    List(ListArgs),
    /// Move every disk away from a pool
    Drain(DrainArgs),
}

/// Arguments of `storage list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward storage list")]
pub struct ListArgs {}

/// Arguments of `storage drain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
One disk after the other, VMs that run and VMs that do not. What cannot be
moved is named with the reason; run again, the command goes on.

Examples:
  virtward storage drain old --to new
  virtward storage drain old --to new --bandwidth 200MiB")]
pub struct DrainArgs {
    /// The pool to empty
    #[arg(value_name = "POOL")]
    pub pool: String,
    /// The pool to which its disks go
    #[arg(long, value_name = "POOL")]
    pub to: String,
    /// Copy no more than this per second
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<Bytes>,
}

/// A drain as JSON.
#[derive(Debug, Serialize)]
struct Drained {
    pool: String,
    moved: Vec<MovedDisk>,
    left: Vec<Left>,
}

#[derive(Debug, Serialize)]
struct Left {
    vm: String,
    target: String,
    path: String,
    reason: String,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(_) => list(app).await,
        Command::Drain(args) => drain(app, args).await,
    }
}

async fn list(app: &App) -> Result<(), Failure> {
    let hypervisor = connect::hypervisor(app).await?;
    let pools = hypervisor.pools().await;
    hypervisor.close().await;
    let pools = pools?;
    if app.json {
        return out::json(&pools);
    }
    let mut table = Table::new(&["POOL", "TYPE", "STATE", "SIZE", "FREE", "PATH"]);
    for pool in &pools {
        table.row([
            pool.name.clone(),
            pool.kind.clone(),
            if pool.active { "active" } else { "inactive" }.to_owned(),
            Bytes(pool.capacity_bytes).to_string(),
            Bytes(pool.available_bytes).to_string(),
            pool.path.clone().unwrap_or_default(),
        ]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
}

async fn drain(app: &App, args: &DrainArgs) -> Result<(), Failure> {
    let hypervisor = connect::hypervisor(app).await?;
    let outcome = drain_pool(app, args, hypervisor.clone()).await;
    hypervisor.close().await;
    let drained = outcome?;
    if app.json {
        out::json(&drained)?;
    } else {
        let mut text = String::new();
        for moved in &drained.moved {
            text += &(line(moved) + "\n");
        }
        for left in &drained.left {
            text += &render::printable(&format!("left: {} {} ({}): {}", left.vm, left.target, left.path, left.reason));
            text.push('\n');
        }
        if drained.left.is_empty() {
            text += &render::printable(&format!("no VM of this host has a disk on {} any more", drained.pool));
            text.push('\n');
        }
        out::text(&text)?;
    }
    if app.cancel.is_cancelled() {
        return Err(Failure::new(Kind::Cancelled, "cancelled"));
    }
    match drained.left.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Kind::Partial, format!("{} disks are left on {}", drained.left.len(), drained.pool))),
    }
}

async fn drain_pool(
    app: &App,
    args: &DrainArgs,
    hypervisor: std::sync::Arc<dyn virtward_hypervisor::Hypervisor>,
) -> Result<Drained, Failure> {
    let pools = hypervisor.pools().await?;
    let find = |name: &str| {
        pools.iter().find(|pool| pool.name == name).ok_or_else(|| {
            Failure::new(Kind::NotFound, format!("there is no storage pool {name}"))
                .hint("virtward storage list shows the pools of this host")
        })
    };
    let path = find(&args.pool)?.path.clone().ok_or_else(|| {
        Failure::new(Kind::Refused, format!("pool {} has no directory", args.pool)).hint("move its disks one by one")
    })?;
    find(&args.to)?;
    if args.pool == args.to {
        return Err(Failure::new(Kind::Usage, "a pool cannot be drained into itself"));
    }
    let env = connect::env(app, hypervisor.clone());
    let options = MoveDiskOptions { bandwidth: args.bandwidth, ..MoveDiskOptions::default() };
    let mut drained = Drained { pool: args.pool.clone(), moved: Vec::new(), left: Vec::new() };
    let inside = format!("{}/", path.trim_end_matches('/'));
    for vm in hypervisor.list().await? {
        for disk in &vm.disks {
            let Some(path) = disk.source.path().filter(|path| path.starts_with(&inside)) else { continue };
            let mut stays = |reason: String| {
                let (vm, target, path) = (vm.name.clone(), disk.target.clone(), path.to_owned());
                drained.left.push(Left { vm, target, path, reason });
            };
            if app.cancel.is_cancelled() {
                stays("cancelled".to_owned());
                continue;
            }
            if disk.device != DiskDevice::Disk || disk.read_only {
                stays("a removable or read-only medium: change it with virsh change-media".to_owned());
                continue;
            }
            let to = DiskPlace::Pool(args.to.clone());
            let id = vm.uuid.to_string();
            let moved = move_disk(&env, &id, &disk.target, &to, &options, &*app.progress, &app.cancel).await;
            app.progress.finish(&vm.name);
            match moved {
                Ok(moved) => drained.moved.push(moved),
                Err(error) => stays(Failure::from(error).message),
            }
        }
    }
    Ok(drained)
}
