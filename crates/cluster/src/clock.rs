//! Time as leases see it: how long it has been, never what o'clock it is. Injected, so that a simulator owns it.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::watch;

/// A clock that only goes forward.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Time since an origin of the clock's own.
    fn now(&self) -> Duration;
    /// Returns when `now` has reached `at`, at once if it has.
    async fn sleep_until(&self, at: Duration);
}

/// The machine's monotonic clock through tokio, so that it also follows a runtime whose time is paused.
#[derive(Clone, Debug)]
pub struct SystemClock {
    origin: tokio::time::Instant,
}

impl SystemClock {
    /// Starts at zero.
    pub fn new() -> Self {
        Self { origin: tokio::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    async fn sleep_until(&self, at: Duration) {
        // A far future is no time that can be computed, and nobody waits for it either.
        match self.origin.checked_add(at) {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

/// A clock that stands still until it is moved.
#[derive(Clone, Debug)]
pub struct ManualClock {
    now: Arc<watch::Sender<Duration>>,
}

impl ManualClock {
    /// Stands at zero.
    pub fn new() -> Self {
        Self { now: Arc::new(watch::Sender::new(Duration::ZERO)) }
    }

    /// Moves it forward and wakes whoever waits for a time that has come.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now += by);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    async fn sleep_until(&self, at: Duration) {
        // The sender lives as long as this clock does, so this ends only when the time has come.
        let _ = self.now.subscribe().wait_for(|now| *now >= at).await;
    }
}
