//! Key slots: the repository's keys under one secret each.

use argon2::{Algorithm, Argon2, Params, Version};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{KdfCost, KeyRing, Secret, SecretKind};
use crate::{
    crypto::{Cipher, Key, TAG_BYTES, derive, random},
    error::{Error, Result},
    format::{
        ChunkId, Malformed, ObjectId,
        config::Config,
        envelope::{self, Kind},
        names,
    },
};

/// Kind of secret that opens a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyKind {
    /// A password through argon2id.
    Password,
    /// The content of a key file.
    KeyFile,
}

/// A key slot, as shown to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Identity of the slot.
    pub id: ObjectId,
    /// What opens it.
    pub kind: KeyKind,
    /// Label given by the operator; empty if none.
    pub label: String,
    /// When it was made.
    pub created: Timestamp,
    /// Newest generation of the keys in it.
    pub generation: u32,
    /// Whether its holder can write and not read data.
    pub write_only: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    #[serde(flatten)]
    config: Config,
    slot: ObjectId,
    kind: KeyKind,
    label: String,
    slot_created: Timestamp,
    cipher: Cipher,
    salt: ChunkId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    argon2id: Option<KdfCost>,
    #[serde(default = "first_generation")]
    generation: u32,
    #[serde(default)]
    write_only: bool,
}

fn first_generation() -> u32 {
    1
}

const LABEL_BYTES_MAX: usize = 200;

fn kek(secret: &Secret, header: &Header) -> Result<Option<Key>, Malformed> {
    let mut material = Key([0; 32]);
    match (&secret.0, header.kind, header.argon2id) {
        (SecretKind::Password(password), KeyKind::Password, Some(cost)) => {
            if !cost.is_bounded() {
                return Err(Malformed("its argon2id cost is out of bounds"));
            }
            let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32))
                .map_err(|_| Malformed("its argon2id cost is out of bounds"))?;
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(password.as_bytes(), &header.salt.0, &mut material.0)
                .map_err(|_| Malformed("its argon2id parameters do not work"))?;
        }
        (SecretKind::KeyFile(bytes), KeyKind::KeyFile, None) => material = Key(*blake3::hash(bytes).as_bytes()),
        _ => return Ok(None),
    }
    let info: [&[u8]; 3] = [&header.salt.0, &header.config.repository.0, &header.slot.0];
    Ok(Some(derive("key slot", &material, &info)))
}

/// Makes a slot with an id; returns its description and its object.
pub fn create(
    slot: ObjectId,
    config: &Config,
    ring: &KeyRing,
    secret: &Secret,
    label: &str,
    cost: KdfCost,
) -> Result<(KeyInfo, Vec<u8>)> {
    if label.len() > LABEL_BYTES_MAX || label.chars().any(char::is_control) {
        return Err(Error::BadSecret { what: "the label of a key is at most 200 bytes of printable text".into() });
    }
    let (kind, argon2id) = match &secret.0 {
        SecretKind::Password(password) if password.is_empty() => {
            return Err(Error::BadSecret { what: "the password is empty; choose one".into() });
        }
        SecretKind::Password(_) => (KeyKind::Password, Some(cost)),
        SecretKind::KeyFile(_) => (KeyKind::KeyFile, None),
    };
    let header = Header {
        config: config.clone(),
        slot,
        kind,
        label: label.into(),
        slot_created: Timestamp::now(),
        cipher: Cipher::preferred(),
        salt: ChunkId(random()),
        argon2id,
        generation: ring.generation(),
        write_only: !ring.can_read_data(),
    };
    let name = names::key(&header.slot);
    let kek = kek(secret, &header).map_err(|e| e.at(&*name))?.expect("the kind was taken from the secret");
    let mut body = ring.encode();
    let prefix = envelope::begin(Kind::KeySlot, &header, body.len() + TAG_BYTES);
    header.cipher.with(&kek).seal(0, &prefix, &mut body);
    Ok((info(&header), envelope::finish(prefix, &body)))
}

fn info(header: &Header) -> KeyInfo {
    KeyInfo {
        id: header.slot,
        kind: header.kind,
        label: header.label.clone(),
        created: header.slot_created,
        generation: header.generation,
        write_only: header.write_only,
    }
}

fn parse<'a>(name: &str, bytes: &'a [u8]) -> Result<(envelope::Envelope<'a>, Header)> {
    let envelope = envelope::parse(bytes, Kind::KeySlot).map_err(|e| e.at(name))?;
    Config::from_json(envelope.header, name)?;
    let header: Header = envelope.header().map_err(|e| e.at(name))?;
    if names::key(&header.slot) != name {
        return Err(Malformed("it belongs to another name").at(name));
    }
    Ok((envelope, header))
}

/// What a slot says in clear: itself, and a copy of the repository's description.
pub fn describe(name: &str, bytes: &[u8]) -> Result<(KeyInfo, Config)> {
    let (_, header) = parse(name, bytes)?;
    Ok((info(&header), header.config))
}

/// What a password for this slot costs, if it takes one.
pub fn cost(name: &str, bytes: &[u8]) -> Result<Option<KdfCost>> {
    Ok(parse(name, bytes)?.1.argon2id)
}

/// The keys behind a slot, or `None` if the secret does not open it.
pub fn open(name: &str, bytes: &[u8], config: &Config, secret: &Secret) -> Result<Option<KeyRing>> {
    let (envelope, header) = parse(name, bytes)?;
    if header.config.repository != config.repository {
        return Ok(None);
    }
    let Some(kek) = kek(secret, &header).map_err(|e| e.at(name))? else { return Ok(None) };
    let mut body = zeroize::Zeroizing::new(envelope.body.to_vec());
    let Ok(text) = header.cipher.with(&kek).open(0, envelope.aad, &mut body) else { return Ok(None) };
    KeyRing::decode(header.config.repository, text).map(Some).map_err(|e| e.at(name))
}
