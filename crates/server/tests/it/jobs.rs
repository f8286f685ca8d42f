//! The life of jobs.

use std::time::Duration;

use serde_json::{Value, json};
use virtward_api::{Code, Job};
use virtward_server::config::{Config, RepositoryConfig};

use crate::common::{Place, problem, send};

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_asked_for_watched_and_restored() {
    let place = Place::new();
    let vm = place.vm("web1", &[], 4).await;
    let daemon = place.start().await;
    let job = daemon.backup("web1").await;
    assert_eq!(job["vm"], json!({"uuid": vm, "name": "web1"}));
    assert_eq!((job["kind"].as_str(), job["result"]["kind"].as_str()), (Some("backup"), Some("full")));
    assert!(job["result"]["stored_bytes"].as_u64() >= Some(4 << 20), "{job}");
    assert_eq!(job["origin"]["by"], "root");
    let log = daemon.get(&format!("/api/v1/jobs/{}/log", job["id"].as_str().unwrap())).await;
    let said: Vec<&str> = log.as_array().unwrap().iter().map(|entry| entry["message"].as_str().unwrap()).collect();
    assert!(said.contains(&"copying") && said.last() == Some(&"done"), "{said:?}");

    let body = json!({"point": "web1@latest", "name": "web1-copy", "dry_run": true});
    let plan = daemon.post("/api/v1/jobs/restore", body).await;
    let path = daemon.place.path("web1-copy-vda.raw").display().to_string();
    assert_eq!((plan["disks"][0]["path"].as_str(), plan["replaces"].as_bool()), (Some(&*path), Some(false)));
    assert!(!daemon.place.path("web1-copy-vda.raw").exists(), "a dry run wrote");
    let job = daemon.post("/api/v1/jobs/restore", json!({"point": "web1@latest", "name": "web1-copy"})).await;
    let job = daemon.ended(job["id"].as_str().unwrap()).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    let (one, other) = (daemon.place.path("web1.raw"), daemon.place.path("web1-copy-vda.raw"));
    assert!(std::fs::read(one).unwrap() == std::fs::read(other).unwrap(), "the copy differs");
    daemon.wait("the new VM", async || daemon.get("/api/v1/vms").await["total"] == 2).await;
    // In place it is refused unless asked for, before anything is done and as a job too.
    daemon
        .fails("POST", "/api/v1/jobs/restore", Some(json!({"point": "web1@latest", "dry_run": true})), Code::Conflict)
        .await;

    let job = daemon.post("/api/v1/jobs/verify", json!({})).await;
    let job = daemon.ended(job["id"].as_str().unwrap()).await;
    assert_eq!((job["state"].as_str(), job["result"]["points"].as_u64()), (Some("succeeded"), Some(1)), "{job}");
    let repository = daemon.get("/api/v1/repositories/default").await;
    assert_eq!((repository["state"].as_str(), repository["points"].as_u64()), (Some("ok"), Some(1)));
    assert_eq!(repository["last_verify"]["is_ok"], true);
    assert_eq!(repository["last_gc"], Value::Null);
    let job = daemon.post("/api/v1/jobs/gc", json!({})).await;
    let job = daemon.ended(job["id"].as_str().unwrap()).await;
    assert_eq!((&job["state"], &job["kind"]), (&json!("succeeded"), &json!("gc")), "{job}");
    assert_eq!((&job["result"]["freed_bytes"], &job["result"]["points"]), (&json!(0), &json!(0)), "{job}");
    let kept = async || daemon.get("/api/v1/repositories/default").await["last_gc"].clone();
    daemon.wait("the collection to be kept", async || kept().await["job"] == job["id"]).await;
    assert_eq!(kept().await["is_ok"], true);
    assert_eq!(kept().await["said"], json!({"key": "collected", "values": {"freed_bytes": 0}}));
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_makes_one_job() {
    let place = Place::new();
    place.vm("web1", &[], 1).await;
    let daemon = place.start().await;
    let ask = |key: &'static str, full: bool| {
        let client = daemon.client.clone();
        async move { client.post::<Job>("/api/v1/jobs/backup", &json!({"vm": "web1", "full": full}), Some(key)).await }
    };
    let (one, two, three) = tokio::join!(ask("a", false), ask("a", false), ask("a", false));
    let ids = [one.unwrap().id, two.unwrap().id, three.unwrap().id];
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(daemon.ended(&ids[0].to_string()).await["state"], "succeeded");
    assert_eq!(ask("a", false).await.unwrap().id, ids[0]);
    assert_ne!(ask("b", false).await.unwrap().id, ids[0]);
    let other = [("idempotency-key", "a")];
    let answer =
        send(&daemon.client, "POST", "/api/v1/jobs/backup", &other, Some(json!({"vm": "web1", "full": true}))).await;
    problem(&answer, Code::IdempotencyMismatch);
    let bad = [("idempotency-key", "with space")];
    let answer = send(&daemon.client, "POST", "/api/v1/jobs/backup", &bad, Some(json!({"vm": "web1"}))).await;
    problem(&answer, Code::BadRequest);
    let place = daemon.end().await;
    // Also a daemon that starts later knows.
    let daemon = place.start().await;
    let again: Job =
        daemon.client.post("/api/v1/jobs/backup", &json!({"vm": "web1", "full": false}), Some("a")).await.unwrap();
    assert_eq!(again.id, ids[0]);
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_one_vm_wait_for_each_other_and_are_cancelled() {
    let place = Place::new();
    place.vm("web1", &[], 64).await;
    let daemon = place.start().await;
    let slow = json!({"vm": "web1", "bandwidth_bytes_s": 4 << 20});
    let one = daemon.post("/api/v1/jobs/backup", slow.clone()).await;
    let two = daemon.post("/api/v1/jobs/backup", slow).await;
    let (one, two) = (one["id"].as_str().unwrap(), two["id"].as_str().unwrap());
    daemon.running(one).await;
    daemon
        .wait("the second to say why it waits", async || {
            let job = daemon.get(&format!("/api/v1/jobs/{two}")).await;
            job["waiting_for"].as_str().is_some_and(|why| why.contains("backup of this VM"))
        })
        .await;
    let vm = daemon.get("/api/v1/vms/web1").await;
    assert!(vm["job"] == one || vm["job"] == two);
    assert_eq!(daemon.get("/api/v1/jobs?state=queued,running").await["total"], 2);
    for id in [two, one] {
        let answer = send(&daemon.client, "POST", &format!("/api/v1/jobs/{id}/cancel"), &[], None).await;
        assert_eq!(answer.status, 202);
        assert_eq!(daemon.ended(id).await["state"], "cancelled");
    }
    daemon.fails("POST", &format!("/api/v1/jobs/{one}/cancel"), None, Code::Conflict).await;
    assert_eq!(daemon.get("/api/v1/vms/web1/points").await["total"], 0);
    assert_eq!(daemon.backup("web1").await["state"], "succeeded");
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_when_the_daemon_ended_is_interrupted_and_done_again() {
    for is_orderly in [true, false] {
        let place = Place::new();
        place.vm("web1", &[], 48).await;
        let daemon = place.start().await;
        let job = daemon.post("/api/v1/jobs/backup", json!({"vm": "web1", "bandwidth_bytes_s": 8 << 20})).await;
        let id = job["id"].as_str().unwrap().to_owned();
        daemon.running(&id).await;
        let place = if is_orderly { daemon.end().await } else { daemon.kill().await };
        let daemon = place.start().await;
        let job = daemon.get(&format!("/api/v1/jobs/{id}")).await;
        assert_eq!(
            (job["state"].as_str(), job["error"]["code"].as_str()),
            (Some("interrupted"), Some("interrupted")),
            "{job}"
        );
        if !is_orderly {
            let all = daemon.get("/api/v1/jobs").await;
            let next = &all["items"][0];
            assert_eq!(
                (next["origin"]["after"].as_str(), next["origin"]["attempt"].as_u64()),
                (Some(&*id), Some(2)),
                "{all}"
            );
            assert_eq!(daemon.ended(next["id"].as_str().unwrap()).await["state"], "succeeded");
        }
        daemon.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fails_says_why_and_a_repository_that_is_gone_is_known() {
    let place = Place::new();
    place.vm("web1", &[], 1).await;
    let config = place.config();
    let other = RepositoryConfig {
        name: "gone".into(),
        location: place.path("gone").display().to_string(),
        ..config.repositories[0].clone()
    };
    let config = Config { repositories: vec![config.repositories[0].clone(), other], ..config };
    let daemon = place.start_with(config).await;
    let job = daemon.post("/api/v1/jobs/backup", json!({"vm": "web1", "repository": "gone"})).await;
    let job = daemon.ended(job["id"].as_str().unwrap()).await;
    assert_eq!((job["state"].as_str(), job["error"]["code"].as_str()), (Some("failed"), Some("repository")), "{job}");
    assert!(job["error"]["message"].as_str().unwrap().contains("not a Virtward repository"), "{job}");
    let overview = daemon.get("/api/v1/overview").await;
    assert_eq!(overview["failures"][0]["id"], job["id"]);
    let events = daemon.get("/api/v1/events?severity=error").await;
    assert!(events["items"].as_array().unwrap().iter().any(|event| event["kind"] == "job-failed"), "{events}");
    daemon
        .wait("the repository to be known as unusable", async || {
            daemon.get("/api/v1/repositories/gone").await["state"] == "unusable"
        })
        .await;
    for (path, body) in [
        ("/api/v1/jobs/backup", json!({"vm": "nope"})),
        ("/api/v1/jobs/backup", json!({"vm": "web1", "repository": "nope"})),
        ("/api/v1/jobs/restore", json!({"point": "nope@latest"})),
    ] {
        daemon.fails("POST", path, Some(body), Code::NotFound).await;
    }
    daemon.fails("POST", "/api/v1/jobs/backup", Some(json!({"vm": "web1", "fast": true})), Code::BadRequest).await;
    daemon
        .fails("POST", "/api/v1/jobs/backup", Some(json!({"vm": "web1", "bandwidth_bytes_s": 0})), Code::Invalid)
        .await;
    let plain =
        send(&daemon.client, "POST", "/api/v1/jobs/backup", &[("content-type", "text/plain")], Some(Value::Null)).await;
    problem(&plain, Code::UnsupportedMediaType);
    tokio::time::sleep(Duration::from_millis(10)).await;
    daemon.end().await;
}
