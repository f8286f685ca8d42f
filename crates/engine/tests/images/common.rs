//! A repository in a temporary directory, and ways to make and compare images.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use virtward_engine::{
    BackupOptions, Cancel, DiskFormat, Error, ImageSet, RestoreDiskOptions, RestoredDisk, Silent, backup_images,
    restore_disk,
};
use virtward_model::{PointId, RestorePoint};
use virtward_repo::{InitOptions, KdfCost, Repository, Secret, store::fs::FsStore};

/// Every format that a restore writes, with QEMU's name of it.
pub const FORMATS: [(DiskFormat, &str); 6] = [
    (DiskFormat::Qcow2, "qcow2"),
    (DiskFormat::Raw, "raw"),
    (DiskFormat::Vmdk, "vmdk"),
    (DiskFormat::VmdkSplit, "vmdk"),
    (DiskFormat::Vhdx, "vhdx"),
    (DiskFormat::Vdi, "vdi"),
];

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub repo: Repository,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(FsStore::new(&dir.path().join("repo")));
        let options = InitOptions { kdf: KdfCost::weak_for_tests(), label: "test".into(), ..InitOptions::default() };
        let repo = Repository::init(store, &Secret::password("secret"), &options).unwrap();
        Self { dir, repo }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new directory of that name.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    /// A raw image with known content.
    pub fn raw(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub async fn back_up(&self, path: &Path, format: Option<&str>) -> Result<RestorePoint, Error> {
        self.back_up_until(path, format, &Cancel::default()).await
    }

    pub async fn back_up_until(
        &self,
        path: &Path,
        format: Option<&str>,
        cancel: &Cancel,
    ) -> Result<RestorePoint, Error> {
        let set = ImageSet { name: "set".into(), files: vec![path.to_owned()], format: format.map(str::to_owned) };
        backup_images(&self.repo, &set, &BackupOptions::default(), &Silent, cancel).await
    }

    pub async fn restore(&self, point: PointId, to: &Path, format: Option<DiskFormat>) -> Result<RestoredDisk, Error> {
        restore_disk(&self.repo, point, &options(to, format), &Silent, &Cancel::default()).await
    }

    pub async fn replace(&self, point: PointId, to: &Path, format: Option<DiskFormat>) -> Result<RestoredDisk, Error> {
        let options = RestoreDiskOptions { overwrite: true, ..options(to, format) };
        restore_disk(&self.repo, point, &options, &Silent, &Cancel::default()).await
    }
}

pub fn options(to: &Path, format: Option<DiskFormat>) -> RestoreDiskOptions {
    RestoreDiskOptions { disk: None, to: to.to_owned(), format, overwrite: false, threads: 2 }
}

/// Runs a program, whatever comes of it.
pub fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs a program, which must succeed; its standard output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Fails unless both images hold the same, whatever follows a shorter one's end being zeros.
pub fn assert_same(one: &Path, format: &str, other: &Path, other_format: &str) {
    let said = output("qemu-img", &["compare", "-q", "-f", format, "-F", other_format, text(one), text(other)]);
    assert!(said.status.success(), "{} and {} differ: {said:?}", one.display(), other.display());
}

/// Bytes that a file takes on its file system.
pub fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// Names in a directory, in order.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Bytes that do not repeat and do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A disk like a guest's: islands of data of odd sizes at odd places in a sea of zeros.
pub fn islands(size: usize) -> Vec<u8> {
    let mut disk = vec![0; size];
    for (seed, (at, length)) in
        [(0, 5000), (size / 3 + 511, 300_001), (size / 2, 1 << 20), (size - 70_001, 70_001)].into_iter().enumerate()
    {
        let end = (at + length).min(size);
        disk[at..end].copy_from_slice(&noise(seed as u64 + 1, end - at));
    }
    disk
}
