//! `virtward backup recover`: deleted restore points, and their way back.

use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;
use virtward_decide::pointref::{self, ShortIds};
use virtward_model::RestorePoint;
use virtward_repo::{DeletedPoint, Error as RepoError, GRACE_DEFAULT};

use crate::{
    app::App,
    commands::{backup::verify, restore::POINT_HELP},
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    progress::Watch,
    render::{self, Table},
    view::PointView,
};

/// Arguments of `backup recover`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
What backup delete and backup prune removed can be brought back for 7 days, and\n\
after that until garbage collection has taken its data. Only what still has all\n\
its data comes back; otherwise what is lost is named.\n\n\
Examples:\n  virtward backup recover                  what can be brought back\n  \
virtward backup recover web1@2026-11-22\n  virtward backup recover 4f1c 90aa"))]
pub struct Args {
    /// Deleted restore points to bring back [default: list them]
    #[arg(value_name = "POINT")]
    pub points: Vec<String>,
    /// List deleted restore points
    #[arg(long, conflicts_with = "points")]
    pub list: bool,
}

#[derive(Serialize)]
struct DeletedView<'a> {
    #[serde(flatten)]
    point: PointView<'a>,
    deleted: Timestamp,
    recoverable_until: Timestamp,
}

impl<'a> From<&'a DeletedPoint> for DeletedView<'a> {
    fn from(one: &'a DeletedPoint) -> Self {
        let DeletedPoint { point, deleted, recoverable_until } = one;
        Self { point: PointView::from(point), deleted: *deleted, recoverable_until: *recoverable_until }
    }
}

/// Lists or recovers.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let listing = repository.clone();
    let found = blocking(move || Ok(listing.deleted_points(GRACE_DEFAULT)?)).await?;
    for (object, error) in &found.unreadable {
        app.progress.warn(&format!("{object} cannot be read: {error}"));
    }
    if args.points.is_empty() {
        return list(app, &found.points);
    }
    let all: Vec<RestorePoint> = found.points.iter().map(|deleted| deleted.point.clone()).collect();
    let mut chosen: Vec<&RestorePoint> = Vec::new();
    for text in &args.points {
        if all.is_empty() {
            return Err(Failure::new(Kind::NotFound, format!("no deleted restore points in {}", app.settings.repo)));
        }
        let resolved = pointref::resolve(&all, text, &TimeZone::system())
            .map_err(|e| Failure::from(e).hint("virtward backup recover --list shows what was deleted"))?;
        if !chosen.iter().any(|other| other.id == resolved.point.id) {
            chosen.push(resolved.point);
        }
    }
    let mut recovered = Vec::new();
    for point in chosen {
        let (repository, id) = (repository.clone(), point.id);
        let watch = Watch::new(app, "recover");
        let outcome = blocking(move || Ok(repository.recover_point(id, &watch))).await;
        app.progress.finish("recover");
        match outcome? {
            Ok(point) => recovered.push(point.id),
            Err(RepoError::Unrecoverable { lost }) => {
                if !app.json {
                    out::text(&verify::losses(&lost))?;
                }
                return Err(RepoError::Unrecoverable { lost }.into());
            }
            Err(error) => return Err(error.into()),
        }
        if !app.json {
            let line = format!("recovered {} of {}, taken {}", id, point.vm, render::exact_time(point.taken));
            out::text(&(render::printable(&line) + "\n"))?;
        }
    }
    if app.json { out::json(&serde_json::json!({ "recovered": recovered })) } else { Ok(()) }
}

fn list(app: &App, deleted: &[DeletedPoint]) -> Result<(), Failure> {
    if app.json {
        return out::json(&deleted.iter().map(DeletedView::from).collect::<Vec<_>>());
    }
    if deleted.is_empty() {
        app.progress.note(&format!("no deleted restore points in {}", app.settings.repo));
        return Ok(());
    }
    let all: Vec<RestorePoint> = deleted.iter().map(|deleted| deleted.point.clone()).collect();
    let mut table = Table::new(&["ID", "VM", "TAKEN", "DELETED", "RECOVERABLE UNTIL"]);
    let ids = ShortIds::new(&all);
    for DeletedPoint { point, deleted, recoverable_until } in deleted {
        table.row([
            ids.of(point),
            point.vm.clone(),
            render::local_time(point.taken),
            render::local_time(*deleted),
            render::local_time(*recoverable_until),
        ]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
}
