//! The proxy's side: sessions of other hosts, each with a writer of a repository.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Extension,
    body::Body,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, sync::mpsc, task::JoinSet};
use uuid::Uuid;
use virtward_api::{Code, Problem};
use virtward_engine::{Cancel, DiskJob, Error, Event, Observer, Terms, store_exports};
use virtward_model::DiskRecord;
use virtward_repo::{Attachment, Compression, Repository, Writer, WriterOptions};

use super::wire::{self, Ask, Ear, PROTOCOL, Tell, Voice};
use crate::{
    daemon::Daemon,
    failures::{self, Result, blocking},
    http::answer::Failed,
    peers::{client::Stream, serve::Member},
};

/// How long the connections of disks may take to come.
const CONNECTED_WITHIN: Duration = Duration::from_secs(30);
/// Between two words about progress.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Connections of disks that wait to be used.
const DISKS_WAITING_MAX: usize = 256;

/// Sessions that other hosts have here.
#[derive(Default)]
pub struct Sessions {
    all: Mutex<HashMap<Uuid, Here>>,
}

/// A session as connections of its disks find it.
struct Here {
    node: String,
    cancel: Cancel,
    disks: mpsc::Sender<(u64, usize, Stream)>,
}

impl Sessions {
    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Uuid, Here>) -> T) -> T {
        change(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.change(|all| all.len())
    }

    /// Ends all, because the daemon ends, and waits until they have told so, for as long as that may take.
    pub async fn stop(&self, limit: Duration) {
        self.change(|all| all.values().for_each(|here| here.cancel.cancel()));
        let until = Instant::now() + limit;
        while self.count() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Turns a request into a stream of bytes: the answer, and the stream to come.
fn upgrade(request: &mut Request) -> Result<(Response, OnUpgrade)> {
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if asked != Some(PROTOCOL) {
        let detail = format!("this daemon knows {PROTOCOL}, not {}", asked.unwrap_or("an unnamed protocol"));
        return Err(Problem::new(Code::BadRequest, detail).hint("let both hosts run the same version of Virtward"));
    }
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let upgrade = upgrade.ok_or_else(|| Problem::new(Code::BadRequest, "this connection cannot be upgraded"))?;
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, PROTOCOL)
        .body(Body::empty());
    Ok((response.map_err(|error| Problem::new(Code::Internal, error.to_string()))?, upgrade))
}

/// The line of a session.
pub async fn serve(
    State(daemon): State<Arc<Daemon>>,
    Extension(Member(node)): Extension<Member>,
    mut request: Request,
) -> Result<Response, Failed> {
    if daemon.is_stopping() {
        return Err(Problem::new(Code::Unavailable, "the daemon is stopping").into());
    }
    let (response, upgrade) = upgrade(&mut request)?;
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            let cancel = Cancel::default();
            let (voice, ear) = wire::line(TokioIo::new(upgraded), cancel.clone());
            session(&daemon, &node, voice, ear, cancel).await;
        }
    });
    Ok(response)
}

/// The connection of a disk.
pub async fn disk(
    State(daemon): State<Arc<Daemon>>,
    Extension(Member(node)): Extension<Member>,
    Path((session, number, disk)): Path<(Uuid, u64, usize)>,
    mut request: Request,
) -> Result<Response, Failed> {
    let here =
        daemon.proxied.change(|all| all.get(&session).filter(|here| here.node == node).map(|here| here.disks.clone()));
    let disks = here.ok_or_else(|| Problem::new(Code::NotFound, "there is no such session"))?;
    let (response, upgrade) = upgrade(&mut request)?;
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            // More than can wait are none of a job's.
            let _ = disks.try_send((number, disk, TokioIo::new(upgraded)));
        }
    });
    Ok(response.into_response())
}

/// One session, to its end.
async fn session(daemon: &Daemon, node: &str, voice: Voice<Tell>, mut ear: Ear<Ask>, cancel: Cancel) {
    let begun = match ear.hear().await {
        Some((Ask::Begin { vm, repository, id, compression }, _)) => {
            let opened = open(daemon, &repository, &id).await;
            match opened {
                Ok(repository) => Begun::new(repository, compression, cancel.clone()).await.map(|begun| (vm, begun)),
                Err(problem) => Err(problem),
            }
        }
        Some(_) => Err(Problem::new(Code::BadRequest, "a session begins with a repository")),
        None => return,
    };
    let (vm, mut begun) = match begun {
        Ok(begun) => begun,
        Err(problem) => {
            tracing::warn!(node, %problem, "a backup is not stored for another host");
            voice.say(&Tell::Failed { number: 0, problem, is_source: false }, Vec::new()).await;
            // It hangs up when it has heard that.
            let _ = tokio::time::timeout(CONNECTED_WITHIN, ear.hear()).await;
            return;
        }
    };
    let id = Uuid::new_v4();
    let (disks, mut connections) = mpsc::channel(DISKS_WAITING_MAX);
    let here = Here { node: node.to_owned(), cancel: cancel.clone(), disks };
    daemon.proxied.change(|all| all.insert(id, here));
    tracing::info!(node, vm, "a backup is read and stored for another host");
    voice.say(&Tell::Ready { session: id }, Vec::new()).await;
    loop {
        let asked = tokio::select! {
            asked = ear.hear() => asked,
            () = cancel.cancelled() => None,
        };
        let Some((ask, bytes)) = asked else { break };
        let (number, done) = match ask {
            Ask::Store { number, disks, terms } => {
                let stored = begun.store((number, disks), &terms, &mut connections, &voice).await;
                (number, stored.map(|disks| Tell::Stored { number, disks }))
            }
            Ask::Complete { number, attachments } => {
                let done = begun.complete(&attachments, bytes).await;
                (number, done.map(|()| Tell::Done { number }))
            }
            Ask::Publish { number, point } => {
                let done = begun.publish(*point).await;
                (number, done.map(|()| Tell::Done { number }))
            }
            Ask::Begin { .. } => break,
        };
        let tell = done.unwrap_or_else(|(problem, is_source)| {
            let problem = match daemon.is_stopping() {
                true => Problem::new(Code::Interrupted, "its daemon is stopped")
                    .hint("the scheduler runs a policy's backup again; ask for another one again"),
                false => problem,
            };
            Tell::Failed { number, problem, is_source }
        });
        voice.say(&tell, Vec::new()).await;
    }
    if daemon.is_stopping() {
        // What was said last is on its way.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tracing::info!(node, vm, why = ear.why(), "the session of another host has ended");
    daemon.proxied.change(|all| all.remove(&id));
}

/// The repository of that name, if it is the one that is meant.
async fn open(daemon: &Daemon, name: &str, id: &str) -> Result<Repository> {
    let repository = daemon.repositories.find(Some(name))?.open().await?;
    if repository.id() != id {
        let detail = format!("repository {name} is another one there ({})", repository.id());
        return Err(Problem::new(Code::Conflict, detail)
            .hint("let the name mean the same repository on every host; virtward cluster status shows which differ"));
    }
    Ok(repository)
}

/// What a session has.
struct Begun {
    repository: Repository,
    options: WriterOptions,
    cancel: Cancel,
    /// Of the disks that were stored last.
    writer: Option<Writer>,
    is_used: bool,
}

type Done<T> = Result<T, (Problem, bool)>;

fn of_engine(error: &Error) -> (Problem, bool) {
    (failures::engine(error), matches!(error, Error::Nbd { .. } | Error::SourceGone(_)))
}

fn no_writer() -> (Problem, bool) {
    (Problem::new(Code::Conflict, "nothing is being stored"), false)
}

impl Begun {
    /// Begins to write before it is known what, so that nobody waits for it later.
    async fn new(repository: Repository, compression: Compression, cancel: Cancel) -> Result<Self> {
        let options = WriterOptions { compression, cancel: Some(cancel.flag()), ..WriterOptions::default() };
        let mut begun = Self { repository, options, cancel, writer: None, is_used: false };
        begun.renew().await?;
        Ok(begun)
    }

    async fn renew(&mut self) -> Result<()> {
        let (repository, options) = (self.repository.clone(), self.options.clone());
        let made = blocking(move || repository.writer(options).map_err(|error| failures::repo(&error)));
        (self.writer, self.is_used) = (Some(made.await?), false);
        Ok(())
    }

    async fn store(
        &mut self,
        (number, disks): (u64, Vec<DiskJob>),
        terms: &Terms,
        connections: &mut mpsc::Receiver<(u64, usize, Stream)>,
        voice: &Voice<Tell>,
    ) -> Done<Vec<DiskRecord>> {
        // An earlier try of the same job left things in its writer that nothing refers to.
        if self.is_used || self.writer.is_none() {
            self.renew().await.map_err(|problem| (problem, false))?;
        }
        self.is_used = true;
        let Some(writer) = &self.writer else { return Err(no_writer()) };
        // Dropped with this future: a disk whose reading ends is let go.
        let mut carried = JoinSet::new();
        let connected = connected((number, disks), connections, &mut carried);
        let connected = tokio::select! {
            connected = tokio::time::timeout(CONNECTED_WITHIN, connected) => connected.unwrap_or_else(|_| {
                Err(Problem::new(Code::HypervisorUnreachable, "the disks were not connected in time"))
            }),
            () = self.cancel.cancelled() => Err(Problem::new(Code::Cancelled, "cancelled")),
        };
        let exports = connected.map_err(|problem| (problem, true))?;
        let report = Report { voice, meter: Mutex::default() };
        let stored = store_exports(writer, exports, terms, &report, &self.cancel).await;
        report.last().await;
        stored.map_err(|error| of_engine(&error))
    }

    async fn complete(&mut self, attachments: &[(String, u64)], bytes: Vec<u8>) -> Done<()> {
        let writer = self.writer.take().ok_or_else(no_writer)?;
        let mut rest = &bytes[..];
        let mut list = Vec::new();
        for (name, length) in attachments {
            let length = usize::try_from(*length).ok().filter(|length| *length <= rest.len());
            let Some((one, more)) = length.map(|length| rest.split_at(length)) else {
                return Err((Problem::new(Code::BadRequest, "an attachment is longer than what was sent"), false));
            };
            list.push(Attachment { name: name.clone(), bytes: one.to_vec() });
            rest = more;
        }
        let completed = blocking(move || {
            writer.complete(&list).map_err(|error| failures::repo(&error))?;
            Ok(writer)
        });
        self.writer = Some(completed.await.map_err(|problem| (problem, false))?);
        Ok(())
    }

    async fn publish(&mut self, point: virtward_model::RestorePoint) -> Done<()> {
        let writer = self.writer.take().ok_or_else(no_writer)?;
        let published = blocking(move || writer.publish(point, Vec::new()).map_err(|error| failures::repo(&error)));
        published.await.map_err(|problem| (problem, false))
    }
}

/// Waits for the connections of disks, and gives each an end that the engine can read from.
async fn connected(
    (number, disks): (u64, Vec<DiskJob>),
    connections: &mut mpsc::Receiver<(u64, usize, Stream)>,
    carried: &mut JoinSet<()>,
) -> Result<Vec<(DiskJob, UnixStream)>> {
    let mut ends: Vec<Option<UnixStream>> = disks.iter().map(|_| None).collect();
    while ends.iter().any(Option::is_none) {
        let Some((of, disk, stream)) = connections.recv().await else {
            return Err(Problem::new(Code::Cancelled, "the session has ended"));
        };
        // Those of an earlier try come to nothing.
        let Some(end) = ends.get_mut(disk).filter(|_| of == number) else { continue };
        let (ours, theirs) = UnixStream::pair()
            .map_err(|error| Problem::new(Code::Internal, format!("cannot make a pair of sockets: {error}")))?;
        carried.spawn(wire::carry(stream, theirs));
        *end = Some(ours);
    }
    Ok(disks.into_iter().zip(ends.into_iter().flatten()).collect())
}

/// Tells the other host how far reading is.
struct Report<'a> {
    voice: &'a Voice<Tell>,
    meter: Mutex<(u64, u64, Option<Instant>)>,
}

impl Report<'_> {
    /// The last word, which is not left out.
    async fn last(&self) {
        let (total_bytes, done_bytes, _) = *self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        self.voice.say(&Tell::Progress { total_bytes, done_bytes }, Vec::new()).await;
    }
}

impl Observer for Report<'_> {
    fn event(&self, _: &str, event: Event<'_>) {
        let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Total { bytes } => meter.0 = meter.0.max(bytes),
            Event::Done { bytes } => meter.1 = meter.1.max(bytes),
            _ => return,
        }
        if meter.2.is_some_and(|told| told.elapsed() < TELL_EVERY) {
            return;
        }
        meter.2 = Some(Instant::now());
        self.voice.mention(&Tell::Progress { total_bytes: meter.0, done_bytes: meter.1 });
    }
}
