//! Small objects under the metadata key: restore points, epochs, leases.
//!
//! The key of each object is derived with a fresh salt; the clear header names repository and object, and is the AAD,
//! so an object cannot be passed off as another.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    ChunkId, Malformed, ObjectId,
    envelope::{self, Kind},
};
use crate::{
    crypto::{Cipher, Key, TAG_BYTES, derive},
    error::Result,
    keys::KeyRing,
};

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    repository: ObjectId,
    name: String,
    key_generation: u32,
    cipher: Cipher,
    salt: ChunkId,
}

fn object_key(master: &Key, header: &Header) -> Key {
    derive("sealed object", master, &[&header.salt.0, &header.repository.0])
}

/// Seals a value under a name.
pub fn seal<T: Serialize>(ring: &KeyRing, kind: Kind, name: &str, value: &T) -> Result<Vec<u8>> {
    let (key_generation, master) = ring.metadata_newest()?;
    let header = Header {
        repository: ring.repository,
        name: name.into(),
        key_generation,
        cipher: Cipher::preferred(),
        salt: ChunkId(crate::crypto::random()),
    };
    let mut body = serde_json::to_vec(value).expect("sealed values are plain data");
    let prefix = envelope::begin(kind, &header, body.len() + TAG_BYTES);
    header.cipher.with(&object_key(master, &header)).seal(0, &prefix, &mut body);
    Ok(envelope::finish(prefix, &body))
}

/// Opens what [`seal`] made for the same name.
pub fn open<T: DeserializeOwned>(ring: &KeyRing, kind: Kind, name: &str, bytes: &[u8]) -> Result<T> {
    let envelope = envelope::parse(bytes, kind).map_err(|e| e.at(name))?;
    let header: Header = envelope.header().map_err(|e| e.at(name))?;
    if header.repository != ring.repository || header.name != name {
        return Err(Malformed("it belongs to another name or repository").at(name));
    }
    let key = object_key(ring.metadata(header.key_generation)?, &header);
    let mut body = envelope.body.to_vec();
    let text = header.cipher.with(&key).open(0, envelope.aad, &mut body).map_err(|e| e.at(name))?;
    serde_json::from_slice(text).map_err(|_| Malformed("its content does not decode").at(name))
}
