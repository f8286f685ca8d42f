//! Sizes and names at the edge of what is allowed; what exists is not touched unless asked.

use std::os::unix::fs::PermissionsExt;

use virtward_engine::{DiskFormat, Error};

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn every_size_comes_back_exactly() {
    let bench = Bench::new();
    const MIB: usize = 1 << 20;
    for (number, size) in
        [0, 1, 511, 512, 65_535, 65_537, MIB - 1, MIB, MIB + 1, 3 * MIB + 4097].into_iter().enumerate()
    {
        let content = noise(number as u64 + 7, size);
        let source = bench.raw(&format!("{size}.raw"), &content);
        let point = bench.back_up(&source, None).await.unwrap_or_else(|error| panic!("{size} bytes: {error}"));
        assert_eq!(point.disks[0].size_bytes, size as u64, "QEMU rounds up, a backup must not");
        for (to, driver) in FORMATS {
            let path = bench.path(&format!("{size}-{to:?}"));
            if size == 0 && driver == "vmdk" {
                assert!(matches!(bench.restore(point.id, &path, Some(to)).await, Err(Error::Refused(_))));
                continue;
            }
            bench.restore(point.id, &path, Some(to)).await.unwrap_or_else(|e| panic!("{size} bytes to {to:?}: {e}"));
            if to == DiskFormat::Raw {
                assert!(std::fs::read(&path).unwrap() == content, "{size} bytes");
            } else {
                assert_same(&source, "raw", &path, driver);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_takes_no_space_anywhere() {
    let bench = Bench::new();
    let source = bench.path("empty.raw");
    std::fs::File::create(&source).unwrap().set_len(8 << 30).unwrap();
    let point = bench.back_up(&source, None).await.unwrap();
    let disk = &point.disks[0];
    assert_eq!((disk.size_bytes, disk.read_bytes, disk.stored_bytes, disk.data_bytes), (8 << 30, 0, 0, 0));
    for (to, driver) in FORMATS {
        let path = bench.path(&format!("{to:?}"));
        bench.restore(point.id, &path, Some(to)).await.unwrap();
        assert!(allocated(&path) < 32 << 20, "{to:?} takes {}", allocated(&path));
        assert_same(&source, "raw", &path, driver);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn zeros_that_were_written_are_not_written_again() {
    let bench = Bench::new();
    let mut content = vec![0; 16 << 20];
    content[5 << 20..(5 << 20) + 100].fill(9);
    let source = bench.raw("zeros.raw", &content);
    let point = bench.back_up(&source, None).await.unwrap();
    for to in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let path = bench.path(&format!("{to:?}"));
        bench.restore(point.id, &path, Some(to)).await.unwrap();
        assert!(allocated(&path) <= 1 << 20, "{to:?} takes {}", allocated(&path));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_trip_tools_are_only_names() {
    let bench = Bench::new();
    let content = islands(1 << 20);
    for (number, name) in
        ["with space", "a,b=c", "a:b", "nbd:x", "-leading", "Größe ☃", "json:{}", "a\"quote", "%41\\x", "'", "$(x)"]
            .into_iter()
            .enumerate()
    {
        let dir = bench.subdir(&format!("dir {number}, {}", name.replace('/', "")));
        let source = dir.join(format!("{name}.raw"));
        std::fs::write(&source, &content).unwrap();
        let point = bench.back_up(&source, None).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        for (to, driver) in FORMATS {
            let path = dir.join(format!("{name}.{to:?}.{driver}"));
            // A VMDK's descriptor cannot hold the name of an extent with a quote in it.
            if driver == "vmdk" && name.contains('"') {
                let error = bench.restore(point.id, &path, Some(to)).await.unwrap_err();
                assert!(matches!(error, Error::Refused(_)), "{error}");
                continue;
            }
            bench.restore(point.id, &path, Some(to)).await.unwrap_or_else(|error| panic!("{path:?}: {error}"));
            assert_same(&source, "raw", &path, driver);
            // And back in again.
            let again = bench.back_up(&path, None).await.unwrap_or_else(|error| panic!("{path:?}: {error}"));
            assert_eq!(again.disks[0].root, point.disks[0].root, "{path:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_unicode_is_refused_or_works() {
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    let name = std::ffi::OsStr::from_bytes(b"\xff\xfe.raw");
    let odd = bench.dir.path().join(name);
    let content = islands(100_000);
    std::fs::write(&odd, &content).unwrap();
    // QEMU takes no such name; what is raw needs no QEMU.
    let image = bench.dir.path().join(std::ffi::OsStr::from_bytes(b"\xff\xfe.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&bench.path("plain.qcow2")), "1M"]);
    std::fs::rename(bench.path("plain.qcow2"), &image).unwrap();
    let error = bench.back_up(&image, None).await.unwrap_err();
    assert!(matches!(error, Error::Refused(_)) && error.to_string().contains("UTF-8"), "{error}");
    let point = bench.back_up(&odd, None).await.unwrap();
    let to = bench.subdir("out").join(name);
    bench.restore(point.id, &to, Some(DiskFormat::Raw)).await.unwrap();
    assert!(std::fs::read(&to).unwrap() == content);
    let error = bench.replace(point.id, &to, Some(DiskFormat::Vmdk)).await.unwrap_err();
    assert!(error.to_string().contains("UTF-8"), "{error}");
    assert!(std::fs::read(&to).unwrap() == content, "a failed restore touched what was there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_exists_is_replaced_only_when_asked_and_only_if_it_is_a_file() {
    let bench = Bench::new();
    let source = bench.raw("a.raw", &islands(3 << 20));
    let point = bench.back_up(&source, None).await.unwrap();
    let dir = bench.subdir("out");
    let to = dir.join("disk.qcow2");
    std::fs::write(&to, "precious").unwrap();
    std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = bench.restore(point.id, &to, None).await.unwrap_err();
    assert!(matches!(error, Error::Refused(_)) && error.to_string().contains("--overwrite"), "{error}");
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "precious");
    bench.replace(point.id, &to, None).await.unwrap();
    assert_same(&source, "raw", &to, "qcow2");
    assert_eq!(to.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(names(&dir), ["disk.qcow2"]);

    let fresh = dir.join("fresh.vmdk");
    bench.restore(point.id, &fresh, None).await.unwrap();
    assert_eq!(fresh.metadata().unwrap().permissions().mode() & 0o777, 0o600, "guest data is nobody else's business");

    run("mkfifo", &[text(&dir.join("fifo"))]);
    run("mknod", &[text(&dir.join("null")), "c", "1", "3"]);
    std::fs::create_dir(dir.join("directory")).unwrap();
    for name in ["fifo", "null", "directory"] {
        let error = bench.replace(point.id, &dir.join(name), Some(DiskFormat::Raw)).await.unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{name}: {error}");
        assert!(dir.join(name).exists());
    }
    for missing in [bench.path("no/such/dir/x.raw"), bench.path("a.raw/x.raw")] {
        assert!(bench.restore(point.id, &missing, None).await.is_err());
    }
    assert_eq!(names(&dir), ["directory", "disk.qcow2", "fifo", "fresh.vmdk", "null"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_disks_must_be_named() {
    let bench = Bench::new();
    let files = vec![bench.raw("a.raw", &islands(200_000)), bench.raw("b.raw", &islands(300_000))];
    let set = virtward_engine::ImageSet { name: "two".into(), files, format: None };
    let (silent, cancel) = (virtward_engine::Silent, virtward_engine::Cancel::default());
    let point = virtward_engine::backup_images(&bench.repo, &set, &Default::default(), &silent, &cancel).await.unwrap();
    let error = bench.restore(point.id, &bench.path("x.raw"), None).await.unwrap_err().to_string();
    assert!(error.contains("--disk") && error.contains("a.raw, b.raw"), "{error}");
    let mut options = options(&bench.path("x.raw"), None);
    options.disk = Some("b.raw".into());
    virtward_engine::restore_disk(&bench.repo, point.id, &options, &silent, &cancel).await.unwrap();
    assert_same(&bench.path("b.raw"), "raw", &bench.path("x.raw"), "raw");
    options.disk = Some("vda".into());
    let error = virtward_engine::restore_disk(&bench.repo, point.id, &options, &silent, &cancel).await.unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
}
