//! Definitions, states, the agent, and the connection itself.

use std::time::{Duration, Instant};

use uuid::Uuid;
use virtward_hypervisor::{DomainEventKind as Kind, ErrorKind, StartOptions, XmlView};
use virtward_model::{DiskDevice, DiskSource, VmState};

use crate::bench::{Bench, DISK_BYTES, Guest, domain_xml, event, eventually, expect_kind};

pub async fn host_is_described(bench: &dyn Bench) {
    let host = bench.hypervisor().host().await.expect("host");
    assert!(!host.name.is_empty() && !host.uuid.is_nil(), "{host:?}");
    assert!(host.libvirt_version >= 9_000_000 && host.qemu_version >= 7_002_000, "{host:?}");
}

pub async fn states_and_transitions(bench: &dyn Bench) {
    let hv = bench.hypervisor();
    let mut events = hv.events();
    let guest = Guest::define(bench, "life", &["qcow2"]).await;
    let id = guest.uuid;
    event(&mut events, id, "defined", |k| *k == Kind::Defined).await;
    assert_eq!(guest.vm().await.state, VmState::ShutOff);
    expect_kind(hv.destroy(id).await, ErrorKind::WrongState);
    expect_kind(hv.suspend(id).await, ErrorKind::WrongState);
    expect_kind(hv.resume(id).await, ErrorKind::WrongState);
    expect_kind(hv.reset(id).await, ErrorKind::WrongState);
    expect_kind(hv.shutdown(id).await, ErrorKind::WrongState);

    hv.start(id, StartOptions { paused: true, ..Default::default() }).await.expect("start paused");
    event(&mut events, id, "started", |k| matches!(k, Kind::Started { detail } if detail == "booted")).await;
    assert_eq!(guest.vm().await.state, VmState::Paused);
    expect_kind(hv.start(id, StartOptions::default()).await, ErrorKind::WrongState);
    hv.resume(id).await.expect("resume");
    event(&mut events, id, "resumed", |k| matches!(k, Kind::Resumed { .. })).await;
    assert_eq!(guest.vm().await.state, VmState::Running);
    expect_kind(hv.resume(id).await, ErrorKind::WrongState);
    hv.suspend(id).await.expect("suspend");
    event(&mut events, id, "suspended", |k| matches!(k, Kind::Suspended { detail } if detail == "paused")).await;
    hv.suspend(id).await.expect("suspending a paused guest changes nothing");
    hv.resume(id).await.expect("resume");
    hv.reset(id).await.expect("reset");
    event(&mut events, id, "rebooted", |k| *k == Kind::Rebooted).await;
    assert_eq!(guest.vm().await.state, VmState::Running);
    hv.destroy(id).await.expect("destroy");
    event(&mut events, id, "stopped", |k| matches!(k, Kind::Stopped { detail } if detail == "destroyed")).await;
    assert_eq!(guest.vm().await.state, VmState::ShutOff);
    guest.remove().await;
    event(&mut events, id, "undefined", |k| *k == Kind::Undefined).await;
    expect_kind(hv.xml(id, XmlView::Live).await, ErrorKind::NoDomain);
}

pub async fn definitions_and_lookups(bench: &dyn Bench) {
    let hv = bench.hypervisor();
    let guest = Guest::define(bench, "def", &["qcow2"]).await;
    assert_eq!(hv.lookup(&guest.uuid.to_string()).await.expect("by UUID").name, guest.name);
    assert!(hv.list().await.expect("list").iter().any(|vm| vm.uuid == guest.uuid));
    for view in [XmlView::Live, XmlView::Inactive, XmlView::Migratable] {
        let xml = hv.xml(guest.uuid, view).await.expect("xml");
        assert!(xml.contains("urn:virtward:contract") && xml.contains("kept &amp; safe"), "metadata lost: {xml}");
    }
    // What was read can be defined again: the same domain, changed.
    let xml = hv.xml(guest.uuid, XmlView::Inactive).await.expect("xml").replace("gold", "silver");
    assert_eq!(hv.define(&xml).await.expect("redefine").uuid, guest.uuid);
    assert!(hv.xml(guest.uuid, XmlView::Inactive).await.expect("xml").contains("silver"));

    for missing in ["no-such-guest", "", "7d11dd6e-0b23-4f0d-a4d1-5a0bb3c0ffee", "a/b'<&"] {
        expect_kind(hv.lookup(missing).await, ErrorKind::NoDomain);
    }
    let nobody = Uuid::new_v4();
    expect_kind(hv.start(nobody, StartOptions::default()).await, ErrorKind::NoDomain);
    expect_kind(hv.checkpoints(nobody).await, ErrorKind::NoDomain);
    expect_kind(hv.define("<domain>").await, ErrorKind::Invalid);
    expect_kind(hv.define("<domain type='qemu'><memory>1</memory></domain>").await, ErrorKind::Invalid);
    let other_uuid = domain_xml(&guest.name, "").replace("<metadata>", &format!("<uuid>{nobody}</uuid><metadata>"));
    expect_kind(hv.define(&other_uuid).await, ErrorKind::Invalid);
    guest.remove().await;
}

pub async fn disks_of_every_kind(bench: &dyn Bench) {
    let guest = Guest::start(bench, "disks", &["qcow2", "raw"]).await;
    let disks = guest.vm().await.disks;
    let named = |target: &str| disks.iter().find(|d| d.target == target).expect("disk");
    assert_eq!((named("vda").format.as_str(), named("vdb").format.as_str()), ("qcow2", "raw"));
    assert!(named("vda").source.path().is_some_and(|p| p.ends_with("-vda.qcow2")));
    assert_eq!((named("sda").device, &named("sda").source), (DiskDevice::Cdrom, &DiskSource::None));
    assert!(named("sda").read_only && !named("vda").read_only);
    guest.remove().await;
}

pub async fn agent_absent(bench: &dyn Bench) {
    let guest = Guest::define(bench, "noagent", &[]).await;
    let (hv, ping) = (&guest.hv, r#"{"execute":"guest-ping"}"#);
    expect_kind(hv.agent(guest.uuid, ping, 5).await, ErrorKind::WrongState);
    expect_kind(hv.fs_freeze(guest.uuid).await, ErrorKind::WrongState);
    hv.start(guest.uuid, StartOptions::default()).await.expect("start");
    let begun = Instant::now();
    expect_kind(hv.agent(guest.uuid, ping, 5).await, ErrorKind::AgentUnavailable);
    expect_kind(hv.fs_freeze(guest.uuid).await, ErrorKind::AgentUnavailable);
    expect_kind(hv.fs_thaw(guest.uuid).await, ErrorKind::AgentUnavailable);
    assert!(begun.elapsed() < Duration::from_secs(10), "an absent agent is known at once");
    guest.remove().await;
}

pub async fn agent_present(bench: &dyn Bench) {
    let (hv, id) = (bench.hypervisor(), bench.agent_guest().await);
    let ask = async |command: &str| hv.agent(id, &format!(r#"{{"execute":"{command}"}}"#), 10).await;
    assert!(ask("guest-ping").await.expect("ping").contains("return"));
    assert!(ask("guest-fsfreeze-status").await.expect("status").contains("thawed"));
    assert!(hv.fs_freeze(id).await.expect("freeze") >= 1);
    assert!(ask("guest-fsfreeze-status").await.expect("status").contains("frozen"));
    expect_kind(hv.fs_freeze(id).await, ErrorKind::Unsupported);
    assert!(hv.fs_thaw(id).await.expect("thaw") >= 1);
    assert!(ask("guest-fsfreeze-status").await.expect("status").contains("thawed"));
    assert_eq!(hv.fs_thaw(id).await.expect("thawing what is not frozen is no error"), 0);
    expect_kind(ask("guest-no-such-thing").await, ErrorKind::Unsupported);

    bench.hang_agent(id).await;
    let begun = Instant::now();
    expect_kind(hv.agent(id, r#"{"execute":"guest-ping"}"#, 1).await, ErrorKind::AgentUnavailable);
    assert!(begun.elapsed() < Duration::from_secs(8), "a hung agent is given up: {:?}", begun.elapsed());
    assert_eq!(hv.lookup(&id.to_string()).await.expect("a hung agent hangs nothing else").state, VmState::Running);
    hv.destroy(id).await.expect("destroy");
}

pub async fn monitor_and_stats(bench: &dyn Bench) {
    let guest = Guest::define(bench, "stats", &["qcow2"]).await;
    let (hv, id) = (&guest.hv, guest.uuid);
    let status = serde_json::json!({ "execute": "query-status" });
    expect_kind(hv.monitor(id, &status).await, ErrorKind::WrongState);
    assert!(!hv.stats().await.expect("stats").iter().any(|s| s.uuid == id), "an inactive domain has no counters");
    hv.start(id, StartOptions::default()).await.expect("start");
    assert_eq!(hv.monitor(id, &status).await.expect("query-status")["running"], true);
    let unknown = serde_json::json!({ "execute": "no-such-command" });
    expect_kind(hv.monitor(id, &unknown).await, ErrorKind::Unsupported);
    let stats = hv.stats().await.expect("stats");
    let mine = stats.iter().find(|s| s.uuid == id).expect("the guest's counters");
    assert_eq!((mine.name.as_str(), mine.vcpus, mine.memory_bytes), (guest.name.as_str(), 1, 32 << 20));
    let disk = mine.disks.iter().find(|d| d.target == "vda").expect("the disk's counters");
    assert_eq!(disk.capacity_bytes, DISK_BYTES);
    guest.remove().await;
}

pub async fn daemon_restart(bench: &dyn Bench) {
    let guest = Guest::start(bench, "restart", &["qcow2"]).await;
    let mut events = guest.hv.events();
    bench.restart_daemon().await;
    // A read right away either waits for the new connection or says that there is none; it never hangs.
    match tokio::time::timeout(Duration::from_secs(30), guest.hv.list()).await.expect("a read hangs") {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind, ErrorKind::Unreachable, "{e}"),
    }
    event(&mut events, Uuid::nil(), "connection lost", |k| *k == Kind::ConnectionLost).await;
    event(&mut events, Uuid::nil(), "connection restored", |k| *k == Kind::ConnectionRestored).await;
    eventually("the guest is known again", async || guest.hv.lookup(&guest.name).await.is_ok()).await;
    assert_eq!(guest.vm().await.state, VmState::Running, "guests outlive the daemon");
    // Events flow on the new connection too.
    guest.hv.suspend(guest.uuid).await.expect("suspend");
    event(&mut events, guest.uuid, "suspended", |k| matches!(k, Kind::Suspended { .. })).await;
    guest.remove().await;
}

pub async fn closing(bench: &dyn Bench) {
    let hv = bench.hypervisor();
    hv.close().await;
    hv.close().await;
    expect_kind(hv.list().await, ErrorKind::Unreachable);
}
