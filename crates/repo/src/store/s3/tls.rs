//! Whom to trust: the system's certificates, or a file that the operator names.

use std::{path::Path, sync::Arc};

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};

use crate::error::{Error, Result};

/// Where systems keep the certificates that they trust.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// TLS for the client.
pub fn config(ca_file: Option<&Path>) -> Result<TlsConfig> {
    let found = ca_file.or_else(|| SYSTEM_BUNDLES.iter().map(Path::new).find(|path| path.exists()));
    let Some(path) = found else {
        return Err(Error::Unsupported {
            what: "this system has no trusted certificates; install ca-certificates, or name a file with ca-file"
                .into(),
        });
    };
    let pem = std::fs::read(path).map_err(|e| Error::io("read", path.display().to_string(), e))?;
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(Error::Unsupported {
            what: format!("{} holds no certificate; name a file with certificates in PEM form", path.display()),
        });
    }
    Ok(TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .root_certs(RootCerts::Specific(Arc::new(certificates)))
        .build())
}
