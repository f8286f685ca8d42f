//! Why a job failed, in the kinds that callers and exit codes distinguish.

use virtward_hypervisor::ErrorKind as HyperKind;

/// A failed job.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such VM, disk, restore point or file.
    #[error("{0}")]
    NotFound(String),
    /// The request does not fit what exists (name taken, wrong state, unusable option).
    #[error("{0}")]
    Refused(String),
    /// Another job or another tool holds the VM.
    #[error("{0}")]
    Busy(String),
    /// The VM was stopped, migrated or deleted, or its disks went away, while the job ran.
    #[error("{0}")]
    SourceGone(String),
    /// The job was given up to protect the guest or the host (scratch space, freeze that would not end).
    #[error("{0}")]
    GuestFirst(String),
    /// Quiescing was required and did not work.
    #[error("{0}")]
    Quiesce(String),
    /// Stopped on request.
    #[error("cancelled")]
    Cancelled,
    /// The hypervisor refused or failed.
    #[error("{context}: {source}")]
    Hypervisor {
        /// What the job was doing.
        context: String,
        /// The driver's error.
        #[source]
        source: virtward_hypervisor::Error,
    },
    /// Reading a disk over NBD failed.
    #[error("{context}: {source}")]
    Nbd {
        /// What the job was doing.
        context: String,
        /// The client's error.
        #[source]
        source: virtward_nbd::Error,
    },
    /// The repository refused or failed.
    #[error(transparent)]
    Repo(#[from] virtward_repo::Error),
    /// A file or a program of this host failed.
    #[error("{context}: {source}")]
    Io {
        /// What the job was doing, on what.
        context: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The other host that reads and stores the data failed, or was lost.
    #[error("{host}: {message}")]
    Proxy {
        /// The host.
        host: String,
        /// What it said, or what became of it.
        message: String,
        /// It could not read a disk, which may be but a symptom of what became of the VM.
        is_source: bool,
    },
    /// A helper program (qemu-nbd, qemu-img, a hook) failed.
    #[error("{0}")]
    Tool(String),
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps an I/O error with what was being done.
    pub fn io(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let context = context.into();
        move |source| Error::Io { context, source }
    }

    /// Wraps an NBD error with what was being done.
    pub fn nbd(context: impl Into<String>) -> impl FnOnce(virtward_nbd::Error) -> Error {
        let context = context.into();
        move |source| Error::Nbd { context, source }
    }

    /// Wraps a hypervisor error with what was being done; a missing domain becomes [`Error::NotFound`].
    pub fn hyper(context: impl Into<String>) -> impl FnOnce(virtward_hypervisor::Error) -> Error {
        let context = context.into();
        move |source| match source.kind {
            HyperKind::NoDomain => Error::NotFound(format!("{context}: {}", source.message)),
            _ => Error::Hypervisor { context, source },
        }
    }
}
