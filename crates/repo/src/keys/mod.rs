//! Keys: what people hold ([`Secret`]), where it is kept ([`slot`]), and what it opens ([`KeyRing`]).
//!
//! Three classes. The id key makes chunk ids. The metadata key opens the index, manifest pages and restore points; a
//! garbage collector needs no more. Data keys, one per pack, are wrapped for the repository's data key, which is
//! symmetric or an X25519 pair; a host that only writes holds the public half. Keys have generations, so metadata and
//! data keys can be rotated without touching packs.

pub mod ring;
pub mod rotate;
pub mod slot;

use std::{fmt, fs::File, io::Read, path::Path};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::{Error, Result};
pub use ring::{Class, KeyRing};
pub use rotate::{RotateOptions, Rotated};
pub use slot::{KeyInfo, KeyKind};

const KEY_FILE_BYTES_MIN: usize = 32;
const KEY_FILE_BYTES_MAX: u64 = 64 << 10;

/// A password or the content of a key file. Erased when dropped, never printed.
#[derive(Clone)]
pub struct Secret(pub(crate) SecretKind);

#[derive(Clone)]
pub(crate) enum SecretKind {
    Password(Zeroizing<String>),
    KeyFile(Zeroizing<Vec<u8>>),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            SecretKind::Password(_) => "Secret::Password(redacted)",
            SecretKind::KeyFile(_) => "Secret::KeyFile(redacted)",
        })
    }
}

impl Secret {
    /// A password, used as it is (no trimming, no normalisation).
    pub fn password(text: impl Into<String>) -> Self {
        Self(SecretKind::Password(Zeroizing::new(text.into())))
    }

    /// The content of a key file: at least 32 bytes, which should be random.
    pub fn key_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fail = |e| Error::io("read", format!("key file {}", path.display()), e);
        let mut bytes = Zeroizing::new(Vec::new());
        File::open(path).map_err(fail)?.take(KEY_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() as u64 > KEY_FILE_BYTES_MAX {
            return Err(Error::BadSecret { what: format!("key file {} is longer than 64 KiB", path.display()) });
        }
        Self::key_bytes(std::mem::take(&mut *bytes))
    }

    /// The bytes of a key file.
    pub fn key_bytes(bytes: Vec<u8>) -> Result<Self> {
        if bytes.len() < KEY_FILE_BYTES_MIN {
            return Err(Error::BadSecret {
                what: format!(
                    "a key file needs at least {KEY_FILE_BYTES_MIN} random bytes and this one has {}; \
                     make one with `head -c 32 /dev/urandom > FILE`",
                    bytes.len()
                ),
            });
        }
        Ok(Self(SecretKind::KeyFile(Zeroizing::new(bytes))))
    }
}

/// Cost of turning a password into a key with argon2id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KdfCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for KdfCost {
    /// 64 MiB and about a tenth of a second.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, passes: 3, lanes: 1 }
    }
}

impl KdfCost {
    /// The least that argon2id takes. Only for tests.
    pub fn weak_for_tests() -> Self {
        Self { memory_kib: 8, passes: 1, lanes: 1 }
    }

    /// A slot is read before it is authenticated: its cost must not be able to stop the machine.
    pub(crate) fn is_bounded(&self) -> bool {
        (8 * self.lanes..=1 << 20).contains(&self.memory_kib)
            && (1..=32).contains(&self.passes)
            && (1..=16).contains(&self.lanes)
    }
}
