//! A watch: the changes of some keys, one transaction after another.

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    error::{Error, Result},
    store::{Revision, Versioned},
};

/// One key's change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was put.
    Put(Versioned),
    /// It was deleted, or its lease ended.
    Delete {
        /// The key.
        key: Bytes,
    },
}

impl Change {
    /// The key that changed.
    pub fn key(&self) -> &Bytes {
        match self {
            Change::Put(entry) => &entry.key,
            Change::Delete { key } => key,
        }
    }
}

/// What one transaction changed, as far as a watch's prefix goes. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The transaction's revision.
    pub revision: Revision,
    /// Ascending by key, each key once.
    pub changes: Vec<Change>,
}

/// How a store feeds a watch.
#[async_trait]
pub(crate) trait Source: Send {
    /// The changes of the first transaction at `from` or later that touched the prefix. Waits for it. May lose nothing
    /// when it is dropped while waiting: the watch asks for the same `from` again.
    async fn next(&mut self, prefix: &[u8], from: Revision) -> Result<Changes>;
}

/// The changes of the keys with a prefix, in order, each once. Made by [`Store::watch`](crate::Store::watch).
///
/// A watch holds nothing but its position: it buffers no more than one answer of the store, a slow reader costs the
/// store nothing, and one that falls behind the history that the store keeps gets [`Error::Compacted`].
pub struct Watch {
    prefix: Bytes,
    position: Revision,
    ended: Option<Error>,
    source: Box<dyn Source>,
}

impl Watch {
    pub(crate) fn new(prefix: &[u8], from: Revision, source: Box<dyn Source>) -> Self {
        Self { prefix: Bytes::copy_from_slice(prefix), position: from, ended: None, source }
    }

    /// The revision from which on changes have yet to be delivered: where another watch would resume.
    pub fn position(&self) -> Revision {
        self.position
    }

    /// The next transaction's changes. Waits without limit for one to happen. Can be cancelled at any time: whatever
    /// was not returned comes next time.
    ///
    /// - [`Error::Unavailable`]: contact was lost. Call again, after a pause, and the watch goes on where it was,
    ///   missing and repeating nothing.
    /// - [`Error::Compacted`]: the changes between are no longer known. List again and make a new watch; this one
    ///   answers the same for ever, as it does after any error that is not [retryable](Error::is_retryable).
    pub async fn next(&mut self) -> Result<Changes> {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        match self.source.next(&self.prefix, self.position).await {
            Ok(changes) => {
                self.position = changes.revision.next();
                Ok(changes)
            }
            Err(error) => {
                if !error.is_retryable() {
                    self.ended = Some(error.clone());
                }
                Err(error)
            }
        }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("prefix", &self.prefix)
            .field("position", &self.position)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
