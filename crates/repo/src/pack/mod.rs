//! Packs: immutable objects of many sealed records.
//!
//! `layout` is the bytes, `codec` turns a chunk into a record and back, `append` writes packs from many threads at once,
//! `read` takes them apart. Not here: which chunks exist (`index`) or are wanted (`manifest`).

pub mod append;
pub mod codec;
pub mod layout;
pub mod read;

use crate::{
    format::{Malformed, ObjectId, names},
    keys::Class,
};
pub use layout::{Encoding, Entry, Footer, Header};

/// What a pack holds, and so which key opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PackClass {
    /// Chunks of disks and attachments.
    Data = 1,
    /// Manifest pages.
    Meta = 2,
}

impl PackClass {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Result<Self, Malformed> {
        match byte {
            1 => Ok(Self::Data),
            2 => Ok(Self::Meta),
            _ => Err(Malformed("it is a pack of an unknown class")),
        }
    }
    /// Class of the key that wraps the pack's key.
    pub fn key_class(self) -> Class {
        match self {
            Self::Data => Class::Data,
            Self::Meta => Class::Metadata,
        }
    }
    /// Where such packs live.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Data => names::DATA,
            Self::Meta => names::META,
        }
    }
    /// Name of a pack.
    pub fn name(self, id: &ObjectId) -> String {
        names::pack(self.prefix(), id)
    }
}

/// A finished pack, as index segments list it.
#[derive(Clone, Debug)]
pub struct PackInfo {
    /// The header, so that nobody needs to fetch it.
    pub header: Header,
    /// The footer: lengths, and BLAKE3 of the ciphertext.
    pub footer: Footer,
}

impl PackInfo {
    /// Identity.
    pub fn id(&self) -> ObjectId {
        self.header.pack
    }
    /// Length of the object.
    pub fn bytes(&self) -> u64 {
        self.footer.pack_bytes()
    }
    /// Bytes of the records in it.
    pub fn record_bytes(&self) -> u64 {
        u64::from(self.footer.table_offset).saturating_sub(layout::HEADER_BYTES as u64)
    }
    /// Name of the object.
    pub fn name(&self) -> String {
        self.header.name()
    }
}
