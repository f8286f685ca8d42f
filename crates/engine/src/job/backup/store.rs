//! Where a backup's data goes through: reading, hashing, compressing, sealing and writing, in this process or on another
//! host, a proxy.
//!
//! Everything that only the VM's own host can do (freeze, cut, thaw, the job and its checkpoint, scratch space, what is read
//! from files beside the disks) stays with the job that is run here. A proxy is given each disk as a connection to the
//! export that this host's QEMU made of it, with all that was decided of it, and answers with the record of what it stored;
//! the job here says when all is to be durable and what the restore point is.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use virtward_decide::tracking::DiskDecision;
use virtward_model::{Bytes, DiskRecord, RestorePoint};
use virtward_nbd::{Address, Client, Options, ReconnectPolicy};
use virtward_repo::{Attachment, Compression, Writer};

use super::{
    BackupOptions, Job, blocking,
    copy::{Flow, Source},
    disks,
    origin::{ALLOCATION, Origin},
};
use crate::{Cancel, Error, Observer, Phase, Result, image::raw::RawImage};

/// One disk about to be read and stored, as whoever does it must know it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskJob {
    /// What tracking allows.
    pub decision: DiskDecision,
    /// Virtual size, in bytes.
    pub size_bytes: u64,
    /// Format of the image, for the record.
    pub format: String,
    /// Where it is, for the record.
    pub source_name: String,
    /// The disk in the previous restore point; the base of what does not change.
    pub base: Option<DiskRecord>,
    /// Name of the bitmap context of the export, if only changes are read.
    pub dirty_context: Option<String>,
    /// Checkpoint that will be there for the next run.
    pub checkpoint: Option<String>,
    /// Name of its export.
    pub export: String,
}

/// How disks are read and stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// Name of the VM.
    pub subject: String,
    /// Read limit in bytes per second over all disks; none is unlimited.
    pub bandwidth: Option<Bytes>,
    /// Number of clean regions re-read to check the tracking.
    pub sample_regions: usize,
    /// How data that the repository does not have is compressed.
    pub compression: Compression,
}

/// Another host that reads and stores the data of one backup job. When it is dropped, the other host forgets all that
/// it has not published.
#[async_trait]
pub trait Proxy: Send + Sync {
    /// Its name, for people.
    fn host(&self) -> &str;

    /// Reads disks, each from the export at a socket of this host, and stores them; their records, in this order. Dropped
    /// before it is done, the reading ends.
    ///
    /// # Errors
    /// [`Error::Proxy`].
    async fn store(
        &self,
        disks: Vec<(DiskJob, PathBuf)>,
        terms: &Terms,
        observer: &dyn Observer,
    ) -> Result<Vec<DiskRecord>>;

    /// Stores the attachments and makes durable all that was stored.
    ///
    /// # Errors
    /// [`Error::Proxy`].
    async fn complete(&self, attachments: Vec<Attachment>) -> Result<()>;

    /// Makes the restore point visible.
    ///
    /// # Errors
    /// [`Error::Proxy`]; if the proxy was lost, the restore point may be there.
    async fn publish(&self, point: &RestorePoint) -> Result<()>;
}

/// The proxy's side of [`Proxy::store`]: reads disks, each over a connection to its export, and stores them.
pub async fn store_exports(
    writer: &Writer,
    exports: Vec<(DiskJob, UnixStream)>,
    terms: &Terms,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<Vec<DiskRecord>> {
    let open = |(job, connection): (DiskJob, UnixStream)| async {
        let client = Client::over(connection, job.options()).await;
        opened(client, job, &terms.subject)
    };
    let sources = futures::future::try_join_all(exports.into_iter().map(open)).await?;
    stored(writer, sources, terms, observer, cancel).await
}

/// Reads disks that are open and stores them.
async fn stored(
    writer: &Writer,
    sources: Vec<(DiskJob, Source)>,
    terms: &Terms,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<Vec<DiskRecord>> {
    let flow = Flow::new(terms.bandwidth.map(|rate| rate.get()), observer, &terms.subject, cancel);
    disks::store(writer, sources, terms.sample_regions, &flow).await
}

/// How a disk is reached on this host.
pub(super) enum Access {
    /// An export at a socket, and whether the same is there again after a connection broke.
    Export { socket: PathBuf, reconnect: ReconnectPolicy },
    /// A raw image that nobody writes to.
    Raw(Arc<RawImage>),
}

impl DiskJob {
    fn options(&self) -> Options {
        let contexts = [Some(ALLOCATION.to_owned()), self.dirty_context.clone()].into_iter().flatten().collect();
        Options { export: self.export.clone(), contexts, ..Options::default() }
    }
}

/// A disk whose export was opened, if it is the one that was meant.
fn opened(client: virtward_nbd::Result<Client>, job: DiskJob, vm: &str) -> Result<(DiskJob, Source)> {
    let target = &job.decision.target;
    let client = client.map_err(Error::nbd(format!("connect to the backup of {vm} disk {target}")))?;
    let size_bytes = client.info().size_bytes;
    let allocation = client.info().contexts.iter().any(|context| context == ALLOCATION);
    if size_bytes != job.size_bytes {
        return Err(Error::SourceGone(format!(
            "disk {target} of {vm} was {} bytes when the backup began and is {size_bytes} bytes now",
            job.size_bytes
        )));
    }
    let chunk_bytes = job.decision.chunk_bytes;
    Ok((job, Source { origin: Origin::Nbd { client, allocation }, size_bytes, chunk_bytes }))
}

async fn open(job: DiskJob, access: Access, vm: &str) -> Result<(DiskJob, Source)> {
    match access {
        Access::Export { socket, reconnect } => {
            let options = Options { reconnect, ..job.options() };
            opened(Client::connect(&Address::Unix(socket), options).await, job, vm)
        }
        Access::Raw(image) => {
            let (size_bytes, chunk_bytes) = (job.size_bytes, job.decision.chunk_bytes);
            Ok((job, Source { origin: Origin::Raw(image), size_bytes, chunk_bytes }))
        }
    }
}

/// Where the data of a job goes through.
pub(super) enum Store<'a> {
    Here(Box<Writer>),
    There(&'a dyn Proxy),
}

impl<'a> Store<'a> {
    pub(super) async fn open(job: &Job<'a>) -> Result<Self> {
        match job.proxy {
            Some(proxy) => Ok(Self::There(proxy)),
            None => {
                let writer = super::open_writer(job.repo, job.options, job.cancel).await?;
                Ok(Self::Here(Box::new(writer)))
            }
        }
    }

    /// Reads disks and stores them.
    pub(super) async fn disks(&self, job: &Job<'_>, disks: Vec<(DiskJob, Access)>) -> Result<Vec<DiskRecord>> {
        let terms = Terms::of(&job.vm.name, job.options);
        match self {
            Self::Here(writer) => {
                let open = |(disk, access)| open(disk, access, &job.vm.name);
                let sources = futures::future::try_join_all(disks.into_iter().map(open)).await?;
                job.phase(Phase::Copying);
                stored(writer, sources, &terms, job.observer, job.cancel).await
            }
            Self::There(proxy) => {
                let mut exports = Vec::new();
                for (disk, access) in disks {
                    match access {
                        Access::Export { socket, .. } => exports.push((disk, socket)),
                        Access::Raw(_) => {
                            return Err(Error::Tool("a raw image cannot be read from another host".into()));
                        }
                    }
                }
                job.phase(Phase::Copying);
                proxy.store(exports, &terms, job.observer).await
            }
        }
    }

    /// Stores the attachments and makes durable all that was stored.
    pub(super) async fn complete(self, attachments: Vec<Attachment>) -> Result<Self> {
        match self {
            Self::Here(writer) => {
                let completed = blocking(move || {
                    writer.complete(&attachments)?;
                    Ok(writer)
                });
                completed.await.map(Self::Here)
            }
            Self::There(proxy) => proxy.complete(attachments).await.map(|()| Self::There(proxy)),
        }
    }

    /// Makes the restore point visible. From here on it is acknowledged.
    pub(super) async fn publish(
        self,
        job: &Job<'_>,
        point: RestorePoint,
        attachments: Vec<Attachment>,
    ) -> Result<RestorePoint> {
        let proxy = match self {
            Self::Here(writer) => return super::publish(*writer, point, attachments).await,
            Self::There(proxy) => proxy,
        };
        if !attachments.is_empty() {
            proxy.complete(attachments).await?;
        }
        let Err(error) = proxy.publish(&point).await else { return Ok(point) };
        // It may have been done before the answer was lost.
        let (repo, id) = (job.repo.clone(), point.id);
        let listed = blocking(move || Ok(repo.points()?.points.iter().any(|point| point.id == id))).await;
        if listed.unwrap_or(false) { Ok(point) } else { Err(error) }
    }
}

impl Terms {
    /// Those of a job's options.
    fn of(vm: &str, options: &BackupOptions) -> Self {
        Self {
            subject: vm.to_owned(),
            bandwidth: options.bandwidth,
            sample_regions: options.sample_regions,
            compression: options.compression,
        }
    }
}
