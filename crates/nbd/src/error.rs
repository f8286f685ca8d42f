//! Everything that can go wrong between this client and an NBD server.
//!
//! Errors are `Clone` because one broken connection fails many requests at once. Each says what failed and on what;
//! a source is kept apart (never repeated in the text), and words that came from the server are quoted as the server's.

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not an NBD address.
    #[error("{text:?} is not an NBD address: {reason}")]
    BadAddress {
        /// What was to be parsed.
        text: String,
        /// What is wrong with it, and what is expected.
        reason: &'static str,
    },
    /// No connection to the server could be made.
    #[error("cannot connect to NBD server {address}")]
    Connect {
        /// Where the server was expected.
        address: String,
        /// The operating system's reason.
        source: Arc<io::Error>,
    },
    /// The server answered, but refused what was asked during the handshake.
    #[error("NBD server refused {what}: {reason}{}", said(.message))]
    Refused {
        /// The option that was refused, as the protocol names it.
        what: &'static str,
        /// The protocol's name of the refusal.
        reason: &'static str,
        /// The server's own words, possibly empty.
        message: String,
    },
    /// The server has no export of this name.
    #[error("NBD server has no export {name:?}{}", said(.message))]
    UnknownExport {
        /// The export that was asked for.
        name: String,
        /// The server's own words, possibly empty.
        message: String,
    },
    /// Extents were asked of a context that was not requested at connect, or that the server does not have.
    #[error("NBD server does not offer the context {context:?} on export {export:?}")]
    ContextNotOffered {
        /// The context that was asked for.
        context: String,
        /// The export.
        export: String,
    },
    /// The server failed a request; the connection remains usable.
    #[error("NBD server failed {command} of {length} bytes at {offset}: {name}{}", said(.message))]
    Server {
        /// The request that failed.
        command: &'static str,
        /// Where it began, in bytes.
        offset: u64,
        /// How long it was, in bytes.
        length: u64,
        /// The error number, as sent.
        errno: u32,
        /// Its name, such as `EIO`.
        name: &'static str,
        /// The server's own words, possibly empty.
        message: String,
    },
    /// The server broke the protocol; nothing that it says on this connection can be trusted any more.
    #[error("NBD server broke the protocol: {0}")]
    Protocol(String),
    /// The connection ended, and the reconnect policy did not bring it back.
    #[error("connection to the NBD server was lost: {reason}")]
    Disconnected {
        /// What was seen.
        reason: String,
        /// The operating system's reason, if it gave one.
        source: Option<Arc<io::Error>>,
    },
    /// The server did not answer in time.
    #[error("NBD server did not answer {what} within {}", pretty(.after))]
    Timeout {
        /// What it was asked.
        what: &'static str,
        /// For how long it was waited.
        after: Duration,
    },
    /// After a reconnect the export was not the same any more.
    #[error("export {export:?} changed while the connection was down: {change}")]
    ExportChanged {
        /// The export.
        export: String,
        /// What differs.
        change: String,
    },
    /// Writes that the server had acknowledged may be gone, because the connection was lost before they were flushed.
    #[error("connection was lost before {bytes} acknowledged bytes were flushed; write them again")]
    FlushLost {
        /// How many bytes, at least, are in doubt.
        bytes: u64,
    },
    /// A request reaches past the end of the export.
    #[error("{length} bytes at {offset} reach past the end of the export ({size} bytes)")]
    OutOfRange {
        /// Where the request began, in bytes.
        offset: u64,
        /// How long it was, in bytes.
        length: u64,
        /// Size of the export in bytes.
        size: u64,
    },
    /// A modifying request is not aligned to the smallest block that the server takes.
    #[error("{length} bytes at {offset} are not aligned to the server's block size of {block} bytes")]
    Unaligned {
        /// Where the request began, in bytes.
        offset: u64,
        /// How long it was, in bytes.
        length: u64,
        /// Smallest block in bytes.
        block: u32,
    },
    /// The server does not take this kind of request.
    #[error("NBD server does not support {what} on this export")]
    Unsupported {
        /// What was wanted.
        what: &'static str,
    },
    /// The export is read-only.
    #[error("export {export:?} is read-only")]
    ReadOnly {
        /// The export.
        export: String,
    },
    /// The client was disconnected by its owner.
    #[error("this NBD client was disconnected")]
    Closed,
}

impl Error {
    /// Whether the same request may succeed later or on another connection.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Connect { source, .. } => !matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ),
            Error::Disconnected { .. } | Error::Timeout { .. } => true,
            // ENOMEM and ESHUTDOWN are states of the server; EIO, EINVAL, ENOSPC and the like are about the request.
            Error::Server { errno, .. } => matches!(errno, 12 | 108),
            Error::Refused { reason, .. } => *reason == "NBD_REP_ERR_SHUTDOWN",
            _ => false,
        }
    }

    pub(crate) fn lost(reason: impl Into<String>) -> Self {
        Error::Disconnected { reason: reason.into(), source: None }
    }

    pub(crate) fn lost_io(reason: &str, source: io::Error) -> Self {
        Error::Disconnected { reason: reason.into(), source: Some(Arc::new(source)) }
    }
}

/// Name of an error number of the protocol (they are Linux's, whatever the server runs on).
pub(crate) fn errno_name(errno: u32) -> &'static str {
    match errno {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        _ => "an error number that NBD does not define",
    }
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (server says {message:?})") }
}

fn pretty(duration: &Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
