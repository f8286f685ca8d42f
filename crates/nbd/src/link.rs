//! One connection in its transmission phase: sends requests, receives answers, notices silence.
//!
//! A link is driven by the one task that owns it ([`crate::lane`]); it has no lock and no task of its own. Reading and
//! writing take turns on readiness, so a peer that stops reading cannot keep us from receiving, nor the reverse.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

use crate::demux::{Completion, Demux, Outcome, Request};
use crate::error::{Error, Result, errno_name};
use crate::handshake::Negotiated;
use crate::lane::Load;
use crate::socket::Socket;
use crate::wire::{self, Command};

/// Framing is received in pieces of this size. What is more than the header is copied to where it belongs, so this is
/// small; the bulk of the data is then received in place.
const FRAME_BUFFER: usize = 512;
/// Most that is received at once of a long body, whose length is the peer's claim.
const BODY_STEP: usize = 64 << 10;
/// Turns taken before other tasks of the runtime get theirs.
const TURNS: u32 = 64;
/// Reads from the socket in one turn.
const READS_PER_TURN: u32 = 16;

/// Somebody waits for the answer to a request.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) reply: oneshot::Sender<Result<Outcome>>,
    /// When the request was given to the connection.
    pub(crate) sent: Instant,
    /// How often a connection broke under it, and when the first did.
    pub(crate) interruptions: u32,
    pub(crate) interrupted: Option<Instant>,
    /// Kept until the answer is there, also if nobody waits for it any more: this bounds what is in flight.
    pub(crate) _permit: OwnedSemaphorePermit,
    pub(crate) _load: Load,
}

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) ticket: Ticket,
}

/// Why a link stopped.
#[derive(Debug)]
pub(crate) enum End {
    /// The owner wants to be disconnected.
    Closed,
    /// The connection cannot be used any more.
    Broken(Error),
}

#[derive(Debug)]
pub(crate) struct Link {
    socket: Socket,
    demux: Demux<Ticket>,
    input: BytesMut,
    output: VecDeque<Bytes>,
    headers: BytesMut,
    negotiated: Arc<Negotiated>,
    depth: usize,
    timeout: Duration,
    written: Arc<crate::durability::Durability>,
}

impl Link {
    pub(crate) fn new(
        socket: Socket,
        input: BytesMut,
        negotiated: Arc<Negotiated>,
        depth: usize,
        timeout: Duration,
        written: Arc<crate::durability::Durability>,
    ) -> Self {
        let demux = Demux::new(negotiated.framing, negotiated.context_ids.clone());
        let (output, headers) = (VecDeque::new(), BytesMut::new());
        Self { socket, demux, input, output, headers, negotiated, depth, timeout, written }
    }

    /// Queues a request, unless nobody waits for it any more.
    pub(crate) fn submit(&mut self, mut job: Job) {
        if job.ticket.reply.is_closed() {
            return;
        }
        job.ticket.sent = Instant::now();
        let payload = job.request.payload.clone();
        self.headers.reserve(32);
        self.demux.submit(job.request, job.ticket, &mut self.headers);
        self.output.push_back(self.headers.split().freeze());
        if !payload.is_empty() {
            self.output.push_back(payload);
        }
    }

    /// What was not answered.
    pub(crate) fn into_jobs(self) -> Vec<Job> {
        self.demux.into_requests().map(|(request, ticket)| Job { request, ticket }).collect()
    }

    /// Serves `jobs` until the owner closes or the connection breaks.
    pub(crate) async fn serve(&mut self, jobs: &mut mpsc::Receiver<Job>, closing: &mut watch::Receiver<bool>) -> End {
        match self.run(jobs, closing).await {
            Ok(()) => End::Closed,
            Err(error) => End::Broken(error),
        }
    }

    async fn run(&mut self, jobs: &mut mpsc::Receiver<Job>, closing: &mut watch::Receiver<bool>) -> Result<()> {
        // Fine enough to be near the limit, coarse enough to cost nothing.
        let mut tick =
            tokio::time::interval((self.timeout / 8).clamp(Duration::from_millis(5), Duration::from_secs(5)));
        let mut turns = 0;
        loop {
            while self.demux.in_flight() < self.depth {
                let Ok(job) = jobs.try_recv() else { break };
                self.submit(job);
            }
            let busy = self.send_some()? | self.receive_some()?;
            if busy {
                turns += 1;
                if turns % TURNS == 0 {
                    self.check_silence()?;
                    tokio::task::yield_now().await;
                }
                continue;
            }
            tokio::select! {
                biased;
                // An error here means that the client is gone, with everybody who could wait.
                changed = closing.changed() => {
                    if changed.is_err() || *closing.borrow() { return Ok(()) }
                }
                ready = self.socket.readable() => ready.map_err(lost)?,
                job = jobs.recv(), if self.demux.in_flight() < self.depth => match job {
                    Some(job) => self.submit(job),
                    None => return Ok(()),
                },
                ready = self.socket.writable(), if !self.output.is_empty() => ready.map_err(lost)?,
                _ = tick.tick() => self.check_silence()?,
            }
        }
    }

    /// Sends what the socket takes now. `true` if that was something.
    fn send_some(&mut self) -> Result<bool> {
        if self.output.is_empty() {
            return Ok(false);
        }
        let mut slices = [IoSlice::new(&[]); 32];
        let mut filled = 0;
        for (slice, bytes) in slices.iter_mut().zip(&self.output) {
            *slice = IoSlice::new(bytes);
            filled += 1;
        }
        let Some(mut count) = self.socket.try_send(&slices[..filled]).map_err(lost)? else { return Ok(false) };
        while let Some(front) = self.output.front_mut() {
            if count < front.len() {
                front.advance(count);
                break;
            }
            count -= front.len();
            self.output.pop_front();
        }
        Ok(true)
    }

    /// Receives what is there now, within the bounds of a turn. `true` if that was something.
    fn receive_some(&mut self) -> Result<bool> {
        let mut busy = false;
        for _ in 0..READS_PER_TURN {
            while let Some(completion) = self.demux.pump(&mut self.input).map_err(|v| Error::Protocol(v.0))? {
                self.deliver(completion);
            }
            let received = if let Some(sink) = self.demux.sink() {
                let received = self.socket.try_receive_data(sink).map_err(lost)?;
                if let Some(completion) = received.and_then(|count| self.demux.received(count)) {
                    self.deliver(completion);
                }
                received
            } else {
                let missing = self.demux.wanted().saturating_sub(self.input.len());
                self.input.reserve(missing.clamp(FRAME_BUFFER, BODY_STEP));
                self.socket.try_receive(&mut self.input).map_err(lost)?
            };
            match received {
                Some(0) => return Err(Error::lost("the server closed it")),
                Some(_) => busy = true,
                None => break,
            }
        }
        Ok(busy)
    }

    fn deliver(&mut self, completion: Completion<Ticket>) {
        let Completion { token, request, result } = completion;
        if result.is_ok() && matches!(request.command, Command::Write | Command::WriteZeroes) {
            self.written.acknowledged(request.length);
        }
        let result = result.map_err(|failure| Error::Server {
            command: request.command.name(),
            offset: failure.offset.unwrap_or(request.offset),
            length: request.length,
            errno: failure.errno,
            name: errno_name(failure.errno),
            message: failure.message,
        });
        // Whoever asked may have lost interest; the answer was needed to free the slot.
        let _ = token.reply.send(result);
    }

    fn check_silence(&self) -> Result<()> {
        let oldest = self.demux.tokens().map(|ticket| ticket.sent).min();
        match oldest {
            Some(sent) if sent.elapsed() > self.timeout => {
                Err(Error::Timeout { what: "a request", after: self.timeout })
            }
            _ => Ok(()),
        }
    }

    /// Says good-bye, so that the server does not log a broken connection. Never waits for long.
    pub(crate) async fn say_goodbye(&mut self) {
        let mut output = BytesMut::new();
        // A request that is partly sent must be sent whole, or the farewell would be taken for its payload.
        for bytes in self.output.drain(..) {
            output.extend_from_slice(&bytes);
        }
        wire::put_request(&mut output, self.negotiated.framing, Command::Disconnect, 0, 0, 0, 0);
        let _ = tokio::time::timeout(Duration::from_secs(1), self.socket.send(&mut output)).await;
    }
}

fn lost(source: std::io::Error) -> Error {
    Error::lost_io("it broke", source)
}
