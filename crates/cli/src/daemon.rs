//! The daemon of this host, asked over its socket.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use virtward_api::{
    Code, Host, Job, Page, Problem,
    client::{Client, Error},
};
use virtward_engine::{Event, Observer};

use crate::{
    app::App,
    commands::job::escaped,
    exit::{Failure, Kind},
    out,
};

/// Between two looks at a job that is followed.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A client of the daemon.
pub fn client(app: &App) -> Client {
    Client::unix(app.settings.socket())
}

/// The hosts that the daemon of this host knows, if there is one and it looks after the libvirt that the command is for.
/// Commands that move VMs have it do the work then: it knows who else does something to them.
pub async fn hosts(app: &App) -> Option<Vec<Host>> {
    let page: Page<Host> = client(app).get("/api/v1/hosts?limit=1000").await.ok()?;
    let is_ours = page.items.iter().any(|host| host.is_local && host.uri == app.settings.connect);
    is_ours.then_some(page.items)
}

/// Whether the daemon of this host knows a VM.
pub async fn knows_vm(app: &App, vm: &str) -> bool {
    hosts(app).await.is_some() && client(app).get::<Value>(&format!("/api/v1/vms/{}", escaped(vm))).await.is_ok()
}

/// Asks for a job and follows it to its end; a signal cancels it. The job as it ended, which may be badly.
pub async fn done(app: &App, path: &str, request: &impl Serialize, subject: &str) -> Result<Job, Failure> {
    let client = client(app);
    let mut job: Job = client.post(path, request, None).await?;
    let mut is_told = false;
    while !job.state.is_final() {
        let progress = &job.progress;
        if progress.total_bytes > 0 {
            app.progress.event(subject, Event::Total { bytes: progress.total_bytes });
            app.progress.event(subject, Event::Done { bytes: progress.done_bytes });
        }
        if let Some(detail) = progress.detail.as_ref().or(job.waiting_for.as_ref()) {
            app.progress.event(subject, Event::Detail(detail));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        if app.cancel.is_cancelled() && !is_told {
            // It may have ended at this very moment.
            let cancel = format!("/api/v1/jobs/{}/cancel", job.id);
            is_told = client.post::<Value>(&cancel, &Value::Null, None).await.is_ok();
        }
        job = client.get(&format!("/api/v1/jobs/{}", job.id)).await?;
    }
    app.progress.finish(subject);
    job.warnings.iter().for_each(|warning| app.progress.warn(warning));
    Ok(job)
}

/// Tells how a job ended: in JSON itself, else the text if it succeeded.
pub fn tell(app: &App, job: &Job, text: impl FnOnce(&Job) -> String) -> Result<(), Failure> {
    if app.json {
        out::json(job)?;
    }
    match &job.error {
        None if app.json => Ok(()),
        None => out::text(&text(job)),
        Some(error) => {
            let problem = Problem::new(error.code, error.message.clone());
            let failure = Failure { hint: error.hint.clone(), ..Failure::from(problem) };
            Err(if app.json { failure.reported() } else { failure })
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Problem(problem) => (*problem).into(),
            Error::Unreachable { .. } => Failure::new(Kind::Other, error.to_string())
                .hint("start it with systemctl start virtward, or virtward serve; its socket is for root"),
            Error::Protocol { .. } => {
                Failure::new(Kind::Other, error.to_string()).hint("is the daemon of the same version as this command?")
            }
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        let kind = match problem.code {
            Code::BadRequest | Code::Invalid | Code::UnsupportedMediaType | Code::TooLarge => Kind::Usage,
            Code::NotFound | Code::MethodNotAllowed => Kind::NotFound,
            Code::Conflict | Code::RevisionMismatch | Code::IdempotencyMismatch => Kind::Refused,
            Code::Busy => Kind::Busy,
            Code::Unauthenticated | Code::Forbidden | Code::CsrfRequired | Code::RateLimited => Kind::PermissionDenied,
            Code::HypervisorUnreachable => Kind::HypervisorUnreachable,
            Code::Repository => Kind::Repository,
            Code::WrongSecret => Kind::WrongSecret,
            Code::Damaged => Kind::Damaged,
            Code::StorageFull => Kind::StorageFull,
            Code::GuestFirst => Kind::GuestFirst,
            Code::Cancelled => Kind::Cancelled,
            Code::Interrupted | Code::TimedOut | Code::StateUnavailable | Code::Unavailable | Code::Internal => {
                Kind::Other
            }
        };
        let mut message = problem.detail;
        for error in &problem.errors {
            if !message.contains(&error.message) {
                let line = error.line.map(|line| format!("line {line}: ")).unwrap_or_default();
                message.push_str(&format!("\n  {line}{}: {}", error.field, error.message));
            }
        }
        Failure { hint: problem.hint, ..Failure::new(kind, message) }
    }
}
