//! A lane is a place for one connection. Its task connects, serves, and reconnects; requests survive the change.
//!
//! ```text
//!   Connecting ──► Up ──broken──► Down ──next request──► (attempts, with pauses) ─┬─► Up
//!       │                          ▲                                              │
//!       └─ spare lane: Gone        └──────────── requests fail ◄── exhausted ─────┘
//! ```
//!
//! The first lane is connected by [`crate::Client::connect`], so that its errors are reported there. The others are
//! spare: they join when their handshake succeeds, and are done without when it does not (a server may take a single
//! client only, and let others wait for ever).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::address::Address;
use crate::durability::Durability;
use crate::error::{Error, Result};
use crate::handshake::{Goal, Negotiated, Progress};
use crate::link::{End, Job, Link};
use crate::options::Options;
use crate::socket::Socket;

/// What all lanes of a client share.
#[derive(Debug)]
pub(crate) struct Context {
    /// None: the connection was handed over, and there is no other.
    pub(crate) address: Option<Address>,
    pub(crate) options: Options,
    pub(crate) durability: Arc<Durability>,
    pub(crate) permits: Arc<Semaphore>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum LaneState {
    Up,
    Down,
    Gone,
}

/// What the client sees of a lane when it chooses one.
#[derive(Debug)]
pub(crate) struct LaneStatus {
    state: AtomicU8,
    load: AtomicUsize,
}

impl LaneStatus {
    pub(crate) fn new(state: LaneState) -> Arc<Self> {
        Arc::new(Self { state: AtomicU8::new(state as u8), load: AtomicUsize::new(0) })
    }

    pub(crate) fn state(&self) -> LaneState {
        match self.state.load(Ordering::Relaxed) {
            0 => LaneState::Up,
            1 => LaneState::Down,
            _ => LaneState::Gone,
        }
    }

    fn set(&self, state: LaneState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    pub(crate) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }
}

/// One unit of a lane's load, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Load(Arc<LaneStatus>);

impl Load {
    pub(crate) fn on(status: &Arc<LaneStatus>) -> Self {
        status.load.fetch_add(1, Ordering::Relaxed);
        Self(status.clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that is past its handshake.
#[derive(Debug)]
pub(crate) struct Established {
    pub(crate) socket: Socket,
    pub(crate) input: BytesMut,
    pub(crate) negotiated: Arc<Negotiated>,
}

/// Connects and shakes hands, within the time for both.
pub(crate) async fn establish(address: Option<&Address>, options: &Options) -> Result<Established> {
    let handed_over = || Error::lost("it was handed over, and nobody knows where another is");
    let connected = async { Socket::connect(address.ok_or_else(handed_over)?).await };
    greet(connected, options).await
}

/// Shakes hands over a connection to come, within the time for both.
pub(crate) async fn greet(connected: impl Future<Output = Result<Socket>>, options: &Options) -> Result<Established> {
    let goal =
        Goal::Export { name: options.export.clone(), contexts: options.contexts.clone(), framing: options.framing };
    let work = async {
        let socket = connected.await?;
        let mut input = BytesMut::new();
        match socket.shake_hands(goal, &mut input).await? {
            Progress::Ready(negotiated) => Ok(Established { socket, input, negotiated: Arc::new(negotiated) }),
            _ => Err(Error::Protocol("the handshake ended without an export".into())),
        }
    };
    let late = Error::Timeout { what: "the connection and its handshake", after: options.connect_timeout };
    tokio::time::timeout(options.connect_timeout, work).await.unwrap_or(Err(late))
}

/// The task's side of a lane.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) context: Arc<Context>,
    pub(crate) status: Arc<LaneStatus>,
    pub(crate) jobs: mpsc::Receiver<Job>,
    pub(crate) closing: watch::Receiver<bool>,
    /// What the first connection found; every later one must find the same.
    pub(crate) expected: Arc<Negotiated>,
}

impl Lane {
    /// The lane that [`crate::Client::connect`] connected.
    pub(crate) async fn run_first(self, connection: Established) {
        self.run(connection).await;
    }

    /// A lane that joins if it can.
    pub(crate) async fn run_spare(mut self) {
        let context = self.context.clone();
        let connection = tokio::select! {
            connection = establish(context.address.as_ref(), &context.options) => connection,
            _ = self.closing.changed() => return self.status.set(LaneState::Gone),
        };
        match connection.and_then(|connection| self.check_same(connection)) {
            Ok(connection) => {
                context.permits.add_permits(context.options.queue_depth.max(1));
                self.run(connection).await;
            }
            Err(error) => {
                tracing::debug!(address = ?context.address, %error, "going on without a further connection");
                self.status.set(LaneState::Gone);
            }
        }
    }

    async fn run(mut self, connection: Established) {
        let mut next = Some(connection);
        let mut waiting: Vec<Job> = Vec::new();
        while !self.is_closing() {
            let connection = match next.take() {
                Some(connection) => connection,
                None => {
                    if waiting.is_empty() {
                        match self.next_job().await {
                            Some(job) => waiting.push(job),
                            None => break,
                        }
                    }
                    match self.reconnect().await {
                        Ok(connection) => connection,
                        Err(error) => {
                            self.fail_all(&mut waiting, &error);
                            continue;
                        }
                    }
                }
            };
            match self.serve(connection, &mut waiting).await {
                End::Closed => break,
                End::Broken(error) => self.keep_what_may_be_repeated(&mut waiting, &error),
            }
        }
        self.status.set(LaneState::Gone);
        self.fail_all(&mut waiting, &Error::Closed);
    }

    /// Serves on one connection; what it leaves unanswered goes back to `waiting`.
    async fn serve(&mut self, connection: Established, waiting: &mut Vec<Job>) -> End {
        let Established { socket, input, negotiated } = connection;
        let options = &self.context.options;
        let depth = options.queue_depth.max(1);
        let durability = self.context.durability.clone();
        let mut link = Link::new(socket, input, negotiated, depth, options.request_timeout, durability);
        for job in waiting.drain(..) {
            link.submit(job);
        }
        self.status.set(LaneState::Up);
        let end = link.serve(&mut self.jobs, &mut self.closing).await;
        self.status.set(LaneState::Down);
        match &end {
            End::Closed => link.say_goodbye().await,
            End::Broken(_) => self.context.durability.connection_lost(),
        }
        *waiting = link.into_jobs();
        end
    }

    /// Fails the requests for which the policy allows no repetition.
    fn keep_what_may_be_repeated(&self, waiting: &mut Vec<Job>, error: &Error) {
        let policy = &self.context.options.reconnect;
        let now = Instant::now();
        if !waiting.is_empty() {
            tracing::debug!(address = ?self.context.address, %error, requests = waiting.len(), "connection broke");
        }
        let mut kept = Vec::with_capacity(waiting.len());
        for mut job in waiting.drain(..) {
            let since = *job.ticket.interrupted.get_or_insert(now);
            job.ticket.interruptions += 1;
            let allowed = job.ticket.interruptions <= policy.attempts && now - since <= policy.total;
            if allowed && error.is_retryable() {
                kept.push(job);
            } else {
                let _ = job.ticket.reply.send(Err(error.clone()));
            }
        }
        *waiting = kept;
    }

    async fn reconnect(&mut self) -> Result<Established> {
        let context = self.context.clone();
        let policy = &context.options.reconnect;
        let began = Instant::now();
        let mut pause = policy.delay;
        let mut last = Error::lost("the policy is not to reconnect");
        for attempt in 1..=policy.attempts {
            let left = policy.total.saturating_sub(began.elapsed());
            let outcome = tokio::select! {
                outcome = establish(context.address.as_ref(), &context.options) => outcome,
                () = tokio::time::sleep(left) => return Err(last),
                () = self.closed() => return Err(Error::Closed),
            };
            match outcome.and_then(|connection| self.check_same(connection)) {
                Ok(connection) => return Ok(connection),
                // A server that comes back says all kinds of things before it has its exports again.
                Err(error @ (Error::ExportChanged { .. } | Error::Protocol(_))) => return Err(error),
                Err(error) => last = error,
            }
            let left = policy.total.saturating_sub(began.elapsed());
            if attempt == policy.attempts || left.is_zero() {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(pause.min(left)) => {}
                () = self.closed() => return Err(Error::Closed),
            }
            pause = (pause * 2).clamp(Duration::from_millis(1), policy.delay_max.max(Duration::from_millis(1)));
        }
        Err(last)
    }

    fn check_same(&self, connection: Established) -> Result<Established> {
        let (now, before) = (&connection.negotiated.info, &self.expected.info);
        let change = if now.size_bytes != before.size_bytes {
            format!("it had {} bytes and now has {}", before.size_bytes, now.size_bytes)
        } else if now.contexts != before.contexts {
            format!("it offered the contexts {:?} and now offers {:?}", before.contexts, now.contexts)
        } else if now.read_only && !before.read_only {
            "it became read-only".to_string()
        } else if now.block_min > before.block_min || now.block_max < before.block_max {
            "it now takes only other block sizes".to_string()
        } else if now.extended != before.extended || now.structured != before.structured {
            "the server now speaks another dialect".to_string()
        } else {
            return Ok(connection);
        };
        Err(Error::ExportChanged { export: self.context.options.export.clone(), change })
    }

    /// Fails what is waiting here and what is queued; later requests start afresh.
    fn fail_all(&mut self, waiting: &mut Vec<Job>, error: &Error) {
        let queued = std::iter::from_fn(|| self.jobs.try_recv().ok());
        for job in waiting.drain(..).chain(queued) {
            let _ = job.ticket.reply.send(Err(error.clone()));
        }
    }

    async fn next_job(&mut self) -> Option<Job> {
        tokio::select! {
            job = self.jobs.recv() => job,
            _ = self.closing.changed() => None,
        }
    }

    /// Resolves when the client is closed or dropped.
    async fn closed(&mut self) {
        // The flag only ever goes from false to true, so one change is all there is.
        if !self.is_closing() {
            let _ = self.closing.changed().await;
        }
    }

    fn is_closing(&self) -> bool {
        *self.closing.borrow() || self.closing.has_changed().is_err()
    }
}
