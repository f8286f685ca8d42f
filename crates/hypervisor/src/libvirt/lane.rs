//! Threads for calls that block.
//!
//! A lane is a small number of dedicated threads that serve one class of calls, so that calls which may block for long
//! (a hung agent, a migration) never starve the others. Async callers wait for a free thread, hand over the call and
//! await its answer; they never block a thread of the runtime. A call that outlives its limit is reported as timed out
//! while it goes on in its thread, which counts as occupied until it really ends: nothing is torn from under libvirt.
//!
//! Not here: what runs, retries.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::{Semaphore, mpsc, oneshot};

type Job = Box<dyn FnOnce() + Send>;

/// Why a lane did not bring an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneError {
    /// The limit passed.
    Timeout,
    /// The lane was closed.
    Closed,
    /// The call panicked, or no thread could be started.
    Broken,
}

/// A bounded set of threads, started when needed.
pub(super) struct Lane {
    name: &'static str,
    threads_max: usize,
    started: AtomicUsize,
    free: Arc<Semaphore>,
    jobs: Mutex<Option<Sender<Job>>>,
    queue: Receiver<Job>,
    /// Held by each thread, so that [`Lane::close`] sees the last one go.
    alive: Mutex<Option<mpsc::Sender<()>>>,
    ended: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

impl Lane {
    /// A lane of at most `threads_max` threads; none is started yet.
    pub(super) fn new(name: &'static str, threads_max: usize) -> Lane {
        let (jobs, queue) = bounded(threads_max);
        let (alive, ended) = mpsc::channel(1);
        Lane {
            name,
            threads_max,
            started: AtomicUsize::new(0),
            free: Arc::new(Semaphore::new(threads_max)),
            jobs: Mutex::new(Some(jobs)),
            queue,
            alive: Mutex::new(Some(alive)),
            ended: tokio::sync::Mutex::new(ended),
        }
    }

    /// Runs `call` on one of the threads and awaits its value, for at most `limit` including the wait for a thread.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, LaneError> {
        let work = async {
            let permit = Arc::clone(&self.free).acquire_owned().await.map_err(|_| LaneError::Closed)?;
            let (answer, answered) = oneshot::channel();
            self.submit(Box::new(move || {
                let value = call();
                // The thread is free before the caller hears of it; nobody may wait for the answer any more.
                drop(permit);
                let _ = answer.send(value);
            }))?;
            answered.await.map_err(|_| LaneError::Broken)
        };
        tokio::time::timeout(limit, work).await.unwrap_or(Err(LaneError::Timeout))
    }

    fn submit(&self, job: Job) -> Result<(), LaneError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.as_ref().ok_or(LaneError::Closed)?;
        let busy = self.threads_max - self.free.available_permits().min(self.threads_max);
        if self.started.load(Ordering::Relaxed) < busy {
            self.start_thread()?;
        }
        // Never full: a permit per slot.
        jobs.try_send(job).map_err(|_| LaneError::Broken)
    }

    /// Called under the `jobs` lock, so that no two callers start the last thread.
    fn start_thread(&self) -> Result<(), LaneError> {
        let queue = self.queue.clone();
        let alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(LaneError::Closed)?;
        let thread = std::thread::Builder::new().name(format!("libvirt-{}", self.name));
        let spawned = thread.spawn(move || {
            let _alive = alive;
            for job in queue {
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a libvirt call panicked");
                }
            }
        });
        match spawned {
            Ok(_) => {
                self.started.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(_) if self.started.load(Ordering::Relaxed) > 0 => Ok(()),
            Err(_) => Err(LaneError::Broken),
        }
    }

    /// Refuses further calls and lets idle threads end.
    pub(super) fn shut(&self) {
        self.free.close();
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// [`Lane::shut`], then waits for the threads to end, for at most `limit`; whether they did.
    pub(super) async fn close(&self, limit: Duration) -> bool {
        self.shut();
        let mut ended = self.ended.lock().await;
        tokio::time::timeout(limit, ended.recv()).await.is_ok()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shut();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hung_call_times_out_and_occupies_only_its_own_thread() {
        let lane = Lane::new("test", 2);
        let (release, hang) = bounded::<()>(1);
        let hung = lane.run(Duration::from_millis(50), move || hang.recv().is_ok()).await;
        assert_eq!(hung, Err(LaneError::Timeout));
        for i in 0..20 {
            assert_eq!(lane.run(Duration::from_secs(5), move || i).await, Ok(i));
        }
        assert!(!lane.close(Duration::from_millis(50)).await, "the hung thread is alive still");
        release.send(()).unwrap();
        assert!(lane.close(Duration::from_secs(5)).await);
        assert_eq!(lane.run(Duration::from_secs(5), || ()).await, Err(LaneError::Closed));
    }

    #[tokio::test]
    async fn never_more_threads_than_allowed_and_a_panic_costs_none() {
        let lane = Lane::new("test", 3);
        assert_eq!(lane.run(Duration::from_secs(5), || panic!("on purpose")).await, Err::<(), _>(LaneError::Broken));
        let lane = Arc::new(lane);
        let now = Arc::new(AtomicUsize::new(0));
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..30 {
            let (lane, now) = (Arc::clone(&lane), Arc::clone(&now));
            calls.spawn(async move {
                let call = move || {
                    let seen = now.fetch_add(1, Ordering::SeqCst) + 1;
                    std::thread::sleep(Duration::from_millis(2));
                    now.fetch_sub(1, Ordering::SeqCst);
                    seen
                };
                lane.run(Duration::from_secs(20), call).await.unwrap()
            });
        }
        let seen = calls.join_all().await;
        assert!(seen.len() == 30 && seen.into_iter().all(|n| n <= 3));
        assert!(lane.close(Duration::from_secs(5)).await);
    }
}
