//! The daemon of this host, asked over its socket.

use virtward_api::{
    Code, Problem,
    client::{Client, Error},
};

use crate::{
    app::App,
    exit::{Failure, Kind},
};

/// A client of the daemon.
pub fn client(app: &App) -> Client {
    Client::unix(app.settings.socket())
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
