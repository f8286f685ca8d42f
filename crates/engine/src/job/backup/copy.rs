//! Moving one disk's bytes from where they are into the repository.
//!
//! One task walks extents and keeps reads in flight; one thread hands finished chunks to the repository's writer, whose
//! own back-pressure reaches the reads through a bounded channel. The number of chunks in memory is bounded by a
//! semaphore that all disks of a job share, however many they are.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use virtward_decide::readplan::{self, ChunkPlan, Dirty, Planner, Span};
use virtward_repo::{ChunkBuf, DiskWriter};

use super::origin::{ChunkRead, Origin};
use crate::{Cancel, Error, Event, Observer, Result};

/// Chunks in memory between the source and the repository, over all disks of a job.
const CHUNKS_IN_FLIGHT: usize = 24;

/// Longest changed range that is read without asking what of it is allocated.
const UNASKED_BYTES_MAX: u64 = 4 << 20;

/// How far from a random place something allocated is looked for at first, and twice as far each time after. A question about
/// a whole disk keeps QEMU from everything else for milliseconds.
const SAMPLE_WINDOW_BYTES: u64 = 16 << 20;

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
    pub origin: Origin,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
}

/// Chunks that are taken in parts, with the parts.
pub(super) type Parts = BTreeMap<u64, Vec<Range<u32>>>;

enum Item {
    Chunk { index: u64, data: ChunkBuf, parts: Option<Vec<Range<u32>>>, _permit: OwnedSemaphorePermit },
    Zero { first: u64, count: u64 },
}

impl Source {
    /// What `context` marks dirty.
    pub(super) async fn dirty(&self, context: &str) -> Result<Dirty> {
        let mut dirty = Dirty::new(self.chunk_bytes, self.size_bytes);
        let mut at = 0;
        while at < self.size_bytes {
            for span in self.origin.dirty(context, at..self.size_bytes).await? {
                at = span.offset + span.length;
                dirty.push(span);
            }
        }
        Ok(dirty)
    }

    /// Copies what may be non-zero in `ranges` into `writer`, of some chunks only `parts`; the bytes read.
    pub(super) async fn copy(
        &self,
        writer: &Arc<DiskWriter>,
        ranges: &[Range<u64>],
        parts: Parts,
        flow: &Flow<'_>,
    ) -> Result<u64> {
        let (sender, receiver) = mpsc::channel(8);
        let sink = tokio::task::spawn_blocking({
            let writer = writer.clone();
            move || drain(&writer, receiver)
        });
        let read = self.read_all(writer, ranges, parts, flow, &sender).await;
        drop(sender);
        let sunk = sink.await.map_err(|error| Error::Tool(format!("the repository writer failed: {error}")))?;
        // A failed repository closes the channel, which ends the reads: its error is the cause.
        sunk?;
        read
    }

    async fn read_all(
        &self,
        writer: &DiskWriter,
        ranges: &[Range<u64>],
        mut parts: Parts,
        flow: &Flow<'_>,
        sink: &mpsc::Sender<Item>,
    ) -> Result<u64> {
        let mut reads = FuturesUnordered::new();
        let mut read_bytes = 0;
        for range in ranges {
            let mut planner = Some(Planner::new(self.chunk_bytes, range.clone()));
            let mut at = range.start;
            while let Some(mut plan) = planner.take() {
                let mut steps = Vec::new();
                let asked = at < range.end && !self.is_read_unasked(range);
                let known = match asked {
                    true => self.while_reading(self.origin.allocated(at..range.end), flow, &mut reads, sink).await??,
                    false => None,
                };
                match known {
                    Some(spans) => {
                        for span in spans {
                            at = span.offset + span.length;
                            plan.push(span, &mut |step| steps.push(step));
                        }
                        planner = Some(plan);
                    }
                    None => plan.finish(&mut |step| steps.push(step)),
                }
                steps.iter_mut().for_each(|step| self.leave_out_clean(step, &parts));
                flow.expect(steps.iter().map(bytes_to_read).sum());
                for step in steps {
                    flow.check()?;
                    match step {
                        ChunkPlan::Zero { first, count } => send(sink, Item::Zero { first, count }).await?,
                        ChunkPlan::Read { index, reads: places, .. } => {
                            let start = index * u64::from(self.chunk_bytes);
                            let chunk = ChunkRead { start, parts: places };
                            read_bytes += chunk.bytes();
                            let permit = flow.chunks.clone().acquire_owned();
                            let permit = self.while_reading(permit, flow, &mut reads, sink).await?;
                            let permit = permit.map_err(|_| Error::Cancelled)?;
                            reads.push(self.read_chunk(writer, index, chunk, parts.remove(&index), permit, flow));
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

    /// Whether it is cheaper to read a changed range than to ask first what of it is allocated.
    fn is_read_unasked(&self, range: &Range<u64>) -> bool {
        let length = range.end - range.start;
        length < self.size_bytes && length <= UNASKED_BYTES_MAX
    }

    /// Waits for something while finished reads go on to the sink.
    async fn while_reading<T, F>(
        &self,
        wanted: impl Future<Output = T>,
        flow: &Flow<'_>,
        reads: &mut FuturesUnordered<F>,
        sink: &mpsc::Sender<Item>,
    ) -> Result<T>
    where
        F: Future<Output = Result<Item>>,
    {
        tokio::pin!(wanted);
        loop {
            tokio::select! {
                biased;
                Some(item) = reads.next(), if !reads.is_empty() => send(sink, item?).await?,
                got = &mut wanted => return Ok(got),
                () = flow.cancel.cancelled() => return Err(Error::Cancelled),
            }
        }
    }

    async fn read_chunk(
        &self,
        writer: &DiskWriter,
        index: u64,
        chunk: ChunkRead,
        parts: Option<Vec<Range<u32>>>,
        permit: OwnedSemaphorePermit,
        flow: &Flow<'_>,
    ) -> Result<Item> {
        let bytes = chunk.bytes();
        flow.pace.take(bytes).await;
        let data = tokio::select! {
            data = self.origin.read(chunk, || writer.buffer(index)) => data?,
            () = flow.cancel.cancelled() => return Err(Error::Cancelled),
        };
        flow.advance(bytes);
        Ok(Item::Chunk { index, data, parts, _permit: permit })
    }

    /// Takes what is not dirty out of a read of a chunk that is taken in parts.
    fn leave_out_clean(&self, step: &mut ChunkPlan, parts: &Parts) {
        let ChunkPlan::Read { index, reads, .. } = step else { return };
        let Some(parts) = parts.get(index) else { return };
        let start = *index * u64::from(self.chunk_bytes);
        let dirty: Vec<_> =
            parts.iter().map(|part| start + u64::from(part.start)..start + u64::from(part.end)).collect();
        *reads = readplan::intersect(reads, &dirty);
    }

    /// A chunk that may hold data, behind a place that one number chooses, and among those there by the other. None if
    /// the disk holds nothing.
    pub(super) async fn allocated_near(&self, place: u64, choice: u64) -> Result<Option<u64>> {
        let chunk = u64::from(self.chunk_bytes);
        if self.size_bytes == 0 {
            return Ok(None);
        }
        let start = place % self.size_bytes / chunk * chunk;
        let mut window = SAMPLE_WINDOW_BYTES;
        // From the place to the end, then from the beginning.
        for range in [start..self.size_bytes, 0..start] {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min(at.saturating_add(window));
                window = window.saturating_mul(2);
                let Some(spans) = self.origin.allocated(at..end).await? else {
                    return Ok(Some(start / chunk));
                };
                let found: Vec<&Span> = spans.iter().filter(|span| span.set && span.length > 0).collect();
                if !found.is_empty() {
                    let span = found[(choice % found.len() as u64) as usize];
                    return Ok(Some((span.offset + (choice >> 16) % span.length) / chunk));
                }
                at = spans.last().map_or(end, |span| span.offset + span.length);
            }
        }
        Ok(None)
    }

    /// Reads whole chunks by number, for the comparison of "clean" regions.
    pub(super) async fn read_index(&self, index: u64) -> Result<ChunkBuf> {
        let start = index * u64::from(self.chunk_bytes);
        let length = u64::from(self.chunk_bytes).min(self.size_bytes - start);
        let whole = start..start + length;
        let chunk = ChunkRead { start, parts: vec![whole] };
        self.origin.read(chunk, || vec![0; length as usize]).await
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

fn drain(writer: &DiskWriter, mut items: mpsc::Receiver<Item>) -> Result<()> {
    while let Some(item) = items.blocking_recv() {
        match item {
            Item::Chunk { index, data, parts: Some(parts), _permit } => writer.put_parts(index, data, &parts)?,
            Item::Chunk { index, data, parts: None, _permit } => writer.put(index, data)?,
            Item::Zero { first, count } => writer.put_zero(first, count)?,
        }
    }
    Ok(())
}
