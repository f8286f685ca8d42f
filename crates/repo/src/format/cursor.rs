//! A bounded reader over bytes from the store, and the matching appenders.

use crate::error::Error;

/// Why bytes do not parse. Becomes [`Error::Damaged`] once the object is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl Malformed {
    /// Names the object.
    pub fn at(self, object: impl Into<String>) -> Error {
        Error::damaged(object, self.0)
    }
}

/// Reads little-endian fields from the front of a slice.
#[derive(Clone, Debug)]
pub struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    /// Over the whole slice.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Malformed("it ends too early"))?;
        self.0 = tail;
        Ok(head)
    }
    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed("it ends too early"))?;
        self.0 = tail;
        Ok(*head)
    }
    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[b]| b)
    }
    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }
    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }
    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }
    /// Checks a fixed byte string.
    pub fn expect(&mut self, magic: &[u8], otherwise: &'static str) -> Result<(), Malformed> {
        if self.take(magic.len())? == magic { Ok(()) } else { Err(Malformed(otherwise)) }
    }
    /// Bytes not read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }
    /// Checks that nothing is left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("it has bytes after its end")) }
    }
}

/// Checks the 32-byte BLAKE3 at the end of an object and returns what it covers. Needs no key.
pub fn checked_body(bytes: &[u8]) -> Result<&[u8], Malformed> {
    let (body, sum) = bytes.split_last_chunk::<32>().ok_or(Malformed("it is too short"))?;
    // A checksum against accidents, not against forgers: equality need not be constant-time.
    if blake3::hash(body).as_bytes() == sum { Ok(body) } else { Err(Malformed("its checksum does not match")) }
}

/// Appends the BLAKE3 of everything so far.
pub fn push_checksum(bytes: &mut Vec<u8>) {
    let sum = blake3::hash(bytes);
    bytes.extend_from_slice(sum.as_bytes());
}
