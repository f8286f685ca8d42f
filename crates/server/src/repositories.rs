//! The repositories that the daemon was told of: opened when needed, looked into now and then, their restore points kept
//! in memory so that lists cost no reading.
//!
//! A repository that cannot be used is no reason to stop: it says why, and is tried again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io::Read,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;
use virtward_api::{Code, JobKind, Maintenance, Problem, RepositoryState, RepositoryUsage, UsageSample};
use virtward_model::{PointId, RestorePoint};
use virtward_repo::{
    Repository, Secret,
    store::{self, Store, append::AppendOnly, cache::CachedStore},
};

use crate::{
    config::{DEFAULT_REPOSITORY, RepositoryConfig, SecretFile},
    failures::{self, Result, blocking},
    jobs::record::{Record, Work},
    kv::Kv,
    peers::{self, Peers, RemoteStore},
    table::Table,
};

/// Longest password or key file that makes sense.
const SECRET_BYTES_MAX: u64 = 1 << 20;
/// Samples of growth: at most one per hour, older ones thinned out.
const SAMPLES_MAX: usize = 1500;
const SAMPLE_EVERY: SignedDuration = SignedDuration::from_hours(1);

/// All of them.
pub struct Repositories {
    kv: Kv,
    peers: Arc<Peers>,
    /// What is kept of each in the state store.
    pub table: Table<String, Kept>,
    /// Others wrote into these.
    stale: Mutex<BTreeSet<String>>,
    /// Some became stale.
    pub wake: Notify,
    entries: Mutex<BTreeMap<String, Arc<Entry>>>,
}

/// One of them.
pub struct Entry {
    /// What was said of it.
    pub config: RepositoryConfig,
    peers: Arc<Peers>,
    opened: tokio::sync::Mutex<Option<Repository>>,
    view: Mutex<Arc<View>>,
}

/// What is known of a repository.
#[derive(Clone, Debug)]
pub struct View {
    /// Identity.
    pub id: Option<String>,
    /// Whether it can be used.
    pub state: RepositoryState,
    /// Why not.
    pub error: Option<String>,
    /// Restore points of each VM, newest first.
    pub points: HashMap<Uuid, Vec<Arc<RestorePoint>>>,
    /// Number of restore points.
    pub count: u64,
    /// Reasons of holds.
    pub holds: BTreeMap<PointId, String>,
    /// What is kept in the state store.
    pub kept: Kept,
}

/// What is kept of a repository in the state store.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Kept {
    /// What it held when it was last measured.
    pub usage: Option<RepositoryUsage>,
    /// Growth.
    pub history: Vec<UsageSample>,
    /// Last check.
    pub last_verify: Option<Maintenance>,
    /// Last removal by rules.
    pub last_prune: Option<Maintenance>,
    /// Last collection.
    pub last_gc: Option<Maintenance>,
}

impl Entry {
    fn new(config: RepositoryConfig, kept: Kept, peers: Arc<Peers>) -> Self {
        let view = View {
            id: None,
            state: RepositoryState::Unknown,
            error: None,
            points: HashMap::new(),
            count: 0,
            holds: BTreeMap::new(),
            kept,
        };
        Self { config, peers, opened: tokio::sync::Mutex::default(), view: Mutex::new(Arc::new(view)) }
    }

    /// What is known of it.
    pub fn view(&self) -> Arc<View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, change: impl FnOnce(&mut View)) {
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut view));
    }

    /// The repository, opened once.
    pub async fn open(&self) -> Result<Repository> {
        let mut opened = self.opened.lock().await;
        if let Some(repository) = &*opened {
            return Ok(repository.clone());
        }
        let config = self.config.clone();
        let remote = peers::served_by(&config.location)
            .map(|(node, name)| Arc::new(RemoteStore::new(self.peers.clone(), node, name)));
        let repository = blocking(move || {
            let store: Arc<dyn Store> = match (remote, &config.store.cache) {
                (None, _) => {
                    store::open_with(&config.location, &config.store).map_err(|error| failures::repo(&error))?
                }
                (Some(remote), None) => Arc::new(AppendOnly::new(remote)),
                (Some(remote), Some(cache)) => {
                    let cached = CachedStore::new(remote, cache).map_err(|error| failures::repo(&error))?;
                    Arc::new(AppendOnly::new(Arc::new(cached)))
                }
            };
            let secret = secret(&config.secret)?;
            Repository::open(store, &secret).map_err(|error| failures::repo(&error))
        })
        .await?;
        *opened = Some(repository.clone());
        Ok(repository)
    }

    /// Reads its restore points; whether its state is another than before.
    pub async fn refresh(&self) -> bool {
        let before = self.view();
        let read = match self.open().await {
            Err(problem) => Err(problem),
            Ok(repository) => {
                let id = repository.id();
                blocking(move || {
                    let list = repository.points().map_err(|error| failures::repo(&error))?;
                    let holds = repository.holds().map_err(|error| failures::repo(&error))?;
                    Ok((id, list, holds))
                })
                .await
            }
        };
        match read {
            Ok((id, list, holds)) => {
                for (object, error) in &list.unreadable {
                    tracing::warn!(repository = self.config.name, object, %error, "a restore point cannot be read");
                }
                let count = list.points.len() as u64;
                let mut points: HashMap<Uuid, Vec<Arc<RestorePoint>>> = HashMap::new();
                for point in list.points {
                    points.entry(point.vm_uuid).or_default().push(Arc::new(point));
                }
                points.values_mut().for_each(|of| of.sort_by_key(|point| std::cmp::Reverse((point.taken, point.id))));
                self.set(|view| {
                    view.id = Some(id);
                    (view.state, view.error) = (RepositoryState::Ok, None);
                    (view.points, view.count) = (points, count);
                    view.holds = holds.into_iter().map(|(id, hold)| (id, hold.reason.clone())).collect();
                });
            }
            Err(problem) => {
                // It may have been replaced or unmounted: what was opened is not what is there.
                *self.opened.lock().await = None;
                self.set(|view| {
                    view.state = RepositoryState::Unusable;
                    view.error = Some(problem.detail.clone());
                });
            }
        }
        self.view().state != before.state
    }
}

impl Repositories {
    /// Those of the configuration.
    pub async fn load(kv: Kv, configs: &[RepositoryConfig], peers: Arc<Peers>) -> Result<Self> {
        let table = Table::load(&kv, "/v1/repositories/").await?;
        let (stale, wake) = (Mutex::default(), Notify::new());
        let all = Self { kv, peers, table, stale, wake, entries: Mutex::default() };
        all.reconfigure(configs);
        Ok(all)
    }

    /// What is kept of a repository is another thing now.
    pub fn news(&self, name: &str, kept: &Kept) {
        if let Ok(entry) = self.find(Some(name)) {
            entry.set(|view| view.kept = kept.clone());
        }
    }

    /// Another daemon did something that may have changed restore points.
    pub fn is_stale(&self, record: &Record) {
        if !matches!(record.job.kind, JobKind::Backup | JobKind::Copy | JobKind::Prune) {
            return;
        }
        let mut stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
        stale.insert(record.job.repository.clone());
        if let Work::Copy { to, .. } = &record.work {
            stale.insert(to.clone());
        }
        self.wake.notify_one();
    }

    /// Those that others wrote into since this was last asked.
    pub fn take_stale(&self) -> Vec<Arc<Entry>> {
        let stale = std::mem::take(&mut *self.stale.lock().unwrap_or_else(PoisonError::into_inner));
        stale.iter().filter_map(|name| self.find(Some(name)).ok()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over another configuration; what did not change stays as it is.
    pub fn reconfigure(&self, configs: &[RepositoryConfig]) {
        let mut entries = self.lock();
        let mut next = BTreeMap::new();
        for config in configs {
            let entry = match entries.get(&config.name) {
                Some(entry) if entry.config == *config => entry.clone(),
                _ => {
                    let kept = self.table.get(&config.name).map(|kept| Kept::clone(&kept)).unwrap_or_default();
                    Arc::new(Entry::new(config.clone(), kept, self.peers.clone()))
                }
            };
            next.insert(config.name.clone(), entry);
        }
        *entries = next;
    }

    /// All, by name.
    pub fn all(&self) -> Vec<Arc<Entry>> {
        self.lock().values().cloned().collect()
    }

    /// One, by name; without one the default.
    pub fn find(&self, name: Option<&str>) -> Result<Arc<Entry>> {
        let entries = self.lock();
        let name = name.unwrap_or(DEFAULT_REPOSITORY);
        entries.get(name).cloned().ok_or_else(|| {
            let known: Vec<&str> = entries.keys().map(String::as_str).collect();
            Problem::new(Code::NotFound, format!("there is no repository called {name}"))
                .hint(format!("the configuration has {}", known.join(", ")))
        })
    }

    /// Measures a repository, and keeps a sample if the last one is old enough.
    pub async fn measure(&self, entry: &Entry) -> Result<()> {
        let repository = entry.open().await?;
        let now = Timestamp::now();
        let info = blocking(move || repository.info().map_err(|error| failures::repo(&error))).await?;
        let space = file_system(Path::new(&entry.config.location));
        let usage = RepositoryUsage {
            at: now,
            bytes: info.bytes,
            data_bytes: info.data_bytes,
            chunk_bytes: info.chunk_bytes,
            dedup_ratio: finite(info.dedup_ratio),
            compression_ratio: finite(info.compression_ratio),
            free_bytes: space.map(|(_, free)| free),
            total_bytes: space.map(|(total, _)| total),
        };
        let sample = UsageSample { at: now, bytes: info.bytes, data_bytes: info.data_bytes, points: info.points };
        self.keep(entry, |kept| {
            kept.usage = Some(usage);
            if kept.history.last().is_none_or(|last| now.duration_since(last.at) >= SAMPLE_EVERY) {
                kept.history.push(sample);
                let surplus = kept.history.len().saturating_sub(SAMPLES_MAX);
                // A value of the state store is bounded: of the oldest half every second sample goes.
                if surplus > 0 {
                    let mut number = 0;
                    let half = SAMPLES_MAX / 2;
                    kept.history.retain(|_| {
                        number += 1;
                        number > half || number % 2 == 0
                    });
                }
            }
        })
        .await
    }

    /// Changes what is kept of a repository.
    pub async fn keep(&self, entry: &Entry, change: impl FnOnce(&mut Kept)) -> Result<()> {
        entry.set(|view| change(&mut view.kept));
        let (name, kept) = (entry.config.name.clone(), entry.view().kept.clone());
        let at = self.kv.put(&key(&name), &kept).await?;
        self.table.put(name, at, kept);
        Ok(())
    }
}

fn key(name: &str) -> String {
    format!("/v1/repositories/{name}")
}

fn finite(ratio: f64) -> f64 {
    if ratio.is_finite() { ratio } else { 1.0 }
}

/// Size and free space of a file system, for users.
pub fn file_system(path: &Path) -> Option<(u64, u64)> {
    if !path.is_absolute() {
        return None;
    }
    let found = rustix::fs::statvfs(path).ok()?;
    Some((found.f_blocks.saturating_mul(found.f_frsize), found.f_bavail.saturating_mul(found.f_frsize)))
}

fn secret(file: &SecretFile) -> Result<Secret> {
    let (path, what) = match file {
        SecretFile::Password(path) => (path, "password"),
        SecretFile::Key(path) => (path, "key"),
    };
    let wrong = |why: &dyn std::fmt::Display| {
        Problem::new(Code::WrongSecret, format!("cannot read the {what} file {}: {why}", path.display()))
            .hint("name the right file with password-file or key-file in the configuration")
    };
    let mut data = Vec::new();
    let file_read = File::open(path).and_then(|file| file.take(SECRET_BYTES_MAX).read_to_end(&mut data));
    file_read.map_err(|error| wrong(&error))?;
    match file {
        SecretFile::Key(_) => Secret::key_bytes(data).map_err(|error| wrong(&error)),
        SecretFile::Password(_) => {
            let line = data.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            match std::str::from_utf8(line) {
                Ok("") => Err(wrong(&"its first line is empty")),
                Ok(text) => Ok(Secret::password(text)),
                Err(_) => Err(wrong(&"it is not valid UTF-8")),
            }
        }
    }
}
