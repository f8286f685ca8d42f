//! One cancellation for a job and everything it started, on async tasks and on plain threads alike.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;

/// A sticky request to stop. Clones share it.
#[derive(Clone, Debug)]
pub struct Cancel {
    flag: Arc<AtomicBool>,
    sender: Arc<watch::Sender<bool>>,
}

impl Default for Cancel {
    fn default() -> Self {
        Self { flag: Arc::default(), sender: Arc::new(watch::Sender::new(false)) }
    }
}

impl Cancel {
    /// Asks to stop. Idempotent.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::SeqCst);
        self.sender.send_replace(true);
    }

    /// Whether stopping was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// Resolves when stopping is asked for.
    pub async fn cancelled(&self) {
        let mut receiver = self.sender.subscribe();
        // The sender lives as long as `self`, so this only ends by cancellation.
        let _ = receiver.wait_for(|stop| *stop).await;
    }

    /// The flag for threads that poll.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.flag.clone()
    }
}
