//! Changes as they happen, as server-sent events.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;
use virtward_api::StreamReset;

use super::{
    answer::Failed,
    params::{self, Params},
};
use crate::{
    daemon::Daemon,
    hub::{Following, Message},
};

/// Between two comments that keep the connection alive.
const ALIVE_EVERY: Duration = Duration::from_secs(15);
/// Between two looks whether the daemon ends.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const TOPICS: [&str; 5] = ["jobs", "inventory", "events", "policies", "repositories"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamParams {
    topics: Option<String>,
}

struct Follower {
    daemon: Arc<Daemon>,
    topics: Vec<&'static str>,
    following: Following,
    ready: VecDeque<Bytes>,
    silent_since: Instant,
}

pub async fn follow(
    State(daemon): State<Arc<Daemon>>,
    headers: HeaderMap,
    Params(query): Params<StreamParams>,
) -> Result<Response, Failed> {
    let topics = match &query.topics {
        None => TOPICS.to_vec(),
        Some(text) => {
            let find = |word: &str| TOPICS.into_iter().find(|topic| *topic == word);
            let found: Option<Vec<&str>> = text.split(',').map(find).collect();
            found.ok_or_else(|| params::bad("topics", format!("some of {}", TOPICS.join(","))))?
        }
    };
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let mut following = daemon.hub.follow(last);
    let mut ready = VecDeque::from([Bytes::from_static(b"retry: 2000\n\n")]);
    match following.missed.take() {
        Some(missed) => {
            let wanted = missed.iter().filter(|message| topics.contains(&message.topic));
            ready.extend(wanted.map(|message| format(&daemon.hub.boot, message)));
        }
        None => {
            ready.push_back(reset(&daemon.hub.boot, following.seq, "what happened meanwhile is not known any more"))
        }
    }
    let follower = Follower { daemon, topics, following, ready, silent_since: Instant::now() };
    let body = Body::from_stream(futures::stream::unfold(follower, next));
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, body).into_response())
}

async fn next(mut follower: Follower) -> Option<(Result<Bytes, std::convert::Infallible>, Follower)> {
    loop {
        if let Some(bytes) = follower.ready.pop_front() {
            follower.silent_since = Instant::now();
            return Some((Ok(bytes), follower));
        }
        if follower.daemon.is_stopping() {
            return None;
        }
        let received = tokio::time::timeout(LOOK_EVERY, follower.following.receiver.recv());
        let boot = &follower.daemon.hub.boot;
        match received.await {
            Ok(Ok(message)) => {
                follower.following.seq = message.seq;
                if follower.topics.contains(&message.topic) {
                    let bytes = format(boot, &message);
                    follower.ready.push_back(bytes);
                }
            }
            Ok(Err(RecvError::Lagged(lost))) => {
                follower.following.seq += lost;
                let bytes = reset(boot, follower.following.seq, "this connection was too slow");
                follower.ready.push_back(bytes);
            }
            Ok(Err(RecvError::Closed)) => return None,
            Err(_) if follower.silent_since.elapsed() < ALIVE_EVERY => {}
            Err(_) => follower.ready.push_back(Bytes::from_static(b": alive\n\n")),
        }
    }
}

fn format(boot: &str, message: &Message) -> Bytes {
    format!("id: {boot}-{}\nevent: {}\ndata: {}\n\n", message.seq, message.name, message.data).into()
}

fn reset(boot: &str, seq: u64, reason: &str) -> Bytes {
    let data = serde_json::to_string(&StreamReset { reason: reason.into() }).unwrap_or_default();
    format!("id: {boot}-{seq}\nevent: reset\ndata: {data}\n\n").into()
}
