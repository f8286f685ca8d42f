//! Threads for calls that block.
//!
//! A lane is a small number of dedicated threads that serve one class of calls, so that calls which may block for long
//! (a hung agent, a migration) never starve the others. Async callers wait for a free thread, hand over the call and
//! await its answer; they never block a thread of the runtime. A call that outlives its limit is reported as timed out
//! and left to end by itself in its thread: nothing is torn from under libvirt. The lane replaces such a thread, up to
//! [`ABANDONED_MAX`] times at once, so that calls which never return (a hung QEMU) do not use it up.
//!
//! Not here: what runs, retries.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// Most threads of one lane that may be lost to calls that have not returned.
pub(super) const ABANDONED_MAX: usize = 32;

/// A call to run; whether its caller gave up on it meanwhile.
type Job = Box<dyn FnOnce() -> bool + Send>;

/// The right to occupy a thread. Whoever takes it out, the call that ends or the caller that gives up, frees the place.
type Place = Arc<Mutex<Option<OwnedSemaphorePermit>>>;

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
    abandoned_max: usize,
    abandoned: Arc<AtomicUsize>,
    started: Arc<AtomicUsize>,
    free: Arc<Semaphore>,
    jobs: Mutex<Option<Sender<Job>>>,
    queue: Receiver<Job>,
    /// Held by each thread, so that [`Lane::close`] sees the last one go.
    alive: Mutex<Option<mpsc::Sender<()>>>,
    ended: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

impl Lane {
    /// A lane of at most `threads_max` threads, of which `abandoned_max` are replaced while their calls do not return.
    /// None is started yet.
    pub(super) fn new(name: &'static str, threads_max: usize, abandoned_max: usize) -> Lane {
        let (jobs, queue) = bounded(threads_max);
        let (alive, ended) = mpsc::channel(1);
        Lane {
            name,
            threads_max,
            abandoned_max,
            abandoned: Arc::new(AtomicUsize::new(0)),
            started: Arc::new(AtomicUsize::new(0)),
            free: Arc::new(Semaphore::new(threads_max)),
            jobs: Mutex::new(Some(jobs)),
            queue,
            alive: Mutex::new(Some(alive)),
            ended: tokio::sync::Mutex::new(ended),
        }
    }

    /// The lane's name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Runs `call` on one of the threads and awaits its value, for at most `limit` including the wait for a thread.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, LaneError> {
        let deadline = tokio::time::Instant::now() + limit;
        let permit = tokio::time::timeout_at(deadline, Arc::clone(&self.free).acquire_owned()).await;
        let permit = permit.map_err(|_| LaneError::Timeout)?.map_err(|_| LaneError::Closed)?;
        let place: Place = Arc::new(Mutex::new(Some(permit)));
        let (answer, answered) = oneshot::channel();
        let held = Arc::clone(&place);
        self.submit(Box::new(move || {
            let value = call();
            // The place is free before the caller hears of it; nobody may wait for the answer any more.
            let given_up = held.lock().unwrap_or_else(PoisonError::into_inner).take().is_none();
            let _ = answer.send(value);
            given_up
        }))?;
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(LaneError::Broken),
            Err(_) => {
                self.give_up(&place);
                Err(LaneError::Timeout)
            }
        }
    }

    /// Gives the place of a call that does not return to the next one, if the lane can afford it.
    fn give_up(&self, place: &Place) {
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() && self.abandoned.load(Ordering::Relaxed) < self.abandoned_max {
            self.abandoned.fetch_add(1, Ordering::Relaxed);
            place.take();
        }
    }

    fn submit(&self, job: Job) -> Result<(), LaneError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.as_ref().ok_or(LaneError::Closed)?;
        let busy = self.threads_max - self.free.available_permits().min(self.threads_max);
        if self.started.load(Ordering::Relaxed) < busy + self.abandoned.load(Ordering::Relaxed) {
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
        let (started, abandoned) = (Arc::clone(&self.started), Arc::clone(&self.abandoned));
        let spawned = thread.spawn(move || {
            let _alive = alive;
            for job in queue {
                match catch_unwind(AssertUnwindSafe(job)) {
                    Ok(false) => {}
                    // Another thread has taken the place meanwhile.
                    Ok(true) => {
                        abandoned.fetch_sub(1, Ordering::Relaxed);
                        break;
                    }
                    Err(_) => tracing::error!("a libvirt call panicked"),
                }
            }
            started.fetch_sub(1, Ordering::Relaxed);
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

    const SOON: Duration = Duration::from_secs(5);
    const AT_ONCE: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn hung_calls_time_out_and_their_threads_are_replaced_within_bounds() {
        let lane = Lane::new("test", 1, 2);
        let (release, hang) = bounded::<()>(0);
        let hung = async || {
            let hang = hang.clone();
            lane.run(AT_ONCE, move || hang.recv().unwrap_or(())).await
        };
        for _ in 0..2 {
            assert_eq!(hung().await, Err(LaneError::Timeout));
            assert_eq!(lane.run(SOON, || 7).await, Ok(7), "the lane goes on");
        }
        assert_eq!(hung().await, Err(LaneError::Timeout));
        assert_eq!(lane.run(AT_ONCE, || 7).await, Err(LaneError::Timeout), "no third replacement");
        release.send(()).unwrap();
        release.send(()).unwrap();
        release.send(()).unwrap();
        assert_eq!(lane.run(SOON, || 7).await, Ok(7), "calls that return after all give back what they held");
        assert_eq!(hung().await, Err(LaneError::Timeout));
        assert!(!lane.close(AT_ONCE).await, "the hung thread is alive still");
        drop(release);
        assert!(lane.close(SOON).await);
        assert_eq!(lane.run(SOON, || ()).await, Err(LaneError::Closed));
    }

    #[tokio::test]
    async fn never_more_threads_than_allowed_and_a_panic_costs_none() {
        let lane = Lane::new("test", 3, 0);
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
