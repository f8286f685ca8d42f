//! The envelope of every small object: clear JSON header, optional sealed body, keyless checksum.
//!
//! ```text
//! "VIRTWARD" · kind u8 · version u8 · 0 u16 · header_len u32 · body_len u32 · header · body · BLAKE3 of all before
//! ```
//! The AAD of a sealed body is everything before it, so the clear header cannot be exchanged.

use serde::{Deserialize, Serialize};

use super::{Cursor, Malformed, cursor::checked_body, cursor::push_checksum};
use crate::error::{Error, Result};

const MAGIC: &[u8] = b"VIRTWARD";
const VERSION: u8 = 1;
/// Upper bound of an enveloped object: a restore point with very many attachments stays far below.
pub const ENVELOPE_BYTES_MAX: u64 = 64 << 20;
const HEADER_BYTES_MAX: u32 = 64 << 10;
/// Bytes of an envelope before the header.
const PREFIX_BYTES: usize = 20;

/// What an envelope holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Kind {
    Config = 1,
    KeySlot = 2,
    Point = 3,
    Epoch = 4,
    Lease = 5,
    Hold = 6,
}

/// A parsed envelope.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// Header JSON.
    pub header: &'a [u8],
    /// Everything before the body.
    pub aad: &'a [u8],
    /// The body, sealed or empty.
    pub body: &'a [u8],
}

/// Begins an envelope: everything up to the body, whose length must be known (a sealed body is 16 longer than its text).
pub fn begin<H: Serialize>(kind: Kind, header: &H, body_len: usize) -> Vec<u8> {
    let json = serde_json::to_vec(header).expect("headers are plain data");
    let mut out = Vec::with_capacity(PREFIX_BYTES + json.len() + body_len + 32);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&[kind as u8, VERSION, 0, 0]);
    out.extend_from_slice(&(json.len() as u32).to_le_bytes());
    out.extend_from_slice(&(body_len as u32).to_le_bytes());
    out.extend_from_slice(&json);
    out
}

/// Ends an envelope with its body and checksum.
pub fn finish(mut prefix: Vec<u8>, body: &[u8]) -> Vec<u8> {
    prefix.extend_from_slice(body);
    push_checksum(&mut prefix);
    prefix
}

/// Parses an envelope and checks its checksum.
pub fn parse(bytes: &[u8], kind: Kind) -> Result<Envelope<'_>, ParseError> {
    let mut at = Cursor::new(bytes);
    at.expect(MAGIC, "it does not begin as an object of a repository")?;
    let (found_kind, version) = (at.u8()?, at.u8()?);
    at.u16()?;
    let (header_len, body_len) = (at.u32()?, at.u32()?);
    let all = checked_body(bytes)?;
    if version != VERSION {
        return Err(ParseError::Newer(version));
    }
    if found_kind != kind as u8 {
        return Err(Malformed("it is an object of another kind").into());
    }
    if header_len > HEADER_BYTES_MAX {
        return Err(Malformed("its header is too long").into());
    }
    let mut at = Cursor::new(&all[PREFIX_BYTES.min(all.len())..]);
    let header = at.take(header_len as usize)?;
    let body = at.take(body_len as usize)?;
    at.end()?;
    Ok(Envelope { header, aad: &all[..PREFIX_BYTES + header_len as usize], body })
}

/// Why an envelope does not parse.
#[derive(Clone, Copy, Debug)]
pub enum ParseError {
    /// Damaged.
    Malformed(Malformed),
    /// Intact, but of a newer version.
    Newer(u8),
}

impl From<Malformed> for ParseError {
    fn from(e: Malformed) -> Self {
        Self::Malformed(e)
    }
}

impl ParseError {
    /// Names the object.
    pub fn at(self, object: impl Into<String>) -> Error {
        match self {
            Self::Malformed(e) => e.at(object),
            Self::Newer(found) => {
                Error::NewerFormat { object: object.into(), found: found.into(), supported: VERSION.into() }
            }
        }
    }
}

impl Envelope<'_> {
    /// Decodes the header.
    pub fn header<H: for<'de> Deserialize<'de>>(&self) -> Result<H, Malformed> {
        serde_json::from_slice(self.header).map_err(|_| Malformed("its header does not decode"))
    }
}
