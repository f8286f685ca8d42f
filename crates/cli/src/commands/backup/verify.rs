//! `virtward backup verify`: reads what is stored and proves that it is what was written, or says what is lost.

use virtward_model::Bytes;
use virtward_repo::{Damage, DamagedPoint, VerifyMode, VerifyOptions, VerifyReport, verify_ciphertext};

use crate::{
    app::{self, App},
    commands::restore::POINT_HELP,
    connect::{self, blocking},
    exit::{Failure, Kind},
    out,
    progress::Watch,
    render, secret,
};

/// Arguments of `backup verify`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("which").required(true).args(["points", "all"])))]
#[command(after_help = format!("{POINT_HELP}\n\n\
Damage is reported with the restore points, disks and byte ranges that it costs;\n\
the exit status is then 9.\n\n\
Examples:\n  virtward backup verify web1@latest\n  virtward backup verify --all --mode light\n  \
virtward backup verify --all --mode ciphertext --percent 10"))]
pub struct Args {
    /// Restore points
    #[arg(value_name = "POINT")]
    pub points: Vec<String>,
    /// Everything in the repository
    #[arg(long)]
    pub all: bool,
    /// How deep to look
    #[arg(long, value_enum, default_value = "full")]
    pub mode: Mode,
    /// Read only this share of the data, chosen at random each time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub percent: Option<u8>,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Everything is there and has its length
    Light,
    /// Also, stored bytes are those that were written
    Ciphertext,
    /// Also, they decrypt and decompress to what they should
    Full,
}

impl From<Mode> for VerifyMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Light => VerifyMode::Light,
            Mode::Ciphertext => VerifyMode::Ciphertext,
            Mode::Full => VerifyMode::Full,
        }
    }
}

/// Verifies.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    if args.all && args.mode == Mode::Ciphertext && args.percent.is_none() && !secret::is_at_hand(app) {
        return without_keys(app).await;
    }
    let repository = connect::repository(app).await?;
    if args.mode == Mode::Full && !repository.can_restore() {
        let failure = connect::readable(&repository).await.err();
        let hint = failure.and_then(|failure| failure.hint).unwrap_or_default();
        return Err(Failure::new(Kind::WrongSecret, "the key in use can write backups and not read them")
            .hint(format!("--mode ciphertext needs no key that reads; for --mode full {hint}")));
    }
    let points = match args.all {
        true => None,
        false => {
            let all = connect::points(app, &repository).await?;
            let chosen: Result<Vec<_>, _> =
                args.points.iter().map(|text| connect::point(app, &all, text).map(|point| point.id)).collect();
            Some(chosen?)
        }
    };
    let options = VerifyOptions { mode: args.mode.into(), percent: args.percent, points, threads: 0 };
    let watch = Watch::new(app, "verify");
    let report = blocking(move || Ok(repository.verify(&options, &watch)?)).await;
    app.progress.finish("verify");
    let report = report?;
    match app.json {
        true => out::json(&report)?,
        false => out::text(&text(&report))?,
    }
    let points = report.damaged_points.len();
    let toll = if args.all { Toll::of_all(&report.damaged, points) } else { Toll::Points(points) };
    damaged(report.is_ok(), report.damaged.len(), toll)
}

/// Stored bytes carry checksums that need no key: a host that only keeps a repository can check it.
async fn without_keys(app: &App) -> Result<(), Failure> {
    let store = connect::store(app)?;
    app.progress.note("no password or key was given: checking stored bytes only");
    let watch = Watch::new(app, "verify");
    let report = blocking(move || Ok(verify_ciphertext(&*store, 0, &watch)?)).await;
    app.progress.finish("verify");
    let report = report?;
    match app.json {
        true => out::json(&report)?,
        false => {
            out::text(&format!("verified {} objects, {}\n", report.objects, Bytes(report.bytes_read)))?;
            out::text(&objects(&report.damaged))?;
        }
    }
    damaged(report.is_ok(), report.damaged.len(), Toll::Unknown)
}

/// Whom damage costs what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toll {
    /// So many restore points have lost something.
    Points(usize),
    /// None of all restore points has lost anything.
    Nothing,
    /// Nobody knows without keys.
    Unknown,
}

impl Toll {
    /// What the damage of a whole repository costs: packs and index segments of which no restore point needs anything more
    /// cost nothing.
    pub fn of_all(damaged: &[Damage], points: usize) -> Self {
        let spare = |damage: &Damage| ["data/", "meta/", "index/"].iter().any(|place| damage.object.starts_with(place));
        if points == 0 && damaged.iter().all(spare) { Self::Nothing } else { Self::Points(points) }
    }
}

/// The failure for damage that a report has already shown in full: in words on standard error only.
pub fn damaged(ok: bool, objects: usize, toll: Toll) -> Result<(), Failure> {
    if ok {
        return Ok(());
    }
    let (what, hint) = match toll {
        Toll::Points(points) => (
            format!("{objects} objects and {points} restore points are damaged"),
            "the next backup stores again what the VM still has; `virtward repo heal` takes the rest from a copy",
        ),
        Toll::Nothing => (
            format!("{objects} objects are damaged, and no restore point has lost anything by it"),
            "`virtward repo gc` removes damaged packs, `virtward repo rebuild-index` damaged index segments",
        ),
        Toll::Unknown => (
            format!("{objects} objects are damaged"),
            "with a key, `virtward backup verify --all` names the restore points, disks and byte ranges that this costs",
        ),
    };
    let failure = Failure::new(Kind::Damaged, what).hint(hint);
    app::report(&failure, false);
    Err(failure.reported())
}

fn text(report: &VerifyReport) -> String {
    let mut text = format!(
        "verified {} restore points ({}): {} of {} packs read, {}, {} chunks\n",
        report.points,
        render::word(&report.mode),
        report.packs_read,
        report.packs,
        Bytes(report.bytes_read),
        report.chunks_checked,
    );
    text.push_str(&objects(&report.damaged));
    report.damaged_points.iter().for_each(|point| text.push_str(&losses(point)));
    text
}

/// Damaged objects, one per line; says so if there are none.
pub fn objects(damaged: &[Damage]) -> String {
    if damaged.is_empty() {
        return "nothing is damaged\n".into();
    }
    let line = |damage: &Damage| render::printable(&format!("damaged: {}: {}", damage.object, damage.what)) + "\n";
    damaged.iter().map(line).collect()
}

/// What a damaged restore point has lost.
pub fn losses(point: &DamagedPoint) -> String {
    const RANGES_SHOWN: usize = 8;
    let head = format!("affected: {} of {}, taken {}", point.id, point.vm, render::exact_time(point.taken));
    let mut text = render::printable(&head);
    if point.attachments {
        text.push_str(", its definition and firmware state");
    }
    text.push('\n');
    for disk in &point.disks {
        let lost = disk.ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum();
        let mut ranges: Vec<String> =
            disk.ranges.iter().take(RANGES_SHOWN).map(|range| format!("{}-{}", range.start, range.end)).collect();
        if disk.ranges.len() > RANGES_SHOWN {
            ranges.push(format!("and {} more", disk.ranges.len() - RANGES_SHOWN));
        }
        let target = render::printable(&disk.target);
        text.push_str(&format!("  {target}: {} lost at bytes {}\n", Bytes(lost), ranges.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use virtward_model::PointId;
    use virtward_repo::DamagedDisk;

    use super::*;

    #[test]
    fn damage_costs_nothing_only_where_all_that_is_needed_stands_elsewhere() {
        let damage = |object: &str| Damage { object: object.into(), what: "cut short".into() };
        assert_eq!(Toll::of_all(&[damage("data/ab/cd"), damage("index/ef")], 0), Toll::Nothing);
        assert_eq!(Toll::of_all(&[damage("data/ab/cd")], 2), Toll::Points(2));
        // A restore point that cannot be read is nobody's loss in the list of losses.
        assert_eq!(Toll::of_all(&[damage("data/ab/cd"), damage("points/4f")], 0), Toll::Points(0));
    }

    #[test]
    fn losses_are_named_by_disk_and_range() {
        let ranges = (0..10).map(|n| (n * 4) << 20..(n * 4 + 1) << 20).collect();
        let point = DamagedPoint {
            id: PointId([0x4f; 16]),
            vm: "web1".into(),
            taken: "2026-11-22T10:00:00Z".parse().unwrap(),
            disks: vec![DamagedDisk { target: "vda".into(), ranges }],
            attachments: true,
        };
        let text = losses(&point);
        assert!(text.starts_with("affected: 4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f of web1, taken "), "{text}");
        assert!(text.contains("  vda: 10.0 MiB lost at bytes 0-1048576, 4194304-5242880, "), "{text}");
        assert!(text.ends_with("and 2 more\n"), "{text}");
    }
}
