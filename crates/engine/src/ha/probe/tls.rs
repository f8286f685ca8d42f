//! A TLS handshake, and how long the certificate is valid.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Failed, Stream, Tls};

const DAY_S: i64 = 86_400;

/// Shakes hands; the stream and what the certificate says.
pub(super) async fn connect<S: Stream>(stream: S, address: &str, tls: &Tls) -> Result<(TlsStream<S>, String), Failed> {
    let question = |why: String| Failed::Question(why);
    let name = tls.name.as_deref().unwrap_or(address).to_owned();
    let server =
        ServerName::try_from(name.clone()).map_err(|_| question(format!("{name:?} is no name of a server")))?;
    let config = config(tls.ca.as_deref()).map_err(question)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(server, stream).await?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or_else(|| Failed::Service("showed no certificate".into()))?;
    let (_, leaf) =
        X509Certificate::from_der(leaf).map_err(|error| Failed::Service(format!("certificate: {error}")))?;
    let left_s = leaf.validity().not_after.timestamp() - jiff::Timestamp::now().as_second();
    if left_s <= 0 {
        return Err(Failed::Service(format!("the certificate expired {} days ago", -left_s / DAY_S)));
    }
    let days = left_s / DAY_S;
    if days < i64::from(tls.days_left) {
        return Err(Failed::Service(format!("the certificate expires in {days} days")));
    }
    Ok((stream, format!("certificate valid for {days} days")))
}

fn config(ca: Option<&Path>) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let Some(ca) = ca else {
        let any = Arc::new(AnyIssuer(provider));
        return Ok(builder.dangerous().with_custom_certificate_verifier(any).with_no_client_auth());
    };
    let wrong = |error: String| format!("{}: {error}", ca.display());
    let mut roots = RootCertStore::empty();
    for one in CertificateDer::pem_file_iter(ca).map_err(|error| wrong(error.to_string()))? {
        let one = one.map_err(|error| wrong(error.to_string()))?;
        roots.add(one).map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("there is no certificate in it".into()));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Accepts whoever proves to hold the key of the certificate that it shows. Nothing secret is ever sent to it.
#[derive(Debug)]
struct AnyIssuer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyIssuer {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
