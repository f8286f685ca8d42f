//! The transmission phase without input or output: requests in flight, and the parser that gives replies to them.
//!
//! ```text
//!   Magic ──► Header ─┬─ nothing follows ──────────────► Magic
//!                     ├─ Body (offset, hole, error, extents) ─┬──► Magic
//!                     └─ simple read ──► Data ◄── data chunk ─┘
//!                                          └── all there ──► Magic
//! ```
//!
//! The caller gives small pieces of framing to [`Demux::pump`]; while [`Demux::sink`] is `Some`, it may receive from
//! the socket straight into the buffer of the request that the data belongs to, so bulk data is never copied.
//!
//! Invariants
//! - A cookie is a slot and the slot's generation: an answer to a request that is over is recognised as such.
//! - Nothing is allocated for a length that the peer chose: read buffers have the length that was asked for, and
//!   bodies grow as they arrive, below the bounds of [`crate::wire`].
//! - A violation poisons the demultiplexer: the caller drops the connection and gets the requests back with
//!   [`Demux::into_requests`].

use bytes::buf::Limit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::coverage::Coverage;
use crate::wire::{self, Command, Framing, ReplyHeader, chunk};

/// Most error chunks that are taken for one request.
const ERROR_CHUNKS_MAX: u32 = 64;

/// What is asked of the server.
#[derive(Debug, Clone)]
pub struct Request {
    /// Kind.
    pub command: Command,
    /// Flags of the protocol for this command.
    pub flags: u16,
    /// Where, in bytes.
    pub offset: u64,
    /// How long, in bytes; at most `u32::MAX` unless headers are extended.
    pub length: u64,
    /// What is to be written.
    pub payload: Bytes,
    /// Where a read puts its data: empty, with a capacity of at least `length`.
    pub buffer: BytesMut,
}

/// Extents of one context, in the order of the negotiated contexts: (length, flags).
pub type ContextExtents = Vec<Vec<(u64, u64)>>;

/// A positive answer.
#[derive(Debug)]
pub enum Outcome {
    /// The data that was read.
    Data(BytesMut),
    /// Extents for every negotiated context, clipped to the request.
    Extents(ContextExtents),
    /// The request took effect.
    Done,
}

/// A negative answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Error number of the protocol.
    pub errno: u32,
    /// The server's words.
    pub message: String,
    /// Where in the export it failed, if that is known better than from the request.
    pub offset: Option<u64>,
}

/// A request that was answered.
#[derive(Debug)]
pub struct Completion<T> {
    /// What the caller gave along with the request.
    pub token: T,
    /// The request; its buffer has moved to the outcome.
    pub request: Request,
    /// The answer.
    pub result: Result<Outcome, Failure>,
}

/// How the peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

/// Where the next bytes from the server go.
#[derive(Debug)]
pub enum Sink<'a> {
    /// Appended, within the limit.
    Append(Limit<&'a mut BytesMut>),
    /// Into the middle of a buffer (the server answers out of order).
    Fill(&'a mut [u8]),
}

#[derive(Debug)]
struct Pending<T> {
    token: T,
    request: Request,
    coverage: Coverage,
    extents: Vec<Option<Vec<(u64, u64)>>>,
    failure: Option<Failure>,
    error_chunks: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    pending: Option<Pending<T>>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Magic,
    Header { magic: u32 },
    Body { slot: usize, kind: u16, done: bool, length: usize, data_follows: u32 },
    Data { slot: usize, at: usize, left: usize, done: bool },
}

/// Requests in flight on one connection, and the parser of its replies.
#[derive(Debug)]
pub struct Demux<T> {
    framing: Framing,
    context_ids: Vec<u32>,
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
    state: State,
}

impl<T> Demux<T> {
    /// Nothing in flight, at the start of the transmission phase.
    pub fn new(framing: Framing, context_ids: Vec<u32>) -> Self {
        Self { framing, context_ids, slots: Vec::new(), free: Vec::new(), state: State::Magic }
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// What the caller gave along with the requests that are in flight.
    pub fn tokens(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.pending.as_ref().map(|pending| &pending.token))
    }

    /// Registers a request and appends its header to `out`; the payload, if any, is to be sent right behind it.
    pub fn submit(&mut self, mut request: Request, token: T, out: &mut BytesMut) {
        if request.command == Command::Read {
            request.buffer.clear();
            request.buffer.reserve(request.length as usize);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, pending: None });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.generation = slot.generation.wrapping_add(1);
        let cookie = u64::from(slot.generation) << 32 | index as u64;
        wire::put_request(out, self.framing, request.command, request.flags, cookie, request.offset, request.length);
        let extents = if request.command == Command::BlockStatus { vec![None; self.context_ids.len()] } else { vec![] };
        slot.pending =
            Some(Pending { token, request, coverage: Coverage::default(), extents, failure: None, error_chunks: 0 });
    }

    /// Ends this connection's life and gives back what was not answered.
    pub fn into_requests(self) -> impl Iterator<Item = (Request, T)> {
        self.slots.into_iter().filter_map(|slot| slot.pending.map(|pending| (pending.request, pending.token)))
    }

    /// Takes what it can from the front of `input`, up to and including the end of one answer.
    ///
    /// Returns `None` when it needs more bytes: [`Self::wanted`] says how many.
    ///
    /// # Errors
    /// The peer broke the protocol.
    pub fn pump(&mut self, input: &mut BytesMut) -> Result<Option<Completion<T>>, Violation> {
        loop {
            let completion = if let State::Data { .. } = self.state {
                if input.is_empty() {
                    return Ok(None);
                }
                self.copy_data(input)
            } else {
                let wanted = self.wanted();
                if input.len() < wanted {
                    return Ok(None);
                }
                let frame = input.split_to(wanted);
                self.frame(&frame)?
            };
            if completion.is_some() {
                return Ok(completion);
            }
        }
    }

    /// Length of the piece of framing that comes next; 0 while data is expected.
    pub fn wanted(&self) -> usize {
        match self.state {
            State::Magic => 4,
            State::Header { magic } => ReplyHeader::length_after(magic, self.framing).unwrap_or(0),
            State::Body { length, .. } => length,
            State::Data { .. } => 0,
        }
    }

    /// Where to receive data directly, if data is what comes next. Follow up with [`Self::received`].
    pub fn sink(&mut self) -> Option<Sink<'_>> {
        let State::Data { slot, at, left, .. } = self.state else { return None };
        let buffer = &mut self.slots[slot].pending.as_mut()?.request.buffer;
        Some(if at < buffer.len() { Sink::Fill(&mut buffer[at..at + left]) } else { Sink::Append(buffer.limit(left)) })
    }

    /// `count` bytes were put into the sink.
    pub fn received(&mut self, count: usize) -> Option<Completion<T>> {
        let State::Data { slot, at, left, done } = self.state else { return None };
        debug_assert!(count <= left);
        if count < left {
            self.state = State::Data { slot, at: at + count, left: left - count, done };
            return None;
        }
        self.state = State::Magic;
        // That a read is complete was checked when its last chunk was announced.
        if done { self.complete(slot).ok() } else { None }
    }

    fn copy_data(&mut self, input: &mut BytesMut) -> Option<Completion<T>> {
        let count = match self.sink()? {
            Sink::Append(mut buffer) => {
                let count = input.len().min(buffer.remaining_mut());
                buffer.put_slice(&input[..count]);
                count
            }
            Sink::Fill(buffer) => {
                let count = input.len().min(buffer.len());
                buffer[..count].copy_from_slice(&input[..count]);
                count
            }
        };
        input.advance(count);
        self.received(count)
    }

    fn frame(&mut self, frame: &[u8]) -> Result<Option<Completion<T>>, Violation> {
        match self.state {
            State::Magic => {
                let magic = u32::from_be_bytes(frame.try_into().map_err(|_| violation("a short magic number"))?);
                if ReplyHeader::length_after(magic, self.framing).is_none() {
                    return Err(violation(format!("a reply begins with {magic:#x} ({:?} framing)", self.framing)));
                }
                self.state = State::Header { magic };
                Ok(None)
            }
            State::Header { magic } => {
                match ReplyHeader::decode(magic, frame).ok_or_else(|| violation("a short reply header"))? {
                    ReplyHeader::Simple { errno, cookie } => self.simple_reply(errno, cookie),
                    ReplyHeader::Chunk { flags, kind, cookie, length } => {
                        self.chunk_header(flags & chunk::FLAG_DONE != 0, kind, cookie, length)
                    }
                }
            }
            State::Body { slot, kind, done, data_follows, .. } => self.body(slot, kind, done, data_follows, frame),
            State::Data { .. } => Ok(None),
        }
    }

    fn lookup(&self, cookie: u64) -> Result<usize, Violation> {
        let index = (cookie & u64::from(u32::MAX)) as usize;
        match self.slots.get(index) {
            Some(slot) if slot.pending.is_some() && u64::from(slot.generation) == cookie >> 32 => Ok(index),
            _ => Err(violation(format!("an answer to request {cookie:#x}, which is not in flight"))),
        }
    }

    fn pending(&mut self, slot: usize) -> Result<&mut Pending<T>, Violation> {
        self.slots[slot].pending.as_mut().ok_or_else(|| violation("an answer to a request that is over"))
    }

    fn simple_reply(&mut self, errno: u32, cookie: u64) -> Result<Option<Completion<T>>, Violation> {
        let slot = self.lookup(cookie)?;
        let framing = self.framing;
        self.state = State::Magic;
        let pending = self.pending(slot)?;
        if errno != 0 {
            pending.failure.get_or_insert(Failure { errno, message: String::new(), offset: None });
            return self.complete(slot).map(Some);
        }
        match pending.request.command {
            Command::Read if framing != Framing::Simple => {
                Err(violation("a simple reply to a read, although replies are structured"))
            }
            Command::BlockStatus => Err(violation("a simple reply to a block-status request")),
            Command::Read => {
                let length = pending.request.length;
                let _ = pending.coverage.add(0, length as u32);
                self.state = State::Data { slot, at: 0, left: length as usize, done: true };
                Ok(None)
            }
            _ => self.complete(slot).map(Some),
        }
    }

    fn chunk_header(
        &mut self,
        done: bool,
        kind: u16,
        cookie: u64,
        length: u64,
    ) -> Result<Option<Completion<T>>, Violation> {
        let slot = self.lookup(cookie)?;
        let extended = self.framing == Framing::Extended;
        let request = &self.pending(slot)?.request;
        let bad = |what: &str| {
            Err(violation(format!("{what} of {length} bytes to a {} of {}", request.command.name(), request.length)))
        };
        let body = |length: u64| State::Body { slot, kind, done, length: length as usize, data_follows: 0 };
        self.state = match (kind, request.command) {
            (chunk::NONE, _) if length == 0 && done => return self.complete(slot).map(Some),
            (chunk::NONE, _) => return bad("an empty chunk that is not the last, or not empty,"),
            (chunk::OFFSET_DATA, Command::Read) => match length.checked_sub(8) {
                Some(data) if data >= 1 && data <= request.length => {
                    State::Body { slot, kind, done, length: 8, data_follows: data as u32 }
                }
                _ => return bad("a data chunk"),
            },
            (chunk::OFFSET_HOLE, Command::Read) if length == 12 => body(length),
            (chunk::OFFSET_HOLE, Command::Read) => return bad("a hole chunk"),
            (chunk::BLOCK_STATUS, Command::BlockStatus) | (chunk::BLOCK_STATUS_EXT, Command::BlockStatus)
                if kind == chunk::BLOCK_STATUS || extended =>
            {
                if !(12..=wire::STATUS_CHUNK_MAX as u64).contains(&length) {
                    return bad("a block-status chunk");
                }
                body(length)
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                if !(4..=wire::ERROR_CHUNK_MAX as u64).contains(&length) {
                    return bad("an error chunk");
                }
                body(length)
            }
            _ => return bad(&format!("a chunk of type {kind}")),
        };
        Ok(None)
    }

    fn body(
        &mut self,
        slot: usize,
        kind: u16,
        done: bool,
        data_follows: u32,
        body: &[u8],
    ) -> Result<Option<Completion<T>>, Violation> {
        self.state = State::Magic;
        match kind {
            chunk::OFFSET_DATA => return self.data_chunk(slot, done, data_follows, body),
            chunk::OFFSET_HOLE => self.hole_chunk(slot, body)?,
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => self.status_chunk(slot, kind, body)?,
            _ => self.error_chunk(slot, kind, body)?,
        }
        if done { self.complete(slot).map(Some) } else { Ok(None) }
    }

    /// Marks part of a read as answered and returns where in its buffer it goes.
    fn claim(pending: &mut Pending<T>, offset: u64, length: u32) -> Result<usize, Violation> {
        let request = &pending.request;
        let at = offset.checked_sub(request.offset);
        let inside = at.filter(|at| at.checked_add(u64::from(length)).is_some_and(|end| end <= request.length));
        let describe = |what| {
            violation(format!(
                "a chunk of {length} bytes at {offset} {what} in the answer to a read of {} at {}",
                request.length, request.offset
            ))
        };
        let Some(at) = inside.filter(|_| length > 0) else { return Err(describe("out of place")) };
        // Reads are at most u32::MAX long, so both ends fit.
        if !pending.coverage.add(at as u32, (at + u64::from(length)) as u32) {
            return Err(describe("that overlaps another"));
        }
        let (at, buffer) = (at as usize, &mut pending.request.buffer);
        if buffer.len() < at {
            buffer.resize(at, 0);
        }
        Ok(at)
    }

    fn data_chunk(
        &mut self,
        slot: usize,
        done: bool,
        length: u32,
        mut body: &[u8],
    ) -> Result<Option<Completion<T>>, Violation> {
        let offset = body.try_get_u64().map_err(|_| violation("a short data chunk"))?;
        let pending = self.pending(slot)?;
        let at = Self::claim(pending, offset, length)?;
        // The end of the read must not be found missing after the data was awaited.
        if done {
            check_complete(pending)?;
        }
        self.state = State::Data { slot, at, left: length as usize, done };
        Ok(None)
    }

    fn hole_chunk(&mut self, slot: usize, mut body: &[u8]) -> Result<(), Violation> {
        let short = |_| violation("a short hole chunk");
        let offset = body.try_get_u64().map_err(short)?;
        let length = body.try_get_u32().map_err(short)?;
        let pending = self.pending(slot)?;
        let at = Self::claim(pending, offset, length)?;
        let buffer = &mut pending.request.buffer;
        // Below the end of the buffer are zeroes already: it was extended over a gap, and the gap was not filled yet.
        if at == buffer.len() {
            buffer.resize(at + length as usize, 0);
        }
        Ok(())
    }

    fn status_chunk(&mut self, slot: usize, kind: u16, body: &[u8]) -> Result<(), Violation> {
        let (id, pairs) =
            wire::decode_status_chunk(kind, body).ok_or_else(|| violation("a block-status chunk of odd length"))?;
        let Some(context) = self.context_ids.iter().position(|known| *known == id) else {
            return Err(violation(format!("extents of context {id}, which was not negotiated")));
        };
        let pending = self.pending(slot)?;
        let extents = clip(pairs, pending.request.length)?;
        if pending.extents[context].replace(extents).is_some() {
            return Err(violation(format!("extents of context {id} twice in one answer")));
        }
        Ok(())
    }

    fn error_chunk(&mut self, slot: usize, kind: u16, body: &[u8]) -> Result<(), Violation> {
        let (errno, message, offset) =
            wire::decode_error_chunk(kind, body).ok_or_else(|| violation("a garbled error chunk"))?;
        let pending = self.pending(slot)?;
        pending.error_chunks += 1;
        if pending.error_chunks > ERROR_CHUNKS_MAX {
            return Err(violation("an endless list of errors to one request"));
        }
        // An error without a number is still an error.
        let errno = if errno == 0 { 22 } else { errno };
        pending.failure.get_or_insert(Failure { errno, message, offset });
        Ok(())
    }

    fn complete(&mut self, slot: usize) -> Result<Completion<T>, Violation> {
        self.state = State::Magic;
        check_complete(self.pending(slot)?)?;
        let pending =
            self.slots[slot].pending.take().ok_or_else(|| violation("an answer to a request that is over"))?;
        self.free.push(slot);
        let Pending { token, mut request, extents, failure, .. } = pending;
        let result = match (failure, request.command) {
            (Some(failure), _) => Err(failure),
            (None, Command::Read) => Ok(Outcome::Data(std::mem::take(&mut request.buffer))),
            (None, Command::BlockStatus) => Ok(Outcome::Extents(extents.into_iter().flatten().collect())),
            (None, _) => Ok(Outcome::Done),
        };
        Ok(Completion { token, request, result })
    }
}

fn check_complete<T>(pending: &Pending<T>) -> Result<(), Violation> {
    let request = &pending.request;
    let complete = match request.command {
        _ if pending.failure.is_some() => true,
        Command::Read => pending.coverage.is_complete(request.length as u32),
        Command::BlockStatus => pending.extents.iter().all(Option::is_some),
        _ => true,
    };
    if complete {
        return Ok(());
    }
    Err(violation(format!(
        "the answer to a {} of {} bytes at {} ended without being complete",
        request.command.name(),
        request.length,
        request.offset
    )))
}

/// The last extent may reach beyond the request and is cut; any other that does is an error, as is an empty one.
fn clip(mut pairs: Vec<(u64, u64)>, length: u64) -> Result<Vec<(u64, u64)>, Violation> {
    let mut left = length;
    let last = pairs.len().saturating_sub(1);
    for (index, (extent, _)) in pairs.iter_mut().enumerate() {
        if *extent == 0 {
            return Err(violation("an extent of no length"));
        }
        if left == 0 || (*extent > left && index != last) {
            return Err(violation("extents that go on after the end of the request"));
        }
        *extent = (*extent).min(left);
        left -= *extent;
    }
    Ok(pairs)
}

fn violation(what: impl Into<String>) -> Violation {
    Violation(what.into())
}

#[cfg(test)]
mod tests;
