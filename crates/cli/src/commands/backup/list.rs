//! `virtward backup list`: restore points, oldest first.

use jiff::Timestamp;
use virtward_decide::pointref;

use crate::{
    app::App,
    connect,
    exit::Failure,
    out,
    view::{self, PointView},
};

/// Arguments of `backup list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward backup list
  virtward backup list web1
  virtward backup list --tag before-upgrade
  virtward backup list --json | jq -r '.[] | [.vm, .id, .taken] | @tsv'")]
pub struct Args {
    /// Only of this VM, by name or UUID
    #[arg(value_name = "VM")]
    pub vm: Option<String>,
    /// Only those with this tag
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
}

/// Lists.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let all = connect::points(app, &repository).await?;
    let mut points = match &args.vm {
        None => all.iter().collect(),
        Some(vm) => {
            let points = pointref::of_vm(&all, vm);
            if points.is_empty() && !all.is_empty() {
                return Err(pointref::no_vm(&all, vm).into());
            }
            points
        }
    };
    if let Some(tag) = &args.tag {
        points.retain(|point| point.tags.contains(tag));
    }
    let holds = connect::holds(&repository).await?;
    if app.json {
        return out::json(&points.iter().map(|point| PointView::from(*point).held(&holds)).collect::<Vec<_>>());
    }
    if points.is_empty() {
        app.progress.note(&format!("no restore points in {}", app.settings.repo));
        return Ok(());
    }
    let table = view::list(&points, &all, &holds, Timestamp::now());
    out::text(&table.render(out::stdout_is_terminal()))
}
