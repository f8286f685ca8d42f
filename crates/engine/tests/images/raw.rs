//! Raw images, which are read without QEMU: holes, files that change under the reader, other users of the file.

use std::{
    fs::File,
    io::Read,
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Once,
    time::{Duration, Instant},
};

use virtward_engine::{BackupOptions, Cancel, DiskFormat, Error, Event, ImageSet, Observer, backup_images};
use virtward_model::{Bytes, RestorePoint};

use crate::common::*;

const MIB: u64 = 1 << 20;

/// Does something once, as soon as the first bytes were read.
struct Midway<F>(Once, F);

impl<F: Fn() + Send + Sync> Observer for Midway<F> {
    fn event(&self, _: &str, event: Event<'_>) {
        if let Event::Done { .. } = event {
            self.0.call_once(&self.1);
        }
    }
}

async fn back_up_while(bench: &Bench, path: &Path, midway: impl Fn() + Send + Sync) -> Result<RestorePoint, Error> {
    let set = ImageSet { name: "set".into(), files: vec![path.to_owned()], format: None };
    let observer = Midway(Once::new(), midway);
    backup_images(&bench.repo, &set, &BackupOptions::default(), &observer, &Cancel::default()).await
}

/// A file of that length with data at these places.
fn sparse(bench: &Bench, name: &str, length: u64, data: &[(u64, usize)]) -> PathBuf {
    let path = bench.path(name);
    let file = File::create(&path).unwrap();
    for (number, (at, bytes)) in data.iter().enumerate() {
        file.write_all_at(&noise(number as u64 + 1, *bytes), *at).unwrap();
    }
    file.set_len(length).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_are_not_read_and_come_back_as_holes() {
    let bench = Bench::new();
    let pieces: Vec<(u64, usize)> = (0..300).map(|n| (n * 3 * MIB / 4 + 4096 * (n % 7), 4096)).collect();
    for (name, length, data) in [
        ("hole-at-end.raw", 70 * MIB, vec![(0, 5000), (9 * MIB + 511, 3 << 20)]),
        ("hole-at-begin.raw", 64 * MIB, vec![(64 * MIB - 4096, 4096)]),
        ("odd-end.raw", 33 * MIB + 1001, vec![(5 * MIB, 1 << 20), (33 * MIB, 1001)]),
        ("odd-hole.raw", 33 * MIB + 1001, vec![(5 * MIB, 1 << 20)]),
        ("pieces.raw", 230 * MIB, pieces),
    ] {
        let source = sparse(&bench, name, length, &data);
        let point = bench.back_up(&source, None).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let (disk, written) = (&point.disks[0], data.iter().map(|(_, bytes)| *bytes as u64).sum::<u64>());
        assert_eq!((disk.size_bytes, &*disk.format), (length, "raw"), "{name}");
        assert!(disk.read_bytes >= written && disk.read_bytes <= allocated(&source) + 8192, "{name}: {disk:?}");
        assert!(disk.data_bytes >= written, "{name}: {disk:?}");
        let to = bench.path("out");
        bench.replace(point.id, &to, Some(DiskFormat::Raw)).await.unwrap();
        assert_eq!(to.metadata().unwrap().len(), length, "{name}");
        assert_same(&source, "raw", &to, "raw");
        assert!(allocated(&to) <= disk.data_bytes + 65536, "{name}: {}", allocated(&to));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_its_length_makes_no_restore_point() {
    let bench = Bench::new();
    // More than is in memory at once, so that something is read after the change.
    let content = noise(5, 48 << 20);
    for (name, length, words) in [("shrinks.raw", 40 * MIB, "shorter"), ("grows.raw", 49 * MIB, "written to")] {
        let source = bench.raw(name, &content);
        let change = || File::options().write(true).open(&source).unwrap().set_len(length).unwrap();
        let error = back_up_while(&bench, &source, change).await.unwrap_err();
        assert!(matches!(error, Error::SourceGone(_)), "{name}: {error}");
        let said = error.to_string();
        assert!(said.contains(words) && said.contains(name) && said.contains("nothing was published"), "{said}");
    }
    // What was cut off was read already, or a hole: it must not pass for zeros.
    let source = sparse(&bench, "cut.raw", 64 * MIB, &[(0, 1 << 20)]);
    let cut = || File::options().write(true).open(&source).unwrap().set_len(MIB).unwrap();
    let error = back_up_while(&bench, &source, cut).await.unwrap_err();
    assert!(matches!(error, Error::SourceGone(_)), "{error}");
    assert!(bench.repo.points().unwrap().points.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_is_read_no_machine_writes_to_it_but_others_may_read() {
    let bench = Bench::new();
    let source = bench.raw("disk.raw", &noise(5, 32 << 20));
    let other = bench.raw("other.raw", &noise(6, 1 << 20));
    let path = source.clone();
    let midway = move || {
        let said = output("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&path)]);
        let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        assert!(!said.status.success() && text.contains("lock"), "{text}");
        assert_same(&path, "raw", &path, "raw");
    };
    let point = back_up_while(&bench, &source, midway).await.unwrap();
    bench.restore(point.id, &bench.path("out.raw"), None).await.unwrap();
    assert!(std::fs::read(bench.path("out.raw")).unwrap() == noise(5, 32 << 20));
    // The lock ends with the backup.
    run("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&source)]);
    bench.back_up(&other, None).await.unwrap();
}

/// A process that has an image open for writing, as a running VM has.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_machine_writes_to_is_not_read() {
    let bench = Bench::new();
    let (image, socket) = (bench.raw("vm.raw", &noise(5, 1 << 20)), bench.path("sock"));
    let holder = Command::new("qemu-nbd")
        .args(["--persistent", "-f", "raw", "--socket", text(&socket), text(&image)])
        .spawn()
        .unwrap();
    let holder = Holder(holder);
    let deadline = Instant::now() + Duration::from_secs(60);
    // Its socket is there before it opens the image; it greets after.
    let greeted = || UnixStream::connect(&socket).and_then(|mut peer| peer.read_exact(&mut [0; 8]));
    while greeted().is_err() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    let error = bench.back_up(&image, None).await.unwrap_err();
    assert!(matches!(error, Error::Busy(_)) && error.to_string().contains("vm.raw"), "{error}");
    assert!(bench.repo.points().unwrap().points.is_empty());
    drop(holder);
    bench.back_up(&image, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_bandwidth_is_kept() {
    let bench = Bench::new();
    let source = bench.raw("a.raw", &noise(5, 4 << 20));
    let set = ImageSet { name: "set".into(), files: vec![source], format: None };
    let options = BackupOptions { bandwidth: Some(Bytes::mib(8)), ..BackupOptions::default() };
    let start = Instant::now();
    backup_images(&bench.repo, &set, &options, &virtward_engine::Silent, &Cancel::default()).await.unwrap();
    // The last of the four chunks begins after three eighths of a second.
    assert!(start.elapsed() >= Duration::from_millis(370), "{:?}", start.elapsed());
}
