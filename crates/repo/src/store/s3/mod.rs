//! S3-compatible object storage over HTTP.
//!
//! An object is written with a condition that its name is free, which the server decides; large ones in parts, which
//! appear at once. Durability is the server's answer. Reads are ranges. Blocking calls over pooled connections; each
//! repeats what failed for a bounded time. Needs of the server: conditional writes, and listings that show what was
//! acknowledged; the first is checked at the first write.
//!
//! Not here: what objects mean, caching, who may delete (that is the credentials' policy, see docs/object-storage.md).

mod client;
mod failure;
mod profile;
mod put;
mod settings;
mod sign;
mod tls;
mod upload;
pub(crate) mod xml;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use jiff::{SignedDuration, Timestamp};

pub use settings::{LockMode, ObjectLock, S3Options};

use self::{
    client::{Answer, Call, Client, IN_FLIGHT},
    settings::Settings,
    upload::{PART_BYTES, Slots, Upload},
};
use super::{Listed, ObjectWriter, Put, Store, check_name};
use crate::{
    error::{Error, Result},
    format::names,
    util::parallel,
};

/// Uploads without a new part for this long are nobody's.
const UPLOAD_AGE_MIN: SignedDuration = SignedDuration::from_hours(24);

/// Names held in memory while retention is renewed.
const RENEWED_AT_ONCE: usize = 1000;

/// A bucket, or a prefix of one.
pub struct S3Store(Arc<Inner>);

/// What uploads share with the store.
struct Inner {
    client: Arc<Client>,
    slots: Slots,
    is_condition_checked: AtomicBool,
}

impl S3Store {
    /// For `bucket/prefix`, what follows `s3://`. Nothing is asked yet. Credentials come from the environment or files.
    pub fn open(rest: &str, options: &S3Options) -> Result<Self> {
        let env = |name: &str| std::env::var(name).ok();
        Self::with(Settings::resolve(rest, options, &env)?)
    }

    /// The same with an environment that is given and not the process's own.
    pub fn open_with_env(rest: &str, options: &S3Options, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        Self::with(Settings::resolve(rest, options, env)?)
    }

    fn with(settings: Settings) -> Result<Self> {
        let client = Client::new(settings)?;
        Ok(Self(Arc::new(Inner { client, slots: Slots::default(), is_condition_checked: AtomicBool::new(false) })))
    }
}

/// For the fuzzer: a URL's rest, an endpoint and a file of credentials of anything.
pub(crate) fn any_location(text: &str) {
    profile::parse(text, "default");
    let options = S3Options { endpoint: Some(text.into()), region: Some("r".into()), ..S3Options::default() };
    let env = |name: &str| name.starts_with("AWS_").then(|| "/nonexistent".to_owned());
    let _ = Settings::resolve("bucket/prefix", &options, &env);
    let _ = Settings::resolve(text, &S3Options::default(), &env);
}

impl Inner {
    fn key(&self, name: &str) -> Result<String> {
        check_name(name)?;
        Ok(format!("{}{name}", self.client.settings.prefix))
    }

    fn is_condition_checked(&self) -> bool {
        self.is_condition_checked.load(Relaxed)
    }
    fn set_condition_checked(&self) {
        self.is_condition_checked.store(true, Relaxed);
    }

    /// An answer that no S3 server gives.
    fn nonsense(&self, action: &'static str, key: &str) -> Error {
        let name = key.strip_prefix(&*self.client.settings.prefix).unwrap_or(key);
        Error::Remote {
            action,
            object: format!("{}/{name}", self.client.settings.location),
            what: "the server's answer makes no sense".into(),
            hint: "check that the endpoint is S3-compatible object storage and not a web page or a proxy".into(),
            is_denied: false,
        }
    }

    /// The answer, if it is a success.
    fn accept(&self, action: &'static str, name: &str, key: &str, answer: Answer) -> Result<Answer> {
        match answer.status {
            200..=299 => Ok(answer),
            404 if !matches!(answer.code(), "NoSuchBucket") => Err(Error::Missing { object: name.into() }),
            416 => Err(Error::damaged(name, "it ends too early")),
            _ => Err(failure::refused(&self.client.settings, action, key, &answer)),
        }
    }

    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let key = self.key(name)?;
        if buf.is_empty() {
            return self.size(name).map(drop);
        }
        let Some(last) = offset.checked_add(buf.len() as u64 - 1) else {
            return Err(Error::damaged(name, "it ends too early"));
        };
        let (range, wanted) = (format!("bytes={offset}-{last}"), buf.len() as u64);
        let call = Call { headers: &[("range", &range)], into: Some(buf), ..Call::new("GET", &key) };
        let answer = self.accept("read", name, &key, self.client.call("read", call)?)?;
        match (answer.status, answer.length()) {
            // The whole object: what we want of it is at its beginning.
            (200, Some(length)) if offset == 0 && length >= wanted => Ok(()),
            (200, Some(_)) if offset == 0 => Err(Error::damaged(name, "it ends too early")),
            (206, Some(length)) if length == wanted => Ok(()),
            (206, Some(length)) if length < wanted => Err(Error::damaged(name, "it ends too early")),
            _ => Err(self.nonsense("read", &key)),
        }
    }

    fn size(&self, name: &str) -> Result<u64> {
        let key = self.key(name)?;
        let answer = self.accept("look up", name, &key, self.client.call("look up", Call::new("HEAD", &key))?)?;
        answer.length().ok_or_else(|| self.nonsense("look up", &key))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let settings = &self.client.settings;
        let prefix = format!("{}{prefix}", settings.prefix);
        let mut next: Option<String> = None;
        loop {
            let mut query = vec![("list-type", "2"), ("prefix", &*prefix)];
            if let Some(next) = &next {
                query.push(("continuation-token", next));
            }
            let answer = self.client.call("list", Call { query: &query, ..Call::new("GET", "") })?;
            if answer.status >= 300 {
                return Err(failure::refused(settings, "list", &prefix, &answer));
            }
            let page = xml::list(&answer.body).map_err(|_| self.nonsense("list", &prefix))?;
            for object in page.objects {
                let Some(name) = object.key.strip_prefix(&*settings.prefix) else { continue };
                if object.key.starts_with(&prefix) && check_name(name).is_ok() {
                    each(Listed { name: name.into(), bytes: object.bytes, modified: object.modified })?;
                }
            }
            match page.next {
                Some(token) if next.as_ref() != Some(&token) => next = Some(token),
                Some(_) => return Err(self.nonsense("list", &prefix)),
                None => return Ok(()),
            }
        }
    }

    fn delete(&self, name: &str) -> Result<bool> {
        let key = self.key(name)?;
        // The protocol does not say whether there was something to delete.
        match self.size(name) {
            Ok(_) => {}
            Err(Error::Missing { .. }) => return Ok(false),
            Err(e) => return Err(e),
        }
        match self.accept("delete", name, &key, self.client.call("delete", Call::new("DELETE", &key))?) {
            Ok(_) => Ok(true),
            Err(Error::Missing { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn abort(&self, key: &str, upload: &str) {
        let call = Call { query: &[("uploadId", upload)], retry: false, ..Call::new("DELETE", key) };
        if let Err(error) = self.client.call("abandon", call) {
            tracing::debug!(%error, "an upload stays until it is cleaned up");
        }
    }

    /// Aborts uploads to our prefix that nobody continues, by the server's own clock.
    fn abort_abandoned(&self) -> Result<()> {
        let prefix = &self.client.settings.prefix;
        let query = [("uploads", ""), ("prefix", &**prefix)];
        let answer =
            self.client.call("list uploads of", Call { query: &query, retry: false, ..Call::new("GET", "") })?;
        if answer.status >= 300 {
            return Err(failure::refused(&self.client.settings, "list uploads of", prefix, &answer));
        }
        let now = answer.date().unwrap_or_else(Timestamp::now);
        let uploads = xml::uploads(&answer.body).map_err(|_| self.nonsense("list uploads of", prefix))?;
        for upload in uploads {
            let is_ours = upload.key.strip_prefix(&**prefix).is_some_and(|name| check_name(name).is_ok());
            if !is_ours || now.duration_since(upload.initiated) < UPLOAD_AGE_MIN {
                continue;
            }
            // A slow writer's upload can be old and alive.
            let query = [("uploadId", &*upload.id)];
            let parts =
                self.client.call("look up", Call { query: &query, retry: false, ..Call::new("GET", &upload.key) })?;
            let Ok(newest) = xml::newest_part(&parts.body) else { continue };
            if newest.is_none_or(|newest| now.duration_since(newest) >= UPLOAD_AGE_MIN) {
                tracing::info!(key = upload.key, "aborting an upload that a dead writer left");
                self.abort(&upload.key, &upload.id);
            }
        }
        Ok(())
    }
}

impl Store for S3Store {
    fn location(&self) -> String {
        self.0.client.settings.location.clone()
    }

    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_range(name, offset, buf)
    }

    fn size(&self, name: &str) -> Result<u64> {
        self.0.size(name)
    }

    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        let key = self.0.key(name)?;
        let call = Call { max_bytes: max, ..Call::new("GET", &key) };
        let answer = self.0.accept("read", name, &key, self.0.client.call("read", call)?)?;
        let size = answer.length().unwrap_or(answer.body.len() as u64);
        if size > max {
            return Err(Error::damaged(name, format!("it has {size} bytes where at most {max} make sense")));
        }
        Ok(answer.body)
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        if bytes.len() > PART_BYTES {
            let mut writer = self.create(name)?;
            writer.write(bytes)?;
            return writer.finish();
        }
        let put = self.0.put_once(name, bytes)?;
        if put == Put::Created {
            self.0.check_condition(name, bytes)?;
        }
        Ok(put)
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(Upload::new(self.0.clone(), name)?))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.0.list(prefix, each)
    }

    fn now(&self) -> Result<Timestamp> {
        let key = self.0.key(names::CONFIG)?;
        // Every answer has the time, one that says that there is nothing too.
        let answer = self.0.client.call("ask the time of", Call::new("HEAD", &key))?;
        answer.date().ok_or_else(|| self.0.nonsense("ask the time of", &key))
    }

    fn delete(&self, name: &str) -> Result<bool> {
        self.0.delete(name)
    }

    fn clean(&self) {
        if let Err(error) = self.0.abort_abandoned() {
            tracing::debug!(%error, "cannot look for abandoned uploads");
        }
    }

    fn fetches_in_flight(&self) -> usize {
        IN_FLIGHT
    }

    fn heed(&self, cancel: &Arc<AtomicBool>) {
        self.0.client.heed(cancel);
    }

    fn retention(&self) -> Option<std::time::Duration> {
        let lock = self.0.client.settings.object_lock?;
        Some(std::time::Duration::from_secs(86_400 * u64::from(lock.days)))
    }

    fn renew(&self, names: &mut dyn Iterator<Item = String>, until: Timestamp) -> Result<()> {
        let Some(lock) = self.0.client.settings.object_lock else { return Ok(()) };
        loop {
            let batch: Vec<String> = (&mut *names).take(RENEWED_AT_ONCE).collect();
            if batch.is_empty() {
                return Ok(());
            }
            parallel(&batch, IN_FLIGHT, |name| match put::is_retained(name) {
                true => self.0.retain(name, lock, until),
                false => Ok(()),
            })?;
        }
    }
}
