//! Why a command failed: a kind that decides the exit status, a message, and what to do next.
//!
//! The numbers are a promise to scripts: they never change, new kinds get new numbers. Translation of the lower layers'
//! errors is in `failures`; nothing else turns an error into a status.

use std::{fmt, io};

use serde::Serialize;

/// Kinds of failure, one exit status each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Anything that has no kind of its own.
    Other,
    /// The command line or the configuration is wrong.
    Usage,
    /// No such VM, disk, restore point or file.
    NotFound,
    /// It exists already, or the request does not fit what exists.
    Refused,
    /// Another job or tool holds the VM.
    Busy,
    /// libvirt cannot be reached.
    HypervisorUnreachable,
    /// The repository cannot be reached, is none, or is of a newer format.
    Repository,
    /// The password or key opens no slot.
    WrongSecret,
    /// Stored data is damaged.
    Damaged,
    /// No space left.
    StorageFull,
    /// Permission denied.
    PermissionDenied,
    /// Some of several VMs failed.
    Partial,
    /// Given up to protect the guest, or quiescing was required and failed.
    GuestFirst,
    /// Cancelled by a signal.
    Cancelled,
}

impl Kind {
    /// The exit status.
    pub const fn code(self) -> u8 {
        match self {
            Kind::Other => 1,
            Kind::Usage => 2,
            Kind::NotFound => 3,
            Kind::Refused => 4,
            Kind::Busy => 5,
            Kind::HypervisorUnreachable => 6,
            Kind::Repository => 7,
            Kind::WrongSecret => 8,
            Kind::Damaged => 9,
            Kind::StorageFull => 10,
            Kind::PermissionDenied => 11,
            Kind::Partial => 12,
            Kind::GuestFirst => 13,
            Kind::Cancelled => 130,
        }
    }

    /// The kind of a system error.
    pub fn of_io(error: &io::Error) -> Kind {
        match error.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::AlreadyExists => Kind::Refused,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::PermissionDenied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::StorageFull,
            _ => Kind::Other,
        }
    }
}

/// A failed command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Decides the exit status.
    pub kind: Kind,
    /// What failed, on what, and why.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    /// The VM concerned, where several are in play.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Already shown to the operator; only the exit status is left to give.
    #[serde(skip)]
    pub reported: bool,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, vm: None, reported: false }
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Names the VM.
    pub fn about(mut self, vm: &str) -> Self {
        self.vm = Some(vm.to_owned());
        self
    }

    /// Marks it as shown.
    pub fn reported(mut self) -> Self {
        self.reported = true;
        self
    }

    /// Wraps a system error with what was being done.
    pub fn io(context: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
        let context = context.into();
        move |error| Failure::new(Kind::of_io(&error), format!("{context}: {error}"))
    }

    /// The whole as `{"error": …}`.
    pub fn json(&self) -> impl Serialize + '_ {
        #[derive(Serialize)]
        struct Wrapped<'a> {
            error: &'a Failure,
        }
        Wrapped { error: self }
    }
}

impl fmt::Display for Failure {
    /// `error: …` and, on a line of its own, `hint: …`. The VM is named once.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.vm {
            Some(vm) if !self.message.contains(vm) => write!(f, "error: {vm}: {}", self.message)?,
            _ => write!(f, "error: {}", self.message)?,
        }
        self.hint.iter().try_for_each(|hint| write!(f, "\nhint: {hint}"))
    }
}

/// What several VMs' outcomes come to: the common kind if all failed alike, cancelled if any was, else partial.
pub fn combine(total: usize, failures: &[Failure]) -> Option<Kind> {
    let first = failures.first()?.kind;
    if failures.iter().any(|failure| failure.kind == Kind::Cancelled) {
        return Some(Kind::Cancelled);
    }
    let alike = failures.iter().all(|failure| failure.kind == first);
    Some(if failures.len() == total && alike { first } else { Kind::Partial })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_the_documented_ones() {
        use Kind::*;
        let documented = [
            (Other, 1),
            (Usage, 2),
            (NotFound, 3),
            (Refused, 4),
            (Busy, 5),
            (HypervisorUnreachable, 6),
            (Repository, 7),
            (WrongSecret, 8),
            (Damaged, 9),
            (StorageFull, 10),
            (PermissionDenied, 11),
            (Partial, 12),
            (GuestFirst, 13),
            (Cancelled, 130),
        ];
        for (kind, code) in documented {
            assert_eq!(kind.code(), code, "{kind:?}");
        }
    }

    #[test]
    fn an_error_reads_as_what_and_what_next() {
        let failure = Failure::new(Kind::Busy, "a backup is running").hint("wait for it").about("web1");
        assert_eq!(failure.to_string(), "error: web1: a backup is running\nhint: wait for it");
        assert_eq!(Failure::new(Kind::Other, "no VM web1").about("web1").to_string(), "error: no VM web1");
        let json = |failure: &Failure| serde_json::to_string(&failure.json()).unwrap();
        assert_eq!(
            json(&failure),
            r#"{"error":{"kind":"busy","message":"a backup is running","hint":"wait for it","vm":"web1"}}"#
        );
        assert_eq!(json(&Failure::new(Kind::Other, "x")), r#"{"error":{"kind":"other","message":"x","hint":null}}"#);
    }

    #[test]
    fn several_outcomes_combine() {
        let failed = |kind| Failure::new(kind, "");
        assert_eq!(combine(2, &[]), None);
        assert_eq!(combine(1, &[failed(Kind::Busy)]), Some(Kind::Busy));
        assert_eq!(combine(2, &[failed(Kind::Busy)]), Some(Kind::Partial));
        assert_eq!(combine(2, &[failed(Kind::Busy), failed(Kind::Busy)]), Some(Kind::Busy));
        assert_eq!(combine(2, &[failed(Kind::Busy), failed(Kind::NotFound)]), Some(Kind::Partial));
        assert_eq!(combine(3, &[failed(Kind::Busy), failed(Kind::Cancelled)]), Some(Kind::Cancelled));
    }
}
