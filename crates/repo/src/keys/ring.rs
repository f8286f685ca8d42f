//! The keys of an open repository, and what can be done with them.

use zeroize::Zeroizing;

use crate::{
    crypto::{Cipher, Key, WRAPPED_BYTES, chunk_id, derive, random, unwrap, wrap, x25519, x25519_public},
    error::{Error, Result},
    format::{ChunkId, Cursor, Malformed, ObjectId},
};

/// Class of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Makes chunk ids.
    Id = 1,
    /// Opens index, manifest pages and restore points.
    Metadata = 2,
    /// Opens what is in the guests: disks, domain XML, NVRAM, TPM state.
    Data = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Form {
    Symmetric = 1,
    X25519Public = 2,
    X25519Private = 3,
}

#[derive(Clone, Debug)]
struct Entry {
    class: Class,
    form: Form,
    generation: u32,
    key: Key,
}

const BUNDLE_VERSION: u8 = 1;
const ENTRIES_MAX: usize = 255;

/// How a pack's key is wrapped, as it stands in the pack header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrapped {
    /// 1: under a symmetric key. 2: sealed to an X25519 public key.
    pub form: u8,
    /// Generation of the wrapping key.
    pub generation: u32,
    /// Salt, or the ephemeral public key.
    pub salt: [u8; 32],
    /// The wrapped key.
    pub key: [u8; WRAPPED_BYTES],
}

/// The keys that a slot opened.
#[derive(Clone, Debug)]
pub struct KeyRing {
    /// Repository that the keys belong to.
    pub repository: ObjectId,
    entries: Vec<Entry>,
    chunk_key: Key,
    page_key: Key,
}

impl KeyRing {
    /// Fresh keys, all symmetric.
    pub fn generate(repository: ObjectId) -> Self {
        let entry = |class| Entry { class, form: Form::Symmetric, generation: 1, key: Key::random() };
        Self::from_entries(repository, vec![entry(Class::Id), entry(Class::Metadata), entry(Class::Data)])
            .expect("the id key is there")
    }

    /// Fresh keys with an X25519 pair as data key, so that [`KeyRing::write_only`] rings can be made of it.
    pub fn generate_sealing(repository: ObjectId) -> Self {
        let mut ring = Self::generate(repository);
        let private = Key::random();
        let public = Key(x25519_public(&private));
        ring.entries.retain(|e| e.class != Class::Data);
        for (form, key) in [(Form::X25519Public, public), (Form::X25519Private, private)] {
            ring.entries.push(Entry { class: Class::Data, form, generation: 1, key });
        }
        ring
    }

    /// What a host needs that may back up and not read: everything but what opens data.
    pub fn write_only(&self) -> Self {
        let mut ring = self.clone();
        ring.entries.retain(|e| e.class != Class::Data || e.form == Form::X25519Public);
        ring
    }

    /// The newest generation of its keys.
    pub fn generation(&self) -> u32 {
        self.entries.iter().filter(|e| e.class != Class::Id).map(|e| e.generation).max().unwrap_or(1)
    }

    /// All keys of this ring and fresh ones of the next generation for what is written from now on. The id key stays:
    /// with another one nothing that is stored would be found again. `sealed` makes the new data key an X25519 pair; once
    /// it is one it stays one.
    pub fn rotated(&self, sealed: bool) -> Result<Self> {
        let too_many = || Error::Unsupported { what: "the keys were rotated too often for one key slot".into() };
        let generation = self.generation().checked_add(1).ok_or_else(too_many)?;
        let was_sealed = self.newest(Class::Data).is_some_and(|e| e.form == Form::X25519Public);
        let mut fresh = match sealed || was_sealed {
            true => Self::generate_sealing(self.repository),
            false => Self::generate(self.repository),
        };
        fresh.entries.retain(|e| e.class != Class::Id);
        fresh.entries.iter_mut().for_each(|e| e.generation = generation);
        let mut ring = self.clone();
        ring.entries.append(&mut fresh.entries);
        if ring.entries.len() > ENTRIES_MAX { Err(too_many()) } else { Ok(ring) }
    }

    fn from_entries(repository: ObjectId, entries: Vec<Entry>) -> Result<Self, Malformed> {
        let id = entries.iter().find(|e| e.class == Class::Id).ok_or(Malformed("it holds no id key"))?;
        let chunk_key = derive("chunk ids", &id.key, &[&repository.0]);
        let page_key = derive("page ids", &id.key, &[&repository.0]);
        Ok(Self { repository, entries, chunk_key, page_key })
    }

    /// The plaintext of a key slot.
    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(Vec::with_capacity(2 + 40 * self.entries.len() + 16));
        out.extend_from_slice(&[BUNDLE_VERSION, self.entries.len() as u8]);
        for entry in &self.entries {
            out.extend_from_slice(&[entry.class as u8, entry.form as u8, 0, 0]);
            out.extend_from_slice(&entry.generation.to_le_bytes());
            out.extend_from_slice(&entry.key.0);
        }
        out
    }

    /// From the plaintext of a key slot.
    pub(crate) fn decode(repository: ObjectId, bytes: &[u8]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        at.expect(&[BUNDLE_VERSION], "it holds keys in a newer form; upgrade virtward")?;
        let count = at.u8()?;
        let mut entries = Vec::new();
        for _ in 0..count {
            let class = match at.u8()? {
                1 => Class::Id,
                2 => Class::Metadata,
                3 => Class::Data,
                _ => return Err(Malformed("it holds a key of an unknown class")),
            };
            let form = match at.u8()? {
                1 => Form::Symmetric,
                2 => Form::X25519Public,
                3 => Form::X25519Private,
                _ => return Err(Malformed("it holds a key of an unknown form")),
            };
            at.u16()?;
            entries.push(Entry { class, form, generation: at.u32()?, key: Key(at.array()?) });
        }
        at.end()?;
        debug_assert!(entries.len() <= ENTRIES_MAX);
        Self::from_entries(repository, entries)
    }

    /// Id of a chunk.
    pub fn chunk_id(&self, plaintext: &[u8]) -> ChunkId {
        chunk_id(&self.chunk_key, plaintext)
    }
    /// Id of a manifest page.
    pub fn page_id(&self, plaintext: &[u8]) -> ChunkId {
        chunk_id(&self.page_key, plaintext)
    }

    fn find(&self, class: Class, form: Form, generation: u32) -> Option<&Key> {
        self.entries.iter().find(|e| e.class == class && e.form == form && e.generation == generation).map(|e| &e.key)
    }
    fn newest(&self, class: Class) -> Option<&Entry> {
        let writes = |e: &&Entry| e.class == class && e.form != Form::X25519Private;
        self.entries.iter().filter(writes).max_by_key(|e| e.generation)
    }

    /// Metadata key of a generation.
    pub fn metadata(&self, generation: u32) -> Result<&Key> {
        self.find(Class::Metadata, Form::Symmetric, generation).ok_or(Error::KeyNotHeld { class: "metadata" })
    }
    /// Metadata key for new objects, with its generation.
    pub fn metadata_newest(&self) -> Result<(u32, &Key)> {
        let entry = self.newest(Class::Metadata).ok_or(Error::KeyNotHeld { class: "metadata" })?;
        Ok((entry.generation, &entry.key))
    }
    /// Whether data can be read, or only written.
    pub fn can_read_data(&self) -> bool {
        self.entries.iter().any(|e| e.class == Class::Data && e.form != Form::X25519Public)
    }

    /// Whether data can be written.
    pub fn can_write_data(&self) -> bool {
        self.newest(Class::Data).is_some()
    }

    /// Wraps the key of a new pack. `aad` identifies the pack.
    pub(crate) fn wrap(&self, class: Class, cipher: Cipher, aad: &[u8], key: &Key) -> Result<Wrapped> {
        let to = self.newest(class).ok_or(Error::KeyNotHeld { class: class_name(class) })?;
        let (form, salt, kek) = match to.form {
            Form::Symmetric => {
                let salt = random();
                (1, salt, derive("pack key under symmetric key", &to.key, &[&salt]))
            }
            _ => {
                let ephemeral = Key::random();
                let salt = x25519_public(&ephemeral);
                let shared = x25519(&ephemeral, &to.key.0).map_err(|e| e.at("data key"))?;
                (2, salt, derive("pack key under x25519", &shared, &[&salt, &to.key.0]))
            }
        };
        Ok(Wrapped { form, generation: to.generation, salt, key: wrap(cipher, &kek, aad, key) })
    }

    /// Reverses [`KeyRing::wrap`].
    pub(crate) fn unwrap(
        &self,
        class: Class,
        cipher: Cipher,
        aad: &[u8],
        wrapped: &Wrapped,
        object: &str,
    ) -> Result<Key> {
        let not_held = Error::KeyNotHeld { class: class_name(class) };
        let kek = match wrapped.form {
            1 => {
                let key = self.find(class, Form::Symmetric, wrapped.generation).ok_or(not_held)?;
                derive("pack key under symmetric key", key, &[&wrapped.salt])
            }
            2 => {
                let private = self.find(class, Form::X25519Private, wrapped.generation).ok_or(not_held)?;
                let shared = x25519(private, &wrapped.salt).map_err(|e| e.at(object))?;
                derive("pack key under x25519", &shared, &[&wrapped.salt, &x25519_public(private)])
            }
            _ => return Err(Malformed("its key is wrapped in an unknown way").at(object)),
        };
        unwrap(cipher, &kek, aad, &wrapped.key).map_err(|e| e.at(object))
    }
}

fn class_name(class: Class) -> &'static str {
    match class {
        Class::Id => "id",
        Class::Metadata => "metadata",
        Class::Data => "data",
    }
}
