//! How long calls report to their caller and learn that they should stop.

/// Watches a long call. Called from worker threads.
pub trait Progress: Sync {
    /// The work ahead, in bytes; may grow.
    fn total(&self, _bytes: u64) {}
    /// More bytes are done.
    fn advance(&self, _bytes: u64) {}
    /// Whether to stop with [`crate::Error::Cancelled`].
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

/// A cancel token alone.
impl Progress for std::sync::atomic::AtomicBool {
    fn is_cancelled(&self) -> bool {
        self.load(std::sync::atomic::Ordering::Relaxed)
    }
}
