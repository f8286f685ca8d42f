//! A directory repository of this node, served to the others: they put and read, and take back what they put and must be
//! able to take back (beats of a lease, a restore point that was withdrawn). They never overwrite and never delete what
//! was there: retention is this node's.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Extension,
    body::{Body, Bytes},
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use virtward_api::{Code, Problem};
use virtward_repo::{
    Error,
    store::{self, Listed, ObjectWriter, Put, Store, append::AppendOnly},
};

use super::serve::Member;
use crate::{
    daemon::Daemon,
    failures::{Result, blocking},
    http::{
        answer::{Answer, Failed, ok},
        params::Params,
    },
};

/// Most that is read at once.
const READ_BYTES_MAX: usize = 16 << 20;
/// An object that nobody goes on to send is abandoned.
const UPLOAD_MAX: Duration = Duration::from_secs(15 * 60);
/// Objects that are being sent, and sent ones that are remembered.
const UPLOADS_MAX: usize = 1024;
const FINISHED_MAX: usize = 16_384;
/// Names per block of a listing.
const LIST_BLOCK: usize = 256;

/// A line of a listing on its way.
#[derive(Serialize, Deserialize)]
pub struct Line {
    /// See [`Listed`].
    pub name: String,
    /// See [`Listed`].
    pub bytes: u64,
    /// See [`Listed`].
    pub modified: jiff::Timestamp,
}

/// An error on its way. Its text is for people, its kind for the repository's code.
#[derive(Debug, Serialize, Deserialize)]
pub struct Trouble {
    /// See [`kind`].
    pub kind: String,
    /// In words.
    pub text: String,
}

/// Status of an upload that is not known (any more): the sender begins anew.
pub const LOST: u16 = 410;

fn lost() -> Response {
    let text = "this object is not being written (any more)".to_owned();
    let body = serde_json::to_vec(&Trouble { kind: "lost".into(), text }).unwrap_or_default();
    let status = axum::http::StatusCode::from_u16(LOST).unwrap_or_default();
    (status, [("content-type", "application/json")], body).into_response()
}

fn trouble(error: &Error) -> Response {
    let (kind, status) = match error {
        Error::Missing { .. } => ("missing", 404),
        Error::AppendOnly { .. } => ("append-only", 403),
        Error::StorageFull { .. } => ("full", 507),
        Error::Damaged { .. } => ("damaged", 422),
        Error::Misuse { .. } => ("misuse", 400),
        _ => ("other", 500),
    };
    let mut text = error.to_string();
    if let Some(cause) = std::error::Error::source(error) {
        text = format!("{text}: {cause}");
    }
    let body = serde_json::to_vec(&Trouble { kind: kind.into(), text }).unwrap_or_default();
    let status = axum::http::StatusCode::from_u16(status).unwrap_or_default();
    (status, [("content-type", "application/json")], body).into_response()
}

struct Upload {
    of: (String, String),
    writer: Box<dyn ObjectWriter>,
    sent: u64,
    last: Instant,
}

/// What is served, and to whom.
#[derive(Default)]
pub struct Served {
    stores: Mutex<HashMap<(String, String), Arc<AppendOnly>>>,
    uploads: Mutex<HashMap<String, Arc<Mutex<Upload>>>>,
    /// What became of uploads, for those who did not hear.
    finished: Mutex<HashMap<String, bool>>,
}

impl Served {
    fn store(&self, daemon: &Daemon, node: &str, name: &str) -> Result<Arc<dyn Store>> {
        let entry = daemon.repositories.find(Some(name))?;
        let location = &entry.config.location;
        if location.contains("://") && !location.starts_with("file://") {
            return Err(Problem::new(Code::Conflict, format!("repository {name} of this node is at {location}"))
                .hint("a node serves a directory of its own; other repositories are reached by every node itself"));
        }
        let key = (node.to_owned(), location.clone());
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&key) {
            return Ok(store.clone());
        }
        // Without local copies: whoever reads is far away and has its own.
        let options = store::StoreOptions { cache: None, append_only: false, ..entry.config.store.clone() };
        let inner = store::open_with(location, &options).map_err(|error| crate::failures::repo(&error))?;
        let store = Arc::new(AppendOnly::new(inner));
        stores.insert(key, store.clone());
        Ok(store)
    }

    fn remember(&self, upload: &str, created: bool) {
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        if finished.len() >= FINISHED_MAX {
            finished.clear();
        }
        finished.insert(upload.to_owned(), created);
    }

    fn outcome(&self, upload: &str) -> Option<bool> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).get(upload).copied()
    }

    fn uploads(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Mutex<Upload>>>> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Asked = (State<Arc<Daemon>>, Path<String>, Extension<Member>);

/// Runs blocking work on the store that is meant.
async fn on<T: Send + 'static>(
    (State(daemon), Path(name), Extension(Member(node))): Asked,
    work: impl FnOnce(&dyn Store) -> std::result::Result<T, Error> + Send + 'static,
) -> std::result::Result<T, Response> {
    let store = daemon.served.store(&daemon, &node, &name).map_err(|problem| Failed(problem).into_response())?;
    match blocking(move || Ok(work(&*store))).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(trouble(&error)),
        Err(problem) => Err(Failed(problem).into_response()),
    }
}

#[derive(Deserialize)]
pub struct Named {
    name: String,
}

pub async fn size(asked: Asked, Params(query): Params<Named>) -> Response {
    match on(asked, move |store| store.size(&query.name)).await {
        Ok(bytes) => ok(&json!({ "bytes": bytes })).into_response(),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
pub struct Range {
    name: String,
    offset: u64,
    len: usize,
}

pub async fn read(asked: Asked, Params(query): Params<Range>) -> Response {
    if query.len > READ_BYTES_MAX {
        return Failed(Problem::new(Code::TooLarge, "more than can be read at once")).into_response();
    }
    match on(asked, move |store| store.get_range(&query.name, query.offset, query.len)).await {
        Ok(bytes) => ([("content-type", "application/octet-stream")], bytes).into_response(),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
pub struct Prefix {
    prefix: String,
}

/// Lines of JSON as they are found; a last line without a name says that it is all.
pub async fn list(asked: Asked, Params(query): Params<Prefix>) -> Response {
    let (State(daemon), Path(name), Extension(Member(node))) = asked;
    let store = match daemon.served.store(&daemon, &node, &name) {
        Ok(store) => store,
        Err(problem) => return Failed(problem).into_response(),
    };
    let (sender, receiver) = tokio::sync::mpsc::channel::<std::result::Result<Bytes, std::io::Error>>(4);
    tokio::task::spawn_blocking(move || {
        let (mut block, mut lines) = (Vec::new(), 0);
        let gone = || Error::Cancelled;
        let outcome = store.list(&query.prefix, &mut |listed: Listed| {
            let line = Line { name: listed.name, bytes: listed.bytes, modified: listed.modified };
            serde_json::to_writer(&mut block, &line).map_err(|_| gone())?;
            block.push(b'\n');
            lines += 1;
            if lines == LIST_BLOCK {
                lines = 0;
                sender.blocking_send(Ok(Bytes::from(std::mem::take(&mut block)))).map_err(|_| gone())?;
            }
            Ok(())
        });
        let end = match outcome {
            Ok(()) => json!({ "end": true }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        block.extend_from_slice(end.to_string().as_bytes());
        block.push(b'\n');
        // Whoever asked may be gone.
        let _ = sender.blocking_send(Ok(block.into()));
    });
    let stream = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|block| (block, receiver))
    });
    ([("content-type", "application/x-ndjson")], Body::from_stream(stream)).into_response()
}

pub async fn now(asked: Asked) -> Response {
    match on(asked, |store| Ok((store.now()?, store.free_bytes()))).await {
        Ok((now, free)) => ok(&json!({ "now": now, "free_bytes": free })).into_response(),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
pub struct Whole {
    name: String,
    upload: String,
}

pub async fn put(asked: Asked, Params(query): Params<Whole>, body: Bytes) -> Response {
    let daemon = asked.0.0.clone();
    if let Some(created) = daemon.served.outcome(&query.upload) {
        return ok(&json!({ "created": created })).into_response();
    }
    match on(asked, move |store| store.put_if_absent(&query.name, &body)).await {
        Ok(put) => {
            let created = put == Put::Created;
            daemon.served.remember(&query.upload, created);
            ok(&json!({ "created": created })).into_response()
        }
        Err(response) => response,
    }
}

#[derive(Deserialize)]
pub struct Block {
    name: String,
    upload: String,
    offset: u64,
}

/// A block of an object. One that came already is taken as read: its answer was lost.
pub async fn append(asked: Asked, Params(query): Params<Block>, body: Bytes) -> Response {
    let daemon = asked.0.0.clone();
    let of = (asked.2.0.0.clone(), asked.1.0.clone());
    let mut known = daemon.served.uploads().get(&query.upload).cloned();
    if known.is_none() && query.offset == 0 {
        let name = query.name.clone();
        let writer = match on(asked, move |store| store.create(&name)).await {
            Ok(writer) => writer,
            Err(response) => return response,
        };
        let upload = Upload { of: of.clone(), writer, sent: 0, last: Instant::now() };
        let mut uploads = daemon.served.uploads();
        uploads.retain(|_, one| {
            one.try_lock().is_ok_and(|one| one.last.elapsed() < UPLOAD_MAX) || Arc::strong_count(one) > 1
        });
        if uploads.len() >= UPLOADS_MAX {
            return Failed(Problem::new(Code::Unavailable, "too many objects are being written")).into_response();
        }
        known = Some(uploads.entry(query.upload.clone()).or_insert_with(|| Arc::new(Mutex::new(upload))).clone());
    }
    let Some(upload) = known else { return lost() };
    let work = move || {
        let mut upload = upload.lock().unwrap_or_else(PoisonError::into_inner);
        let end = query.offset + body.len() as u64;
        if upload.of != of || query.offset > upload.sent || (end > upload.sent && query.offset < upload.sent) {
            return Err(Problem::new(Code::Conflict, "this block does not follow the one before it"));
        }
        upload.last = Instant::now();
        if end <= upload.sent {
            return Ok(Ok(()));
        }
        let written = upload.writer.write(&body);
        if written.is_ok() {
            upload.sent = end;
        }
        Ok(written)
    };
    match blocking(work).await {
        Ok(Ok(())) => ok(&json!({})).into_response(),
        Ok(Err(error)) => trouble(&error),
        Err(problem) => Failed(problem).into_response(),
    }
}

#[derive(Deserialize)]
pub struct Done {
    upload: String,
    bytes: u64,
}

pub async fn finish(State(daemon): State<Arc<Daemon>>, Params(query): Params<Done>) -> Response {
    if let Some(created) = daemon.served.outcome(&query.upload) {
        return ok(&json!({ "created": created })).into_response();
    }
    let Some(upload) = daemon.served.uploads().remove(&query.upload) else { return lost() };
    let work = move || {
        let busy = || Problem::new(Code::Unavailable, "a block of this object is still being written");
        let upload = Arc::into_inner(upload).ok_or_else(busy)?;
        let upload = upload.into_inner().unwrap_or_else(PoisonError::into_inner);
        if upload.sent != query.bytes {
            return Err(Problem::new(Code::Conflict, "blocks of this object are missing"));
        }
        Ok((query.upload, upload.writer.finish()))
    };
    match blocking(work).await {
        Ok((id, Ok(put))) => {
            let created = put == Put::Created;
            daemon.served.remember(&id, created);
            ok(&json!({ "created": created })).into_response()
        }
        Ok((_, Err(error))) => trouble(&error),
        Err(problem) => Failed(problem).into_response(),
    }
}

#[derive(Deserialize)]
pub struct Abandoned {
    upload: String,
}

pub async fn abandon(State(daemon): State<Arc<Daemon>>, Params(query): Params<Abandoned>) -> Answer {
    drop(daemon.served.uploads().remove(&query.upload));
    ok(&json!({}))
}

pub async fn delete(asked: Asked, Params(query): Params<Named>) -> Response {
    match on(asked, move |store| store.delete(&query.name)).await {
        Ok(deleted) => ok(&json!({ "deleted": deleted })).into_response(),
        Err(response) => response,
    }
}
