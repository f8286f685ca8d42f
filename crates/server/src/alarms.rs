//! Troubles that last, found by looking: VMs whose backups are overdue, repositories that run full, a certificate that
//! ends, a state directory without room. Each becomes an event when it begins and when it is over.
//!
//! What is everybody's (VMs, repositories) the leader looks after; that it was told is in the state store, so that neither
//! another leader nor a restart tells it again. What is one host's own its daemon looks after.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_api::{HostState, ProtectionState, Said, Saying, Severity, VmRef};
use virtward_cluster::{Op, TXN_LEN_MAX};
use virtward_engine::Cancel;

use crate::{
    daemon::Daemon,
    events::Note,
    failures::Result,
    kv::{self, Kv},
    repositories,
    said::Sentence,
    table::Table,
    views::Views,
};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// A repository's file system is nearly full below this part of it, and not any more above that one.
const SPACE_MIN: f64 = 0.10;
const SPACE_AGAIN: f64 = 0.12;
/// Room in the state directory: below the first somebody should look, below the second the daemon is not ready.
const STATE_LOW: u64 = 128 << 20;
pub const STATE_MIN: u64 = 1 << 20;
/// A certificate that ends so soon is told.
const CERTIFICATE_SOON: SignedDuration = SignedDuration::from_hours(21 * 24);
/// More troubles of one kind at a time are one event.
const EACH_MAX: usize = 20;
/// Names in an event about many.
const NAMES_MAX: usize = 10;

const VM: &str = "vm-overdue/";
const SPACE: &str = "repository-space/";
/// The condition of an event about many VMs.
const MANY: &str = "vm-overdue/many";

/// A trouble that was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// Since when it is known.
    pub since: Timestamp,
    /// What it is about, for people.
    pub name: String,
    /// What is wrong.
    pub text: String,
    /// The same, for other languages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
}

/// Those that are everybody's.
pub struct Alarms {
    /// By kind and subject.
    pub table: Table<String, Alarm>,
}

impl Alarms {
    /// As the store has them.
    pub async fn load(kv: &Kv) -> Result<Self> {
        Ok(Self { table: Table::load(kv, "/v1/alarms/").await? })
    }

    /// How many there are of each kind.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::from([(kind(VM).to_owned(), 0), (kind(SPACE).to_owned(), 0)]);
        for (key, _) in self.table.all() {
            *counts.entry(kind(&key).to_owned()).or_default() += 1;
        }
        counts
    }
}

fn kind(key: &str) -> &str {
    key.split_once('/').map_or(key, |(kind, _)| kind)
}

/// What a look finds.
#[derive(Default)]
struct Found {
    /// Troubles, by key.
    wrong: BTreeMap<String, (String, Sentence)>,
    /// Of these nobody knows now; what was told of them stays.
    unclear: BTreeSet<String>,
    /// Not everything is seen: what is not found is not over.
    is_blind: bool,
}

/// What was seen and told of this host's own.
#[derive(Default)]
struct Own {
    seen: BTreeSet<String>,
    told: BTreeMap<&'static str, Severity>,
}

/// Looks until cancelled.
pub async fn run(daemon: Arc<Daemon>, cancel: Cancel) {
    let mut own = Own::default();
    loop {
        tokio::select! {
            () = tokio::time::sleep(daemon.config().reconcile.min(LOOK_EVERY)) => {}
            () = cancel.cancelled() => return,
        }
        own.look(&daemon);
        if let Err(problem) = shared(&daemon, &mut own.seen).await {
            tracing::debug!(%problem, "alarms were not told; the next look does");
        }
    }
}

/// Looks at what is everybody's, and tells what began and what is over.
async fn shared(daemon: &Daemon, seen: &mut BTreeSet<String>) -> Result<()> {
    let Ok(guard) = daemon.leader.guard() else {
        seen.clear();
        return Ok(());
    };
    if daemon.nodes.lost_store().is_some() || daemon.is_stopping() {
        return Ok(());
    }
    let found = look(daemon);
    let known: BTreeMap<String, Arc<Alarm>> = daemon.alarms.table.all().into_iter().collect();
    // What is wrong at two looks is wrong: a backup that is due this minute may just be about to start.
    let began = found.wrong.iter().filter(|(key, _)| !known.contains_key(*key) && seen.contains(*key));
    let began: Vec<(String, Alarm)> = began
        .map(|(key, (name, Sentence { text, said }))| {
            let alarm = Alarm { since: Timestamp::now(), name: name.clone(), text: text.clone(), said: said.clone() };
            (key.clone(), alarm)
        })
        .collect();
    let over = known.iter().filter(|(key, _)| {
        !(found.wrong.contains_key(*key) || found.unclear.contains(*key) || found.is_blind && key.starts_with(VM))
    });
    let over: Vec<(String, Arc<Alarm>)> = over.map(|(key, alarm)| (key.clone(), alarm.clone())).collect();
    *seen = found.wrong.into_keys().collect();
    let full = |key: &str| format!("{}{key}", daemon.alarms.table.prefix());
    let (mut told, mut ended) = (Vec::new(), Vec::new());
    for some in began.chunks(TXN_LEN_MAX / 2) {
        let put = |(key, alarm): &(String, Alarm)| kv::put(&full(key), alarm);
        let ops = some.iter().map(put).collect::<Result<Vec<Op>>>()?;
        let Some(at) = daemon.kv.commit(guard.clone(), ops).await? else { break };
        for (key, alarm) in some {
            daemon.alarms.table.put(key.clone(), at, alarm.clone());
            told.push((key.clone(), alarm.clone()));
        }
    }
    for some in over.chunks(TXN_LEN_MAX / 2) {
        let ops = some.iter().map(|(key, _)| Op::delete(full(key))).collect();
        let Some(at) = daemon.kv.commit(guard.clone(), ops).await? else { break };
        for (key, alarm) in some {
            daemon.alarms.table.delete(key, at);
            ended.push((key.clone(), Alarm::clone(alarm)));
        }
    }
    tell(daemon, &told, &ended);
    Ok(())
}

/// What is wrong now.
fn look(daemon: &Daemon) -> Found {
    let views = Views::new(daemon);
    let is_blind = views.fleet.hosts.values().any(|host| !host.is_complete || host.state != HostState::Up);
    let mut found = Found { is_blind, ..Found::default() };
    // Of a VM that came after the last plan it is not known which policies are for it.
    let plan = daemon.plan();
    let planned: HashSet<Uuid> = plan.input.vms.iter().map(|vm| vm.uuid).collect();
    for (uuid, placed) in &views.fleet.vms {
        let key = format!("{VM}{uuid}");
        if !planned.contains(uuid) {
            found.unclear.insert(key);
            continue;
        }
        match views.standing(*uuid) {
            (ProtectionState::Overdue, why) => {
                let name = placed.view.vm.name.clone();
                let text = format!("{name} is overdue: {}", why.text);
                let said =
                    why.said.map(|why| Said::from(Saying::VmOverdue).with("vm", name.as_str()).with("what", why));
                found.wrong.insert(key, (name, Sentence { text, said }));
            }
            (ProtectionState::Unknown, _) => _ = found.unclear.insert(key),
            _ => {}
        }
    }
    for entry in daemon.repositories.all() {
        let name = &entry.config.name;
        let key = format!("{SPACE}{name}");
        let usage = entry.view().kept.usage.clone();
        let measured = usage.and_then(|usage| Some((usage.total_bytes?, usage.free_bytes?)));
        let Some((total, free)) = repositories::file_system(Path::new(&entry.config.location)).or(measured) else {
            continue;
        };
        let part = free as f64 / total.max(1) as f64;
        let is_known = daemon.alarms.table.get(&key).is_some();
        if part < SPACE_MIN || (is_known && part < SPACE_AGAIN) {
            let gib = free as f64 / f64::from(1 << 30);
            let text = format!(
                "repository {name} is nearly full: {gib:.1} GiB free, {:.0} % of its file system; make room, or keep less",
                part * 100.0
            );
            let said = Said::from(Saying::RepositoryFull).with("repository", name.as_str()).with("free_bytes", free);
            found
                .wrong
                .insert(key, (name.clone(), Sentence::new(text, said.with("percent", (part * 100.0).round() as u64))));
        }
    }
    found
}

fn tell(daemon: &Daemon, began: &[(String, Alarm)], over: &[(String, Alarm)]) {
    let of = |all: &[(String, Alarm)], is_vm: bool| -> Vec<(String, Alarm)> {
        all.iter().filter(|(key, _)| key.starts_with(VM) == is_vm).cloned().collect()
    };
    let (vms, well) = (of(began, true), of(over, true));
    if vms.len() > EACH_MAX {
        let text = format!("{} VMs are overdue: {}", vms.len(), names(&vms));
        tracing::warn!("{text}");
        let said = Said::from(Saying::VmsOverdue).with("count", vms.len()).with("names", names(&vms));
        daemon.events.add(Note::new(Severity::Error, kind(VM), text).says(said).about(MANY, false));
    } else {
        vms.iter().for_each(|(key, alarm)| add(daemon, Severity::Error, key, &alarm.name, alarm.clone().into()));
    }
    if well.len() > EACH_MAX {
        let text = format!("{} VMs are not overdue any more: {}", well.len(), names(&well));
        let said = Said::from(Saying::VmsNotOverdue).with("count", well.len()).with("names", names(&well));
        daemon.events.add(Note::new(Severity::Info, kind(VM), text).says(said).about(format!("{MANY}/some"), true));
    } else {
        for (key, alarm) in &well {
            let text = format!("{} is not overdue any more", alarm.name);
            let said = Said::from(Saying::VmNotOverdue).with("vm", alarm.name.as_str());
            add(daemon, Severity::Info, key, &alarm.name, Sentence::new(text, said));
        }
    }
    if !well.is_empty() && daemon.alarms.counts().get(kind(VM)) == Some(&0) {
        let note = Note::new(Severity::Info, kind(VM), "no VM is overdue any more").says(Saying::NoneOverdue);
        daemon.events.add(note.about(MANY, true));
    }
    for (key, alarm) in of(began, false) {
        add(daemon, Severity::Warning, &key, &alarm.name, alarm.clone().into());
    }
    for (key, alarm) in of(over, false) {
        let text = format!("repository {} has room again", alarm.name);
        let said = Said::from(Saying::RepositoryRoom).with("repository", alarm.name.as_str());
        add(daemon, Severity::Info, &key, &alarm.name, Sentence::new(text, said));
    }
}

fn names(all: &[(String, Alarm)]) -> String {
    let mut names: Vec<&str> = all.iter().take(NAMES_MAX).map(|(_, alarm)| alarm.name.as_str()).collect();
    if all.len() > NAMES_MAX {
        names.push("…");
    }
    names.join(", ")
}

impl From<Alarm> for Sentence {
    fn from(Alarm { text, said, .. }: Alarm) -> Self {
        Self { text, said }
    }
}

fn add(daemon: &Daemon, severity: Severity, key: &str, name: &str, Sentence { text, said }: Sentence) {
    tracing::info!("{text}");
    let (kind, subject) = match key.strip_prefix(VM) {
        Some(vm) => (kind(VM), vm),
        None => (kind(SPACE), name),
    };
    let mut note = Note { said, ..Note::new(severity, kind, text) };
    match subject.parse() {
        Ok(uuid) => note.vm = Some(VmRef { uuid, name: name.to_owned() }),
        Err(_) => note.repository = Some(subject.to_owned()),
    }
    daemon.events.add(note.about(key, severity == Severity::Info));
}

impl Own {
    /// Looks at what is this host's own.
    fn look(&mut self, daemon: &Daemon) {
        if let Err(error) = daemon.audit.catch_up() {
            tracing::error!(%error, "entries of the audit log still wait for room");
        }
        let config = daemon.config();
        let dir = &config.state_dir;
        let at = |saying: Saying| Said::from(saying).with("dir", dir.display().to_string());
        let room = state_free(dir).map(|free| match free {
            _ if free < STATE_MIN => {
                let text = format!("there is no room left in {} for the daemon's state; free some", dir.display());
                Some((Severity::Error, Sentence::new(text, at(Saying::StateFull))))
            }
            _ if free < STATE_LOW => {
                let text =
                    format!("{} MiB are free in {} for the daemon's state; make room", free >> 20, dir.display());
                Some((Severity::Warning, Sentence::new(text, at(Saying::StateLow).with("free_bytes", free))))
            }
            _ => None,
        });
        if let Some(room) = room {
            let well = Sentence::new("there is room for the daemon's state again", Saying::StateRoom);
            self.settle(daemon, "state-disk", room, well);
        }
        let ends = daemon.certificate().map(|certificate| certificate.ends);
        let now = Timestamp::now();
        let wrong = ends.and_then(|ends| {
            let advice = "renew it (tls-cert in [server]), then systemctl reload virtward";
            match ends.duration_since(now) {
                left if left < SignedDuration::ZERO => {
                    let text = format!("the certificate for HTTPS ended at {ends:.0}; {advice}");
                    let said = Said::from(Saying::CertificateEnded).with("ends_at", ends.to_string());
                    Some((Severity::Error, Sentence::new(text, said)))
                }
                left if left < CERTIFICATE_SOON => {
                    let text = format!("the certificate for HTTPS ends at {ends:.0}; {advice}");
                    let said = Said::from(Saying::CertificateEnds).with("ends_at", ends.to_string());
                    Some((Severity::Warning, Sentence::new(text, said)))
                }
                _ => None,
            }
        });
        let well = Sentence::new("the certificate for HTTPS is good for a while again", Saying::CertificateGood);
        self.settle(daemon, "certificate", wrong, well);
    }

    fn settle(&mut self, daemon: &Daemon, kind: &'static str, wrong: Option<(Severity, Sentence)>, well: Sentence) {
        let before = self.told.get(kind).copied();
        let now = wrong.as_ref().map(|(severity, _)| *severity);
        if before == now {
            return;
        }
        let (severity, Sentence { text, said }) = wrong.unwrap_or((Severity::Info, well));
        tracing::warn!("{text}");
        match now {
            Some(severity) => self.told.insert(kind, severity),
            None => self.told.remove(kind),
        };
        let host = daemon.host_name();
        let note = Note { said, ..Note::new(severity, kind, text) };
        let mut note = note.about(format!("{kind}/{host}"), now.is_none());
        note.host = Some(host);
        daemon.events.add(note);
    }
}

/// Bytes free where the state is.
pub fn state_free(dir: &Path) -> Option<u64> {
    let dir = std::path::absolute(dir).ok()?;
    repositories::file_system(&dir).map(|(_, free)| free)
}
