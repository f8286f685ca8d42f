//! Whom to trust on the way to a webhook or a mail server: the system's certificates, or a file that the operator names.

use std::{path::Path, sync::Arc};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use super::Failure;

/// Where systems keep the certificates that they trust.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Longest secret that makes sense.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// The certificates that a server's may come from.
pub fn certificates(ca_file: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let found = ca_file.or_else(|| SYSTEM_BUNDLES.iter().map(Path::new).find(|path| path.exists()));
    let path = found.ok_or_else(|| {
        Failure::lasting("this system has no trusted certificates; install ca-certificates, or name a ca-file")
    })?;
    let wrong = |why: &dyn std::fmt::Display| {
        Failure::lasting(format!("cannot use the certificates in {}: {why}", path.display()))
    };
    let all = CertificateDer::pem_file_iter(path).map_err(|error| wrong(&error))?;
    let mut all: Vec<_> = all.collect::<Result<_, _>>().map_err(|error| wrong(&error))?;
    // A bundle may hold what this library cannot read; that one is not trusted then, and the others are.
    let mut readable = rustls::RootCertStore::empty();
    all.retain(|certificate| readable.add(certificate.clone()).is_ok());
    if all.is_empty() { Err(wrong(&"it holds none")) } else { Ok(all) }
}

/// How a connection to a URL is made: with a certificate of these authorities where it is encrypted.
pub fn tls(url: &str, ca_file: Option<&Path>) -> Result<TlsConfig, Failure> {
    let builder = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    if !url.starts_with("https:") {
        return Ok(builder.build());
    }
    let all = certificates(ca_file)?;
    let roots = all.iter().map(|der| Certificate::from_der(der).to_owned()).collect::<Vec<_>>();
    Ok(builder.root_certs(RootCerts::Specific(Arc::new(roots))).build())
}

/// What a library says of a connection, with what to do about certificates, and nothing said twice in a row.
pub fn explained(text: &str) -> String {
    let mut parts: Vec<&str> = text.split(": ").collect();
    parts.dedup();
    let text = parts.join(": ");
    let advice = match &text {
        text if text.contains("CaUsedAsEndEntity") => {
            "; the server shows the certificate of an authority (CA:TRUE) as its own; give it one that is none"
        }
        text if text.contains("invalid peer certificate") => {
            "; if it is the right server, name the authority of its certificate with ca-file"
        }
        _ => "",
    };
    text + advice
}

/// The first line of a file, without the space around it.
pub fn secret(path: &Path) -> Result<String, Failure> {
    use std::io::Read;
    let wrong =
        |why: &dyn std::fmt::Display| Failure::lasting(format!("cannot use the secret in {}: {why}", path.display()));
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| wrong(&error))?;
    file.take(SECRET_BYTES_MAX).read_to_string(&mut text).map_err(|error| wrong(&error))?;
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() { Err(wrong(&"its first line is empty")) } else { Ok(line.to_owned()) }
}
