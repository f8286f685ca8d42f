//! A repository that another node serves, as a store: blocking calls from the repository's threads, carried by the
//! runtime. An answer that is lost is asked for again, which the other side recognises; a node that is away is waited for
//! a while, because a daemon that restarts must not fail the backups of others.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::BodyExt;
use jiff::Timestamp;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::runtime::Handle;
use virtward_api::{Code, Problem};
use virtward_repo::{
    Error,
    store::{Listed, ObjectWriter, Put, Store},
};

use super::{
    Peers,
    client::Call,
    store_server::{LOST, Line, Trouble},
};

type Result<T> = std::result::Result<T, Error>;

/// How long a node that is away is waited for, and between two tries.
const PATIENCE: Duration = Duration::from_secs(120);
const AGAIN: Duration = Duration::from_millis(500);
/// Bytes sent or read at once.
const BLOCK: usize = 4 << 20;
/// An object up to this size can be sent again from the beginning.
const KEPT_MAX: usize = 96 << 20;
/// Longest line of a listing.
const LINE_BYTES_MAX: usize = 64 << 10;

/// A repository of another node's.
pub struct RemoteStore {
    inner: Arc<Inner>,
}

struct Inner {
    peers: Arc<Peers>,
    runtime: Handle,
    node: String,
    repository: String,
    cancel: Mutex<Option<Arc<AtomicBool>>>,
}

#[derive(Deserialize)]
struct Size {
    bytes: u64,
}

#[derive(Deserialize)]
struct Created {
    created: bool,
}

#[derive(Deserialize)]
struct Deleted {
    deleted: bool,
}

#[derive(Deserialize)]
struct Now {
    now: Timestamp,
    free_bytes: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ListLine {
    One(Line),
    Failed {
        error: String,
    },
    End {
        #[serde(rename = "end")]
        _end: bool,
    },
}

impl RemoteStore {
    /// `repository` of `node`. Must be made in the runtime that carries the calls.
    pub fn new(peers: Arc<Peers>, node: &str, repository: &str) -> Self {
        let (node, repository) = (node.to_owned(), repository.to_owned());
        let inner = Inner { peers, runtime: Handle::current(), node, repository, cancel: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }
}

fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes().fold(String::new(), |mut out, byte| {
        match plain(byte) {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

fn upload_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

impl Inner {
    fn path(&self, verb: &str, query: &str) -> String {
        format!("/peer/v1/store/{}/{verb}?{query}", escaped(&self.repository).replace('/', "%2F"))
    }

    fn is_cancelled(&self) -> bool {
        let cancel = self.cancel.lock().unwrap_or_else(PoisonError::into_inner);
        cancel.as_ref().is_some_and(|cancel| cancel.load(Relaxed))
    }

    fn remote(&self, action: &'static str, object: &str, what: String) -> Error {
        let what = format!("node {}: {what}", self.node);
        let hint = "virtward cluster status shows which nodes answer".to_owned();
        Error::Remote { action, object: object.into(), what, hint, is_denied: false }
    }

    /// Waits a little after a failure; gives up when patience or the job is at its end.
    fn again(&self, since: Instant) -> Result<bool> {
        if self.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if since.elapsed() >= PATIENCE {
            return Ok(false);
        }
        std::thread::sleep(AGAIN);
        Ok(true)
    }

    fn ask(&self, action: &'static str, object: &str, method: &str, path: &str, body: Bytes) -> Result<Bytes> {
        match self.ask_again(action, object, method, path, body)? {
            (Some(bytes), _) => Ok(bytes),
            (None, _) => Err(self.remote(action, object, "what was begun there is not known any more".into())),
        }
    }

    /// The answer, and whether it took more than one try. None if the other side knows nothing of what was begun: its
    /// daemon started anew.
    fn ask_again(
        &self,
        action: &'static str,
        object: &str,
        method: &str,
        path: &str,
        body: Bytes,
    ) -> Result<(Option<Bytes>, bool)> {
        let (since, mut is_repeated) = (Instant::now(), false);
        loop {
            let headers = [("content-type", "application/octet-stream")];
            let call = Call { method, path, headers: &headers, body: body.clone() };
            match self.runtime.block_on(self.peers.ask(&self.node, &call)) {
                Ok((200..300, bytes)) => return Ok((Some(bytes), is_repeated)),
                Ok((LOST, _)) => return Ok((None, is_repeated)),
                // It is on its way out, or too busy.
                Ok((503, _)) if self.again(since)? => is_repeated = true,
                Ok((status, bytes)) => return Err(self.error(action, object, status, &bytes)),
                Err(problem) if problem.code == Code::Unavailable && self.again(since)? => is_repeated = true,
                Err(problem) => return Err(self.remote(action, object, problem.detail)),
            }
        }
    }

    fn json<T: DeserializeOwned>(&self, action: &'static str, object: &str, method: &str, path: &str) -> Result<T> {
        let bytes = self.ask(action, object, method, path, Bytes::new())?;
        self.parse(action, object, &bytes)
    }

    fn parse<T: DeserializeOwned>(&self, action: &'static str, object: &str, bytes: &[u8]) -> Result<T> {
        serde_json::from_slice(bytes).map_err(|error| self.remote(action, object, format!("no sense: {error}")))
    }

    fn error(&self, action: &'static str, object: &str, status: u16, body: &[u8]) -> Error {
        let object_of = || object.to_owned();
        if let Ok(trouble) = serde_json::from_slice::<Trouble>(body) {
            return match &*trouble.kind {
                "missing" => Error::Missing { object: object_of() },
                "append-only" => Error::AppendOnly { object: object_of() },
                "full" => Error::StorageFull { object: object_of() },
                "damaged" => Error::Damaged {
                    object: object_of(),
                    what: trouble.text,
                    hint: "virtward backup verify --all shows what is lost".into(),
                },
                _ => self.remote(action, object, trouble.text),
            };
        }
        let what = serde_json::from_slice::<Problem>(body)
            .map_or_else(|_| format!("status {status}"), |problem| problem.detail);
        self.remote(action, object, what)
    }
}

impl Store for RemoteStore {
    fn location(&self) -> String {
        format!("{}{}/{}", super::NODE_SCHEME, self.inner.node, self.inner.repository)
    }

    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        for (number, part) in buf.chunks_mut(BLOCK).enumerate() {
            let at = offset + (number * BLOCK) as u64;
            let query = format!("name={}&offset={at}&len={}", escaped(name), part.len());
            let bytes = self.inner.ask("read", name, "GET", &self.inner.path("read", &query), Bytes::new())?;
            if bytes.len() != part.len() {
                let what = format!("{} bytes came where {} were asked for", bytes.len(), part.len());
                return Err(self.inner.remote("read", name, what));
            }
            part.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn size(&self, name: &str) -> Result<u64> {
        let path = self.inner.path("size", &format!("name={}", escaped(name)));
        self.inner.json::<Size>("examine", name, "GET", &path).map(|size| size.bytes)
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        if bytes.len() > BLOCK {
            let mut writer = self.create(name)?;
            writer.write(bytes)?;
            return writer.finish();
        }
        let query = format!("name={}&upload={}", escaped(name), upload_id());
        let body = Bytes::copy_from_slice(bytes);
        let (answer, is_repeated) =
            self.inner.ask_again("write", name, "PUT", &self.inner.path("put", &query), body)?;
        let Created { created } = self.inner.parse("write", name, &answer.unwrap_or_default())?;
        // It may have been put by the first try, of which a daemon that started anew knows nothing.
        let is_ours = created || is_repeated && self.get(name, bytes.len() as u64).is_ok_and(|there| there == bytes);
        Ok(if is_ours { Put::Created } else { Put::Exists })
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(RemoteWriter {
            inner: self.inner.clone(),
            name: name.to_owned(),
            upload: upload_id(),
            object: Vec::new(),
            kept_from: 0,
            sent: 0,
            has_begun: false,
            is_repeated: false,
        }))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let path = self.inner.path("list", &format!("prefix={}", escaped(prefix)));
        let failed = |what: String| self.inner.remote("list", prefix, what);
        let since = Instant::now();
        // Nothing is handed out before all of it came: what broke off is asked for again, whole.
        loop {
            match self.inner.runtime.block_on(listing(&self.inner, &path)) {
                Ok(lines) => {
                    for line in lines {
                        each(Listed { name: line.name, bytes: line.bytes, modified: line.modified })?;
                    }
                    return Ok(());
                }
                Err(problem) if problem.code == Code::Unavailable && self.inner.again(since)? => {}
                Err(problem) => return Err(failed(problem.detail)),
            }
        }
    }

    fn now(&self) -> Result<Timestamp> {
        self.inner.json::<Now>("ask the time of", "", "GET", &self.inner.path("now", "")).map(|now| now.now)
    }

    fn delete(&self, name: &str) -> Result<bool> {
        let path = self.inner.path("delete", &format!("name={}", escaped(name)));
        self.inner.json::<Deleted>("delete", name, "POST", &path).map(|it| it.deleted)
    }

    fn fetches_in_flight(&self) -> usize {
        8
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.json::<Now>("ask the space of", "", "GET", &self.inner.path("now", "")).ok()?.free_bytes
    }

    fn heed(&self, cancel: &Arc<AtomicBool>) {
        *self.inner.cancel.lock().unwrap_or_else(PoisonError::into_inner) = Some(cancel.clone());
    }
}

async fn listing(inner: &Inner, path: &str) -> crate::failures::Result<Vec<Line>> {
    let broken = |what: String| Problem::new(Code::Unavailable, what);
    let call = Call { method: "GET", path, headers: &[], body: Bytes::new() };
    let response = inner.peers.stream(&inner.node, &call).await?;
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let (mut lines, mut rest) = (Vec::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(error.to_string()))?;
        let Some(data) = frame.data_ref() else { continue };
        rest.extend_from_slice(data);
        if status != 200 {
            continue;
        }
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            match serde_json::from_slice::<ListLine>(&line) {
                Ok(ListLine::One(line)) => lines.push(line),
                Ok(ListLine::End { .. }) => return Ok(lines),
                Ok(ListLine::Failed { error }) => return Err(Problem::new(Code::Repository, error)),
                Err(error) => return Err(Problem::new(Code::Repository, format!("no sense: {error}"))),
            }
        }
        if rest.len() > LINE_BYTES_MAX {
            return Err(Problem::new(Code::Repository, "a line is too long"));
        }
    }
    match status {
        200 => Err(broken("the listing broke off".into())),
        _ => Err(serde_json::from_slice(&rest).unwrap_or_else(|_| broken(format!("status {status}")))),
    }
}

/// An object on its way. What was sent is kept until it is finished, within bounds: should the other side's daemon start
/// anew, it is sent again from the beginning.
struct RemoteWriter {
    inner: Arc<Inner>,
    name: String,
    upload: String,
    /// Bytes from `kept_from` on.
    object: Vec<u8>,
    /// Not zero once the object has become too large to be kept.
    kept_from: usize,
    sent: usize,
    has_begun: bool,
    is_repeated: bool,
}

impl RemoteWriter {
    fn len(&self) -> usize {
        self.kept_from + self.object.len()
    }

    /// Sends what was not sent yet, up to a whole block; all of it at the end.
    fn send(&mut self, is_end: bool) -> Result<()> {
        while self.len() - self.sent >= BLOCK || (is_end && (self.sent < self.len() || !self.has_begun)) {
            let from = self.sent - self.kept_from;
            let body = Bytes::copy_from_slice(&self.object[from..self.object.len().min(from + BLOCK)]);
            let bytes = body.len();
            let query = format!("name={}&upload={}&offset={}", escaped(&self.name), self.upload, self.sent);
            let path = self.inner.path("append", &query);
            match self.inner.ask_again("write", &self.name, "POST", &path, body)?.0 {
                Some(_) => {
                    self.has_begun = true;
                    self.sent += bytes;
                }
                None => self.begin_anew()?,
            }
            if self.object.len() > KEPT_MAX {
                self.object.drain(..self.sent - self.kept_from);
                self.kept_from = self.sent;
            }
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> Result<()> {
        if self.kept_from > 0 {
            let what = "its daemon started anew in the middle of a large object; run the job again".to_owned();
            return Err(self.inner.remote("write", &self.name, what));
        }
        if self.inner.is_cancelled() {
            return Err(Error::Cancelled);
        }
        tracing::info!(object = self.name, node = self.inner.node, "sent again: the node's daemon started anew");
        (self.upload, self.sent, self.has_begun, self.is_repeated) = (upload_id(), 0, false, true);
        Ok(())
    }

    /// Whether the object that is there is this one.
    fn is_there(&self) -> bool {
        let store = RemoteStore { inner: self.inner.clone() };
        self.kept_from == 0 && store.get(&self.name, self.len() as u64).is_ok_and(|there| there == self.object)
    }
}

impl ObjectWriter for RemoteWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for part in bytes.chunks(BLOCK) {
            self.object.extend_from_slice(part);
            self.send(false)?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Put> {
        loop {
            self.send(true)?;
            let path = self.inner.path("finish", &format!("upload={}&bytes={}", self.upload, self.sent));
            let Some(answer) = self.inner.ask_again("write", &self.name, "POST", &path, Bytes::new())?.0 else {
                self.begin_anew()?;
                continue;
            };
            let Created { created } = self.inner.parse("write", &self.name, &answer)?;
            self.has_begun = false;
            // It may have been finished before the other daemon started anew.
            let is_ours = created || (self.is_repeated && self.is_there());
            return Ok(if is_ours { Put::Created } else { Put::Exists });
        }
    }
}

impl Drop for RemoteWriter {
    fn drop(&mut self) {
        if !self.has_begun {
            return;
        }
        // Not waited for: what is not abandoned now is in a while.
        let (inner, path) = (self.inner.clone(), self.inner.path("abandon", &format!("upload={}", self.upload)));
        self.inner.runtime.spawn(async move {
            let call = Call { method: "POST", path: &path, headers: &[], body: Bytes::new() };
            let _ = inner.peers.ask(&inner.node, &call).await;
        });
    }
}
