//! Mistakes planted on purpose, to prove that the simulator finds them. In a build that is no test there are none.

/// A mistake that somebody could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Planted {
    /// The wait counts one watchdog timeout instead of two.
    WaitOneTimeout,
    /// Freshness counts from when a heartbeat was answered, not from when it was sent.
    FreshFromAnswer,
    /// A device's word after a power-off is taken without reading back.
    BelieveUnverified,
    /// After the disk's lease the guest runs without asking the store again.
    SkipRecheck,
    /// A lease of a higher generation on the disk does not stop a start.
    IgnoreLease,
    /// The agent goes on petting while it kills its guests.
    PetWhileKilling,
    /// A new coordinator counts the wait from zero as if it had known all along.
    WaitNotRestarted,
    /// Heartbeats do not compare the host's record.
    UnguardedHeartbeat,
    /// A VM of a silent host is claimed without proof.
    ClaimWithoutProof,
    /// Time as a proof for a host that has no hardware watchdog.
    TrustAnyWatchdog,
    /// A daemon that knows of the fencing still says otherwise to the host.
    AckWhileFencing,
    /// A guest that shut itself down is started again.
    Resurrect,
    /// Silence counts on while the coordinator itself could not see the store.
    CountBlindness,
    /// A power cut is a proof before the writes in flight have landed.
    SkipDrain,
    /// A standby is told to lead before the old active one is over.
    LeadWithoutProof,
    /// What was told in an earlier generation of a pair counts as told now.
    KeepTold,
}

#[cfg(test)]
std::thread_local! {
    pub(crate) static PLANTED: std::cell::Cell<Option<Planted>> = const { std::cell::Cell::new(None) };
}

/// Whether a mistake is planted in this thread's machines.
#[cfg(test)]
pub(crate) fn planted(mistake: Planted) -> bool {
    PLANTED.with(|planted| planted.get() == Some(mistake))
}

/// Never.
#[cfg(not(test))]
pub(crate) const fn planted(_: Planted) -> bool {
    false
}
