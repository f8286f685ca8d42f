//! The side of the VM's host: a session with a proxy, for the engine to store a backup through.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{net::UnixStream, task::JoinSet};
use uuid::Uuid;
use virtward_api::{Code, Problem};
use virtward_engine::{Cancel, DiskJob, Error, Event, Observer, Proxy, Terms};
use virtward_model::{DiskRecord, RestorePoint};
use virtward_repo::{Attachment, Compression, Repository};

use super::wire::{self, Ask, Ear, PROTOCOL, Tell, Voice};
use crate::{failures::Result, peers::Peers};

/// How long a proxy may take to open the repository and begin to write to it.
const READY_MAX: Duration = Duration::from_secs(60);

/// A session with a proxy. It ends when this is dropped.
pub struct Session {
    peers: Arc<Peers>,
    node: String,
    host: String,
    session: Uuid,
    voice: Voice<Ask>,
    /// One question at a time.
    ear: tokio::sync::Mutex<Ear<Tell>>,
    numbers: AtomicU64,
    refusal: Mutex<Option<Problem>>,
}

impl Session {
    /// Begins a session with `node`, called `host`, which is to write to the repository that is called `name` in its
    /// configuration as well and must be the same as `repository`.
    pub async fn begin(
        peers: &Arc<Peers>,
        (node, host): (&str, &str),
        (name, repository): (&str, &Repository),
        compression: Compression,
        vm: &str,
    ) -> Result<Self> {
        let connection =
            peers.upgrade(node, "/peer/v1/proxy", PROTOCOL).await.map_err(|problem| match problem.code {
                Code::NotFound => {
                    Problem::new(Code::Conflict, "its version of Virtward is older and cannot be a proxy")
                }
                _ => problem,
            })?;
        let (voice, mut ear) = wire::line(connection, Cancel::default());
        let (vm, repository, id) = (vm.to_owned(), name.to_owned(), repository.id().to_owned());
        voice.say(&Ask::Begin { vm, repository, id, compression }, Vec::new()).await;
        let answer = tokio::time::timeout(READY_MAX, ear.hear()).await.map_err(|_| {
            Problem::new(Code::Unavailable, format!("{host} is not ready after {} s", READY_MAX.as_secs()))
        })?;
        let session = match answer {
            Some((Tell::Ready { session }, _)) => session,
            Some((Tell::Failed { problem, .. }, _)) => return Err(problem),
            Some(_) => return Err(Problem::new(Code::Unavailable, format!("{host} answered something else"))),
            None => return Err(lost(host, &ear.why())),
        };
        Ok(Self {
            peers: peers.clone(),
            node: node.to_owned(),
            host: host.to_owned(),
            session,
            voice,
            ear: tokio::sync::Mutex::new(ear),
            numbers: AtomicU64::new(1),
            refusal: Mutex::default(),
        })
    }

    /// The problem behind the engine's error about this proxy.
    pub fn problem(&self) -> Option<Problem> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn failed(&self, problem: Problem, is_source: bool) -> Error {
        let message = problem.detail.clone();
        let detail = format!("{}, which reads and stores it: {}", self.host, problem.detail);
        let problem = Problem { detail, ..problem };
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
        Error::Proxy { host: self.host.clone(), message, is_source }
    }

    /// Waits for the answer to a question. What comes late of one that nobody waits for any more is passed over.
    async fn answer(&self, ear: &mut Ear<Tell>, asked: u64, observer: Option<(&str, &dyn Observer)>) -> Answered {
        loop {
            match ear.hear().await {
                Some((Tell::Progress { total_bytes, done_bytes }, _)) => {
                    if let Some((subject, observer)) = observer {
                        observer.event(subject, Event::Total { bytes: total_bytes });
                        observer.event(subject, Event::Done { bytes: done_bytes });
                    }
                }
                Some((Tell::Stored { number, disks }, _)) if number == asked => return Ok(disks),
                Some((Tell::Done { number }, _)) if number == asked => return Ok(Vec::new()),
                Some((Tell::Failed { number, problem, is_source }, _)) if number == asked => {
                    return Err(self.failed(problem, is_source));
                }
                Some(_) => {}
                None => return Err(self.failed(lost(&self.host, &ear.why()), false)),
            }
        }
    }

    async fn ask(&self, ask: impl FnOnce(u64) -> Ask, bytes: Vec<u8>) -> virtward_engine::Result<()> {
        let mut ear = self.ear.lock().await;
        let number = self.numbers.fetch_add(1, Relaxed);
        self.voice.say(&ask(number), bytes).await;
        self.answer(&mut ear, number, None).await.map(drop)
    }
}

/// Connects a proxy with an export of this host, and carries bytes between the two.
async fn connect(peers: Arc<Peers>, node: String, path: String, socket: PathBuf) -> Result<()> {
    let near = UnixStream::connect(&socket).await.map_err(|error| {
        let detail = format!("the export at {} cannot be reached: {error}", socket.display());
        Problem::new(Code::HypervisorUnreachable, detail)
    })?;
    let far = peers.upgrade(&node, &path, PROTOCOL).await?;
    wire::carry(far, near).await;
    Ok(())
}

type Answered = virtward_engine::Result<Vec<DiskRecord>>;

fn lost(host: &str, why: &str) -> Problem {
    Problem::new(Code::Unavailable, format!("it was lost: {why}"))
        .hint(format!("see why the daemon of {host} ended; the next run takes a proxy that answers, or does without"))
}

#[async_trait]
impl Proxy for Session {
    fn host(&self) -> &str {
        &self.host
    }

    async fn store(&self, disks: Vec<(DiskJob, PathBuf)>, terms: &Terms, observer: &dyn Observer) -> Answered {
        let mut ear = self.ear.lock().await;
        let number = self.numbers.fetch_add(1, Relaxed);
        let (disks, sockets): (Vec<DiskJob>, Vec<PathBuf>) = disks.into_iter().unzip();
        let count = disks.len();
        self.voice.say(&Ask::Store { number, disks, terms: terms.clone() }, Vec::new()).await;
        // They end with this future, however that ends.
        let mut connections = JoinSet::new();
        for (disk, socket) in sockets.into_iter().enumerate() {
            let path = format!("/peer/v1/proxy/{}/{number}/{disk}", self.session);
            connections.spawn(connect(self.peers.clone(), self.node.clone(), path, socket));
        }
        let answer = self.answer(&mut ear, number, Some((&terms.subject, observer)));
        tokio::pin!(answer);
        loop {
            tokio::select! {
                answer = &mut answer => {
                    let disks = answer?;
                    return match disks.len() == count {
                        true => Ok(disks),
                        false => Err(self.failed(Problem::new(Code::Internal, "it tells of other disks"), false)),
                    };
                }
                Some(ended) = connections.join_next() => {
                    if let Ok(Err(problem)) = ended {
                        let is_source = problem.code == Code::HypervisorUnreachable;
                        return Err(self.failed(problem, is_source));
                    }
                }
            }
        }
    }

    async fn complete(&self, attachments: Vec<Attachment>) -> virtward_engine::Result<()> {
        let list = attachments.iter().map(|item| (item.name.clone(), item.bytes.len() as u64)).collect();
        let bytes = attachments.into_iter().flat_map(|item| item.bytes).collect();
        self.ask(|number| Ask::Complete { number, attachments: list }, bytes).await
    }

    async fn publish(&self, point: &RestorePoint) -> virtward_engine::Result<()> {
        self.ask(|number| Ask::Publish { number, point: Box::new(point.clone()) }, Vec::new()).await
    }
}
