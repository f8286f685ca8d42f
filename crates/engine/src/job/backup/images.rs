//! Image files that belong to no libvirt domain, in any format that QEMU reads.
//!
//! A format is never guessed from content alone: a guest that owns a raw disk can write any header into it. The file's
//! extension and its header must agree, or the operator says which it is. What else an image refers to is checked before
//! QEMU opens it (`image::chain`); a raw image refers to nothing and is read without QEMU. While an image is read, QEMU's
//! locks keep every VM from writing to it.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use uuid::Uuid;
use virtward_decide::tracking::{DiskDecision, first_chunk_bytes};
use virtward_model::{PointId, QuiesceOutcome, QuiesceRecord, RestorePoint, SourceKind, TrackingState};
use virtward_repo::Repository;

use super::{
    BackupOptions, ImageSet,
    copy::{Flow, Source},
    disks, kind_of, open_writer,
    origin::{ALLOCATION, Origin},
    publish,
    store::DiskJob,
};
use crate::{
    Cancel, Error, Event, Observer, Phase, Result,
    image::{
        chain::{self, Chain},
        raw::RawImage,
    },
    tool::{self, ImageServer},
};

/// Backs up a set of image files as one restore point.
pub(super) async fn run(
    repo: &Repository,
    set: &ImageSet,
    options: &BackupOptions,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<RestorePoint> {
    let started = Timestamp::now();
    if set.files.is_empty() {
        return Err(Error::Refused("no image file was named".into()));
    }
    observer.event(&set.name, Event::Phase(Phase::Preparing));
    let mut servers = Vec::new();
    let mut sources = Vec::new();
    let mut warnings = Vec::new();
    let mut chains = Vec::new();
    for (target, path) in targets(&set.files)? {
        let format = format_of(path, set.format.as_deref())?;
        let chain = Chain::inspect(path, &format)?;
        check(&chain, cancel).await?;
        for below in chain.backing() {
            warnings.push(format!("{target} was read together with its backing file {}", below.display()));
        }
        let (source, server) = open(path, &chain).await?;
        sources.push((disk_job(target, path, format, source.size_bytes)?, source));
        servers.extend(server);
        chains.push(chain);
    }
    let writer = open_writer(repo, options, cancel).await?;
    observer.event(&set.name, Event::Phase(Phase::Copying));
    let flow = Flow::new(options.bandwidth.map(|rate| rate.get()), observer, &set.name, cancel);
    let taken = Timestamp::now();
    let disks = disks::store(&writer, sources, 0, &flow).await?;
    for server in servers {
        server.stop().await?;
    }
    // Writers other than QEMU know nothing of its locks.
    for chain in &chains {
        chain.unchanged()?;
    }
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    observer.event(&set.name, Event::Phase(Phase::Publishing));
    let point = RestorePoint {
        id: PointId::random(),
        vm: set.name.clone(),
        vm_uuid: Uuid::nil(),
        host: hostname(),
        source: SourceKind::Image,
        kind: kind_of(&disks),
        taken,
        started,
        finished: Timestamp::now(),
        parent: None,
        quiesce: QuiesceRecord {
            requested: options.quiesce,
            outcome: QuiesceOutcome::NotNeeded,
            frozen_ms: None,
            reason: None,
        },
        disks,
        skipped: Vec::new(),
        tags: options.tags.clone(),
        warnings,
        copied_from: None,
    };
    publish(writer, point, Vec::new()).await
}

/// Opens an image and keeps writers away from it; through QEMU unless it is raw.
async fn open(path: &Path, chain: &Chain) -> Result<(Source, Option<ImageServer>)> {
    if let Some(path) = chain.raw() {
        let image = RawImage::open_locked(path)?;
        let size_bytes = image.size_bytes();
        return Ok((
            Source { origin: Origin::Raw(image.into()), size_bytes, chunk_bytes: first_chunk_bytes(size_bytes) },
            None,
        ));
    }
    let server = ImageServer::start_node(&chain.node(true)?, path, false, None).await?;
    let client = server.connect(vec![ALLOCATION.to_owned()]).await?;
    let size_bytes = client.info().size_bytes;
    let origin = Origin::Nbd { client, allocation: true };
    Ok((Source { origin, size_bytes, chunk_bytes: first_chunk_bytes(size_bytes) }, Some(server)))
}

/// QEMU reads what is missing at an image's end as zeros and reports nothing; its checker does.
async fn check(chain: &Chain, cancel: &Cancel) -> Result<()> {
    for (path, node) in chain.checkable()? {
        tokio::select! {
            result = tool::image_check(path, &node) => result?,
            () = cancel.cancelled() => return Err(Error::Cancelled),
        }
    }
    Ok(())
}

fn disk_job(target: String, path: &Path, format: String, size_bytes: u64) -> Result<DiskJob> {
    Ok(DiskJob {
        decision: DiskDecision {
            target,
            state: TrackingState::Unsupported,
            reason: Some("image files are read in full; what the repository has is not stored again".into()),
            since: None,
            keep: None,
            trackable: false,
            chunk_bytes: first_chunk_bytes(size_bytes),
        },
        size_bytes,
        format,
        source_name: tool::absolute(path)?.to_string_lossy().into_owned(),
        base: None,
        dirty_context: None,
        checkpoint: None,
        export: String::new(),
    })
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The disk name of each file: its file name, which must tell the files apart.
fn targets(files: &[PathBuf]) -> Result<Vec<(String, &Path)>> {
    let mut named: Vec<(String, &Path)> = Vec::new();
    for path in files {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some((_, other)) = named.iter().find(|(known, _)| known == &name) {
            return Err(Error::Refused(format!(
                "{} and {} have the same file name; back them up as two image sets",
                other.display(),
                path.display()
            )));
        }
        named.push((name, path));
    }
    Ok(named)
}

/// The format of an image: as given, or by extension where the header agrees.
fn format_of(path: &Path, given: Option<&str>) -> Result<String> {
    const KNOWN: [&str; 6] = ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"];
    if let Some(given) = given {
        let driver = if given == "vhd" { "vpc" } else { given };
        return match KNOWN.contains(&driver) {
            true => Ok(driver.to_owned()),
            false => {
                Err(Error::Refused(format!("{given} is not an image format; use raw, qcow2, vmdk, vhd, vhdx or vdi")))
            }
        };
    }
    let extension = path.extension().map(|ext| ext.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let named = match extension.as_str() {
        "qcow2" | "qcow" => Some("qcow2"),
        "vmdk" => Some("vmdk"),
        "vhd" | "vpc" => Some("vpc"),
        "vhdx" => Some("vhdx"),
        "vdi" => Some("vdi"),
        "raw" | "img" | "iso" | "bin" => Some("raw"),
        _ => None,
    };
    let found = chain::magic(path)?;
    match (named, found) {
        (Some(named), found) if found == named || (named == "vpc" && found == "raw") => Ok(named.to_owned()),
        (None, "raw") => Ok("raw".to_owned()),
        (named, found) => Err(Error::Refused(format!(
            "{} is called {} but its content looks like {found}; say which it is with --format",
            path.display(),
            named.map_or("nothing in particular".to_owned(), |named| format!("a {named} image"))
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, name: &str, head: &[u8]) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, head).unwrap();
        path
    }

    #[test]
    fn a_format_is_taken_from_name_and_header_together() {
        let dir = tempfile::tempdir().unwrap();
        let qcow2 = file(dir.path(), "a.qcow2", b"QFI\xfb....");
        assert_eq!(format_of(&qcow2, None).unwrap(), "qcow2");
        assert_eq!(format_of(&qcow2, Some("raw")).unwrap(), "raw");
        assert_eq!(format_of(&file(dir.path(), "disk", b"boot"), None).unwrap(), "raw");
        // A guest wrote a qcow2 header into its raw disk, hoping that a backing file of the host is read.
        let trap = file(dir.path(), "b.img", b"QFI\xfb....");
        let error = format_of(&trap, None).unwrap_err().to_string();
        assert!(error.contains("--format"), "{error}");
        assert!(format_of(&qcow2, Some("zip")).is_err());
        assert_eq!(format_of(&file(dir.path(), "c.vhd", b"....."), None).unwrap(), "vpc");
    }

    #[test]
    fn two_files_of_one_name_are_refused() {
        assert!(targets(&["/a/disk.raw".into(), "/b/disk.raw".into()]).is_err());
        assert_eq!(targets(&["/a/x.raw".into(), "/a/y.raw".into()]).unwrap().len(), 2);
    }
}
