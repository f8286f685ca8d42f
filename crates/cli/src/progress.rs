//! What a running job tells: bars with rate and time left on a terminal, a plain line now and then elsewhere, nothing
//! with `--quiet`. Everything goes to standard error. Reports come from several threads and must not wait for a
//! terminal longer than it takes to draw.

use std::{
    collections::HashMap,
    io::{self, IsTerminal, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use virtward_engine::{Cancel, Event, Observer, Phase};
use virtward_model::Bytes;

use crate::{app::App, out, render};

/// Between two plain lines about one subject.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Draws the progress of jobs.
pub struct Progress {
    mode: Mode,
    subjects: Mutex<HashMap<String, Subject>>,
}

enum Mode {
    Silent,
    Plain,
    Bars(MultiProgress),
}

struct Subject {
    bar: ProgressBar,
    doing: &'static str,
    /// Where it stands, in the words of the job.
    detail: String,
    began: Instant,
    said: Instant,
    total: u64,
    done: u64,
}

impl Progress {
    /// Bars if standard error is a terminal, lines if not, neither if `quiet`.
    pub fn new(quiet: bool) -> Self {
        let mode = match (quiet, io::stderr().is_terminal()) {
            (true, _) => Mode::Silent,
            (false, false) => Mode::Plain,
            (false, true) => Mode::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
        };
        Self { mode, subjects: Mutex::default() }
    }

    /// A line on standard error that does not tear the bars. Warnings are shown even when quiet; notes are not.
    fn line(&self, line: &str) {
        match &self.mode {
            Mode::Bars(bars) => bars.suspend(|| out::note(line)),
            Mode::Silent | Mode::Plain => out::note(line),
        }
    }

    /// Something the operator should know; not shown with `--quiet`.
    pub fn note(&self, line: &str) {
        if !matches!(self.mode, Mode::Silent) {
            self.line(&render::printable(line));
        }
    }

    /// Something that is wrong; shown with `--quiet` too.
    pub fn warn(&self, line: &str) {
        self.line(&format!("warning: {}", render::printable(line)));
    }

    /// The subject is done: its bar goes away.
    pub fn finish(&self, subject: &str) {
        let mut subjects = self.subjects.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(subject) = subjects.remove(subject) {
            subject.bar.finish_and_clear();
        }
    }

    /// A writer for log lines that keeps clear of the bars.
    pub fn log_writer(&self) -> LogWriter {
        match &self.mode {
            Mode::Bars(bars) => LogWriter(Some(bars.clone())),
            Mode::Silent | Mode::Plain => LogWriter(None),
        }
    }

    fn on(&self, name: &str, change: impl FnOnce(&mut Subject)) {
        let mut subjects = self.subjects.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        change(subjects.entry(name.to_owned()).or_insert_with(|| Subject {
            bar: self.bar(name),
            doing: "",
            detail: String::new(),
            began: now,
            said: now,
            total: 0,
            done: 0,
        }));
    }

    fn bar(&self, subject: &str) -> ProgressBar {
        let Mode::Bars(bars) = &self.mode else { return ProgressBar::hidden() };
        let bar = bars.add(ProgressBar::no_length());
        bar.set_prefix(render::printable(subject));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }

    fn enter(&self, name: &str, subject: &mut Subject, doing: &'static str) {
        let now = Instant::now();
        (subject.doing, subject.began, subject.said) = (doing, now, now);
        (subject.total, subject.done) = (0, 0);
        subject.detail.clear();
        match &self.mode {
            Mode::Silent => {}
            Mode::Plain => out::note(&format!("{}: {}", render::printable(name), doing)),
            Mode::Bars(_) => {
                subject.bar.reset();
                subject.bar.unset_length();
                subject.bar.set_style(style(false));
                subject.bar.set_message(doing);
            }
        }
    }

    fn detail(&self, name: &str, subject: &mut Subject, text: &str) {
        text.clone_into(&mut subject.detail);
        match &self.mode {
            Mode::Bars(_) => {
                subject.bar.set_style(detailed());
                subject.bar.set_message(format!("{}: {}", subject.doing, render::printable(text)));
            }
            Mode::Plain if subject.said.elapsed() >= PLAIN_EVERY => {
                subject.said = Instant::now();
                out::note(&render::printable(&format!("{name}: {}: {text}", subject.doing)));
            }
            Mode::Plain | Mode::Silent => {}
        }
    }

    fn advance(&self, name: &str, subject: &mut Subject) {
        match &self.mode {
            Mode::Silent => {}
            Mode::Bars(_) => {
                if subject.total > 0 && subject.bar.length() != Some(subject.total) {
                    if subject.detail.is_empty() {
                        subject.bar.set_style(style(true));
                    }
                    subject.bar.set_length(subject.total);
                }
                subject.bar.set_position(subject.done);
            }
            Mode::Plain => {
                // A job that says more in its own words does so.
                if subject.said.elapsed() >= PLAIN_EVERY && subject.detail.is_empty() {
                    subject.said = Instant::now();
                    let line = plain(subject.doing, subject.done, subject.total, subject.began.elapsed());
                    out::note(&format!("{}: {line}", render::printable(name)));
                }
            }
        }
    }
}

impl Observer for Progress {
    fn event(&self, name: &str, event: Event<'_>) {
        if let Event::Warning(text) = event {
            return self.warn(&format!("{name}: {text}"));
        }
        self.on(name, |subject| match event {
            Event::Phase(phase) => self.enter(name, subject, phase_name(phase)),
            Event::Total { bytes } => {
                subject.total = bytes;
                self.advance(name, subject);
            }
            Event::Done { bytes } => {
                // Reports race on their way here; a bar never runs backwards.
                subject.done = subject.done.max(bytes);
                self.advance(name, subject);
            }
            Event::Detail(text) => self.detail(name, subject, text),
            Event::Warning(_) => {}
        });
    }
}

fn style(sized: bool) -> ProgressStyle {
    let template = match sized {
        true => {
            "{prefix}: {msg} [{wide_bar:.cyan}] {percent:>3} %  {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left"
        }
        false => "{prefix}: {spinner} {msg} {elapsed}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

fn detailed() -> ProgressStyle {
    ProgressStyle::with_template("{prefix}: {msg} [{bar:20.cyan}] {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Preparing => "preparing",
        Phase::Quiescing => "quiescing",
        Phase::Copying => "copying",
        Phase::Publishing => "publishing",
        Phase::CleaningUp => "cleaning up",
    }
}

/// `copying 40 % (1.2 GiB of 3.0 GiB, 310.0 MiB/s, 6 s left)`.
fn plain(doing: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let rate = (done as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    if total == 0 {
        return format!("{doing} ({}, {}/s)", Bytes(done), Bytes(rate));
    }
    let percent = (u128::from(done) * 100 / u128::from(total)).min(100);
    let left = match rate {
        0 => String::new(),
        rate => format!(", {} left", render::duration_ms(total.saturating_sub(done) / rate * 1_000)),
    };
    format!("{doing} {percent} % ({} of {}, {}/s{left})", Bytes(done), Bytes(total), Bytes(rate))
}

/// Shows the progress of a repository call that runs on threads of its own.
pub struct Watch {
    name: &'static str,
    progress: Arc<Progress>,
    cancel: Cancel,
    total: AtomicU64,
    done: AtomicU64,
}

impl Watch {
    /// A watch under this name. [`Progress::finish`] ends it.
    pub fn new(app: &App, name: &'static str) -> Self {
        app.progress.on(name, |subject| app.progress.enter(name, subject, "preparing"));
        Self {
            name,
            progress: app.progress.clone(),
            cancel: app.cancel.clone(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
        }
    }
}

impl virtward_repo::Progress for Watch {
    fn total(&self, bytes: u64) {
        if self.total.swap(bytes, Ordering::Relaxed) == 0 {
            self.progress.on(self.name, |subject| self.progress.enter(self.name, subject, "reading"));
        }
        self.progress.event(self.name, Event::Total { bytes });
    }

    fn advance(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        self.progress.event(self.name, Event::Done { bytes: before.saturating_add(bytes) });
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

/// Writes log lines above the bars.
#[derive(Clone)]
pub struct LogWriter(Option<MultiProgress>);

impl Write for LogWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Some(bars) => bars.suspend(|| io::stderr().write(data)),
            None => io::stderr().write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_has_share_rate_and_time_left() {
        let gib = 1 << 30;
        assert_eq!(
            plain("copying", gib, 4 * gib, Duration::from_secs(4)),
            "copying 25 % (1.0 GiB of 4.0 GiB, 256.0 MiB/s, 12.0 s left)"
        );
        assert_eq!(plain("copying", 0, gib, Duration::ZERO), "copying 0 % (0 B of 1.0 GiB, 0 B/s)");
        assert_eq!(plain("publishing", gib, 0, Duration::from_secs(1)), "publishing (1.0 GiB, 1.0 GiB/s)");
        assert_eq!(plain("copying", u64::MAX, 1, Duration::from_secs(1)).split(' ').nth(1), Some("100"));
    }

    #[test]
    fn templates_are_valid() {
        for sized in [false, true] {
            assert!(std::panic::catch_unwind(|| style(sized)).is_ok());
        }
        let template = "{prefix}: {msg} [{wide_bar:.cyan}] {percent:>3} %  {binary_bytes}/{binary_total_bytes}";
        assert!(ProgressStyle::with_template(template).is_ok());
    }
}
