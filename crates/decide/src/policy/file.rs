//! The policy file: TOML with one `[[policy]]` for each policy.
//!
//! Everything that is wrong is said at once, with line and column: mistakes of syntax if there are any, otherwise fields
//! that are unknown or cannot be read together with what [`check`](super::check) finds. Reading what [`render`] wrote
//! gives the same policies. Pure: the text is handed in.

use std::{fmt, ops::Range};

use serde::Serialize;
use toml::de::DeTable;
use virtward_model::{
    Bytes, Policy, QuiesceRequest, Retention, Seconds, TimeOfDay,
    policy::{CopyTo, Hooks, Mode, Retries, Schedule, Window},
    select::Select,
};

use super::{
    check::{Finding, Known, check},
    reader::{Note, Notes, Table},
};

/// Something wrong in a policy file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Character in the line, from 1.
    pub column: usize,
    /// The field, such as `policy[0].schedule.cron[0]`; empty if it is about no field.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)?;
        self.hint.iter().try_for_each(|hint| write!(f, "; {hint}"))
    }
}

/// Reads and checks a policy file. On failure there is at least one problem, and they come in the order of the text.
pub fn parse(file: &str, text: &str, known: &Known<'_>) -> Result<Vec<Policy>, Vec<Problem>> {
    let place = |note: Note| problem(file, text, note);
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        let notes = errors.into_iter().map(|error| Note {
            place: error.span().unwrap_or_default(),
            field: String::new(),
            message: error.message().to_owned(),
            hint: None,
        });
        return Err(notes.map(place).collect());
    }
    let mut notes = Notes::default();
    let policies = Table::read(table.get_ref(), String::new(), &mut notes, |table| table.tables("policy", policy));
    let policies = policies.unwrap_or_default();
    let findings = check(&policies, known);
    let mut found: Vec<Note> = findings.into_iter().filter_map(|finding| placed(finding, &notes)).collect();
    found.append(&mut notes.problems);
    found.sort_by_key(|note| note.place.start);
    if policies.is_empty() && found.is_empty() {
        found.push(Note {
            place: 0..0,
            field: String::new(),
            message: "the file has no policy".to_owned(),
            hint: Some("begin each policy with [[policy]] on a line of its own".to_owned()),
        });
    }
    if found.is_empty() { Ok(policies) } else { Err(found.into_iter().map(place).collect()) }
}

/// Writes policies as a file that [`parse`] reads.
pub fn render(policies: &[Policy]) -> Result<String, toml::ser::Error> {
    #[derive(Serialize)]
    struct File<'a> {
        policy: &'a [Policy],
    }
    toml::to_string(&File { policy: policies })
}

/// Gives a finding its place: that of its field, or of the nearest thing around it that was written. Nothing if the
/// field could not be read: its problem is known, and what follows from it is no news.
fn placed(finding: Finding, notes: &Notes) -> Option<Note> {
    let field = format!("policy[{}].{}", finding.policy, finding.field);
    let about = |other: &str| within(other, &field) || within(&field, other);
    if notes.problems.iter().any(|note| about(&note.field)) {
        return None;
    }
    let mut around = field.as_str();
    let place = loop {
        if let Some(place) = notes.places.get(around) {
            break place.clone();
        }
        match around.rfind(['.', '[']) {
            Some(end) => around = &around[..end],
            None => break 0..0,
        }
    };
    Some(Note { place, field, message: finding.message, hint: finding.hint })
}

/// Whether a field is another one or inside it.
fn within(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

fn problem(file: &str, text: &str, note: Note) -> Problem {
    let Range { start, .. } = note.place;
    let before = text.get(..start.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    Problem {
        file: file.to_owned(),
        line: 1 + before.bytes().filter(|byte| *byte == b'\n').count(),
        column: 1 + before[line_start..].chars().count(),
        field: note.field,
        message: note.message,
        hint: note.hint,
    }
}

fn policy(t: &mut Table<'_, '_>) -> Policy {
    Policy {
        name: t.text("name").unwrap_or_default(),
        paused: t.boolean("paused").unwrap_or_default(),
        priority: t.integer("priority").unwrap_or_default(),
        repository: t.text("repository").unwrap_or_default(),
        mode: t.choice("mode", &[("auto", Mode::Auto), ("warm", Mode::Warm)]).unwrap_or_default(),
        quiesce: t
            .choice(
                "quiesce",
                &[("auto", QuiesceRequest::Auto), ("required", QuiesceRequest::Required), ("off", QuiesceRequest::Off)],
            )
            .unwrap_or_default(),
        bandwidth: t.number_or_parsed::<Bytes>("bandwidth", "\"100MiB\""),
        proxy: t.one_or_more("proxy", "\"backup1\"").unwrap_or_default(),
        timeout: t.parsed("timeout", "\"6h\""),
        rpo: t.parsed("rpo", "\"26h\""),
        select: t.table("select", select).unwrap_or_default(),
        schedule: t.table("schedule", schedule).unwrap_or_default(),
        retention: t.table("retention", retention).unwrap_or_default(),
        hooks: t.table("hooks", hooks).unwrap_or_default(),
        retries: t.table("retries", retries).unwrap_or_default(),
        copy_to: t.tables("copy-to", copy_to).unwrap_or_default(),
    }
}

fn select(t: &mut Table<'_, '_>) -> Select {
    Select {
        any: t.list("any", "\"name:web-*\"").unwrap_or_default(),
        all: t.list("all", "\"host:kvm1\"").unwrap_or_default(),
        exclude: t.list("exclude", "\"tag:scratch\"").unwrap_or_default(),
    }
}

fn schedule(t: &mut Table<'_, '_>) -> Schedule {
    Schedule {
        cron: t.one_or_more("cron", "\"30 1 * * *\"").unwrap_or_default(),
        time_zone: t.text("time-zone").unwrap_or_default(),
        window: t.table("window", window),
        catch_up: t.boolean("catch-up").unwrap_or(true),
        max_lateness: t.parsed("max-lateness", "\"6h\""),
        jitter: t.parsed("jitter", "\"10m\"").unwrap_or_default(),
    }
}

fn window(t: &mut Table<'_, '_>) -> Window {
    let mut bound = |key| {
        let time = t.parsed::<TimeOfDay>(key, "\"22:30\"");
        if time.is_none() {
            t.required(key, "\"22:30\"");
        }
        time.unwrap_or_default()
    };
    let (start, end) = (bound("start"), bound("end"));
    Window { start, end, days: t.list("days", "\"mon\"").unwrap_or_default() }
}

fn retention(t: &mut Table<'_, '_>) -> Retention {
    Retention {
        last: t.integer("keep-last").unwrap_or_default(),
        hourly: t.integer("keep-hourly").unwrap_or_default(),
        daily: t.integer("keep-daily").unwrap_or_default(),
        weekly: t.integer("keep-weekly").unwrap_or_default(),
        monthly: t.integer("keep-monthly").unwrap_or_default(),
        yearly: t.integer("keep-yearly").unwrap_or_default(),
        within: t.parsed("keep-within", "\"30d\""),
        tags: t.list("keep-tags", "\"before-upgrade\"").unwrap_or_default(),
    }
}

fn hooks(t: &mut Table<'_, '_>) -> Hooks {
    Hooks { pre_freeze: t.text("pre-freeze"), post_thaw: t.text("post-thaw"), timeout: t.parsed("timeout", "\"30s\"") }
}

fn retries(t: &mut Table<'_, '_>) -> Retries {
    let default = Retries::default();
    Retries {
        count: t.integer("count").unwrap_or(default.count),
        backoff: t.parsed::<Seconds>("backoff", "\"5m\"").unwrap_or(default.backoff),
    }
}

fn copy_to(t: &mut Table<'_, '_>) -> CopyTo {
    CopyTo {
        repository: t.text("repository").unwrap_or_default(),
        retention: t.table("retention", retention).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests;
