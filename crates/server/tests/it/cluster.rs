//! Two daemons over one state.

use std::time::Duration;

use serde_json::{Value, json};
use virtward_api::{Code, Role};

use crate::common::{Daemon, Place};

async fn host(daemon: &Daemon, name: &str) -> Value {
    daemon.get(&format!("/api/v1/hosts/{name}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn any_daemon_shows_all_and_takes_requests_for_all() {
    let (one, two) = Place::two().await;
    one.vm("web1", &[], 1).await;
    let web2 = two.vm("web2", &["gold"], 24).await;
    let (one, two) = (one.start().await, two.start().await);
    for daemon in [&one, &two] {
        daemon.wait("all VMs", async || daemon.get("/api/v1/vms").await["total"] == 2).await;
        let overview = daemon.get("/api/v1/overview").await;
        assert_eq!((&overview["hosts"]["up"], &overview["vms"]["total"]), (&json!(2), &json!(2)));
    }
    let vm = one.get("/api/v1/vms/web2").await;
    assert_eq!((&vm["host"], &vm["tags"], &vm["is_stale"]), (&json!("h2"), &json!(["gold"]), &json!(false)));

    // Asked of one, done by the other, watched and read from where it was asked.
    let job = one.post("/api/v1/jobs/backup", json!({ "vm": "web2" })).await;
    assert_eq!(job["host"], "h2");
    let id = job["id"].as_str().unwrap();
    let job = one.ended(id).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    let log = one.get(&format!("/api/v1/jobs/{id}/log")).await;
    assert_eq!(log.as_array().unwrap().last().unwrap()["message"], "done");
    one.wait("the other's restore point", async || one.get("/api/v1/points").await["total"] == 1).await;

    // Progress is seen from afar, and cancelling reaches where it runs.
    let slow = json!({ "vm": "web2", "full": true, "bandwidth_bytes_s": 1 << 20 });
    let job = one.post("/api/v1/jobs/backup", slow).await;
    let id = job["id"].as_str().unwrap();
    one.running(id).await;
    one.post(&format!("/api/v1/jobs/{id}/cancel"), json!({})).await;
    assert_eq!(one.ended(id).await["state"], "cancelled");
    assert_eq!(two.ended(id).await["state"], "cancelled");

    // What is changed at one holds at the other.
    let policy = json!({"policy": {"name": "gold", "repository": "default", "select": {"any": ["tag:gold"]},
        "schedule": {"cron": "0 3 * * *", "time_zone": "UTC"}}});
    let made: Result<Value, _> = one.client.put("/api/v1/policies/gold", &policy, None).await;
    made.unwrap();
    two.wait("the policy", async || {
        let vm = two.get("/api/v1/vms/web2").await;
        vm["policies"] == json!(["gold"])
    })
    .await;
    let token = one.token("t", Role::Viewer, &[]).await;
    let far = two.https(Some(token));
    two.wait("the token", async || far.get::<Value>("/api/v1/whoami").await.is_ok()).await;
    one.client.delete("/api/v1/tokens/t").await.unwrap();
    two.wait("its end", async || far.get::<Value>("/api/v1/whoami").await.is_err()).await;

    // A restore is done where it is wanted.
    let restore = json!({"point": "web2@latest", "name": "copy", "host": "h1",
        "disk_dir": one.place.path("disks").display().to_string()});
    std::fs::create_dir(one.place.path("disks")).unwrap();
    let job = two.post("/api/v1/jobs/restore", restore).await;
    let job = two.ended(job["id"].as_str().unwrap()).await;
    assert_eq!((&job["state"], &job["host"]), (&json!("succeeded"), &json!("h1")), "{job}");
    two.wait("the copy", async || two.get("/api/v1/vms").await["total"] == 3).await;
    let nowhere = json!({"point": "web2@latest", "name": "x", "host": "h9"});
    two.fails("POST", "/api/v1/jobs/restore", Some(nowhere), Code::NotFound).await;
    assert_eq!(two.get("/api/v1/vms/copy").await["host"], "h1");
    let _ = web2;
    one.end().await;
    two.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_vanishes_is_unknown_and_finds_its_job_interrupted() {
    let (one, two) = Place::two().await;
    one.vm("web1", &[], 1).await;
    two.vm("web2", &[], 24).await;
    let (one, two) = (one.start().await, two.start().await);
    one.wait("all VMs", async || one.get("/api/v1/vms").await["total"] == 2).await;
    let slow = json!({ "vm": "web2", "full": true, "bandwidth_bytes_s": 1 << 20 });
    let job = one.post("/api/v1/jobs/backup", slow).await;
    let id = job["id"].as_str().unwrap().to_owned();
    one.running(&id).await;
    let place = two.kill().await;
    one.wait("its silence to be seen", async || host(&one, "h2").await["state"] == "unknown").await;
    assert!(host(&one, "h2").await["reason"].as_str().unwrap().contains("does not answer"));
    let vm = one.get("/api/v1/vms/web2").await;
    assert_eq!((&vm["is_stale"], &vm["host"]), (&json!(true), &json!("h2")));
    let path = format!("/api/v1/jobs/{id}");
    assert_eq!(one.get(&path).await["state"], "running", "nobody knows better");
    // Its own goes on.
    one.backup("web1").await;

    let two = place.start().await;
    one.wait("its return", async || host(&one, "h2").await["state"] == "up").await;
    one.wait("the job's end", async || one.get(&path).await["state"] == "interrupted").await;
    one.wait("another try", async || {
        let jobs = one.get("/api/v1/jobs?vm=web2").await;
        jobs["items"][0]["origin"]["after"] == json!(id)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    two.end().await;
    one.wait("its stop to be told", async || {
        host(&one, "h2").await["reason"].as_str().is_some_and(|reason| reason.contains("was stopped"))
    })
    .await;
    one.end().await;
}
