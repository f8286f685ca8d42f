//! The connection's life: opening, losing, and finding it again.
//!
//! ```text
//!            open ok                lost (close callback, or a call found it dead)
//! start ───────────────► Up(g) ─────────────────────────────────────► Down(why)
//!   │ open failed          ▲                                              │
//!   ▼                      └── open ok, g+1 ── backoff 0.1 … 5 s ◄────────┘
//! error to the caller              close(), from any state ─► Closed
//! ```
//!
//! One thread, the supervisor, makes every transition. A generation number keeps late news of an old connection from
//! hurting its successor. Not here: which calls are retried.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use tokio::sync::{broadcast, oneshot, watch};
use uuid::Uuid;

use super::error::Fault;
use super::events::{self, Translated};
use super::ffi::{Conn, RawEvent, Sink, VirResult};
use crate::xml::DomainXml;
use crate::{DomainEvent, DomainEventKind, ErrorKind};

/// Seconds between signs of life asked of the daemon, and how many may be missing.
const KEEPALIVE: (i32, u32) = (5, 6);
/// First and longest pause between attempts to reconnect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// I/O errors waiting to be resolved to a target before further ones are passed on with the device's alias.
const IO_ERRORS_WAITING_MAX: usize = 64;
/// Events kept for a receiver that lags.
const EVENTS_KEPT: usize = 1024;

/// The state of the connection.
#[derive(Clone)]
enum Link {
    Up { generation: u64, conn: Arc<Conn> },
    Down { why: String },
    Closed,
}

/// What the supervisor is told.
enum Note {
    Lost {
        generation: u64,
        why: String,
    },
    IoError {
        uuid: Uuid,
        name: String,
        alias: String,
    },
    /// A connection to close here, if this is its last owner.
    Release(Arc<Conn>),
    Close,
}

/// A connection that comes back by itself.
pub(super) struct Session {
    uri: String,
    link: watch::Sender<Link>,
    events: broadcast::Sender<DomainEvent>,
    notes: Sender<Note>,
    /// The lanes' connections, with the generation they belong to. The main one only carries events.
    extra: Mutex<HashMap<&'static str, (u64, Arc<Conn>)>>,
}

impl Session {
    /// Starts the supervisor; the receiver tells how the first attempt went.
    pub(super) fn start(uri: &str) -> Result<(Arc<Session>, oneshot::Receiver<VirResult<()>>), Fault> {
        let (notes, inbox) = crossbeam_channel::unbounded();
        let (first, outcome) = oneshot::channel();
        let session = Arc::new(Session {
            uri: uri.to_owned(),
            link: watch::Sender::new(Link::Down { why: "not connected yet".into() }),
            events: broadcast::Sender::new(EVENTS_KEPT),
            notes,
            extra: Mutex::new(HashMap::new()),
        });
        let supervised = Arc::clone(&session);
        std::thread::Builder::new()
            .name("libvirt-session".into())
            .spawn(move || supervised.supervise(&inbox, first))
            .map_err(|e| Fault::new(ErrorKind::Other, format!("cannot start a thread: {e}")))?;
        Ok((session, outcome))
    }

    /// Events of this connection.
    pub(super) fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.events.subscribe()
    }

    /// Tells the supervisor to end. The state is `Closed` soon after.
    pub(super) fn close(&self) {
        // The supervisor is gone if this fails, which is what is wanted.
        let _ = self.notes.send(Note::Close);
    }

    /// Waits until the supervisor has closed the connection.
    pub(super) async fn closed(&self, limit: Duration) -> bool {
        let mut link = self.link.subscribe();
        let closed = link.wait_for(|l| matches!(l, Link::Closed));
        matches!(tokio::time::timeout(limit, closed).await, Ok(Ok(_)))
    }

    /// Waits until the connection works and is alive; whether it does.
    pub(super) async fn up(&self, limit: Duration) -> bool {
        let mut link = self.link.subscribe();
        let up = link.wait_for(|l| match l {
            Link::Up { conn, .. } => conn.is_alive(),
            Link::Down { .. } => false,
            Link::Closed => true,
        });
        matches!(tokio::time::timeout(limit, up).await, Ok(Ok(link)) if matches!(*link, Link::Up { .. }))
    }

    /// Runs `body` on the connection of `lane`. Blocks.
    pub(super) fn with<T>(&self, lane: &'static str, body: impl FnOnce(&Conn) -> Result<T, Fault>) -> Result<T, Fault> {
        let (generation, main) = match &*self.link.borrow() {
            Link::Up { generation, conn } => (*generation, Arc::clone(conn)),
            Link::Down { why } => return Err(Fault::new(ErrorKind::Unreachable, format!("not connected: {why}"))),
            Link::Closed => return Err(Fault::new(ErrorKind::Unreachable, "the connection was closed")),
        };
        let conn = self.lane_connection(lane, generation)?;
        body(&conn).map_err(|fault| {
            if conn.is_alive() {
                return fault;
            }
            if !main.is_alive() {
                let why = fault.message().to_owned();
                let _ = self.notes.send(Note::Lost { generation, why });
            }
            fault.with_kind(ErrorKind::Unreachable)
        })
    }

    /// Has the next call of a lane open a new connection. The old one ends with the calls that still use it.
    pub(super) fn retire(&self, lane: &'static str) {
        let old = self.extra.lock().unwrap_or_else(PoisonError::into_inner).remove(lane);
        if let Some((_, conn)) = old {
            // Closing blocks, and this is an async thread: let the supervisor do it.
            let _ = self.notes.send(Note::Release(conn));
        }
    }

    /// The lane's own connection, opened when first needed and again when it or the main one was replaced.
    fn lane_connection(&self, lane: &'static str, generation: u64) -> Result<Arc<Conn>, Fault> {
        let known = self.extra.lock().unwrap_or_else(PoisonError::into_inner).get(lane).cloned();
        if let Some((_, conn)) = known.filter(|(g, conn)| *g == generation && conn.is_alive()) {
            return Ok(conn);
        }
        let conn = Arc::new(open(&self.uri)?);
        let mut extra = self.extra.lock().unwrap_or_else(PoisonError::into_inner);
        // Two threads of a lane may race to here; the later one wins, the other's connection ends with its call.
        extra.insert(lane, (generation, Arc::clone(&conn)));
        Ok(conn)
    }

    fn supervise(self: Arc<Session>, inbox: &Receiver<Note>, first: oneshot::Sender<VirResult<()>>) {
        let mut generation = 0;
        let opened = self.connect(generation);
        let failed = opened.is_err();
        let _ = first.send(opened);
        if failed {
            self.end();
            return;
        }
        while let Ok(note) = inbox.recv() {
            match note {
                Note::Lost { generation: lost, why } if lost == generation => {
                    self.lost(why);
                    generation += 1;
                    if !self.reconnect(generation, inbox) {
                        break;
                    }
                }
                Note::Lost { .. } => {}
                Note::Release(conn) => drop(conn),
                Note::IoError { uuid, name, alias } => self.io_error(uuid, name, &alias),
                Note::Close => break,
            }
        }
        self.end();
    }

    /// Opens the main connection and announces it as generation `generation`.
    fn connect(&self, generation: u64) -> VirResult<()> {
        let conn = Arc::new(open(&self.uri)?);
        conn.subscribe(Arc::new(Ear { generation, events: self.events.clone(), notes: self.notes.clone() }));
        self.link.send_replace(Link::Up { generation, conn });
        Ok(())
    }

    fn lost(&self, why: String) {
        tracing::warn!(uri = self.uri, why, "the libvirt connection was lost");
        let old = self.link.send_replace(Link::Down { why });
        let extra = std::mem::take(&mut *self.extra.lock().unwrap_or_else(PoisonError::into_inner));
        drop((old, extra));
        self.announce(DomainEventKind::ConnectionLost);
    }

    /// Tries until it works or the session is closed; whether it works.
    fn reconnect(&self, generation: u64, inbox: &Receiver<Note>) -> bool {
        let mut pause = BACKOFF.0;
        loop {
            match self.connect(generation) {
                Ok(()) => {
                    tracing::info!(uri = self.uri, "the libvirt connection works again");
                    self.announce(DomainEventKind::ConnectionRestored);
                    return true;
                }
                Err(e) => {
                    self.link.send_replace(Link::Down { why: e.message });
                }
            }
            match inbox.recv_timeout(pause) {
                Ok(Note::Close) | Err(RecvTimeoutError::Disconnected) => return false,
                Ok(_) | Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(BACKOFF.1),
            }
        }
    }

    fn end(&self) {
        let old = self.link.send_replace(Link::Closed);
        let extra = std::mem::take(&mut *self.extra.lock().unwrap_or_else(PoisonError::into_inner));
        drop((old, extra));
    }

    fn announce(&self, kind: DomainEventKind) {
        // No receiver is no error.
        let _ = self.events.send(DomainEvent { uuid: Uuid::nil(), name: String::new(), kind });
    }

    /// libvirt names the device by its alias; people and we know targets.
    fn io_error(&self, uuid: Uuid, name: String, alias: &str) {
        let target = self.with("supervisor", |conn| {
            let domain = DomainXml::parse(&conn.by_uuid(uuid)?.xml(0)?)?;
            Ok(domain.disks.into_iter().find(|d| d.alias.as_deref() == Some(alias)).map(|d| d.disk.target))
        });
        let target = target.ok().flatten().unwrap_or_else(|| alias.to_owned());
        let _ = self.events.send(DomainEvent { uuid, name, kind: DomainEventKind::IoError { target } });
    }
}

fn open(uri: &str) -> VirResult<Conn> {
    let conn = Conn::open(uri)?;
    if let Err(e) = conn.keepalive(KEEPALIVE.0, KEEPALIVE.1) {
        tracing::debug!(uri, error = e.message, "no keepalive on this connection");
    }
    Ok(conn)
}

/// Where the event loop thread delivers. Never blocks.
struct Ear {
    generation: u64,
    events: broadcast::Sender<DomainEvent>,
    notes: Sender<Note>,
}

impl Sink for Ear {
    fn domain(&self, uuid: Uuid, name: String, event: RawEvent) {
        match events::translate(event) {
            Translated::Event(kind) => {
                let _ = self.events.send(DomainEvent { uuid, name, kind });
            }
            Translated::IoError { alias } if self.notes.len() < IO_ERRORS_WAITING_MAX => {
                let _ = self.notes.send(Note::IoError { uuid, name, alias });
            }
            Translated::IoError { alias } => {
                let _ = self.events.send(DomainEvent { uuid, name, kind: DomainEventKind::IoError { target: alias } });
            }
            Translated::Nothing => {}
        }
    }

    fn closed(&self, reason: &'static str) {
        let _ = self.notes.send(Note::Lost { generation: self.generation, why: reason.to_owned() });
    }
}
