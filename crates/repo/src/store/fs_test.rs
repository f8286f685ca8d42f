//! What a directory keeps when the power is cut, on real file systems of their own.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::{Put, Store, fs::FsStore};
use crate::disorder::{Disorder, testing};

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A mounted file system in a file.
struct Disk {
    dir: tempfile::TempDir,
    options: &'static str,
}

impl Disk {
    fn new(kind: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("virtward-power-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let image = dir.path().join("disk");
        std::fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
        let flag = if kind == "ext4" { "-F" } else { "-f" };
        tool(&format!("mkfs.{kind}"), &["-q", flag, image.to_str().unwrap()]);
        // Nothing becomes durable by itself while the test runs.
        let disk = Self { dir, options: if kind == "ext4" { "loop,commit=600" } else { "loop" } };
        disk.mount();
        disk
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn mount(&self) {
        let image = self.dir.path().join("disk");
        tool("mount", &["-o", self.options, image.to_str().unwrap(), self.at().to_str().unwrap()]);
    }

    /// As if the power had been cut: what the file system has not made durable is gone.
    fn cut(&self) {
        let at = self.at();
        tool("xfs_io", &["-x", "-c", "shutdown", at.to_str().unwrap()]);
        tool("umount", &[at.to_str().unwrap()]);
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.at()).output();
    }
}

fn content(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| (n / 512) as u8 ^ seed).collect()
}

/// Whether all that was acknowledged is whole after a power cut.
fn survives(root: &Path, cut: impl FnOnce(), disorder: Option<Disorder>) -> bool {
    let objects: Vec<(String, Vec<u8>)> = [100, 5_000, 3 << 20, (5 << 20) + 77]
        .into_iter()
        .enumerate()
        .map(|(n, bytes)| (format!("data/0{n}/object"), content(n as u8, bytes)))
        .collect();
    let store = FsStore::new(root);
    testing::with(disorder, || {
        for (number, (name, bytes)) in objects.iter().enumerate() {
            let put = if number % 2 == 0 {
                store.put_if_absent(name, bytes)
            } else {
                let mut writer = store.create(name).unwrap();
                bytes.chunks(1 << 20).for_each(|part| writer.write(part).unwrap());
                writer.finish()
            };
            assert_eq!(put.unwrap(), Put::Created);
        }
    });
    cut();
    objects.iter().all(|(name, bytes)| store.get(name, 1 << 30).is_ok_and(|there| there == *bytes))
}

#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    for kind in ["ext4", "xfs"] {
        let disk = Disk::new(kind);
        for round in 0..3 {
            let root = disk.at().join(format!("right-{round}"));
            assert!(survives(&root, || disk.cut(), None), "{kind}");
        }
        for disorder in [Disorder::NameBeforeBytes, Disorder::AnswerBeforeName] {
            // The kernel may write anything at any time, which hides the mistake once in a while.
            let noticed = (0..5).any(|round| {
                let root = disk.at().join(format!("{disorder:?}-{round}"));
                !survives(&root, || disk.cut(), Some(disorder))
            });
            assert!(noticed, "{disorder:?} would go unnoticed on {kind}");
        }
    }
}
