//! libvirt's built-in test driver, and hosts that are not there: what needs neither QEMU nor root.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use virtward_hypervisor::libvirt::Libvirt;
use virtward_hypervisor::{ErrorKind, Hypervisor, UndefineOptions, XmlView};
use virtward_model::VmState;

/// One number of /proc/self/status, such as VmRSS in KiB or Threads.
fn own_status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|l| l.starts_with(field)).expect("the field");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

/// Threads of this process that a connection owns; the event loop belongs to the process.
fn own_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
    let names = tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok());
    names.filter(|n| n.starts_with("libvirt-") && n.trim() != "libvirt-events").count()
}

/// One test, since it counts the threads and the memory of the whole process.
#[tokio::test]
async fn connections_work_end_and_leave_nothing() {
    unreachable_hosts_are_named().await;
    round(true).await;
    for _ in 0..30 {
        round(false).await;
    }
    let begun = own_status("VmRSS");
    for _ in 0..200 {
        round(false).await;
    }
    let grown = own_status("VmRSS").saturating_sub(begun);
    assert!(grown < 2048, "200 connections left {grown} KiB behind");
    threads_end().await;
}

/// Waits until no connection has a thread.
async fn threads_end() {
    let give_up = Instant::now() + Duration::from_secs(5);
    while own_threads() > 0 {
        assert!(Instant::now() < give_up, "{} threads are left", own_threads());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn round(closed: bool) {
    let hv = Libvirt::connect("test:///default").await.expect("the test driver");
    let test = hv.lookup("test").await.expect("its only domain");
    assert_eq!(test.state, VmState::Running);
    assert!(hv.xml(test.uuid, XmlView::Live).await.expect("xml").contains("<name>test</name>"));
    assert_eq!(hv.lookup("tset").await.expect_err("not there").kind, ErrorKind::NoDomain);
    hv.suspend(test.uuid).await.expect("suspend");
    hv.resume(test.uuid).await.expect("resume");
    let xml = "<domain type='test'><name>two</name><memory>8192</memory><os><type>hvm</type></os></domain>";
    let two = hv.define(xml).await.expect("define");
    assert_eq!(hv.list().await.expect("list").len(), 2);
    hv.undefine(two.uuid, UndefineOptions::default()).await.expect("undefine");
    let unsupported = hv.agent(test.uuid, "{}", 1).await.expect_err("no agent there");
    assert!(unsupported.code != 0 && unsupported.call.ends_with(" test"), "{unsupported:?}");
    if closed {
        hv.close().await;
        hv.close().await;
        assert_eq!(hv.list().await.expect_err("closed").kind, ErrorKind::Unreachable);
        threads_end().await;
    }
}

async fn unreachable_hosts_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    for (uri, kind) in [
        (format!("qemu+unix:///system?socket={}/none", dir.path().display()), ErrorKind::Unreachable),
        ("qemu+tcp://127.0.0.1:1/system".to_owned(), ErrorKind::Unreachable),
        ("qemu:///\0".to_owned(), ErrorKind::Invalid),
    ] {
        let error = Libvirt::connect(&uri).await.expect_err("nobody is there");
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.to_string().starts_with(&format!("connect to {uri}: ")), "{error}");
    }
    // A daemon that accepts and says nothing.
    let socket = dir.path().join("mute");
    let _mute = UnixListener::bind(&socket).expect("bind");
    let uri = format!("qemu+unix:///system?socket={}", socket.display());
    let begun = Instant::now();
    let error = Libvirt::connect_within(&uri, Duration::from_millis(300)).await.expect_err("mute");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}
