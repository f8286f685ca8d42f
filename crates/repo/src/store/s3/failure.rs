//! What a refusal or a silence of the server means, and what the operator can do about it.

use std::io;

use jiff::{SpanRound, Timestamp, Unit};

use super::{client::Answer, settings::Settings};
use crate::error::Error;

/// Whether nothing can have reached the server.
pub fn is_unsent(error: &ureq::Error) -> bool {
    match error {
        _ if is_unresolved(error) => true,
        ureq::Error::ConnectionFailed | ureq::Error::Tls(_) | ureq::Error::Rustls(_) => true,
        ureq::Error::Timeout(phase) => matches!(phase, ureq::Timeout::Resolve | ureq::Timeout::Connect),
        ureq::Error::Io(e) => matches!(e.kind(), io::ErrorKind::ConnectionRefused),
        _ => false,
    }
}

/// Whether trying again is useless.
pub fn is_final(error: &ureq::Error) -> bool {
    matches!(
        error,
        ureq::Error::Tls(_)
            | ureq::Error::Rustls(_)
            | ureq::Error::BadUri(_)
            | ureq::Error::Http(_)
            | ureq::Error::InvalidProxyUrl
            | ureq::Error::RequireHttpsOnly(_)
    ) || matches!(error, ureq::Error::Io(e) if is_tls(e))
}

/// TLS failures arrive as the cause of an I/O error.
fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

/// The name service's failures have no kind of their own.
fn is_unresolved(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound => true,
        ureq::Error::Io(e) => e.to_string().starts_with("failed to lookup address"),
        _ => false,
    }
}

/// In a few words, without URLs.
pub fn describe(error: &ureq::Error) -> String {
    match error {
        ureq::Error::BadUri(_) => "the address is not valid".into(),
        _ if is_unresolved(error) => "its name cannot be resolved".into(),
        ureq::Error::ConnectionFailed => "no connection".into(),
        ureq::Error::Timeout(phase) => format!("no answer in time ({phase})"),
        ureq::Error::Io(e) => e.to_string(),
        other => other.to_string(),
    }
}

fn remote(settings: &Settings, action: &'static str, key: &str, what: String, hint: String) -> Error {
    let name = key.strip_prefix(&*settings.prefix).unwrap_or_default();
    let object = if name.is_empty() { settings.location.clone() } else { format!("{}/{name}", settings.location) };
    Error::Remote { action, object, what, hint, is_denied: false }
}

/// There was no answer.
pub fn unreachable(settings: &Settings, action: &'static str, key: &str, error: &ureq::Error) -> Error {
    let origin = &settings.origin;
    let is_certificate = match error {
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => true,
        ureq::Error::Io(e) => is_tls(e),
        _ => false,
    };
    let hint = match error {
        _ if is_certificate => {
            "check the endpoint's certificate, and name the authority that signed it with ca-file in [s3]".into()
        }
        _ if is_unresolved(error) => "check the endpoint's name and this host's DNS".into(),
        ureq::Error::Timeout(_) => "check the network and the server's load, then run again".to_owned(),
        _ => "check that the server runs, and the endpoint's address and port".into(),
    };
    let what = match is_certificate {
        true => format!("TLS with {origin} failed: {}", describe(error)),
        false => format!("{origin} cannot be reached: {}", describe(error)),
    };
    remote(settings, action, key, what, hint)
}

/// An answer that is a failure.
pub fn refused(settings: &Settings, action: &'static str, key: &str, answer: &Answer) -> Error {
    let code = answer.code();
    let message = answer.failure.as_ref().map_or("", |failure| &failure.message);
    let object = |key: &str| key.strip_prefix(&*settings.prefix).unwrap_or(key).to_owned();
    let said = match (code, message) {
        ("", _) => format!("the server answered with status {}", answer.status),
        (code, "") => format!("the server answered {code}"),
        (code, message) => format!("the server answered {code}: {}", message.trim_end_matches('.')),
    };
    let (what, hint): (String, &str) = match (code, answer.status) {
        ("NoSuchBucket", _) => {
            (format!("there is no bucket {}", settings.bucket), "create it, or correct the URL, endpoint or region")
        }
        ("QuotaExceeded" | "XMinioStorageFull" | "InsufficientStorage", _) | (_, 507) => {
            return Error::StorageFull { object: object(key) };
        }
        ("NotImplemented", _) | (_, 501) => (said, "this server lacks an operation that is needed; use another one"),
        _ => return access(settings, action, key, answer, said),
    };
    remote(settings, action, key, what, hint.into())
}

/// Failures of who asks, when, and where.
fn access(settings: &Settings, action: &'static str, key: &str, answer: &Answer, said: String) -> Error {
    let region = answer.header("x-amz-bucket-region").or(answer.failure.as_ref().and_then(|f| f.region.as_deref()));
    let region = region.filter(|region| *region != settings.region);
    let user = &settings.credentials.access_key;
    let (what, hint) = match (answer.code(), answer.status) {
        ("RequestTimeTooSkewed", _) => (skew(answer), "set the clock of this host (timedatectl shows it)".into()),
        (
            "AuthorizationHeaderMalformed"
            | "PermanentRedirect"
            | "TemporaryRedirect"
            | "IllegalLocationConstraintException",
            _,
        )
        | (_, 301 | 302 | 307 | 308) => (
            format!("the bucket is not in region {} ({said})", settings.region),
            match region {
                Some(region) => format!("set AWS_REGION={region}, or region = \"{region}\" in [s3]"),
                None => "set AWS_REGION or the endpoint to where the bucket is".into(),
            },
        ),
        ("InvalidAccessKeyId", _) => (
            format!("the server does not know the access key {user}"),
            "check AWS_ACCESS_KEY_ID or the profile, and that the endpoint is the right one".into(),
        ),
        ("SignatureDoesNotMatch", _) => (
            format!("the secret does not belong to the access key {user}"),
            "check AWS_SECRET_ACCESS_KEY or the profile".into(),
        ),
        ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => (
            "the temporary credentials have ended".into(),
            "get new ones, with AWS_SESSION_TOKEN, and run again".into(),
        ),
        (_, 401 | 403) => (
            format!("access denied for {user} ({said})"),
            "grant what docs/object-storage.md lists to these credentials, or use others".into(),
        ),
        (_, 500..) => (said, "the server has trouble or is overloaded; run again later".into()),
        _ => (said, "check that the endpoint is S3-compatible object storage".into()),
    };
    let is_denied = matches!(answer.status, 401 | 403);
    match remote(settings, action, key, what, hint) {
        Error::Remote { action, object, what, hint, .. } => Error::Remote { action, object, what, hint, is_denied },
        other => other,
    }
}

fn skew(answer: &Answer) -> String {
    let Some(theirs) = answer.date() else { return "the clocks of this host and the server differ too much".into() };
    let apart = (Timestamp::now() - theirs).abs();
    let apart = apart.round(SpanRound::new().largest(Unit::Hour).smallest(Unit::Second)).unwrap_or(apart);
    format!("the clocks of this host and the server differ by {apart:#}")
}
