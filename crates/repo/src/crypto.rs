//! The few cryptographic operations of the format: key derivation, AEAD with counter nonces, key wrapping.
//!
//! Invariant: a key that seals is either random and used for one object, or derived with a fresh random salt, so
//! counter nonces can never repeat under one key. Not here: passwords (`keys`), what is sealed (`pack`, `index` …).

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey},
    agreement::{PrivateKey, UnparsedPublicKey, X25519, agree},
};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::format::{ChunkId, Malformed};

/// Bytes that sealing adds.
pub const TAG_BYTES: usize = 16;
/// A wrapped 32-byte key.
pub const WRAPPED_BYTES: usize = 32 + TAG_BYTES;

/// A secret 32-byte key; erased when dropped, never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Key(pub(crate) [u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(redacted)")
    }
}

impl Key {
    /// A fresh random key.
    pub fn random() -> Self {
        Self(random())
    }
}

/// Random bytes from the operating system.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system always has random bytes");
    bytes
}

/// BLAKE3 in key derivation mode over `key ‖ info…`; every part has a fixed length for its purpose.
pub fn derive(purpose: &str, key: &Key, info: &[&[u8]]) -> Key {
    let mut hasher = blake3::Hasher::new_derive_key(&format!("virtward repository 1 {purpose}"));
    hasher.update(&key.0);
    for part in info {
        hasher.update(part);
    }
    let out = Key(*hasher.finalize().as_bytes());
    hasher.zeroize();
    out
}

/// Keyed identity of a plaintext.
pub fn chunk_id(key: &Key, plaintext: &[u8]) -> ChunkId {
    ChunkId(*blake3::keyed_hash(&key.0, plaintext).as_bytes())
}

/// Cipher of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Cipher {
    /// AES-256-GCM.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm = 1,
    /// ChaCha20-Poly1305 (RFC 8439).
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305 = 2,
}

impl Cipher {
    /// The faster one on this CPU.
    pub fn preferred() -> Self {
        #[cfg(target_arch = "x86_64")]
        let aes = std::arch::is_x86_feature_detected!("aes");
        #[cfg(target_arch = "aarch64")]
        let aes = std::arch::is_aarch64_feature_detected!("aes");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let aes = false;
        if aes { Self::Aes256Gcm } else { Self::ChaCha20Poly1305 }
    }
    /// From its byte.
    pub fn from_byte(byte: u8) -> Result<Self, Malformed> {
        match byte {
            1 => Ok(Self::Aes256Gcm),
            2 => Ok(Self::ChaCha20Poly1305),
            _ => Err(Malformed("it names an unknown cipher")),
        }
    }
    /// This cipher under a key.
    pub fn with(self, key: &Key) -> Sealer {
        let algorithm = match self {
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, &key.0).expect("both ciphers take 32-byte keys");
        Sealer(LessSafeKey::new(key))
    }
}

/// An AEAD under one key. The caller never repeats a counter when sealing.
#[derive(Debug)]
pub struct Sealer(LessSafeKey);

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Sealer {
    /// Encrypts in place and appends the tag.
    pub fn seal(&self, counter: u64, aad: &[u8], text: &mut Vec<u8>) {
        self.0
            .seal_in_place_append_tag(nonce(counter), Aad::from(aad), text)
            .expect("lengths are far below the limit of the cipher");
    }
    /// Checks and decrypts in place; the plaintext is the front of `sealed`.
    pub fn open<'a>(&self, counter: u64, aad: &[u8], sealed: &'a mut [u8]) -> Result<&'a mut [u8], Malformed> {
        self.0
            .open_in_place(nonce(counter), Aad::from(aad), sealed)
            .map_err(|_| Malformed("it fails authentication (altered, or of another repository)"))
    }
}

/// Wraps `key` under a key-encryption key that is used once.
pub fn wrap(cipher: Cipher, kek: &Key, aad: &[u8], key: &Key) -> [u8; WRAPPED_BYTES] {
    let mut sealed = Vec::with_capacity(WRAPPED_BYTES);
    sealed.extend_from_slice(&key.0);
    cipher.with(kek).seal(0, aad, &mut sealed);
    sealed.try_into().expect("32 bytes and the tag")
}

/// Reverses [`wrap`].
pub fn unwrap(cipher: Cipher, kek: &Key, aad: &[u8], wrapped: &[u8; WRAPPED_BYTES]) -> Result<Key, Malformed> {
    let mut sealed = Zeroizing::new(*wrapped);
    let text = cipher.with(kek).open(0, aad, sealed.as_mut_slice())?;
    let mut key = [0; 32];
    key.copy_from_slice(text);
    Ok(Key(key))
}

/// An X25519 agreement of a private key with a public key.
pub fn x25519(private: &Key, public: &[u8; 32]) -> Result<Key, Malformed> {
    const BAD: Malformed = Malformed("it holds an unusable X25519 key");
    let private = PrivateKey::from_private_key(&X25519, &private.0).map_err(|_| BAD)?;
    agree(&private, UnparsedPublicKey::new(&X25519, public), BAD, |shared| {
        let mut key = [0; 32];
        key.copy_from_slice(shared);
        Ok(Key(key))
    })
}

/// The public half of an X25519 private key.
pub fn x25519_public(private: &Key) -> [u8; 32] {
    let private = PrivateKey::from_private_key(&X25519, &private.0).expect("any 32 bytes are a private key");
    let public = private.compute_public_key().expect("any private key has a public half");
    public.as_ref().try_into().expect("32 bytes")
}
