//! `virtward backup prune`: deletes what the rules do not keep, and says of every restore point why it stays or goes.

use std::collections::BTreeSet;

use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;
use uuid::Uuid;
use virtward_decide::{
    pointref::{self, ShortIds},
    retention::{self, Age, Policy, Protection, Verdict},
};
use virtward_model::{PointId, RestorePoint};
use virtward_repo::{Error as RepoError, Repository};

use crate::{
    app::App,
    config::Retention,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// Arguments of `backup prune`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each VM is judged by itself, in this host's time zone. A calendar rule keeps the
newest restore point of each of the last N hours, days, weeks, months or years
that have one; while there are fewer, the oldest restore point stays too. What
one rule keeps stays. Rules on the command line replace those in [retention] of
the configuration.

Restore points that are held, younger than --min-age, or the newest of their VM
always stay. What is deleted can be brought back for 7 days: see virtward
backup recover.

Examples:
  virtward backup prune --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  virtward backup prune web1 db1 --keep-within 30d --keep-yearly 10
  virtward backup prune --keep-last 3 --keep-tag before-upgrade --min-age 2d
  virtward backup prune                           by the rules of the configuration")]
pub struct Args {
    /// Only these VMs, by name or UUID
    #[arg(value_name = "VM")]
    pub vms: Vec<String>,
    /// The newest N
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u32,
    /// One for each of the last N hours
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u32,
    /// One for each of the last N days
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u32,
    /// One for each of the last N weeks, which begin on Monday
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u32,
    /// One for each of the last N months
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u32,
    /// One for each of the last N years
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_yearly: u32,
    /// All that are at most this much older than the newest: 12h, 30d, 6mo, 1y
    #[arg(long, value_name = "AGE")]
    pub keep_within: Option<Age>,
    /// All with this tag; may be repeated
    #[arg(long = "keep-tag", value_name = "TAG")]
    pub keep_tags: Vec<String>,
    /// Delete nothing younger than this
    #[arg(long, value_name = "AGE")]
    pub min_age: Option<Age>,
    /// Let the newest restore point of a VM go too, if no rule keeps it
    #[arg(long, requires = "vms")]
    pub also_newest: bool,
    /// Say what would be deleted, and delete nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

impl Args {
    fn policy(&self) -> Policy {
        Policy {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within,
            tags: self.keep_tags.clone(),
        }
    }
}

fn configured(retention: &Retention) -> Policy {
    Policy {
        last: retention.keep_last,
        hourly: retention.keep_hourly,
        daily: retention.keep_daily,
        weekly: retention.keep_weekly,
        monthly: retention.keep_monthly,
        yearly: retention.keep_yearly,
        within: retention.keep_within,
        tags: retention.keep_tags.clone(),
    }
}

/// Prunes.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let policy = match args.policy() {
        policy if policy.is_empty() => configured(&app.settings.retention),
        policy => policy,
    };
    if policy.is_empty() {
        return Err(Failure::new(Kind::Usage, retention::EmptyPolicy.to_string())
            .hint("for example --keep-daily 7 --keep-weekly 4, or the same in [retention] of the configuration"));
    }
    let repository = connect::repository(app).await?;
    let listing = repository.clone();
    let list = blocking(move || Ok(listing.points()?)).await?;
    let holds = connect::holds(&repository).await?;
    let protection = Protection {
        min_age: args.min_age.or(app.settings.retention.min_age),
        held: holds.iter().map(|(id, hold)| (*id, hold.reason.clone())).collect(),
        newest_may_go: args.also_newest,
    };
    let chosen = choose(&list.points, &args.vms)?;
    let verdicts = retention::decide(chosen, &policy, &protection, &TimeZone::system(), Timestamp::now())
        .map_err(|e| Failure::new(Kind::Usage, e.to_string()))?;
    for (object, error) in &list.unreadable {
        app.progress.warn(&format!("{object} cannot be read and is left alone: {error}"));
    }
    if !app.json {
        show(app, &verdicts, &list.points)?;
    }
    let deleted = match args.dry_run {
        true => Vec::new(),
        false => delete(app, &repository, &verdicts).await?,
    };
    match app.json {
        true => out::json(&Report {
            dry_run: args.dry_run,
            points: verdicts.iter().map(PointReport::from).collect(),
            deleted,
            unreadable: list.unreadable.iter().map(|(object, error)| Unreadable::new(object, error)).collect(),
        }),
        false => out::text(&summary(args.dry_run, &verdicts, deleted.len())),
    }
}

/// The points of the VMs that were named, or all.
fn choose<'a>(all: &'a [RestorePoint], vms: &[String]) -> Result<Vec<&'a RestorePoint>, Failure> {
    if vms.is_empty() {
        return Ok(all.iter().collect());
    }
    let mut ids = BTreeSet::new();
    for vm in vms {
        let points = pointref::of_vm(all, vm);
        if points.is_empty() {
            return Err(pointref::no_vm(all, vm).into());
        }
        // A VM is one series whatever its name was at the time.
        let uuids: BTreeSet<Uuid> = points.iter().map(|point| point.vm_uuid).filter(|uuid| !uuid.is_nil()).collect();
        ids.extend(points.iter().map(|point| point.id));
        ids.extend(all.iter().filter(|point| uuids.contains(&point.vm_uuid)).map(|point| point.id));
    }
    Ok(all.iter().filter(|point| ids.contains(&point.id)).collect())
}

async fn delete(app: &App, repository: &Repository, verdicts: &[Verdict<'_>]) -> Result<Vec<PointId>, Failure> {
    let going: Vec<PointId> = verdicts.iter().filter(|v| !v.is_kept()).map(|v| v.point.id).collect();
    let (repository, ids, cancel) = (repository.clone(), going.clone(), app.cancel.flag());
    let outcomes = blocking(move || Ok(repository.delete_points(&ids, &*cancel))).await?;
    let (mut deleted, mut failed, reached) = (Vec::with_capacity(going.len()), None, outcomes.len());
    for (id, outcome) in outcomes {
        match outcome {
            Ok(()) => deleted.push(id),
            Err(RepoError::NoPoint { .. }) => app.progress.note(&format!("{id} was deleted by somebody else")),
            Err(error @ RepoError::Held { .. }) => app.progress.warn(&format!("kept after all: {error}")),
            Err(error) => failed = failed.or(Some(Failure::from(error))),
        }
    }
    if reached < going.len() && failed.is_none() {
        failed = Some(Failure::new(Kind::Cancelled, "cancelled"));
    }
    match failed {
        None => Ok(deleted),
        Some(failure) => {
            let so_far = format!("; {} of {} restore points were deleted", deleted.len(), going.len());
            Err(Failure { message: failure.message + &so_far, ..failure })
        }
    }
}

fn reasons(verdict: &Verdict<'_>) -> String {
    let words: Vec<String> = match verdict.is_kept() {
        true => verdict.stays.iter().map(ToString::to_string).collect(),
        false => verdict.misses.iter().map(ToString::to_string).collect(),
    };
    words.join(", ")
}

fn show(app: &App, verdicts: &[Verdict<'_>], all: &[RestorePoint]) -> Result<(), Failure> {
    if verdicts.is_empty() {
        app.progress.note(&format!("no restore points in {}", app.settings.repo));
        return Ok(());
    }
    let mut table = Table::new(&["ID", "VM", "TAKEN", "IS", "WHY"]);
    let ids = ShortIds::new(all);
    for verdict in verdicts {
        table.row([
            ids.of(verdict.point),
            verdict.point.vm.clone(),
            render::local_time(verdict.point.taken),
            if verdict.is_kept() { "kept" } else { "deleted" }.into(),
            reasons(verdict),
        ]);
    }
    out::text(&table.render(out::stdout_is_terminal()))
}

fn summary(dry_run: bool, verdicts: &[Verdict<'_>], deleted: usize) -> String {
    let going = verdicts.iter().filter(|verdict| !verdict.is_kept()).count();
    match dry_run {
        true => format!("{going} of {} restore points would be deleted\n", verdicts.len()),
        false => format!("{deleted} of {} restore points were deleted\n", verdicts.len()),
    }
}

#[derive(Serialize)]
struct Report {
    dry_run: bool,
    points: Vec<PointReport>,
    deleted: Vec<PointId>,
    unreadable: Vec<Unreadable>,
}

#[derive(Serialize)]
struct PointReport {
    id: PointId,
    vm: String,
    uuid: Uuid,
    taken: Timestamp,
    kept: bool,
    reasons: Vec<Reason>,
    misses: Vec<String>,
}

#[derive(Serialize)]
struct Reason {
    rule: &'static str,
    text: String,
}

impl From<&Verdict<'_>> for PointReport {
    fn from(verdict: &Verdict<'_>) -> Self {
        let reason = |stay: &retention::Stay| Reason { rule: stay.rule(), text: stay.to_string() };
        Self {
            id: verdict.point.id,
            vm: verdict.point.vm.clone(),
            uuid: verdict.point.vm_uuid,
            taken: verdict.point.taken,
            kept: verdict.is_kept(),
            reasons: verdict.stays.iter().map(reason).collect(),
            misses: verdict.misses.iter().map(ToString::to_string).collect(),
        }
    }
}

/// An object that holds a restore point and cannot be read.
#[derive(Serialize)]
pub struct Unreadable {
    object: String,
    error: String,
}

impl Unreadable {
    /// With what is wrong.
    pub fn new(object: &str, error: &RepoError) -> Self {
        Self { object: object.to_owned(), error: error.to_string() }
    }
}
