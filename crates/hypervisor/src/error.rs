//! Errors of a hypervisor call: a kind to branch on, the hypervisor's own code and message to show.

/// What callers branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The hypervisor cannot be reached, or the connection broke during the call.
    Unreachable,
    /// Access denied.
    Denied,
    /// No such domain.
    NoDomain,
    /// The domain is not in a state that allows the call (not running, already running).
    WrongState,
    /// Another job holds the domain.
    Busy,
    /// No such checkpoint.
    NoCheckpoint,
    /// A checkpoint's bitmap is missing or unusable.
    CheckpointInconsistent,
    /// Guest agent absent, disconnected or silent.
    AgentUnavailable,
    /// The hypervisor cannot do this with this domain or in this version.
    Unsupported,
    /// Definition or argument that the hypervisor refuses.
    Invalid,
    /// The call did not return in time.
    Timeout,
    /// Anything else.
    Other,
}

/// A failed hypervisor call.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{call}: {message}")]
pub struct Error {
    /// What to branch on.
    pub kind: ErrorKind,
    /// What was attempted, for people: `begin backup of web1`.
    pub call: String,
    /// The hypervisor's message, unchanged.
    pub message: String,
    /// The hypervisor's error code (libvirt: virErrorNumber), 0 if it gave none.
    pub code: i32,
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, Error>;
