//! Errors as they are sent: RFC 9457 problem details with a stable code, what failed, and what to do next.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Media type of an error.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What programs branch on. Codes are added, never renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request cannot be understood: malformed JSON, unknown field, bad parameter.
    BadRequest,
    /// Nobody is logged in, or the token or session is not valid (any more).
    Unauthenticated,
    /// The role or scope does not allow this.
    Forbidden,
    /// A change from a browser session without its CSRF token.
    CsrfRequired,
    /// There is no such thing.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// It exists already, or does not fit what exists.
    Conflict,
    /// It was changed since it was read.
    RevisionMismatch,
    /// Another job holds the VM.
    Busy,
    /// The idempotency key was used for another request.
    IdempotencyMismatch,
    /// The body is too large.
    TooLarge,
    /// The body is of a type that this route does not read.
    UnsupportedMediaType,
    /// Understood, and not good: `errors` says what.
    Invalid,
    /// Too many requests; see `Retry-After`.
    RateLimited,
    /// The hypervisor of the host cannot be reached.
    HypervisorUnreachable,
    /// The repository cannot be reached, is none, or is of a newer format.
    Repository,
    /// The password or key does not open the repository.
    WrongSecret,
    /// Stored data is damaged.
    Damaged,
    /// No space left.
    StorageFull,
    /// Given up to protect the guest, or quiescing was required and failed.
    GuestFirst,
    /// Cancelled.
    Cancelled,
    /// The daemon ended while the job ran.
    Interrupted,
    /// The job took longer than it may.
    TimedOut,
    /// The cluster's state store does not answer.
    StateUnavailable,
    /// The daemon is stopping, or has too much to do.
    Unavailable,
    /// A defect of the daemon.
    Internal,
}

impl Code {
    /// The HTTP status that goes with it.
    pub const fn status(self) -> u16 {
        match self {
            Code::BadRequest => 400,
            Code::Unauthenticated => 401,
            Code::Forbidden | Code::CsrfRequired => 403,
            Code::NotFound => 404,
            Code::MethodNotAllowed => 405,
            Code::Conflict | Code::Busy | Code::Cancelled | Code::GuestFirst | Code::Damaged => 409,
            Code::RevisionMismatch => 412,
            Code::TooLarge => 413,
            Code::UnsupportedMediaType => 415,
            Code::Invalid | Code::IdempotencyMismatch => 422,
            Code::RateLimited => 429,
            Code::Internal => 500,
            Code::HypervisorUnreachable
            | Code::Repository
            | Code::WrongSecret
            | Code::StorageFull
            | Code::Interrupted
            | Code::TimedOut
            | Code::StateUnavailable
            | Code::Unavailable => 503,
        }
    }

    /// A few words for people.
    pub const fn title(self) -> &'static str {
        match self {
            Code::BadRequest => "The request cannot be understood",
            Code::Unauthenticated => "Not logged in",
            Code::Forbidden => "Not allowed",
            Code::CsrfRequired => "The CSRF token is missing or wrong",
            Code::NotFound => "Not found",
            Code::MethodNotAllowed => "This method is not possible here",
            Code::Conflict => "It does not fit what exists",
            Code::RevisionMismatch => "It was changed in the meantime",
            Code::Busy => "Another job holds the VM",
            Code::IdempotencyMismatch => "The idempotency key was used for another request",
            Code::TooLarge => "The request is too large",
            Code::UnsupportedMediaType => "The type of the body is not supported",
            Code::Invalid => "It is not valid",
            Code::RateLimited => "Too many requests",
            Code::HypervisorUnreachable => "The hypervisor cannot be reached",
            Code::Repository => "The repository cannot be used",
            Code::WrongSecret => "The repository does not open",
            Code::Damaged => "Stored data is damaged",
            Code::StorageFull => "No space left",
            Code::GuestFirst => "Given up to protect the guest",
            Code::Cancelled => "Cancelled",
            Code::Interrupted => "Interrupted",
            Code::TimedOut => "It took too long",
            Code::StateUnavailable => "The state store does not answer",
            Code::Unavailable => "The daemon cannot do this now",
            Code::Internal => "The daemon has a defect",
        }
    }
}

/// An error, as `application/problem+json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`: what programs branch on is `code`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in a few words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What failed, on what, and why.
    pub detail: String,
    /// What programs branch on.
    pub code: Code,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Single mistakes in what was sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

/// One mistake in what was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// Where: a JSON pointer (`/schedule/cron/0`) or the name of a parameter.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub message: String,
    /// Line of a policy file, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

impl Problem {
    /// Without a hint.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".into(),
            title: code.title().into(),
            status: code.status(),
            detail: detail.into(),
            code,
            hint: None,
            errors: Vec::new(),
        }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds single mistakes.
    #[must_use]
    pub fn errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Problem {}
