//! What libvirt's errors mean to callers.

use std::ffi::c_uint;

use super::ffi::VirError;
use crate::xml::XmlError;
use crate::{Error, ErrorKind};

/// Why the body of a call failed, before the call's description is put to it.
#[derive(Debug)]
pub(super) struct Fault {
    kind: ErrorKind,
    message: String,
    code: i32,
    /// The domain's name, once it is known.
    subject: Option<String>,
}

/// What the body of a call comes to.
pub(super) type Attempt<T> = Result<T, Fault>;

impl Fault {
    /// A refusal of our own.
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Fault {
        Fault { kind, message: message.into(), code: 0, subject: None }
    }

    /// The same failure under another kind.
    pub(super) fn with_kind(mut self, kind: ErrorKind) -> Fault {
        self.kind = kind;
        self
    }

    /// The same failure, of this domain.
    pub(super) fn of(mut self, domain: String) -> Fault {
        self.subject.get_or_insert(domain);
        self
    }

    /// What kind it is.
    pub(super) fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// libvirt's code.
    pub(super) fn code(&self) -> i32 {
        self.code
    }

    /// libvirt's message.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The error for callers: `verb` and the domain's name, or `subject` if that never became known.
    pub(super) fn into_error(self, verb: &str, subject: &str) -> Error {
        let call = format!("{verb} {}", self.subject.as_deref().unwrap_or(subject));
        Error { kind: self.kind, call: call.trim_end().to_owned(), message: self.message, code: self.code }
    }
}

impl From<VirError> for Fault {
    fn from(e: VirError) -> Fault {
        Fault { kind: kind(&e), code: e.code, message: e.message, subject: None }
    }
}

impl From<XmlError> for Fault {
    fn from(e: XmlError) -> Fault {
        Fault::new(ErrorKind::Invalid, e.to_string())
    }
}

/// The kind that belongs to a libvirt error. Codes decide; the message only where one code means several things.
fn kind(e: &VirError) -> ErrorKind {
    use virt_sys as v;
    let message = e.message.to_ascii_lowercase();
    let says = |part: &str| message.contains(part);
    match e.code as c_uint {
        v::VIR_ERR_NO_DOMAIN => ErrorKind::NoDomain,
        v::VIR_ERR_NO_CONNECT if says("no connection driver available") => ErrorKind::Invalid,
        v::VIR_ERR_NO_CONNECT | v::VIR_ERR_INVALID_CONN | v::VIR_ERR_RPC | v::VIR_ERR_NO_SERVER => {
            ErrorKind::Unreachable
        }
        v::VIR_ERR_SYSTEM_ERROR if e.domain as c_uint == v::VIR_FROM_RPC => ErrorKind::Unreachable,
        v::VIR_ERR_INTERNAL_ERROR if says("client socket is closed") => ErrorKind::Unreachable,
        v::VIR_ERR_AUTH_FAILED
        | v::VIR_ERR_AUTH_CANCELLED
        | v::VIR_ERR_AUTH_UNAVAILABLE
        | v::VIR_ERR_ACCESS_DENIED
        | v::VIR_ERR_OPERATION_DENIED => ErrorKind::Denied,
        v::VIR_ERR_SYSTEM_ERROR if says("permission denied") => ErrorKind::Denied,
        v::VIR_ERR_NO_DOMAIN_CHECKPOINT => ErrorKind::NoCheckpoint,
        v::VIR_ERR_CHECKPOINT_INCONSISTENT => ErrorKind::CheckpointInconsistent,
        _ if says("missing or broken bitmap") || says("not found in backing chain") => {
            ErrorKind::CheckpointInconsistent
        }
        v::VIR_ERR_AGENT_UNRESPONSIVE | v::VIR_ERR_AGENT_UNSYNCED | v::VIR_ERR_AGENT_COMMAND_TIMEOUT => {
            ErrorKind::AgentUnavailable
        }
        _ if says("guest agent is not") => ErrorKind::AgentUnavailable,
        v::VIR_ERR_RESOURCE_BUSY | v::VIR_ERR_BLOCK_COPY_ACTIVE => ErrorKind::Busy,
        v::VIR_ERR_OPERATION_TIMEOUT if says("state change lock") => ErrorKind::Busy,
        v::VIR_ERR_OPERATION_TIMEOUT => ErrorKind::Timeout,
        _ if says("already running") && says("job") || says("already in active block job") => ErrorKind::Busy,
        _ if says("inactive domain") => ErrorKind::WrongState,
        v::VIR_ERR_OPERATION_INVALID => ErrorKind::WrongState,
        _ if says("no disk named") => ErrorKind::Invalid,
        v::VIR_ERR_NO_SUPPORT
        | v::VIR_ERR_CONFIG_UNSUPPORTED
        | v::VIR_ERR_ARGUMENT_UNSUPPORTED
        | v::VIR_ERR_OPERATION_UNSUPPORTED
        | v::VIR_ERR_MIGRATE_UNSAFE => ErrorKind::Unsupported,
        v::VIR_ERR_INVALID_ARG
        | v::VIR_ERR_XML_ERROR
        | v::VIR_ERR_XML_DETAIL
        | v::VIR_ERR_XML_INVALID_SCHEMA
        | v::VIR_ERR_DOM_EXIST => ErrorKind::Invalid,
        v::VIR_ERR_OPERATION_FAILED if says("already exists") => ErrorKind::Invalid,
        _ => ErrorKind::Other,
    }
}
