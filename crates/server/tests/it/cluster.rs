//! Two daemons over one state.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use virtward_api::{Code, JoinTokenMade, Role};
use virtward_decide::schedule::Limit;
use virtward_server::admin;

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

    // A proxy that nobody knows is refused; one that cannot be reached is done without, and that is told.
    let unknown = json!({ "vm": "web2", "proxy": ["h1", "h9"] });
    let refused = one.fails("POST", "/api/v1/jobs/backup", Some(unknown), Code::Invalid).await;
    assert!(refused.detail.contains("there is no host h9"), "{refused:?}");
    let job = one.post("/api/v1/jobs/backup", json!({ "vm": "web2", "proxy": ["h1"] })).await;
    let job = one.ended(job["id"].as_str().unwrap()).await;
    assert_eq!((&job["state"], &job["proxy"]), (&json!("succeeded"), &Value::Null), "{job}");
    assert!(job["warnings"][0].as_str().unwrap().starts_with("proxy h1 does not do it ("), "{job}");

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
        "schedule": {"cron": "0 3 * * *", "time-zone": "UTC"}, "retention": {"keep-last": 3}}});
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

/// Within which the news of a start reach the other node.
const MOMENT: SignedDuration = SignedDuration::from_millis(500);

#[tokio::test(flavor = "multi_thread")]
async fn what_people_ask_for_keeps_to_the_limits_of_the_whole_cluster() {
    let (one, two) = Place::two().await;
    for (place, vm) in [(&one, "a1"), (&one, "a2"), (&two, "b1"), (&two, "b2")] {
        place.vm(vm, &[], 8).await;
    }
    let narrow = |place: &Place| {
        let mut config = place.config();
        config.limits.per_repository = Limit::each(1);
        config
    };
    let (at_one, at_two) = (narrow(&one), narrow(&two));
    let (one, two) = (one.start_with(at_one).await, two.start_with(at_two).await);
    one.wait("all VMs", async || one.get("/api/v1/vms").await["total"] == 4).await;
    two.wait("all VMs", async || two.get("/api/v1/vms").await["total"] == 4).await;
    // Asked of both, for both hosts, all into one repository.
    let mut ids = Vec::new();
    for (number, vm) in ["a1", "b1", "a2", "b2"].iter().enumerate() {
        let asked = if number % 2 == 0 { &two } else { &one };
        let request = json!({ "vm": vm, "full": true, "bandwidth_bytes_s": 8 << 20 });
        ids.push(asked.post("/api/v1/jobs/backup", request).await["id"].as_str().unwrap().to_owned());
    }
    let mut said = false;
    one.wait("all to end", async || {
        let jobs = one.get("/api/v1/jobs").await;
        let jobs = jobs["items"].as_array().unwrap();
        let running = jobs.iter().filter(|job| job["state"] == "running").count();
        // One, and for the moment in which neither daemon knows of the other's start, one each.
        assert!(running <= 2, "{jobs:?}");
        said |= jobs.iter().any(|job| job["waiting_for"].to_string().contains("write to repository default"));
        jobs.iter().filter(|job| job["state"] == "succeeded").count() == 4
    })
    .await;
    assert!(said, "those that wait say for what");
    // One after the other by what the records say as well, in the order in which they were asked for; but once two may have
    // begun in the same moment.
    let mut before: Option<[Timestamp; 2]> = None;
    let mut together = 0;
    for id in &ids {
        let job = one.get(&format!("/api/v1/jobs/{id}")).await;
        let [started, finished]: [Timestamp; 2] =
            ["started", "finished"].map(|of| job[of].as_str().unwrap().parse().unwrap());
        if let Some([earlier, ended]) = before.filter(|[_, ended]| started < *ended) {
            assert!(
                started.duration_since(earlier).abs() < MOMENT,
                "{job}: before {ended}, the end of the one ahead of it"
            );
            together += 1;
        }
        before = Some([started, finished]);
    }
    assert!(together <= 1, "{ids:?}");
    one.end().await;
    two.end().await;
}

async fn join_token(daemon: &Daemon) -> JoinTokenMade {
    daemon.client.post("/api/v1/cluster/tokens", &json!({}), None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_by_a_token_backs_up_into_anothers_directory_and_is_removed() {
    let place = Place::with(&["default", "other"]).with_peers();
    let config = place.config();
    let cluster = config.cluster.clone().unwrap();
    admin::found(&*place.store, &config, &cluster, "test").await.unwrap();
    assert!(admin::found(&*place.store, &config, &cluster, "again").await.is_err(), "one authority per cluster");
    place.vm("web1", &[], 1).await;
    let mut second = Place::beside(&place, "h2", Some("node://h1/default"));
    // What that host calls "other" is "default" here.
    second.repositories.push("other");
    let one = place.start().await;
    let status = one.get("/api/v1/cluster").await;
    assert_eq!((&status["node"], &status["is_cluster"]), (&json!("h1"), &json!(true)), "{status}");
    one.wait("a leader", async || one.get("/api/v1/cluster").await["leader"]["node"] == "h1").await;

    // Joining: with the right token, once, and with no other.
    let own = second.config().cluster.unwrap();
    let made = join_token(&one).await;
    let other = Place::new().with_peers();
    let refused = |token: String, at: String, name: &'static str, own: virtward_server::config::ClusterConfig| async move {
        admin::join(&token, &at, name, &own).await.unwrap_err().detail
    };
    let wrong = Place::new().with_peers().config().cluster.unwrap();
    let forged = made.token.replace("vwj1.", "vwj1.AAAA");
    assert!(refused(forged[..made.token.len()].to_owned(), made.address.clone(), "h3", wrong.clone()).await.len() > 10);
    assert!(refused(made.token.clone(), made.address.clone(), "h 3", wrong.clone()).await.contains("name of a node"));
    assert!(refused(made.token.clone(), made.address.clone(), "h1", wrong.clone()).await.contains("already"));
    admin::join(&made.token, &made.address, "h2", &own).await.unwrap();
    assert!(refused(made.token.clone(), made.address.clone(), "h3", wrong.clone()).await.contains("used by h2"));
    drop(other);

    // A directory on one node serves the other, which puts and reads, and leaves removal to its owner.
    second.vm("web2", &[], 8).await;
    let two = second.start().await;
    two.wait("the other", async || two.get("/api/v1/cluster").await["nodes"][0]["is_there"] == true).await;
    let policy = json!({"policy": {"name": "p", "repository": "default", "select": {"any": ["name:web2"]},
        "schedule": {"cron": "* * * * *", "time-zone": "UTC"}, "retention": {"keep-last": 1}}});
    two.backup("web2").await;
    one.wait("the restore point", async || one.get("/api/v1/points").await["total"] == 1).await;
    let job = two.post("/api/v1/jobs/verify", json!({})).await;
    assert_eq!(two.ended(job["id"].as_str().unwrap()).await["state"], "succeeded");
    // The node that has it reads and stores for the other; not into another repository of the same name.
    let through = async |repository: &str| {
        let request = json!({ "vm": "web2", "proxy": ["h1"], "repository": repository });
        let job = two.post("/api/v1/jobs/backup", request).await;
        let job = two.ended(job["id"].as_str().unwrap()).await;
        assert_eq!(job["state"], "succeeded", "{job}");
        assert_eq!(job["result"]["read_bytes"], 8 << 20, "{job}");
        job
    };
    let job = through("default").await;
    assert_eq!((&job["proxy"], &job["warnings"]), (&json!("h1"), &json!([])), "{job}");
    let job = through("other").await;
    assert_eq!(job["proxy"], Value::Null, "{job}");
    assert!(job["warnings"][0].as_str().unwrap().contains("repository other is another one there"), "{job}");
    let made: Result<Value, _> = one.client.put("/api/v1/policies/p", &policy, None).await;
    made.unwrap();
    let restore = json!({"point": "web2@latest", "name": "copy", "dry_run": true,
        "disk_dir": two.place.path("disks").display().to_string()});
    std::fs::create_dir(two.place.path("disks")).unwrap();
    let plan = one.post("/api/v1/jobs/restore", restore).await;
    assert_eq!(plan["host"], "h2", "only that host can tell: {plan}");

    // Events and the audit log of any node, and of all, are read at any.
    let kinds = async |daemon: &Daemon, query: &str| {
        let page = daemon.get(&format!("/api/v1/events?limit=1000{query}")).await;
        assert_eq!(page["missing"], Value::Null, "{page}");
        let items = page["items"].as_array().unwrap().clone();
        let newest_first = items.windows(2).all(|two| two[0]["id"].as_str() > two[1]["id"].as_str());
        assert!(newest_first, "{items:?}");
        items.len()
    };
    let (own, other) = (kinds(&one, "").await, kinds(&one, "&node=h2").await);
    assert!(own > 0 && other > 0 && kinds(&one, "&node=all").await >= own + other);
    assert!(kinds(&two, "&node=all&severity=warning").await < kinds(&two, "&node=all").await);
    let audit = one.get("/api/v1/audit?node=all&limit=2").await;
    let next = audit["next"].as_str().expect("more than two entries");
    let further = one.get(&format!("/api/v1/audit?node=all&limit=1000&cursor={next}")).await;
    let entries = [audit["items"].as_array().unwrap().clone(), further["items"].as_array().unwrap().clone()].concat();
    let of = |node: &str| entries.iter().filter(|entry| entry["node"] == node).count() as u64;
    let last = |page: Value| page["items"][0]["id"].as_u64().unwrap();
    assert_eq!((of("h1"), of("h2")), (last(one.get("/api/v1/audit").await), last(two.get("/api/v1/audit").await)));
    one.fails("GET", "/api/v1/events?node=h9", None, Code::NotFound).await;

    // Removed: it starts nothing, and nobody answers it.
    one.fails("DELETE", "/api/v1/cluster/nodes/h9", None, Code::NotFound).await;
    one.client.delete("/api/v1/cluster/nodes/h2").await.unwrap();
    two.wait("its removal", async || {
        let warnings = two.get("/api/v1/cluster").await["warnings"].to_string();
        warnings.contains("not a member")
    })
    .await;
    let job = two.post("/api/v1/jobs/backup", json!({ "vm": "web2" })).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(two.get(&format!("/api/v1/jobs/{}", job["id"].as_str().unwrap())).await["state"], "queued");
    assert_eq!(one.get("/api/v1/hosts").await["total"], 1);
    let place = two.end().await;
    let again = place.config();
    let wiring = virtward_server::wire_up::Wiring {
        connector: std::sync::Arc::new(crate::common::SimConnector {
            host: place.sim.clone(),
            reach: place.reach.clone(),
        }),
        store: place.store.clone(),
    };
    let (sender, _ready) = tokio::sync::oneshot::channel();
    let reload: virtward_server::Reload = std::sync::Arc::new(|| Err("no".into()));
    let started = virtward_server::run(again, wiring, reload, virtward_engine::Cancel::default(), sender).await;
    assert!(started.unwrap_err().detail.contains("no node of this cluster"));
    one.end().await;
}
