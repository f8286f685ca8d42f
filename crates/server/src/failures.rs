//! Translation of the lower layers' errors into problems: one place, so that the same trouble has the same code in
//! answers and in job records.

use std::error::Error as StdError;

use virtward_api::{Code, Problem};
use virtward_cluster::Error as StateError;
use virtward_decide::pointref::PointRefError;
use virtward_engine::Error as EngineError;
use virtward_hypervisor::{Error as HyperError, ErrorKind as HyperKind};
use virtward_repo::Error as RepoError;

/// Result of this crate.
pub type Result<T, E = Problem> = std::result::Result<T, E>;

/// An error and its causes, each said once.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// A message that carries its advice after a semicolon, as the lower layers write it.
fn advised(code: Code, text: &str) -> Problem {
    match text.rsplit_once("; ") {
        Some((message, advice)) => Problem::new(code, message).hint(advice),
        None => Problem::new(code, text),
    }
}

/// From the repository.
pub fn repo(error: &RepoError) -> Problem {
    let code = match error {
        RepoError::NoKey { .. } | RepoError::NoPoint { .. } => Code::NotFound,
        RepoError::AlreadyExists { .. } | RepoError::Held { .. } | RepoError::AppendOnly { .. } => Code::Conflict,
        RepoError::WrongSecret { .. } | RepoError::BadSecret { .. } | RepoError::KeyNotHeld { .. } => Code::WrongSecret,
        RepoError::Damaged { .. }
        | RepoError::Missing { .. }
        | RepoError::CannotCollect { .. }
        | RepoError::Unrecoverable { .. } => Code::Damaged,
        RepoError::StorageFull { .. } => Code::StorageFull,
        RepoError::Cancelled => Code::Cancelled,
        _ => Code::Repository,
    };
    advised(code, &chain(error))
}

/// From the hypervisor.
pub fn hyper(error: &HyperError) -> Problem {
    let problem = |code| Problem::new(code, error.to_string());
    match error.kind {
        HyperKind::Unreachable | HyperKind::Timeout | HyperKind::Denied => problem(Code::HypervisorUnreachable)
            .hint("check that libvirt runs on the host: systemctl status libvirtd, or virtqemud"),
        HyperKind::NoDomain | HyperKind::NoCheckpoint => problem(Code::NotFound),
        HyperKind::Busy => problem(Code::Busy).hint("wait until the other job has ended; virsh domjobinfo shows it"),
        HyperKind::WrongState | HyperKind::Invalid | HyperKind::Unsupported => problem(Code::Conflict),
        _ => problem(Code::HypervisorUnreachable),
    }
}

/// From a job.
pub fn engine(error: &EngineError) -> Problem {
    let text = chain(error);
    match error {
        EngineError::NotFound(_) => advised(Code::NotFound, &text),
        EngineError::Refused(_) | EngineError::SourceGone(_) => advised(Code::Conflict, &text),
        EngineError::Busy(_) => advised(Code::Busy, &text),
        EngineError::GuestFirst(_) | EngineError::Quiesce(_) => advised(Code::GuestFirst, &text),
        EngineError::Cancelled => Problem::new(Code::Cancelled, text),
        EngineError::Hypervisor { context, source } => {
            let inner = hyper(source);
            Problem { detail: format!("{context}: {}", inner.detail), ..inner }
        }
        EngineError::Repo(source) => repo(source),
        EngineError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            Problem::new(Code::StorageFull, text)
        }
        EngineError::Proxy { .. } => advised(Code::Unavailable, &text),
        EngineError::Nbd { .. } => Problem::new(Code::HypervisorUnreachable, text),
        EngineError::Io { .. } | EngineError::Tool(_) => Problem::new(Code::Conflict, text),
    }
}

/// From the state store.
pub fn state(error: &StateError) -> Problem {
    match error {
        StateError::TooLarge { .. } => Problem::new(Code::TooLarge, error.to_string()),
        StateError::Corrupt { path, what, remedy } => {
            let text = format!("the daemon's state in {} is damaged ({what})", path.display());
            Problem::new(Code::StateUnavailable, text).hint(remedy.clone())
        }
        StateError::Missing { path, what } => {
            Problem::new(Code::StateUnavailable, format!("there is no state in {}", path.display())).hint(what.clone())
        }
        // Unavailable and not full: whoever waits for the state waits for room as well.
        StateError::Full { location, what } => {
            Problem::new(Code::StateUnavailable, format!("no space left for the state in {location}: {what}"))
                .hint("nothing was changed; free some space there, and it goes on by itself")
        }
        StateError::InUse { .. } => advised(Code::Busy, &chain(error)),
        _ => advised(Code::StateUnavailable, &chain(error)),
    }
}

/// Somebody else was faster.
pub fn changed(what: &str) -> Problem {
    Problem::new(Code::Conflict, format!("{what} was changed by somebody else at the same time"))
        .hint("look at it again, and ask again if it is still wanted")
}

/// From the name of a restore point.
pub fn point(error: &PointRefError) -> Problem {
    match error {
        PointRefError::Syntax { .. } => Problem::new(Code::BadRequest, error.to_string()),
        PointRefError::Ambiguous { .. } => Problem::new(Code::Conflict, error.to_string()).hint("write more digits"),
        _ => Problem::new(Code::NotFound, error.to_string()),
    }
}

/// Runs blocking work on a thread of its own.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Problem::new(Code::Internal, format!("a worker thread ended early: {error}"))),
    }
}
