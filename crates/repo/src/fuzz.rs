//! Entry point that feeds arbitrary bytes to the parsers, for the fuzz target and for the property tests alike.

use crate::{
    format::{ObjectId, config::Config, cursor::push_checksum, envelope, envelope::Kind, names},
    hold,
    index::segment::{Clear, IndexEntry},
    keys::{KeyRing, slot},
    lease::{Beat, Epoch},
    manifest::{Page, overlay, page::PAGE_BYTES_MAX, point, point::PointRecord, tree::Tree},
    pack::{
        Encoding, Footer, Header,
        codec::{Compression, decompress},
        layout::{ENTRY_BYTES, HEADER_BYTES, TAIL_BYTES, parse_table},
    },
    store::s3::{any_location, xml},
};

/// Every parser of bytes that a store, or a server in front of it, gives.
pub fn everything(bytes: &[u8]) {
    objects(bytes);
    // Most stop at a checksum that no fuzzer guesses, so each has the bytes with the right ones as well.
    objects(&summed(bytes));
    let _ = Clear::decode_intact(bytes);
    if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let _ = Header::decode(header);
        let _ = Header::decode(&header_summed(header));
    }
    if let Some(tail) = bytes.first_chunk::<TAIL_BYTES>() {
        let _ = Footer::decode(tail);
        let _ = Footer::decode_intact(tail);
    }
    contents(bytes);
    let mut out = Vec::new();
    for encoding in [Encoding::Plain, Encoding::Lz4, Encoding::Zstd] {
        if decompress(encoding, bytes, 5000, &mut out).is_ok() {
            assert_eq!(out.len(), 5000);
        }
    }
}

fn objects(bytes: &[u8]) {
    for kind in [Kind::Config, Kind::KeySlot, Kind::Point, Kind::Epoch, Kind::Lease, Kind::Hold] {
        if let Ok(envelope) = envelope::parse(bytes, kind) {
            assert_eq!(envelope.aad.len() + envelope.body.len() + 32, bytes.len());
        }
    }
    let _ = Config::decode(bytes);
    let _ = slot::describe("keys/00", bytes);
    let _ = Clear::decode(bytes);
}

/// The bytes with the checksum behind them that an object ends with.
fn summed(bytes: &[u8]) -> Vec<u8> {
    let mut whole = bytes.to_vec();
    push_checksum(&mut whole);
    whole
}

fn header_summed(header: &[u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    let mut header = *header;
    let (fields, sum) = header.split_at_mut(HEADER_BYTES - 16);
    sum.copy_from_slice(&blake3::hash(fields).as_bytes()[..16]);
    header
}

/// What is behind a seal, and texts of others: no checksum stands before these parsers.
pub fn contents(bytes: &[u8]) {
    opened(bytes);
    words(bytes);
}

/// Whoever holds a key can have written anything.
fn opened(bytes: &[u8]) {
    let _ = point::decode_attachments(bytes);
    if let Ok(record) = serde_json::from_slice::<PointRecord>(bytes)
        && record.check(record.point.id).is_ok()
    {
        let disks = record.point.disks.iter();
        let sizes =
            disks.map(|disk| Tree::parse(&disk.root, disk.size_bytes, disk.chunk_bytes).map(|tree| tree.level()));
        assert!(sizes.flatten().all(|level| level <= 3));
    }
    if let Ok(epoch) = serde_json::from_slice::<Epoch>(bytes) {
        assert_eq!(epoch.sentences().count(), epoch.condemned.len());
    }
    let _ = serde_json::from_slice::<Beat>(bytes);
    hold::any_body(bytes);
    let _ = KeyRing::decode(ObjectId([0; 16]), bytes);
    for level in 0..4 {
        if let Ok(page) = Page::decode(bytes, level) {
            assert!(page.encode().len() <= PAGE_BYTES_MAX);
        }
    }
    let mut chunk = vec![0; 5000];
    let _ = overlay::apply(bytes, &mut chunk);
    assert_eq!(chunk.len(), 5000);
    if let Some((offset, table)) = bytes.split_first_chunk()
        && let Ok(entries) = parse_table(table, u32::from_le_bytes(*offset))
    {
        assert_eq!(entries.len() * ENTRY_BYTES, table.len());
    }
    if let Some(row) = bytes.first_chunk()
        && let Ok(entry) = IndexEntry::decode(row, 7)
    {
        let mut again = Vec::new();
        entry.push(&mut again);
        assert_eq!(again, row);
    }
}

/// Answers of an object store, names of objects, files of credentials.
fn words(bytes: &[u8]) {
    let _ = xml::list(bytes);
    let _ = xml::upload_id(bytes);
    let _ = xml::uploads(bytes);
    let _ = xml::newest_part(bytes);
    let _ = xml::failure(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = names::parse_pack(text);
    let _ = text.parse::<Compression>();
    let _ = Tree::parse(text, u64::MAX, 1 << 20);
    any_location(text);
}
