//! Restores onto block devices, zeros included.

use std::path::{Path, PathBuf};

use virtward_engine::{DiskFormat, Error};

use crate::common::*;

/// A loop device over a file full of noise.
struct Loop {
    device: PathBuf,
}

impl Loop {
    fn new(backing: &Path, size: usize) -> Self {
        std::fs::write(backing, noise(77, size)).unwrap();
        let device = PathBuf::from(run("losetup", &["--find", "--show", text(backing)]));
        Self { device }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.device).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = output("losetup", &["--detach", text(&self.device)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_gets_every_byte_of_the_disk_and_keeps_what_is_behind_it() {
    let bench = Bench::new();
    // Not a multiple of the device's blocks.
    let content = islands((5 << 20) + 1000);
    let point = bench.back_up(&bench.raw("a.raw", &content), None).await.unwrap();
    let device = Loop::new(&bench.path("backing"), 8 << 20);
    let error = bench.restore(point.id, &device.device, None).await.unwrap_err();
    assert!(matches!(error, Error::Refused(_)) && error.to_string().contains("--overwrite"), "{error}");
    let error = bench.replace(point.id, &device.device, Some(DiskFormat::Qcow2)).await.unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
    assert!(device.content() == noise(77, 8 << 20), "a refused restore wrote");

    let disk = bench.replace(point.id, &device.device, None).await.unwrap();
    assert_eq!(disk.format, DiskFormat::Raw);
    let found = device.content();
    assert!(found[..content.len()] == content);
    let behind = content.len().next_multiple_of(4096);
    assert!(found[content.len()..behind].iter().all(|byte| *byte == 0));
    assert!(found[behind..] == noise(77, 8 << 20)[behind..]);
    // A device is also a source.
    let again = bench.back_up(&device.device, None).await.unwrap();
    bench.restore(again.id, &bench.path("back.raw"), Some(DiskFormat::Raw)).await.unwrap();
    assert!(std::fs::read(bench.path("back.raw")).unwrap() == found);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_too_small_or_mounted_is_left_alone() {
    let bench = Bench::new();
    let point = bench.back_up(&bench.raw("a.raw", &islands(5 << 20)), None).await.unwrap();
    let small = Loop::new(&bench.path("small"), 4 << 20);
    let error = bench.replace(point.id, &small.device, None).await.unwrap_err();
    assert!(error.to_string().contains("4194304") && error.to_string().contains("5242880"), "{error}");
    assert!(small.content() == noise(77, 4 << 20));

    let mounted = Loop::new(&bench.path("mounted"), 8 << 20);
    run("mkfs.ext4", &["-q", "-F", text(&mounted.device)]);
    let at = bench.subdir("mnt");
    run("mount", &[text(&mounted.device), text(&at)]);
    std::fs::write(at.join("file"), "precious").unwrap();
    let outcome = bench.replace(point.id, &mounted.device, None).await;
    let kept = std::fs::read_to_string(at.join("file"));
    run("umount", &[text(&at)]);
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::Busy(_)) && error.to_string().contains("mounted"), "{error}");
    assert_eq!(kept.unwrap(), "precious");
    run("fsck.ext4", &["-n", "-f", text(&mounted.device)]);
}
