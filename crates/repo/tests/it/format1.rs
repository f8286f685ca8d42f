//! Repositories written by the first release restore for ever.
//!
//! `tests/fixtures/format1` was written once by [`write_repository`] (run with `VIRTWARD_WRITE_FIXTURE=<directory>`) and is
//! never written again: if this test fails, the code is wrong, not the fixture.

use std::{path::Path, sync::Arc};

use virtward_repo::{
    Attachment, Compression, DiskSpec, InitOptions, KdfCost, Repository, Secret, Store, WriterOptions, store,
};

use crate::common::*;

pub const KEY_FILE: &[u8] = b"key file of the fixture, 32 bytes or more";

fn password() -> Secret {
    Secret::password("fixture")
}

/// First state: text, noise, zeros, repetition and a short end. Second state: longer, with other text in between.
pub fn images() -> [Vec<u8>; 2] {
    let chunk = CHUNK as usize;
    let text: Vec<u8> = (0..).flat_map(|n: u32| format!("line {n}\n").into_bytes()).take(chunk).collect();
    let mut first = text.clone();
    first.resize(3 * chunk, 0);
    first.extend_from_slice(&text);
    first.extend((0..2000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8));
    let mut second = first.clone();
    second.resize(300 * chunk + 5, 0);
    second[2 * chunk..3 * chunk].fill(b'x');
    second[300 * chunk] = 1;
    [first, second]
}

fn fixture_attachments() -> Vec<Attachment> {
    vec![
        Attachment { name: "domain.xml".into(), bytes: b"<domain type='kvm'/>".to_vec() },
        Attachment { name: "nvram".into(), bytes: vec![] },
    ]
}

fn write_repository(place: &Path) {
    let store = store::open(place.to_str().unwrap()).unwrap();
    let kdf = KdfCost { memory_kib: 64, passes: 2, lanes: 1 };
    let options = InitOptions { kdf, label: "password".into(), sealed: false };
    let repo = Repository::init(store, &password(), &options).unwrap();
    repo.add_key(&Secret::key_bytes(KEY_FILE.to_vec()).unwrap(), "file", options.kdf).unwrap();
    let mut base = None;
    for (image, compression) in images().iter().zip([Compression::Zstd(3), Compression::Lz4]) {
        let writer = repo.writer(WriterOptions { compression, ..small() }).unwrap();
        let size_bytes = image.len() as u64;
        let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: base.clone() }).unwrap();
        for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
            if base.is_none() || [2, 300].contains(&index) {
                disk.put(index as u64, chunk.to_vec()).unwrap();
            }
        }
        let record = disk_record("vda", size_bytes, CHUNK, &disk.finish().unwrap());
        base = Some(record.clone());
        writer.publish(point("fixture", vec![record]), fixture_attachments()).unwrap();
    }
}

fn assert_restores(place: &Path) {
    for secret in [password(), Secret::key_bytes(KEY_FILE.to_vec()).unwrap()] {
        let store: Arc<dyn Store> = store::open(place.to_str().unwrap()).unwrap();
        let repo = Repository::open(store, &secret).unwrap();
        let points = repo.points().unwrap();
        assert!(points.unreadable.is_empty() && points.points.len() == 2, "{points:?}");
        for (point, image) in points.points.iter().zip(images()) {
            assert!(restore(&repo, &point.disks[0]).unwrap() == image);
            assert_eq!(repo.attachments(point.id).unwrap(), fixture_attachments());
        }
        assert!(repo.check(&()).unwrap().is_ok());
        assert!(repo.verify(&Default::default(), &()).unwrap().is_ok());
    }
}

#[test]
fn the_first_release_restores() {
    assert_restores(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format1"));
}

#[test]
fn what_made_the_fixture_still_works() {
    let dir = tempfile::tempdir().unwrap();
    let place = std::env::var_os("VIRTWARD_WRITE_FIXTURE").map_or_else(|| dir.path().join("repo"), Into::into);
    write_repository(&place);
    assert_restores(&place);
}
