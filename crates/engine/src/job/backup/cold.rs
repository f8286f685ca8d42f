//! A VM that is shut off: its images are read directly, by the bitmaps they hold if those are sound.
//!
//! Reading takes no lock on the images, so the VM may be started at any moment (a guest that must run is worth more than
//! a backup that must finish); a start is noticed and the run is begun again, hot. An image that somebody else has open
//! for writing, such as another host that runs the VM, is not read at all. Raw images are read as they are; the others
//! through QEMU, which is told of every file that it may open (`image::chain`).
//!
//! The bitmap for the next run is made before anything is read: whatever is written from then on is recorded.

use std::path::PathBuf;

use jiff::Timestamp;
use tokio::sync::broadcast;
use virtward_decide::tracking::{BitmapFact, DiskDecision, DiskFacts};
use virtward_hypervisor::{DomainEvent, DomainEventKind};
use virtward_model::{
    Disk, DiskRecord, DiskSource, PointId, QuiesceOutcome, QuiesceRecord, RestorePoint, SourceKind, VmState,
};
use virtward_nbd::ReconnectPolicy;

use super::{
    Job, Taken, attach, disks, quiesce,
    scratch::Scratch,
    select,
    store::{Access, DiskJob, Store},
};
use crate::{
    Error, Phase, Result,
    image::{chain::Chain, raw::RawImage},
    tool::{self, ImageServer},
};

/// One image of the VM.
struct Image {
    disk: Disk,
    path: PathBuf,
    facts: DiskFacts,
    chain: Chain,
    /// Holds the bitmap of this run.
    marked: bool,
}

/// Backs up a VM that is shut off.
pub(super) async fn run(job: &mut Job<'_>) -> Result<RestorePoint> {
    let (chosen, skipped) = select::select(&job.vm, &job.options.only_disks, &job.options.exclude_disks)?;
    let events = job.env.hypervisor.events();
    Scratch::of(job.env, job.vm.uuid).remove()?;
    quiesce::forget_leftover(job.env, job.vm.uuid);
    let attachments = attach::gather(job.env, &job.vm, &mut job.warnings).await?;
    if chosen.is_empty() {
        job.warn(format!("{} has no disk to back up; only its definition is in this restore point", job.vm.name));
    }
    let mut images = Vec::new();
    for disk in chosen {
        images.push(inspect(job, disk).await?);
    }
    let store = Store::open(job).await?;
    let id = PointId::random();
    let new = job.checkpoint_name(id);
    let outcome = take(job, &mut images, &new, id, skipped, &store, events).await;
    let outcome = match outcome {
        Ok(_) if job.cancel.is_cancelled() => Err(Error::Cancelled),
        Ok(taken) => job.publish(store, taken, attachments).await,
        Err(error) => Err(error),
    };
    job.phase(Phase::CleaningUp);
    match &outcome {
        Ok(_) => drop_older(job, &images).await,
        Err(_) => {
            for image in images.iter().filter(|image| image.marked) {
                let _ = tool::bitmap_remove(&image.path, &new).await;
            }
        }
    }
    outcome
}

async fn take(
    job: &Job<'_>,
    images: &mut [Image],
    new: &str,
    id: PointId,
    skipped: Vec<String>,
    store: &Store<'_>,
    events: broadcast::Receiver<DomainEvent>,
) -> Result<Taken> {
    let taken = Timestamp::now();
    for image in images.iter_mut() {
        mark(image, new).await?;
    }
    let facts: Vec<DiskFacts> = images.iter().map(|image| image.facts.clone()).collect();
    let decisions = disks::decide(&facts, &job.history, &job.checkpoint_prefix(), job.options.full);
    let disks = read_all(job, images, decisions, new, store, events).await?;
    still_off(job).await?;
    let quiesce = QuiesceRecord {
        requested: job.options.quiesce,
        outcome: QuiesceOutcome::NotNeeded,
        frozen_ms: None,
        reason: None,
    };
    Ok(Taken { id, source: SourceKind::Cold, taken, quiesce, disks, skipped })
}

async fn inspect(job: &Job<'_>, disk: Disk) -> Result<Image> {
    let path = match &disk.source {
        DiskSource::File { path } | DiskSource::Block { path } => PathBuf::from(path),
        other => {
            return Err(Error::Refused(format!(
                "disk {} of {} is {}; while the VM is shut off only files and block devices of this host can be read. \
                 Start {} (it may stay paused) and run this again, or leave the disk out with --exclude-disk {}",
                disk.target,
                job.vm.name,
                describe(other),
                job.vm.name,
                disk.target
            )));
        }
    };
    let chain = Chain::inspect(&path, &disk.format)?;
    let has_writer = match chain.raw() {
        Some(path) => RawImage::open(path)?.has_writer()?,
        None => tool::is_open_for_writing(&path, &disk.format).await?,
    };
    if has_writer {
        return Err(Error::Busy(format!(
            "{} of {} is open for writing although the VM is shut off here: it may run on another host, or a tool works \
             on its image. Back it up where it runs",
            path.display(),
            job.vm.name
        )));
    }
    let info = tool::image_info(&path, &disk.format).await?;
    let bitmaps = info
        .bitmaps()
        .into_iter()
        .map(|bitmap| BitmapFact {
            broken: bitmap.flags.iter().any(|flag| flag == "in-use"),
            recording: bitmap.flags.iter().any(|flag| flag == "auto"),
            name: bitmap.name,
        })
        .collect();
    let facts = DiskFacts {
        target: disk.target.clone(),
        size_bytes: info.virtual_size,
        untrackable: info.untrackable(),
        bitmaps,
    };
    Ok(Image { disk, path, facts, chain, marked: false })
}

fn describe(source: &DiskSource) -> String {
    match source {
        DiskSource::Network { protocol, name } => format!("reached over the network ({protocol} {name})"),
        DiskSource::Volume { pool, volume } => format!("volume {volume} of pool {pool}"),
        _ => "not a file".to_owned(),
    }
}

async fn read_all(
    job: &Job<'_>,
    images: &[Image],
    decisions: Vec<DiskDecision>,
    new: &str,
    store: &Store<'_>,
    events: broadcast::Receiver<DomainEvent>,
) -> Result<Vec<DiskRecord>> {
    let mut servers = Vec::new();
    let mut disks = Vec::new();
    for (image, decision) in images.iter().zip(decisions) {
        let (server, disk) = open(job, image, decision, new).await?;
        servers.extend(server);
        disks.push(disk);
    }
    let records = tokio::select! {
        records = store.disks(job, disks) => records?,
        error = started(job, events) => return Err(error),
    };
    for image in images {
        image.chain.unchanged()?;
    }
    for server in servers {
        server.stop().await?;
    }
    Ok(records)
}

async fn open(
    job: &Job<'_>,
    image: &Image,
    decision: DiskDecision,
    new: &str,
) -> Result<(Option<ImageServer>, (DiskJob, Access))> {
    let dirty_context = decision.since.as_deref().map(virtward_nbd::dirty_bitmap);
    let (server, access) = match image.chain.raw() {
        // A proxy is served what this host would read by itself.
        Some(path) if job.proxy.is_none() => (None, Access::Raw(RawImage::open(path)?.into())),
        _ => {
            let bitmap = decision.since.as_deref();
            let server = ImageServer::start_node(&image.chain.node(false)?, &image.path, false, bitmap).await?;
            let access = Access::Export { socket: server.socket().to_owned(), reconnect: ReconnectPolicy::default() };
            (Some(server), access)
        }
    };
    let disk_job = DiskJob {
        // In sectors: what a guest sees of a file that ends in the middle of one is filled up with zeros.
        size_bytes: image.facts.size_bytes,
        format: image.disk.format.clone(),
        source_name: image.path.to_string_lossy().into_owned(),
        base: disks::previous_disk(&job.history, &image.disk.target).map(|(_, record)| record),
        dirty_context,
        checkpoint: image.marked.then(|| new.to_owned()),
        export: String::new(),
        decision,
    };
    Ok((server, (disk_job, access)))
}

async fn started(job: &Job<'_>, mut events: broadcast::Receiver<DomainEvent>) -> Error {
    loop {
        tokio::select! {
            () = job.cancel.cancelled() => return Error::Cancelled,
            event = events.recv() => match event {
                Ok(event) if event.uuid == job.vm.uuid && matches!(event.kind, DomainEventKind::Started { .. }) => {
                    return Error::SourceGone(format!("{} was started during the backup", job.vm.name));
                }
                Err(broadcast::error::RecvError::Closed) => std::future::pending::<()>().await,
                _ => {}
            }
        }
    }
}

async fn still_off(job: &Job<'_>) -> Result<()> {
    let context = || format!("look at {} again", job.vm.name);
    let vm = job.env.hypervisor.lookup(&job.vm.uuid.to_string()).await.map_err(Error::hyper(context()))?;
    match vm.state {
        VmState::ShutOff => Ok(()),
        _ => Err(Error::SourceGone(format!("{} was started during the backup", job.vm.name))),
    }
}

/// Makes the bitmap for the next run, on an image that can hold one. From here on a start of the VM loses nothing: its
/// writes are recorded.
async fn mark(image: &mut Image, new: &str) -> Result<()> {
    if image.facts.untrackable.is_some() {
        return Ok(());
    }
    match tool::bitmap_add(&image.path, new).await {
        Ok(()) => image.marked = true,
        Err(error) => tracing::debug!(path = %image.path.display(), %error, "no bitmap for the next run"),
    }
    // Our own change is none of the guest's.
    image.chain = Chain::inspect(&image.path, &image.disk.format)?;
    Ok(())
}

/// Drops the bitmaps of ours that were there before, and what the hypervisor believes of them.
async fn drop_older(job: &Job<'_>, images: &[Image]) {
    let prefix = job.checkpoint_prefix();
    for image in images {
        for bitmap in image.facts.bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(&prefix)) {
            if let Err(error) = tool::bitmap_remove(&image.path, &bitmap.name).await {
                tracing::debug!(%error, "an old bitmap stays until the next run");
            }
        }
    }
    let known = job.env.hypervisor.checkpoints(job.vm.uuid).await.unwrap_or_default();
    for checkpoint in known.iter().filter(|known| known.name.starts_with(&prefix)) {
        let _ = job.env.hypervisor.checkpoint_delete(job.vm.uuid, &checkpoint.name, true).await;
    }
}
