//! `tests/reader`, a reader in another language, written from `docs/format.md` alone, reads what this crate writes.
//!
//! If it cannot, either the page or the code is wrong. Needs Debian's Python with the packages that the script names.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use virtward_model::{DiskRecord, PointId};
use virtward_repo::{Compression, DiskSpec, InitOptions, KdfCost, Repository, Secret, WriterOptions, store};

use crate::{common::*, format1};

/// A repository in a directory, with files that hold its secrets.
struct Place {
    dir: tempfile::TempDir,
    repository: PathBuf,
}

impl Place {
    fn new(repository: Option<PathBuf>, password: &str, key: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("password"), format!("{password}\n")).unwrap();
        std::fs::write(dir.path().join("key"), key).unwrap();
        let repository = repository.unwrap_or_else(|| dir.path().join("repository"));
        Self { dir, repository }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, secret: &str, arguments: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reader/virtward_reader.py");
        let file = self.path(secret.trim_start_matches("--").trim_end_matches("-file"));
        // Debian's own, which has Debian's packages.
        let mut command = Command::new("/usr/bin/python3");
        command.arg("-B").arg(script).arg(secret).arg(file).arg(&self.repository).args(arguments);
        command.output().expect("/usr/bin/python3 (scripts/setup.sh lab)")
    }

    /// What the reader makes of every disk of every restore point must be these images in order. The key file opens
    /// the same keys, so it need not read everything again.
    fn assert_reads(&self, images: &[(&str, &[u8])]) {
        for (secret, count) in [("--password-file", images.len()), ("--key-file", 1)] {
            let listed = good(&self.read(secret, &["list"]));
            let points: Vec<serde_json::Value> =
                listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let disks: Vec<(&str, &str)> = points
                .iter()
                .flat_map(|point| point["disks"].as_array().unwrap().iter().map(move |disk| (point, disk)))
                .map(|(point, disk)| (point["id"].as_str().unwrap(), disk["target"].as_str().unwrap()))
                .collect();
            assert_eq!(
                disks.iter().map(|disk| disk.1).collect::<Vec<_>>(),
                images.iter().map(|i| i.0).collect::<Vec<_>>()
            );
            for ((point, target), (_, image)) in disks.into_iter().zip(images).take(count) {
                let to = self.path("restored");
                good(&self.read(secret, &["restore", &point[..20], target, to.to_str().unwrap()]));
                assert!(std::fs::read(&to).unwrap() == *image, "{target} of {point} with {secret}");
                std::fs::remove_file(&to).unwrap();
            }
        }
    }
}

fn good(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn it_restores_what_the_first_release_wrote() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format1");
    let [first, second] = format1::images();
    Place::new(Some(fixture), "fixture", format1::KEY_FILE).assert_reads(&[("vda", &first), ("vda", &second)]);
}

/// Backs up two disks: `vda` over what it was before, and one of zeros.
fn back_up(
    repo: &Repository,
    image: &[u8],
    base: Option<&DiskRecord>,
    compression: Compression,
) -> (PointId, DiskRecord) {
    let writer = repo.writer(WriterOptions { compression, ..small() }).unwrap();
    let spec = DiskSpec { size_bytes: image.len() as u64, chunk_bytes: CHUNK, base: base.cloned() };
    let disk = writer.disk(spec).unwrap();
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        let changes = index == 2 || index >= 300;
        if base.is_none() || changes {
            disk.put(index as u64, chunk.to_vec()).unwrap();
        }
    }
    let record = disk_record("vda", image.len() as u64, CHUNK, &disk.finish().unwrap());
    let empty = writer.disk(DiskSpec { size_bytes: 700_001, chunk_bytes: CHUNK, base: None }).unwrap();
    empty.put_zero(0, 3).unwrap();
    let empty = disk_record("vdb", 700_001, CHUNK, &empty.finish().unwrap());
    let point = point("vm", vec![record.clone(), empty]);
    let id = point.id;
    writer.publish(point, attachments()).unwrap();
    (id, record)
}

#[test]
fn it_restores_increments_in_every_encoding_with_every_kind_of_key() {
    let chunk = CHUNK as usize;
    let zeros = vec![0; 700_001];
    // Two levels of pages: data of every kind, much nothing, data again, an odd end.
    let mut first = noise(1, 3 * chunk);
    first.resize(299 * chunk, 0);
    first.extend_from_slice(&noise(2, chunk));
    first.extend_from_slice(b"end");
    let mut second = first.clone();
    second[2 * chunk..3 * chunk].fill(b'x');
    second.truncate(300 * chunk + 1);
    second[300 * chunk] = 1;
    let mut third = second.clone();
    third[2 * chunk..3 * chunk].copy_from_slice(&noise(3, chunk));
    third.extend_from_slice(&noise(4, 70_000));
    for sealed in [false, true] {
        let place = Place::new(None, "pässword", &[7; 64]);
        let store = store::open(place.repository.to_str().unwrap()).unwrap();
        let options = InitOptions { kdf: KdfCost::weak_for_tests(), label: "password".into(), sealed };
        let repo = Repository::init(store, &Secret::password("pässword"), &options).unwrap();
        repo.add_key(&Secret::key_bytes(vec![7; 64]).unwrap(), "file", options.kdf).unwrap();
        let (_, base) = back_up(&repo, &first, None, Compression::Zstd(1));
        let (_, base) = back_up(&repo, &second, Some(&base), Compression::Lz4);
        let (last, _) = back_up(&repo, &third, Some(&base), Compression::Off);
        let images = [
            ("vda", &*first),
            ("vdb", &*zeros),
            ("vda", &*second),
            ("vdb", &*zeros),
            ("vda", &*third),
            ("vdb", &*zeros),
        ];
        place.assert_reads(&images);
        assert_refuses_damage(&place, &last.to_string(), sealed);
    }
}

/// A wrong secret and a flipped byte are refused in words, not with a wrong image.
fn assert_refuses_damage(place: &Place, point: &str, sealed: bool) {
    std::fs::write(place.path("key"), [8; 64]).unwrap();
    let said = place.read("--key-file", &["list"]);
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("no key slot opens"), "{said:?}");
    for pack in walk(&place.repository.join("data")) {
        let mut bytes = std::fs::read(&pack).unwrap();
        bytes[300] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    }
    let to = place.path("damaged");
    let said = place.read("--password-file", &["restore", point, "vda", to.to_str().unwrap()]);
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(!said.status.success() && words.contains("fails authentication"), "sealed {sealed}: {words}");
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn it_restores_chunks_that_were_written_over() {
    let place = Place::new(None, "words", &[3; 40]);
    let options = InitOptions { kdf: KdfCost::weak_for_tests(), ..InitOptions::default() };
    let store = store::open(place.repository.to_str().unwrap()).unwrap();
    let repo = Repository::init(store, &Secret::password("words"), &options).unwrap();
    repo.add_key(&Secret::key_bytes(vec![3; 40]).unwrap(), "file", options.kdf).unwrap();
    let mut states = vec![noise(1, 3 * CHUNK as usize + 9000)];
    let mut base = crate::common::back_up(&repo, "web1", &states[0]).unwrap();
    for (step, grown) in [0, 0, 50_000].into_iter().enumerate() {
        let before = states.last().unwrap().clone();
        let mut image = before.clone();
        image[300_000 + step * 6000..][..9000].copy_from_slice(&noise(7 + step as u64, 9000));
        image.resize(image.len() + grown, 0);
        base = back_up_parts(&repo, "web1", &image, &base.disks[0], &before).unwrap().0;
        states.push(image);
    }
    let images: Vec<(&str, &[u8])> = states.iter().map(|image| ("vda", &image[..])).collect();
    place.assert_reads(&images);
}
