//! What a running job reports, on its way to its log, its progress and whoever follows. Called from worker threads;
//! never waits.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use uuid::Uuid;
use virtward_api::{LogLevel, Progress};
use virtward_engine::{Cancel, Event, Observer, Phase};

use super::Jobs;

/// Between two reports of progress to those who follow.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Rates are over about so long.
const RATE_OVER: Duration = Duration::from_secs(10);
/// Warnings that are kept.
const WARNINGS_MAX: usize = 100;

/// Watches one job.
pub struct Watch {
    jobs: Arc<Jobs>,
    id: Uuid,
    cancel: Cancel,
    meter: Mutex<Meter>,
}

struct Meter {
    progress: Progress,
    told: Option<Instant>,
    /// Where the rate is counted from.
    mark: (Instant, u64),
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Told<'a> {
    id: Uuid,
    progress: &'a Progress,
}

impl Watch {
    /// For a job that begins.
    pub fn new(jobs: Arc<Jobs>, id: Uuid, cancel: Cancel) -> Self {
        let meter =
            Meter { progress: Progress::default(), told: None, mark: (Instant::now(), 0), warnings: Vec::new() };
        Self { jobs, id, cancel, meter: Mutex::new(meter) }
    }

    fn change(&self, is_urgent: bool, change: impl FnOnce(&mut Meter)) {
        let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut meter);
        let now = Instant::now();
        let since = now.duration_since(meter.mark.0);
        if since >= Duration::from_millis(500) {
            let done = meter.progress.done_bytes.saturating_sub(meter.mark.1);
            let rate = (done as f64 / since.as_secs_f64()) as u64;
            meter.progress.rate_bytes_s = rate;
            let left = meter.progress.total_bytes.saturating_sub(meter.progress.done_bytes);
            meter.progress.remaining_s = (rate > 0 && meter.progress.total_bytes > 0).then(|| left / rate);
            if since >= RATE_OVER {
                meter.mark = (now, meter.progress.done_bytes);
            }
        }
        if !is_urgent && meter.told.is_some_and(|told| now.duration_since(told) < TELL_EVERY) {
            return;
        }
        meter.told = Some(now);
        let (progress, warnings) = (meter.progress.clone(), meter.warnings.clone());
        drop(meter);
        self.jobs.hub.send("jobs", "progress", &Told { id: self.id, progress: &progress });
        if let Some(live) = self.jobs.live().get_mut(&self.id) {
            live.progress = progress;
            live.warnings = warnings;
        }
    }
}

impl Observer for Watch {
    fn event(&self, _: &str, event: Event<'_>) {
        match event {
            Event::Phase(phase) => {
                let name = match phase {
                    Phase::Preparing => "preparing",
                    Phase::Quiescing => "quiescing",
                    Phase::Copying => "copying",
                    Phase::Publishing => "publishing",
                    Phase::CleaningUp => "cleaning-up",
                };
                self.jobs.note(self.id, LogLevel::Info, name.replace('-', " "));
                self.change(true, |meter| {
                    meter.progress = Progress { phase: Some(name.to_owned()), ..Progress::default() };
                    meter.mark = (Instant::now(), 0);
                });
            }
            Event::Total { bytes } => self.change(false, |meter| meter.progress.total_bytes = bytes),
            Event::Done { bytes } => self.change(false, |meter| {
                meter.progress.done_bytes = meter.progress.done_bytes.max(bytes);
            }),
            Event::Detail(text) => self.change(false, |meter| meter.progress.detail = Some(text.to_owned())),
            Event::Warning(text) => {
                self.jobs.note(self.id, LogLevel::Warning, text.to_owned());
                self.change(true, |meter| {
                    if meter.warnings.len() < WARNINGS_MAX {
                        meter.warnings.push(text.to_owned());
                    }
                });
            }
        }
    }
}

impl virtward_repo::Progress for Watch {
    fn total(&self, bytes: u64) {
        self.change(false, |meter| meter.progress.total_bytes = bytes);
    }

    fn advance(&self, bytes: u64) {
        self.change(false, |meter| meter.progress.done_bytes += bytes);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}
