//! What goes wrong between a client and the store in memory, as a test scripts it.
//!
//! A scripted fault meets one call of its kind; a standing one meets every call until it is taken back. Faults belong
//! to one client, as a broken cable belongs to one node.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use crate::error::Error;

use super::LOCATION;

/// Kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// `get` and `list`.
    Read,
    /// `txn`.
    Txn,
    /// `grant`, `keep_alive` and `revoke`.
    Lease,
}

impl Call {
    /// What a client says that has sent such a call and got no answer.
    pub(super) fn unanswered(self, what: String) -> Error {
        match self {
            Call::Read | Call::Lease => Error::unavailable(LOCATION, what),
            Call::Txn => Error::indeterminate(LOCATION, what),
        }
    }
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not get through.
    Unavailable,
    /// It gets no answer, and took place or not.
    Indeterminate {
        /// Whether it took place.
        happens: bool,
    },
    /// It takes this long to get through. Beyond the deadline it never does.
    Delay(Duration),
    /// A transaction that gets no answer within the deadline and takes place this long after it was sent. Other calls
    /// take place at once and get no answer.
    Late(Duration),
}

#[derive(Default)]
struct Script {
    next: BTreeMap<Call, VecDeque<Fault>>,
    standing: BTreeMap<Call, Fault>,
}

/// The faults of one client.
#[derive(Default)]
pub struct Faults {
    script: Mutex<Script>,
    breaks: watch::Sender<u64>,
}

impl Faults {
    /// Meets the next call of its kind that nothing was scripted for yet.
    pub fn once(&self, call: Call, fault: Fault) {
        self.script().next.entry(call).or_default().push_back(fault);
    }

    /// Meets every call of its kind from now on, or none.
    pub fn always(&self, call: Call, fault: Option<Fault>) {
        let mut script = self.script();
        match fault {
            Some(fault) => script.standing.insert(call, fault),
            None => script.standing.remove(&call),
        };
    }

    /// Cuts this client off, or reconnects it: calls fail without taking place, and watches break.
    pub fn cut_off(&self, cut: bool) {
        for call in [Call::Read, Call::Txn, Call::Lease] {
            self.always(call, cut.then_some(Fault::Unavailable));
        }
        if cut {
            self.break_watches();
        }
    }

    /// Breaks every watch of this client once.
    pub fn break_watches(&self) {
        self.breaks.send_modify(|count| *count += 1);
    }

    pub(super) fn take(&self, call: Call) -> Option<Fault> {
        let mut script = self.script();
        let scripted = script.next.get_mut(&call).and_then(VecDeque::pop_front);
        scripted.or_else(|| script.standing.get(&call).copied())
    }

    /// Watches do not get through where reads do not.
    pub(super) fn watches_fail(&self) -> bool {
        self.script().standing.get(&Call::Read) == Some(&Fault::Unavailable)
    }

    pub(super) fn breaks(&self) -> watch::Receiver<u64> {
        self.breaks.subscribe()
    }

    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
