//! `virtward backup show`: everything that is known of one restore point.

use jiff::Timestamp;
use virtward_model::RestorePoint;
use virtward_repo::Hold;

use crate::{
    app::App,
    commands::restore::POINT_HELP,
    connect,
    exit::Failure,
    out, render,
    view::{self, PointView},
};

/// Arguments of `backup show`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{POINT_HELP}\n\n\
Examples:\n  virtward backup show web1@latest\n  virtward backup show 4f1c --json"))]
pub struct Args {
    /// Restore point
    #[arg(value_name = "POINT")]
    pub point: String,
}

/// Shows it.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let all = connect::points(app, &repository).await?;
    let point = connect::point(app, &all, &args.point)?;
    let holds = connect::holds(&repository).await?;
    if app.json {
        return out::json(&PointView::from(point).held(&holds));
    }
    let hold = holds.get(&point.id);
    out::text(&text(point, hold, Timestamp::now(), out::stdout_is_terminal()))
}

fn text(point: &RestorePoint, hold: Option<&Hold>, now: Timestamp, bold: bool) -> String {
    let joined = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join("; ") };
    let quiesce = match (&point.quiesce.frozen_ms, &point.quiesce.reason) {
        (Some(ms), _) => format!(" for {ms} ms"),
        (None, Some(reason)) => format!(": {reason}"),
        (None, None) => String::new(),
    };
    let held = |hold: &Hold| match hold.since {
        Some(since) => format!("{} (since {})", hold.reason, render::exact_time(since)),
        None => hold.reason.clone(),
    };
    let mut fields = vec![
        ("id", point.id.to_string()),
        ("vm", point.vm.clone()),
        ("uuid", if point.vm_uuid.is_nil() { "none (image files)".into() } else { point.vm_uuid.to_string() }),
        ("host", point.host.clone()),
        ("taken", format!("{} ({})", render::exact_time(point.taken), render::age(point.taken, now))),
        ("kind", format!("{}, {}", render::word(&point.kind), render::word(&point.source))),
        ("took", render::duration_ms(view::duration_ms(point))),
        (
            "quiesce",
            format!(
                "{}{quiesce} (asked: {})",
                render::word(&point.quiesce.outcome),
                render::word(&point.quiesce.requested)
            ),
        ),
        ("tags", joined(&point.tags)),
        ("skipped", joined(&point.skipped)),
        ("warnings", joined(&point.warnings)),
    ];
    fields.extend(hold.map(|hold| ("held", held(hold))));
    fields.extend(point.copied_from.as_ref().map(|from| ("copied", format!("from repository {}", from.repository))));
    let mut text = render::fields(&fields);
    text.push('\n');
    text.push_str(&view::disks(point).render(bold));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_what_is_known() {
        let text = text(&view::tests::point(), None, "2026-11-22T12:00:00Z".parse().unwrap(), false);
        for line in [
            "id:       4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f\n",
            "vm:       web1\n",
            "kind:     incremental, hot\n",
            "took:     1.5 s\n",
            "quiesce:  frozen for 31 ms (asked: auto)\n",
            "tags:     none\n",
            "skipped:  sda: CD-ROM\n",
            "(2 h ago)\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
    }
}
