//! What an error of etcd or of the way to it says about the call that it answers.
//!
//! etcd has few codes and tells much by text; the texts are its public API (api/v3/rpc/rpctypes/error.go).

use std::{error, io};

use etcd_client::Error as EtcdError;

use crate::{
    error::Error,
    store::{LeaseId, Revision},
};

/// What is known.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It was answered, and asking another member would change nothing.
    Final(Error),
    /// It certainly did not happen, and another member may be asked.
    NotSent(String),
    /// One of the two refused the other's certificate: it certainly did not happen, and another member may be asked.
    Untrusted(String),
    /// It may have happened.
    Unknown(String),
}

// Numbers of gRPC, https://grpc.io/docs/guides/status-codes/.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

pub(super) fn judge(location: &str, error: &EtcdError) -> Verdict {
    match error {
        EtcdError::GRpcStatus(status) => {
            let (code, text) = (status.code() as i32, status.message());
            by_code(location, code, text).unwrap_or_else(|| by_cause(error, &format!("{text} ({})", causes(status))))
        }
        EtcdError::InvalidArgs(_) | EtcdError::InvalidUri(_) | EtcdError::InvalidMetadataValue(_) => {
            Verdict::Final(Error::Invalid { what: error.to_string() })
        }
        _ => by_cause(error, &format!("{error} ({})", causes(error))),
    }
}

fn by_code(location: &str, code: i32, text: &str) -> Option<Verdict> {
    let location = || location.to_owned();
    let denied = || Verdict::Final(Error::Denied { location: location(), what: text.into() });
    Some(match code {
        NOT_FOUND if text.contains("lease not found") => {
            Verdict::Final(Error::LeaseEnded { lease: LeaseId::default() })
        }
        PERMISSION_DENIED | UNAUTHENTICATED => denied(),
        INVALID_ARGUMENT | FAILED_PRECONDITION if refuses_user(text) => denied(),
        INVALID_ARGUMENT if text.contains("too large") => Verdict::Final(Error::TooLarge { what: text.into() }),
        INVALID_ARGUMENT => Verdict::Final(Error::Invalid { what: format!("etcd refuses the request: {text}") }),
        RESOURCE_EXHAUSTED if text.contains("space exceeded") => Verdict::Final(Error::Full {
            location: location(),
            what: format!("{text}; compact and defragment etcd, then disarm its alarm"),
        }),
        RESOURCE_EXHAUSTED if text.contains("too many requests") => Verdict::NotSent(text.into()),
        OUT_OF_RANGE if text.contains("compacted") => Verdict::Final(Error::Compacted { oldest: Revision::default() }),
        // The library's own word for an answer larger than it takes.
        OUT_OF_RANGE if text.contains("message length too large") => {
            Verdict::Final(Error::TooLarge { what: text.into() })
        }
        // Turned away at the door: calls demand a leader.
        UNAVAILABLE if text == "etcdserver: no leader" => Verdict::NotSent(text.into()),
        _ => return None,
    })
}

/// Whether a text of etcd's says that this user may not, which some answers say by text alone.
pub(super) fn refuses_user(text: &str) -> bool {
    ["permission denied", "user name is empty", "authentication", "invalid auth token"]
        .iter()
        .any(|no| text.contains(no))
}

/// What rustls says of a certificate that it refuses, and what it says when the other end refused this one's. Types do not
/// survive all the layers between; the texts do, and the tests of TLS see to that.
const REFUSALS: [&str; 10] = [
    "invalid peer certificate",
    "Error parsing TLS certificate",
    "alert: BadCertificate",
    "alert: CertificateRequired",
    "alert: UnknownCA",
    "alert: CertificateUnknown",
    "alert: CertificateExpired",
    "alert: CertificateRevoked",
    "alert: UnsupportedCertificate",
    "alert: AccessDenied",
];

/// The part of a text that tells of a certificate that was refused, if there is one.
pub(super) fn refused(text: &str) -> Option<String> {
    let at = REFUSALS.iter().filter_map(|refusal| text.find(refusal)).min()?;
    Some(match text[at..].strip_prefix("alert: ") {
        Some(alert) => format!("etcd refuses this node's certificate ({alert})"),
        None => text[at..].to_owned(),
    })
}

/// Where no connection came about, nothing was sent. A server reads no request of a client whose certificate it refuses.
fn by_cause(error: &EtcdError, text: &str) -> Verdict {
    if let Some(what) = refused(&causes(error)) {
        return Verdict::Untrusted(what);
    }
    let mut cause: Option<&(dyn error::Error + 'static)> = match error {
        EtcdError::GRpcStatus(status) => Some(status),
        EtcdError::TransportError(error) => Some(error),
        EtcdError::IoError(error) => Some(error),
        _ => None,
    };
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
            )
        {
            return Verdict::NotSent(text.into());
        }
        cause = error.source();
    }
    Verdict::Unknown(text.into())
}

/// The causes of an error, outermost first: gRPC's own message is often just "transport error".
fn causes(error: &dyn error::Error) -> String {
    let mut causes = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    causes.join(": ")
}
