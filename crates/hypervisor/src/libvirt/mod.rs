//! The libvirt implementation of [`Hypervisor`](crate::Hypervisor).
//!
//! ```text
//! async caller ─► call() ─► lane (own threads) ─► session (connection, generation) ─► ffi ─► libvirt
//!                                                     ▲ close callback, events
//!                                           supervisor thread ◄── event loop thread (one per process)
//! ```
//!
//! Each lane but the first has a connection of its own: libvirtd serves a limited number of calls per connection at a
//! time (`max_client_requests`, 5 by default) and stops reading from the connection, keepalives included, at the limit.
//! Invariants: no call blocks an async thread; a call that outlives its limit is reported as timed out and left to end
//! by itself, together with its connection; reads are repeated once after a reconnect, changes never.

mod calls;
mod error;
mod events;
mod ffi;
mod known;
mod lane;
mod migrate;
mod numbers;
mod offer;
mod qmp;
mod session;
mod storage;

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::{Error, ErrorKind, Result};
use error::{Attempt, Fault};
use ffi::{Conn, Domain};
use known::Known;
use lane::{ABANDONED_MAX, Lane, LaneError};
use session::Session;

/// Reads `text` as every kind of answer of QEMU and of guest agents; for fuzzing.
pub(crate) fn any_answer(text: &str) {
    let _ = calls::count("fuzz", text);
    qmp::any(text);
}

/// Longest wait for the first connection (an SSH login may be part of it).
const CONNECT_LIMIT: Duration = Duration::from_secs(40);
/// How long a read waits for a broken connection to come back.
const RECONNECT_WAIT: Duration = Duration::from_secs(3);
/// How long close waits for threads whose calls have not returned.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A libvirt connection that finds itself again after libvirtd restarts.
pub struct Libvirt {
    uri: String,
    session: Arc<Session>,
    lanes: Lanes,
    known: Arc<Known>,
}

/// One lane per class of calls. The numbers of threads stay below libvirtd's limit of calls per connection.
struct Lanes {
    /// Reads and short changes.
    main: Lane,
    /// Thaw, abort, destroy: what must get through whatever else hangs.
    urgent: Lane,
    /// Guest agent calls.
    agent: Lane,
    /// Starts and migrations.
    long: Lane,
    /// Counters of all domains: one hung QEMU hangs the whole call, so it gets no second thread until it returns.
    stats: Lane,
}

impl Lanes {
    fn all(&self) -> [&Lane; 5] {
        [&self.main, &self.urgent, &self.agent, &self.long, &self.stats]
    }
}

/// Which lane serves a call, how long it may take, whether it may be repeated.
#[derive(Clone, Copy)]
struct Shape {
    lane: Class,
    limit: Duration,
    read: bool,
}

#[derive(Clone, Copy)]
enum Class {
    Main,
    Urgent,
    Agent,
    Long,
    Stats,
}

impl Shape {
    const fn new(lane: Class, limit_s: u64, read: bool) -> Shape {
        Shape { lane, limit: Duration::from_secs(limit_s), read }
    }
}

const READ: Shape = Shape::new(Class::Main, 60, true);
const CHANGE: Shape = Shape::new(Class::Main, 120, false);
/// Longer than READ: the XML of a domain whose QEMU hangs takes 30 s to be refused.
const LIST: Shape = Shape::new(Class::Main, 180, true);
const STATS: Shape = Shape::new(Class::Stats, 60, true);
const URGENT: Shape = Shape::new(Class::Urgent, 60, false);
const START: Shape = Shape::new(Class::Long, 600, false);
/// Looking into a directory opens every image in it, and the storage may be slow.
const STORAGE: Shape = Shape::new(Class::Main, 120, false);
/// A migration ends when it ends; whoever drives it aborts the job. A day only keeps the promise of a bound.
const MIGRATE: Shape = Shape::new(Class::Long, 24 * 3600, false);

impl Libvirt {
    /// Connects to a libvirt URI. [`Libvirt::connect_within`] 40 s.
    pub async fn connect(uri: &str) -> Result<Libvirt> {
        Self::connect_within(uri, CONNECT_LIMIT).await
    }

    /// Connects to a libvirt URI within a limit, such as `qemu:///system`, `qemu+ssh://root@host/system`, `qemu+tls://host/system` or
    /// `qemu+unix:///system?socket=/run/libvirt/libvirt-sock`.
    pub async fn connect_within(uri: &str, limit: Duration) -> Result<Libvirt> {
        let verb = "connect to";
        let (session, outcome) = Session::start(uri).map_err(|f| f.into_error(verb, uri))?;
        let failed = match tokio::time::timeout(limit, outcome).await {
            Ok(Ok(Ok(()))) => None,
            Ok(Ok(Err(e))) => {
                let fault = Fault::from(e);
                // Whatever went wrong, what it means is that the host cannot be reached, unless it refused us.
                let kind = match fault.kind() {
                    kind @ (ErrorKind::Denied | ErrorKind::Invalid) => kind,
                    _ => ErrorKind::Unreachable,
                };
                Some(fault.with_kind(kind))
            }
            Ok(Err(_)) => Some(Fault::new(ErrorKind::Other, "the connection thread ended")),
            Err(_) => {
                session.close();
                Some(Fault::new(ErrorKind::Timeout, format!("no answer within {} s", limit.as_secs_f32())))
            }
        };
        if let Some(fault) = failed {
            return Err(fault.into_error(verb, uri));
        }
        let lanes = Lanes {
            main: Lane::new("main", 4, ABANDONED_MAX),
            urgent: Lane::new("urgent", 4, ABANDONED_MAX),
            agent: Lane::new("agent", 4, ABANDONED_MAX),
            long: Lane::new("long", 4, ABANDONED_MAX),
            stats: Lane::new("stats", 1, 0),
        };
        Ok(Libvirt { uri: uri.to_owned(), session, lanes, known: Arc::default() })
    }

    fn lane(&self, class: Class) -> &Lane {
        match class {
            Class::Main => &self.lanes.main,
            Class::Urgent => &self.lanes.urgent,
            Class::Agent => &self.lanes.agent,
            Class::Long => &self.lanes.long,
            Class::Stats => &self.lanes.stats,
        }
    }

    /// Runs `body` with the connection, on a thread of the lane. `verb subject` describes the call in errors.
    async fn host_call<T, F>(&self, shape: Shape, verb: &str, subject: &str, body: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Conn) -> Attempt<T> + Clone + Send + 'static,
    {
        let lane = self.lane(shape.lane);
        let name = lane.name();
        let mut again = shape.read;
        loop {
            let (session, attempt) = (Arc::clone(&self.session), body.clone());
            let fault = match lane.run(shape.limit, move || session.with(name, attempt)).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(fault)) => fault,
                Err(LaneError::Timeout) => {
                    self.session.retire(name);
                    Fault::new(ErrorKind::Timeout, format!("no answer within {} s", shape.limit.as_secs()))
                }
                Err(LaneError::Closed) => Fault::new(ErrorKind::Unreachable, "the connection was closed"),
                Err(LaneError::Broken) => Fault::new(ErrorKind::Other, "the call's thread failed"),
            };
            if !(again && fault.kind() == ErrorKind::Unreachable && self.session.up(RECONNECT_WAIT).await) {
                return Err(fault.into_error(verb, subject));
            }
            again = false;
        }
    }

    /// [`Libvirt::host_call`] with a domain that must exist.
    async fn call<T, F>(&self, shape: Shape, verb: &str, vm: Uuid, body: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Conn, &Domain) -> Attempt<T> + Clone + Send + 'static,
    {
        let body = move |conn: &Conn| {
            let domain = conn.by_uuid(vm)?;
            body(conn, &domain).map_err(|fault| fault.of(domain.name()))
        };
        self.host_call(shape, verb, &vm.to_string(), body).await
    }

    async fn end(&self) {
        self.session.close();
        for lane in self.lanes.all() {
            lane.shut();
        }
        let mut ended = self.session.closed(CLOSE_LIMIT).await;
        for lane in self.lanes.all() {
            ended &= lane.close(CLOSE_LIMIT).await;
        }
        if !ended {
            tracing::warn!(uri = self.uri, "a libvirt call has not returned; its thread is left behind");
        }
    }
}

pub use ffi::exit_now;

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.session.close();
    }
}

impl std::fmt::Debug for Libvirt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Libvirt").field("uri", &self.uri).finish_non_exhaustive()
    }
}

/// A refusal that concerns one argument.
fn invalid(verb: &str, message: impl Into<String>) -> Error {
    Fault::new(ErrorKind::Invalid, message).into_error(verb, "")
}
