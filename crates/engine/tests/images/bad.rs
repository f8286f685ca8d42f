//! Images that are damaged, lie, or point where they should not: a clear error, nothing published, no panic.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use virtward_engine::Error;

use crate::common::*;

async fn refused(bench: &Bench, path: &Path, format: Option<&str>, words: &[&str]) {
    let error = bench.back_up(path, format).await.err().unwrap_or_else(|| panic!("{path:?} was backed up"));
    let said = error.to_string();
    let name = path.file_name().unwrap().to_str().unwrap();
    for word in words.iter().chain(&[name]) {
        assert!(said.contains(word), "{path:?}: {word:?} is not in: {said}");
    }
    assert!(said.len() < 2000, "{said}");
    assert!(bench.repo.points().unwrap().points.is_empty());
}

fn qcow2(bench: &Bench, name: &str, arguments: &[&str]) -> PathBuf {
    let path = bench.path(name);
    let mut all = vec!["create", "-q", "-u", "-f", "qcow2"];
    all.extend(arguments);
    all.extend([text(&path), "8M"]);
    run("qemu-img", &all);
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_cannot_make_us_read_something_else() {
    let bench = Bench::new();
    let secret = bench.raw("secret", b"host secret");
    for (number, name) in [
        "nbd://127.0.0.1:1/x",
        "nbd:unix:/x",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "ssh://h/x",
        "fd:0",
        "file:secret",
    ]
    .into_iter()
    .enumerate()
    {
        let path = qcow2(&bench, &format!("evil{number}.qcow2"), &["-F", "raw", "-b", name]);
        refused(&bench, &path, None, &["backing file", "protocol"]).await;
    }
    refused(&bench, &qcow2(&bench, "gone.qcow2", &["-F", "raw", "-b", "gone.raw"]), None, &["gone.raw", "missing"])
        .await;
    // Without a declared format QEMU would guess, and a guest can make it guess wrong.
    let guess = qcow2(&bench, "guess.qcow2", &["-F", "raw", "-b", "secret"]);
    forget_backing_format(&guess);
    refused(&bench, &guess, None, &["qemu-img rebase"]).await;
    refused(&bench, &qcow2(&bench, "lie.qcow2", &["-F", "qcow2", "-b", "secret"]), None, &["secret", "looks like raw"])
        .await;
    refused(&bench, &qcow2(&bench, "dev.qcow2", &["-F", "raw", "-b", "/dev/zero"]), None, &[]).await;
    refused(&bench, &qcow2(&bench, "loop.qcow2", &["-F", "qcow2", "-b", "loop.qcow2"]), None, &["its own backing"])
        .await;
    let data = bench.path("data.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &format!("data_file={}", text(&bench.path("payload"))),
            text(&data),
            "8M",
        ],
    );
    std::fs::remove_file(bench.path("payload")).unwrap();
    refused(&bench, &data, None, &[]).await;

    for (number, extent) in [text(&secret), "../secret", "nbd://h/x", "no-such"].into_iter().enumerate() {
        let path = bench.path(&format!("evil{number}.vmdk"));
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
             RW 1 FLAT \"{extent}\" 0\n"
        );
        std::fs::write(&path, text).unwrap();
        refused(&bench, &path, None, &["extent"]).await;
    }
}

/// Turns the backing format extension into one that nobody knows.
fn forget_backing_format(path: &Path) {
    let mut head = vec![0; 4096];
    let file = File::options().read(true).write(true).open(path).unwrap();
    file.read_exact_at(&mut head, 0).unwrap();
    let at = head.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    file.write_all_at(&[0x12, 0x34, 0x56, 0x78], at as u64).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_format_is_never_guessed_from_what_a_guest_can_write() {
    let bench = Bench::new();
    let trap = bench.path("guest.raw");
    std::fs::copy(qcow2(&bench, "x.qcow2", &["-F", "raw", "-b", "/etc/passwd"]), &trap).unwrap();
    refused(&bench, &trap, None, &["qcow2", "--format"]).await;
    refused(&bench, &bench.raw("noname", &std::fs::read(&trap).unwrap()), None, &["--format"]).await;
    // Named raw, it is read as raw: header bytes and all.
    let point = bench.back_up(&trap, Some("raw")).await.unwrap();
    bench.restore(point.id, &bench.path("out.raw"), None).await.unwrap();
    assert!(std::fs::read(bench.path("out.raw")).unwrap() == std::fs::read(&trap).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_were_cut_short_are_not_taken_for_zeros() {
    let bench = Bench::new();
    let raw = bench.raw("whole.raw", &noise(3, 6 << 20));
    for (format, name, options) in [
        ("qcow2", "a.qcow2", ""),
        ("vmdk", "a.vmdk", "subformat=monolithicSparse"),
        ("vpc", "a.vhd", "subformat=dynamic"),
        ("vpc", "f.vhd", "subformat=fixed"),
        ("vhdx", "a.vhdx", ""),
        ("vdi", "a.vdi", ""),
        ("vmdk", "s.vmdk", "subformat=twoGbMaxExtentSparse"),
    ] {
        let whole = bench.path(name);
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([text(&raw), text(&whole)]);
        run("qemu-img", &arguments);
        let payload = if name == "s.vmdk" { bench.path("s-s001.vmdk") } else { whole.clone() };
        let length = payload.metadata().unwrap().len();
        // A VHDX is allocated in steps of 8 MiB, of which the end holds nothing.
        let first = if format == "vhdx" { length / 2 } else { length - (1 << 20) };
        for keep in [first, length / 2, 70_000, 600, 100, 0] {
            File::options().write(true).open(&payload).unwrap().set_len(keep).unwrap();
            let outcome = bench.back_up(&whole, Some(format)).await;
            assert!(outcome.is_err(), "{name} cut to {keep} of {length} bytes was backed up");
        }
    }
    assert!(bench.repo.points().unwrap().points.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_headers_is_an_error_or_harmless() {
    let bench = Bench::new();
    let raw = bench.raw("whole.raw", &islands(1 << 20));
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for (format, name) in
        [("qcow2", "a.qcow2"), ("vmdk", "a.vmdk"), ("vpc", "a.vhd"), ("vhdx", "a.vhdx"), ("vdi", "a.vdi")]
    {
        let whole = bench.path(name);
        run("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&whole)]);
        for _ in 0..6 {
            let damaged = bench.path(&format!("damaged-{name}"));
            std::fs::copy(&whole, &damaged).unwrap();
            let file = File::options().write(true).open(&damaged).unwrap();
            for _ in 0..12 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // The magic stays, what follows it suffers. Sizes stay below what is quick to read.
                let at = 4 + state % 500;
                if format == "qcow2" && (24..32).contains(&at) || format == "vdi" && (0x170..0x178).contains(&at) {
                    continue;
                }
                file.write_all_at(&[(state >> 32) as u8], at).unwrap();
            }
            let outcome = tokio::time::timeout(Duration::from_secs(60), bench.back_up(&damaged, Some(format))).await;
            // Not every byte of a header matters, so it need not fail.
            if let Ok(Err(error)) = outcome {
                assert!(!error.to_string().contains("worker"), "{error}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_is_refused_by_name() {
    let bench = Bench::new();
    refused(&bench, &bench.path("gone.qcow2"), None, &[]).await;
    refused(&bench, &bench.subdir("folder.raw"), None, &["neither a file"]).await;
    let fifo = bench.path("pipe.raw");
    run("mkfifo", &[text(&fifo)]);
    refused(&bench, &fifo, None, &["neither a file"]).await;
    refused(&bench, &bench.raw("text.qcow2", b"hello"), None, &["--format"]).await;
    refused(&bench, &bench.raw("text2.qcow2", b"hello"), Some("qcow2"), &["no qcow2"]).await;
    refused(&bench, &bench.raw("short.vhd", b"hello"), None, &["VHD"]).await;
    refused(&bench, &bench.raw("flat.vmdk", &[7; 4096]), None, &["--format"]).await;
    let error = bench.back_up(&bench.raw("a.raw", b""), Some("zip")).await.unwrap_err().to_string();
    assert!(error.contains("zip") && error.contains("qcow2"), "{error}");
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
async fn an_image_in_use_is_neither_read_nor_replaced() {
    let bench = Bench::new();
    let image = bench.path("vm.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "8M"]);
    let point = bench.back_up(&image, None).await.unwrap();
    let socket = bench.path("sock");
    let holder = Command::new("qemu-nbd")
        .args(["--persistent", "-f", "qcow2", "--socket", text(&socket), text(&image)])
        .spawn()
        .unwrap();
    let _holder = Holder(holder);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    let error = bench.back_up(&image, None).await.unwrap_err();
    assert!(matches!(error, Error::Busy(_)) && error.to_string().contains("backup run"), "{error}");
    let error = bench.replace(point.id, &image, None).await.unwrap_err();
    assert!(matches!(error, Error::Busy(_)), "{error}");
    assert!(names(bench.dir.path()).iter().all(|name| !name.contains("virtward")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_while_it_is_read_makes_no_restore_point() {
    let bench = Bench::new();
    let image = bench.raw("busy.raw", &noise(9, 32 << 20));
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (path, flag) = (image.clone(), stop.clone());
    let writer = std::thread::spawn(move || {
        let file = File::options().write(true).open(path).unwrap();
        while !flag.load(std::sync::atomic::Ordering::Relaxed) {
            file.write_all_at(b"x", 5).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let outcome = bench.back_up(&image, None).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
    assert!(matches!(outcome, Err(Error::SourceGone(_))), "{outcome:?}");
    assert!(bench.repo.points().unwrap().points.is_empty());
}
