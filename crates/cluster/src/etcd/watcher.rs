//! A watch on etcd: a stream from one member, opened again at the next one where it broke.

use std::{collections::VecDeque, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::time::Instant;

use super::{
    MESSAGE_BYTES_MAX, Shared, after_prefix, revision,
    verdict::{Verdict, judge, refuses_user},
};
use crate::{
    error::{Error, Result},
    store::Revision,
    watch::{Change, Changes, Source},
};

pub(super) struct EtcdSource {
    shared: Arc<Shared>,
    /// The open stream with the number of its member.
    stream: Option<(usize, WatchStream)>,
    /// Of one answer of etcd, what has yet to be asked for.
    pending: VecDeque<Changes>,
}

impl EtcdSource {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, stream: None, pending: VecDeque::new() }
    }

    async fn open(&mut self, prefix: &[u8], from: Revision) -> Result<()> {
        let start = self.shared.full(prefix);
        let options = WatchOptions::new()
            .with_range(after_prefix(&start))
            // etcd takes zero for "from now on".
            .with_start_revision(i64::try_from(from.0.max(1)).unwrap_or(i64::MAX));
        let deadline = Instant::now() + self.shared.timeout;
        let (number, member) = self.shared.members.current();
        let open = async {
            let client = member.get(deadline).await?;
            let mut watches = client.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
            watches.watch(start, Some(options)).await
        };
        match tokio::time::timeout_at(deadline, open).await {
            Ok(Ok(stream)) => {
                self.stream = Some((number, stream));
                Ok(())
            }
            Ok(Err(error)) => Err(self.broken(number, &error)),
            Err(_) => {
                self.shared.members.leave(number);
                Err(Error::no_answer(self.shared.location(), self.shared.timeout))
            }
        }
    }

    /// What a watch says whose member failed. The next call opens it anew, at the next member.
    fn broken(&mut self, number: usize, error: &etcd_client::Error) -> Error {
        self.stream = None;
        self.shared.members.leave(number);
        match judge(self.shared.location(), error) {
            Verdict::Final(error) => error,
            Verdict::NotSent(what) | Verdict::Untrusted(what) | Verdict::Unknown(what) => {
                Error::unavailable(self.shared.location(), what)
            }
        }
    }

    /// What etcd says when it ends a watch.
    fn cancelled(&mut self, answer: &WatchResponse) -> Error {
        self.stream = None;
        let (compacted, why) = (answer.compact_revision(), answer.cancel_reason());
        let location = self.shared.location();
        match why {
            _ if compacted > 0 => Error::Compacted { oldest: revision(compacted) },
            _ if refuses_user(why) => Error::Denied { location: location.into(), what: why.into() },
            _ => Error::unavailable(location, format!("etcd ended the watch: {why}")),
        }
    }

    /// Sorts the events of an answer into transactions.
    fn take(&mut self, answer: &WatchResponse, from: Revision) {
        for event in answer.events() {
            let Some(pair) = event.kv() else { continue };
            let at = revision(pair.mod_revision());
            if at < from {
                continue;
            }
            let entry = self.shared.entry(pair);
            let change = match event.event_type() {
                EventType::Put => Change::Put(entry),
                EventType::Delete => Change::Delete { key: Bytes::clone(&entry.key) },
            };
            match self.pending.back_mut() {
                Some(last) if last.revision == at => last.changes.push(change),
                _ => self.pending.push_back(Changes { revision: at, changes: vec![change] }),
            }
        }
        for changes in &mut self.pending {
            changes.changes.sort_by(|a, b| a.key().cmp(b.key()));
        }
    }
}

#[async_trait]
impl Source for EtcdSource {
    async fn next(&mut self, prefix: &[u8], from: Revision) -> Result<Changes> {
        loop {
            if let Some(changes) = self.pending.pop_front() {
                return Ok(changes);
            }
            let Some((number, stream)) = &mut self.stream else {
                self.open(prefix, from).await?;
                continue;
            };
            let number = *number;
            match stream.message().await {
                Ok(Some(answer)) if answer.canceled() => return Err(self.cancelled(&answer)),
                Ok(Some(answer)) => self.take(&answer, from),
                Ok(None) => {
                    let ended = etcd_client::Error::WatchError("etcd ended the stream".into());
                    return Err(self.broken(number, &ended));
                }
                Err(error) => return Err(self.broken(number, &error)),
            }
        }
    }
}
