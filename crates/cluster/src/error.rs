//! The one error type of stores: what failed, on what, and what to do next.

use std::{path::PathBuf, time::Duration};

use crate::store::{LeaseId, Revision};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong with a store. What a caller may do about each is said at the variant; in short,
/// [`Error::is_retryable`] says whether the same call can simply be made again.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store cannot be reached, or did not answer in time. No key was changed. Retry. (A lease may have been
    /// granted, kept alive or revoked without an answer; asking again does no harm.)
    #[error("the cluster's state store {location} does not answer: {what}")]
    Unavailable {
        /// Path or endpoints.
        location: String,
        /// Why.
        what: String,
    },
    /// A transaction was sent and no answer came: it happened, or it did not, or it still will. Read before deciding.
    /// The same transaction may be sent again if it puts or deletes a key that it compares: should both arrive, one of
    /// them is refused.
    #[error(
        "the cluster's state store {location} did not say whether a change was made: {what}; read the state before \
         trying again"
    )]
    Indeterminate {
        /// Path or endpoints.
        location: String,
        /// Why.
        what: String,
    },
    /// The changes asked for are no longer kept. List again and watch from there; retrying the watch is useless.
    #[error("changes before revision {oldest} are no longer kept; list again and watch from there")]
    Compacted {
        /// The first revision that can be watched from.
        oldest: Revision,
    },
    /// The lease ended, or never was. Grant a new one; the keys that it held are gone.
    #[error("lease {lease} has ended; the keys that it held are gone")]
    LeaseEnded {
        /// The lease.
        lease: LeaseId,
    },
    /// A key, value or transaction is larger than stores take. Nothing was changed. A defect of the caller.
    #[error("{what}")]
    TooLarge {
        /// Which, and the limit.
        what: String,
    },
    /// A call that makes no sense. Nothing was changed. A defect of the caller.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// The store refuses this client. Nothing was changed. A person must act.
    #[error("the cluster's state store {location} refuses this node: {what}; check its certificate, user and role")]
    Denied {
        /// Path or endpoints.
        location: String,
        /// Why.
        what: String,
    },
    /// Certificates do not fit together: this client does not trust the store's, or the store not this client's. Nothing
    /// was changed. A person must act.
    #[error(
        "this node and the cluster's state store {location} do not trust each other's certificates: {what}; check \
         etcd-ca, etcd-cert and etcd-key in [cluster] of the configuration, and etcd's own certificate"
    )]
    Untrusted {
        /// Endpoints.
        location: String,
        /// Who refused what.
        what: String,
    },
    /// There is no space for the change. Nothing was changed. Retry when there is space.
    #[error("no space left for the cluster's state in {location}: {what}; nothing was changed")]
    Full {
        /// Path or endpoints.
        location: String,
        /// What to do.
        what: String,
    },
    /// Another process has the file open.
    #[error(
        "{} is in use by {holder}; one process at a time may use it: talk to that daemon, or stop it first",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// Which process, as far as the kernel tells.
        holder: String,
    },
    /// There is no state where it should be.
    #[error("there is no cluster state in {}; {what}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What to do.
        what: String,
    },
    /// The stored state is damaged. It is left as it is.
    #[error("the cluster's state in {} is damaged ({what}); {remedy}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
        /// The backups there are, and the command that restores one.
        remedy: String,
    },
    /// Written by a newer version.
    #[error(
        "{} has format {found}, this version reads up to {supported}; upgrade virtward on this host",
        path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Format found.
        found: i64,
        /// Newest format known.
        supported: i64,
    },
    /// A file could not be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// As in "cannot read".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::sync::Arc<std::io::Error>,
    },
}

impl Error {
    /// Whether the same call can be made again as it is, after a pause, with hope of success and without the danger of
    /// doing something twice. False for [`Error::Indeterminate`]: read first.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Error::Unavailable { .. } | Error::Full { .. })
    }

    pub(crate) fn unavailable(location: &str, what: impl Into<String>) -> Self {
        Error::Unavailable { location: location.into(), what: what.into() }
    }

    pub(crate) fn indeterminate(location: &str, what: impl Into<String>) -> Self {
        Error::Indeterminate { location: location.into(), what: what.into() }
    }

    pub(crate) fn no_answer(location: &str, within: Duration) -> Self {
        Error::unavailable(location, format!("no answer within {within:?}"))
    }

    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { doing, path, source: std::sync::Arc::new(source) }
    }
}
