//! What is shown: VMs, hosts, restore points, pages of them, and errors.

use serde_json::Value;
use virtward_api::{Code, openapi, routes};
use virtward_engine::reconcile::inventory::HostState;
use virtward_hypervisor::{Hypervisor, StartOptions, UndefineOptions, sim::AgentMode};

use crate::common::{Place, send};

fn names(page: &Value) -> Vec<String> {
    page["items"].as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_filtered_sorted_and_paged() {
    let place = Place::new();
    for number in 0..25 {
        let tags: &[&str] = if number % 5 == 0 { &["gold"] } else { &[] };
        place.vm(&format!("vm{number:02}"), tags, 0).await;
    }
    let daemon = place.start().await;
    let mut all = Vec::new();
    let mut path = "/api/v1/vms?limit=10".to_owned();
    loop {
        let page = daemon.get(&path).await;
        assert_eq!(page["total"], 25);
        all.extend(names(&page));
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/api/v1/vms?limit=10&cursor={next}");
    }
    let expected: Vec<String> = (0..25).map(|number| format!("vm{number:02}")).collect();
    assert_eq!(all, expected);
    let mut fallen = Vec::new();
    let mut path = "/api/v1/vms?limit=7&sort=-name".to_owned();
    loop {
        let page = daemon.get(&path).await;
        fallen.extend(names(&page));
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/api/v1/vms?limit=7&sort=-name&cursor={next}");
    }
    assert_eq!(fallen, expected.iter().rev().cloned().collect::<Vec<_>>());
    assert_eq!(names(&daemon.get("/api/v1/vms?tag=gold").await), ["vm00", "vm05", "vm10", "vm15", "vm20"]);
    assert_eq!(names(&daemon.get("/api/v1/vms?name=vm1*&state=shut-off&limit=2").await), ["vm10", "vm11"]);
    assert_eq!(names(&daemon.get("/api/v1/vms?name=24").await), ["vm24"]);
    assert_eq!(names(&daemon.get("/api/v1/vms?state=running").await), [""; 0]);
    assert_eq!(daemon.get("/api/v1/vms?protection=unprotected").await["total"], 25);
    for bad in ["state=dead", "limit=0", "limit=1001", "limit=x", "sort=colour", "cursor=zz", "color=red"] {
        daemon.fails("GET", &format!("/api/v1/vms?{bad}"), None, Code::BadRequest).await;
    }
    let problem = daemon.fails("GET", "/api/v1/vms/vm0", None, Code::NotFound).await;
    assert!(problem.hint.unwrap().contains("did you mean"));
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_found_by_what_its_guest_says() {
    let place = Place::new();
    let xml = "<domain type='qemu'><name>vm-0417</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type>hvm</type></os>\
               <devices><interface type='bridge'><mac address='52:54:00:AA:00:07'/><source bridge='br0'/></interface>\
               <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>";
    let uuid = place.sim.define(xml).await.unwrap().uuid;
    place.sim.start(uuid, StartOptions::default()).await.unwrap();
    place.vm("other", &[], 0).await;
    let sim = place.sim.clone();
    let daemon = place.start().await;
    let vm = daemon.get("/api/v1/vms/vm-0417").await;
    assert_eq!(vm["guest"], serde_json::json!({"is_agent_connected": false, "hostname": null, "os": null}));
    assert!(daemon.get("/api/v1/vms/other").await["guest"].is_null());
    sim.set_agent(uuid, AgentMode::Answers { filesystems: 1 });
    let said = async || !daemon.get("/api/v1/vms/vm-0417").await["guest"]["hostname"].is_null();
    daemon.wait("the guest to be asked", said).await;
    let vm = daemon.get("/api/v1/vms/vm-0417").await;
    let os = "Simulated GNU/Linux 1";
    assert_eq!(vm["guest"], serde_json::json!({"is_agent_connected": true, "hostname": "vm-0417", "os": os}));
    assert_eq!(vm["networks"][0]["addresses"], serde_json::json!(["192.0.2.7"]));
    assert_eq!(daemon.get("/api/v1/vms").await["items"][1]["hostname"], "vm-0417");
    for wanted in ["192.0.2.7", "192.0.2.*", "0417", "vm-*"] {
        assert_eq!(names(&daemon.get(&format!("/api/v1/vms?search={wanted}")).await), ["vm-0417"], "{wanted}");
    }
    assert_eq!(names(&daemon.get("/api/v1/vms?search=192.0.2.70").await), [""; 0]);
    sim.destroy(uuid).await.unwrap();
    daemon.wait("its end", async || daemon.get("/api/v1/vms/vm-0417").await["guest"]["hostname"].is_null()).await;
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inventory_follows_events_and_tells_three_kinds_of_absence_apart() {
    let place = Place::new();
    let web1 = place.vm("web1", &["gold"], 0).await;
    let (sim, reach) = (place.sim.clone(), place.reach.clone());
    let daemon = place.start().await;
    assert_eq!(daemon.get("/api/v1/vms/web1").await["state"], "shut-off");
    sim.start(web1, StartOptions::default()).await.unwrap();
    let state = async || daemon.get("/api/v1/vms/web1").await["state"].as_str().unwrap().to_owned();
    daemon.wait("the start to be seen", async || state().await == "running").await;
    for (told, shown) in
        [(HostState::LibvirtdDown, "libvirtd-down"), (HostState::Down, "down"), (HostState::Unknown, "unknown")]
    {
        *reach.lock().unwrap() = told;
        sim.set_connected(false);
        daemon.wait(shown, async || daemon.get("/api/v1/hosts/h1").await["state"] == shown).await;
        let host = daemon.get("/api/v1/hosts/h1").await;
        assert!(host["reason"].as_str().unwrap().contains("connection"), "{host}");
        // What was seen stays, and is marked.
        let vm = daemon.get("/api/v1/vms/web1").await;
        assert_eq!((vm["state"].as_str(), vm["is_stale"].as_bool()), (Some("running"), Some(true)));
        sim.set_connected(true);
        daemon.wait("the return", async || daemon.get("/api/v1/hosts/h1").await["state"] == "up").await;
    }
    sim.destroy(web1).await.unwrap();
    sim.undefine(web1, UndefineOptions::default()).await.unwrap();
    daemon.wait("the VM to go", async || daemon.get("/api/v1/vms").await["total"] == 0).await;
    let kinds = daemon.get("/api/v1/events").await;
    let kinds: Vec<&str> = kinds["items"].as_array().unwrap().iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == "host-state").count(), 7, "{kinds:?}");
    assert!(kinds.contains(&"vm-removed") && kinds.contains(&"vm-state"), "{kinds:?}");
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_route_is_there_and_others_are_problems() {
    let daemon = Place::new().start().await;
    let document: Value = daemon.get("/api/v1/openapi.json").await;
    assert_eq!(document, openapi::document());
    for route in routes::ROUTES.iter().filter(|route| route.name != "stream") {
        let path = route.path.replace(['{', '}'], "");
        let answer = send(&daemon.client, route.method.as_str(), &path, &[], None).await;
        let text = String::from_utf8_lossy(&answer.body);
        assert!(answer.status != 405 && !text.contains("there is no such path"), "{path}: {text}");
    }
    daemon.fails("GET", "/api/v1/nothing", None, Code::NotFound).await;
    daemon.fails("GET", "/no-page", None, Code::NotFound).await;
    daemon.fails("PATCH", "/api/v1/vms", None, Code::MethodNotAllowed).await;
    let metrics = send(&daemon.client, "GET", "/metrics", &[], None).await;
    let text = String::from_utf8_lossy(&metrics.body);
    for name in [
        "virtward_info{version=",
        "virtward_host_state{host=\"h1\",state=\"up\"} 1",
        "virtward_jobs{state=\"running\"} 0",
    ] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
    assert_eq!(send(&daemon.client, "GET", "/readyz", &[], None).await.status, 200);
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_points_are_listed_newest_first_and_stay_when_the_vm_is_gone() {
    let place = Place::new();
    let vm = place.vm("web1", &[], 1).await;
    let sim = place.sim.clone();
    let daemon = place.start().await;
    for _ in 0..3 {
        daemon.backup("web1").await;
    }
    let page = daemon.get("/api/v1/vms/web1/points?limit=2").await;
    assert_eq!(page["total"], 3);
    let next = page["next"].as_str().unwrap();
    let rest = daemon.get(&format!("/api/v1/vms/web1/points?limit=2&cursor={next}")).await;
    let mut points: Vec<Value> = page["items"].as_array().unwrap().clone();
    points.extend(rest["items"].as_array().unwrap().clone());
    let taken: Vec<&str> = points.iter().map(|point| point["taken"].as_str().unwrap()).collect();
    let mut sorted = taken.clone();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!(taken, sorted);
    let id = points[0]["id"].as_str().unwrap();
    assert_eq!(daemon.get(&format!("/api/v1/points/{id}")).await, points[0]);
    let detail = daemon.get("/api/v1/vms/web1").await;
    assert_eq!((detail["points"].as_u64(), &detail["last_point"]), (Some(3), &points[0]["taken"]));
    sim.undefine(vm, UndefineOptions::default()).await.unwrap();
    daemon.wait("the VM to go", async || daemon.get("/api/v1/vms").await["total"] == 0).await;
    assert_eq!(daemon.get("/api/v1/vms/web1/points").await["total"], 3);
    daemon.fails("GET", "/api/v1/vms/web2/points", None, Code::NotFound).await;
    daemon.end().await;
}
