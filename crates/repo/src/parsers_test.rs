//! Every parser against garbage: bytes at random, and valid objects with bytes changed and checksums made right again.

use proptest::prelude::*;

use crate::{
    crypto::Key,
    format::{ChunkId, ObjectId, config::Config, cursor::push_checksum},
    fuzz::{contents, everything},
    index::segment::{self, IndexEntry},
    keys::{KdfCost, KeyRing, Secret, ring::Class, slot},
    lease::{Beat, Epoch},
    manifest::{Page, Ref, overlay, point, point::PointRecord},
    pack::{
        Encoding, Entry, Footer, Header, PackClass, PackInfo,
        codec::{Compression, Compressor, decompress},
        layout::{HEADER_BYTES, TAIL_BYTES, parse_table},
    },
    store::s3::xml,
};

fn entry(id: u8) -> Entry {
    Entry { id: ChunkId([id; 32]), offset: 256, stored: 116, plain: 500, encoding: Encoding::Zstd }
}

/// One valid object of each kind whose clear part is parsed.
fn valid() -> Vec<Vec<u8>> {
    let config = Config::new();
    let ring = KeyRing::generate(config.repository);
    let (_, slot) =
        slot::create(ObjectId::random(), &config, &ring, &Secret::password("x"), "l", KdfCost::weak_for_tests())
            .unwrap();
    let (header, _) = Header::create(&ring, PackClass::Data, ObjectId::random(), 3).unwrap();
    let footer = Footer { table_offset: 372, table_bytes: 56, records: 1, sum: [1; 32] };
    let info = PackInfo { header: header.clone(), footer };
    let entries = vec![IndexEntry { pack: 0, entry: entry(1) }];
    let (_, segment) = segment::encode(&ring, (ObjectId::random(), 3), &[info], &[config.repository], entries).unwrap();
    let refs = (0..200).map(|n| (n % 3 == 0).then_some(Ref::page(ChunkId([n as u8; 32]), 2))).collect();
    let attachments = [point::Attachment { name: "domain.xml".into(), bytes: vec![1; 50] }];
    vec![
        config.encode(),
        slot,
        header.bytes().to_vec(),
        footer.encode(&header).to_vec(),
        segment,
        Page::new(1, refs).unwrap().encode(),
        point::encode_attachments(&attachments),
        ring.encode().to_vec(),
    ]
}

/// Makes the checksums that an object of this length may have right again, so that parsing goes on behind them.
fn repair(bytes: &mut Vec<u8>) {
    if bytes.len() == HEADER_BYTES || bytes.len() == TAIL_BYTES {
        let at = HEADER_BYTES - 16;
        let sum = blake3::hash(&bytes[..at]);
        bytes[at..HEADER_BYTES].copy_from_slice(&sum.as_bytes()[..16]);
    }
    if bytes.len() == TAIL_BYTES {
        let at = TAIL_BYTES - 24;
        let sum = blake3::hash(&bytes[..at]);
        bytes[at..at + 16].copy_from_slice(&sum.as_bytes()[..16]);
    } else if bytes.len() > 32 && bytes.len() != HEADER_BYTES {
        bytes.truncate(bytes.len() - 32);
        push_checksum(bytes);
    }
}

/// The fuzzer's seeds: contents that the parsers understand.
fn seeds() -> Vec<Vec<u8>> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/contents");
    let mut seeds: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    seeds.sort();
    seeds.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn contents_that_were_cut_or_changed_anywhere_are_refused_or_bounded() {
    let seeds = seeds();
    assert!(seeds.len() > 10, "{}", seeds.len());
    for seed in seeds {
        contents(&seed);
        for at in 0..seed.len() {
            contents(&seed[..at]);
            for with in [0, 1, 0x7f, 0xff, b'9', b'"', b'-', seed[at] ^ 1] {
                let mut bytes = seed.clone();
                bytes[at] = with;
                contents(&bytes);
            }
        }
    }
}

/// A seed that is not understood sows nothing.
#[test]
fn the_seeds_of_contents_are_what_they_are_called() {
    let seed =
        |name: &str| std::fs::read(format!("{}/../../fuzz/seeds/contents/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let record: PointRecord = serde_json::from_slice(&seed("point")).unwrap();
    record.check(record.point.id).unwrap();
    serde_json::from_slice::<Epoch>(&seed("epoch")).unwrap();
    serde_json::from_slice::<Beat>(&seed("beat")).unwrap();
    overlay::apply(&seed("overlay"), &mut [0; 200]).unwrap();
    let table = seed("table");
    assert_eq!(parse_table(&table[4..], 372).unwrap().len(), 1);
    IndexEntry::decode(seed("entry").first_chunk().unwrap(), 1).unwrap();
    point::decode_attachments(&seed("attachments")).unwrap();
    Page::decode(&seed("page"), 0).unwrap();
    KeyRing::decode(ObjectId([0; 16]), &seed("keys")).unwrap();
    assert_eq!(xml::list(&seed("list")).unwrap().objects.len(), 1);
    assert!(xml::failure(&seed("error")).is_some());
}

proptest! {
    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        everything(&bytes);
    }

    #[test]
    fn changed_objects_are_refused_or_bounded(
        which in 0usize..8,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = valid()[which].clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        everything(&bytes);
        repair(&mut bytes);
        everything(&bytes);
    }

    #[test]
    fn chunks_survive_every_compression(chunk in prop::collection::vec(0u8..4, 0..3000), level in -5i32..4) {
        let (mut packed, mut out) = (Vec::new(), Vec::new());
        for mode in [Compression::Off, Compression::Lz4, Compression::Zstd(level)] {
            let encoding = Compressor::new(mode).compress(&chunk, &mut packed);
            decompress(encoding, &packed, chunk.len() as u32, &mut out).unwrap();
            prop_assert_eq!(&out, &chunk);
            prop_assert!(packed.len() <= chunk.len());
        }
    }

    #[test]
    fn pages_round_trip(level in 0u8..4, refs in prop::collection::vec(prop::option::of(any::<[u8; 32]>()), 0..=256)) {
        let refs = refs.into_iter().map(|id| id.map(|id| Ref::chunk(ChunkId(id)))).collect();
        if let Some(page) = Page::new(level, refs) {
            prop_assert_eq!(Page::decode(&page.encode(), level).unwrap(), page);
        }
    }
}

#[test]
fn both_wrappings_and_both_ciphers_round_trip() {
    use crate::crypto::Cipher;
    let repository = ObjectId::random();
    for ring in [KeyRing::generate(repository), KeyRing::generate_sealing(repository)] {
        let again = KeyRing::decode(repository, &ring.encode()).unwrap();
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            let key = Key::random();
            let wrapped = ring.wrap(Class::Data, cipher, b"pack", &key).unwrap();
            let unwrap = |ring: &KeyRing, aad: &[u8]| ring.unwrap(Class::Data, cipher, aad, &wrapped, "p");
            assert!(unwrap(&again, b"pack").unwrap().0 == key.0);
            assert!(unwrap(&again, b"other").is_err());
            assert!(unwrap(&KeyRing::generate(repository), b"pack").is_err());
            assert!(unwrap(&ring.write_only(), b"pack").is_err());
        }
    }
}
