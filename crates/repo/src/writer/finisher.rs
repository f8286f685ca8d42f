//! The thread that makes packs durable and indexes them, so that workers never wait for an fsync.
//!
//! Segments are written after every few packs, in growing steps: what a killed run stored is found by the next one,
//! and a long run leaves few segments.

use std::{
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread::JoinHandle,
};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::{
    error::{Error, Result},
    format::names,
    index::segment::{self, IndexEntry},
    pack::append::{Finished, FullPack, Origin},
    repository::Repository,
    store::put_new,
    util::lock,
};

/// Full packs waiting for their fsync; beyond this the workers wait too.
const QUEUED_MAX: usize = 2;
/// The first segment is written after this many packs, later ones after a share of all before.
const SEGMENT_PACKS_MIN: usize = 4;

pub struct Finisher {
    repo: Repository,
    origin: Origin,
    failed: Arc<OnceLock<Error>>,
    progress: Mutex<Counts>,
    settled: Condvar,
}

/// The finisher, where to send packs, and its thread.
type Started = (Arc<Finisher>, Sender<Option<FullPack>>, JoinHandle<()>);

#[derive(Default)]
struct Counts {
    outstanding: usize,
    finished: Vec<Finished>,
    indexed: usize,
}

impl Finisher {
    /// Starts the thread; `None` ends it.
    pub fn start(repo: &Repository, origin: Origin, failed: Arc<OnceLock<Error>>) -> Result<Started> {
        let finisher =
            Arc::new(Self { repo: repo.clone(), origin, failed, progress: Mutex::default(), settled: Condvar::new() });
        let (full, packs) = bounded(QUEUED_MAX);
        let own = finisher.clone();
        let thread = std::thread::Builder::new()
            .name("repo-finish".into())
            .spawn(move || own.run(&packs))
            .map_err(|e| Error::io("start", "the thread that completes packs", e))?;
        Ok((finisher, full, thread))
    }

    fn run(&self, packs: &Receiver<Option<FullPack>>) {
        while let Ok(Some(pack)) = packs.recv() {
            // After a failure packs are abandoned: nothing will ever refer to them.
            let outcome = if self.failed.get().is_none() { self.finish(pack) } else { Ok(()) };
            if let Err(e) = outcome {
                let _ = self.failed.set(e);
            }
            lock(&self.progress).outstanding -= 1;
            self.settled.notify_all();
        }
    }

    fn finish(&self, pack: FullPack) -> Result<()> {
        let finished = pack.finish(&self.repo.inner.ring)?;
        let mut progress = lock(&self.progress);
        progress.finished.push(finished);
        if progress.finished.len() < SEGMENT_PACKS_MIN.max(progress.indexed / 2) {
            return Ok(());
        }
        let batch = std::mem::take(&mut progress.finished);
        progress.indexed += batch.len();
        drop(progress);
        self.write_segment(batch)
    }

    fn write_segment(&self, batch: Vec<Finished>) -> Result<()> {
        let mut packs = Vec::with_capacity(batch.len());
        let mut entries = Vec::new();
        for (number, (info, records)) in batch.into_iter().enumerate() {
            entries.extend(records.into_iter().map(|entry| IndexEntry { pack: number as u32, entry }));
            packs.push(info);
        }
        let inner = &self.repo.inner;
        let (id, bytes) = segment::encode(&inner.ring, (self.origin.writer, self.origin.epoch), &packs, &[], entries)?;
        put_new(&*inner.store, &names::segment(&id), &bytes)
    }

    /// Announces a pack that is about to be sent.
    pub fn expect_one(&self) {
        lock(&self.progress).outstanding += 1;
    }

    /// Waits for all announced packs and indexes those that are not yet.
    pub fn settle(&self) -> Result<()> {
        let mut progress = lock(&self.progress);
        while progress.outstanding > 0 {
            progress = self.settled.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
        let batch = std::mem::take(&mut progress.finished);
        progress.indexed += batch.len();
        drop(progress);
        if let Some(e) = self.failed.get() {
            return Err(e.clone());
        }
        if batch.is_empty() { Ok(()) } else { self.write_segment(batch) }
    }
}
