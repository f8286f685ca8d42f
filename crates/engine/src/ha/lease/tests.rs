//! On the file system of the tests and on a loop device.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

fn claim(vm: Uuid, generation: u64, host: &str) -> Claim {
    Claim { vm, generation, epoch: 7, host: host.into() }
}

/// A loop device on a file, or a file in its place where there is none.
struct Disk {
    path: PathBuf,
    attached: bool,
    _dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
        let attached = Command::new("losetup").args(["-f", "--show"]).arg(&file).stderr(Stdio::null()).output();
        match attached {
            Ok(output) if output.status.success() => {
                Self { path: String::from_utf8(output.stdout).unwrap().trim().into(), attached: true, _dir: dir }
            }
            _ => Self { path: file, attached: false, _dir: dir },
        }
    }

    fn seen_by(&self, host: u32, region: u32) -> Place {
        Place::Device { path: self.path.clone(), region, host }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.attached {
            let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
        }
    }
}

/// The same storage as hosts h1 and h2 see it.
async fn life_of_a_lease(h1: Place, h2: Place) {
    let vm = Uuid::new_v4();
    assert_eq!(read(&h1, vm, LIMIT).await.unwrap(), None);
    take(std::slice::from_ref(&h1), &claim(vm, 3, "h1"), LIMIT).await.unwrap();
    let seen = read(&h2, vm, LIMIT).await.unwrap().unwrap();
    assert_eq!((seen.generation, seen.epoch, seen.host.as_str(), seen.seq, seen.released), (3, 7, "h1", 1, false));
    renew(std::slice::from_ref(&h1), &claim(vm, 3, "h1"), LIMIT).await.unwrap();
    assert_eq!(read(&h2, vm, LIMIT).await.unwrap().unwrap().seq, 2);

    // h1 is dead; h2 claims the next generation. h1's late writes change nothing, and its renewal is refused.
    take(std::slice::from_ref(&h2), &claim(vm, 4, "h2"), LIMIT).await.unwrap();
    let late = renew(std::slice::from_ref(&h1), &claim(vm, 3, "h1"), LIMIT).await.unwrap_err();
    assert!(matches!(&late, Error::Newer { found, claimed: 3, .. } if found.generation == 4), "{late}");
    let Claim { generation, epoch, host, .. } = claim(vm, 3, "h1");
    h1.write_own(&Record { vm, generation, epoch, host, seq: 99, released: false }).unwrap();
    assert_eq!(read(&h1, vm, LIMIT).await.unwrap().unwrap().host, "h2");

    // A restored store gives out an old generation, or the same one to another host.
    let old = take(std::slice::from_ref(&h1), &claim(vm, 2, "h1"), LIMIT).await.unwrap_err();
    assert!(matches!(old, Error::Newer { .. }) && old.to_string().contains("generation 4 of h2"), "{old}");
    let twice = take(std::slice::from_ref(&h1), &claim(vm, 4, "h1"), LIMIT).await.unwrap_err();
    assert!(matches!(twice, Error::Twice { .. }), "{twice}");

    release(std::slice::from_ref(&h2), &claim(vm, 4, "h2"), LIMIT).await.unwrap();
    assert!(read(&h1, vm, LIMIT).await.unwrap().unwrap().released);
    take(std::slice::from_ref(&h1), &claim(vm, 5, "h1"), LIMIT).await.unwrap();
    clear(std::slice::from_ref(&h1), vm, LIMIT).await.unwrap();
    assert_eq!(read(&h2, vm, LIMIT).await.unwrap(), None);
}

#[tokio::test]
async fn a_lease_on_a_directory_goes_from_host_to_host() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Directory(dir.path().to_owned());
    life_of_a_lease(place.clone(), place).await;
    // Storage without direct I/O.
    if let Ok(memory) = tempfile::tempdir_in("/dev/shm") {
        let place = Place::Directory(memory.path().to_owned());
        life_of_a_lease(place.clone(), place).await;
    }
}

#[tokio::test]
async fn a_lease_on_a_device_goes_from_host_to_host() {
    let disk = Disk::new();
    life_of_a_lease(disk.seen_by(0, 3), disk.seen_by(63, 3)).await;
    let vm = Uuid::new_v4();
    let wrong = take(&[disk.seen_by(64, 0)], &claim(vm, 1, "h65"), LIMIT).await.unwrap_err();
    assert!(wrong.to_string().contains("below 64"), "{wrong}");
    // The region of another VM.
    take(&[disk.seen_by(0, 0)], &claim(vm, 1, "h1"), LIMIT).await.unwrap();
    let mixed = take(&[disk.seen_by(1, 0)], &claim(Uuid::new_v4(), 1, "h2"), LIMIT).await.unwrap_err();
    assert!(matches!(&mixed, Error::Damaged { why, .. } if why.contains(&vm.to_string())), "{mixed}");
}

fn own_file(root: &Path, vm: Uuid, host: &str) -> PathBuf {
    root.join(".virtward-lease").join(vm.to_string()).join(host)
}

#[tokio::test]
async fn a_torn_write_leaves_the_record_before_it_and_damage_is_never_taken_for_freedom() {
    let dir = tempfile::tempdir().unwrap();
    let (place, vm) = ([Place::Directory(dir.path().to_owned())], Uuid::new_v4());
    for generation in [1, 2] {
        take(&place, &claim(vm, generation, "h1"), LIMIT).await.unwrap();
    }
    // Generation 3 would have gone over generation 1, in the first block; half of it arrived.
    let file = fs::OpenOptions::new().write(true).open(own_file(dir.path(), vm, "h1")).unwrap();
    file.write_all_at(&[0xa5; 2048], 100).unwrap();
    assert_eq!(read(&place[0], vm, LIMIT).await.unwrap().unwrap().generation, 2);
    take(&place, &claim(vm, 3, "h1"), LIMIT).await.unwrap();
    assert_eq!(read(&place[0], vm, LIMIT).await.unwrap().unwrap().generation, 3);
    // Every single bit of a record counts.
    let whole = fs::read(own_file(dir.path(), vm, "h1")).unwrap();
    for at in [0, 8, 12, 16, 47, 48, 100] {
        let mut bad = whole[..4096].to_vec();
        bad[at] ^= 1;
        assert!(matches!(block::decode(&bad), block::Content::Damaged(_)), "byte {at}");
    }
    file.write_all_at(&[0xa5; 8192], 0).unwrap();
    let error = take(&place, &claim(vm, 9, "h2"), LIMIT).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }) && error.to_string().contains("clear"), "{error}");
    clear(&place, vm, LIMIT).await.unwrap();
    take(&place, &claim(vm, 9, "h2"), LIMIT).await.unwrap();
}

#[tokio::test]
async fn all_storages_are_looked_at_before_one_is_written() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, two) = (Place::Directory(a.path().to_owned()), Place::Directory(b.path().to_owned()));
    let vm = Uuid::new_v4();
    take(std::slice::from_ref(&two), &claim(vm, 8, "h2"), LIMIT).await.unwrap();
    assert!(matches!(take(&[one.clone(), two], &claim(vm, 5, "h1"), LIMIT).await, Err(Error::Newer { .. })));
    assert_eq!(read(&one, vm, LIMIT).await.unwrap(), None);
    // A storage that is not mounted is no empty one.
    let gone = Place::Directory(a.path().join("not-mounted"));
    assert!(matches!(take(&[one.clone(), gone], &claim(vm, 9, "h1"), LIMIT).await, Err(Error::Io { .. })));
    assert_eq!(read(&one, vm, LIMIT).await.unwrap(), None);
    assert!(take(&[one], &claim(vm, 9, "../h1"), LIMIT).await.is_err());
}

#[tokio::test]
async fn storage_that_hangs_is_given_up_in_time_and_not_asked_again_while_it_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let (place, vm) = (Place::Directory(dir.path().to_owned()), Uuid::new_v4());
    let path = own_file(dir.path(), vm, "h1");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    // Opening a pipe for reading waits until somebody writes.
    let pipe = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(pipe.success());
    let started = Instant::now();
    for _ in 0..3 {
        let error = read(&place, vm, Duration::from_millis(100)).await.unwrap_err();
        assert!(matches!(error, Error::Hangs { .. }), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    // It answers again: the hanging access ends, and the next one is made.
    // First out of the way: what opens it once more, after the writer went, would hang for ever.
    let aside = dir.path().join("aside");
    fs::rename(&path, &aside).unwrap();
    let open = fs::OpenOptions::new().read(true).write(true).open(&aside).unwrap();
    drop(open);
    let deadline = Instant::now() + Duration::from_secs(20);
    while read(&place, vm, Duration::from_millis(200)).await.is_err() {
        assert!(Instant::now() < deadline);
    }
}
