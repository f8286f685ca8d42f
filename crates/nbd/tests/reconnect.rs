//! Connections that break in the middle, and servers that come back.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use support::{MIB, Server, options, pattern};
use virtward_nbd::{BASE_ALLOCATION, Client, Error, Options, ReconnectPolicy};

fn stubborn() -> Options {
    let reconnect = ReconnectPolicy { attempts: 200, delay_max: Duration::from_millis(100), ..Default::default() };
    Options { reconnect, ..options() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_survive_a_server_that_is_killed_and_restarted_in_mid_stream() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let start = || Server::nbdkit(&socket, &["--filter=delay", "pattern", "1G", "rdelay=2ms"]);
    let server = start();
    let client = Client::connect(&server.address(), Options { connections: 2, ..stubborn() }).await.unwrap();
    let next = Arc::new(AtomicU64::new(0));
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, next) = (client.clone(), next.clone());
        readers.spawn(async move {
            loop {
                let offset = next.fetch_add(64 << 10, Ordering::Relaxed);
                if offset >= 256 * MIB {
                    return;
                }
                assert!(client.read(offset, 64 << 10).await.unwrap() == pattern(offset, 64 << 10));
            }
        });
    }
    let mut server = server;
    for part in 1..4u64 {
        while next.load(Ordering::Relaxed) < part * 64 * MIB {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        server.kill();
        tokio::time::sleep(Duration::from_millis(50)).await;
        server = start();
    }
    readers.join_all().await;
    client.disconnect().await;
}

#[tokio::test]
async fn a_walk_over_extents_survives_as_well() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let start = || Server::nbdkit(&socket, &["memory", "64G"]);
    let server = start();
    let contexts = vec![BASE_ALLOCATION.to_string()];
    let client = Client::connect(&server.address(), Options { contexts, ..stubborn() }).await.unwrap();
    let mut walk = client.extents(BASE_ALLOCATION, 0..64 << 30).unwrap();
    server.kill();
    let restarted = start();
    let batch = walk.next_batch().await.unwrap().unwrap();
    assert_eq!((batch[0].offset, batch[0].end()), (0, 64 << 30));
    assert_eq!(walk.next_batch().await.unwrap(), None);
    drop(restarted);
}

#[tokio::test]
async fn without_a_policy_the_loss_is_reported_at_once_and_later_requests_say_so_too() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(&directory.path().join("s"), &["memory", "1M"]);
    let client = Client::connect(&server.address(), options()).await.unwrap();
    client.read(0, 512).await.unwrap();
    server.kill();
    let error = client.read(0, 512).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }) && error.is_retryable(), "{error:?}");
    assert!(client.read(0, 512).await.is_err());
}

#[tokio::test]
async fn a_server_that_stays_away_is_given_up_within_the_policy() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(&directory.path().join("s"), &["memory", "1M"]);
    let reconnect = ReconnectPolicy { attempts: 1000, total: Duration::from_millis(300), ..Default::default() };
    let client = Client::connect(&server.address(), Options { reconnect, ..options() }).await.unwrap();
    server.kill();
    let began = Instant::now();
    let error = client.read(0, 512).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. } | Error::Disconnected { .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_lost_flush_boundary_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let image = directory.path().join("raw");
    std::fs::File::create(&image).unwrap().set_len(MIB).unwrap();
    let start = || Server::qemu_nbd(&socket, &["--format=raw", "--cache=writeback", image.to_str().unwrap()]);
    let server = start();
    let client = Client::connect(&server.address(), stubborn()).await.unwrap();
    client.write(0, Bytes::from_static(&[1; 512])).await.unwrap();
    client.flush().await.unwrap();
    client.write(512, Bytes::from_static(&[2; 1024])).await.unwrap();
    server.kill();
    let server = start();
    // The write itself is repeated on the new connection; what was acknowledged before is in doubt.
    client.write(4096, Bytes::from_static(&[3; 512])).await.unwrap();
    match client.flush().await {
        Err(Error::FlushLost { bytes: 1024 }) => {}
        other => panic!("{other:?}"),
    }
    client.write(512, Bytes::from_static(&[2; 1024])).await.unwrap();
    client.flush().await.unwrap();
    client.disconnect().await;
    drop(server);
}
