//! Mutual TLS between nodes, with rustls: version 1.3, the cluster's authority and nobody else's.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
    version::TLS13,
};

use super::{Fingerprint, Identity, Result, Role, authority::node_server_name, certificate};

/// A node's certificate and key, as connections use them: those made after a [replacement](Credentials::replace) have
/// the new one, and nothing has to be restarted.
#[derive(Clone, Debug)]
pub struct Credentials {
    current: Arc<RwLock<Arc<CertifiedKey>>>,
}

impl Credentials {
    /// From a chain and a key in PEM.
    pub fn new(chain_pem: &str, key_pem: &str) -> Result<Self> {
        Ok(Self { current: Arc::new(RwLock::new(certified(chain_pem, key_pem)?)) })
    }

    /// Uses another certificate from now on.
    pub fn replace(&self, chain_pem: &str, key_pem: &str) -> Result<()> {
        let new = certified(chain_pem, key_pem)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// What the certificate in use says.
    pub fn identity(&self) -> Result<Identity> {
        Identity::of(self.get().end_entity_cert().map_err(certificate)?)
    }

    fn get(&self) -> Arc<CertifiedKey> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn certified(chain_pem: &str, key_pem: &str) -> Result<Arc<CertifiedKey>> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(certificate)?;
    let certified = CertifiedKey::from_der(chain.map_err(certificate)?, key, &provider()).map_err(certificate)?;
    Ok(Arc::new(certified))
}

impl ResolvesServerCert for Credentials {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

impl ResolvesClientCert for Credentials {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What a server asks of its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// A certificate of the cluster's authority.
    Required,
    /// Such a certificate, or none, where nodes join. Whoever has none is nobody until a token says otherwise.
    Offered,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn roots(authorities_pem: &str) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(authorities_pem.as_bytes()) {
        roots.add(authority.map_err(certificate)?).map_err(certificate)?;
    }
    if roots.is_empty() { Err(certificate("no authority is given")) } else { Ok(Arc::new(roots)) }
}

/// For serving. `authorities_pem` holds the certificates of the cluster's authority, or of two while one replaces the
/// other.
pub fn server_config(own: &Credentials, authorities_pem: &str, auth: ClientAuth) -> Result<ServerConfig> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authorities_pem)?, provider());
    let verifier = match auth {
        ClientAuth::Required => verifier,
        ClientAuth::Offered => verifier.allow_unauthenticated(),
    };
    let config =
        ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).map_err(certificate)?;
    Ok(config
        .with_client_cert_verifier(verifier.build().map_err(certificate)?)
        .with_cert_resolver(Arc::new(own.clone())))
}

/// For calling a node. Connect with [`node_server_name`] to reach that very node, or with a name or address in its
/// certificate.
pub fn client_config(own: &Credentials, authorities_pem: &str) -> Result<ClientConfig> {
    let config =
        ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).map_err(certificate)?;
    Ok(config.with_root_certificates(roots(authorities_pem)?).with_client_cert_resolver(Arc::new(own.clone())))
}

/// For joining: knows nothing of the cluster but its authority's fingerprint, and has no certificate yet. The server
/// must be a node of that authority, whatever address it is reached by.
pub fn join_client_config(fingerprint: Fingerprint) -> Result<ClientConfig> {
    let config =
        ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).map_err(certificate)?;
    let verifier = PinnedAuthority { fingerprint, provider: provider() };
    Ok(config.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth())
}

/// Trusts the authority with one fingerprint, which the server presents behind its own certificate.
#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refuse = |what: String| rustls::Error::General(what);
        let authority = intermediates.iter().find(|one| Fingerprint::of(one) == self.fingerprint).ok_or_else(|| {
            refuse("this is not the cluster that the join token is for: its authority has another fingerprint".into())
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let identity = Identity::of(end_entity).map_err(|error| refuse(error.to_string()))?;
        if identity.role != Role::Node {
            return Err(refuse("the server is no node of the cluster".into()));
        }
        // The name is what the certificate says it is: which node answers is of no importance.
        let name = ServerName::try_from(node_server_name(&identity.name)).map_err(|error| refuse(error.to_string()))?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| refuse(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}
