//! Entry point that feeds arbitrary bytes to the parsers, for the fuzz target and for the property tests alike.

use crate::{
    format::{ObjectId, config::Config, envelope, envelope::Kind},
    index::segment::Clear,
    keys::{KeyRing, slot},
    manifest::{Page, page::PAGE_BYTES_MAX, point},
    pack::{
        Encoding, Footer, Header,
        codec::decompress,
        layout::{HEADER_BYTES, TAIL_BYTES},
    },
    store::s3::xml,
};

/// Every parser of bytes that a store, or a server in front of it, gives.
pub fn everything(bytes: &[u8]) {
    for kind in [Kind::Config, Kind::KeySlot, Kind::Point, Kind::Epoch, Kind::Lease, Kind::Hold] {
        let _ = envelope::parse(bytes, kind);
    }
    let _ = Config::decode(bytes);
    let _ = xml::list(bytes);
    let _ = xml::upload_id(bytes);
    let _ = xml::uploads(bytes);
    let _ = xml::newest_part(bytes);
    let _ = xml::failure(bytes);
    let _ = slot::describe("keys/00", bytes);
    let _ = Clear::decode(bytes);
    let _ = point::decode_attachments(bytes);
    let _ = KeyRing::decode(ObjectId([0; 16]), bytes);
    for level in 0..4 {
        if let Ok(page) = Page::decode(bytes, level) {
            assert!(page.encode().len() <= PAGE_BYTES_MAX);
        }
    }
    if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let _ = Header::decode(header);
    }
    if let Some(tail) = bytes.first_chunk::<TAIL_BYTES>() {
        let _ = Footer::decode(tail);
    }
    let mut out = Vec::new();
    for encoding in [Encoding::Plain, Encoding::Lz4, Encoding::Zstd] {
        if decompress(encoding, bytes, 5000, &mut out).is_ok() {
            assert_eq!(out.len(), 5000);
        }
    }
}
