//! The one error type of this crate: what failed, on what, and what to do next.

use std::{io, sync::Arc};

use virtward_model::PointId;

use crate::verify::DamagedPoint;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong with a repository. Cheap to clone, because one failure reaches every thread of a run.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no repository at this place.
    #[error(
        "{location} is not a Virtward repository (it has no `config`); check the path, or create one with `virtward repo init`"
    )]
    NotARepository {
        /// URL or path of the store.
        location: String,
    },
    /// The repository was deleted and another one made in its place while it was in use.
    #[error("{location} holds another repository than when this run began; nothing was published, run it again")]
    Replaced {
        /// URL or path of the store.
        location: String,
    },
    /// A repository, or something else, is there already.
    #[error("{location} {what}; choose an empty place, or use what is there")]
    AlreadyExists {
        /// URL or path of the store.
        location: String,
        /// What was found.
        what: String,
    },
    /// Written by a newer version.
    #[error("{object} has format {found}, this version reads up to {supported}; upgrade virtward on this host")]
    NewerFormat {
        /// Object with the newer format.
        object: String,
        /// Format that was found.
        found: u32,
        /// Newest format that this version knows.
        supported: u32,
    },
    /// No key slot opens with this secret.
    #[error("wrong password or key file: none of the {slots} key slots of {location} opens with it")]
    WrongSecret {
        /// URL or path of the store.
        location: String,
        /// Number of slots that were tried.
        slots: usize,
    },
    /// A secret that cannot be used.
    #[error("{what}")]
    BadSecret {
        /// Why, and what to do.
        what: String,
    },
    /// The keys at hand do not allow this.
    #[error(
        "this needs the {class} key, which the key slot in use does not hold; open the repository with another key"
    )]
    KeyNotHeld {
        /// Class of the missing key.
        class: &'static str,
    },
    /// The last key slot cannot be removed.
    #[error("key slot {slot} is the last one; without it nobody could read the repository. Add another key first")]
    LastKey {
        /// The slot.
        slot: String,
    },
    /// No such key slot.
    #[error("there is no key slot {slot}; `virtward repo key list` shows them")]
    NoKey {
        /// The slot asked for.
        slot: String,
    },
    /// Keys whose secrets are not at hand would be left behind by a rotation.
    #[error(
        "these keys cannot be given the new generation without their secrets: {keys}; give their secrets too, or drop them"
    )]
    KeysLeft {
        /// The slots, for people.
        keys: String,
    },
    /// No such restore point.
    #[error("there is no restore point {id}; `virtward backup list` shows them")]
    NoPoint {
        /// The point asked for.
        id: PointId,
    },
    /// The restore point must not go.
    #[error("restore point {id} is held ({reason}); `virtward backup hold remove {id}` ends the hold")]
    Held {
        /// The point.
        id: PointId,
        /// Why it is held.
        reason: String,
    },
    /// A deleted restore point has lost something that it needs.
    #[error("restore point {} cannot be recovered: {}", lost.id, lost.summary())]
    Unrecoverable {
        /// What is gone.
        lost: Box<DamagedPoint>,
    },
    /// The base of an incremental disk cannot be used; back the disk up without a base.
    #[error("the earlier state of this disk cannot serve as a base: {why}")]
    BadBase {
        /// Why not.
        why: String,
    },
    /// An object is missing, cut short, altered or makes no sense.
    #[error("{object} is damaged: {what}; {hint}")]
    Damaged {
        /// Name of the object.
        object: String,
        /// What is wrong with it.
        what: String,
        /// What to do next.
        hint: String,
    },
    /// An object that was expected does not exist.
    #[error("{object} does not exist in the repository; run `virtward repo check`")]
    Missing {
        /// Name of the object.
        object: String,
    },
    /// No space, or a quota is used up.
    #[error(
        "no space left for {object}; free space: delete restore points (virtward backup prune) and collect garbage at once (virtward repo gc --grace 0), or enlarge the file system or its quota"
    )]
    StorageFull {
        /// Object that was being written.
        object: String,
    },
    /// The store refuses.
    #[error(
        "permission denied: cannot {action} {object}; run as the user that owns the repository, or fix its permissions"
    )]
    PermissionDenied {
        /// What was tried.
        action: &'static str,
        /// On which object.
        object: String,
    },
    /// This host may add to the repository and not delete.
    #[error("{object} was not deleted: this host uses the repository append-only; delete from the host that prunes it")]
    AppendOnly {
        /// Object that was to be deleted.
        object: String,
    },
    /// Any other failure of the store.
    #[error("cannot {action} {object}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which object.
        object: String,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// Object storage does not answer, or answers with a refusal.
    #[error("cannot {action} {object}: {what}; {hint}")]
    Remote {
        /// What was tried.
        action: &'static str,
        /// URL of what it was tried on.
        object: String,
        /// What came back.
        what: String,
        /// What to do next.
        hint: String,
        /// Whether the credentials or a policy are the cause.
        is_denied: bool,
    },
    /// The lease of this writer ran out, so what it wrote may have been collected as garbage.
    #[error("the lease of this backup run ended ({why}); nothing was published, run the backup again")]
    LeaseLost {
        /// How it was noticed.
        why: String,
    },
    /// Garbage cannot be told from what is needed.
    #[error("nothing was collected: {why}")]
    CannotCollect {
        /// What is in the way, and what to do.
        why: String,
    },
    /// A cancel token was raised.
    #[error("cancelled")]
    Cancelled,
    /// A store or an option that this version does not have.
    #[error("{what}")]
    Unsupported {
        /// What, and the alternative.
        what: String,
    },
    /// The caller broke the contract of a call.
    #[error("misuse of the repository: {what}")]
    Misuse {
        /// Which rule was broken.
        what: String,
    },
}

impl Error {
    /// Damage with the usual advice.
    pub(crate) fn damaged(object: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Damaged {
            object: object.into(),
            what: what.into(),
            hint: "run `virtward backup verify --all` to see what is affected".into(),
        }
    }

    /// Classifies an I/O error on an object.
    pub(crate) fn io(action: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        let object = object.into();
        match source.kind() {
            io::ErrorKind::NotFound => Error::Missing { object },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::StorageFull { object },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Error::PermissionDenied { action, object }
            }
            _ => Error::Io { action, object, source: Arc::new(source) },
        }
    }

    /// Whether this says that stored data is gone or altered (rather than unreachable for the moment).
    pub fn is_damage(&self) -> bool {
        matches!(self, Error::Damaged { .. } | Error::Missing { .. } | Error::NewerFormat { .. })
    }
}
