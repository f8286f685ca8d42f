//! Writing an object of unknown length: small ones in one request, larger ones in parts.
//!
//! ```text
//! write ─► buffer of 8 MiB ─► thread with a slot: part ─┐
//!                                        …              ├─► finish: all parts there ─► complete, unless the name is taken
//!                             thread with a slot: part ─┘   dropped: stop the parts ─► abort
//! ```
//! Memory is bounded by the slots, which all writers of a store share. Invariant: nothing appears under the name
//! before the completion, and after a failure or a drop no part is under way that could outlive the abort.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use super::{
    Inner,
    client::Call,
    failure,
    put::{Marks, checksum},
    xml,
};
use crate::{
    error::{Error, Result},
    store::{ObjectWriter, Put},
    util::lock,
};

/// Bytes of a part. The protocol wants at least 5 MiB and at most 10,000 parts.
pub const PART_BYTES: usize = 8 << 20;
/// Parts in flight, of all objects that are being written.
const SLOTS: usize = 8;

/// A bounded number of parts in memory.
pub struct Slots {
    free: Mutex<usize>,
    returned: Condvar,
}

impl Default for Slots {
    fn default() -> Self {
        Self { free: Mutex::new(SLOTS), returned: Condvar::new() }
    }
}

/// One slot, given back when dropped.
struct Slot(Arc<Inner>);

impl Slot {
    fn wait(store: &Arc<Inner>) -> Self {
        let slots = &store.slots;
        let mut free = lock(&slots.free);
        while *free == 0 {
            free = slots.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        drop(free);
        Self(store.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *lock(&self.0.slots.free) += 1;
        self.0.slots.returned.notify_one();
    }
}

/// Tag and checksum of a part that arrived.
type Arrived = (String, Option<String>);

/// What the parts' threads share.
#[derive(Default)]
struct Parts {
    arrived: Mutex<BTreeMap<u32, Arrived>>,
    failed: Mutex<Option<Error>>,
    cancel: AtomicBool,
}

/// An upload that was begun at the server.
struct Multipart {
    id: String,
    parts: Arc<Parts>,
    threads: Vec<JoinHandle<()>>,
    sent: u32,
}

/// An object that is being written.
pub struct Upload {
    store: Arc<Inner>,
    name: String,
    key: String,
    marks: Marks,
    buffer: Vec<u8>,
    multipart: Option<Multipart>,
}

impl Upload {
    /// Nothing is sent before the first part is full.
    pub fn new(store: Arc<Inner>, name: &str) -> Result<Self> {
        let key = store.key(name)?;
        let marks = Marks::new(store.client.settings.object_lock, name);
        Ok(Self { store, name: name.into(), key, marks, buffer: Vec::new(), multipart: None })
    }

    fn begin(&self) -> Result<Multipart> {
        let mut headers = self.marks.headers();
        if self.marks.is_locked() {
            headers.push(("x-amz-checksum-algorithm", "SHA256"));
        }
        let call = Call { query: &[("uploads", "")], headers: &headers, ..Call::new("POST", &self.key) };
        let client = &self.store.client;
        let answer = client.call("begin to write", call)?;
        if answer.status >= 300 {
            return Err(failure::refused(&client.settings, "begin to write", &self.key, &answer));
        }
        let id = xml::upload_id(&answer.body).map_err(|_| self.store.nonsense("begin to write", &self.key))?;
        Ok(Multipart { id, parts: Arc::default(), threads: Vec::new(), sent: 0 })
    }

    /// Sends what is in the buffer as the next part, on a thread of its own.
    fn send_part(&mut self) -> Result<()> {
        if self.multipart.is_none() {
            self.multipart = Some(self.begin()?);
        }
        let Some(multipart) = &mut self.multipart else { return Ok(()) };
        if let Some(error) = &*lock(&multipart.parts.failed) {
            return Err(error.clone());
        }
        let slot = Slot::wait(&self.store);
        multipart.threads.retain(|thread| !thread.is_finished());
        multipart.sent += 1;
        let part = Part {
            store: self.store.clone(),
            key: self.key.clone(),
            upload: multipart.id.clone(),
            number: multipart.sent,
            has_checksum: self.marks.is_locked(),
        };
        let (bytes, parts) = (std::mem::take(&mut self.buffer), multipart.parts.clone());
        let thread = std::thread::Builder::new().name("repo-upload".into()).spawn(move || {
            match part.send(&bytes, &parts.cancel) {
                Ok(arrived) => drop(lock(&parts.arrived).insert(part.number, arrived)),
                Err(error) => drop(lock(&parts.failed).get_or_insert(error)),
            }
            drop((bytes, slot));
        });
        multipart.threads.push(thread.map_err(|e| Error::io("start", "a thread that uploads", e))?);
        Ok(())
    }

    fn is_there(&self) -> bool {
        matches!(self.store.whose(&self.key, self.marks.mark()), Ok(Put::Created))
    }

    fn complete(&mut self) -> Result<Put> {
        let Some(multipart) = &mut self.multipart else { return self.store.put_once(&self.name, &self.buffer) };
        multipart.threads.drain(..).for_each(|thread| drop(thread.join()));
        if let Some(error) = &*lock(&multipart.parts.failed) {
            return Err(error.clone());
        }
        let arrived = lock(&multipart.parts.arrived);
        if arrived.len() as u32 != multipart.sent {
            return Err(Error::damaged(&*self.name, "a part of it was lost on the way to the server"));
        }
        let body = xml::complete(arrived.iter().map(|(number, (tag, sum))| (*number, &**tag, sum.as_deref())));
        drop(arrived);
        if self.store.is_taken(&self.key)? {
            return Ok(Put::Exists);
        }
        let mut headers = vec![("content-type", "application/xml")];
        headers.extend(self.store.condition());
        let call = Call {
            query: &[("uploadId", &multipart.id)],
            headers: &headers,
            body: body.as_bytes(),
            ..Call::new("POST", &self.key)
        };
        let client = &self.store.client;
        let answer = client.call("complete", call)?;
        match answer.status {
            200..=299 => {
                self.multipart = None;
                self.store.confirm(&self.key, self.marks.mark())
            }
            412 if !answer.is_ambiguous => Ok(Put::Exists),
            412 => self.store.whose(&self.key, self.marks.mark()),
            // Whatever servers say of an upload that an attempt completed whose answer was lost.
            _ if answer.is_ambiguous && self.is_there() => Ok(Put::Created),
            _ => Err(failure::refused(&client.settings, "complete", &self.key, &answer)),
        }
    }
}

impl ObjectWriter for Upload {
    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.buffer.capacity() == 0 {
                self.buffer.reserve_exact(PART_BYTES);
            }
            let (now, later) = bytes.split_at(bytes.len().min(PART_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            if self.buffer.len() == PART_BYTES {
                self.send_part()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Put> {
        if self.multipart.is_some() && !self.buffer.is_empty() {
            self.send_part()?;
        }
        self.complete()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut multipart) = self.multipart.take() else { return };
        multipart.parts.cancel.store(true, Relaxed);
        multipart.threads.drain(..).for_each(|thread| drop(thread.join()));
        // One attempt: what stays is removed by `clean` later.
        self.store.abort(&self.key, &multipart.id);
    }
}

/// One part on its way.
struct Part {
    store: Arc<Inner>,
    key: String,
    upload: String,
    number: u32,
    has_checksum: bool,
}

impl Part {
    fn send(&self, bytes: &[u8], cancel: &AtomicBool) -> Result<Arrived> {
        let (number, sum) = (self.number.to_string(), self.has_checksum.then(|| checksum(bytes)));
        let headers: Vec<_> = sum.iter().map(|sum| ("x-amz-checksum-sha256", &**sum)).collect();
        let call = Call {
            query: &[("partNumber", &number), ("uploadId", &self.upload)],
            headers: &headers,
            body: bytes,
            cancel: Some(cancel),
            ..Call::new("PUT", &self.key)
        };
        let client = &self.store.client;
        let answer = client.call("write", call)?;
        match (answer.status, answer.header("etag")) {
            (200..=299, Some(tag)) => Ok((tag.to_owned(), sum)),
            (200..=299, None) => Err(self.store.nonsense("write", &self.key)),
            _ => Err(failure::refused(&client.settings, "write", &self.key, &answer)),
        }
    }
}
