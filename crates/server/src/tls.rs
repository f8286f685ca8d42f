//! The listener's certificate: the one that was given, or one that the daemon makes for itself at its first start.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use virtward_api::{Code, Problem};

use crate::{config::Config, failures::Result};

/// A certificate of our own is made anew after this time, long before it ends.
const OWN_AGE_MAX: Duration = Duration::from_secs(400 * 86_400);

/// What is known of the listener's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its fingerprint, in hex.
    pub sha256: String,
    /// When it ends.
    pub ends: Timestamp,
}

/// TLS for the listener, and its certificate.
pub fn load(config: &Config, host: &str) -> Result<(Arc<rustls::ServerConfig>, Certificate)> {
    let (certificate, key) = match &config.tls {
        Some(files) => files.clone(),
        None => own(&config.state_dir, host)?,
    };
    let wrong = |path: &Path, why: &dyn std::fmt::Display| {
        Problem::new(Code::Conflict, format!("cannot use {} for HTTPS: {why}", path.display()))
            .hint("name the right files with tls-cert and tls-key in [server] of the configuration")
    };
    let chain =
        CertificateDer::pem_file_iter(&certificate).and_then(|all| all.collect::<std::result::Result<Vec<_>, _>>());
    let chain: Vec<CertificateDer<'static>> = chain.map_err(|error| wrong(&certificate, &error))?;
    let first = chain.first().ok_or_else(|| wrong(&certificate, &"it has no certificate"))?;
    let known =
        Certificate { sha256: sha256(first), ends: ends(first).ok_or_else(|| wrong(&certificate, &"it is no X.509"))? };
    let secret = PrivateKeyDer::from_pem_file(&key).map_err(|error| wrong(&key, &error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret))
        .map_err(|error| wrong(&certificate, &error))?;
    Ok((Arc::new(tls), known))
}

/// SHA-256 in hex, as browsers show it.
fn sha256(certificate: &CertificateDer<'_>) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(certificate.as_ref()))
}

fn ends(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Timestamp::from_second(parsed.validity().not_after.timestamp()).ok()
}

fn own(dir: &Path, host: &str) -> Result<(PathBuf, PathBuf)> {
    let (certificate, key) = (dir.join("tls.crt"), dir.join("tls.key"));
    let age = fs::metadata(&certificate).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
    if key.exists() && age.is_some_and(|age| age < OWN_AGE_MAX) {
        return Ok((certificate, key));
    }
    let failed = |what: &dyn std::fmt::Display| {
        Problem::new(Code::Conflict, format!("cannot make a certificate for HTTPS in {}: {what}", dir.display()))
    };
    let mut names = vec![host.to_owned(), "localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    names.retain(|name| !name.is_empty());
    names.dedup();
    let mut params = CertificateParams::new(names).map_err(|error| failed(&error))?;
    params.distinguished_name.push(DnType::CommonName, host);
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    let date = |date: jiff::civil::Date| {
        rcgen::date_time_ymd(i32::from(date.year()), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    params.not_before = date(today.yesterday().unwrap_or(today));
    params.not_after = date(today.saturating_add(jiff::Span::new().days(800)));
    let pair = KeyPair::generate().map_err(|error| failed(&error))?;
    let made = params.self_signed(&pair).map_err(|error| failed(&error))?;
    write(&key, pair.serialize_pem().as_bytes()).map_err(|error| failed(&error))?;
    write(&certificate, made.pem().as_bytes()).map_err(|error| failed(&error))?;
    tracing::info!(file = %certificate.display(), "made a certificate for HTTPS");
    Ok((certificate, key))
}

/// Whole or not at all, for its owner only.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
