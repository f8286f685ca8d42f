//! Every format that is read into every format that is written.

use std::path::{Path, PathBuf};

use virtward_engine::DiskFormat;

use crate::common::*;

const SIZE: usize = (9 << 20) + 3 * 512;

/// One image of each kind with the content of `raw`.
fn sources(bench: &Bench, raw: &Path) -> Vec<(PathBuf, &'static str)> {
    let convert = |name: &str, format: &str, options: &[&str]| {
        let to = bench.path(name);
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        arguments.extend(options);
        arguments.extend([text(raw), text(&to)]);
        run("qemu-img", &arguments);
        to
    };
    // The lower half in the base, one layer of nothing, the rest on top.
    let base = bench.path("base.raw");
    let content = std::fs::read(raw).unwrap();
    let mut lower = content.clone();
    lower[SIZE / 2..].fill(0x55);
    std::fs::write(&base, lower).unwrap();
    let (middle, top) = (bench.path("middle.qcow2"), bench.path("chain.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", text(&middle)]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&middle), text(&top)]);
    let upper = bench.path("upper");
    std::fs::write(&upper, &content[SIZE / 2 / 512 * 512..]).unwrap();
    let write = format!("write -q -s {} {} {}", text(&upper), SIZE / 2 / 512 * 512, SIZE - SIZE / 2 / 512 * 512);
    run("qemu-io", &["-f", "qcow2", "-c", &write, text(&top)]);
    vec![
        (raw.to_owned(), "raw"),
        (top, "qcow2"),
        (convert("compressed.qcow2", "qcow2", &["-c"]), "qcow2"),
        (convert("v2.qcow2", "qcow2", &["-o", "compat=0.10"]), "qcow2"),
        (convert("mono.vmdk", "vmdk", &[]), "vmdk"),
        (convert("stream.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]), "vmdk"),
        (convert("split.vmdk", "vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]), "vmdk"),
        (convert("flat.vmdk", "vmdk", &["-o", "subformat=monolithicFlat"]), "vmdk"),
        (convert("dynamic.vhd", "vpc", &["-o", "force_size=on"]), "vpc"),
        (convert("fixed.vhd", "vpc", &["-o", "subformat=fixed,force_size=on"]), "vpc"),
        (convert("disk.vhdx", "vhdx", &[]), "vhdx"),
        (convert("disk.vdi", "vdi", &[]), "vdi"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_becomes_every_format_without_a_bit_lost() {
    let bench = Bench::new();
    let raw = bench.raw("disk.raw", &islands(SIZE));
    for (number, (source, format)) in sources(&bench, &raw).into_iter().enumerate() {
        assert_same(&raw, "raw", &source, format);
        let point = bench.back_up(&source, None).await.unwrap_or_else(|error| panic!("{source:?}: {error}"));
        assert_eq!(point.disks[0].format, format);
        let dir = bench.subdir(&format!("from-{number}"));
        for (to, driver) in FORMATS {
            let path = dir.join(format!("{to:?} disk.{driver}"));
            let disk = bench.restore(point.id, &path, Some(to)).await.unwrap_or_else(|e| panic!("{path:?}: {e}"));
            assert_eq!(disk.format, to);
            assert_same(&raw, "raw", &path, driver);
            if !matches!(to, DiskFormat::Raw) {
                run("qemu-img", &["check", "-q", "-f", driver, text(&path)]);
            }
        }
        assert_eq!(names(&dir).len(), FORMATS.len() + 1, "one extent and no litter: {:?}", names(&dir));
    }
    // All of them are the same disk, so it was stored once.
    let stored: u64 = bench.repo.points().unwrap().points.iter().map(|point| point.disks[0].stored_bytes).sum();
    assert!(stored < 2 << 20, "{stored}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_disk_is_split_into_extents_of_two_gigabytes_and_stays_thin() {
    let bench = Bench::new();
    let source = bench.path("big.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&source), "5G"]);
    for at in ["0", "2047M", "4G", "5119M"] {
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 7 {at} 1M"), text(&source)]);
    }
    let point = bench.back_up(&source, None).await.unwrap();
    assert!(point.disks[0].read_bytes <= 8 << 20, "{}", point.disks[0].read_bytes);
    let dir = bench.subdir("out");
    for (to, driver) in FORMATS {
        let path = dir.join(format!("{to:?}.img"));
        let disk = bench.restore(point.id, &path, Some(to)).await.unwrap();
        assert!(disk.written_bytes <= 8 << 20);
        assert_same(&source, "qcow2", &path, driver);
        // VHDX has blocks of 32 MiB, and room for its log.
        let limit = if to == DiskFormat::Vhdx { 200 << 20 } else { 16 << 20 };
        assert!(allocated(&path) <= limit, "{to:?} takes {} bytes", allocated(&path));
        std::fs::remove_file(&path).unwrap();
    }
    assert_eq!(names(&dir), ["VmdkSplit-s001.img", "VmdkSplit-s002.img", "VmdkSplit-s003.img"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_format_follows_the_extension_then_the_source() {
    let bench = Bench::new();
    let source = bench.raw("a.raw", &islands(1 << 20));
    let point = bench.back_up(&source, None).await.unwrap();
    for (name, format) in [
        ("a.qcow2", DiskFormat::Qcow2),
        ("a.VMDK", DiskFormat::Vmdk),
        ("a.img", DiskFormat::Raw),
        ("a", DiskFormat::Raw),
    ] {
        let path = bench.subdir(&format!("dir-{name}")).join(name);
        assert_eq!(bench.restore(point.id, &path, None).await.unwrap().format, format, "{name}");
    }
    let error = bench.restore(point.id, &bench.path("a.vhd"), None).await.unwrap_err().to_string();
    assert!(error.contains("--format"), "{error}");
}
