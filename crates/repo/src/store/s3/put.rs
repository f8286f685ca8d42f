//! Writing an object that must not exist yet.
//!
//! Every write is conditional (`If-None-Match: *`), so one of several writers wins. It also carries a random mark in the
//! object's metadata: when an answer was lost and the repetition finds the name taken, the mark tells whether the object
//! there is the one that the first attempt wrote. So a lost acknowledgement is neither a failure nor mistaken for
//! somebody else's object, whatever the bytes are.

use aws_lc_rs::digest;
use jiff::{SignedDuration, Timestamp};

use super::{Inner, client::Call, failure, settings::ObjectLock};
use crate::{
    error::{Error, Result},
    format::ObjectId,
    store::Put,
};

/// Metadata that tells one write from another.
pub const MARK: &str = "x-amz-meta-virtward-put";

/// Headers that a new object is to have.
pub struct Marks {
    mark: String,
    lock: Option<(&'static str, String)>,
}

impl Marks {
    /// For one write of an object with this name.
    pub fn new(lock: Option<ObjectLock>, name: &str) -> Self {
        let lock = lock.filter(|_| is_retained(name)).map(|lock| (lock.mode.as_str(), until(lock)));
        Self { mark: ObjectId::random().to_string(), lock }
    }
    /// The headers.
    pub fn headers(&self) -> Vec<(&'static str, &str)> {
        let mut headers = vec![(MARK, &*self.mark)];
        if let Some((mode, until)) = &self.lock {
            headers.push(("x-amz-object-lock-mode", mode));
            headers.push(("x-amz-object-lock-retain-until-date", until));
        }
        headers
    }
    /// Whether the object will be under retention; its parts must carry checksums then.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }
    /// The random mark.
    pub fn mark(&self) -> &str {
        &self.mark
    }
}

/// Everything that a restore needs. Leases and epochs come and go.
pub fn is_retained(name: &str) -> bool {
    !name.starts_with("leases/") && !name.starts_with("epochs/")
}

/// The end of retention that begins now, in whole seconds.
fn until(lock: ObjectLock) -> String {
    let end = Timestamp::now().saturating_add(SignedDuration::from_hours(24 * i64::from(lock.days)));
    date(end.unwrap_or(Timestamp::MAX))
}

/// As the protocol spells an instant.
pub fn date(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// SHA-256 in base64, as the checksum headers have it.
pub fn checksum(bytes: &[u8]) -> String {
    base64::Engine::encode(&base64::engine::general_purpose::STANDARD, digest::digest(&digest::SHA256, bytes))
}

impl Inner {
    /// Writes a small object in one request.
    pub fn put_once(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        let key = self.key(name)?;
        let marks = Marks::new(self.client.settings.object_lock, name);
        let sum = checksum(bytes);
        if self.is_taken(&key)? {
            return Ok(Put::Exists);
        }
        let mut headers = marks.headers();
        headers.extend(self.condition());
        if marks.is_locked() {
            headers.push(("x-amz-checksum-sha256", &sum));
        }
        let answer = self.client.call("write", Call { headers: &headers, body: bytes, ..Call::new("PUT", &key) })?;
        match answer.status {
            200..=299 => self.confirm(&key, marks.mark()),
            412 if answer.is_ambiguous => self.whose(&key, marks.mark()),
            412 => Ok(Put::Exists),
            _ => Err(failure::refused(&self.client.settings, "write", &key, &answer)),
        }
    }

    /// The header that makes a write conditional.
    pub fn condition(&self) -> Option<(&'static str, &'static str)> {
        (!self.client.settings.emulate_conditions).then_some(("if-none-match", "*"))
    }

    /// Whether a name is taken, where the server does not find that out by itself.
    pub fn is_taken(&self, key: &str) -> Result<bool> {
        if !self.client.settings.emulate_conditions {
            return Ok(false);
        }
        let answer = self.client.call("look up", Call::new("HEAD", key))?;
        match answer.status {
            200..=299 => Ok(true),
            404 => Ok(false),
            _ => Err(failure::refused(&self.client.settings, "look up", key, &answer)),
        }
    }

    /// After a write: whether it was this one that counts, where the server does not see to that.
    pub fn confirm(&self, key: &str, mark: &str) -> Result<Put> {
        if self.client.settings.emulate_conditions { self.whose(key, mark) } else { Ok(Put::Created) }
    }

    /// Whether the object under a name is the one with our mark.
    pub fn whose(&self, key: &str, mark: &str) -> Result<Put> {
        let answer = self.client.call("look up", Call::new("HEAD", key))?;
        match answer.status {
            200..=299 if answer.header(MARK) == Some(mark) => Ok(Put::Created),
            200..=299 => Ok(Put::Exists),
            404 => Err(Error::damaged(key, "it vanished while it was being written")),
            _ => Err(failure::refused(&self.client.settings, "look up", key, &answer)),
        }
    }

    /// Repeats the first write of this process: a server that takes it ignores the condition, and two hosts could
    /// overwrite each other's epochs and restore points there. The bytes are the same, so nothing is harmed.
    pub fn check_condition(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if self.is_condition_checked() || self.client.settings.emulate_conditions {
            return Ok(());
        }
        if self.put_once(name, bytes)? == Put::Exists {
            self.set_condition_checked();
            return Ok(());
        }
        let _ = self.delete(name);
        Err(Error::Unsupported {
            what: format!(
                "the server of {} overwrites objects although it is asked not to (it ignores If-None-Match), so several \
                 writers would not be safe there; use a server with conditional writes, or see emulate-conditions in \
                 docs/object-storage.md",
                self.client.settings.location
            ),
        })
    }

    /// Sets the end of an object's retention. Later only: the server refuses to shorten it.
    pub fn retain(&self, name: &str, lock: ObjectLock, until: Timestamp) -> Result<()> {
        let key = self.key(name)?;
        let body = super::xml::retention(lock.mode.as_str(), &date(until));
        let sum = checksum(body.as_bytes());
        let call = Call {
            query: &[("retention", "")],
            headers: &[("content-type", "application/xml"), ("x-amz-checksum-sha256", &sum)],
            body: body.as_bytes(),
            ..Call::new("PUT", &key)
        };
        let answer = self.client.call("renew the retention of", call)?;
        match answer.status {
            200..=299 => Ok(()),
            // Collected since the caller listed it.
            404 if answer.code() != "NoSuchBucket" => Ok(()),
            _ => Err(failure::refused(&self.client.settings, "renew the retention of", &key, &answer)),
        }
    }
}
