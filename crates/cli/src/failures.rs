//! Translation of the lower layers' errors into kinds, messages and hints. One place, so that the same trouble has the
//! same exit status whichever command meets it.

use std::error::Error as StdError;

use virtward_decide::pointref::PointRefError;
use virtward_engine::Error as EngineError;
use virtward_hypervisor::{Error as HyperError, ErrorKind as HyperKind};
use virtward_repo::Error as RepoError;

use crate::exit::{Failure, Kind};

/// An error and all its causes on one line, leaving out what is already contained in the line.
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

/// A failure whose message carries its advice after a semicolon, as the lower layers write it: on a line of its own it is
/// found more easily.
fn advised(kind: Kind, text: &str) -> Failure {
    match text.rsplit_once("; ") {
        Some((message, advice)) => Failure::new(kind, message).hint(advice),
        None => Failure::new(kind, text),
    }
}

impl From<RepoError> for Failure {
    fn from(error: RepoError) -> Self {
        let (kind, text) = (repo_kind(&error), chain(&error));
        match error {
            RepoError::Io { .. } => {
                Failure::new(kind, text).hint("check that the repository is mounted and its disk is healthy")
            }
            _ => advised(kind, &text),
        }
    }
}

fn repo_kind(error: &RepoError) -> Kind {
    match error {
        RepoError::NotARepository { .. }
        | RepoError::Replaced { .. }
        | RepoError::NewerFormat { .. }
        | RepoError::Unsupported { .. } => Kind::Repository,
        RepoError::Remote { is_denied: true, .. } | RepoError::AppendOnly { .. } => Kind::PermissionDenied,
        RepoError::Io { .. } | RepoError::Remote { .. } => Kind::Repository,
        RepoError::AlreadyExists { .. }
        | RepoError::LastKey { .. }
        | RepoError::KeysLeft { .. }
        | RepoError::Held { .. } => Kind::Refused,
        RepoError::WrongSecret { .. } | RepoError::BadSecret { .. } | RepoError::KeyNotHeld { .. } => Kind::WrongSecret,
        RepoError::NoKey { .. } | RepoError::NoPoint { .. } => Kind::NotFound,
        RepoError::Damaged { .. }
        | RepoError::Missing { .. }
        | RepoError::CannotCollect { .. }
        | RepoError::Unrecoverable { .. } => Kind::Damaged,
        RepoError::StorageFull { .. } => Kind::StorageFull,
        RepoError::PermissionDenied { .. } => Kind::PermissionDenied,
        RepoError::Cancelled => Kind::Cancelled,
        _ => Kind::Other,
    }
}

impl From<HyperError> for Failure {
    fn from(error: HyperError) -> Self {
        let failure = Failure::new(hyper_kind(error.kind), error.to_string());
        match error.kind {
            HyperKind::Unreachable => failure.hint(
                "check that libvirt runs (systemctl status libvirtd, or virtqemud) and that --connect names this host",
            ),
            HyperKind::Denied => failure.hint("run as root, or as a member of the group libvirt"),
            HyperKind::NoDomain => failure.hint("virtward vm list shows the VMs of this host"),
            HyperKind::Busy => failure.hint("wait until the other job has ended; virsh domjobinfo shows it"),
            HyperKind::Unsupported => failure.hint("QEMU 7.2 and libvirt 9.0 or later are needed"),
            _ => failure,
        }
    }
}

fn hyper_kind(kind: HyperKind) -> Kind {
    match kind {
        HyperKind::Unreachable => Kind::HypervisorUnreachable,
        HyperKind::Denied => Kind::PermissionDenied,
        HyperKind::NoDomain | HyperKind::NoCheckpoint => Kind::NotFound,
        HyperKind::WrongState | HyperKind::Invalid => Kind::Refused,
        HyperKind::Busy => Kind::Busy,
        _ => Kind::Other,
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let text = chain(&error);
        match error {
            EngineError::NotFound(_) => advised(Kind::NotFound, &text),
            EngineError::Refused(_) => advised(Kind::Refused, &text),
            EngineError::Busy(_) => {
                let failure = advised(Kind::Busy, &text);
                let hint = failure.hint.clone().unwrap_or_else(|| "run it again when the other job has ended".into());
                failure.hint(hint)
            }
            EngineError::SourceGone(_) => Failure::new(Kind::Other, text)
                .hint("nothing was published; run the backup again, it repairs what is left"),
            EngineError::GuestFirst(_) => advised(Kind::GuestFirst, &text),
            EngineError::Quiesce(_) => match text.rsplit_once(". ") {
                Some((message, advice)) => Failure::new(Kind::GuestFirst, message).hint(advice),
                None => Failure::new(Kind::GuestFirst, text),
            },
            EngineError::Cancelled => Failure::new(Kind::Cancelled, text),
            EngineError::Hypervisor { context, source } => {
                let inner = Failure::from(source);
                Failure { message: format!("{context}: {}", inner.message), ..inner }
            }
            EngineError::Repo(source) => source.into(),
            EngineError::Io { source, .. } => Failure::new(Kind::of_io(&source), text),
            EngineError::Nbd { .. } | EngineError::Proxy { .. } | EngineError::Tool(_) => {
                Failure::new(Kind::Other, text)
            }
        }
    }
}

impl From<PointRefError> for Failure {
    fn from(error: PointRefError) -> Self {
        match error {
            PointRefError::Syntax { .. } => Failure::new(Kind::Usage, error.to_string()),
            PointRefError::Ambiguous { .. } => Failure::new(Kind::Refused, error.to_string()).hint("write more digits"),
            PointRefError::NoVm { .. } | PointRefError::NoneBefore { .. } | PointRefError::NoId { .. } => {
                Failure::new(Kind::NotFound, error.to_string()).hint("virtward backup list shows what there is")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use super::*;

    fn hyper(kind: HyperKind) -> HyperError {
        HyperError { kind, call: "look up web1".into(), message: "no".into(), code: 38 }
    }

    fn remote(is_denied: bool) -> RepoError {
        let (what, hint) = ("no".into(), "do".into());
        RepoError::Remote { action: "read", object: "s3://b/x".into(), what, hint, is_denied }
    }

    #[test]
    fn every_trouble_has_its_status() {
        let location = || "/r".to_owned();
        let cases: Vec<(Failure, u8)> = vec![
            (RepoError::NotARepository { location: location() }.into(), 7),
            (RepoError::NewerFormat { object: "config".into(), found: 9, supported: 1 }.into(), 7),
            (RepoError::AlreadyExists { location: location(), what: "is not empty".into() }.into(), 4),
            (RepoError::WrongSecret { location: location(), slots: 2 }.into(), 8),
            (RepoError::LastKey { slot: "a".into() }.into(), 4),
            (RepoError::NoKey { slot: "a".into() }.into(), 3),
            (RepoError::Damaged { object: "p".into(), what: "w".into(), hint: "h".into() }.into(), 9),
            (RepoError::StorageFull { object: "p".into() }.into(), 10),
            (RepoError::PermissionDenied { action: "write", object: "p".into() }.into(), 11),
            (RepoError::AppendOnly { object: "p".into() }.into(), 11),
            (remote(true).into(), 11),
            (remote(false).into(), 7),
            (RepoError::Cancelled.into(), 130),
            (hyper(HyperKind::Unreachable).into(), 6),
            (hyper(HyperKind::Denied).into(), 11),
            (hyper(HyperKind::NoDomain).into(), 3),
            (hyper(HyperKind::Busy).into(), 5),
            (EngineError::Hypervisor { context: "x".into(), source: hyper(HyperKind::Unreachable) }.into(), 6),
            (EngineError::NotFound("x".into()).into(), 3),
            (EngineError::Refused("x".into()).into(), 4),
            (EngineError::Busy("x".into()).into(), 5),
            (EngineError::SourceGone("x".into()).into(), 1),
            (EngineError::GuestFirst("x".into()).into(), 13),
            (EngineError::Quiesce("x".into()).into(), 13),
            (EngineError::Cancelled.into(), 130),
            (EngineError::Repo(RepoError::StorageFull { object: "p".into() }).into(), 10),
            (EngineError::Io { context: "x".into(), source: io::ErrorKind::StorageFull.into() }.into(), 10),
            (EngineError::Tool("x".into()).into(), 1),
        ];
        for (failure, code) in cases {
            assert_eq!(failure.kind.code(), code, "{failure}");
        }
    }

    #[test]
    fn causes_are_said_once_and_advice_is_a_hint() {
        let source = Arc::new(io::Error::other("disk on fire"));
        let failure = Failure::from(RepoError::Io { action: "read", object: "packs/1".into(), source });
        assert_eq!(failure.message, "cannot read packs/1: disk on fire");
        let failure = Failure::from(RepoError::NotARepository { location: "/r".into() });
        assert_eq!(failure.message, "/r is not a Virtward repository (it has no `config`)");
        assert_eq!(failure.hint.unwrap(), "check the path, or create one with `virtward repo init`");
        let failure = Failure::from(EngineError::Refused("x exists; replace it with --overwrite".into()));
        assert_eq!(failure.to_string(), "error: x exists\nhint: replace it with --overwrite");
        let failure = Failure::from(EngineError::Busy("another job works on web1".into()));
        assert_eq!(failure.hint.unwrap(), "run it again when the other job has ended");
    }
}
