//! When to try again: exponential back-off with full jitter, bounded in total time.

use std::time::{Duration, Instant};

/// Longest pause before the first repetition.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// One operation's attempts.
#[derive(Debug)]
pub struct Backoff {
    begun: Instant,
    budget: Duration,
    attempts: u32,
}

impl Backoff {
    /// For an operation that begins now; no attempt begins when `budget` is used up.
    pub fn new(budget: Duration) -> Self {
        Self { begun: Instant::now(), budget, attempts: 0 }
    }

    /// How long to wait before the next attempt; `None` if it is time to give up. Random, so that clients that failed
    /// together do not come back together.
    pub fn pause(&mut self) -> Option<Duration> {
        let longest = FIRST_PAUSE.saturating_mul(1 << self.attempts.min(16)).min(LONGEST_PAUSE);
        self.attempts += 1;
        let share = f64::from(u32::from_le_bytes(crate::crypto::random())) / f64::from(u32::MAX);
        let pause = longest.mul_f64(share).max(Duration::from_millis(1));
        (self.begun.elapsed() + pause < self.budget).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let mut backoff = Backoff::new(Duration::from_secs(3600));
        for n in 0..40 {
            let pause = backoff.pause().expect("an hour is not over");
            assert!(pause <= LONGEST_PAUSE && pause <= FIRST_PAUSE * (1 << n.min(10)), "{n}: {pause:?}");
        }
        assert!(Backoff::new(Duration::ZERO).pause().is_none());
    }
}
