//! What a job tells whoever watches it. Rendering is theirs.

/// A step of a job, in the order in which a person sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading facts, cleaning up after earlier runs, deciding.
    Preparing,
    /// Guest file systems are being frozen and the cut made.
    Quiescing,
    /// Data moves.
    Copying,
    /// The restore point or the VM is being made visible.
    Publishing,
    /// Leftovers are being removed.
    CleaningUp,
}

/// One report.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The job entered a phase.
    Phase(Phase),
    /// Bytes that will have to be processed in this phase, as far as known; may grow.
    Total {
        /// Bytes.
        bytes: u64,
    },
    /// Bytes processed so far in this phase; never shrinks.
    Done {
        /// Bytes.
        bytes: u64,
    },
    /// Where it stands, in a few words that replace the last ones.
    Detail(&'a str),
    /// Something the operator should know now; also kept in the result.
    Warning(&'a str),
}

/// Receives a job's reports. Called from several threads; must not block.
pub trait Observer: Send + Sync {
    /// One report about `subject` (a VM name or a file).
    fn event(&self, subject: &str, event: Event<'_>);
}

/// Discards every report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: &str, _: Event<'_>) {}
}
