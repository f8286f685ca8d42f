//! The client against the servers that people run: qemu-nbd, qemu-storage-daemon, nbdkit.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use support::{MIB, Server, options, pattern, run};
use virtward_nbd::{
    ALLOC_HOLE, ALLOC_ZERO, ALLOCATION_DEPTH, Address, BASE_ALLOCATION, Client, DIRTY, Error, Extent, Framing, Options,
    dirty_bitmap, list_exports,
};

const DIALECTS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

async fn connect(server: &Server, options: Options) -> Result<Client, Error> {
    Client::connect(&server.address(), options).await
}

fn contexts(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// A 64 MiB qcow2 with holes, explicit zeroes, data, and the bitmap `b0` over later writes.
fn holey_image(directory: &Path) -> PathBuf {
    let image = directory.join("disk.qcow2");
    let path = image.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path, "64M"]);
    run("qemu-io", &["-c", "write -P 1 1M 3M", "-c", "write -P 2 40M 64k", "-c", "write -z 8M 1M", path]);
    run("qemu-img", &["bitmap", "--add", path, "b0"]);
    run("qemu-io", &["-c", "write -P 3 2M 1M", "-c", "write -P 4 20M 200k", "-c", "write -P 5 63M 1M", path]);
    image
}

/// What the reference implementation says, its neighbours merged as ours are.
fn nbdinfo_map(context: &str, address: &Address) -> Vec<(u64, u64, u64)> {
    let output = run("nbdinfo", &["--json", &format!("--map={context}"), &address.to_string()]);
    let rows: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_slice(&output.stdout).unwrap();
    let mut merged: Vec<(u64, u64, u64)> = Vec::new();
    for row in rows {
        let number = |key: &str| row[key].as_u64().unwrap();
        match merged.last_mut() {
            Some(last) if last.2 == number("type") => last.1 += number("length"),
            _ => merged.push((number("offset"), number("length"), number("type"))),
        }
    }
    merged
}

fn plain(extents: &[Extent]) -> Vec<(u64, u64, u64)> {
    extents.iter().map(|e| (e.offset, e.length, e.flags)).collect()
}

/// As through a tunnel: the client has one end of a pair of sockets, and somebody carries the bytes to the server.
#[tokio::test]
async fn a_connection_that_was_handed_over_serves_until_it_breaks() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let server = Server::qemu_nbd(&directory.path().join("s"), &["--read-only", "--shared=4", image.to_str().unwrap()]);
    let direct = connect(&server, options()).await.unwrap();
    let Address::Unix(path) = server.address() else { panic!("a Unix socket") };
    let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
    let mut far = tokio::net::UnixStream::connect(path).await.unwrap();
    let tunnel = tokio::spawn(async move { tokio::io::copy_bidirectional(&mut theirs, &mut far).await });
    let client = Client::over(ours, options()).await.unwrap();
    assert_eq!((client.info(), client.connections_up()), (direct.info(), 1));
    assert_eq!(client.read(MIB, 3 << 20).await.unwrap(), direct.read(MIB, 3 << 20).await.unwrap());
    tunnel.abort();
    let _ = tunnel.await;
    let began = Instant::now();
    assert!(matches!(client.read(0, 4096).await, Err(Error::Disconnected { .. })));
    assert!(matches!(client.read(0, 4096).await, Err(Error::Disconnected { .. })), "there is no other connection");
    assert!(began.elapsed() < Duration::from_secs(5));
    direct.disconnect().await;
}

#[tokio::test]
async fn extents_are_those_that_nbdinfo_sees() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let server = Server::qemu_nbd(
        &directory.path().join("s"),
        &["--read-only", "--bitmap=b0", "--allocation-depth", image.to_str().unwrap()],
    );
    let names = [BASE_ALLOCATION.to_string(), dirty_bitmap("b0"), ALLOCATION_DEPTH.to_string()];
    let reference: Vec<_> = names.iter().map(|name| nbdinfo_map(name, &server.address())).collect();
    for framing in [Framing::Structured, Framing::Extended] {
        let client = connect(&server, Options { contexts: names.to_vec(), framing, ..options() }).await.unwrap();
        let mut offered = client.info().contexts.clone();
        offered.sort_by_key(|name| names.iter().position(|n| n == name));
        assert_eq!(offered, names);
        assert_eq!(client.info().extended, framing == Framing::Extended, "qemu 10 has extended headers");
        for (name, expected) in names.iter().zip(&reference) {
            let extents = client.extents(name, 0..64 * MIB).unwrap().collect().await.unwrap();
            assert_eq!(&plain(&extents), expected, "{name} {framing:?}");
        }
        client.disconnect().await;
    }
    // Not only the same, but also what was written above.
    assert!(reference[0].contains(&(MIB, 3 * MIB, 0)));
    assert!(reference[0].iter().any(|e| e.2 == ALLOC_HOLE | ALLOC_ZERO));
    let dirty: Vec<_> = reference[1].iter().filter(|e| e.2 & DIRTY != 0).map(|e| e.0).collect();
    assert_eq!(dirty, [2 * MIB, 20 * MIB, 63 * MIB]);
}

#[tokio::test]
async fn a_part_of_the_extents_is_cut_at_both_ends() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let server = Server::qemu_nbd(&directory.path().join("s"), &["--read-only", image.to_str().unwrap()]);
    let client = connect(&server, Options { contexts: contexts(&[BASE_ALLOCATION]), ..options() }).await.unwrap();
    let range = MIB + 1000..4 * MIB + 1;
    let extents = client.extents(BASE_ALLOCATION, range.clone()).unwrap().collect().await.unwrap();
    assert_eq!(extents.len(), 2);
    assert_eq!((extents[0].offset, extents[0].end(), extents[0].flags), (range.start, 4 * MIB, 0));
    assert_eq!((extents[1].offset, extents[1].end()), (4 * MIB, range.end));
    assert_eq!(client.block_status(BASE_ALLOCATION, 2 * MIB, 4096).await.unwrap()[0].length, 4096);
}

#[tokio::test]
async fn a_context_that_is_not_there_is_left_out_and_named_when_used() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let server = Server::qemu_nbd(&directory.path().join("s"), &["--read-only", image.to_str().unwrap()]);
    let wanted = contexts(&[BASE_ALLOCATION, "qemu:dirty-bitmap:none"]);
    let client = connect(&server, Options { contexts: wanted, ..options() }).await.unwrap();
    assert_eq!(client.info().contexts, [BASE_ALLOCATION]);
    match client.block_status("qemu:dirty-bitmap:none", 0, 4096).await {
        Err(Error::ContextNotOffered { context, .. }) => assert_eq!(context, "qemu:dirty-bitmap:none"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn holes_are_read_as_zeroes_in_every_dialect() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let server = Server::qemu_nbd(&directory.path().join("s"), &["--read-only", image.to_str().unwrap()]);
    let mut expected = vec![0u8; 64 << 20];
    for (from, length, byte) in [
        (1u64 << 20, 3 << 20, 1u8),
        (40 << 20, 64 << 10, 2),
        (2 << 20, 1 << 20, 3),
        (20 << 20, 200 << 10, 4),
        (63 << 20, 1 << 20, 5),
    ] {
        expected[from as usize..from as usize + length].fill(byte);
    }
    for framing in DIALECTS {
        let client =
            Client::connect(&server.address(), Options { framing, connections: 4, ..options() }).await.unwrap();
        assert_eq!(client.info().structured, framing != Framing::Simple);
        // Longer than the server's longest read, and not aligned to anything.
        let all = client.read(0, 64 << 20).await.unwrap();
        assert!(all == expected, "{framing:?}");
        let odd = client.read(MIB - 77, 41 << 20).await.unwrap();
        assert!(odd == expected[(1 << 20) - 77..][..41 << 20], "{framing:?}");
        assert_eq!(client.read(5, 0).await.unwrap().len(), 0);
        client.disconnect().await;
    }
}

#[tokio::test]
async fn a_buffer_is_used_again_without_moving() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(&directory.path().join("s"), &["pattern", "64M"]);
    let client = connect(&server, options()).await.unwrap();
    let buffer = client.read_into(0, MIB as u32, BytesMut::with_capacity(MIB as usize)).await.unwrap();
    let place = buffer.as_ptr();
    let buffer = client.read_into(3 * MIB, MIB as u32, buffer).await.unwrap();
    assert_eq!(buffer.as_ptr(), place);
    assert!(buffer == pattern(3 * MIB, MIB as usize));
}

#[tokio::test]
async fn many_reads_over_several_connections_find_their_askers() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(&directory.path().join("s"), &["--threads=8", "pattern", "4E"]);
    for (framing, queue_depth) in [(Framing::Simple, 3), (Framing::Extended, 16)] {
        let options = Options { framing, connections: 4, queue_depth, ..options() };
        let client = connect(&server, options).await.unwrap();
        let reads = (0..500u64).map(|i| {
            let client = client.clone();
            async move {
                let (offset, length) = (i * 0x3f_0000_0000_1357 % (1 << 61), 1 + (i * 977 % 70_000) as usize);
                assert!(client.read(offset, length as u32).await.unwrap() == pattern(offset, length));
            }
        });
        futures::future::join_all(reads).await;
        assert_eq!(client.connections_up(), 4);
        client.disconnect().await;
    }
}

#[tokio::test]
async fn an_export_of_exabytes_is_walked_in_bounded_time() {
    let directory = tempfile::tempdir().unwrap();
    // Answers 32-bit requests only: more than two thousand million of them would be needed at 4 GiB each.
    let size = 1u64 << 43;
    let server = Server::nbdkit(&directory.path().join("s"), &["memory", &size.to_string()]);
    let client = connect(&server, Options { contexts: contexts(&[BASE_ALLOCATION]), ..options() }).await.unwrap();
    client.write(size / 2, Bytes::from_static(&[7; 4096])).await.unwrap();
    let extents = client.extents(BASE_ALLOCATION, 0..size).unwrap().collect().await.unwrap();
    assert_eq!(extents.len(), 3);
    assert_eq!((extents[1].offset, extents[1].flags), (size / 2, 0));
    assert_eq!(extents[2].end(), size);
}

#[tokio::test]
async fn what_is_written_is_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("raw");
    std::fs::File::create(&image).unwrap().set_len(100 * MIB).unwrap();
    for (server, framing) in [("qemu", Framing::Extended), ("qemu", Framing::Simple), ("nbdkit", Framing::Structured)] {
        let socket = directory.path().join("s");
        let path = image.to_str().unwrap();
        let server = match server {
            "qemu" => Server::qemu_nbd(&socket, &["--format=raw", "--discard=unmap", path]),
            _ => Server::nbdkit(&socket, &["file", path]),
        };
        let client = connect(&server, Options { framing, ..options() }).await.unwrap();
        assert!(!client.info().read_only);
        let data = Bytes::from(pattern(0, 40 << 20));
        client.write(MIB, data.clone()).await.unwrap();
        client.write_zeroes(3 * MIB, MIB, true).await.unwrap();
        client.write_zeroes(5 * MIB, MIB, false).await.unwrap();
        client.trim(10 * MIB, MIB).await.unwrap();
        client.flush().await.unwrap();
        client.write_durable(99 * MIB, Bytes::from_static(b"the end")).await.unwrap();
        let mut expected = data.to_vec();
        expected[2 << 20..3 << 20].fill(0);
        expected[4 << 20..5 << 20].fill(0);
        let read = client.read(MIB, 40 << 20).await.unwrap();
        assert!(read[..9 << 20] == expected[..9 << 20] && read[10 << 20..] == expected[10 << 20..]);
        assert_eq!(client.read(99 * MIB, 7).await.unwrap(), "the end");
        client.disconnect().await;
    }
}

#[tokio::test]
async fn zeroes_are_sent_to_servers_that_cannot_make_them() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(&directory.path().join("s"), &["--filter=nozero", "memory", "8M"]);
    let client = connect(&server, options()).await.unwrap();
    assert!(!client.info().can_write_zeroes);
    client.write(0, Bytes::from(vec![9; 8 << 20])).await.unwrap();
    client.write_zeroes(1000, 5 * MIB, true).await.unwrap();
    let read = client.read(0, 8 << 20).await.unwrap();
    let end = 1000 + (5 << 20);
    assert!(read[..1000].iter().all(|b| *b == 9) && read[end..].iter().all(|b| *b == 9));
    assert!(read[1000..end].iter().all(|b| *b == 0));
}

#[tokio::test]
async fn old_dialects_of_nbdkit_are_spoken() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [&["--no-sr"][..], &["--mask-handshake=0"], &["--mask-handshake=1"], &["--oldstyle"]] {
        let arguments: Vec<_> = arguments.iter().copied().chain(["pattern", "5M"]).collect();
        let server = Server::nbdkit(&directory.path().join("s"), &arguments);
        let wanted = contexts(&[BASE_ALLOCATION]);
        let client = connect(&server, Options { contexts: wanted, ..options() }).await.unwrap();
        assert_eq!(client.info().size_bytes, 5 * MIB, "{arguments:?}");
        if arguments[0] != "--mask-handshake=1" {
            assert!(!client.info().structured && client.info().contexts.is_empty(), "{arguments:?}");
        }
        assert!(client.read(12_345, 3 << 20).await.unwrap() == pattern(12_345, 3 << 20), "{arguments:?}");
        client.disconnect().await;
    }
}

#[tokio::test]
async fn block_sizes_of_the_server_are_honoured() {
    let directory = tempfile::tempdir().unwrap();
    let policy = ["--filter=blocksize-policy", "pattern", "10M", "blocksize-minimum=4096", "blocksize-maximum=1M"];
    let policy: Vec<_> =
        policy.into_iter().chain(["blocksize-preferred=64k", "blocksize-error-policy=error"]).collect();
    let server = Server::nbdkit(&directory.path().join("s"), &policy);
    let client = connect(&server, Options { contexts: contexts(&[BASE_ALLOCATION]), ..options() }).await.unwrap();
    let info = client.info();
    assert_eq!((info.block_min, info.block_preferred, info.block_max), (4096, 65_536, 1 << 20));
    for (offset, length) in [(1, 1), (4095, 2), (4096, 4096), (10_000, 3 << 20), (10 * MIB - 3, 3)] {
        let data = client.read(offset, length).await.unwrap();
        assert!(data == pattern(offset, length as usize), "{length} at {offset}");
    }
    let extents = client.block_status(BASE_ALLOCATION, 5, 10).await.unwrap();
    assert_eq!(plain(&extents), [(5, 10, 0)]);

    let policy: Vec<_> = policy.into_iter().map(|word| if word == "pattern" { "memory" } else { word }).collect();
    let server = Server::nbdkit(&directory.path().join("t"), &policy);
    let client = connect(&server, options()).await.unwrap();
    let data = Bytes::from(pattern(0, 3 << 20));
    client.write(4096, data.clone()).await.unwrap();
    assert!(client.read(4096, 3 << 20).await.unwrap() == data);
    match client.write(100, data).await {
        Err(Error::Unaligned { offset: 100, block: 4096, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn errors_of_the_server_name_what_failed_and_where() {
    let directory = tempfile::tempdir().unwrap();
    let trigger = directory.path().join("trigger");
    let file = format!("error-file={}", trigger.display());
    let server = Server::nbdkit(
        &directory.path().join("s"),
        &["--filter=error", "memory", "4M", "error-pread=ENOSPC", "error-rate=100%", &file],
    );
    let client = connect(&server, options()).await.unwrap();
    client.read(4096, 512).await.unwrap();
    std::fs::write(&trigger, "").unwrap();
    let error = client.read(4096, 512).await.unwrap_err();
    match &error {
        Error::Server { command: "read", offset: 4096, length: 512, name: "ENOSPC", errno: 28, .. } => {}
        other => panic!("{other:?}"),
    }
    assert!(error.to_string().contains("ENOSPC") && !error.is_retryable());
    // The connection was not hurt.
    std::fs::remove_file(&trigger).unwrap();
    client.read(4096, 512).await.unwrap();
}

#[tokio::test]
async fn what_the_export_cannot_do_is_refused_before_it_is_sent() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(&directory.path().join("s"), &["--readonly", "memory", "1M"]);
    let client = connect(&server, options()).await.unwrap();
    assert!(matches!(client.read(MIB - 1, 2).await, Err(Error::OutOfRange { size: MIB, .. })));
    assert!(matches!(client.read(u64::MAX, 2).await, Err(Error::OutOfRange { .. })));
    assert!(matches!(client.write(0, Bytes::from_static(b"x")).await, Err(Error::ReadOnly { .. })));
    assert!(matches!(client.write_zeroes(0, 512, true).await, Err(Error::ReadOnly { .. })));
    client.flush().await.unwrap();
}

#[tokio::test]
async fn a_wrong_name_and_a_missing_server_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let missing = Client::connect(&Address::Unix(socket.clone()), options()).await.unwrap_err();
    assert!(matches!(missing, Error::Connect { .. }) && missing.is_retryable());
    let image = holey_image(directory.path());
    let server = Server::qemu_nbd(&socket, &["--read-only", "--export-name=vda", image.to_str().unwrap()]);
    match connect(&server, Options { export: "vdb".into(), ..options() }).await {
        Err(Error::UnknownExport { name, message }) => assert!(name == "vdb" && !message.is_empty(), "{message}"),
        other => panic!("{other:?}"),
    }
    let client = connect(&server, Options { export: "vda".into(), ..options() }).await.unwrap();
    assert_eq!(client.info().size_bytes, 64 * MIB);
    let listed = list_exports(&server.address()).await.unwrap();
    assert_eq!(listed.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["vda"]);
}

#[tokio::test]
async fn a_storage_daemon_lists_and_serves_its_exports() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let socket = directory.path().join("s");
    let file = format!("driver=file,node-name=f,read-only=on,filename={}", image.display());
    let listen = format!("addr.type=unix,addr.path={}", socket.display());
    let mut arguments = vec!["--blockdev", &file, "--blockdev", "driver=qcow2,node-name=q,file=f,read-only=on"];
    arguments.extend(["--nbd-server", &listen, "--export", "nbd,id=a,node-name=q,name=one,description=First"]);
    arguments.extend(["--export", "nbd,id=b,node-name=q,name=two,bitmaps.0=b0"]);
    let server = Server::start("qemu-storage-daemon", &arguments, &socket);
    // The socket is there before the exports are.
    let began = Instant::now();
    let mut listed = list_exports(&server.address()).await.unwrap();
    while listed.len() < 2 && began.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        listed = list_exports(&server.address()).await.unwrap();
    }
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[0].name.as_str(), listed[0].description.as_str()), ("one", "First"));
    let wanted = vec![dirty_bitmap("b0")];
    let options = Options { export: "two".into(), contexts: wanted.clone(), connections: 3, ..options() };
    let client = connect(&server, options).await.unwrap();
    let extents = client.extents(&wanted[0], 0..64 * MIB).unwrap().collect().await.unwrap();
    assert_eq!(extents.iter().filter(|e| e.flags & DIRTY != 0).count(), 3);
    assert!(client.read(2 * MIB, 4096).await.unwrap().iter().all(|b| *b == 3));
}

#[tokio::test]
async fn a_server_for_a_single_client_is_content_with_one_connection() {
    let directory = tempfile::tempdir().unwrap();
    let image = holey_image(directory.path());
    let socket = directory.path().join("s");
    let arguments = ["--read-only", "--shared=1", "--socket", socket.to_str().unwrap(), image.to_str().unwrap()];
    let mut server = Server::start("qemu-nbd", &arguments, &socket);
    let client = connect(&server, Options { connections: 4, ..options() }).await.unwrap();
    let began = Instant::now();
    for i in 0..64 {
        client.read(i * MIB, MIB as u32).await.unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(5), "waits for connections that do not come");
    assert_eq!(client.connections_up(), 1);
    client.disconnect().await;
    assert!(matches!(client.read(0, 1).await, Err(Error::Closed)));
    // It ends when its only client has left.
    assert!(server.wait_for_end(Duration::from_secs(10)));
}

#[tokio::test]
async fn a_slow_server_is_kept_busy_by_many_requests_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--threads=32", "--filter=delay", "pattern", "64M", "rdelay=100ms"];
    let server = Server::nbdkit(&directory.path().join("s"), &arguments);
    let client = connect(&server, Options { queue_depth: 32, connections: 1, ..options() }).await.unwrap();
    let began = Instant::now();
    futures::future::join_all((0..64).map(|i| client.read(i * MIB, 4096))).await;
    // One by one it would be 6.4 s.
    assert!(began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn tcp_works_as_well() {
    let directory = tempfile::tempdir().unwrap();
    let pid = directory.path().join("pid");
    let (port, _server) = loop {
        // A port that is free now; somebody else may be quicker, then another is tried.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (number, pid_path) = (port.to_string(), pid.to_str().unwrap());
        let arguments = ["--foreground", "--exit-with-parent", "-P", pid_path, "-i", "127.0.0.1", "-p", &number];
        let arguments: Vec<_> = arguments.into_iter().chain(["pattern", "64M"]).collect();
        // nbdkit writes its process id when it listens.
        let server = std::panic::catch_unwind(|| Server::start("nbdkit", &arguments, &pid));
        if let Ok(server) = server {
            break (port, server);
        }
    };
    let address: Address = format!("nbd://localhost:{port}").parse().unwrap();
    let client = Client::connect(&address, Options { connections: 4, ..options() }).await.unwrap();
    let reads = (0..16).map(|i| client.read(i * 4 * MIB + 3, 3 << 20));
    for (i, data) in futures::future::try_join_all(reads).await.unwrap().into_iter().enumerate() {
        assert!(data == pattern(i as u64 * 4 * MIB + 3, 3 << 20));
    }
    client.disconnect().await;
}

#[tokio::test]
async fn dropping_a_read_leaves_the_connection_whole() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--filter=delay", "pattern", "64M", "rdelay=30ms"];
    let server = Server::nbdkit(&directory.path().join("s"), &arguments);
    let client = connect(&server, Options { connections: 1, queue_depth: 4, ..options() }).await.unwrap();
    for i in 0..40u64 {
        // Given up before, while, and after the answer arrives.
        let _ = tokio::time::timeout(Duration::from_millis(i), client.read(i * MIB, MIB as u32)).await;
    }
    assert!(client.read(5 * MIB, MIB as u32).await.unwrap() == pattern(5 * MIB, MIB as usize));
}
