//! The authority in the store, its key sealed with the cluster key.

use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{Authority, Error, Fingerprint, Result, authority::pem_certificate, files, random};
use crate::{Compare, Op, Store};

/// Where the authority is.
const KEY: &str = "/ca";
/// Where that of migrations is.
const MIGRATION_KEY: &str = "/ca-migration";

/// What opens the authority's key. On the disks of the nodes, never in the store.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ClusterKey([u8; 32]);

impl ClusterKey {
    /// A fresh one, for a new cluster.
    pub fn generate() -> Result<Self> {
        Ok(Self(random()?))
    }

    /// As a text, to be handed to a node that joins, over the connection that its token and certificate secured.
    pub fn expose(&self) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(self.0))
    }

    /// From that text.
    pub fn parse(text: &str) -> Result<Self> {
        let mut bytes = [0; 32];
        let wrong = |_| Error::Sealed { what: "it is no cluster key".into() };
        hex::decode_to_slice(text.trim(), &mut bytes).map_err(wrong)?;
        Ok(Self(bytes))
    }

    /// Writes it for its owner alone.
    pub fn save(&self, path: &Path) -> Result<()> {
        files::write_secret(path, self.expose().as_bytes())
    }

    /// Reads it.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = files::read_secret(path)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Error::Sealed { what: "it is no cluster key".into() })?;
        Self::parse(text)
    }

    fn cipher(&self) -> Result<LessSafeKey> {
        let key = UnboundKey::new(&AES_256_GCM, &self.0).map_err(|_| Error::Sealed { what: "no cipher".into() })?;
        Ok(LessSafeKey::new(key))
    }
}

/// In the store.
#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    certificate_pem: String,
    /// Base64: nonce, ciphertext, tag.
    sealed_key: String,
}

/// Ties the sealed key to the certificate that it belongs to.
fn context(fingerprint: Fingerprint) -> Aad<Vec<u8>> {
    Aad::from([&b"virtward cluster authority 1 "[..], &fingerprint.0].concat())
}

/// Makes the cluster's authority and stores it, once: [`Error::Exists`] if there is one.
pub async fn create_ca(store: &dyn Store, key: &ClusterKey, cluster: &str, now: Timestamp) -> Result<Authority> {
    create(store, KEY, key, Authority::create(cluster, now)?).await
}

/// The cluster's authority, able to sign.
pub async fn load_ca(store: &dyn Store, key: &ClusterKey) -> Result<Authority> {
    load(store, KEY, key).await
}

/// The authority of what QEMU shows when VMs migrate; made by whoever asks first. Another one than the cluster's, because
/// QEMU's keys can be read by every QEMU of their host: who breaks out of a guest must not become a node.
pub async fn migration_ca(store: &dyn Store, key: &ClusterKey, now: Timestamp) -> Result<Authority> {
    match load(store, MIGRATION_KEY, key).await {
        Err(Error::Missing) => {}
        known => return known,
    }
    match create(store, MIGRATION_KEY, key, Authority::create("migration", now)?).await {
        Err(Error::Exists) => load(store, MIGRATION_KEY, key).await,
        made => made,
    }
}

async fn create(store: &dyn Store, place: &'static str, key: &ClusterKey, authority: Authority) -> Result<Authority> {
    let unsealed = |_| Error::Sealed { what: "it cannot be sealed".into() };
    let nonce = random::<NONCE_LEN>()?;
    let mut sealed = authority.key_pem().as_bytes().to_vec();
    let context = context(authority.fingerprint());
    let assumed = Nonce::assume_unique_for_key(nonce);
    key.cipher()?.seal_in_place_append_tag(assumed, context, &mut sealed).map_err(unsealed)?;
    let sealed_key = STANDARD.encode([&nonce[..], &sealed].concat());
    let record = Record { version: 1, certificate_pem: authority.certificate_pem().into(), sealed_key };
    let value = serde_json::to_vec(&record).map_err(super::certificate)?;
    let outcome = store.txn(vec![Compare::absent(place)], vec![Op::put(place, value)]).await?;
    if outcome.succeeded { Ok(authority) } else { Err(Error::Exists) }
}

async fn load(store: &dyn Store, place: &'static str, key: &ClusterKey) -> Result<Authority> {
    let entry = store.get(place.as_bytes()).await?.ok_or(Error::Missing)?;
    let broken = |what: &str| Error::Sealed { what: what.into() };
    let record: Record = serde_json::from_slice(&entry.value).map_err(|error| broken(&error.to_string()))?;
    if record.version != 1 {
        return Err(broken("it was stored by a newer version; upgrade virtward on this host"));
    }
    let fingerprint = Fingerprint::of(&pem_certificate(&record.certificate_pem)?);
    let sealed = STANDARD.decode(&record.sealed_key).map_err(|_| broken("it is no base64"))?;
    let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN).ok_or_else(|| broken("it is cut short"))?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| broken("its nonce is wrong"))?;
    let mut opened = Zeroizing::new(sealed.to_vec());
    let plain = key.cipher()?.open_in_place(nonce, context(fingerprint), &mut opened);
    let plain = plain.map_err(|_| broken("it was sealed with another key, or changed"))?;
    let key_pem = std::str::from_utf8(plain).map_err(|_| broken("it is no text"))?;
    Authority::from_parts(&record.certificate_pem, key_pem)
}
