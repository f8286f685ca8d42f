//! Rotation: a new generation of the metadata and data keys for what is written from now on. Nothing is encrypted again;
//! every slot keeps the older generations to read with.
//!
//! The new keys are wrapped for nobody's old keys: who learned those must not get at the new ones. So each slot has to be
//! written again under its own secret, and one whose secret is not at hand is dropped or the rotation refused.
//!
//! ```text
//! which slots open with the secrets at hand? ─► put the first new slot, whose id is a function of the generation
//!   ─► put the others ─► delete all old slots
//! ```
//! Invariants: at every instant each secret that will open the repository afterwards opens it; of two rotations at once
//! only one gets past the first new slot.

use serde::Serialize;

use super::{KdfCost, KeyInfo, KeyKind, KeyRing, Secret, slot};
use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    repository::{Repository, read_slots},
    store::{Put, put_new},
};

/// How to rotate.
#[derive(Clone, Debug, Default)]
pub struct RotateOptions {
    /// Secrets of other slots that are to open the repository afterwards too.
    pub others: Vec<Secret>,
    /// Drop the slots that none of the secrets opens.
    pub drop_others: bool,
    /// Seal data to a public key from now on, so that write-only keys can be made.
    pub sealed: bool,
    /// Least cost of passwords; one that is higher stays.
    pub kdf: KdfCost,
}

/// What a rotation did.
#[derive(Clone, Debug, Serialize)]
pub struct Rotated {
    /// The new generation.
    pub generation: u32,
    /// Slots as they are now.
    pub keys: Vec<KeyInfo>,
    /// Slots that were dropped.
    pub dropped: Vec<KeyInfo>,
}

/// A slot as found, and the secret that opens it if there is one.
struct Found<'a> {
    name: String,
    info: KeyInfo,
    cost: Option<KdfCost>,
    secret: Option<&'a Secret>,
}

impl Repository {
    /// Rotates the keys. `secret` is the one that this repository was opened with, by a slot that can read everything.
    /// Open the repository again afterwards: this one goes on with the older keys.
    pub fn rotate_keys(&self, secret: &Secret, options: &RotateOptions) -> Result<Rotated> {
        let ring = &*self.inner.ring;
        if !ring.can_read_data() {
            return Err(Error::KeyNotHeld { class: "data" });
        }
        let secrets: Vec<&Secret> = std::iter::once(secret).chain(&options.others).collect();
        let mut found = self.slots(&secrets, options.drop_others)?;
        if found.iter().any(|slot| slot.info.generation > ring.generation()) {
            return Err(Error::Unsupported {
                what: "the keys were rotated since, and this key is of the older generation; use a newer key".into(),
            });
        }
        let left: Vec<&KeyInfo> = found.iter().filter(|slot| slot.secret.is_none()).map(|slot| &slot.info).collect();
        if !left.is_empty() && !options.drop_others {
            return Err(Error::KeysLeft { keys: left.into_iter().map(describe).collect::<Vec<_>>().join(", ") });
        }
        let dropped = left.into_iter().cloned().collect();
        // The secret at hand first: if this is interrupted, it can take the rotation up again.
        found.sort_by_key(|slot| slot.secret.is_none_or(|by| !std::ptr::eq(by, secret)));
        let ring = ring.rotated(options.sealed)?;
        let mut keys: Vec<KeyInfo> = Vec::new();
        let mut served: Vec<(*const Secret, bool)> = Vec::new();
        for slot in &found {
            let Some(secret) = slot.secret else { continue };
            // An interrupted rotation leaves two slots for one secret.
            let what = (std::ptr::from_ref(secret), slot.info.write_only);
            if served.contains(&what) {
                continue;
            }
            served.push(what);
            keys.push(self.rewrite(slot, secret, &ring, options.kdf, keys.is_empty())?);
        }
        for slot in &found {
            self.inner.store.delete(&slot.name)?;
        }
        Ok(Rotated { generation: ring.generation(), keys, dropped })
    }

    /// Every slot, each secret with the newest slot that it opens. Slots that cannot be read are in the way unless they
    /// are to go.
    fn slots<'a>(&self, secrets: &[&'a Secret], drop_unreadable: bool) -> Result<Vec<Found<'a>>> {
        let config = &self.inner.config;
        let mut found: Vec<Found<'a>> = Vec::new();
        for (name, bytes) in read_slots(&*self.inner.store)? {
            let described = bytes.and_then(|bytes| Ok((slot::describe(&name, &bytes)?, bytes)));
            let ((info, owner), bytes) = match described {
                Ok(described) => described,
                Err(e) if e.is_damage() && drop_unreadable => continue,
                Err(e) => return Err(e),
            };
            if owner.repository != config.repository {
                continue;
            }
            let mut by = None;
            for secret in secrets {
                if slot::open(&name, &bytes, config, secret)?.is_some() {
                    by = Some(*secret);
                    break;
                }
            }
            found.push(Found { cost: slot::cost(&name, &bytes)?, name, info, secret: by });
        }
        for secret in secrets {
            if !found.iter().any(|slot| slot.secret.is_some_and(|by| std::ptr::eq(by, *secret))) {
                return Err(Error::WrongSecret { location: self.inner.store.location(), slots: found.len() });
            }
        }
        Ok(found)
    }

    fn rewrite(
        &self,
        old: &Found<'_>,
        secret: &Secret,
        ring: &KeyRing,
        least: KdfCost,
        first: bool,
    ) -> Result<KeyInfo> {
        let ring = if old.info.write_only { &ring.write_only() } else { ring };
        let cost = match old.cost {
            Some(cost) if cost.memory_kib >= least.memory_kib && cost.passes >= least.passes => cost,
            _ => least,
        };
        let id = match first {
            true => first_slot(&self.inner.config.repository, ring.generation()),
            false => ObjectId::random(),
        };
        let (info, bytes) = slot::create(id, &self.inner.config, ring, secret, &old.info.label, cost)?;
        let name = names::key(&info.id);
        if !first {
            put_new(&*self.inner.store, &name, &bytes)?;
            return Ok(info);
        }
        match self.inner.store.put_if_absent(&name, &bytes)? {
            Put::Created => Ok(info),
            Put::Exists => Err(Error::Unsupported {
                what: "somebody else rotates the keys at this moment; nothing was changed, look again later".into(),
            }),
        }
    }
}

/// Id of the first slot of a generation: whoever puts it makes the generation.
fn first_slot(repository: &ObjectId, generation: u32) -> ObjectId {
    let mut hasher = blake3::Hasher::new_derive_key("virtward repository 1 first slot of a generation");
    hasher.update(&repository.0).update(&generation.to_le_bytes());
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    ObjectId(id)
}

fn describe(key: &KeyInfo) -> String {
    let kind = match key.kind {
        KeyKind::Password => "password",
        KeyKind::KeyFile => "key file",
    };
    let label = if key.label.is_empty() { String::new() } else { format!(" {:?}", key.label) };
    format!("{} ({kind}{label})", key.id)
}
