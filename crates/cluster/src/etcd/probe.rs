//! Why a member that does not answer over TLS does not: whether one of the two refuses the other's certificate.
//!
//! In TLS 1.3 a server that refuses a client's certificate says so after the handshake, to a connection that is closed
//! with it; the request that waited for the connection is told no more than that it is closed. So it is asked once more,
//! by hand.

use std::{sync::Arc, time::Duration};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{io::AsyncReadExt, net::TcpStream};

use super::{member::EtcdTls, verdict::refused};

/// How long it may take in all.
const TIME_MAX: Duration = Duration::from_secs(2);

/// Who refuses what, if it is that. None if nobody answers, or if there is nothing wrong with the certificates.
pub(super) async fn refusal(url: &str, tls: &EtcdTls) -> Option<String> {
    tokio::time::timeout(TIME_MAX, ask(url, tls)).await.ok().flatten()
}

async fn ask(url: &str, tls: &EtcdTls) -> Option<String> {
    let config = match config(tls) {
        Ok(config) => config,
        Err(error) => return Some(error.to_string()),
    };
    let authority = url.strip_prefix("https://")?.split('/').next()?;
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (authority, 2379_u16),
    };
    let host = host.trim_matches(['[', ']']);
    let expected = ServerName::try_from(tls.server_name.clone().unwrap_or_else(|| host.to_owned())).ok()?;
    let stream = TcpStream::connect((host, port)).await.ok()?;
    let said = |error: std::io::Error| refused(&error.to_string());
    let mut stream = match tokio_rustls::TlsConnector::from(Arc::new(config)).connect(expected, stream).await {
        Ok(stream) => stream,
        Err(error) => return said(error),
    };
    // A server that is content waits for a request; one that is not says so.
    stream.read_u8().await.err().and_then(said)
}

fn config(tls: &EtcdTls) -> Result<ClientConfig, rustls::Error> {
    let unreadable = |what: &str| rustls::Error::General(format!("{what} cannot be read"));
    let certificates = |pem: &str, what: &str| -> Result<Vec<CertificateDer<'static>>, rustls::Error> {
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|_| unreadable(what))
    };
    let mut roots = RootCertStore::empty();
    for authority in certificates(&tls.ca_pem, "the authority's certificate")? {
        roots.add(authority)?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match &tls.identity_pem {
        None => config.with_no_client_auth(),
        Some((chain, key)) => {
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| unreadable("this node's key"))?;
            config.with_client_auth_cert(certificates(chain, "this node's certificate")?, key)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
