//! One simulated domain: its definition, its process, its job, its checkpoints, and the rules between them.

use std::collections::BTreeMap;

use uuid::Uuid;
use virtward_model::{Disk, Vm, VmState};

use super::disk::LiveBitmaps;
use super::{AgentMode, Around, Outcome, World, refuse};
use crate::xml::DomainXml;
use crate::{BackupSpec, BlockCopySpec, CheckpointInfo, DomainEventKind, ErrorKind, JobInfo, JobKind};

/// A domain of one host.
pub(super) struct Domain {
    pub(super) name: String,
    pub(super) uuid: Uuid,
    /// The definition, with its UUID.
    pub(super) xml: String,
    /// Has a definition that outlives its process.
    pub(super) persistent: bool,
    pub(super) state: VmState,
    pub(super) disks: Vec<Disk>,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u32,
    pub(super) agent_channel: bool,
    pub(super) agent: AgentMode,
    pub(super) frozen: u32,
    pub(super) job: Option<Job>,
    /// The last migration that brought it here.
    pub(super) done: Option<JobInfo>,
    pub(super) copies: BTreeMap<String, BlockCopySpec>,
    pub(super) checkpoints: Vec<CheckpointInfo>,
    /// Per target, what QEMU holds while it runs.
    pub(super) live: BTreeMap<String, LiveBitmaps>,
    pub(super) written_bytes: BTreeMap<String, u64>,
}

/// The domain-wide job.
pub(super) struct Job {
    pub(super) kind: JobKind,
    pub(super) backup: Option<BackupSpec>,
    pub(super) scratch_used_bytes: u64,
}

impl Domain {
    /// A domain from its definition; the UUID is added if the XML leaves it out.
    pub(super) fn define(xml: &str) -> Outcome<Domain> {
        let parsed = DomainXml::parse(xml).map_err(|e| refuse(ErrorKind::Invalid, e.to_string()))?;
        let (uuid, xml) = match parsed.uuid {
            Some(uuid) => (uuid, xml.to_owned()),
            None => {
                let uuid = super::name_uuid("domain", &parsed.name);
                (uuid, xml.replacen("</name>", &format!("</name><uuid>{uuid}</uuid>"), 1))
            }
        };
        Ok(Domain {
            name: parsed.name,
            uuid,
            xml,
            persistent: true,
            state: VmState::ShutOff,
            disks: parsed.disks.into_iter().map(|d| d.disk).collect(),
            memory_bytes: parsed.memory_bytes,
            vcpus: parsed.vcpus,
            agent_channel: parsed.agent_channel,
            agent: AgentMode::Absent,
            frozen: 0,
            job: None,
            done: None,
            copies: BTreeMap::new(),
            checkpoints: Vec::new(),
            live: BTreeMap::new(),
            written_bytes: BTreeMap::new(),
        })
    }

    /// As callers see it.
    pub(super) fn vm(&self) -> Vm {
        Vm { name: self.name.clone(), uuid: self.uuid, state: self.state, disks: self.disks.clone() }
    }

    /// Refuses a domain without a process.
    pub(super) fn active(&self) -> Outcome<()> {
        match self.state.is_active() {
            true => Ok(()),
            false => Err(refuse(ErrorKind::WrongState, "Requested operation is not valid: domain is not running")),
        }
    }

    /// Refuses a domain that a job holds.
    pub(super) fn idle(&self) -> Outcome<()> {
        match &self.job {
            None => Ok(()),
            Some(job) => Err(refuse(ErrorKind::Busy, format!("a job of kind {:?} runs already", job.kind))),
        }
    }

    /// The disk with this target.
    pub(super) fn disk(&self, target: &str) -> Outcome<&Disk> {
        self.disks
            .iter()
            .find(|d| d.target == target)
            .ok_or_else(|| refuse(ErrorKind::Invalid, format!("invalid argument: no disk named '{target}'")))
    }

    /// The bitmaps of a disk that can have some.
    pub(super) fn bitmaps(&mut self, target: &str) -> Outcome<&mut LiveBitmaps> {
        let disk = self.disk(target)?;
        if disk.format != "qcow2" {
            let message = format!("checkpoint for disk {target} unsupported for storage type {}", disk.format);
            return Err(refuse(ErrorKind::Unsupported, message));
        }
        Ok(self.live.entry(target.to_owned()).or_default())
    }

    /// The process starts: QEMU opens the images.
    pub(super) fn open_disks(&mut self, world: &mut World) {
        for disk in &self.disks {
            if let Some(path) = disk.source.path() {
                self.live.insert(disk.target.clone(), world.image(path).open());
            }
        }
    }

    /// The process ends, in order or not; only in order are the bitmaps saved.
    pub(super) fn end(&mut self, around: &mut Around<'_>, orderly: bool, detail: &str) {
        let live = std::mem::take(&mut self.live);
        for (target, bitmaps) in live {
            let path = self.disk(&target).ok().and_then(|d| d.source.path().map(str::to_owned));
            if let Some(path) = path.filter(|_| orderly) {
                around.world.image(&path).close(bitmaps);
            }
        }
        self.state = VmState::ShutOff;
        self.frozen = 0;
        self.copies.clear();
        self.written_bytes.clear();
        self.end_job(around);
        around.announce(self, DomainEventKind::Stopped { detail: detail.to_owned() });
        // A transient domain is gone with its process.
        around.gone |= !self.persistent;
    }

    /// The domain-wide job ends, however.
    pub(super) fn end_job(&mut self, around: &Around<'_>) {
        if self.job.take().is_some() {
            around.announce(self, DomainEventKind::JobCompleted);
        }
    }

    /// A disk moves to another image.
    pub(super) fn move_disk(&mut self, target: &str, path: &str, format: &str) {
        let Some(disk) = self.disks.iter_mut().find(|d| d.target == target) else { return };
        if let Some(old) = disk.source.path() {
            for quote in ['\'', '"'] {
                self.xml = self.xml.replace(&format!("{quote}{old}{quote}"), &format!("{quote}{path}{quote}"));
            }
        }
        disk.source = virtward_model::DiskSource::File { path: path.to_owned() };
        disk.format = format.to_owned();
    }
}
