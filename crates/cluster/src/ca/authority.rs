//! The authority and what it signs. ECDSA P-256 throughout.
//!
//! Of a signing request only the public key is used, and the proof that the requester holds the private one; name, role
//! and addresses are what the signer decided. Time is given by the caller.

use std::{fmt, str::FromStr, time::Duration};

use aws_lc_rs::digest;
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use zeroize::Zeroizing;

use super::{Error, Result, certificate, random};

/// How long a certificate is valid.
pub const CERTIFICATE_DAYS: u64 = 90;
const AUTHORITY_DAYS: u64 = 3650;
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates are valid from this long ago: clocks differ.
const SKEW: Duration = Duration::from_secs(3600);
/// Addresses and names that one certificate can be for.
const SANS_MAX: usize = 32;
/// Largest signing request.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// What a certificate's holder may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A member: serves others and calls them.
    Node,
    /// Calls nodes, and is none.
    Client,
    /// QEMU, which sends and takes the memory and disks of VMs that migrate.
    Migration,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Node => "node",
            Role::Client => "client",
            Role::Migration => "migration",
        })
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "node" => Ok(Role::Node),
            "client" => Ok(Role::Client),
            "migration" => Ok(Role::Migration),
            _ => Err(certificate(format!("unknown role {text:?}"))),
        }
    }
}

/// Whom a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Name in the cluster: a DNS label or several.
    pub name: String,
    /// What it may be.
    pub role: Role,
    /// Host names and IP addresses by which it is called, besides [`node_server_name`].
    pub addresses: Vec<String>,
}

/// The name that a node's certificate has whatever its address: what to expect when a certain node is called.
pub fn node_server_name(name: &str) -> String {
    format!("{name}.node.virtward.internal")
}

/// SHA-256 of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate in DER.
    pub fn of(der: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// A private key and the request for a certificate of it.
pub struct NewKey {
    /// PEM, for the disk.
    pub key_pem: Zeroizing<String>,
    /// DER, for the signer.
    pub request_der: Vec<u8>,
}

impl NewKey {
    /// A fresh key. The request says nothing of its holder; the signer knows whom it signs for.
    pub fn generate() -> Result<Self> {
        let key = KeyPair::generate().map_err(certificate)?;
        let request = CertificateParams::default().serialize_request(&key).map_err(certificate)?;
        Ok(Self { key_pem: Zeroizing::new(key.serialize_pem()), request_der: request.der().to_vec() })
    }
}

/// The cluster's certificate authority, able to sign.
pub struct Authority {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one for a cluster of this name.
    pub fn create(cluster: &str, now: Timestamp) -> Result<Self> {
        let key = KeyPair::generate().map_err(certificate)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("Virtward cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, now, AUTHORITY_DAYS)?;
        let own = params.self_signed(&key).map_err(certificate)?;
        Self::from_parts(&own.pem(), &key.serialize_pem())
    }

    pub(super) fn from_parts(certificate_pem: &str, key_pem: &str) -> Result<Self> {
        let der = pem_certificate(certificate_pem)?;
        let key = KeyPair::from_pem(key_pem).map_err(certificate)?;
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(certificate)?;
        Ok(Self { certificate: der, certificate_pem: certificate_pem.into(), issuer })
    }

    pub(super) fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.issuer.key().serialize_pem())
    }

    /// Its certificate in PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its certificate's fingerprint, which join tokens carry.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// A certificate for the key of a request, in PEM, followed by the authority's own: what a server presents, so that
    /// a node that joins can find the authority that its token names.
    pub fn issue(&self, request_der: &[u8], subject: &Subject, now: Timestamp) -> Result<String> {
        let refuse = |what: String| Error::Request { what };
        if request_der.len() > REQUEST_BYTES_MAX {
            return Err(refuse(format!("it has {} bytes", request_der.len())));
        }
        if !is_name(&subject.name) {
            return Err(refuse(format!(
                "{:?} is no name of a node: use letters, digits, dots and hyphens",
                subject.name
            )));
        }
        if subject.addresses.len() > SANS_MAX {
            return Err(refuse(format!("{} addresses; at most {SANS_MAX} are possible", subject.addresses.len())));
        }
        let request = CertificateSigningRequestDer::from(request_der);
        let request = CertificateSigningRequestParams::from_der(&request).map_err(|error| refuse(error.to_string()))?;
        let mut names = subject.addresses.clone();
        if subject.role != Role::Client {
            names.push(node_server_name(&subject.name));
        }
        let mut params = CertificateParams::new(names).map_err(|error| refuse(error.to_string()))?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject.name.clone());
        params.distinguished_name.push(DnType::OrganizationalUnitName, subject.role.to_string());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if subject.role == Role::Migration {
            // QEMU looks for it before it uses a certificate, though keys of this kind do not encipher any.
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        params.extended_key_usages = match subject.role {
            Role::Node | Role::Migration => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
            Role::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, now, CERTIFICATE_DAYS)?;
        let signed = params.signed_by(&request.public_key, &self.issuer).map_err(certificate)?;
        Ok(format!("{}{}", signed.pem(), self.certificate_pem))
    }
}

fn validity(params: &mut CertificateParams, now: Timestamp, days: u64) -> Result<()> {
    let seconds = u64::try_from(now.as_second()).map_err(|_| certificate("the clock is before 1970"))?;
    let since = Duration::from_secs(seconds).saturating_sub(SKEW);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since;
    params.not_after = epoch + Duration::from_secs(seconds) + DAY * u32::try_from(days).unwrap_or(u32::MAX);
    let mut serial = random::<16>()?;
    // Positive, and not shorter than it seems.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(())
}

fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 200 && name.split('.').all(label)
}

/// What a certificate says. Whether it is to be believed was decided when the connection was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name in the cluster.
    pub name: String,
    /// What its holder may be.
    pub role: Role,
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until.
    pub not_after: Timestamp,
}

impl Identity {
    /// Of a certificate in DER: the first of those that a peer presented.
    pub fn of(der: &[u8]) -> Result<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(certificate)?;
        let text = |mut names: Box<dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>> + '_>| {
            names.next().and_then(|name| name.as_str().ok()).map(str::to_owned)
        };
        let name = text(Box::new(parsed.subject().iter_common_name())).ok_or_else(|| certificate("it has no name"))?;
        let role = text(Box::new(parsed.subject().iter_organizational_unit()))
            .ok_or_else(|| certificate("it has no role"))?
            .parse()?;
        let time = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp()).map_err(certificate);
        let validity = parsed.validity();
        Ok(Self { name, role, not_before: time(validity.not_before)?, not_after: time(validity.not_after)? })
    }

    /// Of a chain in PEM.
    pub fn of_pem(chain_pem: &str) -> Result<Self> {
        Self::of(&pem_certificate(chain_pem)?)
    }

    /// Whether two thirds of its life are over, and a new one is to be asked for.
    pub fn renewal_due(&self, now: Timestamp) -> bool {
        let (start, end) = (self.not_before.as_second(), self.not_after.as_second());
        now.as_second() >= start + (end - start) * 2 / 3
    }
}

pub(super) fn pem_certificate(pem: &str) -> Result<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(certificate)
}
