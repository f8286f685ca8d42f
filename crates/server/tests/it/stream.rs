//! Following changes, also over broken connections.

use serde_json::{Value, json};

use crate::common::{LIMIT, Place};

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_sees_a_job_from_beginning_to_end_and_resumes_without_a_gap() {
    let place = Place::new();
    place.vm("web1", &[], 8).await;
    let daemon = place.start().await;
    let mut stream = daemon.client.stream("/api/v1/stream?topics=jobs,events", None).await.unwrap();
    let job = daemon.post("/api/v1/jobs/backup", json!({"vm": "web1", "bandwidth_bytes_s": 4 << 20})).await;
    let mut seen = Vec::new();
    let mut states: Vec<String> = Vec::new();
    let mut has_progress = false;
    loop {
        let event = tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").unwrap().expect("goes on");
        let data: Value = serde_json::from_str(&event.data).unwrap();
        seen.push(event.id.clone());
        match event.name.as_str() {
            "job" if data["id"] == job["id"] => {
                let state = data["state"].as_str().unwrap().to_owned();
                if states.last() != Some(&state) {
                    states.push(state);
                }
            }
            "progress" => has_progress |= data["progress"]["done_bytes"].as_u64() > Some(0),
            "event" if data["kind"] == "job-succeeded" => break,
            "event" | "job" => {}
            other => panic!("{other} was not asked for"),
        }
    }
    assert_eq!(states, ["queued", "running", "succeeded"]);
    assert!(has_progress);
    drop(stream);

    // Back with the id of the second message: all that came after, in order, nothing twice.
    let mut again = daemon.client.stream("/api/v1/stream?topics=jobs,events", Some(&seen[1])).await.unwrap();
    for id in &seen[2..] {
        let event = tokio::time::timeout(LIMIT, again.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(event.id, *id);
    }
    let mut lost = daemon.client.stream("/api/v1/stream", Some("other-1")).await.unwrap();
    let event = tokio::time::timeout(LIMIT, lost.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(event.name, "reset");
    assert!(daemon.client.stream("/api/v1/stream?topics=gossip", None).await.is_err());
    // The end of the daemon ends the stream in order.
    let ended = tokio::spawn(async move { while let Ok(Some(_)) = again.next().await {} });
    daemon.end().await;
    tokio::time::timeout(LIMIT, ended).await.expect("the stream ends").unwrap();
}
