//! `virtward vm`: what the hypervisor has, whether it is protected, and moving it.

pub mod migrate;
pub mod move_disk;
pub mod place;

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;
use virtward_model::{PointId, RestorePoint, Vm, VmState};

use crate::{
    app::App,
    connect,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List VMs with their last restore point
    List(ListArgs),
    /// Move a VM to another host while it runs
    Migrate(Box<migrate::Args>),
    /// Move a disk to another file, format or storage while its VM runs
    MoveDisk(move_disk::Args),
    /// Say on which host a new VM is best started
    Place(place::Args),
}

/// Arguments of `vm list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward vm list
  virtward vm list --connect qemu+ssh://host2/system
  virtward vm list --json | jq -r '.[] | select(.protected == false) | .vm'")]
pub struct ListArgs {}

/// A VM as JSON. `protected` is null when the repository could not be looked at.
#[derive(Debug, PartialEq, Serialize)]
struct VmView<'a> {
    vm: &'a str,
    uuid: Uuid,
    state: VmState,
    disks: Vec<&'a str>,
    protected: Option<bool>,
    last: Option<LastView>,
}

#[derive(Debug, PartialEq, Serialize)]
struct LastView {
    id: PointId,
    taken: Timestamp,
    age_s: i64,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(_) => list(app).await,
        Command::Migrate(args) => migrate::run(app, args).await,
        Command::MoveDisk(args) => move_disk::run(app, args).await,
        Command::Place(args) => place::run(app, args).await,
    }
}

async fn list(app: &App) -> Result<(), Failure> {
    let hypervisor = connect::hypervisor(app).await?;
    let vms = hypervisor.list().await;
    hypervisor.close().await;
    let vms = vms?;
    let points = match restore_points(app).await {
        Ok(points) => Some(points),
        Err(failure) if failure.kind == Kind::Cancelled => return Err(failure),
        // The list is worth having without the repository; what is not known is shown as not known.
        Err(failure) => {
            app.progress.warn(&format!("what is protected is not known: {}", failure.message));
            None
        }
    };
    let now = Timestamp::now();
    let views: Vec<VmView> = vms.iter().map(|vm| view(vm, points.as_deref(), now)).collect();
    match app.json {
        true => out::json(&views),
        false => out::text(&table(&views, now).render(out::stdout_is_terminal())),
    }
}

async fn restore_points(app: &App) -> Result<Vec<RestorePoint>, Failure> {
    connect::points(app, &connect::repository(app).await?).await
}

fn view<'a>(vm: &'a Vm, points: Option<&[RestorePoint]>, now: Timestamp) -> VmView<'a> {
    let newest = points.and_then(|points| {
        points.iter().filter(|point| point.vm_uuid == vm.uuid).max_by_key(|point| (point.taken, point.id))
    });
    VmView {
        vm: &vm.name,
        uuid: vm.uuid,
        state: vm.state,
        disks: vm.disks.iter().map(|disk| disk.target.as_str()).collect(),
        protected: points.map(|_| newest.is_some()),
        last: newest.map(|point| LastView {
            id: point.id,
            taken: point.taken,
            age_s: now.as_second() - point.taken.as_second(),
        }),
    }
}

fn table(views: &[VmView], now: Timestamp) -> Table {
    let mut table = Table::new(&["VM", "STATE", "DISKS", "PROTECTED", "LAST RESTORE POINT", "AGE"]);
    for view in views {
        table.row([
            view.vm.to_owned(),
            render::word(&view.state),
            view.disks.join(","),
            match view.protected {
                Some(true) => "yes",
                Some(false) => "no",
                None => "unknown",
            }
            .to_owned(),
            view.last.as_ref().map(|last| render::local_time(last.taken)).unwrap_or_default(),
            view.last.as_ref().map(|last| render::age(last.taken, now)).unwrap_or_default(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::point;

    #[test]
    fn protection_follows_the_uuid_and_unknown_is_not_no() {
        let now = "2026-11-22T13:00:00Z".parse().unwrap();
        let vm = |name: &str, uuid| Vm {
            name: name.into(),
            uuid: Uuid::from_u128(uuid),
            state: VmState::Running,
            disks: Vec::new(),
        };
        let (renamed, other) = (vm("web1-renamed", 1), vm("web1", 2));
        let points = [point()];
        let with = view(&renamed, Some(&points), now);
        assert_eq!((with.protected, with.last.as_ref().map(|last| last.age_s)), (Some(true), Some(3 * 3600)));
        assert_eq!(view(&other, Some(&points), now).protected, Some(false));
        assert_eq!(view(&other, None, now).protected, None);
        let rows = table(&[with, view(&other, None, now)], now).render(false);
        assert!(rows.lines().nth(1).unwrap().ends_with("3 h ago"), "{rows}");
        assert!(rows.lines().nth(2).unwrap().ends_with("unknown"), "{rows}");
    }
}
