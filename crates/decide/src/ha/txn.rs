//! Transactions as data: what the machines ask of the store. The shell carries them to `cluster::Store`, the simulator to
//! its own; the only compare is by revision.

use serde::Serialize;

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key was last put at this revision.
    At {
        /// Key.
        key: String,
        /// Revision.
        revision: u64,
    },
    /// The key does not exist.
    Absent {
        /// Key.
        key: String,
    },
}

/// A change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a key.
    Put {
        /// Key.
        key: String,
        /// JSON of a record.
        value: String,
    },
    /// Removes a key.
    Delete {
        /// Key.
        key: String,
    },
}

/// All changes if all conditions hold, else none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions.
    pub expects: Vec<Expect>,
    /// Changes.
    pub changes: Vec<Change>,
}

impl Txn {
    /// That a record is the one that was read (none: that there is none).
    #[must_use]
    pub fn expect<T>(mut self, key: String, read: Option<&Versioned<T>>) -> Self {
        self.expects.push(match read {
            Some(read) => Expect::At { key, revision: read.revision },
            None => Expect::Absent { key },
        });
        self
    }

    /// That a key stands at a revision.
    #[must_use]
    pub fn expect_at(mut self, key: String, revision: u64) -> Self {
        self.expects.push(Expect::At { key, revision });
        self
    }

    /// Sets a record.
    #[must_use]
    pub fn put<T: Serialize>(mut self, key: String, record: &T) -> Self {
        let value = serde_json::to_string(record).expect("records have text keys and no floats");
        self.changes.push(Change::Put { key, value });
        self
    }

    /// Removes a record.
    #[must_use]
    pub fn delete(mut self, key: String) -> Self {
        self.changes.push(Change::Delete { key });
        self
    }
}

/// A record with the revision that put it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// Record.
    pub value: T,
    /// Revision.
    pub revision: u64,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// All changes were made, at this revision.
    Done {
        /// Revision.
        revision: u64,
    },
    /// A condition did not hold; nothing was changed.
    Refused,
    /// The store was not reached; nothing was changed, now or later.
    Unavailable,
    /// It happened, or not, or will happen later.
    Unknown,
}
