//! Times of high availability, and the bound below which they are unsafe.
//!
//! All times are of one host's `CLOCK_BOOTTIME`, which goes on while a machine is suspended. No time of one host is ever
//! compared with a time of another; only lengths are, and for those clocks may differ in rate by [`Timing::drift_ppm`].
//!
//! Why the wait is what it is, for a host whose last heartbeat that the store took was sent at `s`:
//!
//! ```text
//! s          the heartbeat is sent; FENCING commits after it, or the heartbeat would have been refused
//! s + m      the last check that may allow a pet of the watchdog
//! s + m + W  the latest pet: had the pause after the check been longer, the watchdog would have fired in it
//! s + m + 2W the watchdog fires
//! … + R      the machine is reset, and what it had sent to the storage has landed or never will
//! ```
//!
//! The coordinator counts from the answer to FENCING, so later than `s`: it waits `(m + 2W + R)(1 + ρ)/(1 − ρ)`.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A moment of this host's `CLOCK_BOOTTIME`, in milliseconds. Means nothing on another host, or after a boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(pub u64);

impl Moment {
    /// Milliseconds since an earlier moment; zero if it is not earlier.
    #[must_use]
    pub fn since(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Some milliseconds later.
    #[must_use]
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

/// Times of a cluster, in milliseconds. A host registers those that it lives by in its record, and whoever waits for it
/// uses them, so that hosts of different settings never misjudge one another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timing {
    /// h: a heartbeat is sent this often.
    pub heartbeat_ms: u64,
    /// m: the watchdog is petted for this long after the sending of the last heartbeat that the store took.
    pub fresh_ms: u64,
    /// W: the watchdog resets the machine if it is not petted for this long.
    pub watchdog_ms: u64,
    /// R: from the watchdog's firing until nothing of the machine reaches the storage any more.
    pub reset_ms: u64,
    /// The part of R that counts after a power cut which was verified: writes that are on their way to the storage.
    pub drain_ms: u64,
    /// ρ: rates of clocks (and watchdogs) differ from true time by at most this, in parts per million.
    pub drift_ppm: u64,
    /// A host is suspected after this much silence. Costs nothing but a needless fencing if it is too short.
    pub silence_ms: u64,
    /// Wait before a host counts as dead by its own watchdog; none: the bound itself.
    pub wait_ms: Option<u64>,
    /// A start that is not done after this is taken to another host.
    pub start_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_ms: 2_000,
            fresh_ms: 12_000,
            watchdog_ms: 10_000,
            reset_ms: 2_000,
            drain_ms: 1_000,
            drift_ppm: 1_000,
            silence_ms: 5_000,
            wait_ms: None,
            start_ms: 120_000,
        }
    }
}

/// Why times are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TimingError {
    /// Two hosts could write at once.
    #[error(
        "[ha] wait-ms = {wait} is unsafe: with fresh-ms = {fresh}, watchdog-ms = {watchdog}, reset-ms = {reset} and \
         drift-ppm = {drift} a host can write for up to {bound} ms after it was fenced; set wait-ms to {bound} or more, or \
         leave it out"
    )]
    WaitTooShort {
        /// What was asked for.
        wait: u64,
        /// What is safe.
        bound: u64,
        /// m.
        fresh: u64,
        /// W.
        watchdog: u64,
        /// R.
        reset: u64,
        /// ρ.
        drift: u64,
    },
    /// Something that makes healthy hosts look dead, or makes no sense.
    #[error("[ha] {field} = {value} cannot work: {why}; set it to {least} or more")]
    TooSmall {
        /// Setting.
        field: &'static str,
        /// What was asked for.
        value: u64,
        /// Smallest that works.
        least: u64,
        /// Reason.
        why: &'static str,
    },
    /// A value beyond reason, which is most likely a wrong unit.
    #[error("[ha] {field} = {value} is more than {most}; is the unit right? Times are in milliseconds")]
    TooLarge {
        /// Setting.
        field: &'static str,
        /// What was asked for.
        value: u64,
        /// Largest that is taken.
        most: u64,
    },
}

impl Timing {
    /// T_self: how long after FENCING a host with a hardware watchdog may still write, stretched for clocks that differ.
    /// Whoever waits less is unsafe.
    pub fn bound_ms(&self) -> u64 {
        self.stretched(self.fresh_ms + 2 * self.watchdog_ms + self.reset_ms)
    }

    /// How long the coordinator waits: the setting, never less than the bound.
    pub fn self_fence_ms(&self) -> u64 {
        self.wait_ms.unwrap_or(0).max(self.bound_ms())
    }

    /// A length on another host's clock as a length on this one's that is surely not shorter: rounded up.
    pub fn stretched(&self, ms: u64) -> u64 {
        let (ms, drift) = (u128::from(ms), u128::from(self.drift_ppm.min(DRIFT_PPM_MAX)));
        let stretched = (ms * (1_000_000 + drift)).div_ceil(1_000_000 - drift);
        u64::try_from(stretched).unwrap_or(u64::MAX)
    }

    /// Refuses what is unsafe or cannot work, saying the bound.
    ///
    /// # Errors
    /// The first value that is wrong.
    pub fn check(&self) -> Result<(), TimingError> {
        for (field, value) in [
            ("heartbeat-ms", self.heartbeat_ms),
            ("fresh-ms", self.fresh_ms),
            ("watchdog-ms", self.watchdog_ms),
            ("reset-ms", self.reset_ms),
            ("drain-ms", self.drain_ms),
            ("silence-ms", self.silence_ms),
            ("start-ms", self.start_ms),
            ("wait-ms", self.wait_ms.unwrap_or(0)),
        ] {
            if value > LENGTH_MS_MAX {
                return Err(TimingError::TooLarge { field, value, most: LENGTH_MS_MAX });
            }
        }
        if self.drift_ppm > DRIFT_PPM_MAX {
            return Err(TimingError::TooLarge { field: "drift-ppm", value: self.drift_ppm, most: DRIFT_PPM_MAX });
        }
        let h = self.heartbeat_ms;
        for (field, value, least, why) in [
            ("heartbeat-ms", h, 200, "the store would be busy with heartbeats"),
            ("drift-ppm", self.drift_ppm, 100, "no clock of a computer is that exact"),
            ("silence-ms", self.silence_ms, 2 * h + h / 4, "a host must be allowed to miss one heartbeat"),
            ("fresh-ms", self.fresh_ms, 3 * h, "a host must outlive two heartbeats that are lost"),
            ("watchdog-ms", self.watchdog_ms, 2_000, "a busy host would be reset"),
            ("drain-ms", self.drain_ms, 200, "writes can be on their way to the storage after a power cut"),
            ("reset-ms", self.reset_ms, self.drain_ms, "a reset is not over before its writes have landed (drain-ms)"),
            ("start-ms", self.start_ms, 5_000, "no VM starts that fast"),
        ] {
            if value < least {
                return Err(TimingError::TooSmall { field, value, least, why });
            }
        }
        match self.wait_ms {
            Some(wait) if wait < self.bound_ms() => Err(TimingError::WaitTooShort {
                wait,
                bound: self.bound_ms(),
                fresh: self.fresh_ms,
                watchdog: self.watchdog_ms,
                reset: self.reset_ms,
                drift: self.drift_ppm,
            }),
            _ => Ok(()),
        }
    }
}

/// Largest drift that is taken: 5 %.
const DRIFT_PPM_MAX: u64 = 50_000;
/// Longest length that is taken: an hour.
const LENGTH_MS_MAX: u64 = 3_600_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_design() {
        let timing = Timing::default();
        assert_eq!(timing.check(), Ok(()));
        assert_eq!(timing.bound_ms(), 34_069, "(12 + 20 + 2) s × 1.001 / 0.999, rounded up");
    }

    #[test]
    fn an_unsafe_wait_is_refused_with_the_bound() {
        let timing = Timing { wait_ms: Some(24_000), ..Timing::default() };
        let text = timing.check().expect_err("unsafe").to_string();
        assert!(text.contains("set wait-ms to 34069 or more"), "{text}");
        let timing = Timing { wait_ms: Some(40_000), ..Timing::default() };
        assert_eq!((timing.check(), timing.self_fence_ms()), (Ok(()), 40_000));
    }

    #[test]
    fn what_would_fence_healthy_hosts_is_refused() {
        for (timing, field) in [
            (Timing { silence_ms: 2_000, ..Timing::default() }, "silence-ms"),
            (Timing { fresh_ms: 4_000, ..Timing::default() }, "fresh-ms"),
            (Timing { watchdog_ms: 10, ..Timing::default() }, "watchdog-ms"),
            (Timing { drift_ppm: 0, ..Timing::default() }, "drift-ppm"),
            (Timing { drift_ppm: 1_000_000, ..Timing::default() }, "drift-ppm"),
            (Timing { reset_ms: u64::MAX, ..Timing::default() }, "reset-ms"),
        ] {
            let text = timing.check().expect_err(field).to_string();
            assert!(text.contains(field), "{text}");
        }
    }
}
