//! `virtward repo gc`: space that no restore point needs comes back.

use std::time::Duration;

use virtward_model::Bytes;
use virtward_repo::{GcOptions, GcReport};

use crate::{
    app::App,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    progress::Watch,
};

/// Arguments of `repo gc`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Runs beside backups, restores and other collections; nothing is locked. What a
collection condemns is deleted by the same call if no backup is running, and
by the next call otherwise. Killed half-way, it is simply run again.

Restore points that were deleted can be recovered until the grace period ends,
so their space comes back only after that.

On a full disk it deletes first what needs no space, and moves the rest into
what that has freed.

Examples:
  virtward repo gc --dry-run
  virtward repo gc
  virtward repo gc --grace 0 --budget 50%      # give back all that is possible now")]
pub struct Args {
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How long deleted restore points can be recovered, such as 12h or 7d
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = duration)]
    pub grace: Duration,
    /// Share of the repository that may be moved to make room in half-empty packs
    #[arg(long, value_name = "PERCENT", default_value = "10%", value_parser = percent)]
    pub budget: u8,
}

fn percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<u8>().ok().filter(|n| *n <= 100);
    number.ok_or_else(|| "write a share from 0% to 100%".into())
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write a number and a unit: 90s, 30m, 12h, 7d or 2w".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().map_err(|_| wrong())?;
    let unit = match &text[split..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        "" if number == 0 => 1,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

/// Collects.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let repository = connect::repository(app).await?;
    let watch = Watch::new(app, "gc");
    let options =
        GcOptions { dry_run: args.dry_run, grace: args.grace, budget_percent: args.budget, ..GcOptions::default() };
    let report = blocking(move || Ok(repository.collect_garbage(&options, &watch)?)).await;
    app.progress.finish("gc");
    let report = report?;
    for note in &report.notes {
        app.progress.warn(note);
    }
    match app.json {
        true => out::json(&report)?,
        false => out::text(&text(&report))?,
    }
    match report.notes.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Kind::Damaged, "some garbage could not be collected; see the warnings")),
    }
}

fn text(report: &GcReport) -> String {
    let mut text = format!(
        "{} restore points need {} of {} in {} packs\n",
        report.points,
        Bytes(report.live_bytes),
        Bytes(report.pack_bytes),
        report.packs
    );
    if report.recoverable_points > 0 {
        text.push_str(&format!("{} deleted restore points can still be recovered\n", report.recoverable_points));
    }
    let (expired, relisted) = (report.expired_points.len(), report.relisted_packs);
    if expired > 0 {
        text.push_str(&format!("{expired} deleted restore points are beyond recovery now\n"));
    }
    if relisted > 0 {
        text.push_str(&format!("{relisted} packs that no index segment listed are listed again\n"));
    }
    if report.ended_leases > 0 {
        text.push_str(&format!("ended the leases of {} writers that fell silent\n", report.ended_leases));
    }
    if report.dry_run {
        text.push_str(&format!("would free up to {} in {} packs\n", Bytes(report.pending_bytes), report.pending_packs));
        return text;
    }
    if report.moved_bytes > 0 {
        text.push_str(&format!("moved {} out of {} packs\n", Bytes(report.moved_bytes), report.moved_packs));
    }
    text.push_str(&format!("freed {} in {} packs\n", Bytes(report.freed_bytes), report.deleted_packs));
    if report.short_of_space {
        text.push_str(
            "some packs were left as they are for lack of space; with more space the next collection goes on\n",
        );
    }
    if report.pending_packs > 0 {
        text.push_str(&format!(
            "{} in {} packs are garbage that waits for {}; the next collection deletes them\n",
            Bytes(report.pending_bytes),
            report.pending_packs,
            match report.waiting_for.len() {
                0 => "the next mark".to_owned(),
                1 => "one running backup".to_owned(),
                n => format!("{n} running backups"),
            }
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_shares_are_read_strictly() {
        assert_eq!(duration("7d"), Ok(Duration::from_secs(604_800)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for wrong in ["", "7", "d", "-1d", "1.5h", "99999999999999999999d", "9999999999999999999w"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert_eq!(percent("25%"), Ok(25));
        assert_eq!(percent("0"), Ok(0));
        assert!(percent("101%").is_err() && percent("x").is_err());
    }
}
