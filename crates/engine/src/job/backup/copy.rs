//! Moving one disk's bytes from an NBD export into the repository.
//!
//! One task walks extents and keeps reads in flight; one thread hands finished chunks to the repository's writer, whose
//! own back-pressure reaches the reads through a bounded channel. The number of chunks in memory is bounded by a
//! semaphore that all disks of a job share, however many they are.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use virtward_decide::readplan::{ChunkPlan, DirtyChunks, Planner, Span};
use virtward_nbd::{ALLOC_ZERO, Client, DIRTY};
use virtward_repo::DiskWriter;

use crate::{Cancel, Error, Event, Observer, Result};

/// Context that every server offers: what reads as zeros.
pub(super) const ALLOCATION: &str = "base:allocation";
/// Chunks in memory between the source and the repository, over all disks of a job.
const CHUNKS_IN_FLIGHT: usize = 48;
/// Longest range asked for in one block-status request.
const STATUS_BYTES_MAX: u64 = 1 << 30;

/// What all disks of one job share: memory, pace, progress, cancellation.
#[derive(Clone)]
pub(super) struct Flow<'a> {
    chunks: Arc<Semaphore>,
    pace: Arc<Pace>,
    meter: Arc<Meter>,
    observer: &'a dyn Observer,
    subject: &'a str,
    cancel: Cancel,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        bytes_per_s: Option<u64>,
        observer: &'a dyn Observer,
        subject: &'a str,
        cancel: &Cancel,
    ) -> Flow<'a> {
        Flow {
            chunks: Arc::new(Semaphore::new(CHUNKS_IN_FLIGHT)),
            pace: Arc::new(Pace::new(bytes_per_s)),
            meter: Arc::default(),
            observer,
            subject,
            cancel: cancel.clone(),
        }
    }

    fn expect(&self, bytes: u64) {
        let bytes = self.meter.total.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.observer.event(self.subject, Event::Total { bytes });
    }

    fn advance(&self, bytes: u64) {
        let bytes = self.meter.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.observer.event(self.subject, Event::Done { bytes });
    }

    fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

#[derive(Default)]
struct Meter {
    total: AtomicU64,
    done: AtomicU64,
}

/// Spaces reads out so that their sum stays below a rate.
struct Pace {
    bytes_per_s: Option<u64>,
    next: Mutex<Instant>,
}

impl Pace {
    fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: bytes_per_s.filter(|rate| *rate > 0), next: Mutex::new(Instant::now()) }
    }

    async fn take(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_s else { return };
        let at = {
            let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let at = (*next).max(Instant::now());
            *next = at + Duration::from_secs_f64(bytes as f64 / rate as f64);
            at
        };
        tokio::time::sleep_until(at).await;
    }
}

/// One disk to read.
pub(super) struct Source {
    pub client: Client,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    /// The export has the allocation context; without it everything is read.
    pub allocation: bool,
}

enum Item {
    Chunk { index: u64, data: Bytes, _permit: OwnedSemaphorePermit },
    Zero { first: u64, count: u64 },
}

impl Source {
    /// The chunk-aligned ranges in which `context` marks anything dirty.
    pub(super) async fn dirty_ranges(&self, context: &str) -> Result<Vec<Range<u64>>> {
        let mut dirty = DirtyChunks::new(self.chunk_bytes, self.size_bytes);
        let mut at = 0;
        while at < self.size_bytes {
            for span in self.spans(context, at..self.size_bytes, |flags| flags & DIRTY != 0).await? {
                at = span.offset + span.length;
                dirty.push(span);
            }
        }
        Ok(dirty.into_ranges())
    }

    /// The first few spans of a range, at least one.
    async fn spans(&self, context: &str, range: Range<u64>, set: impl Fn(u64) -> bool) -> Result<Vec<Span>> {
        let length = (range.end - range.start).min(STATUS_BYTES_MAX) as u32;
        let extents = self
            .client
            .block_status(context, range.start, length)
            .await
            .map_err(Error::nbd(format!("read the {context} map at byte {}", range.start)))?;
        Ok(extents
            .into_iter()
            .map(|extent| Span { offset: extent.offset, length: extent.length, set: set(extent.flags) })
            .collect())
    }

    /// Copies what may be non-zero in `ranges` into `writer`; the bytes read.
    pub(super) async fn copy(
        &self,
        writer: DiskWriter,
        ranges: Vec<Range<u64>>,
        flow: &Flow<'_>,
    ) -> Result<(DiskWriter, u64)> {
        let (sender, receiver) = mpsc::channel(8);
        let sink = tokio::task::spawn_blocking(move || drain(writer, receiver));
        let read = self.read_all(ranges, flow, &sender).await;
        drop(sender);
        let sunk = sink.await.map_err(|error| Error::Tool(format!("the repository writer failed: {error}")))?;
        // A failed repository closes the channel, which ends the reads: its error is the cause.
        match (sunk, read) {
            (Err(error), _) => Err(error),
            (Ok(_), Err(error)) => Err(error),
            (Ok(writer), Ok(read_bytes)) => Ok((writer, read_bytes)),
        }
    }

    async fn read_all(&self, ranges: Vec<Range<u64>>, flow: &Flow<'_>, sink: &mpsc::Sender<Item>) -> Result<u64> {
        let mut reads = FuturesUnordered::new();
        let mut read_bytes = 0;
        for range in ranges {
            let mut planner = Some(Planner::new(self.chunk_bytes, range.clone()));
            let mut at = range.start;
            while let Some(mut plan) = planner.take() {
                let mut steps = Vec::new();
                if self.allocation && at < range.end {
                    for span in self.spans(ALLOCATION, at..range.end, |flags| flags & ALLOC_ZERO == 0).await? {
                        at = span.offset + span.length;
                        plan.push(span, &mut |step| steps.push(step));
                    }
                    planner = Some(plan);
                } else {
                    plan.finish(&mut |step| steps.push(step));
                }
                flow.expect(steps.iter().map(bytes_to_read).sum());
                for step in steps {
                    flow.check()?;
                    match step {
                        ChunkPlan::Zero { first, count } => send(sink, Item::Zero { first, count }).await?,
                        ChunkPlan::Read { index, length, reads: parts } => {
                            read_bytes += parts.iter().map(|part| part.end - part.start).sum::<u64>();
                            let permit = self.permit(flow, &mut reads, sink).await?;
                            reads.push(self.read_chunk(index, length, parts, permit, flow));
                        }
                    }
                }
            }
        }
        while let Some(item) = reads.next().await {
            send(sink, item?).await?;
        }
        Ok(read_bytes)
    }

    /// Waits for a place in memory while finished reads go on to the sink.
    async fn permit<F>(
        &self,
        flow: &Flow<'_>,
        reads: &mut FuturesUnordered<F>,
        sink: &mpsc::Sender<Item>,
    ) -> Result<OwnedSemaphorePermit>
    where
        F: Future<Output = Result<Item>>,
    {
        let acquire = flow.chunks.clone().acquire_owned();
        tokio::pin!(acquire);
        loop {
            tokio::select! {
                biased;
                Some(item) = reads.next(), if !reads.is_empty() => send(sink, item?).await?,
                permit = &mut acquire => return permit.map_err(|_| Error::Cancelled),
                () = flow.cancel.cancelled() => return Err(Error::Cancelled),
            }
        }
    }

    async fn read_chunk(
        &self,
        index: u64,
        length: u32,
        parts: Vec<Range<u64>>,
        permit: OwnedSemaphorePermit,
        flow: &Flow<'_>,
    ) -> Result<Item> {
        let start = index * u64::from(self.chunk_bytes);
        let mut data = None;
        let mut patched: Option<BytesMut> = None;
        for part in &parts {
            let bytes = part.end - part.start;
            flow.pace.take(bytes).await;
            let got = tokio::select! {
                got = self.client.read(part.start, bytes as u32) => got,
                () = flow.cancel.cancelled() => return Err(Error::Cancelled),
            };
            let got = got.map_err(Error::nbd(format!("read {bytes} bytes at byte {}", part.start)))?;
            flow.advance(bytes);
            if bytes == u64::from(length) {
                data = Some(got);
            } else {
                let whole = patched.get_or_insert_with(|| BytesMut::zeroed(length as usize));
                let at = (part.start - start) as usize;
                whole[at..at + got.len()].copy_from_slice(&got);
            }
        }
        let data = data.or_else(|| patched.map(BytesMut::freeze)).unwrap_or_default();
        Ok(Item::Chunk { index, data, _permit: permit })
    }

    /// A chunk that may hold data, behind a place that one number chooses, and among those there by the other. None if
    /// the disk holds nothing.
    pub(super) async fn allocated_near(&self, place: u64, choice: u64) -> Result<Option<u64>> {
        let chunk = u64::from(self.chunk_bytes);
        if self.size_bytes == 0 {
            return Ok(None);
        }
        let start = place % self.size_bytes / chunk * chunk;
        if !self.allocation {
            return Ok(Some(start / chunk));
        }
        // From the place to the end, then from the beginning.
        for range in [start..self.size_bytes, 0..start] {
            let mut at = range.start;
            while at < range.end {
                let spans = self.spans(ALLOCATION, at..range.end, |flags| flags & ALLOC_ZERO == 0).await?;
                let found: Vec<&Span> = spans.iter().filter(|span| span.set && span.length > 0).collect();
                if !found.is_empty() {
                    let span = found[(choice % found.len() as u64) as usize];
                    return Ok(Some((span.offset + (choice >> 16) % span.length) / chunk));
                }
                at = spans.last().map_or(range.end, |span| span.offset + span.length);
            }
        }
        Ok(None)
    }

    /// Reads whole chunks by number, for the comparison of "clean" regions.
    pub(super) async fn read_index(&self, index: u64) -> Result<Bytes> {
        let start = index * u64::from(self.chunk_bytes);
        let length = u64::from(self.chunk_bytes).min(self.size_bytes - start) as u32;
        self.client.read(start, length).await.map_err(Error::nbd(format!("re-read {length} bytes at byte {start}")))
    }
}

fn bytes_to_read(step: &ChunkPlan) -> u64 {
    match step {
        ChunkPlan::Zero { .. } => 0,
        ChunkPlan::Read { reads, .. } => reads.iter().map(|read| read.end - read.start).sum(),
    }
}

async fn send(sink: &mpsc::Sender<Item>, item: Item) -> Result<()> {
    // The sink hangs up only after an error of its own, which the caller reports instead of this one.
    sink.send(item).await.map_err(|_| Error::Cancelled)
}

fn drain(writer: DiskWriter, mut items: mpsc::Receiver<Item>) -> Result<DiskWriter> {
    while let Some(item) = items.blocking_recv() {
        match item {
            Item::Chunk { index, data, _permit } => writer.put(index, data)?,
            Item::Zero { first, count } => writer.put_zero(first, count)?,
        }
    }
    Ok(writer)
}
