//! What happened, for people; and who changed what, for auditors.

use std::{
    collections::VecDeque,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use uuid::Uuid;
use virtward_api::{AuditEntry, Event, PrincipalKind, Said, Severity, VmRef};
use virtward_decide::notify::Occurrence;

use crate::{
    hub::Hub,
    journal::Journal,
    notify::{self, Notifier},
};

/// Events are rotated at this size, so that twice as much is kept at most.
const EVENTS_BYTES_MAX: u64 = 32 << 20;

/// Audit entries that wait for room on the disk.
const WAITING_MAX: usize = 10_000;

/// An event to come.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Note {
    pub severity: Severity,
    pub kind: &'static str,
    pub message: String,
    pub said: Option<Said>,
    pub vm: Option<VmRef>,
    pub host: Option<String>,
    pub job: Option<Uuid>,
    pub policy: Option<String>,
    pub repository: Option<String>,
    /// See [`Note::about`].
    pub condition: Option<(String, bool)>,
}

impl Note {
    /// About nothing in particular.
    pub fn new(severity: Severity, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            severity,
            kind,
            message,
            said: None,
            vm: None,
            host: None,
            job: None,
            policy: None,
            repository: None,
            condition: None,
        }
    }

    /// What it says, for other languages.
    #[must_use]
    pub fn says(self, said: impl Into<Said>) -> Self {
        let said = said.into();
        debug_assert_eq!(crate::web::cannot_say(&said), None, "{said:?}");
        Self { said: Some(said), ..self }
    }

    /// Writes it into the log, as gravely as it is.
    pub fn log(&self) {
        let (vm, job) = (self.vm.as_ref().map(|vm| vm.name.as_str()), self.job.map(tracing::field::display));
        let event = self.kind;
        match self.severity {
            Severity::Error => tracing::error!(event, vm, job, "{}", self.message),
            Severity::Warning => tracing::warn!(event, vm, job, "{}", self.message),
            Severity::Info => tracing::info!(event, vm, job, "{}", self.message),
        }
    }

    /// Names the trouble that it is about, and whether that is over: notifications repeat no trouble, and tell its end.
    /// Without this it is its kind and its subject, and what is only good to know is the end.
    pub fn about(self, condition: impl Into<String>, is_over: bool) -> Self {
        Self { condition: Some((condition.into(), is_over)), ..self }
    }

    fn condition(&self) -> (String, bool) {
        self.condition.clone().unwrap_or_else(|| {
            let subject = self.vm.as_ref().map(|vm| vm.uuid.to_string());
            let subject = subject.or_else(|| self.repository.clone()).or_else(|| self.host.clone());
            let subject = subject.or_else(|| self.policy.clone()).unwrap_or_default();
            (format!("{}/{subject}", self.kind), self.severity == Severity::Info)
        })
    }
}

/// All events.
pub struct Events {
    journal: Journal<Event>,
    hub: Arc<Hub>,
    /// Whom people are told by.
    pub notifier: Arc<Notifier>,
}

impl Events {
    /// Those of the state directory.
    pub fn open(dir: &Path, hub: Arc<Hub>) -> io::Result<Self> {
        let journal = Journal::open(&dir.join("events.jsonl"), Some(EVENTS_BYTES_MAX), |_| {})?;
        Ok(Self { journal, hub, notifier: Arc::default() })
    }

    /// Adds one and tells of it. A full disk must not stop work: it is logged then, kept in memory, and told
    /// all the same.
    pub fn add(&self, note: Note) {
        let make = || Event {
            id: Uuid::now_v7().to_string(),
            at: Timestamp::now(),
            severity: note.severity,
            kind: note.kind.to_owned(),
            message: note.message.clone(),
            said: note.said.clone(),
            vm: note.vm.as_ref().map(|vm| vm.uuid),
            vm_name: note.vm.as_ref().map(|vm| vm.name.clone()),
            node: None,
            host: note.host.clone(),
            job: note.job,
            policy: note.policy.clone(),
            repository: note.repository.clone(),
        };
        let event = self.journal.append(|_| make()).unwrap_or_else(|error| {
            tracing::error!(%error, "an event was not stored");
            let event = make();
            self.journal.remember(event.clone());
            event
        });
        self.hub.send("events", "event", &event);
        let (condition, is_over) = note.condition();
        let (level, kind) = (notify::level(note.severity), event.kind.clone());
        self.notifier.tell(Occurrence { level, kind, condition, is_over, event });
    }

    /// Newest first.
    pub fn page(&self, limit: usize, passes: impl FnMut(&Event) -> bool) -> (Vec<Event>, bool) {
        self.journal.page(limit, passes)
    }
}

/// Who changed what.
pub struct Audit {
    journal: Journal<AuditEntry>,
    /// What a full disk did not take: it comes before what is next.
    waiting: Mutex<VecDeque<(Timestamp, Deed)>>,
}

/// A change to be recorded.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Deed {
    pub who: String,
    pub via: PrincipalKind,
    pub address: Option<String>,
    pub action: String,
    pub target: Option<String>,
    pub status: u16,
    pub detail: Option<String>,
}

/// The hash that ties an entry to the one before it: over that one's hash and all of this one but its own.
fn chain(before: &str, entry: &AuditEntry) -> String {
    let bare = AuditEntry { chain: String::new(), ..entry.clone() };
    let mut hasher = blake3::Hasher::new();
    hasher.update(before.as_bytes());
    hasher.update(&serde_json::to_vec(&bare).unwrap_or_default());
    hasher.finalize().to_hex().to_string()
}

impl Audit {
    /// That of the state directory; and the number of the first entry that does not fit the one before it.
    pub fn open(dir: &Path) -> io::Result<(Self, Option<u64>)> {
        let (mut last, mut id, mut broken) = (String::new(), 0, None);
        let journal = Journal::<AuditEntry>::open(&dir.join("audit.jsonl"), None, |entry| {
            if entry.id != id + 1 || entry.chain != chain(&last, entry) {
                broken.get_or_insert(entry.id);
            }
            (last, id) = (entry.chain.clone(), entry.id);
        })?;
        Ok((Self { journal, waiting: Mutex::default() }, broken))
    }

    /// Adds one. Blocks until it is on the disk. If that fails it is kept, and tried again with the next one.
    pub fn add(&self, deed: Deed) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= WAITING_MAX {
            tracing::error!(lost = ?waiting.pop_front(), "the audit log takes nothing; its oldest waiting entry is lost");
        }
        waiting.push_back((Timestamp::now(), deed));
        self.write(&mut waiting)
    }

    /// Tries again what could not be written.
    pub fn catch_up(&self) -> io::Result<()> {
        self.write(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, waiting: &mut VecDeque<(Timestamp, Deed)>) -> io::Result<()> {
        while let Some((at, deed)) = waiting.front() {
            self.append(*at, deed.clone())?;
            waiting.pop_front();
        }
        Ok(())
    }

    fn append(&self, at: Timestamp, deed: Deed) -> io::Result<()> {
        let make = |last: Option<&AuditEntry>| {
            let mut entry = AuditEntry {
                id: last.map_or(1, |last| last.id + 1),
                at,
                who: deed.who,
                via: deed.via,
                address: deed.address,
                action: deed.action,
                target: deed.target,
                status: deed.status,
                detail: deed.detail,
                node: None,
                chain: String::new(),
            };
            entry.chain = chain(last.map_or("", |last| &last.chain), &entry);
            entry
        };
        self.journal.append(make).map(|_| ())
    }

    /// Newest first.
    pub fn page(&self, limit: usize, passes: impl FnMut(&AuditEntry) -> bool) -> (Vec<AuditEntry>, bool) {
        self.journal.page(limit, passes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_was_changed_or_taken_out_shows() {
        let dir = tempfile::tempdir().unwrap();
        let (audit, broken) = Audit::open(dir.path()).unwrap();
        assert_eq!(broken, None);
        for action in ["policy.put", "token.create", "job.backup"] {
            let deed = Deed {
                who: "root".into(),
                via: PrincipalKind::Local,
                address: None,
                action: action.into(),
                target: None,
                status: 200,
                detail: None,
            };
            audit.add(deed).unwrap();
        }
        drop(audit);
        assert_eq!(Audit::open(dir.path()).unwrap().1, None);
        let path = dir.path().join("audit.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("token.create", "token.revoke")).unwrap();
        assert_eq!(Audit::open(dir.path()).unwrap().1, Some(2));
        let without: Vec<&str> = text.lines().filter(|line| !line.contains("token.create")).collect();
        std::fs::write(&path, without.join("\n") + "\n").unwrap();
        assert_eq!(Audit::open(dir.path()).unwrap().1, Some(3));
    }
}
