//! The client: spreads requests over its connections, and gives them the shape that callers want.
//!
//! Every method may be called from many tasks at once; that is how reads are pipelined. Dropping a future that waits is
//! always safe: the answer is then received and thrown away.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::address::Address;
use crate::demux::{ContextExtents, Outcome, Request};
use crate::durability::Durability;
use crate::error::{Error, Result};
use crate::extents::{Extent, ExtentWalk, clip_to};
use crate::handshake::{ExportEntry, ExportInfo, Goal, Negotiated, Progress};
use crate::lane::{Context, Established, Lane, LaneState, LaneStatus, Load, establish, greet};
use crate::link::{Job, Ticket};
use crate::options::{Options, ReconnectPolicy};
use crate::socket::Socket;
use crate::wire::{Command, command_flag};

/// Longest zeroing or trimming that is asked for at once when lengths have 32 bits: aligned, and quick enough.
const ZERO_STEP: u64 = 1 << 30;
/// Longest read or write of which a server is trusted to handle many at a time, whatever it claims.
const TRANSFER_MAX: u32 = 32 << 20;

/// A client of one export. Clones share the connections.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<Context>,
    negotiated: Arc<Negotiated>,
    lanes: Vec<(Arc<LaneStatus>, mpsc::Sender<Job>)>,
    /// Dropping this ends the lanes, too.
    closing: watch::Sender<bool>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Client {
    /// Connects and opens the export that the options name.
    ///
    /// # Errors
    /// The server is not there, not in time, refuses, or has no such export.
    pub async fn connect(address: &Address, options: Options) -> Result<Client> {
        let first = establish(Some(address), &options).await?;
        Ok(Self::begin(Some(address.clone()), first, options))
    }

    /// Opens the export that the options name over a connection that is there already, such as one that comes through a
    /// tunnel. There is no other: when it breaks, requests fail.
    ///
    /// # Errors
    /// The server does not answer in time, refuses, or has no such export.
    pub async fn over(connection: UnixStream, options: Options) -> Result<Client> {
        let options = Options { connections: 1, reconnect: ReconnectPolicy::never(), ..options };
        let first = greet(async { Ok(Socket::Unix(connection)) }, &options).await?;
        Ok(Self::begin(None, first, options))
    }

    fn begin(address: Option<Address>, first: Established, options: Options) -> Client {
        let depth = options.queue_depth.max(1);
        let negotiated = first.negotiated.clone();
        let many = negotiated.info.can_multi_conn || negotiated.info.read_only;
        let count = if many { options.connections.max(1) } else { 1 };
        let permits = Arc::new(Semaphore::new(depth));
        let durability = Arc::new(Durability::default());
        let context = Arc::new(Context { address, options, durability, permits });
        let (closing, closed) = watch::channel(false);
        let mut lanes = Vec::with_capacity(count);
        let mut tasks = Vec::with_capacity(count);
        let mut first = Some(first);
        for _ in 0..count {
            // Permits bound what is in flight over all lanes, so this never fills up.
            let (sender, jobs) = mpsc::channel(depth * count);
            let status = LaneStatus::new(if first.is_some() { LaneState::Up } else { LaneState::Gone });
            let lane = Lane {
                context: context.clone(),
                status: status.clone(),
                jobs,
                closing: closed.clone(),
                expected: negotiated.clone(),
            };
            tasks.push(match first.take() {
                Some(connection) => tokio::spawn(lane.run_first(connection)),
                None => tokio::spawn(lane.run_spare()),
            });
            lanes.push((status, sender));
        }
        let tasks = Mutex::new(tasks);
        Client { inner: Arc::new(Inner { context, negotiated, lanes, closing, tasks }) }
    }

    /// What the server said about the export.
    pub fn info(&self) -> &ExportInfo {
        &self.inner.negotiated.info
    }

    /// Connections that are usable now. Further ones join shortly after [`Client::connect`].
    pub fn connections_up(&self) -> usize {
        self.inner.lanes.iter().filter(|(status, _)| status.state() == LaneState::Up).count()
    }

    /// Reads `len` bytes. Any offset and length within the export is fine.
    ///
    /// # Errors
    /// See [`Error`]; the data is all there or there is an error.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes> {
        self.read_into(offset, len, BytesMut::new()).await.map(BytesMut::freeze)
    }

    /// Reads `len` bytes into `buffer`, whose contents are replaced and whose memory is used if it is large enough.
    ///
    /// The data is received in place. A buffer comes back from [`Bytes`] with [`Bytes::try_into_mut`].
    ///
    /// # Errors
    /// See [`Error`]; the buffer is gone then.
    pub async fn read_into(&self, offset: u64, len: u32, mut buffer: BytesMut) -> Result<BytesMut> {
        buffer.clear();
        self.check_range(offset, u64::from(len))?;
        if len == 0 {
            return Ok(buffer);
        }
        let (start, end) = self.align_outwards(offset, u64::from(len));
        let length = (end - start) as usize;
        buffer.reserve(length);
        let step = self.transfer_max() as usize;
        let mut data = if length <= step {
            self.read_piece(start, length, buffer).await?
        } else {
            self.read_pieces(start, length, step, buffer).await?
        };
        if length != len as usize {
            let _ = data.split_to((offset - start) as usize);
            data.truncate(len as usize);
        }
        Ok(data)
    }

    /// Splits the buffer, not the data: the pieces are neighbours in memory, so joining them costs nothing.
    async fn read_pieces(&self, start: u64, length: usize, step: usize, buffer: BytesMut) -> Result<BytesMut> {
        let mut rest = buffer;
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < length {
            let size = step.min(length - at);
            let next = rest.split_off(size);
            pieces.push(self.read_piece(start + at as u64, size, std::mem::replace(&mut rest, next)));
            at += size;
        }
        let mut read = try_join_all(pieces).await?.into_iter();
        let mut data = read.next().unwrap_or_default();
        for piece in read {
            data.unsplit(piece);
        }
        Ok(data)
    }

    async fn read_piece(&self, offset: u64, length: usize, buffer: BytesMut) -> Result<BytesMut> {
        let request = Request { buffer, ..request(Command::Read, 0, offset, length as u64) };
        match self.submit(request).await? {
            Outcome::Data(data) => Ok(data),
            other => Err(Error::Protocol(format!("{other:?} as the answer to a read"))),
        }
    }

    /// Asks once for the extents of `context` from `offset`: at least one, together at most `len` bytes.
    ///
    /// # Errors
    /// [`Error::ContextNotOffered`] unless it is among [`ExportInfo::contexts`].
    pub async fn block_status(&self, context: &str, offset: u64, len: u32) -> Result<Vec<Extent>> {
        self.block_status_long(context, offset, u64::from(len)).await
    }

    /// The same for lengths of 64 bits, if the server has them; if not, less is answered.
    ///
    /// # Errors
    /// As [`Client::block_status`].
    pub async fn block_status_long(&self, context: &str, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let index = self.context_index(context)?;
        let mut all = self.status(offset, len).await?;
        Ok(if all.is_empty() { Vec::new() } else { all.swap_remove(index) })
    }

    /// Asks once for the extents of all negotiated contexts, in the order of [`ExportInfo::contexts`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn block_status_all(&self, offset: u64, len: u64) -> Result<Vec<Vec<Extent>>> {
        self.status(offset, len).await
    }

    async fn status(&self, offset: u64, len: u64) -> Result<Vec<Vec<Extent>>> {
        self.check_range(offset, len)?;
        let info = self.info();
        if info.contexts.is_empty() {
            return Err(Error::Unsupported { what: "block status" });
        }
        if len == 0 {
            return Ok(Vec::new());
        }
        let (start, end) = self.align_outwards(offset, len);
        let longest = if info.extended { 1 << 62 } else { u64::from(u32::MAX) / 65_536 * 65_536 };
        let length = (end - start).min(longest);
        match self.submit(request(Command::BlockStatus, 0, start, length)).await? {
            Outcome::Extents(all) => Ok(place(all, start, offset, len)),
            other => Err(Error::Protocol(format!("{other:?} as the answer to a block-status request"))),
        }
    }

    /// Walks over the extents of `context` in `range`, however long it is.
    ///
    /// # Errors
    /// [`Error::ContextNotOffered`], or the range reaches past the end.
    pub fn extents(&self, context: &str, range: std::ops::Range<u64>) -> Result<ExtentWalk> {
        self.context_index(context)?;
        self.check_range(range.start, range.end.saturating_sub(range.start))?;
        Ok(ExtentWalk::new(self.clone(), context.to_string(), range))
    }

    /// Writes `data`, which must be aligned to [`ExportInfo::block_min`]. It is durable after [`Client::flush`].
    ///
    /// # Errors
    /// See [`Error`]; what was written before an error is undefined.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        self.write_with(offset, data, 0).await
    }

    /// As [`Client::write`], and durable on return.
    ///
    /// # Errors
    /// As [`Client::write`]; also if the server has no such writes ([`ExportInfo::can_fua`]).
    pub async fn write_durable(&self, offset: u64, data: Bytes) -> Result<()> {
        if !self.info().can_fua {
            return Err(Error::Unsupported { what: "durable writes (FUA)" });
        }
        self.write_with(offset, data, command_flag::FUA).await
    }

    async fn write_with(&self, offset: u64, mut data: Bytes, flags: u16) -> Result<()> {
        self.check_change(offset, data.len() as u64)?;
        let step = self.transfer_max() as usize;
        let mut pieces = Vec::new();
        let mut at = offset;
        while !data.is_empty() {
            let payload = data.split_to(step.min(data.len()));
            let length = payload.len() as u64;
            pieces.push(self.submit(Request { payload, ..request(Command::Write, flags, at, length) }));
            at += length;
        }
        try_join_all(pieces).await.map(|_| ())
    }

    /// Makes a range read as zeroes; with `may_trim` the server may give its space back.
    ///
    /// A server that cannot do this is sent zeroes.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_trim: bool) -> Result<()> {
        self.check_change(offset, len)?;
        if self.info().can_write_zeroes {
            let flags = if may_trim { 0 } else { command_flag::NO_HOLE };
            return self.in_steps(Command::WriteZeroes, flags, offset, len).await;
        }
        let zeroes = Bytes::from(vec![0; self.transfer_max().min(1 << 20) as usize]);
        let mut at = offset;
        while at < offset + len {
            let piece = zeroes.slice(..(offset + len - at).min(zeroes.len() as u64) as usize);
            let length = piece.len() as u64;
            self.write_with(at, piece, 0).await?;
            at += length;
        }
        Ok(())
    }

    /// Tells the server that the contents of a range do not matter any more.
    ///
    /// # Errors
    /// As [`Client::write`]; also if the server does not support it ([`ExportInfo::can_trim`]).
    pub async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.check_change(offset, len)?;
        if !self.info().can_trim {
            return Err(Error::Unsupported { what: "trim" });
        }
        self.in_steps(Command::Trim, 0, offset, len).await
    }

    async fn in_steps(&self, command: Command, flags: u16, offset: u64, len: u64) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let length = ZERO_STEP.min(offset + len - at);
            self.submit(request(command, flags, at, length)).await?;
            at += length;
        }
        Ok(())
    }

    /// Makes all writes that were answered before this call durable. Does nothing if the server has no volatile cache
    /// that it would tell us of ([`ExportInfo::can_flush`]).
    ///
    /// # Errors
    /// [`Error::FlushLost`] if a connection was lost since the last flush, and with it perhaps writes that had been
    /// answered. This is told once: the caller writes again, or gives up.
    pub async fn flush(&self) -> Result<()> {
        let durability = &self.inner.context.durability;
        let mark = durability.flush_begins();
        if self.info().can_flush {
            self.submit(request(Command::Flush, 0, 0, 0)).await?;
        }
        durability.flushed(&mark).map_err(|bytes| Error::FlushLost { bytes })
    }

    /// Ends all connections in the way that servers expect. Requests that are in flight fail with [`Error::Closed`].
    pub async fn disconnect(&self) {
        self.inner.context.permits.close();
        self.inner.closing.send_replace(true);
        let tasks = std::mem::take(&mut *self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            let _ = task.await;
        }
    }

    async fn submit(&self, request: Request) -> Result<Outcome> {
        let inner = &*self.inner;
        let permit = inner.context.permits.clone().acquire_owned().await.map_err(|_| Error::Closed)?;
        let (status, sender) = inner.choose_lane();
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket {
            reply,
            sent: Instant::now(),
            interruptions: 0,
            interrupted: None,
            _permit: permit,
            _load: Load::on(status),
        };
        sender.send(Job { request, ticket }).await.map_err(|_| Error::Closed)?;
        // Without an answer, the lane ended with the job still in its queue.
        answer.await.map_err(|_| Error::Closed)?
    }

    fn context_index(&self, context: &str) -> Result<usize> {
        self.info().contexts.iter().position(|known| known == context).ok_or_else(|| Error::ContextNotOffered {
            context: context.to_string(),
            export: self.inner.context.options.export.clone(),
        })
    }

    fn transfer_max(&self) -> u32 {
        let info = self.info();
        // Both are at least one block, and blocks are at most 64 KiB.
        info.block_max.min(TRANSFER_MAX) / info.block_min * info.block_min
    }

    /// The smallest range of whole blocks around one within the export.
    fn align_outwards(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = u64::from(self.info().block_min);
        let end = (offset + len).next_multiple_of(block).min(self.info().size_bytes);
        (offset / block * block, end)
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let size = self.info().size_bytes;
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, length, size }),
        }
    }

    fn check_change(&self, offset: u64, length: u64) -> Result<()> {
        let info = self.info();
        self.check_range(offset, length)?;
        if info.read_only {
            return Err(Error::ReadOnly { export: self.inner.context.options.export.clone() });
        }
        let block = u64::from(info.block_min);
        let to_end = offset + length == info.size_bytes;
        if !offset.is_multiple_of(block) || !(length.is_multiple_of(block) || to_end) {
            return Err(Error::Unaligned { offset, length, block: info.block_min });
        }
        Ok(())
    }
}

impl Inner {
    /// The least loaded of those in the best state; the first lane is never out of the question.
    fn choose_lane(&self) -> (&Arc<LaneStatus>, &mpsc::Sender<Job>) {
        let best = self.lanes.iter().min_by_key(|(status, _)| (status.state(), status.load()));
        let (status, sender) = best.unwrap_or(&self.lanes[0]);
        (status, sender)
    }
}

/// Lists the exports of a server. Those that it does not wish to list are missing.
///
/// # Errors
/// The server is not there, or does not list.
pub async fn list_exports(address: &Address) -> Result<Vec<ExportEntry>> {
    let limit = Options::default().connect_timeout;
    let work = async {
        let socket = Socket::connect(address).await?;
        match socket.shake_hands(Goal::List, &mut BytesMut::new()).await? {
            Progress::Listed(exports) => Ok(exports),
            _ => Err(Error::Protocol("the handshake ended without a listing".into())),
        }
    };
    let late = Error::Timeout { what: "the connection and its handshake", after: limit };
    tokio::time::timeout(limit, work).await.unwrap_or(Err(late))
}

fn request(command: Command, flags: u16, offset: u64, length: u64) -> Request {
    Request { command, flags, offset, length, payload: Bytes::new(), buffer: BytesMut::new() }
}

/// Gives extents their offsets, and cuts off what was asked only because of block alignment.
fn place(all: ContextExtents, start: u64, offset: u64, len: u64) -> Vec<Vec<Extent>> {
    all.into_iter().map(|pairs| clip_to(pairs, start, offset, len)).collect()
}
