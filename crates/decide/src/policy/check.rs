//! What is wrong with a set of policies, all of it at once, with advice.
//!
//! Works on policies from anywhere, the file or the API; a finding names its field as it is written there. Whether
//! anything that a policy names exists is asked of [`Known`]. No VM has to exist: policies are for those to come.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{
    SignedDuration, Timestamp, ToSpan, civil,
    tz::{TimeZone, TimeZoneDatabase},
};
use serde::Serialize;
use virtward_model::{
    Bytes, Policy, Retention, Seconds,
    policy::{PRIORITY_RANGE, RETRIES_MAX, Schedule},
};

use crate::{
    pointref::nearest,
    schedule::{cron::Cron, window},
};

/// Longest name: it becomes part of labels and addresses.
const NAME_BYTES_MAX: usize = 63;
/// Most cron expressions of a policy.
const CRONS_MAX: usize = 32;

/// What policies may refer to.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Time zones.
    pub zones: &'a TimeZoneDatabase,
    /// Names of repositories; none: not known here, every name is let pass.
    pub repositories: Option<&'a BTreeSet<String>>,
    /// Names of hosts; none: not known here, every name is let pass.
    pub hosts: Option<&'a BTreeSet<String>>,
}

/// Something wrong in a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Place of the policy in the set, from 0.
    pub policy: usize,
    /// The field, such as `schedule.cron[0]`.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Everything that is wrong with a set of policies, in their order.
pub fn check(policies: &[Policy], known: &Known<'_>) -> Vec<Finding> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut findings = Vec::new();
    for (number, policy) in policies.iter().enumerate() {
        let mut checker = Checker { number, known, findings: &mut findings };
        checker.policy(policy);
        if let Some(other) = seen.insert(&policy.name, number).filter(|_| !policy.name.is_empty()) {
            let message = format!("policy {} of this set is called {:?} as well", other + 1, policy.name);
            checker.find("name", message, "give each policy a name of its own");
        }
    }
    findings
}

struct Checker<'a> {
    number: usize,
    known: &'a Known<'a>,
    findings: &'a mut Vec<Finding>,
}

impl Checker<'_> {
    fn find(&mut self, field: impl Into<String>, message: impl Into<String>, hint: impl Into<String>) {
        let hint = Some(hint.into()).filter(|hint| !hint.is_empty());
        self.findings.push(Finding { policy: self.number, field: field.into(), message: message.into(), hint });
    }

    fn policy(&mut self, policy: &Policy) {
        self.name(&policy.name);
        if !PRIORITY_RANGE.contains(&policy.priority) {
            let (low, high) = (PRIORITY_RANGE.start(), PRIORITY_RANGE.end());
            self.find("priority", format!("priority {} is not from {low} to {high}", policy.priority), "");
        }
        self.repository("repository", &policy.repository);
        self.selection(policy);
        self.schedule(&policy.schedule, policy.rpo);
        self.retention("retention", &policy.retention);
        self.copies(policy);
        self.proxies(&policy.proxy);
        if policy.bandwidth == Some(Bytes(0)) {
            self.find("bandwidth", "a limit of nothing would never end", "leave it out for no limit");
        }
        let hooks = &policy.hooks;
        for (field, length) in [("timeout", policy.timeout), ("rpo", policy.rpo), ("hooks.timeout", hooks.timeout)] {
            if length.is_some_and(Seconds::is_zero) {
                self.find(field, format!("{field} is no time at all"), "leave it out for none");
            }
        }
        for (field, command) in [("hooks.pre-freeze", &hooks.pre_freeze), ("hooks.post-thaw", &hooks.post_thaw)] {
            if command.as_ref().is_some_and(|command| command.trim().is_empty()) {
                self.find(field, "the command is empty", "leave it out for none");
            }
        }
        if policy.retries.count > RETRIES_MAX {
            self.find(
                "retries.count",
                format!("{} retries are too many", policy.retries.count),
                format!("{RETRIES_MAX} at most"),
            );
        }
        if policy.retries.count > 0 && policy.retries.backoff < Seconds(10) {
            let message = format!("a retry after {} finds what the first try found", policy.retries.backoff);
            self.find("retries.backoff", message, "wait at least 10s, or set count = 0 for no retries");
        }
    }

    fn name(&mut self, name: &str) {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() {
            self.find("name", "the policy has no name", "for example name = \"gold\"");
        } else if name.len() > NAME_BYTES_MAX
            || !name.chars().all(plain)
            || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        {
            let message = format!("{name:?} is not a name for a policy");
            self.find(
                "name",
                message,
                format!("use letters, digits, -, _ and . (not first), {NAME_BYTES_MAX} at most"),
            );
        }
    }

    fn repository(&mut self, field: &str, name: &str) {
        if name.is_empty() {
            self.find(field, "no repository is named", "for example repository = \"main\"");
            return;
        }
        let Some(known) = self.known.repositories.filter(|known| !known.contains(name)) else { return };
        let near = nearest(name, known.iter().map(String::as_str));
        let names: Vec<&str> = known.iter().map(String::as_str).collect();
        let hint = match (near.is_empty(), names.is_empty()) {
            (false, _) => format!("did you mean {}?", near.join(" or ")),
            (true, false) => format!("known repositories: {}", names.join(", ")),
            (true, true) => "no repository is configured yet".to_owned(),
        };
        self.find(field, format!("there is no repository {name:?}"), hint);
    }

    fn proxies(&mut self, proxies: &[String]) {
        let mut seen = BTreeSet::new();
        for (place, name) in proxies.iter().enumerate() {
            let field = format!("proxy[{place}]");
            if name.is_empty() {
                self.find(field, "no host is named", "for example proxy = \"backup1\"; leave it out for none");
            } else if !seen.insert(name) {
                self.find(field, format!("host {name:?} is named twice"), "remove one of the two");
            } else if let Some(known) = self.known.hosts.filter(|known| !known.contains(name)) {
                let near = nearest(name, known.iter().map(String::as_str));
                let names: Vec<&str> = known.iter().map(String::as_str).collect();
                let hint = match near.is_empty() {
                    false => format!("did you mean {}?", near.join(" or ")),
                    true => format!("known hosts: {}", names.join(", ")),
                };
                self.find(field, format!("there is no host {name:?}"), hint);
            }
        }
    }

    fn selection(&mut self, policy: &Policy) {
        let select = &policy.select;
        if select.any.is_empty() && select.all.is_empty() {
            let hint = "for every VM write any = [\"name:*\"]";
            self.find("select", "the policy selects no VM", hint);
        }
        let gone = |rule| select.exclude.contains(rule);
        let nothing_left = !select.any.is_empty() && select.any.iter().all(gone) || select.all.iter().any(gone);
        if nothing_left {
            self.find("select.exclude", "all that is selected is excluded again", "remove one of the two");
        }
    }

    fn retention(&mut self, field: &str, retention: &Retention) {
        if retention.is_empty() {
            let hint = "for example keep-daily = 7 and keep-weekly = 4";
            self.find(field, "the retention keeps nothing", hint);
        }
    }

    fn copies(&mut self, policy: &Policy) {
        let mut seen = BTreeSet::from([policy.repository.as_str()]);
        for (place, copy) in policy.copy_to.iter().enumerate() {
            let field = format!("copy-to[{place}].repository");
            self.repository(&field, &copy.repository);
            if !copy.repository.is_empty() && !seen.insert(&copy.repository) {
                let message = format!("the policy writes to {:?} already", copy.repository);
                self.find(field, message, "name another repository, or remove this copy");
            }
            self.retention(&format!("copy-to[{place}].retention"), &copy.retention);
        }
    }

    fn schedule(&mut self, schedule: &Schedule, rpo: Option<Seconds>) {
        let zone = self.zone(&schedule.time_zone);
        if schedule.cron.is_empty() {
            self.find("schedule.cron", "no time is given", "for example cron = \"30 1 * * *\" for every day at 01:30");
        }
        if schedule.cron.len() > CRONS_MAX {
            let message = format!("{} cron expressions are too many", schedule.cron.len());
            self.find("schedule.cron", message, format!("{CRONS_MAX} at most; use lists and steps in them"));
            return;
        }
        let mut crons = Vec::new();
        for (place, text) in schedule.cron.iter().enumerate() {
            match Cron::parse(text) {
                Ok(cron) => crons.push(cron),
                Err(error) => self.find(format!("schedule.cron[{place}]"), error.to_string(), ""),
            }
        }
        if let Some(hours) = &schedule.window {
            if hours.start == hours.end {
                let message = format!("the window ends when it starts, at {}", hours.start);
                self.find("schedule.window", message, "leave the window out for the whole day");
            } else if !crons.is_empty() && !crons.iter().any(|cron| window::is_ever_hit(hours, cron)) {
                let message = format!("no run falls into the window {} to {}", hours.start, hours.end);
                self.find("schedule.window", message, "move the window, or the times of cron");
            }
        }
        if schedule.max_lateness.is_some_and(Seconds::is_zero) {
            self.find(
                "schedule.max-lateness",
                "no run could ever start in time",
                "leave it out, or allow some minutes",
            );
        }
        if let Some((shortest, longest)) = zone.and_then(|zone| distances(&crons, &zone)) {
            self.distances(schedule, rpo, shortest, longest);
        }
    }

    fn distances(&mut self, schedule: &Schedule, rpo: Option<Seconds>, shortest: Seconds, longest: Seconds) {
        if schedule.jitter >= shortest {
            let message = format!("jitter {} is not shorter than the {shortest} between two runs", schedule.jitter);
            self.find("schedule.jitter", message, "shorten it");
        }
        if let Some(rpo) = rpo.filter(|rpo| *rpo <= longest && !rpo.is_zero()) {
            let message = format!("the objective is {rpo}, but up to {longest} pass between two runs");
            self.find("rpo", message, "run more often, or allow that and the time that a backup takes");
        }
    }

    fn zone(&mut self, name: &str) -> Option<TimeZone> {
        if name.is_empty() {
            let hint = "for example time-zone = \"Europe/Berlin\", or \"UTC\"";
            self.find("schedule.time-zone", "no time zone is given", hint);
            return None;
        }
        if let Ok(zone) = self.known.zones.get(name) {
            return Some(zone);
        }
        let names: Vec<String> = self.known.zones.available().map(|zone| zone.to_string()).collect();
        let city = |zone: &str| zone.rsplit('/').next().unwrap_or(zone).to_owned();
        let mut near = nearest(name, names.iter().map(String::as_str));
        near.truncate(1);
        if near.is_empty() {
            // `Berlin` means `Europe/Berlin`.
            near = names.iter().filter(|zone| city(zone).eq_ignore_ascii_case(&city(name))).take(3).cloned().collect();
        }
        let hint = match near.is_empty() {
            true => "write a name of the IANA database, such as Europe/Berlin or UTC".to_owned(),
            false => format!("did you mean {}?", near.join(" or ")),
        };
        self.find("schedule.time-zone", format!("there is no time zone {name:?}"), hint);
        None
    }
}

/// Shortest and longest time between two runs in some two years, or in the first thousands of runs.
fn distances(crons: &[Cron], zone: &TimeZone) -> Option<(Seconds, Seconds)> {
    const DAYS: usize = 800;
    const RUNS_MAX: usize = 5000;
    let mut runs: Vec<Timestamp> = Vec::new();
    for date in civil::date(2026, 1, 1).series(1.day()).take(DAYS) {
        runs.extend(crons.iter().flat_map(|cron| cron.on(date, zone)));
        if runs.len() > RUNS_MAX {
            break;
        }
    }
    runs.sort_unstable();
    runs.dedup();
    let between = runs.windows(2).map(|pair| pair[1].duration_since(pair[0]));
    let shortest: SignedDuration = between.clone().min()?;
    Some((Seconds::of(shortest), Seconds::of(between.max()?)))
}
