//! Identities: 128 random bits for objects, 256-bit keyed hashes for chunks and pages.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                let mut bytes = [0; $len];
                // Only the canonical spelling counts: an identity must have one name.
                if text.len() != 2 * $len || text.bytes().any(|b| b.is_ascii_uppercase()) {
                    return Err(format!("not {} lower-case hex digits", 2 * $len));
                }
                hex::decode_to_slice(text, &mut bytes).map_err(|e| e.to_string())?;
                Ok(Self(bytes))
            }
        }
        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

hex_id!(
    /// Identity of a repository, pack, segment, writer or key slot: random, so it says nothing.
    ObjectId,
    16
);
hex_id!(
    /// Identity of a chunk or of a manifest page: keyed BLAKE3-256 of its plaintext.
    ChunkId,
    32
);

impl ObjectId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(crate::crypto::random())
    }
}

impl ChunkId {
    /// The first eight bytes as a number whose order is that of the ids.
    pub fn prefix(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_be_bytes(first)
    }
}
