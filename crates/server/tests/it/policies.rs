//! Policies: applied, refused, carried out.

use serde_json::{Value, json};
use virtward_api::Code;

use crate::common::{Place, problem, send};

/// Due every minute, on the gold VMs.
fn gold() -> Value {
    json!({
        "name": "gold",
        "repository": "default",
        "select": {"any": ["tag:gold"]},
        "schedule": {"cron": ["* * * * *"], "time-zone": "UTC"},
        "retention": {"keep-last": 2},
    })
}

async fn put(daemon: &crate::common::Daemon, policy: Value, revision: Option<&str>) -> virtward_api::client::Answer {
    let headers: Vec<(&str, &str)> = revision.map(|revision| ("if-match", revision)).into_iter().collect();
    send(&daemon.client, "PUT", "/api/v1/policies/gold", &headers, Some(json!({ "policy": policy }))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_checked_compared_applied_and_explained() {
    let place = Place::new();
    place.vm("web1", &["gold"], 1).await;
    place.vm("web2", &[], 1).await;
    let daemon = place.start().await;
    daemon
        .wait("the plan", async || {
            let validated = daemon.post("/api/v1/policies/validate", json!({"policy": gold()})).await;
            assert_eq!(validated["is_valid"], true, "{validated}");
            validated["vms"].as_array().unwrap().len() == 1
        })
        .await;
    let source = "[[policy]]\nname = \"gold\"\nrepository = \"defualt\"\nselect.any = [\"tag:gold\"]\n\
                  retention.keep-last = 1\n[policy.schedule]\ncron = \"61 * * * *\"\ntime-zone = \"UTC\"\n";
    let bad = daemon.post("/api/v1/policies/validate", json!({"source": source, "file": "gold.toml"})).await;
    assert_eq!(bad["is_valid"], false);
    let lines: Vec<u64> = bad["findings"].as_array().unwrap().iter().filter_map(|f| f["line"].as_u64()).collect();
    assert!(lines.contains(&3) && lines.contains(&7), "{bad}");
    let refused = daemon.fails("PUT", "/api/v1/policies/gold", Some(json!({"source": source})), Code::Invalid).await;
    assert_eq!(refused.errors.len(), 2);

    let diff = daemon.post("/api/v1/policies/diff", json!({"policy": gold()})).await;
    assert_eq!((diff["is_new"].as_bool(), diff["vms_added"][0]["name"].as_str()), (Some(true), Some("web1")), "{diff}");
    let answer = put(&daemon, gold(), Some("0")).await;
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    problem(&put(&daemon, gold(), Some("0")).await, Code::RevisionMismatch);
    let mut more = gold();
    more["retention"] = json!({"keep-last": 3});
    let diff = daemon.post("/api/v1/policies/diff", json!({"policy": more})).await;
    assert_eq!(diff["changes"], json!([{"field": "retention.keep-last", "from": 2, "to": 3}]));
    assert_eq!(put(&daemon, more, Some("1")).await.status, 200);
    let policy = daemon.get("/api/v1/policies/gold").await;
    assert_eq!((policy["revision"].as_u64(), policy["vms"][0]["name"].as_str()), (Some(2), Some("web1")), "{policy}");
    daemon
        .wait("the planner to know", async || {
            let why = daemon.get("/api/v1/vms/web1/explain").await;
            why["policies"][0]["is_selected"] == true && why["policies"][0]["next_run"].is_string()
        })
        .await;
    let why = daemon.get("/api/v1/vms/web2/explain").await;
    assert_eq!(why["policies"][0]["is_selected"], false);
    let vm = daemon.get("/api/v1/vms/web1").await;
    assert_eq!((vm["policies"][0].as_str(), vm["protection"].as_str()), (Some("gold"), Some("pending")), "{vm}");
    assert_eq!(daemon.get("/api/v1/vms/web2").await["protection"], "unprotected");

    // It outlives the daemon.
    let daemon = daemon.end().await.start().await;
    assert_eq!(daemon.get("/api/v1/policies/gold").await["revision"], 2);
    assert_eq!(send(&daemon.client, "DELETE", "/api/v1/policies/gold", &[], None).await.status, 204);
    daemon.fails("DELETE", "/api/v1/policies/gold", None, Code::NotFound).await;
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_due_backs_up_copies_and_prunes() {
    let place = Place::with(&["default", "offsite"]);
    place.vm("web1", &["gold"], 1).await;
    let daemon = place.start().await;
    // Two of this policy, one of another, one of a person: each for reasons of its own.
    for tags in [json!(["policy:gold"]), json!(["policy:gold"]), json!(["policy:silver"]), json!([])] {
        let job = daemon.post("/api/v1/jobs/backup", json!({ "vm": "web1", "tags": tags })).await;
        let job = daemon.ended(job["id"].as_str().unwrap()).await;
        assert_eq!(job["state"], "succeeded", "{job}");
    }
    let mut policy = gold();
    policy["copy-to"] = json!([{"repository": "offsite", "retention": {"keep-last": 1}}]);
    assert_eq!(put(&daemon, policy, None).await.status, 200);
    // Due at the next full minute.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(100);
    loop {
        let jobs = daemon.get("/api/v1/jobs?policy=gold&state=succeeded").await;
        let kinds: Vec<&str> =
            jobs["items"].as_array().unwrap().iter().map(|job| job["kind"].as_str().unwrap()).collect();
        let prunes = kinds.iter().filter(|kind| **kind == "prune").count();
        if kinds.contains(&"backup") && kinds.contains(&"copy") && prunes >= 2 {
            break;
        }
        let failed = daemon.get("/api/v1/jobs?state=failed").await;
        assert_eq!(failed["total"], 0, "{failed}");
        assert!(std::time::Instant::now() < until, "{jobs}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    daemon
        .wait("the lists to follow", async || {
            let here = daemon.get("/api/v1/vms/web1/points?repository=default").await;
            let there = daemon.get("/api/v1/vms/web1/points?repository=offsite").await;
            here["total"] == 4 && there["total"] == 1
        })
        .await;
    let here = daemon.get("/api/v1/vms/web1/points?repository=default").await;
    let tags: Vec<&Value> = here["items"].as_array().unwrap().iter().map(|point| &point["tags"]).collect();
    assert_eq!(tags, [&json!(["policy:gold"]), &json!([]), &json!(["policy:silver"]), &json!(["policy:gold"])]);
    // What the rules there would remove at once was not carried there.
    let copies = daemon.get("/api/v1/jobs?policy=gold&kind=copy&state=succeeded").await;
    assert_eq!(copies["items"][0]["result"]["points"], 1, "{copies}");
    let vm = daemon.get("/api/v1/vms/web1").await;
    assert_eq!(
        (vm["protection"].as_str(), vm["protected"]["policies"][0].as_str()),
        (Some("protected"), Some("gold")),
        "{vm}"
    );
    daemon.end().await;
}
